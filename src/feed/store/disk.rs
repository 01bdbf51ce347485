//! The store's file: SQLite in WAL mode with synchronous=FULL, plain tables
//! that `sqlite3` shows to anybody. Knows nothing of guards and subscribers.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use rusqlite::{Connection, ErrorCode, OptionalExtension, TransactionBehavior, params};

use super::StoreError;
use super::state::{Held, Revision, State};
use super::writer::Plan;
use crate::feed::{Change, Entry, Epoch};

/// The schema of this version, in `PRAGMA user_version`.
const SCHEMA: i64 = 1;

const TABLES: &str = "
    CREATE TABLE kv (key TEXT PRIMARY KEY, value TEXT NOT NULL, rev INTEGER NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE log (rev INTEGER NOT NULL, seq INTEGER NOT NULL, key TEXT NOT NULL, op TEXT NOT NULL, value TEXT,
                      PRIMARY KEY (rev, seq)) STRICT, WITHOUT ROWID;
    CREATE TABLE meta (one INTEGER PRIMARY KEY CHECK (one = 1), epoch TEXT NOT NULL, rev INTEGER NOT NULL,
                       floor INTEGER NOT NULL, reserved INTEGER NOT NULL) STRICT;
    PRAGMA user_version = 1;";

/// One change of the file.
pub(super) enum DiskOp {
    Put { key: String, value: Arc<str>, rev: u64 },
    Delete { key: String, rev: u64 },
}

/// A group was not written.
pub(super) enum Failure {
    /// Nothing of it is in the file.
    Nothing(String),
    /// It may be in the file.
    Doubt(String),
}

/// The file, held by one process.
pub(super) struct Disk {
    path: Option<PathBuf>,
    connection: Option<Connection>,
    /// Revisions up to here are promised to writes that live in memory.
    reserved: u64,
    /// The history on disk holds every revision after this one.
    floor: u64,
    lock: Option<File>,
    /// SQLite transactions so far, and how the next commit is made to fail.
    #[cfg(test)]
    pub(super) writes: usize,
    #[cfg(test)]
    pub(super) break_commit: Option<Break>,
}

/// A commit whose sync fails: its record is seen again after a reopen, or not.
#[cfg(test)]
#[derive(Clone, Copy)]
pub(super) enum Break {
    Written,
    Lost,
}

impl Disk {
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |error| StoreError::Folder { path, error }
        };
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !folder.exists() {
            DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(at(folder))?;
        }
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock_path = PathBuf::from(lock_path);
        let lock = private_file(&lock_path).map_err(at(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StoreError::Busy { path: path.to_owned() }),
            Err(TryLockError::Error(error)) => return Err(StoreError::Folder { path: lock_path, error }),
        }
        // Made before SQLite does, with the mode that its -wal and -shm take over.
        let file = private_file(path).map_err(at(path))?;
        file.set_permissions(std::fs::Permissions::from_mode(0o600)).map_err(at(path))?;
        File::open(folder).and_then(|f| f.sync_all()).map_err(at(folder))?;
        let connection = connect(path).map_err(|e| store_error(path, &e))?;
        Self::new(Some(path.to_owned()), connection, Some(lock)).prepared(path)
    }

    pub(super) fn in_memory() -> Result<Self, StoreError> {
        let path = Path::new(":memory:");
        let connection = Connection::open_in_memory().map_err(|e| store_error(path, &e))?;
        Self::new(None, connection, None).prepared(path)
    }

    fn new(path: Option<PathBuf>, connection: Connection, lock: Option<File>) -> Self {
        Self {
            path,
            connection: Some(connection),
            reserved: 0,
            floor: 0,
            lock,
            #[cfg(test)]
            writes: 0,
            #[cfg(test)]
            break_commit: None,
        }
    }

    /// Makes the tables where there are none; refuses a newer schema.
    fn prepared(mut self, path: &Path) -> Result<Self, StoreError> {
        let fail = |e: &rusqlite::Error| store_error(path, e);
        let Some(connection) = &mut self.connection else { return Ok(self) };
        let found: i64 = connection.query_row("PRAGMA user_version", [], |r| r.get(0)).map_err(|e| fail(&e))?;
        if found > SCHEMA {
            return Err(StoreError::Newer { path: path.to_owned(), found, known: SCHEMA });
        }
        if found == 0 {
            let tables: i64 =
                connection.query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get(0)).map_err(|e| fail(&e))?;
            if tables > 0 {
                let why = "it is a database of something else".to_owned();
                return Err(StoreError::Corrupt { path: path.to_owned(), why });
            }
            let tx = connection.transaction().map_err(|e| fail(&e))?;
            tx.execute_batch(TABLES).map_err(|e| fail(&e))?;
            let epoch = new_epoch().map_err(|why| StoreError::Engine { path: path.to_owned(), why })?;
            tx.execute("INSERT INTO meta VALUES (1, ?1, 0, 0, 0)", params![epoch]).map_err(|e| fail(&e))?;
            tx.commit().map_err(|e| fail(&e))?;
        }
        Ok(self)
    }

    /// Reads the whole file.
    pub(super) fn load(&mut self, changes_max: usize, bytes_max: usize) -> Result<State, StoreError> {
        let path = self.path.clone().unwrap_or_else(|| ":memory:".into());
        self.try_load(changes_max, bytes_max).map_err(|e| store_error(&path, &e))
    }

    fn try_load(&mut self, changes_max: usize, bytes_max: usize) -> rusqlite::Result<State> {
        let connection = self.connection.as_mut().ok_or(rusqlite::Error::InvalidQuery)?;
        let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let (epoch, mut rev, mut floor, reserved): (String, u64, u64, u64) =
            tx.query_row("SELECT epoch, rev, floor, reserved FROM meta", [], |r| {
                Ok((r.get(0)?, r.get(1)?, r.get(2)?, r.get(3)?))
            })?;
        if reserved > 0 {
            // The last process had keys in memory that vanished with it, and no
            // history tells so: whoever resumes must start over.
            rev = rev.max(reserved);
            floor = rev;
            tx.execute("DELETE FROM log", [])?;
            tx.execute("UPDATE meta SET rev = ?1, floor = ?1, reserved = 0", params![rev])?;
        }
        let mut state = State::new(Epoch(epoch.into()), rev, floor, changes_max, bytes_max);
        {
            let mut query = tx.prepare("SELECT key, value, rev FROM kv")?;
            let mut rows = query.query([])?;
            while let Some(row) = rows.next()? {
                let value: Arc<str> = row.get::<_, String>(1)?.into();
                let held = Held { value, rev: row.get(2)?, lease: None };
                state.kv.insert(row.get::<_, String>(0)?.into(), held);
            }
            let mut query = tx.prepare("SELECT rev, key, op, value FROM log WHERE rev > ?1 ORDER BY rev, seq")?;
            let mut rows = query.query(params![floor])?;
            let mut open: Option<Revision> = None;
            while let Some(row) = rows.next()? {
                let (rev, key): (u64, String) = (row.get(0)?, row.get(1)?);
                let change = match row.get::<_, Option<String>>(3)? {
                    Some(value) => Change::Put(Entry { key, value: value.into(), rev }),
                    None => Change::Delete { key, rev },
                };
                match &mut open {
                    Some(revision) if revision.rev == rev => revision.changes.push(change),
                    _ => {
                        if let Some(done) = open.replace(Revision { rev, changes: vec![change] }) {
                            state.remember(done);
                        }
                    }
                }
            }
            if let Some(done) = open {
                state.remember(done);
            }
        }
        tx.commit()?;
        self.reserved = 0;
        self.floor = floor;
        Ok(state)
    }

    /// Writes a group durably, whole or not at all.
    pub(super) fn write(&mut self, plan: &Plan) -> Result<(), Failure> {
        let nothing = |e: rusqlite::Error| Failure::Nothing(e.to_string());
        let old_floor = self.floor;
        let Some(connection) = &mut self.connection else { return Err(Failure::Nothing("the store is closed".into())) };
        let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(nothing)?;
        (|| {
            let mut put = tx.prepare_cached("INSERT OR REPLACE INTO kv VALUES (?1, ?2, ?3)")?;
            let mut delete = tx.prepare_cached("DELETE FROM kv WHERE key = ?1")?;
            let mut log = tx.prepare_cached("INSERT INTO log VALUES (?1, ?2, ?3, ?4, ?5)")?;
            for (seq, op) in plan.disk.iter().enumerate() {
                match op {
                    DiskOp::Put { key, value, rev } => {
                        put.execute(params![key, value, rev])?;
                        log.execute(params![rev, seq, key, "put", value])?;
                    }
                    DiskOp::Delete { key, rev } => {
                        delete.execute(params![key])?;
                        log.execute(params![rev, seq, key, "delete", None::<&str>])?;
                    }
                }
            }
            if plan.floor > old_floor {
                tx.prepare_cached("DELETE FROM log WHERE rev <= ?1")?.execute(params![plan.floor])?;
            }
            tx.prepare_cached("UPDATE meta SET rev = ?1, floor = ?2, reserved = max(reserved, ?3)")?
                .execute(params![plan.rev, plan.floor.max(old_floor), plan.reserve.unwrap_or(0)])?;
            Ok(())
        })()
        .map_err(nothing)?;
        #[cfg(test)]
        let broken = self.break_commit.take();
        #[cfg(test)]
        if let Some(how) = broken {
            match how {
                Break::Written => tx.commit().map_err(nothing)?,
                Break::Lost => tx.rollback().map_err(nothing)?,
            }
            self.connection = None;
            return Err(Failure::Doubt("made to fail".into()));
        }
        #[cfg(test)]
        {
            self.writes += 1;
        }
        if let Err(error) = tx.commit() {
            // A full disk shows while pages are written, before the commit
            // record; only a failed sync leaves it open whether it will be seen.
            if self.path.is_none() || error.sqlite_error_code() == Some(ErrorCode::DiskFull) {
                return Err(Failure::Nothing(error.to_string()));
            }
            self.connection = None;
            return Err(Failure::Doubt(error.to_string()));
        }
        self.floor = plan.floor.max(old_floor);
        self.reserved = self.reserved.max(plan.reserve.unwrap_or(0));
        Ok(())
    }

    /// Opens the file again if a failure closed it; answers the revision found
    /// then. `None`: it was open all the time.
    pub(super) fn reopen(&mut self) -> Result<Option<u64>, String> {
        let (None, Some(path)) = (&self.connection, &self.path) else { return Ok(None) };
        let connection = connect(path).map_err(|e| e.to_string())?;
        let (rev, floor, reserved) = connection
            .query_row("SELECT rev, floor, reserved FROM meta", [], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?)))
            .map_err(|e| e.to_string())?;
        self.connection = Some(connection);
        (self.floor, self.reserved) = (floor, reserved);
        Ok(Some(rev))
    }

    pub(super) fn reserved(&self) -> u64 {
        self.reserved
    }

    pub(super) fn close(&mut self) {
        if let Some(connection) = self.connection.take()
            && let Err((_, error)) = connection.close()
        {
            tracing::warn!(%error, "the store's file did not close cleanly; it is recovered at the next start");
        }
        // Unlocked by hand: a child process that is just being started may hold
        // a copy of the descriptor for a moment.
        if let Some(Err(error)) = self.lock.take().map(|lock| lock.unlock()) {
            tracing::debug!(%error, "the store's lock goes with the process");
        }
    }

    #[cfg(test)]
    pub(super) fn connection(&mut self) -> &mut Connection {
        self.connection.as_mut().unwrap()
    }

    /// As if a sync had failed in the middle of a commit.
    #[cfg(test)]
    pub(super) fn lose_connection(&mut self) {
        self.connection = None;
    }
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    // Somebody may look with the sqlite3 shell while the node runs.
    connection.busy_timeout(Duration::from_secs(2))?;
    let _mode: Option<String> = connection.query_row("PRAGMA journal_mode = WAL", [], |r| r.get(0)).optional()?;
    connection.execute_batch("PRAGMA synchronous = FULL; PRAGMA cache_size = -8192;")?;
    Ok(connection)
}

/// Opens or makes a file that only this user may read.
fn private_file(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

fn new_epoch() -> Result<String, String> {
    let mut bytes = [0_u8; 16];
    SystemRandom::new().fill(&mut bytes).map_err(|_| "the system has no random bytes".to_owned())?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

fn store_error(path: &Path, error: &rusqlite::Error) -> StoreError {
    let (path, why) = (path.to_owned(), error.to_string());
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => StoreError::Corrupt { path, why },
        Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly | ErrorCode::PermissionDenied | ErrorCode::DiskFull) => {
            StoreError::Folder { path, error: std::io::Error::other(why) }
        }
        // The lock file was free, so it is somebody's shell that holds it.
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Busy { path },
        None if !matches!(error, rusqlite::Error::SqliteFailure(..)) => StoreError::Corrupt { path, why },
        _ => StoreError::Engine { path, why },
    }
}
