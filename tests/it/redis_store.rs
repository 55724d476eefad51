//! Redis: its scripts follow the pure state machine of claims, and a Redis outage costs repeats and nothing else.

use crate::harness::eventually;
use crate::harness::process::{Setup, Site};
use crate::harness::servers::certificates;
use crate::harness::servers::{Backends, RedisServer};
use crate::harness::wire::{Webhook, send};
use rustix::process::Signal;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use streamgate_core::claim::{self, ClaimKey, Conclusion, State};
use streamgate_core::ports::{Answers, CallState, Claims, Seen};
use streamgate_store::redis::{Address, Redis, RedisAnswers, RedisClaims, SeenKeys};

/// In the far past, and in the far future, by any clock.
const PAST: i64 = 1;
const FUTURE: i64 = 99_999_999_999_999;
const LEASE: Duration = Duration::from_secs(1000);

fn connect(url: &str, ca: Option<&Path>) -> Redis {
    Redis::start(Address::parse(url, ca).unwrap(), &Site::new().name(), Duration::from_secs(5))
}

async fn up(redis: &Redis) {
    let watched = redis.clone();
    let (sender, mut receiver) = tokio::sync::watch::channel(false);
    let watch = tokio::spawn(async move { watched.watch_up(|up| sender.send_modify(|known| *known = up)).await });
    receiver.wait_for(|up| *up).await.unwrap();
    watch.abort();
}

fn key(event: &str) -> ClaimKey {
    ClaimKey { event: event.into(), life: "app|".into() }
}

fn written(state: Option<State>) -> String {
    match state {
        None => String::new(),
        Some(State::Leased { attempt, abandoned, holder, until_ms }) => {
            format!("L {attempt} {abandoned} {holder} {until_ms}")
        }
        Some(State::Retrying { attempt, abandoned }) => format!("R {attempt} {abandoned}"),
        Some(State::Done) => "D".into(),
        Some(State::Dead) => "X".into(),
    }
}

/// The state without the end of its lease, which is by Redis's clock: only whether it was renewed is compared.
fn comparable(state: &str, now_ms: i64) -> String {
    let words: Vec<_> = state.split(' ').collect();
    match words[..] {
        ["L", attempt, abandoned, holder, until] => {
            let until: i64 = until.parse().unwrap();
            let lease = i64::try_from(LEASE.as_millis()).unwrap();
            let renewed = (until - now_ms - lease).abs() < 600_000 && until != FUTURE;
            format!(
                "L {attempt} {abandoned} {holder} {}",
                if renewed { "renewed".to_owned() } else { until.to_string() }
            )
        }
        _ => state.to_owned(),
    }
}

fn every_state() -> Vec<Option<State>> {
    // The largest exceed the precision of Lua's doubles: a holder is compared as text.
    let holders = [1, u64::MAX - 1, u64::MAX];
    let mut states = vec![None, Some(State::Done), Some(State::Dead)];
    for (attempt, abandoned) in (1..4).flat_map(|attempt| [(attempt, 0), (attempt, 12)]) {
        states.push(Some(State::Retrying { attempt, abandoned }));
        for (holder, until_ms) in holders.into_iter().flat_map(|holder| [(holder, PAST), (holder, FUTURE)]) {
            states.push(Some(State::Leased { attempt, abandoned, holder, until_ms }));
        }
    }
    states
}

#[tokio::test(flavor = "multi_thread")]
async fn the_claim_scripts_follow_the_state_machine() {
    let server = &Backends::shared().await.redis;
    let redis = connect(&server.url(), None);
    up(&redis).await;
    let claims = RedisClaims::new(redis, Duration::from_secs(60));
    let (place, key) = (claims.place("event"), &key("event"));
    let (now, lease) = (jiff::Timestamp::now().as_millisecond(), i64::try_from(LEASE.as_millis()).unwrap());
    let put = async |state: Option<State>| match state {
        None => {
            server.ask(&["EVAL", "return tostring(redis.call('HDEL', KEYS[1], ARGV[1]))", "1", &place, "app|"]).await
        }
        Some(_) => {
            let set = "redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) return 'set'";
            server.ask(&["EVAL", set, "1", &place, "app|", &written(state)]).await
        }
    };
    let check = async |what: String, expected: Option<State>| {
        let found = server.ask(&["HGET", &place, "app|"]).await;
        assert_eq!(comparable(&found, now), comparable(&written(expected), now), "{what}");
    };
    for state in every_state() {
        for attempt in 1..4 {
            put(state).await;
            let verdict = claims.claim(key, attempt, u64::MAX, LEASE).await.unwrap();
            let (expected, recorded) = claim::claim(state, attempt, u64::MAX, now, lease);
            assert_eq!(verdict, expected, "claim {attempt} of {state:?}");
            check(format!("claim {attempt} of {state:?}"), recorded.or(state)).await;
            let conclusions =
                [Conclusion::Done, Conclusion::Dead, Conclusion::Released, Conclusion::Retrying { attempt }];
            for conclusion in conclusions {
                put(state).await;
                claims.conclude(key, u64::MAX, conclusion).await.unwrap();
                let expected = claim::conclude(state, u64::MAX, conclusion);
                check(format!("{conclusion:?} of {state:?}"), expected).await;
            }
        }
        put(state).await;
        let renewed = claims.renew(key, u64::MAX, LEASE).await.unwrap();
        let expected = claim::renew(state, u64::MAX, now, lease);
        assert_eq!(renewed, expected.is_some(), "renew {state:?}");
        check(format!("renew {state:?}"), expected.or(state)).await;
    }
    put(Some(State::Retrying { attempt: 1, abandoned: 0 })).await;
    claims.claim(key, 1, 1, LEASE).await.unwrap();
    let left = async || -> i64 {
        let asked = ["EVAL", "return tostring(redis.call('PTTL', KEYS[1]))", "1", &place];
        server.ask(&asked).await.parse().unwrap()
    };
    let leased = left().await;
    assert!((900_000..=1_000_000).contains(&leased), "a claim does not expire before its lease ends: {leased}");
    claims.conclude(key, 1, Conclusion::Done).await.unwrap();
    let done = left().await;
    assert!((60_000..=leased).contains(&done), "another route's lease is not cut short: {done}");
    let other = ClaimKey { event: "other".into(), ..key.clone() };
    claims.conclude(&other, 1, Conclusion::Done).await.unwrap();
    let asked = ["EVAL", "return tostring(redis.call('PTTL', KEYS[1]))", "1", &claims.place("other")];
    let done: i64 = server.ask(&asked).await.parse().unwrap();
    assert!((1..=60_000).contains(&done), "a concluded claim expires in its time: {done}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_hangs_is_left_alone_until_it_answers() {
    let server = RedisServer::start().await;
    let redis = Redis::start(Address::parse(&server.url(), None).unwrap(), "p", Duration::from_secs(1));
    up(&redis).await;
    let lost = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&lost);
    let on_lost = Arc::new(move |marks| {
        counted.fetch_add(marks, Ordering::Relaxed);
    });
    let seen = SeenKeys::start(redis.clone(), Duration::from_secs(60), on_lost);
    assert!(!seen.contains("one").await.unwrap());
    server.signal(Signal::STOP);
    let failure = async || seen.contains("one").await.unwrap_err().to_string();
    assert!(failure().await.contains("no answer within 1s"));
    eventually("the breaker opens", || async { failure().await.contains("no connection to Redis") }).await;
    // From here on Redis is not asked: a thousand errors that each waited for it would take longer than any timeout.
    for _ in 0..1000 {
        assert!(failure().await.contains("no connection to Redis"));
    }
    seen.mark("two").await.unwrap();
    assert!(seen.contains("two").await.unwrap(), "a process knows its own marks");
    eventually("the mark that Redis did not take is counted", || async { lost.load(Ordering::Relaxed) == 1 }).await;
    server.signal(Signal::CONT);
    eventually("Redis is asked again", || async { seen.contains("one").await.is_ok() }).await;
    seen.mark("three").await.unwrap();
    seen.close().await;
    let other = SeenKeys::start(redis, Duration::from_secs(60), Arc::new(|_| {}));
    assert!(other.contains("three").await.unwrap(), "`close` has written the mark to Redis");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_whose_mark_is_removed_can_begin_again() {
    let server = RedisServer::start().await;
    let redis = connect(&server.url(), None);
    up(&redis).await;
    let answers = RedisAnswers::new(redis);
    let long = Duration::from_secs(1000);
    assert!(matches!(answers.begin("one", long).await.unwrap(), CallState::First));
    assert!(matches!(answers.begin("one", long).await.unwrap(), CallState::InWork));
    answers.forget("one").await.unwrap();
    assert!(matches!(answers.begin("one", long).await.unwrap(), CallState::First));
    // An answer stays.
    answers.remember("one", "{}".into(), long).await.unwrap();
    answers.forget("one").await.unwrap();
    assert!(matches!(answers.begin("one", long).await.unwrap(), CallState::Answered(answer) if &answer[..] == b"{}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_refuses_writes_is_not_up_until_it_takes_them() {
    let server = RedisServer::start().await;
    let redis = connect(&server.url(), None);
    let (sender, receiver) = tokio::sync::watch::channel(false);
    let watched = redis.clone();
    let watch = tokio::spawn(async move { watched.watch_up(|up| sender.send_modify(|known| *known = up)).await });
    let is = |up: bool| {
        let receiver = receiver.clone();
        async move { *receiver.borrow() == up }
    };
    eventually("it is up", || is(true)).await;
    let claims = RedisClaims::new(redis.clone(), Duration::from_secs(60));
    let refused = async || claims.claim(&key("event"), 1, 1, LEASE).await.map_err(|error| error.to_string());
    for (refuse, take, code) in [
        (&["CONFIG", "SET", "maxmemory", "1"][..], &["CONFIG", "SET", "maxmemory", "0"][..], "OOM"),
        (&["REPLICAOF", "127.0.0.1", "1"], &["REPLICAOF", "NO", "ONE"], "READONLY"),
        (
            &["CONFIG", "SET", "min-replicas-to-write", "1"],
            &["CONFIG", "SET", "min-replicas-to-write", "0"],
            "NOREPLICAS",
        ),
        (&["ACL", "SETUSER", "default", "-set"], &["ACL", "SETUSER", "default", "+set"], "NOPERM"),
        (&["ACL", "SETUSER", "default", "-evalsha"], &["ACL", "SETUSER", "default", "+evalsha"], "NOPERM"),
    ] {
        server.ask(refuse).await;
        eventually(&format!("it is down after {code}"), || is(false)).await;
        let error = refused().await.unwrap_err();
        assert!(error.contains(code), "{error}");
        server.ask(take).await;
        eventually(&format!("it is up again after {code}"), || is(true)).await;
        eventually("claims are made", || async { refused().await.is_ok() }).await;
    }
    watch.abort();
}

/// A node takes only the keys of its own slots and refuses others with `MOVED`; the probe's key may be among its own.
#[tokio::test(flavor = "multi_thread")]
async fn one_node_of_a_redis_cluster_is_refused_as_a_single_server() {
    let start = || RedisServer::with(&["--cluster-enabled", "yes"]);
    let nodes = [start().await, start().await];
    for (node, slots) in nodes.iter().zip([0..8192, 8192..16_384]) {
        let slots: Vec<_> = slots.map(|slot: u32| slot.to_string()).collect();
        node.ask(&["CLUSTER", "ADDSLOTS"].into_iter().chain(slots.iter().map(String::as_str)).collect::<Vec<_>>())
            .await;
    }
    nodes[0].ask(&["CLUSTER", "MEET", "127.0.0.1", &nodes[1].port.to_string()]).await;
    let whole = async || nodes[0].ask(&["CLUSTER", "INFO"]).await.contains("cluster_size:2");
    eventually("the cluster is whole", whole).await;
    let address = Address::parse(&nodes[0].url(), None).unwrap();
    let why = streamgate_store::redis::inspect(&address, "x").await.unwrap_err();
    assert!(why.contains("MOVED") && why.contains("redis+cluster://"), "{why}");
    let redis = connect(&nodes[0].url(), None);
    let claims = RedisClaims::new(redis, Duration::from_secs(60));
    eventually("the error names the right URL", || async {
        let claimed = claims.claim(&key("event"), 1, 1, LEASE).await;
        claimed.is_err_and(|error| error.to_string().contains("redis+cluster://"))
    })
    .await;
    let redis = connect(&format!("redis+cluster://127.0.0.1:{}", nodes[0].port), None);
    up(&redis).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_in_place_of_the_master_is_logged_once() {
    let broker = &Backends::shared().await.broker;
    let server = RedisServer::start().await;
    let site = Site::new();
    let prefix = site.name();
    let tables = format!(
        "[rabbitmq]\nurl = \"{}\"\nprefix = \"{prefix}\"\n[redis]\nurl = \"{}\"\nprefix = \"{prefix}\"\n",
        broker.url(),
        server.url()
    );
    site.configure(&Setup { rest: tables, ..Setup::default() });
    let gateway = site.start_as("gateway").await.ready().await;
    let up = || gateway.metric("streamgate_gateway_redis_up");
    eventually("Redis is up", || async { up().await == 1.0 }).await;
    server.ask(&["REPLICAOF", "127.0.0.1", "1"]).await;
    eventually("Redis is down", || async {
        assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
        up().await == 0.0
    })
    .await;
    site.logged("READONLY").await;
    for _ in 0..50 {
        assert_eq!(send(gateway.public, &Webhook::fresh()).await.unwrap().outcome(), "enqueued");
    }
    server.ask(&["REPLICAOF", "NO", "ONE"]).await;
    eventually("Redis is up again", || async { up().await == 1.0 }).await;
    assert!(gateway.terminate().await.success());
    assert_eq!(site.log().matches("READONLY").count(), 1, "{}", site.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_and_marks_work_on_a_redis_cluster_and_behind_sentinel() {
    let cluster = RedisServer::with(&["--cluster-enabled", "yes"]).await;
    let slots: Vec<_> = (0..16_384).map(|slot: u32| slot.to_string()).collect();
    let words: Vec<_> = ["CLUSTER", "ADDSLOTS"].into_iter().chain(slots.iter().map(String::as_str)).collect();
    cluster.ask(&words).await;
    eventually("the cluster is whole", || async {
        cluster.ask(&["CLUSTER", "INFO"]).await.contains("cluster_state:ok")
    })
    .await;
    let master = RedisServer::with(&["--requirepass", "hunter2"]).await;
    let config = Site::new();
    let text = format!(
        "sentinel monitor main 127.0.0.1 {} 1\nsentinel auth-pass main hunter2\nrequirepass its%own\n",
        master.port
    );
    let file = config.write("sentinel.conf", text);
    let sentinel = RedisServer::sentinel(&file).await;
    for url in [
        format!("redis+cluster://127.0.0.1:{}", cluster.port),
        format!("redis+sentinel://:hunter2@127.0.0.1:1,127.0.0.1:{}/main?sentinel_password=its%25own", sentinel.port),
    ] {
        let redis = connect(&url, None);
        up(&redis).await;
        let claims = RedisClaims::new(redis.clone(), Duration::from_secs(60));
        assert_eq!(claims.claim(&key("event"), 1, 1, LEASE).await.unwrap(), claim::Verdict::Run { abandoned: 0 });
        assert_eq!(claims.claim(&key("event"), 1, 2, LEASE).await.unwrap(), claim::Verdict::Wait);
        let seen = SeenKeys::start(redis.clone(), Duration::from_secs(60), Arc::new(|_| panic!("lost")));
        for n in 0..300 {
            seen.mark(&format!("key {n}")).await.unwrap();
        }
        seen.close().await;
        let other = SeenKeys::start(redis, Duration::from_secs(60), Arc::new(|_| {}));
        assert!(other.contains("key 299").await.unwrap() && !other.contains("key 300").await.unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn check_reaches_redis_over_tls_with_a_private_authority() {
    let site = Site::new();
    let (ca, cert, key) = certificates(&site);
    let server = RedisServer::secure(&cert, &key).await;
    let url = server.url().replace("redis:", "rediss:");
    let check = async |ca: &str| {
        let broker = &Backends::shared().await.broker;
        let tables = format!("[rabbitmq]\nurl = \"{}\"\n[redis]\nurl = \"{url}\"\n{ca}", broker.url());
        site.configure(&Setup { rest: tables, ..Setup::default() });
        String::from_utf8(site.run(&["check"]).await.stdout).unwrap()
    };
    let output = check("").await;
    assert!(output.contains("FAIL  redis") && output.contains("UnknownIssuer"), "{output}");
    let output = check(&format!("ca = \"{ca}\"")).await;
    assert!(output.contains("ok    redis") && output.contains("version"), "{output}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_closes_idle_connections_stays_up() {
    let server = RedisServer::start().await;
    server.ask(&["CONFIG", "SET", "timeout", "3"]).await;
    let redis = connect(&server.url(), None);
    up(&redis).await;
    let (sender, receiver) = tokio::sync::watch::channel(0);
    let watched = redis.clone();
    let watch = tokio::spawn(async move { watched.watch_up(|_| sender.send_modify(|changes| *changes += 1)).await });
    // Four times as long as this Redis keeps an idle connection.
    eventually("the connection grows old", || async {
        let list = server.ask(&["CLIENT", "LIST"]).await;
        let ages = list.split_whitespace().filter_map(|word| word.strip_prefix("age=")?.parse::<u32>().ok());
        ages.max().is_some_and(|age| age >= 12)
    })
    .await;
    assert_eq!(*receiver.borrow(), 1, "Redis was up all the time");
    watch.abort();
}
