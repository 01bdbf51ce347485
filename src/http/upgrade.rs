//! A connection that stopped being HTTP: after the origin's 101 both streams
//! are taken back from hyper and relayed raw until either side, silence or the
//! node's end ends it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::io::OriginIo;
use super::record::Record;
use super::websocket;
use crate::error::Error;
use crate::gate::Held;
use crate::metrics::Present;
use crate::relay::{RelaySettings, relay};
use crate::stream::{Duplex, Stream};

/// Both heads are through already, so giving the streams up is a matter of
/// scheduling alone.
const GIVEN_UP: Duration = Duration::from_secs(15);

/// An upgrade that both sides agreed to.
pub(super) struct Upgrade {
    pub(super) visitor: OnUpgrade,
    pub(super) origin: OnUpgrade,
    /// Ends the origin's connection, unless it was taken over.
    pub(super) guard: Option<DropGuard>,
    /// Whether it is a WebSocket, which can be told to leave.
    pub(super) websocket: bool,
    pub(super) record: Record,
    /// What cuts it once it no longer passes its gate.
    pub(super) held: Option<Held>,
}

/// How long a WebSocket that no longer passes may take to end its frame.
const LAST_FRAME: Duration = Duration::from_secs(2);

impl Upgrade {
    /// Relays until the upgraded connection ends, or is silent for `idle`; its
    /// record is told then. A WebSocket is closed in good order once `drain` is
    /// cancelled. `left`: what HTTP/1.1 has left of the visitor's connection.
    pub(super) async fn run(
        self,
        left: Option<Stream>,
        idle: Duration,
        drain: CancellationToken,
        cut: CancellationToken,
    ) {
        let Self { visitor, origin, guard, websocket, mut record, held } = self;
        let _present = Present::new(metrics::gauge!("adit_upgrades"));
        let streams = async {
            let visitor = match visitor.await {
                // A stream of HTTP/2.
                Ok(upgraded) => Some(Stream::other(Tunnelled(TokioIo::new(upgraded)))),
                // hyper leaves it to who drives it to take the stream over.
                Err(by_hand) if by_hand.is_user() => left,
                Err(_) => None,
            };
            let origin = origin_stream(origin.await.ok()?)?;
            Some((visitor?, origin))
        };
        let Ok(Some((visitor, origin))) = tokio::time::timeout(GIVEN_UP, streams).await else {
            record.tally.fail(Error::Internal);
            return;
        };
        if let Some(guard) = guard {
            guard.disarm();
        }
        let gate = held.as_ref().map(Held::cut);
        let (visitor, origin) = match websocket {
            true => websocket::leaving_at(&drain, gate, visitor, origin),
            false => (visitor, origin),
        };
        let quiet = RelaySettings { idle, ..RelaySettings::default() };
        let cut = cut.child_token();
        let relayed = relay(visitor, origin, &quiet, &cut);
        let mut relayed = std::pin::pin!(relayed);
        let closed = async {
            match gate {
                Some(gate) => gate.cancelled().await,
                None => std::future::pending().await,
            }
        };
        let relayed = tokio::select! {
            relayed = &mut relayed => relayed,
            () = closed => {
                let last = if websocket { LAST_FRAME } else { Duration::ZERO };
                match tokio::time::timeout(last, &mut relayed).await {
                    Ok(relayed) => relayed,
                    Err(_) => {
                        cut.cancel();
                        relayed.await
                    }
                }
            }
        };
        if gate.is_some_and(CancellationToken::is_cancelled) {
            record.tally.fail(Error::GateClosed);
        }
        record.tally.sent_up(usize::try_from(relayed.up).unwrap_or(usize::MAX));
        record.tally.sent_down(usize::try_from(relayed.down).unwrap_or(usize::MAX));
        match relayed.error() {
            None => record.complete(),
            Some(error) => record.tally.fail(error),
        }
    }
}

fn origin_stream(upgraded: Upgraded) -> Option<Stream> {
    let parts = upgraded.downcast::<TokioIo<OriginIo>>().ok()?;
    Some(parts.io.into_inner().into_stream(parts.read_buf))
}

/// A visitor's stream of HTTP/2 as bytes.
struct Tunnelled(TokioIo<Upgraded>);

impl AsyncRead for Tunnelled {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Tunnelled {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl Duplex for Tunnelled {
    /// hyper has no way to reset it; a WebSocket's end tells itself, by a close
    /// frame or by having none.
    fn reset(&mut self) {}
}
