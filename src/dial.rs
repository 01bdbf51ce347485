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

/// One live way to an origin: a tunnel, as one session serves it.
pub trait Way: Send + Sync + 'static {
    /// Its number, which no other way of this node ever has.
    fn id(&self) -> u64;

    /// The tunnel.
    fn tunnel(&self) -> &TunnelId;

    /// The console of the session, for the visit's record.
    fn console(&self) -> Arc<dyn Sink>;
}

/// An open stream to an origin.
pub struct Dialed<W> {
    /// Bytes to and from the origin. Dropping it closes the SSH channel.
    pub stream: Stream,
    /// The way that it goes.
    pub way: Arc<W>,
}

/// Finds a way to a socket's origin: the dialer, or a fake in tests of what
/// stands above it.
pub trait Dial: Send + Sync + 'static {
    /// The ways that this dialer knows.
    type Way: Way;

    /// A place among the visitors of a socket.
    ///
    /// # Errors
    /// `SocketLimit`.
    fn admit(&self, route: &Route) -> Result<Permit, Error>;

    /// The ways to the socket's origin, the one whose turn it is first.
    fn ways(&self, route: &Route) -> Vec<Arc<Self::Way>>;

    /// An open stream over the first of these ways that leads to the origin, for
    /// this visitor.
    ///
    /// # Errors
    /// `NoTunnel` where there is no way, `TunnelLimit`, `TunnelSilent`, or
    /// `OriginRefused` where none reached its origin.
    ///
    /// # Cancel safety
    /// Cancel safe: what opens after the caller has left is closed.
    fn dial(
        &self,
        ways: Vec<Arc<Self::Way>>,
        visitor: &Visitor,
    ) -> impl Future<Output = Result<Dialed<Self::Way>, Error>> + Send;
}

impl Way for Attachment {
    fn id(&self) -> u64 {
        self.id
    }

    fn tunnel(&self) -> &TunnelId {
        &self.tunnel
    }

    fn console(&self) -> Arc<dyn Sink> {
        Arc::clone(&self.session.console) as Arc<dyn Sink>
    }
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

    async fn attempt(&self, way: Arc<Attachment>, visitor: &Visitor) -> Result<Dialed<Attachment>, Error> {
        let stream = self.tunnels.open(&way, visitor).await?;
        Ok(Dialed { stream, way })
    }
}

impl Dial for Dialer {
    type Way = Attachment;

    fn admit(&self, route: &Route) -> Result<Permit, Error> {
        Permit::take(&route.state.visitors, self.settings.connections_per_socket).ok_or(Error::SocketLimit)
    }

    /// The latest login of each tunnel in turn, then the standbys.
    fn ways(&self, route: &Route) -> Vec<Arc<Attachment>> {
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

    async fn dial(&self, ways: Vec<Arc<Attachment>>, visitor: &Visitor) -> Result<Dialed<Attachment>, Error> {
        let mut rest = ways.into_iter();
        let mut failure = Error::NoTunnel;
        let mut attempts = FuturesUnordered::new();
        let deadline = Instant::now() + self.settings.deadline;
        let Some(first) = rest.next() else { return Err(failure) };
        let mut current = Arc::clone(&first);
        attempts.push(self.attempt(first, visitor));
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
                                attempts.push(self.attempt(next, visitor));
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
                        attempts.push(self.attempt(next, visitor));
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
        Error::TunnelLimit => 2,
        Error::NoTunnel => 1,
        _ => 0,
    };
    if weight(b) > weight(a) { b } else { a }
}
