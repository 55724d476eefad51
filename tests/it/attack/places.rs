//! Attacks on connections.

use super::frames::{INITIAL_WINDOW_SIZE, Peer};
use super::{Scene, attackers};
use crate::harness::eventually;
use crate::harness::process::{Setup, Site};
use crate::harness::wire::{self, Webhook};
use crate::statuses::secure;
use rustix::process::Signal;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

/// A request whose refusal has a body.
fn lost() -> Webhook {
    Webhook { path: "/".into(), ..Webhook::fresh() }
}

/// Time between two connections of one attacker that is cut off at once.
const PAUSE: Duration = Duration::from_millis(20);

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_never_taken_pin_no_connection() {
    let scene = Scene::start().await;
    let (to, root) = (scene.server.public, scene.root.clone());
    let attackers = attackers(250, |_| {
        let root = root.clone();
        async move {
            loop {
                if let Some(mut peer) = Peer::open(to, &root, &[(INITIAL_WINDOW_SIZE, 0)]).await {
                    peer.begin(&lost(), true).await;
                    peer.closed().await;
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    });
    let row = scene.under(attackers).await;
    scene.hold("answers that HTTP/2 peers never take", row).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unanswered_goaway_keeps_no_place() {
    let scene = Scene::start().await;
    let (to, root) = (scene.server.public, scene.root.clone());
    let attackers = attackers(400, |_| {
        let root = root.clone();
        async move {
            loop {
                let peer = Peer::open(to, &root, &[]).await;
                if let Some(peer) = peer {
                    peer.closed().await;
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    });
    let row = scene.under(attackers).await;
    scene.hold("idle HTTP/2 connections that leave GOAWAY's ping unanswered", row).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_requests_that_are_still_being_read_are_displaced_first() {
    let scene = Scene::start().await;
    let to = scene.server.public;
    // No signature, and no byte of the announced body: about 400 connections/s here.
    let raw = format!("{}content-length: 100000\r\n\r\n", Webhook::fresh().without("x-signature").head());
    let root = scene.root.clone();
    let attackers = attackers(20, |_| {
        let (raw, root) = (raw.clone(), root.clone());
        async move {
            let mut held = std::collections::VecDeque::new();
            loop {
                if let Ok(stream) = TcpStream::connect(to).await
                    && let Ok(mut stream) = wire::tls(stream, &root, b"http/1.1").await
                {
                    drop(stream.write_all(raw.as_bytes()).await);
                    held.push_back(stream);
                    if held.len() > 30 {
                        held.pop_front();
                    }
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    });
    let row = scene.under(attackers).await;
    scene.hold("refused requests that keep their connection", row).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn half_open_handshakes_and_trickling_heads_are_displaced_by_newcomers() {
    let scene = Scene::start().await;
    let to = scene.server.public;
    let attackers = attackers(250, |number| async move {
        loop {
            let Ok(mut stream) = TcpStream::connect(to).await else { continue };
            // Half of them send nothing, the others a byte of a ClientHello now and then.
            for byte in [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3] {
                if number % 2 == 0 && stream.write_all(&[byte]).await.is_err() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    });
    let row = scene.under(attackers).await;
    scene.hold("slow handshakes", row).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_not_taken_in_time_ends_its_connection() {
    let site = Site::new();
    let setup = Setup { gateway: "answer_deadline = \"500ms\"\nkeep_alive = \"1h\"".into(), ..Setup::default() };
    let (server, transports) = secure(&site, setup).await;
    let wire::Transport::Tls { root, .. } = &transports[1] else { panic!() };
    let mut peer = Peer::open(server.public, root, &[(INITIAL_WINDOW_SIZE, 0)]).await.unwrap();
    peer.begin(&lost(), true).await.unwrap();
    // Frames of its own do not count as taking the answer.
    peer.ping(0).await.unwrap();
    tokio::time::timeout(crate::harness::PATIENCE, peer.closed()).await.expect("closed by the server");
    eventually("the peer's place is free", || async { server.metric("streamgate_gateway_connections").await == 0.0 })
        .await;
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_goes_on_after_goaway_is_cut_off() {
    let site = Site::new();
    let setup = Setup { gateway: "answer_deadline = \"500ms\"\nkeep_alive = \"1h\"".into(), ..Setup::default() };
    let (server, transports) = secure(&site, setup).await;
    let wire::Transport::Tls { root, .. } = &transports[1] else { panic!() };
    let forged = Webhook::fresh().on_the_wire("{}");
    // Goes on forging after GOAWAY, and never acknowledges it.
    let forge = async |peer: &mut Peer| {
        let stream = peer.begin(&forged, false).await?;
        peer.data(stream, b"{}", true).await
    };
    // Leaves an answer unread, and always has a body on its way.
    let stall = async |peer: &mut Peer| {
        peer.begin(&lost(), true).await?;
        peer.begin(&forged, false).await.map(drop)
    };
    for (attack, settings) in [(true, [].as_slice()), (false, &[(INITIAL_WINDOW_SIZE, 0)])] {
        let mut peer = Peer::open(server.public, root, settings).await.unwrap();
        let started = std::time::Instant::now();
        while (if attack { forge(&mut peer).await } else { stall(&mut peer).await }).is_some() {
            assert!(started.elapsed() < crate::harness::PATIENCE, "still open");
            tokio::time::sleep(PAUSE * 5).await;
        }
    }
    eventually("the peers' places are free", || async { server.metric("streamgate_gateway_connections").await == 0.0 })
        .await;
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_is_heard_while_a_connection_waits_for_a_place() {
    let site = Site::new();
    site.configure(&Setup { gateway: "max_connections = 1\ndrain_timeout = \"1s\"".into(), ..Setup::default() });
    let server = site.start().await;
    eventually("the store exists", || async { site.data_dir().join("streamgate.db").exists() }).await;
    // A signed push whose commit hangs: the one connection that cannot be closed for another.
    let lock = site.hang_store();
    let busy = wire::raw(server.public, &Webhook::fresh().raw()).await;
    eventually("the push is in hand", || async { server.metric("streamgate_gateway_in_flight").await == 1.0 }).await;
    let waiting = TcpStream::connect(server.public).await.unwrap();
    eventually("no connection can be taken", || async {
        let (status, text) = server.ops("/readyz").await;
        status == 503 && text.contains("max_connections")
    })
    .await;
    server.signal(Signal::TERM);
    let status = tokio::time::timeout(crate::harness::PATIENCE, server.wait()).await.expect("the server stops");
    assert!(status.success());
    drop((busy, waiting, lock));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_without_free_descriptors_is_not_ready() {
    let site = Site::new();
    site.configure(&Setup::default());
    // Descriptors for a few connections only: `max_connections` is far higher.
    let mut command = tokio::process::Command::new("sh");
    let binary = crate::harness::process::binary();
    command.args(["-c", "ulimit -n 64 && exec \"$0\" up", &binary]).env_clear().kill_on_drop(true);
    command.current_dir(site.path("")).env("STREAMGATE_CONFIG", site.config()).stdin(std::process::Stdio::null());
    let server = crate::harness::process::Server::of(command, &site).await;
    // Kept open for the probes: there will be no descriptor for another connection.
    let mut ops = TcpStream::connect(server.ops).await.unwrap();
    let mut ready = async || {
        ops.write_all(b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        wire::status(&mut ops).await
    };
    assert_eq!(ready().await, 200);
    let mut crowd = Vec::new();
    for _ in 0..80 {
        let mut stream = TcpStream::connect(server.public).await.unwrap();
        // A connection without a whole head would be closed for a newcomer; so a body is announced and its end held back.
        let raw = Webhook::fresh().raw();
        drop(stream.write_all(&raw[..raw.len() - 1]).await);
        crowd.push(stream);
    }
    let started = std::time::Instant::now();
    while ready().await != 503 {
        assert!(started.elapsed() < crate::harness::PATIENCE, "{}", site.log());
        let mut stream = TcpStream::connect(server.public).await.unwrap();
        let raw = Webhook::fresh().raw();
        drop(stream.write_all(&raw[..raw.len() - 1]).await);
        crowd.push(stream);
    }
    drop(crowd);
    while ready().await != 200 {
        assert!(started.elapsed() < crate::harness::PATIENCE, "{}", site.log());
    }
    assert!(server.terminate().await.success());
}
