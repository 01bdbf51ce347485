//! What the nodes of a fleet tell each other through the feed: that they live, and
//! which tunnels are logged in where. One leased key says that a node lives; its
//! locations are plain keys that count only beside it, so that a node's death is one
//! event, however many tunnels it had. `table` decides where a tunnel is, `presence`
//! tells what is here, this file follows what others tell; by a `peer` this node
//! reaches another one's tunnels, and by the `door` others reach those of this one.

pub mod authority; // the CA of its nodes
mod door;
mod guard;
mod identity;
mod load;
mod peer;
mod presence;
mod record;
mod settings;
mod table;
mod wire;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use dashmap::DashMap;
use parking_lot::{Mutex, RwLock};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

pub use self::door::Door;
pub use self::peer::Peer;
pub use self::settings::{Coordinates, FleetSettings};
pub use self::table::Place;
#[doc(hidden)]
pub use self::wire::fuzz as fuzz_wire;

use self::guard::Guard;
use self::identity::Identity;
use self::load::Load;
use self::peer::{Means, Refused};
use self::record::{Location, NodeRecord};
use self::table::Table;
use self::wire::Open;
use crate::error::Error;
use crate::feed::{Change, Entry, Event, Feed, Subscription};
use crate::model::{NodeId, SocketId, TunnelId, Visitor};
use crate::stream::Stream;
use crate::tcp::TcpSettings;
use crate::tunnel::Tunnels;

/// Who lives: under a lease. Behind all records in the order of keys, so that one watch
/// of those has none of these, which are many more.
const NODES: &str = "up/node/";
/// Where tunnels are: `up/loc/<node>/<tunnel>`, without one.
const LOCATIONS: &str = "up/loc/";

/// Records of a whole state that are taken in between two chances for other tasks.
const BREATH: usize = 256;

/// What this node knows of the fleet, and tells it.
pub struct Fleet {
    me: NodeId,
    /// This run of the node: what was told by another one counts no more.
    boot: String,
    feed: Arc<dyn Feed>,
    tunnels: Arc<Tunnels>,
    means: Arc<Means>,
    /// Where others reach this node.
    addresses: Vec<std::net::SocketAddr>,
    /// Whether its API writes records.
    control: bool,
    table: RwLock<Table>,
    peers: DashMap<NodeId, Arc<Peer>>,
    /// Those whose links are held.
    linked: Mutex<HashMap<NodeId, CancellationToken>>,
    /// The session that others were told of, of each tunnel that is here.
    told: DashMap<TunnelId, u64>,
    next_place: AtomicU64,
    draining: AtomicBool,
    load: Load,
    /// Our own key is gone from the feed, or is to be told anew.
    lost: Notify,
}

/// What a fleet is made of.
pub struct Parts {
    /// The node's name, which no other one of the fleet has.
    pub me: NodeId,
    /// Where nodes tell each other.
    pub feed: Arc<dyn Feed>,
    /// What is logged in here.
    pub tunnels: Arc<Tunnels>,
    /// How nodes reach each other.
    pub settings: FleetSettings,
    /// Where this node is reached: the listeners as they are bound.
    pub bound: Vec<std::net::SocketAddr>,
    /// Of what connects nodes.
    pub tcp: TcpSettings,
    /// Whether this node's API writes records.
    pub control: bool,
}

/// A visitor who is to be taken to another node.
#[derive(Debug, Clone, Copy)]
pub struct Errand<'a> {
    /// The socket that they came to.
    pub socket: &'a SocketId,
    /// Who it is.
    pub visitor: &'a Visitor,
    /// What the visit is called in logs.
    pub id: &'a str,
}

/// Numbers of places are above those of sessions.
const PLACES: u64 = 1 << 63;

impl Fleet {
    /// The fleet as this node sees it.
    ///
    /// # Errors
    /// The system has no random bytes; a file of the settings cannot be used.
    pub fn new(parts: Parts) -> Result<Arc<Self>, String> {
        let mut boot = [0; 8];
        aws_lc_rs::rand::fill(&mut boot).map_err(|_| "the system has no random bytes".to_owned())?;
        let Parts { me, feed, tunnels, settings, bound, tcp, control } = parts;
        let identity = Identity::new(&settings).map_err(|why| format!("[fleet] {why}"))?;
        let addresses = if settings.advertise.is_empty() { bound } else { settings.advertise.clone() };
        Ok(Arc::new(Self {
            boot: data_encoding::HEXLOWER.encode(&boot),
            load: Load::new(settings.spare_from),
            feed,
            tunnels,
            means: Arc::new(Means { me: me.clone(), settings, tcp, identity }),
            me,
            addresses,
            control,
            table: RwLock::default(),
            peers: DashMap::new(),
            linked: Mutex::default(),
            told: DashMap::new(),
            next_place: AtomicU64::new(PLACES),
            draining: AtomicBool::new(false),
            lost: Notify::new(),
        }))
    }

    /// This node's name.
    pub fn me(&self) -> &NodeId {
        &self.me
    }

    /// Where a tunnel is, the latest login first.
    pub fn places(&self, tunnel: &TunnelId) -> Vec<Arc<Place>> {
        self.table.read().places(tunnel)
    }

    /// Whether the fleet was told of this session as the one that serves a tunnel here.
    pub fn knows(&self, tunnel: &TunnelId, session: u64) -> bool {
        self.told.get(tunnel).is_some_and(|told| *told == session)
    }

    /// Where a tunnel is that is not here.
    fn elsewhere(&self, tunnel: &TunnelId) -> Option<NodeId> {
        self.places(tunnel).iter().map(|place| place.node().clone()).find(|node| *node != self.me)
    }

    /// Opens a stream to a tunnel at another node; how long its origin took there. A
    /// node that denies it is not asked again before it tells of it anew.
    ///
    /// # Errors
    /// `NoTunnel`: it is not there; what the node says of the tunnel; `TunnelLost`: the
    /// node cannot be reached.
    ///
    /// # Cancel safety
    /// Cancel safe: what opens after the caller has left is closed.
    pub async fn open(&self, place: &Place, errand: Errand<'_>) -> Result<(Stream, Duration), Error> {
        let Some(peer) = place.peer() else { return Err(Error::NoTunnel) };
        let open = Open {
            tunnel: place.tunnel.clone(),
            login: place.order,
            socket: errand.socket.clone(),
            visitor: *errand.visitor,
            id: errand.id.to_owned(),
        };
        let mut opened = peer.open(open.clone()).await;
        if let Err(Refused::NotHere(hint)) = &opened {
            tracing::debug!(tunnel = %place.tunnel, node = %place.node(), ?hint, "the tunnel is not there");
            place.deny();
            // Its table is newer than ours: what it names is asked at once, and no other.
            let named = hint.as_ref().filter(|node| *node != place.node()).and_then(|node| self.peer(node));
            if let Some(named) = named.filter(|peer| peer.is_up()) {
                opened = named.open(open).await;
            }
        }
        match opened {
            Ok((stream, took)) => match place.visit() {
                Some(visitor) => Ok((stream.holding(visitor), took)),
                None => Ok((stream, took)),
            },
            Err(Refused::NotHere(_)) => Err(Error::NoTunnel),
            Err(Refused::Failed(error)) => Err(error),
            Err(Refused::Unreachable) => Err(Error::TunnelLost),
        }
    }

    /// What a way to a node costs before it is measured: 3 ms and what light in glass
    /// takes for half as far again as over the ground; 150 ms where that is not known.
    fn guess(&self, node: &NodeId) -> Duration {
        const UNKNOWN: Duration = Duration::from_millis(150);
        let there = self.table.read().node(node).and_then(NodeRecord::place);
        let Some((here, there)) = self.means.settings.place.zip(there) else { return UNKNOWN };
        Duration::from_secs_f64(0.003 + here.kilometres(there) * 1.5 * 2.0 / 200_000.0)
    }

    /// The round trip to a place's node, measured or guessed; none for this one.
    pub fn round_trip(&self, place: &Place) -> Duration {
        match place.peer() {
            None => Duration::ZERO,
            Some(peer) => peer.round_trip().unwrap_or_else(|| self.guess(place.node())),
        }
    }

    /// How far other nodes are, as measured.
    fn trips(&self) -> Vec<(NodeId, Duration)> {
        let up = self.peers.iter().filter(|peer| peer.is_up());
        up.filter_map(|peer| Some((peer.id.clone(), peer.round_trip()?))).collect()
    }

    /// The nodes whose APIs write records.
    pub fn writers(&self) -> Vec<NodeId> {
        self.table.read().nodes().filter(|(_, node, _)| node.control).map(|(id, ..)| id.clone()).collect()
    }

    /// Tells the others that this node is about to leave.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
        self.lost.notify_one();
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// Reads certificates again.
    ///
    /// # Errors
    /// Which file, and why; the former ones stay.
    pub fn reload(&self) -> Result<(), String> {
        self.means.identity.reload(&self.means.settings)
    }

    /// The node of this name, as it is reached; none for this one.
    fn peer(&self, id: &NodeId) -> Option<Arc<Peer>> {
        if *id == self.me {
            return None;
        }
        let peer = self.peers.entry(id.clone()).or_insert_with(|| Peer::new(id.clone(), Arc::clone(&self.means)));
        Some(Arc::clone(&peer))
    }

    /// Holds links to the nodes that live and take others' visitors, and no others.
    fn link(&self, stop: &CancellationToken) {
        let mut linked = self.linked.lock();
        let table = self.table.read();
        linked.retain(|id, held| {
            let lives = table.node(id).is_some_and(|node| !node.addresses.is_empty());
            if !lives {
                held.cancel();
            }
            lives
        });
        for (id, node, _) in table.nodes().filter(|(_, node, _)| !node.addresses.is_empty()) {
            let Some(peer) = self.peer(id) else { continue };
            peer.told(&node.addresses, node.draining);
            if !linked.contains_key(id) {
                let held = stop.child_token();
                tokio::spawn(peer.run(held.clone()));
                linked.insert(id.clone(), held);
            }
        }
    }

    /// Tells what is here, and follows what others tell, until `stop`; then says
    /// goodbye.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let events = self.feed.subscribe(&[NODES, LOCATIONS], None);
        tokio::join!(self.follow(events, stop.clone()), self.load.watch(&stop), presence::run(&self, stop.clone()));
    }

    async fn follow(&self, mut events: Subscription, stop: CancellationToken) {
        let mut guard = Guard::default();
        loop {
            let due = guard.next();
            let event = tokio::select! {
                () = stop.cancelled() => return,
                event = events.next() => event,
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    for id in guard.due(Instant::now()) {
                        self.table.write().remove_node(id.as_str());
                    }
                    self.link(&stop);
                    continue;
                }
            };
            match event {
                None => return,
                Some(Event::Reset { at, state }) => {
                    let mut table = Table::default();
                    table.begin(at.epoch);
                    for (i, entry) in state.into_iter().enumerate() {
                        if let Some(told) = Told::read(&entry) {
                            self.put(&mut table, told, entry.rev);
                        }
                        if i % BREATH == BREATH - 1 {
                            tokio::task::yield_now().await;
                        }
                    }
                    table.take_over(&self.table.read());
                    self.keep_vanished(&mut table, &mut guard);
                    // The former one is large: it ends where nobody waits for that.
                    let former = std::mem::replace(&mut *self.table.write(), table);
                    tokio::task::spawn_blocking(move || drop(former));
                    self.link(&stop);
                    self.check_own();
                }
                Some(Event::Batch { changes, .. }) => {
                    let now = SystemTime::now();
                    let mut nodes = false;
                    for change in changes {
                        nodes |= change.key().starts_with(NODES);
                        self.apply(&change, now, &mut guard);
                    }
                    if nodes {
                        self.link(&stop);
                        self.check_own();
                    }
                }
                Some(Event::Live { .. }) => self.check_own(),
                // What was told still holds: routes are served stale.
                Some(Event::Stale { .. }) => {}
            }
            let (nodes, locations) = self.table.read().size();
            metrics::gauge!("adit_fleet_nodes_suspect").set(guard.len() as f64);
            metrics::gauge!("adit_fleet_nodes").set(nodes as f64);
            metrics::gauge!("adit_fleet_locations").set(locations as f64);
        }
    }

    /// A whole state that lacks many nodes is as doubtful as their deletes.
    fn keep_vanished(&self, table: &mut Table, guard: &mut Guard) {
        let former = self.table.read();
        let mut there = former.size().0;
        for (id, node, _) in former.nodes() {
            if table.node(id).is_some() {
                guard.came(id);
            } else if *id != self.me && !node.draining && guard.keeps(id, there, Instant::now()) {
                table.put_node(id.clone(), node.clone());
            } else {
                there -= 1;
            }
        }
    }

    /// Whether a node whose key was deleted is kept for now.
    fn keeps(&self, key: &str, guard: &mut Guard) -> bool {
        let Some(id) = key.strip_prefix(NODES).and_then(|id| id.parse::<NodeId>().ok()) else { return false };
        let table = self.table.read();
        // Ours is told anew, and who said goodbye is gone.
        let vanished = id != self.me && table.node(&id).is_some_and(|node| !node.draining);
        let kept = vanished && guard.keeps(&id, table.size().0, Instant::now());
        if kept {
            tracing::error!(node = %id, "many nodes vanished from the feed at once: this one is kept for a minute");
        }
        kept
    }

    fn apply(&self, change: &Change, now: SystemTime, guard: &mut Guard) {
        match change {
            Change::Put(entry) => {
                let Some(told) = Told::read(entry) else { return };
                if let Some(age) = told.age(&self.me, now) {
                    metrics::histogram!("adit_fleet_location_seconds").record(age.as_secs_f64());
                }
                if let Some(id) = entry.key.strip_prefix(NODES).and_then(|id| id.parse().ok()) {
                    guard.came(&id);
                }
                self.put(&mut self.table.write(), told, entry.rev);
            }
            Change::Delete { key, .. } if self.keeps(key, guard) => {}
            Change::Delete { key, .. } => remove(&mut self.table.write(), key),
        }
    }

    fn put(&self, table: &mut Table, told: Told, rev: u64) {
        let next_id = || self.next_place.fetch_add(1, Ordering::Relaxed);
        told.put_into(table, rev, |id| self.peer(id), next_id);
    }

    /// Whether the fleet still knows us as what we are.
    fn check_own(&self) {
        match self.table.read().boot(&self.me) {
            Some(boot) if *boot == self.boot => {}
            _ => self.lost.notify_one(),
        }
    }

    /// For `/v1/status`.
    pub fn status(&self) -> Value {
        let table = self.table.read();
        let node = |(id, node, tunnels): (&NodeId, &NodeRecord, usize)| {
            let peer = self.peers.get(id).map(|peer| Arc::clone(&peer));
            let trip = peer.as_ref().and_then(|peer| peer.round_trip());
            let ms = |trip: Duration| (trip.as_secs_f64() * 1e6).round() / 1e3;
            let trips = peer.as_ref().map_or_else(|| self.trips(), |peer| peer.trips());
            let trips: serde_json::Map<_, _> =
                trips.into_iter().map(|(to, trip)| (to.to_string(), json!(ms(trip)))).collect();
            json!({
                "node": id.as_str(),
                "version": node.version,
                "draining": node.draining,
                "spared": peer.as_ref().map_or_else(|| self.load.spare(), |peer| peer.spare()),
                "tunnels": tunnels,
                "addresses": node.addresses,
                "place": node.place().map(|place| place.to_string()),
                "control": node.control,
                "ready": peer.as_ref().map(|peer| peer.ready()),
                "linked": peer.as_ref().map(|peer| peer.is_up()),
                "round_trip_ms": trip.map(ms),
                "round_trips_ms": trips,
            })
        };
        json!({ "nodes": table.nodes().map(node).collect::<Vec<_>>(), "locations": table.size().1 })
    }
}

/// What a node tells of itself.
enum Told {
    Node(NodeId, NodeRecord),
    Location(NodeId, TunnelId, Location),
}

impl Told {
    /// Reads a record; of one that cannot be read the last good one stays.
    fn read(entry: &Entry) -> Option<Self> {
        let Entry { key, value, .. } = entry;
        let told = if let Some(node) = key.strip_prefix(NODES) {
            node.parse().ok().zip(NodeRecord::read(value)).map(|(node, record)| Self::Node(node, record))
        } else {
            let ids = location_key(key).and_then(|(node, tunnel)| node.parse().ok().zip(tunnel.parse().ok()));
            ids.zip(Location::read(value)).map(|((node, tunnel), location)| Self::Location(node, tunnel, location))
        };
        if told.is_none() {
            metrics::counter!("adit_feed_records_refused_total", "kind" => "live").increment(1);
            tracing::error!(key, "what a node tells of itself cannot be read; the last good one stays");
        }
        told
    }

    /// How long ago a login was that another node tells of first.
    fn age(&self, me: &NodeId, now: SystemTime) -> Option<Duration> {
        let Self::Location(node, _, Location { login: 0, since, .. }) = self else { return None };
        now.duration_since(*since).ok().filter(|_| node != me)
    }

    fn put_into(
        self,
        table: &mut Table,
        rev: u64,
        peer: impl FnOnce(&NodeId) -> Option<Arc<Peer>>,
        next_id: impl FnOnce() -> u64,
    ) {
        match self {
            Self::Node(node, record) => table.put_node(node, record),
            Self::Location(node, tunnel, location) => table.put_location((node, peer), tunnel, location, rev, next_id),
        }
    }
}

fn remove(table: &mut Table, key: &str) {
    if let Some(node) = key.strip_prefix(NODES) {
        table.remove_node(node);
    } else if let Some((node, tunnel)) = location_key(key) {
        table.remove_location(node, tunnel);
    }
}

/// A table by itself, fed with records: for its bench.
#[doc(hidden)]
#[derive(Default)]
pub struct Known {
    table: Table,
    rev: u64,
}

impl Known {
    /// Takes a record in; whether it could be read.
    pub fn put(&mut self, key: String, value: &str) -> bool {
        self.rev += 1;
        let told = Told::read(&Entry { key, value: value.into(), rev: self.rev });
        told.map(|told| told.put_into(&mut self.table, self.rev, |_| None, || self.rev)).is_some()
    }

    /// Takes a record out.
    pub fn remove(&mut self, key: &str) {
        remove(&mut self.table, key);
    }

    /// At how many nodes a tunnel is.
    pub fn places(&self, tunnel: &TunnelId) -> usize {
        self.table.places(tunnel).len()
    }

    /// How many tunnels are at nodes that live.
    pub fn tunnels(&self) -> usize {
        self.table.nodes().map(|(_, _, tunnels)| tunnels).sum()
    }
}

/// Node and tunnel of a location's key; ids have no slash.
fn location_key(key: &str) -> Option<(&str, &str)> {
    key.strip_prefix(LOCATIONS)?.split_once('/')
}

/// The lease of a node: it is dead so long after it was heard last.
const LEASE: Duration = Duration::from_secs(6);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nodes_tell_of_themselves_is_not_sent_to_who_follows_records() {
        let records = crate::feed::follower::prefixes();
        for own in [NODES, LOCATIONS] {
            assert!(records.iter().all(|prefix| *prefix < own), "{own} among {records:?}");
        }
    }
}
