//! The queue's rows: how an event comes in, changes, and goes.

use super::{millis, now_ms, row, seen};
use rusqlite::{Connection, params};
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::{envelope::Envelope, ports::Settlement};

/// How a delivery's row changes.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) seq: i64,
    pub(super) route: Option<Arc<str>>,
    pub(super) settlement: Settlement,
}

/// Key and event together: seen is never recorded before the event is, nor without it. The event's number; none for a repeat.
pub(super) fn enqueue(
    connection: &Connection,
    envelope: &Envelope,
    now: i64,
    since: i64,
) -> rusqlite::Result<Option<i64>> {
    if !seen::insert(connection, &envelope.key, now, since)? {
        return Ok(None);
    }
    insert_event(connection, envelope)?;
    Ok(Some(connection.last_insert_rowid()))
}

/// How many there were.
pub(super) fn delete(connection: &Connection, rows: &[i64]) -> rusqlite::Result<usize> {
    let mut delete = connection.prepare_cached("DELETE FROM events WHERE seq = ?1")?;
    rows.iter().map(|seq| delete.execute(params![seq])).sum()
}

/// Puts an event at the end of the queue.
pub(super) fn insert_event(connection: &Connection, envelope: &Envelope) -> rusqlite::Result<()> {
    let sql = "INSERT INTO events (due_at, attempt, route, app, kind, webhook_id, type, headers, body)
               VALUES (0, ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
    connection.prepare_cached(sql)?.execute(params![
        envelope.attempt,
        envelope.route,
        envelope.app,
        envelope.kind.as_str(),
        envelope.id,
        envelope.event_type,
        row::headers_json(envelope),
        &envelope.body[..],
    ])?;
    Ok(())
}

/// A row that is gone was settled before by a write whose answer was lost: settling it again changes nothing.
pub(super) fn settle(connection: &Connection, change: &Change, now: i64) -> rusqlite::Result<()> {
    match &change.settlement {
        Settlement::Done | Settlement::Superseded => {
            delete(connection, &[change.seq])?;
        }
        Settlement::Retry { delay, attempt } => {
            let sql = "UPDATE events SET due_at = ?2, attempt = ?3, route = ?4 WHERE seq = ?1";
            let due = now.saturating_add(millis(*delay));
            connection.prepare_cached(sql)?.execute(params![change.seq, due, attempt, change.route.as_deref()])?;
        }
        Settlement::Wait { delay } => {
            let due = now.saturating_add(millis(*delay));
            connection
                .prepare_cached("UPDATE events SET due_at = ?2 WHERE seq = ?1")?
                .execute(params![change.seq, due])?;
        }
        Settlement::Dead { reason, error } => {
            let sql = "INSERT INTO dead
                           (reason, error, died_at, route, attempt, app, kind, webhook_id, type, headers, body)
                       SELECT ?2, ?3, ?4, ?5, attempt, app, kind, webhook_id, type, headers, body
                       FROM events WHERE seq = ?1";
            connection.prepare_cached(sql)?.execute(params![
                change.seq,
                reason.as_str(),
                error,
                now,
                change.route.as_deref()
            ])?;
            delete(connection, &[change.seq])?;
        }
    }
    Ok(())
}

/// Retries that are due later than any could be.
pub(super) fn bring_forward(connection: &Connection, longest_wait: Duration) -> rusqlite::Result<()> {
    let latest = now_ms().saturating_add(millis(longest_wait));
    connection.execute("UPDATE events SET due_at = ?1 WHERE due_at > ?1", params![latest]).map(drop)
}
