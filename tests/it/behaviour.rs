//! Behaviours of gateway and worker together, over any store. Each behaviour is written once; each stack runs all of them.

use crate::harness::process::{Setup, Site};
use crate::harness::stack::{Act, Script, Stack};
use crate::harness::wire::{Webhook, odd_bodies, send};
use crate::harness::{eventually, unique};
use std::collections::HashSet;
use std::sync::Arc;
use streamgate_core::dead_letter::DeadLetter;
use tokio::sync::Semaphore;

/// Each behaviour as a test of its own, for each stack.
macro_rules! behaviours {
    ($($name:ident)+) => {
        behaviours! { Embedded: $($name)+ }
        behaviours! { Services: $($name)+ }
    };
    ($stack:ident: $($name:ident)+) => {
        #[expect(non_snake_case, reason = "named like the stack")]
        mod $stack {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $name() {
                    super::$name::<crate::harness::stack::$stack>().await;
                }
            )+
        }
    };
}

behaviours! {
    an_event_is_answered_and_handled_with_its_bytes
    a_repeat_is_answered_and_not_handled_again
    concurrent_repeats_are_handled_once
    an_id_with_another_signed_body_is_another_event
    an_event_without_an_id_is_known_by_its_body
    both_callbacks_of_a_pending_message_are_events
    a_failed_attempt_climbs_the_ladder
    the_end_of_the_ladder_is_a_dead_letter
    a_rejected_event_is_a_dead_letter_at_once
    a_replayed_dead_letter_is_handled_again
    a_panic_is_a_failed_attempt
    a_handler_over_its_time_is_a_failed_attempt
    a_repeat_during_a_long_handler_delays_no_event
    a_drain_settles_what_is_in_hand
    unsettled_events_survive_a_restart
    a_retry_survives_a_restart_with_its_attempt
    any_authentic_body_is_delivered
    concurrency_is_bounded
    unmatched_events_are_acknowledged_or_dead
}

fn short_ladder() -> Setup {
    Setup { worker: "retry = [\"10ms\", \"20ms\", \"30ms\"]".into(), ..Setup::default() }
}

async fn accept(stack: &impl Stack, webhook: &Webhook, outcome: &str) {
    let answer = send(stack.public(), webhook).await.unwrap();
    assert_eq!((answer.status.as_u16(), answer.outcome()), (200, outcome), "{answer:?}");
    assert!(answer.body.is_empty());
}

/// How many deliveries were settled with this outcome.
fn settled(stack: &impl Stack, outcome: &str) -> u64 {
    stack.metrics().worker_deliveries.with_label_values(&["app", outcome]).get()
}

async fn an_event_is_answered_and_handled_with_its_bytes<S: Stack>() {
    let (site, mut script) = (Site::new(), Script::willing());
    let stack = S::start(&site, &Setup::default(), script.router.clone()).await;
    let plain = Webhook::push("one", r#"{"type":"message.new","text":"\u003cb\u003e ü"}"#);
    accept(&stack, &plain, "enqueued").await;
    let call = script.next().await;
    assert_eq!((call.id.as_str(), call.attempt, &call.body), ("one", 1, &plain.body));
    let two = Webhook::push("two", r#"{"type":"message.new","number":2}"#);
    accept(&stack, &two.clone().zipped(), "enqueued").await;
    let call = script.next().await;
    assert_eq!((call.id.as_str(), &call.body), ("two", &two.body), "inflated, as it was signed");
    stack.drain().await;
    assert!(script.rest().is_empty());
}

async fn a_repeat_is_answered_and_not_handled_again<S: Stack>() {
    let (site, mut script) = (Site::new(), Script::willing());
    let stack = S::start(&site, &Setup::default(), script.router.clone()).await;
    let webhook = Webhook::fresh();
    accept(&stack, &webhook, "enqueued").await;
    script.next().await;
    accept(&stack, &webhook.clone().set("x-webhook-attempt", "2"), "duplicate").await;
    accept(&stack, &webhook.zipped(), "duplicate").await;
    stack.drain().await;
    assert!(script.rest().is_empty());
}

async fn concurrent_repeats_are_handled_once<S: Stack>() {
    let (site, mut script) = (Site::new(), Script::willing());
    let stack = S::start(&site, &Setup::default(), script.router.clone()).await;
    for _ in 0..20 {
        let webhook = Webhook::fresh();
        let answers = futures_util::future::join_all((0..8).map(|_| send(stack.public(), &webhook))).await;
        assert!(answers.iter().all(|answer| answer.as_ref().unwrap().status.is_success()));
        assert_eq!(script.next().await.id, webhook.id());
    }
    // Every enqueued copy must be settled before the drain, which could return a copy that the worker has not begun.
    eventually("every copy is settled", || async {
        let enqueued = stack.metrics().gateway_requests.with_label_values(&["chat", "push", "enqueued"]).get();
        settled(&stack, "done") + settled(&stack, "superseded") == enqueued
    })
    .await;
    assert!(script.rest().is_empty());
    assert_eq!(settled(&stack, "done"), 20);
    stack.drain().await;
}

async fn an_id_with_another_signed_body_is_another_event<S: Stack>() {
    let (site, mut script) = (Site::new(), Script::willing());
    let stack = S::start(&site, &Setup::default(), script.router.clone()).await;
    accept(&stack, &Webhook::push("same", "{\"type\":\"a\"}"), "enqueued").await;
    accept(&stack, &Webhook::push("same", "{\"type\":\"b\"}"), "enqueued").await;
    let bodies = HashSet::from([script.next().await.body, script.next().await.body]);
    assert_eq!(bodies, HashSet::from(["{\"type\":\"a\"}".into(), "{\"type\":\"b\"}".into()]));
    stack.drain().await;
}

async fn an_event_without_an_id_is_known_by_its_body<S: Stack>() {
    let (site, mut script) = (Site::new(), Script::willing());
    let stack = S::start(&site, &Setup::default(), script.router.clone()).await;
    let webhook = Webhook::push("", "{}").without("x-webhook-id");
    accept(&stack, &webhook, "enqueued").await;
    let call = script.next().await;
    assert_eq!(call.id, "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a");
    accept(&stack, &webhook, "duplicate").await;
    stack.drain().await;
}

async fn both_callbacks_of_a_pending_message_are_events<S: Stack>() {
    let (site, mut script) = (Site::new(), Script::willing());
    let stack = S::start(&site, &Setup::default(), script.router.clone()).await;
    let passed = "/webhooks/stream/pending-message/PassOnPendingMessage";
    let deleted = "/webhooks/stream/pending-message/DeletedPendingMessage";
    let webhook = Webhook::push("same", "{\"message\":{}}");
    for path in [passed, deleted] {
        accept(&stack, &Webhook { path: path.into(), ..webhook.clone() }, "enqueued").await;
        let call = script.next().await;
        assert_eq!(call.id, "same");
        assert_eq!(
            call.event_type,
            if path == passed { "pending_message.passed_on" } else { "pending_message.deleted" }
        );
        accept(&stack, &Webhook { path: path.into(), ..webhook.clone() }, "duplicate").await;
    }
    stack.drain().await;
}

async fn a_failed_attempt_climbs_the_ladder<S: Stack>() {
    let site = Site::new();
    let mut script = Script::new(|call| if call.attempt < 4 { Act::Retry } else { Act::Succeed });
    let stack = S::start(&site, &short_ladder(), script.router.clone()).await;
    let webhook = Webhook::fresh();
    accept(&stack, &webhook, "enqueued").await;
    for attempt in 1..=4 {
        let call = script.next().await;
        assert_eq!((call.id.as_str(), call.attempt, &call.body), (webhook.id(), attempt, &webhook.body));
    }
    eventually("the event is done", || async { settled(&stack, "done") == 1 }).await;
    assert_eq!(settled(&stack, "retry"), 3);
    stack.drain().await;
    assert!(script.rest().is_empty());
    assert!(S::dead_letters(&site).await.is_empty());
}

async fn the_end_of_the_ladder_is_a_dead_letter<S: Stack>() {
    let (site, mut script) = (Site::new(), Script::new(|_| Act::Retry));
    let stack = S::start(&site, &short_ladder(), script.router.clone()).await;
    let webhook = Webhook::fresh();
    accept(&stack, &webhook, "enqueued").await;
    eventually("the event is dead", || async { settled(&stack, "dead") == 1 }).await;
    assert_eq!(
        std::iter::from_fn(|| script.calls.try_recv().ok()).map(|call| call.attempt).collect::<Vec<_>>(),
        [1, 2, 3, 4]
    );
    let dead_letters = S::dead_letters(&site).await;
    let [dead_letter] = &*dead_letters else { panic!("{dead_letters:?}") };
    assert_eq!((dead_letter.reason.as_str(), dead_letter.envelope.id.as_str()), ("retries_exhausted", webhook.id()));
    assert_eq!(dead_letter.error.as_deref(), Some("scripted to be tried again"));
    assert_eq!((dead_letter.envelope.route.as_deref(), dead_letter.envelope.attempt), (Some("app"), 4));
    assert_eq!(dead_letter.envelope.body, webhook.body);
    let history: Vec<_> = dead_letter.envelope.attempts.iter().map(|one| (one.number, one.error.as_str())).collect();
    assert_eq!(history, [1, 2, 3, 4].map(|number| (number, "scripted to be tried again")));
    let ended: Vec<_> = dead_letter.envelope.attempts.iter().map(|one| one.at_ms).collect();
    assert!(ended.is_sorted() && ended[0] > 1_700_000_000_000, "{ended:?}");
    accept(&stack, &webhook, "duplicate").await;
    stack.drain().await;
}

async fn a_rejected_event_is_a_dead_letter_at_once<S: Stack>() {
    let (site, mut script) = (Site::new(), Script::new(|_| Act::Reject));
    let stack = S::start(&site, &short_ladder(), script.router.clone()).await;
    accept(&stack, &Webhook::fresh(), "enqueued").await;
    eventually("the event is dead", || async { settled(&stack, "dead") == 1 }).await;
    assert_eq!(script.rest().len(), 1);
    assert_eq!(S::dead_letters(&site).await[0].reason, "rejected");
    assert_eq!(stack.metrics().worker_dead_letters.with_label_values(&["rejected"]).get(), 1);
    stack.drain().await;
}

async fn a_replayed_dead_letter_is_handled_again<S: Stack>() {
    let site = Site::new();
    let broken = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let still = Arc::clone(&broken);
    let act = move |_: &_| if still.load(std::sync::atomic::Ordering::SeqCst) { Act::Reject } else { Act::Succeed };
    let mut script = Script::new(act);
    let stack = S::start(&site, &short_ladder(), script.router.clone()).await;
    let webhook = Webhook::fresh();
    accept(&stack, &webhook, "enqueued").await;
    let first = script.next().await;
    eventually("the event is dead", || async { settled(&stack, "dead") == 1 }).await;
    let dead_letters: Vec<_> = S::dead_letters(&site).await.iter().map(DeadLetter::id).collect();
    broken.store(false, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(S::replay(&site, dead_letters).await, 1);
    let again = script.next().await;
    assert_eq!((&again.key, again.attempt, &again.body), (&first.key, 1, &webhook.body));
    eventually("the event is done", || async { settled(&stack, "done") == 1 }).await;
    assert!(S::dead_letters(&site).await.is_empty());
    stack.drain().await;
}

async fn a_panic_is_a_failed_attempt<S: Stack>() {
    let site = Site::new();
    let mut script = Script::new(|call| if call.attempt == 1 { Act::Panic } else { Act::Succeed });
    let stack = S::start(&site, &short_ladder(), script.router.clone()).await;
    accept(&stack, &Webhook::fresh(), "enqueued").await;
    assert_eq!(script.next().await.attempt, 1);
    assert_eq!(script.next().await.attempt, 2);
    eventually("the event is done", || async { settled(&stack, "done") == 1 }).await;
    accept(&stack, &Webhook::fresh(), "enqueued").await;
    script.next().await;
    stack.drain().await;
}

async fn a_handler_over_its_time_is_a_failed_attempt<S: Stack>() {
    let site = Site::new();
    let never = Arc::new(Semaphore::new(0));
    let mut script =
        Script::new(move |call| if call.attempt == 1 { Act::Await(Arc::clone(&never)) } else { Act::Succeed });
    let worker = "retry = [\"10ms\"]\nhandler_timeout = \"50ms\"".into();
    let stack = S::start(&site, &Setup { worker, ..Setup::default() }, script.router.clone()).await;
    accept(&stack, &Webhook::fresh(), "enqueued").await;
    assert_eq!(script.next().await.attempt, 1);
    assert_eq!(script.next().await.attempt, 2);
    stack.drain().await;
}

async fn a_repeat_during_a_long_handler_delays_no_event<S: Stack>() {
    let (site, permits) = (Site::new(), Arc::new(Semaphore::new(0)));
    let waits = Arc::clone(&permits);
    let mut script =
        Script::new(move |call| if call.id == "long" { Act::Await(Arc::clone(&waits)) } else { Act::Succeed });
    let stack = S::start(&site, &short_ladder(), script.router.clone()).await;
    let long = Webhook::push("long", "{\"type\":\"long\"}");
    accept(&stack, &long, "enqueued").await;
    script.next().await;
    accept(&stack, &long, "duplicate").await;
    let other = Webhook::fresh();
    accept(&stack, &other, "enqueued").await;
    assert_eq!(script.next().await.id, other.id(), "other events are handled meanwhile");
    permits.add_permits(1);
    eventually("both are done", || async { settled(&stack, "done") == 2 }).await;
    stack.drain().await;
    assert!(script.rest().is_empty(), "the long handler ran once");
}

async fn a_drain_settles_what_is_in_hand<S: Stack>() {
    let (site, permits) = (Site::new(), Arc::new(Semaphore::new(0)));
    let waits = Arc::clone(&permits);
    let mut script = Script::new(move |_| Act::Await(Arc::clone(&waits)));
    let stack = S::start(&site, &Setup::default(), script.router.clone()).await;
    accept(&stack, &Webhook::fresh(), "enqueued").await;
    script.next().await;
    let running = Arc::clone(&script.running);
    // Polled in this order: the drain begins before the handler may finish.
    tokio::join!(biased; stack.drain(), async { permits.add_permits(1) });
    assert_eq!(running.load(std::sync::atomic::Ordering::SeqCst), 0, "the drain let the handler finish");
    let mut after = Script::willing();
    let stack = S::start(&site, &Setup::default(), after.router.clone()).await;
    let probe = Webhook::fresh();
    accept(&stack, &probe, "enqueued").await;
    assert_eq!(after.next().await.id, probe.id(), "the first event was settled before the stop");
    stack.drain().await;
}

async fn unsettled_events_survive_a_restart<S: Stack>() {
    let site = Site::new();
    let never = Arc::new(Semaphore::new(0));
    let mut script = Script::new(move |_| Act::Await(Arc::clone(&never)));
    let setup =
        Setup { gateway: "drain_timeout = \"50ms\"".into(), worker: "concurrency = 2".into(), ..Setup::default() };
    let stack = S::start(&site, &setup, script.router.clone()).await;
    let webhooks: Vec<_> = (0..20).map(|_| Webhook::fresh()).collect();
    for webhook in &webhooks {
        accept(&stack, webhook, "enqueued").await;
    }
    script.next().await;
    stack.drain().await;
    let mut after = Script::willing();
    let stack = S::start(&site, &Setup::default(), after.router.clone()).await;
    let mut handled = HashSet::new();
    for _ in &webhooks {
        handled.insert(after.next().await.id);
    }
    assert_eq!(handled, webhooks.iter().map(|webhook| webhook.id().to_owned()).collect());
    accept(&stack, &webhooks[0], "duplicate").await;
    stack.drain().await;
    assert!(after.rest().is_empty());
}

async fn a_retry_survives_a_restart_with_its_attempt<S: Stack>() {
    let (site, mut script) = (Site::new(), Script::new(|_| Act::Retry));
    let setup = Setup { worker: "retry = [\"500ms\", \"1h\"]".into(), ..Setup::default() };
    let stack = S::start(&site, &setup, script.router.clone()).await;
    accept(&stack, &Webhook::fresh(), "enqueued").await;
    script.next().await;
    eventually("the event waits for its retry", || async { settled(&stack, "retry") == 1 }).await;
    stack.drain().await;
    let mut after = Script::willing();
    let stack = S::start(&site, &setup, after.router.clone()).await;
    assert_eq!(after.next().await.attempt, 2);
    stack.drain().await;
}

async fn any_authentic_body_is_delivered<S: Stack>() {
    let (site, mut script) = (Site::new(), Script::willing());
    // Each body is sent twice under two ids: two events by id.
    let setup = Setup { rest: "[dedup]\nby = \"id\"\n".into(), ..Setup::default() };
    let stack = S::start(&site, &setup, script.router.clone()).await;
    for body in odd_bodies() {
        for zipped in [false, true] {
            let id = format!("odd-{}", unique());
            let webhook = Webhook::push(&id, body.clone());
            let sent = if zipped { webhook.clone().zipped() } else { webhook };
            accept(&stack, &sent, "enqueued").await;
            let call = script.next().await;
            assert_eq!((call.id, call.body), (id, bytes::Bytes::from(body.clone())));
        }
    }
    stack.drain().await;
}

async fn concurrency_is_bounded<S: Stack>() {
    let (site, permits) = (Site::new(), Arc::new(Semaphore::new(0)));
    let waits = Arc::clone(&permits);
    let mut script = Script::new(move |_| Act::Await(Arc::clone(&waits)));
    let setup = Setup { worker: "concurrency = 3".into(), ..Setup::default() };
    let stack = S::start(&site, &setup, script.router.clone()).await;
    for _ in 0..10 {
        accept(&stack, &Webhook::fresh(), "enqueued").await;
    }
    for _ in 0..10 {
        script.next().await;
        assert!(script.running.load(std::sync::atomic::Ordering::SeqCst) <= 3);
        permits.add_permits(1);
    }
    eventually("all are done", || async { settled(&stack, "done") == 10 }).await;
    stack.drain().await;
}

async fn unmatched_events_are_acknowledged_or_dead<S: Stack>() {
    for (unmatched, dead_letters) in [("ack", 0), ("dead", 1)] {
        let site = Site::new();
        let setup = Setup { worker: format!("unmatched = \"{unmatched}\""), ..Setup::default() };
        let stack = S::start(&site, &setup, streamgate::Router::default()).await;
        accept(&stack, &Webhook::fresh(), "enqueued").await;
        let settled =
            || async { stack.metrics().worker_deliveries.with_label_values(&["none", "unmatched"]).get() == 1 };
        eventually("the event is settled", settled).await;
        stack.drain().await;
        let found = S::dead_letters(&site).await;
        assert_eq!(found.len(), dead_letters, "{found:?}");
        assert!(found.iter().all(|dead_letter| dead_letter.reason == "unmatched"));
    }
}
