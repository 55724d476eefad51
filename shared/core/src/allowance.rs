//! Lines in the log of what strangers or a broken service can cause at will: so many a second, and the rest as counts.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Lines a second. Chosen: enough to see what goes on, and a day of it is under a gigabyte.
const MOST: u32 = 10;
const SECOND: Duration = Duration::from_secs(1);

#[derive(Clone, Debug, Default)]
pub struct Allowance {
    /// When the present second began, and the lines of it.
    second: Option<(Instant, u32)>,
    /// How often each thing happened that had no line, since they were last taken.
    left_out: BTreeMap<&'static str, u64>,
}

impl Allowance {
    /// Whether what happened may have a line; it is counted if not.
    pub fn allows(&mut self, what: &'static str, now: Instant) -> bool {
        let (began, lines) = match self.second {
            Some((began, lines)) if now.saturating_duration_since(began) < SECOND => (began, lines),
            Some(_) | None => (now, 0),
        };
        let allows = lines < MOST;
        if !allows {
            *self.left_out.entry(what).or_default() += 1;
        }
        self.second = Some((began, lines + u32::from(allows)));
        allows
    }

    /// What had no line since the last call, as `unknown_key 12, not_found 3`.
    pub fn take_left_out(&mut self) -> Option<String> {
        let left_out = std::mem::take(&mut self.left_out);
        let counts: Vec<_> = left_out.into_iter().map(|(what, count)| format!("{what} {count}")).collect();
        (!counts.is_empty()).then(|| counts.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_lines_a_second_and_the_rest_as_counts() {
        let (start, mut allowance) = (Instant::now(), Allowance::default());
        let at = |ms| start + Duration::from_millis(ms);
        let lines = (0..20).filter(|ms| allowance.allows("a", at(*ms))).count();
        assert_eq!((lines, allowance.allows("b", at(900))), (10, false));
        assert!(allowance.allows("b", at(1_000)), "another second");
        assert_eq!(allowance.take_left_out().as_deref(), Some("a 10, b 1"));
        assert_eq!(allowance.take_left_out(), None);
    }
}
