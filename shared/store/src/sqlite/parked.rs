//! The parked events of a route, for the command line: read, put back and dropped, alongside a running owner or without
//! one.

use super::alongside::MAX_MOVED;
use super::{now_ms, row};
use rusqlite::{Connection, TransactionBehavior, params};
use streamgate_core::{dead_letter::DeadLetter, reason::Reason};

/// Parked events as dead letters with the rows' own numbers, oldest first.
pub(super) fn page(connection: &Connection, route: &str, after: i64, limit: i64) -> rusqlite::Result<Vec<DeadLetter>> {
    let sql = format!(
        "SELECT seq, {} FROM events WHERE parked = ?1 AND parked IS NOT NULL AND seq > ?2 ORDER BY seq LIMIT ?3",
        row::COLUMNS
    );
    let dead_letter = |row: &rusqlite::Row<'_>| {
        let envelope = row::envelope(row, 1)?;
        let (reason, died_at_ms) = (Reason::Parked.as_str().to_owned(), envelope.received_at_ms);
        Ok(DeadLetter { number: row.get(0)?, reason, error: None, died_at_ms, envelope })
    };
    let mut parked = connection.prepare_cached(&sql)?;
    parked.query_map(params![route, after, limit], dead_letter)?.collect()
}

/// Makes parked rows events that are due now: their numbers lie below the cursor of fresh rows. Returns how many became
/// events, and how many of the numbers were processed.
pub(super) fn replay(
    connection: &mut Connection,
    route: &str,
    numbers: &[i64],
    to_any_route: bool,
) -> rusqlite::Result<(usize, usize)> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let some = numbers.get(..MAX_MOVED).unwrap_or(numbers);
    let sql = "UPDATE events SET parked = NULL, due_at = ?3, wait_ms = 0, route = CASE WHEN ?4 THEN NULL ELSE route END
               WHERE seq = ?1 AND parked = ?2";
    let now = now_ms();
    let mut count = 0;
    for number in some {
        count += transaction.prepare_cached(sql)?.execute(params![number, route, now, to_any_route])?;
    }
    transaction.commit().map(|()| (count, some.len()))
}

pub(super) fn delete(connection: &Connection, route: &str, number: i64) -> rusqlite::Result<usize> {
    let sql = "DELETE FROM events WHERE seq = ?1 AND parked = ?2";
    connection.prepare_cached(sql)?.execute(params![number, route])
}
