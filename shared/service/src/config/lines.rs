//! Finds the line of a key in a file.

use std::ops::Range;
use toml::de::{DeTable, DeValue};

/// The line of a key like `worker.routes[2].forward.url`, from 1; if the key is absent, that of the nearest table
/// around it.
pub(super) fn line(text: &str, key: &str) -> Option<usize> {
    let root = DeTable::parse(text).ok()?;
    let mut table = Some(root.get_ref());
    let mut found: Option<Range<usize>> = None;
    let mut rest = key;
    while let Some(at) = table.filter(|_| !rest.is_empty()) {
        // Names may contain dots: the longest match wins.
        let names = at.iter().filter(|(name, _)| starts_segment(rest, name.get_ref()));
        let Some((name, value)) = names.max_by_key(|(name, _)| name.get_ref().len()) else { break };
        found = Some(name.span());
        rest = &rest[name.get_ref().len()..];
        let mut value = value;
        if let Some((place, after)) = rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            let item =
                place.parse::<usize>().ok().and_then(|place| value.get_ref().as_array()?.get(place.checked_sub(1)?));
            let Some(item) = item else { break };
            found = Some(item.span());
            (value, rest) = (item, after);
        }
        rest = rest.strip_prefix('.').unwrap_or(rest);
        table = DeValue::as_table(value.get_ref());
    }
    found.map(|span| line_of(text, span.start))
}

fn starts_segment(key: &str, name: &str) -> bool {
    key.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

/// The line of a byte of the text, from 1.
pub(super) fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes().iter().take(offset).filter(|byte| **byte == b'\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_table_of_keys() {
        let text = "[gateway]\nlisten = 'x'\n\n[[worker.routes]]\nname = 'a'\n[[worker.routes]]\nforward = { url = 'x',\n  headers = { X-A = 'b' } }\n[hooks.custom_commands.commands.x]\nreply = ''\n";
        for (key, expected) in [
            ("gateway.listen", Some(2)),
            ("gateway.missing", Some(1)),
            ("worker.routes[1].name", Some(5)),
            ("worker.routes[1].events", Some(4)),
            ("worker.routes[2].forward.url", Some(7)),
            ("worker.routes[2].forward.headers.X-A", Some(8)),
            ("hooks.custom_commands.commands.x.reply", Some(10)),
            ("redis.url", None),
            ("gateway", Some(1)),
            ("gate", None),
        ] {
            assert_eq!(line(text, key), expected, "{key}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(key in "[a-z.\\[\\]0-9]{0,20}", any in any::<String>()) {
            for text in ["a = [{ b = 1 }]\n[c]\nd = 1\n", &any] {
                line(text, &key);
                line(text, &any);
            }
        }
    }
}
