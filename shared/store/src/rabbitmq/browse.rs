//! One walk over a queue of dead letters that leaves it unchanged: messages are consumed, not acknowledged, and given
//! back in order. `basic.get` with a close at the end would shuffle them.

use super::depth::ready;
use super::endpoint::Endpoint;
use super::endpoint::REPLY_TIMEOUT;
use super::headers::{self, Annotations};
use super::link::close_connection;
use super::publisher::{self, Message};
use futures_util::StreamExt;
use lapin::message::Delivery as Raw;
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, ConfirmSelectOptions};
use lapin::types::FieldTable;
use lapin::{Acker, Channel, Connection, Consumer};
use std::time::Duration;
use streamgate_core::{envelope::Envelope, ports::StoreError};

/// Dead letters held by one channel: their bodies are in memory until they are read.
const MAX_HELD: u16 = 500;
/// RabbitMQ's limit is 2047 channels; the last ones are left to others.
const MOST_CHANNELS: usize = 2000;
/// Half of the settlements that a channel of RabbitMQ 3.10 sends to a quorum queue before it waits.
const ACK_PIECE: usize = 16;
/// Interval between checks whether dead letters are back in their queue.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// One walk over a queue.
#[derive(Debug)]
pub(super) struct Browse {
    endpoint: Endpoint,
    connection: Connection,
    queue: String,
    /// Used to ask how many dead letters are ready.
    asking: Channel,
    /// In opening order; the last one consumes.
    holding: Vec<Holding>,
    consumer: Option<Consumer>,
    /// Dead letters counted at the start that have not arrived yet.
    pub(super) left: u32,
    pub(super) acting: bool,
    /// Publishing has its own connection, because an alarm blocks a publishing connection as a whole.
    publishing: Option<(Connection, Channel)>,
    /// Dead letters that were found and are not settled yet.
    pub(super) chosen: Vec<Chosen>,
}

/// A channel and the dead letters that it holds.
#[derive(Debug)]
struct Holding {
    channel: Channel,
    /// Dead letters delivered to it.
    given: u16,
    /// Those that are not settled.
    held: u32,
    cancelled: bool,
}

/// A dead letter that leaves its queue.
#[derive(Debug)]
pub(super) struct Chosen {
    acker: Acker,
    /// Index of its channel in `holding`.
    place: usize,
    /// The event to publish before the acknowledgement.
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

    /// The next dead letter, or `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Raw>, StoreError> {
        while self.left > 0 {
            if self.consumer.is_none() && !self.consume().await? {
                return Ok(None);
            }
            let Some(consumer) = &mut self.consumer else { return Ok(None) };
            let next = match tokio::time::timeout(REPLY_TIMEOUT, consumer.next()).await {
                Ok(next) => next.transpose().map_err(unavailable)?,
                Err(_) => {
                    tracing::warn!(
                        left = self.left,
                        queue = self.queue,
                        "another consumer holds dead letters; they are left out"
                    );
                    self.left = 0;
                    return Ok(None);
                }
            };
            let Some(delivery) = next else {
                // The consumer was cancelled, and everything delivered to it was read.
                self.consumer = None;
                continue;
            };
            self.left -= 1;
            // A probe tests a binding. The gateways remove it when they hand back the unrouted events.
            let probe = headers::is_probe(&delivery.properties);
            if let Some(holding) = self.holding.last_mut() {
                holding.given = holding.given.saturating_add(1);
                holding.held += 1;
                if holding.given == MAX_HELD {
                    self.cancel().await?;
                }
            }
            if !probe {
                return Ok(Some(delivery));
            }
        }
        Ok(None)
    }

    /// Opens the next channel and consumes on it. Returns whether a channel was left.
    async fn consume(&mut self) -> Result<bool, StoreError> {
        // Channels that hold nothing more are not needed.
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
                "too many dead letters for one walk; these are left out"
            );
            return Ok(false);
        }
        let channel = self.connection.create_channel().await.map_err(unavailable)?;
        channel.basic_qos(MAX_HELD, BasicQosOptions::default()).await.map_err(unavailable)?;
        let queue = self.queue.as_str().into();
        let consumed = channel.basic_consume(queue, "".into(), BasicConsumeOptions::default(), FieldTable::default());
        self.consumer = Some(consumed.await.map_err(unavailable)?);
        self.holding.push(Holding { channel, given: 0, held: 0, cancelled: false });
        Ok(true)
    }

    /// The last dead letter leaves its queue with the next `settle`.
    pub(super) fn choose(&mut self, acker: Acker, again: Option<Envelope>) {
        let place = self.holding.len().saturating_sub(1);
        self.chosen.push(Chosen { acker, place, again });
    }

    /// Ends the consumer of the last channel; what was delivered to it can still be read.
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

    /// Publishes what is chosen, awaits the confirms, and acknowledges what was confirmed. Returns which ones are gone
    /// from the queue, and the error that stopped the rest.
    pub(super) async fn settle(&mut self, back: &str) -> (Vec<bool>, Option<StoreError>) {
        let chosen = std::mem::take(&mut self.chosen);
        // An acknowledgement makes room on the channel, so its consumer must be cancelled before: otherwise the dead
        // letters that a later cancel sends back would stand behind those of the next channel.
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

    /// Acknowledges what is confirmed, and records what is gone by that. A quorum queue's channel sends a limited
    /// number of settlements at a time, and forgets the rest when it is closed. So a channel whose dead letters all go
    /// is settled with one frame, any other in pieces.
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
            let size = if whole { here.len() } else { ACK_PIECE };
            for piece in here.chunks_mut(size) {
                let first = if whole { piece.len().saturating_sub(1) } else { 0 };
                for (chosen, _) in piece.iter().skip(first) {
                    match chosen.acker.ack(BasicAckOptions { multiple: whole }).await {
                        Ok(true) => {}
                        Ok(false) => return Err(unavailable("the connection to RabbitMQ ended")),
                        Err(error) => return Err(unavailable(error)),
                    }
                }
                // A round trip, after which the broker has processed them.
                ready(&holding.channel, &self.queue).await?;
                piece.iter_mut().for_each(|(_, gone)| **gone = true);
            }
        }
        Ok(())
    }

    /// Publishes what has to be published. Returns for each chosen dead letter whether it is confirmed or needs no
    /// confirm, and the error that stopped the rest.
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
            properties: headers::properties(envelope, &Annotations::default()),
            body: envelope.body.clone(),
        });
        let confirmed = publisher::publish_batch(channel, messages).await.map_err(StoreError::Unavailable)?;
        let refused = || StoreError::Full("the queue of events is at its limit".to_owned());
        let error = confirmed.contains(&false).then(refused);
        Ok((confirmed, error))
    }

    /// Takes no more dead letters, and counts those that arrived unread: they go back too.
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

    /// Closes one channel after the other while nothing is consumed, so that the dead letters return to their previous
    /// order. Returns whether the queue holds more of them than it should.
    pub(super) async fn close(mut self) -> Result<bool, StoreError> {
        let cancelled = match tokio::time::timeout(REPLY_TIMEOUT, self.read_on()).await {
            Ok(cancelled) => cancelled,
            Err(_) => Err(StoreError::Unavailable(format!("no answer within {REPLY_TIMEOUT:?}"))),
        };
        let mut expected = ready(&self.asking, &self.queue).await.unwrap_or_default();
        for Holding { channel, held, .. } in &self.holding {
            drop(tokio::time::timeout(REPLY_TIMEOUT, channel.close(200, "OK".into())).await);
            expected = expected.saturating_add(*held);
            // The dead letters of a closed channel return a moment after its close, without a notification. Those of
            // the next channel must not overtake them.
            let back = async {
                while ready(&self.asking, &self.queue).await.is_ok_and(|ready| ready < expected) {
                    tokio::time::sleep(POLL_INTERVAL).await;
                }
            };
            drop(tokio::time::timeout(REPLY_TIMEOUT, back).await);
        }
        let more = ready(&self.asking, &self.queue).await.is_ok_and(|ready| ready > expected);
        close_connection(&self.connection).await;
        if let Some((connection, _)) = &self.publishing {
            close_connection(connection).await;
        }
        cancelled.map(|()| more)
    }
}

fn unavailable(error: impl std::fmt::Display) -> StoreError {
    StoreError::Unavailable(error.to_string())
}
