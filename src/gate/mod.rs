//! What a visitor must pass before anything of theirs reaches an origin: addresses,
//! passwords, tokens of programs, logins. **Begin at** `Gates::admit`: a request,
//! top to bottom. How one logs in is `login`'s and out `logout`'s, what a login is
//! worth `session`'s, what the origin is told `assertion`'s. Knows nothing of
//! connections.

mod assertion;
mod cookies;
pub mod identity;
mod live;
mod login;
mod logout;
mod opened;
mod pages;
mod passwords;
mod paths;
pub mod providers;
mod seen;
mod session;
mod settings;
mod steps;
mod who;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::{constant_time, digest};
use data_encoding::BASE64;
use hyper::header::{
    ACCEPT, ACCESS_CONTROL_REQUEST_METHOD, AUTHORIZATION, CACHE_CONTROL, HeaderMap, HeaderName, HeaderValue, ORIGIN,
    RETRY_AFTER, WWW_AUTHENTICATE,
};
use hyper::{Method, StatusCode, Uri};
use minijinja::context;
use tokio_util::sync::CancellationToken;

pub use self::assertion::strip;
pub use self::live::Held;
pub use self::pages::Reply;
pub use self::passwords::Checked;
pub use self::settings::GateSettings;
pub use self::who::Who;

use self::assertion::Assertions;
use self::live::{Entry, Live};
use self::login::{Destination, Stepped};
use self::opened::Opened;
use self::pages::Pages;
use self::passwords::Passwords;
use self::paths::Found;
use self::providers::Providers;
use self::seen::Seen;
use self::session::{Denied, Session};
use crate::error::Error;
use crate::feed::records::{Condition, Records};
use crate::fields::Base64;
use crate::limits::Rates;
use crate::logins::Logins;
use crate::logins::seal::{Place, Purpose};
use crate::model::gate::{Asks, Gate, PathRule};
use crate::model::identity::{Email, Moment, SealingKey};
use crate::model::{Keyring, KeyringId, SocketId};
use crate::routes::{Route, Routes};

/// A program's token.
const SERVICE_TOKEN: HeaderName = HeaderName::from_static("adit-service-token");
/// What paths of ours begin with, on the auth host and on sockets with logins.
pub const OURS: &str = "/.adit/";
/// Lines of the audit about who was denied, per second.
const AUDIT_LINES: f64 = 100.0;
/// Logouts that one provider's address may tell per second.
const LOGOUTS: f64 = 100.0;
/// Longest body of a form of ours, in bytes.
pub const FORM_MAX: usize = 16 << 10;
/// How long a form of ours may take to come.
pub const FORM_WAIT: Duration = Duration::from_secs(10);
/// Longest credentials that are looked at, in bytes.
const CREDENTIALS_MAX: usize = 2048;

/// A request, as far as a gate looks at it.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// The socket that it is for; none: the auth host.
    pub route: Option<&'a Arc<Route>>,
    /// The host that it is for, in its one form.
    pub host: &'a str,
    /// The authority as it was sent, with its port.
    pub authority: &'a str,
    /// Its method.
    pub method: &'a Method,
    /// Path and query, as they were sent.
    pub target: &'a Uri,
    /// Its fields.
    pub headers: &'a HeaderMap,
    /// From where.
    pub ip: IpAddr,
    /// Whether it came by HTTPS.
    pub secure: bool,
    /// Whether it wants to become another protocol.
    pub upgrade: bool,
    /// Whether it has no body.
    pub empty: bool,
    /// Its id.
    pub id: &'a HeaderValue,
}

impl Asked<'_> {
    fn id(&self) -> Option<&str> {
        self.id.to_str().ok()
    }

    /// Whether a form of ours was sent by our own page: browsers say where a POST
    /// comes from.
    fn is_own_form(&self) -> bool {
        let says = self.headers.contains_key(ORIGIN) || self.headers.contains_key("sec-fetch-site");
        says && !self.is_foreign(&[])
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// Whether a person's browser goes there: one whom a redirect to a login helps.
    /// Programs, scripts of pages, prefetches, frames and what has a body are not.
    fn navigates(&self) -> bool {
        let plain = matches!(*self.method, Method::GET | Method::HEAD)
            && !self.upgrade
            && self.header("sec-purpose").is_none_or(|purpose| !purpose.contains("prefetch"))
            && self.header("purpose").is_none_or(|purpose| purpose != "prefetch")
            && self.header("x-requested-with").is_none()
            && self.header("content-type").is_none_or(|kind| !kind.starts_with("application/grpc"));
        plain
            && match (self.header("sec-fetch-mode"), self.header("sec-fetch-dest")) {
                (Some(mode), dest) => mode == "navigate" && dest.is_none_or(|dest| dest == "document"),
                (None, _) => {
                    self.headers.get(ACCEPT).and_then(|a| a.to_str().ok()).is_some_and(|a| a.contains("text/html"))
                }
            }
    }

    fn is_framed(&self) -> bool {
        *self.method == Method::GET
            && self.header("sec-fetch-mode") == Some("navigate")
            && self.header("sec-fetch-dest").is_some_and(|dest| matches!(dest, "iframe" | "frame" | "embed" | "object"))
    }

    /// Whether a page of another origin makes the browser send this: browsers say
    /// so in one of two ways, and programs in none.
    fn is_foreign(&self, allowed: &[crate::model::gate::Origin]) -> bool {
        let own = |origin: &str| {
            let authority = self.authority.to_ascii_lowercase();
            let usual = authority.strip_suffix(":443").unwrap_or(&authority);
            origin.strip_prefix("https://").is_some_and(|from| from == usual || from == authority)
                || allowed.iter().any(|one| one.0 == origin)
        };
        match (self.headers.get(ORIGIN), self.header("sec-fetch-site")) {
            (Some(origin), _) => !origin.to_str().is_ok_and(|origin| own(&origin.to_ascii_lowercase())),
            (None, Some(site)) => !matches!(site, "same-origin" | "none"),
            (None, None) => false,
        }
    }
}

/// What comes of a request at the gate.
#[derive(Debug)]
pub enum Verdict {
    /// It goes on to the origin.
    Passes(Pass),
    /// The gate answers it.
    Answers(Reply),
    /// It is refused, in whatever form its sender reads.
    Refuses {
        /// Why.
        error: Error,
        /// Fields of the answer: how to do better.
        headers: HeaderMap,
    },
}

/// What comes of a request for the gate itself.
enum Served {
    Reply(Reply),
    Refused(Error),
}

impl Served {
    fn nothing() -> Self {
        Self::Reply(Reply::json(StatusCode::NOT_FOUND, &serde_json::json!({ "error": "not_found" })))
    }
}

impl From<Reply> for Served {
    fn from(reply: Reply) -> Self {
        Self::Reply(reply)
    }
}

impl From<Stepped> for Served {
    fn from(stepped: Stepped) -> Self {
        Self::Reply(stepped.unwrap_or_else(|stopped| *stopped))
    }
}

/// What goes with a request that passes.
#[derive(Debug)]
pub struct Pass {
    who: Who,
    /// Held against the rules while it runs.
    pub held: Held,
    reseal: Option<HeaderValue>,
    /// Whether a password in `Authorization` is for us alone.
    own_password: bool,
    /// Let through by what it is, not by whose it is: nothing of theirs goes with it.
    preflight: bool,
    asks_identity: bool,
}

impl Pass {
    fn open(held: Held) -> Self {
        let who = Who::Nobody;
        Self { who, held, reseal: None, own_password: false, preflight: false, asks_identity: false }
    }

    /// Changes the head of the origin's answer: it cannot set a cookie of ours.
    pub fn answered(&self, headers: &mut HeaderMap) {
        if self.asks_identity {
            cookies::keep_ours(headers);
        }
        if let Some(line) = &self.reseal {
            headers.append(hyper::header::SET_COOKIE, line.clone());
        }
    }
}

/// Who waits at all gates of a node.
pub struct Gates {
    settings: GateSettings,
    logins: Arc<Logins>,
    routes: Arc<Routes>,
    records: Arc<Records>,
    pages: Pages,
    passwords: Passwords,
    assertions: Assertions,
    opened: Opened,
    providers: Providers,
    live: Arc<Live>,
    /// What was used, and may be once.
    seen: Seen,
    begun_by_address: Rates<IpAddr>,
    begun_at_socket: Rates<String>,
    logged_out_by: Rates<IpAddr>,
    exempt_loopback: bool,
    /// Lines of the audit about who was denied.
    audit: Rates<()>,
    /// The port that URLs name, "" where it is the usual one.
    port: String,
    /// The URL of the auth host: whom origins know the tokens by.
    issuer: String,
}

/// What the gate is made of.
pub struct Parts {
    /// What logins rest on.
    pub logins: Arc<Logins>,
    /// Which socket answers to a name.
    pub routes: Arc<Routes>,
    /// Where revocations and a keyring are written.
    pub records: Arc<Records>,
    /// The port that visitors reach by HTTPS.
    pub public_https_port: u16,
    /// Whether limits of addresses leave loopback out.
    pub exempt_loopback: bool,
}

impl Gates {
    /// The gates of a node.
    ///
    /// # Errors
    /// Templates that cannot be used.
    pub fn new(settings: GateSettings, parts: Parts) -> Result<Arc<Self>, String> {
        let (address, socket) = (f64::from(settings.logins_per_address), f64::from(settings.logins_per_socket));
        let port = if parts.public_https_port == 443 { String::new() } else { format!(":{}", parts.public_https_port) };
        let host = settings.host.as_ref().map_or("", |host| host.as_str());
        let issuer = format!("https://{host}{port}");
        Ok(Arc::new(Self {
            pages: Pages::read(settings.pages.as_deref())?,
            passwords: Passwords::new(&settings, parts.exempt_loopback)?,
            assertions: Assertions::default(),
            opened: Opened::default(),
            providers: Providers::new(settings.providers.clone())?,
            live: Arc::default(),
            seen: Seen::default(),
            begun_by_address: Rates::new(address / 60.0, address),
            begun_at_socket: Rates::new(socket / 60.0, socket),
            logged_out_by: Rates::new(LOGOUTS, LOGOUTS * 10.0),
            exempt_loopback: parts.exempt_loopback,
            audit: Rates::new(AUDIT_LINES, AUDIT_LINES * 10.0),
            port,
            issuer,
            logins: parts.logins,
            routes: parts.routes,
            records: parts.records,
            settings,
        }))
    }

    /// Gates over these routes that know of no logins.
    #[cfg(test)]
    pub(crate) fn over(routes: Arc<Routes>) -> Arc<Self> {
        let store = crate::feed::store::Store::in_memory(Default::default()).unwrap();
        let records = Arc::new(Records::new(store, Default::default()));
        let parts = Parts { logins: Arc::default(), routes, records, public_https_port: 443, exempt_loopback: true };
        Self::new(GateSettings::default(), parts).unwrap()
    }

    /// Whether a request is for the gate itself: then `serve` answers it, once its
    /// body is there.
    pub fn is_ours(&self, asked: &Asked<'_>) -> bool {
        match asked.route {
            None => true,
            Some(route) => {
                let logs_in = route.socket.gate.as_ref().is_some_and(|gate| gate.oidc.is_some());
                logs_in && asked.secure && asked.target.path().starts_with(OURS)
            }
        }
    }

    /// Whether this is the host where visitors log in.
    pub fn is_auth_host(&self, host: &str) -> bool {
        self.settings.host.as_ref().is_some_and(|auth| auth.as_str() == host)
    }

    /// Answers a request for the gate itself; `body` is its whole body.
    pub async fn serve(&self, asked: &Asked<'_>, body: &[u8]) -> Verdict {
        if !asked.secure {
            return Verdict::Answers(Reply::redirect(StatusCode::PERMANENT_REDIRECT, &self.here(asked)));
        }
        let served = match asked.route {
            None => self.serve_auth_host(asked, body).await,
            Some(route) => self.serve_socket(asked, route, body).await,
        };
        match served {
            Served::Reply(reply) => Verdict::Answers(reply),
            Served::Refused(error) => refused(error),
        }
    }

    async fn serve_auth_host(&self, asked: &Asked<'_>, body: &[u8]) -> Served {
        let Some(path) = asked.target.path().strip_prefix(OURS) else { return Served::nothing() };
        let now = Moment::now();
        let get = matches!(*asked.method, Method::GET | Method::HEAD);
        let post = *asked.method == Method::POST;
        match path.split_once('/').map_or((path, None), |(path, provider)| (path, Some(provider))) {
            ("jwks.json", None) if get => {
                let keys = assertion::jwks(self.logins.seals().as_deref(), now);
                let mut reply = Reply::json(StatusCode::OK, &keys);
                reply.headers.insert(CACHE_CONTROL, HeaderValue::from_static("public, max-age=300"));
                reply.into()
            }
            ("start", None) if get => self.start(asked, now).await.into(),
            ("cb", Some(provider)) if get => Box::pin(self.callback(asked, provider, now)).await.into(),
            ("continue", None) if post => self.consented(asked, body, now).into(),
            ("local", None) if post => self.password(asked, body, now).await.into(),
            ("logout", None) if get => self.end_session(asked, now).await.into(),
            ("out", None) if get => self.out(asked).into(),
            ("backchannel", Some(provider)) if post => {
                Box::pin(self.backchannel(asked, provider, body, now)).await.into()
            }
            _ => Served::nothing(),
        }
    }

    async fn serve_socket(&self, asked: &Asked<'_>, route: &Arc<Route>, body: &[u8]) -> Served {
        let Some(gate) = route.socket.gate.as_ref().filter(|gate| gate.oidc.is_some()) else {
            return Served::nothing();
        };
        let socket = &route.socket.id;
        if !gate.ip.as_ref().is_none_or(|rules| rules.allows(asked.ip)) {
            self.tell(socket, asked, "ip", Err("address"));
            return Served::Refused(Error::Forbidden);
        }
        if self.settings.host.is_none() {
            tracing::error!(%socket, "this socket asks for logins, and this node has no gate.host");
            return Served::Refused(Error::GateUnready);
        }
        let to = Destination { route: Arc::clone(route), gate: Arc::clone(gate) };
        let now = Moment::now();
        let get = matches!(*asked.method, Method::GET | Method::HEAD);
        match asked.target.path().strip_prefix(OURS).unwrap_or_default() {
            "finish" if get => self.finish(asked, &to, now).into(),
            "login" if get => {
                if !asked.navigates() {
                    return Served::Refused(Error::Unauthorized);
                }
                let switch = asked.target.query() == Some("switch=1");
                self.begin(asked, route, "/", switch, now).into()
            }
            "logout" if get => self.ask_to_log_out(asked, &to, now).into(),
            "logout" if *asked.method == Method::POST => self.log_out(asked, &to, body, now).await.into(),
            "out" if get => self.out(asked).into(),
            "identity" if get => self.identity(asked, &to, now).into(),
            _ => Served::nothing(),
        }
    }

    /// Whether a request may go on to its socket's origin.
    pub async fn admit(&self, asked: &Asked<'_>) -> Verdict {
        let Some(route) = asked.route else { return refused(Error::NoSocket) };
        let socket = &route.socket.id;
        let Some(gate) = &route.socket.gate else {
            // One may be put there while it runs.
            return Verdict::Passes(Pass::open(self.live.hold(socket.clone(), asked, Who::Nobody, false)));
        };
        if !gate.ip.as_ref().is_none_or(|rules| rules.allows(asked.ip)) {
            self.tell(socket, asked, "ip", Err("address"));
            return refused(Error::Forbidden);
        }
        if !gate.asks_identity() {
            return Verdict::Passes(Pass::open(self.live.hold(socket.clone(), asked, Who::Nobody, true)));
        }
        if !asked.secure {
            // Neither cookies nor passwords are read where anybody can write them.
            return Verdict::Answers(Reply::redirect(StatusCode::PERMANENT_REDIRECT, &self.here(asked)));
        }
        let rules = match paths::find(&gate.rules, asked.target.path()) {
            Found::Public => return Verdict::Passes(self.pass(asked, route, gate, Who::Nobody, None)),
            Found::Stricter(rules) => rules,
        };
        let preflight = *asked.method == Method::OPTIONS
            && asked.headers.contains_key(ORIGIN)
            && asked.headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD);
        if preflight
            && !asked.upgrade
            && asked.empty
            && gate.oidc.as_ref().is_some_and(|oidc| oidc.allow_cors_preflight)
        {
            return Verdict::Passes(Pass { preflight: true, ..self.pass(asked, route, gate, Who::Nobody, None) });
        }
        let now = Moment::now();
        if let Some(given) = asked.headers.get(SERVICE_TOKEN) {
            return self.by_token(asked, route, gate, &rules, given.as_bytes(), now);
        }
        if let Some(basic) = &gate.basic
            && let Some((name, password)) = credentials(asked.headers)
        {
            let by_password = self.by_password(asked, route, gate, basic, &rules, (name, password));
            return Box::pin(by_password).await;
        }
        if let Some(oidc) = &gate.oidc {
            return self.by_session(asked, route, gate, oidc, &rules, now);
        }
        self.challenge(asked, gate)
    }

    fn by_token(
        &self,
        asked: &Asked<'_>,
        route: &Arc<Route>,
        gate: &Gate,
        rules: &[&PathRule],
        given: &[u8],
        now: Moment,
    ) -> Verdict {
        let socket = &route.socket.id;
        let hash = digest::digest(&digest::SHA256, given);
        // Every one is compared: time tells nothing of the tokens.
        let known = gate.tokens().iter().fold(None, |known, token| {
            let same = constant_time::verify_slices_are_equal(&token.hash.0, hash.as_ref()).is_ok();
            if same { Some(token) } else { known }
        });
        let verdict = match known {
            None => Err("unknown"),
            Some(token) if token.expires.is_some_and(|at| now >= at) => Err("expired"),
            Some(token) if !rules.iter().all(|rule| names_token(rule, &token.name)) => Err("path"),
            Some(token) => Ok(token),
        };
        if let Err(why) = verdict {
            self.tell(socket, asked, "service_token", Err(why));
        } else {
            metrics::counter!("adit_gate_decisions_total", "kind" => "service_token", "decision" => "granted", "why" => "")
                .increment(1);
        }
        match verdict {
            Ok(token) => {
                let who = Who::Token { name: token.name.clone(), hash: token.hash.clone() };
                Verdict::Passes(self.pass(asked, route, gate, who, None))
            }
            Err("path") => refused(Error::Forbidden),
            Err(_) => self.challenge(asked, gate),
        }
    }

    async fn by_password(
        &self,
        asked: &Asked<'_>,
        route: &Arc<Route>,
        gate: &Gate,
        basic: &crate::model::gate::Basic,
        rules: &[&PathRule],
        (name, password): (String, String),
    ) -> Verdict {
        let socket = &route.socket.id;
        let user = basic.users.iter().find(|user| user.name == name);
        let (hash, like) = (user.map(|user| &user.password), basic.users.first().map(|user| &user.password));
        let checked = self.passwords.check(socket.as_str(), asked.ip, &name, &password, hash.ok_or(like)).await;
        let user = match (checked, user) {
            (Checked::Busy(wait), _) => {
                self.tell(socket, asked, "basic", Err("busy"));
                let mut headers = HeaderMap::new();
                headers.insert(RETRY_AFTER, HeaderValue::from(wait.as_secs().max(1)));
                return Verdict::Refuses { error: Error::TooManyLogins, headers };
            }
            (Checked::Right { anew }, Some(user)) => {
                if anew {
                    self.tell(socket, asked, "basic", Ok(&user.name));
                }
                user
            }
            (Checked::Wrong | Checked::Right { .. }, _) => {
                self.tell(socket, asked, "basic", Err("password"));
                return self.challenge(asked, gate);
            }
        };
        if !rules.iter().all(|rule| names_user(rule, &user.name)) {
            self.tell(socket, asked, "basic", Err("path"));
            return refused(Error::Forbidden);
        }
        // Browsers send a password along with what other pages make them ask.
        if asked.upgrade && asked.is_foreign(&[]) {
            self.tell(socket, asked, "basic", Err("origin"));
            return refused(Error::Forbidden);
        }
        let who = Who::User { name: user.name.clone(), password: user.password.clone() };
        Verdict::Passes(self.pass(asked, route, gate, who, None))
    }

    fn by_session(
        &self,
        asked: &Asked<'_>,
        route: &Arc<Route>,
        gate: &Gate,
        oidc: &crate::model::gate::Oidc,
        rules: &[&PathRule],
        now: Moment,
    ) -> Verdict {
        let socket = &route.socket.id;
        if self.settings.host.is_none() {
            tracing::error!(%socket, "this socket asks for logins, and this node has no gate.host");
            return refused(Error::GateUnready);
        }
        let Some(session) = self.session(asked, socket, now) else {
            return self.ask_to_log_in(asked, route, gate);
        };
        if let Err(denied) = session.passes(oidc, rules, &self.logins, now) {
            self.tell(socket, asked, "login", Err(denied.label()));
            return match denied {
                ended if ended.ended() => self.ask_to_log_in(asked, route, gate),
                denied => self.denied(asked, &session, denied),
            };
        }
        if asked.upgrade && asked.is_foreign(&oidc.allow_origins) {
            self.tell(socket, asked, "login", Err("origin"));
            return refused(Error::Forbidden);
        }
        // Not into what other pages ask for: it may be kept where it should not.
        let own = || asked.navigates() || (!asked.upgrade && asked.header("sec-fetch-site") == Some("same-origin"));
        let reseal = (session.wants_reseal(oidc, now) && own())
            .then(|| self.seal_session(asked.host, socket, &Session { seen: now.0, ..(*session).clone() }, gate, now))
            .flatten();
        Verdict::Passes(self.pass(asked, route, gate, Who::Session(session), reseal))
    }

    fn pass(&self, asked: &Asked<'_>, route: &Arc<Route>, gate: &Gate, who: Who, reseal: Option<HeaderValue>) -> Pass {
        let held = self.live.hold(route.socket.id.clone(), asked, who.clone(), true);
        let own_password = gate.basic.as_ref().is_some_and(|basic| !basic.pass_authorization);
        Pass { who, held, reseal, own_password, preflight: false, asks_identity: gate.asks_identity() }
    }

    /// Takes out of the head of a request that passed what is not the origin's, or
    /// could pass for what we say.
    pub fn strip(&self, pass: &Pass, headers: &mut HeaderMap) {
        assertion::strip(headers, pass.asks_identity);
        // A login outlasts the gate that asked for it.
        cookies::strip(headers);
        if !pass.asks_identity {
            return;
        }
        if pass.preflight {
            assertion::strip_person(headers);
        }
        if pass.own_password && headers.get_all(AUTHORIZATION).iter().any(is_basic) {
            headers.remove(AUTHORIZATION);
        }
    }

    /// Tells the origin who asks, in the head of a request that passed.
    pub fn tell_origin(&self, pass: &Pass, headers: &mut HeaderMap, host: &str) {
        if !pass.asks_identity {
            return;
        }
        let seals = self.logins.seals();
        self.assertions.tell(headers, &pass.who, host, &self.issuer, seals.as_deref(), Moment::now());
    }

    /// The login that a request carries, if one of its cookies is one.
    fn session(&self, asked: &Asked<'_>, socket: &SocketId, now: Moment) -> Option<Arc<Session>> {
        let seals = self.logins.seals()?;
        let place = Place { host: asked.host, socket: socket.as_str() };
        // A sibling's cookie may stand before ours: the first that opens counts.
        cookies::values(asked.headers, cookies::SESSION)
            .take(8)
            .find_map(|sealed| self.opened.session(&seals, place, sealed, now))
    }

    fn seal_session(
        &self,
        host: &str,
        socket: &SocketId,
        session: &Session,
        gate: &Gate,
        now: Moment,
    ) -> Option<HeaderValue> {
        let value = serde_json::to_vec(session).ok()?;
        let place = Place { host, socket: socket.as_str() };
        let sealed = self.logins.seals()?.seal(Purpose::Session, place, &value, now)?;
        cookies::set(cookies::SESSION, &sealed, session::cookie_seconds(session, gate, now))
    }

    /// Who has no login: a person's browser is sent to one, all others are told.
    fn ask_to_log_in(&self, asked: &Asked<'_>, route: &Arc<Route>, gate: &Gate) -> Verdict {
        if asked.is_framed() {
            let said = context! { host => asked.host, again => self.here(asked), id => asked.id.to_str().ok() };
            return Verdict::Answers(self.pages.page(StatusCode::UNAUTHORIZED, "frame.html", said, None));
        }
        if !asked.navigates() {
            return self.challenge(asked, gate);
        }
        if asked.authority.split(':').next().is_some_and(|host| host.ends_with('.')) {
            // Browsers take `name.` for another host, whose cookies are others.
            return Verdict::Answers(Reply::redirect(StatusCode::TEMPORARY_REDIRECT, &self.here(asked)));
        }
        let target = asked.target.path_and_query().map_or("/", |p| p.as_str());
        Verdict::Answers(self.begin(asked, route, target, false, Moment::now()))
    }

    /// 401 with what would help.
    fn challenge(&self, asked: &Asked<'_>, gate: &Gate) -> Verdict {
        let mut headers = HeaderMap::new();
        let mut ask = |text: String| {
            if let Ok(line) = HeaderValue::from_str(&text) {
                headers.append(WWW_AUTHENTICATE, line);
            }
        };
        // A page's script must not make the browser ask for a password where its
        // visitors log in elsewhere.
        let scripted = asked.headers.contains_key("sec-fetch-mode") && gate.oidc.is_some();
        if let Some(basic) = gate.basic.as_ref().filter(|_| !scripted) {
            ask(format!("Basic realm=\"{}\", charset=\"UTF-8\"", basic.realm));
        }
        if gate.oidc.is_some() {
            ask(format!("Adit-Login url=\"https://{}{}{OURS}login\"", asked.host, self.port));
        }
        if gate.service_tokens.is_some() {
            ask("Adit-Service-Token".to_owned());
        }
        Verdict::Refuses { error: Error::Unauthorized, headers }
    }

    /// Who is known, and may not come.
    fn denied(&self, asked: &Asked<'_>, session: &Session, denied: Denied) -> Verdict {
        if !asked.navigates() && !asked.is_framed() {
            return refused(Error::Forbidden);
        }
        Verdict::Answers(self.denied_page(asked, asked.host, session.email.as_ref(), denied))
    }

    fn denied_page(&self, asked: &Asked<'_>, host: &str, email: Option<&Email>, denied: Denied) -> Reply {
        let why = match denied {
            Denied::NoEmail => "Your login does not vouch for an e-mail address of yours.",
            _ => "This login is not allowed here.",
        };
        let email = email.filter(|_| denied != Denied::NoEmail).map(Email::as_str);
        let again = self.url(host, &format!("{OURS}login?switch=1"));
        let said = context! { host, email, why, again, id => asked.id.to_str().ok() };
        self.pages.page(StatusCode::FORBIDDEN, "denied.html", said, None)
    }

    /// The URL of a request.
    fn here(&self, asked: &Asked<'_>) -> String {
        let target = asked.target.path_and_query().map_or("/", |p| p.as_str());
        self.url(asked.host, if target.starts_with('/') { target } else { "/" })
    }

    /// A URL of a host that visitors reach.
    fn url(&self, host: &str, path: &str) -> String {
        format!("https://{host}{}{path}", self.port)
    }

    /// A URL of the auth host.
    fn auth_url(&self, path: &str) -> String {
        format!("{}{path}", self.issuer)
    }

    /// Whether a request that runs would be let in again now.
    fn still_passes(&self, entry: &Entry) -> bool {
        let Some(route) = self.routes.by_host(&entry.host).filter(|route| route.socket.id == entry.socket) else {
            return !entry.gated;
        };
        let Some(gate) = &route.socket.gate else { return true };
        if !gate.ip.as_ref().is_none_or(|rules| rules.allows(entry.ip)) {
            return false;
        }
        if !gate.asks_identity() {
            return true;
        }
        let rules = match paths::find(&gate.rules, entry.target.path()) {
            Found::Public => return true,
            Found::Stricter(rules) => rules,
        };
        let now = Moment::now();
        match &entry.who {
            Who::Nobody => false,
            Who::User { name, password } => {
                let users = gate.basic.as_ref().map(|basic| basic.users.as_slice()).unwrap_or_default();
                users.iter().any(|user| user.name == *name && user.password == *password)
                    && rules.iter().all(|rule| names_user(rule, name))
            }
            Who::Token { name, hash } => {
                let lasts = |token: &&crate::model::gate::ServiceToken| token.expires.is_none_or(|at| now < at);
                gate.tokens().iter().filter(lasts).any(|token| token.name == *name && token.hash == *hash)
                    && rules.iter().all(|rule| names_token(rule, name))
            }
            Who::Session(session) => {
                // Its own requests keep a login alive; one that runs is use enough.
                let used = Session { seen: now.0, ..(**session).clone() };
                gate.oidc.as_ref().is_some_and(|oidc| used.passes(oidc, &rules, &self.logins, now).is_ok())
            }
        }
    }

    /// Holds what runs against the rules: at each change of the records, and from
    /// time to time. Drops revocations that have done their work. Runs until `stop`.
    pub async fn watch(self: Arc<Self>, mut changes: tokio::sync::watch::Receiver<u64>, stop: CancellationToken) {
        const PRUNE: Duration = Duration::from_secs(600);
        let mut again = tokio::time::interval(self.settings.recheck);
        let mut prune = tokio::time::interval(PRUNE);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    // A burst of writes is one look.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    changes.mark_unchanged();
                }
                _ = again.tick() => {}
                _ = prune.tick() => {
                    for id in self.logins.spent_revocations(Moment::now()) {
                        let gone = self.records.delete_unclaimed::<crate::model::Revocation>(&id, Condition::Any).await;
                        if let Err(error) = gone {
                            tracing::debug!(%error, "a spent revocation stays");
                        }
                    }
                }
            }
            if !self.live.is_empty() {
                let cut = self.live.recheck(|entry| self.still_passes(entry)).await;
                if cut > 0 {
                    metrics::counter!("adit_gate_cut_total").increment(cut as u64);
                    tracing::info!(target: "adit::audit", cut, "running requests no longer pass, and were cut");
                }
            }
        }
    }

    /// Makes a keyring where the feed has none, if that is this node's business.
    pub async fn make_keyring(&self) {
        if !self.settings.make_keyring || self.logins.seals().is_some() {
            return;
        }
        let mut secret = vec![0u8; 32];
        let mut name = [0u8; 4];
        if aws_lc_rs::rand::fill(&mut secret).is_err() || aws_lc_rs::rand::fill(&mut name).is_err() {
            return;
        }
        let Ok(kid) = format!("k{}", data_encoding::HEXLOWER.encode(&name)).parse() else { return };
        let key = SealingKey { kid, secret: Base64(secret), seal_from: Moment(0), open_until: None };
        let keyring = Keyring { id: KeyringId, keys: vec![key], extra: serde_json::Map::new() };
        match self.records.put_unclaimed(keyring, Condition::Absent).await {
            Ok(_) => tracing::info!("a keyring for logins was made"),
            Err(error) => tracing::warn!(%error, "there is no keyring for logins, and none could be made"),
        }
    }

    /// The audit's line: what was decided, and why. Who it was is told by a digest;
    /// addresses and names only at level debug.
    fn tell(
        &self,
        socket: impl AsRef<str>,
        asked: &Asked<'_>,
        kind: &'static str,
        verdict: Result<&str, &'static str>,
    ) {
        let (socket, id) = (socket.as_ref(), asked.id().unwrap_or_default());
        let ip = asked.ip;
        match verdict {
            Ok(who) => {
                metrics::counter!("adit_gate_decisions_total", "kind" => kind, "decision" => "granted", "why" => "")
                    .increment(1);
                tracing::info!(target: "adit::audit", socket, kind, decision = "granted", %ip, id, "gate");
                tracing::debug!(target: "adit::audit", socket, kind, who, id, "gate");
            }
            Err(why) => {
                metrics::counter!("adit_gate_decisions_total", "kind" => kind, "decision" => "denied", "why" => why)
                    .increment(1);
                // A flood of the unwelcome must not fill the disk; the count has them all.
                if self.audit.take((), std::time::Instant::now()).is_ok() {
                    tracing::info!(target: "adit::audit", socket, kind, decision = "denied", why, %ip, id, "gate");
                }
            }
        }
    }
}

fn refused(error: Error) -> Verdict {
    Verdict::Refuses { error, headers: HeaderMap::new() }
}

fn names_user(rule: &PathRule, name: &str) -> bool {
    match &rule.asks {
        Asks::Nothing => true,
        Asks::OneOf { users, .. } => users.iter().any(|user| user == name),
    }
}

fn names_token(rule: &PathRule, name: &str) -> bool {
    match &rule.asks {
        Asks::Nothing => true,
        Asks::OneOf { service_tokens, .. } => service_tokens.iter().any(|token| token == name),
    }
}

/// Whether a line of `Authorization` is a name and a password.
fn is_basic(line: &HeaderValue) -> bool {
    line.as_bytes().get(..6).is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"basic "))
}

/// Name and password of `Authorization: Basic` (RFC 7617 §2).
fn credentials(headers: &HeaderMap) -> Option<(String, String)> {
    let mut lines = headers.get_all(AUTHORIZATION).iter();
    let line = lines.next().filter(|_| lines.next().is_none())?.to_str().ok()?;
    let (scheme, text) = line.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") || text.len() > CREDENTIALS_MAX {
        return None;
    }
    let text = String::from_utf8(BASE64.decode(text.trim().as_bytes()).ok()?).ok()?;
    let (name, password) = text.split_once(':')?;
    Some((name.to_owned(), password.to_owned()))
}
