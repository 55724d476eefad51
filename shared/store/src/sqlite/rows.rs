//! Reads rows for the worker: first those that were given back, then due retries, parked ones, and fresh ones.

use super::reader::MAX_BYTES;
use super::{now_ms, row};
use rusqlite::{Connection, params};
use std::collections::HashSet;
use std::sync::Arc;
use streamgate_core::envelope::Envelope;

/// Rows read at a time, and how many of them may be retries or parked: a service that is down must not keep fresh events waiting.
const MAX_ROWS: usize = 64;
const MAX_RETRIES: usize = MAX_ROWS / 2;
const MAX_PARKED: usize = MAX_ROWS / 4;

pub(super) struct Row {
    pub(super) seq: i64,
    pub(super) envelope: Envelope,
    pub(super) deliveries: u32,
    pub(super) parked: Option<Arc<str>>,
}

impl Row {
    fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<Row> {
        Ok(Row { seq: row.get(0)?, deliveries: row.get(1)?, parked: None, envelope: row::envelope(row, 2)? })
    }
}

/// What one read found.
pub(super) struct Found {
    pub(super) rows: Vec<Row>,
    /// Bytes of their bodies.
    bytes: usize,
    pub(super) cursor: i64,
    /// When the next retry is due, if there is one.
    pub(super) next_due: Option<i64>,
    /// The read stopped at its own bounds: there may be more.
    pub(super) more: bool,
}

// Each of these must find its rows without scanning the others, however many there are: a test asks SQLite for its
// plans. The index over due_at holds no zeros, and SQLite uses it only where the condition is written like this.
const BY_SEQ: &str = "WHERE seq = ?1";
const DUE: &str = "WHERE due_at > 0 AND due_at <= ?1 ORDER BY due_at";
const FRESH: &str = "WHERE seq > ?1 AND due_at = 0 ORDER BY seq";
const PARKED: &str = "WHERE parked = ?1 AND parked IS NOT NULL ORDER BY seq";
const LAST: &str = "SELECT coalesce(max(seq), 0) FROM events";
const NEXT_DUE: &str = "SELECT min(due_at) FROM events WHERE due_at > 0 AND due_at > ?1";

fn select(which: &str) -> String {
    format!("SELECT seq, deliveries, {} FROM events {which}", row::COLUMNS)
}

impl Found {
    fn is_full(&self) -> bool {
        self.rows.len() >= MAX_ROWS || self.bytes >= MAX_BYTES
    }

    fn take(&mut self, row: Row) {
        self.bytes += row.envelope.body.len();
        self.rows.push(row);
    }
}

/// Reads what may be handed out. `held`: rows in hand. `parked`: how many parked rows of which routes.
pub(super) fn read(
    connection: &Connection,
    cursor: i64,
    returned: &[i64],
    held: &HashSet<i64>,
    parked: &[(Arc<str>, usize)],
) -> rusqlite::Result<Found> {
    let mut found = Found { rows: Vec::new(), bytes: 0, cursor, next_due: None, more: false };
    // Read before the others: every fresh row up to this number is among what is read.
    let last: i64 = connection.prepare_cached(LAST)?.query_row([], |row| row.get(0))?;
    for seq in returned {
        let mut rows = connection.prepare_cached(&select(BY_SEQ))?;
        let mut rows = rows.query(params![seq])?;
        if let Some(row) = rows.next()? {
            // Their number is bounded by what was in hand.
            found.rows.push(Row::read(row)?);
        }
    }
    read_due(connection, returned, held, &mut found)?;
    read_parked(connection, held, parked, &mut found)?;
    read_fresh(connection, returned, last, &mut found)?;
    found.more |= found.is_full();
    found.next_due = connection.prepare_cached(NEXT_DUE)?.query_row(params![now_ms()], |row| row.get(0))?;
    Ok(found)
}

fn read_due(connection: &Connection, returned: &[i64], held: &HashSet<i64>, found: &mut Found) -> rusqlite::Result<()> {
    let mut due = connection.prepare_cached(&select(DUE))?;
    let mut rows = due.query(params![now_ms()])?;
    while let Some(row) = rows.next()? {
        let seq: i64 = row.get(0)?;
        if held.contains(&seq) || returned.contains(&seq) {
            continue;
        }
        if found.rows.len() >= MAX_RETRIES || found.is_full() {
            found.more = true;
            break;
        }
        found.take(Row::read(row)?);
    }
    Ok(())
}

fn read_parked(
    connection: &Connection,
    held: &HashSet<i64>,
    parked: &[(Arc<str>, usize)],
    found: &mut Found,
) -> rusqlite::Result<()> {
    let most = found.rows.len() + MAX_PARKED;
    for (route, room) in parked {
        let (mut waiting, mut room) = (connection.prepare_cached(&select(PARKED))?, *room);
        let mut rows = waiting.query(params![&**route])?;
        while room > 0
            && let Some(row) = rows.next()?
        {
            if held.contains(&row.get(0)?) {
                continue;
            }
            if found.rows.len() >= most || found.is_full() {
                found.more = true;
                break;
            }
            found.take(Row { parked: Some(Arc::clone(route)), ..Row::read(row)? });
            room -= 1;
        }
    }
    Ok(())
}

/// `last`: the highest number of any row when the read began.
fn read_fresh(connection: &Connection, returned: &[i64], last: i64, found: &mut Found) -> rusqlite::Result<()> {
    let mut fresh = connection.prepare_cached(&select(FRESH))?;
    let mut rows = fresh.query(params![found.cursor])?;
    while !found.is_full() {
        let Some(row) = rows.next()? else {
            // Parked and waiting rows up to there need not be scanned again.
            found.cursor = found.cursor.max(last);
            break;
        };
        let seq: i64 = row.get(0)?;
        found.cursor = seq;
        if !returned.contains(&seq) {
            found.take(Row::read(row)?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::queue::BRING_FORWARD;
    use super::*;
    use crate::sqlite::schema;

    #[test]
    fn no_read_looks_at_all_rows() {
        let directory = tempfile::tempdir().unwrap();
        let connection = schema::open_owner(&directory.path().join("store.db"), 1 << 20).unwrap();
        let selects = [BY_SEQ, DUE, FRESH, PARKED].map(select);
        for sql in selects.into_iter().chain([NEXT_DUE, BRING_FORWARD].map(str::to_owned)) {
            let mut plan = connection.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
            let steps = plan.query_map(params![1], |row| row.get::<_, String>(3)).unwrap();
            let steps: Vec<_> = steps.map(Result::unwrap).collect();
            // "SEARCH" without an index is what SQLite calls a scan for a minimum.
            let finds = |step: &String| step.starts_with("SEARCH events USING ");
            assert!(steps.iter().all(finds), "{sql}: {steps:?}");
        }
    }
}
