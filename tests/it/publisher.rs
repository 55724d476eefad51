//! The publisher against the library's defects: crossed confirms, abandoned waits, brokers that hang.

use crate::harness::broker::Broker;
use crate::harness::eventually;
use crate::harness::process::Site;
use crate::harness::servers::Backends;
use crate::harness::wire::envelope;
use bytes::Bytes;
use futures_util::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions};
use lapin::types::FieldTable;
use rustix::process::Signal;
use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use streamgate_core::envelope::Envelope;
use streamgate_core::ports::{Enqueue, StoreError};
use streamgate_store::rabbitmq::{Endpoint, Exchange, Topology};

fn event(id: &str, bytes: usize) -> Envelope {
    envelope(id, Bytes::from(vec![b'x'; bytes]))
}

/// Bytes that count themselves: the `Arc` is released with them.
struct Counted(Vec<u8>, #[expect(dead_code, reason = "counts by living")] Arc<()>);

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

fn exchange(broker: &Broker, prefix: &str, events_max: u64, in_flight: usize) -> Arc<Exchange> {
    let endpoint = Endpoint::parse(&broker.url(), None, None).unwrap();
    let on_return: Arc<dyn Fn() + Send + Sync> = Arc::new(|| panic!("nothing is returned here"));
    Arc::new(Exchange::start(endpoint, Topology::new(prefix, events_max, true), in_flight, &on_return))
}

async fn ready(exchange: &Exchange) {
    eventually("the broker takes events", || async { exchange.ready().is_ok() }).await;
}

/// Takes all messages out of a queue and returns their ids.
async fn ids_in(broker: &Broker, queue: &str) -> HashSet<String> {
    let left = broker.ready(queue).await;
    let (_connection, channel) = broker.channel().await;
    let options = BasicConsumeOptions::default();
    let mut consumer = channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await.unwrap();
    let mut ids = HashSet::new();
    for _ in 0..left {
        let delivery = consumer.next().await.unwrap().unwrap();
        ids.insert(delivery.properties.message_id().as_ref().unwrap().to_string());
        delivery.ack(BasicAckOptions::default()).await.unwrap();
    }
    ids
}

#[tokio::test(flavor = "multi_thread")]
async fn confirms_never_cross() {
    let (broker, prefix) = (&Backends::shared().await.broker, Site::new().name());
    // A small queue, so that refusals come early among the confirms.
    let exchange = exchange(broker, &prefix, 1 << 20, 256);
    ready(&exchange).await;
    let results = Arc::new(Mutex::new((HashSet::new(), HashSet::new())));
    let tasks = (0..16).map(|task| {
        let (exchange, results) = (Arc::clone(&exchange), Arc::clone(&results));
        tokio::spawn(async move {
            for number in 0..250 {
                let id = format!("{task}-{number}");
                let result = exchange.enqueue(event(&id, 1_000)).await;
                let mut results = results.lock().unwrap();
                match result {
                    Ok(_) => results.0.insert(id),
                    Err(StoreError::Full(_)) => results.1.insert(id),
                    Err(error) => panic!("{error}"),
                };
            }
        })
    });
    for task in futures_util::future::join_all(tasks).await {
        task.unwrap();
    }
    let (confirmed, refused) = std::mem::take(&mut *results.lock().unwrap());
    assert!(confirmed.len() > 500 && refused.len() > 500, "{} and {}", confirmed.len(), refused.len());
    let found = ids_in(broker, &format!("{prefix}.events")).await;
    assert_eq!(found, confirmed, "the queue holds exactly the confirmed events");
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_that_are_given_up_hold_no_memory() {
    let broker = Broker::start().await;
    let exchange = exchange(&broker, "p", 4 << 30, 64);
    ready(&exchange).await;
    // RabbitMQ takes the bytes that the kernel buffers, and never confirms.
    broker.signal(Signal::STOP);
    let living = Arc::new(());
    for round in 0..30 {
        let given_up = (0..64).map(|n| {
            let body = Bytes::from_owner(Counted(vec![b'x'; 1 << 20], Arc::clone(&living)));
            let event = Envelope { body, ..event(&format!("{round}-{n}"), 0) };
            tokio::time::timeout(Duration::from_millis(20), exchange.enqueue(event))
        });
        let results = futures_util::future::join_all(given_up).await;
        assert!(results.iter().all(Result::is_err));
        // Of 64 MiB a round: the jobs that wait in the lanes, and the unconfirmed publishes.
        let held = Arc::strong_count(&living) - 1;
        assert!(held <= 2 * 64, "{held} MiB are held after round {round}");
    }
    broker.signal(Signal::CONT);
    eventually("RabbitMQ takes events again", || async { exchange.enqueue(event("after", 10)).await.is_ok() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_broker_is_given_up_after_its_heartbeats_and_reached_again() {
    let broker = Broker::start().await;
    let exchange = exchange(&broker, "p", 4 << 30, 64);
    ready(&exchange).await;
    broker.signal(Signal::STOP);
    eventually("the session is given up", || async { exchange.ready().is_err() }).await;
    broker.signal(Signal::CONT);
    eventually("a new session publishes", || async { exchange.enqueue(event("after", 10)).await.is_ok() }).await;
    exchange.close().await;
}
