//! The parts of a request's head that are kept. The rest is dropped before the body is read: in memory a head takes several times
//! its length on the wire, and a stranger may send the longest.

use crate::paths::{self, Target};
use hyper::header::{CONTENT_ENCODING, CONTENT_LENGTH, EXPECT, HeaderMap, HeaderName, HeaderValue};
use hyper::{Version, http::request::Parts};
use std::net::IpAddr;
use std::sync::Arc;
use streamgate_core::{
    admission::{self, Facts, Limits, Single},
    apps::Apps,
    envelope::{header, safe_traceparent},
    further::FurtherHeaders,
    hook::is_command_name,
    id::{Kind, header_id},
    inflate::Declared,
    peer::{Client, Peers},
    reason::Reason,
    signature::{Signature, Verifier},
};

const FORWARDED_FOR: &str = "x-forwarded-for";

/// A request whose body is worth reading.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) client: Client,
    pub(crate) target: Target,
    pub(crate) app: Arc<str>,
    pub(crate) api_key: String,
    pub(crate) signature: Signature,
    /// The X-Webhook-Id, in a form that is safe to keep.
    pub(crate) id: Option<String>,
    /// The X-Webhook-Attempt, from 1.
    pub(crate) attempt: u32,
    pub(crate) traceparent: Option<String>,
    pub(crate) further: FurtherHeaders,
    /// The Content-Encoding.
    pub(crate) declared: Declared,
    /// The command's name in the URL.
    pub(crate) query_type: Option<String>,
}

/// What the response needs to know about every request, refused or not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestTraits {
    /// Whether it is HTTP/1, where a header closes the connection.
    pub(crate) is_http1: bool,
    /// Whether it sent `Expect: 100-continue`: if it is refused, there is no body to read on.
    pub(crate) expects_continue: bool,
}

impl RequestTraits {
    pub(crate) fn of(parts: &Parts) -> RequestTraits {
        RequestTraits {
            is_http1: parts.version <= Version::HTTP_11,
            expects_continue: parts.headers.contains_key(EXPECT),
        }
    }
}

/// Larger heads are answered 431.
pub(crate) const MAX_HEAD: usize = 16 << 10;
/// What HTTP/2 counts for a header in addition to its name and value (RFC 9113, section 6.5.2).
const HEADER_OVERHEAD: usize = 32;

/// Whether hyper accepted a head over our limit: its own HTTP/2 limit would refuse one without notifying us.
pub(crate) fn is_too_large(parts: &Parts) -> bool {
    let length = |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len() + HEADER_OVERHEAD;
    let path = parts.uri.path_and_query().map_or(0, |path| path.as_str().len());
    parts.version == Version::HTTP_2 && path + parts.headers.iter().map(length).sum::<usize>() > MAX_HEAD
}

/// Judges a head. Returns the parts that are kept, and the verifier of the body.
pub(crate) fn admit(
    target: Target,
    client: Client,
    parts: &Parts,
    apps: &Apps,
    limits: &Limits,
) -> Result<(Head, Verifier), Reason> {
    let headers = &parts.headers;
    let admitted = admission::admit(&facts(headers), apps, limits)?;
    let text = |name| headers.get(name).map(|value| value.as_bytes());
    let attempt = text(header::WEBHOOK_ATTEMPT).and_then(|text| std::str::from_utf8(text).ok()?.trim().parse().ok());
    let head = Head {
        client,
        target,
        app: Arc::clone(&admitted.key.app),
        api_key: admitted.api_key.to_owned(),
        signature: admitted.signature,
        id: header_id(text(header::WEBHOOK_ID)),
        attempt: attempt.unwrap_or(1),
        traceparent: safe_traceparent(text(header::TRACEPARENT)).map(str::to_owned),
        further: FurtherHeaders::of(headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes()))),
        declared: admitted.declared,
        query_type: named(target, parts),
    };
    Ok((head, Verifier::new(&admitted.key.secrets, admitted.signature)))
}

/// The command that the URL names, if it is a valid name.
fn named(target: Target, parts: &Parts) -> Option<String> {
    let query = parts.uri.query().filter(|_| target.kind == Kind::CustomCommand);
    paths::query_type(query).filter(|name| is_command_name(name)).map(String::from)
}

/// The client that sent the request. `peer` is the other end of the connection, or the client that its PROXY header names.
pub(crate) fn client(peers: &Peers, peer: IpAddr, headers: &HeaderMap) -> Client {
    let forwarded = peers.trusted_proxies.as_ref().map(|_| headers.get_all(FORWARDED_FOR));
    peers.client(peer, forwarded.iter().flatten().map(|value| value.as_bytes()))
}

fn facts(headers: &HeaderMap) -> Facts<'_> {
    Facts {
        api_key: single(headers, header::API_KEY),
        signature: single(headers, header::SIGNATURE),
        content_encoding: headers.get(CONTENT_ENCODING).map(|value| value.as_bytes()),
        content_length: headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok()),
    }
}

fn single<'a>(headers: &'a HeaderMap, name: &str) -> Single<'a> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Single::Absent,
        (Some(value), None) => Single::One(value.as_bytes()),
        (Some(_), Some(_)) => Single::Repeated,
    }
}
