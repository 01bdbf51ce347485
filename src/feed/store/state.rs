//! The store's copy in memory: every key with its value, the leases, and the
//! recent history that subscribers resume from. Pure; changed by the writer
//! alone, after the disk has the change.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use crate::feed::prefixes::Prefixes;
use crate::feed::{Change, Cursor, Entry, Epoch, LeaseId};

/// The value of a key.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) value: Arc<str>,
    pub(super) rev: u64,
    /// Set: only in memory, gone with the lease.
    pub(super) lease: Option<LeaseId>,
}

/// All changes of one revision.
#[derive(Debug)]
pub(super) struct Revision {
    pub(super) rev: u64,
    pub(super) changes: Vec<Change>,
}

impl Revision {
    fn bytes(&self) -> usize {
        self.changes
            .iter()
            .map(|c| match c {
                Change::Put(e) => e.key.len() + e.value.len(),
                Change::Delete { key, .. } => key.len(),
            })
            .sum()
    }
}

/// An entry that shares its texts with the state: cheap to collect under the lock.
pub(super) struct Raw {
    key: Arc<str>,
    value: Arc<str>,
    rev: u64,
}

impl From<Raw> for Entry {
    fn from(raw: Raw) -> Self {
        Self { key: raw.key.as_ref().to_owned(), value: raw.value, rev: raw.rev }
    }
}

/// What a subscriber at some place needs next.
pub(super) enum Next {
    /// It has all there is.
    Current,
    /// Its place is not in the history: the whole state.
    Reset(Cursor, Vec<Raw>),
    /// The revisions after its place, up to and including the last one given.
    Revisions(Vec<Arc<Revision>>),
}

/// Everything at one revision.
pub(super) struct State {
    pub(super) epoch: Epoch,
    pub(super) rev: u64,
    /// The history holds every revision after this one.
    pub(super) floor: u64,
    pub(super) kv: BTreeMap<Arc<str>, Held>,
    pub(super) leases: HashMap<LeaseId, HashSet<Arc<str>>>,
    history: VecDeque<Arc<Revision>>,
    changes: usize,
    bytes: usize,
    changes_max: usize,
    bytes_max: usize,
}

impl State {
    pub(super) fn new(epoch: Epoch, rev: u64, floor: u64, changes_max: usize, bytes_max: usize) -> Self {
        Self {
            epoch,
            rev,
            floor,
            kv: BTreeMap::new(),
            leases: HashMap::new(),
            history: VecDeque::new(),
            changes: 0,
            bytes: 0,
            changes_max,
            bytes_max,
        }
    }

    pub(super) fn cursor(&self) -> Cursor {
        Cursor { epoch: self.epoch.clone(), rev: self.rev }
    }

    pub(super) fn entry(&self, key: &str) -> Option<Entry> {
        let held = self.kv.get(key)?;
        Some(Entry { key: key.to_owned(), value: Arc::clone(&held.value), rev: held.rev })
    }

    /// Up to `limit` entries under `prefix` whose keys sort after `after`.
    pub(super) fn page(&self, prefix: &str, after: &str, limit: usize) -> (Cursor, Vec<Raw>) {
        let from = if after > prefix { Bound::Excluded(after) } else { Bound::Included(prefix) };
        let raw = self
            .kv
            .range::<str, _>((from, Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(prefix))
            .take(limit)
            .map(|(key, held)| Raw { key: Arc::clone(key), value: Arc::clone(&held.value), rev: held.rev })
            .collect();
        (self.cursor(), raw)
    }

    /// What follows `at`; at most `limit` revisions at once.
    pub(super) fn next(&self, at: Option<u64>, prefixes: &Prefixes, limit: usize) -> Next {
        match at {
            Some(at) if at == self.rev => Next::Current,
            Some(at) if (self.floor..self.rev).contains(&at) => {
                let start = self.history.partition_point(|r| r.rev <= at);
                Next::Revisions(self.history.range(start..).take(limit).cloned().collect())
            }
            _ => {
                let state = prefixes.iter().flat_map(|p| self.page(p, "", usize::MAX).1).collect();
                Next::Reset(self.cursor(), state)
            }
        }
    }

    /// Sets or removes a key and keeps the leases in step.
    pub(super) fn set(&mut self, key: &str, held: Option<Held>) {
        let lease = held.as_ref().and_then(|h| h.lease);
        let shared: Arc<str> = match self.kv.get_key_value(key) {
            Some((shared, _)) => Arc::clone(shared),
            None => key.into(),
        };
        let old = match held {
            Some(held) => self.kv.insert(Arc::clone(&shared), held),
            None => self.kv.remove(key),
        };
        if let Some(keys) = old.and_then(|o| o.lease).and_then(|l| self.leases.get_mut(&l)) {
            keys.remove(key);
        }
        if let Some(keys) = lease.and_then(|l| self.leases.get_mut(&l)) {
            keys.insert(shared);
        }
    }

    /// Adds a revision to the history and drops the oldest beyond the bounds.
    pub(super) fn remember(&mut self, revision: Revision) {
        self.changes += revision.changes.len();
        self.bytes += revision.bytes();
        self.history.push_back(Arc::new(revision));
        while self.changes > self.changes_max || self.bytes > self.bytes_max {
            let Some(oldest) = self.history.pop_front() else { break };
            self.changes -= oldest.changes.len();
            self.bytes -= oldest.bytes();
            self.floor = oldest.rev;
        }
    }
}
