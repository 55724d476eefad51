//! Which rows are in hand (delivered and not settled): how many, of which route, and for how long.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use streamgate_core::ports;
use tokio::sync::{Notify, OwnedSemaphorePermit};

/// A row in hand. If it is dropped without [`settled`](Handle::settled), the row is delivered again.
#[derive(Debug)]
pub struct Handle {
    seq: i64,
    /// The route that it was parked for, if it was parked.
    parked: Option<Arc<str>>,
    settled: bool,
    hands: Arc<InHand>,
    _room: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

impl Handle {
    pub(super) fn seq(&self) -> i64 {
        self.seq
    }

    pub(super) fn new(
        seq: i64,
        parked: Option<Arc<str>>,
        hands: &Arc<InHand>,
        room: (OwnedSemaphorePermit, OwnedSemaphorePermit),
    ) -> Handle {
        Handle { seq, parked, settled: false, hands: Arc::clone(hands), _room: room }
    }

    /// A handler begins with it.
    pub(super) fn begins(&self) {
        self.hands.lock().since.insert(self.seq, Instant::now());
    }

    /// The row was deleted, or waits until its new time.
    pub(super) fn settled(mut self) {
        self.settled = true;
    }
}

impl ports::Handle for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut state = self.hands.lock();
        state.held.remove(&self.seq);
        state.since.remove(&self.seq);
        state.end_alone(self.seq);
        if let Some(route) = &self.parked {
            // Frees its place. An unsettled row is still parked in the file.
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
pub(super) struct InHand {
    state: Mutex<HandsState>,
    news: Arc<Notify>,
    /// Notified when deliveries that no handler has begun are wanted back.
    pub(super) recall: Notify,
    /// Most parked rows in hand.
    parked: usize,
    /// How long a worker may hold a delivery.
    pub(super) patience: Duration,
}

#[derive(Debug, Default)]
pub(super) struct HandsState {
    pub(super) held: HashSet<i64>,
    /// When handlers began with the rows that they have.
    pub(super) since: HashMap<i64, Instant>,
    pub(super) returned: Vec<i64>,
    /// How many parked rows are in hand, by the route that takes them or took them.
    pub(super) parked: HashMap<Arc<str>, usize>,
    /// The routes that take their parked events now.
    pub(super) taking: Vec<Arc<str>>,
    /// The row that is alone in hand, with the slots that keep others out.
    alone: Option<(i64, OwnedSemaphorePermit)>,
}

impl HandsState {
    /// Lets others in again, if this row kept them out.
    fn end_alone(&mut self, seq: i64) {
        self.alone.take_if(|(alone, _)| *alone == seq);
    }

    /// How many deliveries have been with handlers for longer than allowed, and when the next one will have been.
    pub(super) fn overdue(&self, patience: Duration, now: Instant) -> (u32, Option<Instant>) {
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

impl InHand {
    pub(super) fn new(news: Arc<Notify>, parked: usize, patience: Duration) -> InHand {
        InHand { state: Mutex::default(), news, recall: Notify::new(), parked, patience }
    }

    /// From now on this row keeps the others out, by holding these slots, for `patience` at most: its handler may block
    /// its thread, or its route may not let it begin.
    pub(super) fn keep_alone(self: &Arc<InHand>, seq: i64, slots: OwnedSemaphorePermit) {
        self.lock().alone = Some((seq, slots));
        let (hands, patience) = (Arc::downgrade(self), self.patience);
        tokio::spawn(async move {
            tokio::time::sleep(patience).await;
            if let Some(hands) = hands.upgrade() {
                hands.lock().end_alone(seq);
            }
        });
    }

    pub(super) fn take_parked(&self, routes: &[Arc<str>]) {
        self.lock().taking = routes.to_vec();
        self.news.notify_one();
    }

    /// How many more parked rows each route takes now.
    pub(super) fn parked_room(&self) -> Vec<(Arc<str>, usize)> {
        let state = self.lock();
        let each = (self.parked / state.taking.len().max(1)).max(1);
        let left = |route: &Arc<str>| each.saturating_sub(state.parked.get(route).copied().unwrap_or_default());
        let rooms = state.taking.iter().map(|route| (Arc::clone(route), left(route)));
        rooms.filter(|(_, room)| *room > 0).collect()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, HandsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
