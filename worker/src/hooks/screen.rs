//! Rules of the configuration, applied before any other handler of before-message-send.

use super::{Hook, HookHandler};
use crate::handler::{BoxFuture, HandlerError};
use bytes::Bytes;
use std::sync::Arc;
use streamgate_core::hook::{OnFailure, rejection, unchanged};
use streamgate_core::rules::{Judgement, Rules};

/// A body of this size takes long enough to judge that a blocking thread does it.
const LONG: usize = 16 << 10;

/// Judges what a message says, and hands on what passes. `on_unreadable` decides about a message that the rules or the next
/// handler cannot read.
#[derive(Clone)]
pub struct Screen {
    pub rules: Arc<Rules>,
    pub on_unreadable: OnFailure,
    /// The text that the sender sees if an unreadable message is rejected.
    pub failure_text: Arc<str>,
    /// `None`: a message that passes the rules is let through.
    pub then: Option<Arc<dyn HookHandler>>,
}

impl std::fmt::Debug for Screen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Screen").field("rules", &self.rules.rules.len()).finish_non_exhaustive()
    }
}

impl HookHandler for Screen {
    fn answer(&self, hook: Hook) -> BoxFuture<Result<Bytes, HandlerError>> {
        let screen = self.clone();
        Box::pin(async move {
            let body = hook.envelope().body.clone();
            match (screen.judge(&body).await?, &screen.then) {
                (Judgement::Reject(text), _) => Ok(rejection(&text).into()),
                (Judgement::Mask(message), _) => Ok(format!("{{\"message\":{message}}}").into()),
                (Judgement::Unreadable, _) if screen.on_unreadable == OnFailure::Reject => Ok(screen.rejection()),
                (Judgement::Pass | Judgement::Unreadable, Some(then)) => match then.answer(hook).await {
                    Err(error) if error.is_unreadable() => match screen.on_unreadable {
                        OnFailure::Reject => Ok(screen.rejection()),
                        OnFailure::Allow => Ok(unchanged(&body).into()),
                    },
                    answer => answer,
                },
                (Judgement::Pass | Judgement::Unreadable, None) => Ok(unchanged(&body).into()),
            }
        })
    }
}

impl Screen {
    async fn judge(&self, body: &Bytes) -> Result<Judgement, HandlerError> {
        if self.rules.is_empty() {
            return Ok(Judgement::Pass);
        }
        if body.len() < LONG {
            return Ok(self.rules.judge(body));
        }
        let (rules, body) = (Arc::clone(&self.rules), body.clone());
        let judged = tokio::task::spawn_blocking(move || rules.judge(&body)).await;
        judged.map_err(|_| HandlerError::retry("the rules could not be tried"))
    }

    fn rejection(&self) -> Bytes {
        rejection(&self.failure_text).into()
    }
}
