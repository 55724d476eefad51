//! The writing thread, as its callers see it: it commits all waiting writes as one transaction (`commit`).
//!
//! One fsync serves every waiting caller: the busier the gateway, the cheaper each event.

use super::clock::Clock;
use super::commit::{Answer, Committer, Remembered, Write};
use super::file_watch::FileWatch;
use super::limits::{Health, Limits, TICK};
use super::queue::Change;
use super::thread::Thread;
use super::{OpenError, schema, unavailable};
use bytes::Bytes;
use rusqlite::Connection;
use std::path::Path;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use streamgate_core::{envelope::Envelope, ports::StoreError, route_record::RouteRecord};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

/// Ticks cause a commit every second: after this long without one, the disk hangs.
const MAX_SILENCE: Duration = Duration::from_secs(3);

#[derive(Debug)]
pub(super) struct Writer {
    writes: mpsc::Sender<Write>,
    health: Arc<Mutex<Health>>,
    /// How many events wait, if they are counted.
    waiting: Option<Arc<AtomicI64>>,
    news: Arc<Notify>,
    thread: Thread,
    ticker: AbortOnDropHandle<()>,
}

impl Writer {
    /// `database`: the file that the connection has open. `waiting`: how many events wait in it, if they are counted.
    pub(super) fn start(
        connection: Connection,
        database: &Path,
        limits: Limits,
        waiting: Option<i64>,
    ) -> Result<Writer, OpenError> {
        let failed = |error| OpenError::Database { path: database.to_owned(), error };
        let data_version = schema::data_version(&connection).map_err(failed)?;
        let waiting = waiting.map(|count| Arc::new(AtomicI64::new(count)));
        let (writes, queue) = mpsc::channel(limits.max_waiting);
        let health = Arc::new(Mutex::new(Health { result: Ok(()), at: Instant::now(), used: 0, has_failed: false }));
        let news = Arc::new(Notify::new());
        let (shown, counted, notified) = (Arc::clone(&health), waiting.clone(), Arc::clone(&news));
        let mut committer = Committer {
            connection,
            limits,
            health: shown,
            waiting: counted,
            data_version,
            news: notified,
            file_watch: FileWatch::of(database),
            log_bytes: 0,
            clock: Clock::now(),
            stepped: false,
            cut_at: Instant::now(),
        };
        let thread = Thread::start("store-writer", move || committer.run(queue))?;
        let ticks = writes.clone();
        let ticker = AbortOnDropHandle::new(tokio::spawn(async move {
            let mut interval = tokio::time::interval(TICK);
            loop {
                interval.tick().await;
                // A full channel means that writes are under way, and those show the store's health as well as a tick.
                if let Err(mpsc::error::TrySendError::Closed(_)) = ticks.try_send(Write::Tick) {
                    return;
                }
            }
        }));
        Ok(Writer { writes, health, waiting, news, thread, ticker })
    }

    /// Notified when rows were added or their due time changed.
    pub(super) fn news(&self) -> Arc<Notify> {
        Arc::clone(&self.news)
    }

    pub(super) fn ready(&self) -> Result<(), StoreError> {
        let health = self.health.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let silent = health.at.elapsed();
        if silent > MAX_SILENCE {
            return Err(unavailable(format!("the disk has not answered for {} s", silent.as_secs())));
        }
        health.result
    }

    /// Bytes of the file in use, as of the last commit, which is a second old at most.
    pub(super) fn used(&self) -> u64 {
        self.health.lock().unwrap_or_else(PoisonError::into_inner).used
    }

    /// How many events wait, if they are counted. Counted at the commit, because callers may have given up by then.
    /// Writes of other processes are counted within a second.
    pub(super) fn waiting(&self) -> u64 {
        let waiting = self.waiting.as_ref().map_or(0, |waiting| waiting.load(Ordering::Relaxed));
        u64::try_from(waiting).unwrap_or(0)
    }

    pub(super) async fn enqueue(&self, envelope: Envelope) -> Result<Option<i64>, StoreError> {
        self.write(|answer| Write::Enqueue(Box::new(envelope), answer)).await
    }

    pub(super) async fn settle(&self, change: Change) -> Result<(), StoreError> {
        self.write(|answer| Write::Settle(change, answer)).await
    }

    pub(super) async fn park(&self, row: i64, route: Arc<str>) -> Result<(), StoreError> {
        self.write(|answer| Write::Park(row, route, answer)).await
    }

    pub(super) async fn copy(&self, row: i64, route: Arc<str>, copies: Vec<Envelope>) -> Result<(), StoreError> {
        self.write(|answer| Write::Copy(row, route, copies, answer)).await
    }

    pub(super) async fn record_route(&self, route: String, record: RouteRecord) -> Result<(), StoreError> {
        self.write(|answer| Write::Route(route, record, answer)).await
    }

    pub(super) async fn release(&self, rows: Vec<i64>) -> Result<(), StoreError> {
        self.write(|answer| Write::Release(rows, answer)).await
    }

    /// Marks rows that are handed out alone.
    pub(super) fn marker(&self) -> Marker {
        Marker(self.writes.clone())
    }

    /// Records that the process ends in order.
    pub(super) async fn end(&self) -> Result<(), StoreError> {
        self.write(Write::End).await
    }

    pub(super) async fn remember(&self, key: [u8; 16], answer: Bytes, until: i64) -> Result<(), StoreError> {
        self.write(|reply| Write::Remember(Remembered { key, answer, until }, reply)).await
    }

    async fn write<T>(&self, make: impl FnOnce(Answer<T>) -> Write) -> Result<T, StoreError> {
        write(&self.writes, make).await
    }

    /// Ends the thread after the waiting writes are committed; later ones fail.
    pub(super) async fn close(&self) {
        self.ticker.abort();
        // The thread may have ended already.
        self.writes.send(Write::Close).await.ok();
        self.thread.join().await;
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
