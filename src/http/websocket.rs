//! WebSocket (RFC 6455) as far as a proxy has to know it: the opening handshake
//! with an HTTP/1.1 origin on behalf of an HTTP/2 visitor (RFC 8441), and frames'
//! boundaries, so that a node that drains can take its leave between two frames.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use aws_lc_rs::digest;
use bytes::Bytes;
use data_encoding::BASE64;
use hyper::header::{HeaderMap, HeaderValue, SEC_WEBSOCKET_ACCEPT};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::stream::{Duplex, Stream};

/// A close frame with code 1001, "going away" (RFC 6455 §7.4.1), as a server
/// sends it; and as a client does, masked (with zeros: it hides nothing).
const GOING_AWAY: &[u8] = &[0x88, 2, 0x03, 0xe9];
const GOING_AWAY_MASKED: &[u8] = &[0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe9];

/// The same with code 1008, "policy violation".
const NOT_ALLOWED: &[u8] = &[0x88, 2, 0x03, 0xf0];
const NOT_ALLOWED_MASKED: &[u8] = &[0x88, 0x82, 0, 0, 0, 0, 0x03, 0xf0];

/// A new `Sec-WebSocket-Key`: 16 random bytes.
pub(super) fn new_key() -> HeaderValue {
    let mut bits = [0u8; 16];
    // Fails only where the system has no randomness at all; it is no secret.
    let _ = aws_lc_rs::rand::fill(&mut bits);
    HeaderValue::from_str(&BASE64.encode(&bits)).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// Whether an answer accepts the handshake with this key (RFC 6455 §4.1).
pub(super) fn accepts(answer: &HeaderMap, key: &HeaderValue) -> bool {
    let salted = [key.as_bytes(), b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"].concat();
    let sum = digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &salted);
    answer.get(SEC_WEBSOCKET_ACCEPT).is_some_and(|accept| accept.as_bytes() == BASE64.encode(sum.as_ref()).as_bytes())
}

/// Both streams of a WebSocket, which end with a close frame once `drain` is
/// cancelled, or `gate`, whose visitor may not go on.
pub(super) fn leaving_at(
    drain: &CancellationToken,
    gate: Option<&CancellationToken>,
    visitor: Stream,
    origin: Stream,
) -> (Stream, Stream) {
    let leaving = |stream, going: &'static [u8], denied: &'static [u8]| {
        let drain = Box::pin(drain.clone().cancelled_owned());
        let gate = gate.map(|gate| (Box::pin(gate.clone().cancelled_owned()), denied));
        Stream::other(Leaving { stream, frames: Frames::default(), drain, gate, goodbye: going, left: false })
    };
    // What is read from one side is what the other is told.
    (leaving(visitor, GOING_AWAY_MASKED, NOT_ALLOWED_MASKED), leaving(origin, GOING_AWAY, NOT_ALLOWED))
}

/// One side: what is read from it ends between two frames, with a goodbye.
struct Leaving {
    stream: Stream,
    frames: Frames,
    drain: Pin<Box<WaitForCancellationFutureOwned>>,
    /// The same, with another goodbye.
    gate: Option<(Pin<Box<WaitForCancellationFutureOwned>>, &'static [u8])>,
    goodbye: &'static [u8],
    left: bool,
}

impl Leaving {
    /// What is said instead of what the stream would say now: nothing while it
    /// has to go on.
    fn poll_goodbye(&mut self, cx: &mut Context<'_>) -> Option<&'static [u8]> {
        if !self.left {
            if !self.frames.is_between() {
                return None;
            }
            let denied =
                self.gate.as_mut().and_then(|(gate, denied)| gate.as_mut().poll(cx).is_ready().then_some(*denied));
            match denied {
                Some(denied) => self.goodbye = denied,
                None if self.drain.as_mut().poll(cx).is_ready() => {}
                None => return None,
            }
            self.left = true;
        }
        Some(std::mem::take(&mut self.goodbye))
    }
}

impl AsyncRead for Leaving {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(goodbye) = self.poll_goodbye(cx) {
            let (now, later) = goodbye.split_at(goodbye.len().min(buf.remaining()));
            buf.put_slice(now);
            self.goodbye = later;
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        self.frames.pass(buf.filled().get(before..).unwrap_or_default());
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Leaving {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Duplex for Leaving {
    fn reset(&mut self) {
        Duplex::reset(&mut self.stream);
    }

    fn poll_piece(&mut self, cx: &mut Context<'_>, max: usize) -> Option<Poll<io::Result<Bytes>>> {
        if let Some(goodbye) = self.poll_goodbye(cx) {
            return Some(Poll::Ready(Ok(Bytes::from_static(goodbye))));
        }
        let piece = self.stream.poll_piece(cx, max)?;
        if let Poll::Ready(Ok(piece)) = &piece {
            self.frames.pass(piece);
        }
        Some(piece)
    }

    fn broken(&self) -> bool {
        self.stream.broken()
    }
}

/// Where in a row of frames a stream is (RFC 6455 §5.2).
#[derive(Debug, Default)]
struct Frames {
    head: [u8; 10],
    /// How much of the head there is.
    got: usize,
    /// What is left of the mask and the payload.
    rest: u64,
}

impl Frames {
    fn is_between(&self) -> bool {
        self.got == 0 && self.rest == 0
    }

    fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.rest > 0 {
                let skipped = bytes.len().min(usize::try_from(self.rest).unwrap_or(usize::MAX));
                self.rest -= skipped as u64;
                bytes = bytes.get(skipped..).unwrap_or_default();
                continue;
            }
            if let (Some(slot), Some((first, after))) = (self.head.get_mut(self.got), bytes.split_first()) {
                *slot = *first;
                self.got += 1;
                bytes = after;
            }
            self.rest = match (self.head, self.got) {
                ([_, b, ..], 2) if b & 0x7f < 126 => u64::from(b & 0x7f),
                ([_, b, c, d, ..], 4) if b & 0x7f == 126 => u64::from(u16::from_be_bytes([c, d])),
                ([_, _, len @ ..], 10) => u64::from_be_bytes(len),
                _ => continue,
            };
            let mask = if self.head[1] & 0x80 == 0 { 0 } else { 4 };
            (self.got, self.rest) = (0, self.rest.saturating_add(mask));
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    fn frame(masked: bool, payload: usize) -> Vec<u8> {
        let bit = if masked { 0x80 } else { 0 };
        let mut frame = match payload {
            0..126 => vec![0x82, bit | payload as u8],
            126..65_536 => [&[0x82, bit | 126], (payload as u16).to_be_bytes().as_slice()].concat(),
            _ => [&[0x82, bit | 127], (payload as u64).to_be_bytes().as_slice()].concat(),
        };
        frame.extend(vec![0x88; payload + if masked { 4 } else { 0 }]);
        frame
    }

    #[test]
    fn boundaries_are_found_however_the_bytes_are_cut() {
        for step in [1, 3, 7, 100, 100_000] {
            let mut frames = Frames::default();
            let (mut all, mut ends) = (Vec::new(), vec![0]);
            for (masked, payload) in
                [(false, 0), (true, 0), (true, 5), (false, 125), (true, 126), (false, 300), (true, 70_000)]
            {
                all.extend(frame(masked, payload));
                ends.push(all.len());
            }
            let mut at = 0;
            for piece in all.chunks(step) {
                assert_eq!(frames.is_between(), ends.contains(&at), "{step} {at}");
                frames.pass(piece);
                at += piece.len();
            }
            assert!(frames.is_between());
        }
    }

    #[tokio::test]
    async fn both_sides_hear_a_close_between_two_frames() {
        let drain = CancellationToken::new();
        let ((visitor, near), (origin, far)) = (duplex(1 << 20), duplex(1 << 20));
        let (near, far) = leaving_at(&drain, None, Stream::other(near), Stream::other(far));
        let (mut near, mut far, mut visitor, mut origin) = (near, far, visitor, origin);
        let large = frame(false, 1000);
        origin.write_all(&large[..500]).await.unwrap();
        let mut read = vec![0; 500];
        far.read_exact(&mut read).await.unwrap();
        drain.cancel();
        // Nothing of the visitor's is under way; of the origin's half a frame is.
        read.clear();
        near.read_to_end(&mut read).await.unwrap();
        assert_eq!(read, GOING_AWAY_MASKED);
        origin.write_all(&large[500..]).await.unwrap();
        origin.write_all(&large).await.unwrap();
        read.clear();
        far.read_to_end(&mut read).await.unwrap();
        assert_eq!(read[read.len() - 4..], *GOING_AWAY);
        let whole = read.len() - 4 + 500;
        assert!(whole.is_multiple_of(large.len()), "{whole}");
        visitor.write_all(b"late").await.unwrap();
    }

    #[test]
    fn the_handshake_of_the_rfc_is_accepted_and_no_other() {
        // RFC 6455 §1.3.
        let key = HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ==");
        let mut answer = HeaderMap::new();
        assert!(!accepts(&answer, &key));
        answer.insert(SEC_WEBSOCKET_ACCEPT, HeaderValue::from_static("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
        assert!(accepts(&answer, &key));
        assert!(!accepts(&answer, &new_key()));
        assert_eq!(new_key().len(), 24);
    }
}
