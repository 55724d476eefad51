//! RabbitMQ: what is owed. Publishers and consumers on connections of their own, each supervised (`link`), over a topology
//! that is verified before anything is believed (`topology`).

mod ask;
mod calls;
mod consumer;
mod endpoint;
mod feed;
mod headers;
mod incoming;
mod letters;
mod link;
mod publisher;
mod topology;

pub use ask::{Caller, OnLate};
pub use calls::CallQueue;
pub use consumer::{Consumer, Handle};
pub use endpoint::{DialError, Endpoint, EndpointError};
pub use letters::LetterQueue;
pub use publisher::OnReturn;
pub use topology::{Topology, TopologyError};

use headers::Beside;
use link::{Link, State};
use publisher::{Message, Publisher, Width};
use streamgate_core::{
    envelope::Envelope,
    ports::{Accepted, Enqueue, StoreError},
};

/// Channels of a gateway: with one, each publish waits for the one before it to be written.
const GATEWAY_LANES: usize = 4;
/// Channels of a worker, with one unconfirmed publish each: a retry that is returned must never be taken for another's.
const WORKER_LANES: usize = 8;

/// The gateway's side: events into the exchange.
#[derive(Debug)]
pub struct Exchange {
    topology: Topology,
    publisher: Publisher,
}

impl Exchange {
    /// Starts to connect. Call within a tokio runtime. `max_in_flight`: publishes at a time.
    pub fn start(endpoint: Endpoint, topology: Topology, max_in_flight: usize, on_return: &OnReturn) -> Exchange {
        let link = Link::start(endpoint, topology.clone(), "gateway");
        let width = Width { lanes: GATEWAY_LANES, window: max_in_flight.div_ceil(GATEWAY_LANES) };
        Exchange { topology, publisher: Publisher::start(link, width, on_return) }
    }

    /// Calls for each change of whether the broker takes events, from now on.
    pub async fn watch_up(&self, tell: impl Fn(bool) + Send) {
        let mut state = self.publisher.link().watch();
        loop {
            tell(matches!(*state.borrow_and_update(), State::Up(_)));
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
            properties: headers::properties(&envelope, &Beside::default()),
            body: envelope.body,
        };
        self.publisher.publish(message).await.map(|()| Accepted::Enqueued)
    }

    fn ready(&self) -> Result<(), StoreError> {
        self.publisher.link().session().map(drop)
    }
}

impl Consumer {
    /// Starts to connect and to consume. Call within a tokio runtime.
    pub fn connect(endpoint: &Endpoint, topology: &Topology, prefetch: u16, on_return: &OnReturn) -> Consumer {
        let link = |topology: Topology, name| Link::start(endpoint.clone(), topology, name);
        let width = Width { lanes: WORKER_LANES, window: 1 };
        let publisher = Publisher::start(link(topology.clone(), "worker, retries"), width, on_return);
        Consumer::start(topology.clone(), link(topology.clone().without_probe(), "worker"), publisher, prefetch)
    }
}

/// What a look at the broker found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Inspection {
    AsItShouldBe,
    /// These are not there yet; the services declare them.
    Absent(Vec<String>),
}

/// Dials, and looks at the topology without changing it. The errors are for people, one each.
pub async fn inspect(endpoint: &Endpoint, topology: &Topology) -> Result<Inspection, Vec<String>> {
    let connection = endpoint.dial("streamgate check").await.map_err(|error| vec![error.to_string()])?;
    let found = topology.inspect(&connection).await;
    link::farewell(&connection).await;
    match found {
        Ok(absent) if absent.is_empty() => Ok(Inspection::AsItShouldBe),
        Ok(absent) => Ok(Inspection::Absent(absent)),
        Err(errors) => Err(errors.iter().map(ToString::to_string).collect()),
    }
}
