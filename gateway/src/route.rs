//! Paths and methods: which kind of webhook a request is.

use hyper::Method;
use streamgate_core::{id::Kind, reason::Reason};

/// What a path means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) kind: Kind,
    /// The type where the path gives it: these callbacks have no `type` in their body.
    pub(crate) event_type: Option<&'static str>,
}

pub(crate) fn target(method: &Method, path: &str) -> Result<Target, Reason> {
    let event_type = match path {
        "/webhooks/stream/push" => None,
        "/webhooks/stream/pending-message/PassOnPendingMessage" => Some("pending_message.passed_on"),
        "/webhooks/stream/pending-message/DeletedPendingMessage" => Some("pending_message.deleted"),
        _ => return Err(Reason::NotFound),
    };
    if method == Method::POST { Ok(Target { kind: Kind::Push, event_type }) } else { Err(Reason::MethodNotAllowed) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_paths() {
        let push = |event_type| Ok(Target { kind: Kind::Push, event_type });
        let cases = [
            (Method::POST, "/webhooks/stream/push", push(None)),
            (Method::GET, "/webhooks/stream/push", Err(Reason::MethodNotAllowed)),
            (Method::POST, "/webhooks/stream/push/", Err(Reason::NotFound)),
            (Method::POST, "/", Err(Reason::NotFound)),
            (Method::GET, "/metrics", Err(Reason::NotFound)),
            (
                Method::POST,
                "/webhooks/stream/pending-message/PassOnPendingMessage",
                push(Some("pending_message.passed_on")),
            ),
        ];
        for (method, path, expected) in cases {
            assert_eq!(target(&method, path), expected, "{method} {path}");
        }
    }
}
