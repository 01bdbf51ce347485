//! A browser for logins, without its page: cookies, redirects, forms, and the
//! headers by which servers tell a navigation from a script's request.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::jar::{Cookie, Jar, Reach};
use super::url::{self, Url};
use super::{DEADLINE, Io, Node, tls_connect, trusting};

/// Where a host and port are reached by the so-manieth request, counted from 0.
pub type Resolve = Arc<dyn Fn(&str, u16, usize) -> SocketAddr + Send + Sync>;

/// What its requests look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// The tab goes there.
    Navigation,
    /// A script of the page asks.
    Fetch,
    /// As a program that is no browser: no header of its own but cookies.
    Bare,
}

/// A browser; a clone of it has the same cookies from there on its own.
#[derive(Clone)]
pub struct Browser {
    pub jar: Jar,
    pub manner: Manner,
    /// The page that begins what comes next; none as typed by its user.
    pub from: Option<Url>,
    tls: Arc<ClientConfig>,
    resolve: Resolve,
    asked: usize,
}

/// An answer, and how it was come by.
#[derive(Debug, Clone)]
pub struct Answer {
    pub method: Method,
    pub url: Url,
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
    /// What went with the request.
    pub sent: HeaderMap,
    request_body: Vec<u8>,
    chain: Chain,
}

/// A request and the redirects that it came by.
#[derive(Debug, Clone)]
struct Chain {
    from: Option<Url>,
    policy: String,
    urls: Vec<Url>,
}

impl Answer {
    /// The first header of this name; empty where there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or("")
    }

    /// All Set-Cookie lines.
    pub fn set_cookies(&self) -> Vec<String> {
        let lines = self.headers.get_all("set-cookie").iter();
        lines.map(|line| String::from_utf8_lossy(line.as_bytes()).into_owned()).collect()
    }

    /// Where it redirects to, if it does.
    pub fn location(&self) -> Option<Url> {
        let redirects = matches!(self.status, 301 | 302 | 303 | 307 | 308);
        let location = self.headers.get("location").filter(|_| redirects)?;
        Some(self.url.join(location.to_str().unwrap()))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Null where it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// Its forms, in order.
    pub fn forms(&self) -> Vec<Form> {
        let text = self.text();
        let tags = tags(&text);
        let mut forms = Vec::new();
        for (name, attributes) in tags {
            let of = |wanted: &str| attributes.iter().find(|(n, _)| n == wanted).map(|(_, v)| v.clone());
            match name.as_str() {
                "form" => {
                    let action = self.url.join(&of("action").unwrap_or_default());
                    let method = of("method").unwrap_or_default().to_ascii_uppercase();
                    forms.push(Form { action, post: method == "POST", fields: Vec::new() });
                }
                "input" => {
                    let kind = of("type").unwrap_or_default();
                    // A box that is not ticked and a button that is not pressed say nothing.
                    let silent = matches!(kind.as_str(), "checkbox" | "radio") && of("checked").is_none();
                    let silent = silent || matches!(kind.as_str(), "submit" | "button" | "reset" | "image");
                    if let (Some(form), Some(name), false) = (forms.last_mut(), of("name"), silent) {
                        form.fields.push((name, of("value").unwrap_or_default()));
                    }
                }
                _ => {}
            }
        }
        forms
    }

    /// Its only form.
    pub fn form(&self) -> Form {
        let forms = self.forms();
        assert_eq!(forms.len(), 1, "forms of {} ({}):\n{}", self.url, self.status, self.text());
        forms.into_iter().next().unwrap()
    }
}

/// A form of a page as it stands filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Form {
    pub action: Url,
    pub post: bool,
    pub fields: Vec<(String, String)>,
}

impl Form {
    /// With this field filled in, or this button pressed.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        match self.fields.iter_mut().find(|(n, _)| n == name) {
            Some(field) => value.clone_into(&mut field.1),
            None => self.fields.push((name.to_owned(), value.to_owned())),
        }
        self
    }

    /// What this field holds.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }
}

impl Browser {
    /// One that trusts these CAs (PEM) alone and finds hosts by `resolve`.
    pub fn new(ca_pem: &[u8], resolve: impl Fn(&str, u16, usize) -> SocketAddr + Send + Sync + 'static) -> Self {
        let tls = trusting(ca_pem, &["http/1.1"]);
        Self { jar: Jar::default(), manner: Manner::Navigation, from: None, tls, resolve: Arc::new(resolve), asked: 0 }
    }

    /// One whose names are all of this node; addresses are what they are.
    pub fn at(node: &Node) -> Self {
        let ip = node.ip;
        Self::new(&std::fs::read(node.ca()).unwrap(), move |host, port, _| {
            SocketAddr::new(host.parse().unwrap_or(ip), port)
        })
    }

    /// One that goes to addresses alone.
    pub fn of_addresses() -> Self {
        Self::new(b"", |host, port, _| SocketAddr::new(host.parse().expect("an address"), port))
    }

    /// Finds hosts by this from now on.
    pub fn resolve_by(&mut self, resolve: impl Fn(&str, u16, usize) -> SocketAddr + Send + Sync + 'static) {
        self.resolve = Arc::new(resolve);
    }

    /// How many requests it has made.
    pub fn asked(&self) -> usize {
        self.asked
    }

    pub fn cookie(&self, host: &str, name: &str) -> Option<&Cookie> {
        self.jar.get(host, name)
    }

    /// Its user types this URL; one answer, redirects are not followed.
    pub async fn get(&mut self, url: &str) -> Answer {
        self.request("GET", url, &[], b"").await
    }

    /// A page of the same site sends a form (`from` says otherwise).
    pub async fn post_form(&mut self, url: &str, fields: &[(&str, &str)]) -> Answer {
        let form = [("content-type", "application/x-www-form-urlencoded")];
        let before = self.from.clone();
        if self.manner != Manner::Bare {
            self.from.get_or_insert_with(|| Url::parse(url));
        }
        let answer = self.request("POST", url, &form, url::form(fields).as_bytes()).await;
        self.from = before;
        answer
    }

    /// Sends a form of a page; that page begins it, with its referrer policy.
    pub async fn submit(&mut self, page: &Answer, form: &Form) -> Answer {
        let query = url::form(&form.fields);
        let chain = Chain::of(Some(page.url.clone()), page.header("referrer-policy"));
        if form.post {
            let headers = [("content-type", "application/x-www-form-urlencoded")];
            return self.send(chain, Method::POST, &form.action, &headers, query.as_bytes()).await.unwrap();
        }
        let to = form.action.join(&format!("?{query}"));
        self.send(chain, Method::GET, &to, &[], b"").await.unwrap()
    }

    /// Follows a link of a page.
    pub async fn click(&mut self, page: &Answer, href: &str) -> Answer {
        let chain = Chain::of(Some(page.url.clone()), page.header("referrer-policy"));
        self.send(chain, Method::GET, &page.url.join(href), &[], b"").await.unwrap()
    }

    /// Any request; these headers are set over its own.
    pub async fn request(&mut self, method: &str, url: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        self.try_request(method, url, headers, body).await.unwrap()
    }

    /// The same; tells where no answer came.
    pub async fn try_request(
        &mut self,
        method: &str,
        url: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<Answer, String> {
        let chain = Chain::of(self.from.clone(), "");
        self.send(chain, method.parse().unwrap(), &Url::parse(url), headers, body).await
    }

    /// Types this URL and follows at most `max` redirects: all answers in order.
    pub async fn follow(&mut self, url: &str, max: usize) -> Vec<Answer> {
        let first = self.get(url).await;
        self.follow_on(first, max).await
    }

    /// Follows on from an answer: that one first, then all others.
    pub async fn follow_on(&mut self, first: Answer, max: usize) -> Vec<Answer> {
        self.follow_while(first, max, |_| true).await
    }

    /// The same, while the next URL is one to go to.
    pub async fn follow_while(&mut self, first: Answer, max: usize, goes: impl Fn(&Url) -> bool) -> Vec<Answer> {
        let mut hops = vec![first];
        while hops.len() <= max {
            let Some(next) = hops.last().unwrap().location().filter(&goes) else { break };
            let next = self.redirected(hops.last().unwrap(), &next).await;
            hops.push(next);
        }
        hops
    }

    /// The request that an answer redirects to.
    async fn redirected(&mut self, answer: &Answer, to: &Url) -> Answer {
        let mut chain = answer.chain.clone();
        if !answer.header("referrer-policy").is_empty() {
            answer.header("referrer-policy").clone_into(&mut chain.policy);
        }
        let kept = matches!(answer.status, 307 | 308) || matches!(answer.method, Method::GET | Method::HEAD);
        if !kept {
            return self.send(chain, Method::GET, to, &[], b"").await.unwrap();
        }
        let kind = answer.sent.get("content-type").map(|v| ("content-type", v.to_str().unwrap()));
        self.send(chain, answer.method.clone(), to, kind.as_slice(), &answer.request_body).await.unwrap()
    }

    fn same_site(&self, a: &Url, b: &Url) -> bool {
        a.is_secure() == b.is_secure() && self.jar.site(&a.host) == self.jar.site(&b.host)
    }

    async fn send(
        &mut self,
        mut chain: Chain,
        method: Method,
        url: &Url,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<Answer, String> {
        chain.urls.push(url.clone());
        // As in Chromium, who began it decides, and not by which redirects it came.
        let cross = chain.from.as_ref().is_some_and(|from| !self.same_site(from, url));
        let safe = matches!(method, Method::GET | Method::HEAD);
        let reach = match (cross, self.manner, safe) {
            (false, ..) => Reach::SameSite,
            (true, Manner::Fetch, _) => Reach::CrossFetch,
            (true, _, true) => Reach::CrossNavigation,
            (true, _, false) => Reach::CrossPost,
        };
        let mut sent = HeaderMap::new();
        let mut set = |name: &str, value: &str| {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            sent.insert(name, HeaderValue::from_str(value).unwrap());
        };
        set("host", &url.authority());
        if self.manner != Manner::Bare {
            self.own_headers(&chain, &method, url, &mut set);
        }
        if let Some(cookies) = self.jar.header(url, reach) {
            set("cookie", &cookies);
        }
        if !body.is_empty() || !safe {
            set("content-length", &body.len().to_string());
        }
        for (name, value) in headers {
            set(name, value);
        }
        let mut request = Request::new(Full::new(Bytes::copy_from_slice(body)));
        *request.method_mut() = method.clone();
        *request.uri_mut() = url.path_query.parse().map_err(|e| format!("{url}: {e}"))?;
        *request.headers_mut() = sent.clone();
        let addr = (self.resolve)(&url.host, url.port, self.asked);
        self.asked += 1;
        let asking = ask(addr, url, Arc::clone(&self.tls), request);
        let (parts, body_got) = match tokio::time::timeout(DEADLINE, asking).await {
            Ok(got) => got.map_err(|why| format!("{url} at {addr}: {why}"))?,
            Err(_) => return Err(format!("{url} at {addr}: not within {DEADLINE:?}")),
        };
        let (status, request_body) = (parts.status.as_u16(), body.to_vec());
        let answer = Answer {
            method,
            url: url.clone(),
            status,
            headers: parts.headers,
            body: body_got,
            sent,
            request_body,
            chain,
        };
        for line in answer.set_cookies() {
            if let Err(why) = self.jar.take(url, &line, reach) {
                eprintln!("{url}: cookie refused ({why}): {line}");
            }
        }
        Ok(answer)
    }

    /// What Chromium adds by itself.
    fn own_headers(&self, chain: &Chain, method: &Method, url: &Url, set: &mut impl FnMut(&str, &str)) {
        let navigation = self.manner == Manner::Navigation;
        set("user-agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/156.0.0.0 Safari/537.36");
        set("accept-language", "en-US,en;q=0.9");
        if navigation {
            set("accept", "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8");
            set("upgrade-insecure-requests", "1");
        } else {
            set("accept", "*/*");
        }
        if let Some(referer) = chain.referer() {
            set("referer", &referer);
        }
        let to_another_origin = chain.from.as_ref().is_some_and(|from| from.origin() != url.origin());
        let wants_origin = !matches!(*method, Method::GET | Method::HEAD) || (!navigation && to_another_origin);
        if let (Some(from), true) = (&chain.from, wants_origin) {
            // Fetch, "append a request Origin header": by a page's policy it may be null.
            let hidden = match chain.policy.as_str() {
                "no-referrer" => navigation || !to_another_origin,
                "same-origin" => navigation && to_another_origin,
                _ => navigation && from.is_secure() && !url.is_secure(),
            };
            let crossed =
                chain.urls.windows(2).any(|w| w[0].origin() != w[1].origin() && w[0].origin() != from.origin());
            let origin = if hidden || crossed { "null".to_owned() } else { from.origin() };
            set("origin", &origin);
        }
        // Only where it is safe to tell.
        if !url.is_secure() && !url.host.ends_with("localhost") && !url.host.starts_with("127.") {
            return;
        }
        set("sec-fetch-site", self.fetch_site(chain));
        set("sec-fetch-mode", if navigation { "navigate" } else { "cors" });
        set("sec-fetch-dest", if navigation { "document" } else { "empty" });
        if navigation {
            set("sec-fetch-user", "?1");
        }
    }

    /// The worst of all URLs that it came by.
    fn fetch_site(&self, chain: &Chain) -> &'static str {
        let Some(from) = &chain.from else { return "none" };
        if chain.urls.iter().all(|url| url.origin() == from.origin()) {
            "same-origin"
        } else if chain.urls.iter().all(|url| self.same_site(from, url)) {
            "same-site"
        } else {
            "cross-site"
        }
    }

    /// Walks oidc-provider's pages from an authorization URL on: logs in and
    /// consents where it is asked to. The answer is the redirect that leaves the
    /// provider, not yet followed.
    pub async fn login_at_op(&mut self, url: &str, login: &str) -> Answer {
        let first = self.get(url).await;
        self.login_on_op(first, login).await
    }

    /// The same from an answer on: a page of the provider's, or a redirect to one.
    pub async fn login_on_op(&mut self, first: Answer, login: &str) -> Answer {
        let mut answer = first;
        // A redirect to the provider has not reached it yet.
        let there =
            |answer: &Answer| answer.url.path().starts_with("/auth") || answer.url.path().starts_with("/interaction");
        while !there(&answer) {
            let next =
                answer.location().unwrap_or_else(|| panic!("{} is no provider's: {}", answer.url, answer.text()));
            answer = self.redirected(&answer, &next).await;
        }
        let provider = answer.url.origin();
        for _ in 0..12 {
            if let Some(next) = answer.location() {
                if next.origin() != provider {
                    return answer;
                }
                answer = self.redirected(&answer, &next).await;
                continue;
            }
            assert_eq!(answer.status, 200, "{}: {}", answer.url, answer.text());
            let form = answer.forms().into_iter().next().unwrap_or_else(|| panic!("no form: {}", answer.text()));
            let form = match form.field("prompt") {
                Some("login") => form.with("login", login).with("password", "any"),
                Some("consent") => form,
                _ => panic!("an unknown page at {}: {}", answer.url, answer.text()),
            };
            answer = self.submit(&answer, &form).await;
        }
        panic!("the provider's pages have no end: {}", answer.url);
    }

    /// The like for the broker of SAML, whose provider asks nothing: it sends a form
    /// that scripts submit.
    pub async fn login_at_saml(&mut self, url: &str) -> Answer {
        let asked = self.follow(url, 10).await.pop().unwrap();
        assert_eq!(asked.status, 200, "{}: {}", asked.url, asked.text());
        self.submit(&asked, &asked.form()).await
    }

    /// The like for glewlwyd, whose pages are a script that calls its API.
    pub async fn login_at_glewlwyd(&mut self, url: &str, user: &str, password: &str) -> Answer {
        let first = self.get(url).await;
        let mut hops = self.follow_while(first, 10, |next| !next.path().ends_with("/login.html")).await;
        let asked = hops.pop().unwrap();
        let login = asked.location().unwrap_or_else(|| panic!("{}: {} {}", asked.url, asked.status, asked.text()));
        let page = self.redirected(&asked, &login).await;
        let api = format!("{}/api", login.origin());
        let (client, scope) = (login.field("client_id").unwrap(), login.field("scope").unwrap());
        let (manner, from) = (std::mem::replace(&mut self.manner, Manner::Fetch), self.from.replace(login.clone()));
        let json_type = [("content-type", "application/json")];
        let credentials = json!({"username": user, "password": password}).to_string();
        let done = self.request("POST", &format!("{api}/auth/"), &json_type, credentials.as_bytes()).await;
        assert_eq!(done.status, 200, "glewlwyd's login: {}", done.text());
        let grant = json!({"scope": scope}).to_string();
        let done = self.request("PUT", &format!("{api}/auth/grant/{client}"), &json_type, grant.as_bytes()).await;
        assert_eq!(done.status, 200, "glewlwyd's consent: {}", done.text());
        (self.manner, self.from) = (manner, from);
        self.click(&page, &format!("{}&g_continue", login.field("callback_url").unwrap())).await
    }
}

impl Chain {
    fn of(from: Option<Url>, policy: &str) -> Self {
        Self { from, policy: policy.to_owned(), urls: Vec::new() }
    }

    /// By the policy that browsers start from, or the two that send less; what a
    /// redirect has cut stays cut.
    fn referer(&self) -> Option<String> {
        let from = self.from.as_ref()?;
        let same = self.urls.iter().all(|url| url.origin() == from.origin());
        match self.policy.as_str() {
            "no-referrer" => None,
            "same-origin" if !same => None,
            _ if from.is_secure() && self.urls.iter().any(|url| !url.is_secure()) => None,
            _ if same => Some(from.to_string()),
            _ => Some(format!("{}/", from.origin())),
        }
    }
}

async fn ask(
    addr: SocketAddr,
    url: &Url,
    tls: Arc<ClientConfig>,
    request: Request<Full<Bytes>>,
) -> Result<(hyper::http::response::Parts, Bytes), String> {
    let io: Io = if url.is_secure() {
        tls_connect(addr, &url.host, tls).await.map_err(|e| e.to_string())?
    } else {
        Box::new(TcpStream::connect(addr).await.map_err(|e| e.to_string())?)
    };
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(io)).await.map_err(|e| e.to_string())?;
    let connection = tokio::spawn(connection);
    let answer = sender.send_request(request).await.map_err(|e| e.to_string())?;
    let (parts, body) = answer.into_parts();
    let body = body.collect().await.map_err(|e| e.to_string())?.to_bytes();
    connection.abort();
    Ok((parts, body))
}

/// Every opening tag of a page with its attributes, as plain pages write them.
fn tags(html: &str) -> Vec<(String, Vec<(String, String)>)> {
    let mut found = Vec::new();
    let mut rest = html;
    while let Some(at) = rest.find('<') {
        rest = &rest[at + 1..];
        let name: String = rest.chars().take_while(char::is_ascii_alphanumeric).collect();
        rest = &rest[name.len()..];
        if name.is_empty() {
            continue;
        }
        let mut attributes = Vec::new();
        loop {
            rest = rest.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == '/');
            let key: String = rest.chars().take_while(|c| !c.is_ascii_whitespace() && !"=>/".contains(*c)).collect();
            rest = &rest[key.len()..];
            if key.is_empty() {
                break;
            }
            let Some(value) = rest.trim_start().strip_prefix('=') else {
                attributes.push((key.to_ascii_lowercase(), String::new()));
                continue;
            };
            let value = value.trim_start();
            let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''));
            let (value, after) = match quote {
                Some(quote) => value[1..].split_once(quote).unwrap_or((&value[1..], "")),
                None => {
                    value.split_at(value.find(|c: char| c.is_ascii_whitespace() || c == '>').unwrap_or(value.len()))
                }
            };
            attributes.push((key.to_ascii_lowercase(), unescaped(value)));
            rest = after;
        }
        found.push((name.to_ascii_lowercase(), attributes));
    }
    found
}

/// Character references as servers write them in attributes.
fn unescaped(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out += &rest[..at];
        rest = &rest[at..];
        let Some(end) = rest.find(';').filter(|end| *end < 10) else {
            out.push('&');
            rest = &rest[1..];
            continue;
        };
        let code = &rest[1..end];
        let hex = code.strip_prefix("#x").or_else(|| code.strip_prefix("#X"));
        let number = hex.map(|h| u32::from_str_radix(h, 16).ok());
        let number = number.or_else(|| code.strip_prefix('#').map(|n| n.parse().ok())).flatten();
        let character = match code {
            "amp" => Some('&'),
            "lt" => Some('<'),
            "gt" => Some('>'),
            "quot" => Some('"'),
            "apos" => Some('\''),
            _ => number.and_then(char::from_u32),
        };
        match character {
            Some(character) => out.push(character),
            None => out += &rest[..=end],
        }
        rest = &rest[end + 1..];
    }
    out + rest
}
