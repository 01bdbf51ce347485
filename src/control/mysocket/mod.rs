//! The calls of mysocketctl, answered over the node's own records, at hosts of their own
//! on the HTTPS port. This file owns the way of a request to its handler; `accounts` who
//! asks, `sessions` their tokens, `sockets` what is theirs and `wanted` what they ask
//! for, `certificates` the CA of their SSH keys, `refusal` what is told instead. Nothing
//! of the operator's API is here.

mod accounts;
mod certificates;
mod names;
mod refusal;
mod sessions;
mod settings;
mod sockets;
mod wanted;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, StatusCode};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::{Mutex, Semaphore, watch};

pub(super) use self::accounts::rekey;
pub use self::names::user as made_up_user;
pub use self::settings::MysocketSettings;

use self::certificates::Authority;
use self::refusal::Refusal;
use self::wanted::Wanted;
use crate::feed::records::{Records, Stored};
use crate::gate::{Gates, Reply};
use crate::limits::Rates;
use crate::logins::Logins;
use crate::model::identity::Moment;
use crate::model::{Account, AccountId, HostName, Tunnel, TunnelId};

/// A write must show in the route table within this; it takes milliseconds.
const APPLY_DEADLINE: Duration = Duration::from_secs(2);
/// Calls that are answered at once; more are told to come back.
const AT_ONCE: usize = 64;
/// Passwords that are hashed at once: each takes a core for some 20 ms.
const HASHING: usize = 1;

/// What the adapter asks the node for.
pub struct MysocketHooks {
    /// The domain of made-up names.
    pub domain: Option<HostName>,
    /// The host at which ports of sockets are reached.
    pub public_host: String,
    /// The ports at which sockets with names are reached.
    pub public_ports: Vec<u16>,
    /// The server of a tunnel's latest login; of none, this node.
    pub tunnel_server: Box<dyn Fn(&TunnelId) -> String + Send + Sync>,
    /// Limits of addresses leave loopback out.
    pub exempt_loopback: bool,
}

/// What the adapter is made of.
pub struct MysocketParts {
    /// Where sockets, tunnels and accounts are written.
    pub records: Arc<Records>,
    /// Accounts and keys, as followed.
    pub logins: Arc<Logins>,
    /// Checks passwords, within the budgets of the node.
    pub gates: Arc<Gates>,
    /// The last revision that acts on every visitor.
    pub acting: watch::Receiver<u64>,
    /// The node.
    pub hooks: MysocketHooks,
}

/// Answers mysocketctl.
pub struct Mysocket {
    settings: MysocketSettings,
    records: Arc<Records>,
    logins: Arc<Logins>,
    gates: Arc<Gates>,
    acting: watch::Receiver<u64>,
    hooks: MysocketHooks,
    at_once: Semaphore,
    hashing: Semaphore,
    /// Sockets and tunnels are made one after another.
    making: Mutex<()>,
    sign_ups: Rates<IpAddr>,
    logins_of_both: Rates<(String, IpAddr)>,
    logins_of_account: Rates<String>,
    calls: Rates<AccountId>,
}

impl Mysocket {
    /// The adapter.
    pub fn new(settings: MysocketSettings, parts: MysocketParts) -> Arc<Self> {
        let MysocketParts { records, logins, gates, acting, hooks } = parts;
        let (sign_ups, tries) = (settings.sign_ups_per_address, settings.logins_per_account);
        Arc::new(Self {
            at_once: Semaphore::new(AT_ONCE),
            hashing: Semaphore::new(HASHING),
            making: Mutex::default(),
            sign_ups: rates(sign_ups, 3600.0),
            logins_of_both: rates(tries, 60.0),
            logins_of_account: rates(tries.saturating_mul(6), 60.0),
            calls: rates(settings.calls_per_account, 60.0),
            settings,
            records,
            logins,
            gates,
            acting,
            hooks,
        })
    }

    /// Answers one request from an address.
    pub async fn answer(&self, request: Request<Bytes>, ip: IpAddr) -> Reply {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let Ok(_place) = self.at_once.try_acquire() else {
            return Refusal::busy("The node has too much to do.", Duration::from_secs(1)).into_reply();
        };
        let reply = match self.dispatch(request, ip).await {
            Ok(reply) => reply,
            Err(refusal) => refusal.into_reply(),
        };
        let status = reply.status.as_u16();
        metrics::counter!("adit_mysocket_calls_total", "status" => status.to_string()).increment(1);
        if method == Method::GET {
            tracing::debug!(%ip, %method, path, status, "mysocket");
        } else {
            tracing::info!(%ip, %method, path, status, "mysocket");
        }
        reply
    }

    async fn dispatch(&self, request: Request<Bytes>, ip: IpAddr) -> Result<Reply, Refusal> {
        // Clients join a base URL and a path, each with a slash or without.
        let path = request.uri().path().trim_matches('/').to_owned();
        let parts: Vec<&str> = path.split('/').collect();
        let method = match *request.method() {
            Method::HEAD => "GET",
            ref method => method.as_str(),
        };
        let body = request.body();
        // What asks for no token.
        match (method, parts.as_slice()) {
            ("GET", ["latest_version.txt"]) => return Ok(self.latest_version()),
            ("POST", ["login"]) => return self.login(read(body)?, ip).await.map(ok),
            ("POST", ["user"]) => return self.sign_up(read(body)?, ip).await.map(ok),
            _ => {}
        }
        let allowed = methods(&parts).ok_or_else(|| Refusal::not_found("path"))?;
        if !allowed.contains(&method) {
            return Err(Refusal::method(allowed));
        }
        let token = request.headers().get("x-access-token").and_then(|token| token.to_str().ok());
        let (account, auth_time) = self.owner(token.map(str::trim))?;
        let done = |()| Reply::bare(StatusCode::NO_CONTENT);
        let me = &*account;
        match (method, parts.as_slice()) {
            ("POST", ["login", "refresh"]) => self.token(me, auth_time, Moment::now()).map(ok),
            ("GET", ["user", id]) if *id == me.id.as_str() => Ok(ok(accounts::shown(me))),
            ("GET", ["user", _]) => Err(Refusal::not_found("user")),
            // Clients of 2022 ask before they connect, and want nothing of it.
            ("GET", ["organization"]) => Ok(ok(json!({ "id": me.id.as_str(), "name": "" }))),
            ("GET", ["connect" | "socket"]) => self.list(me).await.map(ok),
            ("POST", ["connect"]) => self.make_socket(me, read::<Wanted>(body)?, true).await.map(ok),
            ("POST", ["socket"]) => self.make_socket(me, read::<Wanted>(body)?, false).await.map(ok),
            ("DELETE", ["socket", id]) => self.delete_socket(me, id).await.map(done),
            (_, ["socket", id, rest @ ..]) => self.below_socket(me, id, (method, rest), body).await,
            _ => Err(Refusal::not_found("path")),
        }
    }

    /// What is below `/socket/{id}`, but for its end.
    async fn below_socket(
        &self,
        me: &Account,
        id: &str,
        (method, rest): (&str, &[&str]),
        body: &[u8],
    ) -> Result<Reply, Refusal> {
        let socket = self.socket_of(me, id).await?.record;
        match (method, rest) {
            ("GET", []) => self.shown(me, &socket).await.map(ok),
            ("GET", ["tunnel"]) => self.tunnels(&socket).await.map(|all| ok(Value::Array(all))),
            ("POST", ["tunnel"]) => self.make_tunnel(me, &socket).await.map(ok),
            ("GET", ["tunnel", id]) => {
                let tunnel = self.tunnel_of(&socket, id).await?;
                Ok(ok(self.shown_tunnel(&tunnel.record)))
            }
            ("DELETE", ["tunnel", id]) => {
                self.delete_tunnel(self.tunnel_of(&socket, id).await?).await?;
                Ok(Reply::bare(StatusCode::NO_CONTENT))
            }
            ("POST", ["tunnel", id, "signkey"]) => {
                let tunnel = self.tunnel_of(&socket, id).await?;
                if !sockets::is_tunnel_of(&tunnel.record, me) {
                    return Err(Refusal::conflict("This tunnel is served by keys that its record names."));
                }
                let principal = certificates::of_tunnel(&tunnel.record.id);
                self.sign_key(me, &key_of(body)?, (vec![tunnel], principal)).await.map(ok)
            }
            ("POST", ["signkey"]) => {
                let mut tunnels: Vec<Stored<Tunnel>> = Vec::new();
                for id in self.records.tunnels_of(&socket.id).await? {
                    tunnels.push(self.tunnel_of(&socket, id.as_str()).await?);
                }
                let principal = certificates::of_socket(&socket.id);
                self.sign_key(me, &key_of(body)?, (tunnels, principal)).await.map(ok)
            }
            _ => Err(Refusal::not_found("path")),
        }
    }

    fn latest_version(&self) -> Reply {
        let mut reply = Reply::bare(StatusCode::OK);
        reply.headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        reply.body = Bytes::from(format!("{}\n", self.settings.latest_version));
        reply
    }

    fn authority(&self) -> Result<Authority, Refusal> {
        let seals = self.logins.seals().ok_or_else(Refusal::no_keyring)?;
        Authority::now(&seals, Moment::now()).ok_or_else(Refusal::no_keyring)
    }

    /// Waits until this node acts on a write, so that a client that comes right after it
    /// finds it.
    async fn applied(&self, rev: u64) {
        let mut acting = self.acting.clone();
        let acts = tokio::time::timeout(APPLY_DEADLINE, acting.wait_for(|at| *at >= rev));
        if !matches!(acts.await, Ok(Ok(_))) {
            tracing::warn!(rev, "a write is stored and not yet applied");
        }
    }

    fn is_exempt(&self, ip: IpAddr) -> bool {
        self.hooks.exempt_loopback && ip.to_canonical().is_loopback()
    }
}

/// The methods of a path that asks for a token.
fn methods(parts: &[&str]) -> Option<&'static [&'static str]> {
    match parts {
        ["connect" | "socket"] => Some(&["GET", "POST"]),
        ["user", _] | ["organization"] => Some(&["GET"]),
        ["user" | "login"] | ["login", "refresh"] => Some(&["POST"]),
        ["socket", _] | ["socket", _, "tunnel", _] => Some(&["GET", "DELETE"]),
        ["socket", _, "tunnel"] => Some(&["GET", "POST"]),
        ["socket", _, "signkey"] | ["socket", _, "tunnel", _, "signkey"] => Some(&["POST"]),
        ["latest_version.txt"] => Some(&["GET"]),
        _ => None,
    }
}

fn rates<K: Eq + std::hash::Hash + Clone>(count: u32, seconds: f64) -> Rates<K> {
    Rates::new(f64::from(count) / seconds, f64::from(count))
}

fn ok(value: Value) -> Reply {
    Reply::json(StatusCode::OK, &value)
}

/// A body of JSON; none is an empty one, and so is what Go makes of none.
fn read<T: DeserializeOwned + Default>(body: &[u8]) -> Result<T, Refusal> {
    if matches!(body.trim_ascii(), b"" | b"null") {
        return Ok(T::default());
    }
    let wrong = |problem: &str| Refusal::invalid("body", problem, "send a JSON object as mysocketctl does");
    // A list would do for its fields, too.
    if !body.trim_ascii_start().starts_with(b"{") {
        return Err(wrong("is not a JSON object"));
    }
    // Where it is wrong, and never what was written there: it may be a password.
    serde_json::from_slice(body).map_err(|error| {
        wrong(&format!("is not what this call takes, at line {} column {}", error.line(), error.column()))
    })
}

fn key_of(body: &[u8]) -> Result<String, Refusal> {
    #[derive(serde::Deserialize, Default)]
    #[serde(default)]
    struct Csr {
        ssh_public_key: String,
    }
    read::<Csr>(body).map(|csr| csr.ssh_public_key)
}
