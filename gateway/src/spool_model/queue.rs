//! RabbitMQ in the model.

use std::collections::HashSet;
use std::sync::Mutex;
use std::time::Duration;
use streamgate_core::envelope::Envelope;
use streamgate_core::ports::{Accepted, Enqueue, StoreError};
use tokio::sync::oneshot;
use tokio::time::Instant;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broker {
    Up,
    /// Refuses, as a queue at its limit does.
    Nacks,
    /// Takes messages but confirms nothing until the mode changes.
    Silent,
    /// Takes nothing, as under a memory alarm, but confirms what it was given before.
    Blocked,
    /// There is no connection. Each unconfirmed message either is in the queue or is not.
    Down,
}

type Reply = oneshot::Sender<Result<(), StoreError>>;

/// RabbitMQ, as far as the port shows it.
#[derive(Debug)]
pub(super) struct Queue {
    mode: Mutex<Broker>,
    pub(super) messages: Mutex<Vec<String>>,
    held: Mutex<Vec<(String, Reply)>>,
    /// Events that it never takes, and that end the connection with everything under way on it.
    pub(super) poison: Mutex<HashSet<String>>,
    /// How often a connection was lost, and until when there is none.
    lost: Mutex<(u64, Option<Instant>)>,
}

impl Queue {
    pub(super) fn new() -> Queue {
        let (messages, held, poison, lost) = Default::default();
        Queue { mode: Mutex::new(Broker::Up), messages, held, poison, lost }
    }

    pub(super) fn turn(&self, mode: Broker) {
        *self.mode.lock().unwrap() = mode;
        if mode == Broker::Down {
            self.lost.lock().unwrap().0 += 1;
        }
        let held = std::mem::take(&mut *self.held.lock().unwrap());
        for (place, (key, reply)) in held.into_iter().enumerate() {
            match mode {
                Broker::Silent => self.held.lock().unwrap().push((key, reply)),
                Broker::Up | Broker::Nacks | Broker::Blocked => {
                    self.messages.lock().unwrap().push(key);
                    drop(reply.send(Ok(())));
                }
                Broker::Down => {
                    if place.is_multiple_of(2) {
                        self.messages.lock().unwrap().push(key);
                    }
                    drop(reply.send(Err(StoreError::Unavailable("cut".into()))));
                }
            }
        }
    }
}

impl Enqueue for Queue {
    async fn enqueue(&self, envelope: Envelope) -> Result<Accepted, StoreError> {
        tokio::task::yield_now().await;
        let mode = *self.mode.lock().unwrap();
        match mode {
            Broker::Up if self.poison.lock().unwrap().contains(&envelope.key) => {
                let mut lost = self.lost.lock().unwrap();
                *lost = (lost.0 + 1, Some(Instant::now() + Duration::from_millis(100)));
                Err(StoreError::Unavailable("the channel is closed".into()))
            }
            Broker::Up => {
                let lives = || self.lost.lock().unwrap().0;
                let life = lives();
                self.messages.lock().unwrap().push(envelope.key);
                for _ in 0..3 {
                    tokio::task::yield_now().await;
                }
                let lost = || StoreError::Unavailable("lost before the confirm".into());
                (life == lives()).then_some(Accepted::Enqueued).ok_or_else(lost)
            }
            Broker::Nacks => Err(StoreError::Full("nack".into())),
            Broker::Down | Broker::Blocked => Err(StoreError::Unavailable("down or blocked".into())),
            Broker::Silent => {
                let (sender, reply) = oneshot::channel();
                self.held.lock().unwrap().push((envelope.key, sender));
                reply.await.unwrap().map(|()| Accepted::Enqueued)
            }
        }
    }

    fn ready(&self) -> Result<(), StoreError> {
        if self.lost.lock().unwrap().1.is_some_and(|until| Instant::now() < until) {
            return Err(StoreError::Unavailable("connecting".into()));
        }
        match *self.mode.lock().unwrap() {
            Broker::Down | Broker::Blocked => Err(StoreError::Unavailable("down or blocked".into())),
            Broker::Up | Broker::Nacks | Broker::Silent => Ok(()),
        }
    }

    fn connections_lost(&self) -> u64 {
        self.lost.lock().unwrap().0
    }
}
