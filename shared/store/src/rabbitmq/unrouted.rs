//! Events that no queue was bound for. RabbitMQ keeps them in a queue of their own; here they are noticed, and handed back.

use super::depth::ready;
use super::endpoint::PATIENCE;
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

/// Between looks at the depths of the queues.
const LOOK: Duration = Duration::from_secs(5);
/// Messages handed back together: few enough that their bodies are a small part of a gateway's memory, and that a channel settles
/// each of them alone.
const BATCH: u16 = 16;
/// Messages handed back in one look: then it is said what was found, and the next look follows at once.
const MOST: u32 = 1000;
/// More messages than there can be probes: no need to look at them before it is said.
const MANY: u32 = 64;
/// Looks without a diverted event after which none is.
const CLEAN: u32 = 2;

/// What was found in the queue of the unrouted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct HandedBack {
    /// To the events.
    events: u64,
    /// To the dead letters: no event of ours has such a routing key.
    strangers: u64,
}

/// Watches the queues, and hands back what was diverted.
#[derive(Debug)]
pub(super) struct Watch {
    topology: Topology,
    known: Mutex<Known>,
}

/// What the looks so far have found.
#[derive(Debug, Default)]
struct Known {
    /// Why events do not reach their queue.
    diverted: Option<Arc<str>>,
    /// Looks in a row that found diverted events, and such that found none.
    found: u32,
    clean: u32,
    lines: Repeated,
    strangers: Repeated,
}

impl Watch {
    pub(super) fn new(topology: Topology) -> Watch {
        // Looks at the unrouted of its own; what it would try them with would wait behind what is there.
        Watch { topology: topology.without_probe(), known: Mutex::default() }
    }

    /// Why events do not reach their queue, where they do not.
    pub(super) fn diverted(&self) -> Option<Arc<str>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).diverted.clone()
    }

    /// Looks again and again. `show` is called with the depth of each queue. Never returns.
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
                    tracing::debug!(why, "cannot look at the queues");
                    // A queue that is gone, perhaps: the session is of use only where all is as it must be. One that an alarm blocks
                    // answers nothing, and has not ended.
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

    /// Whether more is left to be handed back.
    async fn look(&self, session: &Session, show: &(impl Fn(&'static str, u32) + Send)) -> Result<bool, String> {
        let channel = session.channel().await?;
        let queues = [
            ("waiting", self.topology.events()),
            ("dead", self.topology.dead()),
            ("unrouted", self.topology.unrouted()),
        ];
        let mut waiting = 0;
        for (label, queue) in queues {
            waiting = ready(&channel, &queue).await.map_err(|error| error.to_string())?;
            if label != "unrouted" || waiting > MANY {
                show(label, waiting);
            }
        }
        let mut found = HandedBack::default();
        let mut stopped = None;
        if waiting > 0 {
            // With `declare` this mends what diverts them: a queue or a binding that is missing.
            session.ensure(&self.topology).await?;
            stopped = self.hand_back(session, waiting.min(MOST), &mut found).await.err();
        }
        drop(channel.close(200, "OK".into()).await);
        // Probes do not count.
        let diverted = found.events + found.strangers;
        if waiting <= MANY {
            show("unrouted", if stopped.is_some() { waiting } else { u32::try_from(diverted).unwrap_or(waiting) });
        }
        let more = waiting > MOST && stopped.is_none();
        // Others may have what was there a moment ago.
        if waiting == 0 || diverted > 0 || stopped.is_some() {
            self.report(found, stopped);
        }
        Ok(more)
    }

    /// The first `waiting` messages, oldest first. Whatever is not settled goes back with its channel.
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
                match timeout(PATIENCE, consumer.next()).await {
                    Ok(Some(message)) => batch.push(message.map_err(text)?),
                    Ok(None) => return Err(format!("the consumer of {queue} ended")),
                    // Another gateway has the others.
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
            for (exchange, messages) in [(self.topology.back(), &events), (self.topology.dead(), &strangers)] {
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

    /// Publishes messages as they are, and acknowledges each that is confirmed; why not all, if so.
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
                "messages that are no events of ours were published to the exchange {prefix}: they stand in the dead letters, \
                 reason unrouted"
            );
        }
        if events == 0 && (stopped.is_none() || strangers > 0) {
            (known.found, known.clean) = (0, known.clean + 1);
            if known.clean >= CLEAN && known.diverted.take().is_some() {
                tracing::info!("no more events are diverted to {unrouted}");
            }
            return;
        }
        (known.found, known.clean) = (known.found + 1, 0);
        // Where it is ours to declare, it has just been mended: then only what is found again is diverted still.
        let lasts = stopped.is_some() || known.found > 1 || !self.topology.declare;
        let outcome = stopped
            .map_or_else(|| "they are handed back".to_owned(), |why| format!("they cannot be handed back now: {why}"));
        let why = format!(
            "RabbitMQ diverts events to {unrouted}, for no queue was bound for them; {outcome}. Is the queue {} bound to the exchange \
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

/// Whether it has the routing key that the events are bound by.
fn is_event(message: &Delivery) -> bool {
    message.routing_key.as_str().split('.').nth(1) == Some("push")
}

/// Messages that are ready in these queues. One that is not there, as before the first worker came, has none.
async fn depth_of_all(session: &Session, queues: &[String]) -> Result<u32, String> {
    let mut all = 0_u32;
    for queue in queues {
        // Of its own: a queue that is missing ends it.
        let channel = session.channel().await?;
        // However long RabbitMQ hangs: a channel that was given up here would be closed from both sides when it goes on, and the
        // library ends the whole connection then.
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
