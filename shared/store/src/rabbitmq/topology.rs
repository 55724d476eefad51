//! The exchanges and queues that events need, with all their arguments. A mistake here loses confirmed messages, so
//! `survey` checks them before readiness, after every reconnect and every minute.

use lapin::ExchangeKind;
use lapin::types::{AMQPValue, FieldTable};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// High enough that only the worker bounds redeliveries. Without it 4.x drops at 20; with -1, 3.10 drops at the first
/// requeue.
const DELIVERY_LIMIT: i64 = 1_000_000;
/// Wait for another worker's lease if there are no retry steps.
const ONLY_STEP_MS: u64 = 1000;

/// Names and arguments of everything that one service needs.
#[derive(Clone, Debug)]
pub struct Topology {
    pub(super) prefix: String,
    events_max: u64,
    parked_max: u64,
    /// The routes with queues for parked events; shared by all clones, because a reload may add some.
    parked: Arc<Mutex<BTreeSet<Arc<str>>>>,
    /// Retry steps in milliseconds; empty only for a gateway, which never retries.
    steps: BTreeSet<u64>,
    pub(super) declare: bool,
    /// Whether the queue of calls must exist. A service that may declare declares it. But if operators declare and have
    /// not yet, or its node is down, events must not wait for what only hooks need.
    pub(super) calls: bool,
    /// Whether exchanges, whose bindings cannot be queried, are tested with a message.
    pub(super) probe: bool,
}

/// What is wrong with an exchange or queue.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    #[error("{0}; delete it when it is empty, or set the configuration to what it has")]
    Mismatch(String),
    #[error("{what} does not exist; declare it, or set rabbitmq.declare = true")]
    Missing { what: String },
    #[error(
        "{0}; raise it (rabbitmqctl set_vhost_limits -p VHOST '{{\"max-queues\": -1}}', or cluster_queue_limit in rabbitmq.conf), \
         or delete queues that nobody needs"
    )]
    LimitReached(String),
    #[error("{0}; it returns with that node; or delete it with rabbitmqctl, so that it is declared on another")]
    NodeDown(String),
    #[error(
        "{error}; configure, write and read is what events need under the prefix, and hooks write to amq.default: rabbitmqctl \
         set_permissions -p VHOST USER {permissions} (or declare as an operator, and set rabbitmq.declare = false)"
    )]
    NotPermitted { error: String, permissions: String },
    #[error(
        "the exchange {exchange} is bound to no queue, so its messages would be lost; bind the queue {queue} to it"
    )]
    Unbound { exchange: String, queue: String },
    #[error("cannot verify {what}: {error}")]
    Failed { what: String, error: String },
}

impl TopologyError {
    /// The error, with the permissions that gateway and worker need, as `rabbitmqctl` takes them.
    pub(super) fn refused(error: String, prefix: &str) -> TopologyError {
        let ours = format!("^{}", prefix.replace('.', "\\."));
        let permissions = format!("'{ours}' '{ours}|^amq\\.default$' '{ours}'");
        TopologyError::NotPermitted { error, permissions }
    }

    /// Whether the connection failed, rather than the item.
    pub(super) fn is_passing(&self) -> bool {
        matches!(self, TopologyError::Failed { .. })
    }
}

/// One item of the topology.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Item {
    Exchange { name: String, kind: ExchangeKind, alternate: Option<String> },
    Queue { name: String, arguments: FieldTable },
    Binding { queue: String, exchange: String, key: &'static str },
}

impl Item {
    pub(super) fn what(&self) -> String {
        match self {
            Item::Exchange { name, .. } => format!("the exchange {name}"),
            Item::Queue { name, .. } => format!("the queue {name}"),
            Item::Binding { queue, exchange, .. } => format!("the binding of {queue} to {exchange}"),
        }
    }
}

impl Topology {
    /// The topology of a gateway.
    pub fn new(prefix: &str, events_max: u64, declare: bool) -> Topology {
        let (parked, steps) = Default::default();
        let (prefix, parked_max) = (prefix.to_owned(), events_max);
        Topology { prefix, events_max, parked_max, parked, steps, declare, calls: false, probe: true }
    }

    /// Adds what a worker needs to park events: a queue of this many bytes for each of these routes.
    pub fn with_parked(self, routes: &[&str], parked_max: u64) -> Topology {
        let parked = routes.iter().map(|route| Arc::from(*route)).collect();
        Topology { parked: Arc::new(Mutex::new(parked)), parked_max, ..self }
    }

    /// Adds a route whose events can be parked. Returns whether it is new.
    pub(super) fn add_parked(&self, route: &Arc<str>) -> bool {
        self.parked_routes().insert(Arc::clone(route))
    }

    /// The routes whose events can be parked.
    pub(super) fn routes(&self) -> Vec<Arc<str>> {
        self.parked_routes().iter().cloned().collect()
    }

    fn parked_routes(&self) -> MutexGuard<'_, BTreeSet<Arc<str>>> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds what a worker needs for retries: a queue for each distinct step of its ladder, or a single one to wait in
    /// if there is no ladder.
    pub fn with_steps(self, ladder: &[Duration]) -> Topology {
        let mut steps: BTreeSet<_> =
            ladder.iter().map(|step| u64::try_from(step.as_millis()).unwrap_or(u64::MAX)).collect();
        if steps.is_empty() {
            steps.insert(ONLY_STEP_MS);
        }
        Topology { steps, ..self }
    }

    /// Adds what hooks need.
    #[must_use]
    pub fn with_calls(self) -> Topology {
        Topology { calls: true, ..self }
    }

    /// Leaves out the probe, for connections that never publish: an alarm blocks publishing connections, and then
    /// nothing is acknowledged on them.
    pub(super) fn without_probe(self) -> Topology {
        Topology { probe: false, ..self }
    }

    pub(super) fn exchange(&self) -> &str {
        &self.prefix
    }

    pub(super) fn events(&self) -> String {
        format!("{}.events", self.prefix)
    }

    /// Names of the queues where events wait for another attempt after these waits, whether or not they are part of
    /// this topology.
    pub(super) fn retry_queues(&self, ladder: &[Duration]) -> Vec<String> {
        let with_steps = self.clone().with_steps(ladder);
        with_steps.steps.iter().map(|step_ms| with_steps.retry(*step_ms)).collect()
    }

    /// The names of all queues.
    pub fn queues(&self) -> Vec<String> {
        let queues = self.items().into_iter().filter_map(|item| match item {
            Item::Queue { name, .. } => Some(name),
            Item::Exchange { .. } | Item::Binding { .. } => None,
        });
        queues.collect()
    }

    /// The name of the dead letters' queue and its exchange.
    pub fn dead(&self) -> String {
        format!("{}.dead", self.prefix)
    }

    pub(super) fn unrouted(&self) -> String {
        format!("{}.unrouted", self.prefix)
    }

    /// The exchange through which retries return after their wait, and unrouted events are handed back.
    pub(super) fn return_exchange(&self) -> String {
        format!("{}.back", self.prefix)
    }

    pub(super) fn calls(&self) -> String {
        format!("{}.calls", self.prefix)
    }

    pub(super) fn retry(&self, step_ms: u64) -> String {
        format!("{}.retry.{step_ms}", self.prefix)
    }

    /// Name of the queue, and its exchange, where a route's events wait while the route is full, open or paused.
    pub fn parked(&self, route: &str) -> String {
        format!("{}.parked.{route}", self.prefix)
    }

    /// The shortest step that is not shorter than the delay, else the longest step.
    pub(super) fn step_for(&self, delay: Duration) -> u64 {
        let asked = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self.steps.range(asked..).next().or_else(|| self.steps.last()).copied().unwrap_or(ONLY_STEP_MS)
    }

    /// Whether this is the topology of a worker, which retries.
    pub(super) fn retries(&self) -> bool {
        !self.steps.is_empty()
    }

    /// The exchanges that gateway and worker publish to.
    pub(super) fn publish_targets(&self) -> Vec<String> {
        let fixed = [self.prefix.clone(), self.return_exchange(), self.dead()];
        let steps = self.steps.iter().map(|step| self.retry(*step));
        let parked = self.parked_routes().iter().map(|route| self.parked(route)).collect::<Vec<_>>();
        fixed.into_iter().chain(steps).chain(parked).collect()
    }

    /// Everything, in the order of declaration: the target of a queue's dead letters comes before the queue, and an
    /// alternate exchange before the exchange that leads to it.
    pub(super) fn items(&self) -> Vec<Item> {
        let (unrouted, dead, events, back) = (self.unrouted(), self.dead(), self.events(), self.return_exchange());
        let events_max = AMQPValue::LongLongInt(i64::try_from(self.events_max).unwrap_or(i64::MAX));
        let mut items = vec![
            exchange(&dead, ExchangeKind::Fanout, None),
            // No dead-letter exchange: a queue that dead-letters to itself holds its messages for ever.
            quorum(&dead, vec![("x-overflow", text("reject-publish"))]),
            binding(&dead, &dead, ""),
            exchange(&unrouted, ExchangeKind::Fanout, None),
            quorum(&unrouted, dead_lettering(&dead)),
            binding(&unrouted, &unrouted, ""),
            exchange(&self.prefix, ExchangeKind::Topic, Some(unrouted.clone())),
            quorum(&events, [vec![("x-max-length-bytes", events_max)], dead_lettering(&dead)].concat()),
            binding(&events, &self.prefix, "*.push.#"),
            exchange(&back, ExchangeKind::Fanout, None),
            binding(&events, &back, ""),
        ];
        if self.calls || self.declare {
            // Nothing in it outlives its caller, so it is neither replicated nor written to disk.
            let mut classic = FieldTable::default();
            classic.insert("x-queue-type".into(), text("classic"));
            items.push(Item::Queue { name: self.calls(), arguments: classic });
        }
        for step in &self.steps {
            let name = self.retry(*step);
            let ttl = AMQPValue::LongLongInt(i64::try_from(*step).unwrap_or(i64::MAX));
            items.extend([
                exchange(&name, ExchangeKind::Fanout, None),
                quorum(&name, [vec![("x-message-ttl", ttl)], dead_lettering(&back)].concat()),
                binding(&name, &name, ""),
            ]);
        }
        let parked_max = AMQPValue::LongLongInt(i64::try_from(self.parked_max).unwrap_or(i64::MAX));
        for route in &*self.parked_routes() {
            let name = self.parked(route);
            let bound = vec![("x-max-length-bytes", parked_max.clone())];
            items.extend([
                exchange(&name, ExchangeKind::Fanout, None),
                quorum(&name, [bound, dead_lettering(&dead)].concat()),
                binding(&name, &name, ""),
            ]);
        }
        items
    }
}

fn exchange(name: &str, kind: ExchangeKind, alternate: Option<String>) -> Item {
    Item::Exchange { name: name.to_owned(), kind, alternate }
}

fn quorum(name: &str, more: Vec<(&str, AMQPValue)>) -> Item {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("quorum"));
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(DELIVERY_LIMIT));
    for (name, value) in more {
        arguments.insert(name.into(), value);
    }
    Item::Queue { name: name.to_owned(), arguments }
}

fn binding(queue: &str, exchange: &str, key: &'static str) -> Item {
    Item::Binding { queue: queue.into(), exchange: exchange.into(), key }
}

/// Messages that expire, or that a policy has the broker drop, go to a fanout exchange, which ignores a policy's
/// routing key.
fn dead_lettering(exchange: &str) -> Vec<(&'static str, AMQPValue)> {
    vec![
        ("x-dead-letter-exchange", text(exchange)),
        ("x-dead-letter-strategy", text("at-least-once")),
        // Without it that strategy silently falls back to at-most-once.
        ("x-overflow", text("reject-publish")),
    ]
}

pub(super) fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_queue_carries_every_argument() {
        let steps = [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(1)];
        let items = Topology::new("p", 9, true).with_steps(&steps).with_parked(&["app"], 7).with_calls().items();
        let found: Vec<_> = items
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
        let (limit, net) = ("x-delivery-limit=1000000", "x-dead-letter-strategy=at-least-once");
        let quorum = "x-overflow=reject-publish x-queue-type=quorum";
        let expected = [
            "exchange p.dead Fanout None".to_owned(),
            format!("queue p.dead {limit} {quorum}"),
            "binding p.dead  p.dead".to_owned(),
            "exchange p.unrouted Fanout None".to_owned(),
            format!("queue p.unrouted x-dead-letter-exchange=p.dead {net} {limit} {quorum}"),
            "binding p.unrouted  p.unrouted".to_owned(),
            "exchange p Topic Some(\"p.unrouted\")".to_owned(),
            format!("queue p.events x-dead-letter-exchange=p.dead {net} {limit} x-max-length-bytes=9 {quorum}"),
            "binding p *.push.# p.events".to_owned(),
            "exchange p.back Fanout None".to_owned(),
            "binding p.back  p.events".to_owned(),
            "queue p.calls x-queue-type=classic".to_owned(),
            "exchange p.retry.1000 Fanout None".to_owned(),
            format!("queue p.retry.1000 x-dead-letter-exchange=p.back {net} {limit} x-message-ttl=1000 {quorum}"),
            "binding p.retry.1000  p.retry.1000".to_owned(),
            "exchange p.retry.5000 Fanout None".to_owned(),
            format!("queue p.retry.5000 x-dead-letter-exchange=p.back {net} {limit} x-message-ttl=5000 {quorum}"),
            "binding p.retry.5000  p.retry.5000".to_owned(),
            "exchange p.parked.app Fanout None".to_owned(),
            format!("queue p.parked.app x-dead-letter-exchange=p.dead {net} {limit} x-max-length-bytes=7 {quorum}"),
            "binding p.parked.app  p.parked.app".to_owned(),
        ];
        assert_eq!(found, expected);
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
