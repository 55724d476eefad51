//! RabbitMQ: holds the events that are not handled yet. Publishers and consumers have connections of their own, each
//! supervised (`link`), over a topology that is verified before its confirms are trusted (`topology`).

mod ask;
mod browse;
mod calls;
mod consumer;
mod dead_letters;
mod depth;
mod endpoint;
mod feed;
mod headers;
mod incoming;
mod link;
mod publisher;
mod survey;
mod topology;
mod unrouted;

pub use ask::{Caller, OnLate};
pub use calls::CallQueue;
pub use consumer::{Consumer, Handle, Prefetch};
pub use dead_letters::DeadLetterQueue;
pub use endpoint::{DialError, Endpoint, EndpointError};
pub use publisher::OnReturn;
pub use topology::{Topology, TopologyError};

use headers::Annotations;
use link::{Link, State};
use publisher::{Message, Publisher, Width};
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::{
    envelope::Envelope,
    ports::{Accepted, Enqueue, StoreError},
};
use survey::Inspected;

/// Channels of a gateway: with a single one, each publish would wait until the one before it is written.
const GATEWAY_LANES: usize = 4;
/// Channels of a worker, with one unconfirmed publish each, so that a returned retry is never taken for another
/// message.
const WORKER_LANES: usize = 8;

/// The gateway's side: events into the exchange.
#[derive(Debug)]
pub struct Exchange {
    topology: Topology,
    publisher: Publisher,
    unrouted: unrouted::Watch,
}

impl Exchange {
    /// Starts to connect. Call within a tokio runtime. `max_in_flight`: how many publishes may be unconfirmed at a
    /// time.
    pub fn start(endpoint: Endpoint, topology: Topology, max_in_flight: usize, on_return: &OnReturn) -> Exchange {
        let link = Link::start(endpoint, topology.clone(), "gateway");
        let width = Width { lanes: GATEWAY_LANES, window: max_in_flight.div_ceil(GATEWAY_LANES) };
        let unrouted = unrouted::Watch::new(topology.clone());
        Exchange { topology, publisher: Publisher::start(link, width, on_return), unrouted }
    }

    /// Calls `show` with the depth of each queue, and hands diverted events back to their queue. `ladder`: the workers'
    /// waits between attempts. Never returns.
    pub async fn watch_queues(&self, ladder: &[Duration], show: impl Fn(&'static str, u32) + Send) {
        self.unrouted.run(self.publisher.link(), ladder, show).await;
    }

    /// Why events do not reach their queue, or `None` while they do. Diverted events are durable, but nobody handles
    /// them.
    pub fn diverted(&self) -> Option<Arc<str>> {
        self.unrouted.diverted()
    }

    /// Calls `notify` with whether the broker takes events: now, and after each change.
    pub async fn watch_up(&self, notify: impl Fn(bool) + Send) {
        let mut state = self.publisher.link().watch();
        loop {
            notify(matches!(*state.borrow_and_update(), State::Up(_)));
            if state.changed().await.is_err() {
                return;
            }
        }
    }

    pub async fn close(&self) {
        self.publisher.link().close().await;
    }
}

impl Enqueue for Exchange {
    async fn enqueue(&self, envelope: Envelope) -> Result<Accepted, StoreError> {
        let message = Message {
            exchange: self.topology.exchange().into(),
            routing_key: headers::routing_key(&envelope),
            properties: headers::properties(&envelope, &Annotations::default()),
            body: envelope.body,
        };
        self.publisher.publish(message).await.map(|()| Accepted::Enqueued)
    }

    fn ready(&self) -> Result<(), StoreError> {
        self.publisher.link().session().map(drop)
    }

    fn connections_lost(&self) -> u64 {
        self.publisher.link().sessions_lost()
    }
}

impl Consumer {
    /// Starts to connect and to consume. Call within a tokio runtime.
    pub fn connect(endpoint: &Endpoint, topology: &Topology, prefetch: Prefetch, on_return: &OnReturn) -> Consumer {
        let link = |topology: Topology, name| Link::start(endpoint.clone(), topology, name);
        let width = Width { lanes: WORKER_LANES, window: 1 };
        let publisher = Publisher::start(link(topology.clone(), "worker, retries"), width, on_return);
        Consumer::start(topology.clone(), link(topology.clone().without_probe(), "worker"), publisher, prefetch)
    }
}

/// What an inspection of the broker found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// Exchanges and queues that do not exist yet; the services declare them.
    pub absent: Vec<String>,
    /// Why hooks could not be answered, where everything else would work.
    pub hooks: Option<String>,
}

/// Dials, verifies the topology without changing it, and tries what gateway and worker will do. Each error is one line
/// for an operator.
pub async fn inspect(endpoint: &Endpoint, topology: &Topology) -> Result<Inspection, Vec<String>> {
    let connection = endpoint.dial("streamgate check").await.map_err(|error| vec![error.to_string()])?;
    let inspected = topology.inspect(&connection).await;
    link::close_connection(&connection).await;
    match inspected {
        Ok(Inspected { absent, hooks }) => Ok(Inspection { absent, hooks: hooks.map(|error| error.to_string()) }),
        Err(errors) => Err(errors.iter().map(ToString::to_string).collect()),
    }
}

/// A queue, with the messages that no consumer holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueDepth {
    pub name: String,
    pub messages: u32,
    pub consumers: u32,
}

/// The queues of a topology that exist. The error is for an operator.
pub async fn queue_depths(endpoint: &Endpoint, topology: &Topology) -> Result<Vec<QueueDepth>, String> {
    depths(endpoint, "streamgate status", topology.queues()).await
}

/// Those of these queues that exist. `name` shows in RabbitMQ's list of connections.
async fn depths(endpoint: &Endpoint, name: &str, queues: Vec<String>) -> Result<Vec<QueueDepth>, String> {
    let connection = endpoint.dial(name).await.map_err(|error| error.to_string())?;
    let mut depths = Vec::new();
    for name in queues {
        // A query for an absent queue closes its channel, so each has its own.
        let channel = connection.create_channel().await.map_err(|error| error.to_string())?;
        if let Ok((messages, consumers)) = depth::look(&channel, &name).await {
            depths.push(QueueDepth { name, messages, consumers });
            drop(channel.close(200, "OK".into()).await);
        }
    }
    link::close_connection(&connection).await;
    Ok(depths)
}

/// How many events are parked for each of these routes; routes without a queue are left out. The error is for an
/// operator.
pub async fn parked(endpoint: &Endpoint, topology: &Topology, routes: &[String]) -> Result<Vec<(String, u64)>, String> {
    let queues = routes.iter().map(|route| topology.parked(route)).collect();
    let depths = depths(endpoint, "streamgate route", queues).await?;
    let count = |route: &String| {
        let depth = depths.iter().find(|depth| depth.name == topology.parked(route))?;
        Some((route.clone(), u64::from(depth.messages)))
    };
    Ok(routes.iter().filter_map(count).collect())
}
