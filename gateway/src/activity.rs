//! What a connection is doing, as seen by its timeouts: idle, sending a head, or busy with requests.

use futures_util::task::AtomicWaker;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::Context;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// No byte of a next request has come.
const IDLE: u64 = 0;

/// Shared by a connection's IO, its requests and its timeouts. Times are microseconds since the connection opened, plus 1.
#[derive(Debug)]
pub(crate) struct Activity {
    opened: Instant,
    busy: AtomicUsize,
    /// Since when nothing was in hand.
    idle_since: AtomicU64,
    /// When the first byte of the next head came, or [`IDLE`].
    head_since: AtomicU64,
    /// Whether bytes between requests are a head.
    heads: AtomicBool,
    /// The connection's task: an answer of HTTP/2 ends in a task of its own, and then the clock runs again.
    connection: AtomicWaker,
    /// Told when the connection becomes idle: somebody may wait for its place.
    idle: Arc<Notify>,
}

/// What the timeouts want to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Idle(Instant),
    Head(Instant),
    Busy,
}

impl Activity {
    pub(crate) fn new(idle: Arc<Notify>) -> Arc<Activity> {
        Arc::new(Activity {
            opened: Instant::now(),
            busy: AtomicUsize::new(0),
            idle_since: AtomicU64::new(1),
            head_since: AtomicU64::new(IDLE),
            heads: AtomicBool::new(false),
            connection: AtomicWaker::new(),
            idle,
        })
    }

    /// From now on bytes between requests are a head, as in HTTP/1.1; HTTP/2 has frames of its own there.
    pub(crate) fn expect_heads(&self) {
        self.heads.store(true, Ordering::Relaxed);
    }

    fn now(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_micros()).unwrap_or(u64::MAX - 1) + 1
    }

    fn instant(&self, at: u64) -> Instant {
        self.opened + Duration::from_micros(at.saturating_sub(1))
    }

    pub(crate) fn bytes_arrived(&self) {
        if self.heads.load(Ordering::Relaxed)
            && self.busy.load(Ordering::Relaxed) == 0
            && self.head_since.load(Ordering::Relaxed) == IDLE
        {
            self.head_since.store(self.now(), Ordering::Relaxed);
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        let head_since = self.head_since.load(Ordering::SeqCst);
        if self.busy.load(Ordering::SeqCst) > 0 {
            return Phase::Busy;
        }
        match head_since {
            IDLE => Phase::Idle(self.instant(self.idle_since.load(Ordering::SeqCst))),
            at => Phase::Head(self.instant(at)),
        }
    }

    /// The phase, and a wake-up of this task when requests end elsewhere.
    pub(crate) fn poll_phase(&self, cx: &Context<'_>) -> Phase {
        self.connection.register(cx.waker());
        self.phase()
    }

    /// A request's head is whole. Returns when its first byte came, and what keeps the connection busy.
    pub(crate) fn begin(self: &Arc<Self>) -> (Instant, InHand) {
        // In this order no moment shows an idle connection.
        self.busy.fetch_add(1, Ordering::SeqCst);
        let first_byte = match self.head_since.swap(IDLE, Ordering::SeqCst) {
            IDLE => Instant::now(),
            at => self.instant(at),
        };
        (first_byte, InHand(Arc::clone(self)))
    }
}

/// A request in hand.
#[derive(Debug)]
pub(crate) struct InHand(Arc<Activity>);

impl InHand {
    /// For work that goes on beside the request.
    pub(crate) fn another(&self) -> InHand {
        self.0.busy.fetch_add(1, Ordering::SeqCst);
        InHand(Arc::clone(&self.0))
    }
}

impl Drop for InHand {
    fn drop(&mut self) {
        self.0.idle_since.store(self.0.now(), Ordering::SeqCst);
        if self.0.busy.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.idle.notify_waiters();
        }
        if !self.0.heads.load(Ordering::Relaxed) {
            self.0.connection.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_follow_the_requests() {
        let activity = Activity::new(Arc::default());
        activity.expect_heads();
        assert!(matches!(activity.phase(), Phase::Idle(_)));
        activity.bytes_arrived();
        let Phase::Head(since) = activity.phase() else { panic!("{activity:?}") };
        let (first_byte, one) = activity.begin();
        assert_eq!(first_byte, since);
        activity.bytes_arrived();
        assert_eq!(activity.phase(), Phase::Busy);
        let (_, two) = activity.begin();
        drop(one);
        assert_eq!(activity.phase(), Phase::Busy);
        drop(two);
        let Phase::Idle(idle) = activity.phase() else { panic!("{activity:?}") };
        assert!(idle >= since);
    }

    #[test]
    fn http2_has_no_heads() {
        let activity = Activity::new(Arc::default());
        activity.bytes_arrived();
        assert!(matches!(activity.phase(), Phase::Idle(_)));
    }
}
