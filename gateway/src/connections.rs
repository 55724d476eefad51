//! The open connections: counted, and the longest idle one closed when a new one needs its place.

use crate::activity::{Activity, Phase};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use streamgate_service::metrics::Metrics;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

#[derive(Debug)]
pub(crate) struct Connections {
    limit: usize,
    open: Mutex<Open>,
    /// Told when a place is free, or a connection has become idle.
    freed: Arc<Notify>,
    metrics: Arc<Metrics>,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    entries: HashMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    activity: Arc<Activity>,
    evicted: CancellationToken,
}

/// An open connection's place.
#[derive(Debug)]
pub(crate) struct Place {
    connections: Arc<Connections>,
    number: u64,
    /// Told when the place is given to another.
    pub(crate) evicted: CancellationToken,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.lock().entries.remove(&self.number);
        self.connections.metrics.gateway_connections.dec();
        self.connections.freed.notify_waiters();
    }
}

impl Connections {
    pub(crate) fn new(limit: usize, metrics: Arc<Metrics>) -> Arc<Connections> {
        Arc::new(Connections { limit, open: Mutex::default(), freed: Arc::default(), metrics })
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a new connection does.
    pub(crate) fn activity(&self) -> Arc<Activity> {
        Activity::new(Arc::clone(&self.freed))
    }

    /// Waits until there is a place, closing the longest idle connection at the limit. Where none is idle, it waits for the
    /// first that becomes so.
    pub(crate) async fn place(self: &Arc<Self>, activity: &Arc<Activity>) -> Place {
        loop {
            // Made before the look: whatever is told after that is heard.
            let freed = self.freed.notified();
            if self.lock().entries.len() < self.limit || self.evict() {
                return self.take(activity);
            }
            freed.await;
        }
    }

    fn take(self: &Arc<Self>, activity: &Arc<Activity>) -> Place {
        let evicted = CancellationToken::new();
        let mut open = self.lock();
        open.next += 1;
        let number = open.next;
        open.entries.insert(number, Entry { activity: Arc::clone(activity), evicted: evicted.clone() });
        self.metrics.gateway_connections.inc();
        Place { connections: Arc::clone(self), number, evicted }
    }

    /// Gives away the place of the longest idle connection; a head that is on its way counts as idle since it began. Returns
    /// whether there was one.
    pub(crate) fn evict(&self) -> bool {
        let mut open = self.lock();
        let idle = open.entries.iter().filter_map(|(number, entry)| match entry.activity.phase() {
            Phase::Idle(since) | Phase::Head(since) => Some((since, *number)),
            Phase::Busy => None,
        });
        let Some((_, longest)) = idle.min() else { return false };
        if let Some(entry) = open.entries.remove(&longest) {
            entry.evicted.cancel();
            self.metrics.gateway_evictions.inc();
        }
        true
    }
}
