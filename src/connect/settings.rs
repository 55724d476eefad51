//! The part of an app's settings that can lead to a gateway, as Stream returns it.

use super::hook::{EventHook, same_set, without_credentials};
use serde_json::value::RawValue;
use streamgate_core::fields::Fields;

pub(super) const TIMEOUT_FIELD: &str = "before_message_send_hook_attempt_timeout_ms";
/// An app's settings, as far as they are used here.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) app: AppSummary,
    pub(super) webhooks: Webhooks,
    /// Empty if it is not set.
    pub(super) before_message_send_url: String,
    /// Milliseconds; 0 is Stream's own default.
    pub(super) before_message_send_timeout: u64,
    pub(super) custom_action_handler_url: String,
    /// Other settings with receivers, and where they lead; they are never ours.
    pub(super) other_receivers: Vec<(&'static str, String)>,
}

/// Which app it is, for the user.
#[derive(Clone, Debug, Default)]
pub(super) struct AppSummary {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) region: String,
    pub(super) is_suspended: bool,
}

impl std::fmt::Display for AppSummary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let suspended = if self.is_suspended { ", suspended" } else { "" };
        write!(f, "Stream app {} ({}, {}{suspended})", self.name, self.id, self.region)
    }
}

/// Where push webhooks go. Stream has two generations of this setting.
#[derive(Clone, Debug)]
pub(super) enum Webhooks {
    /// One URL.
    V1 {
        url: String,
        event_types: Vec<String>,
    },
    V2(Vec<EventHook>),
}

impl Settings {
    pub(super) fn of(app: &Fields) -> Result<Settings, String> {
        let text = |name: &str| app.text(name).unwrap_or_default();
        let raw = |name: &str| app.get(name).map(RawValue::get).unwrap_or_default();
        let hooks = hooks(app)?;
        let is_v2 = match (raw("use_hook_v2"), app.get("event_hooks")) {
            ("true", None) => {
                return Err("Stream's answer has use_hook_v2 and no event_hooks: what an update would replace is not known; nothing was \
                            written"
                    .to_owned());
            }
            ("true", Some(_)) => true,
            // Without the field, the presence of hooks decides.
            ("" | "null", _) => !hooks.is_empty(),
            (_, _) => false,
        };
        let webhooks = if is_v2 {
            Webhooks::V2(hooks)
        } else {
            let event_types = serde_json::from_str::<Option<Vec<String>>>(raw("webhook_events")).ok().flatten();
            Webhooks::V1 { url: text("webhook_url"), event_types: event_types.unwrap_or_default() }
        };
        let id = app.get("id").map(|id| id.get().trim_matches('"').to_owned()).unwrap_or_default();
        Ok(Settings {
            app: AppSummary {
                id,
                name: text("name"),
                region: text("placement"),
                is_suspended: raw("suspended") == "true",
            },
            webhooks,
            before_message_send_url: text("before_message_send_hook_url"),
            before_message_send_timeout: raw("before_message_send_hook_attempt_timeout_ms").parse().unwrap_or(0),
            custom_action_handler_url: text("custom_action_handler_url"),
            other_receivers: ["moderation_webhook_url", "sqs_url", "sns_topic_arn"]
                .into_iter()
                .map(|name| (name, text(name)))
                .filter(|(_, place)| !place.is_empty())
                .collect(),
        })
    }

    /// Whether both are equal in everything that a plan depends on.
    pub(super) fn is_equivalent(&self, other: &Settings) -> bool {
        self.webhooks.is_equivalent(&other.webhooks)
            && self.plain() == other.plain()
            && self.other_receivers == other.other_receivers
    }

    /// Whether everything that was written was read back.
    pub(super) fn holds(&self, written: &Settings) -> bool {
        self.webhooks.holds(&written.webhooks) && self.plain() == written.plain()
    }

    pub(super) fn plain(&self) -> (&str, u64, &str) {
        (&self.before_message_send_url, self.before_message_send_timeout, &self.custom_action_handler_url)
    }

    /// Whether each setting has its old or its expected value: reads lag behind, each setting on its own.
    pub(super) fn is_between(&self, before: &Settings, expected: &Settings) -> bool {
        let (now, old, new) = (self.plain(), before.plain(), expected.plain());
        (self.webhooks.holds(&before.webhooks) || self.webhooks.holds(&expected.webhooks))
            && (now.0 == old.0 || now.0 == new.0)
            && (now.1 == old.1 || now.1 == new.1)
            && (now.2 == old.2 || now.2 == new.2)
    }
}

impl Webhooks {
    pub(super) fn is_equivalent(&self, other: &Webhooks) -> bool {
        self.is_as(other, EventHook::is_equivalent)
    }

    pub(super) fn holds(&self, written: &Webhooks) -> bool {
        self.is_as(written, EventHook::holds)
    }

    /// Compares hook by hook, in any order.
    fn is_as(&self, other: &Webhooks, is_as: fn(&EventHook, &EventHook) -> bool) -> bool {
        match (self, other) {
            (Webhooks::V1 { url, event_types }, Webhooks::V1 { url: other_url, event_types: other_types }) => {
                url == other_url && same_set(event_types, other_types)
            }
            (Webhooks::V2(hooks), Webhooks::V2(others)) => {
                hooks.len() == others.len()
                    && others.iter().all(|other| hooks.iter().any(|hook| is_as(hook, other)))
                    && hooks.iter().all(|hook| others.iter().any(|other| is_as(hook, other)))
            }
            (Webhooks::V1 { .. }, Webhooks::V2(_)) | (Webhooks::V2(_), Webhooks::V1 { .. }) => false,
        }
    }
}

/// The app's event hooks. An unreadable hook is an error, because an update would delete it.
fn hooks(app: &Fields) -> Result<Vec<EventHook>, String> {
    let raw = app.get("event_hooks").map_or("null", RawValue::get);
    let unreadable = || "event_hooks in Stream's answer is not a list of objects; nothing was written".to_owned();
    let list: Option<Vec<Box<RawValue>>> = serde_json::from_str(raw).map_err(|_| unreadable())?;
    list.unwrap_or_default().iter().map(|hook| EventHook::read(hook).ok_or_else(unreadable)).collect()
}

/// What was not read back as written, for the user. Of hooks only field names, because others hold secrets.
pub(super) fn differences(expected: &Settings, seen: &Settings) -> Vec<String> {
    let mut lines = hook_differences(&expected.webhooks, &seen.webhooks);
    let (written, found) = (expected.plain(), seen.plain());
    let plain = [
        ("before_message_send_hook_url", without_credentials(written.0), without_credentials(found.0)),
        ("before_message_send_hook_attempt_timeout_ms", written.1.to_string(), found.1.to_string()),
        ("custom_action_handler_url", without_credentials(written.2), without_credentials(found.2)),
    ];
    let changed = plain.into_iter().filter(|(_, written, found)| written != found);
    lines.extend(changed.map(|(name, written, found)| format!("{name} is {found:?} where {written:?} was written")));
    lines
}

fn hook_differences(expected: &Webhooks, seen: &Webhooks) -> Vec<String> {
    match (expected, seen) {
        (Webhooks::V2(expected), Webhooks::V2(seen)) => {
            let lost = expected.iter().filter(|hook| !seen.iter().any(|seen| seen.holds(hook)));
            let lost = lost.map(|hook| match seen.iter().find(|seen| seen.id() == hook.id()) {
                Some(seen) => format!("{}: {}", hook.describe(), seen.differences(hook).join("; ")),
                None => format!("{}: is missing", hook.describe()),
            });
            let is_known = |seen: &&EventHook| expected.iter().any(|hook| hook.id() == seen.id() || seen.holds(hook));
            let other = seen.iter().filter(|seen| !is_known(seen));
            lost.chain(other.map(|hook| format!("{}: was not written by this command", hook.describe()))).collect()
        }
        (expected, seen) if expected.is_equivalent(seen) => Vec::new(),
        (Webhooks::V1 { url, event_types }, Webhooks::V1 { url: other, event_types: types }) => vec![format!(
            "webhook_url is {:?} for {} where {:?} for {} was written",
            without_credentials(other),
            listed(types),
            without_credentials(url),
            listed(event_types),
        )],
        (_, _) => vec!["the app was moved to another generation of hooks".to_owned()],
    }
}

/// Event types, for the user.
pub(super) fn listed(event_types: &[String]) -> String {
    match event_types.len() {
        0 => "every event".to_owned(),
        1..=6 => event_types.join(", "),
        count => format!("{count} types of events"),
    }
}
