//! The state of one visitor's connection that its stream, its requests and its
//! driver share: what it waits for and until when, whether the visitor closed
//! its side, and the upgrade that may follow.

use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::record::Tally;
use super::settings::HttpSettings;
use super::upgrade::Upgrade;
use crate::error::Error;

/// What to do with a connection when its present wait is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// Nothing is wrong: look again.
    Look,
    /// Put hyper's part of it down until the visitor sends something (HTTP/1).
    Rest,
    /// Close it, letting what is on its way arrive.
    Close,
    /// End it now.
    Cut,
}

/// Shared by the parts of one connection.
pub(super) struct Pulse {
    /// HTTP/1: one request at a time, and a half-closed visitor may still read.
    serial: bool,
    state: Mutex<State>,
}

struct State {
    /// Requests under way.
    live: usize,
    /// The latest request: under way on HTTP/1, not yet spawned on HTTP/2.
    latest: Option<Arc<Tally>>,
    /// When the present time without a request began.
    since: Instant,
    /// When the first byte of an incomplete head came (HTTP/1).
    head: Option<Instant>,
    /// When hyper's part of it was made last.
    made: Instant,
    /// What came so far are whole messages.
    between: bool,
    /// Requests whose body is still wanted; a request may be answered before its body
    /// has come.
    uploads: usize,
    /// hyper has begun to close.
    ending: bool,
    /// Nothing has come yet.
    fresh: bool,
    closing: bool,
    /// Whether everything of the last answer has left.
    flushed: bool,
    eof: Eof,
    reader: Option<Waker>,
    uploader: Option<Waker>,
    upgrade: Option<Box<Upgrade>>,
    abort: bool,
    /// Interim answers (1xx) that have not been written yet.
    interim: Vec<u8>,
    /// Nothing of the answer, nor of the one before, is or can be half written.
    clear: bool,
    /// hyper has the answer.
    handed: bool,
    watcher: Option<Waker>,
}

/// How long a connection is idle before hyper's part of it is put down, which is
/// most of its memory. 1 s: the requests of a page follow one another faster, and
/// making hyper's part again takes some microseconds.
const REST: Duration = Duration::from_secs(1);

/// Longest row of interim answers to one request, in bytes.
const INTERIM_MAX: usize = 16 << 10;

/// The visitor's end of its side. hyper takes it for the visitor's leaving and
/// drops the request, so it is held back while an answer is still owed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Eof {
    Unseen,
    Held(Instant),
    Released,
}

impl Pulse {
    pub(super) fn new(serial: bool) -> Self {
        Self {
            serial,
            state: Mutex::new(State {
                live: 0,
                latest: None,
                since: Instant::now(),
                head: None,
                made: Instant::now(),
                between: true,
                uploads: 0,
                ending: false,
                fresh: true,
                closing: false,
                flushed: true,
                eof: Eof::Unseen,
                reader: None,
                uploader: None,
                upgrade: None,
                abort: false,
                interim: Vec::new(),
                clear: false,
                handed: false,
                watcher: None,
            }),
        }
    }

    /// What the connection speaks, as logs call it.
    pub(super) fn protocol(&self) -> &'static str {
        if self.serial { "h1" } else { "h2" }
    }

    /// A request begins.
    pub(super) fn begin(&self, tally: &Arc<Tally>) {
        let mut s = self.state.lock();
        s.live += 1;
        s.latest = Some(Arc::clone(tally));
        s.head = None;
        s.fresh = false;
        s.flushed = false;
        (s.clear, s.handed) = (false, false);
        s.interim.clear();
        // A pipelined request has as much right to its answer as the one before.
        if s.eof == Eof::Released {
            s.eof = Eof::Unseen;
        }
    }

    /// A request has ended.
    pub(super) fn end(&self) {
        let mut s = self.state.lock();
        s.live = s.live.saturating_sub(1);
        s.since = Instant::now();
        if self.serial {
            s.latest = None;
            s.uploader = None;
        }
    }

    /// The request that began last, for the task that will run it (HTTP/2).
    pub(super) fn take_latest(&self) -> Option<Arc<Tally>> {
        self.state.lock().latest.take()
    }

    /// A request's body is to come.
    pub(super) fn upload_begins(&self) {
        self.state.lock().uploads += 1;
    }

    /// A request's body has come, or nobody wants it any more.
    pub(super) fn upload_ends(&self) {
        let mut s = self.state.lock();
        s.uploads = s.uploads.saturating_sub(1);
        // hyper is still to learn it.
        s.since = s.since.max(Instant::now());
    }

    /// hyper closes the connection.
    pub(super) fn ends(&self) {
        self.state.lock().ending = true;
    }

    /// Bytes came from the visitor, up to a message's end where they are `between`.
    pub(super) fn received(&self, between: bool) {
        let mut s = self.state.lock();
        s.between = between;
        if s.live == 0 {
            if self.serial {
                s.head.get_or_insert_with(Instant::now);
            }
            s.fresh = false;
        }
    }

    /// The visitor closed its side. Whether to keep that back for now; then
    /// `reader` is woken when it may be told.
    pub(super) fn hold_eof(&self, reader: &Waker) -> bool {
        if !self.serial {
            return false;
        }
        let mut s = self.state.lock();
        if s.eof == Eof::Released || (s.live == 0 && s.flushed) {
            return false;
        }
        if s.eof == Eof::Unseen {
            s.eof = Eof::Held(Instant::now());
        }
        s.reader = Some(reader.clone());
        // An upload that is not complete has to find out that it never will be.
        if let Some(uploader) = s.uploader.take() {
            uploader.wake();
        }
        true
    }

    /// The upload waits for bytes of the visitor. Where the visitor has closed
    /// its side there will be none, and hyper is told.
    pub(super) fn upload_waits(&self, uploader: &Waker) {
        if !self.serial {
            return;
        }
        let mut s = self.state.lock();
        if matches!(s.eof, Eof::Held(_)) {
            s.release_eof();
        } else if !s.uploader.as_ref().is_some_and(|w| w.will_wake(uploader)) {
            s.uploader = Some(uploader.clone());
        }
    }

    /// All that was written has left.
    pub(super) fn flushed(&self) {
        let mut s = self.state.lock();
        // hyper flushes what it has of the former answer first.
        s.clear |= s.live > 0 && !s.handed;
        if s.live == 0 && !s.flushed {
            s.flushed = true;
            if matches!(s.eof, Eof::Held(_)) {
                s.release_eof();
            }
        }
    }

    /// An interim answer to the request under way, as it goes to the visitor.
    pub(super) fn interim(&self, head: &[u8]) {
        let mut s = self.state.lock();
        if self.serial && !s.handed && s.interim.len() + head.len() <= INTERIM_MAX {
            s.interim.extend_from_slice(head);
            if let Some(watcher) = s.watcher.take() {
                watcher.wake();
            }
        }
    }

    /// The interim answers that can be written now. Where there are none,
    /// `watcher` is woken by the next.
    pub(super) fn take_interim(&self, watcher: &Waker) -> Vec<u8> {
        if !self.serial {
            return Vec::new();
        }
        let mut s = self.state.lock();
        if s.clear && !s.interim.is_empty() {
            return std::mem::take(&mut s.interim);
        }
        if !s.watcher.as_ref().is_some_and(|w| w.will_wake(watcher)) {
            s.watcher = Some(watcher.clone());
        }
        Vec::new()
    }

    /// hyper is given the answer now.
    pub(super) fn answers(&self) {
        self.state.lock().handed = true;
    }

    /// hyper writes.
    pub(super) fn writes(&self) {
        if self.serial {
            self.state.lock().clear = false;
        }
    }

    /// The driver told hyper to close when it can.
    pub(super) fn closing(&self) {
        let mut s = self.state.lock();
        s.closing = true;
        s.since = Instant::now();
    }

    /// Notes the upgrade to run once the connection has given up its stream.
    pub(super) fn set_upgrade(&self, upgrade: Upgrade) {
        self.state.lock().upgrade = Some(Box::new(upgrade));
    }

    /// Whether an upgrade follows.
    pub(super) fn has_upgrade(&self) -> bool {
        self.state.lock().upgrade.is_some()
    }

    /// The upgrade to run, if there is one.
    pub(super) fn take_upgrade(&self) -> Option<Box<Upgrade>> {
        self.state.lock().upgrade.take()
    }

    /// The stream must end with a reset: its end would pass for an answer's.
    pub(super) fn abort(&self) {
        self.state.lock().abort = true;
    }

    /// Whether `abort` was called.
    pub(super) fn aborted(&self) -> bool {
        self.state.lock().abort
    }

    /// Ends whatever runs with this reason.
    pub(super) fn cut(&self, error: Error) {
        let mut s = self.state.lock();
        s.abort |= s.live > 0;
        if let Some(latest) = &s.latest {
            latest.fail(error);
        }
    }

    /// Until when the present wait may last, and what comes then.
    pub(super) fn due(&self, settings: &HttpSettings) -> (Instant, Then) {
        let s = self.state.lock();
        if s.live > 0 {
            let look = || (Instant::now() + settings.body_idle, Then::Look);
            let Some(latest) = s.latest.as_ref().filter(|_| self.serial) else { return look() };
            return match s.eof {
                Eof::Held(since) => (latest.moved().max(since) + settings.half_closed, Then::Cut),
                _ if latest.answered() => (latest.moved() + settings.body_idle, Then::Cut),
                _ => look(),
            };
        }
        let after = |wait: Duration, then| (s.since + wait, then);
        match s.head {
            // What is left of the last answer may take its time; the far end of a
            // GOAWAY must only acknowledge it.
            _ if s.closing => after(if self.serial { settings.body_idle } else { settings.h2_ping_timeout }, Then::Cut),
            Some(begun) => (begun + settings.head_deadline, Then::Cut),
            None if s.fresh => after(settings.head_deadline, Then::Close),
            None => match after(settings.idle, Then::Close) {
                (close, _) if s.may_rest(self.serial) && Instant::now() < close => {
                    ((s.since.max(s.made) + REST).min(close), Then::Rest)
                }
                close => close,
            },
        }
    }

    /// Until when a connection that rests may do so.
    pub(super) fn rests_until(&self, settings: &HttpSettings) -> Instant {
        self.state.lock().since + settings.idle
    }

    /// A rest is over, and hyper's part is made again. It may have been for nothing.
    pub(super) fn rested(&self) {
        self.state.lock().made = Instant::now();
    }

    /// The word for a wait that is over.
    pub(super) fn overdue(&self) -> Error {
        let s = self.state.lock();
        match (s.eof, &s.latest) {
            (Eof::Held(_), _) => Error::VisitorGone,
            (_, Some(latest)) => latest.stalled(),
            (_, None) if s.head.is_some() && !s.closing => Error::HelloTimeout,
            (_, None) => Error::VisitorStalled,
        }
    }
}

impl State {
    /// Whether hyper only waits for a next head. In any other state of its own another
    /// one would take what is left of a body for a request.
    fn may_rest(&self, serial: bool) -> bool {
        let idle = self.live == 0 && self.uploads == 0 && self.between && self.flushed;
        let stays = self.eof == Eof::Unseen && self.upgrade.is_none() && !self.ending && !self.abort;
        serial && idle && stays
    }

    fn release_eof(&mut self) {
        self.eof = Eof::Released;
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}
