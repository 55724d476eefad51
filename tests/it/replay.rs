//! Dead letters that are replayed or dropped: whatever interrupts the command, each dead letter is in one place, and the next
//! run goes on.

use crate::harness::eventually;
use crate::harness::process::{Setup, Site};
use crate::harness::proxy::Proxy;
use crate::harness::receiver::Receiver;
use crate::topology::site;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel};
use rustix::process::{Pid, Signal, kill_process};
use std::process::{Output, Stdio};

/// Puts dead letters into their queue, as workers do.
async fn publish_dead_letters(channel: &Channel, prefix: &str, count: i64) {
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let mut confirms = Vec::new();
    for number in 0..count {
        let mut headers = FieldTable::default();
        let died_at = jiff::Timestamp::from_microsecond(1_775_658_215_000_000 + number).unwrap();
        for (name, value) in [
            ("x-streamgate-key", format!("chat:push:{number}")),
            ("x-streamgate-reason", "rejected".to_owned()),
            ("x-streamgate-died-at", died_at.to_string()),
            ("x-streamgate-received-at", died_at.to_string()),
        ] {
            headers.insert(name.into(), AMQPValue::LongString(value.into()));
        }
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_message_id(format!("id-{number}").into())
            .with_headers(headers);
        let event_type = if number % 2 == 0 { "even" } else { "odd" };
        let (exchange, key) = (format!("{prefix}.dead").into(), format!("chat.push.{event_type}").into());
        let options = BasicPublishOptions::default();
        confirms.push(channel.basic_publish(exchange, key, options, b"{}", properties).await.unwrap());
    }
    futures_util::future::try_join_all(confirms).await.unwrap();
}

/// Runs a command until the condition holds, and sends it this signal.
async fn interrupted(site: &Site, args: &[&str], signal: Signal, when: impl AsyncFn() -> bool) -> Output {
    let mut command = site.command(args);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let pid = Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap();
    eventually("the command is at work", || when()).await;
    kill_process(pid, signal).unwrap();
    child.wait_with_output().await.unwrap()
}

/// The two numbers of an output like `N replayed, M left`.
fn counts(output: &Output, verb: &str) -> (u32, u32) {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let (moved, left) = text.trim().split_once(&format!(" {verb}, ")).unwrap_or_else(|| panic!("{output:?}"));
    (moved.parse().unwrap(), left.strip_suffix(" left").unwrap().parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_that_is_interrupted_or_killed_makes_no_event_twice_and_goes_on() {
    let service = Receiver::willing().await;
    let (site, prefix, backends) = site("", "retry = [\"1s\"]", &service.route()).await;
    assert!(site.start_as("worker").await.ready().await.terminate().await.success());
    let (events, dead) = (format!("{prefix}.events"), format!("{prefix}.dead"));
    let (_connection, channel) = backends.broker.channel().await;
    let all = 6000;
    publish_dead_letters(&channel, &prefix, all.into()).await;
    let replay = ["dead", "replay", "--all"];
    let output = interrupted(&site, &replay, Signal::INT, async || backends.broker.ready(&events).await > 300).await;
    let (moved, left) = counts(&output, "replayed");
    assert_eq!((moved + left, backends.broker.ready(&events).await), (all, moved), "{output:?}");
    eventually("the rest is back in the queue", || async { backends.broker.ready(&dead).await == left }).await;
    let killed = moved + 300;
    let output =
        interrupted(&site, &replay, Signal::KILL, async || backends.broker.ready(&events).await > killed).await;
    assert_eq!(output.status.code(), None);
    // The messages that it held go back when RabbitMQ notices. A copy is the same life, and is handled once.
    let worker = site.start_as("worker").await.ready().await;
    eventually("all are replayed and handled", || async {
        assert!(site.run(&replay).await.status.success());
        service.ids().len() == all as usize
    })
    .await;
    eventually("the queues are empty", || async {
        backends.broker.ready(&events).await + backends.broker.ready(&dead).await == 0
    })
    .await;
    assert_eq!(service.repeats(), 0);
    let copies = worker.metric("streamgate_worker_deliveries_total{outcome=\"superseded\",route=\"app\"}").await;
    assert!(copies <= 100.0, "{copies} copies: more than one batch was confirmed and not acknowledged");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drop_that_is_interrupted_says_what_is_left_and_goes_on() {
    let (site, prefix, backends) = site("", "retry = [\"1s\"]", "").await;
    assert!(site.start_as("worker").await.ready().await.terminate().await.success());
    let dead = format!("{prefix}.dead");
    let (_connection, channel) = backends.broker.channel().await;
    let all = 6000;
    publish_dead_letters(&channel, &prefix, all.into()).await;
    // The signal interrupts the walk over all of them, before anything is dropped, or the drop.
    let args = ["dead", "drop", "--all"];
    let output = interrupted(&site, &args, Signal::INT, async || backends.broker.ready(&dead).await < all).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let left = match error.contains("nothing was changed") {
        true => all,
        false => counts(&output, "dropped").1,
    };
    eventually("the rest is back in the queue", || async { backends.broker.ready(&dead).await == left }).await;
    let ended = site.run(&args).await;
    assert_eq!(String::from_utf8_lossy(&ended.stdout).trim(), format!("{left} dropped"), "{ended:?}");
    assert_eq!(backends.broker.ready(&dead).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_dead_letters_stay_dropped_and_the_others_keep_their_order() {
    let (site, prefix, backends) = site("", "retry = [\"1s\"]", "").await;
    assert!(site.start_as("worker").await.ready().await.terminate().await.success());
    let dead = format!("{prefix}.dead");
    let (_connection, channel) = backends.broker.channel().await;
    publish_dead_letters(&channel, &prefix, 1500).await;
    let dropped = site.run(&["dead", "drop", "--type", "odd"]).await;
    assert_eq!(String::from_utf8_lossy(&dropped.stdout).trim(), "750 dropped", "{dropped:?}");
    assert_eq!(backends.broker.ready(&dead).await, 750);
    let listed = site.run(&["dead", "list", "--json"]).await;
    let dead_letters: Vec<serde_json::Value> = serde_json::from_slice(&listed.stdout).unwrap();
    let ids: Vec<_> = dead_letters.iter().map(|dead_letter| dead_letter["id"].as_str().unwrap().to_owned()).collect();
    let even: Vec<_> = (0..750).map(|number| format!("id-{}", 2 * number)).collect();
    assert!(ids == even, "{ids:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_a_command_that_waits_for_a_broker_that_hangs() {
    use crate::harness::servers::Backends;
    let backends = Backends::start().await;
    let site = Site::new();
    let tables = backends.tables(&site.name());
    site.configure(&Setup { rest: tables, ..Default::default() });
    assert!(site.start_as("worker").await.ready().await.terminate().await.success());
    let (_connection, channel) = backends.broker.channel().await;
    publish_dead_letters(&channel, &site.name(), 10).await;
    let proxy = Proxy::start(backends.broker.port, 1).await;
    let configured = std::fs::read_to_string(site.config()).unwrap();
    let (direct, through) = (format!(":{}/", backends.broker.port), format!(":{}/", proxy.port));
    assert!(configured.contains(&direct), "{configured}");
    site.write("streamgate.toml", configured.replace(&direct, &through));
    backends.broker.signal(Signal::STOP);
    let mut command = site.command(&["dead", "replay", "--all"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let pid = Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap();
    // From here on the command waits for RabbitMQ; before, the first signal would end it.
    proxy.connected().await;
    kill_process(pid, Signal::INT).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    let ended = tokio::time::timeout(crate::harness::PATIENCE, child.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert!(String::from_utf8_lossy(&ended.stderr).contains("aborted"), "{ended:?}");
    backends.broker.signal(Signal::CONT);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_both_services_while_rabbitmq_hangs() {
    use crate::harness::servers::Backends;
    use crate::harness::wire::{Webhook, raw, send};
    let backends = Backends::start().await;
    let (service, gate) = Receiver::gated().await;
    let site = Site::new();
    // Only an abort ends a drain as long as this.
    let rest = format!("{}\n{}", service.route(), backends.tables(&site.name()));
    let gateway = "drain_timeout = \"1h\"\nanswer_deadline = \"5900ms\"\nbody_timeout = \"1h\"".into();
    let worker = "drain_timeout = \"1h\"\nhandler_timeout = \"14m\"".into();
    site.configure(&Setup { gateway, worker, rest, ..Setup::default() });
    let gateway = site.start_as("gateway").await.ready().await;
    let worker = site.start_as("worker").await.ready().await;
    assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    eventually("the event is in hand", || async { worker.metric("streamgate_worker_in_flight").await == 1.0 }).await;
    backends.broker.signal(Signal::STOP);
    // A request whose body never comes.
    let webhook = Webhook::fresh();
    let head =
        format!("POST /webhooks/stream/push HTTP/1.1\r\nhost: x\r\n{}content-length: 1000\r\n\r\n", webhook.head());
    let stream = raw(gateway.public, head.as_bytes()).await;
    for server in [gateway, worker] {
        server.signal(Signal::TERM);
        eventually("the service drains", || async { server.ops("/readyz").await.1.contains("draining") }).await;
        server.signal(Signal::TERM);
        let ended = tokio::time::timeout(crate::harness::PATIENCE, server.wait()).await.expect("the service ends");
        assert_eq!(ended.code(), Some(1), "{}", site.log());
    }
    drop(stream);
    gate.open();
    backends.broker.signal(Signal::CONT);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_that_is_replayed_into_a_gateways_directory_is_handed_over() {
    let (site, prefix, backends) = site("", "", "").await;
    let gateway = site.start_as("gateway").await.ready().await;
    // A dead letter that an earlier `up` has left in this directory.
    let dead_letter = "INSERT INTO dead (reason, died_at, attempt, app, kind, webhook_id, type, headers, body)
                  VALUES ('rejected', 1, 3, 'chat', 'push', 'left', 'a.b', '{}', CAST('{}' AS BLOB))";
    site.store().execute(dead_letter, []).unwrap();
    let alone = Site::new();
    alone.write("streamgate.toml", Setup::default().toml(&site.data_dir()));
    let replayed = alone.run(&["dead", "replay", "--all"]).await;
    assert_eq!(String::from_utf8_lossy(&replayed.stdout).trim(), "1 replayed", "{replayed:?}");
    let events = format!("{prefix}.events");
    eventually("the event is handed over", || async { backends.broker.ready(&events).await == 1 }).await;
    eventually("the spool's gauge is 0", || async { gateway.metric("streamgate_spool_events").await == 0.0 }).await;
}
