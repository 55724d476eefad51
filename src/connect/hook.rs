//! One event hook of a Stream app. Only a few of its fields are known here; all others are kept as they were read,
//! because Stream replaces each hook as a whole and disables what is missing.

use super::tree::Tree;
use jiff::Timestamp;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use streamgate_core::fields::Fields;

/// The fields that Stream returns as integer nanoseconds and accepts only as text.
const TIMES: [&str; 2] = ["created_at", "updated_at"];
/// Stream's name of the product whose events arrive here.
const PRODUCT: &str = "chat";
const WEBHOOK: &str = "webhook";
const EVENT_TYPES: &str = "event_types";
/// Fields whose values are never secret.
const SHOWN: [&str; 7] =
    ["enabled", EVENT_TYPES, "hook_type", "product", "should_send_custom_events", "timeout_ms", "webhook_url"];

/// An event hook, as Stream takes it. Its `Debug` shows no values: other hooks hold secrets.
#[derive(Clone)]
pub(super) struct EventHook {
    json: String,
    fields: Fields,
}

/// The requested state of our hook.
#[derive(Clone, Debug)]
pub(super) struct WantedHook {
    pub(super) id: String,
    pub(super) url: String,
    /// Empty: every event.
    pub(super) event_types: Vec<String>,
    /// `None`: unchanged, and off for a new hook.
    pub(super) custom_events: Option<bool>,
}

impl EventHook {
    /// `None` if it is not a JSON object.
    pub(super) fn read(raw: &RawValue) -> Option<EventHook> {
        EventHook::of(with_written_times(raw.get()))
    }

    fn of(json: String) -> Option<EventHook> {
        let fields = Fields::parse(json.as_bytes())?;
        Some(EventHook { json, fields })
    }

    /// A new hook of ours.
    pub(super) fn new(wanted: &WantedHook) -> EventHook {
        let mut fields = Fields::default();
        fields.set("id", &json!(wanted.id));
        fields.set("enabled", &json!(true));
        fields.set("hook_type", &json!(WEBHOOK));
        fields.set("product", &json!(PRODUCT));
        fields.set("webhook_url", &json!(wanted.url));
        fields.set(EVENT_TYPES, &json!(wanted.event_types));
        fields.set("should_send_custom_events", &json!(wanted.custom_events.unwrap_or(false)));
        EventHook { json: fields.to_json(), fields }
    }

    /// Returns this hook with the requested values, and the names of the fields that change. All other fields stay.
    pub(super) fn updated(&self, wanted: &WantedHook) -> (EventHook, Vec<&'static str>) {
        let mut fields = self.fields.clone();
        let mut changed = Vec::new();
        let mut set = |name: &'static str, is_right: bool, value: Value| {
            if !is_right {
                fields.set(name, &value);
                changed.push(name);
            }
        };
        set("enabled", self.is_enabled(), json!(true));
        set("hook_type", self.hook_type() == WEBHOOK, json!(WEBHOOK));
        set("product", self.delivers_chat(), json!(PRODUCT));
        set("webhook_url", self.url() == wanted.url, json!(wanted.url));
        set(EVENT_TYPES, same_set(&self.event_types(), &wanted.event_types), json!(wanted.event_types));
        if let Some(custom) = wanted.custom_events {
            set("should_send_custom_events", self.sends_custom_events() == custom, json!(custom));
        }
        match changed.is_empty() {
            true => (self.clone(), changed),
            false => (EventHook { json: fields.to_json(), fields }, changed),
        }
    }

    /// The hook for an update.
    pub(super) fn json(&self) -> &str {
        &self.json
    }

    pub(super) fn id(&self) -> String {
        self.text("id")
    }

    /// Empty if it has none.
    pub(super) fn url(&self) -> String {
        self.text("webhook_url")
    }

    pub(super) fn hook_type(&self) -> String {
        self.text("hook_type")
    }

    pub(super) fn is_webhook(&self) -> bool {
        self.hook_type() == WEBHOOK
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.is_true("enabled")
    }

    pub(super) fn delivers_chat(&self) -> bool {
        matches!(self.text("product").as_str(), "" | "all" | PRODUCT)
    }

    /// Whether it is for all products, as a hook without a product is.
    pub(super) fn delivers_all_products(&self) -> bool {
        matches!(self.text("product").as_str(), "" | "all")
    }

    pub(super) fn sends_custom_events(&self) -> bool {
        self.is_true("should_send_custom_events")
    }

    /// Empty: every event.
    pub(super) fn event_types(&self) -> Vec<String> {
        let raw = self.fields.get(EVENT_TYPES);
        raw.and_then(|raw| serde_json::from_str::<Option<Vec<String>>>(raw.get()).ok()?).unwrap_or_default()
    }

    /// Whether both send an event in common.
    pub(super) fn overlaps(&self, event_types: &[String]) -> bool {
        let own = self.event_types();
        let is_everything = |types: &[String]| types.is_empty() || types.iter().any(|one| one == "*");
        is_everything(&own) || is_everything(event_types) || own.iter().any(|one| event_types.contains(one))
    }

    /// How long Stream waits for an answer, in milliseconds; `None` if the hook does not set it.
    pub(super) fn timeout(&self) -> Option<u64> {
        self.fields.get("timeout_ms")?.get().parse().ok().filter(|timeout| *timeout > 0)
    }

    /// Name of a secret field that Stream did not show, so that an update would overwrite the secret.
    pub(super) fn hidden_secret(&self) -> Option<String> {
        for service in ["sqs", "sns"] {
            let is_empty = |part: &str| self.text(&format!("{service}_{part}")).trim().is_empty();
            // The type is "keys" or "key"; without one, the presence of a key decides.
            let needs_secret = match is_empty("auth_type") {
                true => !is_empty("key"),
                false => self.text(&format!("{service}_auth_type")).starts_with("key"),
            };
            if let Some(part) = ["key", "secret"].into_iter().find(|part| needs_secret && is_empty(part)) {
                return Some(format!("{service}_{part}"));
            }
        }
        let failover = self.fields.object("failover_config").unwrap_or_default();
        let shows_credentials = || failover.get("gcs_credentials").is_some_and(|raw| !Tree::of(raw).is_empty());
        if failover.text("type").as_deref() == Some("gcs") && !shows_credentials() {
            return Some("gcs_credentials".to_owned());
        }
        self.fields.iter().find_map(|(name, raw)| Tree::of(raw).find_text(name, &is_masked))
    }

    /// A description for the user, without secrets.
    pub(super) fn describe(&self) -> String {
        let kind = self.hook_type();
        let place = ["webhook_url", "sqs_queue_url", "sns_topic_arn", "gcp_pubsub_topic"];
        let place = place.into_iter().map(|field| self.text(field)).find(|place| !place.is_empty());
        let place = place.map(|place| format!(" to {}", without_credentials(&place))).unwrap_or_default();
        format!("{kind} hook {}{place}", self.id())
    }

    /// Whether both are equal, except for times, nulls, and the order of keys and types.
    pub(super) fn is_equivalent(&self, other: &EventHook) -> bool {
        self.essence() == other.essence()
    }

    /// Whether this hook, as read back, contains everything that was written. Stream may add fields, and omit empty
    /// ones.
    pub(super) fn holds(&self, written: &EventHook) -> bool {
        self.differences(written).is_empty()
    }

    /// The fields that differ from what was written, for the user. Shows only values that cannot be secret.
    pub(super) fn differences(&self, written: &EventHook) -> Vec<String> {
        let (seen, written_fields) = (self.essence(), written.essence());
        let value = |hook: &EventHook, name| match hook.fields.get(name) {
            Some(raw) if name == "webhook_url" => without_credentials(raw.get()),
            Some(raw) => raw.get().to_owned(),
            None => "nothing".to_owned(),
        };
        let changed = written_fields.iter().filter(|(name, value)| match seen.get(*name) {
            Some(seen) => seen != *value,
            None => !value.is_empty(),
        });
        let said = changed.map(|(name, _)| match SHOWN.contains(&name.as_str()) {
            true => format!("{name} is {} where {} was written", value(self, name), value(written, name)),
            false if seen.contains_key(name) => format!("{name} differs from what was written"),
            false => format!("{name} is missing"),
        });
        said.collect()
    }

    /// All fields except times and nulls.
    fn essence(&self) -> BTreeMap<String, Tree> {
        let fields = self.fields.iter().filter(|(name, _)| !TIMES.contains(name));
        let fields = fields.map(|(name, raw)| {
            let mut value = Tree::of(raw).without_nulls();
            if let (EVENT_TYPES, Tree::List(types)) = (name, &mut value) {
                types.sort();
            }
            (name.to_owned(), value)
        });
        fields.filter(|(_, value)| !value.is_null()).collect()
    }

    fn text(&self, name: &str) -> String {
        self.fields.text(name).unwrap_or_default()
    }

    fn is_true(&self, name: &str) -> bool {
        self.fields.get(name).is_some_and(|raw| raw.get() == "true")
    }
}

impl std::fmt::Debug for EventHook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventHook").field("fields", &self.fields).finish_non_exhaustive()
    }
}

/// The same types in any order; `*` is every type, as the empty list is.
pub(super) fn same_set(one: &[String], other: &[String]) -> bool {
    let set = |types: &[String]| match types.iter().any(|name| name == "*") {
        true => BTreeSet::new(),
        false => types.iter().cloned().collect::<BTreeSet<_>>(),
    };
    set(one) == set(other)
}

/// Whether a text is a mask for a hidden value. An ambiguous text counts as a mask only in a field that holds a secret.
fn is_masked(name: &str, text: &str) -> bool {
    let is_fill = |c: char| matches!(c, '*' | '•' | 'x' | 'X');
    let holds_secret = ["secret", "key", "credential", "password", "token"].iter().any(|word| name.contains(word));
    let is_bracketed = text.starts_with(['[', '<']) && text.ends_with([']', '>']);
    let begins_filled = text.chars().take_while(|c| is_fill(*c)).count() > 3;
    let letters: String = text.chars().filter(char::is_ascii_alphabetic).map(|c| c.to_ascii_lowercase()).collect();
    text.contains("***")
        || text.contains("•••")
        || (text.len() > 3 && text.chars().all(is_fill))
        || (holds_secret && (is_bracketed || begins_filled || ["redacted", "hidden", "masked"].contains(&&*letters)))
}

/// Removes a password and the query, which may hold a token, from a URL of another receiver.
pub(super) fn without_credentials(url: &str) -> String {
    let (url, query) = url.split_once('?').map_or((url, ""), |(url, _)| (url, "?…"));
    let shown = match url.split_once("://") {
        Some((scheme, rest)) => match rest.split_once('/').unwrap_or((rest, "")) {
            (authority, path) if authority.contains('@') => {
                let host = authority.rsplit('@').next().unwrap_or_default();
                format!("{scheme}://…@{host}/{path}")
            }
            (_, _) => url.to_owned(),
        },
        None => url.to_owned(),
    };
    shown + query
}

/// The hook with its top-level times as text, and otherwise byte for byte.
fn with_written_times(json: &str) -> String {
    let Ok(Spans(spans)) = serde_json::from_str(json) else { return json.to_owned() };
    let mut written = String::with_capacity(json.len());
    let mut copied = 0;
    for value in spans {
        let Some(time) = value.get().parse().ok().and_then(|nanos| Timestamp::from_nanosecond(nanos).ok()) else {
            continue;
        };
        // `value` is a slice of this text.
        let start = (value.get().as_ptr() as usize).saturating_sub(json.as_ptr() as usize);
        written.push_str(json.get(copied..start).unwrap_or_default());
        written.push_str(&format!("\"{time}\""));
        copied = start + value.get().len();
    }
    written.push_str(json.get(copied..).unwrap_or_default());
    written
}

/// The raw values of the time fields, in order.
struct Spans<'j>(Vec<&'j RawValue>);

impl<'de> Deserialize<'de> for Spans<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Spans<'de>, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Spans<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Spans<'de>, A::Error> {
                let mut spans = Vec::new();
                while let Some((name, value)) = map.next_entry::<&'de RawValue, &'de RawValue>()? {
                    if TIMES.contains(&name.get().trim_matches('"')) {
                        spans.push(value);
                    }
                }
                Ok(Spans(spans))
            }
        }
        deserializer.deserialize_map(Object)
    }
}
