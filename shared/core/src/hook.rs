//! Synchronous hooks: reads the message from their bodies, and makes Stream's answer if no worker gave one.
//!
//! An answer is always JSON with HTTP 200. Stream counts an empty answer or another status as a failed hook, and pauses
//! hooks that fail.

use crate::peek::{each_field, field, text};
use serde_json::value::RawValue;
use std::borrow::Cow;

/// Longest name of a custom command, in bytes.
const MAX_COMMAND: usize = 64;

/// Most bytes of an answer's shape in the log.
pub const MAX_SHAPE: usize = 80;

/// The answer if a hook has none in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFailure {
    /// The request's own message, unchanged.
    Allow,
    /// A message of type `error`, which only the sender sees.
    Reject,
}

/// The request's `message` as written; `None` if there is no such object.
pub fn message(body: &[u8]) -> Option<&RawValue> {
    field(body, "message").filter(|value| value.get().starts_with('{'))
}

/// The name of a custom command in the signed body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SignedCommand<'a> {
    /// The message has none, for example after a click on a button of a standalone MML message.
    Absent,
    Name(Cow<'a, str>),
    /// It is not a valid name. It must not become part of a path or a header, and no other name may replace it.
    Malformed,
}

/// Reads `message.command`.
pub fn command(body: &[u8]) -> SignedCommand<'_> {
    let Some(value) = message(body).and_then(|message| field(message.get().as_bytes(), "command")) else {
        return SignedCommand::Absent;
    };
    match text(value) {
        None if value.get() == "null" => SignedCommand::Absent,
        Some(name) if name.is_empty() => SignedCommand::Absent,
        Some(name) if is_command_name(&name) => SignedCommand::Name(name),
        Some(_) | None => SignedCommand::Malformed,
    }
}

/// `[A-Za-z0-9_-]{1,64}`
pub fn is_command_name(name: &str) -> bool {
    let is_safe = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
    (1..=MAX_COMMAND).contains(&name.len()) && name.bytes().all(is_safe)
}

/// Whether these bytes are a valid answer to Stream: a JSON object whose `message` is an object, or null, which deletes the
/// message. Anything else, like `{"error":"…"}` with status 200, must not pass for the service's decision.
pub fn is_answer(bytes: &[u8]) -> bool {
    let is_object = bytes.trim_ascii_start().starts_with(b"{");
    let is_message = |value: &RawValue| value.get().starts_with('{') || value.get() == "null";
    is_object && serde_json::from_slice::<&RawValue>(bytes).is_ok() && field(bytes, "message").is_some_and(is_message)
}

/// Describes an invalid answer without any of its values: `{"errorMessage":string,"code":number}`. At most
/// [`MAX_SHAPE`] bytes.
pub fn shape(bytes: &[u8]) -> String {
    let mut shape = match serde_json::from_slice::<&RawValue>(bytes) {
        Err(_) if bytes.trim_ascii().is_empty() => "nothing".to_owned(),
        Err(_) => "not JSON".to_owned(),
        Ok(value) if value.get().starts_with('{') => {
            let mut fields = Vec::new();
            let enough = |fields: &[String]| fields.iter().map(String::len).sum::<usize>() > MAX_SHAPE;
            each_field(bytes, |name, value| {
                fields.push(format!("{}:{}", serde_json::Value::from(name), kind(value)));
                !enough(&fields)
            });
            format!("{{{}}}", fields.join(","))
        }
        Ok(value) => kind(value).to_owned(),
    };
    if shape.len() > MAX_SHAPE {
        shape.truncate(shape.floor_char_boundary(MAX_SHAPE));
        shape.push('…');
    }
    shape
}

fn kind(value: &RawValue) -> &'static str {
    match value.get().as_bytes().first() {
        Some(b'{') => "object",
        Some(b'[') => "array",
        Some(b'"') => "string",
        Some(b't' | b'f') => "boolean",
        Some(b'n') => "null",
        _ => "number",
    }
}

/// The request's own message, so that nothing changes. `{"message":null}` would delete it, so an unreadable message is
/// replaced by an empty one, which changes nothing either.
pub fn unchanged(body: &[u8]) -> Vec<u8> {
    let message = message(body).map_or("{}", RawValue::get);
    format!("{{\"message\":{message}}}").into_bytes()
}

/// A message of type `error` with this text.
pub fn rejection(text: &str) -> Vec<u8> {
    let text = serde_json::Value::from(text);
    format!("{{\"message\":{{\"type\":\"error\",\"text\":{text}}}}}").into_bytes()
}

/// The policy's answer. The sender reads `text` if the policy rejects.
pub fn fallback(on_failure: OnFailure, text: &str, body: &[u8]) -> Vec<u8> {
    match on_failure {
        OnFailure::Allow => unchanged(body),
        OnFailure::Reject => rejection(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(answer: Vec<u8>) -> String {
        assert!(is_answer(&answer));
        String::from_utf8(answer).unwrap()
    }

    #[test]
    fn allowing_echoes_the_message_byte_for_byte() {
        let body =
            br#"{"user":{"id":"u"},"message":{ "text":"\u003cb\u003e", "n":1.10, "big":123456789012345678901 }}"#;
        let echo = r#"{"message":{ "text":"\u003cb\u003e", "n":1.10, "big":123456789012345678901 }}"#;
        assert_eq!(text(fallback(OnFailure::Allow, "no", body)), echo);
    }

    #[test]
    fn a_message_that_cannot_be_read_is_never_deleted() {
        for body in [
            &b"{}"[..],
            b"",
            b"no JSON",
            br#"{"message":null}"#,
            br#"{"message":7}"#,
            b"{\"message\":{\"text\":\"\xff\"}}",
        ] {
            assert_eq!(text(unchanged(body)), r#"{"message":{}}"#, "{body:?}");
        }
    }

    #[test]
    fn a_rejection_is_an_error_with_its_text() {
        let answer = text(fallback(OnFailure::Reject, "say \"please\"\n", b"{}"));
        assert_eq!(answer, r#"{"message":{"type":"error","text":"say \"please\"\n"}}"#);
    }

    #[test]
    fn commands() {
        let named = |name: &'static str| SignedCommand::Name(Cow::from(name));
        let long = format!(r#"{{"message":{{"command":"{}"}}}}"#, "a".repeat(MAX_COMMAND + 1));
        let cases = [
            (r#"{"message":{"command":"ticket","args":"x"}}"#, named("ticket")),
            (r#"{"message":{"command":"t\u0069cket"}}"#, named("ticket")),
            (r#"{"message":{"command":"A-b_9"}}"#, named("A-b_9")),
            (r#"{"command":"outside","message":{"text":"x"}}"#, SignedCommand::Absent),
            (r#"{"message":{"command":""}}"#, SignedCommand::Absent),
            (r#"{"message":{"command":null}}"#, SignedCommand::Absent),
            ("[]", SignedCommand::Absent),
            (r#"{"message":{"command":7}}"#, SignedCommand::Malformed),
            (r#"{"message":{"command":"../admin"}}"#, SignedCommand::Malformed),
            (r#"{"message":{"command":"caf\u00e9"}}"#, SignedCommand::Malformed),
            (&long, SignedCommand::Malformed),
        ];
        for (body, expected) in cases {
            assert_eq!(command(body.as_bytes()), expected, "{body}");
        }
    }

    #[test]
    fn an_answer_is_an_object_whose_message_is_an_object_or_null() {
        for good in [
            &b"{\"message\":{}}"[..],
            b" {\"message\":null}\n",
            b"{\"message\":{\"n\":1e999}}",
            b"{\"message\":7,\"message\":{}}",
            b"{\"m\\u0065ssage\":{},\"more\":[]}",
        ] {
            assert!(is_answer(good), "{good:?}");
        }
        for bad in [
            &b""[..],
            b"null",
            b"[]",
            b"{",
            b"{}",
            b"{} {}",
            b"<html>",
            b"{\"a\":\"\xff\"}",
            b"{\"errorMessage\":\"x\"}",
            b"{\"ok\":true}",
            b"{\"message\":\"Internal server error\"}",
            b"{\"message\":[]}",
            b"{\"message\":{},\"message\":7}",
        ] {
            assert!(!is_answer(bad), "{bad:?}");
        }
    }

    #[test]
    fn a_shape_shows_keys_and_no_values() {
        let long = format!("{{\"{}\":1}}", "é".repeat(100));
        for (reply, expected) in [
            ("", "nothing"),
            ("<html>", "not JSON"),
            ("[1]", "array"),
            ("\"words\"", "string"),
            ("{}", "{}"),
            (
                r#"{"errorMessage":"words","ok":true,"n":-1,"x":null,"l":[],"message":{"text":"words"}}"#,
                "{\"errorMessage\":string,\"ok\":boolean,\"n\":number,\"x\":null,\"l\":array,\"message\":obje…",
            ),
        ] {
            assert_eq!(shape(reply.as_bytes()), expected);
        }
        assert!(shape(long.as_bytes()).len() <= MAX_SHAPE + "…".len());
    }

    proptest! {
        #[test]
        fn the_fallback_answer_is_valid_whatever_the_body(body in proptest::collection::vec(any::<u8>(), 0..300), text in any::<String>()) {
            for body in [body.clone(), [b"{\"message\":", &body[..], b"}"].concat()] {
                command(&body);
                prop_assert!(is_answer(&fallback(OnFailure::Allow, &text, &body)));
                prop_assert!(is_answer(&fallback(OnFailure::Reject, &text, &body)));
            }
        }
    }
}
