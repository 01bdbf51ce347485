//! The account of one request while it runs: bytes, progress, what went wrong;
//! told to the visit log at the request's true end, however that comes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use hyper::header::HeaderValue;
use hyper::{Method, Uri};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::pulse::Pulse;
use crate::dial::Way;
use crate::error::Error;
use crate::gate;
use crate::limits::Permit;
use crate::metrics::{Present, held};
use crate::model::{TunnelId, Visitor};
use crate::routes::Route;
use crate::visit_log::{self, Far, Legs, Sink, Visit, What};

/// What both bodies of a request, and who watches over them, write and read.
#[derive(Debug)]
pub(super) struct Tally {
    started: Instant,
    up: AtomicU64,
    down: AtomicU64,
    /// When something last moved, in milliseconds since `started`.
    moved_ms: AtomicU64,
    /// The upload waits for bytes of the visitor.
    visitor_owes: AtomicBool,
    /// The download waits for bytes of the origin.
    origin_owes: AtomicBool,
    answered: AtomicBool,
    verdict: Mutex<Option<Error>>,
}

impl Tally {
    fn begin() -> Self {
        Self {
            started: Instant::now(),
            up: AtomicU64::new(0),
            down: AtomicU64::new(0),
            moved_ms: AtomicU64::new(0),
            visitor_owes: AtomicBool::new(false),
            origin_owes: AtomicBool::new(false),
            answered: AtomicBool::new(false),
            verdict: Mutex::new(None),
        }
    }

    /// Bytes of the request's body went on to the origin.
    pub(super) fn sent_up(&self, bytes: usize) {
        self.up.fetch_add(bytes as u64, Ordering::Relaxed);
        self.visitor_owes.store(false, Ordering::Relaxed);
        self.touch();
    }

    /// Bytes of the answer's body went on to the visitor.
    pub(super) fn sent_down(&self, bytes: usize) {
        self.down.fetch_add(bytes as u64, Ordering::Relaxed);
        self.origin_owes.store(false, Ordering::Relaxed);
        self.touch();
    }

    /// The upload waits for the visitor.
    pub(super) fn await_visitor(&self) {
        self.visitor_owes.store(true, Ordering::Relaxed);
    }

    /// The download waits for the origin.
    pub(super) fn await_origin(&self) {
        self.origin_owes.store(true, Ordering::Relaxed);
    }

    /// Whether it is the visitor who keeps the upload waiting.
    pub(super) fn visitor_owes(&self) -> bool {
        self.visitor_owes.load(Ordering::Relaxed)
    }

    /// Something moved, or a wait began anew.
    pub(super) fn touch(&self) {
        let ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.moved_ms.store(ms, Ordering::Relaxed);
    }

    /// When something last moved.
    pub(super) fn moved(&self) -> Instant {
        self.started + Duration::from_millis(self.moved_ms.load(Ordering::Relaxed))
    }

    /// The head of the answer has come.
    pub(super) fn answer(&self) {
        self.answered.store(true, Ordering::Relaxed);
        self.touch();
    }

    /// Whether the head of the answer has come.
    pub(super) fn answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    /// Why the request failed; the first reason stands.
    pub(super) fn fail(&self, error: Error) {
        self.verdict.lock().get_or_insert(error);
    }

    /// Why the request failed so far.
    pub(super) fn failed(&self) -> Option<Error> {
        *self.verdict.lock()
    }

    /// The right word for bodies that stopped moving.
    pub(super) fn stalled(&self) -> Error {
        if self.origin_owes.load(Ordering::Relaxed) { Error::OriginSilent } else { Error::VisitorStalled }
    }

    /// Waits until an answered request has not moved for `limit`, and says so.
    ///
    /// # Cancel safety
    /// May be dropped at any time.
    pub(super) async fn stall(&self, limit: Duration) {
        loop {
            let now = Instant::now();
            let due = if self.answered() { self.moved() } else { now } + limit;
            if due <= now {
                self.fail(self.stalled());
                return;
            }
            tokio::time::sleep_until(due).await;
        }
    }
}

/// The one owner of a request's record. Dropping it tells the visit: as failed
/// by the visitor's leaving, unless something else was said before.
pub(super) struct Record {
    pub(super) tally: Arc<Tally>,
    pulse: Arc<Pulse>,
    at: SystemTime,
    /// Who asks, as far as it may be believed.
    pub(super) visitor: Visitor,
    method: Method,
    uri: Uri,
    /// The name asked for, as far as it could be read.
    pub(super) host: String,
    pub(super) route: Option<Arc<Route>>,
    pub(super) tunnel: Option<TunnelId>,
    pub(super) node: Option<Far>,
    pub(super) console: Option<Arc<dyn Sink>>,
    /// Its place among the visitors of the socket.
    pub(super) place: Option<Permit>,
    pub(super) status: Option<u16>,
    pub(super) first_byte: Option<Duration>,
    pub(super) id: Option<HeaderValue>,
    pub(super) legs: Legs,
    complete: bool,
    _present: Present,
}

impl Record {
    /// Opens the account of a request, and keeps its connection busy until it
    /// is closed.
    pub(super) fn begin(pulse: &Arc<Pulse>, visitor: Visitor, method: Method, uri: Uri) -> Self {
        let tally = Arc::new(Tally::begin());
        pulse.begin(&tally);
        Self {
            tally,
            pulse: Arc::clone(pulse),
            at: SystemTime::now(),
            visitor,
            method,
            uri,
            host: String::new(),
            route: None,
            tunnel: None,
            node: None,
            console: None,
            place: None,
            status: None,
            first_byte: None,
            id: None,
            legs: Legs::default(),
            complete: false,
            _present: Present::new(held!(gauge: "adit_requests").clone()),
        }
    }

    /// Which way it goes.
    pub(super) fn goes(&mut self, way: &impl Way) {
        self.tunnel = Some(way.tunnel().clone());
        self.node = way.far();
        self.console = Some(way.console());
    }

    /// The head of the origin's answer has come.
    pub(super) fn answered(&mut self) {
        self.tally.answer();
        self.first_byte = Some(self.tally.started.elapsed());
    }

    /// The way to the origin is asked for now.
    pub(super) fn routed(&mut self) {
        self.legs.route = Some(self.tally.started.elapsed());
    }

    /// There is a connection to the origin.
    pub(super) fn dialed(&mut self) {
        self.legs.dial = Some(self.tally.started.elapsed().saturating_sub(self.legs.route.unwrap_or_default()));
    }

    /// The request ends as it should.
    pub(super) fn complete(&mut self) {
        self.complete = true;
    }
}

/// A target as logs have it: without the codes and steps of a login.
fn told(uri: &Uri) -> &str {
    match uri.path_and_query() {
        Some(target) if target.path().starts_with(gate::OURS) => target.path(),
        target => target.map_or("", |target| target.as_str()),
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.pulse.end();
        let tally = &self.tally;
        let gone = (!self.complete).then_some(Error::VisitorGone);
        visit_log::record(
            Visit {
                at: self.at,
                visitor: self.visitor.addr,
                kind: self.route.as_ref().map_or("none", |route| route.socket.kind.as_str()),
                protocol: self.pulse.protocol(),
                id: self.id.take(),
                legs: self.legs,
                socket: self.route.as_ref().map(|route| route.socket.id.clone()),
                tunnel: self.tunnel.take(),
                node: self.node.take(),
                what: What::Request {
                    method: self.method.as_str().to_owned(),
                    host: std::mem::take(&mut self.host),
                    path: told(&self.uri).to_owned(),
                },
                status: self.status,
                bytes_up: tally.up.load(Ordering::Relaxed),
                bytes_down: tally.down.load(Ordering::Relaxed),
                first_byte: self.first_byte,
                total: tally.started.elapsed(),
                error: tally.failed().or(gone),
            },
            self.console.as_ref(),
        );
    }
}
