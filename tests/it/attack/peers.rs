//! The address that a request comes from, and the addresses that may send.

use crate::harness::eventually;
use crate::harness::process::{Server, Setup, Site};
use crate::harness::wire::{self, Webhook, read_to_end};
use crate::statuses::secure;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

async fn start(site: &Site, gateway: &str) -> Server {
    site.configure(&Setup { gateway: gateway.into(), ..Setup::default() });
    site.start().await
}

/// Sends these bytes and a webhook on a new connection. `None` when it is closed without an answer.
async fn status(server: &Server, before: &[u8], webhook: &Webhook) -> Option<u16> {
    let close = webhook.clone().add("connection", "close");
    let answer = read_to_end(wire::raw(server.public, &[before, &close.raw()].concat()).await).await;
    answer.split(' ').nth(1).map(|status| status.parse().unwrap())
}

fn from(forwarded: &str) -> Webhook {
    Webhook::fresh().add("x-forwarded-for", forwarded)
}

#[tokio::test(flavor = "multi_thread")]
async fn only_allowed_peers_may_send() {
    let site = Site::new();
    let server = start(&site, "allow_from = [\"192.0.2.0/24\"]").await;
    let refused = Webhook::fresh().without("x-signature");
    for webhook in [&Webhook::fresh(), &from("192.0.2.1"), &refused, &Webhook { path: "/".into(), ..Webhook::fresh() }]
    {
        assert_eq!(status(&server, b"", webhook).await, Some(403));
    }
    // Refused before a byte of the body.
    let head = format!("{}content-length: 100\r\n\r\n", Webhook::fresh().head());
    let mut stream = wire::raw(server.public, head.as_bytes()).await;
    assert_eq!(wire::status(&mut stream).await, 403);
    assert!(server.terminate().await.success());
    let server = start(&site, "allow_from = [\"127.0.0.1\"]").await;
    assert_eq!(status(&server, b"", &Webhook::fresh()).await, Some(200));
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_trusted_proxy_can_name_the_client() {
    let site = Site::new();
    let allow = "allow_from = [\"192.0.2.1\"]\n";
    let server = start(&site, &format!("{allow}trusted_proxies = [\"127.0.0.0/8\"]")).await;
    assert_eq!(status(&server, b"", &from("192.0.2.1")).await, Some(200));
    assert_eq!(status(&server, b"", &from("192.0.2.1, 127.0.0.9")).await, Some(200));
    assert_eq!(
        status(&server, b"", &from("192.0.2.1, 198.51.100.7")).await,
        Some(403),
        "the client wrote the first address itself"
    );
    assert_eq!(status(&server, b"", &Webhook::fresh()).await, Some(403));
    assert!(server.terminate().await.success());
    let server = start(&site, &format!("{allow}trusted_proxies = [\"10.0.0.0/8\"]")).await;
    assert_eq!(status(&server, b"", &from("192.0.2.1")).await, Some(403), "the proxy is not trusted");
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_header_names_the_client_in_both_versions() {
    let site = Site::new();
    let server = start(&site, "allow_from = [\"192.0.2.1\"]\nproxy_protocol = true").await;
    let second = |source: [u8; 4]| {
        let fixed = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c".as_slice();
        [fixed, &source, &[127, 0, 0, 1], &[0x12, 0x34, 1, 0xbb]].concat()
    };
    let good: [&[u8]; 2] = [b"PROXY TCP4 192.0.2.1 127.0.0.1 4711 443\r\n", &second([192, 0, 2, 1])];
    for header in good {
        assert_eq!(status(&server, header, &Webhook::fresh()).await, Some(200));
    }
    let other: [&[u8]; 3] =
        [b"PROXY TCP4 192.0.2.2 127.0.0.1 4711 443\r\n", &second([192, 0, 2, 2]), b"PROXY UNKNOWN\r\n"];
    for header in other {
        assert_eq!(status(&server, header, &from("192.0.2.1")).await, Some(403));
    }
    for broken in [&b""[..], b"PROXY TCP4 192.0.2.1\r\n", b"PROXY nonsense and no end of it\r\n"] {
        assert_eq!(status(&server, broken, &Webhook::fresh()).await, None, "{broken:?}");
    }
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_header_comes_before_tls_and_only_from_a_trusted_proxy() {
    let site = Site::new();
    let setup = |trusted: &str| Setup {
        gateway: format!("proxy_protocol = true\nheader_timeout = \"1s\"\ntrusted_proxies = [\"{trusted}\"]"),
        ..Setup::default()
    };
    let (server, transports) = secure(&site, setup("127.0.0.1")).await;
    let wire::Transport::Tls { root, .. } = &transports[0] else { panic!() };
    let mut stream = TcpStream::connect(server.public).await.unwrap();
    stream.write_all(b"PROXY TCP4 192.0.2.1 127.0.0.1 4711 443\r\n").await.unwrap();
    let mut stream = wire::tls(stream, root, b"http/1.1").await.unwrap();
    stream.write_all(&Webhook::fresh().add("connection", "close").raw()).await.unwrap();
    let answer = read_to_end(stream).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer:?}");
    // A connection that never sends its header is closed, like one that never ends its handshake.
    let silent = TcpStream::connect(server.public).await.unwrap();
    assert_eq!(read_to_end(silent).await, "");
    eventually("no connection is left", || async { server.metric("streamgate_gateway_connections").await == 0.0 })
        .await;
    assert!(server.terminate().await.success());
    // A peer that is not trusted sends no PROXY header: it begins with its handshake.
    let (server, transports) = secure(&site, setup("192.0.2.9")).await;
    assert_eq!(transports[0].send(server.public, &Webhook::fresh()).await.unwrap().status, 200);
    assert!(server.terminate().await.success());
}
