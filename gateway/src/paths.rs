//! Maps paths and methods to kinds of webhooks.

use hyper::Method;
use std::borrow::Cow;
use streamgate_core::{id::Kind, path, reason::Reason};

/// The meaning of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) kind: Kind,
    /// The event type, if the path implies it: these callbacks have no `type` in their body.
    pub(crate) event_type: Option<&'static str>,
}

pub(crate) fn target(method: &Method, requested: &str) -> Result<Target, Reason> {
    let push = |event_type| Target { kind: Kind::Push, event_type };
    let target = match &*plain(requested) {
        path::PUSH => push(None),
        path::PASS_ON_PENDING_MESSAGE => push(Some("pending_message.passed_on")),
        path::DELETED_PENDING_MESSAGE => push(Some("pending_message.deleted")),
        path::BEFORE_MESSAGE_SEND => Target { kind: Kind::BeforeMessageSend, event_type: None },
        path::CUSTOM_COMMANDS => Target { kind: Kind::CustomCommand, event_type: None },
        _ => return Err(Reason::NotFound),
    };
    if method == Method::POST { Ok(target) } else { Err(Reason::MethodNotAllowed) }
}

/// The path without the trailing and doubled slashes that people and proxies write.
fn plain(path: &str) -> Cow<'_, str> {
    if !path.contains("//") && (!path.ends_with('/') || path == "/") {
        return Cow::from(path);
    }
    let parts = path.split('/').filter(|part| !part.is_empty());
    Cow::from(parts.fold(String::new(), |plain, part| plain + "/" + part))
}

/// The `type` parameter of a query: a command's name in the URL, which is not signed.
pub(crate) fn query_type(query: Option<&str>) -> Option<Cow<'_, str>> {
    let value = query?.split('&').find_map(|pair| pair.strip_prefix("type="))?;
    let decoded = percent_decode(value);
    if decoded.is_empty() { None } else { Some(decoded) }
}

fn percent_decode(text: &str) -> Cow<'_, str> {
    if !text.contains(['%', '+']) {
        return Cow::from(text);
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let code = match (first, after) {
            (b'%', [high, low, ..]) => u8::from_str_radix(&String::from_utf8_lossy(&[*high, *low]), 16).ok(),
            _ => None,
        };
        let (byte, length) = match (code, first) {
            (Some(byte), _) => (byte, 3),
            (None, b'+') => (b' ', 1),
            (None, other) => (*other, 1),
        };
        bytes.push(byte);
        rest = &rest[length..];
    }
    Cow::from(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_paths() {
        let push = |event_type| Ok(Target { kind: Kind::Push, event_type });
        let hook = |kind| Ok(Target { kind, event_type: None });
        let cases = [
            (Method::POST, "/webhooks/stream/push", push(None)),
            (Method::GET, "/webhooks/stream/push", Err(Reason::MethodNotAllowed)),
            (Method::POST, "/webhooks/stream/push/", push(None)),
            (Method::POST, "//webhooks/stream///push//", push(None)),
            (Method::POST, "/webhooks/stream/custom-commands/", hook(Kind::CustomCommand)),
            (Method::POST, "/webhooks/stream/pu/sh", Err(Reason::NotFound)),
            (Method::POST, "/webhooks/streampush", Err(Reason::NotFound)),
            (Method::POST, "//", Err(Reason::NotFound)),
            (Method::POST, "*", Err(Reason::NotFound)),
            (Method::POST, "/", Err(Reason::NotFound)),
            (Method::GET, "/metrics", Err(Reason::NotFound)),
            (
                Method::POST,
                "/webhooks/stream/pending-message/PassOnPendingMessage",
                push(Some("pending_message.passed_on")),
            ),
            (Method::POST, "/webhooks/stream/before-message-send", hook(Kind::BeforeMessageSend)),
            (Method::POST, "/webhooks/stream/custom-commands", hook(Kind::CustomCommand)),
            (Method::GET, "/webhooks/stream/custom-commands", Err(Reason::MethodNotAllowed)),
        ];
        for (method, path, expected) in cases {
            assert_eq!(target(&method, path), expected, "{method} {path}");
        }
    }
    #[test]
    fn the_type_of_a_query() {
        let cases = [
            (None, None),
            (Some(""), None),
            (Some("type="), None),
            (Some("type=ticket"), Some("ticket")),
            (Some("a=b&type=ticket&type=other"), Some("ticket")),
            (Some("type=a%2Fb+c%zz%4"), Some("a/b c%zz%4")),
            (Some("xtype=ticket"), None),
        ];
        for (query, expected) in cases {
            assert_eq!(query_type(query).as_deref(), expected, "{query:?}");
        }
    }
}
