//! When a connection has to end, as a table over its phase and how far it is on its way out.

use crate::activity::Phase;
use std::time::{Duration, Instant};

/// How far a connection is on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaving {
    No,
    /// The drain began at this instant. What the peer sent before it could know that is still taken.
    Grace(Instant),
    /// The peer was notified at this instant; the answers in hand are the last.
    Notified(Instant),
    /// The place was given away at this instant: only answers in hand are waited for.
    Evicted(Instant),
}

/// What has to happen to a connection when its time is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClockAction {
    /// A head was not complete in time.
    HeadTimeout,
    /// The peer is to be notified that the connection ends.
    Notify,
    /// The connection is to be dropped.
    Now,
}

/// How long each phase may last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    pub(crate) header_timeout: Duration,
    pub(crate) keep_alive: Duration,
    /// How long the peer may take to read an answer.
    pub(crate) write_timeout: Duration,
    /// How long an idle connection is kept when a drain begins, for requests on their way.
    pub(crate) grace: Duration,
    /// How long an idle connection may take for its goodbye.
    pub(crate) goodbye: Duration,
}

/// What a connection is doing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConnectionStatus {
    pub(crate) phase: Phase,
    /// Since when the oldest answer waits to be taken, whatever else is in hand.
    pub(crate) unwritten: Option<Instant>,
    /// Whether it ever carried a signed request.
    pub(crate) is_verified: bool,
}

/// What has to happen if the connection stays as it is, and when; `None` if another clock limits its phase.
pub(crate) fn next(doing: &ConnectionStatus, leaving: Leaving, times: &Times) -> Option<(Instant, ClockAction)> {
    let untaken = doing.unwritten.map(|since| (since + times.write_timeout, ClockAction::Now));
    let other = by_phase(doing.phase, leaving, doing.is_verified, times);
    [untaken, other].into_iter().flatten().min_by_key(|(at, _)| *at)
}

fn by_phase(phase: Phase, leaving: Leaving, is_verified: bool, times: &Times) -> Option<(Instant, ClockAction)> {
    // Whatever was in hand when the peer was notified is answered within this time. A request that comes later is from a peer
    // that ignores the notice, and extends nothing.
    let last = |at: Instant| at + times.write_timeout + times.goodbye;
    let next = match (phase, leaving) {
        (Phase::Busy | Phase::Reading(_) | Phase::Lingering(_) | Phase::Writing(_), Leaving::Grace(began)) => {
            (began, ClockAction::Notify)
        }
        // Requests have deadlines of their own, and so does lingering.
        (Phase::Busy, Leaving::No | Leaving::Notified(_) | Leaving::Evicted(_))
        | (Phase::Reading(_), Leaving::No | Leaving::Evicted(_))
        | (Phase::Lingering(_), Leaving::No) => return None,
        (Phase::Reading(_) | Phase::Lingering(_), Leaving::Notified(at)) => (last(at), ClockAction::Now),
        (Phase::Writing(since), Leaving::No | Leaving::Notified(_)) => (since + times.write_timeout, ClockAction::Now),
        (Phase::Lingering(_) | Phase::Writing(_) | Phase::Head(_), Leaving::Evicted(at)) => (at, ClockAction::Now),
        (Phase::Head(since), Leaving::No | Leaving::Grace(_) | Leaving::Notified(_)) => {
            (since + times.header_timeout, ClockAction::HeadTimeout)
        }
        (Phase::Idle(since), Leaving::No) => (since + times.keep_alive, ClockAction::Notify),
        (Phase::Idle(since), Leaving::Grace(began)) => (since.max(began) + times.grace, ClockAction::Notify),
        (Phase::Idle(_), Leaving::Evicted(at)) if !is_verified => (at, ClockAction::Now),
        (Phase::Idle(since), Leaving::Notified(at) | Leaving::Evicted(at)) => {
            ((since.max(at) + times.goodbye).min(last(at)), ClockAction::Now)
        }
    };
    Some(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_phases() {
        let second = Duration::from_secs(1);
        let times = Times {
            header_timeout: 5 * second,
            keep_alive: 75 * second,
            write_timeout: 4 * second,
            grace: second / 4,
            goodbye: second / 2,
        };
        let then = Instant::now();
        let (early, late) = (then + second, then + 9 * second);
        let (idle, lingering, head) = (Phase::Idle(early), Phase::Lingering(early), Phase::Head(early));
        let (reading, writing, busy) = (Phase::Reading(early), Phase::Writing(early), Phase::Busy);
        let (no, grace, notified, evicted) =
            (Leaving::No, Leaving::Grace(late), Leaving::Notified(late), Leaving::Evicted(late));
        let head_timeout = Some((early + 5 * second, ClockAction::HeadTimeout));
        let unwritten = Some((early + 4 * second, ClockAction::Now));
        let notify = Some((late, ClockAction::Notify));
        let cut = Some((late, ClockAction::Now));
        let goodbye = Some((late + second / 2, ClockAction::Now));
        let last = Some((late + 4 * second + second / 2, ClockAction::Now));
        let next = |phase, leaving, is_verified| {
            super::next(&ConnectionStatus { phase, unwritten: None, is_verified }, leaving, &times)
        };
        let cases = [
            (idle, no, Some((early + 75 * second, ClockAction::Notify))),
            (idle, grace, Some((late + second / 4, ClockAction::Notify))),
            (idle, notified, goodbye),
            (idle, evicted, goodbye),
            (lingering, no, None),
            (lingering, grace, notify),
            (lingering, notified, last),
            (lingering, evicted, cut),
            (head, no, head_timeout),
            (head, grace, head_timeout),
            (head, notified, head_timeout),
            (head, evicted, cut),
            (reading, no, None),
            (reading, grace, notify),
            (reading, notified, last),
            (reading, evicted, None),
            (writing, no, unwritten),
            (writing, grace, notify),
            (writing, notified, unwritten),
            (writing, evicted, cut),
            (busy, no, None),
            (busy, grace, notify),
            (busy, notified, None),
            (busy, evicted, None),
        ];
        for (phase, leaving, expected) in cases {
            assert_eq!(next(phase, leaving, true), expected, "{phase:?} {leaving:?}");
            let expected = if (phase, leaving) == (idle, evicted) { cut } else { expected };
            assert_eq!(next(phase, leaving, false), expected, "unverified: {phase:?} {leaving:?}");
        }
        // A connection that becomes idle after the notice has the same time from then on.
        let after = Phase::Idle(late + second);
        assert_eq!(next(after, notified, true), Some((late + second + second / 2, ClockAction::Now)));
        // But a peer that ignores the notice does not get more for ever.
        assert_eq!(next(Phase::Idle(late + 60 * second), notified, true), last);
        // An answer that is not taken ends a connection whatever else it does.
        for phase in [busy, reading, writing, lingering] {
            let doing = ConnectionStatus { phase, unwritten: Some(early), is_verified: true };
            assert_eq!(super::next(&doing, no, &times), unwritten, "{phase:?}");
        }
    }
}
