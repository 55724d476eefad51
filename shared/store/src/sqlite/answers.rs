//! First answers to hooks, so that a repeat gets them again, across a restart too.

use super::Embedded;
use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, params};
use std::time::Duration;
use streamgate_core::id::fingerprint;
use streamgate_core::ports::{Answers, StoreError, Turn};

/// How long an answer is remembered, in milliseconds. Stream asks once; who repeats is a proxy on the way.
const WINDOW_MS: i64 = 2 * 60 * 1000;

impl Answers for Embedded {
    /// Never in work elsewhere: this process is alone with its store.
    async fn begin(&self, key: &str, _within: Duration) -> Result<Turn, StoreError> {
        let (key, now) = (fingerprint(key), super::now_ms());
        let found = self.inbox.query(move |connection| find(connection, key, now)).await?;
        Ok(found.map_or(Turn::First, |answer| Turn::Answered(answer.into())))
    }

    async fn remember(&self, key: &str, answer: Bytes) -> Result<(), StoreError> {
        self.writer.remember(fingerprint(key), answer).await
    }
}

fn find(connection: &Connection, key: [u8; 16], now: i64) -> rusqlite::Result<Option<Vec<u8>>> {
    let sql = "SELECT answer FROM answers WHERE key = ?1 AND at > ?2";
    connection.prepare_cached(sql)?.query_row(params![key, now.saturating_sub(WINDOW_MS)], |row| row.get(0)).optional()
}

/// Forgets answers whose time is over, or has not come: that was a wrong clock.
pub(super) fn purge(connection: &Connection, now: i64) -> rusqlite::Result<()> {
    let forget = "DELETE FROM answers WHERE at <= ?1 OR at > ?2";
    let kept = params![now.saturating_sub(WINDOW_MS), now.saturating_add(WINDOW_MS)];
    connection.prepare_cached(forget)?.execute(kept).map(drop)
}

pub(super) fn insert(connection: &Connection, key: [u8; 16], answer: &[u8], now: i64) -> rusqlite::Result<()> {
    let insert = "INSERT OR REPLACE INTO answers (key, at, answer) VALUES (?1, ?2, ?3)";
    connection.prepare_cached(insert)?.execute(params![key, now, answer]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sqlite::schema;

    #[test]
    fn answers_are_kept_for_their_window() {
        let directory = tempfile::tempdir().unwrap();
        let connection = schema::open_owner(&directory.path().join("store.db"), 1 << 20).unwrap();
        let (one, two) = (fingerprint("one"), fingerprint("two"));
        insert(&connection, one, b"first", 1000).unwrap();
        assert_eq!(find(&connection, one, 1000).unwrap().as_deref(), Some(&b"first"[..]));
        assert_eq!(find(&connection, one, 1000 + WINDOW_MS).unwrap(), None);
        assert_eq!(find(&connection, two, 1000).unwrap(), None);
        insert(&connection, two, b"later", 1000 + WINDOW_MS).unwrap();
        purge(&connection, 1000 + WINDOW_MS).unwrap();
        let kept: i64 = connection.query_row("SELECT count(*) FROM answers", [], |row| row.get(0)).unwrap();
        assert_eq!(kept, 1, "the first is gone from the file too");
    }
}
