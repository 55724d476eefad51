//! Polls a future that wakes itself again at once. The runtime would treat such a wake as a yield: it puts the task at the end of
//! the queue and wakes another thread to look for it. hyper wakes itself with each request that has a body.

use futures_util::task::AtomicWaker;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};

/// Polls in a row, after which other tasks have their turn.
const TURNS: usize = 4;

/// Set while the future is being polled: a wake then schedules nothing.
const POLLING: u8 = 1;
/// Set if the future was woken since the last poll began.
const WOKEN: u8 = 2;

#[derive(Debug, Default)]
struct WakeFlag {
    state: AtomicU8,
    task: AtomicWaker,
}

impl Wake for WakeFlag {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Written even if it was set already, so that the poll which reads it sees everything that happened before any wake.
        if self.state.fetch_or(WOKEN, Ordering::AcqRel) & POLLING == 0 {
            self.task.wake();
        }
    }
}

/// Stands between a future and its task.
#[derive(Debug)]
pub(crate) struct Repoll {
    flag: Arc<WakeFlag>,
    waker: Waker,
}

impl Repoll {
    pub(crate) fn new() -> Repoll {
        let flag = Arc::new(WakeFlag::default());
        Repoll { waker: Waker::from(Arc::clone(&flag)), flag }
    }

    pub(crate) fn poll<T>(&self, cx: &mut Context<'_>, mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
        let state = &self.flag.state;
        self.flag.task.register(cx.waker());
        for _ in 0..TURNS {
            state.swap(POLLING, Ordering::AcqRel);
            let polled = poll(&mut Context::from_waker(&self.waker));
            let woken = state.fetch_and(!POLLING, Ordering::AcqRel) & WOKEN != 0;
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
    fn a_task_that_wakes_itself_is_polled_again_at_once_but_not_for_ever() {
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
