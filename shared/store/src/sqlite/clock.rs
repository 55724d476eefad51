//! This machine's clock, which can be set back.

use super::now_ms;
use std::time::Instant;

/// A smaller difference means a clock that is being slewed, or a thread that was not scheduled.
const TOLERANCE_MS: i64 = 1_000;

/// The wall clock, compared with a monotonic one.
#[derive(Debug)]
pub(super) struct Clock {
    wall_ms: i64,
    at: Instant,
}

impl Clock {
    pub(super) fn now() -> Clock {
        Clock { wall_ms: now_ms(), at: Instant::now() }
    }

    /// Whether the wall clock, which was read just now, was set back since the last call.
    pub(super) fn went_back(&mut self, wall_ms: i64) -> bool {
        self.look(wall_ms, Instant::now())
    }

    fn look(&mut self, wall_ms: i64, at: Instant) -> bool {
        let passed = i64::try_from(at.saturating_duration_since(self.at).as_millis()).unwrap_or(i64::MAX);
        let expected = self.wall_ms.saturating_add(passed);
        *self = Clock { wall_ms, at };
        wall_ms < expected.saturating_sub(TOLERANCE_MS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_step_back_is_noticed_once_and_nothing_else_is() {
        let started = Instant::now();
        let mut clock = Clock { wall_ms: 1_000_000, at: started };
        let after = |seconds| started + Duration::from_secs(seconds);
        assert!(!clock.look(1_001_000, after(1)));
        assert!(!clock.look(9_002_000, after(2)), "forward");
        assert!(clock.look(1_003_000, after(3)), "back");
        assert!(!clock.look(1_004_000, after(4)));
        assert!(!clock.look(1_004_500, after(5)), "slewed");
    }
}
