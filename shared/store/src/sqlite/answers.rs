//! First answers to hooks, so that a repeat gets the same answer, across a restart too.

use super::Embedded;
use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, params};
use std::time::Duration;
use streamgate_core::id::fingerprint;
use streamgate_core::ports::{Answers, CallState, StoreError};

/// Longest time that an answer is kept, in milliseconds: a time further ahead was written by a wrong clock.
const LONGEST_MS: i64 = 25 * 60 * 60 * 1000;

impl Answers for Embedded {
    /// Never in work elsewhere: only this process uses the store.
    async fn begin(&self, key: &str, _within: Duration) -> Result<CallState, StoreError> {
        let (key, now) = (fingerprint(key), super::now_ms());
        let found = self.inbox.query(move |connection| find(connection, key, now)).await?;
        Ok(found.map_or(CallState::First, |answer| CallState::Answered(answer.into())))
    }

    async fn remember(&self, key: &str, answer: Bytes, window: Duration) -> Result<(), StoreError> {
        let until = super::now_ms().saturating_add(super::millis(window));
        self.writer.remember(fingerprint(key), answer, until).await
    }

    /// Only the gateway's memory knows which hooks are in work.
    fn forget(&self, _key: &str) -> impl Future<Output = Result<(), StoreError>> + Send {
        std::future::ready(Ok(()))
    }
}

fn find(connection: &Connection, key: [u8; 16], now: i64) -> rusqlite::Result<Option<Vec<u8>>> {
    let sql = "SELECT answer FROM answers WHERE key = ?1 AND until > ?2";
    connection.prepare_cached(sql)?.query_row(params![key, now], |row| row.get(0)).optional()
}

/// Deletes answers whose time is over, or further ahead than possible.
pub(super) fn purge(connection: &Connection, now: i64) -> rusqlite::Result<()> {
    let forget = "DELETE FROM answers WHERE until <= ?1 OR until > ?2";
    connection.prepare_cached(forget)?.execute(params![now, now.saturating_add(LONGEST_MS)]).map(drop)
}

/// `until`: in milliseconds since the Unix epoch.
pub(super) fn insert(connection: &Connection, key: [u8; 16], answer: &[u8], until: i64) -> rusqlite::Result<()> {
    let insert = "INSERT OR REPLACE INTO answers (key, until, answer) VALUES (?1, ?2, ?3)";
    connection.prepare_cached(insert)?.execute(params![key, until, answer]).map(drop)
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
        insert(&connection, one, b"first", 2000).unwrap();
        assert_eq!(find(&connection, one, 1999).unwrap().as_deref(), Some(&b"first"[..]));
        assert_eq!(find(&connection, one, 2000).unwrap(), None);
        assert_eq!(find(&connection, two, 1000).unwrap(), None);
        insert(&connection, two, b"later", 3000).unwrap();
        insert(&connection, fingerprint("wrong clock"), b"far", 3000 + LONGEST_MS).unwrap();
        purge(&connection, 2000).unwrap();
        let kept: i64 = connection.query_row("SELECT count(*) FROM answers", [], |row| row.get(0)).unwrap();
        assert_eq!(kept, 1, "the first is gone from the file too");
    }
}
