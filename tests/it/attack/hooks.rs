//! Hooks under overload: Stream does not repeat a hook, and stores the message of one that is refused.

use crate::harness::process::{Server, Setup, Site};
use crate::harness::wire::{MODERATION, Webhook, raw, read_to_end, send};

const WIDE: usize = 64 << 10;

async fn start(site: &Site, gateway: &str, on_failure: &str) -> Server {
    let rest = format!("[hooks.before_message_send]\non_failure = \"{on_failure}\"\nfailure_text = \"not now\"\n");
    site.configure(&Setup { gateway: format!("max_body = \"64KiB\"\n{gateway}"), rest, ..Setup::default() });
    site.start().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_under_overload_is_answered_by_its_policy() {
    let message = r#"{"text":"hello","n":1.10}"#;
    let rejected = r#"{"message":{"type":"error","text":"not now"}}"#;
    for (on_failure, expected) in [("allow", format!("{{\"message\":{message}}}")), ("reject", rejected.to_owned())] {
        let site = Site::new();
        let server = start(&site, "max_in_flight = 1", on_failure).await;
        let lock = site.hang_store();
        let held = server.hold(1, WIDE).await;
        // Signed, but over the limit of signed requests.
        let answer = send(server.public, &Webhook::moderation(message)).await.unwrap();
        assert_eq!((answer.status.as_u16(), answer.outcome()), (200, "in_flight_limit"));
        assert_eq!(answer.body, expected);
        drop((lock, held));
        assert!(server.terminate().await.success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_that_cannot_be_verified_in_time_fails_as_its_policy_says() {
    for (on_failure, status) in [("allow", 503), ("reject", 200)] {
        let site = Site::new();
        let server = start(&site, "memory_budget = \"160KiB\"\nbody_timeout = \"300ms\"", on_failure).await;
        // A slow body: its sender may be a stranger, and gets the answer that any hook gets.
        let hook = Webhook::moderation(r#"{"text":"hello"}"#).add("connection", "close").raw();
        let slow = read_to_end(raw(server.public, &hook[..hook.len() - 1]).await).await;
        assert!(slow.starts_with(if status == 200 { "HTTP/1.1 200 " } else { "HTTP/1.1 408 " }), "{slow:?}");
        assert_eq!(slow.contains("not now"), status == 200, "{slow:?}");
        // Without memory to inflate it.
        let lock = site.hang_store();
        let held = server.hold(2, WIDE).await;
        let zipped = Webhook::moderation(r#"{"text":"hello"}"#).zipped();
        let answer = send(server.public, &zipped).await.unwrap();
        assert_eq!(answer.status, status, "{answer:?}");
        assert_eq!(answer.outcome() == "memory_budget", status == 200, "{answer:?}");
        // A wrong signature is a final refusal, not overload: the policy never answers it.
        let forged = Webhook::moderation("{}").on_the_wire("{}");
        assert_eq!(send(server.public, &Webhook { path: MODERATION.into(), ..forged }).await.unwrap().status, 401);
        drop((lock, held));
        assert!(server.terminate().await.success());
    }
}
