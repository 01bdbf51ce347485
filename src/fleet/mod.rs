//! What the nodes of a fleet tell each other through the feed: that they live, and
//! which tunnels are logged in where. One leased key says that a node lives; its
//! locations are plain keys that count only beside it, so that a node's death is one
//! event, however many tunnels it had. `table` decides where a tunnel is, `presence`
//! tells what is here, this file follows what others tell.

mod presence;
mod record;
mod table;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::RwLock;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use self::record::{Location, NodeRecord};
use self::table::Table;
use crate::feed::{Change, Entry, Event, Feed, Subscription};
use crate::model::{NodeId, TunnelId};
use crate::tunnel::Tunnels;

/// Who lives: under a lease.
const NODES: &str = "live/node/";
/// Where tunnels are: `live/loc/<node>/<tunnel>`, without one.
const LOCATIONS: &str = "live/loc/";

/// What this node knows of the fleet, and tells it.
pub struct Fleet {
    me: NodeId,
    /// This run of the node: what was told by another one counts no more.
    boot: String,
    feed: Arc<dyn Feed>,
    tunnels: Arc<Tunnels>,
    table: RwLock<Table>,
    /// Our own key is gone from the feed.
    lost: Notify,
}

/// Where a tunnel is logged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The node.
    pub node: NodeId,
    /// The order of its login: the highest serves, the others stand by.
    pub order: u64,
}

impl Fleet {
    /// The fleet as node `me` sees it.
    ///
    /// # Errors
    /// The system has no random bytes.
    pub fn new(me: NodeId, feed: Arc<dyn Feed>, tunnels: Arc<Tunnels>) -> Result<Arc<Self>, String> {
        let mut boot = [0; 8];
        aws_lc_rs::rand::fill(&mut boot).map_err(|_| "the system has no random bytes".to_owned())?;
        let boot = data_encoding::HEXLOWER.encode(&boot);
        let (table, lost) = (RwLock::default(), Notify::new());
        Ok(Arc::new(Self { me, boot, feed, tunnels, table, lost }))
    }

    /// Where a tunnel is, the latest login first.
    pub fn places(&self, tunnel: &TunnelId) -> Vec<Place> {
        self.table.read().places(tunnel)
    }

    /// Tells what is here, and follows what others tell, until `stop`; then says
    /// goodbye.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let events = self.feed.subscribe(&[NODES, LOCATIONS], None);
        tokio::join!(self.follow(events, stop.clone()), presence::run(&self, stop));
    }

    async fn follow(&self, mut events: Subscription, stop: CancellationToken) {
        loop {
            let event = tokio::select! {
                () = stop.cancelled() => return,
                event = events.next() => event,
            };
            match event {
                None => return,
                Some(Event::Reset { at, state }) => {
                    let mut table = Table::default();
                    table.begin(at.epoch);
                    state.iter().for_each(|entry| Self::put(&mut table, entry));
                    *self.table.write() = table;
                    self.check_own();
                }
                Some(Event::Batch { changes, .. }) => {
                    let now = SystemTime::now();
                    for change in changes {
                        self.apply(&change, now);
                    }
                    self.check_own();
                }
                Some(Event::Live { .. }) => self.check_own(),
                // What was told still holds: routes are served stale.
                Some(Event::Stale { .. }) => {}
            }
            let (nodes, locations) = self.table.read().size();
            metrics::gauge!("adit_fleet_nodes").set(nodes as f64);
            metrics::gauge!("adit_fleet_locations").set(locations as f64);
        }
    }

    fn apply(&self, change: &Change, now: SystemTime) {
        match change {
            Change::Put(entry) => {
                Self::put(&mut self.table.write(), entry);
                if let Some((node, _)) = location_key(&entry.key)
                    && node != self.me.as_str()
                    && let Some(told) = Location::read(&entry.value)
                    && told.login == 0
                    && let Ok(age) = now.duration_since(told.since)
                {
                    metrics::histogram!("adit_fleet_location_seconds").record(age.as_secs_f64());
                }
            }
            Change::Delete { key, .. } => {
                let mut table = self.table.write();
                if let Some(node) = key.strip_prefix(NODES) {
                    table.remove_node(node);
                } else if let Some((node, tunnel)) = location_key(key) {
                    table.remove_location(node, tunnel);
                }
            }
        }
    }

    /// Takes a record in; one that cannot be read leaves the last good one.
    fn put(table: &mut Table, entry: &Entry) {
        let known = if let Some(node) = entry.key.strip_prefix(NODES) {
            node.parse().ok().zip(NodeRecord::read(&entry.value)).map(|(id, node)| table.put_node(id, node))
        } else {
            let ids = location_key(&entry.key).and_then(|(node, tunnel)| node.parse().ok().zip(tunnel.parse().ok()));
            ids.zip(Location::read(&entry.value))
                .map(|((node, tunnel), location)| table.put_location(node, tunnel, location, entry.rev))
        };
        if known.is_none() {
            metrics::counter!("adit_feed_records_refused_total", "kind" => "live").increment(1);
            tracing::error!(key = entry.key, "what a node tells of itself cannot be read; the last good one stays");
        }
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
            json!({
                "node": id.as_str(),
                "version": node.version,
                "draining": node.draining,
                "tunnels": tunnels,
            })
        };
        json!({ "nodes": table.nodes().map(node).collect::<Vec<_>>(), "locations": table.size().1 })
    }
}

/// Node and tunnel of a location's key; ids have no slash.
fn location_key(key: &str) -> Option<(&str, &str)> {
    key.strip_prefix(LOCATIONS)?.split_once('/')
}

/// The lease of a node: it is dead so long after it was heard last.
const LEASE: Duration = Duration::from_secs(6);
