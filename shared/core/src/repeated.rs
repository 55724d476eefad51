//! What happens again and again for one cause: one line in the log at once, then one a minute with the count.

use std::time::{Duration, Instant};

/// Chosen: often enough to see that it lasts, seldom enough to read the rest.
const EVERY: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, Default)]
pub struct Repeated {
    last: Option<Instant>,
    unsaid: u64,
}

impl Repeated {
    /// It happened. Returns how often it did since the last line, this time included, where a line is due.
    pub fn happened(&mut self, now: Instant) -> Option<u64> {
        self.unsaid += 1;
        if self.last.is_some_and(|last| now.saturating_duration_since(last) < EVERY) {
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_at_once_and_then_one_a_minute_with_the_count() {
        let (start, mut repeated) = (Instant::now(), Repeated::default());
        let at = |seconds| start + Duration::from_secs(seconds);
        let lines: Vec<_> = [0, 1, 2, 59, 60, 61, 200].map(|second| repeated.happened(at(second))).into();
        assert_eq!(lines, [Some(1), None, None, None, Some(4), None, Some(2)]);
    }
}
