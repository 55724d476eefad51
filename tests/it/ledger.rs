//! No acknowledged event is lost: the process is killed again and again in traffic, and the ledger is held against what was
//! handled.

use crate::harness::eventually;
use crate::harness::ledger::Load;
use crate::harness::process::{Setup, Site};
use crate::harness::receiver::{Receiver, reply};
use std::sync::atomic::{AtomicU64, Ordering};

/// Kills in a run; `tests/run --soak` sets more.
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
        "sent {}, accepted {}, given up while nobody listened {}, deliveries repeated, failed attempts included, {repeats}",
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
