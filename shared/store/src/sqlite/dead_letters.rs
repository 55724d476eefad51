//! The dead letters, for the command line: read, replayed and dropped, alongside a running owner or without one.

use super::{
    OpenError,
    alongside::{Alongside, MAX_MOVED, MAX_MOVED_BYTES},
    parked, queue, row, schema,
};
use rusqlite::{Connection, TransactionBehavior, params};
use std::path::Path;
use std::sync::Arc;
use streamgate_core::{
    dead_letter::{DeadLetter, DeadLetterId},
    ports::{DeadLetters, Moved, Page, PageToken, StoreError},
};

/// The dead letters of a data directory, or the parked events of one route in it.
#[derive(Clone, Debug)]
pub struct DeadLetterBox {
    file: Alongside,
    which: Which,
}

#[derive(Clone, Debug)]
enum Which {
    Dead,
    /// Those of that route. `to_any_route`: a replayed event may go to any route that takes it.
    Parked {
        route: Arc<str>,
        to_any_route: bool,
    },
}

impl DeadLetterBox {
    pub fn open(data_dir: &Path) -> Result<DeadLetterBox, OpenError> {
        DeadLetterBox::of(data_dir, Which::Dead)
    }

    /// Opens the parked events of a route. `to_any_route`: the route no longer exists, so replayed events go to
    /// another.
    pub fn open_parked(data_dir: &Path, route: &str, to_any_route: bool) -> Result<DeadLetterBox, OpenError> {
        DeadLetterBox::of(data_dir, Which::Parked { route: route.into(), to_any_route })
    }

    fn of(data_dir: &Path, which: Which) -> Result<DeadLetterBox, OpenError> {
        Ok(DeadLetterBox { file: Alongside::open(data_dir)?, which })
    }

    /// Empties the store's log, which contains what was dropped as well: once, after the last drop.
    pub async fn empty_log(&self) -> Result<(), StoreError> {
        if !self.file.run(|connection| schema::empty_log(connection)).await? {
            tracing::warn!(
                "a reader keeps what was dropped in the store's log (-wal); it goes when streamgate stops, at the latest"
            );
        }
        Ok(())
    }
}

impl DeadLetters for DeadLetterBox {
    /// A token is the number of the last row: any page can be read again.
    async fn page(&self, from: Option<PageToken>, limit: usize) -> Result<Page, StoreError> {
        let (after, which) = (from.map_or(0, |PageToken(number)| number), self.which.clone());
        let most = i64::try_from(limit).unwrap_or(i64::MAX);
        let read = self.file.run(move |connection| match which {
            Which::Dead => {
                let sql =
                    format!("SELECT {COLUMNS}, {} FROM dead WHERE number > ?1 ORDER BY number LIMIT ?2", row::COLUMNS);
                let mut dead_letters = connection.prepare_cached(&sql)?;
                dead_letters.query_map(params![after, most], dead_letter)?.collect()
            }
            Which::Parked { route, .. } => parked::page(connection, &route, after, most),
        });
        let dead_letters: Vec<_> = read.await?;
        let last = dead_letters.last().filter(|_| dead_letters.len() == limit);
        Ok(Page { next: last.map(|last| PageToken(last.number)), dead_letters })
    }

    async fn replay(&self, dead_letters: Vec<DeadLetterId>) -> Moved {
        let (mut moved, mut left) = (Moved::default(), numbers(&dead_letters));
        while !left.is_empty() {
            let which = self.which.clone();
            let replayed = self.file.run(move |connection| {
                let (count, taken) = match &which {
                    Which::Dead => replay(connection, &left)?,
                    Which::Parked { route, to_any_route } => parked::replay(connection, route, &left, *to_any_route)?,
                };
                Ok((count, left.split_off(taken)))
            });
            match replayed.await {
                Ok((count, rest)) => (moved.count, left) = (moved.count + count, rest),
                Err(error) => return Moved { stopped: Some(error), ..moved },
            }
        }
        moved
    }

    fn release(&self) -> impl Future<Output = Result<(), StoreError>> + Send {
        // This store holds no dead letters back.
        std::future::ready(Ok(()))
    }

    async fn discard(&self, dead_letters: Vec<DeadLetterId>) -> Moved {
        let mut moved = Moved::default();
        for some in numbers(&dead_letters).chunks(MAX_MOVED) {
            let (some, which) = (some.to_vec(), self.which.clone());
            let discard = move |connection: &mut Connection| {
                let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
                let mut count = 0;
                for number in some {
                    count += match &which {
                        Which::Dead => delete(&transaction, number)?,
                        Which::Parked { route, .. } => parked::delete(&transaction, route, number)?,
                    };
                }
                transaction.commit().map(|()| count)
            };
            match self.file.run(discard).await {
                Ok(count) => moved.count += count,
                Err(error) => return Moved { stopped: Some(error), ..moved },
            }
        }
        moved
    }
}

/// In this store a number identifies a dead letter alone.
fn numbers(dead_letters: &[DeadLetterId]) -> Vec<i64> {
    dead_letters.iter().map(|dead_letter| dead_letter.number).collect()
}

/// Columns of a dead letter, before those of its event.
const COLUMNS: &str = "number, reason, error, died_at";

fn dead_letter(row: &rusqlite::Row<'_>) -> rusqlite::Result<DeadLetter> {
    Ok(DeadLetter {
        number: row.get(0)?,
        reason: row.get(1)?,
        error: row.get(2)?,
        died_at_ms: row.get(3)?,
        envelope: row::envelope(row, 4)?,
    })
}

/// In one transaction a dead letter becomes an event again: it is never in both places, nor in neither. Returns how
/// many did, and how many of the numbers were processed.
fn replay(connection: &mut Connection, numbers: &[i64]) -> rusqlite::Result<(usize, usize)> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let (mut count, mut taken, mut bytes) = (0, 0, 0);
    for number in numbers {
        if taken >= MAX_MOVED || bytes >= MAX_MOVED_BYTES {
            break;
        }
        taken += 1;
        let sql = format!("SELECT {COLUMNS}, {} FROM dead WHERE number = ?1", row::COLUMNS);
        let found = transaction.prepare_cached(&sql)?.query_row(params![number], dead_letter);
        let dead_letter = match found {
            Err(rusqlite::Error::QueryReturnedNoRows) => continue,
            found => found?,
        };
        bytes += dead_letter.envelope.body.len();
        queue::insert_event(&transaction, &dead_letter.replayed())?;
        count += delete(&transaction, *number)?;
    }
    transaction.commit().map(|()| (count, taken))
}

fn delete(connection: &Connection, number: i64) -> rusqlite::Result<usize> {
    connection.prepare_cached("DELETE FROM dead WHERE number = ?1")?.execute(params![number])
}

pub(super) fn count(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row("SELECT count(*) FROM dead", [], |row| row.get(0))
}
