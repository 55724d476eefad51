//! Answers to commands from the configuration, without code.

use super::{Answer, Command, Hook, HookHandler};
use crate::handler::{BoxFuture, HandlerError};
use bytes::Bytes;
use streamgate_core::template::{Slot, Template};
use streamgate_service::config::ReplyType;

/// Fills a template.
#[derive(Clone, Debug)]
pub struct Reply {
    pub text: Template,
    pub reply_type: ReplyType,
}

impl HookHandler for Reply {
    fn answer(&self, hook: Hook) -> BoxFuture<Result<Bytes, HandlerError>> {
        let command = match Command::try_from(hook) {
            Ok(command) => command,
            Err(error) => return Box::pin(std::future::ready(Err(error))),
        };
        let text = self.text.fill(|slot| match slot {
            Slot::Command => command.name().to_owned(),
            Slot::Args => command.args(),
            Slot::User => command.user_name().unwrap_or_default(),
        });
        let answer: Answer = match self.reply_type {
            ReplyType::Ephemeral => command.ephemeral(text),
            ReplyType::Regular => command.regular(text),
            ReplyType::Error => command.error(text),
        };
        Box::pin(std::future::ready(Ok(answer.into_bytes())))
    }
}
