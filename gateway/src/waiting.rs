//! Unverified requests that wait for bytes of their bodies. Their number is bounded in all, for each connection and, if
//! clients can be distinguished, for each client. At a bound the newcomer gets the place of the request that has waited longest.

use crate::activity::Activity;
use crate::budget::Short;
use crate::waiting_line::WaitingLine;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;
use tokio::sync::Notify;

/// A connection may have a quarter of the places and a client half of them, but either at least this many.
const LEAST: usize = 8;
/// When memory is short, requests that hold this much go first: most events take less, so displacing those would free little.
const HEAVY: usize = 16 << 10;

#[derive(Debug)]
pub(crate) struct Waiting {
    most: usize,
    crowd: Mutex<Crowd>,
    began: Instant,
}

#[derive(Debug, Default)]
struct Crowd {
    line: WaitingLine<Arc<Waiter>, u64>,
    /// Those that hold much memory are in a line of their own, too.
    heavy: WaitingLine<Arc<Waiter>, u64>,
    /// Requests that were not displaced, in all and by group.
    places: usize,
    by_group: HashMap<Group, usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Group {
    Connection(u64),
    Client(IpAddr),
}

/// One waiting request.
#[derive(Debug)]
struct Waiter {
    connection: u64,
    client: Option<IpAddr>,
    /// Microseconds since `Waiting::began`.
    last_byte: AtomicU64,
    is_displaced: AtomicBool,
    displaced: Notify,
    /// Its number in the line of those that hold much memory.
    heavy: OnceLock<u64>,
    /// It has ended and given back its memory.
    is_gone: AtomicBool,
}

/// A displaced request.
#[derive(Debug)]
pub(crate) struct Displaced(Arc<Waiter>);

impl Displaced {
    /// Whether it has given back its memory.
    pub(crate) fn is_gone(&self) -> bool {
        self.0.is_gone.load(Ordering::SeqCst)
    }

    /// Whether it held much memory. If no waiting request does, the memory is held elsewhere.
    pub(crate) fn is_heavy(&self) -> bool {
        self.0.heavy.get().is_some()
    }
}

/// A request's place, given up on drop.
#[derive(Debug)]
pub(crate) struct WaitingPlace<'a> {
    waiting: &'a Waiting,
    number: u64,
    waiter: Arc<Waiter>,
}

impl Waiting {
    /// `most` is the number of places in all.
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

    /// Gives a newcomer a place, if necessary that of the request that has waited longest. `client` is its address, if
    /// clients can be distinguished; otherwise all clients behind a balancer would count as one.
    pub(crate) fn enter(&self, activity: &Activity, client: Option<IpAddr>) -> WaitingPlace<'_> {
        let now = self.now();
        let waiter = Arc::new(Waiter {
            connection: activity.number,
            client,
            last_byte: AtomicU64::new(now),
            is_displaced: AtomicBool::new(false),
            displaced: Notify::new(),
            heavy: OnceLock::new(),
            is_gone: AtomicBool::new(false),
        });
        let mut crowd = self.crowd();
        for group in waiter.groups() {
            if crowd.by_group.get(&group).is_some_and(|count| *count >= self.bound(group)) {
                crowd.displace_longest_of(group, None);
            }
        }
        if crowd.places >= self.most {
            crowd.displace_longest(None);
        }
        crowd.places += 1;
        for group in waiter.groups() {
            *crowd.by_group.entry(group).or_default() += 1;
        }
        let number = crowd.line.add(Arc::clone(&waiter), now);
        WaitingPlace { waiting: self, number, waiter }
    }

    /// Displaces for its memory the request that has waited longest for a byte, among all or on the same connection. Never
    /// displaces `than`, for which a byte has just come. `None` if there is no other.
    pub(crate) fn displace_other(&self, than: &WaitingPlace<'_>, among: Short) -> Option<Displaced> {
        let mut crowd = self.crowd();
        let group = Group::Connection(than.waiter.connection);
        let (all, own) = (crowd.places, usize::from(!than.waiter.is_displaced()));
        than.byte();
        let displaced = match among {
            Short::All if all > own => crowd.displace_heavy(than).or_else(|| crowd.displace_longest(Some(than))),
            Short::Connection if crowd.by_group.get(&group).is_some_and(|count| *count > own) => {
                crowd.displace_longest_of(group, Some(than))
            }
            Short::All | Short::Connection => None,
        };
        displaced.map(Displaced)
    }
}

impl Crowd {
    fn displace_longest(&mut self, than: Option<&WaitingPlace<'_>>) -> Option<Arc<Waiter>> {
        let number = than.map(|place| place.number);
        let longest = longest_other(&mut self.line, than, number);
        longest.inspect(|waiter| self.displace(waiter))
    }

    fn displace_heavy(&mut self, than: &WaitingPlace<'_>) -> Option<Arc<Waiter>> {
        let number = than.waiter.heavy.get().copied();
        let longest = longest_other(&mut self.heavy, Some(than), number);
        longest.inspect(|waiter| self.displace(waiter))
    }

    fn displace_longest_of(&mut self, group: Group, than: Option<&WaitingPlace<'_>>) -> Option<Arc<Waiter>> {
        let in_group = |waiter: &&Arc<Waiter>| {
            let is_other = than.is_none_or(|place| !Arc::ptr_eq(waiter, &place.waiter));
            is_other && !waiter.is_displaced() && waiter.groups().any(|its| its == group)
        };
        let order = |waiter: &&Arc<Waiter>| (waiter.heavy.get().is_none(), waiter.last_byte());
        let longest = self.line.members().filter(in_group).min_by_key(order).map(Arc::clone);
        longest.inspect(|waiter| self.displace(waiter))
    }

    fn displace(&mut self, waiter: &Waiter) {
        self.leave(waiter);
        waiter.is_displaced.store(true, Ordering::Relaxed);
        waiter.displaced.notify_one();
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

/// The longest waiter of a line other than `than`, which keeps its place there. `number` is that one's number in this line,
/// if any.
fn longest_other(
    line: &mut WaitingLine<Arc<Waiter>, u64>,
    than: Option<&WaitingPlace<'_>>,
    number: Option<u64>,
) -> Option<Arc<Waiter>> {
    let is_other = |waiter: &Arc<Waiter>| than.is_none_or(|place| !Arc::ptr_eq(waiter, &place.waiter));
    let longest = line.take_longest(|waiter| Waiter::key(waiter).filter(|_| is_other(waiter))).map(Arc::clone);
    if let (Some(place), Some(number)) = (than, number) {
        line.line_up(number, place.waiter.last_byte());
    }
    longest
}

impl Waiter {
    fn groups(&self) -> impl Iterator<Item = Group> + use<> {
        [Some(Group::Connection(self.connection)), self.client.map(Group::Client)].into_iter().flatten()
    }

    /// Its position in a line; `None` if it is displaced.
    fn key(waiter: &Arc<Waiter>) -> Option<u64> {
        if waiter.is_displaced() { None } else { Some(waiter.last_byte()) }
    }

    fn last_byte(&self) -> u64 {
        self.last_byte.load(Ordering::Relaxed)
    }

    fn is_displaced(&self) -> bool {
        self.is_displaced.load(Ordering::Relaxed)
    }
}

impl WaitingPlace<'_> {
    /// Notes that a byte came.
    pub(crate) fn byte(&self) {
        self.waiter.last_byte.store(self.waiting.now(), Ordering::Relaxed);
    }

    /// Notes that the request holds this many bytes now.
    pub(crate) fn holds(&self, bytes: usize) {
        if bytes >= HEAVY && self.waiter.heavy.get().is_none() {
            let number = self.waiting.crowd().heavy.add(Arc::clone(&self.waiter), self.waiter.last_byte());
            self.waiter.heavy.get_or_init(|| number);
        }
    }

    /// Completes when the place is given away.
    pub(crate) async fn displaced(&self) {
        self.waiter.displaced.notified().await;
    }
}

impl Drop for WaitingPlace<'_> {
    fn drop(&mut self) {
        let mut crowd = self.waiting.crowd();
        crowd.line.remove(self.number);
        if let Some(number) = self.waiter.heavy.get() {
            crowd.heavy.remove(*number);
        }
        if !self.waiter.is_displaced() {
            crowd.leave(&self.waiter);
        }
        self.waiter.is_gone.store(true, Ordering::SeqCst);
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

    /// The clock of microseconds must advance between two bytes.
    fn tick(waiting: &Waiting) {
        let now = waiting.now();
        while waiting.now() == now {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn a_newcomer_gets_the_place_of_the_longest_waiter() {
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
        let victim =
            waiting.displace_other(&places[1], Short::All).expect("the first, for this one has just got a byte");
        assert_eq!(displaced(&places), [0]);
        assert_eq!(waiting.crowd().places, 2);
        assert!(!victim.is_gone());
        drop(places);
        assert!(victim.is_gone());
        let crowd = waiting.crowd();
        assert_eq!((crowd.places, crowd.by_group.len(), crowd.line.len()), (0, 0, 0));
    }

    #[test]
    fn the_largest_holders_are_displaced_first_for_memory() {
        let waiting = Waiting::new(8);
        let places: Vec<_> = (0..4).map(|number| waiting.enter(&activity(number), None)).collect();
        tick(&waiting);
        places[1].holds(HEAVY);
        places[2].holds(HEAVY);
        places[1].byte();
        assert!(waiting.displace_other(&places[3], Short::All).is_some());
        assert_eq!(displaced(&places), [2]);
        for expected in [vec![1], vec![0], vec![]] {
            assert_eq!(waiting.displace_other(&places[3], Short::All).is_some(), !expected.is_empty());
            assert_eq!(displaced(&places), expected);
        }
    }

    #[test]
    fn no_waiter_displaces_itself() {
        let waiting = Waiting::new(3);
        let place = waiting.enter(&activity(0), None);
        place.holds(HEAVY);
        assert!(waiting.displace_other(&place, Short::All).is_none());
        let other = waiting.enter(&activity(1), None);
        assert!(waiting.displace_other(&place, Short::Connection).is_none(), "it is of another connection");
        assert_eq!(other.displaced().now_or_never(), None);
        assert!(
            waiting.displace_other(&place, Short::All).is_some_and(|victim| !victim.is_heavy()),
            "light, but another"
        );
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
