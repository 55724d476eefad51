//! Whether a Stream app's settings still fit the configuration: mismatches that go unnoticed until an event is missed.

use super::address::{BaseUrl, gateway_at};
use super::hook::{EventHook, without_credentials};
use super::settings::{Settings, Webhooks, listed};
use super::{answers_commands, answers_moderation, moderation_deadline, sign_in};
use crate::exit::BadUsage;
use std::time::Duration;
use streamgate_core::event_types::{OTHER_PRODUCTS, in_hooks};
use streamgate_core::path::{BEFORE_MESSAGE_SEND, CUSTOM_COMMANDS, PUSH};
use streamgate_core::pattern::Pattern;
use streamgate_service::config::{AppConfig, Config, STREAM_MODERATION};

/// A mismatch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Drift {
    /// Nothing arrives.
    Broken(String),
    /// Some of it may be unintended.
    Doubtful(String),
}

/// The findings about one app.
#[derive(Clone, Debug)]
pub(crate) struct Findings {
    /// The app, and the URLs that lead to a gateway.
    pub(crate) summary: String,
    pub(crate) drift: Vec<Drift>,
}

/// Lists the app's settings that do not fit. `url`: the gateway's base URL; without it, any gateway is taken for this
/// one.
pub(crate) async fn look(
    app: &AppConfig,
    config: &Config,
    stream_url: &str,
    url: Option<&str>,
) -> Result<Findings, String> {
    let base = |url, option| BaseUrl::parse(url, option).map_err(|BadUsage(what)| what);
    let stream = base(stream_url, "--stream-url")?;
    let here = Here(url.map(|url| base(url, "--url")).transpose()?);
    let (_, settings) = sign_in(&stream, app).await.map_err(|error| format!("{error:#}"))?;
    let bases = here.bases(&settings);
    let summary = format!("{} delivers to {}", settings.app, joined(&bases));
    Ok(Findings { summary, drift: drift(&settings, &app.name, config, &here, &bases) })
}

/// Which gateways count as this one: the one with the base URL, or all if the URL is not known.
struct Here(Option<BaseUrl>);

impl Here {
    fn is(&self, base: Option<BaseUrl>) -> bool {
        base.is_some_and(|base| self.0.as_ref().is_none_or(|here| *here == base))
    }

    /// Temporary hooks of Stream's own CLI do not count: they disappear when it ends.
    fn gets(&self, hook: &EventHook) -> bool {
        hook.is_webhook() && self.is(gateway_at(&hook.url(), PUSH))
    }

    fn delivers(&self, hook: &EventHook) -> bool {
        self.gets(hook) && hook.is_enabled() && hook.delivers_chat()
    }

    /// The base URLs that lead to this gateway, each once.
    fn bases(&self, settings: &Settings) -> Vec<BaseUrl> {
        let push: Vec<_> = match &settings.webhooks {
            Webhooks::V1 { url, .. } => vec![gateway_at(url, PUSH)],
            Webhooks::V2(hooks) => {
                hooks.iter().filter(|hook| self.delivers(hook)).map(|hook| gateway_at(&hook.url(), PUSH)).collect()
            }
        };
        let synchronous = [
            gateway_at(&settings.before_message_send_url, BEFORE_MESSAGE_SEND),
            gateway_at(&settings.custom_action_handler_url, CUSTOM_COMMANDS),
        ];
        let all = push.into_iter().chain(synchronous).flatten();
        let mut here: Vec<_> = all.filter(|base| self.is(Some(base.clone()))).collect();
        here.sort_by(|one, other| one.as_str().cmp(other.as_str()));
        here.dedup();
        here
    }
}

fn drift(settings: &Settings, app: &str, config: &Config, here: &Here, bases: &[BaseUrl]) -> Vec<Drift> {
    let mut found = Vec::new();
    if settings.app.is_suspended {
        found.push(Drift::Broken("Stream has suspended the app: no webhook is sent".to_owned()));
    }
    match &settings.webhooks {
        Webhooks::V1 { url, event_types } if here.is(gateway_at(url, PUSH)) => {
            found.extend(unsent(
                app,
                config,
                &[Sent { event_types: event_types.clone(), custom: true, all_products: true }],
            ));
        }
        Webhooks::V1 { url, .. } if url.is_empty() => found.push(Drift::Broken(nothing("webhook_url is not set"))),
        Webhooks::V1 { url, .. } => {
            let why = format!("webhook_url is {}", without_credentials(url));
            found.push(Drift::Broken(nothing(&why)));
        }
        Webhooks::V2(hooks) => found.extend(of_hooks(hooks, app, config, here)),
    }
    found.extend(hosts(bases));
    found.extend(synchronous(settings, config, here));
    found
}

fn nothing(why: &str) -> String {
    format!("{why}, so no event arrives here: `streamgate connect --url https://…` points the app at this gateway")
}

fn joined(bases: &[BaseUrl]) -> String {
    bases.iter().map(BaseUrl::as_str).collect::<Vec<_>>().join(" and ")
}

/// Findings about the hosts that lead here.
fn hosts(bases: &[BaseUrl]) -> Vec<Drift> {
    let mut found = Vec::new();
    if bases.len() > 1 {
        let all = joined(bases);
        found.push(Drift::Doubtful(format!(
            "the app's settings lead to several gateways: {all}; --url names this one's"
        )));
    }
    if let Some((base, tunnel)) = bases.iter().find_map(|base| Some((base, base.tunnel()?))) {
        found.push(Drift::Doubtful(format!(
            "{} is a tunnel of {tunnel}: nothing arrives once it is closed",
            base.as_str()
        )));
    }
    found
}

/// What a hook sends.
struct Sent {
    /// Empty: every event.
    event_types: Vec<String>,
    /// Whether custom events are sent too.
    custom: bool,
    /// Whether events of Stream's other products are sent too.
    all_products: bool,
}

impl Sent {
    fn is_everything(&self) -> bool {
        self.event_types.is_empty() || self.event_types.iter().any(|name| name == "*")
    }
}

fn of_hooks(hooks: &[EventHook], app: &str, config: &Config, here: &Here) -> Vec<Drift> {
    let ours: Vec<&EventHook> = hooks.iter().filter(|hook| here.delivers(hook)).collect();
    if ours.is_empty() {
        let why = match hooks.iter().find(|hook| here.gets(hook)) {
            Some(hook) if hook.is_enabled() => format!("{} is for another product than chat", hook.describe()),
            Some(hook) => format!("{} is not enabled", hook.describe()),
            None => "no hook of the app leads here".to_owned(),
        };
        return vec![Drift::Broken(nothing(&why))];
    }
    let sent = ours.iter().map(|hook| Sent {
        event_types: hook.event_types(),
        custom: hook.sends_custom_events(),
        all_products: hook.delivers_all_products(),
    });
    let sent: Vec<_> = sent.collect();
    let mut found = unsent(app, config, &sent);
    let deadline = config.gateway.answer_deadline;
    for hook in &ours {
        if let Some(timeout) = hook.timeout().map(Duration::from_millis).filter(|timeout| *timeout <= deadline) {
            found.push(Drift::Doubtful(format!(
                "{}: Stream waits {timeout:?} (its timeout_ms), and gateway.answer_deadline is {deadline:?}",
                hook.describe()
            )));
        }
    }
    let receivers = hooks.iter().filter(|hook| hook.is_enabled() && hook.is_webhook() && hook.delivers_chat());
    for other in receivers.filter(|hook| !ours.first().is_some_and(|first| std::ptr::eq(*first, *hook))) {
        if ours.iter().any(|hook| !std::ptr::eq(*hook, other) && other.overlaps(&hook.event_types())) {
            found.push(Drift::Doubtful(format!("{} gets the same events", other.describe())));
        }
    }
    found
}

/// Event types that routes match and no hook sends.
fn unsent(app: &str, config: &Config, sent: &[Sent]) -> Vec<Drift> {
    let is_sent =
        |name: &str| sent.iter().any(|hook| hook.is_everything() || hook.event_types.iter().any(|one| one == name));
    let is_custom_sent = sent.iter().any(|hook| hook.custom);
    // Callbacks of pending messages have a separate hook.
    let is_pending =
        |pattern: &Pattern| pattern.matches("pending_message.deleted") || pattern.matches("pending_message.passed_on");
    let of_app = |apps: &[String]| apps.is_empty() || apps.iter().any(|one| one == app);
    let mut found = Vec::new();
    for route in config.worker.routes.iter().filter(|route| of_app(&route.apps)) {
        for pattern in route.events.iter().filter(|pattern| !is_pending(pattern)) {
            let (there, missing): (Vec<_>, Vec<_>) =
                in_hooks().filter(|name| pattern.matches(name)).partition(|name| is_sent(name));
            // Custom types, and types of a later version of Stream.
            let is_other_products = OTHER_PRODUCTS.iter().any(|start| pattern.as_str().starts_with(start));
            let sends_others = is_custom_sent
                || sent.iter().any(|hook| hook.event_types.iter().any(|name| pattern.matches(name)))
                || is_other_products && sent.iter().any(|hook| hook.all_products && hook.is_everything());
            let missing: Vec<_> = missing.into_iter().map(str::to_owned).collect();
            let what = if there.is_empty() && !sends_others {
                "which no hook sends here".to_owned()
            } else if missing.is_empty() || pattern.is_everything() {
                // A route for every event takes whatever arrives.
                continue;
            } else {
                format!("of which no hook sends {}", listed(&missing))
            };
            found.push(Drift::Doubtful(format!(
                "the route {} waits for {:?}, {what}: `streamgate connect` with --event-types (or --custom-events, for types of the app's \
                 own) has Stream send it",
                route.name,
                pattern.as_str()
            )));
        }
    }
    found
}

fn synchronous(settings: &Settings, config: &Config, here: &Here) -> Vec<Drift> {
    let url = &settings.before_message_send_url;
    let fields = [
        (
            "before_message_send_hook_url",
            url,
            here.is(gateway_at(url, BEFORE_MESSAGE_SEND)),
            answers_moderation(config),
        ),
        (
            "custom_action_handler_url",
            &settings.custom_action_handler_url,
            here.is(gateway_at(&settings.custom_action_handler_url, CUSTOM_COMMANDS)),
            answers_commands(config),
        ),
    ];
    let mut found = Vec::new();
    for (field, url, leads_here, is_answered) in fields {
        let what = match (leads_here, is_answered) {
            (true, false) => format!(
                "{field} leads here, and the configuration answers no such hooks: each waits for its policy (--no-hooks removes it)"
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
    if here.is(gateway_at(url, BEFORE_MESSAGE_SEND)) && waits <= deadline {
        found.push(Drift::Doubtful(format!(
            "Stream waits {waits:?} for before-message-send, and this gateway may take {deadline:?}: `streamgate connect` makes it longer, to 5 s at the most"
        )));
    }
    found
}
