//! The two streams that hyper drives, with what it does not do itself: the
//! visitor's side tells the connection's pulse what comes, ends by reset where
//! an end would lie and lingers where a reset would destroy an answer; the
//! origin's side still reads what came before it stopped taking our bytes.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio_util::task::TaskTracker;

use super::Protocol;
use super::framing::Framing;
use super::pulse::Pulse;
use crate::stream::{Duplex, Stream};

/// Stops lingering with a visitor that keeps sending this much, in bytes: it is
/// not going to read our answer.
const LINGER_MAX: usize = 64 << 20;

/// The visitor's stream under hyper.
pub(super) struct VisitorIo {
    /// Absent once taken out.
    stream: Option<Stream>,
    /// What a former hyper had read too far: guarded and told already.
    unread: Bytes,
    /// Guards what is read, where it is HTTP/1.
    framing: Option<Framing>,
    /// It found what is not clear: nothing is read from there on.
    refused: bool,
    pulse: Arc<Pulse>,
    tracker: TaskTracker,
    linger: Duration,
    /// We closed our side in order.
    shut: bool,
    /// The visitor closed theirs, or the stream broke.
    ended: bool,
    /// What is left to write of interim answers, and whether it is to be flushed.
    interim: Bytes,
    unflushed: bool,
}

impl VisitorIo {
    pub(super) fn new(
        stream: Stream,
        protocol: Protocol,
        pulse: Arc<Pulse>,
        tracker: TaskTracker,
        linger: Duration,
    ) -> Self {
        let framing = (protocol == Protocol::Http1).then(Framing::default);
        Self {
            stream: Some(stream),
            unread: Bytes::new(),
            framing,
            refused: false,
            pulse,
            tracker,
            linger,
            shut: false,
            ended: false,
            interim: Bytes::new(),
            unflushed: false,
        }
    }

    /// The same for another hyper, which reads first what the former had read too far.
    pub(super) fn again(mut self, unread: Bytes) -> Self {
        debug_assert!(self.unread.is_empty(), "hyper reads all that there is");
        // Even empty it would keep hyper's buffer.
        if !unread.is_empty() {
            self.unread = unread;
        }
        self
    }

    /// Ready once the visitor may have sent something.
    pub(super) fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.stream {
            Some(stream) if self.unread.is_empty() => stream.poll_readable(cx),
            _ => Poll::Ready(()),
        }
    }

    /// The bare stream, with what hyper had read too far put back.
    pub(super) fn into_stream(mut self, unread: Bytes) -> Option<Stream> {
        self.stream.take().map(|stream| put_back(stream, unread))
    }

    /// Writes the interim answers that there are. hyper's server knows none but
    /// 100, and answers are all that it writes: between two of them is room.
    fn poll_interim(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.interim.is_empty() {
            self.interim = self.pulse.take_interim(cx.waker()).into();
        }
        while !self.interim.is_empty() {
            let rest = self.interim.clone();
            let written = ready!(self.stream()?.poll_write(cx, &rest))?;
            self.interim.advance(written);
            self.unflushed = true;
        }
        if self.unflushed {
            ready!(self.stream()?.poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn stream(&mut self) -> io::Result<Pin<&mut Stream>> {
        self.stream.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

/// Puts bytes in front of a stream that may still have some of its own there.
fn put_back(mut stream: Stream, unread: Bytes) -> Stream {
    if unread.is_empty() {
        return stream;
    }
    let rest = stream.take_head();
    if rest.is_empty() {
        return stream.with_head(unread);
    }
    let mut both = BytesMut::from(unread);
    both.extend_from_slice(&rest);
    stream.with_head(both.freeze())
}

impl AsyncRead for VisitorIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // Whatever comes of it, the next write or read goes on with it.
        let _ = self.poll_interim(cx);
        if !self.unread.is_empty() {
            let len = self.unread.len().min(buf.remaining());
            buf.put_slice(&self.unread.split_to(len));
            return Poll::Ready(Ok(()));
        }
        if self.refused {
            return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
        }
        let before = buf.filled().len();
        let read = if self.ended { Ok(()) } else { ready!(self.stream()?.poll_read(cx, buf)) };
        if let Err(error) = read {
            self.ended = true;
            return Poll::Ready(Err(error));
        }
        if let Some(read) = buf.filled_mut().get_mut(before..).filter(|read| !read.is_empty()) {
            if let Some(framing) = &mut self.framing
                && let Err(at) = framing.read(read)
                && let Some(unclear) = read.get_mut(at)
            {
                // A NUL is good in no head: hyper answers it with a 400, in place of
                // what it would have made of it. Some of what frames a chunk it does
                // not look at, but there the body breaks off by the next read.
                *unclear = 0;
                self.refused = true;
                buf.set_filled(before + at + 1);
            }
            self.pulse.received(self.framing.as_ref().is_some_and(Framing::is_between));
        } else {
            self.ended = true;
            if self.pulse.hold_eof(cx.waker()) {
                return Poll::Pending;
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for VisitorIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_interim(cx))?;
        self.pulse.writes();
        self.stream()?.poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_interim(cx))?;
        self.pulse.writes();
        self.stream()?.poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.as_ref().is_some_and(AsyncWrite::is_write_vectored)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.stream()?.poll_flush(cx))?;
        self.pulse.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.pulse.ends();
        ready!(self.stream()?.poll_shutdown(cx))?;
        self.shut = true;
        Poll::Ready(Ok(()))
    }
}

impl Drop for VisitorIo {
    fn drop(&mut self) {
        let Some(mut stream) = self.stream.take() else { return };
        if self.pulse.aborted() {
            Duplex::reset(&mut stream);
        } else if self.shut && !self.ended && !self.linger.is_zero() {
            // At the runtime's own end there is nobody to linger.
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                self.tracker.spawn_on(linger(stream, self.linger), &runtime);
            }
        }
    }
}

/// Reads and drops what the visitor still sends, so that the kernel has no
/// reason to answer it with a reset.
async fn linger(mut stream: Stream, wait: Duration) {
    let drain = async {
        let mut scratch = vec![0u8; 16 << 10];
        let mut dropped = 0;
        while dropped < LINGER_MAX {
            match stream.read(&mut scratch).await {
                Ok(0) | Err(_) => return,
                Ok(n) => dropped += n,
            }
        }
    };
    let _ = tokio::time::timeout(wait, drain).await;
}

/// The origin's stream under hyper.
pub(super) struct OriginIo {
    stream: Stream,
    /// A write failed. The origin may have answered before it stopped reading,
    /// so that is for the reading side to find out.
    deaf: bool,
}

impl OriginIo {
    pub(super) fn new(stream: Stream) -> Self {
        Self { stream, deaf: false }
    }

    /// The bare stream, with what hyper had read too far put back.
    pub(super) fn into_stream(self, unread: Bytes) -> Stream {
        put_back(self.stream, unread)
    }

    /// Writing to a deaf origin waits; whatever ends the connection ends the wait.
    fn heard<T>(&mut self, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match written {
            Poll::Ready(Err(_)) => {
                self.deaf = true;
                Poll::Pending
            }
            written => written,
        }
    }
}

impl AsyncRead for OriginIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for OriginIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.deaf {
            return Poll::Pending;
        }
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.heard(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.deaf {
            return Poll::Pending;
        }
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.heard(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.deaf {
            return Poll::Pending;
        }
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.heard(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.deaf {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
