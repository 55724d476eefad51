//! The loop that answers hooks: bounded concurrency, a timeout for each, and a drain that answers what is in hand.

use super::{Hook, Hooks};
use arc_swap::ArcSwap;
use futures_util::FutureExt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};
use streamgate_core::duration::rounded;
use streamgate_core::hook::{is_answer, shape};
use streamgate_core::ports::{Call, Calls};
use streamgate_core::reason::Reason;
use streamgate_service::{metrics::Metrics, shutdown::Shutdown};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

/// Wait between tries to get a call while the store fails.
const STORE_BACKOFF: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug)]
pub struct CallPolicy {
    /// Most hooks at a time.
    pub concurrency: usize,
    /// How long answers may take after the drain began.
    pub drain_timeout: Duration,
}

/// Answers calls until the drain begins.
#[derive(Debug)]
pub struct CallWorker<C> {
    answerer: Arc<Answerer<C>>,
    policy: CallPolicy,
}

/// What all answers share.
#[derive(Debug)]
struct Answerer<C> {
    calls: Arc<C>,
    hooks: Arc<ArcSwap<Hooks>>,
    metrics: Arc<Metrics>,
}

impl<C: Calls> CallWorker<C> {
    pub fn new(calls: Arc<C>, hooks: Arc<ArcSwap<Hooks>>, policy: CallPolicy, metrics: Arc<Metrics>) -> CallWorker<C> {
        CallWorker { answerer: Arc::new(Answerer { calls, hooks, metrics }), policy }
    }

    /// Runs until the drain begins, then until what was in hand is answered or `drain_timeout` is over.
    pub async fn run(&self, shutdown: Shutdown) {
        let running = Arc::new(Semaphore::new(self.policy.concurrency));
        let tasks = TaskTracker::new();
        loop {
            let take = async {
                let permit = Arc::clone(&running).acquire_owned().await.ok()?;
                Some((permit, self.answerer.calls.next().await))
            };
            let taken = tokio::select! {
                biased;
                () = shutdown.drain.cancelled() => break,
                taken = take => taken,
            };
            match taken {
                Some((permit, Ok(call))) => {
                    let answerer = Arc::clone(&self.answerer);
                    tasks.spawn(async move {
                        answerer.answer(call).await;
                        drop(permit);
                    });
                }
                Some((_, Err(error))) => {
                    tracing::error!(%error, "cannot get hooks from the store");
                    tokio::time::sleep(STORE_BACKOFF).await;
                }
                None => break,
            }
        }
        tasks.close();
        // Each has its own deadline, far shorter than a drain.
        tokio::select! {
            () = tasks.wait() => {}
            () = tokio::time::sleep(self.policy.drain_timeout) => {}
            () = shutdown.abort.cancelled() => {}
        }
    }
}

impl<C: Calls> Answerer<C> {
    async fn answer(&self, call: Call<C::Handle>) {
        let Call { envelope, within, handle } = call;
        let (kind, key) = (envelope.kind.as_str(), envelope.key.clone());
        let (hook, started) = (Hook::new(envelope, within), Instant::now());
        self.metrics.worker_calls_in_flight.inc();
        let hooks = self.hooks.load_full();
        let answer = match hooks.pick(&hook) {
            None => Err((Reason::Unhandled, "there is no handler for it".to_owned())),
            Some(handler) => {
                // The call itself may panic too, not only its future.
                let run = AssertUnwindSafe(async { handler.answer(hook).await }).catch_unwind();
                match tokio::time::timeout(within, run).await {
                    Ok(Ok(Ok(body))) if is_answer(&body) => Ok(body),
                    Ok(Ok(Ok(body))) => Err((Reason::HookFailed, not_an_answer(&body))),
                    Ok(Ok(Err(error))) => Err((Reason::HookFailed, error.to_string())),
                    // A panic's message may hold anything, so it is not quoted.
                    Ok(Err(_)) => Err((Reason::HookFailed, "the handler panicked".to_owned())),
                    Err(_) => {
                        Err((Reason::HookTimeout, format!("the handler did not end within {:?}", rounded(within))))
                    }
                }
            }
        };
        self.metrics.worker_calls_in_flight.dec();
        self.metrics.worker_call.with_label_values(&[kind]).observe(started.elapsed().as_secs_f64());
        let answer = answer.map_err(|(reason, error)| {
            tracing::warn!(kind, key, %reason, error, "a hook has no answer");
            reason
        });
        let outcome = answer.as_ref().map_or_else(|reason| reason.as_str(), |_| "answered");
        self.metrics.worker_calls.with_label_values(&[kind, outcome]).inc();
        if let Err(error) = self.calls.answer(handle, answer).await {
            tracing::debug!(%error, key, "cannot answer a hook; the gateway answers it by policy");
        }
    }
}

fn not_an_answer(body: &[u8]) -> String {
    format!("malformed: the answer must be an object whose `message` is an object or null, and it is {}", shape(body))
}
