//! Reads the few fields of a body that routing needs, without building a tree.
//!
//! The signature has already proved that the body is Stream's, so nothing here may fail: an unreadable field counts as
//! absent, and the event goes on. The last of duplicate keys wins, as in the JSON parsers of Stream's SDKs.

use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;

/// The fields found in a body.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peek<'a> {
    pub event_type: Option<Cow<'a, str>>,
    pub cid: Option<Cow<'a, str>>,
    /// In milliseconds since the Unix epoch. On the wire it is RFC 3339 text, or an integer of nanoseconds.
    pub created_at_ms: Option<i64>,
}

/// Reads the fields. A body that is not a JSON object, or is truncated, yields those before the error.
pub fn peek(body: &[u8]) -> Peek<'_> {
    let mut found = Peek::default();
    let mut json = serde_json::Deserializer::from_slice(body);
    // The error does not matter: `found` keeps what was read before it.
    drop((&mut json).deserialize_map(Fields(&mut found)));
    found
}

/// The value of one field of an object, as written; the last one if the key is repeated. `None` if the JSON is not an
/// object, is truncated before the field, or the value is not UTF-8.
pub fn field<'a>(json: &'a [u8], name: &str) -> Option<&'a RawValue> {
    let mut found = None;
    let mut json = serde_json::Deserializer::from_slice(json);
    drop((&mut json).deserialize_map(One { name, found: &mut found }));
    found
}

/// Visits the fields of an object in order, until `more` returns false or the JSON is truncated.
pub fn each_field<'a>(json: &'a [u8], more: impl FnMut(&str, &'a RawValue) -> bool) {
    let mut json = serde_json::Deserializer::from_slice(json);
    drop((&mut json).deserialize_map(Each(more)));
}

struct Each<F>(F);

impl<'de, F: FnMut(&str, &'de RawValue) -> bool> Visitor<'de> for Each<F> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some((key, value)) = map.next_entry::<&'de RawValue, &'de RawValue>()? {
            if !(self.0)(&text(key).unwrap_or_default(), value) {
                break;
            }
        }
        Ok(())
    }
}

struct One<'a, 'de> {
    name: &'a str,
    found: &'a mut Option<&'de RawValue>,
}

impl<'de> Visitor<'de> for One<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<&'de RawValue>()? {
            if text(key).as_deref() == Some(self.name) {
                *self.found = Some(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

struct Fields<'a, 'de>(&'a mut Peek<'de>);

impl<'de> Visitor<'de> for Fields<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        // A key is borrowed raw, so that an escaped or unusual key elsewhere in the object cannot end the reading.
        while let Some(key) = map.next_key::<&'de RawValue>()? {
            match text(key).as_deref() {
                Some("type") => self.0.event_type = text(map.next_value()?),
                Some("cid") => self.0.cid = text(map.next_value()?),
                Some("created_at") => self.0.created_at_ms = instant(map.next_value()?),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }
}

/// The string, or `None` if the value is not a string.
pub fn text(value: &RawValue) -> Option<Cow<'_, str>> {
    #[derive(serde::Deserialize)]
    struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
    serde_json::from_str::<Text<'_>>(value.get()).ok().map(|text| text.0)
}

/// Like [`text`], but with U+FFFD for an unpaired surrogate, as clients show it.
pub fn text_lossy(value: &RawValue) -> Option<Cow<'_, str>> {
    value.get().strip_prefix('"')?.strip_suffix('"').map(unescaped)
}

/// Unescapes the inner part of a JSON string; an unpaired surrogate is U+FFFD, as in the SDKs' languages.
pub fn unescaped(inner: &str) -> Cow<'_, str> {
    if !inner.contains('\\') {
        return Cow::Borrowed(inner);
    }
    let mut text = String::with_capacity(inner.len());
    let mut rest = inner;
    while let Some((before, escape)) = rest.split_once('\\') {
        text.push_str(before);
        let Some(escaped) = escape.chars().next() else { break };
        rest = &escape[escaped.len_utf8()..];
        match escaped {
            'n' => text.push('\n'),
            't' => text.push('\t'),
            'r' => text.push('\r'),
            'b' => text.push('\u{8}'),
            'f' => text.push('\u{c}'),
            'u' => {
                let Some(unit) = unit(rest) else { continue };
                rest = &rest[4..];
                let low = rest.strip_prefix("\\u").and_then(unit_of_pair);
                let paired = low.filter(|_| (0xd800..0xdc00).contains(&unit)).map(|low| [unit, low]);
                if paired.is_some() {
                    rest = &rest[6..];
                }
                text.push_str(&match paired {
                    Some(pair) => String::from_utf16_lossy(&pair),
                    None => String::from_utf16_lossy(&[unit]),
                });
            }
            other => text.push(other),
        }
    }
    text.push_str(rest);
    Cow::Owned(text)
}

fn unit(text: &str) -> Option<u16> {
    u16::from_str_radix(text.get(..4)?, 16).ok()
}

/// The second half of a surrogate pair.
fn unit_of_pair(text: &str) -> Option<u16> {
    unit(text).filter(|unit| (0xdc00..0xe000).contains(unit))
}

fn instant(value: &RawValue) -> Option<i64> {
    match text(value) {
        Some(text) => text.parse::<jiff::Timestamp>().ok().map(jiff::Timestamp::as_millisecond),
        None => value.get().parse::<i64>().ok().map(|nanoseconds| nanoseconds / 1_000_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn types(body: &str) -> Option<String> {
        peek(body.as_bytes()).event_type.map(Cow::into_owned)
    }

    #[test]
    fn a_table_of_bodies() {
        let deep = format!(r#"{{"a":{}{},"type":"x"}}"#, "[".repeat(100_000), "]".repeat(100_000));
        let cases: [(&str, Option<&str>); 15] = [
            (r#"{"\u0074ype":"x"}"#, Some("x")),
            (r#"{"type":"message.new"}"#, Some("message.new")),
            (r#"{"message":{"type":"regular"},"type":"message.new"}"#, Some("message.new")),
            (r#"{"type":"a","type":"b"}"#, Some("b")),
            (r#"{"type":"caf\u00e9 \u003c"}"#, Some("café <")),
            (r#"{"ty\"pe":1,"type":"x"}"#, Some("x")),
            (r#"{"n":1e999,"type":"x"}"#, Some("x")),
            (r#"{"type":7}"#, None),
            (r#"{"type":null}"#, None),
            (r#"{"type":{"type":"inner"}}"#, None),
            (r#"{"type":"x","broken"#, Some("x")),
            (&deep, Some("x")),
            ("[]", None),
            ("", None),
            ("no JSON at all", None),
        ];
        for (body, expected) in cases {
            assert_eq!(types(body).as_deref(), expected, "{}", &body[..body.len().min(60)]);
        }
    }

    #[test]
    fn invalid_utf8_elsewhere_does_not_hide_the_type() {
        let body = b"{\"text\":\"\xff\xfe\",\"type\":\"message.new\"}";
        assert_eq!(peek(body).event_type.as_deref(), Some("message.new"));
        assert_eq!(peek(b"{\"type\":\"\xff\"}").event_type, None);
    }

    #[test]
    fn both_forms_of_time() {
        let at = |body: &str| peek(body.as_bytes()).created_at_ms;
        assert_eq!(at(r#"{"created_at":1778198400000000000}"#), Some(1_778_198_400_000));
        assert_eq!(at(r#"{"created_at":"2026-04-08T14:23:35.879421674Z"}"#), Some(1_775_658_215_879));
        assert_eq!(at(r#"{"created_at":"yesterday"}"#), None);
        assert_eq!(at(r#"{"created_at":1e9}"#), None);
    }

    proptest! {
        #[test]
        fn nothing_panics(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            peek(&body);
            peek(&[br#"{"type":"#.as_slice(), &body].concat());
        }

        #[test]
        fn any_type_is_read_back(name in any::<String>(), cid in any::<String>()) {
            let body = serde_json::json!({"cid": cid, "nested": {"type": 1}, "type": name}).to_string();
            let found = peek(body.as_bytes());
            prop_assert_eq!(found.event_type.as_deref(), Some(name.as_str()));
            prop_assert_eq!(found.cid.as_deref(), Some(cid.as_str()));
        }
    }
}
