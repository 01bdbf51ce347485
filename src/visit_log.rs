//! The record of one visit, and where it goes: the log of the node and the
//! console of the SSH session that served it. Writing a record never waits.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::error::Error;
use crate::model::{SocketId, TunnelId};

/// One request (HTTP) or one connection (everything else), told once, at its end.
#[derive(Debug, Clone)]
pub struct Visit {
    /// When it began.
    pub at: SystemTime,
    /// Who came.
    pub visitor: SocketAddr,
    /// The socket, if one was found.
    pub socket: Option<SocketId>,
    /// The tunnel that served it, if any did.
    pub tunnel: Option<TunnelId>,
    /// What was asked: method and path of a request, or the socket's type.
    pub what: What,
    /// The HTTP status sent, where HTTP was spoken.
    pub status: Option<u16>,
    /// Bytes from the visitor to the origin (bodies only, for HTTP).
    pub bytes_up: u64,
    /// Bytes from the origin to the visitor (bodies only, for HTTP).
    pub bytes_down: u64,
    /// From the start of the visit to the origin's first byte.
    pub first_byte: Option<Duration>,
    /// From the start to the end.
    pub total: Duration,
    /// Why it failed, if it did.
    pub error: Option<Error>,
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
    /// A raw connection of this type.
    Connection(&'static str),
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
                what = %visit.what,
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

impl std::fmt::Display for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            // The visitor chose these bytes: nothing in them may move a terminal.
            What::Request { method, host, path } => {
                write!(f, "{} {}{}", method.escape_debug(), host.escape_debug(), path.escape_debug())
            }
            What::Connection(kind) => f.write_str(kind),
        }
    }
}
