//! `[hooks]`: webhooks that wait for an answer. The gateway uses the deadlines and policies, the worker the handlers.

use super::{
    environment::Environment,
    handler::{HandlerConfig, Owner},
    reader::{Report, Section},
};
use regex::Regex;
use std::collections::BTreeMap;
use std::time::Duration;
use streamgate_core::{
    hook::{OnFailure, is_command_name},
    rules::{Action, Part, Rule, Rules},
};

/// The longest that Stream can be made to wait for before-message-send.
pub const STREAM_LONGEST: Duration = Duration::from_secs(5);
const NOT_A_COMMAND: &str = "is not the name of a command: 1 to 64 characters of A-Z, a-z, 0-9, _ and -";
/// Answers are kept in memory or on disk until the window ends.
const LONGEST_REPLAY_WINDOW: Duration = Duration::from_secs(24 * 60 * 60);
/// How long Stream waits for before-message-send by default.
pub const STREAM_MODERATION: Duration = Duration::from_millis(1500);
/// How long Stream waits for a command; no setting changes that.
const STREAM_COMMAND: Duration = Duration::from_secs(1);

/// `[hooks]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HooksConfig {
    /// Most hooks that a worker answers at a time, in addition to its events. Default 64.
    pub concurrency: usize,
    pub before_message_send: ModerationConfig,
    pub custom_commands: CommandsConfig,
}

/// Settings of every kind of hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookPolicy {
    /// From headers read to answer written; `gateway.answer_deadline` applies if it is shorter.
    pub deadline: Duration,
    /// The answer to Stream if there is none in time. Default `allow`.
    pub on_failure: OnFailure,
    /// The text that the sender sees if that is `reject`.
    pub failure_text: String,
    /// How long the same signed body gets the first answer again, under any id; at most 24 h. Default `off`: equal
    /// messages are legitimate.
    pub replay_window: Option<Duration>,
}

/// `[hooks.before_message_send]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModerationConfig {
    /// Default deadline 1.2 s: Stream waits 1.5 s by default.
    pub policy: HookPolicy,
    /// The handler that is asked about messages that no rule rejects.
    pub handler: Option<HandlerConfig>,
    /// `max_length`, `max_links`, `rules` and `fields`.
    pub rules: Rules,
    /// What to do with a message that rules cannot read: not JSON, over 4,096 fields or 256 KiB. Default `reject`.
    pub on_unreadable: OnFailure,
}

/// `[hooks.custom_commands]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandsConfig {
    /// Default deadline 800 ms: Stream waits 1 s.
    pub policy: HookPolicy,
    /// Handler for every command without an entry of its own. `{type}` in its URL is the command's name.
    pub handler: Option<HandlerConfig>,
    pub commands: BTreeMap<String, HandlerConfig>,
    /// Further commands that the URL may name if the signed message names none, as with a click on standalone MML
    /// (`mml`). Commands with an entry of their own may always be named.
    pub by_url: Vec<String>,
}

impl HooksConfig {
    pub(super) fn read(mut section: Section<'_>, environment: &Environment) -> HooksConfig {
        let moderation = section.section_or_empty("before_message_send");
        let commands = section.section_or_empty("custom_commands");
        let config = HooksConfig {
            concurrency: section.count("concurrency", 64, 2000),
            before_message_send: ModerationConfig::read(moderation, environment),
            custom_commands: CommandsConfig::read(commands, environment),
        };
        section.finish();
        config
    }

    /// Every handler, with the path of its table and the policy that stands in for it.
    pub fn handlers(&self) -> impl Iterator<Item = (String, &HandlerConfig, &HookPolicy)> {
        let (moderation, commands) = (&self.before_message_send, &self.custom_commands);
        let moderating = moderation.handler.iter();
        let moderating =
            moderating.map(|handler| ("hooks.before_message_send".to_owned(), handler, &moderation.policy));
        let any = commands.handler.iter();
        let any = any.map(|handler| ("hooks.custom_commands".to_owned(), handler, &commands.policy));
        let named = commands.commands.iter();
        let named =
            named.map(|(name, handler)| (format!("hooks.custom_commands.commands.{name}"), handler, &commands.policy));
        moderating.chain(any).chain(named)
    }
}

impl HookPolicy {
    fn read(section: &mut Section<'_>, deadline: Duration, failure_text: &str) -> HookPolicy {
        let on_failure = section.parsed("on_failure", on_failure);
        let policy = HookPolicy {
            deadline: section.duration("deadline", deadline),
            on_failure: on_failure.unwrap_or(OnFailure::Allow),
            failure_text: section
                .prose("failure_text", |text| Ok(text.to_owned()))
                .unwrap_or_else(|| failure_text.to_owned()),
            replay_window: section.duration_or_off("replay_window"),
        };
        if policy.replay_window.is_some_and(|window| window > LONGEST_REPLAY_WINDOW) {
            section.problem("replay_window", "must be at most 24h: first answers are kept no longer");
        }
        if policy.deadline > STREAM_LONGEST {
            section.problem("deadline", "must be at most 5s: Stream never waits longer");
        }
        policy
    }
}

fn on_failure(text: &str) -> Result<OnFailure, String> {
    match text {
        "allow" => Ok(OnFailure::Allow),
        "reject" => Ok(OnFailure::Reject),
        other => Err(format!("{other:?} is neither \"allow\" nor \"reject\"")),
    }
}

impl ModerationConfig {
    fn read(mut section: Section<'_>, environment: &Environment) -> ModerationConfig {
        let text = "Your message could not be checked. Please try again.";
        let policy = HookPolicy::read(&mut section, Duration::from_millis(1200), text);
        let handler = HandlerConfig::read(&mut section, Owner::Moderation, environment);
        let sections = section.sections("rules");
        let has_rules = !sections.is_empty();
        let most = |text: &str| text.parse().map_err(|_| format!("invalid number {text:?}: expected a whole number"));
        let rules = Rules {
            max_length: section.parsed("max_length", most),
            max_links: section.parsed("max_links", most),
            rules: sections.into_iter().filter_map(read_rule).collect(),
            parts: read_parts(&mut section),
        };
        let on_unreadable = section.parsed("on_unreadable", on_failure).unwrap_or(OnFailure::Reject);
        if rules.rules.is_empty() && !has_rules && section.was_given("fields") {
            section.problem("fields", "needs rules: max_length applies to the text, max_links to the whole message");
        }
        if handler.is_some() && rules.masks() {
            let what = "that mask cannot be combined with forward: the service gets the message as Stream signed it";
            section.problem("rules", what);
        }
        section.finish();
        ModerationConfig { policy, handler, rules, on_unreadable }
    }
}

/// The fields that rules check. Default: all.
fn read_parts(section: &mut Section<'_>) -> Vec<Part> {
    let Some(names) = section.texts("fields") else { return Part::ALL.to_vec() };
    let known = |name: &String| Part::ALL.into_iter().find(|part| part.as_str() == name).ok_or_else(|| name.clone());
    match names.iter().map(known).collect::<Result<Vec<_>, _>>() {
        Ok(parts) if parts.is_empty() => {
            section.problem("fields", "is empty, so rules would check nothing: leave the key out to check every field");
            parts
        }
        Ok(parts) => parts,
        Err(name) => {
            let all = Part::ALL.map(Part::as_str).join(", ");
            section.problem("fields", format!("unknown field {name:?}: expected any of {all}"));
            Part::ALL.to_vec()
        }
    }
}

fn read_rule(mut section: Section<'_>) -> Option<Rule> {
    let pattern = section.prose("pattern", |text| Regex::new(text).map_err(|error| regex_problem(&error)));
    if pattern.is_none() && !section.was_given("pattern") {
        section.problem("pattern", "is missing: write a regular expression, like \"(?i)\\\\bword\\\\b\"");
    }
    let action = section.parsed("action", |text| match text {
        "reject" => Ok(Action::Reject),
        "mask" => Ok(Action::Mask),
        other => Err(format!("{other:?} is neither \"reject\" nor \"mask\"")),
    });
    if action.is_none() && !section.was_given("action") {
        section.problem("action", "is missing: \"reject\" or \"mask\"");
    }
    let text = section.prose("text", |text| Ok(text.to_owned()));
    let text = action.map(|action| {
        text.unwrap_or_else(|| match action {
            Action::Reject => "This message is not allowed here.".to_owned(),
            Action::Mask => "***".to_owned(),
        })
    });
    // A character that no pattern is about: a pattern with an empty match in it matches every message.
    let is_empty = |pattern: &Regex| pattern.find("\u{e000}").is_some_and(|found| found.is_empty());
    if action == Some(Action::Reject) && pattern.as_ref().is_some_and(is_empty) {
        section.problem(
            "pattern",
            "matches every message, because it matches the empty text: is there a | or a * too many?",
        );
    }
    let is_masked = |text: &String| {
        pattern.as_ref().is_some_and(|pattern| pattern.find(text).is_some_and(|found| !found.is_empty()))
    };
    if action == Some(Action::Mask) && text.as_ref().is_some_and(is_masked) {
        section.problem("text", "is matched by its own pattern: what is masked would still be there");
    }
    section.finish();
    Some(Rule { pattern: pattern?, action: action?, text: text? })
}

/// The error in one line: the library draws the pattern over several.
fn regex_problem(error: &regex::Error) -> String {
    let text = error.to_string();
    let last = text.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
    format!("invalid regular expression (syntax of the Rust crate regex): {last}")
}

impl CommandsConfig {
    fn read(mut section: Section<'_>, environment: &Environment) -> CommandsConfig {
        let text = "This command could not be run. Please try again.";
        let policy = HookPolicy::read(&mut section, Duration::from_millis(800), text);
        let handler = HandlerConfig::read(&mut section, Owner::AnyCommand, environment);
        let commands = section.named_sections("commands").into_iter();
        let commands = commands.filter_map(|(name, mut command)| {
            let handler = HandlerConfig::read(&mut command, Owner::Command, environment);
            command.finish();
            Some((name, handler?))
        });
        let commands = commands.collect();
        let by_url = section.texts("by_url").unwrap_or_default();
        if let Some(name) = by_url.iter().find(|name| !is_command_name(name)) {
            section.problem("by_url", format!("{name:?} {NOT_A_COMMAND}"));
        }
        let config = CommandsConfig { policy, handler, commands, by_url };
        section.finish();
        config
    }
}

/// Checks that involve several keys.
pub(super) fn cross_check(hooks: &HooksConfig, report: &Report) {
    let (moderation, commands) = (&hooks.before_message_send, &hooks.custom_commands);
    if moderation.policy.deadline > STREAM_MODERATION {
        let what = "is over the 1.5s that Stream waits, unless its before_message_send_hook_timeout was raised: it would go on without the answer";
        report.doubt("hooks.before_message_send.deadline", what);
    }
    if commands.policy.deadline > STREAM_COMMAND {
        report.doubt("hooks.custom_commands.deadline", "is over the 1s that Stream waits for a command");
    }
    for (path, handler, policy) in hooks.handlers() {
        handler.doubt_timeout(&path, policy.deadline, "the deadline of the hook", report);
    }
    for name in hooks.custom_commands.commands.keys().filter(|name| !is_command_name(name)) {
        let what = match name.strip_prefix('/') {
            Some(_) => "is written without the slash",
            None => NOT_A_COMMAND,
        };
        report.problem(format!("hooks.custom_commands.commands.{name}"), what);
    }
}
