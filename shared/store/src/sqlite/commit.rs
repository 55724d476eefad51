//! The writing thread's work: one transaction for all writes that wait, then their results.
//!
//! No caller gets a result before the commit, nor when the files that were written are not the ones that a restart
//! would find. Where a batch fails because of one write, each write is tried alone, so that one cannot take the others
//! with it.

use super::file_watch::FileWatch;
use super::limits::{Health, Limits, TICK};
use super::queue::{self, Change};
use super::{answers, clock::Clock, now_ms, routes, schema, seen, unavailable};
use bytes::Bytes;
use rusqlite::{Connection, ErrorCode, TransactionBehavior};
use std::mem::discriminant;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use streamgate_core::{
    envelope::Envelope,
    ports::{Settlement, StoreError},
    route_record::RouteRecord,
};
use tokio::sync::{Notify, mpsc, oneshot};

/// Most writes in one transaction: a larger batch saves nothing more and only delays the first result.
const MAX_BATCH: usize = 1024;
pub(super) type Answer<T> = oneshot::Sender<Result<T, StoreError>>;

pub(super) enum Write {
    /// The result is the row's number, or `None` for a repeat.
    Enqueue(Box<Envelope>, Answer<Option<i64>>),
    Settle(Change, Answer<()>),
    /// A row waits until its route takes it.
    Park(i64, Arc<str>, Answer<()>),
    /// Rows to delete: they are durable elsewhere.
    Release(Vec<i64>, Answer<()>),
    /// A row that may kill the process is handed out alone.
    Alone(i64, Answer<()>),
    /// The process hands out nothing more.
    End(Answer<()>),
    /// The first answer to a hook.
    Remember(Remembered, Answer<()>),
    /// A row becomes an event of that route; the envelopes are copies for other routes.
    Copy(i64, Arc<str>, Vec<Envelope>, Answer<()>),
    /// The record of a route: paused or running.
    Route(String, RouteRecord, Answer<()>),
    /// Purges old keys and checks the store's health.
    Tick,
    /// The last write: those after it are refused.
    Close,
}

/// An answer to remember until `until`, in milliseconds since the Unix epoch.
pub(super) struct Remembered {
    pub(super) key: [u8; 16],
    pub(super) answer: Bytes,
    pub(super) until: i64,
}

/// What a write did; it holds once the commit succeeds.
#[derive(Clone, Copy)]
enum Effect {
    Accepted(Option<i64>),
    Released(usize),
    Settled,
}

/// Why a batch was not committed.
struct Failed {
    error: StoreError,
    /// The store caused it, so no write of the batch would fare better alone.
    of_the_store: bool,
}

/// The files that are written are not those that a restart would find.
fn gone(what: String) -> Failed {
    let what = format!("{what}: deleted, moved or unmounted; bring it back, or restart on another store.data_dir");
    Failed { error: StoreError::Gone(what), of_the_store: true }
}

impl From<rusqlite::Error> for Failed {
    fn from(error: rusqlite::Error) -> Failed {
        let code = error.sqlite_error_code();
        let of_the_store = matches!(
            code,
            Some(
                ErrorCode::DiskFull
                    | ErrorCode::DatabaseBusy
                    | ErrorCode::SystemIoFailure
                    | ErrorCode::DatabaseCorrupt
                    | ErrorCode::ReadOnly
                    | ErrorCode::CannotOpen
            )
        );
        let error = match code {
            Some(ErrorCode::DiskFull) => StoreError::Full(format!("{error}; free disk space or raise store.spool_max")),
            _ => unavailable(error),
        };
        Failed { error, of_the_store }
    }
}

/// Commits the waiting writes. Lives on the writing thread.
pub(super) struct Committer {
    pub(super) connection: Connection,
    pub(super) limits: Limits,
    pub(super) health: Arc<Mutex<Health>>,
    /// How many events wait, if they are counted.
    pub(super) waiting: Option<Arc<AtomicI64>>,
    /// SQLite's `data_version`: changes with each commit of another connection, since `dead replay` inserts events too.
    pub(super) data_version: i64,
    pub(super) news: Arc<Notify>,
    pub(super) file_watch: FileWatch,
    /// Length of the write-ahead log after the last commit.
    pub(super) log_bytes: u64,
    pub(super) clock: Clock,
    /// The clock was set back, and the due times were not corrected yet.
    pub(super) stepped: bool,
    /// Time of the last attempt to truncate the log.
    pub(super) cut_at: Instant,
}

impl Committer {
    pub(super) fn run(&mut self, mut waiting: mpsc::Receiver<Write>) {
        let mut batch = Vec::with_capacity(MAX_BATCH);
        let mut is_closed = false;
        while !is_closed && waiting.blocking_recv_many(&mut batch, MAX_BATCH) > 0 {
            is_closed = batch.iter().any(|write| matches!(write, Write::Close));
            let outcome = self.commit(&batch);
            match outcome {
                Ok(effects) => self.answer(batch.drain(..).zip(effects)),
                Err(Failed { error, of_the_store }) if of_the_store || batch.len() == 1 => {
                    batch.drain(..).for_each(|write| write.refuse(&error));
                }
                Err(_) => self.one_by_one(&mut batch),
            }
            self.cut_log();
        }
    }

    /// Truncates a log that a reader kept from being truncated. Runs after all results are sent, since it changes
    /// nothing for the callers.
    fn cut_log(&mut self) {
        if self.log_bytes <= schema::LOG_BYTES || self.cut_at.elapsed() < TICK {
            return;
        }
        self.cut_at = Instant::now();
        if let Err(error) = schema::cut_log(&self.connection) {
            tracing::debug!(%error, "cannot cut the store's log back yet");
        }
    }

    fn one_by_one(&mut self, batch: &mut Vec<Write>) {
        for write in batch.drain(..) {
            match self.commit(std::slice::from_ref(&write)) {
                Ok(effects) => self.answer(std::iter::once(write).zip(effects)),
                Err(failed) => write.refuse(&failed.error),
            }
        }
    }

    /// One transaction for all writes. Records whether it succeeded: readiness depends on it.
    fn commit(&mut self, batch: &[Write]) -> Result<Vec<Result<Effect, StoreError>>, Failed> {
        let result = self.transact(batch);
        let health = match &result {
            Ok((_, used)) if *used < self.limits.max_bytes => Ok(()),
            Ok(_) => Err(self.limits.full()),
            Err(failed) => Err(failed.error.clone()),
        };
        let mut known = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        match (&known.result, &health) {
            // The same kind of failure again, perhaps with another text or number, is not logged.
            (Err(before), Err(error)) if discriminant(before) == discriminant(error) => {}
            (_, Err(error)) => tracing::error!(%error, "events can no longer be stored"),
            (Err(_), Ok(())) => tracing::info!("events can be stored again"),
            (Ok(()), Ok(())) => {}
        }
        let used = result.as_ref().map_or(known.used, |(_, used)| *used);
        *known = Health { result: health, at: Instant::now(), used, has_failed: result.is_err() };
        result.map(|(effects, _)| effects)
    }

    /// Returns the effect of each write, and how many bytes were in use before it.
    fn transact(&mut self, batch: &[Write]) -> Result<(Vec<Result<Effect, StoreError>>, u64), Failed> {
        // The time is read before waiting for the lock.
        let now = now_ms();
        self.stepped |= self.clock.went_back(now);
        let limits = &self.limits;
        let since = now.saturating_sub(limits.remember_ms);
        let has_failed = self.health.lock().unwrap_or_else(PoisonError::into_inner).has_failed;
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let used = schema::used_bytes(&transaction)? + self.log_bytes.saturating_sub(schema::LOG_BYTES);
        let version = match self.waiting {
            Some(_) => schema::data_version(&transaction)?,
            None => self.data_version,
        };
        let others_wrote = self.data_version != version;
        let (full, pressed) = (used >= limits.max_bytes, used >= limits.max_bytes / 4 * 3);
        let mut effects = Vec::with_capacity(batch.len());
        let mut has_looked = false;
        for write in batch {
            effects.push(match write {
                // The caller gave up and answered 503: the repeat that follows must not find its key recorded.
                Write::Enqueue(_, answer) if answer.is_closed() => Ok(Effect::Settled),
                // A repeat of a stored event needs no room.
                Write::Enqueue(envelope, _) if full => match seen::contains(&transaction, &envelope.key, since)? {
                    true => Ok(Effect::Accepted(None)),
                    false => Err(limits.full()),
                },
                Write::Enqueue(envelope, _) => {
                    Ok(Effect::Accepted(queue::enqueue(&transaction, envelope, now, since)?))
                }
                Write::Settle(change, _) => {
                    // Under pressure rows must not grow: the last quarter is for events, and the headroom above it for
                    // settlements.
                    let grows_once = matches!(change.settlement, Settlement::Dead { .. });
                    let has_room = !pressed || (grows_once && !full);
                    let attempts = change.attempts.as_deref().filter(|_| has_room);
                    queue::settle(&transaction, change, attempts, now)?;
                    Ok(Effect::Settled)
                }
                Write::Park(row, route, _) => {
                    queue::park(&transaction, *row, route)?;
                    Ok(Effect::Settled)
                }
                // The last quarter is for events: without a stored answer, a repeated hook is asked again.
                Write::Remember(..) if pressed => Err(limits.full()),
                Write::Remember(Remembered { key, answer, until }, _) => {
                    answers::insert(&transaction, *key, answer, *until)?;
                    Ok(Effect::Settled)
                }
                Write::Alone(row, _) => {
                    queue::alone(&transaction, *row)?;
                    Ok(Effect::Settled)
                }
                Write::End(_) => {
                    queue::end(&transaction)?;
                    Ok(Effect::Settled)
                }
                Write::Copy(row, route, copies, _) => {
                    queue::copy(&transaction, *row, route, copies)?;
                    Ok(Effect::Settled)
                }
                Write::Route(route, record, _) => {
                    routes::write(&transaction, route, record)?;
                    Ok(Effect::Settled)
                }
                Write::Release(rows, _) => Ok(Effect::Released(queue::delete(&transaction, rows)?)),
                Write::Close => Ok(Effect::Settled),
                Write::Tick => {
                    // After a failure a write is tried, because an empty transaction would succeed on a full disk.
                    if has_failed {
                        schema::probe(&transaction)?;
                    }
                    if self.stepped {
                        queue::bring_forward(&transaction, now)?;
                        self.news.notify_one();
                    }
                    has_looked = true;
                    Ok(Effect::Settled)
                }
            });
        }
        // Under pressure keys are kept for the promised window only.
        let keep_ms = if pressed { limits.seen_window_ms } else { limits.remember_ms };
        seen::purge(&transaction, now, keep_ms)?;
        answers::purge(&transaction, now)?;
        let recounted = others_wrote.then(|| queue::count(&transaction)).transpose()?;
        // Checked before the commit, so that little is committed whose callers get an error, and again after it, for
        // what happened during the commit.
        self.file_watch.look_unless_recent().map_err(gone)?;
        transaction.commit()?;
        self.data_version = version;
        self.stepped &= !has_looked;
        self.count(&effects, recounted);
        self.log_bytes = self.file_watch.look().map_err(gone)?;
        Ok((effects, used))
    }

    /// Counts the rows that came and went, even where their callers have given up. `recounted`: how many wait in total,
    /// with this commit.
    fn count(&self, effects: &[Result<Effect, StoreError>], recounted: Option<i64>) {
        let Some(waiting) = &self.waiting else { return };
        if let Some(all) = recounted {
            waiting.store(all, Ordering::Relaxed);
            return;
        }
        let change = effects.iter().flatten().map(|effect| match effect {
            Effect::Accepted(Some(_)) => 1,
            Effect::Released(rows) => i64::try_from(*rows).unwrap_or(i64::MAX).saturating_neg(),
            Effect::Accepted(None) | Effect::Settled => 0,
        });
        waiting.fetch_add(change.sum(), Ordering::Relaxed);
    }

    fn answer(&self, written: impl Iterator<Item = (Write, Result<Effect, StoreError>)>) {
        let mut news = false;
        for (write, effect) in written {
            // The receiver may be gone: a caller that gave up will repeat, and find a duplicate.
            match (write, effect) {
                (Write::Enqueue(_, answer), Ok(Effect::Accepted(row))) => {
                    news |= row.is_some();
                    drop(answer.send(Ok(row)));
                }
                (Write::Release(_, answer), Ok(Effect::Released(_))) => drop(answer.send(Ok(()))),
                (Write::Settle(change, answer), Ok(_)) => {
                    news |= matches!(change.settlement, Settlement::Retry { .. } | Settlement::Wait { .. });
                    drop(answer.send(Ok(())));
                }
                (Write::Park(_, _, answer) | Write::Copy(_, _, _, answer), Ok(_)) => {
                    news = true;
                    drop(answer.send(Ok(())));
                }
                (
                    Write::Alone(_, answer)
                    | Write::End(answer)
                    | Write::Remember(_, answer)
                    | Write::Route(_, _, answer),
                    Ok(_),
                ) => drop(answer.send(Ok(()))),
                (write, Err(error)) => write.refuse(&error),
                (Write::Tick | Write::Close | Write::Enqueue(..) | Write::Release(..), Ok(_)) => {}
            }
        }
        if news {
            self.news.notify_one();
        }
    }
}

impl Write {
    fn refuse(self, error: &StoreError) {
        match self {
            Write::Enqueue(_, answer) => drop(answer.send(Err(error.clone()))),
            Write::Release(_, answer)
            | Write::Settle(_, answer)
            | Write::Park(_, _, answer)
            | Write::Route(_, _, answer)
            | Write::Copy(_, _, _, answer)
            | Write::Alone(_, answer)
            | Write::End(answer)
            | Write::Remember(_, answer) => drop(answer.send(Err(error.clone()))),
            Write::Tick | Write::Close => {}
        }
    }
}
