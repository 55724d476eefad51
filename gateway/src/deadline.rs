//! By when a request is answered. This alone counts down: stores and workers learn how much time is left, and keep no clock of it.

use std::time::Duration;
use tokio::time::Instant;

/// Kept back for writing a hook's answer, but never more than a tenth of its time.
const WRITING: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    /// The answer is on its way by then, whatever happened.
    pub(crate) answer_by: Instant,
    /// The answer is known by then: a hook that has none is answered by its policy.
    pub(crate) decide_by: Instant,
}

impl Deadline {
    /// `most`: for any request. `hook`: for a hook of its kind, where it is one.
    pub(crate) fn of(head_read: Instant, most: Duration, hook: Option<Duration>) -> Deadline {
        let time = hook.map_or(most, |hook| hook.min(most));
        let answer_by = head_read + time;
        let decide_by = answer_by.checked_sub(WRITING.min(time / 10)).unwrap_or(answer_by);
        Deadline { answer_by, decide_by }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shorter_time_holds_and_a_part_of_it_is_for_writing() {
        let (now, ms) = (Instant::now(), Duration::from_millis);
        let times = |most, hook: Option<u64>| {
            let Deadline { answer_by, decide_by } = Deadline::of(now, ms(most), hook.map(ms));
            ((answer_by - now).as_millis(), (decide_by - now).as_millis())
        };
        assert_eq!(times(4500, None), (4500, 4480));
        assert_eq!(times(4500, Some(800)), (800, 780));
        assert_eq!(times(100, Some(800)), (100, 90));
    }
}
