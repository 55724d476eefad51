//! `--set PATH=JSON`: one value of a body replaced, and all others as they were written.

use serde_json::value::RawValue;
use streamgate_core::fields::Fields;

/// What is put where.
#[derive(Clone, Debug)]
pub(super) struct Edit {
    path: Vec<String>,
    value: Box<RawValue>,
}

impl Edit {
    /// `message.text="hello"`, `message.attachments[0].type="image"`, `user.banned=true`
    pub(super) fn parse(text: &str) -> Result<Edit, String> {
        let (path, value) = text.split_once('=').ok_or("takes PATH=JSON, like message.text=\"hello\"")?;
        let steps: Vec<String> = path.replace('[', ".").replace(']', "").split('.').map(str::to_owned).collect();
        if steps.iter().any(String::is_empty) {
            return Err(format!(
                "{path:?} is no path: names and places go with dots, like message.attachments[0].type"
            ));
        }
        let value = RawValue::from_string(value.trim().to_owned())
            .map_err(|_| format!("what stands behind {path}= is no JSON; a text goes in quotes: '{path}=\"text\"'"))?;
        Ok(Edit { path: steps, value })
    }

    /// The value at a name of the body's own.
    pub(super) fn of(name: &str, value: &str) -> Edit {
        // A text can always be written.
        let value = serde_json::value::to_raw_value(value).unwrap_or_default();
        Edit { path: vec![name.to_owned()], value }
    }

    pub(super) fn apply(&self, json: &[u8]) -> Result<String, String> {
        let text = std::str::from_utf8(json).map_err(|_| "the body is no UTF-8, so nothing can be set in it")?;
        set(text, &self.path, &self.value).map_err(|what| format!("cannot set {}: {what}", self.path.join(".")))
    }
}

fn set(json: &str, path: &[String], value: &RawValue) -> Result<String, String> {
    let Some((name, rest)) = path.split_first() else { return Ok(value.get().to_owned()) };
    match json.trim_start().bytes().next() {
        Some(b'[') => {
            let mut items: Vec<Box<RawValue>> = serde_json::from_str(json).map_err(|error| error.to_string())?;
            let place: usize =
                name.parse().map_err(|_| format!("{name:?} is no place in a list: they count from 0"))?;
            let there = items.get(place).map_or("null", |item| item.get());
            let item = RawValue::from_string(set(there, rest, value)?).map_err(|error| error.to_string())?;
            if place < items.len() {
                items[place] = item;
            } else if place == items.len() {
                items.push(item);
            } else {
                return Err(format!("the list has {} items, so the next one is at {}", items.len(), items.len()));
            }
            serde_json::to_string(&items).map_err(|error| error.to_string())
        }
        // What is not there yet is made.
        Some(b'n') if name == "0" => set("[]", path, value),
        Some(b'n') => set("{}", path, value),
        Some(b'{') => {
            let mut fields = Fields::parse(json.as_bytes()).ok_or("the body is no JSON object")?;
            let within = set(fields.get(name).map_or("null", RawValue::get), rest, value)?;
            fields.set_raw(name, RawValue::from_string(within).map_err(|error| error.to_string())?);
            Ok(fields.to_json())
        }
        _ => Err(format!("what holds {name:?} is neither an object nor a list")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_edits() {
        let body = r#"{"n":1.10,"message":{"text":"a","attachments":[{"type":"image"}]},"big":9223372036854775807}"#;
        for (edit, expected) in [
            (
                r#"message.text="b""#,
                r#"{"n":1.10,"message":{"text":"b","attachments":[{"type":"image"}]},"big":9223372036854775807}"#,
            ),
            (
                r#"message.attachments[0].type="file""#,
                r#"{"n":1.10,"message":{"text":"a","attachments":[{"type":"file"}]},"big":9223372036854775807}"#,
            ),
            (
                "message.attachments.1=2.50",
                r#"{"n":1.10,"message":{"text":"a","attachments":[{"type":"image"},2.50]},"big":9223372036854775807}"#,
            ),
            (
                "new.list[0].x=null",
                r#"{"n":1.10,"message":{"text":"a","attachments":[{"type":"image"}]},"big":9223372036854775807,"new":{"list":[{"x":null}]}}"#,
            ),
        ] {
            assert_eq!(Edit::parse(edit).unwrap().apply(body.as_bytes()).unwrap(), expected, "{edit}");
        }
        for (edit, why) in [
            ("message.text", "takes PATH=JSON"),
            ("message.text=hello", "'message.text=\"text\"'"),
            (".text=1", "no path"),
            ("=1", "no path"),
            ("n.x=1", "neither an object nor a list"),
            ("message.attachments[5]=1", "the next one is at 1"),
            ("message.attachments.type=1", "no place in a list"),
        ] {
            let told = Edit::parse(edit).and_then(|edit| edit.apply(body.as_bytes())).unwrap_err();
            assert!(told.contains(why), "{edit}: {told}");
        }
        assert!(
            Edit::parse("a=1").unwrap().apply(b"{").is_err() && Edit::parse("a=1").unwrap().apply(b"\xff").is_err()
        );
    }
}
