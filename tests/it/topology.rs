//! Exchanges and queues: a wrong one is reported by name, and no event is answered 200 on a broken one.

use crate::harness::broker::Broker;
use crate::harness::eventually;
use crate::harness::process::{Server, Setup, Site};
use crate::harness::receiver::{Receiver, reply};
use crate::harness::servers::{Backends, certificates, free_port};
use crate::harness::wire::{Webhook, send};
use lapin::options::{ExchangeDeleteOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use std::time::{Duration, Instant};

/// A site on the shared backends, under a prefix of its own.
pub async fn site(more: &str, worker: &str, routes: &str) -> (Site, String, &'static Backends) {
    let (site, backends) = (Site::new(), Backends::shared().await);
    let prefix = site.name();
    let tables = backends.tables_with(&prefix, more);
    site.configure(&Setup { worker: worker.into(), rest: format!("{routes}\n{tables}"), ..Setup::default() });
    (site, prefix, backends)
}

async fn says(server: &Server, words: &[&str]) {
    eventually(&format!("/readyz says {words:?}"), || async {
        let (status, text) = server.ops("/readyz").await;
        status == 200
            && text.starts_with("ready, but events go to the spool")
            && words.iter().all(|word| text.contains(word))
    })
    .await;
}

/// Declares the topology of a site that may not declare it, as an operator's tool would; here a second service does.
pub async fn declared_by_an_operator(site: &Site) {
    let operator = Site::new();
    let declaring = std::fs::read_to_string(site.config()).unwrap().replace("declare = false", "declare = true");
    operator.write("streamgate.toml", declaring);
    drop(operator.start_as("worker").await.ready().await);
}

/// Runs `check` and returns its lines that begin with FAIL.
pub async fn failures(site: &Site) -> String {
    let checked = site.run(&["check"]).await;
    let output = String::from_utf8(checked.stdout).unwrap();
    let failed: Vec<_> = output.lines().filter(|line| line.starts_with("FAIL")).collect();
    assert_eq!(checked.status.code(), Some(if failed.is_empty() { 0 } else { 1 }), "{output}");
    failed.join("\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_with_other_arguments_is_reported_by_name_and_argument() {
    let (site, prefix, backends) = site("", "", "").await;
    let (_connection, channel) = backends.broker.channel().await;
    let events = format!("{prefix}.events");
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    arguments.insert("x-max-length-bytes".into(), AMQPValue::LongLongInt(1_000));
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(events.as_str().into(), options, arguments).await.unwrap();
    assert!(failures(&site).await.contains("inequivalent arg"));
    let gateway = site.start_as("gateway").await;
    says(&gateway, &["inequivalent arg", "x-", &events]).await;
    assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "spooled");
    channel.queue_delete(events.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    let gateway = gateway.ready().await;
    assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    assert_eq!(failures(&site).await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_permission_is_reported() {
    let (site, prefix, backends) = site("", "", "").await;
    let (user, vhost) = (format!("u{prefix}"), "%2f");
    let manage = async |method: &str, path: &str, body: &str| {
        backends.broker.manage(method, path, body).await;
    };
    manage("PUT", &format!("users/{user}"), r#"{"password":"secret","tags":""}"#).await;
    let url = backends.broker.url_of(&user, "secret", vhost);
    let configured = std::fs::read_to_string(site.config()).unwrap().replace(&backends.broker.url(), &url);
    site.write("streamgate.toml", &configured);
    assert!(failures(&site).await.contains("does not let user"));
    let permissions = format!("permissions/{vhost}/{user}");
    manage("PUT", &permissions, r#"{"configure":"^$","write":".*","read":".*"}"#).await;
    assert!(failures(&site).await.contains("ACCESS_REFUSED"));
    let gateway = site.start_as("gateway").await;
    says(&gateway, &["ACCESS_REFUSED", "rabbitmqctl set_permissions", &prefix]).await;
    assert!(!gateway.ops("/readyz").await.1.contains("secret"));
    manage("PUT", &permissions, r#"{"configure":".*","write":".*","read":".*"}"#).await;
    let gateway = gateway.ready().await;
    assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    // The whole topology exists now, but declaring it again still needs the permission.
    manage("PUT", &permissions, r#"{"configure":"^$","write":".*","read":".*"}"#).await;
    assert!(failures(&site).await.contains("ACCESS_REFUSED"));
    site.write("streamgate.toml", configured.replace("[rabbitmq]\n", "[rabbitmq]\ndeclare = false\n"));
    let failed = failures(&site).await;
    assert!(
        failed.lines().all(|line| line.contains(".retry.") || line.contains(".parked.")) && !failed.is_empty(),
        "only the worker's queues are missing: {failed}"
    );
    assert!(!site.log().contains("secret"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_of_rabbitmq_is_reported_as_a_limit() {
    let (site, prefix, backends) = site("", "", "").await;
    let manage = async |method: &str, path: &str, body: &str| {
        backends.broker.manage(method, path, body).await;
    };
    manage("PUT", &format!("vhosts/{prefix}"), "").await;
    let url = backends.broker.url_of("guest", "guest", &prefix);
    let configured = std::fs::read_to_string(site.config()).unwrap().replace(&backends.broker.url(), &url);
    site.write("streamgate.toml", configured);
    manage("PUT", &format!("vhost-limits/{prefix}/max-queues"), r#"{"value":1}"#).await;
    let gateway = site.start_as("gateway").await;
    says(&gateway, &["queue limit in vhost", "set_vhost_limits"]).await;
    assert!(!gateway.ops("/readyz").await.1.contains("delete it when it is empty"));
    manage("DELETE", &format!("vhost-limits/{prefix}/max-queues"), "").await;
    let gateway = gateway.ready().await;
    assert!(gateway.terminate().await.success());
    manage("PUT", &format!("vhost-limits/{prefix}/max-connections"), r#"{"value":0}"#).await;
    let failed = failures(&site).await;
    assert!(failed.contains("connection limit") && failed.contains("set_vhost_limits"), "{failed}");
    assert!(!failed.contains("add_vhost"), "{failed}");
    manage("DELETE", &format!("vhosts/{prefix}"), "").await;
}

/// Makes the site's services log in as a user of their own. Returns the path of the user's permissions.
async fn user(site: &Site, prefix: &str, backends: &Backends, permissions: &str) -> String {
    let user = format!("u{prefix}");
    backends.broker.manage("PUT", &format!("users/{user}"), r#"{"password":"secret","tags":""}"#).await;
    let path = format!("permissions/%2f/{user}");
    backends.broker.manage("PUT", &path, permissions).await;
    let url = backends.broker.url_of(&user, "secret", "%2f");
    let configured = std::fs::read_to_string(site.config()).unwrap().replace(&backends.broker.url(), &url);
    site.write("streamgate.toml", configured);
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn events_need_no_permission_outside_the_prefix_and_check_names_the_one_for_hooks() {
    let service = Receiver::start(|one| match (one.header("x-webhook-id"), one.header("x-streamgate-attempt")) {
        ("dead", _) => reply(422, &[]),
        (_, "1") => reply(503, &[]),
        _ => reply(200, &[]),
    })
    .await;
    let (site, prefix, backends) = site("", "retry = [\"200ms\"]", &service.route()).await;
    let ours = format!("^{prefix}");
    let permissions = format!(r#"{{"configure":"{ours}","write":"{ours}","read":"{ours}"}}"#);
    user(&site, &prefix, backends, &permissions).await;
    let warns = async || {
        let checked = site.run(&["check"]).await;
        let text = String::from_utf8(checked.stdout).unwrap();
        let warned = text.lines().any(|line| line.starts_with("warn") && line.contains("amq.default"));
        assert!(checked.status.success() && warned && text.contains("set_permissions"), "{text}");
    };
    warns().await;
    let gateway = site.start_as("gateway").await.ready().await;
    let worker = site.start_as("worker").await.ready().await;
    warns().await;
    for id in ["retried", "dead"] {
        let webhook = Webhook::push(id, format!(r#"{{"type":"a.b","id":"{id}"}}"#));
        assert_eq!(send(gateway.public, &webhook).await.unwrap().outcome(), "enqueued");
    }
    eventually("one event is done and the other is dead", || async {
        worker.metric("streamgate_worker_deliveries_total{outcome=\"done\",route=\"app\"}").await == 1.0
            && worker.metric("streamgate_worker_deliveries_total{outcome=\"dead\",route=\"app\"}").await == 1.0
    })
    .await;
    let replayed = site.run(&["dead", "replay", "--all"]).await;
    assert!(replayed.status.success(), "{replayed:?}");
    assert!(!site.log().contains("ACCESS_REFUSED"), "{}", site.log());
    // With a hook configured this is a failure: the hook's service could never answer.
    let configured = std::fs::read_to_string(site.config()).unwrap();
    let hook = "[hooks.before_message_send]\nforward = { url = \"http://127.0.0.1:1/\" }\n";
    site.write("streamgate.toml", format!("{configured}\n{hook}"));
    assert!(failures(&site).await.contains("amq.default"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_settlement_backs_off_and_check_names_it() {
    let service = Receiver::start(|one| match one.header("x-streamgate-attempt") {
        "1" => reply(503, &[]),
        _ => reply(200, &[]),
    })
    .await;
    let route = service.route().replace("forward", "breaker = false\nforward");
    let (site, prefix, backends) = site("", "retry = [\"200ms\"]", &route).await;
    let everything = r#"{"configure":".*","write":".*","read":".*"}"#;
    let path = user(&site, &prefix, backends, everything).await;
    let gateway = site.start_as("gateway").await.ready().await;
    let worker = site.start_as("worker").await.ready().await;
    // RabbitMQ caches a permission for the life of a channel, so only a new connection sees the change.
    let refused = format!(
        r#"{{"configure":".*","write":"^({prefix}|{prefix}\\.(events|dead|back|calls|unrouted))$","read":".*"}}"#
    );
    assert!(worker.terminate().await.success());
    backends.broker.manage("PUT", &path, &refused).await;
    let failed = failures(&site).await;
    assert!(failed.contains(&format!("{prefix}.retry.200")) && failed.contains("set_permissions"), "{failed}");
    site.write(
        "streamgate.toml",
        std::fs::read_to_string(site.config()).unwrap().replace("[rabbitmq]\n", "[rabbitmq]\ndeclare = false\n"),
    );
    let worker = site.start_as("worker").await.ready().await;
    for _ in 0..50 {
        assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    }
    eventually("the refusal is in the log", || async { site.log().contains("ACCESS_REFUSED") }).await;
    eventually("all were tried", || async { service.ids().len() == 50 }).await;
    backends.broker.manage("PUT", &path, everything).await;
    eventually("all are done", || async {
        worker.metric("streamgate_worker_deliveries_total{outcome=\"done\",route=\"app\"}").await == 50.0
    })
    .await;
    assert_eq!(service.received().len(), 100, "no event was delivered again in the meantime");
    let lines = site.log().matches("cannot publish settlements").count();
    assert!((1..=2).contains(&lines), "one line a minute, not one for each event: {lines}");
}

#[tokio::test(flavor = "multi_thread")]
async fn declare_false_declares_nothing_and_verifies_the_whole_topology() {
    let (theirs, prefix, backends) = site("declare = false", "retry = [\"1s\"]", "").await;
    let gateway = theirs.start_as("gateway").await;
    says(&gateway, &[&format!("the exchange {prefix} does not exist"), &format!("the queue {prefix}.events")]).await;
    assert!(failures(&theirs).await.contains(&format!("the queue {prefix}.retry.1000 does not exist")));
    let queues = backends.broker.manage("GET", "queues", "").await;
    assert!(!queues.contains(&format!("\"{prefix}.")), "nothing was declared");
    declared_by_an_operator(&theirs).await;
    let gateway = gateway.ready().await;
    assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    assert_eq!(failures(&theirs).await, "");
    // An alternate exchange that leads nowhere would swallow confirmed events.
    let unrouted = format!("{prefix}.unrouted");
    let (_connection, channel) = backends.broker.channel().await;
    let nothing = FieldTable::default();
    let (queue, exchange) = (unrouted.as_str().into(), unrouted.as_str().into());
    channel.queue_unbind(queue, exchange, "".into(), nothing).await.unwrap();
    assert!(failures(&theirs).await.contains("is bound to no queue"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_alternate_exchange_is_noticed_with_the_first_unroutable_event() {
    let (site, prefix, backends) = site("", "", "").await;
    let gateway = site.start_as("gateway").await.ready().await;
    let (_connection, channel) = backends.broker.channel().await;
    let (events, unrouted) = (format!("{prefix}.events"), format!("{prefix}.unrouted"));
    // Without both, RabbitMQ confirms events and throws them away. The queue stays: the gateway reads its depth every 5 seconds, and
    // would declare a missing one anew before the event comes.
    let (queue, exchange) = (events.as_str().into(), prefix.as_str().into());
    channel.queue_unbind(queue, exchange, "*.push.#".into(), FieldTable::default()).await.unwrap();
    channel.exchange_delete(unrouted.as_str().into(), ExchangeDeleteOptions::default()).await.unwrap();
    assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "spooled");
    assert!(gateway.metric("streamgate_gateway_returned_total").await >= 1.0);
    // The queue and the exchange are declared again, for this event and the next.
    let gateway = gateway.ready().await;
    eventually("the event is handed over", || async { gateway.metric("streamgate_spool_released_total").await == 1.0 })
        .await;
    let webhook = Webhook::fresh();
    assert_eq!(send(gateway.public, &webhook).await.unwrap().outcome(), "enqueued");
    assert_eq!(backends.broker.ready(&events).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn check_says_what_is_wrong_with_each_backend() {
    let (broker, redis) = (&Backends::shared().await.broker, &Backends::shared().await.redis);
    let wrong = [
        ("amqp://guest:guest@127.0.0.1:1/%2f".to_owned(), "Connection refused"),
        (broker.url_of("guest", "hunter2", "%2f"), "refuses the login of user \"guest\""),
        (broker.url_of("guest", "guest", "nowhere"), "vhost nowhere not found"),
        (format!("amqp://guest:guest@127.0.0.1:{}/%2f", redis.port), "no answer in AMQP"),
        (broker.url().replace("amqp:", "amqps:"), "TLS with RabbitMQ"),
        ("amqp://guest:guest@no.host.invalid/%2f".to_owned(), "cannot reach RabbitMQ"),
    ];
    let checks = wrong.into_iter().map(|(url, expected)| async move {
        let site = Site::new();
        site.configure(&Setup {
            rest: format!("[rabbitmq]\nurl = \"{url}\"\n[redis]\nurl = \"redis://127.0.0.1:1\""),
            ..Setup::default()
        });
        let failed = failures(&site).await;
        assert!(
            failed.contains(expected) && failed.contains("redis: cannot use Redis at 127.0.0.1:1"),
            "{url}: {failed}"
        );
        assert!(!failed.contains("hunter2"), "{failed}");
    });
    futures_util::future::join_all(checks).await;
    for (url, expected) in [
        (format!("redis://:hunter2@127.0.0.1:{}", redis.port), "check user and password"),
        (format!("redis://127.0.0.1:{}", broker.port), "is it a Redis"),
    ] {
        let site = Site::new();
        site.configure(&Setup {
            rest: format!("[rabbitmq]\nurl = \"{}\"\n[redis]\nurl = \"{url}\"", broker.url()),
            ..Setup::default()
        });
        let failed = failures(&site).await;
        assert!(failed.contains(expected) && !failed.contains("hunter2"), "{failed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_reaches_rabbitmq_over_tls_with_a_private_authority() {
    let site = Site::new();
    let (ca, cert, key) = certificates(&site);
    let port = free_port();
    let broker = Broker::with(&format!(
        "listeners.ssl.default = 127.0.0.1:{port}\nssl_options.cacertfile = {ca}\nssl_options.certfile = {cert}\n\
         ssl_options.keyfile = {key}\nssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = true"
    ))
    .await;
    let redis = &Backends::shared().await.redis;
    let url = broker.url().replace("amqp:", "amqps:").replace(&broker.port.to_string(), &port.to_string());
    let configure = |files: &str| {
        let tables = format!("[rabbitmq]\nurl = \"{url}\"\n{files}\n[redis]\nurl = \"{}\"", redis.url());
        site.configure(&Setup { rest: tables, ..Setup::default() });
    };
    configure("");
    assert!(failures(&site).await.contains("is its authority in rabbitmq.ca"));
    let files = format!("ca = \"{ca}\"\ncert = \"{cert}\"\nkey = \"{key}\"");
    configure(&files);
    assert_eq!(failures(&site).await, "");
    let gateway = site.start_as("gateway").await.ready().await;
    assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_after_longer_than_the_ladder_is_observed() {
    let asked = Duration::from_secs(2);
    let service = Receiver::start(|one| match one.header("x-streamgate-attempt") {
        "1" => reply(503, &[("retry-after", "2")]),
        _ => reply(200, &[]),
    })
    .await;
    let (site, _prefix, _backends) = site("", "retry = [\"200ms\"]", &service.route()).await;
    let gateway = site.start_as("gateway").await.ready().await;
    let _worker = site.start_as("worker").await.ready().await;
    let started = Instant::now();
    assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    eventually("the event is tried again", || async { service.received().len() == 2 }).await;
    assert!(started.elapsed() >= asked, "{:?}", started.elapsed());
    assert_eq!(service.received()[1].header("x-streamgate-attempt"), "2");
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_listed_in_order_and_left_as_they_were() {
    let service = Receiver::start(|_| reply(422, &[])).await;
    let (site, prefix, backends) = site("", "concurrency = 1\nretry = [\"1s\"]", &service.route()).await;
    let gateway = site.start_as("gateway").await.ready().await;
    let worker = site.start_as("worker").await.ready().await;
    // More dead letters than one channel of a walk over the queue holds.
    let count = 620;
    for number in 0..count {
        let body = format!(r#"{{"type":"{}","n":{number}}}"#, if number % 100 == 0 { "rare" } else { "common" });
        let webhook = Webhook::push(&format!("id-{number}"), body);
        assert_eq!(send(gateway.public, &webhook).await.unwrap().outcome(), "enqueued");
    }
    let dead = format!("{prefix}.dead");
    eventually("all events are dead", || async { backends.broker.ready(&dead).await == count }).await;
    let ids = async |args: &[&str]| -> Vec<String> {
        let listed = site.run(&[&["dead", "list", "--json"], args].concat()).await;
        assert!(listed.status.success(), "{listed:?}");
        let dead_letters: Vec<serde_json::Value> = serde_json::from_slice(&listed.stdout).unwrap();
        dead_letters.iter().map(|dead_letter| dead_letter["id"].as_str().unwrap().to_owned()).collect()
    };
    let all: Vec<_> = (0..count).map(|number| format!("id-{number}")).collect();
    assert_eq!(ids(&[]).await, all);
    assert!(ids(&[]).await == all, "listing changes nothing");
    assert_eq!(ids(&["--type", "rare"]).await.len(), 7);
    let shown = site.run(&["dead", "show", "id-619", "--body", "--json"]).await;
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!((shown["reason"].as_str(), shown["attempts"].as_u64()), (Some("rejected"), Some(1)));
    assert_eq!(shown["body"], r#"{"type":"common","n":619}"#);
    let number = shown["number"].as_str().unwrap().to_owned();
    assert!(worker.terminate().await.success());
    let changed = site.run(&["dead", "drop", &number, "id-3", "--json"]).await;
    assert_eq!(String::from_utf8_lossy(&changed.stdout).trim(), "{\"dropped\":2}");
    let changed = site.run(&["dead", "replay", "--type", "rare", "--json"]).await;
    assert_eq!(String::from_utf8_lossy(&changed.stdout).trim(), "{\"replayed\":7}");
    let left: Vec<_> =
        (0..count).filter(|n| n % 100 != 0 && ![3, 619].contains(n)).map(|number| format!("id-{number}")).collect();
    let found = ids(&[]).await;
    let differs = found.iter().zip(&left).position(|(one, other)| one != other);
    assert!(
        found == left,
        "the others keep their order; {} of {}, from {differs:?} on: {:?}",
        found.len(),
        left.len(),
        differs.map(|at| &found[at..found.len().min(at + 8)])
    );
    assert_eq!(backends.broker.ready(&format!("{prefix}.events")).await, 7);
    let unknown = site.run(&["dead", "drop", "id-3"]).await;
    assert_eq!(unknown.status.code(), Some(1), "{unknown:?}");
}
