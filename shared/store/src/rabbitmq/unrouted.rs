//! Events that no queue was bound for. RabbitMQ keeps them in a queue of their own; this module notices them and hands
//! them back.

use super::depth::{ready, ready_in_time};
use super::endpoint::REPLY_TIMEOUT;
use super::headers;
use super::link::{Link, Session};
use super::publisher::{self, Message};
use super::topology::Topology;
use bytes::Bytes;
use futures_util::StreamExt;
use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions, ConfirmSelectOptions};
use lapin::types::FieldTable;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use streamgate_core::repeated::Repeated;
use tokio::time::{MissedTickBehavior, interval, timeout};

/// Interval between looks at the depths of the queues.
const LOOK: Duration = Duration::from_secs(5);
/// Messages handed back together: few enough that their bodies take a small part of a gateway's memory, and that a
/// channel settles each of them alone.
const BATCH: u16 = 16;
/// Most messages handed back in one look: after them the findings are reported, and the next look follows at once.
const MAX_PER_LOOK: u32 = 1000;
/// More messages than there can be probes: reported as diverted without reading them.
const MORE_THAN_PROBES: u32 = 64;
/// Looks in a row without a diverted event after which the diversion is over.
const CLEAN_LOOKS: u32 = 2;

/// What was found in the queue of the unrouted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct HandedBack {
    /// Handed back to the events.
    events: u64,
    /// Moved to the dead letters, because no event of ours has such a routing key.
    strangers: u64,
}

/// Watches the queues, and hands back what was diverted.
#[derive(Debug)]
pub(super) struct Watch {
    topology: Topology,
    known: Mutex<Known>,
}

/// The findings of all looks so far.
#[derive(Debug, Default)]
struct Known {
    /// Why events do not reach their queue, if they do not.
    diverted: Option<Arc<str>>,
    /// How many looks in a row found diverted events, and how many found none.
    found: u32,
    clean: u32,
    lines: Repeated,
    strangers: Repeated,
}

impl Watch {
    pub(super) fn new(topology: Topology) -> Watch {
        // No probe: it would wait in the unrouted queue behind the messages that are there, and this watch reads that
        // queue anyway.
        Watch { topology: topology.without_probe(), known: Mutex::default() }
    }

    /// Why events do not reach their queue, if they do not.
    pub(super) fn diverted(&self) -> Option<Arc<str>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).diverted.clone()
    }

    /// Looks periodically, and calls `show` with the depth of each queue. Never returns.
    pub(super) async fn run(&self, link: &Link, ladder: &[Duration], show: impl Fn(&'static str, u32) + Send) {
        let retries = self.topology.retry_queues(ladder);
        drop(link.up().await);
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut more = false;
        loop {
            if !std::mem::take(&mut more) {
                ticks.tick().await;
            }
            let Ok(session) = link.session() else { continue };
            if let Ok(retrying) = depth_of_all(&session, &retries).await {
                show("retrying", retrying);
            }
            match self.look(&session, &show).await {
                Ok(left) => more = left,
                Err(why) => {
                    tracing::debug!(why, "cannot read the depths of the queues");
                    // Perhaps a queue is gone: the session can be used only while the topology is complete. A session
                    // that an alarm blocks does not answer, and has not ended.
                    if link.session().is_ok_and(|now| now.is(&session))
                        && let Err(why) = session.ensure(&self.topology).await
                        && link.session().is_ok_and(|now| now.is(&session))
                    {
                        session.fail(why);
                    }
                }
            }
        }
    }

    /// Looks once. Returns whether more messages are left to hand back.
    async fn look(&self, session: &Session, show: &(impl Fn(&'static str, u32) + Send)) -> Result<bool, String> {
        let channel = session.channel().await?;
        let queues = [
            ("waiting", self.topology.events()),
            ("dead", self.topology.dead()),
            ("unrouted", self.topology.unrouted()),
        ];
        let mut waiting = 0;
        for (label, queue) in queues {
            waiting = ready_in_time(&channel, &queue).await.map_err(|error| error.to_string())?;
            if label != "unrouted" || waiting > MORE_THAN_PROBES {
                show(label, waiting);
            }
        }
        let mut found = HandedBack::default();
        let mut stopped = None;
        if waiting > 0 {
            // With `declare` this repairs what diverts them: a missing queue or binding.
            session.ensure(&self.topology).await?;
            stopped = self.hand_back(session, waiting.min(MAX_PER_LOOK), &mut found).await.err();
        }
        drop(channel.close(200, "OK".into()).await);
        // Probes do not count.
        let diverted = found.events + found.strangers;
        if waiting <= MORE_THAN_PROBES {
            show("unrouted", if stopped.is_some() { waiting } else { u32::try_from(diverted).unwrap_or(waiting) });
        }
        let more = waiting > MAX_PER_LOOK && stopped.is_none();
        // If nothing was found, another gateway may have taken what was there a moment ago.
        if waiting == 0 || diverted > 0 || stopped.is_some() {
            self.report(found, stopped);
        }
        Ok(more)
    }

    /// Hands back the first `waiting` messages, oldest first. Unsettled ones return to the queue when their channel
    /// closes.
    async fn hand_back(&self, session: &Session, waiting: u32, found: &mut HandedBack) -> Result<(), String> {
        let (taking, putting) = (session.channel().await?, session.channel().await?);
        let handed = self.hand_back_over(&taking, &putting, waiting, found).await;
        drop(tokio::join!(taking.close(200, "OK".into()), putting.close(200, "OK".into())));
        handed
    }

    async fn hand_back_over(
        &self,
        taking: &Channel,
        putting: &Channel,
        waiting: u32,
        found: &mut HandedBack,
    ) -> Result<(), String> {
        let text = |error: lapin::Error| error.to_string();
        putting.confirm_select(ConfirmSelectOptions::default()).await.map_err(text)?;
        taking.basic_qos(BATCH, BasicQosOptions::default()).await.map_err(text)?;
        let (queue, options) = (self.topology.unrouted(), BasicConsumeOptions::default());
        let mut consumer = taking
            .basic_consume(queue.as_str().into(), "".into(), options, FieldTable::default())
            .await
            .map_err(text)?;
        let mut left = waiting;
        while left > 0 {
            let mut batch = Vec::new();
            while batch.len() < usize::from(BATCH) && left > 0 {
                match timeout(REPLY_TIMEOUT, consumer.next()).await {
                    Ok(Some(message)) => batch.push(message.map_err(text)?),
                    Ok(None) => return Err(format!("the consumer of {queue} ended")),
                    // Another gateway holds the others.
                    Err(_) => left = 1,
                }
                left -= 1;
            }
            if batch.is_empty() {
                return Ok(());
            }
            let messages = batch.iter().filter(|message| !headers::is_probe(&message.properties));
            let (events, strangers): (Vec<_>, Vec<_>) = messages.partition(|message| is_event(message));
            found.events += events.len() as u64;
            found.strangers += strangers.len() as u64;
            let mut failed = None;
            for (exchange, messages) in [(self.topology.return_exchange(), &events), (self.topology.dead(), &strangers)]
            {
                failed = failed.or(self.put(putting, &exchange, messages).await.err());
            }
            for probe in batch.iter().filter(|message| headers::is_probe(&message.properties)) {
                probe.ack(BasicAckOptions::default()).await.map_err(text)?;
            }
            if let Some(why) = failed {
                return Err(why);
            }
        }
        Ok(())
    }

    /// Publishes messages unchanged, and acknowledges each that is confirmed. The error says why not all.
    async fn put(&self, channel: &Channel, exchange: &str, messages: &[&Delivery]) -> Result<(), String> {
        let as_it_is = |message: &&Delivery| Message {
            exchange: exchange.into(),
            routing_key: message.routing_key.clone(),
            properties: message.properties.clone(),
            body: Bytes::copy_from_slice(&message.data),
        };
        let confirmed = publisher::publish_batch(channel, messages.iter().map(as_it_is)).await?;
        for (message, _) in messages.iter().zip(&confirmed).filter(|(_, confirmed)| **confirmed) {
            message.ack(BasicAckOptions::default()).await.map_err(|error| error.to_string())?;
        }
        let refused = || format!("what the exchange {exchange} leads to is at its limit");
        if confirmed.contains(&false) { Err(refused()) } else { Ok(()) }
    }

    fn report(&self, found: HandedBack, stopped: Option<String>) {
        let Topology { prefix, .. } = &self.topology;
        let (HandedBack { events, strangers }, unrouted) = (found, self.topology.unrouted());
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if strangers > 0
            && let Some(looks) = known.strangers.happened("", Instant::now())
        {
            tracing::error!(
                messages = strangers,
                looks,
                stopped,
                "foreign messages were published to the exchange {prefix}: they are in the dead letters, \
                 reason unrouted"
            );
        }
        if events == 0 && (stopped.is_none() || strangers > 0) {
            (known.found, known.clean) = (0, known.clean + 1);
            if known.clean >= CLEAN_LOOKS && known.diverted.take().is_some() {
                tracing::info!("no more events are diverted to {unrouted}");
            }
            return;
        }
        (known.found, known.clean) = (known.found + 1, 0);
        // If we declare the topology, it has just been repaired: then events are diverted only if more are found.
        let lasts = stopped.is_some() || known.found > 1 || !self.topology.declare;
        let outcome = stopped
            .map_or_else(|| "they are handed back".to_owned(), |why| format!("they cannot be handed back now: {why}"));
        let why = format!(
            "RabbitMQ diverts events to {unrouted}, because no queue was bound for them; {outcome}. Is the queue {} bound to the exchange \
             {prefix} with *.push.#?",
            self.topology.events()
        );
        if let Some(looks) = known.lines.happened(&why, Instant::now()) {
            tracing::error!(events, looks, "{why}");
        }
        if lasts {
            known.diverted = Some(why.into());
        }
    }
}

/// Whether the message has a routing key that the events are bound by.
fn is_event(message: &Delivery) -> bool {
    message.routing_key.as_str().split('.').nth(1) == Some("push")
}

/// How many messages are ready in these queues. A missing queue has none, as before the first worker starts.
async fn depth_of_all(session: &Session, queues: &[String]) -> Result<u32, String> {
    let mut all = 0_u32;
    for queue in queues {
        // Each query has its own channel, because a missing queue ends it.
        let channel = session.channel().await?;
        // Without a time limit: if a request is abandoned while RabbitMQ hangs, the channel is closed from both sides
        // once RabbitMQ continues, and then the library ends the whole connection.
        let depth = tokio::select! {
            depth = ready(&channel, queue) => depth,
            () = session.ended() => return Err(session.why()),
        };
        if let Ok(depth) = depth {
            all = all.saturating_add(depth);
            drop(channel.close(200, "OK".into()).await);
        }
    }
    Ok(all)
}
