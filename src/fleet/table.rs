//! Where tunnels are, as all nodes tell it. Pure: the same records give the same
//! answer on every node, in whatever order they came.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::peer::Peer;
use super::record::{Location, NodeRecord};
use crate::feed::Epoch;
use crate::limits::Permit;
use crate::model::{NodeId, TunnelId};

#[derive(Debug, Default)]
pub(super) struct Table {
    epoch: Option<Epoch>,
    nodes: BTreeMap<NodeId, NodeRecord>,
    /// The runs that locations are of: one node has one, seldom more.
    runs: HashMap<NodeId, Vec<Arc<Run>>>,
    locations: HashMap<TunnelId, Vec<Arc<Place>>>,
    told: usize,
}

/// A run of a node that told of locations, whether it lives or not.
#[derive(Debug)]
struct Run {
    node: NodeId,
    boot: Box<str>,
    /// How the node is reached; none: it is this one.
    peer: Option<Arc<Peer>>,
    /// Locations that are of it.
    told: AtomicUsize,
}

/// Where a tunnel is logged in. There are as many as the fleet has logins: what many
/// share is in their run.
#[derive(Debug)]
pub struct Place {
    /// Its number as a way to an origin: another login there has another one.
    pub id: u64,
    /// The tunnel.
    pub tunnel: TunnelId,
    run: Arc<Run>,
    /// The order of its login: the highest serves, the others stand by.
    pub order: u64,
    /// In microseconds.
    round_trip: Option<NonZeroU32>,
    fails: bool,
    /// The node itself said that it is not there.
    denied: AtomicBool,
    /// Visitors of this node that are there; none before the first.
    streams: OnceLock<Arc<AtomicUsize>>,
}

impl Place {
    /// The node.
    pub fn node(&self) -> &NodeId {
        &self.run.node
    }

    /// How the node is reached; none: it is this one.
    pub fn peer(&self) -> Option<&Arc<Peer>> {
        self.run.peer.as_ref()
    }

    /// The round trip from the node to the owner's client, once measured.
    pub fn round_trip(&self) -> Option<Duration> {
        self.round_trip.map(|micros| Duration::from_micros(micros.get().into()))
    }

    /// Whether checks of its origin fail there.
    pub fn fails(&self) -> bool {
        self.fails
    }

    /// Visitors of this node that are there.
    pub fn streams(&self) -> usize {
        self.streams.get().map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// One more of them, while the permit lives.
    pub(super) fn visit(&self) -> Option<Permit> {
        Permit::take(self.streams.get_or_init(Arc::default), usize::MAX)
    }

    /// The node itself says that the tunnel is not there: of no use until it tells of
    /// it again.
    pub(super) fn deny(&self) {
        self.denied.store(true, Ordering::Relaxed);
    }

    /// Whether it is of the same login as a former one.
    fn is_again(&self, former: &Self) -> bool {
        let (ours, theirs) = (&self.run, &former.run);
        self.order == former.order && ours.node == theirs.node && ours.boot == theirs.boot
    }

    /// The same login, told again: what is kept open to it stays.
    fn keep(&mut self, former: &Self) {
        self.id = former.id;
        self.streams.clone_from(&former.streams);
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
        (node, peer): (NodeId, impl FnOnce(&NodeId) -> Option<Arc<Peer>>),
        tunnel: TunnelId,
        location: Location,
        rev: u64,
        next_id: impl FnOnce() -> u64,
    ) {
        // Of a login that is told again the first revision counts, and nobody is from
        // the future.
        let again = location.login > 0 && self.epoch.as_ref().is_some_and(|epoch| *epoch.0 == *location.epoch);
        let order = if again { location.login.min(rev) } else { rev };
        let run = run(&mut self.runs, node, location.boot, peer);
        let entry = self.locations.entry(tunnel);
        let tunnel = entry.key().clone();
        // Most tunnels are logged in once.
        let all = entry.or_insert_with(|| Vec::with_capacity(1));
        let former = all.iter().position(|place| place.run.node == run.node).map(|at| all.swap_remove(at));
        let round_trip = location.round_trip.and_then(|trip| NonZeroU32::new(u32::try_from(trip.as_micros()).ok()?));
        run.told.fetch_add(1, Ordering::Relaxed);
        let (denied, streams) = (AtomicBool::new(false), OnceLock::new());
        let fails = location.fails;
        let mut place = Place { id: 0, tunnel, run, order, round_trip, fails, denied, streams };
        match former.as_ref().filter(|former| place.is_again(former)) {
            Some(former) => place.keep(former),
            None => place.id = next_id(),
        }
        all.push(Arc::new(place));
        match former {
            Some(former) => _ = former.run.told.fetch_sub(1, Ordering::Relaxed),
            None => self.told += 1,
        }
    }

    pub(super) fn remove_location(&mut self, node: &str, tunnel: &str) {
        let Some(all) = self.locations.get_mut(tunnel) else { return };
        if let Some(at) = all.iter().position(|place| place.run.node.as_str() == node) {
            all.swap_remove(at).run.told.fetch_sub(1, Ordering::Relaxed);
            self.told -= 1;
        }
        if all.is_empty() {
            self.locations.remove(tunnel);
        }
    }

    /// Keeps what is open to logins that a former table has too.
    pub(super) fn take_over(&mut self, former: &Self) {
        for place in self.locations.values_mut().flatten().filter_map(Arc::get_mut) {
            let all = former.locations.get(&place.tunnel).map(Vec::as_slice).unwrap_or_default();
            if let Some(former) = all.iter().find(|former| place.is_again(former)) {
                place.keep(former);
            }
        }
    }

    /// Where a tunnel is, the latest login first: what living nodes told in this run
    /// of theirs.
    pub(super) fn places(&self, tunnel: &TunnelId) -> Vec<Arc<Place>> {
        let all = self.locations.get(tunnel).map(Vec::as_slice).unwrap_or_default();
        let mut places: Vec<Arc<Place>> = all
            .iter()
            .filter(|place| self.lives(&place.run) && !place.denied.load(Ordering::Relaxed))
            .map(Arc::clone)
            .collect();
        // Two of one revision: logins that one transaction told of.
        places.sort_by(|a, b| b.order.cmp(&a.order).then_with(|| a.node().cmp(b.node())));
        places
    }

    fn lives(&self, run: &Run) -> bool {
        self.nodes.get(&run.node).is_some_and(|node| *node.boot == *run.boot)
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
        self.nodes.iter().map(|(id, node)| {
            let run = self.runs.get(id).and_then(|runs| runs.iter().find(|run| *run.boot == *node.boot));
            (id, node, run.map_or(0, |run| run.told.load(Ordering::Relaxed)))
        })
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

/// The one value of a run, which its locations share.
fn run(
    runs: &mut HashMap<NodeId, Vec<Arc<Run>>>,
    node: NodeId,
    boot: String,
    peer: impl FnOnce(&NodeId) -> Option<Arc<Peer>>,
) -> Arc<Run> {
    if let Some(known) = runs.get(&node).and_then(|runs| runs.iter().find(|run| *run.boot == *boot)) {
        return Arc::clone(known);
    }
    let (peer, boot) = (peer(&node), boot.into());
    let runs = runs.entry(node.clone()).or_default();
    // Of a former run nothing may be left.
    runs.retain(|run| run.told.load(Ordering::Relaxed) > 0);
    let run = Arc::new(Run { node, boot, peer, told: AtomicUsize::new(0) });
    runs.push(Arc::clone(&run));
    run
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
        Location { boot: boot.into(), login, epoch: epoch.into(), since: UNIX_EPOCH, round_trip: None, fails: false }
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
        table.put_location((id(node), |_: &NodeId| None), id(tunnel), location, rev, || rev);
    }

    fn places(table: &Table) -> Vec<(String, u64)> {
        table.places(&id("t")).into_iter().map(|place| (place.node().to_string(), place.order)).collect()
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
    fn a_whole_state_that_is_told_again_keeps_ways_and_counts() {
        let fill = |first_id: u64| {
            let mut table = table(&[("a", "2"), ("b", "1")]);
            for (n, (node, boot)) in (0..).zip([("a", "1"), ("a", "2"), ("b", "1")]) {
                let next_id = || first_id + n;
                let location = location(boot, 0, "");
                table.put_location((id(node), |_: &NodeId| None), id(&format!("t{n}")), location, 10 + n, next_id);
            }
            table
        };
        let first = fill(100);
        let counts = |table: &Table| table.nodes().map(|(_, _, tunnels)| tunnels).collect::<Vec<_>>();
        assert_eq!((counts(&first), first.size()), (vec![1, 1], (2, 3)));
        let visitor = first.places(&id("t2"))[0].visit();
        let mut second = fill(200);
        put(&mut second, "a", "t1", location("2", 0, ""), 20);
        second.take_over(&first);
        let way = |tunnel: &str| second.places(&id(tunnel)).first().map(|place| (place.id, place.streams()));
        assert_eq!((way("t0"), way("t1"), way("t2")), (None, Some((20, 0)), Some((102, 1))));
        drop(visitor);
        assert_eq!(way("t2"), Some((102, 0)));
        second.remove_location("a", "t1");
        second.remove_location("a", "t1");
        assert_eq!((counts(&second), second.size()), (vec![0, 1], (2, 2)));
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
