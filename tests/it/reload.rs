//! Apps, certificates, routes and hooks are read again on SIGHUP and when a file changes; a bad file leaves the old ones in use.

use crate::harness::eventually;
use crate::harness::process::{Server, Setup, Site};
use crate::harness::receiver::Receiver;
use crate::harness::servers::Backends;
use crate::harness::wire::{API_KEY, Transport, Webhook, send};
use crate::statuses::secure;
use rcgen::generate_simple_self_signed;
use rustix::process::Signal;
use streamgate_core::signature::SigningKey;

fn signed_with(secret: &str) -> Webhook {
    let webhook = Webhook::fresh();
    let signature = SigningKey::new(secret.as_bytes()).sign(&webhook.body).to_hex();
    webhook.set("x-signature", &signature)
}

async fn status(server: &Server, secret: &str) -> u16 {
    send(server.public, &signed_with(secret)).await.unwrap().status.as_u16()
}

fn config(site: &Site, key: &str) -> String {
    let setup = Setup::default().toml(&site.data_dir());
    let (_, rest) = setup.split_once("[gateway]").unwrap();
    let secret = site.path("secret");
    format!(
        "[[apps]]\nname = \"chat\"\nkeys = [{{ api_key = \"{key}\", secrets = [\"file:{}\"] }}]\n[gateway]{rest}",
        secret.display()
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_and_apps_are_read_again() {
    let site = Site::new();
    site.write("secret", "first");
    site.write("streamgate.toml", config(&site, API_KEY));
    let server = site.start().await;
    assert_eq!((status(&server, "first").await, status(&server, "second").await), (200, 401));
    // A secret file that changes is enough.
    site.write("secret", "second");
    eventually("the new secret verifies", || async { status(&server, "second").await == 200 }).await;
    assert_eq!(status(&server, "first").await, 401);
    // A configuration with a mistake changes nothing, and the log says so.
    site.write("streamgate.toml", config(&site, API_KEY).replace("[store]", "[shop]"));
    server.signal(Signal::HUP);
    eventually("the mistake is logged", || async { site.log().contains("not reloaded") }).await;
    assert!(site.log().contains("shop: unknown key"), "{}", site.log());
    assert_eq!(status(&server, "second").await, 200);
    // A removed key is unknown.
    site.write("streamgate.toml", config(&site, "another"));
    server.signal(Signal::HUP);
    eventually("the old key is unknown", || async { status(&server, "second").await == 401 }).await;
    let moved = signed_with("second").set("x-api-key", "another");
    assert_eq!(send(server.public, &moved).await.unwrap().status, 200);
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_read_again() {
    let site = Site::new();
    let (server, transports) = secure(&site, Setup::default()).await;
    let reach = |transport: Transport| {
        let server = &server;
        async move { transport.send(server.public, &Webhook::fresh()).await.is_ok_and(|answer| answer.status == 200) }
    };
    assert!(reach(transports[0].clone()).await);
    // With a key that does not match, the old certificate stays in use.
    let renewed = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    site.write("key.pem", renewed.signing_key.serialize_pem());
    eventually("the mismatch is logged", || async { site.log().contains("not reloaded") }).await;
    assert!(reach(transports[0].clone()).await);
    site.write("cert.pem", renewed.cert.pem());
    for http2 in [false, true] {
        let renewed = Transport::Tls { root: renewed.cert.der().clone(), http2 };
        eventually("the new certificate is served", || reach(renewed.clone())).await;
    }
    assert!(!reach(transports[0].clone()).await, "the old certificate is no longer served");
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_certificate_does_not_keep_secrets_from_reloading() {
    let site = Site::new();
    site.write("secret", "first");
    let made = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (cert, key) =
        (site.write("cert.pem", made.cert.pem()), site.write("key.pem", made.signing_key.serialize_pem()));
    let tls = format!("\n[gateway.tls]\ncert = \"{}\"\nkey = \"{}\"\n", cert.display(), key.display());
    site.write("streamgate.toml", config(&site, API_KEY) + &tls);
    let server = site.start().await;
    let transport = Transport::Tls { root: made.cert.der().clone(), http2: true };
    let status = |secret: &'static str| {
        let (server, transport) = (&server, &transport);
        async move { transport.send(server.public, &signed_with(secret)).await.unwrap().status.as_u16() }
    };
    assert_eq!(status("first").await, 200);
    site.write("cert.pem", "noise");
    site.write("secret", "second");
    eventually("the new secret verifies", || async { status("second").await == 200 }).await;
    site.logged("certificates are not reloaded").await;
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_reloads_its_routes_and_survives_sighup() {
    let (backends, service) = (Backends::shared().await, Receiver::willing().await);
    let site = Site::new();
    let token = site.write("token", "first");
    let route_with = |events: &str, keys: &str| {
        let headers = format!("headers = {{ Authorization = \"file:{}\" }}", token.display());
        let forward = format!("forward = {{ url = \"{}\", {headers} }}", service.url());
        let rest = format!("[[worker.routes]]\nname = \"app\"\nevents = [\"{events}\"]\n{keys}\n{forward}\n");
        site.configure(&Setup { rest: rest + &backends.tables(&site.name()), ..Setup::default() });
    };
    let route = |events: &str| route_with(events, "");
    route("*");
    let gateway = site.start_as("gateway").await.ready().await;
    let worker = site.start_as("worker").await.ready().await;
    let tokens = || service.received().iter().map(|one| one.header("authorization").to_owned()).collect::<Vec<_>>();
    let sent = async |token: &str| {
        assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().status, 200);
        eventually("the event is handled", || async { tokens().last().is_some_and(|last| last == token) }).await;
    };
    sent("first").await;
    // A file that changes is enough.
    site.write("token", "second");
    site.logged("reloaded routes").await;
    sent("second").await;
    // A wrong configuration changes nothing, and does not end the worker.
    route("[");
    worker.signal(Signal::HUP);
    site.logged("not reloaded: the running configuration stays").await;
    sent("second").await;
    // A configuration without routes is refused: every event would be logged and acknowledged.
    site.configure(&Setup { rest: backends.tables(&site.name()), ..Setup::default() });
    worker.signal(Signal::HUP);
    site.logged("has no route any more").await;
    sent("second").await;
    // Values that the start would have refused, or that it prepares for.
    for (keys, said) in [
        ("handler_timeout = \"20m\"", "must be under 15m with RabbitMQ"),
        ("handler_timeout = \"40s\"", "over the longest at the start"),
        ("retry = [\"7s\"]", "a new step of a retry ladder"),
    ] {
        route_with("reaction.*", keys);
        worker.signal(Signal::HUP);
        site.logged(said).await;
        sent("second").await;
    }
    // A signal alone applies another route, too.
    route("reaction.*");
    worker.signal(Signal::HUP);
    let handled = tokens().len();
    eventually("the route takes other events", || async {
        assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().status, 200);
        worker.metric("streamgate_worker_deliveries_total{outcome=\"unmatched\",route=\"none\"}").await > 0.0
    })
    .await;
    assert!(tokens().len() >= handled);
    for server in [gateway, worker] {
        assert!(server.terminate().await.success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_of_the_backends_that_are_rotated_are_taken_with_the_next_connection() {
    let (site, backends, service) = (Site::new(), Backends::shared().await, Receiver::willing().await);
    let (broker, redis, user) = (&backends.broker, &backends.redis, format!("u{}", site.name()));
    let manage = async |password: &str| {
        let body = format!(r#"{{"password":"{password}","tags":""}}"#);
        broker.manage("PUT", &format!("users/{user}"), &body).await;
        redis.ask(&["ACL", "SETUSER", &user, "on", "resetpass", &format!(">{password}"), "~*", "&*", "+@all"]).await;
    };
    let write = |password: &str| {
        site.write("rabbitmq.url", broker.url_of(&user, password, "%2f"));
        site.write("redis.url", redis.url().replace("redis://", &format!("redis://{user}:{password}@")));
    };
    manage("first").await;
    let everything = r#"{"configure":".*","write":".*","read":".*"}"#;
    broker.manage("PUT", &format!("permissions/%2f/{user}"), everything).await;
    write("first");
    let file = |name: &str| format!("file:{}", site.path(name).display());
    let tables = backends.tables(&site.name());
    let tables = tables.replace(&broker.url(), &file("rabbitmq.url")).replace(&redis.url(), &file("redis.url"));
    site.configure(&Setup { rest: format!("{}\n{tables}", service.route()), ..Setup::default() });
    let gateway = site.start_as("gateway").await.ready().await;
    let worker = site.start_as("worker").await.ready().await;
    let up = async || {
        gateway.ops("/readyz").await.1.trim() == "ready"
            && gateway.metric("streamgate_gateway_redis_up").await == 1.0
            && worker.metric("streamgate_worker_broker_up").await == 1.0
            && worker.metric("streamgate_worker_redis_up").await == 1.0
    };
    eventually("both are connected", || async { up().await }).await;
    manage("second").await;
    write("second");
    for part in ["RabbitMQ's address", "Redis's address"] {
        let text = format!("reloaded {part}");
        let second = format!(", {part}");
        eventually("both have read it", || async {
            site.log().matches(text.as_str()).count() + site.log().matches(second.as_str()).count() >= 2
        })
        .await;
    }
    // Open connections stay open; only the next one needs the new password.
    broker.manage("DELETE", &format!("connections/username/{user}"), "").await;
    redis.ask(&["CLIENT", "KILL", "USER", &user]).await;
    let ids = ["one", "two"];
    for id in ids {
        let webhook = Webhook::push(id, format!(r#"{{"type":"a.b","id":"{id}"}}"#));
        assert_eq!(send(gateway.public, &webhook).await.unwrap().status, 200);
    }
    eventually("both are connected again", || async { up().await }).await;
    eventually("all are handled", || async { service.ids().len() == ids.len() }).await;
    assert!(!site.log().contains("first") && !site.log().contains("second"), "no password is in the log");
}
