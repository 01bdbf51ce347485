//! In which order a visit tries a socket's tunnels: those that can be expected to
//! serve first, by their priority, in the order of the socket's policy.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::health::Health;
use super::{Candidate, Way};
use crate::fleet::Fleet;
use crate::model::{Balance, Tunnel};
use crate::routes::Route;

/// Nodes whose distances differ by less share the visitors: below it what pings measure
/// is noise.
const TIE: (f64, Duration) = (0.05, Duration::from_millis(1));
/// The same for the whole way: owners' clients answer when they are scheduled to, and
/// of two on one machine one was measured at 0.7 ms and the other at 2.3.
const NOISE: (f64, Duration) = (0.05, Duration::from_millis(10));
/// The nearest one of before stays it until another is nearer by more than this.
const STAYS: (f64, Duration) = (0.15, Duration::from_millis(3));

/// A tunnel as it would serve now.
pub(super) struct Head<W = Candidate> {
    way: W,
    /// Those of a lower class come first: how surely it serves, then its priority.
    class: (u8, u32),
    weight: u32,
    /// The round trip to its node.
    distance: Duration,
    /// The round trip to the owner's client.
    cost: Duration,
    /// Visitors that go there from here.
    load: usize,
}

impl Head {
    pub(super) fn new(way: Candidate, record: Option<&Tunnel>, fleet: Option<&Fleet>, health: &Health) -> Self {
        let (up, fails, spared, distance, own, load) = match &way {
            Candidate::Here(attachment) => {
                let session = &attachment.session;
                (true, attachment.fails(), false, Duration::ZERO, session.rtt(), session.channels())
            }
            Candidate::There { place, peer, .. } => {
                let trip = fleet.map_or(Duration::ZERO, |fleet| fleet.round_trip(place));
                let spared = peer.is_draining() || peer.is_spared(dice);
                (peer.is_up(), place.fails(), spared, trip, place.round_trip(), place.streams())
            }
        };
        let surely = match () {
            () if !up => 3,
            () if fails || !health.is_good(way.tunnel(), dice) => 2,
            () if spared => 1,
            () => 0,
        };
        let (priority, weight) = record.map_or((0, 1), |tunnel| (tunnel.priority, tunnel.weight));
        Self {
            way,
            class: (surely, priority),
            weight: weight.max(1),
            distance,
            cost: distance + own.unwrap_or_default(),
            load,
        }
    }
}

/// All of them in the order in which this visit tries them.
pub(super) fn in_order<W: Way>(mut heads: Vec<Head<W>>, route: &Route, ip: IpAddr) -> Vec<W> {
    if heads.len() > 1 {
        heads.sort_by_key(|head| head.class);
        let best = heads.first().map(|head| head.class);
        let best = heads.iter().take_while(|head| Some(head.class) == best).count();
        let turn = route.state.turn();
        let (able, _) = heads.split_at_mut(best);
        let first = match route.socket.balance {
            Balance::Nearest => nearest(able, route, turn),
            Balance::RoundRobin => in_turn(able, turn),
            Balance::LeastConnections => least(able.iter().enumerate(), turn),
            Balance::Random => in_turn(able, (dice() * f64::from(u32::MAX)) as usize),
            Balance::IpHash => by_address(able, ip),
        };
        // Whom the first one fails goes on to the next in turn, or the next nearest.
        if matches!(route.socket.balance, Balance::Nearest) {
            let chosen = able.get(first).map(|head| head.way.id());
            able.sort_by_key(|head| (Some(head.way.id()) != chosen, head.cost));
        } else {
            able.rotate_left(first);
        }
    }
    heads.into_iter().map(|head| head.way).collect()
}

/// One after the other, each as often as its weight says.
fn in_turn<W>(able: &[Head<W>], turn: usize) -> usize {
    let total: usize = able.iter().map(|head| head.weight as usize).sum();
    let mut at = turn.checked_rem(total).unwrap_or(0);
    for (n, head) in able.iter().enumerate() {
        match at.checked_sub(head.weight as usize) {
            Some(rest) => at = rest,
            None => return n,
        }
    }
    0
}

/// The one with the least to do for its weight; of several the one whose turn it is.
fn least<'a, W: 'a>(able: impl Iterator<Item = (usize, &'a Head<W>)> + Clone, turn: usize) -> usize {
    let count = able.clone().count().max(1);
    let all = able.clone().skip(turn % count).chain(able.take(turn % count));
    let busy = |head: &Head<W>| head.load as f64 / f64::from(head.weight);
    all.min_by(|(_, a), (_, b)| busy(a).total_cmp(&busy(b))).map_or(0, |(n, _)| n)
}

/// The nearest one; of several that are as near, the less busy of two (in turn: with
/// nothing to do they share evenly).
fn nearest<W: Way>(able: &[Head<W>], route: &Route, turn: usize) -> usize {
    let within = |cost: Duration, of: Duration, (share, more): (f64, Duration)| cost <= of.mul_f64(1.0 + share) + more;
    let Some(least_cost) = able.iter().map(|head| head.cost).min() else { return 0 };
    let before = route.state.nearest.load(Ordering::Relaxed);
    let name = |head: &Head<W>| hash(head.way.tunnel());
    let stays = able.iter().find(|head| name(head) == before && within(head.cost, least_cost, STAYS));
    if stays.is_none()
        && let Some(new) = able.iter().find(|head| head.cost == least_cost)
    {
        route.state.nearest.store(name(new), Ordering::Relaxed);
    }
    let Some(best) = stays.or_else(|| able.iter().find(|head| head.cost == least_cost)) else { return 0 };
    let as_near = |head: &Head<W>| within(head.distance, best.distance, TIE) && within(head.cost, best.cost, NOISE);
    let near: Vec<(usize, &Head<W>)> = able.iter().enumerate().filter(|(_, head)| as_near(head)).collect();
    let two = near.iter().cycle().skip(turn % near.len().max(1)).take(2);
    least(two.copied(), 0)
}

/// Always the same one for an address, and the others stay where they are when one
/// comes or goes: the highest draw wins (rendezvous hashing), weighted by -w / ln(u).
fn by_address<W: Way>(able: &[Head<W>], ip: IpAddr) -> usize {
    let draw = |head: &Head<W>| {
        let drawn = hash(&(ip, head.way.tunnel()));
        let unit = (drawn >> 11) as f64 / (1u64 << 53) as f64;
        -f64::from(head.weight) / unit.max(f64::MIN_POSITIVE).ln()
    };
    let all = able.iter().enumerate();
    all.max_by(|(_, a), (_, b)| draw(a).total_cmp(&draw(b))).map_or(0, |(n, _)| n)
}

/// The same on every node, which all choose alike.
fn hash(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// 0 to 1.
fn dice() -> f64 {
    use std::cell::Cell;
    thread_local!(static STATE: Cell<u64> = Cell::new(hash(&std::time::SystemTime::now()) | 1));
    // Xorshift: nothing that must be secret hangs on it.
    STATE.with(|state| {
        let mut x = state.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        state.set(x);
        (x >> 11) as f64 / (1u64 << 53) as f64
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use super::*;
    use crate::model::{Socket, SocketType, TunnelId};
    use crate::routes::Routes;
    use crate::visit_log::Sink;

    #[derive(Clone, PartialEq, Debug)]
    struct Fake(TunnelId);

    impl Way for Fake {
        fn id(&self) -> u64 {
            hash(&self.0)
        }
        fn tunnel(&self) -> &TunnelId {
            &self.0
        }
        fn console(&self) -> Arc<dyn Sink> {
            unreachable!()
        }
    }

    fn route(balance: Balance) -> Arc<Route> {
        let routes = Routes::default();
        let mut socket = Socket::new("a".parse().unwrap(), SocketType::Tcp);
        socket.balance = balance;
        socket.ports = vec![1];
        routes.put_socket(socket);
        routes.by_port(1).unwrap()
    }

    fn head(name: &str, cost_ms: u64) -> Head<Fake> {
        let way = Fake(name.parse().unwrap());
        let cost = Duration::from_millis(cost_ms);
        Head { way, class: (0, 0), weight: 1, distance: cost, cost, load: 0 }
    }

    fn order(heads: Vec<Head<Fake>>, route: &Route) -> Vec<String> {
        let ip = "192.0.2.1".parse().unwrap();
        in_order(heads, route, ip).into_iter().map(|way| way.0.to_string()).collect()
    }

    fn firsts(route: &Route, heads: impl Fn() -> Vec<Head<Fake>>) -> HashMap<String, usize> {
        let mut counts = HashMap::new();
        for _ in 0..600 {
            *counts.entry(order(heads(), route).remove(0)).or_default() += 1;
        }
        counts
    }

    #[test]
    fn the_nearest_serves_and_those_as_near_share() {
        let route = route(Balance::Nearest);
        assert_eq!(order(vec![head("far", 120), head("mid", 40), head("near", 5)], &route), ["near", "mid", "far"]);
        let shared = firsts(&route, || vec![head("far", 40), head("one", 5), head("two", 5)]);
        assert_eq!((shared["one"], shared["two"], shared.get("far")), (300, 300, None));
        // Owners of one node, one of whom was measured while the machine was busy.
        let here = |name, own| Head { distance: Duration::ZERO, ..head(name, own) };
        let noisy = firsts(&route, || vec![here("one", 1), here("two", 9), here("far", 30)]);
        assert_eq!((noisy["one"], noisy["two"]), (300, 300));
        let busy = firsts(&route, || vec![Head { load: 3, ..head("one", 5) }, head("two", 5)]);
        assert_eq!(busy.len(), 1, "{busy:?}");
    }

    #[test]
    fn the_nearest_does_not_flap() {
        let route = route(Balance::Nearest);
        order(vec![head("a", 40), head("b", 60)], &route);
        // A little nearer is no reason; much nearer is.
        let closer = firsts(&route, || vec![head("a", 44), head("b", 40)]);
        assert!(closer.contains_key("a"), "{closer:?}");
        let much = firsts(&route, || vec![head("a", 60), head("b", 40)]);
        assert_eq!(much.len(), 1, "{much:?}");
        assert!(much.contains_key("b"));
    }

    #[test]
    fn backups_wait_and_what_fails_comes_last() {
        let route = route(Balance::RoundRobin);
        let backup = || Head { class: (0, 1), ..head("backup", 1) };
        let down = || Head { class: (3, 0), ..head("down", 1) };
        let firsts = firsts(&route, || vec![backup(), down(), head("a", 1), head("b", 1)]);
        assert_eq!((firsts["a"], firsts["b"]), (300, 300));
        assert_eq!(order(vec![down(), backup()], &route), ["backup", "down"]);
    }

    #[test]
    fn weights_are_shares() {
        let heavy = || vec![Head { weight: 3, ..head("a", 1) }, head("b", 1)];
        assert_eq!(firsts(&route(Balance::RoundRobin), heavy)["a"], 450);
        let random = firsts(&route(Balance::Random), heavy)["a"];
        assert!((380..520).contains(&random), "{random}");
        let busy = || vec![Head { weight: 3, load: 5, ..head("a", 1) }, Head { load: 2, ..head("b", 1) }];
        assert_eq!(firsts(&route(Balance::LeastConnections), busy)["a"], 600);
    }

    #[test]
    fn an_address_stays_where_it_was_when_another_tunnel_comes_or_goes() {
        let route = route(Balance::IpHash);
        let all = ["a", "b", "c", "d"];
        let chosen = |names: &[&str], ip: u32| {
            let heads = names.iter().map(|name| head(name, 1)).collect();
            in_order(heads, &route, std::net::Ipv4Addr::from(ip).into()).remove(0).0.to_string()
        };
        let mut moved = 0;
        for ip in 0..400 {
            let before = chosen(&all, ip);
            let after = chosen(&["a", "b", "c"], ip);
            assert!(before == "d" || before == after);
            moved += usize::from(before != after);
        }
        assert!((60..140).contains(&moved), "a quarter of them: {moved}");
    }
}
