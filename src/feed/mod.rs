//! The feed: where sockets, tunnels and certificates come from. One trait, two
//! engines (the embedded store of one node, etcd for a fleet), and the typed
//! records above it. No engine's own word leaks: compaction and gaps are
//! `Reset`, a lost engine is `Stale`.

pub mod cache;
pub mod certificate_check;
#[cfg(feature = "etcd")]
pub mod etcd;
pub mod follower;
mod prefixes;
pub mod records;
pub mod settings;
pub mod store;

#[cfg(test)]
pub(crate) mod conformance;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;

/// A life of the feed's data; revisions compare only within one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Epoch(pub Arc<str>);

/// A place in the feed's history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor {
    /// The life of the data that `rev` belongs to.
    pub epoch: Epoch,
    /// The revision: one global order of all writes.
    pub rev: u64,
}

/// A key with its value and the revision that wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// `cfg/sock/<id>` and the like.
    pub key: String,
    /// JSON text.
    pub value: Arc<str>,
    /// The revision of its last write.
    pub rev: u64,
}

/// One change of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The key has this value now.
    Put(Entry),
    /// The key is gone.
    Delete {
        /// Which key.
        key: String,
        /// The revision that deleted it.
        rev: u64,
    },
}

impl Change {
    /// Which key it is of.
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key, .. } => key,
        }
    }
}

/// What a subscriber sees, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Forget what you knew: this is the whole state of the prefixes at `at`
    /// (first snapshot, history compacted, epoch changed, subscriber too slow).
    Reset {
        /// The state's place in history.
        at: Cursor,
        /// Every entry, sorted by key.
        state: Vec<Entry>,
    },
    /// All changes of one revision.
    Batch {
        /// The place after these changes.
        at: Cursor,
        /// The changes, in the order of the transaction.
        changes: Vec<Change>,
    },
    /// Up to date with the engine as of `at`.
    Live {
        /// The place reached.
        at: Cursor,
    },
    /// The engine cannot be reached; what was seen last still holds.
    Stale {
        /// Why, for the log.
        why: String,
    },
}

/// A running subscription. Never ends while the feed lives: reconnecting,
/// resuming and resyncing happen inside.
pub struct Subscription {
    pub(crate) events: tokio::sync::mpsc::Receiver<Event>,
}

impl From<tokio::sync::mpsc::Receiver<Event>> for Subscription {
    /// What an engine of one's own tells.
    fn from(events: tokio::sync::mpsc::Receiver<Event>) -> Self {
        Self { events }
    }
}

impl Subscription {
    /// The next event; `None` when the feed has shut down.
    ///
    /// # Cancel safety
    /// Cancel safe: no event is lost.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }
}

/// What must hold of a key for a transaction to be applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// The key does not exist.
    Absent,
    /// The key exists.
    Present,
    /// The key's last write was this revision.
    Rev(u64),
}

/// One write of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Sets a key.
    Put {
        /// Which key.
        key: String,
        /// JSON text.
        value: String,
        /// The lease it lives under, if any.
        lease: Option<LeaseId>,
    },
    /// Removes a key; nothing if it is not there.
    Delete {
        /// Which key.
        key: String,
    },
}

/// Guards and writes, applied whole at one revision or not at all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Txn {
    /// All must hold.
    pub expect: Vec<(String, Expect)>,
    /// Applied in order.
    pub ops: Vec<Op>,
}

/// Names a lease of one engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LeaseId(pub u64);

/// Keys under a lease vanish when it is revoked, expires, or the process dies.
/// Dropping it revokes it; it is kept alive inside until then.
pub struct Lease {
    /// The name to put into `Op::Put`.
    pub id: LeaseId,
    pub(crate) revoke: Option<Box<dyn FnOnce() + Send + Sync>>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(revoke) = self.revoke.take() {
            revoke();
        }
    }
}

/// Why a write did not happen, or may not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WriteError {
    /// A guard did not hold.
    Conflict {
        /// Whose.
        key: String,
        /// The revision it has now; `None`: it does not exist.
        rev: Option<u64>,
    },
    /// This node may not write there.
    Denied(String),
    /// The lease is gone.
    LeaseLost,
    /// The engine cannot be reached or failed; nothing was written.
    Unavailable(String),
    /// The engine did not answer: it may have been written.
    Unknown(String),
}

impl fmt::Display for WriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Conflict { key, rev: Some(rev) } => write!(f, "{key} is at revision {rev}"),
            Self::Conflict { key, rev: None } => write!(f, "{key} does not exist"),
            Self::Denied(why) => write!(f, "denied: {why}"),
            Self::LeaseLost => f.write_str("the lease is gone"),
            Self::Unavailable(why) => write!(f, "the feed is unavailable: {why}"),
            Self::Unknown(why) => write!(f, "the feed did not answer, the write may have happened: {why}"),
        }
    }
}

impl std::error::Error for WriteError {}

/// The engine cannot be read now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadError(pub String);

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the feed cannot be read: {}", self.0)
    }
}

impl std::error::Error for ReadError {}

/// An engine that keeps records and tells their changes in one global order.
pub trait Feed: Send + Sync + 'static {
    /// Follows all keys under `prefixes`. With `from`, resumes after that
    /// place if the engine still has the history, else starts with `Reset`.
    fn subscribe(&self, prefixes: &[&str], from: Option<Cursor>) -> Subscription;

    /// Applies a transaction durably; answers the revision it got.
    fn commit(&self, txn: Txn) -> BoxFuture<'_, Result<u64, WriteError>>;

    /// Reads one key.
    fn read<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>, ReadError>>;

    /// Reads all keys under a prefix, sorted, as of one revision.
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<(Cursor, Vec<Entry>), ReadError>>;

    /// Reads up to `limit` keys under a prefix that sort after `after` (whole
    /// keys; "" starts at the first), as of one revision.
    fn page<'a>(
        &'a self,
        prefix: &'a str,
        after: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<(Cursor, Vec<Entry>), ReadError>>;

    /// Opens a lease that expires `ttl` after this process stopped renewing it.
    fn lease(&self, ttl: Duration) -> BoxFuture<'_, Result<Lease, WriteError>>;
}
