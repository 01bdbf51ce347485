//! The HTTP path of a visitor: one connection (HTTP/1.1 or HTTP/2), many
//! requests, each routed by its own authority, forwarded over a stream to the
//! origin and told in one record at its end. What the rules say about heads is
//! in `headers`; who finds the stream is behind `Dial`.

mod answer;
mod body;
mod forward;
pub mod forwarded;
pub mod framing;
pub mod headers;
mod io;
mod origin_tls;
mod origins;
mod own;
pub mod page;
mod probe;
mod pulse;
mod record;
mod settings;
mod upgrade;
mod websocket;

#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::{Duration, SystemTime};

use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::own::OwnHosts;
pub use self::settings::HttpSettings;

use self::body::Body;
use self::io::VisitorIo;
use self::origin_tls::OriginTls;
use self::origins::{Origin, Origins};
use self::page::Template;
use self::pulse::{Pulse, Then};
use self::record::{Record, Tally};
use crate::dial::Dial;
use crate::error::{Chain, Error};
use crate::gate::Gates;
use crate::metrics::{Present, held};
use crate::model::{HostName, Visitor};
use crate::routes::Routes;
use crate::stream::Stream;
use crate::visit_log::{self, Legs, Visit, What};

/// The HTTP version that a visitor's connection speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1 or 1.0.
    Http1,
    /// HTTP/2: by ALPN, or by its preface in plain text.
    Http2,
}

impl Protocol {
    /// Its name in ALPN (RFC 7301).
    pub fn alpn(self) -> &'static [u8] {
        match self {
            Self::Http1 => b"http/1.1",
            Self::Http2 => b"h2",
        }
    }
}

/// How a visitor's bytes came.
#[derive(Clone)]
pub struct Via {
    /// What they speak.
    pub protocol: Protocol,
    /// The TLS connection that carried them, if one did.
    pub tls: Option<Tls>,
}

/// What a request has to know of the TLS connection that it came over.
#[derive(Clone)]
pub struct Tls {
    /// The name that the visitor asked for in the handshake.
    pub sni: Option<HostName>,
    /// Whether the certificate that was presented covers this host.
    pub covers: Arc<dyn Fn(&str) -> bool + Send + Sync>,
    /// How long its handshake took.
    pub took: Duration,
}

/// Serves HTTP to visitors.
pub struct Http<D> {
    routes: Arc<Routes>,
    dialer: Arc<D>,
    settings: HttpSettings,
    origin_tls: OriginTls,
    origins: Arc<Origins>,
    template: Template,
    gates: Arc<Gates>,
    own: OnceLock<OwnHosts>,
    tracker: TaskTracker,
}

/// One visitor's connection, as its requests see it.
struct Connection {
    visitor: Visitor,
    via: Via,
    pulse: Arc<Pulse>,
    drain: CancellationToken,
    cut: CancellationToken,
    /// A connection to an origin that is authenticated as this visitor.
    own: Mutex<Option<Origin>>,
}

impl Connection {
    /// Tells of a head that never became a request: hyper answered it by a bare
    /// status, or nothing did.
    fn refused(&self, error: Error) {
        let visit = Visit {
            at: SystemTime::now(),
            visitor: self.visitor.addr,
            kind: "none",
            protocol: self.pulse.protocol(),
            id: None,
            socket: None,
            tunnel: None,
            node: None,
            what: What::Connection,
            legs: Legs { tls: self.via.tls.as_ref().map(|tls| tls.took), ..Legs::default() },
            status: (error != Error::HelloTimeout).then(|| error.status()),
            bytes_up: 0,
            bytes_down: 0,
            first_byte: None,
            total: Duration::ZERO,
            error: Some(error),
        };
        visit_log::record(visit, None);
    }
}

impl<D: Dial> Http<D> {
    /// The HTTP path over these routes. Tasks (HTTP/2 streams, connections to
    /// origins) are spawned on `tracker`.
    ///
    /// # Errors
    /// `error_page` cannot be used.
    pub fn new(
        routes: Arc<Routes>,
        dialer: Arc<D>,
        gates: Arc<Gates>,
        settings: HttpSettings,
        tracker: TaskTracker,
    ) -> Result<Arc<Self>, String> {
        let template = Template::read(settings.error_page.as_deref())?;
        let origin_tls = OriginTls::new(settings.origin_tls, settings.origin_ca_file.clone());
        let origins = Origins::new(&settings, tracker.clone());
        Ok(Arc::new(Self {
            routes,
            dialer,
            settings,
            origin_tls,
            origins,
            template,
            gates,
            own: OnceLock::new(),
            tracker,
        }))
    }

    /// Whether this host is the node's own: where visitors log in, or one of
    /// `serve_own`.
    pub fn is_own_host(&self, host: &str) -> bool {
        self.gates.is_auth_host(host) || self.own.get().is_some_and(|own| own.has(host))
    }

    /// Answers for these hosts from here on; said once.
    pub fn serve_own(&self, hosts: OwnHosts) {
        let _ = self.own.set(hosts);
    }

    /// Closes the connections to origins that wait for a request, and keeps no
    /// more: for the end, when nobody is to wait for them.
    pub fn close(&self) {
        self.origins.close();
    }

    /// Serves one visitor's connection until it ends, upgraded connections
    /// included. `drain` finishes what runs and takes no more; `cut` ends
    /// everything now. Every request's record is told before this returns, or
    /// (HTTP/2) by a tracked task soon after.
    ///
    /// # Cancel safety
    /// Dropping it cuts the connection.
    pub async fn serve(
        self: &Arc<Self>,
        stream: Stream,
        visitor: Visitor,
        via: Via,
        drain: &CancellationToken,
        cut: &CancellationToken,
    ) {
        let protocol = via.protocol;
        let _present = Present::new(match protocol {
            Protocol::Http1 => metrics::gauge!("adit_http_connections", "protocol" => "h1"),
            Protocol::Http2 => metrics::gauge!("adit_http_connections", "protocol" => "h2"),
        });
        let pulse = Arc::new(Pulse::new(protocol == Protocol::Http1));
        let io = VisitorIo::new(stream, protocol, Arc::clone(&pulse), self.tracker.clone(), self.settings.linger);
        // Children, because polling a token locks it: connections must not meet at one lock.
        let (drain, cut) = (drain.child_token(), cut.child_token());
        let own = Mutex::new(None);
        let connection = Connection { visitor, via, pulse, drain: drain.clone(), cut: cut.clone(), own };
        let connection = Arc::new(connection);
        // Boxed: one visit in many is HTTP, and few of these are HTTP/2.
        let left = match protocol {
            Protocol::Http1 => self.serve_http1(io, &connection, &drain, &cut).await,
            Protocol::Http2 => {
                Box::pin(self.serve_http2(io, &connection, &drain, &cut)).await;
                None
            }
        };
        if let Some(upgrade) = connection.pulse.take_upgrade() {
            Box::pin(upgrade.run(left, self.settings.upgrade_idle, drain, cut)).await;
        }
    }

    /// Serves HTTP/1.1; gives the stream that is left after its end. hyper's part of a
    /// connection that is idle is put down until the visitor sends something.
    async fn serve_http1(
        self: &Arc<Self>,
        mut io: VisitorIo,
        connection: &Arc<Connection>,
        drain: &CancellationToken,
        cut: &CancellationToken,
    ) -> Option<Stream> {
        loop {
            let service = service_fn(|request| self.answering(connection, request));
            let mut hyper = Box::pin(self.http1().serve_connection(TokioIo::new(io), service));
            let left = self.drive(&mut hyper, |c| c.graceful_shutdown(), connection, drain, cut).await;
            let parts = Pin::into_inner(hyper).into_parts();
            io = parts.io.into_inner();
            match left {
                Left::Rests => io = io.again(parts.read_buf),
                // Of a connection that ends in any other way nothing is left.
                Left::Ended if connection.pulse.has_upgrade() => return io.into_stream(parts.read_buf),
                Left::Ended | Left::Cut => return None,
            }
            // Whatever comes, hyper and its driver know what to do.
            let _present = Present::new(held!(gauge: "adit_http_connections_resting").clone());
            tokio::select! {
                biased;
                () = cut.cancelled() => {}
                () = drain.cancelled() => {}
                () = poll_fn(|cx| io.poll_readable(cx)) => {}
                () = tokio::time::sleep_until(connection.pulse.rests_until(&self.settings)) => {}
            }
            connection.pulse.rested();
        }
    }

    async fn serve_http2(
        self: &Arc<Self>,
        io: VisitorIo,
        connection: &Arc<Connection>,
        drain: &CancellationToken,
        cut: &CancellationToken,
    ) {
        // Boxed: it is some kilobytes, which hyper and tokio would move about five times.
        let service = service_fn(|request| Box::pin(self.answering(connection, request)));
        let builder = self.http2(&connection.pulse, cut);
        let mut hyper = Box::pin(builder.serve_connection(TokioIo::new(io), service));
        self.drive(&mut hyper, |c| c.graceful_shutdown(), connection, drain, cut).await;
    }

    /// The answer to a request.
    fn answering(
        self: &Arc<Self>,
        at: &Arc<Connection>,
        request: Request<Incoming>,
    ) -> impl Future<Output = Result<Response<Body>, Infallible>> + Send + use<D> {
        let record = Record::begin(&at.pulse, at.visitor, request.method().clone(), request.uri().clone());
        let (http, at) = (Arc::clone(self), Arc::clone(at));
        async move { Ok(http.request(&at, request, record).await) }
    }

    fn http1(&self) -> http1::Builder {
        let mut builder = http1::Builder::new();
        builder
            // The connection's own watch knows idle from slow; hyper's has one figure for both.
            .header_read_timeout(None)
            .max_headers(self.settings.headers_max)
            .max_header_size(self.settings.head_max.0)
            .max_buf_size(self.settings.buffer_max());
        builder
    }

    fn http2(&self, pulse: &Arc<Pulse>, cut: &CancellationToken) -> http2::Builder<StreamTasks> {
        let s = &self.settings;
        let window = |size: usize| u32::try_from(size).unwrap_or(u32::MAX >> 1);
        let mut builder = http2::Builder::new(StreamTasks {
            tracker: self.tracker.clone(),
            pulse: Arc::clone(pulse),
            body_idle: s.body_idle,
            cut: cut.clone(),
        });
        builder
            .timer(TokioTimer::new())
            .enable_connect_protocol()
            .max_concurrent_streams(s.h2_streams)
            .max_header_list_size(window(s.head_max.0))
            .initial_stream_window_size(window(s.h2_stream_window.0))
            .initial_connection_window_size(window(s.h2_window.0))
            .max_send_buf_size(s.h2_send_buffer.0)
            .keep_alive_interval(s.h2_ping)
            .keep_alive_timeout(s.h2_ping_timeout)
            .max_pending_accept_reset_streams(s.h2_resets_pending)
            .max_local_error_reset_streams(s.h2_resets_local);
        builder
    }

    /// Polls a visitor's connection to its end, or until it rests, and holds it to its
    /// deadlines.
    async fn drive<C>(
        &self,
        hyper: &mut Pin<Box<C>>,
        close: impl Fn(Pin<&mut C>),
        connection: &Connection,
        drain: &CancellationToken,
        cut: &CancellationToken,
    ) -> Left
    where
        C: Future<Output = hyper::Result<()>>,
    {
        let pulse = &connection.pulse;
        let mut closing = false;
        let (at, _) = pulse.due(&self.settings);
        let mut timer = pin!(tokio::time::sleep_until(at));
        loop {
            let watched = poll_fn(|cx| {
                if let Poll::Ready(end) = hyper.as_mut().poll(cx) {
                    if let Err(error) = end {
                        tracing::debug!(error = %Chain(&error), "a visitor's connection ended in an error");
                        if error.is_parse() {
                            let large = error.is_parse_too_large();
                            connection.refused(if large { Error::HeadTooLarge } else { Error::BadRequest });
                        }
                    }
                    return Poll::Ready(None);
                }
                // The timer is only ever brought forward; where it is early, look again.
                loop {
                    let (at, then) = pulse.due(&self.settings);
                    if at <= Instant::now() && then != Then::Look {
                        return Poll::Ready(Some(then));
                    }
                    if at < timer.deadline() || timer.is_elapsed() {
                        timer.as_mut().reset(at);
                    }
                    if timer.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                }
            });
            tokio::select! {
                biased;
                () = cut.cancelled() => {
                    pulse.cut(Error::Draining);
                    return Left::Cut;
                }
                () = drain.cancelled(), if !closing => {}
                then = watched => match then {
                    None => return Left::Ended,
                    Some(Then::Rest) => return Left::Rests,
                    Some(Then::Cut) => {
                        let late = pulse.overdue();
                        pulse.cut(late);
                        if late == Error::HelloTimeout {
                            connection.refused(late);
                        }
                        return Left::Cut;
                    }
                    Some(Then::Close | Then::Look) if closing => continue,
                    Some(Then::Close | Then::Look) => {}
                }
            }
            closing = true;
            pulse.closing();
            close(hyper.as_mut());
        }
    }
}

/// How a drive ends.
enum Left {
    /// hyper is through with it.
    Ended,
    /// It ends now.
    Cut,
    /// Nothing is under way on it.
    Rests,
}

/// Runs the streams of an HTTP/2 connection, each held to its progress.
#[derive(Clone)]
struct StreamTasks {
    tracker: TaskTracker,
    pulse: Arc<Pulse>,
    body_idle: Duration,
    cut: CancellationToken,
}

impl<F> hyper::rt::Executor<F> for StreamTasks
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        // hyper spawns a stream right after it called the service for it.
        let tally: Option<Arc<Tally>> = self.pulse.take_latest();
        let (body_idle, cut) = (self.body_idle, self.cut.clone());
        self.tracker.spawn(async move {
            let Some(tally) = tally else { return stream.await };
            let cut = async {
                cut.cancelled().await;
                tally.fail(Error::Draining);
            };
            // The reason is noted before the stream is dropped, which resets it.
            tokio::select! {
                biased;
                () = cut => {}
                () = stream => {}
                () = tally.stall(body_idle) => {}
            }
        });
    }
}
