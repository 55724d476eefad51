//! Connections that are slow, break off, lie about their framing, or are too many.

use crate::harness::eventually;
use crate::harness::process::{Setup, Site, raise_open_files};
use crate::harness::wire::{self, Transport, Webhook, read_to_end, send};
use crate::statuses::secure;
use rustix::process::Signal;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn impatient() -> Setup {
    let gateway = "header_timeout = \"300ms\"\nbody_timeout = \"300ms\"\nkeep_alive = \"300ms\"\nmax_body = \"64KiB\"";
    Setup { gateway: gateway.into(), ..Setup::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_heads_and_bodies_get_408() {
    let site = Site::new();
    site.configure(&impatient());
    let server = site.start().await;
    let webhook = Webhook::fresh();
    let raw = webhook.raw();
    for (part, code) in [(10, "header_timeout"), (raw.len() - 5, "body_timeout")] {
        let answer = read_to_end(wire::raw(server.public, &raw[..part]).await).await;
        assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains(code), "{answer:?}");
    }
    // A head that trickles in is timed from its start, not from its last byte.
    let mut stream = wire::raw(server.public, &raw[..10]).await;
    let (mut reader, mut writer) = stream.split();
    let trickle = async {
        for byte in &raw[10..] {
            tokio::time::sleep(Duration::from_millis(20)).await;
            if writer.write_all(&[*byte]).await.is_err() {
                return;
            }
        }
    };
    let mut answer = String::new();
    tokio::select! {
        () = trickle => panic!("a head of {} slow bytes was taken", raw.len()),
        read = reader.read_to_string(&mut answer) => drop(read),
    }
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer:?}");
    let timeouts =
        server.metric("streamgate_gateway_requests_total{app=\"none\",kind=\"none\",outcome=\"header_timeout\"}");
    assert_eq!(timeouts.await, 2.0);
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_are_kept_alive_and_then_closed() {
    let site = Site::new();
    site.configure(&Setup { gateway: "header_timeout = \"100ms\"\nkeep_alive = \"1s\"".into(), ..Setup::default() });
    let server = site.start().await;
    let mut stream = wire::raw(server.public, &Webhook::fresh().raw()).await;
    assert_eq!(wire::status(&mut stream).await, 200);
    // Longer than `header_timeout`: between requests `keep_alive` applies.
    tokio::time::sleep(Duration::from_millis(300)).await;
    stream.write_all(&Webhook::fresh().raw()).await.unwrap();
    assert_eq!(wire::status(&mut stream).await, 200);
    assert_eq!(read_to_end(stream).await, "", "closed without an answer");
    assert_eq!(
        read_to_end(TcpStream::connect(server.public).await.unwrap()).await,
        "",
        "closed though nothing was ever sent"
    );
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_open_handshake_ends() {
    let site = Site::new();
    let (server, transports) = secure(&site, impatient()).await;
    // The first bytes of a ClientHello, and nothing more.
    let stream = wire::raw(server.public, &[0x16, 0x03, 0x01, 0x02, 0x00, 0x01]).await;
    assert_eq!(read_to_end(stream).await, "");
    let plain = read_to_end(wire::raw(server.public, &Webhook::fresh().raw()).await).await;
    assert!(!plain.contains("200"), "plain HTTP on the TLS port: {plain:?}");
    for transport in &transports {
        assert_eq!(transport.send(server.public, &Webhook::fresh()).await.unwrap().status, 200);
    }
    eventually("no connection is left", || async { server.metric("streamgate_gateway_connections").await == 0.0 })
        .await;
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_of_one_mebibyte_is_refused() {
    let site = Site::new();
    site.configure(&Setup::default());
    let server = site.start().await;
    let mut stream = TcpStream::connect(server.public).await.unwrap();
    let head = Webhook::fresh().add("x-long", &"a".repeat(1 << 20)).raw();
    // The refusal may come before all of it is sent.
    drop(stream.write_all(&head).await);
    let answer = read_to_end(stream).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431 "), "{:?}", answer.get(..100));
    assert_eq!(send(server.public, &Webhook::fresh()).await.unwrap().status, 200);
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunked_body_over_the_limit_gets_a_413_that_the_client_can_read() {
    let site = Site::new();
    site.configure(&Setup::default());
    let server = site.start().await;
    // More than the sockets' buffers hold: it can be sent whole only if the gateway reads it.
    let webhook = Webhook::push("chunked", vec![b'x'; 14 << 20]);
    let mut raw = format!("{}transfer-encoding: chunked\r\n\r\n", webhook.head()).into_bytes();
    for chunk in webhook.body.chunks(10_000) {
        raw.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
        raw.extend_from_slice(chunk);
        raw.extend_from_slice(b"\r\n");
    }
    raw.extend_from_slice(b"0\r\n\r\n");
    // All of it is sent before the answer is read, as simple clients do: the answer must be there all the same.
    let mut stream = wire::raw(server.public, &raw).await;
    assert_eq!(wire::status(&mut stream).await, 413);
    let within = Webhook::push("within", "{}");
    let raw = format!("{}transfer-encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n", within.head());
    assert_eq!(wire::status(&mut wire::raw(server.public, raw.as_bytes()).await).await, 200);
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_content_length_with_a_chunked_body_smuggles_no_request() {
    let site = Site::new();
    site.configure(&Setup::default());
    let server = site.start().await;
    let webhook = Webhook::push("framed", "{}");
    let smuggled = String::from_utf8(Webhook::push("smuggled", "[]").raw()).unwrap();
    let raw = format!(
        "{}content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n{smuggled}",
        webhook.head()
    );
    let answer = read_to_end(wire::raw(server.public, raw.as_bytes()).await).await;
    assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "one answer, then the connection is closed: {answer:?}");
    assert_eq!(
        server.metric("streamgate_gateway_requests_total{app=\"chat\",kind=\"push\",outcome=\"enqueued\"}").await,
        1.0
    );
    for framing in ["content-length: 2\r\ncontent-length: 3", "transfer-encoding: gzip", "content-length: -1"] {
        let raw = format!("{}{framing}\r\n\r\n{{}}", webhook.head());
        let answer = read_to_end(wire::raw(server.public, raw.as_bytes()).await).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{framing}: {answer:?}");
    }
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_off_body_is_not_taken() {
    let site = Site::new();
    site.configure(&Setup::default());
    let server = site.start().await;
    let raw = Webhook::fresh().raw();
    let mut stream = wire::raw(server.public, &raw[..raw.len() - 3]).await;
    stream.shutdown().await.unwrap();
    let answer = read_to_end(stream).await;
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("body_incomplete"), "{answer:?}");
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_idle_connections_leave_room() {
    const CROWD: usize = 10_000;
    raise_open_files(CROWD + 1000);
    let site = Site::new();
    site.configure(&Setup { gateway: format!("max_connections = {CROWD}"), ..Setup::default() });
    let server = site.start().await;
    let mut crowd = Vec::with_capacity(CROWD);
    for _ in 0..CROWD {
        crowd.push(TcpStream::connect(server.public).await.unwrap());
    }
    eventually("all are accepted", || async { server.metric("streamgate_gateway_connections").await >= CROWD as f64 })
        .await;
    let with_crowd = server.resident_bytes();
    assert_eq!(send(server.public, &Webhook::fresh()).await.unwrap().status, 200);
    assert!(server.metric("streamgate_gateway_connections_evicted_total").await >= 1.0);
    assert!(with_crowd < 512 << 20, "{with_crowd} bytes for {CROWD} idle connections");
    // The first connection was idle for longest, and it alone was closed.
    let mut first = crowd.swap_remove(0);
    assert_eq!(first.read(&mut [0; 1]).await.unwrap(), 0);
    crowd.truncate(10);
    let mut last = crowd.pop().unwrap();
    last.write_all(&Webhook::fresh().raw()).await.unwrap();
    assert_eq!(wire::status(&mut last).await, 200);
    drop(crowd);
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_connection_displaces_the_one_that_has_waited_longest_for_a_byte() {
    let site = Site::new();
    let gateway = "max_connections = 2\nkeep_alive = \"1h\"\nbody_timeout = \"1h\"".into();
    site.configure(&Setup { gateway, ..Setup::default() });
    let server = site.start().await;
    let raw = Webhook::fresh().raw();
    let mut longest = wire::raw(server.public, &raw[..raw.len() - 1]).await;
    eventually("the first body is being read", || async { server.metric("streamgate_gateway_in_flight").await == 1.0 })
        .await;
    let other = Webhook::fresh().raw();
    let mut other_stream = wire::raw(server.public, &other[..other.len() - 1]).await;
    eventually("both bodies are being read", || async { server.metric("streamgate_gateway_in_flight").await == 2.0 })
        .await;
    let mut third = wire::raw(server.public, &Webhook::fresh().raw()).await;
    assert_eq!(wire::status(&mut third).await, 200);
    let mut answer = String::new();
    longest.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("displaced"), "{answer:?}");
    other_stream.write_all(&other[other.len() - 1..]).await.unwrap();
    assert_eq!(wire::status(&mut other_stream).await, 200);
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_connection_waits_while_only_signed_requests_are_in_hand() {
    let site = Site::new();
    site.configure(&Setup { gateway: "max_connections = 2\nkeep_alive = \"1h\"".into(), ..Setup::default() });
    let server = site.start().await;
    let lock = site.hang_store();
    let mut busy = Vec::new();
    for _ in 0..2 {
        busy.push(wire::raw(server.public, &Webhook::fresh().raw()).await);
    }
    eventually("both are busy", || async { server.metric("streamgate_gateway_in_flight").await == 2.0 }).await;
    let mut third = wire::raw(server.public, &Webhook::fresh().raw()).await;
    eventually("no connection can be closed for the third", || async {
        server.ops("/readyz").await.1.contains("max_connections")
    })
    .await;
    assert_eq!(server.metric("streamgate_gateway_in_flight").await, 2.0);
    drop(lock);
    for stream in busy.iter_mut().chain([&mut third]) {
        assert_eq!(wire::status(stream).await, 200);
    }
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_answers_what_was_read_and_ends_idle_connections() {
    let site = Site::new();
    let gateway = "drain_timeout = \"4s\"\nanswer_deadline = \"5900ms\"\nbody_timeout = \"10s\"".into();
    site.configure(&Setup { gateway, ..Setup::default() });
    let server = site.start().await;
    let webhook = Webhook::fresh();
    let raw = webhook.raw();
    let mut half = wire::raw(server.public, &raw[..raw.len() - 3]).await;
    let mut used = wire::raw(server.public, &Webhook::fresh().raw()).await;
    assert_eq!(wire::status(&mut used).await, 200);
    let unused = TcpStream::connect(server.public).await.unwrap();
    eventually("all are open", || async { server.metric("streamgate_gateway_connections").await == 3.0 }).await;
    eventually("the half body is being read", || async { server.metric("streamgate_gateway_in_flight").await == 1.0 })
        .await;
    server.signal(Signal::TERM);
    eventually("/readyz is 503", || async { server.ops("/readyz").await.0 == 503 }).await;
    assert_eq!(read_to_end(used).await, "");
    assert_eq!(read_to_end(unused).await, "");
    // A balancer that has not looked yet is still served; later requests are refused with Retry-After.
    eventually("a late request is refused", || async {
        let late = send(server.public, &Webhook::fresh()).await.unwrap();
        if late.status == 503 {
            assert_eq!((late.code().as_str(), &late.headers["retry-after"]), ("draining", &"1".parse().unwrap()));
        }
        late.status == 503
    })
    .await;
    half.write_all(&raw[raw.len() - 3..]).await.unwrap();
    let answer = read_to_end(half).await;
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.to_lowercase().contains("connection: close"), "{answer:?}");
    assert!(server.wait().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_gateway_serves_late_requests_for_drain_least() {
    let site = Site::new();
    let gateway = "drain_timeout = \"40s\"\ndrain_least = \"30s\"".into();
    site.configure(&Setup { gateway, ..Setup::default() });
    let server = site.start().await;
    server.signal(Signal::TERM);
    eventually("/readyz is 503", || async { server.ops("/readyz").await.0 == 503 }).await;
    // From a balancer that has not looked yet.
    for _ in 0..20 {
        assert_eq!(send(server.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    }
    server.signal(Signal::TERM);
    assert_eq!(server.wait().await.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_aborts() {
    let site = Site::new();
    site.configure(&Setup { gateway: "drain_timeout = \"1h\"".into(), ..Setup::default() });
    let server = site.start().await;
    let raw = Webhook::fresh().raw();
    let half = wire::raw(server.public, &raw[..raw.len() - 3]).await;
    eventually("the half body is being read", || async { server.metric("streamgate_gateway_in_flight").await == 1.0 })
        .await;
    server.signal(Signal::TERM);
    eventually("/readyz is 503", || async { server.ops("/readyz").await.0 == 503 }).await;
    server.signal(Signal::TERM);
    assert_eq!(server.wait().await.code(), Some(1));
    drop(half);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_disconnects_frees_its_place() {
    let site = Site::new();
    site.configure(&Setup::default());
    let server = site.start().await;
    let mut used = wire::raw(server.public, &Webhook::fresh().raw()).await;
    assert_eq!(wire::status(&mut used).await, 200);
    let unused = TcpStream::connect(server.public).await.unwrap();
    let half = wire::raw(server.public, &Webhook::fresh().raw()[..20]).await;
    let open = || server.metric("streamgate_gateway_connections");
    eventually("all are open", || async { open().await == 3.0 }).await;
    drop((used, unused, half));
    eventually("none is left", || async { open().await == 0.0 }).await;
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelined_requests_are_all_answered() {
    let site = Site::new();
    site.configure(&Setup::default());
    let server = site.start().await;
    let close = Webhook::fresh().add("connection", "close");
    let raw = [Webhook::fresh().raw(), Webhook::fresh().raw(), close.raw()].concat();
    let answers = read_to_end(wire::raw(server.public, &raw).await).await;
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 3, "{answers:?}");
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_streams_of_one_http2_connection_are_all_answered() {
    let site = Site::new();
    let (server, transports) = secure(&site, Setup::default()).await;
    let Transport::Tls { root, .. } = &transports[1] else { panic!() };
    let stream = TcpStream::connect(server.public).await.unwrap();
    let io = hyper_util::rt::TokioIo::new(wire::tls(stream, root, b"h2").await.unwrap());
    let executor = hyper_util::rt::TokioExecutor::new();
    let (sender, connection) = hyper::client::conn::http2::handshake(executor, io).await.unwrap();
    let driver = tokio::spawn(connection);
    let answers = (0..300).map(|_| {
        let (mut sender, webhook) = (sender.clone(), Webhook::fresh());
        async move {
            let mut request = hyper::Request::post(format!("https://localhost{}", webhook.path));
            for (name, value) in &webhook.headers {
                request = request.header(name, value);
            }
            let request = request.body(http_body_util::Full::new(webhook.body.clone())).unwrap();
            sender.send_request(request).await.unwrap().status()
        }
    });
    let statuses = futures_util::future::join_all(answers).await;
    assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}");
    // The drain sends GOAWAY: the driver ends without an error.
    server.signal(Signal::TERM);
    driver.await.unwrap().unwrap();
    assert!(server.wait().await.success());
}
