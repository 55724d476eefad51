//! Synchronous hooks: a worker is asked, and Stream is answered within the deadline, by the worker or by the policy. A repeat
//! gets the first answer again, and waits for it while it is being made.

use crate::answered::{Answered, Source};
use bytes::Bytes;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use streamgate_core::{
    envelope::Envelope,
    hook::{self, OnFailure},
    id::Kind,
    ports::{Answers, Ask, Turn},
    reason::Reason,
};
use streamgate_service::config::{HookPolicy, HooksConfig};
use streamgate_service::metrics::Metrics;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Between looks at an answer that another gateway is waiting for. A repeat meets another gateway seldom, and then waits for
/// one hook: not worth a connection of its own on which Redis could tell.
const LOOK: Duration = Duration::from_millis(20);
/// For looking up an earlier answer, but never more than a quarter of what is left: most hooks have none.
const LOOKING: Duration = Duration::from_millis(200);
/// How long the answer to an id is remembered. Stream asks once; who repeats is a proxy on the way.
const REPEATS: Duration = Duration::from_secs(120);
/// Answers that are being remembered at a time, and for how long each: a store that hangs must not make them pile up.
const REMEMBERING: usize = 256;
const REMEMBER: Duration = Duration::from_secs(1);
/// How long a mark outlives its call's deadline; at the least, for clocks differ.
const MARKED: Duration = Duration::from_secs(1);
/// How long a stop waits for them.
const FAREWELL: Duration = Duration::from_secs(2);
/// Kept back from each deadline for writing the answer, but never more than a tenth of it.
const WRITING: Duration = Duration::from_millis(20);

/// One hook to be answered.
#[derive(Debug)]
pub struct Asked {
    pub(crate) call: Envelope,
    /// Whether its key tells it from others: a repeat of it gets its answer.
    pub(crate) repeatable: bool,
    pub(crate) deadline: Instant,
    /// The drain's time is over.
    pub(crate) given_up: CancellationToken,
}

/// What is known of a call before it is asked.
enum Known {
    Answered(Answered),
    /// Nothing, and it is marked as in work: ask, and remember.
    First,
    /// Nothing could be learned: the same, without a mark.
    Unmarked,
    /// It is being answered, and was not told of in time: neither asked again nor remembered.
    Elsewhere,
}

type Answering = Pin<Box<dyn Future<Output = Answered> + Send>>;

/// Answers hooks.
pub trait AnswerHook: Send + Sync + 'static {
    /// From headers read to answer written, by kind; no limit of its own for pushes.
    fn deadline(&self, kind: Kind) -> Duration;
    /// Whether a hook of this kind gets the first answer to the same signed body, whatever id it comes under.
    fn is_by_body(&self, kind: Kind) -> bool;
    /// Whether somebody is configured to answer the command of this name.
    fn knows_command(&self, name: &str) -> bool;
    fn answer(self: Arc<Self>, asked: Asked) -> Answering;
    /// The answer of the policy to a signed hook that nobody is asked about. `body`: empty where it is not at hand.
    fn by_policy(&self, kind: Kind, body: &[u8], reason: Reason) -> Answered;
    /// The answer to a hook that is refused for a passing reason. None where a refusal says as much: an unsigned one that the
    /// policy allows, which Stream takes a refusal for.
    fn refused(&self, kind: Kind, reason: Reason, is_signed: bool) -> Option<Answered>;
}

impl std::fmt::Debug for dyn AnswerHook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hooks(…)")
    }
}

/// Hooks over any stores.
#[derive(Debug)]
pub struct Hooks<C, A> {
    calls: Arc<C>,
    answers: Arc<A>,
    before_message_send: HookPolicy,
    custom_commands: HookPolicy,
    /// Names of commands that have an answer of their own.
    commands: HashSet<String>,
    metrics: Arc<Metrics>,
    /// Hooks that are being answered here, by key, until their answer is remembered.
    in_work: Mutex<HashMap<String, watch::Receiver<Option<Answered>>>>,
    remembering: Arc<Semaphore>,
    /// Whatever goes on beside the connections.
    tasks: TaskTracker,
}

impl<C: Ask, A: Answers> Hooks<C, A> {
    /// `commands`: names of commands that have an answer of their own; they alone may be asked for by a URL.
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

    /// Asks, and decides where there is no answer.
    async fn ask(&self, asked: Asked) -> Answered {
        let Asked { call, deadline, given_up, .. } = asked;
        let (kind, body) = (call.kind, call.body.clone());
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return self.by_policy(kind, &body, Reason::HookTimeout);
        }
        let told = tokio::select! {
            biased;
            // First: what nobody waits for is not asked.
            () = given_up.cancelled() => Err(Reason::Draining),
            told = self.calls.ask(call, left) => told,
            () = tokio::time::sleep_until(deadline) => Err(Reason::HookTimeout),
        };
        match told {
            Ok(body) => Answered { body, source: Source::Worker },
            Err(reason) => self.by_policy(kind, &body, reason),
        }
    }

    /// The answer of a call that has an id: the first one, whoever asks for it.
    async fn once(self: Arc<Self>, asked: Asked) -> Answered {
        let key = asked.call.key.clone();
        let (mut told, first) = match self.in_work().entry(key.clone()) {
            Entry::Occupied(known) => (known.get().clone(), None),
            Entry::Vacant(place) => {
                let (tell, told) = watch::channel(None);
                place.insert(told.clone());
                (told, Some(tell))
            }
        };
        if let Some(tell) = first {
            let window = self.policy(asked.call.kind).replay_window.unwrap_or(REPEATS);
            let place = InWork { hooks: Arc::clone(&self), key, window };
            let tasks = self.tasks.clone();
            return Detached { work: Some(Box::pin(place.first(asked, tell))), tasks }.await;
        }
        // Its own deadline may come before that of the first.
        let reason = tokio::select! {
            biased;
            told = told.wait_for(Option::is_some) => match told.as_deref() {
                Ok(Some(answered)) => return Answered { source: Source::First, ..answered.clone() },
                // The first one panicked.
                Ok(None) | Err(_) => Reason::HookFailed,
            },
            () = tokio::time::sleep_until(asked.deadline) => Reason::HookTimeout,
            () = asked.given_up.cancelled() => Reason::Draining,
        };
        self.by_policy(asked.call.kind, &asked.call.body, reason)
    }

    /// What is known of a call, here and at other gateways.
    async fn known(&self, key: &str, asked: &Asked) -> Known {
        let mut unknown = Known::Unmarked;
        loop {
            let left = asked.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return unknown;
            }
            let looked = tokio::time::timeout(LOOKING.min(left / 4), self.answers.begin(key, left)).await;
            let error = match looked {
                Ok(Ok(Turn::First)) => return Known::First,
                Ok(Ok(Turn::Answered(body))) => return Known::Answered(Answered { body, source: Source::First }),
                Ok(Ok(Turn::InWork)) => {
                    unknown = Known::Elsewhere;
                    tokio::time::sleep(LOOK.min(left)).await;
                    continue;
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => "it takes too long".to_owned(),
            };
            self.metrics.hook_memory_errors.inc();
            tracing::debug!(error, "cannot look up earlier answers to a hook; going on without");
            return unknown;
        }
    }
}

impl<C: Ask, A: Answers> AnswerHook for Hooks<C, A> {
    fn deadline(&self, kind: Kind) -> Duration {
        match kind {
            Kind::Push => Duration::MAX,
            Kind::BeforeMessageSend | Kind::CustomCommand => self.policy(kind).deadline,
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

    fn answer(self: Arc<Self>, mut asked: Asked) -> Answering {
        Box::pin(async move {
            let (kind, started) = (asked.call.kind, Instant::now());
            let reserve = WRITING.min(self.policy(kind).deadline / 10);
            asked.deadline = asked.deadline.checked_sub(reserve).unwrap_or(asked.deadline);
            let metrics = Arc::clone(&self.metrics);
            let answered = if asked.repeatable { self.once(asked).await } else { self.ask(asked).await };
            let labels = [kind.as_str(), answered.word()];
            metrics.hook_call.with_label_values(&labels).observe(started.elapsed().as_secs_f64());
            answered
        })
    }
}

/// The place of a hook that is being answered, given up however that ends.
struct InWork<C: Ask, A: Answers> {
    hooks: Arc<Hooks<C, A>>,
    key: String,
    /// How long its answer is remembered.
    window: Duration,
}

impl<C: Ask, A: Answers> InWork<C, A> {
    /// Answers, and tells whoever repeats the call meanwhile.
    async fn first(self, asked: Asked, tell: watch::Sender<Option<Answered>>) -> Answered {
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
        tell.send_replace(Some(answered.clone()));
        if is_first {
            // Beside the answer; until it is done, repeats find the answer here.
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
        // What nobody said is not said again for longer than a proxy may repeat the question.
        let window = if is_said { self.window } else { self.window.min(REPEATS) };
        let remembering = self.hooks.answers.remember(&self.key, answer, window);
        let remembered = tokio::time::timeout(REMEMBER, remembering).await;
        let error = match remembered {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("it takes too long".to_owned()),
        };
        if let Some(error) = error {
            self.hooks.metrics.hook_memory_errors.inc();
            tracing::debug!(error, "cannot remember the answer to a hook; a repeat of it would be asked again");
            // Else a repeat would wait for an answer that does not come, until the mark lapses.
            // Only while it is ours: after that it may be another gateway's.
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

/// Work that goes on when nobody waits for it any more: who hangs up and repeats finds the answer to the first. A task from
/// the start would do as well, at the price of two more switches on the way of each answer.
struct Detached {
    work: Option<Answering>,
    tasks: TaskTracker,
}

impl Future for Detached {
    type Output = Answered;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answered> {
        // Taken out for the poll: what panics must not be polled again. After its end it waits for ever, as any future may.
        let Some(mut work) = self.work.take() else { return Poll::Pending };
        let polled = work.as_mut().poll(cx);
        if polled.is_pending() {
            self.work = Some(work);
        }
        polled
    }
}

impl Drop for Detached {
    fn drop(&mut self) {
        if let (Some(work), Ok(runtime)) = (self.work.take(), tokio::runtime::Handle::try_current()) {
            self.tasks.spawn_on(work, &runtime);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn what_nobody_waits_for_goes_on() {
        let (open, gate) = oneshot::channel::<()>();
        let (tell, told) = oneshot::channel();
        let work = async {
            gate.await.unwrap();
            tell.send(()).unwrap();
            Answered { body: Bytes::new(), source: Source::Worker }
        };
        let mut detached = Box::pin(Detached { work: Some(Box::pin(work)), tasks: TaskTracker::new() });
        assert!(futures_util::poll!(&mut detached).is_pending());
        drop(detached);
        open.send(()).unwrap();
        told.await.unwrap();
    }
}
