//! When a certificate is asked for, and how long to wait after a failure. PURE.

use crate::certificate::Validity;
use std::time::Duration;

/// When two thirds of a certificate's life are over: of 90 days there are 30 left to get the next one.
pub(super) fn renewal(validity: Validity) -> i64 {
    validity.not_after - life(validity) / 3
}

/// For a certificate that was got at `now`. A clock that is wrong by years makes each new certificate look used up; a third of
/// its life lies between two orders all the same, for authorities limit them to a few a week.
pub(super) fn renewal_of_new(validity: Validity, now: i64) -> i64 {
    renewal(validity).max(now + life(validity) / 3)
}

fn life(validity: Validity) -> i64 {
    validity.not_after - validity.not_before
}

/// What went wrong, as far as the next attempt depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// The authority took a nonce for used (RFC 8555, section 6.5): the next attempt has others.
    Nonce,
    /// No answer, or none that makes sense, or a disk that takes nothing.
    Unreachable,
    /// The authority does not know the account any more.
    Account,
    /// The authority says no: mostly it could not reach the names.
    Refused,
    /// Too many orders.
    RateLimited,
}

impl Cause {
    /// The wait after the first failure in a row, doubled with each further one, and the longest.
    fn waits(self) -> (Duration, Duration) {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        match self {
            Cause::Nonce | Cause::Account => (Duration::from_secs(1), minutes(10)),
            Cause::Unreachable => (Duration::from_secs(10), minutes(10)),
            // Let's Encrypt forgives one failed validation of a name every 12 minutes.
            Cause::Refused => (minutes(15), minutes(240)),
            Cause::RateLimited => (minutes(60), minutes(480)),
        }
    }

    /// `failures`: in a row, this one included.
    pub(super) fn wait(self, failures: u32) -> Duration {
        let (first, longest) = self.waits();
        first.saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1).min(16))).min(longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_renewed_when_two_thirds_of_its_life_are_over() {
        let validity = Validity { not_before: 1_000, not_after: 1_900 };
        assert_eq!(renewal(validity), 1_600);
        assert_eq!(renewal_of_new(validity, 1_001), 1_600);
        // Our clock is years ahead.
        assert_eq!(renewal_of_new(validity, 90_000), 90_300);
    }

    #[test]
    fn waits_double_up_to_a_limit_and_never_run_into_the_authoritys_limits() {
        for cause in [Cause::Nonce, Cause::Unreachable, Cause::Account, Cause::Refused, Cause::RateLimited] {
            let waits: Vec<_> = (1..200).map(|failures| cause.wait(failures)).collect();
            assert!(waits.is_sorted() && waits[1] == waits[0] * 2, "{cause:?}");
            assert_eq!(*waits.last().unwrap(), cause.waits().1, "{cause:?}");
        }
        assert!(Cause::Refused.wait(1) > Duration::from_secs(12 * 60));
    }
}
