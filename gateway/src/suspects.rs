//! Events on the disk that the queue may never take: too large for RabbitMQ, or refused by a third party's bound queue. One such
//! event must not block those behind it.
//!
//! The refusal of a batch says nothing about a single event. An event that is refused alone is doubted; one that is refused
//! alone again, after another was confirmed, is held: it stays on the disk and is offered less and less often.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;

/// The first and the longest interval between offers of a held event.
const HELD_FIRST: Duration = Duration::from_secs(30);
const HELD_MOST: Duration = Duration::from_secs(600);
/// Most rows that are remembered of either kind. A forgotten row is offered with the others again.
const MOST: usize = 4096;

/// Rows on the disk, by number.
#[derive(Debug, Default)]
pub(crate) struct Suspects {
    doubted: BTreeSet<i64>,
    held: BTreeMap<i64, Held>,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    until: Instant,
    wait: Duration,
}

impl Suspects {
    /// Rows that must not be offered together with others.
    pub(crate) fn numbers(&self) -> BTreeSet<i64> {
        self.doubted.iter().chain(self.held.keys()).copied().collect()
    }

    /// How many are held.
    pub(crate) fn held(&self) -> usize {
        self.held.len()
    }

    /// A row to offer alone, now that the queue takes events.
    pub(crate) fn next(&self, now: Instant) -> Option<i64> {
        let due = || self.held.iter().find(|(_, held)| held.until <= now).map(|(row, _)| *row);
        self.doubted.first().copied().or_else(due)
    }

    /// Notes that a row which was not doubted yet was refused alone.
    pub(crate) fn doubt(&mut self, row: i64) {
        self.doubted.insert(row);
        if self.doubted.len() > MOST {
            self.doubted.pop_first();
        }
    }

    /// Notes that a doubted or held row was refused again although the queue took others. Returns whether it was not held before.
    pub(crate) fn hold(&mut self, row: i64, now: Instant) -> bool {
        self.doubted.remove(&row);
        let before = self.held.get(&row).map(|held| held.wait);
        let wait = before.map_or(HELD_FIRST, |wait| (wait * 2).min(HELD_MOST));
        self.held.insert(row, Held { until: now + wait, wait });
        if self.held.len() > MOST {
            self.held.pop_first();
        }
        before.is_none()
    }

    /// Forgets a row that is not on the disk any more.
    pub(crate) fn clear(&mut self, row: i64) {
        self.doubted.remove(&row);
        self.held.remove(&row);
    }

    /// Forgets doubts: nothing was confirmed meanwhile, so the refused rows are not to blame.
    pub(crate) fn forget_doubts(&mut self) {
        self.doubted.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_event_is_held_only_after_another_was_taken_and_then_offered_more_and_more_seldom() {
        let (mut suspects, start) = (Suspects::default(), Instant::now());
        suspects.doubt(7);
        assert_eq!((suspects.numbers(), suspects.next(start), suspects.held()), ([7].into(), Some(7), 0));
        assert!(suspects.hold(7, start));
        assert_eq!((suspects.numbers(), suspects.next(start), suspects.held()), ([7].into(), None, 1));
        assert_eq!(suspects.next(start + HELD_FIRST), Some(7));
        assert!(!suspects.hold(7, start), "reported once");
        assert_eq!(suspects.next(start + HELD_FIRST), None);
        for _ in 0..10 {
            suspects.hold(7, start);
        }
        assert_eq!(suspects.next(start + HELD_MOST), Some(7));
        suspects.clear(7);
        assert!(suspects.numbers().is_empty());
        suspects.doubt(8);
        suspects.forget_doubts();
        assert!(suspects.numbers().is_empty());
    }
}
