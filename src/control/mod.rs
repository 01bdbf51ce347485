//! The operator's API: JSON over HTTP/1.1 on the control listener. This file
//! owns the listener, who may ask, and the way of a request to its handler;
//! `resources` has the records, `watch` the event stream, `ops` the node. `mysocket`
//! answers owners' clients instead, at hosts of the HTTPS port.

mod mysocket;
mod ops;
mod problem;
mod resources;
mod routing;
mod secrets;
mod settings;
#[cfg(test)]
mod tests;
mod watch;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::{constant_time, digest};
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Map, Value};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch as watch_channel};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::mysocket::{Mysocket, MysocketHooks, MysocketParts, MysocketSettings, made_up_user};
pub use self::settings::ControlSettings;

use self::problem::Problem;
use self::routing::{Endpoint, Route};
use crate::feed::Feed;
use crate::feed::follower::Following;
use crate::feed::records::Records;
use crate::fields::Mistake;
use crate::model::authority_host;

/// Largest head of a request; tokens and conditions are short.
const HEAD_MAX: usize = 16 << 10;
/// Pause after a failed accept (EMFILE): long enough not to spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Fewest bytes of a token: below, guessing it over the network is thinkable.
const TOKEN_MIN: usize = 16;

type Body = UnsyncBoxBody<Bytes, Infallible>;
type Answer = Result<Response<Body>, Problem>;

/// What the API asks the node for.
pub struct NodeHooks {
    /// Fields of `/v1/status` beyond the API's own: uptime, listeners, tunnels.
    pub status: Box<dyn Fn() -> Map<String, Value> + Send + Sync>,
    /// The metrics as text.
    pub metrics: Box<dyn Fn() -> String + Send + Sync>,
    /// Whether the node takes visitors; the error says why not.
    pub ready: Box<dyn Fn() -> Result<(), String> + Send + Sync>,
    /// The nodes of the fleet whose APIs write records.
    pub writers: Box<dyn Fn() -> Vec<String> + Send + Sync>,
    /// Begins the drain; returns at once.
    pub drain: Box<dyn Fn() + Send + Sync>,
}

/// Everything a request may need.
pub struct ControlState {
    settings: ControlSettings,
    /// Digests of the tokens that may ask; `None`: anybody on loopback.
    tokens: Option<Vec<digest::Digest>>,
    records: Arc<Records>,
    feed: Arc<dyn Feed>,
    following: Following,
    acting: watch_channel::Receiver<u64>,
    node: NodeHooks,
    watchers: Arc<Semaphore>,
    started: Instant,
}

impl ControlState {
    /// Reads the token file. `acting` is the last revision that acts on every
    /// visitor: a write is answered when it does.
    ///
    /// # Errors
    /// A token file that cannot be used.
    pub fn new(
        settings: ControlSettings,
        records: Arc<Records>,
        feed: Arc<dyn Feed>,
        following: Following,
        acting: watch_channel::Receiver<u64>,
        node: NodeHooks,
    ) -> Result<Arc<Self>, Mistake> {
        let tokens = settings.token_file.as_deref().map(read_tokens).transpose()?;
        let watchers = Arc::new(Semaphore::new(settings.watchers));
        Ok(Arc::new(Self {
            settings,
            tokens,
            records,
            feed,
            following,
            acting,
            node,
            watchers,
            started: Instant::now(),
        }))
    }
}

/// Each line that is neither empty nor a `#` comment is a token, so that a new
/// one can be added before the old one goes.
fn read_tokens(path: &std::path::Path) -> Result<Vec<digest::Digest>, Mistake> {
    let wrong = |problem: String, fix: &str| Mistake { at: "control.token_file".into(), problem, fix: fix.into() };
    let text = std::fs::read_to_string(path)
        .map_err(|e| wrong(format!("{}: {e}", path.display()), "write a file that the node's user can read"))?;
    let tokens: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')).collect();
    if tokens.is_empty() || tokens.iter().any(|t| t.len() < TOKEN_MIN) {
        let problem = format!("{}: needs at least one token, each of {TOKEN_MIN} bytes or more", path.display());
        return Err(wrong(problem, "fill it with `openssl rand -hex 32`"));
    }
    Ok(tokens.into_iter().map(|t| digest::digest(&digest::SHA256, t.as_bytes())).collect())
}

/// Serves the API until `cancel`; then answers what was asked, ends watches and
/// returns within `close_deadline`.
pub async fn serve(listener: TcpListener, state: Arc<ControlState>, cancel: CancellationToken) {
    let loopback = listener.local_addr().is_ok_and(|a| a.ip().to_canonical().is_loopback());
    if state.tokens.is_none() {
        if !loopback {
            return tracing::error!("the control API needs control.token_file on an address that is not loopback");
        }
        tracing::warn!("the control API asks for no token: anybody on this machine may change records");
    }
    let tasks = TaskTracker::new();
    let room = Arc::new(Semaphore::new(state.settings.connections));
    loop {
        let accepted = tokio::select! {
            () = cancel.cancelled() => break,
            accepted = async {
                let permit = Arc::clone(&room).acquire_owned().await;
                (listener.accept().await, permit)
            } => accepted,
        };
        match accepted {
            (Ok((stream, peer)), Ok(permit)) => {
                let (state, cancel) = (Arc::clone(&state), cancel.clone());
                tasks.spawn(async move {
                    connection(stream, peer, state, cancel).await;
                    drop(permit);
                });
            }
            (Err(error), _) => {
                tracing::warn!(%error, "the control listener cannot accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            (_, Err(_closed)) => break,
        }
    }
    drop(listener);
    tasks.close();
    if tokio::time::timeout(state.settings.close_deadline * 2, tasks.wait()).await.is_err() {
        tracing::warn!(connections = tasks.len(), "control connections are cut");
    }
}

async fn connection(stream: TcpStream, peer: SocketAddr, state: Arc<ControlState>, cancel: CancellationToken) {
    let options = socket2::SockRef::from(&stream);
    // A watcher that stops reading must not hold its place for ever.
    let stall = state.settings.stall_deadline;
    if let Err(error) = options.set_tcp_nodelay(true).and_then(|()| options.set_tcp_user_timeout(Some(stall))) {
        tracing::debug!(%error, "a control connection keeps the system's timeouts");
    }
    let (deadline, close) = (state.settings.head_deadline, state.settings.close_deadline);
    let ends = cancel.clone();
    let service = service_fn(move |request| {
        let (state, ends) = (Arc::clone(&state), ends.clone());
        async move { Ok::<_, Infallible>(answer(&state, peer, request, ends).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(deadline)
        .max_buf_size(HEAD_MAX)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = cancel.cancelled() => {
            connection.as_mut().graceful_shutdown();
            match tokio::time::timeout(close, connection).await {
                Ok(result) => result,
                Err(_) => return tracing::debug!(%peer, "a control connection did not finish in time"),
            }
        }
    };
    if let Err(error) = result {
        tracing::debug!(%peer, %error, "a control connection failed");
    }
}

/// One request, to its answer.
async fn answer(
    state: &Arc<ControlState>,
    peer: SocketAddr,
    request: Request<Incoming>,
    ends: CancellationToken,
) -> Response<Body> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let began = Instant::now();
    let mut response = match dispatch(state, peer, request, ends).await {
        Ok(response) => response,
        Err(problem) => problem.naming(&state.node.writers).into_response(),
    };
    // Answers hold keys and change at any time.
    response.headers_mut().entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let (status, ms) = (response.status().as_u16(), began.elapsed().as_secs_f64() * 1e3);
    if matches!(method, Method::GET | Method::HEAD) {
        tracing::debug!(%peer, %method, path, status, ms, "control");
    } else {
        // Who changed what: the operator's own trail.
        tracing::info!(%peer, %method, path, status, ms, "control");
    }
    response
}

async fn dispatch(
    state: &Arc<ControlState>,
    peer: SocketAddr,
    request: Request<Incoming>,
    ends: CancellationToken,
) -> Answer {
    let found = routing::find(request.uri().path());
    if !found.as_ref().is_some_and(|(route, _)| is_open(state, route)) {
        admit(state, peer, &request)?;
    }
    let (route, id) = found.ok_or_else(Problem::no_such_path)?;
    let method = if request.method() == Method::HEAD { Method::GET } else { request.method().clone() };
    if !route.methods.contains(&method.as_str()) {
        return Err(Problem::method_not_allowed(route));
    }
    routing::acceptable(request.headers(), route.produces)?;
    let id = id.as_deref().unwrap_or_default();
    use crate::model::{Account, Certificate, Keyring, Provider, Revocation, Socket, TicketKeys, Tunnel};
    match route.endpoint {
        Endpoint::Sockets => resources::list::<Socket>(state, &request).await,
        Endpoint::Socket => resources::one::<Socket>(state, id, method, request).await,
        Endpoint::Tunnels => resources::list::<Tunnel>(state, &request).await,
        Endpoint::Tunnel => resources::one::<Tunnel>(state, id, method, request).await,
        Endpoint::Certificates => resources::list::<Certificate>(state, &request).await,
        Endpoint::Certificate => resources::one::<Certificate>(state, id, method, request).await,
        Endpoint::TicketKeysList => resources::list::<TicketKeys>(state, &request).await,
        Endpoint::TicketKeys => resources::one::<TicketKeys>(state, id, method, request).await,
        Endpoint::Providers => resources::list::<Provider>(state, &request).await,
        Endpoint::Provider => resources::one::<Provider>(state, id, method, request).await,
        Endpoint::Accounts => resources::list::<Account>(state, &request).await,
        Endpoint::Account => resources::one::<Account>(state, id, method, request).await,
        Endpoint::Keyrings => resources::list::<Keyring>(state, &request).await,
        Endpoint::Keyring => resources::one::<Keyring>(state, id, method, request).await,
        Endpoint::Revocations => resources::list::<Revocation>(state, &request).await,
        Endpoint::Revocation => resources::one::<Revocation>(state, id, method, request).await,
        Endpoint::Watch => watch::watch(state, &request, ends),
        Endpoint::Status => ops::status(state),
        Endpoint::Drain => ops::drain(state),
        Endpoint::OpenApi => Ok(text(StatusCode::OK, routing::JSON, Bytes::from_static(OPENAPI.as_bytes()))),
        Endpoint::Health => ops::health(),
        Endpoint::Ready => ops::ready(state),
        Endpoint::Metrics => ops::metrics(state),
    }
}

/// The document of this API; a test holds it equal to the handlers.
const OPENAPI: &str = include_str!("openapi.json");

fn is_open(state: &ControlState, route: &Route) -> bool {
    match route.endpoint {
        Endpoint::Health | Endpoint::Ready => true,
        Endpoint::Metrics => state.settings.metrics_open,
        _ => false,
    }
}

/// Whether this request may be answered at all.
fn admit(state: &ControlState, peer: SocketAddr, request: &Request<Incoming>) -> Result<(), Problem> {
    let value = |name: header::HeaderName| request.headers().get(name).and_then(|v| v.to_str().ok());
    let host = value(header::HOST).unwrap_or_default();
    // A web page may not write here through its visitor's browser. Without a
    // token nothing else would stop it.
    if let Some(origin) = request.headers().get(header::ORIGIN) {
        let own = |o: &str| o.strip_prefix("http://").or(o.strip_prefix("https://")) == Some(host) && !host.is_empty();
        if !origin.to_str().is_ok_and(own) {
            return Err(Problem::forbidden("This request comes from a web page of another origin."));
        }
    }
    let Some(tokens) = &state.tokens else {
        if !peer.ip().to_canonical().is_loopback() {
            return Err(Problem::forbidden("Without a token only this machine may ask."));
        }
        // DNS rebinding: a foreign name that resolves to loopback stays foreign.
        let ours = authority_host(host).is_ok_and(|name| {
            name == "localhost"
                || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
                || state.settings.hosts.iter().any(|h| h.as_str() == name)
        });
        return if ours {
            Ok(())
        } else {
            Err(Problem::forbidden("This name is not one of this API's (control.hosts)."))
        };
    };
    let given = value(header::AUTHORIZATION)
        .and_then(|v| v.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, token)| digest::digest(&digest::SHA256, token.trim().as_bytes()));
    let Some(given) = given else { return Err(Problem::unauthorized("Send `Authorization: Bearer <token>`.")) };
    // Digests of one length, all compared: time tells nothing of the tokens.
    let known = tokens.iter().fold(false, |known, token| {
        known | constant_time::verify_slices_are_equal(token.as_ref(), given.as_ref()).is_ok()
    });
    if known { Ok(()) } else { Err(Problem::unauthorized("This token is not known here.")) }
}

fn text(status: StatusCode, media: &'static str, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Full::new(body).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(media));
    response
}

fn json(status: StatusCode, body: &Value) -> Response<Body> {
    text(status, routing::JSON, body.to_string().into())
}
