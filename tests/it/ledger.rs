//! No acknowledged event is lost: the process is killed again and again in traffic, and the ledger is compared with the events
//! that were handled.

use crate::harness::eventually;
use crate::harness::ledger::Load;
use crate::harness::process::{Setup, Site};
use crate::harness::receiver::{Gate, Receiver, reply};
use crate::harness::wire::{Webhook, send};
use rustix::process::{Pid, Signal, kill_process};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How often a run kills the process; `tests/run --soak` sets more.
fn kills() -> usize {
    std::env::var("STREAMGATE_TEST_KILLS").map_or(20, |text| text.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_acknowledged_event_is_lost_to_sigkill() {
    let site = Site::new();
    // A tenth of the attempts fail, so that some events always wait for a retry when the process dies.
    let calls = AtomicU64::new(0);
    let unsteady =
        move |_: &_| if calls.fetch_add(1, Ordering::Relaxed) % 10 == 9 { reply(503, &[]) } else { reply(200, &[]) };
    let service = Receiver::start(unsteady).await;
    let worker = format!("retry = [{}]", vec!["\"50ms\""; 40].join(", "));
    let mut setup = Setup { worker, rest: service.route(), ..Setup::default() };
    site.configure(&setup);
    let mut server = site.start().await;
    setup.listen = server.public;
    site.configure(&setup);
    let load = Load::start(server.public, 12);
    for kill in 1..=kills() {
        let before = load.ledger.accepted();
        eventually("traffic flows", || async { load.ledger.accepted() >= before + 300 }).await;
        server.kill().await;
        server = site.start().await;
        println!("kill {kill}: {} accepted, {} not yet handled", load.ledger.accepted(), load.ledger.missing(&service));
    }
    let before = load.ledger.accepted();
    eventually("traffic flows at the end", || async { load.ledger.accepted() >= before + 300 }).await;
    let ledger = load.stop().await;
    let repeats = ledger.prove(&service).await;
    println!(
        "sent {}, accepted {}, given up while no server listened {}, deliveries repeated, failed attempts included, {repeats}",
        ledger.sent.load(Ordering::Relaxed),
        ledger.accepted(),
        ledger.refused.load(Ordering::Relaxed),
    );
    assert!(server.terminate().await.success());
    let listed = site.run(&["dead", "list", "--json"]).await;
    assert_eq!(String::from_utf8_lossy(&listed.stdout).trim(), "[]", "nothing ended in the dead letters");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_faults_nothing_is_handled_twice_and_nothing_refused() {
    let (site, service) = (Site::new(), Receiver::willing().await);
    site.configure(&Setup { rest: service.route(), ..Setup::default() });
    let server = site.start().await;
    let load = Load::start(server.public, 12);
    eventually("traffic flows", || async { load.ledger.accepted() >= 3000 }).await;
    let ledger = load.stop().await;
    assert_eq!(ledger.prove(&service).await, 0, "deliveries repeated");
    assert_eq!(ledger.refused.load(Ordering::Relaxed), 0);
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_in_traffic_loses_nothing_and_refuses_nothing() {
    let (site, service) = (Site::new(), Receiver::willing().await);
    let mut setup = Setup { rest: service.route(), ..Setup::default() };
    site.configure(&setup);
    let mut server = site.start().await;
    setup.listen = server.public;
    site.configure(&setup);
    let load = Load::start(server.public, 12);
    for _ in 0..3 {
        let before = load.ledger.accepted();
        eventually("traffic flows", || async { load.ledger.accepted() >= before + 300 }).await;
        assert!(server.terminate().await.success());
        server = site.start().await;
    }
    let ledger = load.stop().await;
    assert_eq!(ledger.prove(&service).await, 0, "a drain settles what it delivered");
    assert!(!site.log().contains("drain timeout"), "{}", site.log());
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_event_that_kills_the_process_becomes_a_dead_letter() {
    let (site, gate) = (Site::new(), Gate::default());
    let (send_pid, pids) = std::sync::mpsc::channel::<u32>();
    let (pids, open, deaths) = (Mutex::new(pids), gate.clone(), Arc::new(AtomicU64::new(0)));
    let counted = Arc::clone(&deaths);
    let service = Receiver::start(move |one| {
        if one.header("x-webhook-id") == "poison" {
            kill_process(Pid::from_raw(pids.lock().unwrap().recv().unwrap() as i32).unwrap(), Signal::KILL).unwrap();
            counted.fetch_add(1, Ordering::Relaxed);
        } else {
            // In hand whenever the process dies, until the gate opens.
            open.wait();
        }
        reply(200, &[])
    })
    .await;
    site.configure(&Setup { rest: service.route(), ..Setup::default() });
    let mut server = site.start().await;
    for id in ["before", "poison", "after"] {
        assert_eq!(send(server.public, &Webhook::push(id, "{}")).await.unwrap().outcome(), "enqueued");
    }
    loop {
        let lives = deaths.load(Ordering::Relaxed) + 1;
        send_pid.send(server.pid()).unwrap();
        let dead_letters = async || {
            let listed = site.run(&["dead", "list", "--json"]).await;
            serde_json::from_slice::<serde_json::Value>(&listed.stdout).unwrap().as_array().unwrap().len()
        };
        let (mut given_up, began) = (false, Instant::now());
        while !given_up && !server.has_ended() {
            assert!(began.elapsed() < Duration::from_secs(60), "neither handed out again nor given up");
            given_up = dead_letters().await == 1;
        }
        if given_up {
            break;
        }
        assert!(!server.wait().await.success());
        assert!(lives < 20, "a crash loop");
        if lives == 6 {
            gate.open();
        }
        server = site.start().await;
    }
    eventually("the other event is handled", || async { service.ids().contains("after") }).await;
    assert_eq!(deaths.load(Ordering::Relaxed), 10, "the event killed each process that it was handed to");
    let listed = site.run(&["dead", "list", "--json"]).await;
    let dead_letters: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!(dead_letters.as_array().unwrap().len(), 1, "{dead_letters}");
    assert_eq!((dead_letters[0]["id"].as_str(), dead_letters[0]["reason"].as_str()), (Some("poison"), Some("poison")));
    assert!(server.terminate().await.success());
}
