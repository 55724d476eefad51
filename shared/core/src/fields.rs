//! A JSON object in which single fields are read or replaced while all others stay as they were written, digit by digit: fields
//! that a later version of Stream adds survive, and so do numbers that no float can represent.

use crate::peek::{text, text_lossy};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};
use std::borrow::Cow;

/// Fields in order, each once. `Debug` shows none of their values.
#[derive(Clone, Default)]
pub struct Fields(Vec<Field>);

#[derive(Clone)]
struct Field {
    name: String,
    /// The name in JSON if it cannot be written from `name`: an unpaired surrogate has no other form.
    literal: Option<Box<RawValue>>,
    value: Box<RawValue>,
}

impl Fields {
    /// `None` if the text is not a JSON object.
    pub fn parse(json: &[u8]) -> Option<Fields> {
        serde_json::from_slice(json).ok()
    }

    pub fn get(&self, name: &str) -> Option<&RawValue> {
        self.0.iter().find(|field| field.name == name).map(|field| &*field.value)
    }

    /// The fields in their order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &RawValue)> {
        self.0.iter().map(|field| (field.name.as_str(), &*field.value))
    }

    /// The value as a tree, or `None` if it is nested more than 127 levels deep. In the tree, but not in this object, a
    /// number that no float can represent exactly is rounded, and an unpaired surrogate is U+FFFD.
    pub fn value(&self, name: &str) -> Option<Value> {
        let json = self.get(name)?.get();
        serde_json::from_str(json).ok().or_else(|| serde_json::from_str(&whole(json)).ok())
    }

    /// Appends an item to a list, whose other items stay as written. Creates the list if there is none.
    pub fn push(&mut self, name: &str, item: &Value) {
        let there: Option<Vec<Box<RawValue>>> = self.get(name).and_then(|raw| serde_json::from_str(raw.get()).ok());
        let mut items: Vec<String> = there.iter().flatten().map(|item| item.get().to_owned()).collect();
        items.push(item.to_string());
        // The items are JSON values, so joined by commas they are a JSON list.
        if let Ok(value) = RawValue::from_string(format!("[{}]", items.join(","))) {
            self.put(Field { name: name.to_owned(), literal: None, value });
        }
    }

    /// The string, with U+FFFD for an unpaired surrogate, or `None` if the value is not a string.
    pub fn text(&self, name: &str) -> Option<String> {
        text_lossy(self.get(name)?).map(Cow::into_owned)
    }

    /// A nested object.
    pub fn object(&self, name: &str) -> Option<Fields> {
        Fields::parse(self.get(name)?.get().as_bytes())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The object as JSON text.
    pub fn to_json(&self) -> String {
        let mut json = String::from("{");
        for Field { name, literal, value } in &self.0 {
            let comma = if json.len() > 1 { "," } else { "" };
            let literal =
                literal.as_ref().map_or_else(|| Value::from(name.as_str()).to_string(), |raw| raw.get().to_owned());
            json.push_str(&format!("{comma}{literal}:{}", value.get()));
        }
        json.push('}');
        json
    }

    /// Replaces the value of an existing field, or appends a new one.
    pub fn set(&mut self, name: &str, value: &Value) {
        // Serialising a tree of values never fails.
        if let Ok(value) = to_raw_value(value) {
            self.put(Field { name: name.to_owned(), literal: None, value });
        }
    }

    /// Like `set`, but keeps the value digit by digit.
    pub fn set_raw(&mut self, name: &str, value: Box<RawValue>) {
        self.put(Field { name: name.to_owned(), literal: None, value });
    }

    fn put(&mut self, field: Field) {
        match self.0.iter_mut().find(|known| known.name == field.name) {
            Some(known) => known.value = field.value,
            None => self.0.push(field),
        }
    }
}

impl std::fmt::Debug for Fields {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.iter().map(|field| &field.name)).finish()
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Fields, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let (mut fields, mut entries) = (Fields::default(), 0);
                while let Some((literal, value)) = map.next_entry::<Box<RawValue>, Box<RawValue>>()? {
                    entries += 1;
                    if entries > MAX_FIELDS {
                        return Err(A::Error::custom("too many fields"));
                    }
                    let exact = text(&literal).map(Cow::into_owned);
                    let lossy = || text_lossy(&literal).map(Cow::into_owned).unwrap_or_default();
                    let (name, literal) = match exact {
                        Some(name) => (name, None),
                        None => (lossy(), Some(literal)),
                    };
                    fields.put(Field { name, literal, value });
                }
                Ok(fields)
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// The JSON with U+FFFD for each unpaired surrogate.
fn whole(json: &str) -> String {
    let mut whole = String::with_capacity(json.len());
    let mut rest = json;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        whole.push_str(before);
        let unit = |from: usize| u16::from_str_radix(escape.get(from..from + 4)?, 16).ok();
        let (length, written) = match (escape.as_bytes().get(1), unit(2)) {
            (Some(b'u'), Some(high @ 0xd800..=0xdbff)) => match (escape.get(6..8), unit(8)) {
                (Some("\\u"), Some(0xdc00..=0xdfff)) => (12, escape.get(..12)),
                _ => (6, Some("\\ufffd").filter(|_| high > 0)),
            },
            (Some(b'u'), Some(0xdc00..=0xdfff)) => (6, Some("\\ufffd")),
            _ => (2, escape.get(..2)),
        };
        whole.push_str(written.unwrap_or_default());
        rest = escape.get(length..).unwrap_or_default();
    }
    whole.push_str(rest);
    whole
}

/// Each new field is compared with all earlier ones, so without a limit a hostile body could cost far more than its bytes.
const MAX_FIELDS: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_that_are_not_replaced_stay_as_they_were_written() {
        let json = br#"{"a":1e400,"id":12345678901234567890123,"f":1.10,"text":"old","n":{"x":[ 1 ]},"a":"last"}"#;
        let mut fields = Fields::parse(json).unwrap();
        fields.set("text", &"new".into());
        fields.set("more", &serde_json::json!([1]));
        let written = fields.to_json();
        let expected = r#"{"a":"last","id":12345678901234567890123,"f":1.10,"text":"new","n":{"x":[ 1 ]},"more":[1]}"#;
        assert_eq!(written, expected);
        assert_eq!(fields.text("text").as_deref(), Some("new"));
        assert_eq!((fields.text("f"), fields.text("none")), (None, None));
    }

    #[test]
    fn halves_of_characters_are_kept() {
        let json = r#"{"\ud83d":1,"text":"x \ud83d"}"#;
        let mut fields = Fields::parse(json.as_bytes()).unwrap();
        assert_eq!(fields.text("text").as_deref(), Some("x \u{fffd}"));
        assert_eq!(fields.to_json(), json);
        fields.set("text", &"y".into());
        assert_eq!(fields.to_json(), r#"{"\ud83d":1,"text":"y"}"#);
        let mut fields = Fields::parse(br#"{"a":[{"t":"\ud83d \ud83d\ude00 \ude00 \\ud83d \n"}]}"#).unwrap();
        assert_eq!(fields.value("a"), Some(serde_json::json!([{"t": "\u{fffd} \u{1f600} \u{fffd} \\ud83d \n"}])));
        fields.push("a", &serde_json::json!({"n": 1}));
        fields.push("b", &1.into());
        assert_eq!(fields.to_json(), r#"{"a":[{"t":"\ud83d \ud83d\ude00 \ude00 \\ud83d \n"},{"n":1}],"b":[1]}"#);
    }

    #[test]
    fn only_an_object_has_fields_and_debug_shows_no_values() {
        for json in [&b"[]"[..], b"1", b"null", b"", b"{\"a\"", b"{} x", b"{\"a\":\"\xff\"}"] {
            assert!(Fields::parse(json).is_none());
        }
        let debug = format!("{:?}", Fields::parse(br#"{"text":"private words"}"#).unwrap());
        assert_eq!(debug, r#"{"text"}"#);
    }

    #[test]
    fn a_hostile_number_of_fields_is_refused() {
        let fields: Vec<_> = (0..=MAX_FIELDS).map(|n| format!("\"{n}\":0")).collect();
        assert!(Fields::parse(format!("{{{}}}", fields.join(",")).as_bytes()).is_none());
        assert!(Fields::parse(format!("{{{}}}", fields[1..].join(",")).as_bytes()).is_some());
    }

    proptest! {
        #[test]
        fn every_field_survives(fields in proptest::collection::btree_map(any::<String>(), any::<(i64, String)>(), 0..8)) {
            let json = serde_json::to_string(&fields).unwrap();
            let mut read = Fields::parse(json.as_bytes()).unwrap();
            prop_assert_eq!(read.to_json(), json);
            read.set("\u{1}new", &1.into());
            for (name, value) in &fields {
                prop_assert_eq!(read.value(name), Some(serde_json::json!(value)));
            }
        }
    }
}
