//! Builds responses. This file alone maps reasons to statuses.

use crate::answered::Answered;
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use streamgate_core::{ports::Accepted, reason::Reason};

const OUTCOME: HeaderName = HeaderName::from_static("x-streamgate-outcome");
const JSON: HeaderValue = HeaderValue::from_static("application/json");
/// In seconds. Stream has its own schedule, but a proxy in between may follow this.
const RETRY_SOON: HeaderValue = HeaderValue::from_static("1");

/// An accepted request.
#[derive(Clone, Debug)]
pub(crate) enum Taken {
    Event(Accepted),
    Hook(Answered),
}

impl Taken {
    /// Why the policy answered a hook, if it did.
    pub(crate) fn policy(&self) -> Option<Reason> {
        match self {
            Taken::Event(_) => None,
            Taken::Hook(answered) => answered.policy(),
        }
    }
}

/// The outcome of a request.
pub(crate) type Outcome = Result<Taken, Reason>;

/// The outcome's label in metrics and in the response header.
pub(crate) fn outcome_label(outcome: &Outcome) -> &'static str {
    match outcome {
        Ok(Taken::Event(Accepted::Enqueued)) => "enqueued",
        Ok(Taken::Event(Accepted::Spooled)) => "spooled",
        Ok(Taken::Event(Accepted::Duplicate)) => "duplicate",
        Ok(Taken::Hook(answered)) => answered.label(),
        Err(reason) => reason.as_str(),
    }
}

/// Stream repeats after 408, 429 and 5xx and never after another 4xx: a refusal for a passing reason must use one of the former.
pub(crate) fn status(reason: Reason) -> StatusCode {
    match reason {
        Reason::MissingApiKey
        | Reason::MalformedApiKey
        | Reason::MissingSignature
        | Reason::MalformedSignature
        | Reason::BadGzip
        | Reason::BadEncoding
        | Reason::WrongKind
        | Reason::TooOld
        // The HTTP library answers these, or no answer is possible.
        | Reason::MalformedHttp
        | Reason::TlsOnPlainPort
        | Reason::Http2OnPlainPort
        | Reason::TlsFailed
        | Reason::UnexpectedProxyHeader
        | Reason::MissingProxyHeader => StatusCode::BAD_REQUEST,
        Reason::HeadTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        Reason::UnknownKey | Reason::WrongSignature => StatusCode::UNAUTHORIZED,
        Reason::PeerNotAllowed => StatusCode::FORBIDDEN,
        Reason::NotFound => StatusCode::NOT_FOUND,
        Reason::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        Reason::HeaderTimeout | Reason::BodyTimeout | Reason::BodyIncomplete | Reason::Displaced => {
            StatusCode::REQUEST_TIMEOUT
        }
        Reason::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        Reason::UnsupportedEncoding => StatusCode::UNSUPPORTED_MEDIA_TYPE,
        Reason::InFlightLimit
        | Reason::MemoryBudget
        | Reason::Draining
        | Reason::DeadlineExceeded
        | Reason::StoreUnavailable
        | Reason::StoreFull => StatusCode::SERVICE_UNAVAILABLE,
        // Reasons of the worker, which has no caller to answer, and of hooks, which are always answered 200.
        Reason::Rejected
        | Reason::RetriesExhausted
        | Reason::Unmatched
        | Reason::RouteUnknown
        | Reason::Parked
        | Reason::ParkedFull
        | Reason::Poison
        | Reason::DroppedByBroker
        | Reason::Unrouted
        | Reason::NoWorker
        | Reason::Unhandled
        | Reason::HookFailed
        | Reason::HookTimeout => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Whether the same request may be accepted later.
pub(crate) fn is_passing(reason: Reason) -> bool {
    matches!(status(reason), StatusCode::REQUEST_TIMEOUT | StatusCode::SERVICE_UNAVAILABLE)
}

/// What the caller can do about it.
pub(crate) fn advice(reason: Reason) -> &'static str {
    match reason {
        Reason::MalformedHttp => "the request is not valid HTTP/1.1",
        Reason::HeadTooLarge => "the headers exceed 16 KiB, or there are more than 100",
        Reason::TlsOnPlainPort => {
            "this port speaks plain HTTP: use an http:// URL, or set gateway.tls, or put TLS in front"
        }
        Reason::Http2OnPlainPort => "without TLS this port speaks HTTP/1.1: have the proxy in front speak that",
        Reason::TlsFailed => "this port speaks TLS: use an https:// URL, and a certificate that the sender trusts",
        Reason::UnexpectedProxyHeader => {
            "the balancer sends a PROXY header: set gateway.proxy_protocol = true, and the balancer in gateway.trusted_proxies"
        }
        Reason::MissingProxyHeader => {
            "gateway.proxy_protocol is set, and this connection does not begin with a valid PROXY header"
        }
        Reason::PeerNotAllowed => "this address may not send here; see gateway.allow_from",
        Reason::MissingApiKey => "the X-Api-Key header is missing, and several keys are configured",
        Reason::MalformedApiKey => "the X-Api-Key header must occur once, with one API key",
        Reason::MissingSignature => "the X-Signature header is missing",
        Reason::MalformedSignature => "the X-Signature header must occur once, with 64 hex digits",
        Reason::BadGzip => "the body starts like gzip but does not inflate",
        Reason::BadEncoding => {
            "the body does not inflate as its Content-Encoding says (br: with a window of at most 4 MiB); a proxy on the way may have changed one of them"
        }
        Reason::WrongKind => {
            "the body is an event; events are sent to /webhooks/stream/push: check the URLs in Stream's settings"
        }
        Reason::TooOld => "the event is older than dedup.max_age",
        Reason::UnknownKey | Reason::WrongSignature => {
            "no secret of a known API key signed this body; check the app's key and secret, and that no proxy changes the body"
        }
        Reason::NotFound => {
            "webhooks arrive at /webhooks/stream/push, /webhooks/stream/before-message-send and /webhooks/stream/custom-commands"
        }
        Reason::MethodNotAllowed => "webhooks are sent by POST",
        Reason::HeaderTimeout => "the headers did not arrive in time",
        Reason::BodyTimeout => "the body did not arrive in time",
        Reason::BodyIncomplete => "the body is incomplete",
        Reason::Displaced => {
            "too many requests at this moment, and this one had waited longest for its body; try again"
        }
        Reason::TooLarge => "the body is over the limit, on the wire or inflated",
        Reason::UnsupportedEncoding => "send the body as it is, or with one Content-Encoding: gzip, deflate or br",
        Reason::InFlightLimit => "too many requests at this moment; try again",
        Reason::MemoryBudget => "too many bytes at this moment; try again",
        Reason::Draining => "this server is stopping; try again",
        Reason::DeadlineExceeded => "the event could not be made durable in time; try again",
        Reason::StoreUnavailable => "the event cannot be made durable now; try again",
        Reason::StoreFull => "there is no room for the event now; try again",
        Reason::Rejected
        | Reason::RetriesExhausted
        | Reason::Unmatched
        | Reason::RouteUnknown
        | Reason::Parked
        | Reason::ParkedFull
        | Reason::Poison
        | Reason::DroppedByBroker
        | Reason::Unrouted => "the event could not be handled",
        Reason::NoWorker | Reason::Unhandled | Reason::HookFailed | Reason::HookTimeout => "the hook had no answer",
    }
}

/// `closes` adds `Connection: close`, for protocols that have that header.
pub(crate) fn response(outcome: Outcome, closes: bool) -> Response<Full<Bytes>> {
    let value = HeaderValue::from_static(outcome_label(&outcome));
    let reason = match outcome {
        Ok(taken) => {
            let mut response = Response::new(Full::default());
            response.headers_mut().insert(OUTCOME, value);
            if let Taken::Hook(answered) = taken {
                response.headers_mut().insert(CONTENT_TYPE, JSON);
                *response.body_mut() = Full::new(answered.body);
            }
            return response;
        }
        Err(reason) => reason,
    };
    let mut response = Response::new(Full::from(refusal_body(reason)));
    let status = status(reason);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, JSON);
    if status == StatusCode::SERVICE_UNAVAILABLE {
        headers.insert(RETRY_AFTER, RETRY_SOON);
    }
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(ALLOW, HeaderValue::from_static("POST"));
    }
    if closes {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Both parts are literals of this file that need no escaping.
fn refusal_body(reason: Reason) -> String {
    format!("{{\"code\":\"{}\",\"message\":\"{}\"}}\n", reason.code(), advice(reason))
}

/// The raw response to a request whose head was not complete in time.
pub(crate) fn header_timeout() -> String {
    let body = refusal_body(Reason::HeaderTimeout);
    format!(
        "HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_table_of_statuses() {
        let expected = |reason| match reason {
            "missing_api_key"
            | "malformed_api_key"
            | "missing_signature"
            | "malformed_signature"
            | "bad_gzip"
            | "bad_encoding"
            | "wrong_kind"
            | "too_old"
            | "malformed_http"
            | "tls_on_plain_port"
            | "http2_on_plain_port"
            | "tls_failed"
            | "unexpected_proxy_header"
            | "missing_proxy_header" => 400,
            "head_too_large" => 431,
            "unknown_key" | "wrong_signature" => 401,
            "peer_not_allowed" => 403,
            "not_found" => 404,
            "method_not_allowed" => 405,
            "header_timeout" | "body_timeout" | "body_incomplete" | "displaced" => 408,
            "too_large" => 413,
            "unsupported_encoding" => 415,
            "rejected" | "retries_exhausted" | "unmatched" | "poison" | "dropped_by_broker" | "unrouted" => 500,
            "route_unknown" | "parked" | "parked_full" => 500,
            "no_worker" | "unhandled" | "hook_failed" | "hook_timeout" => 500,
            "in_flight_limit" | "memory_budget" | "draining" | "deadline_exceeded" => 503,
            "store_unavailable" | "store_full" => 503,
            other => {
                panic!("{other} has no row: add it here, and to the alerts of 503, 408 or 4xx in deploy/alerts.yml")
            }
        };
        for reason in Reason::ALL {
            let answer = response(Err(reason), true);
            assert!(answer.headers().contains_key(CONNECTION), "{reason}");
            assert_eq!(is_passing(reason), matches!(answer.status().as_u16(), 408 | 503), "{reason}");
            assert!(!response(Err(reason), false).headers().contains_key(CONNECTION), "{reason}");
            assert_eq!(answer.status().as_u16(), expected(reason.as_str()), "{reason}");
            assert_eq!(answer.status() == 503, Reason::OF_OVERLOAD.contains(&reason), "{reason}");
            assert_eq!(answer.headers().contains_key(RETRY_AFTER), answer.status() == 503, "{reason}");
            assert_eq!(answer.headers().contains_key(ALLOW), answer.status() == 405, "{reason}");
            assert!(!refusal_body(reason).trim_matches(['{', '}', '\n']).contains(['\\', '{', '}']), "{reason}");
        }
    }

    #[test]
    fn an_unknown_key_and_a_wrong_signature_answer_alike() {
        assert_eq!(refusal_body(Reason::UnknownKey), refusal_body(Reason::WrongSignature));
    }

    #[test]
    fn the_documented_refusals_are_those_that_are_sent() {
        let document = include_str!("../../docs/http.md");
        let (_, refusals) = document.split_once("\n## Refusals\n").unwrap();
        let rows = refusals.split("\n## ").next().unwrap().lines().filter_map(|line| line.strip_prefix("| `"));
        let rows: Vec<_> =
            rows.map(|row| row.split('|').map(|cell| cell.trim_matches([' ', '`'])).collect::<Vec<_>>()).collect();
        let (answered, unanswered): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| row[1].parse::<u16>().is_ok());
        let answered: BTreeSet<_> = answered.iter().map(|row| format!("{} {}", row[0], row[1])).collect();
        let unanswered: BTreeSet<_> = unanswered.iter().map(|row| row[0].to_owned()).collect();
        let is_refusal = |reason: &Reason| status(*reason) != StatusCode::INTERNAL_SERVER_ERROR;
        let refusals = Reason::ALL.into_iter().filter(is_refusal);
        let (silent, sent): (Vec<_>, Vec<_>) = refusals.partition(|reason| unanswered.contains(reason.as_str()));
        let sent: BTreeSet<_> =
            sent.into_iter().map(|reason| format!("{} {}", reason.code(), status(reason).as_u16())).collect();
        assert_eq!(answered, sent);
        assert_eq!(silent.len(), unanswered.len(), "{unanswered:?}");
    }
}
