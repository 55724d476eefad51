//! Brings rows from the file to the worker: in order, bounded in number and bytes, each in one pair of hands at a time.
//!
//! Fresh rows are read forward from a cursor, so a row in hand is never read twice and delivering costs no write. Rows that
//! wait for a retry are read by their time. What was in hand when a process died is read again by the next one, whose
//! cursor starts at the beginning.

use super::{now_ms, reader::MAX_BYTES, reader::Reader, row, unavailable, writer::Marker};
use rusqlite::{Connection, params};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use streamgate_core::envelope::Envelope;
use streamgate_core::ports::{Delivery, StoreError};
use streamgate_core::retry::Precaution;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::task::AbortOnDropHandle;

/// Rows read at a time, and how many of them may be retries or parked: a service that is down must not keep fresh events waiting.
const MAX_ROWS: usize = 64;
const MAX_RETRIES: usize = MAX_ROWS / 2;
const MAX_PARKED: usize = MAX_ROWS / 4;
/// How soon rows that another process inserted (`dead replay`) are noticed.
const TICK: Duration = Duration::from_millis(500);
/// Memory is counted in these: semaphores hold 32-bit counts.
const UNIT: usize = 1024;

#[derive(Debug)]
pub(super) struct Inbox {
    arrived: tokio::sync::Mutex<mpsc::Receiver<Delivery<Handle>>>,
    reader: Arc<Reader>,
    hands: Arc<Hands>,
    health: Arc<Mutex<Result<(), StoreError>>>,
    /// None once it is closed.
    feeder: Mutex<Option<AbortOnDropHandle<()>>>,
}

/// What may be in hand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Deliveries.
    pub(super) prefetch: usize,
    /// How many of them may be parked ones.
    pub(super) parked: usize,
    /// Bytes of their bodies.
    pub(super) in_hand_bytes: usize,
    /// How long a delivery may be with the worker.
    pub(super) patience: Duration,
}

/// A row in hand. Dropped without [`settled`](Handle::settled), the row is delivered again.
#[derive(Debug)]
pub struct Handle {
    seq: i64,
    /// The route that it was parked for.
    parked: Option<Arc<str>>,
    settled: bool,
    hands: Arc<Hands>,
    _room: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

impl Handle {
    pub(super) fn seq(&self) -> i64 {
        self.seq
    }

    /// A handler has it. One that is alone keeps the others out for as long as it may take, and no longer: its handler may block its
    /// thread.
    pub(super) fn begins(&self) {
        let mut state = self.hands.lock();
        state.since.insert(self.seq, Instant::now());
        if state.alone.as_ref().is_none_or(|(alone, _)| *alone != self.seq) {
            return;
        }
        let (hands, seq, patience) = (Arc::downgrade(&self.hands), self.seq, self.hands.patience);
        tokio::spawn(async move {
            tokio::time::sleep(patience).await;
            if let Some(hands) = hands.upgrade() {
                hands.lock().end_alone(seq);
            }
        });
    }

    /// The row is gone, or waits for its new time.
    pub(super) fn settled(mut self) {
        self.settled = true;
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut state = self.hands.lock();
        state.held.remove(&self.seq);
        state.since.remove(&self.seq);
        state.end_alone(self.seq);
        if let Some(route) = &self.parked {
            // Its place is another's. Where it is not settled, it is still parked.
            if let Some(held) = state.parked.get_mut(route) {
                *held -= 1;
            }
        } else if !self.settled {
            state.returned.push(self.seq);
        } else {
            return;
        }
        drop(state);
        self.hands.news.notify_one();
    }
}

/// Which rows are in hand, and which came back unsettled.
#[derive(Debug)]
struct Hands {
    state: Mutex<HandsState>,
    news: Arc<Notify>,
    /// Most parked rows in hand.
    parked: usize,
    /// How long a delivery may be with the worker.
    patience: Duration,
}

#[derive(Debug, Default)]
struct HandsState {
    held: HashSet<i64>,
    /// When those that the worker has were handed to it.
    since: HashMap<i64, Instant>,
    returned: Vec<i64>,
    /// How many parked rows are in hand, of each route that takes them or did.
    parked: HashMap<Arc<str>, usize>,
    /// The routes that take theirs.
    taking: Vec<Arc<str>>,
    /// The one that is alone in hand, with the slots that keep the others out.
    alone: Option<(i64, OwnedSemaphorePermit)>,
}

impl HandsState {
    /// Lets others in again, where this one kept them out.
    fn end_alone(&mut self, seq: i64) {
        self.alone.take_if(|(alone, _)| *alone == seq);
    }

    /// How many deliveries have been with the worker for longer than a handler may take, and when the next one will have been.
    fn overdue(&self, patience: Duration, now: Instant) -> (u32, Option<Instant>) {
        let (mut overdue, mut next) = (0, None);
        for since in self.since.values() {
            match *since + patience {
                until if until <= now => overdue += 1,
                until => next = Some(next.map_or(until, |next: Instant| next.min(until))),
            }
        }
        (overdue, next)
    }
}

impl Hands {
    /// How many parked rows each route takes now.
    fn parked_room(&self) -> Vec<(Arc<str>, usize)> {
        let state = self.lock();
        let each = (self.parked / state.taking.len().max(1)).max(1);
        let left = |route: &Arc<str>| each.saturating_sub(state.parked.get(route).copied().unwrap_or_default());
        let rooms = state.taking.iter().map(|route| (Arc::clone(route), left(route)));
        rooms.filter(|(_, room)| *room > 0).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HandsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inbox {
    pub(super) fn start(reader: Reader, marker: Marker, news: Arc<Notify>, bounds: Bounds) -> Inbox {
        let Bounds { prefetch, parked, in_hand_bytes, patience } = bounds;
        let (deliver, arrived) = mpsc::channel(prefetch);
        let units = u32::try_from(in_hand_bytes / UNIT).unwrap_or(u32::MAX >> 4).max(1);
        let (reader, health) = (Arc::new(reader), Arc::new(Mutex::new(Ok(()))));
        let hands = Arc::new(Hands { state: Mutex::default(), news: Arc::clone(&news), parked, patience });
        let feeder = Feeder {
            reader: Arc::clone(&reader),
            marker,
            deliver,
            hands: Arc::clone(&hands),
            news,
            slots: Arc::new(Semaphore::new(prefetch)),
            prefetch: u32::try_from(prefetch).unwrap_or(u32::MAX),
            memory: Arc::new(Semaphore::new(units as usize)),
            units,
            cursor: 0,
            health: Arc::clone(&health),
        };
        let feeder = Mutex::new(Some(AbortOnDropHandle::new(tokio::spawn(feeder.run()))));
        Inbox { arrived: tokio::sync::Mutex::new(arrived), reader, hands, health, feeder }
    }

    pub(super) async fn next(&self) -> Result<Delivery<Handle>, StoreError> {
        self.arrived.lock().await.recv().await.ok_or_else(|| unavailable("the store is closed"))
    }

    /// Hands out what is parked for these routes, and for no others.
    pub(super) fn take_parked(&self, routes: &[Arc<str>]) {
        self.hands.lock().taking = routes.to_vec();
        self.hands.news.notify_one();
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

    /// Deliveries that the worker has. Once it is closed: which a handler was left behind with.
    pub(super) fn in_hand(&self) -> usize {
        self.hands.lock().since.len()
    }

    /// Hands out no more.
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
    hands: Arc<Hands>,
    news: Arc<Notify>,
    slots: Arc<Semaphore>,
    prefetch: u32,
    memory: Arc<Semaphore>,
    units: u32,
    /// Every fresh row up to here was read.
    cursor: i64,
    health: Arc<Mutex<Result<(), StoreError>>>,
}

struct Row {
    seq: i64,
    envelope: Envelope,
    deliveries: u32,
    parked: Option<Arc<str>>,
}

impl Row {
    fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<Row> {
        Ok(Row { seq: row.get(0)?, deliveries: row.get(1)?, parked: None, envelope: row::envelope(row, 2)? })
    }
}

/// What one read found.
struct Found {
    rows: Vec<Row>,
    cursor: i64,
    /// When the next retry is due, if any waits.
    next_due: Option<i64>,
    /// Whether the read stopped for its own bounds: there may be more.
    more: bool,
}

impl Feeder {
    async fn run(mut self) {
        loop {
            // A slot first: nothing is read that could not be handed on.
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
            let mut state = self.hands.lock();
            (std::mem::take(&mut state.returned), state.held.clone())
        };
        let (cursor, back) = (self.cursor, returned.clone());
        let parked = self.hands.parked_room();
        let read = self.reader.query(move |connection| read(connection, cursor, &back, &held, &parked)).await;
        if read.is_err() {
            self.hands.lock().returned.extend(returned);
        }
        read
    }

    /// Whether the worker still listens.
    async fn hand_on(&self, rows: Vec<Row>) -> bool {
        {
            let mut state = self.hands.lock();
            state.held.extend(rows.iter().map(|row| row.seq));
            for route in rows.iter().filter_map(|row| row.parked.as_ref()) {
                *state.parked.entry(Arc::clone(route)).or_default() += 1;
            }
        }
        for Row { seq, envelope, deliveries, parked } in rows {
            let units = u32::try_from(envelope.body.len() / UNIT + 1).unwrap_or(u32::MAX).min(self.units);
            // One that may kill the process is alone in hand, so that no other is blamed for it.
            let suspect = Precaution::of(deliveries) != Precaution::None;
            let slot = if suspect { self.alone(seq).await } else { Arc::clone(&self.slots).acquire_owned().await.ok() };
            let (Some(slot), Ok(memory)) = (slot, Arc::clone(&self.memory).acquire_many_owned(units).await) else {
                return false;
            };
            let hands = Arc::clone(&self.hands);
            let handle = Handle { seq, parked: parked.clone(), settled: false, hands, _room: (slot, memory) };
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

    /// Waits until nothing else is in hand, but for what has been there for longer than it may take; and keeps it so.
    async fn alone(&self, seq: i64) -> Option<OwnedSemaphorePermit> {
        let mut slots = self.all_slots().await?;
        let own = slots.split(1);
        self.hands.lock().alone = Some((seq, slots));
        own
    }

    async fn all_slots(&self) -> Option<OwnedSemaphorePermit> {
        loop {
            let (now, mut wait) = (Instant::now(), TICK);
            let (overdue, next) = self.hands.lock().overdue(self.hands.patience, now);
            if let Some(next) = next {
                wait = wait.min(next.saturating_duration_since(now));
            }
            let wanted = self.prefetch.saturating_sub(overdue).max(1);
            let slots = Arc::clone(&self.slots).acquire_many_owned(wanted);
            // Meanwhile the worker may have taken one whose time was not running yet.
            if let Ok(slots) = tokio::time::timeout(wait, slots).await {
                return slots.ok();
            }
        }
    }
}

// Each of these must find its rows without looking at the others, however many wait: a test asks SQLite for its plans. The
// index over due_at holds no zeros, and SQLite uses it only where the condition says so in these words.
const BY_SEQ: &str = "WHERE seq = ?1";
const DUE: &str = "WHERE due_at > 0 AND due_at <= ?1 ORDER BY due_at";
const FRESH: &str = "WHERE seq > ?1 AND due_at = 0 ORDER BY seq";
const PARKED: &str = "WHERE parked = ?1 AND parked IS NOT NULL ORDER BY seq";
const LAST: &str = "SELECT coalesce(max(seq), 0) FROM events";
const NEXT_DUE: &str = "SELECT min(due_at) FROM events WHERE due_at > 0 AND due_at > ?1";

fn select(which: &str) -> String {
    format!("SELECT seq, deliveries, {} FROM events {which}", row::COLUMNS)
}

/// `parked`: how many parked rows of which routes.
fn read(
    connection: &Connection,
    cursor: i64,
    returned: &[i64],
    held: &HashSet<i64>,
    parked: &[(Arc<str>, usize)],
) -> rusqlite::Result<Found> {
    let mut found = Found { rows: Vec::new(), cursor, next_due: None, more: false };
    let mut bytes = 0;
    // Before the others are read: whatever is fresh up to here is among what is read.
    let last: i64 = connection.prepare_cached(LAST)?.query_row([], |row| row.get(0))?;
    let full = |rows: &Vec<_>, bytes: usize| rows.len() >= MAX_ROWS || bytes >= MAX_BYTES;
    for seq in returned {
        let sql = select(BY_SEQ);
        let mut rows = connection.prepare_cached(&sql)?;
        let mut rows = rows.query(params![seq])?;
        if let Some(row) = rows.next()? {
            found.rows.push(Row::read(row)?);
        }
    }
    let sql = select(DUE);
    let mut due = connection.prepare_cached(&sql)?;
    let mut rows = due.query(params![now_ms()])?;
    while let Some(row) = rows.next()? {
        let seq: i64 = row.get(0)?;
        if held.contains(&seq) || returned.contains(&seq) {
            continue;
        }
        if found.rows.len() >= MAX_RETRIES || full(&found.rows, bytes) {
            found.more = true;
            break;
        }
        let row = Row::read(row)?;
        bytes += row.envelope.body.len();
        found.rows.push(row);
    }
    drop(rows);
    let sql = select(PARKED);
    let most = found.rows.len() + MAX_PARKED;
    for (route, room) in parked {
        let (mut waiting, mut room) = (connection.prepare_cached(&sql)?, *room);
        let mut rows = waiting.query(params![&**route])?;
        while room > 0
            && let Some(row) = rows.next()?
        {
            if held.contains(&row.get(0)?) {
                continue;
            }
            if found.rows.len() >= most || full(&found.rows, bytes) {
                found.more = true;
                break;
            }
            let row = Row { parked: Some(Arc::clone(route)), ..Row::read(row)? };
            bytes += row.envelope.body.len();
            found.rows.push(row);
            room -= 1;
        }
    }
    let sql = select(FRESH);
    let mut fresh = connection.prepare_cached(&sql)?;
    let mut rows = fresh.query(params![cursor])?;
    while !full(&found.rows, bytes) {
        let Some(row) = rows.next()? else {
            // What is parked, or waits for its time, is not looked at again.
            found.cursor = found.cursor.max(last);
            break;
        };
        let seq: i64 = row.get(0)?;
        found.cursor = seq;
        if returned.contains(&seq) {
            continue;
        }
        let row = Row::read(row)?;
        bytes += row.envelope.body.len();
        found.rows.push(row);
    }
    found.more |= full(&found.rows, bytes);
    drop(rows);
    found.next_due = connection.prepare_cached(NEXT_DUE)?.query_row(params![now_ms()], |row| row.get(0))?;
    Ok(found)
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
            // "SEARCH" alone is how SQLite calls a scan for a minimum.
            let finds = |step: &String| step.starts_with("SEARCH events USING ");
            assert!(steps.iter().all(finds), "{sql}: {steps:?}");
        }
    }
}
