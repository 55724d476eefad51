//! Counts and logs the outcome of each webhook. By default each refusal that Stream does not repeat has a line, so that nobody
//! has to guess why an event did not arrive.

use crate::response::{self, Outcome};
use hyper::header::{CONTENT_LENGTH, HeaderMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use streamgate_core::allowance::Allowance;
use streamgate_core::envelope::header;
use streamgate_core::id::{Kind, header_id};
use streamgate_core::reason::Reason;
use streamgate_core::repeated::Repeated;
use streamgate_service::config::Lines;
use streamgate_service::metrics::Metrics;

/// The label if the app or kind is unknown.
const NONE: &str = "none";
/// Interval between summaries of refusals without a line of their own.
const SUMMARY: Duration = Duration::from_secs(60);
/// Characters of an API key that are logged: it is public, but a log need not spread it.
const KEY_END: usize = 4;

/// What a log line says about a request besides its outcome, without any of the body's content.
#[derive(Debug)]
pub(crate) struct RequestDetails {
    peer: IpAddr,
    key_end: Option<[u8; KEY_END]>,
    id: Option<String>,
    declared: Option<u64>,
    /// It carries one of Stream's headers, so its sender meant a webhook.
    is_webhook: bool,
    pub(crate) event_type: Option<String>,
    /// Length of the inflated body.
    pub(crate) bytes: Option<usize>,
}

impl RequestDetails {
    pub(crate) fn of(peer: IpAddr, headers: &HeaderMap) -> RequestDetails {
        let declared = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        let streams = [header::SIGNATURE, header::WEBHOOK_ID];
        RequestDetails {
            peer,
            key_end: headers.get(header::API_KEY).and_then(|key| end(key.as_bytes())),
            id: header_id(headers.get(header::WEBHOOK_ID).map(|id| id.as_bytes())),
            declared,
            is_webhook: streams.iter().any(|name| headers.contains_key(*name)),
            event_type: None,
            bytes: None,
        }
    }
}

/// The last characters of a key, if they are only a small part of it.
fn end(key: &[u8]) -> Option<[u8; KEY_END]> {
    let is_plain = key.iter().all(u8::is_ascii_alphanumeric);
    key.last_chunk().copied().filter(|_| is_plain && key.len() > 2 * KEY_END)
}

fn shown(end: [u8; KEY_END]) -> String {
    format!("…{}", end.map(char::from).iter().collect::<String>())
}

/// Whose webhook it was, as far as known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WebhookSource<'a> {
    pub(crate) app: Option<&'a str>,
    pub(crate) kind: Option<Kind>,
    pub(crate) is_signed: bool,
}

/// Counts outcomes and writes their lines.
#[derive(Debug)]
pub struct AccessLog {
    lines: Lines,
    pub(crate) metrics: Arc<Metrics>,
    refusals: Mutex<Allowance>,
    /// Connections that were refused before there was a request, by reason.
    connections: Mutex<Repeated>,
    /// Refusals for passing reasons, and hooks that the policy answered.
    repeated: Mutex<Repeated>,
}

impl AccessLog {
    /// Sets the counters of final refusals to 0, or rates and alerts would miss the first refusal.
    pub fn new(lines: Lines, metrics: Arc<Metrics>) -> AccessLog {
        for reason in Reason::ALL.into_iter().filter(|reason| response::status(*reason).is_client_error()) {
            metrics.gateway_refused.with_label_values(&[reason.as_str()]).reset();
            metrics.gateway_requests.with_label_values(&[NONE, NONE, reason.as_str()]).reset();
        }
        AccessLog {
            lines,
            metrics,
            refusals: Mutex::default(),
            connections: Mutex::default(),
            repeated: Mutex::default(),
        }
    }

    /// Counts and logs an answered webhook.
    pub(crate) fn answered(
        &self,
        of: WebhookSource<'_>,
        outcome: &Outcome,
        about: &RequestDetails,
        first_byte: Instant,
    ) {
        let (app, kind, label) =
            (of.app.unwrap_or(NONE), of.kind.map_or(NONE, Kind::as_str), response::outcome_label(outcome));
        self.metrics.gateway_requests.with_label_values(&[app, kind, label]).inc();
        // Of signed ones alone: a stranger that sends slowly must not look like slow answers to Stream.
        if of.is_signed {
            self.metrics.gateway_ack.with_label_values(&[kind]).observe(first_byte.elapsed().as_secs_f64());
        }
        match outcome {
            Ok(taken) => {
                if let Some(reason) = taken.policy() {
                    self.hook_unanswered(kind, reason);
                }
                if self.lines == Lines::All {
                    let RequestDetails { peer, id, event_type, bytes, .. } = about;
                    let ms = milliseconds(first_byte);
                    tracing::info!(app, kind, id, r#type = event_type, outcome = label, status = 200, ms, bytes, %peer, "webhook");
                }
            }
            Err(reason) => self.refused(&of, *reason, about, first_byte),
        }
    }

    fn refused(&self, of: &WebhookSource<'_>, reason: Reason, about: &RequestDetails, first_byte: Instant) {
        let (app, kind) = (of.app.unwrap_or(NONE), of.kind.map_or(NONE, Kind::as_str));
        let status = response::status(reason);
        let is_final = status != hyper::StatusCode::SERVICE_UNAVAILABLE;
        if about.is_webhook && is_final {
            self.metrics.gateway_refused.with_label_values(&[reason.as_str()]).inc();
        }
        if !is_final {
            self.busy(of.kind, reason);
        }
        let has_line = match self.lines {
            Lines::None => false,
            // An unverified sender must not be able to fill the log.
            Lines::All => of.is_signed || self.allows(reason),
            Lines::Failures => is_final && self.allows(reason),
        };
        if !has_line {
            return;
        }
        let RequestDetails { peer, key_end, id, declared, bytes, .. } = about;
        let (status, ms, advice) = (status.as_u16(), milliseconds(first_byte), response::advice(reason));
        tracing::warn!(
            app,
            kind,
            %reason,
            status,
            api_key = key_end.map(shown),
            id,
            content_length = declared,
            bytes,
            ms,
            %peer,
            advice,
            "refused a webhook"
        );
    }

    fn allows(&self, reason: Reason) -> bool {
        self.refusals.lock().unwrap_or_else(PoisonError::into_inner).allows(reason.as_str(), Instant::now())
    }

    /// Logs answers of 503 once a minute. Stream repeats a refused push, and treats a refused hook as allowed.
    fn busy(&self, kind: Option<Kind>, reason: Reason) {
        let what = match kind {
            Some(kind @ (Kind::BeforeMessageSend | Kind::CustomCommand)) => {
                return self.hook_unanswered(kind.as_str(), reason);
            }
            Some(Kind::Push) | None => format!("webhooks are answered 503: {reason}"),
        };
        self.repeatedly(&what, response::advice(reason));
    }

    fn hook_unanswered(&self, kind: &str, reason: Reason) {
        self.repeatedly(&format!("hooks are answered by their policy: {kind}, {reason}"), response::advice(reason));
    }

    fn repeatedly(&self, what: &str, advice: &str) {
        if self.lines == Lines::None {
            return;
        }
        let mut repeated = self.repeated.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(times) = repeated.happened(what, Instant::now()) {
            tracing::warn!(times, advice, "{what}");
        }
    }

    /// Whether the lines of accepted webhooks include their types.
    pub(crate) fn names_types(&self) -> bool {
        self.lines == Lines::All
    }

    /// Counts and logs a head that was not complete in time, which its connection has answered.
    pub(crate) fn head_timed_out(&self, peer: IpAddr) {
        self.metrics.gateway_requests.with_label_values(&[NONE, NONE, Reason::HeaderTimeout.as_str()]).inc();
        self.connection_refused(Reason::HeaderTimeout, peer);
    }

    /// Counts and logs input that is not a readable request; the HTTP library has answered it, or no answer was possible.
    pub(crate) fn unreadable(&self, reason: Reason, peer: IpAddr) {
        self.metrics.gateway_requests.with_label_values(&[NONE, NONE, reason.as_str()]).inc();
        self.connection_refused(reason, peer);
    }

    fn connection_refused(&self, reason: Reason, peer: IpAddr) {
        if self.lines == Lines::None {
            return;
        }
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(times) = connections.happened(reason.as_str(), Instant::now()) {
            tracing::warn!(%reason, times, %peer, advice = response::advice(reason), "refused input that is not a webhook");
        }
    }

    /// Logs every minute how many refusals had no line of their own. Runs until it is dropped.
    pub(crate) async fn summaries(&self) {
        loop {
            tokio::time::sleep(SUMMARY).await;
            self.summary();
        }
    }

    /// Logs how many refusals had no line of their own since the last summary.
    pub(crate) fn summary(&self) {
        let left_out = self.refusals.lock().unwrap_or_else(PoisonError::into_inner).take_left_out();
        if let Some(left_out) = left_out {
            tracing::warn!(left_out, "more refused webhooks than log lines");
        }
        let connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner).take_unlogged();
        for (reason, times) in connections {
            tracing::warn!(reason, times, "refused more input that is not a webhook");
        }
        let repeated = self.repeated.lock().unwrap_or_else(PoisonError::into_inner).take_unlogged();
        for (what, times) in repeated {
            tracing::warn!(times, "{what}");
        }
    }
}

fn milliseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_shows_its_end_only() {
        assert_eq!(end(b"a1b23cdefgh4").map(shown).as_deref(), Some("…fgh4"));
        for none in ["abcd", "abcdefgh", "", "a b c d e f g", "é1b23cdefgh4"] {
            assert_eq!(end(none.as_bytes()), None, "{none}");
        }
    }
}
