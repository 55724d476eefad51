//! From a signed body to a durable event.

use crate::head::Head;
use crate::hooks::AnswerHook;
use crate::paths::Target;
use bytes::Bytes;
use std::borrow::Cow;
use std::time::Instant;
use streamgate_core::{
    attempts::Attempts,
    envelope::{Envelope, PENDING, safe_cid, safe_type},
    hook::{self, SignedCommand},
    id::{DedupBy, KeyedBy, Kind, PushFacts, body_id, idempotency_key},
    peek::{Peek, peek},
    ports::{Accepted, Enqueue, StoreError},
    reason::Reason,
};
use streamgate_service::config::DedupConfig;
use streamgate_service::metrics::Metrics;

/// What the configuration says about the identity of events.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    pub(crate) by: DedupBy,
    /// In milliseconds.
    pub(crate) max_age_ms: Option<i64>,
}

impl Identity {
    pub(crate) fn new(config: &DedupConfig) -> Identity {
        let max_age_ms = config.max_age.map(|age| i64::try_from(age.as_millis()).unwrap_or(i64::MAX));
        Identity { by: config.by, max_age_ms }
    }
}

impl Identity {
    /// Refuses for good a body that is not a webhook of this kind, or is too old.
    fn judge(&self, target: Target, peek: &Peek<'_>, received_at_ms: i64) -> Result<(), Reason> {
        // A type with a dot is an event's. Nothing else is judged: a field that Stream adds later must not disable a hook.
        let is_event = peek.event_type.as_deref().is_some_and(|name| name.contains('.'));
        if is_event && (target.kind != Kind::Push || target.event_type.is_some()) {
            return Err(Reason::WrongKind);
        }
        match (target.kind, self.max_age_ms, peek.created_at_ms) {
            (Kind::Push, Some(max_age), Some(at)) if at < received_at_ms.saturating_sub(max_age) => Err(Reason::TooOld),
            _ => Ok(()),
        }
    }
}

/// The type in an event's body. A body cannot claim to be a callback of a pending message: only its path makes it one.
fn own_type<'p>(peek: &'p Peek<'_>) -> Option<&'p str> {
    peek.event_type.as_deref().filter(|name| !name.starts_with(PENDING))
}

/// A command's name: the signed one; if there is none, the URL's, provided that a handler for it is configured.
fn command<'b>(body: &'b [u8], query_type: Option<String>, hooks: &dyn AnswerHook) -> Option<Cow<'b, str>> {
    match hook::command(body) {
        SignedCommand::Name(name) => Some(name),
        SignedCommand::Absent => query_type.filter(|name| hooks.knows_command(name)).map(Cow::from),
        SignedCommand::Malformed => None,
    }
}

/// The log's advice about a command for which no handler is asked.
const NO_COMMAND: &str = "invalid or missing command name: expected [A-Za-z0-9_-]{1,64} in the signed message or, if that \
                          has none, in the `type` of the URL, if hooks.custom_commands lists it (commands, by_url)";

/// Makes the event or the call from a signed body. `hooks` knows which commands there are.
pub(crate) fn envelope(
    head: Head,
    body: Bytes,
    received_at_ms: i64,
    identity: Identity,
    hooks: &dyn AnswerHook,
) -> Result<Envelope, Reason> {
    let Head { client, target, app, api_key, signature, id, attempt, traceparent, further, query_type, declared: _ } =
        head;
    let Target { kind, event_type: path_type } = target;
    let id = id.unwrap_or_else(|| body_id(&body));
    let signature = signature.to_hex();
    let bytes = body.clone();
    let peek = peek(&bytes);
    let named = identity.judge(target, &peek, received_at_ms).and_then(|()| match kind {
        Kind::Push => Ok(path_type.or(own_type(&peek)).map(Cow::from)),
        // The body of this kind has no type.
        Kind::BeforeMessageSend => Ok(Some(Cow::from(kind.as_str()))),
        Kind::CustomCommand => command(&bytes, query_type, hooks).map(Some).ok_or(Reason::Unhandled),
    });
    let event_type = named.inspect_err(|reason| {
        // A refusal has its own log line; this reason is answered by the policy instead.
        if *reason == Reason::Unhandled {
            let peer = client.address;
            tracing::debug!(app = &*app, kind = kind.as_str(), id, %reason, %peer, "no handler is asked: {NO_COMMAND}");
        }
    })?;
    let by = match kind {
        Kind::Push => {
            let is_dated = peek.created_at_ms.is_some();
            identity.by.of_push(&PushFacts { id: &id, path_type, is_dated })
        }
        Kind::BeforeMessageSend | Kind::CustomCommand if hooks.is_by_body(kind) => KeyedBy::Body,
        Kind::BeforeMessageSend | Kind::CustomCommand => KeyedBy::Id(&id),
    };
    Ok(Envelope {
        key: idempotency_key(&app, kind, path_type, by, &signature),
        app: app.as_ref().to_owned(),
        kind,
        event_type: safe_type(event_type.as_deref()).to_owned(),
        id,
        webhook_attempt: attempt,
        api_key,
        signature,
        received_at_ms,
        attempt: 1,
        attempts: Attempts::default(),
        cid: safe_cid(peek.cid.as_deref()).map(str::to_owned),
        route: None,
        replay: None,
        traceparent,
        further,
        body,
    })
}

/// Makes an event durable, or finds out that it is a repeat.
pub(crate) async fn store<E: Enqueue>(enqueue: &E, metrics: &Metrics, envelope: Envelope) -> Result<Accepted, Reason> {
    let (key, started) = (envelope.key.clone(), Instant::now());
    let accepted = enqueue.enqueue(envelope).await.map_err(|error| {
        // Debug only: the store logs once that it fails and the metrics count how often, which a line for each event would bury.
        tracing::debug!(%error, key, "not durable: answered 503");
        match error {
            StoreError::Full(_) => Reason::StoreFull,
            StoreError::Unavailable(_) | StoreError::Gone(_) => Reason::StoreUnavailable,
        }
    })?;
    if accepted != Accepted::Duplicate {
        metrics.gateway_publish.observe(started.elapsed().as_secs_f64());
    }
    Ok(accepted)
}
