//! Which delivery runs next, and which one makes room for others. Each route has one lane, with its own limits and its own queue.
//!
//! There is no clock and no IO here: time is an argument, and `dispatch` starts and parks the deliveries that this returns.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use streamgate_core::breaker::{Breaker, BreakerPolicy, Change, Health, Probe};
use streamgate_core::rate::{Pace, Rate};

/// A route's limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most handlers at a time.
    pub concurrency: usize,
    pub rate: Option<Rate>,
    /// How long a handler may take.
    pub handler_timeout: Duration,
    /// `None`: its events are tried whatever happened to earlier ones.
    pub breaker: Option<BreakerPolicy>,
}

impl Limits {
    /// How many deliveries may wait so that the last of them begins within `longest`.
    pub fn most_waiting(&self, longest: Duration) -> usize {
        let times = |one: Duration| usize::try_from(longest.as_nanos() / one.as_nanos().max(1)).unwrap_or(usize::MAX);
        let by_time = self.concurrency.saturating_mul(times(self.handler_timeout));
        by_time.min(self.rate.map_or(usize::MAX, |rate| times(rate.interval())))
    }
}

/// What all lanes together may hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    /// Most fresh deliveries that the store hands out, running or waiting.
    pub(crate) deliveries: usize,
    /// Most bytes of bodies.
    pub(crate) bytes: usize,
    /// How long a delivery may wait for its handler before the store takes it back; `None` if it never does.
    pub(crate) longest_wait: Option<Duration>,
}

/// A delivery that waits in a lane.
pub(crate) trait Item {
    fn bytes(&self) -> usize;
    /// Whether it was parked before; then it is not parked again.
    fn is_parked(&self) -> bool;
    /// Whether it may have to run alone. A delivery that may end the process waits for no place, because it keeps all others
    /// from theirs.
    fn is_suspect(&self) -> bool;
    /// Whether it can still be settled. The store delivers again what it has taken back.
    fn is_live(&self) -> bool;
}

/// A delivery that starts.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Start<T> {
    pub(crate) item: T,
    /// Set if it finds out whether the service responds again.
    pub(crate) probe: Option<Probe>,
}

/// Whether events of a route are handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Running = 0,
    /// Its breaker is open: its service failed too many times in a row.
    Open = 1,
    /// A person paused it.
    Paused = 2,
}

#[derive(Debug)]
struct Lane<T> {
    route: Arc<str>,
    limits: Limits,
    pace: Option<Pace>,
    breaker: Option<Breaker>,
    is_paused: bool,
    running: usize,
    /// Bytes of the bodies that run.
    running_bytes: usize,
    /// A delivery has started or ended since the last look.
    has_moved: bool,
    /// None has started for a while, for lack of a place, of room for more bodies, or because of its rate.
    is_stuck: bool,
    fresh: VecDeque<T>,
    parked: VecDeque<T>,
    /// The last delivery to start was fresh: if both queues have one, a parked one is next.
    fresh_was_last: bool,
    /// The route no longer exists; the lane stays for handlers that still run.
    is_retired: bool,
}

impl<T: Item> Lane<T> {
    fn new(route: Arc<str>, limits: Limits) -> Lane<T> {
        let (pace, breaker) = (limits.rate.map(Pace::new), limits.breaker.map(Breaker::new));
        let (fresh, parked) = (VecDeque::new(), VecDeque::new());
        Lane {
            route,
            limits,
            pace,
            breaker,
            is_paused: false,
            running: 0,
            running_bytes: 0,
            has_moved: false,
            is_stuck: false,
            fresh,
            parked,
            fresh_was_last: false,
            is_retired: false,
        }
    }

    fn take_limits(&mut self, limits: Limits) {
        if self.limits.rate != limits.rate {
            self.pace = limits.rate.map(Pace::new);
        }
        if self.limits.breaker != limits.breaker {
            self.breaker = limits.breaker.map(Breaker::new);
        }
        self.limits = limits;
    }

    /// Whether no delivery may start now.
    fn is_shut(&self, now: Instant) -> bool {
        self.is_paused || self.breaker.as_ref().is_some_and(|breaker| !breaker.may_start(now))
    }

    fn state(&self) -> State {
        let is_closed = self.breaker.as_ref().is_none_or(Breaker::is_closed);
        match is_closed {
            _ if self.is_paused => State::Paused,
            true => State::Running,
            false => State::Open,
        }
    }

    fn waiting(&self) -> usize {
        self.fresh.len() + self.parked.len()
    }

    fn has_place(&self) -> bool {
        self.running < self.limits.concurrency
    }

    /// The next delivery that may start: the one in turn, if it has a place, room for its body and a rate that allows it;
    /// else a suspect.
    fn next(&self, share: usize, now: Instant) -> Option<Next> {
        let next = if self.takes_parked() { self.parked.front() } else { self.fresh.front() };
        let fits = |item: &T| self.running == 0 || self.running_bytes + item.bytes() <= share;
        if self.has_place() && self.paced_until(now).is_none() && next.is_some_and(fits) {
            return Some(Next::InTurn);
        }
        let suspect = |items: &VecDeque<T>| items.iter().position(Item::is_suspect);
        suspect(&self.fresh).map(Next::Fresh).or_else(|| suspect(&self.parked).map(Next::Parked))
    }

    fn takes_parked(&self) -> bool {
        !self.parked.is_empty() && (self.fresh_was_last || self.fresh.is_empty())
    }

    /// When the rate lets the next one start; `None` if it may start at once.
    fn paced_until(&self, now: Instant) -> Option<Instant> {
        self.pace.as_ref().and_then(|pace| pace.wait_until(now))
    }

    fn take(&mut self, next: Next) -> Option<T> {
        let item = match next {
            Next::InTurn if self.takes_parked() => self.parked.pop_front(),
            Next::InTurn => self.fresh.pop_front(),
            Next::Fresh(place) => self.fresh.remove(place),
            Next::Parked(place) => self.parked.remove(place),
        }?;
        self.fresh_was_last = !item.is_parked();
        Some(item)
    }
}

/// Which delivery of a lane starts.
enum Next {
    InTurn,
    Fresh(usize),
    Parked(usize),
}

/// All lanes.
#[derive(Debug)]
pub(crate) struct Lanes<T> {
    lanes: Vec<Lane<T>>,
    room: Room,
    waiting_bytes: usize,
    paused: BTreeSet<Arc<str>>,
}

impl<T: Item> Lanes<T> {
    pub(crate) fn new(room: Room) -> Lanes<T> {
        Lanes { lanes: Vec::new(), room, waiting_bytes: 0, paused: BTreeSet::new() }
    }

    /// Replaces the routes. Returns all waiting deliveries, to be offered again: they may belong elsewhere now.
    pub(crate) fn adopt(&mut self, routes: Vec<(Arc<str>, Limits)>) -> Vec<T> {
        let mut waited = Vec::new();
        for lane in &mut self.lanes {
            lane.is_retired = true;
            waited.extend(lane.parked.drain(..).chain(lane.fresh.drain(..)));
        }
        self.waiting_bytes = 0;
        for (route, limits) in routes {
            match self.lanes.iter_mut().find(|lane| lane.route == route) {
                Some(lane) => {
                    lane.is_retired = false;
                    lane.take_limits(limits);
                }
                None => self.lanes.push(Lane::new(route, limits)),
            }
        }
        self.lanes.retain(|lane| !lane.is_retired || lane.running > 0);
        let paused = std::mem::take(&mut self.paused);
        self.pause(paused);
        waited
    }

    /// Pauses these routes and resumes all others.
    pub(crate) fn pause(&mut self, paused: BTreeSet<Arc<str>>) {
        for lane in &mut self.lanes {
            lane.is_paused = paused.contains(&lane.route);
        }
        self.paused = paused;
    }

    /// Queues a delivery in its route's lane. Returns it as the error if there is no such lane.
    pub(crate) fn offer(&mut self, route: &str, item: T) -> Result<(), T> {
        let Some(lane) = self.lanes.iter_mut().find(|lane| *lane.route == *route && !lane.is_retired) else {
            return Err(item);
        };
        self.waiting_bytes += item.bytes();
        if item.is_parked() {
            lane.parked.push_back(item)
        } else {
            lane.fresh.push_back(item)
        }
        Ok(())
    }

    /// The next delivery to run, counted as running until `ended`.
    pub(crate) fn next_start(&mut self, now: Instant) -> Option<Start<T>> {
        let share = self.share();
        let may_start = |lane: &Lane<T>| {
            if lane.waiting() == 0 || lane.is_shut(now) {
                return None;
            }
            lane.next(share, now)
        };
        let (lane, next) = self.lanes.iter_mut().find_map(|lane| may_start(lane).map(|next| (lane, next)))?;
        let item = lane.take(next)?;
        lane.running += 1;
        lane.running_bytes += item.bytes();
        (lane.has_moved, lane.is_stuck) = (true, false);
        if let Some(pace) = &mut lane.pace {
            pace.started(now);
        }
        self.waiting_bytes -= item.bytes();
        Some(Start { item, probe: lane.breaker.as_mut().and_then(Breaker::start) })
    }

    /// The earliest instant at which a rate lets the next one start or a probe is due.
    pub(crate) fn due(&self, now: Instant) -> Option<Instant> {
        let waits = self.lanes.iter().filter(|lane| lane.has_place() && lane.waiting() > 0);
        let paced = waits.filter_map(|lane| lane.paced_until(now));
        let probed = self.lanes.iter().filter(|lane| !lane.is_paused);
        let probes = probed.filter_map(|lane| lane.breaker.as_ref()?.due()).filter(|due| *due > now);
        paced.chain(probes).min()
    }

    /// A delivery to park: any of a lane that is shut; else one that would not begin in time; else the newest of the lane
    /// where most wait, if it is in the way of another lane that could handle more. A lane that is alone is in nobody's way.
    pub(crate) fn next_park(&mut self, now: Instant) -> Option<T> {
        let is_shut = |lane: &Lane<T>| !lane.fresh.is_empty() && lane.is_shut(now);
        // All of a shut lane are parked, so this keeps their order.
        let item = match self.lanes.iter_mut().find(|lane| is_shut(lane)) {
            Some(shut) => shut.fresh.pop_front(),
            None => {
                let place = self.late().or_else(|| self.in_the_way(now))?;
                self.lanes.get_mut(place)?.fresh.pop_back()
            }
        }?;
        self.waiting_bytes -= item.bytes();
        Some(item)
    }

    /// A lane whose last waiting delivery would not begin in time.
    fn late(&self) -> Option<usize> {
        let longest = self.room.longest_wait?;
        let is_late = |lane: &Lane<T>| !lane.fresh.is_empty() && lane.waiting() > lane.limits.most_waiting(longest);
        self.lanes.iter().position(is_late)
    }

    /// Most bytes of bodies that the handlers of one lane may hold, and that all waiting deliveries may hold together.
    fn share(&self) -> usize {
        match self.lanes.len() {
            0 | 1 => self.room.bytes,
            lanes => self.room.bytes / (lanes + 1),
        }
    }

    /// A parked delivery to give back, from a lane that is shut or stuck: it stays in the store.
    pub(crate) fn next_give_back(&mut self, now: Instant) -> Option<T> {
        // A stuck lane keeps its oldest, or the turn of parked ones would never come.
        let is_idle = |lane: &&mut Lane<T>| {
            (lane.is_shut(now) && !lane.parked.is_empty()) || (lane.is_stuck && lane.parked.len() > 1)
        };
        let item = self.lanes.iter_mut().find(is_idle)?.parked.pop_back()?;
        self.waiting_bytes -= item.bytes();
        Some(item)
    }

    fn in_the_way(&self, now: Instant) -> Option<usize> {
        if !self.is_crowded() {
            return None;
        }
        let most = self.lanes.iter().enumerate().filter(|(_, lane)| !lane.fresh.is_empty());
        let (place, _) = most.max_by_key(|(_, lane)| lane.waiting())?;
        let is_idle = |(other, lane): (usize, &Lane<T>)| {
            other != place && !lane.is_retired && lane.has_place() && lane.waiting() == 0 && !lane.is_shut(now)
        };
        self.lanes.iter().enumerate().any(is_idle).then_some(place)
    }

    /// Whether waiting deliveries fill over half of the room, or over what the handlers leave of it.
    fn is_crowded(&self) -> bool {
        let waiting: usize = self.lanes.iter().map(|lane| lane.fresh.len()).sum();
        let handlers: usize = self.lanes.iter().map(|lane| lane.limits.concurrency).sum();
        let most = (self.room.deliveries / 2).min(self.room.deliveries.saturating_sub(handlers));
        waiting > most || self.waiting_bytes > self.share()
    }

    /// Passes the result of an attempt to the route's breaker. Returns what that changes.
    pub(crate) fn judged(&mut self, route: &str, probe: Option<Probe>, health: Health, now: Instant) -> Option<Change> {
        let lane = self.lanes.iter_mut().find(|lane| *lane.route == *route)?;
        lane.breaker.as_mut()?.end(probe, health, now)
    }

    /// Takes note that a handler has ended. Returns whether others of its lane wait for that.
    pub(crate) fn ended(&mut self, route: &str, bytes: usize) -> bool {
        let Some(place) = self.lanes.iter().position(|lane| *lane.route == *route) else { return false };
        let Some(lane) = self.lanes.get_mut(place) else { return false };
        lane.running = lane.running.saturating_sub(1);
        lane.running_bytes = lane.running_bytes.saturating_sub(bytes);
        (lane.has_moved, lane.is_stuck) = (true, false);
        let waits = lane.waiting() > 0;
        if lane.is_retired && lane.running == 0 {
            self.lanes.swap_remove(place);
        }
        waits
    }

    /// The routes whose parked events may be delivered.
    pub(crate) fn taking_parked(&self, now: Instant) -> Vec<Arc<str>> {
        let taking = self.lanes.iter().filter(|lane| !lane.is_retired && !lane.is_shut(now) && !lane.is_stuck);
        taking.map(|lane| Arc::clone(&lane.route)).collect()
    }

    /// Whether all routes run and take parked events.
    pub(crate) fn all_run(&self) -> bool {
        self.lanes.iter().all(|lane| lane.state() == State::Running && !lane.is_stuck)
    }

    /// Finds out which lanes have not moved since the last look, and drops what the store has taken back.
    pub(crate) fn look(&mut self, now: Instant) {
        let share = self.share();
        for lane in &mut self.lanes {
            let has_room = lane.has_place() && lane.running_bytes < share && lane.paced_until(now).is_none();
            lane.is_stuck = !std::mem::take(&mut lane.has_moved) && !has_room;
            lane.fresh.retain(Item::is_live);
            lane.parked.retain(Item::is_live);
        }
        let waiting = self.lanes.iter().flat_map(|lane| lane.fresh.iter().chain(&lane.parked));
        self.waiting_bytes = waiting.map(Item::bytes).sum();
    }

    pub(crate) fn states(&self) -> Vec<(Arc<str>, State)> {
        let present = self.lanes.iter().filter(|lane| !lane.is_retired);
        present.map(|lane| (Arc::clone(&lane.route), lane.state())).collect()
    }

    /// Removes and returns all waiting deliveries.
    pub(crate) fn take_waiting(&mut self) -> Vec<T> {
        self.waiting_bytes = 0;
        self.lanes.iter_mut().flat_map(|lane| lane.parked.drain(..).chain(lane.fresh.drain(..))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::num::NonZeroU32;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Event {
        number: usize,
        is_parked: bool,
    }

    impl Item for Event {
        fn bytes(&self) -> usize {
            10
        }

        fn is_parked(&self) -> bool {
            self.is_parked
        }

        fn is_suspect(&self) -> bool {
            self.number >= SUSPECT
        }

        fn is_live(&self) -> bool {
            !(STALE..SUSPECT).contains(&self.number)
        }
    }

    const STALE: usize = 1_000;
    const SUSPECT: usize = 2_000;

    fn limits(concurrency: usize) -> Limits {
        Limits { concurrency, rate: None, handler_timeout: Duration::from_secs(30), breaker: None }
    }

    fn lanes(deliveries: usize, routes: &[(&str, usize)]) -> Lanes<Event> {
        let mut lanes = Lanes::new(Room { deliveries, bytes: 1 << 20, longest_wait: Some(Duration::from_secs(900)) });
        let routes = routes.iter().map(|(route, concurrency)| (Arc::from(*route), limits(*concurrency)));
        assert!(lanes.adopt(routes.collect()).is_empty());
        lanes
    }

    fn fresh(number: usize) -> Event {
        Event { number, is_parked: false }
    }

    fn starts(lanes: &mut Lanes<Event>) -> Vec<usize> {
        std::iter::from_fn(|| lanes.next_start(Instant::now())).map(|start| start.item.number).collect()
    }

    #[test]
    fn each_lane_has_its_own_places() {
        let mut lanes = lanes(64, &[("slow", 2), ("quick", 1)]);
        for number in 0..6 {
            lanes.offer("slow", fresh(number)).unwrap();
        }
        assert_eq!(starts(&mut lanes), [0, 1]);
        lanes.offer("quick", fresh(10)).unwrap();
        assert_eq!(starts(&mut lanes), [10], "what hangs beside it does not matter");
        assert!(lanes.ended("slow", 10) && !lanes.ended("quick", 10));
        assert_eq!(starts(&mut lanes), [2]);
        assert_eq!(lanes.offer("gone", fresh(11)), Err(fresh(11)));
    }

    #[test]
    fn a_lane_parks_only_where_it_is_in_the_way_of_one_that_is_idle() {
        let mut two = lanes(16, &[("slow", 1), ("quick", 1)]);
        for number in 0..9 {
            two.offer("slow", fresh(number)).unwrap();
        }
        starts(&mut two);
        assert_eq!(two.next_park(Instant::now()), None, "8 wait: half of the room");
        two.offer("slow", fresh(9)).unwrap();
        assert_eq!(two.next_park(Instant::now()), Some(fresh(9)), "the newest");
        assert_eq!(two.next_park(Instant::now()), None);
        for number in [20, 21] {
            two.offer("quick", fresh(number)).unwrap();
        }
        starts(&mut two);
        assert_eq!(two.next_park(Instant::now()), None, "both are full: nobody is helped");
        two.ended("quick", 10);
        starts(&mut two);
        two.ended("quick", 10);
        two.offer("slow", fresh(10)).unwrap();
        assert_eq!(two.next_park(Instant::now()), Some(fresh(10)));
        let mut alone = lanes(16, &[("slow", 1)]);
        alone.room.longest_wait = None;
        for number in 0..100 {
            alone.offer("slow", fresh(number)).unwrap();
        }
        starts(&mut alone);
        assert_eq!(alone.next_park(Instant::now()), None, "one that is alone is in nobody's way");
    }

    #[test]
    fn a_lane_parks_for_the_bytes_of_large_bodies_too() {
        let mut lanes = lanes(1000, &[("slow", 8), ("quick", 1)]);
        lanes.room.bytes = 90;
        for number in 0..7 {
            lanes.offer("slow", fresh(number)).unwrap();
        }
        assert_eq!(starts(&mut lanes), [0, 1, 2], "30 bytes for each of the lanes, and for what waits");
        assert_eq!(lanes.next_park(Instant::now()), Some(fresh(6)));
        assert_eq!(lanes.next_park(Instant::now()), None);
        lanes.offer("quick", fresh(10)).unwrap();
        assert_eq!(starts(&mut lanes), [10]);
    }

    #[test]
    fn a_suspect_waits_for_no_place_and_what_the_store_took_back_does_not_start() {
        let mut lanes = lanes(64, &[("app", 1)]);
        for number in [0, 1, STALE, SUSPECT] {
            lanes.offer("app", fresh(number)).unwrap();
        }
        assert_eq!(starts(&mut lanes), [0, SUSPECT]);
        lanes.look(Instant::now());
        assert_eq!(lanes.waiting_bytes, 10);
        for _ in 0..2 {
            lanes.ended("app", 10);
        }
        assert_eq!(starts(&mut lanes), [1]);
    }

    #[test]
    fn a_lane_that_is_stuck_leaves_what_is_parked_to_others() {
        let (mut lanes, now) = (lanes(64, &[("app", 1)]), Instant::now());
        let parked = Event { number: 10, is_parked: true };
        lanes.offer("app", fresh(0)).unwrap();
        let second = Event { number: 11, is_parked: true };
        for event in [parked, second] {
            lanes.offer("app", event).unwrap();
        }
        assert_eq!(starts(&mut lanes), [0]);
        lanes.look(Instant::now());
        assert_eq!((lanes.next_give_back(now), lanes.taking_parked(now).len()), (None, 1), "it has moved");
        lanes.look(Instant::now());
        assert_eq!((lanes.next_give_back(now), lanes.taking_parked(now).len()), (Some(second), 0));
        assert_eq!(lanes.next_give_back(now), None, "its own turn comes");
        lanes.ended("app", 10);
        assert_eq!((lanes.taking_parked(now).len(), lanes.all_run()), (1, true));
        lanes.offer("app", fresh(1)).unwrap();
        assert_eq!(starts(&mut lanes), [10], "however slow the handlers are and however many fresh ones wait");
    }

    #[test]
    fn parked_and_fresh_take_turns_oldest_first() {
        let mut lanes = lanes(64, &[("app", 1)]);
        for number in 0..4 {
            lanes.offer("app", fresh(number)).unwrap();
            lanes.offer("app", Event { number: 10 + number, is_parked: true }).unwrap();
        }
        let mut order = Vec::new();
        for _ in 0..8 {
            order.extend(starts(&mut lanes));
            lanes.ended("app", 10);
        }
        assert_eq!(order, [0, 10, 1, 11, 2, 12, 3, 13]);
    }

    #[test]
    fn a_rate_spreads_the_starts_and_parks_what_would_be_late() {
        let mut lanes = lanes(1000, &[("slow", 10), ("quick", 1)]);
        let rate = Some(Rate { count: NonZeroU32::new(1).unwrap(), per: Duration::from_secs(60) });
        lanes.adopt(vec![("slow".into(), Limits { rate, ..limits(10) }), ("quick".into(), limits(1))]);
        for number in 0..20 {
            lanes.offer("slow", fresh(number)).unwrap();
        }
        let now = Instant::now();
        assert_eq!(lanes.next_start(now).map(|start| start.item), Some(fresh(0)));
        assert_eq!(lanes.next_start(now), None);
        let due = lanes.due(now).unwrap();
        assert!(due > now + Duration::from_secs(59) && due <= now + Duration::from_secs(60));
        assert_eq!(lanes.next_start(due).map(|start| start.item), Some(fresh(1)));
        let parked: Vec<_> = std::iter::from_fn(|| lanes.next_park(Instant::now())).collect();
        assert_eq!(parked.len(), 3, "15 of 18 begin within 15 minutes");
    }

    #[test]
    fn a_reload_keeps_running_deliveries_and_returns_waiting_ones() {
        let mut lanes = lanes(64, &[("old", 1), ("kept", 1)]);
        for route in ["old", "kept"] {
            for number in 0..3 {
                lanes.offer(route, fresh(number)).unwrap();
            }
        }
        starts(&mut lanes);
        let waited = lanes.adopt(vec![("kept".into(), limits(2)), ("new".into(), limits(1))]);
        assert_eq!(waited.len(), 4);
        assert_eq!(lanes.taking_parked(Instant::now()), ["kept".into(), "new".into()] as [Arc<str>; 2]);
        assert!(lanes.offer("old", fresh(9)).is_err());
        for event in waited {
            lanes.offer("kept", event).unwrap();
        }
        assert_eq!(starts(&mut lanes).len(), 1, "one of two places is taken");
        assert!(!lanes.ended("old", 10));
        assert_eq!(lanes.lanes.len(), 2, "a lane that is gone goes with its last handler");
    }

    #[test]
    fn an_open_lane_parks_fresh_events_returns_parked_ones_and_starts_one_probe() {
        let breaker = Some(BreakerPolicy { failures: NonZeroU32::MIN, ..BreakerPolicy::default() });
        let mut lanes = lanes(64, &[]);
        lanes.adopt(vec![("app".into(), Limits { breaker, ..limits(4) })]);
        let now = Instant::now();
        lanes.offer("app", fresh(0)).unwrap();
        let start = lanes.next_start(now).unwrap();
        assert_eq!(start.probe, None);
        let down = Health::Down { retry_after: None };
        assert!(matches!(lanes.judged("app", None, down, now), Some(Change::Opened { .. })));
        lanes.ended("app", 10);
        let parked = Event { number: 10, is_parked: true };
        for event in [fresh(1), fresh(2), parked] {
            lanes.offer("app", event).unwrap();
        }
        assert_eq!(lanes.next_start(now), None);
        assert_eq!((lanes.next_park(now), lanes.next_park(now)), (Some(fresh(1)), Some(fresh(2))), "alone or not");
        assert_eq!((lanes.next_give_back(now), lanes.next_give_back(now)), (Some(parked), None));
        assert!(lanes.taking_parked(now).is_empty() && !lanes.all_run());
        let due = lanes.due(now).unwrap();
        assert_eq!(lanes.taking_parked(due).len(), 1, "a quiet route is probed with what is parked");
        for number in [3, 4] {
            lanes.offer("app", fresh(number)).unwrap();
        }
        let Start { item, probe } = lanes.next_start(due).unwrap();
        assert_eq!((item, probe.is_some()), (fresh(3), true));
        assert_eq!((lanes.next_start(due), lanes.next_park(due)), (None, Some(fresh(4))));
        assert_eq!(lanes.judged("app", probe, Health::Up, due), Some(Change::Closed));
        lanes.offer("app", fresh(5)).unwrap();
        assert_eq!(lanes.next_start(due), Some(Start { item: fresh(5), probe: None }));
        assert!(lanes.all_run());
        lanes.offer("app", fresh(6)).unwrap();
        lanes.pause(["app".into()].into());
        assert_eq!((lanes.next_start(due), lanes.next_park(due)), (None, Some(fresh(6))), "a person's word holds, too");
        assert!(lanes.adopt(vec![("app".into(), limits(4))]).is_empty() && lanes.taking_parked(due).is_empty());
        lanes.pause(BTreeSet::new());
        assert!(lanes.all_run() && lanes.taking_parked(due).len() == 1);
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Offer { lane: usize, is_parked: bool },
        Start,
        End { lane: usize },
        Park,
        Adopt,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => (0..3usize, proptest::bool::weighted(0.2)).prop_map(|(lane, is_parked)| Step::Offer { lane, is_parked }),
            4 => Just(Step::Start),
            3 => (0..3usize).prop_map(|lane| Step::End { lane }),
            2 => Just(Step::Park),
            1 => Just(Step::Adopt),
        ];
        proptest::collection::vec(step, 0..200)
    }

    const ROUTES: [(&str, usize); 3] = [("a", 1), ("b", 2), ("c", 3)];

    proptest! {
        /// Whatever happens: none is lost or started twice, no lane runs more than it may, and no lane with a free place waits.
        #[test]
        fn every_delivery_has_one_fate(steps in steps()) {
            let mut lanes = lanes(12, &ROUTES);
            let (mut running, mut offered, mut fates) = (vec![0_usize; 3], 0, std::collections::HashMap::new());
            let mut lane_of = std::collections::HashMap::new();
            for step in steps {
                match step {
                    Step::Offer { lane, is_parked } => {
                        lane_of.insert(offered, lane);
                        lanes.offer(ROUTES[lane].0, Event { number: offered, is_parked }).unwrap();
                        offered += 1;
                    }
                    Step::Start => {
                        while let Some(Start { item: event, .. }) = lanes.next_start(Instant::now()) {
                            prop_assert_eq!(fates.insert(event.number, "started"), None);
                            running[lane_of[&event.number]] += 1;
                        }
                        for (place, (route, concurrency)) in ROUTES.iter().enumerate() {
                            let lane = lanes.lanes.iter().find(|lane| *lane.route == **route).unwrap();
                            prop_assert!(lane.waiting() == 0 || running[place] == *concurrency);
                        }
                    }
                    Step::End { lane } if running[lane] > 0 => {
                        running[lane] -= 1;
                        lanes.ended(ROUTES[lane].0, 10);
                    }
                    Step::End { .. } => {}
                    Step::Park => {
                        if let Some(event) = lanes.next_park(Instant::now()) {
                            prop_assert!(!event.is_parked);
                            prop_assert_eq!(fates.insert(event.number, "parked"), None);
                        }
                    }
                    Step::Adopt => {
                        let routes = ROUTES.map(|(route, concurrency)| (Arc::from(route), limits(concurrency)));
                        for event in lanes.adopt(routes.to_vec()) {
                            lanes.offer(ROUTES[lane_of[&event.number]].0, event).unwrap();
                        }
                    }
                }
                for (place, (_, concurrency)) in ROUTES.iter().enumerate() {
                    prop_assert!(running[place] <= *concurrency);
                }
                let waiting: usize = lanes.lanes.iter().map(Lane::waiting).sum();
                prop_assert_eq!(waiting + fates.len(), offered);
                prop_assert_eq!(lanes.waiting_bytes, waiting * 10);
            }
        }
    }
}
