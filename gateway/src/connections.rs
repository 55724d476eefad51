//! The open connections: counted by their sockets, and one is closed when a new one needs its place.

use crate::activity::{Activity, Rank};
use crate::waiting_line::WaitingLine;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use streamgate_service::metrics::Metrics;
use tokio::sync::Notify;

/// After this long without a free place another connection is evicted: the first may take its time to say goodbye.
const NEXT: Duration = Duration::from_millis(10);
/// After this long without a free place a gateway is not ready; under load each new connection waits for a moment.
const STUCK: Duration = Duration::from_secs(1);

type Members = WaitingLine<Arc<Activity>, (Rank, Instant)>;

#[derive(Debug)]
pub(crate) struct Connections {
    limit: usize,
    open: Mutex<Members>,
    /// Notified when a place is free, or when another connection can be evicted.
    freed: Notify,
    /// The last connection that was closed to free memory.
    pressed: Mutex<Option<u64>>,
    /// Why no connection can be accepted, and since when.
    stuck: Mutex<Option<(Instant, Stuck)>>,
    metrics: Arc<Metrics>,
}

/// Why no connection can be accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stuck {
    /// All places are taken, and none of their connections can be evicted.
    Places,
    /// The process or the system has no descriptor or memory left.
    Descriptors,
}

/// An open connection's place, until its socket is closed.
#[derive(Debug)]
pub(crate) struct Place {
    connections: Arc<Connections>,
    pub(crate) activity: Arc<Activity>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.open().remove(self.activity.number);
        self.connections.metrics.gateway_connections.dec();
        self.connections.freed.notify_waiters();
    }
}

impl Connections {
    pub(crate) fn new(limit: usize, metrics: Arc<Metrics>) -> Arc<Connections> {
        Arc::new(Connections {
            limit,
            open: Mutex::default(),
            freed: Notify::new(),
            pressed: Mutex::default(),
            stuck: Mutex::default(),
            metrics,
        })
    }

    fn open(&self) -> MutexGuard<'_, Members> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stuck(&self) -> MutexGuard<'_, Option<(Instant, Stuck)>> {
        self.stuck.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a place, and at the limit evicts connections. If none can be evicted, it waits for the first that can.
    /// Cancel-safe.
    pub(crate) async fn place(self: &Arc<Self>, peer: IpAddr) -> Place {
        let mut evicted: Option<Instant> = None;
        loop {
            // Created before the check, so that no notification after it is missed.
            let freed = self.freed.notified();
            if let Some(place) = self.take(peer) {
                self.clear_stuck();
                return place;
            }
            self.note_stuck(Stuck::Places);
            // One eviction at a time, whatever wakes this loop.
            if evicted.is_none_or(|at| at.elapsed() >= NEXT) && self.evict() {
                evicted = Some(Instant::now());
            }
            drop(tokio::time::timeout(NEXT, freed).await);
        }
    }

    fn take(self: &Arc<Self>, peer: IpAddr) -> Option<Place> {
        let mut open = self.open();
        if open.len() >= self.limit {
            return None;
        }
        let activity = Activity::new(open.next(), peer, Arc::clone(self));
        open.add(Arc::clone(&activity), (Rank::Unverified, Instant::now()));
        self.metrics.gateway_connections.inc();
        Some(Place { connections: Arc::clone(self), activity })
    }

    /// Closes the first connection that can go, to free memory that is not given back otherwise: never one that carried a signed
    /// request, and only after the one before is gone.
    pub(crate) fn evict_for_memory(&self) {
        let mut pressed = self.pressed.lock().unwrap_or_else(PoisonError::into_inner);
        if pressed.is_some_and(|before| self.open().contains(before)) {
            return;
        }
        *pressed = self.evict_up_to(Rank::Unverified);
    }

    /// Closes the first connection that can go: refused ones before unverified ones, and those before verified ones; within a
    /// rank the one that has waited longest. Its place is free when its socket is closed. Returns whether there was one.
    pub(crate) fn evict(&self) -> bool {
        self.evict_up_to(Rank::Verified).is_some()
    }

    /// Evicts a connection of this rank at most, and returns its number.
    fn evict_up_to(&self, rank: Rank) -> Option<u64> {
        let mut open = self.open();
        let standing = |activity: &Arc<Activity>| {
            // In this order a connection that becomes idle after the check finds itself out of line, and lines up again.
            activity.set_in_line(false);
            let standing = activity.standing();
            activity.set_in_line(standing.is_some());
            standing
        };
        let activity = Arc::clone(open.take_longest(standing)?);
        // A signature may have matched since the check.
        match standing(&activity) {
            None => return None,
            Some(standing) if standing.0 > rank => {
                open.line_up(activity.number, standing);
                return None;
            }
            Some(_) => activity.evicted.cancel(),
        }
        self.metrics.gateway_evictions.inc();
        Some(activity.number)
    }

    /// Puts a connection in its place in the line of those that can go.
    pub(crate) fn line_up(&self, activity: &Activity) {
        let mut open = self.open();
        if let Some(standing) = activity.standing().filter(|_| !activity.evicted.is_cancelled()) {
            activity.set_in_line(true);
            open.line_up(activity.number, standing);
            drop(open);
            self.freed.notify_waiters();
        }
    }

    /// Notes that no connection can be accepted now.
    pub(crate) fn note_stuck(&self, why: Stuck) {
        let mut stuck = self.stuck();
        if stuck.is_none_or(|(_, before)| before != why) {
            *stuck = Some((Instant::now(), why));
        }
    }

    pub(crate) fn lacks_descriptors(&self) -> bool {
        matches!(*self.stuck(), Some((_, Stuck::Descriptors)))
    }

    /// Notes that connections are accepted again.
    pub(crate) fn clear_stuck(&self) {
        *self.stuck() = None;
    }

    /// Whether a new connection could be accepted now; the error says why not.
    pub(crate) fn ready(&self) -> Result<(), &'static str> {
        match *self.stuck() {
            Some((_, Stuck::Descriptors)) => {
                Err("cannot accept connections: the limit of open files is reached; raise it (ulimit -n, LimitNOFILE=)")
            }
            Some((since, Stuck::Places)) if since.elapsed() >= STUCK => {
                Err("cannot accept connections: gateway.max_connections are open, and all are busy")
            }
            Some((_, Stuck::Places)) | None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn evicted(places: &[&Place]) -> Vec<bool> {
        places.iter().map(|place| place.activity.evicted.is_cancelled()).collect()
    }

    #[tokio::test]
    async fn the_least_valuable_connection_is_closed_and_its_place_is_free_with_its_socket() {
        let connections = Connections::new(4, Metrics::new());
        let mut places = Vec::new();
        for _ in 0..4 {
            places.push(connections.place(PEER).now_or_never().unwrap());
        }
        let [verified, refused, unverified, busy] = &places[..] else { panic!() };
        let (_, signed) = verified.activity.begin();
        signed.signed();
        drop(signed);
        let (_, in_hand) = busy.activity.begin();
        in_hand.signed();
        let (_, bad) = refused.activity.begin();
        let lingering = bad.linger();
        drop(bad);
        assert!(connections.place(PEER).now_or_never().is_none());
        let all = [verified, refused, unverified, busy];
        assert_eq!(evicted(&all), [false, true, false, false]);
        assert!(connections.place(PEER).now_or_never().is_none(), "the socket is still open");
        assert_eq!(evicted(&all), [false, true, true, false]);
        connections.evict();
        assert_eq!(evicted(&all), [true, true, true, false]);
        connections.evict();
        assert_eq!(evicted(&all), [true, true, true, false], "a signed request is in hand");
        drop(in_hand);
        connections.evict();
        assert_eq!(evicted(&all), [true, true, true, true], "and now it is not");
        drop(lingering);
        places.pop();
        assert!(connections.place(PEER).now_or_never().is_some());
        assert_eq!(connections.ready(), Ok(()));
    }

    #[test]
    fn a_connection_that_was_active_meanwhile_is_not_the_longest_idle() {
        let connections = Connections::new(2, Metrics::new());
        let one = connections.take(PEER).unwrap();
        let two = connections.take(PEER).unwrap();
        drop(one.activity.begin());
        connections.evict();
        assert_eq!(evicted(&[&one, &two]), [false, true]);
    }

    #[test]
    fn missing_descriptors_are_reported_until_a_connection_is_accepted() {
        let connections = Connections::new(1, Metrics::new());
        connections.note_stuck(Stuck::Descriptors);
        assert!(connections.ready().is_err());
        connections.clear_stuck();
        assert_eq!(connections.ready(), Ok(()));
    }
}
