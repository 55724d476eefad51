//! A circuit breaker: after several failures in a row a route's service is not called any more, until a probe succeeds.

use crate::retry::MAX_RETRY_AFTER;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

/// When a breaker opens, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerPolicy {
    /// This many failures in a row open the breaker.
    pub failures: NonZeroU32,
    /// The wait before the first probe.
    pub open: Duration,
    /// Each failed probe doubles the wait, up to this.
    pub longest: Duration,
}

impl Default for BreakerPolicy {
    fn default() -> BreakerPolicy {
        let failures = NonZeroU32::MIN.saturating_add(9);
        BreakerPolicy { failures, open: Duration::from_secs(5), longest: Duration::from_secs(120) }
    }
}

/// What an attempt says about the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// The service responded, even if it refused the event.
    Up,
    /// No connection, no response in time, 5xx or 429.
    Down { retry_after: Option<Duration> },
    /// The service was not called.
    Unknown,
}

/// A change of a breaker's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The next attempt is a probe after this wait.
    Opened {
        wait: Duration,
    },
    /// The probe failed as well.
    StillOpen {
        wait: Duration,
    },
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed {
        failures: u32,
    },
    /// A probe is due at `until`. `wait` is the wait without Retry-After, which a failed probe doubles.
    Open {
        until: Instant,
        wait: Duration,
    },
    /// The probe is under way.
    Probing {
        wait: Duration,
        probe: Probe,
    },
}

/// An attempt that finds out whether the service responds again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe(u64);

/// The breaker of one route in one worker.
#[derive(Clone, Copy, Debug)]
pub struct Breaker {
    policy: BreakerPolicy,
    state: State,
    probes: u64,
}

impl Breaker {
    pub fn new(policy: BreakerPolicy) -> Breaker {
        Breaker { policy, state: State::Closed { failures: 0 }, probes: 0 }
    }

    /// Whether an attempt may start: any while it is closed, and one probe when that is due.
    pub fn may_start(&self, now: Instant) -> bool {
        match self.state {
            State::Closed { .. } => true,
            State::Open { until, .. } => until <= now,
            State::Probing { .. } => false,
        }
    }

    /// When a probe is due; `None` while none is waited for.
    pub fn due(&self) -> Option<Instant> {
        match self.state {
            State::Open { until, .. } => Some(until),
            State::Closed { .. } | State::Probing { .. } => None,
        }
    }

    pub fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed { .. })
    }

    /// Starts an attempt that may start; returns a probe if the breaker is open.
    pub fn start(&mut self) -> Option<Probe> {
        let State::Open { wait, .. } = self.state else { return None };
        self.probes += 1;
        let probe = Probe(self.probes);
        self.state = State::Probing { wait, probe };
        Some(probe)
    }

    /// Ends an attempt. Failures of attempts that began before the breaker opened change nothing, because they are not the probe.
    pub fn end(&mut self, probe: Option<Probe>, health: Health, now: Instant) -> Option<Change> {
        let is_probe = matches!(self.state, State::Probing { probe: current, .. } if probe == Some(current));
        match (self.state, health) {
            (State::Closed { failures }, Health::Down { retry_after }) => {
                let failures = failures.saturating_add(1);
                if failures < self.policy.failures.get() {
                    self.state = State::Closed { failures };
                    return None;
                }
                let wait = self.open(self.policy.open, retry_after, now);
                Some(Change::Opened { wait })
            }
            (State::Probing { wait, .. }, Health::Down { retry_after }) if is_probe => {
                let longer = wait.saturating_mul(2).min(self.policy.longest).max(self.policy.open);
                let wait = self.open(longer, retry_after, now);
                Some(Change::StillOpen { wait })
            }
            // The probe says nothing about the service, so the next attempt is the probe.
            (State::Probing { wait, .. }, Health::Unknown) if is_probe => {
                self.state = State::Open { until: now, wait };
                None
            }
            (State::Closed { .. }, Health::Up) => {
                self.state = State::Closed { failures: 0 };
                None
            }
            (State::Open { .. } | State::Probing { .. }, Health::Up) => {
                self.state = State::Closed { failures: 0 };
                Some(Change::Closed)
            }
            (State::Open { .. } | State::Probing { .. }, Health::Down { .. } | Health::Unknown)
            | (State::Closed { .. }, Health::Unknown) => None,
        }
    }

    fn open(&mut self, wait: Duration, retry_after: Option<Duration>, now: Instant) -> Duration {
        let asked = retry_after.unwrap_or_default().min(MAX_RETRY_AFTER);
        self.state = State::Open { until: now + wait.max(asked), wait };
        wait.max(asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DOWN: Health = Health::Down { retry_after: None };
    const SECOND: Duration = Duration::from_secs(1);

    fn policy() -> BreakerPolicy {
        let failures = NonZeroU32::new(3).unwrap();
        BreakerPolicy { failures, open: 5 * SECOND, longest: 18 * SECOND }
    }

    #[test]
    fn failures_in_a_row_open_the_breaker_and_a_successful_probe_closes_it() {
        let (mut breaker, start) = (Breaker::new(policy()), Instant::now());
        for health in [DOWN, DOWN, Health::Up, DOWN, DOWN, Health::Unknown] {
            assert_eq!(breaker.end(None, health, start), None, "not in a row");
        }
        assert_eq!(breaker.end(None, DOWN, start), Some(Change::Opened { wait: 5 * SECOND }));
        assert!(!breaker.may_start(start + 4 * SECOND) && breaker.may_start(start + 5 * SECOND));
        let mut now = start + 5 * SECOND;
        for wait in [10, 18, 18] {
            let probe = breaker.start();
            assert!(probe.is_some() && !breaker.may_start(now), "one at a time");
            assert_eq!(breaker.end(probe, DOWN, now), Some(Change::StillOpen { wait: wait * SECOND }));
            assert_eq!(breaker.due(), Some(now + wait * SECOND));
            now += wait * SECOND;
        }
        let stale = breaker.start();
        assert_eq!(breaker.end(stale, Health::Unknown, now), None);
        assert!(breaker.may_start(now), "a probe that never asked is followed by another");
        let probe = breaker.start();
        assert_eq!(breaker.end(stale, DOWN, now), None, "that is over");
        assert_eq!(breaker.end(probe, Health::Up, now), Some(Change::Closed));
        assert!(breaker.may_start(now) && breaker.start().is_none() && breaker.is_closed());
        assert_eq!(breaker.end(None, DOWN, now), None, "the count begins anew");
    }

    #[test]
    fn late_results_neither_double_the_wait_nor_count_as_the_probe() {
        let (mut breaker, now) = (Breaker::new(policy()), Instant::now());
        for _ in 0..3 {
            breaker.end(None, DOWN, now);
        }
        assert_eq!(breaker.end(None, DOWN, now + SECOND), None);
        assert_eq!(breaker.due(), Some(now + 5 * SECOND));
        assert!(breaker.start().is_some());
        assert_eq!(breaker.end(None, DOWN, now + 6 * SECOND), None);
        assert!(!breaker.may_start(now + 100 * SECOND), "the probe is still on its way");
        assert_eq!(breaker.end(None, Health::Up, now + 6 * SECOND), Some(Change::Closed), "it answers again");
    }

    #[test]
    fn retry_after_makes_the_wait_not_shorter() {
        for (asked, wait) in [(1, 5), (60, 60), (1_000_000, 3600)] {
            let (mut breaker, now) = (Breaker::new(policy()), Instant::now());
            let health = Health::Down { retry_after: Some(asked * SECOND) };
            let changes: Vec<_> = (0..3).filter_map(|_| breaker.end(None, health, now)).collect();
            assert_eq!(changes, [Change::Opened { wait: wait * SECOND }], "asked for {asked} s");
            assert_eq!(breaker.due(), Some(now + wait * SECOND));
        }
    }

    proptest! {
        /// In any run, no attempt starts while a probe is under way, and a service that responds closes the breaker with the
        /// next attempt.
        #[test]
        fn a_breaker_is_never_stuck(steps in proptest::collection::vec((0..4u8, 0..3u8, 0..40u32), 0..200)) {
            let (mut breaker, mut now) = (Breaker::new(policy()), Instant::now());
            let mut running = Vec::new();
            for (what, health, seconds) in steps {
                now += seconds * SECOND;
                let health = [Health::Up, DOWN, Health::Unknown][usize::from(health)];
                if what < 2 {
                    if breaker.may_start(now) {
                        running.push(breaker.start());
                        prop_assert!(breaker.is_closed() || !breaker.may_start(now));
                    }
                } else if !running.is_empty() {
                    let probe = running.remove(seconds as usize % running.len());
                    breaker.end(probe, health, now);
                }
            }
            for probe in running {
                breaker.end(probe, DOWN, now);
            }
            now += policy().longest + SECOND;
            prop_assert!(breaker.may_start(now), "{:?}", breaker);
            let probe = breaker.start();
            breaker.end(probe, Health::Up, now);
            prop_assert!(breaker.is_closed());
        }
    }
}
