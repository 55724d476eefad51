//! Memory is bounded by configuration, whatever a peer does.

use crate::harness::eventually;
use crate::harness::process::{Setup, Site, raise_open_files};
use crate::harness::proxy::{Proxy, Weather};
use crate::harness::receiver::Receiver;
use crate::harness::servers::Backends;
use crate::harness::wire::{Webhook, raw, send, status};
use bytes::Bytes;
use futures_util::future::join_all;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;

const MIB: usize = 1 << 20;
/// Memory that the process may hold in addition to `memory_budget`: code, stacks, connections, SQLite's caches, allocator slack.
const CONSTANT: u64 = 128 << 20;
/// Further memory that an idle connection may cost.
const CONNECTION: u64 = 32 << 10;

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
            assert!(matches!(answer.unwrap().status.as_u16(), 408 | 413 | 503));
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
    // Most were displaced by others while they were sent, before their timeout.
    let displaced = "streamgate_gateway_requests_total{app=\"chat\",kind=\"push\",outcome=\"displaced\"}";
    assert!(server.metric(displaced).await >= 20.0);
    let statuses = join_all(held.iter_mut().map(status)).await;
    assert!(statuses.iter().all(|status| matches!(status, 408 | 503)), "{statuses:?}");
    drop(held);
    assert_eq!(send(server.public, &Webhook::fresh()).await.unwrap().status, 200, "the gateway goes on");
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_whose_broker_never_confirms_and_whose_disk_hangs_stays_within_the_budget() {
    const CROWD: usize = 10_000;
    raise_open_files(CROWD + 2_000);
    let backends = Backends::shared().await;
    let proxy = Proxy::start(backends.broker.port, 1).await;
    let site = Site::new();
    let (direct, proxied) = (format!(":{}/%2f", backends.broker.port), format!(":{}/%2f?heartbeat=0", proxy.port));
    let gateway = format!("memory_budget = \"64MiB\"\nmax_body = \"4MiB\"\nmax_connections = {}", CROWD + 500);
    let rest = backends.tables(&site.name()).replace(&direct, &proxied);
    site.configure(&Setup { gateway, rest, ..Setup::default() });
    let server = site.start_as("gateway").await.ready().await;
    // RabbitMQ takes every publish, but none of its confirms arrives; and no commit finishes.
    proxy.turn(Weather::Deaf);
    let lock = site.hang_store();
    let mut crowd = Vec::with_capacity(CROWD);
    for _ in 0..CROWD {
        crowd.push(TcpStream::connect(server.public).await.unwrap());
    }
    // Clients that send on and on and never read an answer: their requests are small, and refused at once.
    let many = Webhook::push("slow", "{}").without("x-signature").raw().repeat(2_000);
    let asking: Vec<_> = (0..100)
        .map(|_| {
            let (many, to) = (many.clone(), server.public);
            AbortOnDropHandle::new(tokio::spawn(async move {
                let mut stream = TcpStream::connect(to).await.unwrap();
                drop(stream.write_all(&many).await);
                std::future::pending::<()>().await;
            }))
        })
        .collect();
    let mut refused = 0;
    for round in 0..4 {
        let wide = |n| Webhook::push(&format!("wide-{round}-{n}"), Bytes::from(vec![b'x'; 4 * MIB]));
        for answer in join_all((0..100).map(|n| async move { send(server.public, &wide(n)).await })).await {
            // A request that is refused before its body is read may be cut while it is sent.
            refused += u32::from(answer.is_ok_and(|answer| matches!(answer.status.as_u16(), 408 | 503)));
        }
    }
    assert!(refused > 50, "{refused}: nothing could be made durable");
    let peak = server.peak_resident_bytes();
    assert!(server.metric("streamgate_gateway_connections").await >= CROWD as f64);
    let allowed = 64 * MIB as u64 + CONSTANT + CROWD as u64 * CONNECTION;
    println!("{} MiB at the most, of {} allowed; {refused} refused", peak >> 20, allowed >> 20);
    assert!(peak < allowed, "{} MiB", peak >> 20);
    drop((asking, crowd, lock));
    proxy.cut();
    proxy.turn(Weather::Fair);
    eventually("the gateway goes on", || async {
        send(server.public, &Webhook::fresh()).await.is_ok_and(|answer| answer.outcome() == "enqueued")
    })
    .await;
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_of_large_events_is_delivered_in_bounded_memory() {
    let site = Site::new();
    // The service does not answer until the backlog is complete.
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
