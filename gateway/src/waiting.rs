//! Requests that wait for bytes of their body, and are not verified yet: bounded in all, for each connection and, where clients
//! can be told apart, for each client. Where a bound is reached the newcomer gets the place of whoever has waited longest.

use crate::activity::Activity;
use crate::line::Line;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::Notify;

/// A connection may have a quarter of the places, a client half of them; but this many at least.
const LEAST: usize = 8;

#[derive(Debug)]
pub(crate) struct Waiting {
    most: usize,
    crowd: Mutex<Crowd>,
    began: Instant,
}

#[derive(Debug, Default)]
struct Crowd {
    line: Line<Arc<Waiter>, u64>,
    /// Those that were not displaced, in all and by group.
    places: usize,
    by_group: HashMap<Group, usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Group {
    Connection(u64),
    Client(IpAddr),
}

/// One request that waits.
#[derive(Debug)]
struct Waiter {
    connection: u64,
    client: Option<IpAddr>,
    /// Microseconds since `Waiting::began`.
    last_byte: AtomicU64,
    is_displaced: AtomicBool,
    displaced: Notify,
}

/// A waiter's place, given up when it is dropped.
#[derive(Debug)]
pub(crate) struct WaitingPlace<'a> {
    waiting: &'a Waiting,
    number: u64,
    waiter: Arc<Waiter>,
}

impl Waiting {
    /// `most`: the places in all.
    pub(crate) fn new(most: usize) -> Waiting {
        Waiting { most: most.max(1), crowd: Mutex::default(), began: Instant::now() }
    }

    fn crowd(&self) -> MutexGuard<'_, Crowd> {
        self.crowd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn bound(&self, group: Group) -> usize {
        match group {
            Group::Connection(_) => (self.most / 4).max(LEAST),
            Group::Client(_) => (self.most / 2).max(LEAST),
        }
    }

    /// A place for one more, if need be that of whoever has waited longest. `client`: its address, where clients can be told apart;
    /// else everybody behind a balancer would be one.
    pub(crate) fn enter(&self, activity: &Activity, client: Option<IpAddr>) -> WaitingPlace<'_> {
        let now = self.now();
        let waiter = Arc::new(Waiter {
            connection: activity.number,
            client,
            last_byte: AtomicU64::new(now),
            is_displaced: AtomicBool::new(false),
            displaced: Notify::new(),
        });
        let mut crowd = self.crowd();
        for group in waiter.groups() {
            if crowd.by_group.get(&group).is_some_and(|count| *count >= self.bound(group)) {
                crowd.displace_longest_of(group);
            }
        }
        if crowd.places >= self.most {
            crowd.displace_longest();
        }
        crowd.places += 1;
        for group in waiter.groups() {
            *crowd.by_group.entry(group).or_default() += 1;
        }
        let number = crowd.line.add(Arc::clone(&waiter), now);
        WaitingPlace { waiting: self, number, waiter }
    }

    /// Displaces whoever has waited longest for a byte, but not this one, for which a byte has just come. Returns whether there
    /// was one.
    pub(crate) fn displace_other(&self, than: Option<&WaitingPlace<'_>>) -> bool {
        let mut crowd = self.crowd();
        let own = than.filter(|place| !place.waiter.is_displaced()).inspect(|place| place.byte());
        crowd.places > usize::from(own.is_some()) && crowd.displace_longest()
    }
}

impl Crowd {
    fn displace_longest(&mut self) -> bool {
        let key = |waiter: &Arc<Waiter>| if waiter.is_displaced() { None } else { Some(waiter.last_byte()) };
        let longest = self.line.take_longest(key).map(Arc::clone);
        longest.is_some_and(|waiter| self.displace(&waiter))
    }

    fn displace_longest_of(&mut self, group: Group) {
        let in_group = |waiter: &&Arc<Waiter>| !waiter.is_displaced() && waiter.groups().any(|its| its == group);
        let longest = self.line.members().filter(in_group).min_by_key(|waiter| waiter.last_byte()).map(Arc::clone);
        if let Some(waiter) = longest {
            self.displace(&waiter);
        }
    }

    fn displace(&mut self, waiter: &Waiter) -> bool {
        self.leave(waiter);
        waiter.is_displaced.store(true, Ordering::Relaxed);
        waiter.displaced.notify_one();
        true
    }

    fn leave(&mut self, waiter: &Waiter) {
        self.places -= 1;
        for group in waiter.groups() {
            if let Some(count) = self.by_group.get_mut(&group) {
                *count -= 1;
                if *count == 0 {
                    self.by_group.remove(&group);
                }
            }
        }
    }
}

impl Waiter {
    fn groups(&self) -> impl Iterator<Item = Group> + use<> {
        [Some(Group::Connection(self.connection)), self.client.map(Group::Client)].into_iter().flatten()
    }

    fn last_byte(&self) -> u64 {
        self.last_byte.load(Ordering::Relaxed)
    }

    fn is_displaced(&self) -> bool {
        self.is_displaced.load(Ordering::Relaxed)
    }
}

impl WaitingPlace<'_> {
    /// A byte came.
    pub(crate) fn byte(&self) {
        self.waiter.last_byte.store(self.waiting.now(), Ordering::Relaxed);
    }

    /// Completes when the place is another's.
    pub(crate) async fn displaced(&self) {
        self.waiter.displaced.notified().await;
    }
}

impl Drop for WaitingPlace<'_> {
    fn drop(&mut self) {
        let mut crowd = self.waiting.crowd();
        crowd.line.remove(self.number);
        if !self.waiter.is_displaced() {
            crowd.leave(&self.waiter);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connections::Connections;
    use futures_util::FutureExt;
    use streamgate_service::metrics::Metrics;

    fn activity(number: u64) -> Arc<Activity> {
        Activity::new(number, [192, 0, 2, 9].into(), Connections::new(1, Metrics::new()))
    }

    fn displaced(places: &[WaitingPlace<'_>]) -> Vec<usize> {
        (0..places.len()).filter(|number| places[*number].displaced().now_or_never().is_some()).collect()
    }

    /// A clock of microseconds must move between two bytes.
    fn tick(waiting: &Waiting) {
        let now = waiting.now();
        while waiting.now() == now {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn a_newcomer_gets_the_place_of_whoever_has_waited_longest() {
        let waiting = Waiting::new(3);
        let mut places = Vec::new();
        for number in 0..3 {
            places.push(waiting.enter(&activity(number), None));
            tick(&waiting);
        }
        places[0].byte();
        places.push(waiting.enter(&activity(3), None));
        assert_eq!(displaced(&places), [1]);
        places.remove(1);
        assert!(waiting.displace_other(Some(&places[1])), "the first, for this one has just got a byte");
        assert_eq!(displaced(&places), [0]);
        assert_eq!(waiting.crowd().places, 2);
        drop(places);
        let crowd = waiting.crowd();
        assert_eq!((crowd.places, crowd.by_group.len(), crowd.line.len()), (0, 0, 0));
    }

    #[test]
    fn nobody_is_displaced_for_itself() {
        let waiting = Waiting::new(3);
        assert!(!waiting.displace_other(None));
        let place = waiting.enter(&activity(0), None);
        assert!(!waiting.displace_other(Some(&place)));
        assert_eq!(place.displaced().now_or_never(), None);
    }

    #[test]
    fn connections_and_clients_displace_their_own_first() {
        let waiting = Waiting::new(4 * LEAST);
        let other = waiting.enter(&activity(0), Some([192, 0, 2, 1].into()));
        tick(&waiting);
        let client = Some([192, 0, 2, 2].into());
        let crowded = activity(1);
        let mut places: Vec<_> = (0..=LEAST).map(|_| waiting.enter(&crowded, client)).collect();
        assert_eq!(displaced(&places).len(), 1, "a quarter of the places for a connection");
        // The same client on other connections.
        places.extend((2..=2 + LEAST as u64).map(|number| waiting.enter(&activity(number), client)));
        assert_eq!(displaced(&places).len(), 1, "half of the places for a client");
        assert_eq!(other.displaced().now_or_never(), None);
    }
}
