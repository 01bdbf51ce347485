//! Where tunnels are, as all nodes tell it. Pure: the same records give the same
//! answer on every node, in whatever order they came.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use super::peer::Peer;
use super::record::{Location, NodeRecord};
use crate::feed::Epoch;
use crate::model::{NodeId, TunnelId};

#[derive(Debug, Default)]
pub(super) struct Table {
    epoch: Option<Epoch>,
    nodes: BTreeMap<NodeId, NodeRecord>,
    locations: HashMap<TunnelId, Vec<Told>>,
    told: usize,
}

/// A location, whether its node lives or not.
#[derive(Debug)]
struct Told {
    boot: String,
    place: Arc<Place>,
}

/// Where a tunnel is logged in.
#[derive(Debug)]
pub struct Place {
    /// Its number as a way to an origin: another login there has another one.
    pub id: u64,
    /// The tunnel.
    pub tunnel: TunnelId,
    /// The node.
    pub node: NodeId,
    /// The order of its login: the highest serves, the others stand by.
    pub order: u64,
    /// The round trip from the node to the owner's client, once measured.
    pub round_trip: Option<Duration>,
    /// How the node is reached; none: it is this one.
    pub peer: Option<Arc<Peer>>,
    /// Visitors of this node that are there.
    pub(super) streams: Arc<AtomicUsize>,
    /// The node itself said that it is not there.
    denied: AtomicBool,
}

impl Place {
    /// Visitors of this node that are there.
    pub fn streams(&self) -> usize {
        self.streams.load(Ordering::Relaxed)
    }

    /// The node itself says that the tunnel is not there: of no use until it tells of
    /// it again.
    pub(super) fn deny(&self) {
        self.denied.store(true, Ordering::Relaxed);
    }
}

impl Table {
    /// A life of the data begins.
    pub(super) fn begin(&mut self, epoch: Epoch) {
        self.epoch = Some(epoch);
    }

    pub(super) fn put_node(&mut self, id: NodeId, node: NodeRecord) {
        self.nodes.insert(id, node);
    }

    pub(super) fn remove_node(&mut self, id: &str) {
        self.nodes.remove(id);
    }

    /// Takes in what revision `rev` says of a tunnel at a node, which `peer` reaches.
    pub(super) fn put_location(
        &mut self,
        (node, peer): (NodeId, Option<Arc<Peer>>),
        tunnel: TunnelId,
        location: Location,
        rev: u64,
        next_id: impl FnOnce() -> u64,
    ) {
        // Of a login that is told again the first revision counts, and nobody is from
        // the future.
        let again = location.login > 0 && self.epoch.as_ref().is_some_and(|epoch| *epoch.0 == *location.epoch);
        let order = if again { location.login.min(rev) } else { rev };
        let all = self.locations.entry(tunnel.clone()).or_default();
        let before = all.len();
        let former = all.iter().position(|told| told.place.node == node).map(|at| all.swap_remove(at));
        // The same login, told again: what is kept open to it stays.
        let same = former.filter(|told| told.place.order == order && told.boot == location.boot);
        let kept = |told: Told| (told.place.id, Arc::clone(&told.place.streams));
        let (id, streams) = same.map_or_else(|| (next_id(), Arc::default()), kept);
        let (round_trip, denied) = (location.round_trip, AtomicBool::new(false));
        let place = Arc::new(Place { id, tunnel, node, order, round_trip, peer, streams, denied });
        all.push(Told { boot: location.boot, place });
        self.told = self.told + all.len() - before;
    }

    pub(super) fn remove_location(&mut self, node: &str, tunnel: &str) {
        let Some(all) = self.locations.get_mut(tunnel) else { return };
        let before = all.len();
        all.retain(|told| told.place.node.as_str() != node);
        self.told -= before - all.len();
        if all.is_empty() {
            self.locations.remove(tunnel);
        }
    }

    /// Where a tunnel is, the latest login first: what living nodes told in this run
    /// of theirs.
    pub(super) fn places(&self, tunnel: &TunnelId) -> Vec<Arc<Place>> {
        let all = self.locations.get(tunnel).map(Vec::as_slice).unwrap_or_default();
        let mut places: Vec<Arc<Place>> = all
            .iter()
            .filter(|told| self.lives(told) && !told.place.denied.load(Ordering::Relaxed))
            .map(|told| Arc::clone(&told.place))
            .collect();
        // Two of one revision: logins that one transaction told of.
        places.sort_by(|a, b| b.order.cmp(&a.order).then_with(|| a.node.cmp(&b.node)));
        places
    }

    fn lives(&self, told: &Told) -> bool {
        self.nodes.get(&told.place.node).is_some_and(|node| node.boot == told.boot)
    }

    /// A node that lives.
    pub(super) fn node(&self, id: &NodeId) -> Option<&NodeRecord> {
        self.nodes.get(id)
    }

    /// The run of a node that lives.
    pub(super) fn boot(&self, id: &NodeId) -> Option<&String> {
        self.nodes.get(id).map(|node| &node.boot)
    }

    /// The nodes that live, each with how many tunnels are logged in there.
    pub(super) fn nodes(&self) -> impl Iterator<Item = (&NodeId, &NodeRecord, usize)> {
        let mut counts: HashMap<&NodeId, usize> = HashMap::new();
        for told in self.locations.values().flatten() {
            if self.lives(told) {
                *counts.entry(&told.place.node).or_default() += 1;
            }
        }
        self.nodes.iter().map(move |(id, node)| (id, node, counts.get(id).copied().unwrap_or(0)))
    }

    /// The life of the data; "" before the first record.
    pub(super) fn epoch(&self) -> String {
        self.epoch.as_ref().map(|epoch| epoch.0.to_string()).unwrap_or_default()
    }

    /// How many nodes live, and locations were told.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.nodes.len(), self.told)
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use proptest::prelude::*;

    use super::*;

    fn id<T: std::str::FromStr<Err = &'static str>>(text: &str) -> T {
        text.parse().unwrap()
    }

    fn location(boot: &str, login: u64, epoch: &str) -> Location {
        Location { boot: boot.into(), login, epoch: epoch.into(), since: UNIX_EPOCH, round_trip: None }
    }

    fn table(nodes: &[(&str, &str)]) -> Table {
        let mut table = Table::default();
        table.begin(Epoch("now".into()));
        for (node, boot) in nodes {
            table.put_node(id(node), NodeRecord::new(boot));
        }
        table
    }

    fn put(table: &mut Table, node: &str, tunnel: &str, location: Location, rev: u64) {
        table.put_location((id(node), None), id(tunnel), location, rev, || rev);
    }

    fn places(table: &Table) -> Vec<(String, u64)> {
        table.places(&id("t")).into_iter().map(|place| (place.node.to_string(), place.order)).collect()
    }

    #[test]
    fn the_latest_login_serves_and_older_ones_stand_by() {
        let mut table = table(&[("a", "1"), ("b", "1")]);
        put(&mut table, "a", "t", location("1", 0, ""), 10);
        put(&mut table, "b", "t", location("1", 0, ""), 12);
        assert_eq!(places(&table), [("b".into(), 12), ("a".into(), 10)]);
        // A healed node tells its login again, and does not become newer by that.
        put(&mut table, "a", "t", location("1", 10, "now"), 20);
        assert_eq!(places(&table), [("b".into(), 12), ("a".into(), 10)]);
        // Nobody is from the future, and another life of the data counts anew.
        put(&mut table, "a", "t", location("1", 9_999, "now"), 21);
        assert_eq!(places(&table)[0], ("a".into(), 21));
        put(&mut table, "a", "t", location("1", 5, "before"), 22);
        assert_eq!(places(&table)[0], ("a".into(), 22));
        table.remove_location("a", "t");
        assert_eq!(places(&table), [("b".into(), 12)]);
    }

    #[test]
    fn a_login_told_again_is_the_same_way_and_one_denied_is_none() {
        let mut table = table(&[("a", "1")]);
        let first = |table: &Table| table.places(&id("t")).first().map(|place| (place.id, place.order));
        put(&mut table, "a", "t", location("1", 0, ""), 10);
        assert_eq!(first(&table), Some((10, 10)));
        put(&mut table, "a", "t", location("1", 10, "now"), 20);
        assert_eq!(first(&table), Some((10, 10)));
        put(&mut table, "a", "t", location("1", 0, ""), 30);
        assert_eq!(first(&table), Some((30, 30)));
        table.places(&id("t"))[0].deny();
        assert_eq!(first(&table), None);
        put(&mut table, "a", "t", location("1", 0, ""), 40);
        assert_eq!(first(&table), Some((40, 40)));
    }

    #[test]
    fn a_node_that_died_or_began_anew_takes_all_that_it_told_along() {
        let mut table = table(&[("a", "1"), ("b", "1")]);
        for tunnel in ["t", "u", "v"] {
            put(&mut table, "a", tunnel, location("1", 0, ""), 10);
        }
        put(&mut table, "b", "t", location("1", 0, ""), 9);
        table.put_node(id("a"), NodeRecord::new("2"));
        assert_eq!(places(&table), [("b".into(), 9)]);
        assert!(table.places(&id("u")).is_empty());
        put(&mut table, "a", "u", location("2", 0, ""), 15);
        assert_eq!(table.places(&id("u")).len(), 1);
        table.remove_node("a");
        assert!(table.places(&id("u")).is_empty());
        assert_eq!(places(&table), [("b".into(), 9)]);
    }

    proptest! {
        /// Two keys' changes come in any order between two prefixes, each key's own in
        /// order: every node ends with the same answer.
        #[test]
        fn the_answer_is_of_what_is_told_and_not_of_how_it_came(
            locations in proptest::collection::vec((0..3u8, 0..2u8, 1..50u64, 0..60u64), 1..30),
            boots in proptest::collection::vec(0..2u8, 3),
            nodes_first: bool,
        ) {
            let mut last: BTreeMap<(u8, u8), (u64, Location)> = BTreeMap::new();
            for (rev, (node, boot, login, _)) in (1..).zip(&locations) {
                last.insert((*node, 0), (rev, location(&boot.to_string(), login % 7, "now")));
            }
            let fill = |table: &mut Table, reverse: bool| {
                let mut all: Vec<_> = last.iter().collect();
                if reverse {
                    all.reverse();
                }
                for ((node, _), (rev, location)) in all {
                    put(table, &format!("n{node}"), "t", location.clone(), *rev);
                }
            };
            let live = |table: &mut Table| {
                for (node, boot) in boots.iter().enumerate() {
                    table.put_node(id(&format!("n{node}")), NodeRecord::new(&boot.to_string()));
                }
            };
            let (mut one, mut other) = (table(&[]), table(&[]));
            live(&mut one);
            fill(&mut one, false);
            if nodes_first { live(&mut other); }
            fill(&mut other, true);
            live(&mut other);
            prop_assert_eq!(places(&one), places(&other));
            let orders: Vec<u64> = places(&one).into_iter().map(|(_, order)| order).collect();
            prop_assert!(orders.is_sorted_by(|a, b| a >= b));
        }
    }
}
