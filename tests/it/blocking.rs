//! Handlers of events that block their threads, over any store.

use crate::harness::process::{Setup, Site};
use crate::harness::receiver::Gate;
use crate::harness::stack::{Act, Script, Stack};
use crate::harness::wire::{Webhook, send};
use crate::harness::{PATIENCE, eventually};
use crate::hooks::{ask, counting};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use streamgate::Hooks;

behaviours! {
    event_handlers_that_block_their_threads_delay_no_hook_and_no_drain
    an_abort_waits_for_no_handler
}

/// A stack whose handler of events blocks until the gate opens, and how many of its threads are blocked.
async fn blocking<S: Stack>(site: &Site, worker: String, hooks: Hooks) -> (S, Gate, Arc<AtomicUsize>) {
    let (gate, blocked) = (Gate::default(), Arc::new(AtomicUsize::new(0)));
    let (closed, counted) = (gate.clone(), Arc::clone(&blocked));
    let script = Script::new(move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
        closed.wait();
        Act::Succeed
    });
    let stack = S::with_hooks(site, &Setup { worker, ..Setup::default() }, script.router, hooks).await;
    (stack, gate, blocked)
}

async fn event_handlers_that_block_their_threads_delay_no_hook_and_no_drain<S: Stack>() {
    let (site, (hooks, _)) = (Site::new(), counting());
    let threads = std::thread::available_parallelism().unwrap().get();
    let worker = format!("concurrency = {0}\nprefetch = {0}\ndrain_timeout = \"200ms\"", 4 * threads);
    let (stack, gate, blocked) = blocking::<S>(&site, worker, hooks).await;
    for _ in 0..4 * threads {
        assert_eq!(send(stack.public(), &Webhook::fresh()).await.unwrap().status, 200);
    }
    eventually("every thread is blocked", || async { blocked.load(Ordering::SeqCst) == threads }).await;
    for _ in 0..20 {
        assert_eq!(ask(&stack, &Webhook::moderation(r#"{"text":"x"}"#)).await.outcome(), "answered");
    }
    assert_eq!(send(stack.public(), &Webhook::fresh()).await.unwrap().status, 200);
    stack.drain().await;
    assert_eq!(blocked.load(Ordering::SeqCst), threads, "the drain waited for none of them");
    gate.open();
}

async fn an_abort_waits_for_no_handler<S: Stack>() {
    let site = Site::new();
    let (stack, gate, blocked) = blocking::<S>(&site, "drain_timeout = \"1h\"".into(), Hooks::default()).await;
    assert_eq!(send(stack.public(), &Webhook::fresh()).await.unwrap().status, 200);
    eventually("the event is in hand", || async { blocked.load(Ordering::SeqCst) == 1 }).await;
    tokio::time::timeout(PATIENCE, stack.abort()).await.expect("the abort ends while the handler blocks");
    gate.open();
}
