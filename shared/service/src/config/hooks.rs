//! `[hooks]`: the webhooks that want an answer. The gateway reads the deadlines and what to do without an answer, the worker
//! what answers.

use super::{
    load::Environment,
    reader::{Report, Section},
    worker::ForwardConfig,
};
use regex::Regex;
use std::collections::BTreeMap;
use std::time::Duration;
use streamgate_core::{
    hook::OnFailure,
    rules::{Action, Rule, Rules},
    template::Template,
};

/// The longest that Stream can be told to wait for before-message-send.
const STREAM_LONGEST: Duration = Duration::from_secs(5);
/// The command's name in the URL of a service.
pub const COMMAND_PLACE: &str = "{type}";

/// `[hooks]`
#[derive(Clone, Debug)]
pub struct HooksConfig {
    /// Most hooks that a worker answers at a time, beside its events. Default 64.
    pub concurrency: usize,
    pub before_message_send: ModerationConfig,
    pub custom_commands: CommandsConfig,
}

/// What every kind of hook has.
#[derive(Clone, Debug)]
pub struct HookPolicy {
    /// From headers read to answer written; `gateway.answer_deadline` holds over it.
    pub deadline: Duration,
    /// What Stream is answered without an answer in time. Default `allow`.
    pub on_failure: OnFailure,
    /// What the sender reads where that is `reject`.
    pub failure_text: String,
}

/// `[hooks.before_message_send]`
#[derive(Clone, Debug)]
pub struct ModerationConfig {
    /// Default deadline 1.2 s: Stream waits 1.5 s where its setting was not changed.
    pub policy: HookPolicy,
    /// Where messages that no rule rejects are asked about.
    pub forward: Option<ForwardConfig>,
    /// `max_length`, `max_links` and `rules`.
    pub rules: Rules,
}

/// `[hooks.custom_commands]`
#[derive(Clone, Debug)]
pub struct CommandsConfig {
    /// Default deadline 800 ms: Stream waits 1 s.
    pub policy: HookPolicy,
    /// For every command without an entry of its own. `{type}` in its URL is the command's name.
    pub forward: Option<ForwardConfig>,
    pub commands: BTreeMap<String, CommandConfig>,
}

/// `[hooks.custom_commands.commands.NAME]`
#[derive(Clone, Debug)]
pub enum CommandConfig {
    Forward(ForwardConfig),
    /// An answer made here.
    Reply {
        text: Template,
        reply_type: ReplyType,
    },
}

/// Who reads a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyType {
    /// Its sender only.
    Ephemeral,
    /// Everybody in the channel.
    Regular,
    /// Its sender only, as an error.
    Error,
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
}

impl HookPolicy {
    fn read(section: &mut Section<'_>, deadline: Duration, failure_text: &str) -> HookPolicy {
        let on_failure = section.parsed("on_failure", |text| match text {
            "allow" => Ok(OnFailure::Allow),
            "reject" => Ok(OnFailure::Reject),
            other => Err(format!("{other:?} is neither \"allow\" nor \"reject\"")),
        });
        let policy = HookPolicy {
            deadline: section.duration("deadline", deadline),
            on_failure: on_failure.unwrap_or(OnFailure::Allow),
            failure_text: section.text("failure_text").unwrap_or_else(|| failure_text.to_owned()),
        };
        if policy.deadline > STREAM_LONGEST {
            section.problem("deadline", "must be at most 5s: Stream never waits longer");
        }
        policy
    }
}

impl ModerationConfig {
    fn read(mut section: Section<'_>, environment: &Environment) -> ModerationConfig {
        let text = "Your message could not be checked. Please try again.";
        let policy = HookPolicy::read(&mut section, Duration::from_millis(1200), text);
        let forward = section.section("forward").and_then(|forward| ForwardConfig::read(forward, environment));
        let most = |text: &str| text.parse().map_err(|_| format!("{text:?} is no whole number"));
        let rules = Rules {
            max_length: section.parsed("max_length", most),
            max_links: section.parsed("max_links", most),
            rules: section.sections("rules").into_iter().filter_map(read_rule).collect(),
        };
        if forward.is_some() && rules.masks() {
            let what = "that mask and forward do not go together: the service is sent the message as Stream signed it";
            section.problem("rules", what);
        }
        section.finish();
        ModerationConfig { policy, forward, rules }
    }
}

fn read_rule(mut section: Section<'_>) -> Option<Rule> {
    let pattern = section.parsed("pattern", |text| Regex::new(text).map_err(|error| told(&error)));
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
    let text = section.text("text");
    section.finish();
    let action = action?;
    let default = match action {
        Action::Reject => "This message is not allowed here.",
        Action::Mask => "***",
    };
    Some(Rule { pattern: pattern?, action, text: text.unwrap_or_else(|| default.to_owned()) })
}

/// In one line: the library draws the pattern over several.
fn told(error: &regex::Error) -> String {
    let text = error.to_string();
    let last = text.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
    format!("is no regular expression of the crate regex: {last}")
}

impl CommandsConfig {
    fn read(mut section: Section<'_>, environment: &Environment) -> CommandsConfig {
        let text = "This command could not be run. Please try again.";
        let policy = HookPolicy::read(&mut section, Duration::from_millis(800), text);
        let forward = section.section("forward").and_then(|forward| ForwardConfig::read(forward, environment));
        let commands = section.named_sections("commands").into_iter();
        let commands = commands.filter_map(|(name, command)| Some((name, CommandConfig::read(command, environment)?)));
        let config = CommandsConfig { policy, forward, commands: commands.collect() };
        section.finish();
        config
    }
}

impl CommandConfig {
    fn read(mut section: Section<'_>, environment: &Environment) -> Option<CommandConfig> {
        let forward = section.section("forward");
        let text = section.parsed("reply", |text| Template::parse(text).map_err(|error| error.to_string()));
        let reply_type = section.parsed("reply_type", |text| match text {
            "ephemeral" => Ok(ReplyType::Ephemeral),
            "regular" => Ok(ReplyType::Regular),
            "error" => Ok(ReplyType::Error),
            other => Err(format!("{other:?} is neither \"ephemeral\" nor \"regular\" nor \"error\"")),
        });
        if section.was_given("forward") == section.was_given("reply") {
            section.problem("forward", "or reply: a command takes one of them");
        }
        if section.was_given("reply_type") && !section.was_given("reply") {
            section.problem("reply_type", "goes with reply");
        }
        section.finish();
        match (forward, text) {
            (Some(forward), _) => ForwardConfig::read(forward, environment).map(CommandConfig::Forward),
            (None, text) => {
                Some(CommandConfig::Reply { text: text?, reply_type: reply_type.unwrap_or(ReplyType::Ephemeral) })
            }
        }
    }
}

/// What no single key can tell.
pub(super) fn cross_check(hooks: &HooksConfig, report: &Report) {
    let moderation = hooks.before_message_send.forward.as_ref();
    if moderation.is_some_and(|forward| forward.url.to_string().contains(COMMAND_PLACE)) {
        report.problem("hooks.before_message_send.forward.url", "has {type}, which only a custom command has");
    }
    for name in hooks.custom_commands.commands.keys().filter(|name| name.starts_with('/')) {
        report.problem(format!("hooks.custom_commands.commands.{name}"), "is written without the slash");
    }
}
