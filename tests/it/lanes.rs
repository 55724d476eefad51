//! Each route has a lane of its own: a route that hangs, is full or has a rate delays only its own events, and parked events are
//! neither lost nor counted as attempts. Over both stores.

use crate::commands::text;
use crate::harness::process::{Server, Setup, Site};
use crate::harness::receiver::{Receiver, reply};
use crate::harness::servers::Backends;
use crate::harness::wire::{Webhook, send};
use crate::harness::{PATIENCE, eventually, within};
use futures_util::{StreamExt, stream};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A running setup: one process on the embedded store, or a gateway and a worker on RabbitMQ and Redis.
pub(crate) struct Running {
    pub(crate) site: Site,
    pub(crate) tables: String,
    pub(crate) prefix: String,
    pub(crate) gateway: Server,
    pub(crate) worker: Option<Server>,
}

impl Running {
    /// `worker`: the inside of its table; `rest`: the routes; `rabbitmq`: further lines of its table.
    pub(crate) async fn start(services: bool, worker: &str, rest: &str, rabbitmq: &str) -> Running {
        let site = Site::new();
        let prefix = site.name();
        let tables = if services { Backends::shared().await.tables_with(&prefix, rabbitmq) } else { String::new() };
        configure(&site, worker, &format!("{rest}\n{tables}"));
        let (gateway, worker) = Running::processes(&site, services).await;
        Running { site, tables, prefix, gateway, worker }
    }

    pub(crate) async fn processes(site: &Site, services: bool) -> (Server, Option<Server>) {
        match services {
            true => (site.start_as("gateway").await.ready().await, Some(site.start_as("worker").await.ready().await)),
            false => (site.start().await, None),
        }
    }

    pub(crate) fn worker(&self) -> &Server {
        self.worker.as_ref().unwrap_or(&self.gateway)
    }

    /// Kills the processes, and starts them with another configuration.
    pub(crate) async fn restart(self, worker: &str, rest: &str) -> Running {
        let Running { site, tables, prefix, gateway, worker: other } = self;
        let services = other.is_some();
        gateway.kill().await;
        if let Some(worker) = other {
            worker.kill().await;
        }
        configure(&site, worker, &format!("{rest}\n{tables}"));
        let (gateway, worker) = Running::processes(&site, services).await;
        Running { site, tables, prefix, gateway, worker }
    }

    /// Sends `count` events of this type and returns their ids.
    pub(crate) async fn push(&self, event_type: &str, count: usize) -> HashSet<String> {
        let sent = stream::iter(0..count).map(|_| async {
            let id = format!("{event_type}-{}", crate::harness::unique());
            let body = format!(r#"{{"type":"{event_type}","id":"{id}","text":"{}"}}"#, "x".repeat(500));
            assert_eq!(send(self.gateway.public, &Webhook::push(&id, body)).await.unwrap().status, 200);
            id
        });
        sent.buffer_unordered(16).collect().await
    }

    pub(crate) async fn deliveries(&self, route: &str, outcome: &str) -> f64 {
        let labels = format!("{{outcome=\"{outcome}\",route=\"{route}\"}}");
        self.worker().metric(&format!("streamgate_worker_deliveries_total{labels}")).await
    }

    /// How often events were parked, and how many are parked now.
    pub(crate) async fn parked(&self, route: &str) -> (f64, f64) {
        let metric = |name: &str| format!("streamgate_worker_parked_{name}{{route=\"{route}\"}}");
        (self.worker().metric(&metric("total")).await, self.worker().metric(&metric("events")).await)
    }

    pub(crate) async fn stop(self) {
        for server in self.worker.into_iter().chain([self.gateway]) {
            assert!(server.terminate().await.success(), "{}", self.site.log());
        }
    }
}

fn configure(site: &Site, worker: &str, rest: &str) {
    site.configure(&Setup { worker: worker.into(), rest: rest.into(), ..Setup::default() });
}

pub(crate) fn route(name: &str, events: &str, to: &Receiver, keys: &str) -> String {
    format!(
        "[[worker.routes]]\nname = \"{name}\"\nevents = [\"{events}\"]\n{keys}\nforward = {{ url = \"{}\", timeout = \"5m\" }}\n",
        to.url()
    )
}

/// A small prefetch, so that a hundred events are many.
pub(crate) const FEW: &str = "prefetch = 16\nconcurrency = 4\nretry = [\"100ms\"]\nhandler_timeout = \"5m\"";

#[tokio::test(flavor = "multi_thread")]
async fn a_route_that_hangs_delays_only_its_own_events() {
    for services in [false, true] {
        let ((slow, gate), quick) = (Receiver::gated().await, Receiver::willing().await);
        let routes = route("slow", "message.new", &slow, "") + &route("quick", "reaction.new", &quick, "");
        let running = Running::start(services, FEW, &routes, "").await;
        let mut held = running.push("message.new", 200).await;
        let free = running.push("reaction.new", 100).await;
        eventually("the quick route's events are handled", || async { quick.ids() == free }).await;
        held.extend(running.push("message.new", 100).await);
        let more = running.push("reaction.new", 100).await;
        eventually("the quick route's later events are handled", || async { quick.ids().is_superset(&more) }).await;
        assert_eq!(slow.received().len(), 0);
        let (parked, _) = running.parked("slow").await;
        assert!(parked >= 200.0, "the slow route's events are parked to make room: {parked}");
        assert_eq!(running.parked("quick").await.0, 0.0);
        eventually("the gauge shows the parked events", || async { running.parked("slow").await.1 >= 200.0 }).await;
        gate.open();
        eventually("all are handled in the end", || async { slow.ids() == held }).await;
        eventually("none is parked", || async { running.parked("slow").await.1 == 0.0 }).await;
        assert_eq!((slow.received().len(), quick.received().len()), (300, 200), "each event was handled once");
        assert!(
            slow.received().iter().all(|request| request.header("x-streamgate-attempt") == "1"),
            "no attempt was used up"
        );
        assert_eq!(running.deliveries("slow", "retry").await + running.deliveries("slow", "dead").await, 0.0);
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_is_alone_parks_nothing_however_long_its_queue() {
    for services in [false, true] {
        let (slow, gate) = Receiver::gated().await;
        let running = Running::start(services, FEW, &route("slow", "*", &slow, ""), "").await;
        let sent = running.push("message.new", 100).await;
        eventually("the route's places are taken", || async {
            running.worker().metric("streamgate_worker_in_flight").await == 4.0
        })
        .await;
        assert_eq!(running.parked("slow").await.0, 0.0);
        gate.open();
        eventually("all are handled", || async { slow.ids() == sent }).await;
        assert_eq!(running.parked("slow").await.0, 0.0);
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn parked_events_outlive_every_process() {
    for services in [false, true] {
        let ((slow, gate), quick) = (Receiver::gated().await, Receiver::willing().await);
        let routes = route("slow", "message.new", &slow, "") + &route("quick", "*", &quick, "");
        // A short timeout: a killed worker's lease lasts longer than its handler's timeout.
        let few = FEW.replace("5m", "8s").replace("[\"100ms\"]", &format!("[{}]", ["\"100ms\""; 60].join(", ")));
        let mut running = Running::start(services, &few, &routes, "").await;
        let held = running.push("message.new", 100).await;
        for _ in 0..2 {
            let free = running.push("reaction.new", 50).await;
            eventually("the others are handled", || async { quick.ids().is_superset(&free) }).await;
            eventually("many are parked", || async { running.parked("slow").await.1 >= 50.0 }).await;
            running = running.restart(&few, &routes).await;
        }
        gate.open();
        eventually("all are handled", || async { slow.ids().is_superset(&held) }).await;
        eventually("none is parked", || async { running.parked("slow").await.1 == 0.0 }).await;
        let dead = text(&running.site.run(&["dead", "list", "--json"]).await.stdout);
        assert_eq!(dead.trim(), "[]");
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_of_a_route_that_a_worker_lacks_goes_to_no_other() {
    for services in [false, true] {
        let (refuses, other) = (Receiver::start(|_| reply(503, &[])).await, Receiver::willing().await);
        let worker = "retry = [\"200ms\", \"1h\"]";
        let ladder = format!("breaker = false\nretry = [{}]", ["\"200ms\""; 100].join(", "));
        let running = Running::start(services, worker, &route("old", "*", &refuses, &ladder), "").await;
        let sent = running.push("message.new", 1).await;
        // Only a recorded retry names the route that the event belongs to.
        eventually("a retry is recorded", || async { running.deliveries("old", "retry").await >= 1.0 }).await;
        // The route is renamed: an event that failed on the old route does not go to the new one.
        let running = running.restart(worker, &route("new", "*", &other, "")).await;
        eventually("the event waits", || async { running.deliveries("none", "wait").await >= 2.0 }).await;
        running.site.logged("an event names a route that this worker does not have").await;
        let fresh = running.push("message.new", 1).await;
        eventually("a fresh event is handled", || async { other.ids() == fresh }).await;
        // The route does not come back within `claim_window`.
        let running =
            running.restart(&format!("{worker}\nclaim_window = \"1s\""), &route("new", "*", &other, "")).await;
        let listed = async || text(&running.site.run(&["dead", "list", "--json"]).await.stdout);
        eventually("the event is a dead letter", || async { listed().await.contains("route_unknown") }).await;
        assert!(listed().await.contains("\"route\":\"old\""), "{}", listed().await);
        let replayed = running.site.run(&["dead", "replay", "--all", "--yes"]).await;
        assert!(replayed.status.success(), "{replayed:?}");
        let all: HashSet<_> = sent.union(&fresh).cloned().collect();
        eventually("a replay goes to any route that takes it", || async { other.ids() == all }).await;
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_of_parked_events_makes_dead_letters_that_can_be_replayed() {
    let ((slow, gate), quick) = (Receiver::gated().await, Receiver::willing().await);
    let routes = route("slow", "message.new", &slow, "") + &route("quick", "*", &quick, "");
    let running = Running::start(true, FEW, &routes, "parked_max = \"40KiB\"").await;
    let held = running.push("message.new", 200).await;
    let free = running.push("reaction.new", 50).await;
    eventually("the others are handled", || async { quick.ids() == free }).await;
    let dead = async || running.worker().metric("streamgate_worker_dead_letters_total{reason=\"parked_full\"}").await;
    eventually("events that find no room are dead letters", || async { dead().await > 20.0 }).await;
    gate.open();
    eventually("the lane runs again", || async { !slow.received().is_empty() }).await;
    let listed = text(&running.site.run(&["dead", "list", "--reason", "parked_full", "--json"]).await.stdout);
    assert!(listed.contains("rabbitmq.parked_max") && listed.contains("\"route\":\"slow\""), "{listed}");
    assert!(running.site.run(&["dead", "replay", "--all", "--yes"]).await.status.success());
    eventually("no event is lost", || async { slow.ids() == held }).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_keeps_its_rate_and_delays_no_other_route() {
    for services in [false, true] {
        let (paced, quick) = (Receiver::willing().await, Receiver::willing().await);
        let routes = route("paced", "message.new", &paced, "rate = \"20/s\"") + &route("quick", "*", &quick, "");
        let running = Running::start(services, FEW, &routes, "").await;
        let (slowly, free) = tokio::join!(running.push("message.new", 120), running.push("reaction.new", 200));
        eventually("the others do not wait", || async { quick.ids() == free }).await;
        eventually("all are handled", || async { paced.ids() == slowly }).await;
        let mut began: Vec<_> = paced.received().iter().map(|request| request.began).collect();
        began.sort();
        // 119 intervals of 50 ms, less 2 s, since a busy machine may record the first events late. It makes the other intervals only
        // longer.
        let took = began[119].duration_since(began[0]).as_millis();
        assert!(took >= 119 * 50 - 2000, "120 events in {took} ms");
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_that_a_reload_brings_has_a_lane_and_a_place_to_park() {
    for services in [false, true] {
        let ((slow, gate), quick) = (Receiver::gated().await, Receiver::willing().await);
        let running = Running::start(services, FEW, &route("quick", "*", &quick, ""), "").await;
        let routes = route("slow", "message.new", &slow, "") + &route("quick", "*", &quick, "");
        configure(&running.site, FEW, &format!("{routes}\n{}", running.tables));
        running.site.logged("reloaded").await;
        // The old routes take the events until the worker has applied the new ones.
        let mut held = HashSet::new();
        eventually("the new route has an event", || async {
            running.worker().metric("streamgate_worker_in_flight").await >= 1.0 || {
                running.push("message.new", 1).await;
                false
            }
        })
        .await;
        held.extend(running.push("message.new", 100).await);
        let free = running.push("reaction.new", 50).await;
        eventually("the others are handled", || async { quick.ids().is_superset(&free) }).await;
        eventually("the new route's events are parked", || async { running.parked("slow").await.0 >= 50.0 }).await;
        gate.open();
        eventually("all are handled", || async { slow.ids().is_superset(&held) }).await;
        if services {
            let queue = format!("{}.parked.slow", running.prefix);
            assert_eq!(Backends::shared().await.broker.ready(&queue).await, 0);
        }
        running.stop().await;
    }
}

/// With `declare = false` a missing queue is named, and the worker takes no events until it exists.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_queue_of_parked_events_is_named() {
    let (backends, quick) = (Backends::shared().await, Receiver::willing().await);
    let running = Running::start(true, "", &route("app", "*", &quick, ""), "").await;
    let (site, prefix) = (Site::new(), running.prefix.clone());
    let tables = backends.tables_with(&prefix, "declare = false");
    let routes = route("app", "message.*", &quick, "") + &route("extra", "*", &quick, "");
    configure(&site, "", &format!("{routes}\n{tables}"));
    let worker = site.start_as("worker").await;
    eventually("/readyz names the missing queue", || async {
        let (status, why) = worker.ops("/readyz").await;
        status == 503 && why.contains(&format!("{prefix}.parked.extra"))
    })
    .await;
    let checked = text(&site.run(&["check"]).await.stdout);
    assert!(checked.contains(&format!("the queue {prefix}.parked.extra does not exist")), "{checked}");
    assert!(worker.terminate().await.success());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_down_is_not_called_and_uses_up_no_attempt() {
    for services in [false, true] {
        let is_up = Arc::new(AtomicBool::new(false));
        let up = Arc::clone(&is_up);
        let broken = Receiver::start(move |_| reply(if up.load(Ordering::SeqCst) { 200 } else { 503 }, &[])).await;
        let quick = Receiver::willing().await;
        let worker = format!("concurrency = 4\nretry = [{}]", ["\"50ms\""; 40].join(", "));
        let routes = |open: &str| {
            let breaker = format!("breaker = {{ failures = 3, open = \"{open}\", longest = \"{open}\" }}");
            route("broken", "message.new", &broken, &breaker) + &route("quick", "*", &quick, "")
        };
        let running = Running::start(services, &worker, &routes("1h"), "").await;
        let mut held = running.push("message.new", 60).await;
        let state =
            async |running: &Running| running.worker().metric("streamgate_worker_route_state{route=\"broken\"}").await;
        eventually("the breaker is open", || async { state(&running).await == 1.0 }).await;
        eventually("all are parked", || async { running.parked("broken").await.1 == 60.0 }).await;
        held.extend(running.push("message.new", 40).await);
        let free = running.push("reaction.new", 40).await;
        eventually("the others are handled", || async { quick.ids() == free }).await;
        eventually("these are parked as well", || async { running.parked("broken").await.1 == 100.0 }).await;
        // Three failures in a row, and the calls that were under way with them.
        let asked = broken.received().len();
        assert!((3..=6).contains(&asked), "asked {asked} times");
        running.site.logged("the route's breaker is open").await;
        let running = running.restart(&worker, &routes("100ms")).await;
        eventually("probes go on", || async { broken.received().len() >= asked + 8 }).await;
        eventually("the breaker is still open", || async { state(&running).await == 1.0 }).await;
        is_up.store(true, Ordering::SeqCst);
        eventually("all are handled", || async { handled(&broken) == held }).await;
        eventually("the route runs", || async { state(&running).await == 0.0 }).await;
        running.site.logged("the route runs again").await;
        let dead = text(&running.site.run(&["dead", "list", "--json"]).await.stdout);
        assert_eq!(dead.trim(), "[]");
        running.stop().await;
    }
}

/// The ids of the requests that were answered 200.
fn handled(receiver: &Receiver) -> HashSet<String> {
    let received = receiver.received();
    received
        .iter()
        .filter(|request| request.status == 200)
        .map(|request| request.header("x-webhook-id").to_owned())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn events_parked_for_a_removed_route_are_reported_and_can_be_replayed() {
    for services in [false, true] {
        let (old, new) = (Receiver::willing().await, Receiver::willing().await);
        let (before, after) = (route("old", "*", &old, ""), route("new", "*", &new, ""));
        let running = Running::start(services, FEW, &before, "").await;
        assert!(running.site.run(&["route", "pause", "old"]).await.status.success());
        eventually("the route is paused", || async {
            running.worker().metric("streamgate_worker_route_state{route=\"old\"}").await == 2.0
        })
        .await;
        let mut held = running.push("message.new", 21).await;
        eventually("all are parked", || async { running.parked("old").await.1 == 21.0 }).await;
        let dropped = held.iter().next().unwrap().clone();
        let drop = running.site.run(&["dead", "drop", "--queue", "parked.old", &dropped]).await;
        assert!(drop.status.success() && held.remove(&dropped), "{drop:?}");
        let running = running.restart(FEW, &after).await;
        running.site.logged("events are parked for a route that is gone").await;
        let listed = text(&running.site.run(&["route", "list"]).await.stdout);
        assert!(listed.contains("dead replay --queue parked.old"), "{listed}");
        let checked = text(&running.site.run(&["check"]).await.stdout);
        assert!(checked.contains("20 events are parked for the route \"old\""), "{checked}");
        let replayed = running.site.run(&["dead", "replay", "--queue", "parked.old", "--all", "--yes"]).await;
        assert!(replayed.status.success(), "{replayed:?}");
        eventually("the route that takes them now handles them", || async { new.ids() == held }).await;
        assert!(old.received().is_empty());
        running.stop().await;
    }
}

/// How many events a backlog has; STREAMGATE_TEST_BACKLOG sets more.
fn backlog() -> usize {
    std::env::var("STREAMGATE_TEST_BACKLOG").map_or(4_000, |text| text.parse().unwrap())
}

/// However many events wait or are parked for a full route, a worker holds no more of them than it may have in hand.
#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_is_kept_in_the_store_and_not_in_memory() {
    for services in [false, true] {
        let ((slow, gate), quick) = (Receiver::gated().await, Receiver::willing().await);
        let routes = route("slow", "message.new", &slow, "") + &route("quick", "*", &quick, "");
        let running = Running::start(services, FEW, &routes, "").await;
        let mut held = running.push("message.new", backlog() / 4).await;
        running.push("reaction.new", 50).await;
        eventually("the route's places are taken, and the rest is parked", || async {
            running.parked("slow").await.1 >= 100.0
        })
        .await;
        let before = running.worker().resident_bytes();
        held.extend(running.push("message.new", backlog() * 3 / 4).await);
        let free = running.push("reaction.new", 50).await;
        eventually("the others are handled", || async { quick.ids().is_superset(&free) }).await;
        let grown = running.worker().resident_bytes().saturating_sub(before);
        println!("services: {services}: {} more events wait, {} KiB more", backlog() * 3 / 4, grown >> 10);
        // In memory the events would take some 2 KiB each; the bound leaves room for what the allocator keeps.
        assert!(grown < 24 << 20, "{grown} bytes for {} events", backlog() * 3 / 4);
        gate.open();
        let patience = PATIENCE + Duration::from_millis(10) * u32::try_from(backlog()).unwrap();
        within(patience, "all are handled", || async { slow.ids().len() == held.len() }).await;
        running.stop().await;
    }
}

/// Three routes take an event and one of them fails: three lives, each with its own attempts and its own dead letter.
#[tokio::test(flavor = "multi_thread")]
async fn routes_that_fan_out_give_each_further_route_an_event_of_its_own() {
    for services in [false, true] {
        let is_well = Arc::new(AtomicBool::new(false));
        let well = Arc::clone(&is_well);
        let (first, third, never) = (Receiver::willing().await, Receiver::willing().await, Receiver::willing().await);
        let second = Receiver::start(move |_| reply(if well.load(Ordering::SeqCst) { 200 } else { 422 }, &[])).await;
        let routes = route("first", "*", &first, "fan_out = true")
            + &route("second", "message.*", &second, "fan_out = true")
            + &route("third", "*", &third, "")
            + &route("never", "*", &never, "");
        // A short timeout: a killed worker's lease lasts longer than its handler's timeout.
        let few = FEW.replace("5m", "5s");
        let mut running = Running::start(services, &few, &routes, "").await;
        let sent = running.push("message.new", 20).await;
        let others = running.push("reaction.new", 10).await;
        let all: HashSet<_> = sent.union(&others).cloned().collect();
        eventually("each route has its own events", || async {
            first.ids() == all && third.ids() == all && second.ids() == sent
        })
        .await;
        eventually("the second route's events are dead letters", || async {
            running.deliveries("second", "dead").await == 20.0
        })
        .await;
        let dead = text(&running.site.run(&["dead", "list", "--json"]).await.stdout);
        assert_eq!(dead.matches("\"route\":\"second\"").count(), 20, "{dead}");
        is_well.store(true, Ordering::SeqCst);
        assert!(running.site.run(&["dead", "replay", "--all", "--yes"]).await.status.success());
        eventually("replayed events go to their own route", || async { handled(&second) == sent }).await;
        assert_eq!(
            (first.received().len(), third.received().len(), never.received().len()),
            (30, 30, 0),
            "each event was handled once"
        );
        // A kill between the copies and their original: each route gets every event.
        let more = running.push("message.new", 60).await;
        running = running.restart(&few, &routes).await;
        eventually("all events arrive", || async {
            [&first, &second, &third].iter().all(|receiver| receiver.ids().is_superset(&more))
        })
        .await;
        running.stop().await;
    }
}
