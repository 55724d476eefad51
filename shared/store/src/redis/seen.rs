//! Which events are durable: the newest in memory, all of the window in Redis. Redis is asked once, before the publish;
//! a mark is sent to Redis concurrently with the answer.

use super::link::{Redis, millis};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use streamgate_core::id::fingerprint;
use streamgate_core::ports::{Seen, StoreError};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Keys in memory: Stream's retries end after 15 s, so this suffices for 8,000 events/s without Redis. About 10 MB.
const RECENT: usize = 1 << 17;
/// Most marks that wait for Redis; further ones are dropped and counted.
const MAX_WAITING: usize = 1 << 14;
/// Most marks sent to Redis at a time.
const MARK_BATCH: usize = 256;

/// Called with the number of marks that did not reach Redis.
pub type OnLost = Arc<dyn Fn(u64) + Send + Sync>;

#[derive(Debug)]
pub struct SeenKeys {
    redis: Redis,
    window: Duration,
    recent: Mutex<Recent>,
    marks: mpsc::Sender<[u8; 16]>,
    closing: CancellationToken,
    marker: Mutex<Option<AbortOnDropHandle<()>>>,
}

impl SeenKeys {
    /// Call within a tokio runtime.
    pub fn start(redis: Redis, window: Duration, on_lost: OnLost) -> SeenKeys {
        let (marks, waiting) = mpsc::channel(MAX_WAITING);
        let closing = CancellationToken::new();
        let marking = mark_all(redis.clone(), window, waiting, on_lost, closing.clone());
        let marker = Mutex::new(Some(AbortOnDropHandle::new(tokio::spawn(marking))));
        SeenKeys { redis, window, recent: Mutex::default(), marks, closing, marker }
    }

    /// Sends the waiting marks to Redis. Later ones fail, and a second call does nothing.
    pub async fn close(&self) {
        self.closing.cancel();
        let marker = self.marker.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(marker) = marker {
            drop(marker.await);
        }
    }
}

impl Seen for SeenKeys {
    async fn contains(&self, key: &str) -> Result<bool, StoreError> {
        let key = fingerprint(key);
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner).contains(&key, Instant::now());
        if recent {
            return Ok(true);
        }
        self.redis.command(redis::cmd("EXISTS").arg(self.redis.key("seen", key))).await
    }

    /// Never waits.
    async fn mark(&self, key: &str) -> Result<(), StoreError> {
        let key = fingerprint(key);
        let ends = Instant::now() + self.window;
        self.recent.lock().unwrap_or_else(PoisonError::into_inner).insert(key, ends);
        self.marks.try_send(key).map_err(|_| StoreError::Full("too many marks wait for Redis".to_owned()))
    }
}

async fn mark_all(
    redis: Redis,
    window: Duration,
    mut waiting: mpsc::Receiver<[u8; 16]>,
    on_lost: OnLost,
    closing: CancellationToken,
) {
    let mut keys = Vec::with_capacity(MARK_BATCH);
    loop {
        let received = tokio::select! {
            biased;
            () = closing.cancelled(), if !waiting.is_closed() => {
                waiting.close();
                continue;
            }
            received = waiting.recv_many(&mut keys, MARK_BATCH) => received,
        };
        if received == 0 {
            return;
        }
        let marks = keys.drain(..).map(|key| {
            let mut set = redis::cmd("SET");
            set.arg(redis.key("seen", key)).arg(1).arg("PX").arg(millis(window));
            let redis = redis.clone();
            async move { redis.command::<()>(&set).await }
        });
        let lost = futures_util::future::join_all(marks).await.into_iter().filter(Result::is_err).count();
        if lost > 0 {
            on_lost(lost as u64);
        }
    }
}

/// The newest keys, each until its window ends or its place is needed.
#[derive(Debug, Default)]
struct Recent {
    ends: HashMap<[u8; 16], Instant>,
    order: VecDeque<[u8; 16]>,
}

impl Recent {
    fn contains(&self, key: &[u8; 16], now: Instant) -> bool {
        self.ends.get(key).is_some_and(|ends| *ends > now)
    }

    fn insert(&mut self, key: [u8; 16], ends: Instant) {
        if self.ends.insert(key, ends).is_none() {
            self.order.push_back(key);
        }
        if self.order.len() > RECENT
            && let Some(oldest) = self.order.pop_front()
        {
            self.ends.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_are_known_until_their_time_is_over() {
        let (mut recent, now) = (Recent::default(), Instant::now());
        let (later, key) = (now + Duration::from_secs(1), |n: usize| (n as u128).to_be_bytes());
        for n in 0..RECENT + 10 {
            recent.insert(key(n), later);
            recent.insert(key(n), later);
        }
        assert!(!recent.contains(&key(9), now) && recent.contains(&key(10), now));
        assert!(!recent.contains(&key(10), later));
        assert_eq!((recent.ends.len(), recent.order.len()), (RECENT, RECENT));
    }
}
