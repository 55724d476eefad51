//! Memory is bounded by configuration, whatever a peer does.

use crate::harness::eventually;
use crate::harness::process::{Setup, Site};
use crate::harness::receiver::Receiver;
use crate::harness::wire::{Webhook, raw, send, status};
use bytes::Bytes;
use futures_util::future::join_all;

const MIB: usize = 1 << 20;
/// What the process may hold beside `memory_budget`: code, stacks, connections, SQLite's caches, and the allocator's slack.
const CONSTANT: u64 = 128 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn bombs_and_maximal_bodies_stay_within_the_budget() {
    let site = Site::new();
    // 64 MiB of bodies, of which each may have 4 MiB; deliveries in hand have a bound of their own.
    let gateway = "memory_budget = \"64MiB\"\nmax_body = \"4MiB\"\nbody_timeout = \"3s\"".into();
    site.configure(&Setup { gateway, worker: "memory_budget = \"16MiB\"".into(), ..Setup::default() });
    let server = site.start().await;
    let bomb = Webhook::push("bomb", Bytes::from(vec![0; 64 * MIB])).zipped();
    assert!(bomb.body.len() * 1000 < 65 * MIB, "about 1:1000");
    for _ in 0..4 {
        for answer in join_all((0..32).map(|_| send(server.public, &bomb))).await {
            assert!(matches!(answer.unwrap().status.as_u16(), 413 | 503));
        }
    }
    // Bodies that are almost whole, on more connections than the budget has room for.
    let wide = Webhook::push("wide", Bytes::from(vec![b'x'; 4 * MIB]));
    let almost = wide.raw();
    let mut held = join_all((0..40).map(|_| async {
        let mut stream = raw(server.public, &wide.raw()[..1000]).await;
        // A refusal may come first, and with it the end of the connection.
        drop(tokio::io::AsyncWriteExt::write_all(&mut stream, &almost[1000..almost.len() - 1]).await);
        stream
    }))
    .await;
    let held_bytes = server.metric("streamgate_gateway_memory_bytes").await;
    assert!(held_bytes <= 64.0 * MIB as f64, "{held_bytes}");
    let resident = server.resident_bytes();
    assert!(resident < 80 * MIB as u64 + CONSTANT, "{} MiB resident", resident >> 20);
    let statuses = join_all(held.iter_mut().map(status)).await;
    assert!(statuses.contains(&503), "some found no room: {statuses:?}");
    drop(held);
    assert_eq!(send(server.public, &Webhook::fresh()).await.unwrap().status, 200, "it goes on");
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_of_large_events_is_delivered_in_bounded_memory() {
    let site = Site::new();
    // The service answers nobody until the backlog stands.
    let (service, gate) = Receiver::gated().await;
    let worker = "memory_budget = \"8MiB\"\nconcurrency = 4".into();
    site.configure(&Setup { worker, rest: service.route(), ..Setup::default() });
    let server = site.start().await;
    for number in 0..100 {
        let body = Bytes::from([format!("{number} ").as_bytes(), &vec![b'x'; 2 * MIB]].concat());
        assert_eq!(send(server.public, &Webhook::push(&format!("large-{number}"), body)).await.unwrap().status, 200);
    }
    let resident = server.resident_bytes();
    gate.open();
    eventually("all are handled", || async { service.ids().len() == 100 }).await;
    let resident = resident.max(server.resident_bytes());
    assert!(resident < 8 * MIB as u64 + CONSTANT, "{} MiB resident", resident >> 20);
    assert!(server.terminate().await.success());
}
