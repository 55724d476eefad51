//! From a signed body to a durable event: seen before, or enqueue and mark.

use crate::route::Target;
use bytes::Bytes;
use std::time::Instant;
use streamgate_core::{
    envelope::{Envelope, safe_cid, safe_traceparent, safe_type},
    hook,
    id::{Kind, idempotency_key, webhook_id},
    peek::peek,
    ports::{Accepted, Enqueue, Seen, StoreError},
    reason::Reason,
    signature::Signature,
};
use streamgate_service::metrics::Metrics;

/// What came beside the body.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Beside<'a> {
    pub(crate) target: Target,
    pub(crate) app: &'a str,
    pub(crate) api_key: &'a str,
    pub(crate) signature: Signature,
    pub(crate) webhook_id: Option<&'a [u8]>,
    pub(crate) webhook_attempt: Option<&'a [u8]>,
    pub(crate) traceparent: Option<&'a [u8]>,
    /// The command's name as the URL has it.
    pub(crate) query_type: Option<&'a str>,
}

pub(crate) fn envelope(beside: &Beside<'_>, body: Bytes, received_at_ms: i64) -> Envelope {
    let id = webhook_id(beside.webhook_id, &body);
    let signature = beside.signature.to_hex();
    let bytes = body.clone();
    let peek = peek(&bytes);
    let command;
    let event_type = match beside.target.kind {
        Kind::Push => beside.target.event_type.or(peek.event_type.as_deref()),
        // Its body has no type.
        Kind::BeforeMessageSend => Some(beside.target.kind.as_str()),
        Kind::CustomCommand => {
            command = hook::command(&bytes);
            command.as_deref().or(beside.query_type)
        }
    };
    // Two callbacks may carry one body under one id; the path tells them apart.
    let id_of_key = beside.target.event_type.map_or_else(|| id.clone(), |path| format!("{path}/{id}"));
    let attempt = beside.webhook_attempt.and_then(|text| std::str::from_utf8(text).ok()?.trim().parse().ok());
    Envelope {
        app: beside.app.to_owned(),
        kind: beside.target.kind,
        event_type: safe_type(event_type).to_owned(),
        key: idempotency_key(beside.app, beside.target.kind, &id_of_key, &signature),
        id,
        webhook_attempt: attempt.unwrap_or(1),
        api_key: beside.api_key.to_owned(),
        signature,
        received_at_ms,
        attempt: 1,
        cid: safe_cid(peek.cid.as_deref()).map(str::to_owned),
        route: None,
        replay: None,
        traceparent: safe_traceparent(beside.traceparent).map(str::to_owned),
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
