//! Dead letters in their queue: listed, replayed and dropped, by walks over it (`browse`).

use super::browse::Browse;
use super::endpoint::Endpoint;
use super::headers;
use super::topology::Topology;
use bytes::Bytes;
use lapin::Acker;
use lapin::message::Delivery as Raw;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use streamgate_core::{
    dead_letter::{DeadLetter, DeadLetterId},
    envelope::Envelope,
    ports::{DeadLetters, Moved, Page, PageToken, StoreError},
    reason::Reason,
};
use tokio::sync::Mutex;

/// Bytes of bodies after which dead letters are settled, however few they are.
const MAX_BYTES: usize = 4 << 20;
/// Dead letters settled together, of those that came back although they had been settled.
const ACKNOWLEDGED: usize = 100;
/// Most walks to remove dead letters that came back.
const MOST_LOOKS: usize = 5;

/// A queue of dead letters, of unrouted events, or of the parked events of a route.
#[derive(Debug)]
pub struct DeadLetterQueue {
    endpoint: Endpoint,
    queue: String,
    /// The reason shown for messages in it that did not die.
    alive: Reason,
    /// Whether a replayed event may go to any route that takes it.
    to_any_route: bool,
    /// The exchange that leads back to the events.
    back: String,
    browse: Mutex<Option<Browse>>,
    /// Dead letters that were acknowledged. RabbitMQ confirms no acknowledgement.
    settled: Mutex<HashSet<DeadLetterId>>,
    /// How many walks have begun that only look.
    walks: AtomicI64,
    /// An earlier walk ended with more dead letters in the queue than it should hold.
    came_back: AtomicBool,
}

impl DeadLetterQueue {
    pub fn dead(endpoint: Endpoint, topology: &Topology) -> DeadLetterQueue {
        DeadLetterQueue::of(endpoint, topology.dead(), Reason::Unrouted, topology)
    }

    pub fn unrouted(endpoint: Endpoint, topology: &Topology) -> DeadLetterQueue {
        DeadLetterQueue::of(endpoint, topology.unrouted(), Reason::Unrouted, topology)
    }

    /// The parked events of a route. `to_any_route`: the route no longer exists, so replayed events go to another.
    pub fn parked(endpoint: Endpoint, topology: &Topology, route: &str, to_any_route: bool) -> DeadLetterQueue {
        let parked = DeadLetterQueue::of(endpoint, topology.parked(route), Reason::Parked, topology);
        DeadLetterQueue { to_any_route, ..parked }
    }

    fn of(endpoint: Endpoint, queue: String, alive: Reason, topology: &Topology) -> DeadLetterQueue {
        let (browse, settled, walks, came_back, to_any_route) = Default::default();
        DeadLetterQueue {
            endpoint,
            queue,
            alive,
            to_any_route,
            back: topology.return_exchange(),
            browse,
            settled,
            walks,
            came_back,
        }
    }

    fn token(&self) -> PageToken {
        PageToken(self.walks.load(Ordering::Relaxed))
    }

    fn dead_letter(&self, raw: Raw) -> (DeadLetter, Acker) {
        let Raw { routing_key, properties, data, acker, .. } = raw;
        (headers::dead_letter(&properties, routing_key.as_str(), Bytes::from(data), self.alive), acker)
    }

    fn replayed(&self, dead_letter: &DeadLetter) -> Envelope {
        let envelope = dead_letter.replayed();
        if self.to_any_route { Envelope { route: None, ..envelope } } else { envelope }
    }

    /// Gives back what was only read, in order; what was replayed or dropped is gone from the queue by then.
    pub async fn close(&self) -> Result<(), StoreError> {
        let Some(browse) = self.browse.lock().await.take() else { return Ok(()) };
        let settled = std::mem::take(&mut *self.settled.lock().await);
        let mut more = browse.close().await? | self.came_back.swap(false, Ordering::Relaxed);
        for _ in 0..MOST_LOOKS {
            // New dead letters also count as more; then the walk finds none of ours.
            if settled.is_empty() || !more {
                return Ok(());
            }
            let mut browse = Browse::open(&self.endpoint, &self.queue, true).await?;
            let mut found = false;
            while let Some(raw) = browse.next().await? {
                let (dead_letter, acker) = self.dead_letter(raw);
                if settled.contains(&dead_letter.id()) {
                    found = true;
                    browse.choose(acker, None);
                }
                if browse.chosen.len() == ACKNOWLEDGED {
                    browse.settle(&self.back).await;
                }
            }
            browse.settle(&self.back).await;
            more = browse.close().await? && found;
        }
        Err(StoreError::Unavailable("dead letters come back although they were acknowledged".to_owned()))
    }

    /// Acts on these dead letters, which must be in the order in which `page` returned them: one walk over the queue
    /// serves all calls of a command. When it returns, what it counts is gone from the queue.
    async fn act(&self, dead_letters: Vec<DeadLetterId>, action: Action) -> Moved {
        let mut held = self.browse.lock().await;
        let browse = match held.take() {
            // A walk at its end has already passed the wanted ones, if an earlier one was missing.
            Some(browse) if browse.acting && browse.left > 0 => Ok(browse),
            looked => self.begin_acting(looked).await,
        };
        let mut moved = Moved::default();
        let mut browse = match browse {
            Ok(browse) => browse,
            Err(error) => return Moved { stopped: Some(error), ..moved },
        };
        // The same dead letter may be there more than once.
        let mut wanted = HashMap::<DeadLetterId, usize>::new();
        dead_letters.into_iter().for_each(|dead_letter| *wanted.entry(dead_letter).or_default() += 1);
        let (mut found, mut bytes) = (Vec::new(), 0);
        while !wanted.is_empty() && moved.stopped.is_none() {
            let next = match browse.next().await {
                Ok(next) => next,
                Err(error) => {
                    moved.stopped = Some(error);
                    break;
                }
            };
            let Some(raw) = next else { break };
            let (dead_letter, acker) = self.dead_letter(raw);
            if let Entry::Occupied(mut count) = wanted.entry(dead_letter.id()) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
                bytes += dead_letter.envelope.body.len();
                found.push(dead_letter.id());
                browse.choose(acker, matches!(action, Action::Replay).then(|| self.replayed(&dead_letter)));
            }
            if bytes >= MAX_BYTES {
                bytes = 0;
                self.let_go(&mut browse, &mut found, &mut moved).await;
            }
        }
        // Also after an error: what was found is settled.
        self.let_go(&mut browse, &mut found, &mut moved).await;
        *held = Some(browse);
        moved
    }

    async fn begin_acting(&self, looked: Option<Browse>) -> Result<Browse, StoreError> {
        if let Some(looked) = looked {
            let acting = looked.acting;
            if looked.close().await? && acting {
                self.came_back.store(true, Ordering::Relaxed);
            }
        }
        Browse::open(&self.endpoint, &self.queue, true).await
    }

    async fn let_go(&self, browse: &mut Browse, found: &mut Vec<DeadLetterId>, moved: &mut Moved) {
        let (gone, error) = browse.settle(&self.back).await;
        let gone: Vec<_> =
            found.drain(..).zip(gone).filter_map(|(dead_letter, gone)| gone.then_some(dead_letter)).collect();
        moved.count += gone.len();
        moved.stopped = moved.stopped.take().or(error);
        self.settled.lock().await.extend(gone);
    }
}

#[derive(Clone, Copy, Debug)]
enum Action {
    Replay,
    Discard,
}

impl DeadLetters for DeadLetterQueue {
    /// A token names a walk over the queue: what the walk has shown it holds, so that it goes on from its last page alone.
    async fn page(&self, from: Option<PageToken>, limit: usize) -> Result<Page, StoreError> {
        let mut held = self.browse.lock().await;
        let mut browse = match (from, held.take()) {
            (Some(token), Some(browse)) if token == self.token() && !browse.acting => browse,
            (Some(_), ended) => {
                *held = ended;
                return Err(StoreError::Unavailable("this look at the queue has ended; begin a new one".to_owned()));
            }
            (None, ended) => {
                if let Some(ended) = ended {
                    ended.close().await?;
                }
                self.walks.fetch_add(1, Ordering::Relaxed);
                Browse::open(&self.endpoint, &self.queue, false).await?
            }
        };
        let mut is_last = false;
        let mut dead_letters = Vec::new();
        let read = async {
            while dead_letters.len() < limit {
                let Some(raw) = browse.next().await? else {
                    is_last = true;
                    break;
                };
                dead_letters.push(self.dead_letter(raw).0);
            }
            Ok(())
        };
        let read = read.await;
        *held = Some(browse);
        read.map(|()| Page { dead_letters, next: (!is_last).then(|| self.token()) })
    }

    async fn replay(&self, dead_letters: Vec<DeadLetterId>) -> Moved {
        self.act(dead_letters, Action::Replay).await
    }

    async fn release(&self) -> Result<(), StoreError> {
        self.close().await
    }

    async fn discard(&self, dead_letters: Vec<DeadLetterId>) -> Moved {
        self.act(dead_letters, Action::Discard).await
    }
}
