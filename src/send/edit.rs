//! `--set PATH=JSON`: replaces one value of a body, and keeps all others as written.

use serde_json::value::RawValue;
use streamgate_core::fields::Fields;

/// Most steps of a path: chosen far above what any of Stream's bodies needs, and low enough for the stack.
const MAX_STEPS: usize = 64;

/// A value and its place.
#[derive(Clone, Debug)]
pub(super) struct Edit {
    path: Vec<Step>,
    value: Box<RawValue>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// A field of an object.
    Name(String),
    /// An item of a list, from 0.
    Place(usize),
}

impl Edit {
    /// `message.text="hello"`, `message.attachments[0].type="image"`, `user.banned=true`
    pub(super) fn parse(text: &str) -> Result<Edit, String> {
        let (path, value) = text.split_once('=').ok_or("expected PATH=JSON, like message.text=\"hello\"")?;
        let steps = steps(path).filter(|steps| (1..=MAX_STEPS).contains(&steps.len())).ok_or_else(|| {
            format!(
                "invalid path {path:?}: expected names and places like message.attachments[0].type, at most {MAX_STEPS}"
            )
        })?;
        let value = RawValue::from_string(value.trim().to_owned())
            .map_err(|_| format!("invalid JSON behind {path}=; quote a text: '{path}=\"text\"'"))?;
        Ok(Edit { path: steps, value })
    }

    /// Sets a text at this path.
    pub(super) fn of(names: &[&str], value: &str) -> Edit {
        // Serializing a string cannot fail.
        let value = serde_json::value::to_raw_value(value).unwrap_or_default();
        Edit { path: names.iter().map(|name| Step::Name((*name).to_owned())).collect(), value }
    }

    /// Whether it replaces this field of the body.
    pub(super) fn is_of(&self, name: &str) -> bool {
        matches!(self.path.as_slice(), [Step::Name(only)] if only == name)
    }

    pub(super) fn apply(&self, json: &[u8]) -> Result<String, String> {
        let text = std::str::from_utf8(json).map_err(|_| "cannot set anything in the body: it is not UTF-8")?;
        set(text, &self.path, &self.value).map_err(|what| format!("cannot set {}: {what}", shown(&self.path)))
    }
}

/// `None` if the text is not a path: each part has a name, and positions follow it in brackets.
fn steps(path: &str) -> Option<Vec<Step>> {
    let mut steps = Vec::new();
    for (part, text) in path.split('.').enumerate() {
        let (name, mut places) = text.split_at(text.find('[').unwrap_or(text.len()));
        if name.contains([']', '"', '\'']) || (name.is_empty() && (part > 0 || places.is_empty())) {
            return None;
        }
        if !name.is_empty() {
            steps.push(Step::Name(name.to_owned()));
        }
        while !places.is_empty() {
            let (digits, rest) = places.strip_prefix('[')?.split_once(']')?;
            let place: usize = digits.parse().ok().filter(|place: &usize| place.to_string() == digits)?;
            steps.push(Step::Place(place));
            places = rest;
        }
    }
    Some(steps)
}

fn shown(path: &[Step]) -> String {
    let step = |step: &Step| match step {
        Step::Name(name) => format!(".{name}"),
        Step::Place(place) => format!("[{place}]"),
    };
    path.iter().map(step).collect::<String>().trim_start_matches('.').to_owned()
}

/// Creates what is missing on the way.
fn set(json: &str, path: &[Step], value: &RawValue) -> Result<String, String> {
    let Some((step, rest)) = path.split_first() else { return Ok(value.get().to_owned()) };
    let raw = |json| RawValue::from_string(json).map_err(|error| error.to_string());
    let is_missing = json.trim() == "null";
    match step {
        Step::Name(name) => {
            let json = if is_missing { "{}" } else { json };
            if !json.trim_start().starts_with('{') {
                return Err(format!("{name} is a field, and what should hold it is not an object"));
            }
            let mut fields = Fields::parse(json.as_bytes())
                .ok_or("the body is not valid JSON, or an object in it has over 4096 fields")?;
            let within = set(fields.get(name).map_or("null", RawValue::get), rest, value)?;
            fields.set_raw(name, raw(within)?);
            Ok(fields.to_json())
        }
        Step::Place(place) => {
            let json = if is_missing { "[]" } else { json };
            let mut items: Vec<Box<RawValue>> = serde_json::from_str(json)
                .map_err(|_| format!("[{place}] is a place in a list, and what should hold it is not a list"))?;
            let item = raw(set(items.get(*place).map_or("null", |item| item.get()), rest, value)?)?;
            let length = items.len();
            match items.get_mut(*place) {
                Some(there) => *there = item,
                None if *place == length => items.push(item),
                None => return Err(format!("the list has {length} items, so the next place is [{length}]")),
            }
            serde_json::to_string(&items).map_err(|error| error.to_string())
        }
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
                "message.attachments[1]=2.50",
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
            ("message.text", "expected PATH=JSON"),
            ("message.text=hello", "'message.text=\"text\"'"),
            (".text=1", "invalid path"),
            ("=1", "invalid path"),
            ("message.text]=1", "invalid path"),
            ("message.\"text\"=1", "invalid path"),
            ("message.attachments[00]=1", "invalid path"),
            ("message.attachments[+0]=1", "invalid path"),
            ("message.attachments[0=1", "invalid path"),
            (&*format!("a{}=1", ".a".repeat(3000)), "at most 64"),
            ("n.x=1", "not an object"),
            ("message[0]=1", "not a list"),
            ("message.attachments[5]=1", "the next place is [1]"),
            ("message.attachments.type=1", "not an object"),
        ] {
            let error = Edit::parse(edit).and_then(|edit| edit.apply(body.as_bytes())).unwrap_err();
            assert!(error.contains(why), "{edit}: {error}");
        }
        assert!(
            Edit::parse("a=1").unwrap().apply(b"{").is_err() && Edit::parse("a=1").unwrap().apply(b"\xff").is_err()
        );
    }
}
