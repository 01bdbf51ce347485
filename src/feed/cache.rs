//! The last state of a feed that is elsewhere, in a file of this node: it serves
//! from its start although the feed is out of reach, and asks a feed that is there
//! for what is new alone. SQLite, like the embedded store; whatever is wrong with the
//! file, it is begun anew. It holds keys of certificates: mode 0600.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};
use tokio::sync::mpsc;

use super::{Change, Cursor, Entry, Epoch, Event, Feed, Subscription};

/// Events between the feed and the file; beyond, the feed waits.
const WAITING: usize = 256;
/// How long the file may take to make place for one more.
const SLOW: Duration = Duration::from_secs(10);
/// Events of one transaction.
const GROUP: usize = 256;

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS kv (key TEXT PRIMARY KEY, value TEXT NOT NULL, rev INTEGER NOT NULL)
        STRICT, WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS meta (one INTEGER PRIMARY KEY CHECK (one = 1), epoch TEXT NOT NULL,
        rev INTEGER NOT NULL, prefixes TEXT NOT NULL) STRICT;";

/// Follows the keys under `prefixes`, beginning with what `path` remembers of them.
pub fn follow(path: PathBuf, feed: Arc<dyn Feed>, prefixes: Vec<&'static str>) -> Subscription {
    let (tell, events) = mpsc::channel(WAITING);
    tokio::spawn(run(path, feed, prefixes, tell));
    Subscription { events }
}

async fn run(path: PathBuf, feed: Arc<dyn Feed>, prefixes: Vec<&'static str>, tell: mpsc::Sender<Event>) {
    let of = prefixes.join(" ");
    let opened = tokio::task::spawn_blocking(move || Cache::open(path, of)).await;
    let (cache, known) = opened.unwrap_or_default();
    let from = known.as_ref().map(|(at, _)| at.clone());
    if let Some((at, state)) = known {
        tracing::info!(records = state.len(), rev = at.rev, "the feed's last state is here");
        let why = "the feed has not been asked yet".to_owned();
        if tell.send(Event::Reset { at, state }).await.is_err() || tell.send(Event::Stale { why }).await.is_err() {
            return;
        }
    }
    let (mut keep, keeping) = match cache {
        Some(cache) => {
            let (keep, kept) = mpsc::channel(WAITING);
            (Some(keep), Some(tokio::task::spawn_blocking(move || cache.keep(kept))))
        }
        None => (None, None),
    };
    let mut events = feed.subscribe(&prefixes, from);
    loop {
        let event = tokio::select! {
            () = tell.closed() => break,
            event = events.next() => event,
        };
        let Some(event) = event else { break };
        let copy = keep.as_ref().filter(|_| !matches!(event, Event::Stale { .. })).map(|_| event.clone());
        if tell.send(event).await.is_err() {
            break;
        }
        // Who serves has it first, and does not wait for a disk that is stuck. What the
        // file has by then is a state that was, and stays.
        if let (Some(kept), Some(copy)) = (&keep, copy)
            && kept.send_timeout(copy, SLOW).await.is_err()
        {
            tracing::error!("the feed's last state is no longer kept: its disk fails, or takes too long");
            keep = None;
        }
    }
    drop(keep);
    if let Some(keeping) = keeping {
        let _ = keeping.await;
    }
}

type Known = (Cursor, Vec<Entry>);

struct Cache {
    path: PathBuf,
    connection: Connection,
    prefixes: String,
    /// One process at a time.
    _lock: File,
}

impl Cache {
    /// The file, and what it knows; without a file that can be used, neither.
    fn open(path: PathBuf, prefixes: String) -> (Option<Self>, Option<Known>) {
        let lock = match lock(&path) {
            Ok(lock) => lock,
            Err(error) => {
                tracing::error!(path = %path.display(), error, "the feed's last state is not used");
                return (None, None);
            }
        };
        for attempt in 0..2 {
            let opened = connect(&path).and_then(|connection| {
                let known = known(&connection, &prefixes)?;
                Ok((connection, known))
            });
            match opened {
                Ok((connection, known)) => return (Some(Self { path, connection, prefixes, _lock: lock }), known),
                Err(error) if attempt == 0 => {
                    tracing::warn!(path = %path.display(), error, "the feed's last state cannot be read: begun anew");
                    remove(&path);
                }
                Err(error) => {
                    tracing::error!(path = %path.display(), error, "the feed's last state cannot be kept");
                }
            }
        }
        (None, None)
    }

    /// Writes what comes until nothing more does.
    fn keep(mut self, mut events: mpsc::Receiver<Event>) {
        let mut group = Vec::new();
        while events.blocking_recv().map(|event| group.push(event)).is_some() {
            while group.len() < GROUP
                && let Ok(event) = events.try_recv()
            {
                group.push(event);
            }
            if let Err(error) = self.write(std::mem::take(&mut group)) {
                tracing::error!(path = %self.path.display(), %error, "the feed's last state is no longer kept");
                remove(&self.path);
                return;
            }
        }
    }

    fn write(&mut self, group: Vec<Event>) -> rusqlite::Result<()> {
        let transaction = self.connection.transaction()?;
        let mut place = None;
        {
            let mut put = transaction.prepare_cached("INSERT OR REPLACE INTO kv VALUES (?1, ?2, ?3)")?;
            let mut delete = transaction.prepare_cached("DELETE FROM kv WHERE key = ?1")?;
            for event in group {
                let at = match event {
                    Event::Reset { at, state } => {
                        transaction.execute("DELETE FROM kv", [])?;
                        for entry in state {
                            put.execute(params![entry.key, &*entry.value, entry.rev.cast_signed()])?;
                        }
                        at
                    }
                    Event::Batch { at, changes } => {
                        for change in changes {
                            match change {
                                Change::Put(entry) => {
                                    put.execute(params![entry.key, &*entry.value, entry.rev.cast_signed()])?
                                }
                                Change::Delete { key, .. } => delete.execute(params![key])?,
                            };
                        }
                        at
                    }
                    Event::Live { at } => at,
                    Event::Stale { .. } => continue,
                };
                place = Some(at);
            }
        }
        if let Some(at) = place {
            transaction.execute(
                "INSERT OR REPLACE INTO meta VALUES (1, ?1, ?2, ?3)",
                params![&*at.epoch.0, at.rev.cast_signed(), self.prefixes],
            )?;
        }
        transaction.commit()
    }
}

fn lock(path: &Path) -> Result<File, String> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(format!("{}.lock", path.display())).map_err(|e| e.to_string())?;
    file.try_lock().map_err(|_| "another process has it open".to_owned())?;
    Ok(file)
}

fn connect(path: &Path) -> Result<Connection, String> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    options.open(path).map_err(|e| e.to_string())?;
    let made = Connection::open(path).and_then(|connection| {
        // What a power cut takes from the end is asked of the feed again.
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        connection.execute_batch(TABLES)?;
        Ok(connection)
    });
    made.map_err(|e| e.to_string())
}

fn known(connection: &Connection, prefixes: &str) -> Result<Option<Known>, String> {
    let read = || -> rusqlite::Result<Option<Known>> {
        let meta = connection.query_row("SELECT epoch, rev, prefixes FROM meta", [], |row| {
            Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?, row.get::<_, String>(2)?))
        });
        // Of another version, that followed other keys.
        let Some((epoch, rev, _)) = meta.optional()?.filter(|(_, _, of)| of == prefixes) else { return Ok(None) };
        let mut rows = connection.prepare("SELECT key, value, rev FROM kv ORDER BY key")?;
        let rows = rows.query_map([], |row| {
            let (key, value, rev): (String, String, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
            Ok(Entry { key, value: value.into(), rev: rev.cast_unsigned() })
        })?;
        let state = rows.collect::<rusqlite::Result<Vec<_>>>()?;
        Ok(Some((Cursor { epoch: Epoch(epoch.into()), rev: rev.cast_unsigned() }, state)))
    };
    read().map_err(|e| e.to_string())
}

fn remove(path: &Path) {
    for end in ["", "-wal", "-shm"] {
        let _ = std::fs::remove_file(format!("{}{end}", path.display()));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::feed::store::{Store, StoreSettings};
    use crate::feed::{Op, Txn};

    const PREFIXES: &[&str] = &["cfg/"];

    async fn put(feed: &Store, key: &str, value: &str) -> u64 {
        let op = Op::Put { key: key.into(), value: value.into(), lease: None };
        feed.commit(Txn { expect: vec![], ops: vec![op] }).await.unwrap()
    }

    async fn next(events: &mut Subscription) -> Event {
        tokio::time::timeout(Duration::from_secs(10), events.next()).await.expect("in time").expect("it goes on")
    }

    /// What is told before the feed is asked, and what the feed then tells.
    async fn first(path: &Path, feed: &Arc<Store>, prefixes: &'static [&'static str]) -> (Vec<Event>, Vec<Event>) {
        let mut events = follow(path.to_owned(), Arc::clone(feed) as _, prefixes.to_vec());
        let (mut before, mut after) = (Vec::new(), Vec::new());
        loop {
            match next(&mut events).await {
                Event::Live { .. } => return (before, after),
                Event::Stale { .. } => before = std::mem::take(&mut after),
                event => after.push(event),
            }
        }
    }

    async fn until_kept(path: &Path, rev: u64) {
        let by = std::time::Instant::now() + Duration::from_secs(10);
        let kept =
            || known(&Connection::open(path).unwrap(), "cfg/").ok().flatten().is_some_and(|(at, _)| at.rev >= rev);
        while !kept() {
            assert!(std::time::Instant::now() < by, "not kept in time");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_was_seen_is_there_at_the_next_start_and_only_news_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("feed.cache");
        let feed = Store::in_memory(StoreSettings::default()).unwrap();
        put(&feed, "cfg/a", "1").await;
        let rev = put(&feed, "cfg/b", "1").await;
        let (before, after) = first(&path, &feed, PREFIXES).await;
        assert!(before.is_empty() && matches!(&after[..], [Event::Reset { state, .. }] if state.len() == 2));
        until_kept(&path, rev).await;
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // Its follower has noticed that nobody listens, and closed the file.
        let by = std::time::Instant::now() + Duration::from_secs(10);
        while lock(&path).is_err() {
            assert!(std::time::Instant::now() < by, "the file stays open");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let news = put(&feed, "cfg/c", "1").await;
        let (before, after) = first(&path, &feed, PREFIXES).await;
        assert!(matches!(&before[..], [Event::Reset { at, state }] if at.rev == rev && state.len() == 2), "{before:?}");
        assert!(
            matches!(&after[..], [Event::Batch { at, changes }] if at.rev == news && changes.len() == 1),
            "{after:?}"
        );
        // Who follows other keys knows nothing of them yet.
        assert!(first(&path, &feed, &["cfg/", "live/"]).await.0.is_empty());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_file_that_is_broken_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("feed.cache");
        std::fs::write(&path, "no database, whatever its name says".repeat(100)).unwrap();
        let feed = Store::in_memory(StoreSettings::default()).unwrap();
        let rev = put(&feed, "cfg/a", "1").await;
        let (before, after) = first(&path, &feed, PREFIXES).await;
        assert!(before.is_empty() && after.len() == 1);
        until_kept(&path, rev).await;
    }
}
