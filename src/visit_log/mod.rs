//! The record of one visit, and where it goes: the log of the node and the
//! console of the SSH session that served it. Writing a record never waits.

pub mod access_log;
pub(crate) mod line;

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use hyper::header::HeaderValue;

use self::access_log::AccessLog;
use crate::error::Error;
use crate::model::{NodeId, SocketId, TunnelId};

/// One request (HTTP) or one connection (everything else), told once, at its end.
#[derive(Debug, Clone)]
pub struct Visit {
    /// When it began.
    pub at: SystemTime,
    /// Who came.
    pub visitor: SocketAddr,
    /// The type of the socket; `none` where no socket was found.
    pub kind: &'static str,
    /// What the visitor spoke: `h1`, `h2`, `tls` or `tcp`.
    pub protocol: &'static str,
    /// The request's id.
    pub id: Option<HeaderValue>,
    /// The socket, if one was found.
    pub socket: Option<SocketId>,
    /// The tunnel that served it, if any did.
    pub tunnel: Option<TunnelId>,
    /// The nodes, where it came in at another one than the tunnel's.
    pub node: Option<Far>,
    /// What was asked.
    pub what: What,
    /// The HTTP status sent, where HTTP was spoken.
    pub status: Option<u16>,
    /// Bytes from the visitor to the origin (bodies only, for HTTP).
    pub bytes_up: u64,
    /// Bytes from the origin to the visitor (bodies only, for HTTP).
    pub bytes_down: u64,
    /// How long its parts took.
    pub legs: Legs,
    /// From the start of the visit to the origin's first byte.
    pub first_byte: Option<Duration>,
    /// From the start to the end.
    pub total: Duration,
    /// Why it failed, if it did.
    pub error: Option<Error>,
}

/// Where a visit came in, and where its tunnel is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Far {
    /// The node that the visitor came to.
    pub entry: NodeId,
    /// The node where the tunnel is logged in.
    pub owner: NodeId,
    /// The round trip between them, as it was measured.
    pub between: Option<Duration>,
}

/// What a visit asked for.
#[derive(Debug, Clone)]
pub enum What {
    /// An HTTP request.
    Request {
        /// The method.
        method: String,
        /// The name asked for.
        host: String,
        /// Path and query as sent.
        path: String,
    },
    /// A raw connection.
    Connection,
}

/// How long the parts of a visit took, as far as it came.
#[derive(Debug, Clone, Copy, Default)]
pub struct Legs {
    /// The TLS handshake of the connection that it came over.
    pub tls: Option<Duration>,
    /// From its start until the way to the origin was asked for: the route, the gate.
    pub route: Option<Duration>,
    /// Until there was a connection to the origin.
    pub dial: Option<Duration>,
    /// How much of that the tunnel took at another node.
    pub tunnel: Option<Duration>,
}

static ACCESS_LOG: OnceLock<AccessLog> = OnceLock::new();

/// Has all visits of this process written to an access log, from now on.
pub fn install(log: AccessLog) {
    let _ = ACCESS_LOG.set(log);
}

/// The access log, if there is one.
pub fn access_log() -> Option<&'static AccessLog> {
    ACCESS_LOG.get()
}

/// Takes the visits that one SSH session served. Must not block: a sink that
/// cannot keep up drops and counts.
pub trait Sink: Send + Sync {
    /// One visit has ended.
    fn record(&self, visit: &Arc<Visit>);
}

/// Tells a finished visit to the node's log and metrics, and to the session
/// that served it.
pub fn record(visit: Visit, console: Option<&Arc<dyn Sink>>) {
    let visit = Arc::new(visit);
    crate::metrics::visit(&visit);
    log(&visit);
    if let Some(access_log) = access_log() {
        access_log.record(&visit);
    }
    if let Some(console) = console {
        console.record(&visit);
    }
}

/// One line in the node's log. `tracing` needs a constant level per callsite.
fn log(visit: &Visit) {
    macro_rules! line {
        ($level:expr) => {
            tracing::event!(
                target: "adit::visit",
                $level,
                visitor = %visit.visitor,
                socket = visit.socket.as_ref().map(|s| s.as_str()),
                tunnel = visit.tunnel.as_ref().map(|t| t.as_str()),
                node = visit.node.as_ref().map(|far| far.owner.as_str()),
                what = %visit,
                status = visit.status,
                up = visit.bytes_up,
                down = visit.bytes_down,
                first_byte_ms = visit.first_byte.map(|d| d.as_millis() as u64),
                total_ms = visit.total.as_millis() as u64,
                error = visit.error.map(Error::label),
                fault = visit.error.map(|e| e.fault().as_str()),
            )
        };
    }
    match visit.error.map_or(tracing::Level::DEBUG, Error::level) {
        tracing::Level::ERROR => line!(tracing::Level::ERROR),
        tracing::Level::WARN => line!(tracing::Level::WARN),
        tracing::Level::INFO => line!(tracing::Level::INFO),
        _ => line!(tracing::Level::DEBUG),
    }
}

/// What was asked, in a few words.
impl std::fmt::Display for Visit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.what {
            // The visitor chose these bytes: nothing in them may move a terminal.
            What::Request { method, host, path } => {
                write!(f, "{} {}{}", method.escape_debug(), host.escape_debug(), path.escape_debug())
            }
            What::Connection => f.write_str(self.kind),
        }
    }
}
