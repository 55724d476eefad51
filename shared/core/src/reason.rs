//! All reasons to refuse a request or to give up on an event, in one enum.
//!
//! It feeds the status, the response code, the log field, the metric label and the dead-letter record, so that these always
//! agree. Only the gateway maps reasons to status codes (`gateway/src/response.rs`).

/// Declares each reason once with its name: it is then in `ALL`, too.
macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $label:literal,)*) => {
        /// Why a request was refused, why an event is in the dead letters, or why a hook was answered by its policy.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason {
            $($(#[$doc])* $name,)*
        }

        impl Reason {
            pub const ALL: [Reason; [$($label),*].len()] = [$(Reason::$name),*];

            /// The name in logs, metrics and dead letters.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Reason::$name => $label,)*
                }
            }
        }
    };
}

reasons! {
    NotFound = "not_found",
    MethodNotAllowed = "method_not_allowed",
    /// The input is not readable HTTP.
    MalformedHttp = "malformed_http",
    HeadTooLarge = "head_too_large",
    /// A TLS handshake on a port for plain HTTP.
    TlsOnPlainPort = "tls_on_plain_port",
    /// HTTP/2 without TLS.
    Http2OnPlainPort = "http2_on_plain_port",
    /// The handshake failed: the peer does not speak TLS, or does not accept the certificate.
    TlsFailed = "tls_failed",
    /// A PROXY header that is not expected.
    UnexpectedProxyHeader = "unexpected_proxy_header",
    /// There is no readable PROXY header, although one is required.
    MissingProxyHeader = "missing_proxy_header",
    /// The peer is not in `gateway.allow_from`.
    PeerNotAllowed = "peer_not_allowed",
    MissingApiKey = "missing_api_key",
    MalformedApiKey = "malformed_api_key",
    MissingSignature = "missing_signature",
    MalformedSignature = "malformed_signature",
    UnknownKey = "unknown_key",
    WrongSignature = "wrong_signature",
    UnsupportedEncoding = "unsupported_encoding",
    BadGzip = "bad_gzip",
    /// The body does not inflate as its Content-Encoding says.
    BadEncoding = "bad_encoding",
    /// An event's body on the path of another kind.
    WrongKind = "wrong_kind",
    /// Older than `dedup.max_age`.
    TooOld = "too_old",
    TooLarge = "too_large",
    HeaderTimeout = "header_timeout",
    BodyTimeout = "body_timeout",
    BodyIncomplete = "body_incomplete",
    /// The request had waited longest for its body, and another one needed its place.
    Displaced = "displaced",
    InFlightLimit = "in_flight_limit",
    MemoryBudget = "memory_budget",
    Draining = "draining",
    DeadlineExceeded = "deadline_exceeded",
    StoreUnavailable = "store_unavailable",
    StoreFull = "store_full",
    /// The handler or the forwarded-to service said that no retry can help.
    Rejected = "rejected",
    /// The last step of the retry ladder failed.
    RetriesExhausted = "retries_exhausted",
    /// No route matched, and `worker.unmatched = "dead"`.
    Unmatched = "unmatched",
    /// No worker has had the route that the event names for the whole of `worker.claim_window`.
    RouteUnknown = "route_unknown",
    /// The event waits until its route can handle it.
    Parked = "parked",
    /// The event's route is full, open or paused, and its queue of parked events is full, too.
    ParkedFull = "parked_full",
    /// Begun again and again and never concluded: handling the event ends or hangs the worker.
    Poison = "poison",
    /// RabbitMQ itself removed the event from its queue, because of a policy.
    DroppedByBroker = "dropped_by_broker",
    /// No queue was bound for the event.
    Unrouted = "unrouted",
    /// No worker is there to answer a synchronous hook.
    NoWorker = "no_worker",
    /// No worker has a handler for this hook.
    Unhandled = "unhandled",
    /// The hook's handler failed, or its answer is invalid.
    HookFailed = "hook_failed",
    /// The hook's handler did not answer within the deadline.
    HookTimeout = "hook_timeout",
}

impl Reason {
    /// Those for which a push is answered 503: they pass, and Stream repeats it.
    pub const OF_OVERLOAD: [Reason; 6] = [
        Reason::InFlightLimit,
        Reason::MemoryBudget,
        Reason::Draining,
        Reason::DeadlineExceeded,
        Reason::StoreUnavailable,
        Reason::StoreFull,
    ];

    /// The reasons for which workers give up on an event.
    pub const OF_WORKERS: [Reason; 6] = [
        Reason::Rejected,
        Reason::RetriesExhausted,
        Reason::Unmatched,
        Reason::RouteUnknown,
        Reason::ParkedFull,
        Reason::Poison,
    ];

    /// The code in the response. An unknown key and a wrong signature share one, so that a stranger cannot probe for keys.
    pub fn code(self) -> &'static str {
        if matches!(self, Reason::UnknownKey | Reason::WrongSignature) { "unauthorized" } else { self.as_str() }
    }

    /// The reason with this name, as kept in a store.
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
