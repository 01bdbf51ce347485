//! Connections to origins, kept for the next request: a new one costs a round
//! trip to the origin's site, and a handshake where it speaks TLS. They are kept
//! by the way they go (one tunnel through one session) and end with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use dashmap::DashMap;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderName, WWW_AUTHENTICATE};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::body::Upload;
use super::headers::KEEP_ALIVE;
use super::io::OriginIo;
use super::settings::HttpSettings;
use super::{Chain, Connection};
use crate::error::Error;
use crate::metrics::Present;
use crate::stream::Stream;

/// What must not be sent twice goes over a connection that was used this
/// recently, or over a new one: the origin might be closing an older one right now.
const FRESH: Duration = Duration::from_secs(1);

/// Whom a connection reaches, and as what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    /// `Way::id`.
    pub(super) way: u64,
    /// Over TLS: the name asked for, and whether it was verified.
    pub(super) tls: Option<(ServerName<'static>, bool)>,
}

/// The connections that wait for a request.
pub(super) struct Origins {
    kept: DashMap<u64, Vec<Kept>>,
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
        self.origin.requests.is_closed() || self.since.elapsed() >= self.origin.idle
    }
}

/// A connection in use for one request. Dropping it closes it.
pub(super) struct Origin {
    requests: http1::SendRequest<Upload>,
    stop: DropGuard,
    key: Key,
    origins: Arc<Origins>,
    made: Instant,
    /// How long it may wait for a request.
    idle: Duration,
    reused: bool,
    /// What it is asked as is bound to the visitor's connection (NTLM).
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
        self.count.store(0, Ordering::Relaxed);
    }

    /// A kept connection, the one used last; for what must not be sent twice
    /// none that has waited.
    pub(super) fn take(&self, key: &Key, repeatable: bool) -> Option<Origin> {
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

    /// Keeps a connection, in place of the one that waits longest where there
    /// are as many as there may be.
    fn keep(&self, origin: Origin) {
        if !self.keeps() || origin.made.elapsed() >= self.settings.origin_age {
            return;
        }
        let way = origin.key.way;
        let present = Present::new(metrics::gauge!("adit_origin_connections_kept"));
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
        if !origin.requests.is_closed() && !self.closed.load(Ordering::SeqCst) {
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
    }

    /// Speaks HTTP/1.1 over a new stream to an origin.
    ///
    /// # Errors
    /// `OriginReset`.
    pub(super) async fn handshake(self: &Arc<Self>, stream: Stream, key: Key) -> Result<Origin, Error> {
        let mut builder = http1::Builder::new();
        builder.max_headers(self.settings.headers_max).max_buf_size(self.settings.buffer_max());
        let io = TokioIo::new(OriginIo::new(stream));
        let (requests, driver) = builder.handshake(io).await.map_err(|_| Error::OriginReset)?;
        let stop = CancellationToken::new();
        let guard = stop.clone().drop_guard();
        let (origins, way) = (Arc::clone(self), key.way);
        self.tracker.spawn(async move {
            let mut driver = Box::pin(driver.with_upgrades());
            // Nothing waits longer than twice its time.
            let look = origins.settings.origin_idle.max(Duration::from_millis(100));
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
                    () = tokio::time::sleep(look) => origins.forget(way),
                }
            }
            drop(driver);
            origins.forget(way);
        });
        Ok(Origin {
            requests,
            stop: guard,
            key,
            origins: Arc::clone(self),
            made: Instant::now(),
            idle: self.settings.origin_idle,
            reused: false,
            bound: false,
            owner: None,
        })
    }
}

impl Origin {
    /// Whether it served another request before.
    pub(super) fn reused(&self) -> bool {
        self.reused
    }

    /// Whether it reaches `key`'s origin by any of these ways.
    pub(super) fn reaches(&self, ways: impl IntoIterator<Item = u64>, tls: &Key) -> bool {
        self.key.tls == tls.tls && ways.into_iter().any(|way| way == self.key.way) && !self.requests.is_closed()
    }

    /// Its way's number.
    pub(super) fn way(&self) -> u64 {
        self.key.way
    }

    /// Sends a request; the answer's head.
    pub(super) async fn send(&mut self, request: Request<Upload>) -> Result<Response<Incoming>, Unanswered> {
        self.bound |= binds(request.headers(), AUTHORIZATION);
        self.requests.try_send_request(request).await.map_err(|mut refused| Unanswered {
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

    /// The request is answered in full: waits for the next one.
    pub(super) fn give_back(mut self) {
        if self.requests.is_closed() || self.idle.is_zero() {
            return;
        }
        if self.requests.is_ready() {
            return self.wait_for_the_next();
        }
        // Its task has not seen the end yet, or the request's body is still on its way.
        let tracker = self.origins.tracker.clone();
        if tokio::runtime::Handle::try_current().is_ok() {
            tracker.spawn(async move {
                let ready = tokio::time::timeout(self.idle, self.requests.ready()).await;
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
    pub(super) fn into_guard(self) -> DropGuard {
        self.stop
    }
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
