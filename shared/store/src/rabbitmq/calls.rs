//! The worker's side of calls: on a connection of its own, so that neither a backlog of events nor their retries delay an
//! answer.

use super::endpoint::Endpoint;
use super::feed::{Arrived, Feed};
use super::headers;
use super::link::{self, Link, Session};
use super::topology::Topology;
use bytes::Bytes;
use lapin::message::Delivery as Raw;
use lapin::options::{BasicAckOptions, BasicNackOptions};
use lapin::types::ShortString;
use lapin::{Acker, Channel};
use std::time::Duration;
use streamgate_core::ports::{Call, Calls, StoreError};
use streamgate_core::reason::Reason;
use tokio::sync::Mutex;

/// Stream never waits longer. Used for a foreign call that names no expiration or a longer one.
const LONGEST_CALL: Duration = Duration::from_secs(5);

/// Calls from RabbitMQ.
#[derive(Debug)]
pub struct CallQueue {
    feed: Feed,
    /// The channel for answers, and the session that it belongs to.
    answers: Mutex<Option<(Session, Channel)>>,
}

/// Answers one call.
#[derive(Debug)]
pub struct Handle {
    acker: Acker,
    /// `None` where the caller asked for no reply.
    to: Option<(ShortString, ShortString)>,
}

impl CallQueue {
    /// Starts to connect and to consume, `concurrency` calls at a time. Call within a tokio runtime.
    pub fn start(endpoint: &Endpoint, topology: &Topology, concurrency: u16) -> CallQueue {
        let link = Link::start(endpoint.clone(), topology.clone().with_calls().without_probe(), "worker, calls");
        CallQueue { feed: Feed::start(link, topology.calls(), concurrency, 0), answers: Mutex::default() }
    }

    /// Takes no more calls, and gives back those that no handler has begun: their time is running.
    pub async fn stop(&self) {
        self.feed.stop().await;
    }

    pub async fn close(&self) {
        self.feed.close().await;
    }

    async fn reply(
        &self,
        to: Option<(ShortString, ShortString)>,
        answer: Result<Bytes, Reason>,
    ) -> Result<(), StoreError> {
        let Some((reply_to, correlation)) = to else { return Ok(()) };
        let channel = self.channel().await?;
        let (body, reason) = match answer {
            Ok(body) => (body, None),
            Err(reason) => (Bytes::new(), Some(reason)),
        };
        // An answer for a caller that is gone costs nothing: the broker drops it.
        link::post(&channel, reply_to, headers::answer(correlation, reason), &body)
    }

    /// The open session's channel for answers. It is not in confirm mode, so tasks may share it.
    async fn channel(&self) -> Result<Channel, StoreError> {
        let session = self.feed.link().session()?;
        let mut answers = self.answers.lock().await;
        if let Some((of, channel)) = &*answers
            && of.is(&session)
            && channel.status().connected()
        {
            return Ok(channel.clone());
        }
        let channel = session.channel().await.map_err(StoreError::Unavailable)?;
        *answers = Some((session, channel.clone()));
        Ok(channel)
    }
}

impl Calls for CallQueue {
    type Handle = Handle;

    async fn next(&self) -> Result<Call<Handle>, StoreError> {
        let Arrived { message, .. } = self.feed.next().await;
        Ok(call(message))
    }

    async fn answer(&self, handle: Handle, answer: Result<Bytes, Reason>) -> Result<(), StoreError> {
        let Handle { acker, to } = handle;
        // Settled after the answer: if the worker dies before that, the broker hands the call out again while there is
        // time. And settled even where the answer failed: an unsettled call would occupy a prefetch slot for as long as
        // the session lives.
        let settled = match self.reply(to, answer).await {
            Ok(()) => acker.ack(BasicAckOptions::default()).await,
            Err(error) => {
                drop(acker.nack(BasicNackOptions { requeue: true, ..BasicNackOptions::default() }).await);
                return Err(error);
            }
        };
        settled.map(drop).map_err(|error| StoreError::Unavailable(error.to_string()))
    }
}

fn call(raw: Raw) -> Call<Handle> {
    let Raw { routing_key, properties, data, acker, .. } = raw;
    let to = properties.reply_to().clone();
    let to = to.map(|reply_to| (reply_to, properties.correlation_id().clone().unwrap_or_default()));
    let within = headers::within(&properties).unwrap_or(LONGEST_CALL).min(LONGEST_CALL);
    let envelope = headers::read(&properties, routing_key.as_str(), data.into()).envelope;
    Call { envelope, within, handle: Handle { acker, to } }
}
