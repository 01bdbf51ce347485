//! A connection that stopped being HTTP: after the origin's 101 both streams
//! are taken back from hyper and relayed raw until either side, silence or the
//! node's end ends it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::io::{OriginIo, VisitorIo};
use super::record::{Record, Tally};
use super::settings::HttpSettings;
use crate::error::Error;
use crate::stream::Stream;

/// Copy buffer per direction, in bytes: upgraded connections are many and
/// mostly carry small messages.
const COPY_BUFFER: usize = 16 << 10;

/// An upgrade that both sides agreed to.
pub(super) struct Upgrade {
    pub(super) visitor: OnUpgrade,
    pub(super) origin: OnUpgrade,
    /// Ends the origin's connection, unless it was taken over.
    pub(super) guard: DropGuard,
    pub(super) record: Record,
}

impl Upgrade {
    /// Relays until the upgraded connection ends; its record is told then.
    pub(super) async fn run(self, settings: &HttpSettings, cut: &CancellationToken) {
        let Self { visitor, origin, guard, mut record } = self;
        let streams = async {
            let visitor = visitor.await.ok().and_then(visitor_stream)?;
            let origin = origin.await.ok().and_then(origin_stream)?;
            Some((visitor, origin))
        };
        // Both heads are through already, so this is a matter of scheduling alone.
        let Ok(Some((visitor, origin))) = tokio::time::timeout(settings.head_deadline, streams).await else {
            record.tally.fail(Error::Internal);
            return;
        };
        guard.disarm();
        match relay(visitor, origin, &record.tally, settings.upgrade_idle, cut).await {
            Ok(()) => record.complete(),
            Err(error) => record.tally.fail(error),
        }
    }
}

fn visitor_stream(upgraded: Upgraded) -> Option<Stream> {
    let parts = upgraded.downcast::<TokioIo<VisitorIo>>().ok()?;
    parts.io.into_inner().into_stream(parts.read_buf)
}

fn origin_stream(upgraded: Upgraded) -> Option<Stream> {
    let parts = upgraded.downcast::<TokioIo<OriginIo>>().ok()?;
    Some(parts.io.into_inner().into_stream(parts.read_buf))
}

/// Moves bytes both ways; each side's end goes on to the other.
///
/// # Errors
/// Why it ended other than by both sides' ends; both streams were reset then.
async fn relay(
    visitor: Stream,
    origin: Stream,
    tally: &Tally,
    idle: Duration,
    cut: &CancellationToken,
) -> Result<(), Error> {
    let mut visitor = Side { stream: visitor, tally, up: true, broken: false };
    let mut origin = Side { stream: origin, tally, up: false, broken: false };
    tally.touch();
    let ended = tokio::select! {
        copied = tokio::io::copy_bidirectional_with_sizes(&mut visitor, &mut origin, COPY_BUFFER, COPY_BUFFER) => {
            copied.map(drop).map_err(|_| Error::OriginReset)
        }
        () = silence(tally, idle) => Err(Error::Idle),
        () = cut.cancelled() => Err(Error::Draining),
    };
    let ended = ended.map_err(|error| if visitor.broken { Error::VisitorGone } else { error });
    if ended.is_err() {
        visitor.stream.reset();
        origin.stream.reset();
    }
    ended
}

async fn silence(tally: &Tally, idle: Duration) {
    loop {
        let due = tally.moved() + idle;
        if due <= tokio::time::Instant::now() {
            return;
        }
        tokio::time::sleep_until(due).await;
    }
}

/// One side of a relay: counts what it gives and remembers that it broke.
struct Side<'a> {
    stream: Stream,
    tally: &'a Tally,
    up: bool,
    broken: bool,
}

impl Side<'_> {
    fn noted<T>(&mut self, done: io::Result<T>) -> io::Result<T> {
        self.broken |= done.is_err();
        done
    }
}

impl AsyncRead for Side<'_> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        let bytes = buf.filled().len() - before;
        if self.up {
            self.tally.sent_up(bytes)
        } else {
            self.tally.sent_down(bytes)
        }
        Poll::Ready(self.noted(read))
    }
}

impl AsyncWrite for Side<'_> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, buf));
        Poll::Ready(self.noted(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = ready!(Pin::new(&mut self.stream).poll_flush(cx));
        Poll::Ready(self.noted(flushed))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = ready!(Pin::new(&mut self.stream).poll_shutdown(cx));
        Poll::Ready(self.noted(shut))
    }
}
