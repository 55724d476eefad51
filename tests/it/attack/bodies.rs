//! Attacks by requests that are not verified yet: on requests in flight, memory and CPU.

use super::frames::Peer;
use super::{CONNECTION, CONSTANT, MAX_BODY, Scene, attack_time, attackers};
use crate::harness::process::other_binary;
use crate::harness::wire::{self, Webhook, gzip};
use flate2::{Compression, write::GzEncoder};
use rustls_pki_types::CertificateDer;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use streamgate_core::signature::SigningKey;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Time between two requests of one attacker.
const PAUSE: Duration = Duration::from_millis(20);

/// A webhook signed with another secret, as a stranger can make it.
fn forged(body: Vec<u8>) -> Webhook {
    let signature = SigningKey::new(b"not the secret").sign(&body).to_hex();
    Webhook::push("forged", body).set("x-signature", &signature)
}

/// Compressed about 1000:1, and as large as a body may be when inflated.
fn bomb() -> Vec<u8> {
    gzip(&vec![b'a'; MAX_BODY])
}

/// Sends a request again and again, each on a new TLS connection and without its last `kept` bytes, and waits for the answer.
async fn send_without_the_last(to: SocketAddr, root: CertificateDer<'static>, raw: Arc<Vec<u8>>, kept: usize) {
    loop {
        if let Ok(stream) = TcpStream::connect(to).await
            && let Ok(mut stream) = wire::tls(stream, &root, b"http/1.1").await
            && stream.write_all(&raw[..raw.len() - kept]).await.is_ok()
        {
            drop(stream.read(&mut [0; 4096]).await);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_never_arrive_take_no_place_from_signed_requests() {
    let scene = Scene::start().await;
    let (to, root, raw) = (scene.server.public, scene.root.clone(), Arc::new(forged(b"{}".to_vec()).raw()));
    let mut all = attackers(100, |_| send_without_the_last(to, root.clone(), Arc::clone(&raw), 1));
    // A few connections with as many streams as the server allows.
    all.extend(attackers(4, |_| {
        let root = root.clone();
        async move {
            loop {
                tokio::time::sleep(PAUSE).await;
                let Some(mut peer) = Peer::open(to, &root, &[]).await else { continue };
                for _ in 0..100 {
                    peer.begin(&forged(b"{}".to_vec()), false).await;
                }
                drop(tokio::time::timeout(Duration::from_secs(1), peer.closed()).await);
            }
        }
    }));
    let row = scene.under(all).await;
    scene.hold("bodies that never come", row).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gzip_bombs_without_their_trailer_pin_no_memory() {
    let scene = Scene::start().await;
    let (to, root) = (scene.server.public, scene.root.clone());
    let raw = Arc::new(forged(bomb()).on_the_wire(bomb()).raw());
    // Inflated, they would more than fill the budget.
    let all = attackers(100, |_| send_without_the_last(to, root.clone(), Arc::clone(&raw), 8));
    let row = scene.under(all).await;
    scene.hold("gzip bombs that hold back their trailer", row).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_gzip_bombs_leave_time_for_signed_requests() {
    let scene = Scene::start().await;
    let (to, root) = (scene.server.public, scene.root.clone());
    let raw = Arc::new(forged(vec![]).on_the_wire(bomb()).raw());
    let all = attackers(8, |_| send_without_the_last(to, root.clone(), Arc::clone(&raw), 0));
    let row = scene.under(all).await;
    scene.hold("gzip bombs under a wrong signature", row).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gzip_bombs_that_queue_for_inflation_give_way_to_signed_requests() {
    let scene = Scene::start().await;
    let (to, root) = (scene.server.public, scene.root.clone());
    let webhook = forged(vec![]).on_the_wire(bomb());
    // Each holds 72 KiB of the 8 MiB that unverified bodies may hold together.
    let all = attackers(4, |_| {
        let (root, webhook) = (root.clone(), webhook.clone());
        async move {
            loop {
                tokio::time::sleep(PAUSE * 10).await;
                let Some(mut peer) = Peer::open(to, &root, &[]).await else { continue };
                for _ in 0..100 {
                    let Some(stream) = peer.begin(&webhook, false).await else { break };
                    peer.data(stream, &webhook.body, true).await;
                }
                drop(tokio::time::timeout(Duration::from_millis(500), peer.closed()).await);
            }
        }
    });
    let row = scene.under(all).await;
    scene.hold("gzip bombs that queue for their inflation", row).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn empty_blocks_of_gzip_take_turns() {
    let scene = Scene::start().await;
    let (to, root) = (scene.server.public, scene.root.clone());
    // Empty stored blocks (RFC 1951, 3.2.4): five bytes each, which inflate to nothing.
    let header = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    let blocks = [0, 0, 0, 0xff, 0xff].repeat(MAX_BODY / 5 - 10);
    let wire = [&header[..], &blocks, &[1, 0, 0, 0xff, 0xff], &[0; 8]].concat();
    let raw = Arc::new(forged(b"x".to_vec()).on_the_wire(wire).raw());
    let all = attackers(8, |_| send_without_the_last(to, root.clone(), Arc::clone(&raw), 0));
    let row = scene.under(all).await;
    scene.hold("gzip of many blocks", row).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gzip_of_empty_members_and_long_fields_costs_next_to_nothing() {
    let scene = Scene::start().await;
    let (to, root) = (scene.server.public, scene.root.clone());
    let empty = gzip(b"");
    let members = forged(vec![]).on_the_wire(empty.repeat(MAX_BODY / empty.len()));
    let field = flate2::GzBuilder::new().comment(vec![b'x'; 60_000]);
    let mut long: GzEncoder<Vec<u8>> = field.write(Vec::new(), Compression::default());
    long.write_all(b"{}").unwrap();
    let fields = forged(vec![]).on_the_wire(long.finish().unwrap());
    let raws = [Arc::new(members.raw()), Arc::new(fields.raw())];
    let all = attackers(8, |number| send_without_the_last(to, root.clone(), Arc::clone(&raws[number % 2]), 0));
    let row = scene.under(all).await;
    scene.hold("gzip of empty members and long fields", row).await;
}

/// Bits, the lowest first (RFC 7932, 1.5).
#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    count: usize,
}

impl Bits {
    fn put(&mut self, value: u32, bits: u32) {
        for bit in 0..bits {
            if self.count.is_multiple_of(8) {
                self.bytes.push(0);
            }
            *self.bytes.last_mut().unwrap() |= ((value >> bit & 1) as u8) << (self.count % 8);
            self.count += 1;
        }
    }

    /// A prefix code of one symbol (3.4), which takes no bits of the data.
    fn code_of_one(&mut self, symbol: u32, alphabet_bits: u32) {
        self.put(1, 2);
        self.put(0, 2);
        self.put(symbol, alphabet_bits);
    }

    /// The number 256, the most block types or codes (9.2).
    fn most(&mut self) {
        self.put(1, 1);
        self.put(7, 3);
        self.put(127, 7);
    }

    /// A meta-block of one literal, with as many prefix codes as possible (9.2): 1.2 kB for 768 tables.
    fn meta_block_of_many_codes(&mut self, literal: u8) {
        // Not the last meta-block, of length 1, compressed.
        self.put(0, 1 + 2 + 16 + 1);
        // Literals: one block type. Commands: 256, with their codes of types and of lengths, and the length of the first.
        self.put(0, 1);
        self.most();
        self.code_of_one(0, 9);
        self.code_of_one(0, 5);
        self.put(0, 2);
        // Distances: one block type; no postfix, no direct codes; the context mode.
        self.put(0, 1 + 2 + 4 + 2);
        // Codes of literals and of distances, and the maps to them.
        for _ in 0..2 {
            self.most();
            self.put(0, 1);
            self.code_of_one(0, 8);
            self.put(0, 1);
        }
        (0..256).for_each(|_| self.code_of_one(literal.into(), 8));
        // Insert one literal, then copy: the meta-block ends before that.
        (0..256).for_each(|_| self.code_of_one(8, 10));
        (0..256).for_each(|_| self.code_of_one(0, 6));
    }
}

/// Brotli with a window of 4 MiB, in which every literal costs as much as a meta-block can.
fn many_codes(letters: usize) -> Vec<u8> {
    let mut bits = Bits::default();
    bits.put(0b1011, 4);
    (0..letters).for_each(|_| bits.meta_block_of_many_codes(b'a'));
    bits.put(0b11, 2);
    bits.bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn brotli_prefix_codes_stay_within_the_budget_and_leave_time_for_others() {
    let scene = Scene::start().await;
    let (to, root) = (scene.server.public, scene.root.clone());
    let letters = MAX_BODY / many_codes(1).len() - 1;
    let authentic = Webhook::push("authentic", vec![b'a'; letters]).on_the_wire(many_codes(letters));
    let answer = scene.tls.send(to, &authentic.clone().set("content-encoding", "br")).await.unwrap();
    assert_eq!(answer.status.as_u16(), 200, "the body of the attack is valid brotli");
    let raw = Arc::new(forged(b"x".to_vec()).on_the_wire(many_codes(letters)).set("content-encoding", "br").raw());
    let all = attackers(8, |_| send_without_the_last(to, root.clone(), Arc::clone(&raw), 0));
    let row = scene.under(all).await;
    scene.hold("brotli of many prefix codes", row).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn brotli_and_deflate_bombs_leave_time_for_signed_requests() {
    let scene = Scene::start().await;
    let (to, root) = (scene.server.public, scene.root.clone());
    let raws = ["br", "deflate"].map(|encoding| {
        let bomb = Webhook::push("bomb", vec![b'a'; MAX_BODY]).encoded(encoding);
        Arc::new(bomb.set("x-signature", &"a".repeat(64)).raw())
    });
    let all = attackers(8, |number| send_without_the_last(to, root.clone(), Arc::clone(&raws[number % 2]), 0));
    let row = scene.under(all).await;
    scene.hold("bombs of brotli and deflate under a wrong signature", row).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_bodies_that_stop_short_fill_no_memory() {
    let scene = Scene::start().await;
    let (to, root) = (scene.server.public, scene.root.clone());
    let raw = Arc::new(forged(vec![b'x'; MAX_BODY]).raw());
    // Three times as much as the budget.
    let all = attackers(190, |_| send_without_the_last(to, root.clone(), Arc::clone(&raw), 1));
    let row = scene.under(all).await;
    scene.hold("large bodies that stop short", row).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn long_heads_stay_within_the_promised_memory() {
    // With the defaults, for which the bound is promised.
    let scene = Scene::with("").await;
    let (to, root) = (scene.server.public, scene.root.clone());
    // Short fields cost most: a field takes about 100 bytes in memory in addition to its own.
    let mut long = forged(b"{}".to_vec());
    for number in 0..360 {
        long = long.add(&format!("x{number}"), "y");
    }
    let open = attackers(32, |_| {
        let (root, long) = (root.clone(), long.clone());
        async move {
            let mut peer = Peer::open(to, &root, &[]).await.unwrap();
            for _ in 0..120 {
                peer.begin(&long, false).await;
            }
            peer.closed().await;
        }
    });
    let began = Instant::now();
    while began.elapsed() < attack_time() && scene.server.metric("streamgate_gateway_in_flight").await < 1900.0 {
        tokio::time::sleep(PAUSE).await;
    }
    let held = scene.server.metric("streamgate_gateway_memory_bytes").await;
    let (peak, allowed) = (scene.server.peak_resident_bytes(), (256 << 20) + CONSTANT + 32 * CONNECTION);
    // This attack does not use up the budget, so only the memory beyond what the budget counts is compared.
    let beyond = peak.saturating_sub(held as u64);
    println!(
        "| long heads over 32 HTTP/2 connections: beyond the budget | | {} of {} MiB | |",
        beyond >> 20,
        (allowed >> 20) - 256
    );
    drop(open);
    if other_binary().is_none() {
        assert!(held > 1e6, "the budget pays for the parts of heads that are kept: {held}");
        assert!(beyond < CONSTANT + 32 * CONNECTION, "{} MiB", beyond >> 20);
        assert!(scene.server.terminate().await.success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_signature_closes_its_connection() {
    let scene = Scene::start().await;
    let to = scene.server.public;
    let stream = TcpStream::connect(to).await.unwrap();
    let mut stream = wire::tls(stream, &scene.root, b"http/1.1").await.unwrap();
    stream.write_all(&forged(b"{}".to_vec()).raw()).await.unwrap();
    let answer = wire::read_to_end(stream).await.to_lowercase();
    assert!(answer.starts_with("http/1.1 401 ") && answer.contains("connection: close"), "{answer:?}");
    // A broken body under a wrong signature closes its connection, too: only a signature is worth the work.
    let mut broken = bomb();
    *broken.last_mut().unwrap() ^= 1;
    let stream = TcpStream::connect(to).await.unwrap();
    let mut stream = wire::tls(stream, &scene.root, b"http/1.1").await.unwrap();
    stream.write_all(&forged(vec![]).on_the_wire(broken).raw()).await.unwrap();
    let answer = wire::read_to_end(stream).await.to_lowercase();
    assert!(answer.starts_with("http/1.1 400 ") && answer.contains("connection: close"), "{answer:?}");
    // Over HTTP/2 other requests may share the connection, so it ends only after a few.
    let mut peer = Peer::open(to, &scene.root, &[]).await.unwrap();
    for _ in 0..4 {
        let stream = peer.begin(&forged(b"{}".to_vec()), false).await.unwrap();
        peer.data(stream, b"{}", true).await.unwrap();
    }
    tokio::time::timeout(crate::harness::PATIENCE, peer.closed()).await.expect("closed by the server");
    assert!(scene.server.terminate().await.success());
}
