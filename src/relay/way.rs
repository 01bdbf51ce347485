//! One direction of a relay: copies or splices, whichever suits what flows, and
//! passes the end on. What both directions mean together is decided above.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::AsyncWrite;
use tokio::task::coop::has_budget_remaining;
use tokio::time::Instant;

use super::RelaySettings;
use super::copy::Copier;
use super::splice::Splicer;
use crate::error::Error;
use crate::stream::Stream;

/// A read of this much is bulk (measured: splice pays from 16 KiB a read on,
/// and costs below 4 KiB).
pub(super) const BULK_READ: usize = 16 << 10;
/// Bulk reads in a row after which a direction splices.
const BULK_READS: u32 = 2;
/// Small splices in a row after which it copies again.
pub(super) const SMALL_SPLICES: u32 = 8;
/// Bulk reads to copy where no pipe was to be had, before asking again.
const PATIENCE: u32 = 64;
/// Bytes after which a direction lets the other one and other tasks run.
const SHARE: usize = 1 << 20;
/// Reads after which it does: two directions of as many reads and writes stay
/// below the 128 operations that tokio grants a task at a time, so that the
/// first cannot use up what the second needs.
const ROUNDS: usize = 24;

/// One direction.
#[derive(Debug, Default)]
pub(super) struct Way {
    pub(super) state: State,
    copier: Copier,
    splicer: Splicer,
    splicing: bool,
    /// Whether it paused although there may be more to read.
    yielded: bool,
    /// Reads in a row that speak for the other mode.
    turns: u32,
    /// Large reads to let pass before splice is tried again.
    patience: u32,
    pub(super) tally: Tally,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) enum State {
    #[default]
    Open,
    /// All is written; the writer is being told that this is the end.
    Closing,
    Done,
    /// The writer takes nothing more.
    Refused,
}

/// Which side of a direction broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Broken {
    Read,
    Write,
}

/// What one round of a direction did.
pub(super) enum Step {
    /// So many bytes were read, and written or kept.
    Read(usize),
    /// The reader has said all.
    End,
    /// This cannot be spliced now.
    Unable,
}

impl Way {
    pub(super) fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Whether it reads, rather than waiting for its writer or being over.
    pub(super) fn reads(&self) -> bool {
        self.state == State::Open && self.copier.is_empty() && self.splicer.is_empty()
    }

    /// Whether what keeps it pending is the reader, that has nothing now.
    pub(super) fn awaits_reader(&self) -> bool {
        // Out of budget, tokio's sockets are pending without having looked.
        self.copier.is_empty() && self.splicer.is_empty() && !self.yielded && has_budget_remaining()
    }

    /// Moves what can be moved now. Ready once the direction has ended.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Stream,
        to: &mut Stream,
        settings: &RelaySettings,
    ) -> Poll<Result<(), Broken>> {
        let mut share = SHARE;
        loop {
            match self.state {
                State::Open if share == 0 => {
                    self.yielded = true;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                State::Open => self.yielded = false,
                State::Closing => {
                    ready!(Pin::new(&mut *to).poll_shutdown(cx)).map_err(|_| Broken::Write)?;
                    self.state = State::Done;
                    return Poll::Ready(Ok(()));
                }
                State::Done | State::Refused => return Poll::Ready(Ok(())),
            }
            let spliced = match (from.as_tcp(), to.as_tcp()) {
                (Some(from), Some(to)) if self.splicing => {
                    Some(ready!(self.splicer.poll(cx, from, to, settings, &mut self.tally))?)
                }
                _ => None,
            };
            let step = match spliced {
                Some(step) => step,
                None => ready!(self.copier.poll(cx, from, to, settings.copy_size, &mut self.tally))?,
            };
            match step {
                Step::Read(read) => {
                    share = share.saturating_sub(read.max(SHARE / ROUNDS));
                    self.choose(read, from, to, settings);
                }
                Step::End => self.state = State::Closing,
                Step::Unable => {
                    self.splicing = false;
                    self.patience = PATIENCE;
                }
            }
        }
    }

    /// Copy or splice from here on? Starts with copy, which is cheaper for
    /// small messages and needs no descriptors.
    fn choose(&mut self, read: usize, from: &Stream, to: &Stream, settings: &RelaySettings) {
        let bulk = read >= BULK_READ;
        self.turns = if bulk == self.splicing { 0 } else { self.turns + 1 };
        if self.splicing {
            if self.turns >= SMALL_SPLICES && self.splicer.is_empty() {
                self.splicer.release();
                (self.splicing, self.turns) = (false, 0);
            }
            return;
        }
        self.patience = self.patience.saturating_sub(u32::from(bulk));
        let able = settings.splice && self.patience == 0 && from.as_tcp().is_some() && to.as_tcp().is_some();
        if self.turns >= BULK_READS && able && self.copier.is_empty() {
            self.turns = 0;
            self.splicing = self.splicer.prepare(settings);
            self.patience = if self.splicing { 0 } else { PATIENCE };
        }
    }
}

/// What a direction has moved.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) moved: u64,
    pub(super) spliced: u64,
    pub(super) first: Option<Instant>,
    /// Why the reader broke, if it knew.
    pub(super) why: Option<Error>,
}

impl Tally {
    /// Marks that bytes have come.
    pub(super) fn read(&mut self) {
        if self.first.is_none() {
            self.first = Some(Instant::now());
        }
    }
}
