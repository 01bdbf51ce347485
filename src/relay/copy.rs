//! One direction of a relay through user space, for streams of any kind. Bytes
//! are read into a buffer that all relays of a thread share, and written at
//! once; only what the writer does not take is kept, so a quiet relay holds none.

use std::cell::Cell;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::way::{Broken, Step, Tally};
use crate::error::Error;
use crate::stream::Stream;

thread_local! {
    /// Taken out while in use, so that nothing can find it borrowed.
    static SHARED: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// What one direction still has to write.
#[derive(Debug, Default)]
pub(super) struct Copier {
    kept: Vec<u8>,
    written: usize,
    unflushed: bool,
}

impl Copier {
    /// Whether every byte that was read has been written.
    pub(super) fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Writes what is kept, then reads once and writes that.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Stream,
        to: &mut Stream,
        size: usize,
        tally: &mut Tally,
    ) -> Poll<Result<Step, Broken>> {
        ready!(self.poll_kept(cx, to, tally))?;
        let mut shared = SHARED.take();
        if shared.len() != size {
            shared.resize(size, 0);
        }
        let step = self.poll_through(cx, from, to, &mut shared, tally);
        SHARED.set(shared);
        step
    }

    fn poll_through(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Stream,
        to: &mut Stream,
        shared: &mut [u8],
        tally: &mut Tally,
    ) -> Poll<Result<Step, Broken>> {
        let mut buf = ReadBuf::new(shared);
        match Pin::new(from).poll_read(cx, &mut buf) {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(error)) => {
                tally.why = Error::within(&error);
                return Poll::Ready(Err(Broken::Read));
            }
            Poll::Pending => {
                // The reader will be a while: TLS must not sit on a record.
                if self.unflushed
                    && let Poll::Ready(flushed) = Pin::new(to).poll_flush(cx)
                {
                    self.unflushed = false;
                    flushed.map_err(|_| Broken::Write)?;
                }
                return Poll::Pending;
            }
        }
        let mut rest = buf.filled();
        let read = rest.len();
        if read == 0 {
            return Poll::Ready(Ok(Step::End));
        }
        tally.read();
        while !rest.is_empty() {
            match Pin::new(&mut *to).poll_write(cx, rest) {
                Poll::Ready(Ok(n)) if n > 0 => {
                    rest = rest.get(n..).unwrap_or_default();
                    tally.moved += n as u64;
                    self.unflushed = true;
                }
                Poll::Ready(_) => return Poll::Ready(Err(Broken::Write)),
                Poll::Pending => {
                    self.kept = rest.to_vec();
                    self.written = 0;
                    break;
                }
            }
        }
        Poll::Ready(Ok(Step::Read(read)))
    }

    fn poll_kept(&mut self, cx: &mut Context<'_>, to: &mut Stream, tally: &mut Tally) -> Poll<Result<(), Broken>> {
        while let Some(rest) = self.kept.get(self.written..).filter(|rest| !rest.is_empty()) {
            match ready!(Pin::new(&mut *to).poll_write(cx, rest)) {
                Ok(n) if n > 0 => {
                    self.written += n;
                    tally.moved += n as u64;
                    self.unflushed = true;
                }
                _ => return Poll::Ready(Err(Broken::Write)),
            }
        }
        self.kept = Vec::new();
        Poll::Ready(Ok(()))
    }
}
