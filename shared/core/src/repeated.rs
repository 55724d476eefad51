//! Limits log lines about recurring events: one line at once for each cause, then one a minute with the count.

use std::time::{Duration, Instant};

/// Chosen: often enough to see that it goes on, rarely enough to read the rest.
const EVERY: Duration = Duration::from_secs(60);
/// Causes that have lines of their own. Beyond them, for example if each text contains another id, there are no more lines
/// within a minute.
const CAUSES: usize = 8;

#[derive(Clone, Debug, Default)]
pub struct Repeated(Vec<Cause>);

#[derive(Clone, Debug)]
struct Cause {
    text: String,
    last: Instant,
    unlogged: u64,
}

impl Repeated {
    /// Counts an occurrence. If a line about this cause is due, returns how often it occurred since the last line, including
    /// this time.
    pub fn happened(&mut self, cause: &str, now: Instant) -> Option<u64> {
        let causes = &mut self.0;
        let is_old = |cause: &Cause| now.saturating_duration_since(cause.last) >= EVERY;
        let known = causes.iter().position(|known| known.text == cause);
        let place =
            known.or_else(|| if causes.len() < CAUSES { None } else { causes.iter().position(is_old).or(Some(0)) });
        let Some(known_cause) = place.and_then(|place| causes.get_mut(place)) else {
            causes.push(Cause { text: cause.to_owned(), last: now, unlogged: 0 });
            return Some(1);
        };
        known_cause.unlogged += 1;
        if !is_old(known_cause) {
            return None;
        }
        let times = known_cause.unlogged;
        *known_cause = Cause { text: cause.to_owned(), last: now, unlogged: 0 };
        Some(times)
    }

    /// The causes that occurred since their last line, with their counts.
    pub fn take_unlogged(&mut self) -> Vec<(String, u64)> {
        let unlogged = self.0.iter_mut().filter(|cause| cause.unlogged > 0);
        unlogged.map(|cause| (cause.text.clone(), std::mem::take(&mut cause.unlogged))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_at_once_for_each_cause_and_then_one_a_minute_with_the_count() {
        let (start, mut repeated) = (Instant::now(), Repeated::default());
        let at = |seconds| start + Duration::from_secs(seconds);
        let lines: Vec<_> = [0, 1, 2, 59, 60, 61, 200].map(|second| repeated.happened("down", at(second))).into();
        assert_eq!(lines, [Some(1), None, None, None, Some(4), None, Some(2)]);
        assert_eq!(repeated.happened("silent", at(201)), Some(1), "another cause is news");
        assert_eq!(repeated.happened("silent", at(202)), None);
        assert_eq!(repeated.take_unlogged(), [("silent".to_owned(), 1)]);
        assert_eq!(repeated.take_unlogged(), []);
        assert_eq!(repeated.happened("down", at(202)), None);
    }

    #[test]
    fn causes_without_end_make_no_lines_without_end() {
        let (start, mut repeated) = (Instant::now(), Repeated::default());
        let lines = (0..1000).filter(|number| repeated.happened(&number.to_string(), start).is_some()).count();
        assert_eq!(lines, CAUSES);
        assert!(repeated.happened("a minute later", start + EVERY).is_some());
    }
}
