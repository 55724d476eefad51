//! The progress of the hand-over from the disk to the queue, on which the next step depends.

use crate::suspects::Suspects;
use std::time::Duration;

/// Interval between looks at a queue that cannot be reached, and the wait after a first refusal.
pub(crate) const RETRY: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub(crate) struct Progress {
    /// How many events are offered together: one after a refusal, twice as many each time all are confirmed.
    pub(crate) width: usize,
    /// While the gate is shut: the last row that was tried, and whether any was offered since the first row.
    pub(crate) probed: i64,
    pub(crate) offered: bool,
    /// Set when a suspect was refused, so that the other events have their turn.
    pub(crate) others_turn: bool,
    pub(crate) suspects: Suspects,
    pub(crate) pause: Duration,
}

impl Default for Progress {
    fn default() -> Progress {
        Progress {
            width: 1,
            probed: 0,
            offered: false,
            others_turn: false,
            suspects: Suspects::default(),
            pause: RETRY,
        }
    }
}
