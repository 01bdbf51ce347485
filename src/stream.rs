//! A byte stream of one visit: either a bare `TcpStream` (which the kernel can
//! splice) or anything else (TLS, an SSH channel), with bytes that were peeked
//! put back in front. Who opens, routes or relays streams is elsewhere.

use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::limits::Permit;

/// What a stream must be able to do besides moving bytes.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {
    /// Ends the stream so that the far end can tell it from a clean end
    /// (TCP: RST). Called once, right before the stream is dropped.
    fn reset(&mut self);

    /// Bytes as they came, at most `max`, for a stream that holds them already:
    /// none at its end. `None` for one that reads into the caller's memory.
    fn poll_piece(&mut self, _cx: &mut Context<'_>, _max: usize) -> Option<Poll<io::Result<Bytes>>> {
        None
    }

    /// Whether the far end has broken the stream off, for one who does not
    /// read now and so would not learn it. True once: what tells it forgets it.
    fn broken(&self) -> bool {
        false
    }

    /// Has the caller's runtime tell of its bytes, after another one did: a wake-up less
    /// for each. Where that cannot be, the other one goes on to tell.
    fn rehome(&mut self) {}

    /// Ready once reading may give something, for one who waits long and would not
    /// keep memory to read into. At once where that is not known.
    fn poll_readable(&mut self, _cx: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}

enum Io {
    Tcp(TcpStream),
    Other(Box<dyn Duplex>),
}

/// One end of a visit. Reads give the put-back bytes first.
pub struct Stream {
    head: Bytes,
    io: Io,
    /// Counted for as long as it is open.
    place: Option<Permit>,
}

impl Stream {
    /// A bare TCP connection: relayed by splice where the other end is one too.
    pub fn tcp(tcp: TcpStream) -> Self {
        Self { head: Bytes::new(), io: Io::Tcp(tcp), place: None }
    }

    /// Anything that is not a bare TCP connection.
    pub fn other(io: impl Duplex + 'static) -> Self {
        Self { head: Bytes::new(), io: Io::Other(Box::new(io)), place: None }
    }

    /// Puts bytes back in front of what is still to be read.
    #[must_use]
    pub fn with_head(mut self, head: Bytes) -> Self {
        debug_assert!(self.head.is_empty(), "a head is put back once");
        self.head = head;
        self
    }

    /// Holds a place for as long as it is open.
    #[must_use]
    pub fn holding(mut self, place: Permit) -> Self {
        self.place = Some(place);
        self
    }

    /// Takes the put-back bytes that nobody has read yet.
    pub fn take_head(&mut self) -> Bytes {
        std::mem::take(&mut self.head)
    }

    /// The bare TCP connection, where this is one and no put-back byte is left.
    pub fn as_tcp(&self) -> Option<&TcpStream> {
        match &self.io {
            Io::Tcp(tcp) if self.head.is_empty() => Some(tcp),
            _ => None,
        }
    }

    /// Ends the stream abnormally: the far end sees a reset, never a clean end
    /// that would make a truncated answer look complete.
    pub fn reset(mut self) {
        Duplex::reset(&mut self);
    }
}

impl Duplex for Stream {
    fn reset(&mut self) {
        match &mut self.io {
            Io::Tcp(tcp) => Duplex::reset(tcp),
            Io::Other(io) => io.reset(),
        }
    }

    fn poll_piece(&mut self, cx: &mut Context<'_>, max: usize) -> Option<Poll<io::Result<Bytes>>> {
        match &mut self.io {
            Io::Other(io) if self.head.is_empty() => io.poll_piece(cx, max),
            _ => None,
        }
    }

    fn broken(&self) -> bool {
        match &self.io {
            Io::Tcp(tcp) => Duplex::broken(tcp),
            Io::Other(io) => io.broken(),
        }
    }

    fn rehome(&mut self) {
        match &mut self.io {
            Io::Tcp(tcp) => Duplex::rehome(tcp),
            Io::Other(io) => io.rehome(),
        }
    }

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.io {
            _ if !self.head.is_empty() => Poll::Ready(()),
            Io::Tcp(tcp) => Duplex::poll_readable(tcp, cx),
            Io::Other(io) => io.poll_readable(cx),
        }
    }
}

impl Duplex for TcpStream {
    fn reset(&mut self) {
        // SO_LINGER 0: close(2) sends RST and drops what is queued.
        let _ = socket2::SockRef::from(&*self).set_linger(Some(std::time::Duration::ZERO));
    }

    fn broken(&self) -> bool {
        !matches!(self.take_error(), Ok(None))
    }

    fn rehome(&mut self) {
        // Another descriptor of the connection, for this one is not ours to give away.
        let tcp = self.as_fd().try_clone_to_owned();
        if let Ok(tcp) = tcp.and_then(|tcp| TcpStream::from_std(tcp.into())) {
            *self = tcp;
        }
    }

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.poll_read_ready(cx).map(|_| ())
    }
}

impl<S: Duplex> Duplex for tokio_rustls::server::TlsStream<S> {
    fn reset(&mut self) {
        self.get_mut().0.reset();
    }

    fn broken(&self) -> bool {
        self.get_ref().0.broken()
    }

    fn rehome(&mut self) {
        self.get_mut().0.rehome();
    }

    /// For one who has read all that there was: what is opened already is not seen.
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.get_mut().0.poll_readable(cx)
    }
}

impl<S: Duplex> Duplex for tokio_rustls::client::TlsStream<S> {
    fn reset(&mut self) {
        self.get_mut().0.reset();
    }

    fn broken(&self) -> bool {
        self.get_ref().0.broken()
    }

    fn rehome(&mut self) {
        self.get_mut().0.rehome();
    }
}

/// An in-memory pair, for tests of what stands above streams.
impl Duplex for tokio::io::DuplexStream {
    fn reset(&mut self) {}
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.head.is_empty() {
            let n = self.head.len().min(buf.remaining());
            // Not `advance`: an empty rest would keep the memory.
            buf.put_slice(&self.head.split_to(n));
            return Poll::Ready(Ok(()));
        }
        match &mut self.io {
            Io::Tcp(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Io::Other(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Tcp(tcp) => Pin::new(tcp).poll_write(cx, buf),
            Io::Other(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Tcp(tcp) => Pin::new(tcp).poll_write_vectored(cx, bufs),
            Io::Other(io) => Pin::new(io).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Tcp(tcp) => tcp.is_write_vectored(),
            Io::Other(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Tcp(tcp) => Pin::new(tcp).poll_flush(cx),
            Io::Other(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Tcp(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Io::Other(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.io {
            Io::Tcp(_) => "tcp",
            Io::Other(_) => "other",
        };
        f.debug_struct("Stream").field("io", &kind).field("head", &self.head.len()).finish()
    }
}
