//! `streamgate status`: what runs and what waits, over both stores, whatever is away.

use crate::commands::text;
use crate::harness::process::{Setup, Site};
use crate::harness::receiver::{Receiver, reply};
use crate::harness::{eventually, servers::Backends};
use crate::lanes::{FEW, Running, route};
use serde_json::Value;

async fn status(site: &Site) -> (bool, Value) {
    let output = site.run(&["status", "--json"]).await;
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    assert_eq!(output.status.success(), report["ok"] == true, "{report}");
    (output.status.success(), report)
}

/// Whether the report says that this needs a person, with this command.
fn needs(report: &Value, what: &str, command: Option<&str>) -> bool {
    let mut needs = report["attention"].as_array().unwrap().iter();
    needs.any(|need| need["what"].as_str().unwrap().contains(what) && need["command"].as_str() == command)
}

fn roles(report: &Value) -> Vec<&str> {
    let mut roles: Vec<_> =
        report["instances"].as_array().unwrap().iter().map(|one| one["role"].as_str().unwrap()).collect();
    roles.sort_unstable();
    roles
}

#[tokio::test(flavor = "multi_thread")]
async fn status_shows_what_runs_what_waits_and_what_needs_a_person() {
    for services in [false, true] {
        let (app, broken) = (Receiver::willing().await, Receiver::start(|_| reply(422, &[])).await);
        let routes = route("app", "message.new", &app, "") + &route("broken", "*", &broken, "");
        let running = Running::start(services, FEW, &routes, "").await;
        let expected = if services { vec!["gateway", "worker"] } else { vec!["up"] };
        eventually("all is well", || async {
            let (ok, report) = status(&running.site).await;
            ok && roles(&report) == expected
        })
        .await;
        let page = text(&running.site.run(&["status"]).await.stdout);
        assert!(page.starts_with("Nothing needs a person.\n"), "{page}");
        assert!(page.contains("PROCESSES") && page.contains("ready") && page.contains("DEAD LETTERS  0"), "{page}");
        running.push("message.new", 3).await;
        running.push("reaction.new", 2).await;
        let pause = ["route", "pause", "app", "--why", "a migration"];
        assert!(running.site.run(&pause).await.status.success());
        eventually("the worker knows of the pause", || async {
            running.worker().metric("streamgate_worker_route_state{route=\"app\"}").await == 2.0
        })
        .await;
        running.push("message.new", 4).await;
        eventually("dead letters and the pause show", || async {
            let (ok, report) = status(&running.site).await;
            let causes = &report["dead_letters"]["causes"];
            let parked =
                report["routes"].as_array().unwrap().iter().any(|one| one["name"] == "app" && one["parked"] == 4);
            !ok && parked
                && needs(&report, "2 dead letters", Some("streamgate dead list --group"))
                && needs(&report, "the route app is paused by ", Some("streamgate route resume app"))
                && causes[0]["reason"] == "rejected"
                && causes[0]["count"] == 2
        })
        .await;
        let page = text(&running.site.run(&["status"]).await.stdout);
        assert!(page.starts_with("! ") && page.contains(": a migration\n    streamgate route resume app\n"), "{page}");
        let Running { site, gateway, worker, .. } = running;
        for server in worker.into_iter().chain([gateway]) {
            assert!(server.terminate().await.success(), "{}", site.log());
        }
        // A process that stops says so: nobody waits until its last heartbeat is old.
        let (ok, report) = status(&site).await;
        assert!(!ok && roles(&report).is_empty(), "{report}");
        for role in expected {
            let command = format!("streamgate {role}");
            assert!(needs(&report, &format!("no `streamgate {role}` runs"), Some(&command)), "{report}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_away_shows_as_away_and_the_rest_still_shows() {
    let site = Site::new();
    let (prefix, backends) = (site.name(), Backends::shared().await);
    let tables = backends.tables(&prefix);
    site.configure(&Setup { rest: tables.clone(), ..Setup::default() });
    let gateway = site.start_as("gateway").await.ready().await;
    eventually("the gateway shows", || async { roles(&status(&site).await.1) == ["gateway"] }).await;
    let away = |url: String| tables.replace(&url, "redis://127.0.0.1:1");
    site.configure(&Setup { rest: away(backends.redis.url()), ..Setup::default() });
    let (ok, report) = status(&site).await;
    assert!(!ok && needs(&report, "Redis cannot be used from here", Some("streamgate check")), "{report}");
    assert!(report["instances"]["error"].is_string() && report["routes"]["error"].is_string(), "{report}");
    let queues = report["queues"].as_array().unwrap();
    assert!(queues.iter().any(|queue| queue["name"] == format!("{prefix}.events")), "{report}");
    let broker = backends.broker.url();
    site.configure(&Setup { rest: tables.replace(&broker, "amqp://127.0.0.1:1/%2f"), ..Setup::default() });
    let (ok, report) = status(&site).await;
    assert!(!ok && needs(&report, "RabbitMQ cannot be used from here", Some("streamgate check")), "{report}");
    assert!(report["queues"]["error"].is_string() && report["dead_letters"]["error"].is_string(), "{report}");
    assert_eq!(roles(&report), ["gateway"]);
    assert!(gateway.terminate().await.success());
}

/// A process that is killed has no time to say so.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_process_is_gone_after_a_while() {
    for services in [false, true] {
        let running = Running::start(services, "", "", "").await;
        let expected = if services { 2 } else { 1 };
        eventually("all processes show", || async { roles(&status(&running.site).await.1).len() == expected }).await;
        let Running { site, gateway, worker, .. } = running;
        for server in worker.into_iter().chain([gateway]) {
            server.kill().await;
        }
        eventually("none shows any more", || async { roles(&status(&site).await.1).is_empty() }).await;
    }
}
