//! The queue's rows: how they are inserted, changed and deleted.

use super::{millis, now_ms, row, seen};
use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use std::sync::Arc;
use streamgate_core::{envelope::Envelope, ports::Settlement, retry::ALONE_FROM};

/// How a delivery's row changes.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) seq: i64,
    pub(super) route: Option<Arc<str>>,
    pub(super) settlement: Settlement,
    /// The record of the attempts so far, if one was added.
    pub(super) attempts: Option<String>,
}

/// Inserts key and event together: a key is never recorded before its event, nor without it. Returns the event's
/// number, or `None` for a repeat.
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

/// Deletes rows. Returns how many existed.
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

/// `attempts`: the record of the attempts so far; `None` leaves the stored one. A row that is gone was settled before
/// by a write whose result was lost: settling it again changes nothing.
pub(super) fn settle(
    connection: &Connection,
    change: &Change,
    attempts: Option<&str>,
    now: i64,
) -> rusqlite::Result<()> {
    match &change.settlement {
        Settlement::Done | Settlement::Superseded => {
            delete(connection, &[change.seq])?;
        }
        Settlement::Retry { delay, attempt } => {
            let sql = "UPDATE events SET due_at = ?2 + ?5, wait_ms = ?5, attempt = ?3, route = ?4, parked = NULL,
                           attempts = coalesce(?6, attempts), deliveries = 0 WHERE seq = ?1";
            let (route, wait) = (change.route.as_deref(), millis(*delay));
            connection.prepare_cached(sql)?.execute(params![change.seq, now, attempt, route, wait, attempts])?;
        }
        Settlement::Wait { delay } => {
            let sql = "UPDATE events SET due_at = ?2 + ?3, wait_ms = ?3, route = coalesce(?4, route), parked = NULL WHERE seq = ?1";
            let (route, wait) = (change.route.as_deref(), millis(*delay));
            connection.prepare_cached(sql)?.execute(params![change.seq, now, wait, route])?;
        }
        Settlement::Dead { reason, error } => {
            let sql = "INSERT INTO dead
                           (reason, error, died_at, route, attempts, attempt, app, kind, webhook_id, type, headers, body)
                       SELECT ?2, ?3, ?4, ?5, coalesce(?6, attempts), attempt, app, kind, webhook_id, type, headers, body
                       FROM events WHERE seq = ?1";
            connection.prepare_cached(sql)?.execute(params![
                change.seq,
                reason.as_str(),
                error,
                now,
                change.route.as_deref(),
                attempts
            ])?;
            delete(connection, &[change.seq])?;
        }
    }
    Ok(())
}

/// Parks an event with the others of the route.
pub(super) fn park(connection: &Connection, seq: i64, route: &str) -> rusqlite::Result<()> {
    let sql = "UPDATE events SET due_at = -1, wait_ms = NULL, parked = ?2, route = ?2 WHERE seq = ?1";
    connection.prepare_cached(sql)?.execute(params![seq, route])?;
    // No handler has it, so it is not to blame if the process dies now.
    connection.prepare_cached("UPDATE running SET alone = NULL WHERE alone = ?1")?.execute(params![seq]).map(drop)
}

/// Assigns an event to that route, and inserts copies for other routes. A row that already names a route has its
/// copies.
pub(super) fn copy(connection: &Connection, seq: i64, route: &str, copies: &[Envelope]) -> rusqlite::Result<()> {
    let sql = "UPDATE events SET route = ?2 WHERE seq = ?1 AND route IS NULL";
    if connection.prepare_cached(sql)?.execute(params![seq, route])? == 0 {
        return Ok(());
    }
    copies.iter().try_for_each(|copy| insert_event(connection, copy))
}

/// How many events are parked for each route.
pub(super) fn count_parked(connection: &Connection) -> rusqlite::Result<Vec<(String, i64)>> {
    let sql = "SELECT parked, count(*) FROM events WHERE parked IS NOT NULL GROUP BY parked";
    let mut counts = connection.prepare_cached(sql)?;
    counts.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
}

/// How many events wait.
pub(super) fn count(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row("SELECT count(*) FROM events", [], |row| row.get(0))
}

/// How many events wait for another attempt.
pub(super) fn count_retrying(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row("SELECT count(*) FROM events WHERE due_at > 0", [], |row| row.get(0))
}

/// Corrects rows that are due later than their whole wait from now: they were written while the clock was ahead. Rows
/// of a version that did not store the wait had at most an hour, or their ladder's longest step.
pub(super) const BRING_FORWARD: &str = "UPDATE events SET due_at = ?1 + coalesce(wait_ms, 3600000)
     WHERE due_at > 0 AND due_at > ?1 AND due_at > ?1 + coalesce(wait_ms, 3600000)";

pub(super) fn bring_forward(connection: &Connection, now: i64) -> rusqlite::Result<()> {
    connection.prepare_cached(BRING_FORWARD)?.execute(params![now]).map(drop)
}

/// A process begins to hand out events. If the process before it died, every event that it may have had in hand is
/// counted as abandoned: the first `in_hand` of each order in which events are handed out, and the first
/// `parked_in_hand` of each route's parked ones. That counts innocent ones too, so the counting stops where an event is
/// handed out alone; from there on it is known which event it was.
pub(super) fn begin(connection: &mut Connection, in_hand: usize, parked_in_hand: usize) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let died: Option<Option<i64>> =
        transaction.query_row("SELECT alone FROM running", [], |row| row.get(0)).optional()?;
    let now = now_ms();
    if let Some(alone) = died {
        let in_hand = i64::try_from(in_hand).unwrap_or(i64::MAX);
        let sql = "UPDATE events SET deliveries = deliveries + 1 WHERE deliveries >= ?2 AND seq = ?1";
        transaction.execute(sql, params![alone, ALONE_FROM])?;
        let counted = |order: &str| {
            format!(
                "UPDATE events SET deliveries = deliveries + 1
                 WHERE deliveries < ?3 AND seq IN (SELECT seq FROM events WHERE {order} LIMIT ?1)"
            )
        };
        for order in ["due_at = 0 AND ?2 > 0 ORDER BY seq", "due_at > 0 AND due_at <= ?2 ORDER BY due_at"] {
            transaction.execute(&counted(order), params![in_hand, now, ALONE_FROM])?;
        }
        let in_hand = i64::try_from(parked_in_hand).unwrap_or(i64::MAX);
        let order = "parked = ?2 AND parked IS NOT NULL ORDER BY seq";
        for (route, _) in count_parked(&transaction)? {
            transaction.execute(&counted(order), params![in_hand, route, ALONE_FROM])?;
        }
    }
    end(&transaction)?;
    transaction.execute("INSERT INTO running (since) VALUES (?1)", params![now])?;
    transaction.commit()
}

/// The process ends in order: nothing is in hand.
pub(super) fn end(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute("DELETE FROM running", []).map(drop)
}

/// Records that an event is handed out alone, because it may kill the process.
pub(super) fn alone(connection: &Connection, seq: i64) -> rusqlite::Result<()> {
    connection.prepare_cached("UPDATE running SET alone = ?1")?.execute(params![seq]).map(drop)
}
