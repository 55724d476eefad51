//! From a signed body to a durable event: seen before, or enqueue and mark.

use crate::head::Head;
use bytes::Bytes;
use std::time::Instant;
use streamgate_core::{
    envelope::{Envelope, safe_cid, safe_type},
    hook,
    id::{Kind, body_id, idempotency_key},
    peek::peek,
    ports::{Accepted, Enqueue, Seen, StoreError},
    reason::Reason,
};
use streamgate_service::metrics::Metrics;

/// The event, or the call, that a signed body is.
pub(crate) fn envelope(head: Head, body: Bytes, received_at_ms: i64) -> Envelope {
    let Head { target, app, api_key, signature, id, attempt, traceparent, query_type } = head;
    let id = id.unwrap_or_else(|| body_id(&body));
    let signature = signature.to_hex();
    let bytes = body.clone();
    let peek = peek(&bytes);
    let command;
    let event_type = match target.kind {
        Kind::Push => target.event_type.or(peek.event_type.as_deref()),
        // Its body has no type.
        Kind::BeforeMessageSend => Some(target.kind.as_str()),
        Kind::CustomCommand => {
            command = hook::command(&bytes);
            command.as_deref().or(query_type.as_deref())
        }
    };
    // Two callbacks may carry one body under one id; the path tells them apart.
    let id_of_key = target.event_type.map_or_else(|| id.clone(), |path| format!("{path}/{id}"));
    Envelope {
        key: idempotency_key(&app, target.kind, &id_of_key, &signature),
        app: app.as_ref().to_owned(),
        kind: target.kind,
        event_type: safe_type(event_type).to_owned(),
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
    }
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
