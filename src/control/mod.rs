//! The operator's listener: who may ask, limits, and one table of what can be
//! asked for. What each call does is in `api`, the event stream in `events`.

mod api;
mod events;
mod problem;

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, HOST, HeaderMap, ORIGIN, WWW_AUTHENTICATE};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::problem::Problem;
use crate::feed::Feed;
use crate::feed::records::Records;
use crate::fields::{self, Fields};
use crate::model::authority_host;
use crate::routes::Routes;

/// The knobs of `[control]`.
#[derive(Debug, Clone, PartialEq)]
pub struct ControlSettings {
    /// Where the API, metrics and health checks are served.
    pub listen: Vec<SocketAddr>,
    /// A file with the bearer token that calls must carry.
    pub token_file: Option<PathBuf>,
    /// Whether `/metrics` is told without the token.
    pub metrics_open: bool,
    /// Largest body of a call.
    pub body_max: fields::Bytes,
    /// Connections at once.
    pub connections: usize,
    /// Time for a call's head, and for its body.
    pub deadline: Duration,
}

impl ControlSettings {
    /// Reads `[control]`.
    pub fn read(f: &mut Fields) -> Self {
        Self {
            listen: f.take("listen", vec![SocketAddr::from(([127, 0, 0, 1], 9090))]),
            token_file: f.optional("token_file"),
            metrics_open: f.take("metrics_open", false),
            body_max: f.take("body_max", fields::Bytes(256 << 10)),
            connections: f.take("connections", 256),
            deadline: f.take("deadline", Duration::from_secs(10)),
        }
    }
}

type Body = BoxBody<Bytes, Infallible>;
type Answer = Result<Response<Body>, Problem>;

/// What the API shows and changes.
pub struct Parts {
    /// The records.
    pub records: Arc<Records>,
    /// The feed under them.
    pub feed: Arc<dyn Feed>,
    /// The last revision that acts on every visitor.
    pub applied: watch::Receiver<u64>,
    /// The route table.
    pub routes: Arc<Routes>,
    /// `GET /v1/status`.
    pub status: Box<dyn Fn() -> Value + Send + Sync>,
    /// `GET /metrics`.
    pub metrics: Box<dyn Fn() -> String + Send + Sync>,
    /// Whether the node takes visitors.
    pub ready: Box<dyn Fn() -> bool + Send + Sync>,
    /// `POST /v1/drain`.
    pub drain: CancellationToken,
}

/// The operator's API of this node.
pub struct Control {
    settings: ControlSettings,
    token: Option<String>,
    connections: Semaphore,
    parts: Parts,
}

impl Control {
    /// The API; reads the token.
    ///
    /// # Errors
    /// What to tell the operator: a listener beyond loopback needs a token.
    pub fn new(settings: ControlSettings, parts: Parts) -> Result<Arc<Self>, String> {
        let token = match &settings.token_file {
            Some(path) => {
                let at = path.display();
                let text = std::fs::read_to_string(path)
                    .map_err(|e| format!("control.token_file: {at} cannot be read: {e}; make it, readable by adit"))?;
                let token = text.trim().to_owned();
                if token.len() < 16 {
                    return Err(format!(
                        "control.token_file: {at} holds fewer than 16 characters; write a random token"
                    ));
                }
                Some(token)
            }
            None => {
                if let Some(open) = settings.listen.iter().find(|a| !a.ip().is_loopback()) {
                    return Err(format!(
                        "control.listen: {open} is not loopback, and there is no token; \
                         write control.token_file, or listen on 127.0.0.1"
                    ));
                }
                tracing::warn!("the control API needs no token: whoever is on this machine may change this node");
                None
            }
        };
        let connections = Semaphore::new(settings.connections);
        Ok(Arc::new(Self { settings, token, connections, parts }))
    }

    /// Serves a listener until `stop`.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, stop: CancellationToken) {
        let tasks = TaskTracker::new();
        loop {
            let Ok(place) = self.connections.acquire().await else { return };
            place.forget();
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = stop.cancelled() => break,
            };
            let tcp = match accepted {
                Ok((tcp, _)) => tcp,
                Err(error) => {
                    self.connections.add_permits(1);
                    tracing::warn!(%error, "the control listener cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (control, stop) = (Arc::clone(&self), stop.clone());
            tasks.spawn(async move {
                let service = service_fn(|request| {
                    let (control, stop) = (Arc::clone(&control), stop.clone());
                    async move { control.answer(request, &stop).await }
                });
                let mut http = hyper::server::conn::http1::Builder::new();
                http.timer(TokioTimer::new()).header_read_timeout(control.settings.deadline).max_headers(64);
                let mut connection = std::pin::pin!(http.serve_connection(TokioIo::new(tcp), service));
                let ended = tokio::select! {
                    ended = connection.as_mut() => ended,
                    () = stop.cancelled() => {
                        connection.as_mut().graceful_shutdown();
                        let last = tokio::time::timeout(Duration::from_secs(1), connection).await;
                        last.unwrap_or(Ok(()))
                    }
                };
                if let Err(error) = ended {
                    tracing::debug!(%error, "a control connection broke");
                }
                control.connections.add_permits(1);
            });
        }
        tasks.close();
        let _ = tokio::time::timeout(Duration::from_secs(2), tasks.wait()).await;
    }

    async fn answer(
        self: &Arc<Self>,
        request: Request<Incoming>,
        stop: &CancellationToken,
    ) -> Result<Response<Body>, Infallible> {
        let head = request.method() == hyper::Method::HEAD;
        let answer = match self.admit(&request) {
            Ok(()) => self.call(request, stop).await,
            Err(problem) => Err(problem),
        };
        let mut answer = answer.unwrap_or_else(Problem::into_answer);
        if head {
            *answer.body_mut() = api::empty();
        }
        Ok(answer)
    }

    /// Whether this call may be made.
    fn admit(&self, request: &Request<Incoming>) -> Result<(), Problem> {
        let path = request.uri().path();
        let open = matches!(path, "/healthz" | "/readyz") || (path == "/metrics" && self.settings.metrics_open);
        if open {
            return Ok(());
        }
        let headers = request.headers();
        match &self.token {
            Some(token) => {
                let given = headers.get(AUTHORIZATION).and_then(|v| v.to_str().ok()).unwrap_or_default();
                let given = given.split_once(' ').filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
                let given = given.map_or("", |(_, token)| token.trim());
                let same = aws_lc_rs::constant_time::verify_slices_are_equal(given.as_bytes(), token.as_bytes());
                same.map_err(|_| {
                    Problem::new(
                        StatusCode::UNAUTHORIZED,
                        "send the token of control.token_file as Authorization: Bearer",
                    )
                    .header(WWW_AUTHENTICATE, "Bearer")
                })
            }
            None => only_local_programs(headers),
        }
    }
}

/// Without a token the machine's own programs are trusted, but not the pages in
/// its browsers: those name another origin, or by DNS rebinding another host.
fn only_local_programs(headers: &HeaderMap) -> Result<(), Problem> {
    let host = headers.get(HOST).and_then(|h| h.to_str().ok()).unwrap_or_default();
    let local =
        authority_host(host).is_ok_and(|h| h == "localhost" || h.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()));
    if !local {
        return Err(Problem::new(
            StatusCode::FORBIDDEN,
            "without a token, call this listener as localhost or 127.0.0.1",
        ));
    }
    if headers.contains_key(ORIGIN) {
        return Err(Problem::new(StatusCode::FORBIDDEN, "pages in browsers may not call this listener"));
    }
    Ok(())
}
