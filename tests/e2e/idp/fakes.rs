//! GitHub and Facebook as their public documents describe them, in this process.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use aws_lc_rs::{digest, hmac};
use bytes::Bytes;
use data_encoding::{BASE64URL_NOPAD, HEXLOWER};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::harness::*;

/// A request that a fake has had.
#[derive(Debug, Clone)]
pub struct Asked {
    pub method: String,
    pub path: String,
    /// Fields of the query and of the form.
    pub fields: Vec<(String, String)>,
    pub headers: BTreeMap<String, String>,
}

impl Asked {
    /// The first field of this name; empty where there is none.
    pub fn field(&self, name: &str) -> &str {
        self.fields.iter().find(|(n, _)| n == name).map_or("", |(_, value)| value)
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// What authorization gave a code for.
#[derive(Debug, Clone)]
struct Grant {
    redirect_uri: String,
    challenge: Option<String>,
    scope: String,
}

#[derive(Default)]
struct State {
    redirect_uri: String,
    client_id: String,
    client_secret: String,
    user: Value,
    emails: Value,
    denied: bool,
    failing: Option<u16>,
    codes: BTreeMap<String, Grant>,
    tokens: BTreeMap<String, Grant>,
    made: usize,
    asked: Vec<Asked>,
}

impl State {
    fn secret(&mut self, kind: &str) -> String {
        self.made += 1;
        let mut bytes = [0; 16];
        aws_lc_rs::rand::fill(&mut bytes).unwrap();
        format!("{kind}{}{}", HEXLOWER.encode(&bytes), self.made)
    }
}

type Answering = fn(&mut State, &Asked) -> Response<Full<Bytes>>;

/// The listener of either; ends with it.
struct Fake {
    addr: SocketAddr,
    state: Arc<Mutex<State>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Fake {
    async fn start(state: State, answering: Answering) -> Self {
        let listener = TcpListener::bind((own_address(), 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(state));
        let shared = Arc::clone(&state);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                let state = Arc::clone(&shared);
                connections.spawn(async move {
                    let service = service_fn(|request| answer(request, &state, answering));
                    let _ =
                        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(tcp), service).await;
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Self { addr, state, task }
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap())
    }
}

async fn answer(
    request: Request<Incoming>,
    state: &Mutex<State>,
    answering: Answering,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map(|b| b.to_bytes()).unwrap_or_default();
    let mut fields = url::fields(parts.uri.query().unwrap_or(""));
    let header = |name: &str| parts.headers.get(name).map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
    if header("content-type").is_some_and(|kind| kind.starts_with("application/x-www-form-urlencoded")) {
        fields.extend(url::fields(&String::from_utf8_lossy(&body)));
    }
    let headers = parts.headers.keys().map(|name| (name.to_string(), header(name.as_str()).unwrap())).collect();
    let asked = Asked { method: parts.method.to_string(), path: parts.uri.path().to_owned(), fields, headers };
    let mut state = state.lock().unwrap();
    state.asked.push(asked.clone());
    if let Some(status) = state.failing {
        return Ok(json_answer(status, &json!({"message": "Server Error"})));
    }
    Ok(answering(&mut state, &asked))
}

fn json_answer(status: u16, body: &Value) -> Response<Full<Bytes>> {
    let kind = "application/json; charset=utf-8";
    Response::builder().status(status).header("content-type", kind).body(Full::new(body.to_string().into())).unwrap()
}

fn redirect(to: &str, fields: &[(&str, &str)], fragment: &str) -> Response<Full<Bytes>> {
    let mark = if to.contains('?') { '&' } else { '?' };
    let to = format!("{to}{mark}{}{fragment}", url::form(fields));
    Response::builder().status(302).header("location", to).body(Full::default()).unwrap()
}

/// RFC 7636, 4.6.
fn verifies(challenge: Option<&str>, verifier: &str) -> bool {
    let of = BASE64URL_NOPAD.encode(digest::digest(&digest::SHA256, verifier.as_bytes()).as_ref());
    challenge.is_none_or(|challenge| challenge == of)
}

macro_rules! settable {
    ($fake:ident) => {
        impl $fake {
            /// The next authorizations are refused by the user; or no longer.
            pub fn denies(&self, denied: bool) {
                self.fake.with(|state| state.denied = denied);
            }

            /// Tokens given so far are worth nothing any more.
            pub fn revoke_tokens(&self) {
                self.fake.with(|state| state.tokens.clear());
            }

            /// Answers everything with this status; or no longer.
            pub fn fails(&self, status: Option<u16>) {
                self.fake.with(|state| state.failing = status);
            }

            /// What it was asked so far at this path.
            pub fn asked(&self, path: &str) -> Vec<Asked> {
                self.fake.with(|state| state.asked.iter().filter(|asked| asked.path == path).cloned().collect())
            }
        }
    };
}

/// github.com and api.github.com, both at `url`. Its authorization page agrees at once.
pub struct FakeGithub {
    pub url: String,
    pub client_id: String,
    pub client_secret: String,
    fake: Fake,
}
settable!(FakeGithub);

impl FakeGithub {
    /// An app with this callback; the user is octocat with octocat@example.com, verified.
    pub async fn start(redirect_uri: &str) -> Self {
        let (client_id, client_secret) = ("Iv1.0123456789abcdef", "github's secret");
        let state = State {
            redirect_uri: redirect_uri.to_owned(),
            client_id: client_id.into(),
            client_secret: client_secret.into(),
            user: json!({"login": "octocat", "id": 583_231, "node_id": "MDQ6VXNlcjU4MzIzMQ==", "type": "User",
                "name": "The Octocat", "email": null}),
            emails: json!([{"email": "octocat@example.com", "primary": true, "verified": true, "visibility": null}]),
            ..State::default()
        };
        let fake = Fake::start(state, github).await;
        Self {
            url: format!("http://{}", fake.addr),
            client_id: client_id.into(),
            client_secret: client_secret.into(),
            fake,
        }
    }

    /// Who logs in from now on; the id is what stays of an account.
    pub fn set_user(&self, id: u64, login: &str) {
        self.fake.with(|state| {
            state.user["id"] = json!(id);
            state.user["login"] = json!(login);
        });
    }

    /// The user's addresses: each with whether it is primary, and verified.
    pub fn set_emails(&self, emails: &[(&str, bool, bool)]) {
        let of = |(email, primary, verified): &(&str, bool, bool)| json!({"email": email, "primary": primary, "verified": verified, "visibility": null});
        let emails = emails.iter().map(of).collect();
        self.fake.with(|state| state.emails = emails);
    }
}

fn github(state: &mut State, asked: &Asked) -> Response<Full<Bytes>> {
    let field = |name: &str| asked.field(name);
    let token = |state: &State| {
        let shown = asked.header("authorization");
        let token = shown.strip_prefix("Bearer ").or_else(|| shown.strip_prefix("token ")).unwrap_or("");
        state.tokens.get(token).cloned()
    };
    match (asked.method.as_str(), asked.path.as_str()) {
        ("GET", "/login/oauth/authorize") => {
            if field("client_id") != state.client_id {
                return json_answer(404, &json!({"message": "Not Found"}));
            }
            let asked_for = field("redirect_uri");
            let to = if asked_for.is_empty() { state.redirect_uri.clone() } else { asked_for.to_owned() };
            let told = |error: &str, what: &str, to: &str| {
                redirect(to, &[("error", error), ("error_description", what), ("state", field("state"))], "")
            };
            if to != state.redirect_uri {
                let what = "The redirect_uri MUST match the registered callback URL for this application.";
                return told("redirect_uri_mismatch", what, &state.redirect_uri);
            }
            if state.denied {
                return told("access_denied", "The user has denied your application access.", &to);
            }
            let challenge = (!field("code_challenge").is_empty()).then(|| field("code_challenge").to_owned());
            if challenge.is_some() && field("code_challenge_method") != "S256" {
                return told("invalid_request", "code_challenge_method must be S256", &to);
            }
            let code = state.secret("");
            let grant =
                Grant { redirect_uri: asked_for.to_owned(), challenge, scope: field("scope").replace(' ', ",") };
            state.codes.insert(code.clone(), grant);
            redirect(&to, &[("code", &code), ("state", field("state"))], "")
        }
        ("POST", "/login/oauth/access_token") => {
            // Errors have status 200 there; without an Accept, a form is answered.
            let say = |fields: &[(&str, &str)]| match asked.header("accept") {
                kind if kind.contains("json") => {
                    let all: serde_json::Map<_, _> = fields.iter().map(|(n, v)| ((*n).into(), json!(v))).collect();
                    json_answer(200, &all.into())
                }
                _ => Response::builder()
                    .header("content-type", "application/x-www-form-urlencoded; charset=utf-8")
                    .body(Full::new(url::form(fields).into()))
                    .unwrap(),
            };
            if field("client_id") != state.client_id || field("client_secret") != state.client_secret {
                let what = "The client_id and/or client_secret passed are incorrect.";
                return say(&[("error", "incorrect_client_credentials"), ("error_description", what)]);
            }
            let wrong =
                [("error", "bad_verification_code"), ("error_description", "The code passed is incorrect or expired.")];
            let Some(grant) = state.codes.remove(field("code")) else { return say(&wrong) };
            if !verifies(grant.challenge.as_deref(), field("code_verifier")) {
                return say(&wrong);
            }
            if !field("redirect_uri").is_empty() && field("redirect_uri") != state.redirect_uri {
                let what = "The redirect_uri MUST match the registered callback URL for this application.";
                return say(&[("error", "redirect_uri_mismatch"), ("error_description", what)]);
            }
            let token = state.secret("gho_");
            let scope = grant.scope.clone();
            state.tokens.insert(token.clone(), grant);
            say(&[("access_token", &token), ("scope", &scope), ("token_type", "bearer")])
        }
        ("GET", "/user" | "/user/emails") => {
            if asked.header("user-agent").is_empty() {
                return json_answer(
                    403,
                    &json!({"message": "Request forbidden by administrative rules. Please make sure your request has a User-Agent header"}),
                );
            }
            let Some(grant) = token(state) else {
                return json_answer(401, &json!({"message": "Bad credentials", "status": "401"}));
            };
            if asked.path == "/user" {
                return json_answer(200, &state.user);
            }
            let may = grant.scope.split(',').any(|scope| matches!(scope, "user" | "user:email"));
            if may { json_answer(200, &state.emails) } else { json_answer(404, &json!({"message": "Not Found"})) }
        }
        _ => json_answer(404, &json!({"message": "Not Found"})),
    }
}

/// www.facebook.com and graph.facebook.com, both at `url`, with or without a
/// version in paths. Its dialog agrees at once.
pub struct FakeFacebook {
    pub url: String,
    pub client_id: String,
    pub client_secret: String,
    fake: Fake,
}
settable!(FakeFacebook);

impl FakeFacebook {
    /// An app with this callback; the user has the e-mail pat@example.com.
    pub async fn start(redirect_uri: &str) -> Self {
        let (client_id, client_secret) = ("1234567890", "facebook's secret");
        let state = State {
            redirect_uri: redirect_uri.to_owned(),
            client_id: client_id.into(),
            client_secret: client_secret.into(),
            user: json!({"id": "10220012345678901", "name": "Pat Tester", "email": "pat@example.com"}),
            ..State::default()
        };
        let fake = Fake::start(state, facebook).await;
        Self {
            url: format!("http://{}", fake.addr),
            client_id: client_id.into(),
            client_secret: client_secret.into(),
            fake,
        }
    }

    /// Who logs in from now on; many have no e-mail.
    pub fn set_user(&self, id: &str, email: Option<&str>) {
        self.fake.with(|state| {
            state.user = json!({"id": id, "name": "Pat Tester"});
            if let Some(email) = email {
                state.user["email"] = json!(email);
            }
        });
    }
}

fn facebook(state: &mut State, asked: &Asked) -> Response<Full<Bytes>> {
    let field = |name: &str| asked.field(name);
    let error = |status, message: &str, kind: &str, code: u32| {
        json_answer(status, &json!({"error": {"message": message, "type": kind, "code": code, "fbtrace_id": "AbCdEf"}}))
    };
    // A version stands first: /v23.0/me.
    let path = match asked.path.strip_prefix("/v").and_then(|rest| rest.split_once('/')) {
        Some((version, rest)) if version.starts_with(|c: char| c.is_ascii_digit()) => format!("/{rest}"),
        _ => asked.path.clone(),
    };
    match (asked.method.as_str(), path.as_str()) {
        ("GET", "/dialog/oauth") => {
            if field("client_id") != state.client_id {
                return error(400, "Invalid App ID", "OAuthException", 101);
            }
            if field("redirect_uri") != state.redirect_uri {
                return error(400, "URL blocked: the redirect URI is not white-listed", "OAuthException", 191);
            }
            if state.denied {
                let fields = [
                    ("error_reason", "user_denied"),
                    ("error", "access_denied"),
                    ("error_description", "Permissions error"),
                    ("state", field("state")),
                ];
                return redirect(&state.redirect_uri, &fields, "#_=_");
            }
            let challenge = (!field("code_challenge").is_empty()).then(|| field("code_challenge").to_owned());
            let code = state.secret("AQ");
            let scope = field("scope").replace(' ', ",");
            let grant = Grant { redirect_uri: field("redirect_uri").to_owned(), challenge, scope };
            state.codes.insert(code.clone(), grant);
            redirect(&state.redirect_uri, &[("code", &code), ("state", field("state"))], "#_=_")
        }
        ("GET" | "POST", "/oauth/access_token") => {
            if field("client_id") != state.client_id || field("client_secret") != state.client_secret {
                return error(400, "Error validating client secret.", "OAuthException", 1);
            }
            let Some(grant) = state.codes.remove(field("code")) else {
                return error(400, "This authorization code has been used.", "OAuthException", 100);
            };
            if field("redirect_uri") != grant.redirect_uri {
                let what = "Error validating verification code. Please make sure your redirect_uri is identical to the one you used in the OAuth dialog request";
                return error(400, what, "OAuthException", 100);
            }
            if !verifies(grant.challenge.as_deref(), field("code_verifier")) {
                return error(400, "Invalid code_verifier", "OAuthException", 100);
            }
            let token = state.secret("EAA");
            state.tokens.insert(token.clone(), grant);
            json_answer(200, &json!({"access_token": token, "token_type": "bearer", "expires_in": 5_183_944}))
        }
        ("GET", "/me") => {
            let bearer = asked.header("authorization").strip_prefix("Bearer ");
            let token = bearer.unwrap_or_else(|| field("access_token"));
            let Some(grant) = state.tokens.get(token) else {
                return error(
                    400,
                    "Error validating access token: the session has been invalidated",
                    "OAuthException",
                    190,
                );
            };
            let key = hmac::Key::new(hmac::HMAC_SHA256, state.client_secret.as_bytes());
            if field("appsecret_proof") != HEXLOWER.encode(hmac::sign(&key, token.as_bytes()).as_ref()) {
                let what = "Invalid appsecret_proof provided in the API argument";
                return error(400, what, "GraphMethodException", 100);
            }
            let may_email = grant.scope.split(',').any(|scope| scope == "email");
            let wanted = if field("fields").is_empty() { "id,name" } else { field("fields") };
            let told = wanted.split(',').chain(["id"]).filter(|name| *name != "email" || may_email);
            let told = told.filter_map(|name| Some((name.to_owned(), state.user.get(name)?.clone())));
            json_answer(200, &Value::Object(told.collect()))
        }
        _ => error(404, "Unknown path components", "OAuthException", 2500),
    }
}
