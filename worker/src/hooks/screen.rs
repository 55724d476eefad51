//! Rules of the configuration before whoever else answers before-message-send.

use super::{Hook, HookHandler};
use crate::handler::{BoxFuture, HandlerError};
use bytes::Bytes;
use std::sync::Arc;
use streamgate_core::hook::{OnFailure, fallback, rejection, unchanged};
use streamgate_core::rules::{Judgement, Rules};

/// Judges what a message says; what passes goes on.
pub struct Screen {
    pub rules: Rules,
    pub on_unreadable: OnFailure,
    /// What its sender reads where an unreadable message is rejected.
    pub failure_text: String,
    /// None: what passes is let through.
    pub then: Option<Arc<dyn HookHandler>>,
}

impl std::fmt::Debug for Screen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Screen").field("rules", &self.rules.rules.len()).finish_non_exhaustive()
    }
}

impl HookHandler for Screen {
    fn answer(&self, hook: Hook) -> BoxFuture<Result<Bytes, HandlerError>> {
        let body = &hook.envelope().body;
        let answer = match (self.rules.judge(body), &self.then) {
            (Judgement::Reject(text), _) => rejection(&text),
            (Judgement::Mask(message), _) => format!("{{\"message\":{message}}}").into_bytes(),
            (Judgement::Unreadable, _) if self.on_unreadable == OnFailure::Reject => {
                fallback(OnFailure::Reject, &self.failure_text, body)
            }
            (Judgement::Pass | Judgement::Unreadable, Some(then)) => return then.answer(hook),
            (Judgement::Pass | Judgement::Unreadable, None) => unchanged(body),
        };
        Box::pin(std::future::ready(Ok(answer.into())))
    }
}
