//! Finds a way from a visitor to an origin: the socket's live tunnels in turn,
//! the next one on failure, a second one beside the first where that is slow,
//! one deadline over all.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, sleep_until};

use crate::error::Error;
use crate::fields::Fields;
use crate::limits::Permit;
use crate::model::{TunnelId, Visitor};
use crate::routes::Route;
use crate::stream::Stream;
use crate::tunnel::{Attachment, Tunnels};
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

/// Finds a way to a socket's origin: the dialer, or a fake in tests of what
/// stands above it.
pub trait Dial: Send + Sync + 'static {
    /// An open stream to the origin of `route`, for this visitor.
    ///
    /// # Errors
    /// `NoTunnel`, `SocketLimit`, `TunnelLimit`, `TunnelSilent`, or
    /// `OriginRefused` where no tunnel of the socket reached its origin.
    ///
    /// # Cancel safety
    /// Cancel safe: what opens after the caller has left is closed.
    fn dial(&self, route: &Arc<Route>, visitor: &Visitor) -> impl Future<Output = Result<Dialed, Error>> + Send;
}

/// The knobs of `[dial]`.
#[derive(Debug, Clone, PartialEq)]
pub struct DialSettings {
    /// Time for one visit to find an origin, over all attempts.
    pub deadline: Duration,
    /// Visitors of one socket at once.
    pub connections_per_socket: usize,
}

impl Default for DialSettings {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(15), connections_per_socket: 20_000 }
    }
}

impl DialSettings {
    /// Reads `[dial]`.
    pub fn read(f: &mut Fields) -> Self {
        let d = Self::default();
        let settings = Self {
            deadline: f.take("deadline", d.deadline),
            connections_per_socket: f.take("connections_per_socket", d.connections_per_socket),
        };
        if settings.deadline.is_zero() {
            f.mistake("deadline", "0 would fail every visit".into(), "write a duration like \"15s\"".into());
        }
        if settings.connections_per_socket == 0 {
            f.mistake(
                "connections_per_socket",
                "0 would refuse everybody".into(),
                "write a whole number from 1".into(),
            );
        }
        settings
    }
}

/// Dials origins through live tunnels.
pub struct Dialer {
    tunnels: Arc<Tunnels>,
    settings: DialSettings,
}

impl Dialer {
    /// A dialer over this node's live tunnels.
    pub fn new(tunnels: Arc<Tunnels>, settings: DialSettings) -> Self {
        Self { tunnels, settings }
    }

    fn patience(&self) -> Instant {
        Instant::now() + self.tunnels.settings().open_patience
    }

    /// The latest login of each tunnel in turn, then the standbys.
    fn in_order(&self, route: &Route) -> Vec<Arc<Attachment>> {
        let mut serving = Vec::new();
        let mut standbys = Vec::new();
        for tunnel in route.tunnels_in_turn() {
            let mut sessions = self.tunnels.candidates(tunnel).into_iter();
            serving.extend(sessions.next());
            standbys.extend(sessions);
        }
        serving.extend(standbys);
        serving
    }

    async fn attempt(&self, via: Arc<Attachment>, route: &Route, visitor: &Visitor) -> Result<Dialed, Error> {
        let permit = Permit::take(&route.state.visitors, self.settings.connections_per_socket);
        let permit = permit.ok_or(Error::SocketLimit)?;
        let stream = self.tunnels.open(&via, visitor, vec![permit]).await?;
        Ok(Dialed { stream, tunnel: via.tunnel.clone(), console: Some(via.console()) })
    }
}

impl Dial for Dialer {
    async fn dial(&self, route: &Arc<Route>, visitor: &Visitor) -> Result<Dialed, Error> {
        let mut rest = self.in_order(route).into_iter();
        let mut failure = Error::NoTunnel;
        let mut attempts = FuturesUnordered::new();
        let deadline = Instant::now() + self.settings.deadline;
        let Some(first) = rest.next() else { return Err(failure) };
        let mut current = Arc::clone(&first);
        attempts.push(self.attempt(first, route, visitor));
        let mut patience = self.patience();
        let mut asked = false;
        loop {
            tokio::select! {
                Some(result) = attempts.next() => match result {
                    Ok(dialed) => return Ok(dialed),
                    Err(error) => {
                        failure = worse(failure, error);
                        match rest.next() {
                            Some(next) => {
                                current = Arc::clone(&next);
                                attempts.push(self.attempt(next, route, visitor));
                                (patience, asked) = (self.patience(), false);
                            }
                            None if attempts.is_empty() => return Err(failure),
                            None => {}
                        }
                    }
                },
                () = sleep_until(patience), if !asked => {
                    // Slow: find out whether that peer is alive, and try another beside it.
                    self.tunnels.suspect(&current);
                    asked = true;
                    if let Some(next) = rest.next() {
                        current = Arc::clone(&next);
                        attempts.push(self.attempt(next, route, visitor));
                        (patience, asked) = (self.patience(), false);
                    }
                }
                () = sleep_until(deadline) => return Err(worse(failure, Error::TunnelSilent)),
            }
        }
    }
}

/// Of two failures, the one that tells more of what is wrong.
fn worse(a: Error, b: Error) -> Error {
    let weight = |e: Error| match e {
        Error::OriginRefused => 4,
        Error::TunnelSilent => 3,
        Error::TunnelLimit | Error::SocketLimit => 2,
        Error::NoTunnel => 1,
        _ => 0,
    };
    if weight(b) > weight(a) { b } else { a }
}
