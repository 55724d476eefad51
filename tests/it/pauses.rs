//! Routes that a person pauses and resumes.

use crate::commands::text;
use crate::harness::eventually;
use crate::harness::fleet::Fleet;
use crate::harness::receiver::Receiver;
use crate::harness::servers::Backends;
use crate::harness::wire::{Webhook, send};
use crate::lanes::{FEW, Running, route};

#[tokio::test(flavor = "multi_thread")]
async fn events_of_a_paused_route_are_parked_until_a_person_resumes_it() {
    for services in [false, true] {
        let (paused, quick) = (Receiver::willing().await, Receiver::willing().await);
        let routes = route("app", "message.new", &paused, "") + &route("quick", "*", &quick, "");
        let running = Running::start(services, FEW, &routes, "").await;
        let wrong = running.site.run(&["route", "pause", "apq"]).await;
        assert!(!wrong.status.success() && text(&wrong.stderr).contains("did you mean \"app\"?"), "{wrong:?}");
        let pause =
            running.site.command(&["route", "pause", "app", "--why", "a migration"]).env("USER", "ann").output().await;
        assert!(text(&pause.unwrap().stdout).contains("app is paused"));
        let state =
            async |running: &Running| running.worker().metric("streamgate_worker_route_state{route=\"app\"}").await;
        eventually("the route is paused", || async { state(&running).await == 2.0 }).await;
        running.site.logged("the route is paused").await;
        let before = paused.received().len();
        let mut held = running.push("message.new", 30).await;
        let free = running.push("reaction.new", 30).await;
        eventually("the others are handled", || async { quick.ids() == free }).await;
        eventually("all are parked", || async { running.parked("app").await.1 == 30.0 }).await;
        // A worker holds no events of a paused route, so the command line sees all that are parked.
        let list = async |running: &Running| text(&running.site.run(&["route", "list", "--json"]).await.stdout);
        let listed = list(&running).await;
        for expected in [
            "\"state\":\"paused\"",
            "\"by\":\"ann@",
            "\"why\":\"a migration\"",
            "\"parked\":30",
            "\"state\":\"running\"",
        ] {
            assert!(listed.contains(expected), "{expected} in {listed}");
        }
        let seen = text(&running.site.run(&["dead", "list", "--queue", "parked.app", "--json"]).await.stdout);
        assert_eq!(seen.matches("\"reason\":\"parked\"").count(), 30, "{seen}");
        let running = running.restart(FEW, &routes).await;
        eventually("the route is still paused", || async { state(&running).await == 2.0 }).await;
        held.extend(running.push("message.new", 10).await);
        eventually("these are parked as well", || async { running.parked("app").await.1 == 40.0 }).await;
        assert_eq!(paused.received().len(), before, "no event is handled");
        assert!(running.site.run(&["route", "resume", "app"]).await.status.success());
        eventually("all are handled", || async { paused.ids() == held }).await;
        eventually("the route runs", || async { state(&running).await == 0.0 }).await;
        assert_eq!(paused.received().len(), 40, "each event was handled once");
        running.site.logged("the route is resumed").await;
        running.stop().await;
    }
}

/// Two workers, and a Redis that is flushed, killed and restored from an old dump: the pause holds, and so does its end.
#[tokio::test(flavor = "multi_thread")]
async fn a_pause_survives_a_flush_a_kill_and_an_old_dump_of_redis() {
    let (mut backends, service) = (Backends::start().await, Receiver::willing().await);
    let mut fleet = Fleet::new(&backends, &service);
    fleet.rest = route("app", "message.new", &service, "") + &route("other", "*", &service, "");
    let (_gateway_site, gateway) = fleet.gateway().await;
    let ((site, first), (_second_site, second)) = tokio::join!(fleet.worker(), fleet.worker());
    let states = async |value: f64| {
        for worker in [&first, &second] {
            eventually(&format!("the route state of both workers is {value}"), || async {
                worker.metric("streamgate_worker_route_state{route=\"app\"}").await == value
            })
            .await;
        }
    };
    let push = async || {
        let webhook = Webhook::fresh();
        assert_eq!(send(gateway.public, &webhook).await.unwrap().status, 200);
        webhook.id().to_owned()
    };
    let parked = async |events: f64| {
        eventually(&format!("{events} are parked"), || async {
            let mut most: f64 = 0.0;
            for worker in [&first, &second] {
                most = most.max(worker.metric("streamgate_worker_parked_events{route=\"app\"}").await);
            }
            most == events
        })
        .await;
    };
    let mut held = vec![push().await];
    eventually("the event is handled", || async { service.ids().len() == 1 }).await;
    assert!(site.run(&["route", "pause", "app"]).await.status.success());
    states(2.0).await;
    let places = format!("{}:routes", fleet.prefix);
    let record = backends.redis.ask(&["HGET", &places, "app"]).await;
    assert!(record.contains("\"paused\""), "{record}");
    backends.redis.ask(&["FLUSHALL"]).await;
    eventually("the record is written back", || async {
        backends.redis.ask(&["HGET", &places, "app"]).await == record
    })
    .await;
    states(2.0).await;
    backends.redis.kill();
    held.push(push().await);
    parked(1.0).await;
    backends.redis.restart().await;
    eventually("the record is written back again", || async {
        backends.redis.ask(&["HGET", &places, "app"]).await == record
    })
    .await;
    states(2.0).await;
    assert!(site.run(&["route", "resume", "app"]).await.status.success());
    states(0.0).await;
    // An old dump is restored: the later record holds.
    backends.redis.ask(&["HSET", &places, "app", &record]).await;
    eventually("the later record is written back", || async {
        backends.redis.ask(&["HGET", &places, "app"]).await.contains("running")
    })
    .await;
    states(0.0).await;
    held.push(push().await);
    eventually("all are handled", || async { held.iter().all(|id| service.ids().contains(id)) }).await;
    for worker in [first, second] {
        assert!(worker.terminate().await.success());
    }
}

/// Without Redis a worker cannot know whether a route is paused: it runs the route after a while, and logs that.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_starts_without_redis_runs_its_routes_after_a_while() {
    let (mut backends, service) = (Backends::start().await, Receiver::willing().await);
    let fleet = Fleet::new(&backends, &service);
    let (_gateway_site, gateway) = fleet.gateway().await;
    backends.redis.kill();
    let site = fleet.site();
    let worker = site.start_as("worker").await;
    let webhook = Webhook::fresh();
    assert_eq!(send(gateway.public, &webhook).await.unwrap().status, 200);
    eventually("the event is handled", || async { service.ids().contains(webhook.id()) }).await;
    site.logged("which routes are paused: all run until that is known").await;
    assert!(worker.terminate().await.success());
}
