//! One direction of a relay through user space, for streams of any kind. Bytes
//! are read into a buffer that all relays of a thread share, and written at
//! once; only what the writer does not take is kept, so a quiet relay holds none.

use std::cell::Cell;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::way::{Broken, Step, Tally};
use crate::error::Error;
use crate::stream::{Duplex, Stream};

thread_local! {
    /// Taken out while in use, so that nothing can find it borrowed.
    static SHARED: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// What one direction still has to write.
#[derive(Debug, Default)]
pub(super) struct Copier {
    kept: Bytes,
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
        if let Some(piece) = from.poll_piece(cx, size) {
            return self.pass_on(cx, piece, to, tally);
        }
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
                return self.flush_meanwhile(cx, to);
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
                    self.kept = Bytes::copy_from_slice(rest);
                    break;
                }
            }
        }
        Poll::Ready(Ok(Step::Read(read)))
    }

    /// Writes a piece that the reader had; what the writer does not take is kept.
    fn pass_on(
        &mut self,
        cx: &mut Context<'_>,
        piece: Poll<std::io::Result<Bytes>>,
        to: &mut Stream,
        tally: &mut Tally,
    ) -> Poll<Result<Step, Broken>> {
        match piece {
            Poll::Ready(Ok(piece)) if piece.is_empty() => Poll::Ready(Ok(Step::End)),
            Poll::Ready(Ok(piece)) => {
                tally.read();
                let read = piece.len();
                self.kept = piece;
                match self.poll_kept(cx, to, tally) {
                    Poll::Ready(Err(broken)) => Poll::Ready(Err(broken)),
                    _ => Poll::Ready(Ok(Step::Read(read))),
                }
            }
            Poll::Ready(Err(error)) => {
                tally.why = Error::within(&error);
                Poll::Ready(Err(Broken::Read))
            }
            Poll::Pending => self.flush_meanwhile(cx, to),
        }
    }

    /// The reader will be a while: TLS must not sit on a record.
    fn flush_meanwhile(&mut self, cx: &mut Context<'_>, to: &mut Stream) -> Poll<Result<Step, Broken>> {
        if self.unflushed
            && let Poll::Ready(flushed) = Pin::new(to).poll_flush(cx)
        {
            self.unflushed = false;
            flushed.map_err(|_| Broken::Write)?;
        }
        Poll::Pending
    }

    fn poll_kept(&mut self, cx: &mut Context<'_>, to: &mut Stream, tally: &mut Tally) -> Poll<Result<(), Broken>> {
        while !self.kept.is_empty() {
            match ready!(Pin::new(&mut *to).poll_write(cx, &self.kept)) {
                Ok(n) if n > 0 => {
                    self.kept.advance(n);
                    tally.moved += n as u64;
                    self.unflushed = true;
                }
                _ => return Poll::Ready(Err(Broken::Write)),
            }
        }
        self.kept = Bytes::new();
        Poll::Ready(Ok(()))
    }
}
