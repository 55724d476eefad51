//! From a signed body to a durable event: seen before, or enqueue and mark.

use crate::head::Head;
use crate::hooks::AnswerHook;
use crate::route::Target;
use bytes::Bytes;
use std::borrow::Cow;
use std::time::Instant;
use streamgate_core::{
    envelope::{Envelope, PENDING, rfc3339, safe_cid, safe_type},
    hook::{self, SignedCommand},
    id::{By, DedupBy, Kind, PushFacts, body_id, idempotency_key},
    peek::peek,
    ports::{Accepted, Enqueue, Seen, StoreError},
    reason::Reason,
};
use streamgate_service::config::DedupConfig;
use streamgate_service::metrics::Metrics;

/// What the configuration says of identity.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    pub(crate) by: DedupBy,
    /// Milliseconds.
    pub(crate) max_age_ms: Option<i64>,
}

impl Identity {
    pub(crate) fn new(config: &DedupConfig) -> Identity {
        let max_age_ms = config.max_age.map(|age| i64::try_from(age.as_millis()).unwrap_or(i64::MAX));
        Identity { by: config.by, max_age_ms }
    }
}

/// The event, or the call, that a signed body is. `hooks` knows which commands there are.
pub(crate) fn envelope(
    head: Head,
    body: Bytes,
    received_at_ms: i64,
    identity: Identity,
    hooks: &dyn AnswerHook,
) -> Result<Envelope, Reason> {
    let Head { client, target, app, api_key, signature, id, attempt, traceparent, query_type } = head;
    let Target { kind, event_type: path_type } = target;
    let id = id.unwrap_or_else(|| body_id(&body));
    let signature = signature.to_hex();
    let bytes = body.clone();
    let peek = peek(&bytes);
    // A type with a dot is an event's. Nothing else is judged here: a field that Stream adds later must not close a hook.
    let is_elsewhere = kind != Kind::Push || path_type.is_some();
    if is_elsewhere && let Some(event_type) = peek.event_type.as_deref().filter(|name| name.contains('.')) {
        tracing::error!(
            app = &*app,
            kind = kind.as_str(),
            id,
            event_type = safe_type(Some(event_type)),
            peer = %client.address,
            "refused for good: an event was sent to the URL of another kind of webhook; check the URLs in Stream's settings. \
             Or somebody replays what was signed for another path"
        );
        return Err(Reason::WrongKind);
    }
    if let (Kind::Push, Some(max_age), Some(created_at)) = (kind, identity.max_age_ms, peek.created_at_ms)
        && created_at < received_at_ms.saturating_sub(max_age)
    {
        let created_at = rfc3339(created_at);
        tracing::warn!(app = &*app, id, created_at, peer = %client.address, "refused for good: older than dedup.max_age");
        return Err(Reason::TooOld);
    }
    let event_type = match kind {
        // A body cannot call itself a callback of a pending message: its path says that it is one.
        Kind::Push => {
            let own = peek.event_type.as_deref().filter(|name| !name.starts_with(PENDING));
            path_type.or(own).map(Cow::from)
        }
        // Its body has no type.
        Kind::BeforeMessageSend => Some(Cow::from(kind.as_str())),
        Kind::CustomCommand => match hook::command(&bytes) {
            SignedCommand::Name(name) => Some(name),
            SignedCommand::Absent => query_type.filter(|name| hooks.knows_command(name)).map(Cow::from),
            SignedCommand::Malformed => None,
        },
    };
    if kind == Kind::CustomCommand && event_type.is_none() {
        tracing::warn!(
            app = &*app,
            id,
            peer = %client.address,
            "a command without a name that can be used: it is [A-Za-z0-9_-]{{1,64}} in the signed message, or where that has \
             none the `type` of the URL if [hooks.custom_commands.commands] has it"
        );
        return Err(Reason::Unhandled);
    }
    let by = match kind {
        Kind::Push => {
            let is_dated = peek.created_at_ms.is_some();
            identity.by.of_push(&PushFacts { id: &id, path_type, is_dated })
        }
        Kind::BeforeMessageSend | Kind::CustomCommand if hooks.is_by_body(kind) => By::Body,
        Kind::BeforeMessageSend | Kind::CustomCommand => By::Id(&id),
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
        cid: safe_cid(peek.cid.as_deref()).map(str::to_owned),
        route: None,
        replay: None,
        traceparent,
        body,
    })
}

/// Marks an event as seen only after it is durable: a memory that is lost or ahead costs duplicates, never events.
pub(crate) async fn store<E: Enqueue, S: Seen>(
    enqueue: &E,
    seen: &S,
    metrics: &Metrics,
    envelope: Envelope,
) -> Result<Accepted, Reason> {
    match seen.contains(&envelope.key).await {
        Ok(true) => return Ok(Accepted::Duplicate),
        Ok(false) => {}
        Err(error) => {
            metrics.gateway_dedup_errors.inc();
            tracing::debug!(%error, "cannot look up what was seen; going on without");
        }
    }
    let key = envelope.key.clone();
    let started = Instant::now();
    let accepted = enqueue.enqueue(envelope).await.map_err(|error| {
        // The store tells once that it fails, the metrics how often: a line for each event would only bury that.
        tracing::debug!(%error, key, "not durable: answered 503");
        match error {
            StoreError::Full(_) => Reason::StoreFull,
            StoreError::Unavailable(_) => Reason::StoreUnavailable,
        }
    })?;
    metrics.gateway_publish.observe(started.elapsed().as_secs_f64());
    if let Err(error) = seen.mark(&key).await {
        metrics.gateway_dedup_errors.inc();
        tracing::debug!(%error, "cannot mark an event as seen; a repeat of it would be enqueued again");
    }
    Ok(accepted)
}
