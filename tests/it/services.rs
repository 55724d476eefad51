//! Gateways and workers as processes of their own: no acknowledged event is lost, whatever is killed.

use crate::harness::eventually;
use crate::harness::fleet::Fleet;
use crate::harness::ledger::Load;
use crate::harness::process::{Server, Site};
use crate::harness::receiver::{Received, Receiver, reply};
use crate::harness::servers::{Backends, free_port};
use crate::harness::wire::{Webhook, raw, send, status};
use futures_util::future::join_all;
use rustix::process::Signal;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn two_gateways_and_two_workers_handle_each_event_once() {
    let (backends, service) = (Backends::shared().await, Receiver::willing().await);
    let fleet = Fleet::new(backends, &service);
    let ((_s1, first), (_s2, second)) = tokio::join!(fleet.gateway(), fleet.gateway());
    let ((_s3, third), (_s4, fourth)) = tokio::join!(fleet.worker(), fleet.worker());
    let load = Load::over(vec![first.public, second.public], 24, Some(10));
    eventually("10,000 events are accepted", || async { load.ledger.accepted() >= 10_000 }).await;
    eventually("20,000 events are accepted", || async { load.ledger.accepted() >= 20_000 }).await;
    let ledger = load.stop().await;
    assert_eq!(ledger.prove(&service).await, 0, "an event was handled twice");
    assert_eq!(ledger.refused.load(Ordering::Relaxed), 0);
    assert!(ledger.repeated.load(Ordering::Relaxed) >= 1_900);
    let mut handled = 0.0;
    for worker in [&third, &fourth] {
        let done = worker.metric("streamgate_worker_deliveries_total{outcome=\"done\",route=\"app\"}").await;
        assert!(done > 1_000.0, "both workers handle events");
        handled += done;
    }
    assert!(handled >= ledger.accepted() as f64);
    for server in [first, second, third, fourth] {
        assert!(server.terminate().await.success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_loses_nothing_refuses_nothing_and_repeats_nothing() {
    let (backends, service) = (Backends::shared().await, Receiver::willing().await);
    let fleet = Fleet::new(backends, &service);
    let (mut gateways, mut workers) =
        (vec![fleet.gateway().await, fleet.gateway().await], vec![fleet.worker().await, fleet.worker().await]);
    let load = Load::over(gateways.iter().map(|(_, server)| server.public).collect(), 12, None);
    for place in [0, 1, 0, 1] {
        for (service, fleet) in [("gateway", &mut gateways), ("worker", &mut workers)] {
            let before = load.ledger.accepted();
            eventually("traffic flows", || async { load.ledger.accepted() >= before + 300 }).await;
            let (site, server) = fleet.remove(place);
            assert!(server.terminate().await.success(), "{}", site.log());
            assert!(!site.log().contains("drain timeout"), "{}", site.log());
            let server = site.start_as(service).await.ready().await;
            fleet.insert(place, (site, server));
        }
    }
    let ledger = load.stop().await;
    assert_eq!(ledger.prove(&service).await, 0, "an event was handled twice");
    assert_eq!(ledger.refused.load(Ordering::Relaxed), 0);
}

/// HAProxy in front of these gateways, in TCP mode, so that it cannot repeat a request. Returns its address.
async fn balancer(site: &Site, gateways: &[(Site, Server)]) -> (SocketAddr, tokio::process::Child) {
    let listen = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let mut config = format!(
        "global\n  log stderr format raw local0\ndefaults\n  log global\n  mode tcp\n  timeout connect 2s\n  timeout client 60s\n  \
         timeout server 60s\n  option redispatch\n  retries 3\nlisten gateways\n  bind {listen}\n  balance roundrobin\n  \
         option httpchk GET /readyz\n  default-server check inter 200ms fall 1 rise 1\n"
    );
    for (number, (_, gateway)) in gateways.iter().enumerate() {
        let (public, ops) = (gateway.public, gateway.ops.port());
        config += &format!("  server gateway{number} {public} port {ops}\n");
    }
    let file = site.write("haproxy.cfg", config);
    let log = std::fs::File::create(site.path("haproxy.log")).unwrap();
    let mut command = tokio::process::Command::new("haproxy");
    command.env("PATH", format!("/usr/sbin:{}", std::env::var("PATH").unwrap()));
    command.args(["-db", "-f", file.to_str().unwrap()]).stderr(log).kill_on_drop(true);
    let child = command.spawn().unwrap();
    eventually("HAProxy passes events on", || async {
        send(listen, &Webhook::fresh()).await.is_ok_and(|answer| answer.status == 200)
    })
    .await;
    (listen, child)
}

#[tokio::test(flavor = "multi_thread")]
async fn gateways_behind_a_tcp_balancer_restart_without_failing_a_request() {
    let (mut backends, service) = (Backends::start().await, Receiver::willing().await);
    let fleet = Fleet::new(&backends, &service);
    let mut gateways = vec![fleet.gateway().await, fleet.gateway().await];
    let _worker = fleet.worker().await;
    let site = Site::new();
    let (listen, _balancer) = balancer(&site, &gateways).await;
    let load = Load::paced(vec![listen], 10, None, Duration::from_millis(40));
    for round in 0..4 {
        if round == 2 {
            // From here on events wait in the spools, also across restarts.
            backends.broker.kill();
        }
        let before = load.ledger.accepted();
        eventually("traffic flows", || async { load.ledger.accepted() >= before + 300 }).await;
        // Kept alive, so that the drain takes a while, during which other requests come.
        let kept = join_all((0..6).map(|_| async {
            let mut stream = raw(listen, &Webhook::fresh().raw()).await;
            assert_eq!(status(&mut stream).await, 200);
            stream
        }))
        .await;
        let (place, server) = gateways.remove(0);
        assert!(server.terminate().await.success(), "{}", place.log());
        drop(kept);
        let server = place.start_as("gateway").await;
        gateways.push((place, server));
        let (_, server) = &gateways[1];
        eventually("the gateway takes part again", || async {
            server.metric("streamgate_gateway_ack_seconds_count{kind=\"push\"}").await >= 20.0
        })
        .await;
    }
    backends.broker.restart().await;
    let ledger = load.stop().await;
    ledger.prove(&service).await;
    let (requests, failed) = (ledger.requests.load(Ordering::Relaxed), ledger.failed.load(Ordering::Relaxed));
    println!("{requests} requests by way of HAProxy, {failed} failed, {} events accepted", ledger.accepted());
    assert_eq!(failed, 0, "HAProxy: {}", std::fs::read_to_string(site.path("haproxy.log")).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_acknowledged_event_is_lost_to_any_fault_of_one_part() {
    let mut backends = Backends::start().await;
    // A tenth of the attempts fail, so that some events always wait for a retry.
    let calls = std::sync::atomic::AtomicU64::new(0);
    let unsteady =
        move |_: &_| if calls.fetch_add(1, Ordering::Relaxed) % 10 == 9 { reply(503, &[]) } else { reply(200, &[]) };
    let service = Receiver::start(unsteady).await;
    let mut fleet = Fleet::new(&backends, &service);
    fleet.tables = backends.impatient_tables(&fleet.prefix);
    fleet.worker = format!("handler_timeout = \"1s\"\nretry = [{}]", vec!["\"100ms\""; 60].join(", "));
    let (mut gateways, mut workers) =
        (vec![fleet.gateway().await, fleet.gateway().await], vec![fleet.worker().await, fleet.worker().await]);
    let load = Load::over(gateways.iter().map(|(_, server)| server.public).collect(), 12, Some(10));
    let flows = async |what: &str| {
        let before = load.ledger.accepted();
        eventually(&format!("traffic flows after: {what}"), || async { load.ledger.accepted() >= before + 300 }).await;
        let (accepted, missing) = (load.ledger.accepted(), load.ledger.missing(&service));
        println!("{what}: {accepted} accepted, {missing} not yet handled");
    };
    flows("the start").await;
    for place in [0, 1] {
        for (service, fleet) in [("gateway", &mut gateways), ("worker", &mut workers)] {
            let (site, server) = fleet.remove(place);
            server.kill().await;
            flows(&format!("{service} killed")).await;
            let server = site.start_as(service).await;
            fleet.insert(place, (site, server));
        }
    }
    backends.redis.ask(&["FLUSHALL"]).await;
    flows("Redis flushed").await;
    backends.redis.signal(Signal::STOP);
    flows("Redis stopped").await;
    backends.redis.signal(Signal::CONT);
    flows("Redis resumed").await;
    backends.redis.kill();
    flows("Redis killed").await;
    backends.redis.restart().await;
    flows("Redis is back").await;
    backends.broker.kill();
    let refused = load.ledger.refused.load(Ordering::Relaxed);
    flows("RabbitMQ killed").await;
    backends.broker.restart().await;
    flows("RabbitMQ is back").await;
    assert_eq!(load.ledger.refused.load(Ordering::Relaxed), refused, "nothing is refused without RabbitMQ");
    let ledger = load.stop().await;
    let repeats = ledger.prove(&service).await;
    println!(
        "sent {}, accepted {}, given up {}, deliveries repeated, failed attempts included, {repeats}",
        ledger.sent.load(Ordering::Relaxed),
        ledger.accepted(),
        ledger.refused.load(Ordering::Relaxed),
    );
    let site = &workers[0].0;
    let listed = site.run(&["dead", "list", "--json"]).await;
    assert_eq!(String::from_utf8_lossy(&listed.stdout).trim(), "[]", "nothing ended in the dead letters: {listed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_without_backends_runs_says_so_and_recovers() {
    let mut backends = Backends::start().await;
    let service = Receiver::willing().await;
    let fleet = Fleet::new(&backends, &service);
    backends.broker.kill();
    backends.redis.kill();
    let (gateway_site, worker_site) = (fleet.site(), fleet.site());
    let gateway = gateway_site.start_as("gateway").await;
    let worker = worker_site.start_as("worker").await;
    eventually("the worker says why it is not ready", || async {
        let (status, text) = worker.ops("/readyz").await;
        status == 503 && text.contains("Connection refused")
    })
    .await;
    for server in [&gateway, &worker] {
        assert_eq!(server.ops("/healthz").await.0, 200);
    }
    assert_eq!(gateway.ops("/readyz").await.0, 200, "the spool makes events durable");
    let early = Webhook::fresh();
    assert_eq!(send(gateway.public, &early).await.unwrap().outcome(), "spooled");
    assert_eq!(gateway.metric("streamgate_gateway_broker_up").await, 0.0);
    backends.broker.restart().await;
    let (gateway, _worker) = (gateway.ready().await, worker.ready().await);
    // Redis is still down: the gateway itself knows its repeats.
    let webhook = Webhook::fresh();
    assert_eq!(send(gateway.public, &webhook).await.unwrap().outcome(), "enqueued");
    assert_eq!(send(gateway.public, &webhook).await.unwrap().outcome(), "duplicate");
    assert_eq!(gateway.metric("streamgate_gateway_redis_up").await, 0.0);
    assert!(gateway.metric("streamgate_gateway_dedup_errors_total").await >= 2.0);
    eventually("the events are handled", || async {
        service.ids().contains(webhook.id()) && service.ids().contains(early.id())
    })
    .await;
    backends.redis.restart().await;
    eventually("Redis is back", || async { gateway.metric("streamgate_gateway_redis_up").await == 1.0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_knows_repeats_of_events_that_another_gateway_took() {
    let (backends, service) = (Backends::shared().await, Receiver::willing().await);
    let fleet = Fleet::new(backends, &service);
    let ((_s1, first), (_s2, second)) = tokio::join!(fleet.gateway(), fleet.gateway());
    let webhook = Webhook::fresh();
    assert_eq!(send(first.public, &webhook).await.unwrap().outcome(), "enqueued");
    // The mark is made alongside the answer; before it exists a repeat would be enqueued, and the claim would absorb it.
    let marks = format!("{}:seen:*", fleet.prefix);
    let marked = || async {
        backends.redis.ask(&["EVAL", "return tostring(#redis.call('KEYS', ARGV[1]))", "0", &marks]).await == "1"
    };
    eventually("the mark is made", marked).await;
    assert_eq!(send(second.public, &webhook).await.unwrap().outcome(), "duplicate");
    let (_s3, worker) = fleet.worker().await;
    eventually("the event is handled", || async { service.ids().contains(webhook.id()) }).await;
    assert!(worker.terminate().await.success());
    assert_eq!(service.received().len(), 1);
}

/// The id of an event that fails at its first attempt.
const STUBBORN: &str = "stubborn";

#[tokio::test(flavor = "multi_thread")]
async fn deliveries_go_on_while_a_memory_alarm_blocks_publishing() {
    let mut backends = Backends::start().await;
    let failing = Arc::new(AtomicBool::new(false));
    let still = Arc::clone(&failing);
    let fails = move |received: &Received| {
        let first = received.header("x-streamgate-attempt") == "1";
        let fails = still.load(Ordering::Relaxed) || (first && received.header("x-webhook-id") == STUBBORN);
        reply(if fails { 503 } else { 200 }, &[])
    };
    let service = Receiver::start(fails).await;
    let mut fleet = Fleet::new(&backends, &service);
    let (_site, gateway) = fleet.gateway().await;
    // With everything declared, a worker that only verifies: it must not publish on the connection on which it consumes.
    assert!(fleet.worker().await.1.terminate().await.success());
    fleet.tables = fleet.tables.replace("[rabbitmq]\n", "[rabbitmq]\ndeclare = false\n");
    let before = [Webhook::fresh(), Webhook::fresh(), Webhook::fresh()];
    for webhook in &before {
        assert_eq!(send(gateway.public, webhook).await.unwrap().outcome(), "enqueued");
    }
    let stubborn = send(gateway.public, &Webhook::push(STUBBORN, "{}")).await.unwrap();
    assert_eq!(stubborn.outcome(), "enqueued");
    backends.broker.control(&["set_vm_memory_high_watermark", "0.000001"]).await;
    eventually("events go to the spool", || async {
        let answer = send(gateway.public, &Webhook::fresh()).await.unwrap();
        assert_eq!(answer.status, 200);
        answer.outcome() == "spooled"
    })
    .await;
    let (_worker_site, worker) = fleet.worker().await;
    eventually("the events are handled", || async { before.iter().all(|one| service.ids().contains(one.id())) }).await;
    let settling = || worker.metric("streamgate_worker_settling");
    eventually("a retry is held", || async { settling().await == 1.0 }).await;
    failing.store(true, Ordering::Relaxed);
    backends.broker.control(&["set_vm_memory_high_watermark", "0.4"]).await;
    eventually("the held retry is published", || async { settling().await == 0.0 }).await;
    let gateway = gateway.ready().await;
    let webhook = Webhook::fresh();
    assert_eq!(send(gateway.public, &webhook).await.unwrap().outcome(), "enqueued");
    eventually("a retry is published again", || async {
        worker.metric("streamgate_worker_retries_total{route=\"app\"}").await >= 1.0
    })
    .await;
    failing.store(false, Ordering::Relaxed);
    eventually("all events are handled in the end", || async {
        worker.metric("streamgate_worker_deliveries_total{outcome=\"done\",route=\"app\"}").await >= 5.0
    })
    .await;
    backends.broker.kill();
}
