//! Limits the log lines that strangers or a broken service can cause at will; the excess is counted.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// Lines a second. Chosen: enough to see what goes on, and a day's lines are under a gigabyte.
const MOST: usize = 10;
const SECOND: Duration = Duration::from_secs(1);

#[derive(Clone, Debug, Default)]
pub struct Allowance {
    /// When the current second began, and its number of lines.
    second: Option<(Instant, usize)>,
    /// What had a line in the current second.
    said: BTreeSet<String>,
    /// How often each thing happened without a line, since these counts were last taken.
    left_out: BTreeMap<String, u64>,
}

impl Allowance {
    /// Whether an occurrence of `what`, from a closed set, may have a line; if not, it is counted. Each thing may have its
    /// first line of a second however many lines others have: a flood of one hides no other.
    pub fn allows(&mut self, what: &str, now: Instant) -> bool {
        if self.second.is_none_or(|(began, _)| now.saturating_duration_since(began) >= SECOND) {
            self.second = Some((now, 0));
            self.said.clear();
        }
        let lines = self.second.map_or(0, |(_, lines)| lines);
        let allows = lines < MOST || !self.said.contains(what);
        if allows {
            self.second = self.second.map(|(began, lines)| (began, lines + 1));
            self.said.insert(what.to_owned());
        } else {
            *self.left_out.entry(what.to_owned()).or_default() += 1;
        }
        allows
    }

    /// What had no line since the last call, like `unknown_key 12, not_found 3`.
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
        assert_eq!(lines, 10);
        assert!(allowance.allows("b", at(900)), "a flood of one hides no other");
        assert!(!allowance.allows("b", at(901)) && !allowance.allows("a", at(902)));
        assert!(allowance.allows("b", at(1_000)), "another second");
        assert_eq!(allowance.take_left_out().as_deref(), Some("a 11, b 1"));
        assert_eq!(allowance.take_left_out(), None);
    }
}
