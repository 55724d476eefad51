//! Rules of the configuration before whoever else answers before-message-send.

use super::{BeforeMessageSend, Hook, HookHandler};
use crate::handler::{BoxFuture, HandlerError};
use bytes::Bytes;
use std::sync::Arc;
use streamgate_core::rules::{Judgement, Rules};

/// Judges a message's text; what passes goes on.
pub struct Screen {
    rules: Rules,
    /// None: what passes is let through.
    then: Option<Arc<dyn HookHandler>>,
}

impl std::fmt::Debug for Screen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Screen").field("rules", &self.rules.rules.len()).finish_non_exhaustive()
    }
}

impl Screen {
    pub fn new(rules: Rules, then: Option<Arc<dyn HookHandler>>) -> Screen {
        Screen { rules, then }
    }
}

impl HookHandler for Screen {
    fn answer(&self, hook: Hook) -> BoxFuture<Result<Bytes, HandlerError>> {
        let message = match BeforeMessageSend::try_from(hook.clone()) {
            Ok(message) => message,
            Err(error) => return Box::pin(std::future::ready(Err(error))),
        };
        let answer = match (self.rules.judge(&message.text()), &self.then) {
            (Judgement::Reject(text), _) => message.reject(text),
            (Judgement::Mask(text), _) => message.rewrite().text(text),
            (Judgement::Pass, Some(then)) => return then.answer(hook),
            (Judgement::Pass, None) => message.pass(),
        };
        Box::pin(std::future::ready(Ok(answer.into_bytes())))
    }
}
