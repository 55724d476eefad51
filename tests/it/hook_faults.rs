//! Hooks with the real binary: the answers that callers get when a part is killed, hangs or loses an answer. Each is 200 with
//! JSON.

use crate::harness::eventually;
use crate::harness::process::{Server, Setup, Site};
use crate::harness::receiver::{Gate, Receiver};
use crate::harness::servers::Backends;
use crate::harness::wire::{Answer, Webhook, send};
use bytes::Bytes;
use futures_util::StreamExt;
use http_body_util::Full;
use hyper::Response;
use lapin::BasicProperties;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions};
use lapin::types::FieldTable;
use rustix::process::Signal;
use std::time::Duration;

/// Longer than any deadline here: an answer that takes so long has hung.
const HUNG: Duration = Duration::from_secs(20);

/// Sends a hook, which must be answered whatever happens.
pub async fn ask(gateway: &Server, webhook: &Webhook) -> Answer {
    let answer = tokio::time::timeout(HUNG, send(gateway.public, webhook)).await.expect("an answer in time").unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(serde_json::from_slice::<serde_json::Value>(&answer.body).unwrap().is_object(), "{answer:?}");
    answer
}

/// An answer of a service with this body.
pub fn json(status: u16, body: &'static str) -> Response<Full<Bytes>> {
    Response::builder().status(status).body(Full::from(body)).unwrap()
}

/// JSON as no serializer would write it.
pub const SPACED: &str = "{ \"message\" : {\"text\":\"\\u003cby the service\\u003e\", \"n\":1.10} }\n";

/// Gateway and workers on backends of their own; each hook is answered by the service.
struct Fleet {
    backends: Backends,
    prefix: String,
    service: Receiver,
}

impl Fleet {
    async fn start(service: Receiver) -> Fleet {
        Fleet { backends: Backends::start().await, prefix: Site::new().name(), service }
    }

    async fn server(&self, service: &str, deadline: &str) -> (Site, Server) {
        let site = Site::new();
        let rest = format!(
            "[hooks.before_message_send]\ndeadline = \"{deadline}\"\nforward = {{ url = \"{}\" }}\n{}",
            self.service.url(),
            self.backends.impatient_tables(&self.prefix)
        );
        site.configure(&Setup { rest, ..Setup::default() });
        let server = site.start_as(service).await.ready().await;
        (site, server)
    }
}

async fn sees_workers(gateway: &Server, up: f64) {
    let what = format!("streamgate_gateway_hook_workers_up is {up}");
    eventually(&what, || async { gateway.metric("streamgate_gateway_hook_workers_up").await == up }).await;
}

fn message() -> Webhook {
    Webhook::moderation(r#"{"text":"x"}"#)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_of_a_killed_worker_is_answered_by_another_or_by_the_policy() {
    let (service, gate) = {
        let gate = Gate::default();
        let closed = gate.clone();
        let service = Receiver::start(move |_| {
            closed.wait();
            json(200, SPACED)
        });
        (service.await, gate)
    };
    let fleet = Fleet::start(service).await;
    let (_site, gateway) = fleet.server("gateway", "5s").await;
    let (_site, first) = fleet.server("worker", "5s").await;
    sees_workers(&gateway, 1.0).await;
    let answered = || {
        let (public, webhook) = (gateway.public, message());
        tokio::spawn(async move { send(public, &webhook).await.unwrap() })
    };
    // The only worker is killed: none is left to answer.
    let asked = answered();
    let in_hand = async |worker: &Server| {
        let name = "streamgate_worker_calls_in_flight";
        eventually("the call is in hand", || async { worker.metric(name).await == 1.0 }).await;
    };
    in_hand(&first).await;
    first.kill().await;
    sees_workers(&gateway, 0.0).await;
    let at_once = ask(&gateway, &message()).await;
    assert_eq!((&at_once.body[..], at_once.outcome()), (&br#"{"message":{"text":"x"}}"#[..], "no_worker"));
    assert_eq!(asked.await.unwrap().outcome(), "hook_timeout");
    // One of two workers is killed: RabbitMQ hands the call to the other.
    let ((_s2, second), (_s3, third)) = tokio::join!(fleet.server("worker", "5s"), fleet.server("worker", "5s"));
    sees_workers(&gateway, 1.0).await;
    let asked = answered();
    let in_flight = async |worker: &Server| worker.metric("streamgate_worker_calls_in_flight").await;
    eventually("one worker has the call", || async { in_flight(&second).await + in_flight(&third).await == 1.0 }).await;
    let (holder, other) = if in_flight(&second).await == 1.0 { (second, third) } else { (third, second) };
    holder.kill().await;
    in_hand(&other).await;
    gate.open();
    let answer = asked.await.unwrap();
    assert_eq!((&answer.body[..], answer.outcome()), (SPACED.as_bytes(), "answered"));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_rabbitmq_or_redis_hooks_are_answered() {
    let service = Receiver::start(|_| json(200, SPACED)).await;
    let mut fleet = Fleet::start(service).await;
    let (_site, gateway) = fleet.server("gateway", "1s").await;
    let (_site, _worker) = fleet.server("worker", "1s").await;
    sees_workers(&gateway, 1.0).await;
    assert_eq!(ask(&gateway, &message()).await.outcome(), "answered");
    fleet.backends.redis.signal(Signal::STOP);
    for _ in 0..10 {
        assert_eq!(ask(&gateway, &message()).await.outcome(), "answered", "Redis hangs");
    }
    fleet.backends.redis.kill();
    let webhook = message();
    assert_eq!(ask(&gateway, &webhook).await.outcome(), "answered", "Redis is down");
    // The gateway knows the answer by itself until its attempt to store it has failed.
    eventually("a repeat is asked again", || async { ask(&gateway, &webhook).await.outcome() == "answered" }).await;
    assert!(gateway.metric("streamgate_hook_memory_errors_total").await >= 2.0);
    fleet.backends.redis.restart().await;
    eventually("Redis is back", || async { gateway.metric("streamgate_gateway_redis_up").await == 1.0 }).await;
    let webhook = message();
    assert_eq!(ask(&gateway, &webhook).await.outcome(), "answered");
    eventually("answers are remembered again", || async { ask(&gateway, &webhook).await.outcome() == "repeated" })
        .await;
    // RabbitMQ hangs: the first callers wait for their deadline, later ones are answered at once.
    fleet.backends.broker.signal(Signal::STOP);
    assert_eq!(ask(&gateway, &message()).await.outcome(), "hook_timeout");
    eventually("the hang is noticed", || async { ask(&gateway, &message()).await.outcome() == "store_unavailable" })
        .await;
    fleet.backends.broker.signal(Signal::CONT);
    eventually("hooks are answered after the hang", || async {
        ask(&gateway, &message()).await.outcome() == "answered"
    })
    .await;
    fleet.backends.broker.kill();
    eventually("the outage is noticed", || async { ask(&gateway, &message()).await.outcome() == "store_unavailable" })
        .await;
    fleet.backends.broker.restart().await;
    eventually("hooks are answered after the outage", || async {
        ask(&gateway, &message()).await.outcome() == "answered"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_policy_answers_a_hook_whose_answer_is_lost_or_late() {
    let fleet = Fleet::start(Receiver::willing().await).await;
    let (_site, gateway) = fleet.server("gateway", "500ms").await;
    // A foreign worker, which follows the contract and takes its time.
    let (_connection, channel) = fleet.backends.broker.channel().await;
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let queue = format!("{}.calls", fleet.prefix);
    let mut calls = channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await.unwrap();
    sees_workers(&gateway, 1.0).await;
    let mut asked = async |answers: bool| {
        let (public, webhook) = (gateway.public, message());
        let waits = tokio::spawn(async move { send(public, &webhook).await.unwrap() });
        let call = calls.next().await.unwrap().unwrap();
        let properties = call.properties.clone();
        let left: u64 = properties.expiration().as_ref().unwrap().as_str().parse().unwrap();
        assert!((1..=500).contains(&left), "what is left of the deadline: {left}");
        assert_eq!(properties.delivery_mode(), &Some(1));
        let reply_to = properties.reply_to().clone().unwrap();
        let own = BasicProperties::default().with_correlation_id(properties.correlation_id().clone().unwrap());
        let body = br#"{"message":{"text":"foreign"}}"#;
        let reply = channel.basic_publish("".into(), reply_to, BasicPublishOptions::default(), body, own);
        if answers {
            reply.await.unwrap();
            return waits.await.unwrap();
        }
        let answered = waits.await.unwrap();
        reply.await.unwrap();
        answered
    };
    let answered = asked(true).await;
    assert_eq!((&answered.body[..], answered.outcome()), (&br#"{"message":{"text":"foreign"}}"#[..], "answered"));
    let late = asked(false).await;
    assert_eq!((&late.body[..], late.outcome()), (&br#"{"message":{"text":"x"}}"#[..], "hook_timeout"));
    eventually("the late answer is counted", || async {
        gateway.metric("streamgate_hook_late_answers_total").await == 1.0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_at_another_gateway_gets_the_first_answer() {
    let (gate, closed) = (Gate::default(), Gate::default());
    let waits = (gate.clone(), closed.clone());
    let service = Receiver::start(move |received| {
        if received.header("x-webhook-id") == "waits" {
            waits.1.open();
            waits.0.wait();
        }
        json(200, SPACED)
    })
    .await;
    let fleet = Fleet::start(service).await;
    let ((_s1, one), (_s2, two)) = tokio::join!(fleet.server("gateway", "5s"), fleet.server("gateway", "5s"));
    let (_s3, _worker) = fleet.server("worker", "5s").await;
    tokio::join!(sees_workers(&one, 1.0), sees_workers(&two, 1.0));
    let webhook = message();
    assert_eq!(ask(&one, &webhook).await.outcome(), "answered");
    let again = ask(&two, &webhook).await;
    assert_eq!((&again.body[..], again.outcome()), (SPACED.as_bytes(), "repeated"));
    // The same while the first is still being answered.
    let webhook = message().set("x-webhook-id", "waits");
    let (public, first) = (one.public, webhook.clone());
    let first = tokio::spawn(async move { send(public, &first).await.unwrap() });
    tokio::task::spawn_blocking(move || closed.wait()).await.unwrap();
    let public = two.public;
    let second = tokio::spawn(async move { send(public, &webhook).await.unwrap() });
    eventually("the second waits", || async { two.metric("streamgate_gateway_in_flight").await == 1.0 }).await;
    gate.open();
    assert_eq!(first.await.unwrap().outcome(), "answered");
    let second = second.await.unwrap();
    assert_eq!((&second.body[..], second.outcome()), (SPACED.as_bytes(), "repeated"));
    assert_eq!(fleet.service.received().len(), 2, "the service was asked once for each hook");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_and_no_message_shows_in_the_services() {
    const MESSAGE: &str = "a-very-private-message";
    const PASSWORD: &str = "a-very-private-password";
    let service = Receiver::start(|received| match received.path.as_str() {
        "/hook" => json(422, "a-very-private-answer"),
        _ => json(500, "a-very-private-answer"),
    })
    .await;
    let fleet = Fleet::start(service).await;
    let broker = &fleet.backends.broker;
    broker.control(&["add_user", "private", PASSWORD]).await;
    broker.control(&["set_permissions", "private", ".*", ".*", ".*"]).await;
    let tables = fleet.backends.tables(&fleet.prefix).replace("guest:guest", &format!("private:{PASSWORD}"));
    let forward = format!("forward = {{ url = \"http://{}/moderate\" }}", fleet.service.address);
    let rest = format!("{}\n[hooks.before_message_send]\n{forward}\n{tables}", fleet.service.route());
    let mut sites = Vec::new();
    for service in ["gateway", "worker"] {
        let site = Site::new();
        site.configure(&Setup { rest: rest.clone(), ..Setup::default() });
        let mut command = site.command(&[service]);
        command.env("STREAMGATE_LOG", "trace");
        let server = Server::of(command, &site).await.ready().await;
        sites.push((site, server));
    }
    let gateway = &sites[0].1;
    sees_workers(gateway, 1.0).await;
    let hook = Webhook::moderation(&format!("{{\"text\":\"{MESSAGE}\"}}"));
    assert_eq!(ask(gateway, &hook).await.outcome(), "hook_failed");
    let push = format!("{{\"type\":\"message.new\",\"text\":\"{MESSAGE}\"}}");
    assert_eq!(send(gateway.public, &Webhook::push("private", push.clone())).await.unwrap().status, 200);
    eventually("the event is dead", || async {
        sites[1].1.metric("streamgate_worker_dead_letters_total{reason=\"rejected\"}").await == 1.0
    })
    .await;
    // RabbitMQ returns an event that no queue takes, with its body.
    for queue in ["events", "unrouted"] {
        broker.manage("DELETE", &format!("queues/%2F/{}.{queue}", fleet.prefix), "").await;
    }
    eventually("a message comes back", || async {
        let webhook = Webhook::push(&format!("back-{}", crate::harness::unique()), push.clone());
        drop(send(gateway.public, &webhook).await);
        gateway.metric("streamgate_gateway_returned_total").await >= 1.0
    })
    .await;
    for (site, server) in sites {
        let mut said = vec![server.greeting.clone(), server.ops("/metrics").await.1];
        assert!(server.terminate().await.success());
        let checked = site.run(&["check"]).await;
        said.extend([checked.stdout, checked.stderr].map(|bytes| String::from_utf8(bytes).unwrap()));
        said.push(site.log());
        for words in said {
            // Some libraries show bytes as a list of numbers.
            let bytes = format!("{:?}", MESSAGE.as_bytes());
            let bytes = bytes.trim_matches(['[', ']']);
            for secret in [MESSAGE, bytes, PASSWORD, crate::harness::wire::SECRET, "a-very-private-answer"] {
                let place = words.find(secret).map(|at| &words[at.saturating_sub(200)..at + 20]);
                assert_eq!(place, None, "{secret} shows");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_an_alarm_caught_take_no_place_after_it() {
    let gate = Gate::default();
    let closed = gate.clone();
    let service = Receiver::start(move |_| {
        closed.wait();
        json(200, SPACED)
    })
    .await;
    let fleet = Fleet::start(service).await;
    let (_site, gateway) = fleet.server("gateway", "5s").await;
    let (site, worker) = fleet.server("worker", "5s").await;
    assert!(worker.terminate().await.success());
    let mut command = site.command(&["worker"]);
    command.env("STREAMGATE__HOOKS__CONCURRENCY", "3");
    let worker = Server::of(command, &site).await.ready().await;
    sees_workers(&gateway, 1.0).await;
    let asked = || {
        let (public, webhook) = (gateway.public, message());
        tokio::spawn(async move { send(public, &webhook).await.unwrap() })
    };
    let in_hand = async |calls: f64| {
        let name = "streamgate_worker_calls_in_flight";
        eventually("calls are in hand", || async { worker.metric(name).await == calls }).await;
    };
    let caught = [asked(), asked(), asked()];
    in_hand(3.0).await;
    fleet.backends.broker.control(&["set_vm_memory_high_watermark", "0.000001"]).await;
    gate.open();
    for one in caught {
        assert_eq!(one.await.unwrap().status, 200);
    }
    fleet.backends.broker.control(&["set_vm_memory_high_watermark", "0.4"]).await;
    // One after the other: if the caught calls kept their places, no hook would be answered.
    eventually("the worker answers again", || async { ask(&gateway, &message()).await.outcome() == "answered" }).await;
    for _ in 0..9 {
        assert_eq!(ask(&gateway, &message()).await.outcome(), "answered");
    }
}
