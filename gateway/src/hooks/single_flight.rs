//! One answer for each call: a repeat waits for the first answer and gets it, also from another gateway.

use super::detached::Detached;
use super::{AnswerHook, Asked, Hooks};
use crate::answered::{Answered, Source};
use bytes::Bytes;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::{
    ports::{Answers, Ask, CallState},
    reason::Reason,
};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::Instant;

/// Interval between looks for an answer that another gateway waits for. Repeats rarely meet another gateway, and then wait
/// for one hook only: that does not justify a connection of its own for notifications from Redis.
const LOOK: Duration = Duration::from_millis(20);
/// Limit for looking up an earlier answer, but never more than a quarter of the time left: most hooks have none.
const LOOKING: Duration = Duration::from_millis(200);
/// How long the answer to an id is remembered. Stream asks once; repeats come from proxies on the way.
const REPEATS: Duration = Duration::from_secs(120);
/// How long remembering an answer may take.
const REMEMBER: Duration = Duration::from_secs(1);
/// How long a mark outlives its call's deadline, at least, because clocks differ.
const MARKED: Duration = Duration::from_secs(1);

/// What is known about a call before a worker is asked.
enum Known {
    Answered(Answered),
    /// No answer is known, and the call is now marked as in work: ask, and remember.
    First,
    /// The memory could not be read: ask and remember, but without a mark.
    Unmarked,
    /// Another gateway is answering it, and its answer did not come in time: neither ask nor remember.
    Elsewhere,
}

impl<C: Ask, A: Answers> Hooks<C, A> {
    /// Answers a call that has an id; every repeat gets the first answer.
    pub(super) async fn once(self: Arc<Self>, asked: Asked) -> Answered {
        let key = asked.call.key.clone();
        let (mut receiver, first) = match self.in_work().entry(key.clone()) {
            Entry::Occupied(known) => (known.get().clone(), None),
            Entry::Vacant(place) => {
                let (sender, receiver) = watch::channel(None);
                place.insert(receiver.clone());
                (receiver, Some(sender))
            }
        };
        if let Some(sender) = first {
            let window = self.policy(asked.call.kind).replay_window.unwrap_or(REPEATS);
            let place = InWork { hooks: Arc::clone(&self), key, window };
            let tasks = self.tasks.clone();
            return Detached { work: Some(Box::pin(place.first(asked, sender))), tasks }.await;
        }
        // The repeat's own deadline may come before that of the first.
        let reason = tokio::select! {
            biased;
            answer = receiver.wait_for(Option::is_some) => match answer.as_deref() {
                Ok(Some(answered)) => return Answered { source: Source::Repeat, ..answered.clone() },
                // The first one panicked.
                Ok(None) | Err(_) => Reason::HookFailed,
            },
            () = tokio::time::sleep_until(asked.deadline) => Reason::HookTimeout,
            () = asked.given_up.cancelled() => Reason::Draining,
        };
        self.by_policy(asked.call.kind, &asked.call.body, reason)
    }

    /// Looks up what is known about a call, here and at other gateways.
    async fn known(&self, key: &str, asked: &Asked) -> Known {
        let mut unknown = Known::Unmarked;
        loop {
            let left = asked.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return unknown;
            }
            let looked = tokio::time::timeout(LOOKING.min(left / 4), self.answers.begin(key, left)).await;
            let error = match looked {
                Ok(Ok(CallState::First)) => return Known::First,
                Ok(Ok(CallState::Answered(body))) => return Known::Answered(Answered { body, source: Source::Repeat }),
                Ok(Ok(CallState::InWork)) => {
                    unknown = Known::Elsewhere;
                    tokio::time::sleep(LOOK.min(left)).await;
                    continue;
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => "timed out".to_owned(),
            };
            self.metrics.hook_memory_errors.inc();
            tracing::debug!(error, "cannot look up earlier answers to a hook; going on without");
            return unknown;
        }
    }
}

/// The entry of a hook that is being answered, removed on drop.
struct InWork<C: Ask, A: Answers> {
    hooks: Arc<Hooks<C, A>>,
    key: String,
    /// How long its answer is remembered.
    window: Duration,
}

impl<C: Ask, A: Answers> InWork<C, A> {
    /// Answers, and passes the answer to repeats that came meanwhile.
    async fn first(self, asked: Asked, sender: watch::Sender<Option<Answered>>) -> Answered {
        let known = tokio::select! {
            biased;
            known = self.hooks.known(&self.key, &asked) => known,
            () = asked.given_up.cancelled() => Known::Elsewhere,
        };
        let marked_until = if matches!(known, Known::First) { asked.deadline + MARKED } else { Instant::now() };
        let (answered, is_first) = match known {
            Known::Answered(answered) => (answered, false),
            Known::First | Known::Unmarked => (self.hooks.ask(asked).await, true),
            Known::Elsewhere => {
                let reason = if asked.given_up.is_cancelled() { Reason::Draining } else { Reason::HookTimeout };
                (self.hooks.by_policy(asked.call.kind, &asked.call.body, reason), false)
            }
        };
        sender.send_replace(Some(answered.clone()));
        if is_first {
            // Concurrently with the answer; until this is done, repeats find the answer in memory.
            match Arc::clone(&self.hooks.remembering).try_acquire_owned() {
                Ok(permit) => {
                    let tasks = self.hooks.tasks.clone();
                    let is_said = answered.policy().is_none();
                    tasks.spawn(self.remember(answered.body.clone(), is_said, marked_until, permit));
                }
                Err(_) => self.hooks.metrics.hook_memory_errors.inc(),
            }
        }
        answered
    }

    async fn remember(self, answer: Bytes, is_said: bool, marked_until: Instant, permit: OwnedSemaphorePermit) {
        // A policy's answer is not repeated for longer than a proxy may repeat the call.
        let window = if is_said { self.window } else { self.window.min(REPEATS) };
        let remembering = self.hooks.answers.remember(&self.key, answer, window);
        let remembered = tokio::time::timeout(REMEMBER, remembering).await;
        let error = match remembered {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("timed out".to_owned()),
        };
        if let Some(error) = error {
            self.hooks.metrics.hook_memory_errors.inc();
            tracing::debug!(error, "cannot remember the answer to a hook; a repeat of it would be asked again");
            // Otherwise a repeat would wait for an answer that never comes, until the mark lapses. The mark is removed only
            // while it is ours: later it may be another gateway's.
            while Instant::now() < marked_until {
                let forgetting = tokio::time::timeout(REMEMBER, self.hooks.answers.forget(&self.key)).await;
                if matches!(forgetting, Ok(Ok(()))) {
                    break;
                }
                tokio::time::sleep(MARKED / 4).await;
            }
        }
        drop(permit);
    }
}

impl<C: Ask, A: Answers> Drop for InWork<C, A> {
    fn drop(&mut self) {
        self.hooks.in_work().remove(&self.key);
    }
}
