//! The results of an event's attempts so far, which travel with the event so that a dead letter shows them all.

use crate::timestamp::{parse_rfc3339, rfc3339};
use serde_json::{Value, json};

/// The newest attempts that are kept.
const MAX_ATTEMPTS: usize = 8;
/// Most bytes of their JSON.
const MAX_BYTES: usize = 1024;
/// Most bytes of one error, whose class and cause come first.
const MAX_ERROR: usize = 96;

/// A failed attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Its number, from 1.
    pub number: u32,
    /// When it ended, in milliseconds since the Unix epoch.
    pub at_ms: i64,
    /// How long it took.
    pub took_ms: u64,
    /// Never contains a service's response.
    pub error: String,
}

/// The newest attempts, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attempts(Vec<Attempt>);

impl Attempts {
    pub fn push(&mut self, attempt: Attempt) {
        let mut error = attempt.error;
        error.truncate(error.floor_char_boundary(MAX_ERROR));
        self.0.push(Attempt { error, ..attempt });
        while self.0.len() > MAX_ATTEMPTS || (self.to_json().len() > MAX_BYTES && !self.0.is_empty()) {
            self.0.remove(0);
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = &Attempt> {
        self.0.iter()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A list of objects with `n`, `at`, `ms` and `error`.
    pub fn to_json(&self) -> String {
        let attempts = self.0.iter().map(|Attempt { number, at_ms, took_ms, error }| {
            json!({"n": number, "at": rfc3339(*at_ms), "ms": took_ms, "error": error})
        });
        Value::from_iter(attempts).to_string()
    }

    /// Reads the JSON of this version or another, and skips what is unreadable.
    pub fn parse(json: &str) -> Attempts {
        let attempts: Vec<Value> = serde_json::from_str(json).unwrap_or_default();
        let mut read = Attempts::default();
        for attempt in &attempts {
            let number = attempt["n"].as_u64().and_then(|number| u32::try_from(number).ok());
            let (Some(number), Some(at_ms)) = (number, attempt["at"].as_str().and_then(parse_rfc3339)) else {
                continue;
            };
            let error = attempt["error"].as_str().unwrap_or_default().to_owned();
            read.push(Attempt { number, at_ms, took_ms: attempt["ms"].as_u64().unwrap_or_default(), error });
        }
        read
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn attempt(number: u32, error: &str) -> Attempt {
        Attempt { number, at_ms: 1_775_658_215_879, took_ms: 12, error: error.to_owned() }
    }

    #[test]
    fn the_newest_are_kept_within_the_bounds() {
        let mut attempts = Attempts::default();
        for number in 1..=20 {
            attempts.push(attempt(number, "refused: nobody listens"));
        }
        assert_eq!(attempts.iter().map(|one| one.number).collect::<Vec<_>>(), (13..=20).collect::<Vec<_>>());
        for number in 21..=40 {
            attempts.push(attempt(number, &"é".repeat(200)));
            assert!(attempts.to_json().len() <= 1024);
            assert_eq!(attempts.iter().last().map(|one| (one.number, one.error.len())), Some((number, 96)));
        }
    }

    #[test]
    fn what_cannot_be_read_is_left_out() {
        for odd in ["", "{}", "[1]", r#"[{"n":1}]"#, r#"[{"n":-1,"at":"2026-01-01T00:00:00Z"}]"#] {
            assert!(Attempts::parse(odd).is_empty(), "{odd}");
        }
        let newer = Attempts::parse(r#"[{"n":1,"at":"2026-01-01T00:00:00Z","invention":{}}]"#);
        assert_eq!(newer.iter().count(), 1);
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(errors in proptest::collection::vec(any::<String>(), 0..12)) {
            let mut attempts = Attempts::default();
            for (number, error) in errors.iter().enumerate() {
                attempts.push(attempt(number as u32, error));
            }
            prop_assert!(attempts.to_json().len() <= 1024);
            prop_assert_eq!(Attempts::parse(&attempts.to_json()), attempts);
        }
    }
}
