//! Synchronous hooks: a worker is asked, and Stream is answered within the deadline, by the worker or by the policy.

mod detached;
mod single_flight;

use crate::answered::{Answered, Source};
use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use streamgate_core::{
    envelope::Envelope,
    hook::{self, OnFailure},
    id::Kind,
    ports::{Answers, Ask},
    reason::Reason,
};
use streamgate_service::config::{HookPolicy, HooksConfig};
use streamgate_service::metrics::Metrics;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Most answers that are being remembered at a time: a store that hangs must not make them pile up.
const REMEMBERING: usize = 256;
/// How long a stop waits for them.
const FAREWELL: Duration = Duration::from_secs(2);

/// A hook to be answered.
#[derive(Debug)]
pub struct Asked {
    pub(crate) call: Envelope,
    /// Whether its key identifies it, so that a repeat gets the same answer.
    pub(crate) repeatable: bool,
    /// When the policy answers.
    pub(crate) deadline: Instant,
    /// Cancelled when the drain's time is over.
    pub(crate) given_up: CancellationToken,
}

type Answering = Pin<Box<dyn Future<Output = Answered> + Send>>;

/// Answers hooks.
pub trait AnswerHook: Send + Sync + 'static {
    /// The time from reading the headers to writing the answer; `None` for a push, which is not a hook.
    fn deadline(&self, kind: Kind) -> Option<Duration>;
    /// Whether a hook of this kind gets the first answer to the same signed body, whatever its id.
    fn is_by_body(&self, kind: Kind) -> bool;
    /// Whether a handler is configured for the command of this name.
    fn knows_command(&self, name: &str) -> bool;
    fn answer(self: Arc<Self>, asked: Asked) -> Answering;
    /// The policy's answer to a signed hook for which no handler is asked. `body` is empty if it is not available.
    fn by_policy(&self, kind: Kind, body: &[u8], reason: Reason) -> Answered;
    /// The answer to a hook that is refused for a passing reason. `None` if a refusal has the same effect: Stream treats it
    /// as allowed, which is the policy for an unsigned hook.
    fn refused(&self, kind: Kind, reason: Reason, is_signed: bool) -> Option<Answered>;
}

impl std::fmt::Debug for dyn AnswerHook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hooks(…)")
    }
}

/// Answers hooks with any stores.
#[derive(Debug)]
pub struct Hooks<C, A> {
    calls: Arc<C>,
    answers: Arc<A>,
    before_message_send: HookPolicy,
    custom_commands: HookPolicy,
    /// Names of commands that have a handler of their own.
    commands: HashSet<String>,
    metrics: Arc<Metrics>,
    /// Hooks that are being answered here, by key, until their answer is remembered.
    in_work: Mutex<HashMap<String, watch::Receiver<Option<Answered>>>>,
    remembering: Arc<Semaphore>,
    /// Tasks that outlive their connections.
    tasks: TaskTracker,
}

impl<C: Ask, A: Answers> Hooks<C, A> {
    /// `commands` are the names of commands with a handler of their own; a URL may name only these.
    pub fn new(
        config: &HooksConfig,
        commands: HashSet<String>,
        calls: Arc<C>,
        answers: Arc<A>,
        metrics: Arc<Metrics>,
    ) -> Arc<Hooks<C, A>> {
        Arc::new(Hooks {
            commands,
            calls,
            answers,
            before_message_send: config.before_message_send.policy.clone(),
            custom_commands: config.custom_commands.policy.clone(),
            metrics,
            in_work: Mutex::default(),
            remembering: Arc::new(Semaphore::new(REMEMBERING)),
            tasks: TaskTracker::new(),
        })
    }

    /// Waits until the last answers are remembered, before their store is closed.
    pub async fn close(&self) {
        self.tasks.close();
        drop(tokio::time::timeout(FAREWELL, self.tasks.wait()).await);
    }

    fn policy(&self, kind: Kind) -> &HookPolicy {
        match kind {
            Kind::CustomCommand => &self.custom_commands,
            Kind::BeforeMessageSend | Kind::Push => &self.before_message_send,
        }
    }

    fn in_work(&self) -> MutexGuard<'_, HashMap<String, watch::Receiver<Option<Answered>>>> {
        self.in_work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks a worker; the policy answers if there is no answer.
    async fn ask(&self, asked: Asked) -> Answered {
        let Asked { call, deadline, given_up, .. } = asked;
        let (kind, body) = (call.kind, call.body.clone());
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return self.by_policy(kind, &body, Reason::HookTimeout);
        }
        let answer = tokio::select! {
            biased;
            // First, so that no worker is asked when nobody waits for the answer.
            () = given_up.cancelled() => Err(Reason::Draining),
            answer = self.calls.ask(call, left) => answer,
            () = tokio::time::sleep_until(deadline) => Err(Reason::HookTimeout),
        };
        match answer {
            Ok(body) => Answered { body, source: Source::Worker },
            Err(reason) => self.by_policy(kind, &body, reason),
        }
    }
}

impl<C: Ask, A: Answers> AnswerHook for Hooks<C, A> {
    fn deadline(&self, kind: Kind) -> Option<Duration> {
        match kind {
            Kind::Push => None,
            Kind::BeforeMessageSend | Kind::CustomCommand => Some(self.policy(kind).deadline),
        }
    }

    fn is_by_body(&self, kind: Kind) -> bool {
        self.policy(kind).replay_window.is_some()
    }

    fn knows_command(&self, name: &str) -> bool {
        self.commands.contains(name)
    }

    fn by_policy(&self, kind: Kind, body: &[u8], reason: Reason) -> Answered {
        let policy = self.policy(kind);
        let body = hook::fallback(policy.on_failure, &policy.failure_text, body).into();
        Answered { body, source: Source::Policy(reason) }
    }

    fn refused(&self, kind: Kind, reason: Reason, is_signed: bool) -> Option<Answered> {
        let answers = is_signed || self.policy(kind).on_failure == OnFailure::Reject;
        answers.then(|| self.by_policy(kind, b"", reason))
    }

    fn answer(self: Arc<Self>, asked: Asked) -> Answering {
        Box::pin(async move {
            let (kind, started) = (asked.call.kind, Instant::now());
            let metrics = Arc::clone(&self.metrics);
            let answered = if asked.repeatable { self.once(asked).await } else { self.ask(asked).await };
            let labels = [kind.as_str(), answered.label()];
            metrics.hook_call.with_label_values(&labels).observe(started.elapsed().as_secs_f64());
            answered
        })
    }
}
