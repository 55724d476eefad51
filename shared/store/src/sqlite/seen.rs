//! Seen keys: the accepted events, by fingerprint and time.

use rusqlite::{Connection, params};
use streamgate_core::id::fingerprint;

/// Keys removed at a time: about a millisecond of work.
const PURGE_STEP: i64 = 2000;

/// Whether the key was seen after `since`, in milliseconds since the Unix epoch.
pub(super) fn contains(connection: &Connection, key: &str, since: i64) -> rusqlite::Result<bool> {
    let mut known = connection.prepare_cached("SELECT 1 FROM seen WHERE key = ?1 AND at > ?2")?;
    known.exists(params![fingerprint(key), since])
}

/// Remembers the key. Returns whether it is new: never seen, or not since `since`.
pub(super) fn insert(connection: &Connection, key: &str, now: i64, since: i64) -> rusqlite::Result<bool> {
    let key = fingerprint(key);
    let mut insert = connection.prepare_cached("INSERT OR IGNORE INTO seen (key, at) VALUES (?1, ?2)")?;
    if insert.execute(params![key, now])? == 1 {
        return Ok(true);
    }
    let mut forget = connection.prepare_cached("DELETE FROM seen WHERE key = ?1 AND at <= ?2")?;
    if forget.execute(params![key, since])? == 0 {
        return Ok(false);
    }
    insert.execute(params![key, now]).map(|inserted| inserted == 1)
}

/// Deletes the oldest keys, a bounded number at a time. Ids grow with time, so no index over time is needed. A key from
/// the future was written while the clock was wrong: it must not keep the others from being deleted.
pub(super) fn purge(connection: &Connection, now: i64, keep_ms: i64) -> rusqlite::Result<()> {
    let kept = now.saturating_sub(keep_ms)..=now.saturating_add(keep_ms);
    let mut oldest = connection.prepare_cached("SELECT id, at FROM seen ORDER BY id LIMIT ?1")?;
    let mut rows = oldest.query(params![PURGE_STEP])?;
    let mut last = None;
    while let Some(row) = rows.next()? {
        if kept.contains(&row.get::<_, i64>(1)?) {
            break;
        }
        last = Some(row.get::<_, i64>(0)?);
    }
    drop(rows);
    if let Some(last) = last {
        connection.prepare_cached("DELETE FROM seen WHERE id <= ?1")?.execute(params![last])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sqlite::schema;

    #[test]
    fn keys_are_forgotten_when_they_are_old_or_from_the_future() {
        let directory = tempfile::tempdir().unwrap();
        let connection = schema::open_owner(&directory.path().join("store.db"), 1 << 20).unwrap();
        for (key, at) in [("future", 10_000), ("old", 100), ("kept", 600), ("older, but later", 1)] {
            connection.execute("INSERT INTO seen (key, at) VALUES (?1, ?2)", params![key.as_bytes(), at]).unwrap();
        }
        purge(&connection, 1000, 500).unwrap();
        let mut left = connection.prepare("SELECT at FROM seen ORDER BY id").unwrap();
        let left: Vec<i64> = left.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
        assert_eq!(left, [600, 1], "the oldest first, as far as one that is kept");
    }
}
