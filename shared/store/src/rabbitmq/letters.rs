//! Letters in a queue, looked at without harm: consumed, not acknowledged, and given back in order. `basic.get` with a
//! close at the end would shuffle them.

use super::endpoint::Endpoint;
use super::headers::{self, Beside};
use super::link::{PATIENCE, farewell};
use super::topology::Topology;
use bytes::Bytes;
use futures_util::StreamExt;
use lapin::message::Delivery as Raw;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{Acker, Channel, Confirmation, Connection, Consumer};
use std::collections::HashSet;
use std::time::Duration;
use streamgate_core::{
    envelope::Envelope,
    letter::Letter,
    ports::{Letters, StoreError},
};
use tokio::sync::Mutex;

/// Letters held by a channel: their bodies are in memory until they are read.
const HELD: u16 = 500;
/// RabbitMQ's limit of channels is 2047; the last ones are left to others.
const MOST_CHANNELS: usize = 2000;
/// Between looks at whether letters are back in their queue.
const LOOK: Duration = Duration::from_millis(5);

/// A queue of letters: the dead, or the unrouted.
#[derive(Debug)]
pub struct LetterQueue {
    endpoint: Endpoint,
    queue: String,
    events: String,
    browse: Mutex<Option<Browse>>,
}

impl LetterQueue {
    pub fn dead(endpoint: Endpoint, topology: &Topology) -> LetterQueue {
        LetterQueue { endpoint, queue: topology.dead(), events: topology.events(), browse: Mutex::default() }
    }

    pub fn unrouted(endpoint: Endpoint, topology: &Topology) -> LetterQueue {
        LetterQueue { endpoint, queue: topology.unrouted(), events: topology.events(), browse: Mutex::default() }
    }

    /// Lets go what was settled, and gives back the rest in order. After an error some letters that were replayed or dropped
    /// still stand in the queue.
    pub async fn close(&self) -> Result<(), StoreError> {
        match self.browse.lock().await.take() {
            Some(browse) => browse.close().await,
            None => Ok(()),
        }
    }

    /// Does something about the letters of these numbers, which must be in the order in which `page` told them: one walk
    /// over the queue serves all calls of a command.
    async fn act(&self, numbers: Vec<i64>, nonce: Option<&str>) -> Result<usize, StoreError> {
        let mut held = self.browse.lock().await;
        let mut browse = match held.take() {
            Some(browse) if browse.acting => browse,
            looked => {
                if let Some(looked) = looked {
                    looked.close().await?;
                }
                Browse::open(&self.endpoint, &self.queue, true).await?
            }
        };
        let mut wanted: HashSet<_> = numbers.into_iter().collect();
        let asked = wanted.len();
        let walk = async {
            while !wanted.is_empty() {
                let Some(raw) = browse.next().await? else { break };
                let Raw { routing_key, properties, data, acker, .. } = raw;
                let letter = headers::letter(&properties, routing_key.as_str(), Bytes::from(data));
                if !wanted.remove(&letter.number) {
                    continue;
                }
                if let Some(nonce) = nonce {
                    let again = Envelope { attempt: 1, replay: Some(nonce.to_owned()), ..letter.envelope };
                    browse.publish(&self.events, &again).await?;
                }
                browse.settle(acker);
            }
            Ok(())
        };
        let walked = walk.await;
        *held = Some(browse);
        walked.map(|()| asked - wanted.len())
    }
}

impl Letters for LetterQueue {
    /// 0 starts a new walk over the queue; any other number goes on with the last one.
    async fn page(&self, after: i64, limit: usize) -> Result<Vec<Letter>, StoreError> {
        let mut held = self.browse.lock().await;
        let mut browse = match held.take() {
            Some(browse) if after != 0 => browse,
            ended => {
                if let Some(ended) = ended {
                    ended.close().await?;
                }
                Browse::open(&self.endpoint, &self.queue, false).await?
            }
        };
        let mut letters = Vec::new();
        let read = async {
            while letters.len() < limit {
                let Some(raw) = browse.next().await? else { break };
                letters.push(headers::letter(&raw.properties, raw.routing_key.as_str(), Bytes::from(raw.data)));
            }
            Ok(())
        };
        let read = read.await;
        *held = Some(browse);
        read.map(|()| letters)
    }

    async fn replay(&self, numbers: Vec<i64>, nonce: String) -> Result<usize, StoreError> {
        self.act(numbers, Some(&nonce)).await
    }

    async fn discard(&self, numbers: Vec<i64>) -> Result<usize, StoreError> {
        self.act(numbers, None).await
    }
}

/// One walk over a queue.
#[derive(Debug)]
struct Browse {
    endpoint: Endpoint,
    connection: Connection,
    queue: String,
    /// Asks how many letters are ready.
    asking: Channel,
    /// In the order in which they were opened, with the letters that each holds; the last one consumes.
    channels: Vec<(Channel, u32)>,
    consumer: Option<Consumer>,
    /// Letters that the current channel was given.
    given: u16,
    /// Letters of the start that have not come yet.
    left: u32,
    acting: bool,
    /// Publishing has a connection of its own, for an alarm blocks those that publish whole.
    publishing: Option<(Connection, Channel)>,
    /// Of the last channel, not yet let go.
    settled: Vec<Acker>,
}

impl Browse {
    async fn open(endpoint: &Endpoint, queue: &str, acting: bool) -> Result<Browse, StoreError> {
        let connection = endpoint.dial("streamgate dead").await.map_err(unavailable)?;
        let asking = connection.create_channel().await.map_err(unavailable)?;
        let left = ready(&asking, queue).await?;
        Ok(Browse {
            endpoint: endpoint.clone(),
            connection,
            queue: queue.to_owned(),
            asking,
            channels: Vec::new(),
            consumer: None,
            given: 0,
            left,
            acting,
            publishing: None,
            settled: Vec::new(),
        })
    }

    /// The next letter, or none at the end.
    async fn next(&mut self) -> Result<Option<Raw>, StoreError> {
        while self.left > 0 {
            if self.consumer.is_none() && !self.consume().await? {
                return Ok(None);
            }
            let Some(consumer) = &mut self.consumer else { return Ok(None) };
            let next = match tokio::time::timeout(PATIENCE, consumer.next()).await {
                Ok(next) => next.transpose().map_err(unavailable)?,
                Err(_) => {
                    tracing::warn!(
                        left = self.left,
                        queue = self.queue,
                        "somebody else holds letters; they are left out"
                    );
                    self.left = 0;
                    return Ok(None);
                }
            };
            let Some(delivery) = next else {
                // Cancelled below, and read to its end.
                self.consumer = None;
                continue;
            };
            self.left -= 1;
            self.given = self.given.saturating_add(1);
            if let Some((_, held)) = self.channels.last_mut() {
                *held += 1;
            }
            if self.given == HELD {
                self.cancel().await?;
            }
            return Ok(Some(delivery));
        }
        Ok(None)
    }

    /// Opens the next channel and consumes there; whether there was one left.
    async fn consume(&mut self) -> Result<bool, StoreError> {
        if self.channels.len() == MOST_CHANNELS {
            tracing::warn!(left = self.left, queue = self.queue, "too many letters for one look; these are left out");
            return Ok(false);
        }
        let channel = self.connection.create_channel().await.map_err(unavailable)?;
        channel.basic_qos(HELD, BasicQosOptions::default()).await.map_err(unavailable)?;
        let queue = self.queue.as_str().into();
        let consumed = channel.basic_consume(queue, "".into(), BasicConsumeOptions::default(), FieldTable::default());
        self.consumer = Some(consumed.await.map_err(unavailable)?);
        self.channels.push((channel, 0));
        self.given = 0;
        Ok(true)
    }

    /// The last letter may go. It does when its channel consumes no more: before, it would make room there for letters that
    /// a cancel sends back, behind those of the next channel.
    fn settle(&mut self, letter: Acker) {
        self.settled.push(letter);
        if let Some((_, held)) = self.channels.last_mut() {
            *held = held.saturating_sub(1);
        }
    }

    /// Ends the consumer of the last channel, and lets go what is settled there.
    async fn cancel(&mut self) -> Result<(), StoreError> {
        if let (Some(consumer), Some((channel, _))) = (&self.consumer, self.channels.last()) {
            let cancelled = channel.basic_cancel(consumer.tag(), BasicCancelOptions::default()).await;
            cancelled.map_err(unavailable)?;
        }
        for letter in self.settled.drain(..) {
            letter.ack(BasicAckOptions::default()).await.map_err(unavailable)?;
        }
        Ok(())
    }

    /// Puts an event into a queue; returns when it is confirmed there.
    async fn publish(&mut self, queue: &str, envelope: &Envelope) -> Result<(), StoreError> {
        if self.publishing.is_none() {
            let connection = self.endpoint.dial("streamgate dead, replays").await.map_err(unavailable)?;
            let channel = connection.create_channel().await.map_err(unavailable)?;
            channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(unavailable)?;
            self.publishing = Some((connection, channel));
        }
        let Some((_, channel)) = &self.publishing else { return Ok(()) };
        let publish = async {
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let properties = headers::properties(envelope, &Beside::default());
            let body = &envelope.body;
            channel.basic_publish("".into(), queue.into(), options, body, properties).await?.await
        };
        let told = match tokio::time::timeout(PATIENCE, publish).await {
            Ok(told) => told.map_err(unavailable)?,
            Err(_) => return Err(StoreError::Unavailable(format!("no confirm within {PATIENCE:?}"))),
        };
        match told {
            Confirmation::Ack(None) => Ok(()),
            Confirmation::Nack(_) => Err(StoreError::Full(format!("{queue} is at its limit"))),
            Confirmation::Ack(Some(_)) | Confirmation::NotRequested => {
                Err(StoreError::Unavailable(format!("the queue {queue} is not there")))
            }
        }
    }

    /// One channel after the other, and nobody consuming meanwhile: so the letters stand in the queue as before.
    async fn close(mut self) -> Result<(), StoreError> {
        let settled = match tokio::time::timeout(PATIENCE, self.cancel()).await {
            Ok(settled) => settled,
            Err(_) => Err(StoreError::Unavailable(format!("no answer within {PATIENCE:?}"))),
        };
        let mut expected = ready(&self.asking, &self.queue).await.unwrap_or_default();
        for (channel, held) in &self.channels {
            drop(tokio::time::timeout(PATIENCE, channel.close(200, "OK".into())).await);
            expected = expected.saturating_add(*held);
            // A closed channel's letters go back a moment after its close, and nobody is told: the next channel's must not
            // overtake them.
            let back = async {
                while ready(&self.asking, &self.queue).await.is_ok_and(|ready| ready < expected) {
                    tokio::time::sleep(LOOK).await;
                }
            };
            drop(tokio::time::timeout(PATIENCE, back).await);
        }
        farewell(&self.connection).await;
        if let Some((connection, _)) = &self.publishing {
            farewell(connection).await;
        }
        settled
    }
}

/// Messages of a queue that nobody holds.
async fn ready(channel: &Channel, queue: &str) -> Result<u32, StoreError> {
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let declared = channel.queue_declare(queue.into(), options, FieldTable::default()).await;
    let declared = declared.map_err(|error| StoreError::Unavailable(format!("the queue {queue}: {error}")))?;
    Ok(declared.message_count())
}

fn unavailable(error: impl std::fmt::Display) -> StoreError {
    StoreError::Unavailable(error.to_string())
}
