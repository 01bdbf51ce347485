//! A connection that stopped being HTTP: after the origin's 101 both streams
//! are taken back from hyper and relayed raw until either side, silence or the
//! node's end ends it.

use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::io::{OriginIo, VisitorIo};
use super::record::Record;
use super::settings::HttpSettings;
use crate::error::Error;
use crate::relay::{RelaySettings, relay};
use crate::stream::Stream;

/// An upgrade that both sides agreed to.
pub(super) struct Upgrade {
    pub(super) visitor: OnUpgrade,
    pub(super) origin: OnUpgrade,
    /// Ends the origin's connection, unless it was taken over.
    pub(super) guard: Option<DropGuard>,
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
        if let Some(guard) = guard {
            guard.disarm();
        }
        let quiet = RelaySettings { idle: settings.upgrade_idle, ..RelaySettings::default() };
        let relayed = relay(visitor, origin, &quiet, cut).await;
        record.tally.sent_up(usize::try_from(relayed.up).unwrap_or(usize::MAX));
        record.tally.sent_down(usize::try_from(relayed.down).unwrap_or(usize::MAX));
        match relayed.error() {
            None => record.complete(),
            Some(error) => record.tally.fail(error),
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
