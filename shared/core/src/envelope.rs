//! An event on its way: the signed bytes with their metadata, and the versioned form in which stores keep it.
//!
//! Readers ignore unknown headers and have a default for each missing one, so that old and new processes can share a queue during
//! a rolling upgrade.

use crate::attempts::Attempts;
use crate::claim::ClaimKey;
use crate::further::FurtherHeaders;
use crate::id::{KeyedBy, Kind, idempotency_key};
use crate::timestamp::{parse_rfc3339, rfc3339};
use bytes::Bytes;
use std::borrow::Cow;

/// The version of the header format that this build writes.
pub const VERSION: u32 = 1;
/// Replaces a type that is absent or cannot be a routing key; the raw one stays in the body.
pub const UNKNOWN_TYPE: &str = "unknown";
/// Prefix of the types of pending-message callbacks, which their paths imply and their bodies lack.
pub const PENDING: &str = "pending_message.";
const MAX_TYPE: usize = 128;
const MAX_CID: usize = 256;

pub mod header {
    //! Names of the headers of a stored event.
    pub const WEBHOOK_ID: &str = "x-webhook-id";
    pub const WEBHOOK_ATTEMPT: &str = "x-webhook-attempt";
    pub const API_KEY: &str = "x-api-key";
    pub const SIGNATURE: &str = "x-signature";
    pub const VERSION: &str = "x-streamgate-version";
    pub const KEY: &str = "x-streamgate-key";
    pub const RECEIVED_AT: &str = "x-streamgate-received-at";
    pub const ATTEMPT: &str = "x-streamgate-attempt";
    /// The results of earlier attempts.
    pub const ATTEMPTS: &str = "x-streamgate-attempts";
    pub const TYPE: &str = "x-streamgate-type";
    pub const CID: &str = "x-streamgate-cid";
    pub const ROUTE: &str = "x-streamgate-route";
    pub const REPLAY: &str = "x-streamgate-replay";
    pub const TRACEPARENT: &str = "traceparent";
    pub const FURTHER: &str = "x-streamgate-further-headers";
}

/// One event, from the gateway's answer until it is settled.
#[derive(Clone, PartialEq, Eq)]
pub struct Envelope {
    pub app: String,
    pub kind: Kind,
    /// X-Webhook-Id, or the id that replaces it.
    pub id: String,
    /// Safe for routing keys: at most 128 bytes of `[A-Za-z0-9_.-]`, or [`UNKNOWN_TYPE`].
    pub event_type: String,
    /// The idempotency key, see [`idempotency_key`].
    pub key: String,
    /// X-Webhook-Attempt: the number of Stream's attempt, from 1.
    pub webhook_attempt: u32,
    pub api_key: String,
    /// 64 hex digits in lower case.
    pub signature: String,
    /// In milliseconds since the Unix epoch.
    pub received_at_ms: i64,
    /// The number of the worker's attempt, from 1.
    pub attempt: u32,
    /// The results of earlier attempts.
    pub attempts: Attempts,
    pub cid: Option<String>,
    /// The route that this copy belongs to, once a worker has chosen one.
    pub route: Option<String>,
    /// Set on a replayed dead letter, so that its claims differ from those of the first life.
    pub replay: Option<String>,
    pub traceparent: Option<String>,
    /// Stream's headers beyond the four, which are passed on to services.
    pub further: FurtherHeaders,
    /// The uncompressed bytes that Stream signed.
    pub body: Bytes,
}

/// Metadata that a store keeps in fields of its own rather than in headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    pub app: String,
    pub kind: Kind,
    pub id: String,
    pub event_type: String,
}

impl Envelope {
    /// The key of the worker's claim, one for each route and each life of the event.
    pub fn claim_key(&self, route: &str) -> ClaimKey {
        let life = format!("{route}|{}", self.replay.as_deref().unwrap_or_default());
        ClaimKey { event: self.key.clone(), life }
    }

    /// All headers to store with the body.
    pub fn headers(&self) -> Vec<(&'static str, Cow<'_, str>)> {
        let mut headers = vec![
            (header::VERSION, Cow::from(VERSION.to_string())),
            (header::WEBHOOK_ID, self.id.as_str().into()),
            (header::WEBHOOK_ATTEMPT, self.webhook_attempt.to_string().into()),
            (header::API_KEY, self.api_key.as_str().into()),
            (header::SIGNATURE, self.signature.as_str().into()),
            (header::KEY, self.key.as_str().into()),
            (header::RECEIVED_AT, rfc3339(self.received_at_ms).into()),
            (header::ATTEMPT, self.attempt.to_string().into()),
        ];
        let optional = [
            (header::CID, &self.cid),
            (header::ROUTE, &self.route),
            (header::REPLAY, &self.replay),
            (header::TRACEPARENT, &self.traceparent),
        ];
        headers.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value.as_deref()?.into()))));
        if !self.further.is_empty() {
            headers.push((header::FURTHER, self.further.to_json().into()));
        }
        if !self.attempts.is_empty() {
            headers.push((header::ATTEMPTS, self.attempts.to_json().into()));
        }
        headers
    }

    /// Reads what [`headers`](Envelope::headers) wrote, in this version or another.
    pub fn restore<'h>(properties: Properties, header: impl Fn(&str) -> Option<&'h str>, body: Bytes) -> Envelope {
        let text = |name| header(name).map(str::to_owned);
        let number = |name| header(name).and_then(|value| value.parse().ok());
        let Properties { app, kind, id, event_type } = properties;
        let signature = text(header::SIGNATURE).unwrap_or_default();
        Envelope {
            key: text(header::KEY).unwrap_or_else(|| idempotency_key(&app, kind, None, KeyedBy::Id(&id), &signature)),
            webhook_attempt: number(header::WEBHOOK_ATTEMPT).unwrap_or(1),
            api_key: text(header::API_KEY).unwrap_or_default(),
            received_at_ms: header(header::RECEIVED_AT).and_then(parse_rfc3339).unwrap_or_default(),
            attempt: number(header::ATTEMPT).unwrap_or(1),
            attempts: header(header::ATTEMPTS).map(Attempts::parse).unwrap_or_default(),
            cid: text(header::CID),
            route: text(header::ROUTE),
            replay: text(header::REPLAY),
            traceparent: text(header::TRACEPARENT),
            further: header(header::FURTHER).map(FurtherHeaders::parse).unwrap_or_default(),
            app,
            kind,
            id,
            event_type,
            signature,
            body,
        }
    }
}

/// Bodies stay out of every log: only their length is shown.
impl std::fmt::Debug for Envelope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Envelope")
            .field("key", &self.key)
            .field("type", &self.event_type)
            .field("attempt", &self.attempt)
            .field("bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}

/// The type, if it is safe in a routing key, a label or a header; else [`UNKNOWN_TYPE`].
pub fn safe_type(raw: Option<&str>) -> &str {
    let safe = |name: &&str| {
        (1..=MAX_TYPE).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
    };
    raw.filter(safe).unwrap_or(UNKNOWN_TYPE)
}

/// The channel id, if it is short and printable enough for a header.
pub fn safe_cid(raw: Option<&str>) -> Option<&str> {
    raw.filter(|cid| (1..=MAX_CID).contains(&cid.len()) && cid.bytes().all(|byte| matches!(byte, 0x20..=0x7e)))
}

/// A valid W3C traceparent.
pub fn safe_traceparent(raw: Option<&[u8]>) -> Option<&str> {
    const LENGTHS: [usize; 4] = [2, 32, 16, 2];
    let text = std::str::from_utf8(raw?).ok()?;
    let hex = |part: &str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let parts: Vec<_> = text.split('-').collect();
    let well_formed = parts.len() == LENGTHS.len()
        && parts.iter().zip(LENGTHS).all(|(part, length)| part.len() == length && hex(part));
    well_formed.then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn envelope() -> Envelope {
        Envelope {
            app: "chat".into(),
            kind: Kind::Push,
            id: "id-1".into(),
            event_type: "message.new".into(),
            key: "chat:push:id-1:aaaaaaaaaaaaaaaa".into(),
            webhook_attempt: 2,
            api_key: "key".into(),
            signature: "a".repeat(64),
            received_at_ms: 1_775_658_215_879,
            attempt: 3,
            attempts: Attempts::parse(r#"[{"n":1,"at":"2026-01-01T00:00:00Z","ms":7,"error":"refused"}]"#),
            cid: Some("messaging:x".into()),
            route: Some("app".into()),
            replay: Some("nonce".into()),
            traceparent: None,
            further: FurtherHeaders::of([("target-agent", b"a/1".as_slice())]),
            body: Bytes::from_static(b"{}"),
        }
    }

    fn properties(envelope: &Envelope) -> Properties {
        Properties {
            app: envelope.app.clone(),
            kind: envelope.kind,
            id: envelope.id.clone(),
            event_type: envelope.event_type.clone(),
        }
    }

    #[test]
    fn headers_read_back() {
        let written = envelope();
        let headers: HashMap<_, _> = written.headers().into_iter().collect();
        let read = Envelope::restore(
            properties(&written),
            |name| headers.get(name).map(|value| &**value),
            written.body.clone(),
        );
        assert_eq!(read, written);
    }

    #[test]
    fn a_newer_writers_headers_are_ignored_and_an_older_ones_have_defaults() {
        let signature = "b".repeat(64);
        let headers = HashMap::from([
            ("x-streamgate-version", "99"),
            ("x-streamgate-invention", "?"),
            ("x-signature", &*signature),
            ("x-streamgate-attempt", "many"),
        ]);
        let read =
            Envelope::restore(properties(&envelope()), |name| headers.get(name).copied(), Bytes::from_static(b"x"));
        assert_eq!(read.key, "chat:push:id-1:bbbbbbbbbbbbbbbb");
        assert_eq!((read.attempt, read.webhook_attempt, read.received_at_ms), (1, 1, 0));
        assert_eq!((read.route, read.replay, read.cid), (None, None, None));
    }

    #[test]
    fn unsafe_types_cids_and_traceparents_are_not_passed_on() {
        let long = "t".repeat(129);
        for (raw, safe) in [
            (Some("message.new"), "message.new"),
            (Some("my event"), UNKNOWN_TYPE),
            (Some("a*b"), UNKNOWN_TYPE),
            (Some("a#"), UNKNOWN_TYPE),
            (Some(""), UNKNOWN_TYPE),
            (Some(&long), UNKNOWN_TYPE),
            (None, UNKNOWN_TYPE),
        ] {
            assert_eq!(safe_type(raw), safe);
        }
        assert_eq!(safe_cid(Some("messaging:é")), None);
        assert_eq!(safe_cid(Some("messaging:e")), Some("messaging:e"));
        let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(safe_traceparent(Some(trace.as_bytes())), Some(trace));
        assert_eq!(safe_traceparent(Some(&trace.as_bytes()[1..])), None);
        assert_eq!(safe_traceparent(Some(trace.to_uppercase().as_bytes())), None);
    }

    #[test]
    fn debug_shows_no_body() {
        let secret = Envelope { body: Bytes::from_static(b"private words"), ..envelope() };
        assert!(!format!("{secret:?}").contains("private"));
    }

    proptest! {
        /// Whatever headers a broker holds can be read, and what was read is written and read back unchanged.
        #[test]
        fn any_headers_are_read_and_read_back(values in proptest::collection::vec(any::<String>(), 14)) {
            let names = [
                header::WEBHOOK_ID, header::WEBHOOK_ATTEMPT, header::API_KEY, header::SIGNATURE, header::VERSION, header::KEY,
                header::RECEIVED_AT, header::ATTEMPT, header::CID, header::ROUTE, header::REPLAY, header::TRACEPARENT,
                header::FURTHER, header::ATTEMPTS,
            ];
            let properties = || Properties { app: "chat".into(), kind: Kind::Push, id: "id".into(), event_type: "a.b".into() };
            let header = |name: &str| Some(values[names.iter().position(|known| *known == name)?].as_str());
            let read = Envelope::restore(properties(), header, Bytes::new());
            let written = read.headers();
            let written = |name: &str| written.iter().find(|(known, _)| *known == name).map(|(_, value)| &**value);
            prop_assert_eq!(Envelope::restore(properties(), written, Bytes::new()), read);
        }
    }
}
