//! Handlers: of a route's events, of before-message-send, of a command. The same tables configure all of them.

use super::{
    ExecConfig, ForwardConfig,
    environment::Environment,
    reader::{Report, Section},
};
use std::time::Duration;
use streamgate_core::template::Template;

/// Placeholder for the command's name in the URL of a service.
pub const COMMAND_PLACE: &str = "{type}";

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandlerConfig {
    /// A service that is sent the webhook.
    Forward(ForwardConfig),
    /// A command that is run for each event.
    Exec(ExecConfig),
    /// A text that answers a command.
    Reply(ReplyConfig),
}

/// `reply` and `reply_type`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplyConfig {
    pub text: Template,
    /// Default `ephemeral`.
    pub reply_type: ReplyType,
}

/// Who sees a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyType {
    /// Its sender only.
    Ephemeral,
    /// Everybody in the channel.
    Regular,
    /// Its sender only, as an error.
    Error,
}

/// Whose handler a table may have, and thus which kinds it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// One of `forward` and `exec`, and it must have one.
    Route,
    /// `forward`, if any.
    Moderation,
    /// `forward`, if any, for every command without a table of its own.
    AnyCommand,
    /// One of `forward` and `reply`, and it must have one.
    Command,
}

impl Owner {
    /// Placeholders that the URL of a service may contain.
    fn places(self) -> &'static [&'static str] {
        match self {
            Owner::Route | Owner::Moderation => &[],
            Owner::AnyCommand | Owner::Command => &[COMMAND_PLACE],
        }
    }
}

impl HandlerConfig {
    /// The handler in a table, or none where there is none or it is wrong (then reported).
    pub(super) fn read(section: &mut Section<'_>, owner: Owner, environment: &Environment) -> Option<HandlerConfig> {
        let mut found = Vec::new();
        if let Some(table) = section.section("forward") {
            found.push(ForwardConfig::read(table, environment, owner.places()).map(HandlerConfig::Forward));
        }
        if owner == Owner::Route
            && let Some(table) = section.section("exec")
        {
            found.push(ExecConfig::read(table).map(HandlerConfig::Exec));
        }
        if owner == Owner::Command
            && let Some(reply) = ReplyConfig::read(section)
        {
            found.push(reply.map(HandlerConfig::Reply));
        }
        match (owner, found.len()) {
            (Owner::Route, 0) => section.problem(
                "forward",
                "is missing: say where to, forward = { url = \"http://127.0.0.1:3000/webhooks/stream\" }, or what to run, exec = { \
                 command = [\"./handle\"] }",
            ),
            (Owner::Route, 2..) => {
                let what = "cannot be combined with forward: a route has one handler, so remove one of them";
                section.problem("exec", what);
            }
            (Owner::Command, 0 | 2..) => {
                section.problem("forward", "a command needs either forward or reply, and takes only one of them");
            }
            (Owner::Moderation | Owner::AnyCommand, 0 | 1) | (Owner::Route | Owner::Command, 1) => {}
            (Owner::Moderation | Owner::AnyCommand, 2..) => {
                section.problem("forward", "cannot be combined with another handler: remove one of them");
            }
        }
        found.into_iter().next()?
    }

    /// The key of its own timeout and its value, where the configuration gives one.
    fn timeout_given(&self) -> Option<(&'static str, Duration)> {
        match self {
            HandlerConfig::Forward(forward) => forward.timeout_is_given.then_some(("forward.timeout", forward.timeout)),
            HandlerConfig::Exec(exec) => exec.timeout_is_given.then_some(("exec.timeout", exec.timeout)),
            HandlerConfig::Reply(_) => None,
        }
    }

    /// Warns about a timeout of the handler's own that cannot be reached. `path` is that of its table, and `cut_by` what ends it earlier.
    pub(super) fn doubt_timeout(&self, path: &str, limit: Duration, cut_by: &str, report: &Report) {
        if let Some((key, _)) = self.timeout_given().filter(|(_, timeout)| *timeout > limit) {
            report.doubt(format!("{path}.{key}"), format!("is over {cut_by}, which cuts it short"));
        }
    }
}

impl ReplyConfig {
    /// `None` where there is none, `Some(None)` where it is wrong (then reported).
    fn read(section: &mut Section<'_>) -> Option<Option<ReplyConfig>> {
        let text = section.prose("reply", |text| match text.trim() {
            "" => Err("is empty: a command is answered with a text".to_owned()),
            _ => Template::parse(text).map_err(|error| error.to_string()),
        });
        let reply_type = section.parsed("reply_type", |text| match text {
            "ephemeral" => Ok(ReplyType::Ephemeral),
            "regular" => Ok(ReplyType::Regular),
            "error" => Ok(ReplyType::Error),
            other => Err(format!("{other:?} is neither \"ephemeral\" nor \"regular\" nor \"error\"")),
        });
        if section.was_given("reply_type") && !section.was_given("reply") {
            section.problem("reply_type", "needs reply");
        }
        let reply = text.map(|text| ReplyConfig { text, reply_type: reply_type.unwrap_or(ReplyType::Ephemeral) });
        section.was_given("reply").then_some(reply)
    }
}
