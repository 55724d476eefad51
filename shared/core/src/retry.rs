//! The retry ladder: which wait comes after which attempt, and when to give up.

use std::time::Duration;

/// The longest wait that a service can ask for by Retry-After where the ladder's own steps are shorter.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// The waits between attempts: `["1s", "5s", …]`, then the dead letters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ladder(Vec<Duration>);

impl Ladder {
    pub fn new(steps: Vec<Duration>) -> Ladder {
        Ladder(steps)
    }

    /// The wait after attempt number `attempt` (from 1) failed, or none: give up. `retry_after` makes it not shorter.
    pub fn after(&self, attempt: u32, retry_after: Option<Duration>) -> Option<Duration> {
        let place = usize::try_from(attempt.saturating_sub(1)).ok()?;
        let step = *self.0.get(place)?;
        let longest = self.0.iter().copied().max().unwrap_or_default().max(MAX_RETRY_AFTER);
        Some(retry_after.map_or(step, |asked| step.max(asked.min(longest))))
    }

    /// The shortest step: where a delivery waits while another process holds its lease.
    pub fn shortest(&self) -> Duration {
        self.0.iter().copied().min().unwrap_or(Duration::from_secs(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
