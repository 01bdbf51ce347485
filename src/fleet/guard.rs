//! Nodes that vanish from the feed all at once are more likely a fault of the feed, or
//! of the way to it, than dead: they are kept for a while, and links tell whether they
//! are there. Pure: `now` is an argument.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use crate::model::NodeId;

/// More nodes than this, and a larger part of the fleet than one in `PART`, within
/// `WITHIN`.
const NODES: usize = 3;
const PART: usize = 5;
const WITHIN: Duration = Duration::from_secs(30);
/// How long they are kept.
const KEPT: Duration = Duration::from_secs(60);

/// Watches nodes go.
#[derive(Debug, Default)]
pub(super) struct Guard {
    gone: VecDeque<(Instant, NodeId)>,
    kept: HashMap<NodeId, Instant>,
}

impl Guard {
    /// A node's key is gone, of so many that were there: whether to keep it for now.
    pub(super) fn keeps(&mut self, id: &NodeId, there: usize, now: Instant) -> bool {
        while self.gone.front().is_some_and(|(at, _)| now - *at > WITHIN) {
            self.gone.pop_front();
        }
        let fleet = there + self.gone.iter().filter(|(_, id)| !self.kept.contains_key(id)).count();
        self.gone.push_back((now, id.clone()));
        let many = self.gone.len() > NODES && self.gone.len() * PART > fleet;
        if many {
            self.kept.entry(id.clone()).or_insert(now + KEPT);
        }
        many
    }

    /// A node tells that it lives.
    pub(super) fn came(&mut self, id: &NodeId) {
        self.kept.remove(id);
        self.gone.retain(|(_, gone)| gone != id);
    }

    /// When the next one has been kept long enough.
    pub(super) fn next(&self) -> Option<Instant> {
        self.kept.values().min().copied()
    }

    /// Those that have been kept long enough: they are gone.
    pub(super) fn due(&mut self, now: Instant) -> Vec<NodeId> {
        let due: Vec<NodeId> = self.kept.iter().filter(|(_, until)| **until <= now).map(|(id, _)| id.clone()).collect();
        for id in &due {
            self.kept.remove(id);
        }
        due
    }

    /// How many are kept.
    pub(super) fn len(&self) -> usize {
        self.kept.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: usize) -> NodeId {
        format!("n{n}").parse().unwrap()
    }

    #[test]
    fn a_few_nodes_go_and_many_at_once_are_kept_for_a_minute() {
        let (mut guard, start) = (Guard::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        // Three of ten, and ones that go one after the other, are gone.
        assert!((0..3).all(|n| !guard.keeps(&id(n), 10 - n, start)));
        assert!((3..6).all(|n| !guard.keeps(&id(n), 10 - n, at(40 * n as u64))));
        let mut guard = Guard::default();
        let kept: Vec<bool> = (0..10).map(|n| guard.keeps(&id(n), 10 - n.min(3), start)).collect();
        assert_eq!(kept, [vec![false; 3], vec![true; 7]].concat());
        assert_eq!((guard.next(), guard.len()), (Some(at(60)), 7));
        guard.came(&id(9));
        assert!(guard.due(at(59)).is_empty());
        assert_eq!(guard.due(at(60)).len(), 6);
        assert_eq!((guard.next(), guard.len()), (None, 0));
    }

    #[test]
    fn in_a_large_fleet_a_few_are_no_fault_of_the_feed() {
        let (mut guard, now) = (Guard::default(), Instant::now());
        let kept = (0..30).map(|n| guard.keeps(&id(n), 100 - n.min(20), now)).filter(|kept| *kept).count();
        assert_eq!(kept, 10, "beyond a fifth");
    }
}
