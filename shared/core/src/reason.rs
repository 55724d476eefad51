//! Every reason to refuse a request or to give up on an event, in one enum.
//!
//! It feeds the status, the response code, the log field, the metric label and the dead-letter record, so these can never
//! disagree. Status codes are the gateway's business (`gateway/src/response.rs`).

/// Why a request was refused, why an event stands in the dead letters, or why a hook was answered by its policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    NotFound,
    MethodNotAllowed,
    /// Not HTTP that can be read.
    MalformedHttp,
    HeadTooLarge,
    /// A TLS handshake where plain HTTP is spoken.
    TlsOnPlainPort,
    /// HTTP/2 without TLS.
    Http2OnPlainPort,
    /// The handshake failed: the peer does not speak TLS, or does not like the certificate.
    TlsFailed,
    /// A PROXY header where none is expected.
    UnexpectedProxyHeader,
    /// None that can be read, where there must be one.
    MissingProxyHeader,
    /// Its peer is not in `gateway.allow_from`.
    PeerNotAllowed,
    MissingApiKey,
    MalformedApiKey,
    MissingSignature,
    MalformedSignature,
    UnknownKey,
    WrongSignature,
    UnsupportedEncoding,
    BadGzip,
    /// Does not inflate as its Content-Encoding says.
    BadEncoding,
    /// An event's body on the path of another kind.
    WrongKind,
    /// Older than `dedup.max_age`.
    TooOld,
    TooLarge,
    HeaderTimeout,
    BodyTimeout,
    BodyIncomplete,
    /// It had waited longest for its body, and another request needed its place.
    Displaced,
    InFlightLimit,
    MemoryBudget,
    Draining,
    DeadlineExceeded,
    StoreUnavailable,
    StoreFull,
    /// The handler or the forwarded-to service said that no retry can help.
    Rejected,
    /// Every step of the retry ladder was climbed.
    RetriesExhausted,
    /// No route matched, and `worker.unmatched = "dead"`.
    Unmatched,
    /// Begun again and again and never concluded: its handler ends or hangs the worker.
    Poison,
    /// RabbitMQ itself took it out of its queue, by a policy.
    DroppedByBroker,
    /// No queue was bound for it.
    Unrouted,
    /// Nobody is there to answer a synchronous hook.
    NoWorker,
    /// Workers are there, but none has a handler for this hook.
    Unhandled,
    /// The hook's handler failed, or what it answered is no answer.
    HookFailed,
    /// The hook's handler did not answer within the deadline.
    HookTimeout,
}

impl Reason {
    pub const ALL: [Reason; 42] = [
        Reason::NotFound,
        Reason::MethodNotAllowed,
        Reason::MalformedHttp,
        Reason::HeadTooLarge,
        Reason::TlsOnPlainPort,
        Reason::Http2OnPlainPort,
        Reason::TlsFailed,
        Reason::UnexpectedProxyHeader,
        Reason::MissingProxyHeader,
        Reason::PeerNotAllowed,
        Reason::MissingApiKey,
        Reason::MalformedApiKey,
        Reason::MissingSignature,
        Reason::MalformedSignature,
        Reason::UnknownKey,
        Reason::WrongSignature,
        Reason::UnsupportedEncoding,
        Reason::BadGzip,
        Reason::BadEncoding,
        Reason::WrongKind,
        Reason::TooOld,
        Reason::TooLarge,
        Reason::HeaderTimeout,
        Reason::BodyTimeout,
        Reason::BodyIncomplete,
        Reason::Displaced,
        Reason::InFlightLimit,
        Reason::MemoryBudget,
        Reason::Draining,
        Reason::DeadlineExceeded,
        Reason::StoreUnavailable,
        Reason::StoreFull,
        Reason::Rejected,
        Reason::RetriesExhausted,
        Reason::Unmatched,
        Reason::Poison,
        Reason::DroppedByBroker,
        Reason::Unrouted,
        Reason::NoWorker,
        Reason::Unhandled,
        Reason::HookFailed,
        Reason::HookTimeout,
    ];

    /// The word in logs, metrics and dead letters.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::NotFound => "not_found",
            Reason::MethodNotAllowed => "method_not_allowed",
            Reason::MalformedHttp => "malformed_http",
            Reason::HeadTooLarge => "head_too_large",
            Reason::TlsOnPlainPort => "tls_on_plain_port",
            Reason::Http2OnPlainPort => "http2_on_plain_port",
            Reason::TlsFailed => "tls_failed",
            Reason::UnexpectedProxyHeader => "unexpected_proxy_header",
            Reason::MissingProxyHeader => "missing_proxy_header",
            Reason::PeerNotAllowed => "peer_not_allowed",
            Reason::MissingApiKey => "missing_api_key",
            Reason::MalformedApiKey => "malformed_api_key",
            Reason::MissingSignature => "missing_signature",
            Reason::MalformedSignature => "malformed_signature",
            Reason::UnknownKey => "unknown_key",
            Reason::WrongSignature => "wrong_signature",
            Reason::UnsupportedEncoding => "unsupported_encoding",
            Reason::BadGzip => "bad_gzip",
            Reason::BadEncoding => "bad_encoding",
            Reason::WrongKind => "wrong_kind",
            Reason::TooOld => "too_old",
            Reason::TooLarge => "too_large",
            Reason::HeaderTimeout => "header_timeout",
            Reason::BodyTimeout => "body_timeout",
            Reason::BodyIncomplete => "body_incomplete",
            Reason::Displaced => "displaced",
            Reason::InFlightLimit => "in_flight_limit",
            Reason::MemoryBudget => "memory_budget",
            Reason::Draining => "draining",
            Reason::DeadlineExceeded => "deadline_exceeded",
            Reason::StoreUnavailable => "store_unavailable",
            Reason::StoreFull => "store_full",
            Reason::Rejected => "rejected",
            Reason::RetriesExhausted => "retries_exhausted",
            Reason::Unmatched => "unmatched",
            Reason::Poison => "poison",
            Reason::DroppedByBroker => "dropped_by_broker",
            Reason::Unrouted => "unrouted",
            Reason::NoWorker => "no_worker",
            Reason::Unhandled => "unhandled",
            Reason::HookFailed => "hook_failed",
            Reason::HookTimeout => "hook_timeout",
        }
    }

    /// The word in the answer. An unknown key and a wrong signature share one, so that a stranger cannot probe for keys.
    pub fn code(self) -> &'static str {
        if matches!(self, Reason::UnknownKey | Reason::WrongSignature) { "unauthorized" } else { self.as_str() }
    }

    /// The reason of that name: reads back what a store kept.
    pub fn parse(name: &str) -> Option<Reason> {
        Reason::ALL.into_iter().find(|reason| reason.as_str() == name)
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct_and_read_back() {
        for reason in Reason::ALL {
            assert_eq!(Reason::parse(reason.as_str()), Some(reason));
        }
        assert_eq!(Reason::parse("no such reason"), None);
    }

    #[test]
    fn a_stranger_cannot_tell_an_unknown_key_from_a_wrong_signature() {
        assert_eq!(Reason::UnknownKey.code(), Reason::WrongSignature.code());
    }
}
