//! Decides whether new events go to the queue or to the gateway's own disk: a queue that does not confirm in time must not make
//! callers wait for it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The publishes under way, and what they say about the queue.
#[derive(Debug)]
pub struct Gate {
    /// Once the oldest unconfirmed publish is this old, nothing more is published after it.
    spool_after: Duration,
    /// When each publish began, by its ticket: tickets grow with time, so the first is the oldest.
    unconfirmed: BTreeMap<u64, Instant>,
    next: u64,
    /// Set by a failure, until something is confirmed.
    shut: bool,
}

/// How a publish ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Confirmed,
    /// Refused, returned, or lost with its connection.
    Failed,
    /// Nobody waits for it any more.
    GivenUp,
}

impl Gate {
    pub fn new(spool_after: Duration) -> Gate {
        Gate { spool_after, unconfirmed: BTreeMap::new(), next: 0, shut: false }
    }

    /// Whether new events go to the queue.
    pub fn is_open(&mut self, now: Instant) -> bool {
        let oldest = self.unconfirmed.first_key_value().map(|(_, began)| *began);
        // Remembered, because a caller that gives up must not make the queue look healthy.
        self.shut |= oldest.is_some_and(|began| now.saturating_duration_since(began) >= self.spool_after);
        !self.shut
    }

    /// Begins a publish and returns its ticket.
    pub fn begin(&mut self, now: Instant) -> u64 {
        let ticket = self.next;
        self.next += 1;
        self.unconfirmed.insert(ticket, now);
        ticket
    }

    /// Ends a publish. Returns whether that opened the gate.
    pub fn end(&mut self, ticket: u64, how: Ended) -> bool {
        self.unconfirmed.remove(&ticket);
        match how {
            Ended::Confirmed => std::mem::take(&mut self.shut),
            Ended::Failed => {
                self.shut = true;
                false
            }
            Ended::GivenUp => false,
        }
    }

    /// Opens the gate when the queue is reachable and nothing waits on the disk: the next event is the probe.
    pub fn open(&mut self) {
        self.shut = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AFTER: Duration = Duration::from_millis(250);

    #[test]
    fn an_old_publish_shuts_the_gate_and_a_confirm_opens_it() {
        let (mut gate, start) = (Gate::new(AFTER), Instant::now());
        let (first, second) = (gate.begin(start), gate.begin(start + AFTER / 2));
        assert!(gate.is_open(start + AFTER / 2));
        assert!(!gate.is_open(start + AFTER));
        assert!(gate.end(first, Ended::Confirmed));
        assert!(gate.is_open(start + AFTER), "the second is not yet old");
        assert!(!gate.is_open(start + AFTER * 2));
        assert!(!gate.end(second, Ended::GivenUp));
        assert!(!gate.is_open(start + AFTER * 2), "nothing was confirmed");
        gate.open();
        assert!(gate.is_open(start + AFTER * 2));
    }

    #[test]
    fn a_failure_shuts_the_gate_until_a_confirm() {
        let (mut gate, now) = (Gate::new(AFTER), Instant::now());
        let (one, two, three) = (gate.begin(now), gate.begin(now), gate.begin(now));
        gate.end(one, Ended::Failed);
        assert!(!gate.is_open(now));
        gate.end(two, Ended::Failed);
        assert!(gate.end(three, Ended::Confirmed));
        assert!(gate.is_open(now));
    }
}
