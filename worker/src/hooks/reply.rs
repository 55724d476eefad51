//! Commands answered by templates of the configuration, without code.

use super::{Answer, Command, Hook, HookHandler, Unreadable};
use crate::handler::{BoxFuture, HandlerError};
use bytes::Bytes;
use streamgate_core::template::{Slot, Template};
use streamgate_service::config::{ReplyConfig, ReplyType};

/// Answers with a filled template.
#[derive(Clone, Debug)]
pub struct Reply {
    text: Template,
    reply_type: ReplyType,
}

impl HookHandler for Reply {
    fn answer(&self, hook: Hook) -> BoxFuture<Result<Bytes, HandlerError>> {
        Box::pin(std::future::ready(
            self.fill(&Command::from(hook)).map(Answer::into_bytes).map_err(HandlerError::from),
        ))
    }
}

impl Reply {
    pub fn new(config: &ReplyConfig) -> Reply {
        Reply { text: config.text.clone(), reply_type: config.reply_type }
    }

    fn fill(&self, command: &Command) -> Result<Answer, Unreadable> {
        let (args, user) = (command.args()?, command.user_name()?.unwrap_or_default());
        let text = self.text.fill(|slot| match slot {
            Slot::Command => command.name().to_owned(),
            Slot::Args => args.clone(),
            Slot::User => user.clone(),
        });
        Ok(match self.reply_type {
            ReplyType::Ephemeral => command.ephemeral(text),
            ReplyType::Regular => command.regular(text),
            ReplyType::Error => command.error(text),
        })
    }
}
