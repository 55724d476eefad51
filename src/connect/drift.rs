//! Whether a Stream app's settings still fit the configuration: what nobody notices until an event is missed.

use super::address::{BaseUrl, is_any_before_message_send, is_any_custom_commands, is_any_push};
use super::hook::{EventHook, without_credentials};
use super::settings::{Settings, Webhooks};
use super::{answers_commands, answers_moderation, moderation_deadline, sign_in};
use crate::exit::BadUsage;
use std::time::Duration;
use streamgate_core::event_types::CHAT;
use streamgate_core::pattern::Pattern;
use streamgate_service::config::{AppConfig, Config, STREAM_MODERATION};

/// Something that does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Drift {
    /// Nothing arrives.
    Broken(String),
    /// Some of it may not be what was meant.
    Doubtful(String),
}

/// What of the app's settings does not fit; or which app it is, where all does.
pub(crate) async fn look(app: &AppConfig, config: &Config, stream_url: &str) -> Result<(String, Vec<Drift>), String> {
    let stream = BaseUrl::parse(stream_url, "--stream-url").map_err(|BadUsage(what)| what)?;
    let (_, settings) = sign_in(&stream, app).await.map_err(|error| format!("{error:#}"))?;
    Ok((settings.app.to_string(), drift(&settings, &app.name, config)))
}

fn drift(settings: &Settings, app: &str, config: &Config) -> Vec<Drift> {
    let mut found = Vec::new();
    if settings.app.is_suspended {
        found.push(Drift::Broken("Stream has suspended the app: no webhook is sent".to_owned()));
    }
    match &settings.webhooks {
        Webhooks::V1 { url, event_types } if is_any_push(url) => {
            found.extend(unsent(app, config, &[Sent { event_types: event_types.clone(), custom: true }]));
        }
        Webhooks::V1 { .. } => found.push(Drift::Broken(nothing("webhook_url leads elsewhere"))),
        Webhooks::V2(hooks) => found.extend(of_hooks(hooks, app, config)),
    }
    found.extend(synchronous(settings, config));
    found
}

fn nothing(why: &str) -> String {
    format!("{why}, so no event arrives here: `streamgate connect --url https://…` points the app at this gateway")
}

/// What a hook sends.
struct Sent {
    /// Empty: every event.
    event_types: Vec<String>,
    /// Whether those of the app's own types are sent too.
    custom: bool,
}

fn of_hooks(hooks: &[EventHook], app: &str, config: &Config) -> Vec<Drift> {
    // Temporary hooks of Stream's own CLI end with it.
    let to_us =
        |hook: &&EventHook| hook.is_webhook() && is_any_push(&hook.url()) && !hook.url().contains("?cliwebhook=");
    let delivers = |hook: &&EventHook| to_us(hook) && hook.is_enabled() && hook.delivers_chat();
    let ours: Vec<&EventHook> = hooks.iter().filter(delivers).collect();
    if ours.is_empty() {
        let why = match hooks.iter().find(to_us) {
            Some(hook) if hook.is_enabled() => "the hook that leads here is for another product than chat",
            Some(_) => "the hook that leads here is not enabled",
            None => "no hook of the app leads here",
        };
        return vec![Drift::Broken(nothing(why))];
    }
    let sent: Vec<_> =
        ours.iter().map(|hook| Sent { event_types: hook.event_types(), custom: hook.sends_custom_events() }).collect();
    let mut found = unsent(app, config, &sent);
    let receivers = hooks.iter().filter(|hook| hook.is_enabled() && hook.is_webhook() && hook.delivers_chat());
    for other in receivers.filter(|hook| !ours.first().is_some_and(|first| std::ptr::eq(*first, *hook))) {
        if ours.iter().any(|hook| !std::ptr::eq(*hook, other) && other.overlaps(&hook.event_types())) {
            found.push(Drift::Doubtful(format!("{} gets the same events", other.describe())));
        }
    }
    found
}

/// The routes of which some pattern matches nothing that is sent.
fn unsent(app: &str, config: &Config, sent: &[Sent]) -> Vec<Drift> {
    let is_sent = |pattern: &Pattern| {
        sent.iter().any(|hook| match hook.event_types.as_slice() {
            [] => hook.custom || CHAT.iter().any(|name| pattern.matches(name)),
            types => types.iter().any(|name| name == "*" || pattern.matches(name)),
        })
    };
    // The callbacks of pending messages have a hook of their own.
    let is_pending =
        |pattern: &Pattern| pattern.matches("pending_message.deleted") || pattern.matches("pending_message.passed_on");
    let routes =
        config.worker.routes.iter().filter(|route| route.apps.is_empty() || route.apps.iter().any(|one| one == app));
    routes
        .flat_map(|route| {
            let unsent = route.events.iter().filter(|pattern| !is_sent(pattern) && !is_pending(pattern));
            unsent.map(|pattern| {
                Drift::Doubtful(format!(
                    "the route {} waits for {:?}, which no hook sends here: `streamgate connect` with --event-types (or \
                     --custom-events, for types of the app's own) has Stream send it",
                    route.name,
                    pattern.as_str()
                ))
            })
        })
        .collect()
}

fn synchronous(settings: &Settings, config: &Config) -> Vec<Drift> {
    let url = &settings.before_message_send_url;
    let fields = [
        ("before_message_send_hook_url", url, is_any_before_message_send(url), answers_moderation(config)),
        (
            "custom_action_handler_url",
            &settings.custom_action_handler_url,
            is_any_custom_commands(&settings.custom_action_handler_url),
            answers_commands(config),
        ),
    ];
    let mut found = Vec::new();
    for (field, url, leads_here, is_answered) in fields {
        let what = match (leads_here, is_answered) {
            (true, false) => format!(
                "{field} leads here, and the configuration answers no such hooks: each waits for its policy (--no-hooks takes it out)"
            ),
            (false, true) if url.is_empty() => {
                format!("{field} is not set, and the configuration answers such hooks: `streamgate connect` sets it")
            }
            (false, true) => {
                format!("{field} is {}, and the configuration answers such hooks", without_credentials(url))
            }
            (true, true) | (false, false) => continue,
        };
        found.push(Drift::Doubtful(what));
    }
    let waits = match settings.before_message_send_timeout {
        0 => STREAM_MODERATION,
        timeout => Duration::from_millis(timeout),
    };
    let deadline = moderation_deadline(config);
    if is_any_before_message_send(url) && waits <= deadline {
        found.push(Drift::Doubtful(format!(
            "Stream waits {waits:?} for before-message-send, and this gateway may take {deadline:?}: `streamgate connect` makes it longer, to 5 s at the most"
        )));
    }
    found
}
