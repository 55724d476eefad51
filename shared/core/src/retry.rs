//! The retry ladder: how long to wait after each attempt, and when to give up.

use crate::{ports::Settlement, reason::Reason};
use std::time::Duration;

/// Longest error text kept with a dead letter, in bytes.
pub const MAX_ERROR: usize = 512;

/// The longest wait that a service can request by Retry-After, if our own are shorter.
pub(crate) const MAX_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// The waits between attempts: `["1s", "5s", …]`, followed by the dead letters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ladder(Vec<Duration>);

impl Ladder {
    pub fn new(steps: Vec<Duration>) -> Ladder {
        Ladder(steps)
    }

    /// The wait after attempt number `attempt` (from 1) failed; `None` means give up. `retry_after` can only make it longer.
    pub fn after(&self, attempt: u32, retry_after: Option<Duration>) -> Option<Duration> {
        let place = usize::try_from(attempt.saturating_sub(1)).ok()?;
        let step = *self.0.get(place)?;
        Some(retry_after.map_or(step, |asked| step.max(asked.min(self.longest()))))
    }

    /// The longest wait that this ladder can result in.
    pub fn longest(&self) -> Duration {
        self.0.iter().copied().max().unwrap_or_default().max(MAX_RETRY_AFTER)
    }

    /// The shortest step, which a delivery waits while another process holds its lease.
    pub fn shortest(&self) -> Duration {
        self.0.iter().copied().min().unwrap_or(Duration::from_secs(1))
    }
}

/// From this many abandoned attempts on, a delivery is handled alone, so that other handlers do not die with it.
pub const ALONE_FROM: u32 = 5;
/// From this many abandoned attempts on, a delivery is not handled any more.
const POISON_FROM: u32 = 10;
/// From this many deliveries on, an event is handled alone if no claim counts the attempts that were begun. Chosen far above
/// the number that restarts, dropped connections and looks at the queue cause.
const UNKNOWN_ALONE_FROM: u32 = 100;

/// How to treat a delivery whose earlier attempts were begun and never concluded, because the process died or hung each time. A
/// handler that fails or panics does conclude its attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precaution {
    None,
    /// Handle it while no other handler runs.
    Alone,
    /// Do not handle it: it goes to the dead letters.
    Dead,
}

impl Precaution {
    pub fn of(abandoned: u32) -> Precaution {
        match abandoned {
            0..ALONE_FROM => Precaution::None,
            ALONE_FROM..POISON_FROM => Precaution::Alone,
            POISON_FROM.. => Precaution::Dead,
        }
    }

    /// If only deliveries are counted: never a dead letter, because possibly no handler has seen the event.
    pub fn unclaimed(redelivered: u32) -> Precaution {
        if redelivered < UNKNOWN_ALONE_FROM { Precaution::None } else { Precaution::Alone }
    }
}

/// Why an attempt failed, and whether another can help.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    Retry { error: String, retry_after: Option<Duration> },
    Reject { error: String },
}

/// How the delivery of attempt number `attempt` ends.
pub fn settlement(ladder: &Ladder, attempt: u32, result: Result<(), Failure>) -> Settlement {
    let dead = |reason, error| Settlement::Dead { reason, error: Some(shorten(error)) };
    match result {
        Ok(()) => Settlement::Done,
        Err(Failure::Reject { error }) => dead(Reason::Rejected, error),
        Err(Failure::Retry { error, retry_after }) => match ladder.after(attempt, retry_after) {
            Some(delay) => Settlement::Retry { delay, attempt: attempt.saturating_add(1) },
            None => dead(Reason::RetriesExhausted, error),
        },
    }
}

fn shorten(mut error: String) -> String {
    error.truncate(error.floor_char_boundary(MAX_ERROR));
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_settlements() {
        let ladder = Ladder::new(vec![Duration::from_secs(1)]);
        let retry = || Err(Failure::Retry { error: "é".repeat(400), retry_after: None });
        assert_eq!(settlement(&ladder, 1, Ok(())), Settlement::Done);
        assert_eq!(settlement(&ladder, 1, retry()), Settlement::Retry { delay: Duration::from_secs(1), attempt: 2 });
        let exhausted = Settlement::Dead { reason: Reason::RetriesExhausted, error: Some("é".repeat(256)) };
        assert_eq!(settlement(&ladder, 2, retry()), exhausted);
        let rejected = Settlement::Dead { reason: Reason::Rejected, error: Some("no".into()) };
        assert_eq!(settlement(&ladder, 1, Err(Failure::Reject { error: "no".into() })), rejected);
    }

    #[test]
    fn a_table_of_precautions() {
        let cases = [(0, Precaution::None), (4, Precaution::None), (5, Precaution::Alone), (9, Precaution::Alone)];
        for (abandoned, expected) in cases.into_iter().chain([10, u32::MAX].map(|many| (many, Precaution::Dead))) {
            assert_eq!(Precaution::of(abandoned), expected, "{abandoned}");
        }
        let unclaimed = [0, 99, 100, u32::MAX].map(Precaution::unclaimed);
        assert_eq!(unclaimed, [Precaution::None, Precaution::None, Precaution::Alone, Precaution::Alone]);
    }

    #[test]
    fn a_table_of_waits() {
        let seconds = Duration::from_secs;
        let ladder = Ladder::new(vec![seconds(1), seconds(5), seconds(30)]);
        let cases = [
            (1, None, Some(1)),
            (2, None, Some(5)),
            (3, None, Some(30)),
            (4, None, None),
            (u32::MAX, None, None),
            (1, Some(10), Some(10)),
            (3, Some(10), Some(30)),
            (1, Some(1_000_000), Some(3600)),
            (4, Some(10), None),
        ];
        for (attempt, retry_after, expected) in cases {
            assert_eq!(ladder.after(attempt, retry_after.map(seconds)), expected.map(seconds), "attempt {attempt}");
        }
        assert_eq!(ladder.shortest(), seconds(1));
        assert_eq!(Ladder::new(vec![]).after(1, None), None);
    }
}
