//! The writing thread: takes all writes that wait, commits them as one transaction, then answers them all.
//!
//! One fsync serves everybody who waited for it: the busier the gateway, the cheaper each event. Nobody is answered before
//! the commit. Where a batch fails for what one write holds, each is tried alone, so that one cannot take the others with it.

use super::queue::{self, Change};
use super::{OpenError, Options, answers, millis, now_ms, schema, seen, unavailable};
use bytes::Bytes;
use rusqlite::{Connection, ErrorCode, TransactionBehavior};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use streamgate_core::{
    envelope::Envelope,
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
    Enqueue(Box<Envelope>, Answer<Accepted>),
    Settle(Change, Answer<()>),
    /// The first answer to a hook.
    Remember([u8; 16], Bytes, Answer<()>),
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

    pub(super) async fn remember(&self, key: [u8; 16], answer: Bytes) -> Result<(), StoreError> {
        self.write(|told| Write::Remember(key, answer, told)).await
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
            Ok((_, true)) => Err(self.limits.full()),
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
                    true => Ok(Effect::Accepted(Accepted::Duplicate)),
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
                Write::Remember(key, answer, _) => {
                    answers::insert(&transaction, *key, answer, now)?;
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
        let keep_ms = if pressed { limits.seen_window_ms } else { limits.remember_ms };
        seen::purge(&transaction, now, keep_ms)?;
        answers::purge(&transaction, now)?;
        transaction.commit()?;
        Ok((effects, full))
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
                (Write::Remember(_, _, told), Ok(_)) => drop(told.send(Ok(()))),
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
            Write::Settle(_, answer) | Write::Remember(_, _, answer) => drop(answer.send(Err(error.clone()))),
            Write::Tick => {}
        }
    }
}
