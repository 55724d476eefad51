//! Attacks by somebody who has recorded signed requests: replays, and bodies on the path of another kind.

use crate::harness::eventually;
use crate::harness::process::{Setup, Site};
use crate::harness::receiver::Receiver;
use crate::harness::wire::{Answer, COMMANDS, MODERATION, SECRET, Webhook, send};
use streamgate_core::signature::SigningKey;

const PASSED: &str = "/webhooks/stream/pending-message/PassOnPendingMessage";
const DELETED: &str = "/webhooks/stream/pending-message/DeletedPendingMessage";

/// A unique event, dated now.
fn dated(id: &str) -> Webhook {
    dated_at(id, jiff::Timestamp::now())
}

fn dated_at(id: &str, created_at: jiff::Timestamp) -> Webhook {
    let number = crate::harness::unique();
    Webhook::push(id, format!(r#"{{"type":"message.new","created_at":"{created_at}","number":{number}}}"#))
}

fn at(path: &str, webhook: Webhook) -> Webhook {
    Webhook { path: path.into(), ..webhook }
}

async fn outcome(server: std::net::SocketAddr, webhook: &Webhook) -> (u16, String) {
    let answer: Answer = send(server, webhook).await.unwrap();
    let outcome = if answer.status == 200 { answer.outcome().to_owned() } else { answer.code() };
    (answer.status.as_u16(), outcome)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signed_body_is_handled_once_whatever_id_it_comes_under() {
    let site = Site::new();
    let service = Receiver::willing().await;
    site.configure(&Setup { rest: service.route(), ..Setup::default() });
    let server = site.start().await;
    let event = dated("first");
    let to = server.public;
    assert_eq!(outcome(to, &event).await, (200, "enqueued".into()));
    for id in ["second", "first", ""] {
        assert_eq!(outcome(to, &event.clone().set("x-webhook-id", id)).await, (200, "duplicate".into()), "{id:?}");
    }
    assert_eq!(outcome(to, &event.clone().without("x-webhook-id")).await, (200, "duplicate".into()));
    // Another body under a known id is a new event.
    assert_eq!(outcome(to, &dated("first")).await, (200, "enqueued".into()));
    // Without a date, equal bodies under two ids are two events.
    let undated = Webhook::push("a", r#"{"type":"user.updated"}"#);
    assert_eq!(outcome(to, &undated).await, (200, "enqueued".into()));
    assert_eq!(outcome(to, &undated.clone().set("x-webhook-id", "b")).await, (200, "enqueued".into()));
    assert_eq!(outcome(to, &undated).await, (200, "duplicate".into()));
    // Both callbacks of a pending message may carry the same body; each is taken once.
    let pending = Webhook::push("p", r#"{"message":{"id":"m"},"metadata":{}}"#);
    for path in [PASSED, DELETED] {
        assert_eq!(outcome(to, &at(path, pending.clone())).await, (200, "enqueued".into()), "{path}");
        let again = at(path, pending.clone().set("x-webhook-id", "q"));
        assert_eq!(outcome(to, &again).await, (200, "duplicate".into()), "{path}");
    }
    eventually("all are handled", || async { service.received().len() == 6 }).await;
    let key = format!("chat:push:{}", &event.headers.iter().find(|(name, _)| name == "x-signature").unwrap().1[..32]);
    let keys: Vec<_> = service.received().iter().map(|one| one.header("x-streamgate-key").to_owned()).collect();
    assert!(keys.contains(&key), "{key} in {keys:?}");
    assert!(server.terminate().await.success());
    assert_eq!(service.received().len(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn dedup_by_id_takes_a_body_under_another_id_as_another_event() {
    let site = Site::new();
    site.configure(&Setup { rest: "[dedup]\nby = \"id\"".into(), ..Setup::default() });
    let server = site.start().await;
    let event = dated("first");
    assert_eq!(outcome(server.public, &event).await, (200, "enqueued".into()));
    assert_eq!(outcome(server.public, &event.clone().set("x-webhook-id", "second")).await, (200, "enqueued".into()));
    assert_eq!(outcome(server.public, &event).await, (200, "duplicate".into()));
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_event_is_refused_where_max_age_says_so() {
    let site = Site::new();
    site.configure(&Setup { rest: "[dedup]\nmax_age = \"1h\"".into(), ..Setup::default() });
    let server = site.start().await;
    let hours = |hours: i64| jiff::Timestamp::now() - jiff::SignedDuration::from_hours(hours);
    assert_eq!(outcome(server.public, &dated_at("old", hours(2))).await, (400, "too_old".into()));
    assert_eq!(outcome(server.public, &dated_at("new", hours(0))).await, (200, "enqueued".into()));
    assert_eq!(outcome(server.public, &dated_at("ahead", hours(-2))).await, (200, "enqueued".into()));
    assert_eq!(
        outcome(server.public, &Webhook::fresh()).await,
        (200, "enqueued".into()),
        "an event without a date is never too old"
    );
    site.logged("max_age").await;
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_refused_on_the_path_of_another_kind() {
    let site = Site::new();
    let rest = "[hooks.custom_commands.commands.ticket]\nreply = \"opened\"\n\
                [hooks.before_message_send]\nrules = [{ pattern = 'casino', action = 'reject' }]\n";
    site.configure(&Setup { rest: rest.into(), ..Setup::default() });
    let server = site.start().await;
    let commands = format!("{COMMANDS}?type=ticket");
    for path in [MODERATION, &commands, PASSED, DELETED] {
        assert_eq!(outcome(server.public, &at(path, dated("event"))).await, (400, "wrong_kind".into()), "{path}");
    }
    site.logged("wrong_kind").await;
    // Fields that Stream may yet add to a hook's body do not get it refused.
    let message = r#"{"type":"regular","message":{"text":"hello","type":"a.b"},"created_at":"2026-01-01T00:00:00Z"}"#;
    assert_eq!(outcome(server.public, &at(MODERATION, Webhook::push("h", message))).await, (200, "answered".into()));
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_cannot_claim_to_be_a_pending_message_callback() {
    let site = Site::new();
    let service = Receiver::willing().await;
    let route = service.route().replace("[\"*\"]", "[\"pending_message.*\"]");
    site.configure(&Setup { rest: route, ..Setup::default() });
    let server = site.start().await;
    let body = r#"{"type":"pending_message.deleted","message":{"id":"m"}}"#;
    assert_eq!(outcome(server.public, &Webhook::push("spoof", body)).await, (200, "enqueued".into()));
    let pending = Webhook::push("real", r#"{"message":{"id":"m"},"metadata":{}}"#);
    assert_eq!(outcome(server.public, &at(DELETED, pending)).await, (200, "enqueued".into()));
    eventually("both are settled", || async {
        let settled =
            async |labels: &str| server.metric(&format!("streamgate_worker_deliveries_total{{{labels}}}")).await;
        settled("outcome=\"done\",route=\"app\"").await == 1.0
            && settled("outcome=\"unmatched\",route=\"none\"").await == 1.0
    })
    .await;
    assert_eq!(service.ids(), ["real".to_owned()].into());
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_name_counts_only_if_it_is_signed_or_configured() {
    let site = Site::new();
    let service = Receiver::willing().await;
    let rest = format!(
        "[hooks.custom_commands]\nforward = {{ url = \"{}/{{type}}\" }}\n[hooks.custom_commands.commands.ticket]\nreply = \"opened\"\n",
        service.url()
    );
    site.configure(&Setup { rest, ..Setup::default() });
    let server = site.start().await;
    let unnamed = Webhook::push("u", r#"{"message":{"text":"hello"},"user":{"id":"ann"}}"#);
    let asked = |query: &str| at(&format!("{COMMANDS}{query}"), unnamed.clone().set("x-webhook-id", query));
    assert_eq!(outcome(server.public, &asked("?type=ticket")).await, (200, "answered".into()));
    // A name that is neither signed nor configured reaches no service.
    for query in ["?type=delete_account", "?type=..%2Fadmin", ""] {
        assert_eq!(outcome(server.public, &asked(query)).await, (200, "unhandled".into()), "{query}");
    }
    // The signed name decides, whatever the URL says; an invalid signed name is not made valid.
    let signed = at(&format!("{COMMANDS}?type=ticket"), Webhook::command("../admin", "", None));
    assert_eq!(outcome(server.public, &signed).await, (200, "unhandled".into()));
    assert_eq!(service.received().len(), 0);
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn within_the_replay_window_a_hook_gets_its_first_answer() {
    let site = Site::new();
    let hook =
        "[hooks.before_message_send]\nreplay_window = \"1h\"\nrules = [{ pattern = 'casino', action = 'reject' }]\n";
    site.configure(&Setup { rest: hook.into(), ..Setup::default() });
    let server = site.start().await;
    let message = Webhook::moderation(r#"{"text":"hello"}"#);
    assert_eq!(outcome(server.public, &message).await, (200, "answered".into()));
    let again = message.clone().set("x-webhook-id", "another");
    assert_eq!(outcome(server.public, &again).await, (200, "repeated".into()));
    assert_eq!(outcome(server.public, &message.without("x-webhook-id")).await, (200, "repeated".into()));
    assert!(server.terminate().await.success());
    // The first answer survives a restart.
    let server = site.start().await;
    assert_eq!(outcome(server.public, &again).await, (200, "repeated".into()));
    assert_eq!(outcome(server.public, &Webhook::moderation(r#"{"text":"other"}"#)).await, (200, "answered".into()));
    assert!(server.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_body_under_two_secrets_is_two_events() {
    let site = Site::new();
    let other = "another_secret_for_the_rotation";
    site.configure(&Setup::default());
    let text = std::fs::read_to_string(site.config()).unwrap();
    site.write("streamgate.toml", text.replace(&format!("[\"{SECRET}\"]"), &format!("[\"{SECRET}\", \"{other}\"]")));
    let server = site.start().await;
    let event = dated("rotated");
    assert_eq!(outcome(server.public, &event).await, (200, "enqueued".into()));
    let signature = SigningKey::new(other.as_bytes()).sign(&event.body).to_hex();
    let again = event.set("x-signature", &signature);
    assert_eq!(
        outcome(server.public, &again).await,
        (200, "enqueued".into()),
        "a rotation of secrets costs one repeat"
    );
    assert_eq!(outcome(server.public, &again).await, (200, "duplicate".into()));
    assert!(server.terminate().await.success());
}
