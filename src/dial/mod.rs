//! Finds a way from a visitor to an origin: live tunnels, here and at other nodes, in
//! the order that `choice` gives them; the next one on failure, a second one beside
//! the first where that is slow, one deadline over all.

mod choice;
mod health;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, sleep_until};

pub use self::health::HealthSettings;
pub use crate::fleet::Errand;

use self::choice::Head;
use self::health::Health;
use crate::cores::Core;
use crate::error::Error;
use crate::fields::Fields;
use crate::fleet::{Fleet, Peer, Place};
use crate::limits::Permit;
use crate::model::{NodeId, TunnelId};
use crate::routes::Route;
use crate::stream::{Duplex, Stream};
use crate::tunnel::{Attachment, Tunnels};
use crate::visit_log::{Far, Sink, Visit, line};

/// One live way to an origin: a tunnel, as one session serves it.
pub trait Way: Clone + Send + Sync + 'static {
    /// Its number, which no other way of this node ever has.
    fn id(&self) -> u64;

    /// The tunnel.
    fn tunnel(&self) -> &TunnelId;

    /// The nodes, where the tunnel is at another one.
    fn far(&self) -> Option<Far> {
        None
    }

    /// The console of the session, for the visit's record.
    fn console(&self) -> Arc<dyn Sink>;

    /// Waits until what carries it no longer answers, where that is known before its
    /// streams break.
    fn lost(&self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }
}

/// An open stream to an origin.
pub struct Dialed<W> {
    /// Bytes to and from the origin. Dropping it closes the SSH channel.
    pub stream: Stream,
    /// The way that it goes.
    pub way: W,
    /// How long the tunnel took, where it is at another node.
    pub took: Option<Duration>,
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

    /// The ways to the socket's origin for a visitor from `ip`, the best first.
    fn ways(&self, route: &Route, ip: IpAddr) -> Vec<Self::Way>;

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
        ways: Vec<Self::Way>,
        errand: Errand<'_>,
    ) -> impl Future<Output = Result<Dialed<Self::Way>, Error>> + Send;
}

/// A tunnel of this node, or of another one.
#[derive(Clone)]
pub enum Candidate {
    /// As a session of this node serves it.
    Here(Arc<Attachment>),
    /// As another node does.
    There {
        /// Where.
        place: Arc<Place>,
        /// How that node is reached.
        peer: Arc<Peer>,
        /// This node.
        me: NodeId,
    },
}

impl Way for Candidate {
    fn id(&self) -> u64 {
        match self {
            Self::Here(attachment) => attachment.id,
            Self::There { place, .. } => place.id,
        }
    }

    fn tunnel(&self) -> &TunnelId {
        match self {
            Self::Here(attachment) => &attachment.tunnel,
            Self::There { place, .. } => &place.tunnel,
        }
    }

    fn far(&self) -> Option<Far> {
        match self {
            Self::Here(_) => None,
            Self::There { place, me, peer } => {
                Some(Far { entry: me.clone(), owner: place.node().clone(), between: peer.round_trip() })
            }
        }
    }

    fn console(&self) -> Arc<dyn Sink> {
        match self {
            Self::Here(attachment) => Arc::clone(&attachment.session.console) as _,
            Self::There { place, peer, .. } => {
                Arc::new(FarConsole { tunnel: place.tunnel.clone(), peer: Arc::clone(peer) })
            }
        }
    }

    async fn lost(&self) {
        match self {
            Self::Here(_) => std::future::pending().await,
            Self::There { peer, .. } => peer.lost().await,
        }
    }
}

/// The console of an owner at another node.
struct FarConsole {
    tunnel: TunnelId,
    peer: Arc<Peer>,
}

impl Sink for FarConsole {
    fn record(&self, visit: &Arc<Visit>) {
        let mut text = String::new();
        line::write(&mut text, visit);
        self.peer.tell_owner(&self.tunnel, text);
    }
}

/// The knobs of `[dial]`.
#[derive(Debug, Clone, PartialEq)]
pub struct DialSettings {
    /// Time for one visit to find an origin, over all attempts.
    pub deadline: Duration,
    /// Visitors of one socket at once.
    pub connections_per_socket: usize,
    /// When a tunnel that fails is left alone for a while.
    pub health: HealthSettings,
}

impl Default for DialSettings {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(15), connections_per_socket: 20_000, health: HealthSettings::default() }
    }
}

impl DialSettings {
    /// Reads `[dial]`.
    pub fn read(f: &mut Fields) -> Self {
        let d = Self::default();
        let settings = Self {
            deadline: f.take("deadline", d.deadline),
            connections_per_socket: f.take("connections_per_socket", d.connections_per_socket),
            health: HealthSettings::read(f),
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
    fleet: Option<Arc<Fleet>>,
    health: Health,
    settings: DialSettings,
}

impl Dialer {
    /// A dialer over this node's live tunnels, and those of its fleet.
    pub fn new(tunnels: Arc<Tunnels>, fleet: Option<Arc<Fleet>>, settings: DialSettings) -> Self {
        Self { tunnels, fleet, health: Health::new(settings.health.clone()), settings }
    }

    /// Where a visitor of a socket had best be served: with one of its tunnels, another
    /// one each `turn`. None where none is here.
    pub fn core(&self, route: &Route, turn: usize) -> Option<Core> {
        let (before, from) = route.tunnels.split_at(turn.checked_rem(route.tunnels.len()).unwrap_or(0));
        from.iter().chain(before).find_map(|tunnel| self.tunnels.core(tunnel))
    }

    /// How long one attempt may take before another is made beside it.
    fn patience(&self) -> Instant {
        Instant::now() + self.tunnels.settings().open_patience
    }

    /// Who holds a tunnel, the latest login first, wherever it was.
    fn holders(&self, tunnel: &TunnelId) -> Vec<Candidate> {
        let here = self.tunnels.candidates(tunnel);
        let Some(fleet) = &self.fleet else { return here.into_iter().map(Candidate::Here).collect() };
        let places = fleet.places(tunnel);
        // What the fleet was not told of yet is the latest there is.
        let known = here.iter().any(|one| fleet.knows(tunnel, one.session.id));
        let mine = places.iter().position(|place| place.peer().is_none()).filter(|_| known).unwrap_or(0);
        let there = |place: &Arc<Place>| {
            let peer = Arc::clone(place.peer()?);
            Some(Candidate::There { place: Arc::clone(place), peer, me: fleet.me().clone() })
        };
        let (later, earlier) = places.split_at(mine);
        let later = later.iter().filter_map(there);
        later.chain(here.into_iter().map(Candidate::Here)).chain(earlier.iter().filter_map(there)).collect()
    }

    /// The same, but those of a dead node, or whose origin fails its checks, wait for
    /// who serves in their place.
    fn able_first(&self, tunnel: &TunnelId) -> Vec<Candidate> {
        let mut holders = self.holders(tunnel);
        holders.sort_by_key(|way| match way {
            Candidate::Here(attachment) => (false, attachment.fails()),
            Candidate::There { place, peer, .. } => (!peer.is_up(), place.fails()),
        });
        holders
    }

    async fn attempt(&self, way: Candidate, errand: Errand<'_>) -> Result<Dialed<Candidate>, Error> {
        let opened = match (&way, &self.fleet) {
            (Candidate::Here(attachment), _) => {
                self.tunnels.open(attachment, errand.visitor).await.map(|stream| (stream, None))
            }
            (Candidate::There { place, .. }, Some(fleet)) => {
                fleet.open(place, errand).await.map(|(mut stream, took)| {
                    // It was made ready elsewhere.
                    stream.rehome();
                    (stream, Some(took))
                })
            }
            (Candidate::There { .. }, None) => Err(Error::NoTunnel),
        };
        self.health.learn(way.tunnel(), opened.as_ref().err().copied());
        opened.map(|(stream, took)| Dialed { stream, way, took })
    }

    /// Finds out whether a way that is slow is still one.
    fn suspect(&self, way: &Candidate) {
        if let Candidate::Here(attachment) = way {
            self.tunnels.suspect(attachment);
        }
    }
}

impl Dial for Dialer {
    type Way = Candidate;

    fn admit(&self, route: &Route) -> Result<Permit, Error> {
        Permit::take(&route.state.visitors, self.settings.connections_per_socket).ok_or(Error::SocketLimit)
    }

    /// Of each tunnel the latest login, in the order of the socket's policy; then the
    /// standbys.
    fn ways(&self, route: &Route, ip: IpAddr) -> Vec<Candidate> {
        if let [tunnel] = route.tunnels.as_slice() {
            // Most sockets have one, and nothing to be chosen.
            return self.able_first(tunnel);
        }
        let mut heads = Vec::with_capacity(route.tunnels.len());
        let mut standbys = Vec::new();
        for tunnel in &route.tunnels {
            let mut holders = self.able_first(tunnel).into_iter();
            let record = self.tunnels.record(tunnel);
            heads.extend(
                holders.next().map(|way| Head::new(way, record.as_deref(), self.fleet.as_deref(), &self.health)),
            );
            standbys.extend(holders);
        }
        let mut ways = choice::in_order(heads, route, ip);
        ways.extend(standbys);
        ways
    }

    async fn dial(&self, ways: Vec<Candidate>, errand: Errand<'_>) -> Result<Dialed<Candidate>, Error> {
        let mut rest = ways.into_iter();
        let mut failure = Error::NoTunnel;
        let mut attempts = FuturesUnordered::new();
        let deadline = Instant::now() + self.settings.deadline;
        let Some(first) = rest.next() else { return Err(failure) };
        let mut current = first.clone();
        attempts.push(self.attempt(first, errand));
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
                                current = next.clone();
                                attempts.push(self.attempt(next, errand));
                                (patience, asked) = (self.patience(), false);
                            }
                            None if attempts.is_empty() => return Err(failure),
                            None => {}
                        }
                    }
                },
                () = async { tokio::select! { () = sleep_until(patience) => {} () = current.lost() => {} } }, if !asked => {
                    // Slow: find out whether that peer is alive, and try another beside it.
                    self.suspect(&current);
                    asked = true;
                    if let Some(next) = rest.next() {
                        current = next.clone();
                        attempts.push(self.attempt(next, errand));
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
        Error::OriginRefused => 6,
        Error::TunnelSilent => 5,
        Error::TunnelLimit => 4,
        Error::NodeLimit | Error::Draining => 3,
        Error::TunnelLost => 2,
        Error::NoTunnel => 1,
        _ => 0,
    };
    if weight(b) > weight(a) { b } else { a }
}
