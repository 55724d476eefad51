//! What of an app's settings leads to a gateway, as Stream has it.

use super::hook::{EventHook, without_credentials};
use serde_json::value::RawValue;
use streamgate_core::fields::Fields;

/// An app's settings, as far as they are of interest.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) app: AppSummary,
    pub(super) webhooks: Webhooks,
    /// Empty where there is none.
    pub(super) before_message_send_url: String,
    /// Milliseconds; 0 is Stream's own default.
    pub(super) before_message_send_timeout: u64,
    pub(super) custom_action_handler_url: String,
    /// `moderation_webhook_url`, which is nothing of ours.
    pub(super) moderation_webhook_url: String,
}

/// Which app it is, for people.
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

/// Where push webhooks go. Stream has two generations of that.
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
        let webhooks = if raw("use_hook_v2") == "true" {
            Webhooks::V2(hooks(app)?)
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
            moderation_webhook_url: text("moderation_webhook_url"),
        })
    }

    /// Whether they say the same of all that a plan rests on.
    pub(super) fn says_same(&self, other: &Settings) -> bool {
        self.webhooks.says_same(&other.webhooks)
            && self.before_message_send_url == other.before_message_send_url
            && self.before_message_send_timeout == other.before_message_send_timeout
            && self.custom_action_handler_url == other.custom_action_handler_url
    }

    /// Whether each setting is as before or as expected: reads lag behind, and not all alike.
    pub(super) fn is_between(&self, before: &Settings, expected: &Settings) -> bool {
        let is_either = |webhooks: &Webhooks| webhooks.says_same(&self.webhooks);
        let either = |field: fn(&Settings) -> &str| field(self) == field(before) || field(self) == field(expected);
        let timeout = self.before_message_send_timeout;
        (is_either(&before.webhooks) || is_either(&expected.webhooks))
            && either(|settings| &settings.before_message_send_url)
            && either(|settings| &settings.custom_action_handler_url)
            && (timeout == before.before_message_send_timeout || timeout == expected.before_message_send_timeout)
    }
}

impl Webhooks {
    pub(super) fn says_same(&self, other: &Webhooks) -> bool {
        match (self, other) {
            (Webhooks::V1 { url, event_types }, Webhooks::V1 { url: other_url, event_types: other_types }) => {
                url == other_url && event_types == other_types
            }
            (Webhooks::V2(hooks), Webhooks::V2(others)) => {
                hooks.len() == others.len() && hooks.iter().zip(others).all(|(hook, other)| hook.says_same(other))
            }
            (Webhooks::V1 { .. }, Webhooks::V2(_)) | (Webhooks::V2(_), Webhooks::V1 { .. }) => false,
        }
    }
}

/// The app's event hooks. What cannot be read is an error: an update would delete it.
fn hooks(app: &Fields) -> Result<Vec<EventHook>, String> {
    let raw = app.get("event_hooks").map_or("null", RawValue::get);
    let unreadable = || "Stream's answer has event_hooks that are no list of objects; nothing was written".to_owned();
    let list: Option<Vec<Box<RawValue>>> = serde_json::from_str(raw).map_err(|_| unreadable())?;
    list.unwrap_or_default().iter().map(|hook| EventHook::read(hook).ok_or_else(unreadable)).collect()
}

/// What did not come back as it was written; of hooks only which, for they hold secrets.
pub(super) fn hook_differences(expected: &Webhooks, seen: &Webhooks) -> Vec<String> {
    match (expected, seen) {
        (Webhooks::V2(expected), Webhooks::V2(seen)) => {
            let is_in = |hook: &EventHook, hooks: &[EventHook]| hooks.iter().any(|other| other.says_same(hook));
            let missing = expected.iter().filter(|hook| !is_in(hook, seen));
            let missing = missing.map(|hook| format!("expected, and not there as it was written: {}", hook.describe()));
            let other = seen.iter().filter(|hook| !is_in(hook, expected));
            missing.chain(other.map(|hook| format!("there instead: {}", hook.describe()))).collect()
        }
        (expected, seen) if expected.says_same(seen) => Vec::new(),
        (Webhooks::V1 { url, event_types }, Webhooks::V1 { url: other, event_types: types }) => vec![format!(
            "webhook_url: expected {:?} for {event_types:?}, and it is {:?} for {types:?}",
            without_credentials(url),
            without_credentials(other)
        )],
        (_, _) => vec!["the app was moved to another generation of hooks".to_owned()],
    }
}
