//! How many deliveries RabbitMQ hands to a worker before the first of them is settled.

use crate::backends::PARKED_SHARE;
use crate::wiring;
use std::time::Duration;
use streamgate_store::rabbitmq::Prefetch;
use streamgate_worker::Limits;

/// RabbitMQ's limit for a consumer of a quorum queue.
const MOST_UNACKED: usize = 2000;
/// Most handlers at a time: the share of parked deliveries comes off.
pub(super) const MOST_HANDLERS: usize = MOST_UNACKED - MOST_UNACKED / PARKED_SHARE;
/// RabbitMQ takes back what is not settled within 30 minutes, its default consumer_timeout: half of that is for waiting.
pub(super) const LONGEST_WAIT: Duration = Duration::from_secs(15 * 60);

/// `most`: deliveries in hand. The last prefetched one waits for all before it, so fewer are prefetched if handlers are
/// slow and few. With several routes the worker prevents long waits itself, by parking.
pub(super) fn prefetch(most: usize, routes: &[Limits]) -> Prefetch {
    let total = most.min(MOST_UNACKED);
    let in_time = routes.iter().map(|limits| limits.most_waiting(LONGEST_WAIT)).min().unwrap_or(usize::MAX);
    let each = (total / PARKED_SHARE / routes.len().max(1)).min(in_time / PARKED_SHARE).max(1);
    let parked = each * routes.len().max(1);
    let alone = if routes.len() > 1 { usize::MAX } else { in_time.saturating_sub(each) };
    let fresh = total.saturating_sub(parked).min(alone).max(wiring::handlers(routes)).max(1);
    let count = |deliveries: usize| u16::try_from(deliveries).unwrap_or(u16::MAX);
    Prefetch { fresh: count(fresh), parked: count(parked) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroU32;
    use streamgate_core::rate::Rate;

    #[test]
    fn nothing_is_prefetched_that_rabbitmq_would_take_back() {
        let limits = |concurrency, seconds| Limits {
            concurrency,
            rate: None,
            handler_timeout: Duration::from_secs(seconds),
            breaker: None,
        };
        let counts = |most, routes: &[Limits]| {
            let Prefetch { fresh, parked } = prefetch(most, routes);
            (fresh, parked)
        };
        assert_eq!(counts(256, &[limits(64, 30)]), (192, 64));
        assert_eq!(counts(256, &[limits(2, 30)]), (45, 15), "2 at a time, 30 s each, in 15 minutes");
        assert_eq!(counts(256, &[limits(64, 14 * 60)]), (64, 16), "never under the concurrency");
        assert_eq!(counts(256, &[limits(64, 30), limits(2, 30)]), (226, 30), "the worker parks what would be late");
        assert_eq!(counts(10_000, &[limits(1500, 1)]), (1500, 500), "RabbitMQ's own limit");
        let rate = Some(Rate { count: NonZeroU32::new(1).unwrap(), per: Duration::from_secs(60) });
        assert_eq!(counts(256, &[Limits { rate, ..limits(1, 1) }]), (12, 3), "one in a minute");
    }
}
