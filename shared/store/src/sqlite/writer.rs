//! The writing thread: takes all writes that wait, commits them as one transaction, then answers them all.
//!
//! One fsync serves everybody who waited for it: the busier the gateway, the cheaper each event. Nobody is answered before
//! the commit. Where a batch fails for what one write holds, each is tried alone, so that one cannot take the others with it.

use super::{OpenError, Options, millis, now_ms, row, schema, unavailable};
use rusqlite::{Connection, ErrorCode, TransactionBehavior, params};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use streamgate_core::{
    envelope::Envelope,
    id::fingerprint,
    ports::{Accepted, Settlement, StoreError},
};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

/// Most writes in one transaction: beyond this a larger batch saves nothing and only delays the first answer.
const MAX_BATCH: usize = 1024;
/// How often the store's health and the age of seen keys are looked at while nobody writes.
const TICK: Duration = Duration::from_secs(1);
/// Ticks end commits every second: after this long without one the disk hangs.
const MAX_SILENCE: Duration = Duration::from_secs(3);
/// Seen keys removed at a time: about a millisecond of work.
const PURGE_STEP: i64 = 2000;

/// How a delivery's row changes.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) seq: i64,
    pub(super) route: Option<Arc<str>>,
    pub(super) settlement: Settlement,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    max_bytes: u64,
    seen_window_ms: i64,
    remember_ms: i64,
    max_waiting: usize,
}

impl Limits {
    pub(super) fn of(options: &Options) -> Limits {
        Limits {
            max_bytes: options.max_bytes,
            seen_window_ms: millis(options.seen_window),
            remember_ms: millis(options.remember.max(options.seen_window)),
            max_waiting: options.max_waiting,
        }
    }
}

type Answer<T> = oneshot::Sender<Result<T, StoreError>>;

enum Write {
    Enqueue(Box<Envelope>, Answer<Accepted>),
    Settle(Change, Answer<()>),
    /// Looks after age and health.
    Tick,
}

/// What a write did, until the commit says that it is so.
#[derive(Clone, Copy)]
enum Effect {
    Accepted(Accepted),
    Settled,
}

/// How the last commit went, and when it ended.
#[derive(Clone, Debug)]
struct Health {
    told: Result<(), StoreError>,
    at: Instant,
}

#[derive(Debug)]
pub(super) struct Writer {
    writes: mpsc::Sender<Write>,
    health: Arc<Mutex<Health>>,
    news: Arc<Notify>,
    thread: JoinHandle<()>,
    ticker: AbortOnDropHandle<()>,
}

impl Writer {
    pub(super) fn start(connection: Connection, limits: Limits) -> Result<Writer, OpenError> {
        let (writes, waiting) = mpsc::channel(limits.max_waiting);
        let health = Arc::new(Mutex::new(Health { told: Ok(()), at: Instant::now() }));
        let news = Arc::new(Notify::new());
        let mut desk = Desk { connection, limits, health: Arc::clone(&health), news: Arc::clone(&news) };
        let thread = std::thread::Builder::new().name("store-writer".into());
        let thread = thread.spawn(move || desk.run(waiting)).map_err(OpenError::Thread)?;
        let ticks = writes.clone();
        let ticker = AbortOnDropHandle::new(tokio::spawn(async move {
            let mut interval = tokio::time::interval(TICK);
            loop {
                interval.tick().await;
                // Full means that writes are under way, and they tell as much as a tick would.
                if let Err(mpsc::error::TrySendError::Closed(_)) = ticks.try_send(Write::Tick) {
                    return;
                }
            }
        }));
        Ok(Writer { writes, health, news, thread, ticker })
    }

    /// Told of whenever rows came or their time changed.
    pub(super) fn news(&self) -> Arc<Notify> {
        Arc::clone(&self.news)
    }

    pub(super) fn ready(&self) -> Result<(), StoreError> {
        let health = self.health.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let silent = health.at.elapsed();
        if silent > MAX_SILENCE {
            return Err(unavailable(format!("the disk has not answered for {} s", silent.as_secs())));
        }
        health.told
    }

    pub(super) async fn enqueue(&self, envelope: Envelope) -> Result<Accepted, StoreError> {
        self.write(|answer| Write::Enqueue(Box::new(envelope), answer)).await
    }

    pub(super) async fn settle(&self, change: Change) -> Result<(), StoreError> {
        self.write(|answer| Write::Settle(change, answer)).await
    }

    async fn write<T>(&self, make: impl FnOnce(Answer<T>) -> Write) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        self.writes.send(make(answer)).await.map_err(|_| unavailable("the writing thread has ended"))?;
        answered.await.map_err(|_| unavailable("the writing thread has ended"))?
    }

    pub(super) async fn close(self) {
        self.ticker.abort();
        drop(self.ticker.await);
        drop(self.writes);
        let joined = tokio::task::spawn_blocking(move || self.thread.join()).await;
        if !matches!(joined, Ok(Ok(()))) {
            tracing::error!("the store's writing thread panicked");
        }
    }
}

/// Why a batch was not committed.
struct Failed {
    error: StoreError,
    /// Whether it lies with the store, so that no write of the batch would fare better alone.
    of_the_store: bool,
}

impl Failed {
    fn of(error: rusqlite::Error) -> Failed {
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

/// Where the writing is done.
struct Desk {
    connection: Connection,
    limits: Limits,
    health: Arc<Mutex<Health>>,
    news: Arc<Notify>,
}

impl Desk {
    fn run(&mut self, mut waiting: mpsc::Receiver<Write>) {
        let mut batch = Vec::with_capacity(MAX_BATCH);
        while waiting.blocking_recv_many(&mut batch, MAX_BATCH) > 0 {
            let outcome = self.commit(&batch);
            match outcome {
                Ok(effects) => self.answer(batch.drain(..).zip(effects)),
                Err(Failed { error, of_the_store }) if of_the_store || batch.len() == 1 => {
                    batch.drain(..).for_each(|write| write.refuse(&error));
                }
                Err(_) => self.one_by_one(&mut batch),
            }
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

    /// One transaction for all. Remembers whether it went well: that is what readiness means.
    fn commit(&mut self, batch: &[Write]) -> Result<Vec<Result<Effect, StoreError>>, Failed> {
        let result = self.transact(batch).map_err(Failed::of);
        let health = match &result {
            Ok((_, false)) => Ok(()),
            Ok((_, true)) => Err(self.full()),
            Err(failed) => Err(failed.error.clone()),
        };
        let mut told = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        match (&told.told, &health) {
            (Ok(()), Err(error)) => tracing::error!(%error, "events can no longer be stored"),
            (Err(_), Ok(())) => tracing::info!("events can be stored again"),
            (Ok(()), Ok(())) | (Err(_), Err(_)) => {}
        }
        *told = Health { told: health, at: Instant::now() };
        result.map(|(effects, _)| effects)
    }

    /// Returns what each write did, and whether the store is full.
    fn transact(&mut self, batch: &[Write]) -> rusqlite::Result<(Vec<Result<Effect, StoreError>>, bool)> {
        let now = now_ms();
        let limits = self.limits;
        let full_error = self.full();
        let healthy = self.health.lock().unwrap_or_else(PoisonError::into_inner).told.is_ok();
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let used = schema::used_bytes(&transaction)?;
        let full = used >= limits.max_bytes;
        let mut effects = Vec::with_capacity(batch.len());
        for write in batch {
            effects.push(match write {
                // Its caller gave up and answered 503: the repeat that this asks for should find nothing half done.
                Write::Enqueue(_, answer) if answer.is_closed() => Ok(Effect::Settled),
                Write::Enqueue(envelope, _) => enqueue(&transaction, envelope, now, limits.remember_ms, full)?
                    .map(Effect::Accepted)
                    .ok_or_else(|| full_error.clone()),
                Write::Settle(change, _) => {
                    settle(&transaction, change, now)?;
                    Ok(Effect::Settled)
                }
                Write::Tick => {
                    // An empty transaction would succeed on a full disk.
                    if !healthy {
                        schema::probe(&transaction)?;
                    }
                    Ok(Effect::Settled)
                }
            });
        }
        // Under pressure keys are kept for the promised window only.
        let keep_ms = if used >= limits.max_bytes / 4 * 3 { limits.seen_window_ms } else { limits.remember_ms };
        purge(&transaction, now, keep_ms)?;
        transaction.commit()?;
        Ok((effects, full))
    }

    fn full(&self) -> StoreError {
        StoreError::Full(format!(
            "{} bytes, the limit of store.spool_max, are in use by events that wait, dead letters and seen keys; raise it, \
             or look at `streamgate dead list`",
            self.limits.max_bytes
        ))
    }

    fn answer(&self, written: impl Iterator<Item = (Write, Result<Effect, StoreError>)>) {
        let mut news = false;
        for (write, effect) in written {
            // Whoever waited may be gone: a caller that gave up will repeat, and find a duplicate.
            match (write, effect) {
                (Write::Enqueue(_, answer), Ok(Effect::Accepted(accepted))) => {
                    news |= accepted == Accepted::Enqueued;
                    drop(answer.send(Ok(accepted)));
                }
                (Write::Settle(change, answer), Ok(_)) => {
                    news |= matches!(change.settlement, Settlement::Retry { .. } | Settlement::Wait { .. });
                    drop(answer.send(Ok(())));
                }
                (write, Err(error)) => write.refuse(&error),
                (Write::Tick | Write::Enqueue(..), Ok(_)) => {}
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
            Write::Settle(_, answer) => drop(answer.send(Err(error.clone()))),
            Write::Tick => {}
        }
    }
}

/// None: the store is full, and the event is new.
fn enqueue(
    connection: &Connection,
    envelope: &Envelope,
    now: i64,
    remember_ms: i64,
    full: bool,
) -> rusqlite::Result<Option<Accepted>> {
    let key = fingerprint(&envelope.key);
    let mut insert = connection.prepare_cached("INSERT OR IGNORE INTO seen (key, at) VALUES (?1, ?2)")?;
    let mut forget = connection.prepare_cached("DELETE FROM seen WHERE key = ?1 AND at <= ?2")?;
    if full {
        let mut known = connection.prepare_cached("SELECT 1 FROM seen WHERE key = ?1 AND at > ?2")?;
        let known = known.exists(params![key, now.saturating_sub(remember_ms)])?;
        return Ok(known.then_some(Accepted::Duplicate));
    }
    if insert.execute(params![key, now])? == 0 {
        // Known, unless so long ago that it no longer counts.
        if forget.execute(params![key, now.saturating_sub(remember_ms)])? == 0 {
            return Ok(Some(Accepted::Duplicate));
        }
        insert.execute(params![key, now])?;
    }
    insert_event(connection, envelope)?;
    Ok(Some(Accepted::Enqueued))
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
fn settle(connection: &Connection, change: &Change, now: i64) -> rusqlite::Result<()> {
    let delete = |seq| connection.prepare_cached("DELETE FROM events WHERE seq = ?1")?.execute(params![seq]);
    match &change.settlement {
        Settlement::Done | Settlement::Superseded => {
            delete(change.seq)?;
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
            delete(change.seq)?;
        }
    }
    Ok(())
}

/// Forgets the oldest keys, a bounded number at a time. Ids grow with time, so no index over it is needed. A key from the
/// future was written while the clock was wrong: it must not stand in the way of the others.
fn purge(connection: &Connection, now: i64, keep_ms: i64) -> rusqlite::Result<()> {
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

/// Retries that are due later than any could be.
pub(super) fn bring_forward(connection: &Connection, longest_wait: Duration) -> rusqlite::Result<()> {
    let latest = now_ms().saturating_add(millis(longest_wait));
    connection.execute("UPDATE events SET due_at = ?1 WHERE due_at > ?1", params![latest]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

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
