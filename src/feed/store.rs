//! The embedded feed: SQLite (WAL, synchronous=FULL) behind one writer thread.
//! An acknowledged write is on disk; transactions that wait together share one
//! fsync. Keys under a lease are on disk too, so that one order holds for all,
//! and are deleted at the next start: no lease outlives its process.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use futures_util::future::BoxFuture;
use rusqlite::{Connection, OptionalExtension, Transaction, params};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::{
    Change, Cursor, Entry, Epoch, Event, Expect, Feed, Lease, LeaseId, Op, ReadError, Subscription, Txn, WriteError,
};
use crate::fields::Fields;

/// The knobs of `[store]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreSettings {
    /// Revisions kept for subscribers that resume; older ones start anew.
    pub history: u64,
    /// Time for one write to reach the disk.
    pub deadline: Duration,
}

impl Default for StoreSettings {
    fn default() -> Self {
        Self { history: 100_000, deadline: Duration::from_secs(10) }
    }
}

impl StoreSettings {
    /// Reads `[store]`.
    pub fn read(f: &mut Fields) -> Self {
        let d = Self::default();
        Self { history: f.take("history", d.history), deadline: f.take("deadline", d.deadline) }
    }
}

/// The layout of the tables; a file of a newer one is refused.
const SCHEMA: i64 = 1;

/// Transactions that share one fsync at most.
const BATCH: usize = 256;

/// Writes under way at once; more wait their turn.
const IN_FLIGHT: usize = 1024;

/// Events that wait for one subscriber; one who falls further behind gets the
/// whole state anew.
const BACKLOG: usize = 1024;

/// How often room is looked for at a subscriber that fell behind.
const CATCH_UP: Duration = Duration::from_millis(20);

/// The embedded store.
pub struct Store {
    commands: Sender<Command>,
    in_flight: Semaphore,
    deadline: Duration,
}

enum Command {
    Commit(Txn, oneshot::Sender<Result<u64, WriteError>>),
    Read(String, oneshot::Sender<Result<Option<Entry>, ReadError>>),
    List(String, oneshot::Sender<Result<(Cursor, Vec<Entry>), ReadError>>),
    Subscribe(Subscriber, Option<Cursor>),
    Lease(oneshot::Sender<LeaseId>),
    Revoke(LeaseId),
    Close(oneshot::Sender<()>),
}

struct Subscriber {
    prefixes: Vec<String>,
    events: mpsc::Sender<Event>,
    /// Missed something: gets a `Reset` as soon as there is room.
    behind: bool,
}

impl Subscriber {
    fn wants(&self, key: &str) -> bool {
        self.prefixes.iter().any(|p| key.starts_with(p.as_str()))
    }
}

impl Store {
    /// Opens the store in this file, made if absent.
    ///
    /// # Errors
    /// What to tell the operator: not writable, in use by another process, not
    /// a store, or of a newer version.
    pub fn open(path: &Path, settings: StoreSettings) -> Result<Arc<Self>, String> {
        let at = path.display();
        let connection = Connection::open(path).map_err(|e| format!("the store {at} cannot be opened: {e}"))?;
        Self::start(connection, settings).map_err(|e| match e.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked) => {
                format!("the store {at} is in use by another process; stop it or choose another state folder")
            }
            _ => format!("the store {at} cannot be used: {e}"),
        })
    }

    /// A store that is gone with the process, for tests.
    ///
    /// # Errors
    /// Where memory cannot be had.
    pub fn in_memory(settings: StoreSettings) -> Result<Arc<Self>, String> {
        let connection = Connection::open_in_memory().map_err(|e| e.to_string())?;
        Self::start(connection, settings).map_err(|e| e.to_string())
    }

    fn start(connection: Connection, settings: StoreSettings) -> rusqlite::Result<Arc<Self>> {
        let deadline = settings.deadline;
        let mut writer = Writer::new(connection, settings.history)?;
        let (commands, received) = channel();
        std::thread::Builder::new()
            .name("adit-store".to_owned())
            .spawn(move || writer.run(&received))
            .map_err(|e| rusqlite::Error::ToSqlConversionFailure(Box::new(e)))?;
        Ok(Arc::new(Self { commands, in_flight: Semaphore::new(IN_FLIGHT), deadline }))
    }

    /// Finishes what was begun and closes the file; subscriptions end.
    pub async fn close(&self) {
        let (done, closed) = oneshot::channel();
        if self.commands.send(Command::Close(done)).is_ok() {
            let _ = tokio::time::timeout(self.deadline, closed).await;
        }
    }

    async fn ask<T>(&self, make: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, &'static str> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(make(answer)).map_err(|_| "the store is closed")?;
        match tokio::time::timeout(self.deadline, answered).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err("the store is closed"),
            Err(_) => Err("the disk does not answer"),
        }
    }
}

impl Feed for Store {
    fn subscribe(&self, prefixes: &[&str], from: Option<Cursor>) -> Subscription {
        let (events, received) = mpsc::channel(BACKLOG);
        let prefixes = prefixes.iter().map(|p| (*p).to_owned()).collect();
        let _ = self.commands.send(Command::Subscribe(Subscriber { prefixes, events, behind: false }, from));
        Subscription { events: received }
    }

    fn commit(&self, txn: Txn) -> BoxFuture<'_, Result<u64, WriteError>> {
        Box::pin(async move {
            let _turn = self.in_flight.acquire().await;
            match self.ask(|answer| Command::Commit(txn, answer)).await {
                Ok(result) => result,
                Err(why @ "the disk does not answer") => Err(WriteError::Unknown(why.to_owned())),
                Err(why) => Err(WriteError::Unavailable(why.to_owned())),
            }
        })
    }

    fn read<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>, ReadError>> {
        Box::pin(async move {
            let asked = self.ask(|answer| Command::Read(key.to_owned(), answer)).await;
            asked.unwrap_or_else(|why| Err(ReadError(why.to_owned())))
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<(Cursor, Vec<Entry>), ReadError>> {
        Box::pin(async move {
            let asked = self.ask(|answer| Command::List(prefix.to_owned(), answer)).await;
            asked.unwrap_or_else(|why| Err(ReadError(why.to_owned())))
        })
    }

    /// In one process a lease needs no renewal: it ends with its drop, or with
    /// the process, whatever `ttl` says.
    fn lease(&self, _ttl: Duration) -> BoxFuture<'_, Result<Lease, WriteError>> {
        Box::pin(async move {
            let id = self.ask(Command::Lease).await.map_err(|why| WriteError::Unavailable(why.to_owned()))?;
            let commands = self.commands.clone();
            let revoke = Box::new(move || drop(commands.send(Command::Revoke(id))));
            Ok(Lease { id, revoke: Some(revoke) })
        })
    }
}

/// The one thread that touches the file.
struct Writer {
    connection: Connection,
    epoch: Epoch,
    rev: u64,
    history: u64,
    next_lease: u64,
    leases: std::collections::HashSet<LeaseId>,
    subscribers: Vec<Subscriber>,
}

/// What a committed transaction tells its caller and the subscribers.
struct Applied {
    rev: u64,
    changes: Vec<Change>,
}

impl Writer {
    fn new(connection: Connection, history: u64) -> rusqlite::Result<Self> {
        connection.busy_timeout(Duration::from_millis(200))?;
        // One process holds the file; without this two nodes would share it.
        connection.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
        connection.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        if found > SCHEMA {
            let why = format!("it was written by a newer version (schema {found}, this one knows {SCHEMA})");
            return Err(rusqlite::Error::ToSqlConversionFailure(why.into()));
        }
        connection.execute_batch(
            "BEGIN IMMEDIATE;
             CREATE TABLE IF NOT EXISTS kv (key TEXT PRIMARY KEY, value TEXT NOT NULL, rev INTEGER NOT NULL, lease INTEGER)
                 WITHOUT ROWID;
             CREATE INDEX IF NOT EXISTS kv_lease ON kv (lease) WHERE lease IS NOT NULL;
             CREATE TABLE IF NOT EXISTS log (rev INTEGER NOT NULL, seq INTEGER NOT NULL, key TEXT NOT NULL, value TEXT,
                 PRIMARY KEY (rev, seq)) WITHOUT ROWID;
             CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
             INSERT OR IGNORE INTO meta VALUES ('rev', '0'), ('epoch', lower(hex(randomblob(16))));
             PRAGMA user_version = 1;
             COMMIT;",
        )?;
        let meta = |name: &str| -> rusqlite::Result<String> {
            connection.query_row("SELECT value FROM meta WHERE name = ?1", [name], |row| row.get(0))
        };
        let (rev, epoch) = (meta("rev")?.parse().unwrap_or(0), Epoch(meta("epoch")?.into()));
        let mut writer = Self {
            connection,
            epoch,
            rev,
            history,
            next_lease: 1,
            leases: std::collections::HashSet::new(),
            subscribers: Vec::new(),
        };
        // What leases of the former process kept ends here.
        let orphans = writer.leased(None)?;
        if !orphans.is_empty() {
            writer.apply_all(vec![deletion(orphans)])?;
        }
        Ok(writer)
    }

    fn run(&mut self, commands: &Receiver<Command>) {
        loop {
            let wait = if self.subscribers.iter().any(|s| s.behind) { CATCH_UP } else { Duration::from_secs(3600) };
            match commands.recv_timeout(wait) {
                Ok(Command::Commit(txn, answer)) => {
                    // Whoever waits already shares this fsync.
                    let mut batch = vec![(txn, answer)];
                    let mut next = None;
                    while batch.len() < BATCH {
                        match commands.try_recv() {
                            Ok(Command::Commit(txn, answer)) => batch.push((txn, answer)),
                            Ok(other) => {
                                next = Some(other);
                                break;
                            }
                            Err(_) => break,
                        }
                    }
                    self.commit(batch);
                    if next.is_some_and(|command| self.handle(command)) {
                        return;
                    }
                }
                Ok(command) => {
                    if self.handle(command) {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.catch_up();
        }
    }

    /// Whether this was the last command.
    fn handle(&mut self, command: Command) -> bool {
        match command {
            Command::Commit(txn, answer) => self.commit(vec![(txn, answer)]),
            Command::Read(key, answer) => {
                let _ = answer.send(read(&self.connection, &key).map_err(|e| ReadError(e.to_string())));
            }
            Command::List(prefix, answer) => {
                let entries = list(&self.connection, &prefix).map_err(|e| ReadError(e.to_string()));
                let _ = answer.send(entries.map(|entries| (self.cursor(), entries)));
            }
            Command::Subscribe(subscriber, from) => self.subscribe(subscriber, from),
            Command::Lease(answer) => {
                let id = LeaseId(self.next_lease);
                self.next_lease += 1;
                self.leases.insert(id);
                if answer.send(id).is_err() {
                    self.leases.remove(&id);
                }
            }
            Command::Revoke(id) => {
                self.leases.remove(&id);
                match self.leased(Some(id)) {
                    Ok(keys) if keys.is_empty() => {}
                    Ok(keys) => {
                        if let Ok(applied) = self.apply_all(vec![deletion(keys)]) {
                            applied.into_iter().flatten().for_each(|a| self.tell(&a));
                        }
                    }
                    Err(error) => tracing::error!(%error, "a lease's keys could not be removed"),
                }
            }
            Command::Close(done) => {
                self.subscribers.clear();
                let _ = self.connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE);");
                let _ = done.send(());
                return true;
            }
        }
        false
    }

    fn commit(&mut self, batch: Vec<(Txn, oneshot::Sender<Result<u64, WriteError>>)>) {
        let (txns, answers): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
        match self.apply_all(txns) {
            Ok(results) => {
                for (result, answer) in results.into_iter().zip(answers) {
                    if let Ok(applied) = &result {
                        self.tell(applied);
                    }
                    let _ = answer.send(result.map(|applied| applied.rev));
                }
            }
            Err(error) => {
                tracing::error!(%error, "the store cannot write");
                for answer in answers {
                    let _ = answer.send(Err(WriteError::Unavailable(error.to_string())));
                }
            }
        }
    }

    /// Applies transactions in one commit to disk; each by itself whole or not
    /// at all. An error means that none of them happened.
    fn apply_all(&mut self, txns: Vec<Txn>) -> rusqlite::Result<Vec<Result<Applied, WriteError>>> {
        let mut rev = self.rev;
        let leases = &self.leases;
        let disk = self.connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let mut results = Vec::with_capacity(txns.len());
        for txn in txns {
            let refused = refusal(&disk, &txn, leases)?;
            results.push(match refused {
                Some(error) => Err(error),
                None => {
                    rev += 1;
                    Ok(apply(&disk, txn, rev)?)
                }
            });
        }
        if rev > self.rev {
            disk.execute("UPDATE meta SET value = ?1 WHERE name = 'rev'", [rev.to_string()])?;
            // Trimmed by halves: a delete for every write would double the work.
            if rev / (self.history / 2).max(1) > self.rev / (self.history / 2).max(1) {
                disk.execute("DELETE FROM log WHERE rev <= ?1", [to_sql(rev.saturating_sub(self.history))])?;
            }
        }
        disk.commit()?;
        self.rev = rev;
        Ok(results)
    }

    fn leased(&self, lease: Option<LeaseId>) -> rusqlite::Result<Vec<String>> {
        let sql = "SELECT key FROM kv WHERE lease IS NOT NULL AND (?1 IS NULL OR lease = ?1) ORDER BY key";
        let mut query = self.connection.prepare_cached(sql)?;
        let rows = query.query_map(params![lease.map(|l| to_sql(l.0))], |row| row.get(0))?;
        rows.collect()
    }

    fn cursor(&self) -> Cursor {
        Cursor { epoch: self.epoch.clone(), rev: self.rev }
    }

    fn tell(&mut self, applied: &Applied) {
        let at = Cursor { epoch: self.epoch.clone(), rev: applied.rev };
        self.subscribers.retain_mut(|subscriber| {
            let changes: Vec<Change> =
                applied.changes.iter().filter(|c| subscriber.wants(key_of(c))).cloned().collect();
            if changes.is_empty() || subscriber.behind {
                return !subscriber.events.is_closed();
            }
            match subscriber.events.try_send(Event::Batch { at: at.clone(), changes }) {
                Ok(()) => true,
                Err(mpsc::error::TrySendError::Full(_)) => {
                    subscriber.behind = true;
                    true
                }
                Err(mpsc::error::TrySendError::Closed(_)) => false,
            }
        });
    }

    fn subscribe(&mut self, mut subscriber: Subscriber, from: Option<Cursor>) {
        let resumed = from.and_then(|from| self.since(&subscriber, &from));
        match resumed {
            Some(batches) if batches.len() < BACKLOG / 2 => {
                for batch in batches {
                    let _ = subscriber.events.try_send(batch);
                }
                let _ = subscriber.events.try_send(Event::Live { at: self.cursor() });
            }
            _ => subscriber.behind = true,
        }
        self.subscribers.push(subscriber);
        self.catch_up();
    }

    /// The changes after a cursor; none where they are not (all) kept.
    fn since(&self, subscriber: &Subscriber, from: &Cursor) -> Option<Vec<Event>> {
        if from.epoch != self.epoch || from.rev > self.rev || self.rev - from.rev > self.history {
            return None;
        }
        // What is kept may be less than what is promised now: an earlier run
        // may have kept a shorter history.
        let oldest: Option<i64> = self.connection.query_row("SELECT min(rev) FROM log", [], |row| row.get(0)).ok()?;
        if from.rev < self.rev && oldest.is_none_or(|oldest| from_sql(oldest) > from.rev + 1) {
            return None;
        }
        let sql = "SELECT rev, key, value FROM log WHERE rev > ?1 ORDER BY rev, seq";
        let mut query = self.connection.prepare_cached(sql).ok()?;
        let rows = query.query_map([to_sql(from.rev)], |row| {
            let rev: i64 = row.get(0)?;
            let (key, value): (String, Option<String>) = (row.get(1)?, row.get(2)?);
            let rev = from_sql(rev);
            Ok(match value {
                Some(value) => (rev, Change::Put(Entry { key, value: value.into(), rev })),
                None => (rev, Change::Delete { key, rev }),
            })
        });
        let mut events: Vec<Event> = Vec::new();
        for row in rows.ok()? {
            let (rev, change) = row.ok()?;
            if !subscriber.wants(key_of(&change)) {
                continue;
            }
            match events.last_mut() {
                Some(Event::Batch { at, changes }) if at.rev == rev => changes.push(change),
                _ => {
                    let at = Cursor { epoch: self.epoch.clone(), rev };
                    events.push(Event::Batch { at, changes: vec![change] });
                }
            }
        }
        Some(events)
    }

    /// Gives the whole state to those who fell behind and have room again.
    fn catch_up(&mut self) {
        let at = self.cursor();
        let connection = &self.connection;
        self.subscribers.retain_mut(|subscriber| {
            if !subscriber.behind {
                return true;
            }
            let Ok(mut room) = subscriber.events.try_reserve_many(2) else { return !subscriber.events.is_closed() };
            let mut state = Vec::new();
            for prefix in &subscriber.prefixes {
                match list(connection, prefix) {
                    Ok(entries) => state.extend(entries),
                    Err(error) => {
                        tracing::error!(%error, "the store cannot be read");
                        return true;
                    }
                }
            }
            state.sort_by(|a, b| a.key.cmp(&b.key));
            state.dedup_by(|a, b| a.key == b.key);
            let events = [Event::Reset { at: at.clone(), state }, Event::Live { at: at.clone() }];
            for (place, event) in room.by_ref().zip(events) {
                place.send(event);
            }
            drop(room);
            subscriber.behind = false;
            true
        });
    }
}

fn key_of(change: &Change) -> &str {
    match change {
        Change::Put(entry) => &entry.key,
        Change::Delete { key, .. } => key,
    }
}

fn deletion(keys: Vec<String>) -> Txn {
    Txn { expect: Vec::new(), ops: keys.into_iter().map(|key| Op::Delete { key }).collect() }
}

/// Revisions are SQLite integers: 63 bits.
fn to_sql(rev: u64) -> i64 {
    i64::try_from(rev).unwrap_or(i64::MAX)
}

fn from_sql(rev: i64) -> u64 {
    u64::try_from(rev).unwrap_or(0)
}

/// Why a transaction may not be applied now.
fn refusal(
    disk: &Transaction<'_>,
    txn: &Txn,
    leases: &std::collections::HashSet<LeaseId>,
) -> rusqlite::Result<Option<WriteError>> {
    for op in &txn.ops {
        if let Op::Put { lease: Some(lease), .. } = op
            && !leases.contains(lease)
        {
            return Ok(Some(WriteError::LeaseLost));
        }
    }
    for (key, expect) in &txn.expect {
        let rev = read(disk, key)?.map(|entry| entry.rev);
        let holds = match expect {
            Expect::Absent => rev.is_none(),
            Expect::Present => rev.is_some(),
            Expect::Rev(wanted) => rev == Some(*wanted),
        };
        if !holds {
            return Ok(Some(WriteError::Conflict { key: key.clone(), rev }));
        }
    }
    Ok(None)
}

fn apply(disk: &Transaction<'_>, txn: Txn, rev: u64) -> rusqlite::Result<Applied> {
    let mut changes = Vec::with_capacity(txn.ops.len());
    for (seq, op) in txn.ops.into_iter().enumerate() {
        let seq = i64::try_from(seq).unwrap_or(i64::MAX);
        let change = match op {
            Op::Put { key, value, lease } => {
                disk.prepare_cached("INSERT OR REPLACE INTO kv (key, value, rev, lease) VALUES (?1, ?2, ?3, ?4)")?
                    .execute(params![key, value, to_sql(rev), lease.map(|l| to_sql(l.0))])?;
                log(disk, rev, seq, &key, Some(&value))?;
                Change::Put(Entry { key, value: value.into(), rev })
            }
            Op::Delete { key } => {
                if disk.prepare_cached("DELETE FROM kv WHERE key = ?1")?.execute([&key])? == 0 {
                    continue;
                }
                log(disk, rev, seq, &key, None)?;
                Change::Delete { key, rev }
            }
        };
        changes.push(change);
    }
    Ok(Applied { rev, changes })
}

fn log(disk: &Transaction<'_>, rev: u64, seq: i64, key: &str, value: Option<&str>) -> rusqlite::Result<()> {
    let mut insert = disk.prepare_cached("INSERT INTO log (rev, seq, key, value) VALUES (?1, ?2, ?3, ?4)")?;
    insert.execute(params![to_sql(rev), seq, key, value]).map(|_| ())
}

fn read(connection: &Connection, key: &str) -> rusqlite::Result<Option<Entry>> {
    let mut query = connection.prepare_cached("SELECT key, value, rev FROM kv WHERE key = ?1")?;
    query.query_row([key], entry).optional()
}

fn list(connection: &Connection, prefix: &str) -> rusqlite::Result<Vec<Entry>> {
    // Keys are ASCII: the prefix followed by the last code point ends its range.
    let end = format!("{prefix}\u{10ffff}");
    let mut query =
        connection.prepare_cached("SELECT key, value, rev FROM kv WHERE key >= ?1 AND key < ?2 ORDER BY key")?;
    let rows = query.query_map([prefix, &end], entry)?;
    rows.collect()
}

fn entry(row: &rusqlite::Row<'_>) -> rusqlite::Result<Entry> {
    let value: String = row.get(1)?;
    Ok(Entry { key: row.get(0)?, value: value.into(), rev: from_sql(row.get(2)?) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_longer_history_than_before_promises_nothing_that_was_trimmed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let put = |n: u64| Op::Put { key: format!("k/{n}"), value: n.to_string(), lease: None };
        let store = Store::open(&path, StoreSettings { history: 4, ..StoreSettings::default() }).unwrap();
        let (start, _) = store.list("k/").await.unwrap();
        for n in 0..20 {
            store.commit(Txn { expect: Vec::new(), ops: vec![put(n)] }).await.unwrap();
        }
        store.close().await;
        drop(store);
        let store = Store::open(&path, StoreSettings::default()).unwrap();
        let mut events = store.subscribe(&["k/"], Some(start));
        match events.next().await.unwrap() {
            Event::Reset { state, .. } => assert_eq!(state.len(), 20),
            other => panic!("resumed over a gap: {other:?}"),
        }
        let (at, _) = store.list("k/").await.unwrap();
        let mut events = store.subscribe(&["k/"], Some(Cursor { rev: at.rev - 2, ..at.clone() }));
        assert!(matches!(events.next().await.unwrap(), Event::Batch { at: first, .. } if first.rev == at.rev - 1));
        store.close().await;
    }
}
