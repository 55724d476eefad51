//! Calls to services: a transport failure is never taken for the service's answer, and errors name the cause.

use crate::harness::eventually;
use crate::harness::process::{Server, Setup, Site};
use crate::harness::proxy::{Proxy, Weather};
use crate::harness::raw_service::{Asked, Raw, RawService};
use crate::harness::receiver::Receiver;
use crate::harness::servers::{certificates, certificates_for, free_port};
use crate::harness::wire::{Webhook, send};
use crate::hook_faults::ask;
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio_util::task::AbortOnDropHandle;

const ANSWER: &str = r#"{"message":{"text":"by the service"}}"#;

/// A server that forwards its events and its hooks to one service.
async fn up(site: &Site, url: &str, more: &str) -> Server {
    let forward = format!("forward = {{ url = \"{url}\"{more} }}");
    let rest = format!(
        "[[worker.routes]]\nname = \"app\"\nevents = [\"*\"]\n{forward}\n[hooks.before_message_send]\ndeadline = \"5s\"\n{forward}"
    );
    let gateway = "answer_deadline = \"5900ms\"".into();
    site.configure(&Setup { gateway, worker: "retry = []".into(), rest, ..Setup::default() });
    site.start().await
}

fn message() -> Webhook {
    Webhook::moderation(r#"{"text":"x"}"#)
}

async fn settled(server: &Server, outcome: &str) -> f64 {
    server.metric(&format!("streamgate_worker_deliveries_total{{outcome=\"{outcome}\",route=\"app\"}}")).await
}

/// Answers the first request of each connection, and closes it at the second.
fn once(asked: &Asked) -> Raw {
    match asked.nth {
        0 => Raw::ok(ANSWER),
        _ => Raw::last(""),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_drops_every_reused_connection_loses_no_event_and_fails_no_hook() {
    let authority = Site::new();
    let (ca, cert, key) = certificates(&authority);
    let plain = RawService::start(once).await;
    let secure = RawService::over_tls((&cert, &key), once).await;
    let secure_url = format!("https://{}/", secure.address);
    for (service, url, more) in
        [(&plain, plain.url(), String::new()), (&secure, secure_url, format!(", ca = \"{ca}\""))]
    {
        let site = Site::new();
        let server = up(&site, &url, &more).await;
        for number in 1..=20 {
            assert_eq!(send(server.public, &Webhook::fresh()).await.unwrap().status, 200);
            eventually("the event is handled", || async { settled(&server, "done").await == f64::from(number) }).await;
            let answer = ask(&server, &message()).await;
            assert_eq!((&answer.body[..], answer.outcome()), (ANSWER.as_bytes(), "answered"));
        }
        // Several at a time, so that more connections are opened than are used.
        let at_once = (0..40).map(|_| async { ask(&server, &message()).await.outcome().to_owned() });
        assert_eq!(futures_util::future::join_all(at_once).await, ["answered"; 40]);
        let asked = service.asked();
        let dropped: Vec<_> = asked.iter().filter(|asked| asked.nth > 0).collect();
        assert!(!dropped.is_empty(), "connections were reused");
        assert!(asked.iter().all(|asked| asked.header("x-streamgate-attempt") == "1"), "no attempt was counted");
        for one in dropped {
            let key = one.header("x-streamgate-key");
            let times = asked.iter().filter(|asked| asked.header("x-streamgate-key") == key).count();
            assert_eq!(times, 2, "both tries carry the same key: {key}");
        }
        assert!(server.terminate().await.success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_breaks_off_is_the_services_failure() {
    let service = RawService::start(|asked| match asked.nth {
        0 => Raw::ok(ANSWER),
        _ => Raw::last("HTTP/1.1 200 O"),
    })
    .await;
    let site = Site::new();
    let server = up(&site, &service.url(), "").await;
    let times = AtomicUsize::new(0);
    eventually("a connection is reused", || async {
        times.fetch_add(1, Ordering::SeqCst);
        ask(&server, &message()).await.outcome() == "hook_failed"
    })
    .await;
    assert_eq!(service.asked().len(), times.load(Ordering::SeqCst), "no hook was sent twice");
    site.logged("broke before its reply").await;
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn replies_that_other_clients_take_are_taken() {
    let many: String = (0..1_000).map(|number| format!("x-{number}: v\r\n")).collect();
    let length = ANSWER.len();
    let heads = [
        format!("HTTP/1.1 200 OK\r\nx-folded: one\r\n two\r\n\tthree\r\ncontent-length: {length}\r\n\r\n"),
        format!("HTTP/1.1 200 OK\r\nX-A : b\r\ncontent-length: {length}\r\n\r\n"),
        format!("HTTP/1.1 200 OK\r\n{many}content-length: {length}\r\n\r\n"),
        format!("HTTP/1.1 200 OK\r\nno colon at all\r\ncontent-length: {length}\r\n\r\n"),
        format!("HTTP/1.1 200\r\ncontent-length: {length}\r\n\r\n"),
        format!("HTTP/1.1 200 OK\ncontent-length: {length}\n\n"),
        format!("HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n"),
        "HTTP/1.0 200 OK\r\n\r\n".to_owned(),
    ];
    let replies: Vec<_> = heads.iter().map(|head| format!("{head}{ANSWER}")).collect();
    let count = replies.len();
    let service = RawService::start(move |asked| {
        let number: usize = asked.header("x-webhook-id").rsplit('-').next().unwrap().parse().unwrap();
        Raw::last(replies[number].clone())
    })
    .await;
    let site = Site::new();
    let server = up(&site, &service.url(), "").await;
    for (number, head) in heads.iter().enumerate() {
        let answer = ask(&server, &message().set("x-webhook-id", &format!("hook-{number}"))).await;
        assert_eq!((&answer.body[..], answer.outcome()), (ANSWER.as_bytes(), "answered"), "{head:?}");
        let event = Webhook::push(&format!("event-{number}"), format!(r#"{{"type":"a.b","n":{number}}}"#));
        assert_eq!(send(server.public, &event).await.unwrap().status, 200);
    }
    eventually("all are handled", || async { settled(&server, "done").await == count as f64 }).await;
    assert!(service.asked().iter().all(|asked| asked.header("accept-encoding") == "identity"));
    assert!(server.terminate().await.success());
}

/// Asks eight hooks at a time, so that there are eight connections.
async fn ask_eight(server: &Server) -> Vec<String> {
    let asks = (0..8).map(|_| async { ask(server, &message()).await.outcome().to_owned() });
    futures_util::future::join_all(asks).await
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_to_a_node_server_that_closes_its_idle_connections_are_answered() {
    let mut command = tokio::process::Command::new("node");
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop/service.mjs"));
    let mut node = command.kill_on_drop(true).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(node.stdout.take().unwrap()).lines();
    let port = lines.next_line().await.unwrap().expect("the service starts").parse().unwrap();
    let proxy = Proxy::start(port, 1).await;
    proxy.turn(Weather::Far);
    let site = Site::new();
    let server = up(&site, &format!("http://127.0.0.1:{}/", proxy.port), "").await;
    assert_eq!(ask_eight(&server).await, ["answered"; 8]);
    // A fixed sleep: the test needs the moment at which Node closes its connections.
    tokio::time::sleep(Duration::from_millis(5_980)).await;
    assert_eq!(ask_eight(&server).await, ["answered"; 8]);
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_a_server_may_be_about_to_close_is_not_used_again() {
    let service = RawService::start(|_| Raw::ok(ANSWER)).await;
    let site = Site::new();
    let server = up(&site, &service.url(), "").await;
    assert_eq!(ask(&server, &message()).await.outcome(), "answered");
    // gunicorn closes its connections after 2 s. A fixed sleep: the test needs a moment just before that.
    tokio::time::sleep(Duration::from_millis(1_900)).await;
    assert_eq!(ask(&server, &message()).await.outcome(), "answered");
    assert_eq!(service.asked().iter().map(|asked| asked.nth).collect::<Vec<_>>(), [0, 0]);
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_whose_service_is_just_starting_is_answered() {
    let port = free_port();
    let site = Site::new();
    let server = up(&site, &format!("http://127.0.0.1:{port}/"), "").await;
    // Bound but not listening yet: connections are refused.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, 1], port).into()).unwrap();
    let webhook = message();
    let asked = async { ask(&server, &webhook).await.outcome().to_owned() };
    let started = async {
        eventually("the service was asked", || async {
            server.metric("streamgate_worker_calls_in_flight").await == 1.0
        })
        .await;
        let listener = socket.listen(8).unwrap();
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        while !request.ends_with(&webhook.body) {
            assert!(stream.read_buf(&mut request).await.unwrap() > 0);
        }
        tokio::io::AsyncWriteExt::write_all(&mut stream, &Raw::ok(ANSWER).bytes).await.unwrap();
        // Waits until the answer was read.
        drop(stream.read_buf(&mut request).await);
    };
    let outcome = tokio::select! {
        outcome = asked => outcome,
        () = async { started.await; std::future::pending().await } => unreachable!(),
    };
    assert_eq!(outcome, "answered");
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_behind_a_private_authority_is_trusted_by_forward_ca() {
    let (site, authority) = (Site::new(), Site::new());
    let (ca, cert, key) = certificates(&authority);
    let service = RawService::over_tls((&cert, &key), |_| Raw::ok(ANSWER)).await;
    let url = format!("https://{}/", service.address);
    let server = up(&site, &url, &format!(", ca = \"{ca}\"")).await;
    assert_eq!(ask(&server, &message()).await.outcome(), "answered");
    assert_eq!(send(server.public, &Webhook::fresh()).await.unwrap().status, 200);
    eventually("the event is handled", || async { settled(&server, "done").await == 1.0 }).await;
    // The service gets a certificate of another authority: the `ca` file is read again.
    let rotated = Site::new();
    let (other, cert, key) = certificates(&rotated);
    let second = RawService::over_tls((&cert, &key), |_| Raw::ok(ANSWER)).await;
    let configured = std::fs::read_to_string(site.config()).unwrap();
    site.write("streamgate.toml", configured.replace(&url, &format!("https://{}/", second.address)));
    eventually("the new service is not trusted", || async {
        ask(&server, &message()).await.outcome() == "hook_failed"
    })
    .await;
    std::fs::copy(&other, &ca).unwrap();
    eventually("the new service is trusted once its authority is", || async {
        ask(&server, &message()).await.outcome() == "answered"
    })
    .await;
    assert!(server.terminate().await.success());

    for (ca, expected) in [("/nowhere.pem", "cannot read the file /nowhere.pem"), (&*key, "holds no certificate")] {
        site.write("streamgate.toml", configured.replace(&authority.path("ca.pem").display().to_string(), ca));
        let checked = site.run(&["check"]).await;
        let errors = String::from_utf8(checked.stderr).unwrap();
        assert_eq!(checked.status.code(), Some(64), "{errors}");
        assert!(errors.contains("worker.routes[1].forward.ca") && errors.contains(expected), "{errors}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_name_what_keeps_a_service_from_being_called() {
    let (trusted, expired, named) = (Site::new(), Site::new(), Site::new());
    let (_, cert, key) = certificates(&trusted);
    let (old_ca, old_cert, old_key) = certificates_for(&expired, &["127.0.0.1"], 2001);
    let (other_ca, other_cert, other_key) = certificates_for(&named, &["example.com"], 2099);
    let private = RawService::over_tls((&cert, &key), |_| Raw::ok(ANSWER)).await;
    let outdated = RawService::over_tls((&old_cert, &old_key), |_| Raw::ok(ANSWER)).await;
    let misnamed = RawService::over_tls((&other_cert, &other_key), |_| Raw::ok(ANSWER)).await;
    let mail = RawService::start(|_| Raw::last("220 mail.example.com ESMTP\r\n")).await;
    let plain = Receiver::willing().await;
    let silent = RawService::start(|_| Raw::last("")).await;
    // A server that speaks first, as mail servers and databases do.
    let greeter = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let greeting = greeter.local_addr().unwrap();
    let _greeter = AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            let (mut stream, _) = greeter.accept().await.unwrap();
            let greeted = tokio::io::AsyncWriteExt::write_all(&mut stream, b"220 mail.example.com ESMTP\r\n").await;
            let mut rest = Vec::new();
            if greeted.is_ok() {
                drop(stream.read_to_end(&mut rest).await);
            }
        }
    }));
    let (gone, port) = (free_port(), private.address.port());
    let with = |ca: &str| format!(", ca = \"{ca}\"");
    let table = [
        (
            format!("http://127.0.0.1:{gone}/"),
            String::new(),
            "refused: cannot connect to the service at 127.0.0.1:",
            "connection refused",
        ),
        (
            "http://no-such-host.invalid/".into(),
            String::new(),
            "dns: cannot find the address of the service at no-such-host.invalid:80",
            "",
        ),
        (
            format!("https://127.0.0.1:{port}/"),
            String::new(),
            "by TLS: its certificate is of an unknown issuer",
            "`ca`",
        ),
        (format!("https://{}/", misnamed.address), with(&other_ca), "by TLS: its certificate is for another name", ""),
        (format!("https://{}/", outdated.address), with(&old_ca), "by TLS: its certificate has expired", ""),
        (format!("https://{}/", plain.address), String::new(), "does not speak TLS", "http"),
        (mail.url(), String::new(), "is not HTTP/1.1", ""),
        (format!("http://{greeting}/"), String::new(), "is not HTTP/1.1", ""),
        (format!("http://127.0.0.1:{port}/"), String::new(), "is not HTTP/1.1", ""),
        (silent.url(), String::new(), "broke before its reply", ""),
    ];
    for (url, more, first, second) in table {
        let site = Site::new();
        let server = up(&site, &url, &more).await;
        assert_eq!(send(server.public, &Webhook::fresh()).await.unwrap().status, 200);
        eventually("the event is a dead letter", || async { settled(&server, "dead").await == 1.0 }).await;
        let listed = site.run(&["dead", "list", "--json"]).await;
        let dead_letters: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
        let error = dead_letters[0]["error"].as_str().unwrap();
        assert!(error.contains(first) && error.contains(second), "{url}: {error}");
        assert_eq!(ask(&server, &message()).await.outcome(), "hook_failed", "{url}");
        site.logged(first).await;
        assert!(server.terminate().await.success());
    }
}
