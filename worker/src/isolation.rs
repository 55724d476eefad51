//! Which handlers run at the same time. An event that was abandoned again and again runs alone, so that if it ends the process
//! or hangs, it takes no other event with it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// After its timeout plus this, a handler can only be blocking its thread, and is no longer waited for.
const MARGIN: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(crate) struct Isolation {
    state: Mutex<State>,
    /// Notified of each change while somebody waits for one.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    running: HashMap<u64, Running>,
    /// How many of them run alone.
    alone: usize,
    /// Handlers that wait to run alone: while there are any, no other handler begins.
    wanting: usize,
    waiting: usize,
}

#[derive(Clone, Copy, Debug)]
struct Running {
    alone: bool,
    /// From then on it is no longer waited for.
    overdue: Instant,
}

/// Whether a handler may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Free,
    /// Blocked until something changes, or until this instant at the latest.
    Blocked(Option<Instant>),
}

impl State {
    fn way(&self, alone: bool, now: Instant) -> Way {
        if !alone && self.alone == 0 {
            return if self.wanting > 0 { Way::Blocked(None) } else { Way::Free };
        }
        let blocking = self.running.values().filter(|other| other.overdue > now && (alone || other.alone));
        match blocking.map(|other| other.overdue).min() {
            Some(overdue) => Way::Blocked(Some(overdue)),
            None if !alone && self.wanting > 0 => Way::Blocked(None),
            None => Way::Free,
        }
    }
}

impl State {
    fn run(&mut self, id: u64, alone: bool, now: Instant, timeout: Duration) {
        self.alone += usize::from(alone);
        self.running.insert(id, Running { alone, overdue: now + timeout.saturating_add(MARGIN) });
    }

    fn end(&mut self, id: u64) {
        let ended = self.running.remove(&id);
        self.alone -= usize::from(ended.is_some_and(|ended| ended.alone));
    }
}

impl Isolation {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the right to run a handler, which lasts until the returned place is dropped. `id` is unique among running
    /// handlers.
    pub(crate) async fn enter(&self, id: u64, alone: bool, timeout: Duration) -> Place<'_> {
        if let Some(place) = self.try_enter(id, alone, timeout) {
            return place;
        }
        let wanting = alone.then(|| Count::begin(self, |state| &mut state.wanting));
        let waiting = Count::begin(self, |state| &mut state.waiting);
        let others_wait = loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            let blocked_until = {
                let (mut state, now) = (self.lock(), Instant::now());
                match state.way(alone, now) {
                    Way::Free => {
                        state.run(id, alone, now, timeout);
                        break state.waiting > 1;
                    }
                    Way::Blocked(until) => until,
                }
            };
            match blocked_until {
                Some(until) => drop(tokio::time::timeout_at(until, changed).await),
                None => changed.await,
            }
        };
        let place = Place { isolation: self, id };
        drop((wanting, waiting));
        if others_wait {
            // The last of the waiters that were just woken is queued on this thread, where no other thread can steal it: it
            // must check before a handler blocks the thread.
            tokio::task::yield_now().await;
        }
        place
    }

    /// The usual case: nobody waits, and nothing blocks this handler.
    fn try_enter(&self, id: u64, alone: bool, timeout: Duration) -> Option<Place<'_>> {
        let (mut state, now) = (self.lock(), Instant::now());
        let is_free = state.waiting == 0 && state.way(alone, now) == Way::Free;
        is_free.then(|| {
            state.run(id, alone, now, timeout);
            Place { isolation: self, id }
        })
    }
}

/// The right to run a handler.
#[derive(Debug)]
pub(crate) struct Place<'i> {
    isolation: &'i Isolation,
    id: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut state = self.isolation.lock();
        state.end(self.id);
        let is_awaited = state.waiting > 0;
        drop(state);
        if is_awaited {
            self.isolation.changed.notify_waiters();
        }
    }
}

/// Counts one handler in `wanting` or `waiting` until it is dropped.
struct Count<'i> {
    isolation: &'i Isolation,
    of: fn(&mut State) -> &mut usize,
}

impl<'i> Count<'i> {
    fn begin(isolation: &'i Isolation, of: fn(&mut State) -> &mut usize) -> Count<'i> {
        *of(&mut isolation.lock()) += 1;
        Count { isolation, of }
    }
}

impl Drop for Count<'_> {
    fn drop(&mut self) {
        *(self.of)(&mut self.isolation.lock()) -= 1;
        self.isolation.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    const TIMEOUT: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn a_suspect_runs_alone_and_others_before_and_after_it() {
        let isolation = Isolation::default();
        let first = isolation.enter(1, false, TIMEOUT).await;
        let second = isolation.enter(2, false, TIMEOUT).now_or_never().expect("others run at the same time");
        let mut suspect = std::pin::pin!(isolation.enter(3, true, TIMEOUT));
        assert!(suspect.as_mut().now_or_never().is_none(), "while others run");
        let mut later = std::pin::pin!(isolation.enter(4, false, TIMEOUT));
        assert!(later.as_mut().now_or_never().is_none(), "nobody begins while a suspect waits");
        drop(first);
        assert!(suspect.as_mut().now_or_never().is_none());
        drop(second);
        let alone = suspect.await;
        assert!(later.as_mut().now_or_never().is_none());
        drop(alone);
        drop(later.await);
        assert!(isolation.lock().running.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_suspect_that_gives_up_keeps_nobody_waiting() {
        let isolation = Isolation::default();
        let first = isolation.enter(1, false, TIMEOUT).await;
        {
            let mut suspect = std::pin::pin!(isolation.enter(2, true, TIMEOUT));
            assert!(suspect.as_mut().now_or_never().is_none());
        }
        isolation.enter(3, false, TIMEOUT).now_or_never().expect("nobody waits to be alone");
        drop(first);
    }

    #[tokio::test(start_paused = true)]
    async fn a_handler_that_blocks_its_thread_is_not_waited_for_beyond_its_time() {
        let isolation = Isolation::default();
        let started = Instant::now();
        let blocked = isolation.enter(1, false, TIMEOUT).await;
        let alone = isolation.enter(2, true, TIMEOUT).await;
        assert_eq!(started.elapsed(), TIMEOUT + MARGIN);
        // The same holds for a blocked handler that was to run alone.
        let other = isolation.enter(3, false, TIMEOUT).await;
        assert_eq!(started.elapsed(), 2 * (TIMEOUT + MARGIN));
        drop((blocked, alone, other));
    }
}
