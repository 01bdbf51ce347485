//! Finds a way from a visitor to an origin: the socket's live tunnels in turn,
//! the next one on failure, one deadline over all.

use std::sync::Arc;

use crate::model::TunnelId;
use crate::stream::Stream;
use crate::visit_log::Sink;

/// An open way to an origin.
pub struct Dialed {
    /// Bytes to and from the origin. Dropping it closes the SSH channel.
    pub stream: Stream,
    /// The tunnel that carries it.
    pub tunnel: TunnelId,
    /// The console of the session that carries it, for the visit's record.
    pub console: Option<Arc<dyn Sink>>,
}
