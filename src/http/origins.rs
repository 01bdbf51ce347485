//! Connections to origins, kept for the next request: a new one costs a round
//! trip to the origin's site, and a handshake where it speaks TLS. They are kept
//! by the way they go (one tunnel through one session) and end with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use dashmap::DashMap;
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::header::{
    AUTHORIZATION, CONNECTION, HOST, HeaderMap, HeaderName, TRANSFER_ENCODING, UPGRADE, WWW_AUTHENTICATE,
};
use hyper::http::uri::{Authority, Scheme};
use hyper::{Request, Response, Uri};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::pki_types::ServerName;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::Connection;
use super::body::Upload;
use super::headers::KEEP_ALIVE;
use super::io::OriginIo;
use super::settings::HttpSettings;
use crate::error::{Chain, Error};
use crate::limits::Permit;
use crate::metrics::{Present, held};
use crate::stream::Stream;

/// What must not be sent twice goes over a connection that was used this
/// recently, or over a new one: the origin might be closing an older one right now.
const FRESH: Duration = Duration::from_secs(1);

/// A request waits no longer than this for another's connection.
const OPENING: Duration = Duration::from_secs(1);

/// Whom a connection reaches, and as what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    /// `Way::id`.
    pub(super) way: u64,
    /// Over TLS: the name asked for, and whether it was verified.
    pub(super) tls: Option<(ServerName<'static>, bool)>,
    /// HTTP/2, where the origin agrees to it.
    pub(super) http2: bool,
}

/// The connections that take another request: those of HTTP/1.1 that wait for
/// one, and all of HTTP/2.
pub(super) struct Origins {
    kept: DashMap<u64, Vec<Kept>>,
    shared: DashMap<u64, SharedOnes>,
    count: AtomicUsize,
    closed: AtomicBool,
    settings: HttpSettings,
    tracker: TaskTracker,
}

struct Kept {
    origin: Origin,
    since: Instant,
    _present: Present,
}

impl Kept {
    fn is_over(&self) -> bool {
        self.origin.is_closed() || self.since.elapsed() >= self.origin.idle
    }
}

/// All HTTP/2 connections of a way.
#[derive(Default)]
struct SharedOnes {
    all: Vec<Shared>,
    /// Held by who opens another one.
    opening: Arc<tokio::sync::Mutex<()>>,
}

/// An HTTP/2 connection, which carries many requests at once.
struct Shared {
    requests: http2::SendRequest<Upload>,
    key: Key,
    streams: Arc<AtomicUsize>,
    made: Instant,
    /// When it was last seen with a request.
    used: Instant,
}

/// A connection, as one request uses it.
enum Requests {
    /// HTTP/1.1. Dropping the guard closes the connection.
    One(http1::SendRequest<Upload>, DropGuard),
    /// A stream of HTTP/2.
    Many(http2::SendRequest<Upload>),
}

/// A connection in use for one request. Dropping it closes it (HTTP/1.1), or
/// ends the request's stream with the answer's body (HTTP/2).
pub(super) struct Origin {
    requests: Requests,
    /// Among the streams of an HTTP/2 connection.
    _place: Option<Permit>,
    key: Key,
    origins: Arc<Origins>,
    made: Instant,
    /// How long it may wait for a request.
    idle: Duration,
    reused: bool,
    /// It serves one visitor's connection alone: by what was said on it (NTLM, the
    /// PROXY protocol).
    bound: bool,
    /// Where it goes back to, if so.
    owner: Option<Arc<Connection>>,
}

/// A request that was not answered.
pub(super) struct Unanswered {
    pub(super) error: hyper::Error,
    /// The request, where nothing of it was sent.
    pub(super) unsent: Option<Box<Request<Upload>>>,
}

impl Origins {
    pub(super) fn new(settings: &HttpSettings, tracker: TaskTracker) -> Arc<Self> {
        Arc::new(Self {
            kept: DashMap::new(),
            shared: DashMap::new(),
            count: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            settings: settings.clone(),
            tracker,
        })
    }

    /// Whether connections are kept at all.
    pub(super) fn keeps(&self) -> bool {
        !self.settings.origin_idle.is_zero() && !self.closed.load(Ordering::Relaxed)
    }

    /// Closes the kept ones and keeps no more.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.kept.clear();
        self.shared.clear();
        self.count.store(0, Ordering::Relaxed);
    }

    /// A connection that is there: a stream of a shared one, or the kept one used
    /// last; for what must not be sent twice none that has waited.
    pub(super) fn take(self: &Arc<Self>, key: &Key, repeatable: bool) -> Option<Origin> {
        if key.http2
            && let Some(origin) = self.share(key)
        {
            return Some(origin);
        }
        let mut kept = self.kept.get_mut(&key.way)?;
        let before = kept.len();
        let mut over = Vec::new();
        let found = loop {
            let Some(at) = kept.iter().rposition(|kept| kept.origin.key == *key) else { break None };
            let fresh = repeatable || kept.get(at).is_some_and(|kept| kept.since.elapsed() < FRESH);
            if !fresh {
                break None;
            }
            let found = kept.remove(at);
            if !found.is_over() {
                break Some(found.origin);
            }
            over.push(found);
        };
        self.count.fetch_sub(before - kept.len(), Ordering::Relaxed);
        drop(kept);
        found.map(|mut origin| {
            origin.reused = true;
            origin
        })
    }

    /// Waits while another request opens an HTTP/2 connection that this one may
    /// share; the guard is held while this one does.
    pub(super) async fn turn_to_open(&self, way: u64) -> Option<tokio::sync::OwnedMutexGuard<()>> {
        let opening = Arc::clone(&self.shared.entry(way).or_default().opening);
        tokio::time::timeout(OPENING, opening.lock_owned()).await.ok()
    }

    fn share(self: &Arc<Self>, key: &Key) -> Option<Origin> {
        let mut shared = self.shared.get_mut(&key.way)?;
        // An old one ends with its last stream; so does one that said GOAWAY.
        shared.all.retain(|s| !s.requests.is_closed() && s.made.elapsed() < self.settings.origin_age);
        shared.all.iter_mut().filter(|s| s.key == *key).find_map(|s| {
            let place = Permit::take(&s.streams, self.settings.origin_h2_streams)?;
            s.used = Instant::now();
            let mut origin = self.origin(Requests::Many(s.requests.clone()), key.clone());
            (origin.reused, origin._place) = (true, Some(place));
            Some(origin)
        })
    }

    /// Keeps a connection, in place of the one that waits longest where there
    /// are as many as there may be.
    fn keep(&self, origin: Origin) {
        if !self.keeps() || origin.made.elapsed() >= self.settings.origin_age {
            return;
        }
        let way = origin.key.way;
        let present = Present::new(held!(gauge: "adit_origin_connections_kept").clone());
        let mut replaced = None;
        let mut kept = self.kept.entry(way).or_default();
        let full = self.count.load(Ordering::Relaxed) >= self.settings.origin_kept;
        if kept.len() >= self.settings.origin_kept_per_tunnel || full {
            if kept.is_empty() {
                return;
            }
            replaced = Some(kept.remove(0));
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
        // Its end is noticed here or, later, by `forget` under the same lock.
        if !origin.is_closed() && !self.closed.load(Ordering::SeqCst) {
            kept.push(Kept { origin, since: Instant::now(), _present: present });
            self.count.fetch_add(1, Ordering::Relaxed);
        }
        drop(kept);
        drop(replaced);
    }

    /// Drops those of one way that have ended or waited too long.
    fn forget(&self, way: u64) {
        let mut over = Vec::new();
        if let Some(mut kept) = self.kept.get_mut(&way) {
            let all = std::mem::take(&mut *kept);
            let (ended, waiting): (Vec<_>, Vec<_>) = all.into_iter().partition(Kept::is_over);
            *kept = waiting;
            self.count.fetch_sub(ended.len(), Ordering::Relaxed);
            over = ended;
        }
        self.kept.remove_if(&way, |_, kept| kept.is_empty());
        drop(over);
        if let Some(mut shared) = self.shared.get_mut(&way) {
            shared.all.retain_mut(|s| {
                if s.streams.load(Ordering::Relaxed) > 0 {
                    s.used = Instant::now();
                }
                !s.requests.is_closed() && s.used.elapsed() < self.settings.origin_h2_idle
            });
        }
        self.shared.remove_if(&way, |_, shared| shared.all.is_empty() && Arc::strong_count(&shared.opening) == 1);
    }

    fn origin(self: &Arc<Self>, requests: Requests, key: Key) -> Origin {
        Origin {
            requests,
            _place: None,
            key,
            origins: Arc::clone(self),
            made: Instant::now(),
            idle: self.settings.origin_idle,
            reused: false,
            bound: false,
            owner: None,
        }
    }

    /// Speaks HTTP over a new stream to an origin, which serves one visitor alone
    /// where it is `private`.
    ///
    /// # Errors
    /// `OriginReset`.
    pub(super) async fn handshake(
        self: &Arc<Self>,
        stream: Stream,
        key: Key,
        http2: bool,
        private: bool,
    ) -> Result<Origin, Error> {
        let io = TokioIo::new(OriginIo::new(stream));
        let mut origin = match http2 {
            true => self.handshake_http2(io, key, !private).await?,
            false => self.handshake_http1(io, key).await?,
        };
        origin.bound = private;
        Ok(origin)
    }

    async fn handshake_http1(self: &Arc<Self>, io: TokioIo<OriginIo>, key: Key) -> Result<Origin, Error> {
        let mut builder = http1::Builder::new();
        builder.max_headers(self.settings.headers_max).max_buf_size(self.settings.buffer_max());
        let (requests, driver) = builder.handshake(io).await.map_err(|_| Error::OriginReset)?;
        let stop = CancellationToken::new();
        let guard = stop.clone().drop_guard();
        self.tracker.spawn(Arc::clone(self).drive(key.way, driver.with_upgrades(), stop, self.settings.origin_idle));
        Ok(self.origin(Requests::One(requests, guard), key))
    }

    async fn handshake_http2(self: &Arc<Self>, io: TokioIo<OriginIo>, key: Key, share: bool) -> Result<Origin, Error> {
        let s = &self.settings;
        let window = u32::try_from(s.origin_h2_stream_window.0).unwrap_or(u32::MAX >> 1);
        let streams = u32::try_from(s.origin_h2_streams).unwrap_or(u32::MAX);
        let mut builder = http2::Builder::new(Tasks(self.tracker.clone()));
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(window)
            // Room for all streams: one that is not read must not hold the others up.
            .initial_connection_window_size(window.saturating_mul(streams).min(u32::MAX >> 1))
            .max_send_buf_size(s.h2_send_buffer.0)
            .max_header_list_size(u32::try_from(s.head_max.0).unwrap_or(u32::MAX));
        let (requests, driver) = builder.handshake(io).await.map_err(|_| Error::OriginReset)?;
        let streams = Arc::<AtomicUsize>::default();
        let place = Permit::take(&streams, s.origin_h2_streams).ok_or(Error::Internal)?;
        // It ends once nobody can ask it for anything.
        self.tracker.spawn(Arc::clone(self).drive(key.way, driver, CancellationToken::new(), s.origin_h2_idle));
        if share && self.keeps() {
            let now = Instant::now();
            let (requests, key) = (requests.clone(), key.clone());
            let mut shared = self.shared.entry(key.way).or_default();
            // Its end is noticed here or, later, by `forget` under the same lock.
            if !requests.is_closed() && !self.closed.load(Ordering::SeqCst) {
                shared.all.push(Shared { requests, key, streams, made: now, used: now });
            }
        }
        let mut origin = self.origin(Requests::Many(requests), key);
        origin._place = Some(place);
        Ok(origin)
    }

    /// Runs a connection to its end.
    async fn drive(
        self: Arc<Self>,
        way: u64,
        driver: impl Future<Output = hyper::Result<()>>,
        stop: CancellationToken,
        idle: Duration,
    ) {
        let mut driver = Box::pin(driver);
        // Nothing waits longer than twice its time.
        let look = idle.max(Duration::from_millis(100));
        loop {
            tokio::select! {
                end = &mut driver => {
                    if let Err(error) = end {
                        tracing::debug!(error = %Chain(&error), "a connection to an origin ended in an error");
                    }
                    break;
                }
                // Dropped, it closes the way through the tunnel.
                () = stop.cancelled() => break,
                () = tokio::time::sleep(look) => self.forget(way),
            }
        }
        drop(driver);
        self.forget(way);
    }
}

/// Runs what an HTTP/2 connection spawns.
#[derive(Clone)]
struct Tasks(TaskTracker);

impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}

impl Origin {
    /// Whether it served another request before.
    pub(super) fn reused(&self) -> bool {
        self.reused
    }

    /// Whether each request on it is a stream of HTTP/2.
    pub(super) fn is_http2(&self) -> bool {
        matches!(self.requests, Requests::Many(_))
    }

    fn is_closed(&self) -> bool {
        match &self.requests {
            Requests::One(requests, _) => requests.is_closed(),
            Requests::Many(requests) => requests.is_closed(),
        }
    }

    /// Whether it reaches `key`'s origin by any of these ways.
    pub(super) fn reaches(&self, ways: impl IntoIterator<Item = u64>, key: &Key) -> bool {
        self.key.tls == key.tls && ways.into_iter().any(|way| way == self.key.way) && !self.is_closed()
    }

    /// Its way's number.
    pub(super) fn way(&self) -> u64 {
        self.key.way
    }

    /// Sends a request; the answer's head.
    pub(super) async fn send(&mut self, mut request: Request<Upload>) -> Result<Response<Incoming>, Unanswered> {
        self.bound |= binds(request.headers(), AUTHORIZATION);
        let answered = match &mut self.requests {
            Requests::One(requests, _) => requests.try_send_request(request).await,
            Requests::Many(requests) => {
                let scheme = if self.key.tls.is_some() { Scheme::HTTPS } else { Scheme::HTTP };
                for_http2(&mut request, scheme);
                requests.try_send_request(request).await
            }
        };
        answered.map_err(|mut refused| Unanswered {
            unsent: refused.take_message().map(Box::new),
            error: refused.into_error(),
        })
    }

    /// Learns from an answer's head how the connection may be used again.
    pub(super) fn learn(&mut self, answer: &HeaderMap, visitor: Option<&Arc<Connection>>) {
        self.bound |= binds(answer, WWW_AUTHENTICATE);
        if self.bound {
            self.owner = visitor.cloned();
        }
        if let Some(timeout) = keep_alive_timeout(answer) {
            self.idle = self.idle.min(timeout.saturating_sub(Duration::from_secs(1)));
        }
    }

    /// Where this request ends on it is not agreed on: it serves no other one.
    pub(super) fn serves_no_more(&mut self) {
        self.idle = Duration::ZERO;
    }

    /// The request is answered in full: waits for the next one.
    pub(super) fn give_back(mut self) {
        let Requests::One(requests, _) = &self.requests else { return };
        if requests.is_closed() || self.idle.is_zero() {
            return;
        }
        if requests.is_ready() {
            return self.wait_for_the_next();
        }
        // Its task has not seen the end yet, or the request's body is still on its way.
        let tracker = self.origins.tracker.clone();
        if tokio::runtime::Handle::try_current().is_ok() {
            tracker.spawn(async move {
                let Requests::One(requests, _) = &mut self.requests else { return };
                let ready = tokio::time::timeout(self.idle, requests.ready()).await;
                if matches!(ready, Ok(Ok(()))) {
                    self.wait_for_the_next();
                }
            });
        }
    }

    fn wait_for_the_next(mut self) {
        self.reused = true;
        if self.bound {
            if let Some(owner) = self.owner.take() {
                *owner.own.lock() = Some(self);
            }
            return;
        }
        let origins = Arc::clone(&self.origins);
        origins.keep(self);
    }

    /// What ends the connection, for one who takes its stream over.
    pub(super) fn into_guard(self) -> Option<DropGuard> {
        match self.requests {
            Requests::One(_, guard) => Some(guard),
            Requests::Many(_) => None,
        }
    }
}

/// Turns a request for HTTP/1.1 into one for HTTP/2 (RFC 9113 §8.2.2, §8.3.1).
fn for_http2(request: &mut Request<Upload>, scheme: Scheme) {
    let headers = request.headers_mut();
    for name in [CONNECTION, TRANSFER_ENCODING, UPGRADE] {
        headers.remove(name);
    }
    let authority = headers.remove(HOST).and_then(|host| Authority::try_from(host.as_bytes()).ok());
    let mut parts = std::mem::take(request.uri_mut()).into_parts();
    let bare = parts.path_and_query.clone();
    (parts.scheme, parts.authority) = (Some(scheme), authority);
    // Checked before; without an authority the target stays what it was.
    *request.uri_mut() = Uri::from_parts(parts).unwrap_or_else(|_| bare.map_or_else(Uri::default, Uri::from));
}

/// Whether a field speaks of authentication that holds for a connection rather
/// than a request (RFC 4559 §6, MS-NTHT).
fn binds(headers: &HeaderMap, field: HeaderName) -> bool {
    headers.get_all(field).iter().any(|value| {
        let scheme = value.as_bytes().split(|b| *b == b' ').next().unwrap_or_default();
        [b"ntlm".as_slice(), b"negotiate"].iter().any(|bound| scheme.eq_ignore_ascii_case(bound))
    })
}

/// How long the origin says that it keeps an idle connection (RFC 2068 §19.7.1.1).
fn keep_alive_timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(KEEP_ALIVE)?.to_str().ok()?;
    let timeout = text.split(',').find_map(|part| {
        let (name, value) = part.split_once('=')?;
        name.trim().eq_ignore_ascii_case("timeout").then(|| value.trim().parse().ok())?
    });
    timeout.map(Duration::from_secs)
}
