//! The file's format: tables, migrations, and how connections are opened.

use super::directory::{self, OpenError};
use rusqlite::{Connection, OpenFlags};
use std::cmp::Ordering;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

/// Each step migrates the file from `user_version` = its index to the next. Never change a released step.
const MIGRATIONS: [&str; 8] = [
    "
    -- What is owed. A row leaves when it is settled. due_at = 0: never failed; else ready from then on (ms, Unix).
    CREATE TABLE events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        due_at INTEGER NOT NULL,
        attempt INTEGER NOT NULL,
        route TEXT,
        app TEXT NOT NULL,
        kind TEXT NOT NULL,
        webhook_id TEXT NOT NULL,
        type TEXT NOT NULL,
        headers TEXT NOT NULL,
        body BLOB NOT NULL
    );
    CREATE INDEX events_due ON events (due_at) WHERE due_at > 0;
    -- What was accepted: the fingerprint of its key, in order of time.
    CREATE TABLE seen (
        id INTEGER PRIMARY KEY,
        key BLOB NOT NULL UNIQUE,
        at INTEGER NOT NULL
    );
    CREATE TABLE dead (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        reason TEXT NOT NULL,
        error TEXT,
        died_at INTEGER NOT NULL,
        attempt INTEGER NOT NULL,
        route TEXT,
        app TEXT NOT NULL,
        kind TEXT NOT NULL,
        webhook_id TEXT NOT NULL,
        type TEXT NOT NULL,
        headers TEXT NOT NULL,
        body BLOB NOT NULL
    );
",
    "
    -- What hooks were answered first, by the fingerprint of their key.
    CREATE TABLE answers (
        key BLOB PRIMARY KEY,
        at INTEGER NOT NULL,
        answer BLOB NOT NULL
    );
    CREATE INDEX answers_at ON answers (at);
",
    "
    -- How often a process died that may have had the event in hand.
    ALTER TABLE events ADD COLUMN deliveries INTEGER NOT NULL DEFAULT 0;
    -- Holds a row while a process hands events out. One that is found at the start was left by a process that died; alone: the
    -- event that it handed out last while nothing else was in hand.
    CREATE TABLE running (since INTEGER NOT NULL, alone INTEGER);
",
    "
    -- Answers are kept for as long as each is to be: until when, instead of since when.
    DROP INDEX answers_at;
    ALTER TABLE answers RENAME COLUMN at TO until;
    UPDATE answers SET until = until + 120000;
    CREATE INDEX answers_until ON answers (until);
",
    "
    -- How long a row that waits has to wait in all: what is due later was written while the clock was ahead.
    ALTER TABLE events ADD COLUMN wait_ms INTEGER;
",
    "
    -- So that the dead letters are counted without a look at their bodies.
    CREATE INDEX dead_died_at ON dead (died_at);
",
    "
    -- The failed attempts of an event, as JSON.
    ALTER TABLE events ADD COLUMN attempts TEXT;
    ALTER TABLE dead ADD COLUMN attempts TEXT;
",
    "
    -- The route that an event is parked for: due_at is -1 then, and it waits until that route takes it.
    ALTER TABLE events ADD COLUMN parked TEXT;
    CREATE INDEX events_parked ON events (parked, seq) WHERE parked IS NOT NULL;
    -- Whether a route runs or was paused, as JSON; of two records the later epoch holds.
    CREATE TABLE routes (
        name TEXT PRIMARY KEY,
        epoch INTEGER NOT NULL,
        record TEXT NOT NULL
    );
",
];
const VERSION: i64 = MIGRATIONS.len() as i64;

/// With this size, events of some 2 KB lie three to a page, instead of one with half of the page empty.
const PAGE_SIZE: u64 = 8192;
/// Room above the limit for what must never be refused: settlements, dead letters, keys.
const HEADROOM: u64 = 64 << 20;
/// Size of the write-ahead log between checkpoints (SQLite's 1000 pages, and a large commit), to which it is truncated.
/// What it takes beyond, while a reader blocks checkpoints, counts as used.
pub(super) const LOG_BYTES: u64 = 16 << 20;
/// Transactions of the command line alongside the owner are short; longer than this is a fault.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Opens the owner's writing connection: creates or migrates the file.
pub(super) fn open_owner(path: &Path, max_bytes: u64) -> Result<Connection, OpenError> {
    let failed = |error| OpenError::Database { path: path.to_owned(), error };
    let mut connection = Connection::open(path).map_err(failed)?;
    connection.pragma_update(None, "page_size", PAGE_SIZE as i64).map_err(failed)?;
    durable(&connection).map_err(failed)?;
    migrate(&mut connection, path)?;
    let max_pages = max_bytes.saturating_add(max_bytes / 4).saturating_add(HEADROOM) / PAGE_SIZE;
    let max_pages = i64::try_from(max_pages).unwrap_or(i64::MAX);
    connection.pragma_update(None, "max_page_count", max_pages).map_err(failed)?;
    let directory = path.parent().unwrap_or(Path::new("."));
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(|error| OpenError::Directory { path: directory.to_owned(), error })?;
    Ok(connection)
}

/// Opens a connection that reads alongside the writer.
pub(super) fn open_reader(path: &Path) -> Result<Connection, OpenError> {
    let failed = |error| OpenError::Database { path: path.to_owned(), error };
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(failed)?;
    connection.busy_timeout(BUSY_TIMEOUT).map_err(failed)?;
    Ok(connection)
}

/// Checks the store of a data directory without changing anything.
pub fn inspect(data_dir: &Path) -> Result<(), OpenError> {
    let path = directory::database(data_dir);
    if !path.exists() {
        return Err(OpenError::Absent { path: data_dir.to_owned() });
    }
    let found = version(&open_reader(&path)?).map_err(|error| OpenError::Database { path: path.clone(), error })?;
    expect_version(found, &path)
}

/// Opens a connection of another process, alongside the owner or without one: never creates, never migrates.
pub(super) fn open_alongside(path: &Path) -> Result<Connection, OpenError> {
    let failed = |error| OpenError::Database { path: path.to_owned(), error };
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(failed)?;
    durable(&connection).map_err(failed)?;
    expect_version(version(&connection).map_err(failed)?, path)?;
    Ok(connection)
}

fn expect_version(found: i64, path: &Path) -> Result<(), OpenError> {
    let (path, known) = (path.to_owned(), VERSION);
    match found.cmp(&VERSION) {
        Ordering::Equal => Ok(()),
        Ordering::Greater => Err(OpenError::Newer { path, found, known }),
        Ordering::Less => Err(OpenError::Older { path, found, known }),
    }
}

/// WAL with an fsync at every commit: what callers were promised is in the file, whatever happens next. Never less. And
/// deleted content is overwritten: messages must not remain in the file after they were handled or erased.
fn durable(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "secure_delete", "on")?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    connection.pragma_update(None, "journal_size_limit", LOG_BYTES as i64)?;
    connection.pragma_update(None, "synchronous", "full")
}

fn version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, "user_version", |row| row.get(0))
}

fn migrate(connection: &mut Connection, path: &Path) -> Result<(), OpenError> {
    let failed = |error| OpenError::Database { path: path.to_owned(), error };
    let found = version(connection).map_err(failed)?;
    if found > VERSION {
        return Err(OpenError::Newer { path: path.to_owned(), found, known: VERSION });
    }
    let transaction = connection.transaction().map_err(failed)?;
    for step in MIGRATIONS.iter().skip(usize::try_from(found).unwrap_or(0)) {
        transaction.execute_batch(step).map_err(failed)?;
    }
    transaction.pragma_update(None, "user_version", VERSION).map_err(failed)?;
    transaction.commit().map_err(failed)
}

/// Writes without changing anything: fails where a commit would fail.
pub(super) fn probe(connection: &Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "user_version", VERSION)
}

/// Lets the log restart from its beginning, if no reader needs it, and with that be truncated to its limit. Does not
/// wait.
pub(super) fn cut_log(connection: &Connection) -> rusqlite::Result<()> {
    let pages = |row: &rusqlite::Row<'_>| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?, row.get::<_, i64>(2)?));
    let (busy, in_log, copied) = connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], pages)?;
    if busy != 0 || in_log != copied {
        return Ok(());
    }
    connection.busy_timeout(Duration::ZERO)?;
    let written = probe(connection);
    connection.busy_timeout(BUSY_TIMEOUT)?;
    written
}

/// Copies the log into the file and empties it: deleted text remains in the log too. Returns whether it succeeded;
/// while a reader uses an older state, the log is emptied the next time.
pub(super) fn empty_log(connection: &Connection) -> rusqlite::Result<bool> {
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0)).map(|busy| busy == 0)
}

/// SQLite's `data_version`: it changes after each commit of another connection, in this process or another.
pub(super) fn data_version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, "data_version", |row| row.get(0))
}

/// Bytes of the file in use.
pub(super) fn used_bytes(connection: &Connection) -> rusqlite::Result<u64> {
    let pragma = |name| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let pages = pragma("page_count")?.saturating_sub(pragma("freelist_count")?);
    Ok(u64::try_from(pages).unwrap_or(0).saturating_mul(PAGE_SIZE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_file_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.db");
        drop(open_owner(&path, 1 << 20).unwrap());
        let connection = Connection::open(&path).unwrap();
        connection.pragma_update(None, "user_version", VERSION + 1).unwrap();
        for error in [open_owner(&path, 1 << 20).unwrap_err(), open_alongside(&path).unwrap_err()] {
            assert!(error.to_string().contains("newer streamgate"), "{error}");
        }
        assert_eq!(version(&connection).unwrap(), VERSION + 1);
    }

    #[test]
    fn an_older_file_is_migrated_by_its_owner_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.db");
        drop(Connection::open(&path).unwrap().pragma_update(None, "journal_mode", "wal"));
        assert!(matches!(open_alongside(&path), Err(OpenError::Older { found: 0, .. })));
        let connection = open_owner(&path, 1 << 20).unwrap();
        assert_eq!(version(&connection).unwrap(), VERSION);
        assert!(open_alongside(&path).is_ok());
    }

    #[test]
    fn commits_are_synchronous() {
        let directory = tempfile::tempdir().unwrap();
        let connection = open_owner(&directory.path().join("store.db"), 1 << 20).unwrap();
        let pragma = |name| connection.pragma_query_value(None, name, |row| row.get::<_, rusqlite::types::Value>(0));
        assert_eq!(pragma("journal_mode").unwrap(), rusqlite::types::Value::Text("wal".into()));
        assert_eq!(pragma("synchronous").unwrap(), rusqlite::types::Value::Integer(2));
    }
}
