//! When a certificate is due, and how long to wait after a failure. PURE.

use crate::certificate::Validity;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// An authority that issues certificates which are due at once must not be asked in a loop.
const LEAST_BETWEEN: Duration = Duration::from_secs(10);

/// After two thirds of a certificate's life: of 90 days, 30 are left to get the next one.
pub(super) fn renewal(validity: Validity) -> i64 {
    validity.not_after - life(validity) / 3
}

/// The least time between a certificate and the next order. If the clock is wrong by years, each new certificate looks
/// expired, and authorities allow only a few orders a week.
pub(super) fn least_between(validity: Validity) -> Duration {
    Duration::from_secs((life(validity) / 3).max(0).unsigned_abs()).max(LEAST_BETWEEN)
}

fn life(validity: Validity) -> i64 {
    validity.not_after - validity.not_before
}

/// The cause of a failure, as far as the next attempt depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Cause {
    /// The authority did not accept the nonce (RFC 8555, section 6.5): the next attempt uses others.
    Nonce,
    /// No usable answer; a disk that cannot be written; or a process that ended during the attempt.
    Unreachable,
    /// The authority refused, mostly because it could not reach the names; or it may have issued what we could not fetch.
    Refused,
    /// Too many orders.
    RateLimited,
}

impl Cause {
    /// The wait after the first failure in a row, which doubles with each further one, and the longest wait.
    fn waits(self) -> (Duration, Duration) {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        match self {
            Cause::Nonce => (Duration::from_secs(1), minutes(10)),
            Cause::Unreachable => (Duration::from_secs(10), minutes(10)),
            // Let's Encrypt forgives one failed validation of a name every 12 minutes.
            Cause::Refused => (minutes(15), minutes(240)),
            Cause::RateLimited => (minutes(60), minutes(480)),
        }
    }
}

/// Failures in a row, all with the same cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Failures {
    cause: Cause,
    count: u32,
}

impl Failures {
    /// Adds a failure: another cause starts a new row.
    pub(super) fn and(before: Option<Failures>, cause: Cause) -> Failures {
        let count = before.filter(|before| before.cause == cause).map_or(0, |before| before.count);
        Failures { cause, count: count.saturating_add(1) }
    }

    /// For an attempt during which the process ends: the wait is never shorter than the one before.
    pub(super) fn unended(before: Option<Failures>) -> Failures {
        match before {
            Some(before) if matches!(before.cause, Cause::Refused | Cause::RateLimited) => before,
            Some(_) | None => Failures::and(before, Cause::Unreachable),
        }
    }

    pub(super) fn wait(self) -> Duration {
        let (first, longest) = self.cause.waits();
        first.saturating_mul(2_u32.saturating_pow(self.count.saturating_sub(1).min(16))).min(longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_due_when_two_thirds_of_its_life_are_over() {
        let validity = Validity { not_before: 1_000, not_after: 1_900 };
        assert_eq!(renewal(validity), 1_600);
        assert_eq!(least_between(validity), Duration::from_secs(300));
        let nonsense = Validity { not_before: 1_900, not_after: 1_000 };
        assert_eq!(least_between(nonsense), LEAST_BETWEEN);
    }

    #[test]
    fn waits_double_up_to_a_limit_and_never_run_into_the_authoritys_limits() {
        for cause in [Cause::Nonce, Cause::Unreachable, Cause::Refused, Cause::RateLimited] {
            let mut row = None;
            let mut waits = Vec::new();
            for _ in 0..200 {
                let failures = Failures::and(row, cause);
                waits.push(failures.wait());
                row = Some(failures);
            }
            assert!(waits.is_sorted() && waits[1] == waits[0] * 2, "{cause:?}");
            assert_eq!(*waits.last().unwrap(), cause.waits().1, "{cause:?}");
        }
        assert!(Failures::and(None, Cause::Refused).wait() > Duration::from_secs(12 * 60));
    }

    #[test]
    fn another_cause_begins_anew() {
        let mut row = None;
        for _ in 0..10 {
            row = Some(Failures::and(row, Cause::Unreachable));
        }
        assert_eq!(Failures::and(row, Cause::Refused), Failures::and(None, Cause::Refused));
    }
}
