//! Synchronous hooks over any store: each is answered 200 with JSON, by a handler or by the policy.

use crate::harness::eventually;
use crate::harness::process::{Setup, Site};
use crate::harness::stack::{self, Act, Script, Stack};
use crate::harness::wire::{Answer, COMMANDS, MODERATION, Webhook, send};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use streamgate::{AnsweredBy, BeforeMessageSend, Button, Command, HandlerError, HookHandler, Hooks, Style};
use tokio::sync::Semaphore;

behaviours! {
    a_message_passes_is_rewritten_or_rejected
    a_command_goes_from_its_buttons_to_its_end
    every_hook_is_answered_whatever_its_handler_does
    without_a_handler_the_policy_answers_at_once
    a_repeat_gets_the_first_answer_again
    a_repeat_waits_for_the_answer_that_is_in_work
    no_answer_is_remembered_for_a_hook_without_an_id
    the_first_answer_survives_a_restart
    the_signed_command_name_decides_which_handler_answers
    a_backlog_of_events_delays_no_hook
    a_drain_answers_the_hooks_in_hand
    unsigned_hooks_are_refused
}

/// Sends a hook, which must be answered 200 with JSON.
pub async fn ask(stack: &impl Stack, webhook: &Webhook) -> Answer {
    let answer = send(stack.public(), webhook).await.unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.headers["content-type"], "application/json");
    answer
}

async fn start<S: Stack>(site: &Site, rest: &str, hooks: Hooks) -> S {
    let setup = Setup { rest: rest.to_owned(), ..Setup::default() };
    S::with_hooks(site, &setup, Script::willing().router, hooks).await
}

fn moderation<R>(handler: impl Fn(BeforeMessageSend) -> R + Send + Sync + 'static) -> Hooks
where
    R: Future<Output = Result<streamgate::Answer, HandlerError>> + Send + 'static,
{
    Hooks { before_message_send: Some(AnsweredBy::<_, BeforeMessageSend>::moderation(handler)), ..Hooks::default() }
}

fn command<R>(handler: impl Fn(Command) -> R + Send + Sync + 'static) -> Arc<dyn HookHandler>
where
    R: Future<Output = Result<streamgate::Answer, HandlerError>> + Send + 'static,
{
    AnsweredBy::<_, Command>::command(handler)
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// A moderation handler that answers with the number of calls so far, and that number.
pub fn counting() -> (Hooks, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    let hooks = moderation(move |hook| {
        let number = counted.fetch_add(1, Ordering::SeqCst) + 1;
        async move { Ok(hook.rewrite().text(format!("answer {number}"))) }
    });
    (hooks, asked)
}

async fn a_message_passes_is_rewritten_or_rejected<S: Stack>() {
    let site = Site::new();
    let hooks = moderation(|hook| async move {
        assert_eq!((hook.user_id()?.as_deref(), hook.cid()?.as_deref()), (Some("ann"), Some("messaging:x")));
        Ok(match hook.text()?.as_str() {
            "bad" => hook.reject("no \"bad\" words"),
            "card 1234" => hook
                .rewrite()
                .text("card ****")
                .silent(true)
                .show_in_channel(false)
                .message_type("system")
                .i18n(json!({"language": "en"}))
                .attachments(json!([]))
                .set("flagged", json!({"by": "us"})),
            _ => hook.pass(),
        })
    });
    let stack: S = start(&site, "", hooks).await;
    // The example of Stream's documentation, with a field that no type of ours knows.
    let message = r#"{"id":"","text":"hello \u003cb\u003e","html":"","type":"regular","attachments":[],"latest_reactions":[],"reaction_counts":null,"reply_count":0,"mentioned_users":[],"silent":false,"later":{"n":1.10,"big":12345678901234567890123}}"#;
    let passed = ask(&stack, &Webhook::moderation(message)).await;
    assert_eq!((text(&passed.body), passed.outcome()), (&*format!("{{\"message\":{message}}}"), "answered"));
    let zipped = ask(&stack, &Webhook::moderation(message).zipped()).await;
    assert_eq!(text(&zipped.body), format!("{{\"message\":{message}}}"), "the handler gets the body inflated");
    let rewritten = ask(&stack, &Webhook::moderation(r#"{"text":"card 1234","x":1.10,"type":"regular"}"#)).await;
    let expected = r#"{"message":{"text":"card ****","x":1.10,"type":"system","silent":true,"show_in_channel":false,"i18n":{"language":"en"},"attachments":[],"flagged":{"by":"us"}}}"#;
    assert_eq!(text(&rewritten.body), expected);
    let rejected = ask(&stack, &Webhook::moderation(r#"{"text":"bad","type":"regular"}"#)).await;
    assert_eq!(text(&rejected.body), r#"{"message":{"type":"error","text":"no \"bad\" words"}}"#);
    let calls = stack.metrics().worker_calls.with_label_values(&["before-message-send", "answered"]).get();
    let answered = ["chat", "before-message-send", "answered"];
    assert_eq!((calls, stack.metrics().gateway_requests.with_label_values(&answered).get()), (4, 4));
    stack.drain().await;
}

async fn a_command_goes_from_its_buttons_to_its_end<S: Stack>() {
    let site = Site::new();
    let ticket = command(|command| async move {
        assert_eq!((command.name(), command.user_name()?.as_deref()), ("ticket", Some("Ann")));
        if command.args()?.is_empty() {
            return Ok(command.error("What is it about?"));
        }
        let confirm = Button::new("action", "confirm", "Confirm").style(Style::Primary);
        Ok(match command.form("action")?.as_deref() {
            None if command.is_action()? => command.regular("by an input").mml("<mml>done</mml>"),
            None => command.ephemeral("Open it?").buttons([confirm, Button::new("action", "cancel", "Cancel")]),
            Some("confirm") => command.regular(format!("Ticket: {}", command.args()?)),
            Some(_) => command.cancel(),
        })
    });
    let hooks = Hooks { commands: [("ticket".to_owned(), ticket)].into(), ..Hooks::default() };
    let stack: S = start(&site, "", hooks).await;
    let message_for = async |args: &str, form: Option<&str>| {
        let answer = ask(&stack, &Webhook::command("ticket", args, form)).await;
        assert_eq!(answer.outcome(), "answered");
        serde_json::from_slice::<Value>(&answer.body).unwrap()["message"].clone()
    };
    let first = message_for("screen is dark", None).await;
    assert_eq!((&first["type"], &first["text"]), (&json!("ephemeral"), &json!("Open it?")));
    assert_eq!(first["custom"], json!({"n": 1.10}), "custom fields survive");
    let actions = json!([
        {"type": "button", "name": "action", "value": "confirm", "text": "Confirm", "style": "primary"},
        {"type": "button", "name": "action", "value": "cancel", "text": "Cancel", "style": "default"},
    ]);
    assert_eq!(first["attachments"][0]["actions"], actions);
    let last = message_for("screen is dark", Some(r#"{"action":"confirm"}"#)).await;
    assert_eq!((&last["type"], &last["text"]), (&json!("regular"), &json!("Ticket: screen is dark")));
    assert!(last["attachments"].is_null() && last.get("attachments").is_some(), "the buttons are removed: {last}");
    assert_eq!(message_for("x", Some(r#"{"reported_by":"Ann"}"#)).await["mml"], json!("<mml>done</mml>"));
    let cancelled = ask(&stack, &Webhook::command("ticket", "x", Some(r#"{"action":"cancel"}"#))).await;
    assert_eq!(text(&cancelled.body), r#"{"message":null}"#);
    assert_eq!(message_for("", None).await, json!({"type": "error", "text": "What is it about?"}));
    stack.drain().await;
}

async fn every_hook_is_answered_whatever_its_handler_does<S: Stack>() {
    let never = Arc::new(Semaphore::new(0));
    for (policy, answer) in [
        ("allow", r#"{"message":{"text":"TEXT","x":1.10}}"#),
        ("reject", r#"{"message":{"type":"error","text":"later, please"}}"#),
    ] {
        let (site, never) = (Site::new(), Arc::clone(&never));
        let hooks = moderation(move |hook| {
            let never = Arc::clone(&never);
            async move {
                match hook.text()?.as_str() {
                    "fail" => return Err(HandlerError::retry("scripted to fail")),
                    "panic" => panic!("scripted to panic"),
                    "slow" => never.acquire().await.unwrap().forget(),
                    _ => {}
                }
                Ok(hook.pass())
            }
        });
        let rest = format!(
            "[hooks.before_message_send]\ndeadline = \"500ms\"\non_failure = \"{policy}\"\nfailure_text = \"later, please\"\n\
             [hooks.custom_commands]\non_failure = \"reject\"\nfailure_text = \"no commands\"\n"
        );
        let stack: S = start(&site, &rest, hooks).await;
        for (message, outcome) in [("fail", "hook_failed"), ("panic", "hook_failed"), ("slow", "hook_timeout")] {
            let reply = ask(&stack, &Webhook::moderation(&format!(r#"{{"text":"{message}","x":1.10}}"#))).await;
            assert_eq!((text(&reply.body), reply.outcome()), (&*answer.replace("TEXT", message), outcome));
        }
        // Each kind has a policy of its own.
        let command = ask(&stack, &Webhook::command("none", "x", None)).await;
        assert_eq!(text(&command.body), r#"{"message":{"type":"error","text":"no commands"}}"#);
        let requests = &stack.metrics().gateway_requests;
        assert_eq!(requests.with_label_values(&["chat", "before-message-send", "hook_failed"]).get(), 2);
        let good = ask(&stack, &Webhook::moderation(r#"{"text":"good"}"#)).await;
        assert_eq!(good.outcome(), "answered", "the worker goes on after failures");
        stack.drain().await;
    }
}

async fn without_a_handler_the_policy_answers_at_once<S: Stack>() {
    let site = Site::new();
    // A long deadline: the policy must answer without waiting for it.
    let rest = "[hooks.before_message_send]\ndeadline = \"5s\"\n";
    let stack: S = start(&site, rest, Hooks::default()).await;
    let reply = ask(&stack, &Webhook::moderation(r#"{"text":"x"}"#)).await;
    assert_eq!((text(&reply.body), reply.outcome()), (r#"{"message":{"text":"x"}}"#, "no_worker"));
    let odd = Webhook { path: MODERATION.into(), ..Webhook::push("odd", "no JSON at all") };
    assert_eq!(text(&ask(&stack, &odd).await.body), r#"{"message":{}}"#);
    stack.drain().await;
    // A worker is there, but it handles other hooks only.
    let other = command(|command| async move { Ok(command.pass()) });
    let hooks = Hooks { commands: [("other".to_owned(), other)].into(), ..Hooks::default() };
    let stack: S = start(&Site::new(), rest, hooks).await;
    assert_eq!(ask(&stack, &Webhook::moderation(r#"{"text":"x"}"#)).await.outcome(), "unhandled");
    assert_eq!(ask(&stack, &Webhook::command("ticket", "x", None)).await.outcome(), "unhandled");
    assert_eq!(ask(&stack, &Webhook::command("other", "x", None)).await.outcome(), "answered");
    stack.drain().await;
}

async fn a_repeat_gets_the_first_answer_again<S: Stack>() {
    let (site, (hooks, asked)) = (Site::new(), counting());
    let stack: S = start(&site, "", hooks).await;
    let webhook = Webhook::moderation(r#"{"text":"x"}"#);
    let first = ask(&stack, &webhook).await;
    assert_eq!((text(&first.body), first.outcome()), (r#"{"message":{"text":"answer 1"}}"#, "answered"));
    for repeat in [webhook.clone().set("x-webhook-attempt", "2"), webhook.clone().zipped()] {
        let again = ask(&stack, &repeat).await;
        assert_eq!((&again.body, again.outcome()), (&first.body, "repeated"));
    }
    // The id is not signed: another body under the same id is another hook.
    let other = Webhook { path: MODERATION.into(), ..Webhook::push(webhook.id(), r#"{"message":{"text":"y"}}"#) };
    assert_eq!(text(&ask(&stack, &other).await.body), r#"{"message":{"text":"answer 2"}}"#);
    assert_eq!(asked.load(Ordering::SeqCst), 2);
    stack.drain().await;
}

async fn a_repeat_waits_for_the_answer_that_is_in_work<S: Stack>() {
    let (site, permits) = (Site::new(), Arc::new(Semaphore::new(0)));
    let (waits, asked) = (Arc::clone(&permits), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&asked);
    let hooks = moderation(move |hook| {
        let (waits, number) = (Arc::clone(&waits), counted.fetch_add(1, Ordering::SeqCst) + 1);
        async move {
            waits.acquire().await.unwrap().forget();
            Ok(hook.rewrite().text(format!("answer {number}")))
        }
    });
    let stack: S = start(&site, "[hooks.before_message_send]\ndeadline = \"5s\"\n", hooks).await;
    let webhook = Webhook::moderation(r#"{"text":"x"}"#);
    let public = stack.public();
    let repeats: Vec<_> = (0..5)
        .map(|_| {
            let webhook = webhook.clone();
            tokio::spawn(async move { send(public, &webhook).await.unwrap() })
        })
        .collect();
    let in_flight = || async { stack.metrics().gateway_in_flight.get() == 5 };
    eventually("all of them wait", in_flight).await;
    eventually("the handler has the first", || async { asked.load(Ordering::SeqCst) == 1 }).await;
    permits.add_permits(10);
    let mut outcomes = Vec::new();
    for repeat in repeats {
        let answer = repeat.await.unwrap();
        assert_eq!(text(&answer.body), r#"{"message":{"text":"answer 1"}}"#);
        outcomes.push(answer.outcome().to_owned());
    }
    outcomes.sort();
    assert_eq!(outcomes, ["answered", "repeated", "repeated", "repeated", "repeated"]);
    assert_eq!(asked.load(Ordering::SeqCst), 1, "the handler was asked once");
    stack.drain().await;
}

async fn no_answer_is_remembered_for_a_hook_without_an_id<S: Stack>() {
    let (site, (hooks, asked)) = (Site::new(), counting());
    let stack: S = start(&site, "", hooks).await;
    let webhook = Webhook::moderation(r#"{"text":"x"}"#).without("x-webhook-id");
    for number in 1..=2 {
        let answer = ask(&stack, &webhook).await;
        let expected = format!(r#"{{"message":{{"text":"answer {number}"}}}}"#);
        assert_eq!((text(&answer.body), answer.outcome()), (&*expected, "answered"));
    }
    assert_eq!(asked.load(Ordering::SeqCst), 2);
    stack.drain().await;
}

async fn the_first_answer_survives_a_restart<S: Stack>() {
    let (site, (hooks, asked)) = (Site::new(), counting());
    let stack: S = start(&site, "", hooks.clone()).await;
    let webhook = Webhook::moderation(r#"{"text":"x"}"#);
    let first = ask(&stack, &webhook).await;
    // An answer is stored alongside its reply, in order: the second one is stored after the first.
    ask(&stack, &Webhook::moderation(r#"{"text":"y"}"#)).await;
    stack.drain().await;
    let stack: S = start(&site, "", hooks).await;
    let again = ask(&stack, &webhook).await;
    assert_eq!((&again.body, again.outcome()), (&first.body, "repeated"));
    assert_eq!(asked.load(Ordering::SeqCst), 2);
    stack.drain().await;
}

async fn the_signed_command_name_decides_which_handler_answers<S: Stack>() {
    let site = Site::new();
    let named = |name: &'static str| {
        command(move |command| async move { Ok(command.ephemeral(format!("{name}: {}", command.name()))) })
    };
    let commands = [("ticket".to_owned(), named("ticket")), ("mml".to_owned(), named("mml"))].into();
    let hooks = Hooks { commands, any_command: Some(named("any")), ..Hooks::default() };
    let stack: S = start(&site, "[hooks.custom_commands]\nby_url = [\"mml\"]\n", hooks).await;
    let text_for = async |webhook: Webhook| {
        let answer = ask(&stack, &webhook).await;
        serde_json::from_slice::<Value>(&answer.body).unwrap()["message"]["text"].as_str().unwrap().to_owned()
    };
    let signed = Webhook::command("ticket", "x", None);
    assert_eq!(text_for(Webhook { path: format!("{COMMANDS}?type=other"), ..signed }).await, "ticket: ticket");
    assert_eq!(text_for(Webhook::command("unknown", "x", None)).await, "any: unknown");
    // A click on markup that no command has sent: only the URL names it.
    let click = Webhook::push("click", r#"{"message":{"text":"x"},"form_data":{"mml_name":"form"}}"#);
    assert_eq!(text_for(Webhook { path: format!("{COMMANDS}?type=mml"), ..click }).await, "mml: mml");
    stack.drain().await;
}

async fn a_backlog_of_events_delays_no_hook<S: Stack>() {
    let (site, permits) = (Site::new(), Arc::new(Semaphore::new(0)));
    let waits = Arc::clone(&permits);
    let script = Script::new(move |_| Act::Await(Arc::clone(&waits)));
    let (hooks, _) = counting();
    let setup = Setup { worker: "concurrency = 2\nprefetch = 4".into(), ..Setup::default() };
    let stack = S::with_hooks(&site, &setup, script.router.clone(), hooks).await;
    for _ in 0..50 {
        assert_eq!(send(stack.public(), &Webhook::fresh()).await.unwrap().status, 200);
    }
    eventually("every handler is busy", || async { script.running.load(Ordering::SeqCst) == 2 }).await;
    for _ in 0..20 {
        assert_eq!(ask(&stack, &Webhook::moderation(r#"{"text":"x"}"#)).await.outcome(), "answered");
    }
    permits.add_permits(50);
    stack.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abandoned_worker_gets_no_more_hooks() {
    let (site, (hooks, _)) = (Site::new(), counting());
    let mut stack: stack::Services = start(&site, "", hooks).await;
    assert_eq!(ask(&stack, &Webhook::moderation("{}")).await.outcome(), "answered");
    stack.abandon_worker().await;
    eventually("the gateway finds no worker", || async {
        ask(&stack, &Webhook::moderation(r#"{"text":"x"}"#)).await.outcome() == "no_worker"
    })
    .await;
    stack.drain().await;
}

async fn a_drain_answers_the_hooks_in_hand<S: Stack>() {
    let (site, permits) = (Site::new(), Arc::new(Semaphore::new(0)));
    let (waits, running) = (Arc::clone(&permits), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&running);
    let hooks = moderation(move |hook| {
        let waits = Arc::clone(&waits);
        counted.fetch_add(1, Ordering::SeqCst);
        async move {
            waits.acquire().await.unwrap().forget();
            Ok(hook.rewrite().text("in the end"))
        }
    });
    let stack: S = start(&site, "[hooks.before_message_send]\ndeadline = \"5s\"\n", hooks).await;
    let (public, webhook) = (stack.public(), Webhook::moderation(r#"{"text":"x"}"#));
    let asked = tokio::spawn(async move { send(public, &webhook).await.unwrap() });
    eventually("the handler has the hook", || async { running.load(Ordering::SeqCst) == 1 }).await;
    // Polled in this order: the drain begins before the handler may finish.
    tokio::join!(biased; stack.drain(), async { permits.add_permits(1) });
    let answer = asked.await.unwrap();
    assert_eq!((text(&answer.body), answer.outcome()), (r#"{"message":{"text":"in the end"}}"#, "answered"));
}

async fn unsigned_hooks_are_refused<S: Stack>() {
    let (site, (hooks, asked)) = (Site::new(), counting());
    let stack: S = start(&site, "", hooks).await;
    let webhook = Webhook::moderation(r#"{"text":"x"}"#);
    let wrong = webhook.clone().set("x-signature", &"0".repeat(64));
    for (webhook, status) in
        [(wrong, 401), (webhook.clone().without("x-signature"), 400), (Webhook { method: "GET", ..webhook }, 405)]
    {
        assert_eq!(send(stack.public(), &webhook).await.unwrap().status, status);
    }
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    stack.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_whose_body_comes_during_the_drain_is_answered() {
    let (site, (hooks, _)) = (Site::new(), counting());
    let gateway = "drain_timeout = \"3s\"\nanswer_deadline = \"5900ms\"\nbody_timeout = \"10s\"".into();
    let rest = "[hooks.before_message_send]\ndeadline = \"5s\"".into();
    let setup = Setup { gateway, rest, ..Setup::default() };
    let stack = stack::Embedded::with_hooks(&site, &setup, Script::willing().router, hooks).await;
    let raw = Webhook::moderation(r#"{"text":"x"}"#).raw();
    let (first, rest) = raw.split_at(raw.len() - 5);
    let mut stream = crate::harness::wire::raw(stack.public(), first).await;
    eventually("the body is being read", || async { stack.metrics().gateway_in_flight.get() == 1 }).await;
    let public = stack.public();
    let drained = tokio::spawn(stack.drain());
    eventually("new connections are refused as draining", || async {
        send(public, &Webhook::fresh()).await.is_ok_and(|answer| answer.code() == "draining")
    })
    .await;
    tokio::io::AsyncWriteExt::write_all(&mut stream, rest).await.unwrap();
    let answer = crate::harness::wire::read_to_end(stream).await;
    assert!(answer.contains("x-streamgate-outcome: answered"), "{answer}");
    drained.await.unwrap();
}
