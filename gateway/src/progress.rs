//! The progress of the hand-over from the disk to the queue, on which the next step depends.

use crate::suspects::Suspects;
use std::time::Duration;

/// Interval between looks at a queue that cannot be reached, and the wait after a first refusal.
pub(crate) const RETRY: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub(crate) struct Progress {
    pub(crate) mode: Mode,
    /// How many events are offered together: one after a refusal, twice as many each time all are confirmed.
    pub(crate) width: usize,
    pub(crate) suspects: Suspects,
    pub(crate) pause: Duration,
}

/// What the hand-over is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// The queue takes events, and a suspect may be offered alone before the others.
    SuspectsFirst,
    /// The queue takes events, and a suspect was refused: the others have their turn.
    OthersFirst,
    /// The queue takes nothing: one event after another finds out whether it does again, from this number on.
    Probing { after: i64, offered: Offered },
}

/// Whether a round of probes has offered the queue anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offered {
    Nothing,
    Some,
}

impl Mode {
    /// A new round of probes, from the first event on.
    pub(crate) const PROBE: Mode = Mode::Probing { after: 0, offered: Offered::Nothing };
}

impl Default for Progress {
    fn default() -> Progress {
        Progress { mode: Mode::SuspectsFirst, width: 1, suspects: Suspects::default(), pause: RETRY }
    }
}
