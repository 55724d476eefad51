//! Poison events: only attempts that were begun and never concluded count against an event; and a dead letter that is moved by
//! hand is replayed.

use crate::harness::broker::Broker;
use crate::harness::eventually;
use crate::harness::process::{Server, Setup, Site};
use crate::harness::receiver::{Gate, Receiver, reply};
use crate::harness::servers::Backends;
use crate::harness::stack::{Act, Script, Services, Stack};
use crate::harness::wire::{Webhook, send, sign};
use crate::topology::site;
use lapin::message::BasicGetMessage;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicNackOptions, BasicPublishOptions};
use lapin::types::{AMQPValue, FieldTable};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use streamgate::Hooks;
use streamgate_store::redis::{Address, Redis, RedisClaims};

/// Takes deliveries of a queue `times` times and drops the connection each time, without a settlement.
pub async fn deliver_and_drop(broker: &Broker, queue: &str, times: usize) {
    use futures_util::StreamExt;
    for _ in 0..times {
        let (connection, channel) = broker.channel().await;
        let options = BasicConsumeOptions::default();
        let mut consumer =
            channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await.unwrap();
        consumer.next().await.unwrap().unwrap();
        connection.close(200, "OK".into()).await.unwrap();
    }
}

async fn done(worker: &Server) -> f64 {
    worker.metric("streamgate_worker_deliveries_total{outcome=\"done\",route=\"app\"}").await
}

/// The idempotency key of the one event of a queue.
async fn key_of(broker: &Broker, queue: &str) -> String {
    let (_connection, channel) = broker.channel().await;
    let peeked = channel.basic_get(queue.into(), BasicGetOptions::default()).await.unwrap().unwrap();
    let headers = peeked.properties.headers().clone().unwrap();
    peeked.nack(BasicNackOptions { requeue: true, ..Default::default() }).await.unwrap();
    headers.inner().get("x-streamgate-key").unwrap().as_long_string().unwrap().to_string()
}

/// Records a state of an event's claim, as an earlier worker left it.
pub async fn record(backends: &Backends, prefix: &str, key: &str, state: &str) {
    let redis = Redis::start(Address::parse(&backends.redis.url(), None).unwrap(), prefix, Duration::from_secs(5));
    let place = RedisClaims::new(redis, Duration::from_secs(60)).place(key);
    let set = "redis.call('HSET', KEYS[1], 'app|', ARGV[1]) return 'set'";
    backends.redis.ask(&["EVAL", set, "1", &place, state]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn peeks_dropped_connections_and_restarts_do_not_count_against_an_event() {
    let (service, gate) = Receiver::gated().await;
    let (site, prefix, backends) = site("", "concurrency = 4\nretry = [\"1s\"]", &service.route()).await;
    let events = format!("{prefix}.events");
    let gateway = site.start_as("gateway").await.ready().await;
    for number in 0..20 {
        let webhook = Webhook::push(&format!("id-{number}"), format!(r#"{{"type":"a.b","n":{number}}}"#));
        assert_eq!(send(gateway.public, &webhook).await.unwrap().outcome(), "enqueued");
    }
    deliver_and_drop(&backends.broker, &events, 12).await;
    // Workers that stop in the middle of their handlers, each with all events in its prefetch.
    for round in 1..=3 {
        let worker = site.start_as("worker").await.ready().await;
        eventually("handlers run", || async { worker.metric("streamgate_worker_in_flight").await >= 1.0 }).await;
        // The second signal cuts the drain short.
        worker.signal(rustix::process::Signal::TERM);
        eventually("the worker drains", || async { site.log().matches("draining; a second signal").count() == round })
            .await;
        worker.terminate().await;
    }
    gate.open();
    let worker = site.start_as("worker").await.ready().await;
    eventually("all are handled", || async { done(&worker).await >= 20.0 }).await;
    assert_eq!(service.ids().len(), 20);
    assert_eq!(backends.broker.ready(&format!("{prefix}.dead")).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_kills_its_workers_is_handled_alone_and_then_given_up() {
    let service = slow_service().await;
    let (site, prefix, backends) = site("", "concurrency = 4\nretry = [\"1s\"]", &service.route()).await;
    let events = format!("{prefix}.events");
    let gateway = site.start_as("gateway").await.ready().await;
    assert_eq!(send(gateway.public, &Webhook::push("poison", "{}")).await.unwrap().outcome(), "enqueued");
    record(backends, &prefix, &key_of(&backends.broker, &events).await, "L 1 9 77 1").await;
    let worker = site.start_as("worker").await.ready().await;
    eventually("the event is given up", || async {
        worker.metric("streamgate_worker_dead_letters_total{reason=\"poison\"}").await == 1.0
    })
    .await;
    assert!(service.received().is_empty(), "the event was not handled again");
    let listed = site.run(&["dead", "list", "--reason", "poison", "--json"]).await;
    let dead_letters: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!((dead_letters[0]["id"].as_str(), dead_letters[0]["route"].as_str()), (Some("poison"), Some("app")));
    let error = dead_letters[0]["error"].as_str().unwrap();
    assert!(error.starts_with("begun 10 times and never concluded"), "{error}");
    assert!(worker.terminate().await.success());

    assert_eq!(send(gateway.public, &Webhook::push("suspect", "{\"n\":1}")).await.unwrap().outcome(), "enqueued");
    record(backends, &prefix, &key_of(&backends.broker, &events).await, "L 1 4 77 1").await;
    for _ in 0..8 {
        assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    }
    let worker = site.start_as("worker").await.ready().await;
    eventually("all are handled", || async { service.received().len() == 9 }).await;
    eventually("all are settled", || async { done(&worker).await == 9.0 }).await;
    ran_alone(&service, "suspect");
}

/// A service whose calls take long enough for another one to begin, if the worker let it.
async fn slow_service() -> Receiver {
    Receiver::start(|_| {
        std::thread::sleep(Duration::from_millis(100));
        reply(200, &[])
    })
    .await
}

fn ran_alone(service: &Receiver, id: &str) {
    let (alone, others): (Vec<_>, Vec<_>) =
        service.received().into_iter().partition(|one| one.header("x-webhook-id") == id);
    assert_eq!(alone.len(), 1);
    for other in others {
        let apart = other.ended <= alone[0].began || other.began >= alone[0].ended;
        assert!(apart, "{} was handled concurrently with {id}", other.header("x-webhook-id"));
    }
}

/// Takes the first event of a queue and gives it back, `times` times: each counts as a delivery.
async fn peek(broker: &Broker, queue: &str, times: usize) {
    let (_connection, channel) = broker.channel().await;
    for _ in 0..times {
        let peeked = channel.basic_get(queue.into(), BasicGetOptions::default()).await.unwrap().unwrap();
        peeked.nack(BasicNackOptions { requeue: true, ..Default::default() }).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_redis_a_redelivered_event_is_handled_alone_and_never_given_up() {
    let (gone, backends) = (crate::harness::servers::free_port(), Backends::shared().await);
    let service = slow_service().await;
    let (site, prefix) = (Site::new(), Site::new().name());
    let tables = backends.tables(&prefix).replace(&backends.redis.url(), &format!("redis://127.0.0.1:{gone}"));
    assert!(tables.contains(&gone.to_string()), "{tables}");
    let rest = format!("{}\n{tables}", service.route());
    site.configure(&Setup { worker: "concurrency = 4\nretry = [\"1s\"]".into(), rest, ..Setup::default() });
    let gateway = site.start_as("gateway").await;
    eventually("RabbitMQ is up", || async { gateway.metric("streamgate_gateway_broker_up").await == 1.0 }).await;
    assert_eq!(send(gateway.public, &Webhook::push("suspect", "{}")).await.unwrap().outcome(), "enqueued");
    peek(&backends.broker, &format!("{prefix}.events"), 150).await;
    for _ in 0..8 {
        assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    }
    let _worker = site.start_as("worker").await;
    eventually("all are handled", || async { service.ids().len() == 9 }).await;
    ran_alone(&service, "suspect");
    assert_eq!(backends.broker.ready(&format!("{prefix}.dead")).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_killed_counts_one_abandoned_attempt() {
    let (service, gate) = Receiver::gated().await;
    let (site, prefix, backends) = site("", "handler_timeout = \"3s\"\nretry = [\"1s\"]", &service.route()).await;
    let gateway = site.start_as("gateway").await.ready().await;
    assert_eq!(send(gateway.public, &Webhook::push("held", "{}")).await.unwrap().outcome(), "enqueued");
    let key = key_of(&backends.broker, &format!("{prefix}.events")).await;
    let redis = Redis::start(Address::parse(&backends.redis.url(), None).unwrap(), &prefix, Duration::from_secs(5));
    let place = RedisClaims::new(redis, Duration::from_secs(60)).place(&key);
    let state = async || backends.redis.ask(&["HGET", &place, "app|"]).await;
    let worker = site.start_as("worker").await.ready().await;
    eventually("its handler runs", || async { state().await.starts_with("L 1 0 ") }).await;
    worker.kill().await;
    let worker = site.start_as("worker").await.ready().await;
    eventually("the lease lapses, and the event is begun again", || async { state().await.starts_with("L 1 1 ") })
        .await;
    gate.open();
    eventually("the event is handled", || async { state().await == "D" }).await;
    eventually("the event is settled", || async { done(&worker).await >= 1.0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_live_lease_is_waited_for_and_counts_no_attempt() {
    let service = Receiver::willing().await;
    let (site, prefix, backends) = site("", "retry = [\"1h\"]", &service.route()).await;
    let (events, waiting) = (format!("{prefix}.events"), format!("{prefix}.retry.3600000"));
    let gateway = site.start_as("gateway").await.ready().await;
    assert_eq!(send(gateway.public, &Webhook::push("held", "{}")).await.unwrap().outcome(), "enqueued");
    // The lease of a process that died a moment ago.
    record(backends, &prefix, &key_of(&backends.broker, &events).await, "L 1 0 77 99999999999999").await;
    let worker = site.start_as("worker").await.ready().await;
    eventually("the event waits", || async {
        worker.metric("streamgate_worker_deliveries_total{outcome=\"wait\",route=\"app\"}").await == 1.0
    })
    .await;
    let (_connection, channel) = backends.broker.channel().await;
    let waits = channel.basic_get(waiting.as_str().into(), BasicGetOptions::default()).await.unwrap().unwrap();
    let headers = waits.properties.headers().clone().unwrap();
    assert_eq!(headers.inner().get("x-streamgate-attempt"), Some(&AMQPValue::LongString("1".into())));
    assert!(service.received().is_empty());
}

/// Moves the first message of a queue to another one, as RabbitMQ's own tools do: published with all its headers to the default
/// exchange, `copies` times.
pub async fn move_by_hand(broker: &Broker, from: &str, to: &str, copies: usize) {
    let (_connection, channel) = broker.channel().await;
    let BasicGetMessage { delivery, .. } =
        channel.basic_get(from.into(), BasicGetOptions::default()).await.unwrap().unwrap();
    for _ in 0..copies {
        let (options, properties) = (BasicPublishOptions::default(), delivery.properties.clone());
        channel.basic_publish("".into(), to.into(), options, &delivery.data, properties).await.unwrap();
    }
    delivery.ack(BasicAckOptions::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_that_is_moved_by_hand_is_replayed_once_however_often_it_is_copied() {
    let calls = AtomicUsize::new(0);
    let service = Receiver::start(move |_| match calls.fetch_add(1, Ordering::Relaxed) {
        0 | 1 => reply(422, &[]),
        _ => reply(200, &[]),
    })
    .await;
    let (site, prefix, backends) = site("", "retry = [\"1s\"]", &service.route()).await;
    let (events, dead) = (format!("{prefix}.events"), format!("{prefix}.dead"));
    let gateway = site.start_as("gateway").await.ready().await;
    let worker = site.start_as("worker").await.ready().await;
    assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    for life in 1..=2 {
        eventually("the event is a dead letter", || async { backends.broker.ready(&dead).await == 1 }).await;
        assert_eq!(service.received().len(), life);
        move_by_hand(&backends.broker, &dead, &events, 3).await;
    }
    eventually("the third life succeeds", || async { done(&worker).await == 1.0 }).await;
    eventually("its copies end with it", || async {
        worker.metric("streamgate_worker_deliveries_total{outcome=\"superseded\",route=\"app\"}").await == 4.0
    })
    .await;
    assert_eq!(service.received().len(), 3, "each life was handled once");
    let attempts: Vec<_> = service.received().iter().map(|one| one.header("x-streamgate-attempt").to_owned()).collect();
    assert_eq!(attempts, ["1", "1", "1"]);
    assert_eq!(backends.broker.ready(&dead).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_handler_does_not_stall_a_worker_that_must_run_a_suspect_alone() {
    let (site, backends, gate) = (Site::new(), Backends::shared().await, Gate::default());
    let (closed, blocked) = (gate.clone(), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&blocked);
    let mut script = Script::new(move |call| {
        if call.id == "blocks" {
            counted.fetch_add(1, Ordering::SeqCst);
            closed.wait();
        }
        Act::Succeed
    });
    let router = std::mem::replace(&mut script.router, streamgate_worker::Router::new(Vec::new()));
    let worker = "concurrency = 4\nhandler_timeout = \"1s\"\nretry = [\"1s\"]".into();
    let setup = Setup { worker, ..Setup::default() };
    let stack = Services::with_hooks(&site, &setup, router, Hooks::default()).await;
    let suspect = Webhook::push("suspect", r#"{"type":"a.b","n":"suspect"}"#);
    record(backends, &site.name(), &format!("chat:push:{}", &sign(&suspect.body)[..32]), "L 1 5 77 1").await;
    assert_eq!(send(stack.public(), &Webhook::push("blocks", "{}")).await.unwrap().status, 200);
    eventually("a thread is blocked", || async { blocked.load(Ordering::SeqCst) == 1 }).await;
    assert_eq!(send(stack.public(), &suspect).await.unwrap().status, 200);
    for number in 0..20 {
        let other = Webhook::push(&format!("other-{number}"), format!(r#"{{"type":"a.b","n":{number}}}"#));
        assert_eq!(send(stack.public(), &other).await.unwrap().status, 200);
    }
    let mut handled = std::collections::HashSet::new();
    while handled.len() < 21 {
        handled.insert(script.next().await.id);
    }
    assert!(handled.contains("suspect") && !handled.contains("blocks"), "{handled:?}");
    gate.open();
    stack.drain().await;
}
