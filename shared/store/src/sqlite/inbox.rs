//! Brings rows from the file to the worker: in order, bounded in number and bytes, each in one place at a time.
//!
//! Fresh rows are read forward from a cursor, so a row in hand is never read twice and delivering costs no write. Rows
//! that wait for a retry are read by their due time. Rows in hand when a process dies are read again by the next one,
//! whose cursor starts at the beginning.

use super::in_hand::{Handle, InHand};
use super::rows::{Found, Row, read};
use super::{now_ms, reader::Reader, unavailable, writer::Marker};
use rusqlite::Connection;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use streamgate_core::ports::{Delivery, StoreError};
use streamgate_core::retry::Precaution;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::task::AbortOnDropHandle;

/// How soon rows that another process inserted (`dead replay`) are noticed.
const TICK: Duration = Duration::from_millis(500);
/// Unit in which memory is counted, in bytes: semaphores hold 32-bit counts.
const UNIT: usize = 1024;

#[derive(Debug)]
pub(super) struct Inbox {
    arrived: tokio::sync::Mutex<mpsc::Receiver<Delivery<Handle>>>,
    reader: Arc<Reader>,
    in_hand: Arc<InHand>,
    health: Arc<Mutex<Result<(), StoreError>>>,
    /// `None` once the inbox is closed.
    feeder: Mutex<Option<AbortOnDropHandle<()>>>,
}

/// Limits of what may be in hand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Deliveries.
    pub(super) prefetch: usize,
    /// How many deliveries may be parked events.
    pub(super) parked: usize,
    /// Bytes of the deliveries' bodies.
    pub(super) in_hand_bytes: usize,
    /// How long a worker may hold a delivery.
    pub(super) patience: Duration,
}

impl Inbox {
    pub(super) fn start(reader: Reader, marker: Marker, news: Arc<Notify>, bounds: Bounds) -> Inbox {
        let Bounds { prefetch, parked, in_hand_bytes, patience } = bounds;
        let (deliver, arrived) = mpsc::channel(prefetch);
        let units = u32::try_from(in_hand_bytes / UNIT).unwrap_or(u32::MAX >> 4).max(1);
        let (reader, health) = (Arc::new(reader), Arc::new(Mutex::new(Ok(()))));
        let in_hand = Arc::new(InHand::new(Arc::clone(&news), parked, patience));
        let feeder = Feeder {
            reader: Arc::clone(&reader),
            marker,
            deliver,
            in_hand: Arc::clone(&in_hand),
            news,
            slots: Arc::new(Semaphore::new(prefetch)),
            prefetch: u32::try_from(prefetch).unwrap_or(u32::MAX),
            memory: Arc::new(Semaphore::new(units as usize)),
            units,
            cursor: 0,
            health: Arc::clone(&health),
        };
        let feeder = Mutex::new(Some(AbortOnDropHandle::new(tokio::spawn(feeder.run()))));
        Inbox { arrived: tokio::sync::Mutex::new(arrived), reader, in_hand, health, feeder }
    }

    pub(super) async fn next(&self) -> Result<Delivery<Handle>, StoreError> {
        self.arrived.lock().await.recv().await.ok_or_else(|| unavailable("the store is closed"))
    }

    /// Hands out the parked events of these routes, and of no others.
    pub(super) fn take_parked(&self, routes: &[Arc<str>]) {
        self.in_hand.take_parked(routes);
    }

    /// Completes when all deliveries that no handler has begun are wanted back.
    pub(super) async fn recalled(&self) {
        self.in_hand.recall.notified().await;
    }

    /// Runs a query on the reading thread.
    pub(super) async fn query<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.reader.query(query).await
    }

    pub(super) fn ready(&self) -> Result<(), StoreError> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many deliveries handlers have begun. After the close: how many were left behind with a handler.
    pub(super) fn in_hand(&self) -> usize {
        self.in_hand.lock().since.len()
    }

    /// Hands out nothing more.
    pub(super) async fn close(&self) {
        let feeder = self.feeder.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(feeder) = feeder {
            feeder.abort();
            drop(feeder.await);
        }
        let mut arrived = self.arrived.lock().await;
        arrived.close();
        while arrived.try_recv().is_ok() {}
        drop(arrived);
        self.reader.close().await;
    }
}

struct Feeder {
    reader: Arc<Reader>,
    marker: Marker,
    deliver: mpsc::Sender<Delivery<Handle>>,
    in_hand: Arc<InHand>,
    news: Arc<Notify>,
    slots: Arc<Semaphore>,
    prefetch: u32,
    memory: Arc<Semaphore>,
    units: u32,
    /// Every fresh row up to here was read.
    cursor: i64,
    health: Arc<Mutex<Result<(), StoreError>>>,
}

impl Feeder {
    async fn run(mut self) {
        loop {
            // The slot comes first, so that no row is read that could not be handed on.
            let Ok(slot) = Arc::clone(&self.slots).acquire_owned().await else { return };
            let found = self.read().await;
            let result = found.as_ref().map(|_| ()).map_err(Clone::clone);
            *self.health.lock().unwrap_or_else(PoisonError::into_inner) = result;
            let mut wait = TICK;
            match found {
                Ok(found) => {
                    self.cursor = found.cursor;
                    if let Some(due) = found.next_due {
                        wait = wait.min(Duration::from_millis(u64::try_from(due - now_ms()).unwrap_or(0)));
                    }
                    let more = found.more;
                    drop(slot);
                    if !self.hand_on(found.rows).await {
                        return;
                    }
                    if more {
                        continue;
                    }
                }
                Err(error) => tracing::error!(%error, "cannot read the queue"),
            }
            tokio::select! {
                () = self.news.notified() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    async fn read(&self) -> Result<Found, StoreError> {
        let (returned, held) = {
            let mut state = self.in_hand.lock();
            (std::mem::take(&mut state.returned), state.held.clone())
        };
        let (cursor, back) = (self.cursor, returned.clone());
        let parked = self.in_hand.parked_room();
        let read = self.reader.query(move |connection| read(connection, cursor, &back, &held, &parked)).await;
        if read.is_err() {
            self.in_hand.lock().returned.extend(returned);
        }
        read
    }

    /// Hands rows to the worker. Returns whether the worker still listens.
    async fn hand_on(&self, rows: Vec<Row>) -> bool {
        {
            let mut state = self.in_hand.lock();
            state.held.extend(rows.iter().map(|row| row.seq));
            for route in rows.iter().filter_map(|row| row.parked.as_ref()) {
                *state.parked.entry(Arc::clone(route)).or_default() += 1;
            }
        }
        for Row { seq, envelope, deliveries, parked } in rows {
            let units = u32::try_from(envelope.body.len() / UNIT + 1).unwrap_or(u32::MAX).min(self.units);
            // A row that may kill the process is alone in hand, so that no other is blamed for it.
            let suspect = Precaution::of(deliveries) != Precaution::None;
            let slot = if suspect { self.alone(seq).await } else { Arc::clone(&self.slots).acquire_owned().await.ok() };
            let (Some(slot), Ok(memory)) = (slot, Arc::clone(&self.memory).acquire_many_owned(units).await) else {
                return false;
            };
            let handle = Handle::new(seq, parked.clone(), &self.in_hand, (slot, memory));
            if suspect && let Err(error) = self.marker.alone(seq).await {
                tracing::error!(%error, key = envelope.key, "cannot mark an event that may kill the process, trying again");
                tokio::time::sleep(TICK).await;
                continue;
            }
            let delivery = Delivery { envelope, abandoned: deliveries, redelivered: 0, parked, handle };
            if self.deliver.send(delivery).await.is_err() {
                return false;
            }
        }
        true
    }

    /// Waits until nothing else is in hand, except deliveries that are overdue, and keeps it so.
    async fn alone(&self, seq: i64) -> Option<OwnedSemaphorePermit> {
        let mut slots = self.all_slots().await?;
        let own = slots.split(1);
        self.in_hand.keep_alone(seq, slots);
        own
    }

    async fn all_slots(&self) -> Option<OwnedSemaphorePermit> {
        loop {
            let (now, mut wait) = (Instant::now(), TICK);
            let (overdue, next) = self.in_hand.lock().overdue(self.in_hand.patience, now);
            if let Some(next) = next {
                wait = wait.min(next.saturating_duration_since(now));
            }
            let wanted = self.prefetch.saturating_sub(overdue).max(1);
            let slots = Arc::clone(&self.slots).acquire_many_owned(wanted);
            // Deliveries that wait for their route's turn would hold their slots as long as the others.
            self.in_hand.recall.notify_one();
            // Time-limited, since the worker may meanwhile have taken a delivery whose time was not running yet.
            if let Ok(slots) = tokio::time::timeout(wait, slots).await {
                return slots.ok();
            }
        }
    }
}
