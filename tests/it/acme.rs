//! A certificate that a gateway gets for itself, from Let's Encrypt's own test server.

use crate::harness::pebble::{Manners, Pebble};
use crate::harness::process::{Server, Setup, Site};
use crate::harness::servers::Backends;
use crate::harness::wire::{Transport, Webhook, tls};
use crate::harness::{eventually, within};
use rustix::process::Signal;
use rustls_pki_types::CertificateDer;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::TcpStream;

/// A site whose gateway gets its certificate from this Pebble.
fn site(pebble: &Pebble, domains: &str, rest: &str) -> Site {
    let site = Site::new();
    configure(&site, pebble, domains, rest);
    site
}

fn configure(site: &Site, pebble: &Pebble, domains: &str, rest: &str) {
    let rest = format!("{}{rest}", pebble.tls(domains));
    site.configure(&Setup { listen: pebble.address(), rest, ..Setup::default() });
}

/// Whether the gateway takes signed webhooks, over HTTP/1.1 and HTTP/2, from a client that trusts this root.
async fn is_taken(server: &Server, root: &CertificateDer<'static>) -> bool {
    for http2 in [false, true] {
        let transport = Transport::Tls { root: root.clone(), http2 };
        match transport.send(server.public, &Webhook::fresh()).await {
            Ok(answer) => assert_eq!(answer.status, 200),
            Err(_) => return false,
        }
    }
    true
}

/// The certificate that is served, without its chain.
async fn served(server: &Server, root: &CertificateDer<'static>) -> Option<CertificateDer<'static>> {
    let stream = TcpStream::connect(server.public).await.unwrap();
    let stream = tls(stream, root, b"h2").await.ok()?;
    Some(stream.get_ref().1.peer_certificates()?.first()?.clone().into_owned())
}

async fn has_certificate(server: &Server) {
    eventually("the gateway has a certificate", || async { server.ops("/readyz").await.0 == 200 }).await;
}

/// Everything under a directory.
fn entries(directory: &Path) -> Vec<PathBuf> {
    let found = directory.read_dir().unwrap().map(|entry| entry.unwrap().path());
    found
        .flat_map(|path| if path.is_dir() { [vec![path.clone()], entries(&path)].concat() } else { vec![path] })
        .collect()
}

fn kept(site: &Site, name: &str) -> Option<String> {
    let found = entries(&site.data_dir().join("acme")).into_iter().find(|path| path.ends_with(name))?;
    std::fs::read_to_string(found).ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_gets_its_certificate_and_renews_it_while_it_serves() {
    // Almost a third of the nonces is refused: an order takes about ten, and the next attempt begins at once.
    let manners = Manners { validity_seconds: 36, refused_nonces: 30, ..Manners::default() };
    let pebble = Pebble::start(manners).await;
    let backends = Backends::shared().await;
    let prefix = Site::new().name();
    let site = site(&pebble, "[\"localhost\", \"hooks.example.com\"]", &backends.tables(&prefix));
    let server = site.start_as("gateway").await;
    has_certificate(&server).await;
    let root = pebble.root().await;
    assert!(is_taken(&server, &root).await, "{}", site.log());
    let first = served(&server, &root).await.unwrap();
    let expiry = server.metric("streamgate_tls_certificate_expiry_timestamp_seconds").await;
    assert!(expiry > 1.7e9);
    for path in entries(&site.data_dir().join("acme")) {
        let expected = if path.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, expected, "{}", path.display());
    }
    let renewed = || async { served(&server, &root).await.is_some_and(|now| now != first) };
    within(Duration::from_secs(120), "another certificate is served", renewed).await;
    assert!(is_taken(&server, &root).await, "{}", site.log());
    assert!(server.metric("streamgate_tls_certificate_expiry_timestamp_seconds").await > expiry);
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_served_on_while_no_other_can_be_had() {
    let mut pebble = Pebble::start(Manners::default()).await;
    let site = site(&pebble, "[\"localhost\"]", "");
    let server = site.start().await;
    has_certificate(&server).await;
    let root = pebble.root().await;
    let account = kept(&site, "account.pem").unwrap();
    pebble.kill();
    // One more name, which the present certificate does not cover.
    configure(&site, &pebble, "[\"localhost\", \"hooks.example.com\"]", "");
    server.signal(Signal::HUP);
    eventually("the failure is logged", || async { site.log().contains("cannot get a certificate") }).await;
    let (status, text) = server.ops("/readyz").await;
    assert!(status == 200 && text.contains("is not renewed: cannot ask localhost"), "{text}");
    assert!(is_taken(&server, &root).await, "{}", site.log());
    // Back to the old name, which the present certificate covers.
    configure(&site, &pebble, "[\"localhost\"]", "");
    server.signal(Signal::HUP);
    let ready = || async { server.ops("/readyz").await.1 == "ready\n" };
    eventually("/readyz names nothing missing", ready).await;
    // The authority is back, and has forgotten the account.
    pebble.restart(Manners::default()).await;
    configure(&site, &pebble, "[\"localhost\", \"hooks.example.com\"]", "");
    server.signal(Signal::HUP);
    let root = pebble.root().await;
    eventually("the new certificate is served", || is_taken(&server, &root)).await;
    assert_eq!(kept(&site, "account.pem").unwrap(), account);
    eventually("/readyz names nothing missing", ready).await;
    // An account that was closed is replaced.
    pebble.deactivate(&account).await;
    configure(&site, &pebble, "[\"localhost\", \"other.example.com\"]", "");
    server.signal(Signal::HUP);
    eventually("another account is made", || async { kept(&site, "account.pem").unwrap() != account }).await;
    let certificates = || async { site.log().matches("got a certificate").count() };
    eventually("a third certificate is issued", || async { certificates().await == 3 }).await;
    assert!(is_taken(&server, &root).await, "{}", site.log());
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_killed_during_its_order_gets_its_certificate_after_the_restart() {
    let mut pebble = Pebble::start(Manners { sleep_seconds: 15, ..Manners::default() }).await;
    let site = site(&pebble, "[\"localhost\"]", "");
    let server = site.start().await;
    eventually("the order is made", || async { pebble.log().contains("There are now 1 authorizations") }).await;
    let account = kept(&site, "account.pem").expect("the account is kept before it is used");
    server.kill().await;
    assert!(kept(&site, "certificate.pem").is_none());
    let server = site.start().await;
    has_certificate(&server).await;
    let root = pebble.root().await;
    assert!(is_taken(&server, &root).await, "{}", site.log());
    assert_eq!(kept(&site, "account.pem").unwrap(), account, "one account is enough");
    assert!(pebble.log().contains("There are now 1 accounts") && !pebble.log().contains("There are now 2 accounts"));
    // A kept certificate is served at once, without the authority.
    let certificate = served(&server, &root).await;
    server.kill().await;
    pebble.kill();
    let server = site.start().await;
    assert_eq!(server.ops("/readyz").await.0, 200);
    assert_eq!(served(&server, &root).await, certificate);
    assert!(server.terminate().await.success());
    // A file that is not a certificate is replaced.
    let file = entries(&site.data_dir().join("acme")).into_iter().find(|path| path.ends_with("certificate.pem"));
    std::fs::write(file.unwrap(), [0xff; 100]).unwrap();
    pebble.restart(Manners::default()).await;
    let server = site.start().await;
    let root = pebble.root().await;
    eventually("another certificate is served", || is_taken(&server, &root)).await;
    site.logged("a damaged file is ignored and will be replaced").await;
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_the_authority_cannot_reach_is_reported_with_what_to_do() {
    let mut pebble = Pebble::start(Manners::default()).await;
    let site = Site::new();
    // The gateway does not listen at the port where challenges are checked.
    site.configure(&Setup { rest: pebble.tls("[\"localhost\"]"), ..Setup::default() });
    let checked = site.run(&["check"]).await;
    let text = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(checked.status.success(), "{text}");
    for expected in [
        "ok    gateway.tls: localhost: no certificate yet; https://localhost:",
        "warn  gateway.tls.acme: one gateway for each name",
        "warn  gateway.listen: the authority connects to port 443 of localhost: forward that",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    assert!(!site.data_dir().exists(), "`check` creates nothing");
    let server = site.start().await;
    eventually("the refusal is logged", || async { site.log().contains("cannot get a certificate") }).await;
    let (status, text) = server.ops("/readyz").await;
    assert!(status == 503 && text.contains("must reach this gateway at port 443 of each name"), "{text}");
    assert!(text.contains("localhost: Failed to connect to 127.0.0.1"), "{text}");
    assert!(!is_taken(&server, &pebble.root().await).await, "there is no certificate to serve");
    assert!(server.terminate().await.success());
    // A restarted gateway does not ask again at once: authorities count refusals.
    let server = site.start().await;
    let waits = || async { site.log().contains("the last attempt to get a certificate failed") };
    eventually("the gateway waits", waits).await;
    assert!(server.ops("/readyz").await.1.contains("must reach this gateway at port 443"));
    assert_eq!(site.log().matches("cannot get a certificate").count(), 1, "{}", site.log());
    // SIGHUP makes it ask at once.
    server.signal(Signal::HUP);
    let asked = || async { site.log().matches("cannot get a certificate").count() == 2 };
    eventually("the authority is asked again", asked).await;
    assert!(server.terminate().await.success());
    // `check` with an authority that is down.
    pebble.kill();
    let checked = site.run(&["check"]).await;
    let text = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(text.contains("FAIL  gateway.tls: https://localhost:") && text.contains("cannot ask localhost"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_account_is_made_without_a_directory_to_keep_it() {
    let pebble = Pebble::start(Manners::default()).await;
    let site = site(&pebble, "[\"localhost\"]", "");
    // A file in place of the directory.
    std::fs::create_dir(site.data_dir()).unwrap();
    std::fs::write(site.data_dir().join("acme"), "").unwrap();
    let server = site.start().await;
    eventually("the failure is logged", || async { site.log().contains("cannot get a certificate") }).await;
    let (status, text) = server.ops("/readyz").await;
    assert!(status == 503 && text.contains("check the data directory and its permissions"), "{text}");
    assert!(!pebble.log().contains("There are now 1 accounts"), "{}", pebble.log());
    assert!(server.terminate().await.success());
}
