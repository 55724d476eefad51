//! What wakes itself while it is polled is polled again at once. To the runtime such a wake is a yield: the task goes to the
//! end of the queue, and another thread is woken to look for it. hyper does that with each request that has a body.

use futures_util::task::AtomicWaker;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};

/// Polls in a row; then other tasks have their turn.
const TURNS: usize = 4;

/// It is being polled: a wake needs nobody else.
const POLLING: u8 = 1;
/// It was woken since the last poll began.
const RUNG: u8 = 2;

#[derive(Debug, Default)]
struct Bell {
    state: AtomicU8,
    task: AtomicWaker,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Always written, even if it was set: the poll that reads it sees what came before any wake.
        if self.state.fetch_or(RUNG, Ordering::AcqRel) & POLLING == 0 {
            self.task.wake();
        }
    }
}

/// Stands between a future and its task.
#[derive(Debug)]
pub(crate) struct Repoll {
    bell: Arc<Bell>,
    waker: Waker,
}

impl Repoll {
    pub(crate) fn new() -> Repoll {
        let bell = Arc::new(Bell::default());
        Repoll { waker: Waker::from(Arc::clone(&bell)), bell }
    }

    pub(crate) fn poll<T>(&self, cx: &mut Context<'_>, mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
        let state = &self.bell.state;
        self.bell.task.register(cx.waker());
        for _ in 0..TURNS {
            state.swap(POLLING, Ordering::AcqRel);
            let polled = poll(&mut Context::from_waker(&self.waker));
            let woken = state.fetch_and(!POLLING, Ordering::AcqRel) & RUNG != 0;
            if polled.is_ready() || !woken {
                return polled;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::task::{ArcWake, waker};
    use std::sync::atomic::AtomicUsize;

    /// Counts how often its task would be scheduled.
    #[derive(Default)]
    struct Scheduled(AtomicUsize);

    impl ArcWake for Scheduled {
        fn wake_by_ref(counted: &Arc<Scheduled>) {
            counted.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn what_wakes_itself_is_polled_at_once_and_not_for_ever() {
        let scheduled = Arc::new(Scheduled::default());
        let task = waker(Arc::clone(&scheduled));
        let (repoll, mut polls) = (Repoll::new(), 0);
        let polled = repoll.poll(&mut Context::from_waker(&task), |cx| {
            polls += 1;
            cx.waker().wake_by_ref();
            if polls == 2 { Poll::Ready(()) } else { Poll::Pending }
        });
        assert_eq!((polled, polls, scheduled.0.load(Ordering::SeqCst)), (Poll::Ready(()), 2, 0));
        let mut polls = 0;
        let polled: Poll<()> = repoll.poll(&mut Context::from_waker(&task), |cx| {
            polls += 1;
            cx.waker().wake_by_ref();
            Poll::Pending
        });
        assert_eq!((polled, polls, scheduled.0.load(Ordering::SeqCst)), (Poll::Pending, TURNS, 1));
    }

    #[test]
    fn a_wake_by_another_thread_is_taken_whenever_it_comes() {
        let scheduled = Arc::new(Scheduled::default());
        let task = waker(Arc::clone(&scheduled));
        let (repoll, mut polls, mut kept) = (Repoll::new(), 0, None);
        let wake = |waker: Waker| std::thread::spawn(move || waker.wake()).join().unwrap();
        let polled: Poll<()> = repoll.poll(&mut Context::from_waker(&task), |cx| {
            polls += 1;
            if polls == 1 {
                wake(cx.waker().clone());
            }
            kept = Some(cx.waker().clone());
            Poll::Pending
        });
        assert_eq!((polled, polls, scheduled.0.load(Ordering::SeqCst)), (Poll::Pending, 2, 0), "within the poll");
        wake(kept.unwrap());
        assert_eq!(scheduled.0.load(Ordering::SeqCst), 1, "between polls");
    }
}
