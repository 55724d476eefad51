//! Limits starts to a rate, by the generic cell rate algorithm, which needs no timer and one number of state.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

/// How early a start may be, because timers do not fire to the millisecond.
const SLACK: Duration = Duration::from_millis(10);

/// At most `count` starts in each `per`, evenly spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub count: NonZeroU32,
    pub per: Duration,
}

impl Rate {
    /// The time between two starts.
    pub fn interval(self) -> Duration {
        self.per / self.count.get()
    }
}

/// Keeps starts to a rate.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    interval: Duration,
    /// The theoretical time of the next start.
    next: Option<Instant>,
}

impl Pace {
    pub fn new(rate: Rate) -> Pace {
        Pace { interval: rate.interval(), next: None }
    }

    /// The earliest time of the next start; `None` if it may be now.
    pub fn wait_until(&self, now: Instant) -> Option<Instant> {
        self.next.and_then(|next| next.checked_sub(SLACK)).filter(|earliest| *earliest > now)
    }

    /// Counts a start.
    pub fn started(&mut self, now: Instant) {
        let begins = self.next.map_or(now, |next| next.max(now));
        self.next = Some(begins + self.interval);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn starts_within(rate: Rate, time: Duration, look: Duration) -> u32 {
        let (begin, mut pace, mut starts) = (Instant::now(), Pace::new(rate), 0);
        let mut now = begin;
        while now < begin + time {
            while pace.wait_until(now).is_none() {
                pace.started(now);
                starts += 1;
            }
            now += look;
        }
        starts
    }

    /// However often the pace is checked: at most the rate plus the slack is used, and nearly all of the rate.
    #[test]
    fn a_rate_is_kept_and_used() {
        for (count, seconds) in [(1, 1), (50, 1), (333, 1), (5_000, 1), (7, 60)] {
            let count = NonZeroU32::new(count).unwrap();
            let rate = Rate { count, per: Duration::from_secs(seconds) };
            for look_ms in [1, 3, 9] {
                let starts = starts_within(rate, Duration::from_secs(seconds * 3), Duration::from_millis(look_ms));
                let most = 3 * count.get() + count.get() / 100 + 1;
                let least = 3 * count.get() - count.get() / 20 - 1;
                assert!((least..=most).contains(&starts), "{rate:?}, a look every {look_ms} ms: {starts} starts");
            }
        }
    }

    #[test]
    fn unused_starts_of_a_rate_are_not_caught_up() {
        let mut pace = Pace::new(Rate { count: NonZeroU32::new(10).unwrap(), per: Duration::from_secs(1) });
        let begin = Instant::now();
        pace.started(begin);
        let later = begin + Duration::from_secs(100);
        assert_eq!(pace.wait_until(later), None);
        pace.started(later);
        assert!(pace.wait_until(later).is_some(), "one start, not a thousand");
    }
}
