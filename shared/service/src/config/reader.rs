//! Reads a TOML table key by key, and collects every mistake instead of stopping at the first.
//!
//! serde stops at the first error; an operator who fixes a configuration in production wants all of them at once, each
//! with its key.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;
use toml::{Table, Value};

/// One mistake: where, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub key: String,
    pub what: String,
    /// The line in the file, from 1, if the key is in a file.
    pub line: Option<usize>,
}

impl Problem {
    pub fn new(key: impl Into<String>, what: impl Into<String>) -> Problem {
        Problem { key: key.into(), what: what.into(), line: None }
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        write!(f, "{}: {}", self.key, self.what)
    }
}

/// The mistakes found so far, and which keys came from the environment.
#[derive(Debug, Default)]
pub struct Report {
    problems: RefCell<Vec<Problem>>,
    /// Settings that work and are probably not what was meant.
    doubts: RefCell<Vec<Problem>>,
    from_env: BTreeMap<String, String>,
}

impl Report {
    /// `from_env`: key path → name of the variable that set it.
    pub fn new(from_env: BTreeMap<String, String>) -> Report {
        Report { from_env, ..Report::default() }
    }

    pub fn problem(&self, key: impl Into<String>, what: impl Into<String>) {
        let (key, mut what) = (key.into(), what.into());
        if let Some(variable) = self.from_env.get(&key) {
            what.push_str(&format!(" (set by the environment variable {variable})"));
        }
        self.problems.borrow_mut().push(Problem::new(key, what));
    }

    pub fn doubt(&self, key: impl Into<String>, what: impl Into<String>) {
        self.doubts.borrow_mut().push(Problem::new(key, what));
    }

    pub fn into_problems(self) -> Vec<Problem> {
        self.problems.into_inner()
    }

    /// The doubts so far, which are not mistakes.
    pub fn take_doubts(&self) -> Vec<Problem> {
        self.doubts.take()
    }
}

/// A table being read. Every key that is asked for is removed; what is left at the end is unknown.
#[derive(Debug)]
pub struct Section<'r> {
    path: String,
    table: Table,
    known: Vec<&'static str>,
    given: Vec<&'static str>,
    report: &'r Report,
}

impl<'r> Section<'r> {
    pub fn root(table: Table, report: &'r Report) -> Section<'r> {
        Section { path: String::new(), table, known: Vec::new(), given: Vec::new(), report }
    }

    /// The full path of a key in this section.
    pub fn key(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    pub fn problem(&self, key: &str, what: impl Into<String>) {
        self.report.problem(self.key(key), what);
    }

    pub fn doubt(&self, key: &str, what: impl Into<String>) {
        self.report.doubt(self.key(key), what);
    }

    /// Whether the key exists, whatever its value.
    pub fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// Whether the key existed, after it was asked for.
    pub fn was_given(&self, key: &str) -> bool {
        self.given.contains(&key)
    }

    fn take(&mut self, key: &'static str) -> Option<Value> {
        self.known.push(key);
        let value = self.table.remove(key);
        if value.is_some() {
            self.given.push(key);
        }
        value
    }

    /// The value that `parse` makes of a key's text or number, or `None` if the key is absent or wrong (then reported).
    /// A reference to the environment or a file is wrong here: as a literal it would never work.
    pub fn parsed<T>(&mut self, key: &'static str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        self.scalar(key, |text| if is_reference(text) { Err(NO_REFERENCE.to_owned()) } else { parse(text) })
    }

    /// Like `parsed`, for texts and patterns, which may begin in any way.
    pub fn prose<T>(&mut self, key: &'static str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        self.scalar(key, parse)
    }

    /// A text that may be a reference to the environment or a file, which the caller resolves.
    pub fn reference(&mut self, key: &'static str) -> Option<String> {
        self.scalar(key, |text| Ok(text.to_owned()))
    }

    fn scalar<T>(&mut self, key: &'static str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        let text = match self.take(key)? {
            Value::String(text) => text,
            Value::Integer(number) => number.to_string(),
            Value::Boolean(flag) => flag.to_string(),
            other @ (Value::Float(_) | Value::Datetime(_) | Value::Array(_) | Value::Table(_)) => {
                self.problem(
                    key,
                    format!("invalid {}: expected a text, a whole number, true or false", other.type_str()),
                );
                return None;
            }
        };
        parse(&text).map_err(|what| self.problem(key, what)).ok()
    }

    pub fn text(&mut self, key: &'static str) -> Option<String> {
        self.parsed(key, |text| Ok(text.to_owned()))
    }

    /// `true` or `false`.
    pub fn flag(&mut self, key: &'static str, default: bool) -> bool {
        let parse = |text: &str| text.parse().map_err(|_| format!("{text:?} is neither true nor false"));
        self.parsed(key, parse).unwrap_or(default)
    }

    pub fn duration(&mut self, key: &'static str, default: Duration) -> Duration {
        self.parsed(key, duration).unwrap_or(default)
    }

    /// A duration, or `None` if the key is absent or `off`.
    pub fn duration_or_off(&mut self, key: &'static str) -> Option<Duration> {
        self.parsed(key, |text| if text == "off" { Ok(None) } else { duration(text).map(Some) }).flatten()
    }

    pub fn size(&mut self, key: &'static str, default: usize) -> usize {
        self.parsed(key, size).unwrap_or(default)
    }

    /// A number from 1 to `most`.
    pub fn count(&mut self, key: &'static str, default: usize, most: usize) -> usize {
        let parse = |text: &str| match text.parse::<usize>() {
            Ok(number) if (1..=most).contains(&number) => Ok(number),
            _ => Err(format!("invalid number {text:?}: expected a whole number from 1 to {most}")),
        };
        self.parsed(key, parse).unwrap_or(default)
    }

    /// A list of strings, or `None` if the key is absent. References are not allowed in it.
    pub fn texts(&mut self, key: &'static str) -> Option<Vec<String>> {
        let texts = self.references(key)?;
        if texts.iter().any(|text| is_reference(text)) {
            self.problem(key, NO_REFERENCE);
        }
        Some(texts)
    }

    /// A list of strings that may be references, which the caller resolves.
    pub fn references(&mut self, key: &'static str) -> Option<Vec<String>> {
        let value = self.take(key)?;
        let texts: Option<Vec<String>> =
            value.as_array().and_then(|list| list.iter().map(|item| item.as_str().map(str::to_owned)).collect());
        if texts.is_none() {
            self.problem(key, "takes a list of strings, [\"…\", \"…\"]");
        }
        texts
    }

    /// A table of strings, in the order of its keys.
    pub fn text_table(&mut self, key: &'static str) -> Vec<(String, String)> {
        let Some(value) = self.take(key) else { return Vec::new() };
        let Value::Table(table) = value else {
            self.problem(key, "takes a table of strings, { Name = \"value\" }");
            return Vec::new();
        };
        let mut texts = Vec::new();
        for (name, value) in table {
            match value.as_str() {
                Some(text) => texts.push((name, text.to_owned())),
                None => self.report.problem(format!("{}.{name}", self.key(key)), "takes a string"),
            }
        }
        texts
    }

    /// A sub-table, or `None` if it is absent.
    pub fn section(&mut self, key: &'static str) -> Option<Section<'r>> {
        if let Value::Table(table) = self.take(key)? {
            return Some(self.child(self.key(key), table));
        }
        self.problem(key, format!("takes a table, [{}]", self.key(key)));
        None
    }

    /// A table, or `false` to switch the feature off.
    pub fn section_or_false(&mut self, key: &'static str) -> Option<Option<Section<'r>>> {
        match self.take(key)? {
            Value::Table(table) => Some(Some(self.child(self.key(key), table))),
            Value::Boolean(false) => Some(None),
            Value::Boolean(true)
            | Value::String(_)
            | Value::Integer(_)
            | Value::Float(_)
            | Value::Datetime(_)
            | Value::Array(_) => {
                self.problem(key, "takes a table, or false for none");
                None
            }
        }
    }

    /// A sub-table; empty if it is absent, so that every key in it has its default.
    pub fn section_or_empty(&mut self, key: &'static str) -> Section<'r> {
        let path = self.key(key);
        self.section(key).unwrap_or_else(|| self.child(path, Table::new()))
    }

    /// An array of tables; each element's path contains its position, from 1.
    pub fn sections(&mut self, key: &'static str) -> Vec<Section<'r>> {
        let Some(value) = self.take(key) else { return Vec::new() };
        let Value::Array(list) = value else {
            self.problem(key, format!("takes an array of tables, [[{}]]", self.key(key)));
            return Vec::new();
        };
        let mut sections = Vec::new();
        for (place, item) in list.into_iter().enumerate() {
            let path = format!("{}[{}]", self.key(key), place + 1);
            if let Value::Table(table) = item {
                sections.push(self.child(path, table));
            } else {
                self.report.problem(path, "takes a table");
            }
        }
        sections
    }

    /// A table of tables, whose keys are names.
    pub fn named_sections(&mut self, key: &'static str) -> Vec<(String, Section<'r>)> {
        let Some(section) = self.section(key) else { return Vec::new() };
        let mut sections = Vec::new();
        for (name, item) in section.table {
            let path = format!("{}.{name}", section.path);
            if let Value::Table(table) = item {
                sections.push((name, self.child(path, table)));
            } else {
                self.report.problem(path, "takes a table");
            }
        }
        sections
    }

    fn child(&self, path: String, table: Table) -> Section<'r> {
        Section { path, table, known: Vec::new(), given: Vec::new(), report: self.report }
    }

    /// Reports every key that was never asked for.
    pub fn finish(self) {
        for key in self.table.keys() {
            let known = self.known.join(", ");
            let meant = nearest(key, self.known.iter().copied());
            let meant = meant.map(|meant| format!(", did you mean {meant}?")).unwrap_or_default();
            self.report.problem(self.key(key), format!("unknown key{meant}; this section takes: {known}"));
        }
    }
}

const NO_REFERENCE: &str = "takes the value itself: env: and file: work only in secrets, URLs and headers";

/// Whether a text is a reference to where a value is read from.
pub fn is_reference(text: &str) -> bool {
    text.starts_with("env:") || text.starts_with("file:")
}

/// The known name that was probably meant.
pub fn nearest<'n>(name: &str, known: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let likeness = |known: &str| strsim::normalized_damerau_levenshtein(name, known);
    known.filter(|known| likeness(known) >= LIKE).max_by(|one, other| likeness(one).total_cmp(&likeness(other)))
}

/// Least similarity of two names: `listn` and `listen` have 0.83, `retries` and `retry` 0.57, `colour` and
/// `concurrency` 0.27.
const LIKE: f64 = 0.5;

/// Parses `500ms`, `5s`, `2m`, `24h`: over zero.
pub fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err(format!("invalid duration {text:?}: expected a number with a unit, like 500ms, 5s, 2m or 24h")),
    }
}

/// Parses a duration, or `0`.
pub fn duration_or_zero(text: &str) -> Result<Duration, String> {
    if text == "0" || humantime::parse_duration(text) == Ok(Duration::ZERO) {
        Ok(Duration::ZERO)
    } else {
        duration(text)
    }
}

/// Parses `4MiB`, `256KiB`, `1GB` or plain bytes: over zero.
pub fn size(text: &str) -> Result<usize, String> {
    match text.parse::<bytesize::ByteSize>() {
        Ok(size) if size.as_u64() > 0 => usize::try_from(size.as_u64()).map_err(|error| error.to_string()),
        _ => Err(format!("invalid size {text:?}: expected bytes, or a number with a unit, like 4MiB, 256KiB or 1GiB")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mistake_is_reported_with_its_key() {
        let table: Table = toml::from_str(
            "wait = '5x'\nsize = 4096\ncount = '0'\nnames = [1]\nextra = 1\n[[list]]\nunknown = 1\n[[list]]\n",
        )
        .unwrap();
        let report = Report::new(BTreeMap::from([("wait".to_owned(), "STREAMGATE__WAIT".to_owned())]));
        let mut section = Section::root(table, &report);
        assert_eq!(section.duration("wait", Duration::from_secs(9)), Duration::from_secs(9));
        assert_eq!(section.size("size", 1), 4096);
        assert_eq!(section.count("count", 3, 10), 3);
        assert_eq!(section.texts("names"), None);
        let list = section.sections("list");
        assert_eq!(list.len(), 2);
        list.into_iter().for_each(Section::finish);
        section.finish();
        let keys: Vec<_> = report.into_problems().into_iter().map(|problem| problem.to_string()).collect();
        assert_eq!(keys.len(), 5, "{keys:#?}");
        assert!(keys[0].starts_with("wait: ") && keys[0].contains("STREAMGATE__WAIT"), "{}", keys[0]);
        assert!(keys[3].starts_with("list[1].unknown: unknown key"), "{}", keys[3]);
        assert!(keys[4].starts_with("extra: unknown key; this section takes: wait, size"), "{}", keys[4]);
    }

    #[test]
    fn durations_and_sizes() {
        assert_eq!(duration("4500ms"), Ok(Duration::from_millis(4500)));
        assert_eq!(duration("24h"), Ok(Duration::from_secs(86_400)));
        assert_eq!((duration_or_zero("0"), duration_or_zero("0s")), (Ok(Duration::ZERO), Ok(Duration::ZERO)));
        assert!(duration_or_zero("1s") == Ok(Duration::from_secs(1)) && duration_or_zero("soon").is_err());
        assert!(duration("0s").is_err() && duration("5").is_err() && duration("").is_err());
        assert_eq!(size("4MiB"), Ok(4 << 20));
        assert_eq!(size("4MB"), Ok(4_000_000));
        assert!(size("0").is_err() && size("big").is_err() && size("-1").is_err());
    }
}
