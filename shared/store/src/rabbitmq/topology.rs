//! The exchanges and queues that events need, declared or verified. A mistake here loses messages that were confirmed, so
//! it is checked before ready, after every reconnect and every minute.

use super::link::PATIENCE;
use lapin::options::{
    BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions,
    QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection, ErrorKind, ExchangeKind};
use std::collections::BTreeSet;
use std::time::Duration;

/// So high that only the worker bounds redeliveries. Without it 4.x drops at 20; with -1 3.10 drops at the first requeue.
const DELIVERY_LIMIT: i64 = 1_000_000;
/// Where deliveries wait for another's lease when there are no retries.
const ONLY_STEP_MS: u64 = 1000;
const ACCESS_REFUSED: u16 = 403;
const NOT_FOUND: u16 = 404;
const PRECONDITION_FAILED: u16 = 406;

/// Names and arguments, of what a service needs.
#[derive(Clone, Debug)]
pub struct Topology {
    prefix: String,
    events_max: u64,
    /// Milliseconds; empty for a gateway, which never retries, and for nobody else.
    steps: BTreeSet<u64>,
    declare: bool,
    /// Whether the queue of calls must be there. Whoever declares declares it; but where operators do and have not yet, or its
    /// node is down, what only hooks need must not keep events waiting.
    calls: bool,
    /// Whether that the alternate exchange leads somewhere is tried by a message.
    probe: bool,
}

/// What is wrong with an exchange or queue.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    #[error("{0}; delete it when it is empty, or set the configuration to what it has")]
    Mismatch(String),
    #[error("{what} does not exist; declare it, or set rabbitmq.declare = true")]
    Missing { what: String },
    #[error("{0}; it is back when that node is, or delete it with rabbitmqctl to have it on another")]
    NodeDown(String),
    #[error("{0}; grant it (rabbitmqctl set_permissions), or declare as an operator and set rabbitmq.declare = false")]
    NotPermitted(String),
    #[error(
        "the exchange {exchange} is bound to no queue: what it gets would be gone; bind the queue {exchange} to it"
    )]
    Unbound { exchange: String },
    #[error("cannot verify {what}: {error}")]
    Failed { what: String, error: String },
}

impl TopologyError {
    /// Whether the connection failed rather than what was looked at.
    pub(super) fn is_passing(&self) -> bool {
        matches!(self, TopologyError::Failed { .. })
    }
}

/// One thing of the topology.
#[derive(Clone, Debug, PartialEq)]
enum Item {
    Exchange { name: String, kind: ExchangeKind, alternate: Option<String> },
    Queue { name: String, arguments: FieldTable },
    Binding { queue: String, exchange: String, key: &'static str },
}

impl Item {
    fn what(&self) -> String {
        match self {
            Item::Exchange { name, .. } => format!("the exchange {name}"),
            Item::Queue { name, .. } => format!("the queue {name}"),
            Item::Binding { queue, exchange, .. } => format!("the binding of {queue} to {exchange}"),
        }
    }
}

impl Topology {
    /// What a gateway needs.
    pub fn new(prefix: &str, events_max: u64, declare: bool) -> Topology {
        Topology { prefix: prefix.to_owned(), events_max, steps: BTreeSet::new(), declare, calls: false, probe: true }
    }

    /// What a worker needs too: a queue for each distinct step of its ladder, and one to wait in where there is no ladder.
    pub fn with_steps(self, ladder: &[Duration]) -> Topology {
        let mut steps: BTreeSet<_> =
            ladder.iter().map(|step| u64::try_from(step.as_millis()).unwrap_or(u64::MAX)).collect();
        if steps.is_empty() {
            steps.insert(ONLY_STEP_MS);
        }
        Topology { steps, ..self }
    }

    /// What hooks need too.
    #[must_use]
    pub fn with_calls(self) -> Topology {
        Topology { calls: true, ..self }
    }

    /// For connections that never publish: an alarm blocks those that do, and then nothing is acknowledged on them.
    pub(super) fn without_probe(self) -> Topology {
        Topology { probe: false, ..self }
    }

    pub(super) fn exchange(&self) -> &str {
        &self.prefix
    }

    pub(super) fn events(&self) -> String {
        format!("{}.events", self.prefix)
    }

    pub(super) fn dead(&self) -> String {
        format!("{}.dead", self.prefix)
    }

    pub(super) fn unrouted(&self) -> String {
        format!("{}.unrouted", self.prefix)
    }

    pub(super) fn calls(&self) -> String {
        format!("{}.calls", self.prefix)
    }

    pub(super) fn retry(&self, step_ms: u64) -> String {
        format!("{}.retry.{step_ms}", self.prefix)
    }

    /// The shortest step that is not under the delay, else the longest step.
    pub(super) fn step_for(&self, delay: Duration) -> u64 {
        let asked = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self.steps.range(asked..).next().or_else(|| self.steps.last()).copied().unwrap_or(ONLY_STEP_MS)
    }

    fn items(&self) -> Vec<Item> {
        let unrouted = self.unrouted();
        let queue = |name: &str, more: &[(&str, AMQPValue)]| {
            let mut arguments = FieldTable::default();
            arguments.insert("x-queue-type".into(), text("quorum"));
            arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(DELIVERY_LIMIT));
            for (name, value) in more {
                arguments.insert((*name).into(), value.clone());
            }
            Item::Queue { name: name.to_owned(), arguments }
        };
        let exchange = |name: &str, kind, alternate| Item::Exchange { name: name.to_owned(), kind, alternate };
        let binding =
            |queue: &str, exchange: &str, key| Item::Binding { queue: queue.into(), exchange: exchange.into(), key };
        let events_max = AMQPValue::LongLongInt(i64::try_from(self.events_max).unwrap_or(i64::MAX));
        let mut classic = FieldTable::default();
        classic.insert("x-queue-type".into(), text("classic"));
        // The alternate exchange stands before the exchange that leads to it.
        let mut items = vec![
            exchange(&unrouted, ExchangeKind::Fanout, None),
            queue(&unrouted, &[]),
            binding(&unrouted, &unrouted, ""),
            exchange(&self.prefix, ExchangeKind::Topic, Some(unrouted.clone())),
            queue(&self.events(), &[("x-max-length-bytes", events_max), ("x-overflow", text("reject-publish"))]),
            binding(&self.events(), &self.prefix, "*.push.#"),
            queue(&self.dead(), &[]),
        ];
        if self.calls || self.declare {
            // Nothing in it outlives its caller, so it is neither replicated nor written to disk.
            items.push(Item::Queue { name: self.calls(), arguments: classic });
        }
        for step in &self.steps {
            let name = self.retry(*step);
            let ttl = AMQPValue::LongLongInt(i64::try_from(*step).unwrap_or(i64::MAX));
            items.extend([
                exchange(&name, ExchangeKind::Fanout, None),
                queue(
                    &name,
                    &[
                        ("x-message-ttl", ttl),
                        // No x-dead-letter-routing-key: an expired copy goes to the queue that its routing key names.
                        ("x-dead-letter-exchange", text("")),
                        ("x-dead-letter-strategy", text("at-least-once")),
                        // Without it that strategy silently falls back to at-most-once.
                        ("x-overflow", text("reject-publish")),
                    ],
                ),
                binding(&name, &name, ""),
            ]);
        }
        items
    }

    /// Makes sure that all is there as it must be; tells everything that is not.
    pub(super) async fn ensure(&self, connection: &Connection) -> Result<(), Vec<TopologyError>> {
        let mut look = Look { connection, channel: None, errors: Vec::new() };
        for item in self.items() {
            let before = look.errors.len();
            if self.declare {
                look.at(&item.what(), |channel| declare(channel, &item, false)).await;
            } else {
                look.verify(&item, Owner::Operator).await;
            }
            // Whoever needs it tells what is wrong with it. It stands on one node: without that, events go on.
            let of_calls = matches!(&item, Item::Queue { name, .. } if *name == self.calls());
            if of_calls && !self.calls && !look.errors.last().is_some_and(TopologyError::is_passing) {
                look.errors.truncate(before);
            }
            // Without a connection the rest fails alike.
            if look.errors.last().is_some_and(TopologyError::is_passing) {
                break;
            }
        }
        if self.probe && !self.declare && look.errors.is_empty() {
            look.is_bound(&self.unrouted()).await;
        }
        if look.errors.is_empty() { Ok(()) } else { Err(look.errors) }
    }

    /// As `ensure`, but creates nothing. Returns what is not there yet, where we would declare it.
    pub(super) async fn inspect(&self, connection: &Connection) -> Result<Vec<String>, Vec<TopologyError>> {
        let mut look = Look { connection, channel: None, errors: Vec::new() };
        let mut absent = Vec::new();
        let owner = if self.declare { Owner::Us } else { Owner::Operator };
        for item in self.items() {
            if !look.verify(&item, owner).await {
                absent.push(item.what());
            }
        }
        if !absent.is_empty() {
            look.may_declare(&self.prefix).await;
        } else if look.errors.is_empty() {
            look.is_bound(&self.unrouted()).await;
        }
        if look.errors.is_empty() { Ok(absent) } else { Err(look.errors) }
    }
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

async fn declare(channel: Channel, item: &Item, passive: bool) -> lapin::Result<()> {
    match item {
        Item::Exchange { name, kind, alternate } => {
            let mut arguments = FieldTable::default();
            if let Some(alternate) = alternate {
                arguments.insert("alternate-exchange".into(), text(alternate));
            }
            let options = ExchangeDeclareOptions { durable: true, passive, ..ExchangeDeclareOptions::default() };
            channel.exchange_declare(name.as_str().into(), kind.clone(), options, arguments).await
        }
        Item::Queue { name, arguments } => {
            let options = QueueDeclareOptions { durable: true, passive, ..QueueDeclareOptions::default() };
            channel.queue_declare(name.as_str().into(), options, arguments.clone()).await.map(drop)
        }
        Item::Binding { queue, exchange, key } => {
            let options = QueueBindOptions::default();
            let (queue, exchange) = (queue.as_str().into(), exchange.as_str().into());
            channel.queue_bind(queue, exchange, (*key).into(), options, FieldTable::default()).await
        }
    }
}

/// Who declares the topology.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Us,
    Operator,
}

/// A walk over the topology. An error closes its channel, so each next step opens another.
struct Look<'c> {
    connection: &'c Connection,
    channel: Option<Channel>,
    errors: Vec<TopologyError>,
}

impl Look<'_> {
    /// Does one step; what goes wrong is kept.
    async fn at<F: Future<Output = lapin::Result<()>> + Send>(
        &mut self,
        what: &str,
        step: impl FnOnce(Channel) -> F + Send,
    ) {
        if let Err(error) = self.run(what, step).await {
            self.errors.push(error);
        }
    }

    async fn run<T: Send, F: Future<Output = lapin::Result<T>> + Send>(
        &mut self,
        what: &str,
        step: impl FnOnce(Channel) -> F + Send,
    ) -> Result<T, TopologyError> {
        let work = async {
            let channel = match self.channel.take().filter(|channel| channel.status().connected()) {
                Some(channel) => channel,
                None => self.connection.create_channel().await?,
            };
            let told = step(channel.clone()).await?;
            self.channel = Some(channel);
            Ok(told)
        };
        match tokio::time::timeout(PATIENCE, work).await {
            Ok(result) => result.map_err(|error| judge(what, &error)),
            Err(_) => Err(TopologyError::Failed { what: what.into(), error: format!("no answer within {PATIENCE:?}") }),
        }
    }

    /// Whether the item is there; one that is absent is no error where we would declare it. Bindings cannot be asked for.
    async fn verify(&mut self, item: &Item, owner: Owner) -> bool {
        if matches!(item, Item::Binding { .. }) {
            return true;
        }
        match self.run(&item.what(), |channel| declare(channel, item, true)).await {
            Ok(()) => {}
            Err(TopologyError::Missing { .. }) if owner == Owner::Us => return false,
            Err(error) => {
                self.errors.push(error);
                return true;
            }
        }
        // It exists: declaring it again changes nothing and compares the arguments.
        match (self.run(&item.what(), |channel| declare(channel, item, false)).await, owner) {
            // Who may not declare cannot compare, and need not where operators declare.
            (Ok(()), _) | (Err(TopologyError::NotPermitted(_)), Owner::Operator) => {}
            (Err(error), _) => self.errors.push(error),
        }
        true
    }

    /// Whether an exchange leads anywhere, by a message that expires at once and comes back if it does not.
    async fn is_bound(&mut self, exchange: &str) {
        let probe = |channel: Channel| async move {
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let properties = BasicProperties::default().with_expiration("0".into());
            let confirm = channel.basic_publish(exchange.into(), "probe".into(), options, b"", properties).await?;
            Ok(confirm.await?.take_message().is_some())
        };
        match self.run(exchange, probe).await {
            Ok(false) | Err(TopologyError::NotPermitted(_)) => {}
            Ok(true) => self.errors.push(TopologyError::Unbound { exchange: exchange.to_owned() }),
            Err(error) => self.errors.push(error),
        }
        // In confirm mode, and of no further use.
        self.channel = None;
    }

    /// Whether we may declare, write and read under this prefix, by a queue of our own that nobody else sees.
    async fn may_declare(&mut self, prefix: &str) {
        let name = ShortString::from(format!("{prefix}.check.{}", std::process::id()));
        let probe = |channel: Channel| async move {
            let options = QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
            channel.queue_declare(name.clone(), options, FieldTable::default()).await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            let options = BasicPublishOptions::default();
            let properties = BasicProperties::default();
            let confirm = channel.basic_publish("".into(), name.clone(), options, b"", properties).await?;
            confirm.await?;
            channel.basic_get(name.clone(), BasicGetOptions { no_ack: true }).await?;
            channel.queue_delete(name, QueueDeleteOptions::default()).await?;
            Ok(())
        };
        self.at("what this user may do", probe).await;
        self.channel = None;
    }
}

fn judge(what: &str, error: &lapin::Error) -> TopologyError {
    let failed = |error: String| TopologyError::Failed { what: what.to_owned(), error };
    let ErrorKind::ProtocolError(told) = error.kind() else { return failed(error.to_string()) };
    let text = told.get_message().to_string();
    match told.get_id() {
        PRECONDITION_FAILED => TopologyError::Mismatch(text),
        NOT_FOUND if text.contains("down or inaccessible") => TopologyError::NodeDown(text),
        NOT_FOUND => TopologyError::Missing { what: what.to_owned() },
        ACCESS_REFUSED => TopologyError::NotPermitted(text),
        _ => failed(text),
    }
}

/// All errors in one line.
pub(super) fn list(errors: &[TopologyError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_queue_carries_every_argument() {
        let steps = [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(1)];
        let items = Topology::new("p", 9, true).with_steps(&steps).with_calls().items();
        let told: Vec<_> = items
            .iter()
            .map(|item| match item {
                Item::Exchange { name, kind, alternate } => format!("exchange {name} {kind:?} {alternate:?}"),
                Item::Binding { queue, exchange, key } => format!("binding {exchange} {key} {queue}"),
                Item::Queue { name, arguments } => {
                    let arguments = arguments.inner().iter().map(|(name, value)| {
                        if let AMQPValue::LongLongInt(number) = value {
                            return format!("{name}={number}");
                        }
                        format!("{name}={}", value.as_long_string().expect("numbers and strings only"))
                    });
                    format!("queue {name} {}", arguments.collect::<Vec<_>>().join(" "))
                }
            })
            .collect();
        let retry = "x-dead-letter-exchange= x-dead-letter-strategy=at-least-once x-delivery-limit=1000000";
        let expected = [
            "exchange p.unrouted Fanout None".to_owned(),
            "queue p.unrouted x-delivery-limit=1000000 x-queue-type=quorum".to_owned(),
            "binding p.unrouted  p.unrouted".to_owned(),
            "exchange p Topic Some(\"p.unrouted\")".to_owned(),
            "queue p.events x-delivery-limit=1000000 x-max-length-bytes=9 x-overflow=reject-publish x-queue-type=quorum"
                .to_owned(),
            "binding p *.push.# p.events".to_owned(),
            "queue p.dead x-delivery-limit=1000000 x-queue-type=quorum".to_owned(),
            "queue p.calls x-queue-type=classic".to_owned(),
            "exchange p.retry.1000 Fanout None".to_owned(),
            format!("queue p.retry.1000 {retry} x-message-ttl=1000 x-overflow=reject-publish x-queue-type=quorum"),
            "binding p.retry.1000  p.retry.1000".to_owned(),
            "exchange p.retry.5000 Fanout None".to_owned(),
            format!("queue p.retry.5000 {retry} x-message-ttl=5000 x-overflow=reject-publish x-queue-type=quorum"),
            "binding p.retry.5000  p.retry.5000".to_owned(),
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn a_wait_is_not_shorter_than_asked_where_a_step_allows() {
        let topology = Topology::new("p", 9, true).with_steps(&[Duration::from_secs(1), Duration::from_secs(30)]);
        let step = |ms| topology.step_for(Duration::from_millis(ms));
        assert_eq!([1, 1000, 1001, 30_000].map(step), [1000, 1000, 30_000, 30_000]);
        assert_eq!(step(90_000), 30_000, "the longest; the rest is waited in another round");
        assert_eq!(Topology::new("p", 9, true).with_steps(&[]).step_for(Duration::ZERO), 1000);
    }
}
