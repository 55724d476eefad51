//! The ledger: every event that was answered 2xx must be handled, with an identical body.

use super::receiver::Receiver;
use super::wire::{self, Webhook};
use bytes::Bytes;
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Tries of one event after network errors and 5xx, as Stream makes them.
const ATTEMPTS: u32 = 3;
/// How long `prove` waits for repeats after the last delivery.
const QUIET: Duration = Duration::from_millis(250);

/// The events that were promised to be handled, and counts of the rest.
#[derive(Debug, Default)]
pub struct Ledger {
    accepted: Mutex<HashMap<String, Bytes>>,
    pub sent: AtomicU64,
    /// Events given up after all attempts.
    pub refused: AtomicU64,
    /// Requests: each attempt is one.
    pub requests: AtomicU64,
    /// Requests that were not answered 2xx.
    pub failed: AtomicU64,
    pub repeated: AtomicU64,
}

impl Ledger {
    pub fn accept(&self, webhook: &Webhook) {
        self.accepted.lock().unwrap().insert(webhook.id().to_owned(), webhook.body.clone());
    }

    pub fn accepted_ids(&self) -> HashSet<String> {
        self.accepted.lock().unwrap().keys().cloned().collect()
    }

    pub fn accepted(&self) -> usize {
        self.accepted.lock().unwrap().len()
    }

    /// How many of the accepted events have not been handled.
    pub fn missing(&self, receiver: &Receiver) -> usize {
        let handled = receiver.ids();
        self.accepted.lock().unwrap().keys().filter(|id| !handled.contains(*id)).count()
    }

    /// Waits until every accepted event is handled, then compares each body with the one sent. Returns how many deliveries
    /// were repeats.
    pub async fn prove(&self, receiver: &Receiver) -> usize {
        super::eventually("every accepted event is handled", || async { self.missing(receiver) == 0 }).await;
        // A repeat comes after the delivery that it repeats.
        let last = Mutex::new((receiver.received().len(), Instant::now()));
        super::eventually("nothing more comes", || async {
            let (mut last, now) = (last.lock().unwrap(), receiver.received().len());
            if now != last.0 {
                *last = (now, Instant::now());
            }
            last.1.elapsed() >= QUIET
        })
        .await;
        let received = receiver.received();
        let accepted = self.accepted.lock().unwrap();
        for one in &received {
            if let Some(body) = accepted.get(one.header("x-webhook-id")) {
                assert_eq!(body, &one.body, "the body of {} changed", one.header("x-webhook-id"));
            }
        }
        received.len() - receiver.ids().len()
    }
}

/// Signed events from several senders until it is stopped.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    /// Senders wait between events while it is set.
    pub paused: watch::Sender<bool>,
    senders: JoinSet<()>,
    pub ledger: Arc<Ledger>,
}

impl Load {
    /// Sends to one server.
    pub fn start(to: SocketAddr, senders: usize) -> Load {
        Load::over(vec![to], senders, None)
    }

    /// Sends to several servers, each attempt to the next. With `repeats`, every nth event is sent again after it was accepted.
    pub fn over(targets: Vec<SocketAddr>, senders: usize, repeats: Option<u64>) -> Load {
        Load::paced(targets, senders, repeats, Duration::ZERO)
    }

    /// Each sender begins its next event `pace` after the one before, or later, when that has its answer.
    pub fn paced(targets: Vec<SocketAddr>, senders: usize, repeats: Option<u64>, pace: Duration) -> Load {
        let (stop, ledger) = (Arc::new(AtomicBool::new(false)), Arc::new(Ledger::default()));
        let (paused, on_pause) = watch::channel(false);
        let (mut tasks, targets) = (JoinSet::new(), Arc::new(targets));
        for sender in 0..senders {
            let (stop, ledger, targets) = (Arc::clone(&stop), Arc::clone(&ledger), Arc::clone(&targets));
            let mut paused = on_pause.clone();
            tasks.spawn(async move {
                let mut number = 0_u64;
                let mut due = Instant::now();
                while !stop.load(Ordering::Relaxed) {
                    tokio::time::sleep_until(due).await;
                    due = (due + pace).max(Instant::now());
                    // An error means that the load is dropped, which ends this task, too.
                    drop(paused.wait_for(|paused| !paused).await);
                    number += 1;
                    let text = "x".repeat(usize::try_from(number % 3000).unwrap());
                    let body =
                        format!(r#"{{"type":"message.new","sender":{sender},"number":{number},"text":"{text}"}}"#);
                    let webhook = Webhook::push(&format!("load-{sender}-{number}"), body);
                    let first = usize::try_from(number).unwrap() + sender;
                    let accepted = deliver(&targets, first, &webhook, &ledger).await;
                    if accepted && repeats.is_some_and(|every| number.is_multiple_of(every)) {
                        ledger.repeated.fetch_add(1, Ordering::Relaxed);
                        deliver(&targets, first + 1, &webhook, &ledger).await;
                    }
                }
            });
        }
        Load { stop, paused, senders: tasks, ledger }
    }

    pub async fn stop(mut self) -> Arc<Ledger> {
        self.stop.store(true, Ordering::Relaxed);
        self.paused.send_replace(false);
        while let Some(ended) = self.senders.join_next().await {
            ended.unwrap();
        }
        self.ledger
    }
}

/// Sends an event, with Stream's retries. Returns whether it was accepted.
async fn deliver(targets: &[SocketAddr], first: usize, webhook: &Webhook, ledger: &Ledger) -> bool {
    ledger.sent.fetch_add(1, Ordering::Relaxed);
    for attempt in 1..=ATTEMPTS {
        let webhook = webhook.clone().set("x-webhook-attempt", &attempt.to_string());
        let to = targets[(first + usize::try_from(attempt).unwrap()) % targets.len()];
        ledger.requests.fetch_add(1, Ordering::Relaxed);
        match tokio::time::timeout(Duration::from_secs(6), wire::send(to, &webhook)).await {
            Ok(Ok(answer)) if answer.status.is_success() => {
                ledger.accept(&webhook);
                return true;
            }
            Ok(Ok(answer)) => assert!(answer.status.is_server_error(), "refused for good: {answer:?}"),
            Ok(Err(_)) | Err(_) => {}
        }
        ledger.failed.fetch_add(1, Ordering::Relaxed);
        // No server listens while the process restarts: wait as Stream would, rather than spin.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    ledger.refused.fetch_add(1, Ordering::Relaxed);
    false
}
