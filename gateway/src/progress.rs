//! How handing the disk's events over to the queue goes: what the next step rests on.

use crate::suspects::Suspects;
use std::time::Duration;

/// Between looks at a queue that cannot be reached, and after the first refusal.
pub(crate) const RETRY: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub(crate) struct Progress {
    /// Events that are offered together: one after a refusal, twice as many after each time that all were confirmed.
    pub(crate) width: usize,
    /// While the gate is shut: the last that was looked at, and whether any was offered since the first.
    pub(crate) probed: i64,
    pub(crate) offered: bool,
    /// A suspect was refused: the others have their turn.
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
