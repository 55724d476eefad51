//! A walk over the topology: declares it, verifies it, or tries what a role will do, and collects everything that is
//! wrong.

use super::endpoint::REPLY_TIMEOUT;
use super::headers;
use super::topology::{Item, Topology, TopologyError, text};
use lapin::options::{
    BasicAckOptions, BasicGetOptions, BasicNackOptions, BasicPublishOptions, ConfirmSelectOptions,
    ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Connection, ErrorKind, ExchangeKind};

const ACCESS_REFUSED: u16 = 403;
const NOT_FOUND: u16 = 404;
const PRECONDITION_FAILED: u16 = 406;
/// Attempts at a publish that is refused: its reason is lost where the refusal arrives between the publish and the next
/// call.
const TRIES: usize = 10;
/// Messages searched for our own probe: at most other gateways' probes stand before it.
const MOST_PROBES: usize = 64;

/// What an inspection without changes found.
#[derive(Debug)]
pub(super) struct Inspected {
    /// Names that do not exist yet, where we would declare them.
    pub(super) absent: Vec<String>,
    /// Why hooks could not be answered, where everything else would work.
    pub(super) hooks: Option<TopologyError>,
}

impl Topology {
    /// Makes sure that everything exists as it must; returns every mistake.
    pub(super) async fn ensure(&self, connection: &Connection) -> Result<(), Vec<TopologyError>> {
        let mut survey = Survey::begin(connection, &self.prefix);
        for item in self.items() {
            let before = survey.errors.len();
            if self.declare {
                survey.at(&item.what(), |channel| declare(channel, &item, false)).await;
            } else {
                survey.verify(&item, Owner::Operator).await;
            }
            // The roles that need the queue of calls report what is wrong with it. It lives on one node: while that
            // node is down, events go on.
            let of_calls = matches!(&item, Item::Queue { name, .. } if *name == self.calls());
            if of_calls && !self.calls && !survey.errors.last().is_some_and(TopologyError::is_passing) {
                survey.errors.truncate(before);
            }
            // Without a connection every further step would fail alike.
            if survey.errors.last().is_some_and(TopologyError::is_passing) {
                break;
            }
        }
        if self.probe && !self.declare && survey.errors.is_empty() {
            match self.retries() {
                // The probe reaches a worker, which removes it.
                true => survey.leads_to(&self.return_exchange(), &self.events()).await,
                false => survey.keeps(&self.unrouted()).await,
            }
        }
        if survey.errors.is_empty() { Ok(()) } else { Err(survey.errors) }
    }

    /// As `ensure`, but creates nothing, and tries everything that gateway and worker will do.
    pub(super) async fn inspect(&self, connection: &Connection) -> Result<Inspected, Vec<TopologyError>> {
        let mut survey = Survey::begin(connection, &self.prefix);
        let mut absent = Vec::new();
        let owner = if self.declare { Owner::Us } else { Owner::Operator };
        for item in self.items() {
            if !survey.verify(&item, owner).await {
                absent.push(item.what());
            }
        }
        if absent.is_empty() && survey.errors.is_empty() {
            for exchange in self.publish_targets() {
                survey.may_write(&exchange).await;
                // Without a connection that takes publishes the rest fails alike.
                if survey.errors.last().is_some_and(TopologyError::is_passing) {
                    return Err(survey.errors);
                }
            }
            for queue in [self.events(), self.dead()] {
                survey.may_read(&queue).await;
            }
            // This checks that the queue can be read, too.
            survey.keeps(&self.unrouted()).await;
        } else if !absent.is_empty() {
            survey.may_declare().await;
        }
        let before = survey.errors.len();
        // Calls and answers use the default exchange: RabbitMQ's direct reply-to works over no other.
        survey.may_write("").await;
        let hooks = survey.errors.drain(before..).next();
        if survey.errors.is_empty() { Ok(Inspected { absent, hooks }) } else { Err(survey.errors) }
    }
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

/// Whether the services or the operators declare the topology.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Us,
    Operator,
}

/// One walk over the topology. An error closes its channel, so the next step opens another.
struct Survey<'c> {
    connection: &'c Connection,
    prefix: &'c str,
    channel: Option<Channel>,
    errors: Vec<TopologyError>,
}

impl<'c> Survey<'c> {
    fn begin(connection: &'c Connection, prefix: &'c str) -> Survey<'c> {
        Survey { connection, prefix, channel: None, errors: Vec::new() }
    }

    /// Runs one step and keeps its error.
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
            let result = step(channel.clone()).await?;
            self.channel = Some(channel);
            Ok(result)
        };
        match tokio::time::timeout(REPLY_TIMEOUT, work).await {
            Ok(result) => result.map_err(|error| self.judge(what, &error)),
            Err(_) => {
                Err(TopologyError::Failed { what: what.into(), error: format!("no answer within {REPLY_TIMEOUT:?}") })
            }
        }
    }

    fn judge(&self, what: &str, error: &lapin::Error) -> TopologyError {
        let failed = |error: String| TopologyError::Failed { what: what.to_owned(), error };
        let ErrorKind::ProtocolError(reply) = error.kind() else { return failed(error.to_string()) };
        let text = reply.get_message().to_string();
        match reply.get_id() {
            PRECONDITION_FAILED if text.contains("limit") && text.contains("is reached") => {
                TopologyError::LimitReached(text)
            }
            PRECONDITION_FAILED => TopologyError::Mismatch(text),
            NOT_FOUND if text.contains("down or inaccessible") => TopologyError::NodeDown(text),
            NOT_FOUND => TopologyError::Missing { what: what.to_owned() },
            ACCESS_REFUSED => TopologyError::refused(text, self.prefix),
            _ => failed(text),
        }
    }

    /// Whether the item exists; an absent one is an error only where operators declare. Bindings cannot be queried.
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
        // It exists, so declaring it again changes nothing and compares the arguments.
        match (self.run(&item.what(), |channel| declare(channel, item, false)).await, owner) {
            // A user without the right to declare cannot compare, and need not where operators declare.
            (Ok(()), _) | (Err(TopologyError::NotPermitted { .. }), Owner::Operator) => {}
            (Err(error), _) => self.errors.push(error),
        }
        true
    }

    /// Checks that an exchange leads to some queue, with a message that comes back if it does not.
    async fn leads_to(&mut self, exchange: &str, queue: &str) {
        let probe = |channel: Channel| async move {
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let confirm =
                channel.basic_publish(exchange.into(), "probe".into(), options, b"", headers::probe()).await?;
            Ok(confirm.await?.take_message().is_some())
        };
        match self.run(&format!("the exchange {exchange}"), probe).await {
            Ok(false) => {}
            Ok(true) => {
                let (exchange, queue) = (exchange.to_owned(), queue.to_owned());
                self.errors.push(TopologyError::Unbound { exchange, queue });
            }
            Err(error) => self.errors.push(error),
        }
        // The channel is in confirm mode now, and cannot be reused.
        self.channel = None;
    }

    /// Checks that the alternate exchange keeps unroutable messages. The probe is removed again; where events stand
    /// before it, the gateway that hands those back removes it.
    async fn keeps(&mut self, unrouted: &str) {
        // First checks that the probe could be removed.
        let before = self.errors.len();
        self.may_read(unrouted).await;
        if self.errors.len() > before {
            return;
        }
        self.leads_to(unrouted, unrouted).await;
        let take = |channel: Channel| async move {
            for _ in 0..MOST_PROBES {
                let Some(message) = channel.basic_get(unrouted.into(), BasicGetOptions::default()).await? else {
                    break;
                };
                if headers::is_probe(&message.properties) {
                    message.ack(BasicAckOptions::default()).await?;
                    continue;
                }
                message.nack(BasicNackOptions { requeue: true, ..BasicNackOptions::default() }).await?;
                break;
            }
            Ok(())
        };
        self.at(&format!("the queue {unrouted}"), take).await;
    }

    /// Checks that we may publish to an exchange, with a publish that is rolled back before it is routed.
    async fn may_write(&mut self, exchange: &str) {
        let name = if exchange.is_empty() { "the default exchange (amq.default)" } else { exchange };
        let what = format!("what is published to {name}");
        for attempt in 1..=TRIES {
            let publish = |channel: Channel| async move {
                channel.tx_select().await?;
                let options = BasicPublishOptions::default();
                channel.basic_publish(exchange.into(), "probe".into(), options, b"", headers::probe()).await?;
                channel.tx_rollback().await
            };
            // The library loses the reason of a closed channel where no call waits for a reply on it at that moment.
            let tried = self.run(&what, publish).await;
            // The channel is in a transaction now, and cannot be reused.
            self.channel = None;
            match tried {
                Ok(()) => return,
                // An alarm holds publishes back until it is over: no further try says more.
                Err(_) if self.connection.status().blocked() => {
                    let error = "RabbitMQ blocks publishing: it is low on memory or disk space".to_owned();
                    return self.errors.push(TopologyError::Failed { what, error });
                }
                Err(error) if !error.is_passing() || attempt == TRIES => return self.errors.push(error),
                Err(_) => {}
            }
        }
    }

    /// Checks that we may consume a queue: reads one message, if there is one, and gives it back.
    async fn may_read(&mut self, queue: &str) {
        let get = |channel: Channel| async move {
            if let Some(message) = channel.basic_get(queue.into(), BasicGetOptions::default()).await? {
                message.nack(BasicNackOptions { requeue: true, ..BasicNackOptions::default() }).await?;
            }
            Ok(())
        };
        self.at(&format!("what is read from {queue}"), get).await;
    }

    /// Checks that we may declare, bind, write and read under this prefix, with an exchange and a queue that end with
    /// the connection.
    async fn may_declare(&mut self) {
        let name = ShortString::from(format!("{}.check.{}", self.prefix, std::process::id()));
        let queue = name.clone();
        let declare = |channel: Channel| async move {
            let options = QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
            channel.queue_declare(queue.clone(), options, FieldTable::default()).await?;
            // The exchange is deleted with its last binding, so with the queue.
            let options = ExchangeDeclareOptions { auto_delete: true, ..ExchangeDeclareOptions::default() };
            channel.exchange_declare(queue.clone(), ExchangeKind::Fanout, options, FieldTable::default()).await?;
            channel
                .queue_bind(queue.clone(), queue.clone(), "".into(), QueueBindOptions::default(), FieldTable::default())
                .await
        };
        let before = self.errors.len();
        self.at(&format!("what {name} would be"), declare).await;
        if self.errors.len() == before {
            self.may_write(name.as_str()).await;
            self.may_read(name.as_str()).await;
        }
        // An exchange is deleted with its last binding; this one may never have had one.
        let delete =
            |channel: Channel| async move { channel.exchange_delete(name, ExchangeDeleteOptions::default()).await };
        drop(self.run("what was tried", delete).await);
    }
}

/// All errors in one line.
pub(super) fn list(errors: &[TopologyError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
