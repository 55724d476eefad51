//! The writing thread: takes all writes that wait, commits them as one transaction, then answers them all.
//!
//! One fsync serves everybody who waited for it: the busier the gateway, the cheaper each event. Nobody is answered before
//! the commit. Where a batch fails for what one write holds, each is tried alone, so that one cannot take the others with it.

use super::queue::{self, Change};
use super::{OpenError, Options, answers, millis, now_ms, schema, seen, unavailable};
use bytes::Bytes;
use rusqlite::{Connection, ErrorCode, TransactionBehavior};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use streamgate_core::{
    envelope::Envelope,
    ports::{Settlement, StoreError},
};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

/// Most writes in one transaction: beyond this a larger batch saves nothing and only delays the first answer.
const MAX_BATCH: usize = 1024;
/// How often the store's health and the age of seen keys are looked at while nobody writes.
const TICK: Duration = Duration::from_secs(1);
/// Ticks end commits every second: after this long without one the disk hangs.
const MAX_SILENCE: Duration = Duration::from_secs(3);

#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) max_bytes: u64,
    pub(super) seen_window_ms: i64,
    pub(super) remember_ms: i64,
    pub(super) max_waiting: usize,
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

    /// Why a new event is refused at the limit.
    fn full(&self) -> StoreError {
        StoreError::Full(format!(
            "{} bytes, the limit of store.spool_max, are in use by events that wait, dead letters and seen keys; raise it, \
             or look at `streamgate dead list`",
            self.max_bytes
        ))
    }
}

type Answer<T> = oneshot::Sender<Result<T, StoreError>>;

enum Write {
    /// Answered with the row's number, or none for a repeat.
    Enqueue(Box<Envelope>, Answer<Option<i64>>),
    Settle(Change, Answer<()>),
    /// Rows that are durable elsewhere.
    Release(Vec<i64>, Answer<()>),
    /// A row that may kill the process is handed out alone.
    Alone(i64, Answer<()>),
    /// The process hands nothing out any more.
    End(Answer<()>),
    /// The first answer to a hook.
    Remember(Remembered, Answer<()>),
    /// Looks after age and health.
    Tick,
}

/// An answer to be remembered until then, in milliseconds since the Unix epoch.
struct Remembered {
    key: [u8; 16],
    answer: Bytes,
    until: i64,
}

/// What a write did, until the commit says that it is so.
#[derive(Clone, Copy)]
enum Effect {
    Accepted(Option<i64>),
    Released(usize),
    Settled,
}

/// How the last commit went, when it ended, and how much of the file was in use.
#[derive(Clone, Debug)]
struct Health {
    told: Result<(), StoreError>,
    at: Instant,
    used: u64,
}

#[derive(Debug)]
pub(super) struct Writer {
    writes: mpsc::Sender<Write>,
    health: Arc<Mutex<Health>>,
    /// Events that came and were not released since the start.
    came: Arc<AtomicI64>,
    news: Arc<Notify>,
    thread: JoinHandle<()>,
    ticker: AbortOnDropHandle<()>,
}

impl Writer {
    pub(super) fn start(connection: Connection, limits: Limits) -> Result<Writer, OpenError> {
        let (writes, waiting) = mpsc::channel(limits.max_waiting);
        let health = Arc::new(Mutex::new(Health { told: Ok(()), at: Instant::now(), used: 0 }));
        let news = Arc::new(Notify::new());
        let came = Arc::new(AtomicI64::new(0));
        let (told, counted, notified) = (Arc::clone(&health), Arc::clone(&came), Arc::clone(&news));
        let mut desk = Desk { connection, limits, health: told, came: counted, news: notified };
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
        Ok(Writer { writes, health, came, news, thread, ticker })
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

    /// Bytes of the file that are in use, as of the last commit: of a second ago at most.
    pub(super) fn used(&self) -> u64 {
        self.health.lock().unwrap_or_else(PoisonError::into_inner).used
    }

    /// Events that came since the start, less those that were released: counted where they are committed, for callers may
    /// have given up by then.
    pub(super) fn came(&self) -> i64 {
        self.came.load(Ordering::Relaxed)
    }

    pub(super) async fn enqueue(&self, envelope: Envelope) -> Result<Option<i64>, StoreError> {
        self.write(|answer| Write::Enqueue(Box::new(envelope), answer)).await
    }

    pub(super) async fn settle(&self, change: Change) -> Result<(), StoreError> {
        self.write(|answer| Write::Settle(change, answer)).await
    }

    pub(super) async fn release(&self, rows: Vec<i64>) -> Result<(), StoreError> {
        self.write(|answer| Write::Release(rows, answer)).await
    }

    /// What marks rows that are handed out alone.
    pub(super) fn marker(&self) -> Marker {
        Marker(self.writes.clone())
    }

    /// The process ends in order.
    pub(super) async fn end(&self) -> Result<(), StoreError> {
        self.write(Write::End).await
    }

    pub(super) async fn remember(&self, key: [u8; 16], answer: Bytes, until: i64) -> Result<(), StoreError> {
        self.write(|told| Write::Remember(Remembered { key, answer, until }, told)).await
    }

    async fn write<T>(&self, make: impl FnOnce(Answer<T>) -> Write) -> Result<T, StoreError> {
        write(&self.writes, make).await
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

/// Marks rows that are handed out alone, for as long as the writer lives.
#[derive(Debug)]
pub(super) struct Marker(mpsc::Sender<Write>);

impl Marker {
    /// Returns when it is committed.
    pub(super) async fn alone(&self, row: i64) -> Result<(), StoreError> {
        write(&self.0, |answer| Write::Alone(row, answer)).await
    }
}

async fn write<T>(writes: &mpsc::Sender<Write>, make: impl FnOnce(Answer<T>) -> Write) -> Result<T, StoreError> {
    let (answer, answered) = oneshot::channel();
    writes.send(make(answer)).await.map_err(|_| unavailable("the writing thread has ended"))?;
    answered.await.map_err(|_| unavailable("the writing thread has ended"))?
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
    came: Arc<AtomicI64>,
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
            Ok((_, used)) if *used < self.limits.max_bytes => Ok(()),
            Ok(_) => Err(self.limits.full()),
            Err(failed) => Err(failed.error.clone()),
        };
        let mut told = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        match (&told.told, &health) {
            (Ok(()), Err(error)) => tracing::error!(%error, "events can no longer be stored"),
            (Err(_), Ok(())) => tracing::info!("events can be stored again"),
            (Ok(()), Ok(())) | (Err(_), Err(_)) => {}
        }
        let used = result.as_ref().map_or(told.used, |(_, used)| *used);
        *told = Health { told: health, at: Instant::now(), used };
        result.map(|(effects, _)| effects)
    }

    /// Returns what each write did, and how many bytes were in use before it.
    fn transact(&mut self, batch: &[Write]) -> rusqlite::Result<(Vec<Result<Effect, StoreError>>, u64)> {
        let now = now_ms();
        let limits = self.limits;
        let since = now.saturating_sub(limits.remember_ms);
        let healthy = self.health.lock().unwrap_or_else(PoisonError::into_inner).told.is_ok();
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let used = schema::used_bytes(&transaction)?;
        let (full, pressed) = (used >= limits.max_bytes, used >= limits.max_bytes / 4 * 3);
        let mut effects = Vec::with_capacity(batch.len());
        for write in batch {
            effects.push(match write {
                // Its caller gave up and answered 503: the repeat that this asks for should find nothing half done.
                Write::Enqueue(_, answer) if answer.is_closed() => Ok(Effect::Settled),
                // A repeat of what is stored needs no room.
                Write::Enqueue(envelope, _) if full => match seen::contains(&transaction, &envelope.key, since)? {
                    true => Ok(Effect::Accepted(None)),
                    false => Err(limits.full()),
                },
                Write::Enqueue(envelope, _) => {
                    Ok(Effect::Accepted(queue::enqueue(&transaction, envelope, now, since)?))
                }
                Write::Settle(change, _) => {
                    queue::settle(&transaction, change, now)?;
                    Ok(Effect::Settled)
                }
                // The last quarter is for events: without an answer a repeat is asked again.
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
                Write::Release(rows, _) => Ok(Effect::Released(queue::delete(&transaction, rows)?)),
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
        let keep_ms = if pressed { limits.seen_window_ms } else { limits.remember_ms };
        seen::purge(&transaction, now, keep_ms)?;
        answers::purge(&transaction, now)?;
        transaction.commit()?;
        Ok((effects, used))
    }

    fn answer(&self, written: impl Iterator<Item = (Write, Result<Effect, StoreError>)>) {
        let mut news = false;
        for (write, effect) in written {
            // Whoever waited may be gone: a caller that gave up will repeat, and find a duplicate.
            match (write, effect) {
                (Write::Enqueue(_, answer), Ok(Effect::Accepted(row))) => {
                    news |= row.is_some();
                    self.came.fetch_add(row.is_some().into(), Ordering::Relaxed);
                    drop(answer.send(Ok(row)));
                }
                (Write::Release(_, answer), Ok(Effect::Released(rows))) => {
                    self.came.fetch_sub(i64::try_from(rows).unwrap_or(i64::MAX), Ordering::Relaxed);
                    drop(answer.send(Ok(())));
                }
                (Write::Settle(change, answer), Ok(_)) => {
                    news |= matches!(change.settlement, Settlement::Retry { .. } | Settlement::Wait { .. });
                    drop(answer.send(Ok(())));
                }
                (Write::Alone(_, told) | Write::End(told) | Write::Remember(_, told), Ok(_)) => drop(told.send(Ok(()))),
                (write, Err(error)) => write.refuse(&error),
                (Write::Tick | Write::Enqueue(..) | Write::Release(..), Ok(_)) => {}
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
            | Write::Alone(_, answer)
            | Write::End(answer)
            | Write::Remember(_, answer) => drop(answer.send(Err(error.clone()))),
            Write::Tick => {}
        }
    }
}
