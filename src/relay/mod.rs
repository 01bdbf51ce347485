//! Moves bytes both ways between a visitor and an origin until both have said
//! all. An end of one crosses to the other as what it was: a clean end of one
//! direction as such, a broken connection as a reset. Choosing and opening the
//! two streams is elsewhere.

mod copy;
mod splice;
mod way;

use std::future::{Future, poll_fn};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::Error;
use crate::fields::{Bytes, Fields};
use crate::stream::{Duplex, Stream};
use way::{BULK_READ, Broken, State, Way};

/// How relays behave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelaySettings {
    /// How long nothing may move either way before a relay is ended; ends it at
    /// the latest a quarter later. 1 h: quiet sessions of people (SSH, database
    /// consoles, WebSockets without pings) live through a lunch break, and dead
    /// far ends are found by TCP keepalive long before.
    pub idle: Duration,
    /// The most that one read through user space takes, and what a direction
    /// whose writer is slow may keep. 32 KiB: an SSH channel's largest packet;
    /// a TLS record has 16 KiB.
    pub copy_size: usize,
    /// Whether bulk between two bare TCP connections stays in the kernel. On:
    /// less than half of the CPU that copying costs per byte (`benches/relay.rs`).
    pub splice: bool,
    /// The size of a pipe for it. 256 KiB: above, little is won.
    pub pipe_size: usize,
    /// The most that all pipes of this process may have together; beyond it
    /// relays copy. 48 MiB: an unprivileged user may have 64 MiB before the
    /// kernel cuts pipes down (`fs.pipe-user-pages-soft`, 16384 pages).
    pub pipe_budget: usize,
}

impl Default for RelaySettings {
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(3600),
            copy_size: 32 << 10,
            splice: true,
            pipe_size: 256 << 10,
            pipe_budget: 48 << 20,
        }
    }
}

impl RelaySettings {
    /// Reads the settings' table.
    pub fn read(f: &mut Fields) -> Self {
        let d = Self::default();
        let settings = Self {
            idle: f.take("idle", d.idle),
            copy_size: f.take("copy_size", Bytes(d.copy_size)).0,
            splice: f.take("splice", d.splice),
            pipe_size: f.take("pipe_size", Bytes(d.pipe_size)).0,
            pipe_budget: f.take("pipe_budget", Bytes(d.pipe_budget)).0,
        };
        if settings.idle.is_zero() {
            f.mistake("idle", "would end every relay".into(), "write a duration like \"1h\"".into());
        }
        if !(BULK_READ..=1 << 20).contains(&settings.copy_size) {
            f.mistake("copy_size", "is out of range".into(), "write a size from \"16KiB\" to \"1MiB\"".into());
        }
        // Above 1 MiB an unprivileged process is refused (`fs.pipe-max-size`).
        if !settings.pipe_size.is_power_of_two() || !(64 << 10..=1 << 20).contains(&settings.pipe_size) {
            let fix = "write \"64KiB\", \"128KiB\", \"256KiB\", \"512KiB\" or \"1MiB\"";
            f.mistake("pipe_size", "is not a size that pipes have".into(), fix.into());
        }
        settings
    }
}

/// What a relay did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Relayed {
    /// Bytes from the visitor that the origin's side took.
    pub up: u64,
    /// Bytes from the origin that the visitor's side took.
    pub down: u64,
    /// How many of both the kernel moved by splice.
    pub spliced: u64,
    /// From the start of the relay to the origin's first byte.
    pub first_byte: Option<Duration>,
    /// How it ended.
    pub end: End,
    /// Why, where the stream that broke knew.
    pub why: Option<Error>,
}

impl Relayed {
    /// Why the visit failed, if it did.
    pub fn error(&self) -> Option<Error> {
        match self.end {
            End::Clean => None,
            End::VisitorGone => self.why.or(Some(Error::VisitorGone)),
            End::OriginLost => self.why.or(Some(Error::OriginReset)),
            End::Idle => Some(Error::Idle),
            End::Cut => Some(Error::Draining),
        }
    }
}

/// How a relay ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Both sides said all, and all of it was passed on.
    Clean,
    /// The visitor's connection broke.
    VisitorGone,
    /// The origin's connection, or what carries it, broke.
    OriginLost,
    /// Nothing moved for the idle limit.
    Idle,
    /// The caller had it cut.
    Cut,
}

/// Relays until both directions have ended, one side breaks, nothing moves for
/// the idle limit, or `cut` is cancelled. Only the first of these is a clean
/// end; after the others both sides see a reset.
///
/// # Cancel safety
/// Dropping it is an end like `Cut`: both sides see a reset.
pub async fn relay(visitor: Stream, origin: Stream, settings: &RelaySettings, cut: &CancellationToken) -> Relayed {
    let started = Instant::now();
    let mut ends = Ends { visitor, origin, clean: false };
    let (mut up, mut down) = (Way::default(), Way::default());
    // A child, because polling a token locks it: relays must not meet at one lock.
    let cut = cut.child_token();
    let mut cut = std::pin::pin!(cut.cancelled());
    let mut watch = Watch::new(started, settings.idle);
    let mut timer = std::pin::pin!(tokio::time::sleep_until(watch.next(false)));
    let mut watchful = false;

    let end = poll_fn(|cx| {
        if cut.as_mut().poll(cx).is_ready() {
            return Poll::Ready(End::Cut);
        }
        if let Poll::Ready(end) = poll_ways(cx, &mut ends, &mut up, &mut down, settings) {
            return Poll::Ready(end);
        }
        let unread = !up.reads() || down.is_done();
        if unread && !watchful {
            watchful = true;
            timer.as_mut().reset(watch.next(true));
        }
        while timer.as_mut().poll(cx).is_ready() {
            if let Some(end) = ends.broken_behind(&up, &down) {
                return Poll::Ready(end);
            }
            if watch.is_idle(up.tally.moved + down.tally.moved, Instant::now()) {
                return Poll::Ready(End::Idle);
            }
            watchful = unread;
            timer.as_mut().reset(watch.next(watchful));
        }
        Poll::Pending
    })
    .await;

    ends.clean = end == End::Clean;
    let spliced = up.tally.spliced + down.tally.spliced;
    if spliced > 0 {
        metrics::counter!("adit_relay_spliced_bytes_total").increment(spliced);
    }
    Relayed {
        up: up.tally.moved,
        down: down.tally.moved,
        spliced,
        first_byte: down.tally.first.map(|at| at.duration_since(started)),
        end,
        why: down.tally.why.or(up.tally.why),
    }
}

fn poll_ways(
    cx: &mut Context<'_>,
    ends: &mut Ends,
    up: &mut Way,
    down: &mut Way,
    settings: &RelaySettings,
) -> Poll<End> {
    let Ends { visitor, origin, .. } = ends;
    match up.poll(cx, visitor, origin, settings) {
        Poll::Ready(Err(Broken::Read)) => return Poll::Ready(End::VisitorGone),
        // An origin that answers early and closes (413, say) breaks the upload;
        // what it answered may still be there to be read.
        Poll::Ready(Err(Broken::Write)) => up.state = State::Refused,
        _ => {}
    }
    match down.poll(cx, origin, visitor, settings) {
        Poll::Ready(Err(Broken::Read)) => return Poll::Ready(End::OriginLost),
        Poll::Ready(Err(Broken::Write)) => return Poll::Ready(End::VisitorGone),
        _ => {}
    }
    match (&up.state, &down.state) {
        (State::Done, State::Done) => Poll::Ready(End::Clean),
        (State::Refused, _) if down.is_done() || down.awaits_reader() => Poll::Ready(End::OriginLost),
        _ => Poll::Pending,
    }
}

/// Both streams. Dropped before the clean end, they are reset.
struct Ends {
    visitor: Stream,
    origin: Stream,
    clean: bool,
}

impl Ends {
    /// Whether a side that is not read now has broken: one that has ended its
    /// own direction, and a visitor whose bytes the origin does not take. (What
    /// a broken origin sent is still worth delivering.)
    fn broken_behind(&self, up: &Way, down: &Way) -> Option<End> {
        if !up.reads() && self.visitor.broken() {
            return Some(End::VisitorGone);
        }
        (down.is_done() && self.origin.broken()).then_some(End::OriginLost)
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        if !self.clean {
            Duplex::reset(&mut self.visitor);
            Duplex::reset(&mut self.origin);
        }
    }
}

/// Looks at intervals whether anything moved: cheaper than a timer that is set
/// anew by every read.
struct Watch {
    limit: Duration,
    moved: u64,
    moved_at: Instant,
}

impl Watch {
    fn new(now: Instant, limit: Duration) -> Self {
        Self { limit, moved: 0, moved_at: now }
    }

    fn next(&self, watchful: bool) -> Instant {
        let quarter = self.limit / 4;
        // Relays with a side that is not read are few, and a second is prompt
        // enough to notice that it is gone.
        let pause = if watchful { quarter.min(Duration::from_secs(1)) } else { quarter };
        Instant::now() + pause.max(Duration::from_millis(1))
    }

    fn is_idle(&mut self, moved: u64, now: Instant) -> bool {
        if moved != self.moved {
            (self.moved, self.moved_at) = (moved, now);
        }
        now.duration_since(self.moved_at) >= self.limit
    }
}

#[cfg(test)]
mod tests;
