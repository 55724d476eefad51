//! Attacks that have never succeeded, kept as regression tests.

use super::Scene;
use crate::harness::process::{Setup, Site};
use crate::harness::wire::{self, Webhook, read_to_end};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

#[tokio::test(flavor = "multi_thread")]
async fn no_smuggled_request_is_taken() {
    let site = Site::new();
    site.configure(&Setup::default());
    let server = site.start().await;
    let inner = String::from_utf8(Webhook::push("smuggled", "[]").raw()).unwrap();
    let length = inner.len();
    let chunked = format!("{length:x}\r\n{inner}\r\n0\r\n\r\n");
    let framings = [
        // (framing headers, the bytes after the head)
        ("content-length: 0\r\ntransfer-encoding: chunked\r\n".to_owned(), chunked.clone()),
        ("transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n".to_owned(), chunked.clone()),
        ("transfer-encoding: xchunked\r\n".to_owned(), chunked.clone()),
        ("transfer-encoding : chunked\r\n".to_owned(), chunked.clone()),
        ("transfer-encoding:\x0bchunked\r\n".to_owned(), chunked.clone()),
        ("x: y\r\n transfer-encoding: chunked\r\n".to_owned(), chunked),
        (format!("content-length: +{length}\r\n"), inner.clone()),
        (format!("content-length: {length}\r\ncontent-length: 0\r\n"), inner.clone()),
        (format!("content-length: 0, {length}\r\n"), inner.clone()),
        (format!("content-length: 0x{length:x}\r\n"), inner.clone()),
    ];
    for (framing, rest) in framings {
        let head = Webhook::push("outer", "").without("x-signature").head();
        let answer = read_to_end(wire::raw(server.public, format!("{head}{framing}\r\n{rest}").as_bytes()).await).await;
        assert!(!answer.contains("HTTP/1.1 200"), "{framing:?}: {answer:?}");
    }
    assert_eq!(server.pushes("enqueued").await, 0.0);
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_fields_and_line_breaks_end_in_a_refusal() {
    let scene = Scene::start().await;
    let to = scene.server.public;
    let many: String = (0..5_000).map(|number| format!("x-{number}: y\r\n")).collect();
    let heads = [
        Webhook::fresh().head() + &many + "\r\n",
        format!("POST {} HTTP/1.1\r\n\r\n", "/a".repeat(40_000)),
        "\r\n".repeat(20_000),
        "GET / HTTP/0.9\r\n\r\n".to_owned(),
        "\0".repeat(40_000),
        Webhook::fresh().add("x-a", "b\r\nx-c: d\0").head() + "\r\n",
    ];
    for head in heads {
        let mut stream = wire::tls(TcpStream::connect(to).await.unwrap(), &scene.root, b"http/1.1").await.unwrap();
        drop(stream.write_all(head.as_bytes()).await);
        drop(stream.shutdown().await);
        let answer = read_to_end(stream).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{:?}: {answer:?}", head.get(..40));
    }
    assert_eq!(scene.tls.send(to, &Webhook::fresh()).await.unwrap().status, 200);
    assert!(scene.server.terminate().await.success());
}
