//! Every reason to refuse a request or to give up on an event, in one enum.
//!
//! It feeds the status, the response code, the log field, the metric label and the dead-letter record, so these can never
//! disagree. Status codes are the gateway's business (`gateway/src/response.rs`).

/// The reasons with their words, each written once: one that is added here is in the list and has a word.
macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $word:literal,)*) => {
        /// Why a request was refused, why an event stands in the dead letters, or why a hook was answered by its policy.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason {
            $($(#[$doc])* $name,)*
        }

        impl Reason {
            pub const ALL: [Reason; [$($word),*].len()] = [$(Reason::$name),*];

            /// The word in logs, metrics and dead letters.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Reason::$name => $word,)*
                }
            }
        }
    };
}

reasons! {
    NotFound = "not_found",
    MethodNotAllowed = "method_not_allowed",
    /// Not HTTP that can be read.
    MalformedHttp = "malformed_http",
    HeadTooLarge = "head_too_large",
    /// A TLS handshake where plain HTTP is spoken.
    TlsOnPlainPort = "tls_on_plain_port",
    /// HTTP/2 without TLS.
    Http2OnPlainPort = "http2_on_plain_port",
    /// The handshake failed: the peer does not speak TLS, or does not like the certificate.
    TlsFailed = "tls_failed",
    /// A PROXY header where none is expected.
    UnexpectedProxyHeader = "unexpected_proxy_header",
    /// None that can be read, where there must be one.
    MissingProxyHeader = "missing_proxy_header",
    /// Its peer is not in `gateway.allow_from`.
    PeerNotAllowed = "peer_not_allowed",
    MissingApiKey = "missing_api_key",
    MalformedApiKey = "malformed_api_key",
    MissingSignature = "missing_signature",
    MalformedSignature = "malformed_signature",
    UnknownKey = "unknown_key",
    WrongSignature = "wrong_signature",
    UnsupportedEncoding = "unsupported_encoding",
    BadGzip = "bad_gzip",
    /// Does not inflate as its Content-Encoding says.
    BadEncoding = "bad_encoding",
    /// An event's body on the path of another kind.
    WrongKind = "wrong_kind",
    /// Older than `dedup.max_age`.
    TooOld = "too_old",
    TooLarge = "too_large",
    HeaderTimeout = "header_timeout",
    BodyTimeout = "body_timeout",
    BodyIncomplete = "body_incomplete",
    /// It had waited longest for its body, and another request needed its place.
    Displaced = "displaced",
    InFlightLimit = "in_flight_limit",
    MemoryBudget = "memory_budget",
    Draining = "draining",
    DeadlineExceeded = "deadline_exceeded",
    StoreUnavailable = "store_unavailable",
    StoreFull = "store_full",
    /// The handler or the forwarded-to service said that no retry can help.
    Rejected = "rejected",
    /// Every step of the retry ladder was climbed.
    RetriesExhausted = "retries_exhausted",
    /// No route matched, and `worker.unmatched = "dead"`.
    Unmatched = "unmatched",
    /// It names a route that no worker has had for the whole of `worker.claim_window`.
    RouteUnknown = "route_unknown",
    /// It waits until its route takes it.
    Parked = "parked",
    /// Its route is full, open or paused, and what is parked for it takes no more.
    ParkedFull = "parked_full",
    /// Begun again and again and never concluded: its handler ends or hangs the worker.
    Poison = "poison",
    /// RabbitMQ itself took it out of its queue, by a policy.
    DroppedByBroker = "dropped_by_broker",
    /// No queue was bound for it.
    Unrouted = "unrouted",
    /// Nobody is there to answer a synchronous hook.
    NoWorker = "no_worker",
    /// Workers are there, but none has a handler for this hook.
    Unhandled = "unhandled",
    /// The hook's handler failed, or what it answered is no answer.
    HookFailed = "hook_failed",
    /// The hook's handler did not answer within the deadline.
    HookTimeout = "hook_timeout",
}

impl Reason {
    /// Those for which workers give up on an event.
    pub const OF_WORKERS: [Reason; 6] = [
        Reason::Rejected,
        Reason::RetriesExhausted,
        Reason::Unmatched,
        Reason::RouteUnknown,
        Reason::ParkedFull,
        Reason::Poison,
    ];

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
