//! A JSON value for comparison: numbers keep their digits, and half a surrogate pair is accepted as text.

use serde::Deserialize;
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use streamgate_core::fields::Fields;

/// Deeper values are compared as text. Chosen: settings nest three deep.
const DEEPEST: usize = 32;

/// Equal if the values are, whatever the order of keys and the notation. It has no `Debug`: it may hold secrets.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Tree {
    Null,
    Bool(bool),
    /// The digits; a number with a fraction or an exponent is parsed as a float first.
    Number(String),
    Text(String),
    List(Vec<Tree>),
    Object(BTreeMap<String, Tree>),
}

impl Tree {
    pub(super) fn of(raw: &RawValue) -> Tree {
        Tree::at(raw, 0)
    }

    fn at(raw: &RawValue, depth: usize) -> Tree {
        let json = raw.get();
        let as_written = || Tree::Text(json.to_owned());
        if depth > DEEPEST {
            return as_written();
        }
        match json.as_bytes().first() {
            Some(b'n') => Tree::Null,
            Some(b't') => Tree::Bool(true),
            Some(b'f') => Tree::Bool(false),
            Some(b'"') => parse(json).map_or_else(as_written, Tree::Text),
            Some(b'[') => {
                let items: Option<Vec<Box<RawValue>>> = parse(json);
                items.map_or_else(as_written, |items| {
                    Tree::List(items.iter().map(|item| Tree::at(item, depth + 1)).collect())
                })
            }
            Some(b'{') => {
                let fields = Fields::parse(json.as_bytes());
                let object = |fields: Fields| {
                    fields.iter().map(|(name, raw)| (name.to_owned(), Tree::at(raw, depth + 1))).collect()
                };
                fields.map_or_else(as_written, |fields| Tree::Object(object(fields)))
            }
            _ => Tree::Number(number(json)),
        }
    }

    pub(super) fn is_null(&self) -> bool {
        *self == Tree::Null
    }

    /// Whether Stream may omit the value without changing the meaning.
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Tree::Null => true,
            Tree::Bool(value) => !value,
            Tree::Number(digits) => digits == "0",
            Tree::Text(text) => text.is_empty(),
            Tree::List(items) => items.is_empty(),
            Tree::Object(fields) => fields.is_empty(),
        }
    }

    /// The value without null fields, at any depth.
    pub(super) fn without_nulls(self) -> Tree {
        match self {
            Tree::Object(fields) => {
                let fields = fields.into_iter().filter(|(_, value)| !value.is_null());
                Tree::Object(fields.map(|(name, value)| (name, value.without_nulls())).collect())
            }
            Tree::List(items) => Tree::List(items.into_iter().map(Tree::without_nulls).collect()),
            other @ (Tree::Null | Tree::Bool(_) | Tree::Number(_) | Tree::Text(_)) => other,
        }
    }

    /// The field name of the first text, at any depth, for which `is_it` returns true. `is_it` takes the field's name
    /// and the text.
    pub(super) fn find_text(&self, name: &str, is_it: &impl Fn(&str, &str) -> bool) -> Option<String> {
        match self {
            Tree::Text(text) => is_it(name, text).then(|| name.to_owned()),
            Tree::List(items) => items.iter().find_map(|item| item.find_text(name, is_it)),
            Tree::Object(fields) => fields.iter().find_map(|(name, value)| value.find_text(name, is_it)),
            Tree::Null | Tree::Bool(_) | Tree::Number(_) => None,
        }
    }
}

fn parse<'j, T: Deserialize<'j>>(json: &'j str) -> Option<T> {
    serde_json::from_str(json).ok()
}

/// One notation for each value, within the precision of floats.
fn number(json: &str) -> String {
    let as_float = || json.parse::<f64>().ok().filter(|value| value.is_finite());
    let is_float = json.contains(['.', 'e', 'E']);
    if is_float { as_float().map_or_else(|| json.to_owned(), |value| value.to_string()) } else { json.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(json: &str) -> Tree {
        Tree::of(&RawValue::from_string(json.to_owned()).unwrap())
    }

    #[test]
    fn values_are_equal_by_their_digits_and_not_by_their_writing() {
        for (one, other, is_same) in [
            (r#"{"a":1,"b":"\u00e9"}"#, r#"{ "b" : "é", "a":1 }"#, true),
            ("18446744073709551617", "18446744073709551618", false),
            ("1e2", "100.0", true),
            ("1e400", "1e401", false),
            (r#""\ud800""#, r#""\ud801""#, false),
            (r#"{"a":["\ud800"]}"#, r#"{"a": ["\ud800"]}"#, true),
            ("[1,2]", "[2,1]", false),
            ("null", "false", false),
        ] {
            assert_eq!(tree(one) == tree(other), is_same, "{one} {other}");
        }
        let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(tree(&deep) == tree(&deep), "no depth is too much");
        assert!(tree(r#"{"a":null,"b":[{"c":null}]}"#).without_nulls() == tree(r#"{"b":[{}]}"#));
    }
}
