//! The embedded store: the feed of a single node, in one SQLite file. A commit
//! is on disk before it is answered. This file is the door (open, commit, read,
//! subscribe, close); `state` is the copy in memory that all reads and
//! subscriptions use, `writer` the one thread that writes, `disk` the file.
//!
//! The whole state lives in memory beside the file (about 0.6 KB per socket):
//! guards, reads, lists and snapshots never touch the disk, and a disk that
//! fails takes only the writes away.

mod disk;
mod state;
mod subscription;
mod writer;

#[cfg(test)]
mod durability;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use self::disk::Disk;
use self::state::State;
use self::writer::{Job, Writer};
use super::prefixes::Prefixes;
use super::{Cursor, Entry, Feed, Lease, LeaseId, Op, ReadError, Subscription, Txn, WriteError};
use crate::fields::{Bytes, Fields};

/// Most writes of one transaction. Records need a handful; a transaction is one
/// event to every subscriber.
const OPS_MAX: usize = 1000;
/// Longest key, in bytes. Two ids of 128 bytes and a prefix fit thrice.
const KEY_MAX: usize = 1024;

/// The store's knobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreSettings {
    /// Changes kept for subscribers that resume. Default 10000: at a hundred
    /// changes a second a watcher may be away for over a minute; about 5 MB.
    pub history: usize,
    /// Bytes of values kept for the same, whichever is reached first. Default
    /// 64 MiB: bounds memory where records are large.
    pub history_bytes: Bytes,
    /// Transactions waiting for the writer. Default 256: more wait in their
    /// callers, so that memory is bounded by callers, not by this queue.
    pub queue: usize,
    /// Transactions that share one fsync. Default 64: with 4 ms per fsync this
    /// is beyond what one core can prepare.
    pub group: usize,
    /// Largest value of a key. Default 1 MiB: certificate chains are 4-20 KiB.
    pub value_limit: Bytes,
    /// How long a commit may take before it is answered as unknown. Default
    /// 10 s: a healthy disk needs milliseconds, a stuck one must not hold
    /// callers for ever.
    pub commit_deadline: Duration,
    /// Events that wait for one subscriber in memory. Default 64; one that is
    /// slower reads on from the history, and gets a Reset if that has moved on.
    pub subscriber_events: usize,
}

impl Default for StoreSettings {
    fn default() -> Self {
        Self {
            history: 10_000,
            history_bytes: Bytes(64 << 20),
            queue: 256,
            group: 64,
            value_limit: Bytes(1 << 20),
            commit_deadline: Duration::from_secs(10),
            subscriber_events: 64,
        }
    }
}

impl StoreSettings {
    /// Reads the section `store` of the settings.
    pub fn read(f: &mut Fields) -> Self {
        let d = Self::default();
        let settings = Self {
            history: f.take("history", d.history),
            history_bytes: f.take("history_bytes", d.history_bytes),
            queue: f.take("queue", d.queue),
            group: f.take("group", d.group),
            value_limit: f.take("value_limit", d.value_limit),
            commit_deadline: f.take("commit_deadline", d.commit_deadline),
            subscriber_events: f.take("subscriber_events", d.subscriber_events),
        };
        for (key, value) in
            [("queue", settings.queue), ("group", settings.group), ("subscriber_events", settings.subscriber_events)]
        {
            if value == 0 {
                f.mistake(key, "is 0".into(), "write a whole number from 1".into());
            }
        }
        settings
    }
}

/// Why the store could not be opened.
#[derive(Debug)]
pub enum StoreError {
    /// The folder or a file in it cannot be made, read or written.
    Folder {
        /// Which.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// Another process has this store open.
    Busy {
        /// Which file.
        path: PathBuf,
    },
    /// The file is not a store, or is damaged.
    Corrupt {
        /// Which file.
        path: PathBuf,
        /// What SQLite says.
        why: String,
    },
    /// The file was written by a newer version.
    Newer {
        /// Which file.
        path: PathBuf,
        /// The schema it has.
        found: i64,
        /// The newest that this version reads.
        known: i64,
    },
    /// SQLite failed otherwise.
    Engine {
        /// Which file.
        path: PathBuf,
        /// What it says.
        why: String,
    },
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder { path, error } => {
                write!(f, "{}: {error}; the store needs a folder that this user may write", path.display())
            }
            Self::Busy { path } => {
                write!(f, "{}: another process has this store open; stop it, or use another folder", path.display())
            }
            Self::Corrupt { path, why } => write!(
                f,
                "{}: is not a store or is damaged ({why}); move it away to start empty, or restore a backup",
                path.display()
            ),
            Self::Newer { path, found, known } => write!(
                f,
                "{}: was written by a newer version (schema {found}, this one reads up to {known}); run that version",
                path.display()
            ),
            Self::Engine { path, why } => write!(f, "{}: {why}", path.display()),
        }
    }
}

impl std::error::Error for StoreError {}

/// What the door, the writer and the subscriptions share.
struct Shared {
    state: RwLock<State>,
    /// The newest revision in `state`; tells subscriptions to look.
    head: watch::Sender<u64>,
    /// Leases dropped and not yet revoked by the writer.
    dropped: Mutex<Vec<LeaseId>>,
    /// Set once nothing more will be written.
    closed: CancellationToken,
}

/// The embedded store.
pub struct Store {
    shared: Arc<Shared>,
    settings: StoreSettings,
    jobs: mpsc::Sender<Job>,
    last_lease: AtomicU64,
}

impl Store {
    /// Opens the store in file `path`, or makes it. Blocks while it reads the
    /// file (0.1 s per 100 000 records). Its folder is made with mode 0700 if
    /// it is missing, the file has mode 0600.
    ///
    /// # Errors
    /// See [`StoreError`]; nothing is changed in a file that is refused.
    pub fn open(path: &Path, settings: StoreSettings) -> Result<Arc<Self>, StoreError> {
        Self::start(Disk::open(path)?, settings, path)
    }

    /// A store without a file, gone with the process.
    ///
    /// # Errors
    /// SQLite could not be started.
    pub fn in_memory(settings: StoreSettings) -> Result<Arc<Self>, StoreError> {
        Self::start(Disk::in_memory()?, settings, Path::new(":memory:"))
    }

    fn start(mut disk: Disk, settings: StoreSettings, path: &Path) -> Result<Arc<Self>, StoreError> {
        let state = disk.load(settings.history, settings.history_bytes.0)?;
        let shared = Arc::new(Shared {
            head: watch::Sender::new(state.rev),
            state: RwLock::new(state),
            dropped: Mutex::default(),
            closed: CancellationToken::new(),
        });
        let (jobs, queue) = mpsc::channel(settings.queue.max(1));
        let writer = Writer::new(Arc::clone(&shared), disk, settings.group.max(1));
        std::thread::Builder::new()
            .name("adit-store".into())
            .spawn(move || writer.run(queue))
            .map_err(|error| StoreError::Folder { path: path.to_owned(), error })?;
        Ok(Arc::new(Self { shared, settings, jobs, last_lease: AtomicU64::new(0) }))
    }

    /// Writes what is queued, closes the file and releases it; subscriptions
    /// end. Later commits are `Unavailable`, reads still answer.
    pub async fn close(&self) {
        let (done, closed) = oneshot::channel();
        if self.jobs.send(Job::Close(done)).await.is_ok() {
            let _gone = closed.await;
        }
    }

    /// Refuses what no transaction may hold, before it is queued.
    fn check(&self, txn: &Txn) -> Result<(), WriteError> {
        if txn.ops.len() > OPS_MAX {
            return Err(WriteError::Denied(format!("{} writes in one transaction, at most {OPS_MAX}", txn.ops.len())));
        }
        let mut seen = HashSet::new();
        for op in &txn.ops {
            let (key, size) = match op {
                Op::Put { key, value, .. } => (key, value.len()),
                Op::Delete { key } => (key, 0),
            };
            if key.is_empty() || key.len() > KEY_MAX {
                return Err(WriteError::Denied(format!("a key of {} bytes, 1 to {KEY_MAX}", key.len())));
            }
            if size > self.settings.value_limit.0 {
                return Err(WriteError::Denied(format!(
                    "{key} has {size} bytes, at most {} (store.value_limit)",
                    self.settings.value_limit.0
                )));
            }
            if !seen.insert(key.as_str()) {
                return Err(WriteError::Denied(format!("{key} is written twice in one transaction")));
            }
        }
        Ok(())
    }

    /// Runs `work` with the connection, on the writer's thread.
    #[cfg(test)]
    async fn with_disk(&self, work: impl FnOnce(&mut Disk) + Send + 'static) {
        let (done, finished) = oneshot::channel();
        let work = Box::new(move |disk: &mut Disk| {
            work(disk);
            let _ = done.send(());
        });
        let _ = self.jobs.send(Job::Probe(work)).await;
        let _ = finished.await;
    }
}

impl Feed for Store {
    fn subscribe(&self, prefixes: &[&str], from: Option<Cursor>) -> Subscription {
        let (events, receiver) = mpsc::channel(self.settings.subscriber_events.max(1));
        let pump = subscription::pump(Arc::clone(&self.shared), Prefixes::new(prefixes), from, events);
        match tokio::runtime::Handle::try_current() {
            // Ends with its receiver or with the store, whichever is first.
            Ok(runtime) => drop(runtime.spawn(pump)),
            Err(error) => tracing::error!(%error, "a subscription needs the async runtime; it ends at once"),
        }
        Subscription { events: receiver }
    }

    fn commit(&self, txn: Txn) -> BoxFuture<'_, Result<u64, WriteError>> {
        Box::pin(async move {
            self.check(&txn)?;
            let (answer, answered) = oneshot::channel();
            let queued = tokio::time::timeout(self.settings.commit_deadline, self.jobs.send(Job::Commit(txn, answer)));
            match queued.await {
                Err(_) => return Err(WriteError::Unavailable("the store's queue did not move".into())),
                Ok(Err(_)) => return Err(WriteError::Unavailable("the store is closed".into())),
                Ok(Ok(())) => {}
            }
            match tokio::time::timeout(self.settings.commit_deadline, answered).await {
                Ok(Ok(result)) => result,
                Ok(Err(_)) => Err(WriteError::Unavailable("the store is closed".into())),
                Err(_) => Err(WriteError::Unknown("the disk did not answer in time".into())),
            }
        })
    }

    fn read<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>, ReadError>> {
        let entry = self.shared.state.read().entry(key);
        Box::pin(async move { Ok(entry) })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<(Cursor, Vec<Entry>), ReadError>> {
        self.page(prefix, "", usize::MAX)
    }

    fn page<'a>(
        &'a self,
        prefix: &'a str,
        after: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<(Cursor, Vec<Entry>), ReadError>> {
        Box::pin(async move {
            let (at, raw) = self.shared.state.read().page(prefix, after, limit);
            Ok((at, raw.into_iter().map(Into::into).collect()))
        })
    }

    /// The lease lives as long as this process and its `Lease`: there is nobody
    /// else who could outlive it, so `ttl` needs no timer here.
    fn lease(&self, _ttl: Duration) -> BoxFuture<'_, Result<Lease, WriteError>> {
        let id = LeaseId(self.last_lease.fetch_add(1, Ordering::Relaxed) + 1);
        let open =
            !self.shared.closed.is_cancelled() && self.shared.state.write().leases.insert(id, HashSet::new()).is_none();
        let (shared, jobs) = (Arc::clone(&self.shared), self.jobs.clone());
        Box::pin(async move {
            if !open {
                return Err(WriteError::Unavailable("the store is closed".into()));
            }
            let revoke = move || {
                shared.dropped.lock().push(id);
                // A full queue wakes the writer as well: it looks at `dropped`
                // before each group.
                let _full = jobs.try_send(Job::Wake);
            };
            Ok(Lease { id, revoke: Some(Box::new(revoke)) })
        })
    }
}
