//! One walk over a queue of dead letters, without harm: consumed, not acknowledged, and given back in order. `basic.get` with a close at
//! the end would shuffle them.

use super::depth::ready;
use super::endpoint::Endpoint;
use super::endpoint::PATIENCE;
use super::headers::{self, Beside};
use super::link::farewell;
use super::publisher::{self, Message};
use futures_util::StreamExt;
use lapin::message::Delivery as Raw;
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, ConfirmSelectOptions};
use lapin::types::FieldTable;
use lapin::{Acker, Channel, Connection, Consumer};
use std::time::Duration;
use streamgate_core::{envelope::Envelope, ports::StoreError};

/// Letters held by a channel: their bodies are in memory until they are read.
const HELD: u16 = 500;
/// RabbitMQ's limit of channels is 2047; the last ones are left to others.
const MOST_CHANNELS: usize = 2000;
/// Half of the settlements that a channel of RabbitMQ 3.10 sends to a quorum queue before it waits.
const PIECE: usize = 16;
/// Between looks at whether dead letters are back in their queue.
const LOOK: Duration = Duration::from_millis(5);

/// One walk over a queue.
#[derive(Debug)]
pub(super) struct Browse {
    endpoint: Endpoint,
    connection: Connection,
    queue: String,
    /// Asks how many dead letters are ready.
    asking: Channel,
    /// In the order in which they were opened; the last one consumes.
    holding: Vec<Holding>,
    consumer: Option<Consumer>,
    /// Letters of the start that have not come yet.
    pub(super) left: u32,
    pub(super) acting: bool,
    /// Publishing has a connection of its own, for an alarm blocks those that publish whole.
    publishing: Option<(Connection, Channel)>,
    /// Found, and not settled yet.
    pub(super) chosen: Vec<Chosen>,
}

/// A channel, and the dead letters that it holds.
#[derive(Debug)]
struct Holding {
    channel: Channel,
    /// Letters that it was given.
    given: u16,
    /// Those of them that are not settled.
    held: u32,
    cancelled: bool,
}

/// A dead letter that leaves its queue.
#[derive(Debug)]
pub(super) struct Chosen {
    acker: Acker,
    /// The place of its channel.
    place: usize,
    /// What is published before.
    again: Option<Envelope>,
}

impl Browse {
    pub(super) async fn open(endpoint: &Endpoint, queue: &str, acting: bool) -> Result<Browse, StoreError> {
        let connection = endpoint.dial("streamgate dead").await.map_err(unavailable)?;
        let asking = connection.create_channel().await.map_err(unavailable)?;
        let left = ready(&asking, queue).await?;
        Ok(Browse {
            endpoint: endpoint.clone(),
            connection,
            queue: queue.to_owned(),
            asking,
            holding: Vec::new(),
            consumer: None,
            left,
            acting,
            publishing: None,
            chosen: Vec::new(),
        })
    }

    /// The next dead letter, or none at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Raw>, StoreError> {
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
                        "somebody else holds dead letters; they are left out"
                    );
                    self.left = 0;
                    return Ok(None);
                }
            };
            let Some(delivery) = next else {
                // Cancelled, and read to its end.
                self.consumer = None;
                continue;
            };
            self.left -= 1;
            // It tries a binding. The gateways take it away when they hand the unrouted back.
            let probe = headers::is_probe(&delivery.properties);
            if let Some(holding) = self.holding.last_mut() {
                holding.given = holding.given.saturating_add(1);
                holding.held += 1;
                if holding.given == HELD {
                    self.cancel().await?;
                }
            }
            if !probe {
                return Ok(Some(delivery));
            }
        }
        Ok(None)
    }

    /// Opens the next channel and consumes there; whether there was one left.
    async fn consume(&mut self) -> Result<bool, StoreError> {
        // Those that hold nothing more are of no further use.
        if self.chosen.is_empty() {
            let (done, holding) = std::mem::take(&mut self.holding).into_iter().partition(|holding| holding.held == 0);
            self.holding = holding;
            for Holding { channel, .. } in done {
                channel.close(200, "OK".into()).await.map_err(unavailable)?;
            }
        }
        if self.holding.len() == MOST_CHANNELS {
            tracing::warn!(
                left = self.left,
                queue = self.queue,
                "too many dead letters for one look; these are left out"
            );
            return Ok(false);
        }
        let channel = self.connection.create_channel().await.map_err(unavailable)?;
        channel.basic_qos(HELD, BasicQosOptions::default()).await.map_err(unavailable)?;
        let queue = self.queue.as_str().into();
        let consumed = channel.basic_consume(queue, "".into(), BasicConsumeOptions::default(), FieldTable::default());
        self.consumer = Some(consumed.await.map_err(unavailable)?);
        self.holding.push(Holding { channel, given: 0, held: 0, cancelled: false });
        Ok(true)
    }

    /// The last dead letter leaves its queue, with the next `settle`.
    pub(super) fn choose(&mut self, acker: Acker, again: Option<Envelope>) {
        let place = self.holding.len().saturating_sub(1);
        self.chosen.push(Chosen { acker, place, again });
    }

    /// Ends the consumer of the last channel; what it was given can still be read.
    async fn cancel(&mut self) -> Result<(), StoreError> {
        if let (Some(consumer), Some(holding)) = (&self.consumer, self.holding.last_mut())
            && !holding.cancelled
        {
            let cancelled = holding.channel.basic_cancel(consumer.tag(), BasicCancelOptions::default()).await;
            cancelled.map_err(unavailable)?;
            holding.cancelled = true;
        }
        Ok(())
    }

    /// Publishes what is chosen, awaits the confirms, and lets go of what was confirmed: which of all that is, and why not all.
    pub(super) async fn settle(&mut self, back: &str) -> (Vec<bool>, Option<StoreError>) {
        let chosen = std::mem::take(&mut self.chosen);
        // To acknowledge makes room on the channel: its consumer must take no more by then, for the dead letters that a cancel sends
        // back stand behind those of the next channel.
        let confirmed = match self.cancel().await {
            Ok(()) => self.publish(back, &chosen).await,
            Err(error) => Err(error),
        };
        let (confirmed, error) = match confirmed {
            Ok(confirmed) => confirmed,
            Err(error) => return (vec![false; chosen.len()], Some(error)),
        };
        let mut gone = vec![false; chosen.len()];
        let acknowledged = self.acknowledge(&chosen, &confirmed, &mut gone).await;
        (gone, acknowledged.err().or(error))
    }

    /// Acknowledges what is confirmed, and notes what is gone by that. A quorum queue's channel sends only so many settlements at a
    /// time, and forgets the rest when it is closed. So what a channel holds is settled with one frame where all of it goes, and else
    /// in pieces.
    async fn acknowledge(
        &mut self,
        chosen: &[Chosen],
        confirmed: &[bool],
        gone: &mut [bool],
    ) -> Result<(), StoreError> {
        let all = chosen.iter().zip(confirmed).zip(gone);
        let mut go: Vec<_> =
            all.filter_map(|((chosen, confirmed), gone)| confirmed.then_some((chosen, gone))).collect();
        for here in go.chunk_by_mut(|(one, _), (other, _)| one.place == other.place) {
            let Some(holding) = here.first().and_then(|(chosen, _)| self.holding.get_mut(chosen.place)) else {
                continue;
            };
            holding.held = holding.held.saturating_sub(u32::try_from(here.len()).unwrap_or(u32::MAX));
            let whole = holding.held == 0;
            let size = if whole { here.len() } else { PIECE };
            for piece in here.chunks_mut(size) {
                let first = if whole { piece.len().saturating_sub(1) } else { 0 };
                for (chosen, _) in piece.iter().skip(first) {
                    match chosen.acker.ack(BasicAckOptions { multiple: whole }).await {
                        Ok(true) => {}
                        Ok(false) => return Err(unavailable("the connection to RabbitMQ ended")),
                        Err(error) => return Err(unavailable(error)),
                    }
                }
                // Meanwhile they are settled.
                ready(&holding.channel, &self.queue).await?;
                piece.iter_mut().for_each(|(_, gone)| **gone = true);
            }
        }
        Ok(())
    }

    /// Publishes whatever is to be published; which of all are confirmed, or need not be, and why not all.
    async fn publish(&mut self, back: &str, chosen: &[Chosen]) -> Result<(Vec<bool>, Option<StoreError>), StoreError> {
        if chosen.iter().all(|chosen| chosen.again.is_none()) {
            return Ok((vec![true; chosen.len()], None));
        }
        if self.publishing.is_none() {
            let connection = self.endpoint.dial("streamgate dead, replays").await.map_err(unavailable)?;
            let channel = connection.create_channel().await.map_err(unavailable)?;
            channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(unavailable)?;
            self.publishing = Some((connection, channel));
        }
        let Some((_, channel)) = &self.publishing else { return Ok((Vec::new(), None)) };
        let messages = chosen.iter().filter_map(|chosen| chosen.again.as_ref()).map(|envelope| Message {
            exchange: back.into(),
            routing_key: headers::routing_key(envelope),
            properties: headers::properties(envelope, &Beside::default()),
            body: envelope.body.clone(),
        });
        let confirmed = publisher::publish_batch(channel, messages).await.map_err(StoreError::Unavailable)?;
        let refused = || StoreError::Full("the queue of events is at its limit".to_owned());
        let error = confirmed.contains(&false).then(refused);
        Ok((confirmed, error))
    }

    /// Takes no more dead letters, and counts those that came and were not looked at: they go back too.
    async fn read_on(&mut self) -> Result<(), StoreError> {
        self.cancel().await?;
        let Some(consumer) = &mut self.consumer else { return Ok(()) };
        let mut unread = 0;
        while let Some(dead_letter) = consumer.next().await {
            dead_letter.map_err(unavailable)?;
            unread += 1;
        }
        if let Some(holding) = self.holding.last_mut() {
            holding.held += unread;
        }
        Ok(())
    }

    /// One channel after the other, and nobody consuming meanwhile: so the dead letters stand in the queue as before. Whether more of them
    /// do than should.
    pub(super) async fn close(mut self) -> Result<bool, StoreError> {
        let cancelled = match tokio::time::timeout(PATIENCE, self.read_on()).await {
            Ok(cancelled) => cancelled,
            Err(_) => Err(StoreError::Unavailable(format!("no answer within {PATIENCE:?}"))),
        };
        let mut expected = ready(&self.asking, &self.queue).await.unwrap_or_default();
        for Holding { channel, held, .. } in &self.holding {
            drop(tokio::time::timeout(PATIENCE, channel.close(200, "OK".into())).await);
            expected = expected.saturating_add(*held);
            // A closed channel's dead letters go back a moment after its close, without a notification: the next channel's must not
            // overtake them.
            let back = async {
                while ready(&self.asking, &self.queue).await.is_ok_and(|ready| ready < expected) {
                    tokio::time::sleep(LOOK).await;
                }
            };
            drop(tokio::time::timeout(PATIENCE, back).await);
        }
        let more = ready(&self.asking, &self.queue).await.is_ok_and(|ready| ready > expected);
        farewell(&self.connection).await;
        if let Some((connection, _)) = &self.publishing {
            farewell(connection).await;
        }
        cancelled.map(|()| more)
    }
}

fn unavailable(error: impl std::fmt::Display) -> StoreError {
    StoreError::Unavailable(error.to_string())
}
