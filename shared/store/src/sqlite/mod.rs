//! One SQLite file in the data directory. It is the embedded store of `up` (queue, retries, dead letters and seen keys,
//! for one process on one machine), and the spool of a gateway (`spool`). The format is the same: any process that
//! opens it finds the events that are not handled yet.
//!
//! One thread writes, and commits in groups: one fsync for all waiting writes (`writer`). One thread reads (`reader`).
//! A key is inserted in the transaction that inserts its event, so within the window a key has at most one row; the row
//! itself carries the attempt. That is why the claims of this store are only leases in memory (`leases`): a dead
//! process holds none.

mod alongside;
mod answers;
mod clock;
mod commit;
mod damage;
mod dead_letters;
mod depths;
mod directory;
mod file_watch;
mod in_hand;
mod inbox;
mod instances;
mod leases;
mod limits;
mod parked;
mod queue;
mod reader;
mod routes;
mod row;
mod rows;
mod schema;
mod seen;
mod spool;
mod thread;
mod writer;

pub use damage::set_aside_in;
pub use dead_letters::DeadLetterBox;
pub use depths::{Depths, depths_of};
pub use directory::{OpenError, SECRET, create_private};
pub use instances::InstanceFile;
pub use routes::RouteRecordsFile;
pub use schema::inspect;
pub use spool::{SpoolFile, SpoolOptions};

use depths::Counter;
use directory::Owned;
use in_hand::Handle;
use inbox::{Bounds, Inbox};
use leases::Leases;
use queue::Change;
use reader::Reader;
use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use streamgate_core::{
    claim::{ClaimKey, Conclusion, Verdict},
    envelope::Envelope,
    ports::{Accepted, Claims, Deliveries, Delivery, Enqueue, Parked, Settled, Settlement, StoreError},
};
use writer::Writer;

/// The longest wait between tries to record a settlement while the store fails. There is no last try: the handler has
/// run, and giving up would only run it again.
const SETTLE_BACKOFF: Duration = Duration::from_secs(2);

#[derive(Clone, Debug)]
pub struct Options {
    pub data_dir: PathBuf,
    /// Bytes that the file may take before new events are refused.
    pub max_bytes: u64,
    /// A repeat is recognised for at least this long.
    pub seen_window: Duration,
    /// A repeat is recognised for up to this long, while there is room.
    pub remember: Duration,
    /// Most writes that wait for a commit.
    pub max_waiting: usize,
    /// Most deliveries in hand.
    pub prefetch: usize,
    /// One in this many deliveries may be a parked event.
    pub parked_share: usize,
    /// Most bytes of bodies in hand.
    pub in_hand_bytes: usize,
    /// How long a worker may hold a delivery: a handler that blocks its thread for longer is not waited for.
    pub patience: Duration,
}

/// The store of a process that owns its data directory.
#[derive(Debug)]
pub struct Embedded {
    writer: Writer,
    inbox: Inbox,
    leases: Leases,
    /// Counts rows, apart from the threads that callers wait for; `None` once the store is closed.
    counting: Arc<Mutex<Option<Counter>>>,
    /// `None` once the store is closed. The last field: the lock is released after the threads that use the file have
    /// ended.
    owned: Mutex<Option<Owned>>,
}

impl Embedded {
    /// Takes the data directory, migrates its file, and starts the threads. Call within a tokio runtime.
    pub fn open(options: &Options) -> Result<Embedded, OpenError> {
        let owned = Owned::take(&options.data_dir)?;
        let mut writing = damage::open_owner(&owned.database(), options.max_bytes)?;
        let failed = |error| OpenError::Database { path: owned.database(), error };
        queue::bring_forward(&writing, now_ms()).map_err(failed)?;
        let parked = options.prefetch / options.parked_share.max(1);
        queue::begin(&mut writing, options.prefetch, parked).map_err(failed)?;
        let reading = schema::open_reader(&owned.database())?;
        let counting = Arc::new(Mutex::new(Some(Counter::new(schema::open_reader(&owned.database())?))));
        let writer = Writer::start(writing, &owned.database(), limits::Limits::of(options), None)?;
        let Options { prefetch, in_hand_bytes, patience, .. } = *options;
        let bounds = Bounds { prefetch, parked, in_hand_bytes, patience };
        let inbox = Inbox::start(Reader::start(reading)?, writer.marker(), writer.news(), bounds);
        Ok(Embedded { writer, inbox, leases: Leases::default(), counting, owned: Mutex::new(Some(owned)) })
    }

    /// How many rows of each kind there are.
    pub async fn depths(&self) -> Result<Depths, StoreError> {
        let counting = Arc::clone(&self.counting);
        let counted = tokio::task::spawn_blocking(move || {
            let mut counting = counting.lock().unwrap_or_else(PoisonError::into_inner);
            counting.as_mut().map(Counter::depths).transpose()
        });
        let failed = |error: &dyn std::fmt::Display| StoreError::Unavailable(error.to_string());
        let counted = counted.await.map_err(|error| failed(&error))?.map_err(|error| failed(&error))?;
        counted.ok_or_else(|| failed(&"it is closed"))
    }

    /// Ends the threads once their work is committed, and releases the directory. Later calls fail, and a second call
    /// does nothing.
    pub async fn close(&self) {
        if self.owned.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
            return;
        }
        // The counting connection goes first, after a count that is under way: SQLite empties its log when the last
        // connection closes, if that one can write.
        drop(self.counting.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.inbox.close().await;
        match self.inbox.in_hand() {
            0 => {
                if let Err(error) = self.writer.end().await {
                    tracing::warn!(%error, "cannot record that nothing is in hand: the next start treats this process as killed");
                }
            }
            // The hanging handler is to blame, and without the mark every stop would forget that.
            left => tracing::warn!(left, "handlers were left behind: the next start treats this process as killed"),
        }
        self.writer.close().await;
        drop(self.owned.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Enqueue for Embedded {
    async fn enqueue(&self, envelope: Envelope) -> Result<Accepted, StoreError> {
        let row = self.writer.enqueue(envelope).await?;
        Ok(row.map_or(Accepted::Duplicate, |_| Accepted::Enqueued))
    }

    fn ready(&self) -> Result<(), StoreError> {
        self.writer.ready()
    }
}

impl Deliveries for Embedded {
    type Handle = Handle;

    async fn next(&self) -> Result<Delivery<Handle>, StoreError> {
        self.inbox.next().await
    }

    fn take_parked(&self, routes: &[Arc<str>]) {
        self.inbox.take_parked(routes);
    }

    async fn recalled(&self) {
        self.inbox.recalled().await;
    }

    fn begin(&self, delivery: &Delivery<Handle>) {
        delivery.handle.begins();
    }

    async fn park(&self, delivery: Delivery<Handle>, route: Arc<str>) -> Result<Parked<Handle>, StoreError> {
        let seq = delivery.handle.seq();
        until_written(&delivery.envelope.key, || self.writer.park(seq, Arc::clone(&route))).await;
        delivery.handle.settled();
        Ok(Parked::Kept)
    }

    /// Runs in one transaction, so that a copy is made once.
    async fn copy(&self, delivery: &mut Delivery<Handle>, routes: &[Arc<str>]) -> Result<(), StoreError> {
        let [first, further @ ..] = routes else { return Ok(()) };
        let (seq, envelope) = (delivery.handle.seq(), &delivery.envelope);
        let copies =
            || further.iter().map(|route| Envelope { route: Some(route.to_string()), ..envelope.clone() }).collect();
        until_written(&envelope.key, || self.writer.copy(seq, Arc::clone(first), copies())).await;
        delivery.envelope.route = Some(first.to_string());
        Ok(())
    }

    /// Dropping the handle gives it back.
    async fn give_back(&self, delivery: Delivery<Handle>) {
        drop(delivery);
    }

    async fn settle(
        &self,
        delivery: Delivery<Handle>,
        route: Option<Arc<str>>,
        settlement: Settlement,
    ) -> Result<Settled<Handle>, StoreError> {
        let goes_on = matches!(settlement, Settlement::Retry { .. } | Settlement::Dead { .. });
        let attempts = goes_on.then(|| delivery.envelope.attempts.to_json());
        let change = Change { seq: delivery.handle.seq(), route, settlement, attempts };
        until_written(&delivery.envelope.key, || self.writer.settle(change.clone())).await;
        Ok(Settled(delivery.handle))
    }

    async fn finish(&self, Settled(handle): Settled<Handle>) -> Result<(), StoreError> {
        handle.settled();
        Ok(())
    }

    fn ready(&self) -> Result<(), StoreError> {
        self.inbox.ready()
    }
}

/// Retries a write until it succeeds.
async fn until_written<W: Future<Output = Result<(), StoreError>>>(key: &str, write: impl Fn() -> W) {
    let mut wait = Duration::from_millis(50);
    while let Err(error) = write().await {
        tracing::warn!(%error, key, "cannot record a settlement, trying again");
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(SETTLE_BACKOFF);
    }
}

impl Claims for Embedded {
    fn claim(
        &self,
        key: &ClaimKey,
        attempt: u32,
        holder: u64,
        lease: Duration,
    ) -> impl Future<Output = Result<Verdict, StoreError>> + Send {
        std::future::ready(Ok(self.leases.claim(key, attempt, holder, lease)))
    }

    fn renew(
        &self,
        key: &ClaimKey,
        holder: u64,
        lease: Duration,
    ) -> impl Future<Output = Result<bool, StoreError>> + Send {
        std::future::ready(Ok(self.leases.renew(key, holder, lease)))
    }

    fn conclude(
        &self,
        key: &ClaimKey,
        holder: u64,
        conclusion: Conclusion,
    ) -> impl Future<Output = Result<(), StoreError>> + Send {
        self.leases.conclude(key, holder, conclusion);
        std::future::ready(Ok(()))
    }
}

/// Milliseconds since the Unix epoch, by this machine's clock: the clock of this store.
fn now_ms() -> i64 {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    millis(since_epoch)
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

fn unavailable(error: impl std::fmt::Display) -> StoreError {
    StoreError::Unavailable(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use rusqlite::Connection;
    use streamgate_core::id::Kind;
    use streamgate_core::reason::Reason;

    fn options(data_dir: PathBuf) -> Options {
        Options {
            data_dir,
            max_bytes: 64 << 20,
            seen_window: Duration::from_secs(600),
            remember: Duration::from_secs(600),
            max_waiting: 64,
            prefetch: 4,
            parked_share: 4,
            in_hand_bytes: 1 << 20,
            patience: Duration::from_secs(3600),
        }
    }

    fn event(id: &str) -> Envelope {
        Envelope {
            app: "chat".into(),
            kind: Kind::Push,
            id: id.into(),
            event_type: "message.new".into(),
            key: format!("key of {id}"),
            webhook_attempt: 1,
            api_key: String::new(),
            signature: String::new(),
            received_at_ms: 1,
            attempt: 1,
            attempts: Default::default(),
            cid: None,
            route: None,
            replay: None,
            traceparent: None,
            further: streamgate_core::further::FurtherHeaders::default(),
            body: Bytes::from_static(b"{}"),
        }
    }

    /// The next delivery, as begun by a handler; fails rather than waits for ever.
    async fn next(store: &Embedded) -> Delivery<Handle> {
        let next = tokio::time::timeout(Duration::from_secs(30), store.next()).await;
        let delivery = next.expect("a delivery comes").unwrap();
        store.begin(&delivery);
        delivery
    }

    async fn settle(store: &Embedded, delivery: Delivery<Handle>, settlement: Settlement) {
        let settled = store.settle(delivery, None, settlement).await.unwrap();
        store.finish(settled).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn events_come_in_order_and_unsettled_ones_come_back() {
        let directory = tempfile::tempdir().unwrap();
        let store = Embedded::open(&options(directory.path().join("data"))).unwrap();
        for number in 0..10 {
            assert_eq!(store.enqueue(event(&number.to_string())).await.unwrap(), Accepted::Enqueued);
        }
        let dropped = next(&store).await;
        assert_eq!(dropped.envelope.id, "0");
        drop(dropped);
        let mut ids = Vec::new();
        for _ in 0..10 {
            let delivery = next(&store).await;
            ids.push(delivery.envelope.id.clone());
            settle(&store, delivery, Settlement::Done).await;
        }
        let position = |id: &str| ids.iter().position(|found| found == id);
        assert!(position("0").is_some(), "what was dropped came back: {ids:?}");
        ids.retain(|id| id != "0");
        assert_eq!(ids, (1..10).map(|number: i32| number.to_string()).collect::<Vec<_>>());
        store.close().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_closed_store_refuses_what_comes_later_and_leaves_its_directory_to_others() {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path().join("data"));
        let store = Embedded::open(&options).unwrap();
        store.enqueue(event("before")).await.unwrap();
        store.close().await;
        store.close().await;
        assert!(matches!(store.enqueue(event("after")).await, Err(StoreError::Unavailable(_))));
        assert!(store.next().await.is_err() && store.depths().await.is_err());
        // The closed store is not dropped yet.
        let next_owner = Embedded::open(&options).unwrap();
        assert_eq!(next(&next_owner).await.envelope.id, "before");
        next_owner.close().await;
        drop(store);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_delivery_left_behind_with_a_handler_counts_as_abandoned() {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path().join("data"));
        for (is_left_behind, abandoned) in [(true, 0), (false, 1), (false, 1)] {
            let store = Embedded::open(&options).unwrap();
            if abandoned == 0 {
                store.enqueue(event("hangs")).await.unwrap();
            }
            let delivery = next(&store).await;
            assert_eq!(delivery.abandoned, abandoned);
            // A handler that blocks its thread never releases its delivery.
            let left_behind = Some(delivery).filter(|_| is_left_behind);
            store.close().await;
            drop(left_behind);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn only_the_event_that_kills_its_process_becomes_poison() {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path().join("data"));
        let mut store = Embedded::open(&options).unwrap();
        for id in ["one", "poison", "two"] {
            store.enqueue(event(id)).await.unwrap();
        }
        let (mut counts, mut done) = (Vec::new(), Vec::new());
        // A killed process gives nothing back, so its deliveries must not free places for the next event.
        let mut never_given_back = Vec::new();
        for _life in 0..40 {
            let first = next(&store).await;
            if first.abandoned < 5 {
                // Concurrently: all are in hand when the process dies.
                let others = [next(&store).await, next(&store).await];
                assert!(others.iter().all(|other| other.abandoned == first.abandoned));
                never_given_back.extend(others.into_iter().chain([first]));
            } else {
                let mut delivery = first;
                while delivery.envelope.id != "poison" {
                    done.push(delivery.envelope.id.clone());
                    settle(&store, delivery, Settlement::Done).await;
                    delivery = next(&store).await;
                }
                counts.push(delivery.abandoned);
                if delivery.abandoned >= 10 {
                    settle(&store, delivery, Settlement::Dead { reason: Reason::Poison, error: None }).await;
                    let last = next(&store).await;
                    assert_eq!((last.envelope.id.as_str(), last.abandoned), ("two", 5));
                    settle(&store, last, Settlement::Done).await;
                    store.close().await;
                    break;
                }
                never_given_back.push(delivery);
            }
            // No orderly end, as after SIGKILL.
            drop(store);
            store = tokio::task::block_in_place(|| reopen(&options));
        }
        assert_eq!((counts, done), (vec![5, 6, 7, 8, 9, 10], vec!["one".to_owned()]));
        // An orderly end counts nothing.
        let store = Embedded::open(&options).unwrap();
        store.enqueue(event("three")).await.unwrap();
        drop(next(&store).await);
        store.close().await;
        let store = Embedded::open(&options).unwrap();
        assert_eq!(next(&store).await.abandoned, 0);
        store.close().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_delivery_that_is_never_given_back_keeps_a_suspect_waiting_no_longer_than_a_handler_may_take() {
        let directory = tempfile::tempdir().unwrap();
        let options = Options { patience: Duration::from_millis(300), ..options(directory.path().join("data")) };
        let store = Embedded::open(&options).unwrap();
        for id in ["stuck", "suspect", "other", "another"] {
            store.enqueue(event(id)).await.unwrap();
        }
        store.close().await;
        let connection = Connection::open(directory.path().join("data").join("streamgate.db")).unwrap();
        connection.execute("UPDATE events SET deliveries = 5 WHERE webhook_id = 'suspect'", []).unwrap();
        drop(connection);
        let store = Embedded::open(&options).unwrap();
        // Handlers that block their threads for ever: first the one before the suspect, then the suspect's own.
        let (stuck, suspect) = (next(&store).await, next(&store).await);
        assert_eq!((stuck.envelope.id.as_str(), suspect.envelope.id.as_str()), ("stuck", "suspect"));
        assert_eq!((stuck.abandoned, suspect.abandoned), (0, 5));
        let others = [next(&store).await, next(&store).await];
        assert!(others.iter().all(|other| other.envelope.id.ends_with("other")));
        drop((stuck, suspect, others));
        store.close().await;
    }

    /// The threads of a dropped store release the directory when they have ended.
    fn reopen(options: &Options) -> Embedded {
        loop {
            match Embedded::open(options) {
                Err(OpenError::Owned { .. }) => std::thread::yield_now(),
                opened => return opened.unwrap(),
            }
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_waiting_delivery_comes_back_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let store = Embedded::open(&options(directory.path().join("data"))).unwrap();
        store.enqueue(event("one")).await.unwrap();
        let delivery = next(&store).await;
        settle(&store, delivery, Settlement::Wait { delay: Duration::from_millis(5) }).await;
        let again = next(&store).await;
        assert_eq!(again.envelope, event("one"));
        settle(&store, again, Settlement::Superseded).await;
        store.close().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_directory_has_one_owner() {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path().join("deep/er/data"));
        let store = Embedded::open(&options).unwrap();
        assert!(matches!(Embedded::open(&options), Err(OpenError::Owned { .. })));
        store.close().await;
        Embedded::open(&options).unwrap().close().await;
    }

    /// This event after a failed first attempt.
    fn failed(mut delivery: Delivery<Handle>) -> Delivery<Handle> {
        let error = "x".repeat(90);
        delivery.envelope.attempts.push(streamgate_core::attempts::Attempt { number: 1, at_ms: 1, took_ms: 1, error });
        delivery
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn waiting_retrying_and_dead_events_are_counted() {
        let directory = tempfile::tempdir().unwrap();
        let store = Embedded::open(&options(directory.path().join("data"))).unwrap();
        for number in 0..5 {
            store.enqueue(event(&number.to_string())).await.unwrap();
        }
        let retry = Settlement::Retry { delay: Duration::from_secs(3600), attempt: 2 };
        for settlement in [Settlement::Done, retry, Settlement::Dead { reason: Reason::Rejected, error: None }] {
            let delivery = next(&store).await;
            settle(&store, delivery, settlement).await;
        }
        let expected = Depths { waiting: 2, retrying: 1, parked: Vec::new(), dead: 1 };
        // The count of all events is repeated only after a while.
        let counted = async {
            while store.depths().await.unwrap() != expected {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), counted).await.expect("they are counted");
        store.close().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_retry_keeps_its_attempts_and_the_headers_of_a_newer_version() {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path().join("data"));
        let store = Embedded::open(&options).unwrap();
        store.enqueue(event("one")).await.unwrap();
        store.close().await;
        let file = Connection::open(options.data_dir.join("streamgate.db")).unwrap();
        let newer = r#"{"x-streamgate-invention":"?"}"#;
        assert_eq!(file.execute("UPDATE events SET headers = ?1", [newer]).unwrap(), 1);
        let store = Embedded::open(&options).unwrap();
        let retry = Settlement::Retry { delay: Duration::from_millis(1), attempt: 2 };
        settle(&store, failed(next(&store).await), retry).await;
        let again = next(&store).await;
        assert_eq!(again.envelope.attempts.iter().count(), 1);
        settle(&store, again, Settlement::Dead { reason: Reason::Rejected, error: None }).await;
        let kept = |row: &rusqlite::Row<'_>| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?));
        let (headers, attempts) = file.query_row("SELECT headers, attempts FROM dead", [], kept).unwrap();
        assert_eq!(headers, newer);
        assert!(attempts.contains("xxx"), "{attempts}");
        store.close().await;
    }

    /// However short the time since the last look: the look after the commit decides.
    #[tokio::test(flavor = "multi_thread")]
    async fn no_commit_is_acknowledged_in_a_file_that_was_moved_since_the_last_one() {
        for round in 0..20 {
            let directory = tempfile::tempdir().unwrap();
            let options = options(directory.path().join("data"));
            let store = Embedded::open(&options).unwrap();
            assert!(store.enqueue(event("before")).await.is_ok());
            std::fs::rename(&options.data_dir, directory.path().join("moved")).unwrap();
            let refused = store.enqueue(event("after")).await;
            assert!(matches!(refused, Err(StoreError::Gone(_))), "round {round}: {refused:?}");
            std::fs::rename(directory.path().join("moved"), &options.data_dir).unwrap();
            store.close().await;
        }
    }

    /// A growing row would take the room that settlements need: no event could leave a full store any more.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_full_store_keeps_no_history_of_attempts() {
        let directory = tempfile::tempdir().unwrap();
        let options = Options { max_bytes: 2 << 20, ..options(directory.path().join("data")) };
        let store = Embedded::open(&options).unwrap();
        for number in 0.. {
            let large = Envelope { body: Bytes::from(vec![b' '; 8 << 10]), ..event(&number.to_string()) };
            if let Err(error) = store.enqueue(large).await {
                assert!(matches!(error, StoreError::Full(_)), "{error}");
                break;
            }
        }
        let retry = Settlement::Retry { delay: Duration::ZERO, attempt: 2 };
        settle(&store, failed(next(&store).await), retry).await;
        let again = loop {
            let delivery = next(&store).await;
            if delivery.envelope.attempt == 2 {
                break delivery;
            }
            settle(&store, delivery, Settlement::Wait { delay: Duration::from_secs(60) }).await;
        };
        assert!(again.envelope.attempts.is_empty());
        store.close().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_clock_that_was_ahead_delays_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path().join("data"));
        let store = Embedded::open(&options).unwrap();
        store.enqueue(event("one")).await.unwrap();
        let delivery = next(&store).await;
        settle(&store, delivery, Settlement::Retry { delay: Duration::from_millis(10), attempt: 2 }).await;
        store.close().await;
        // As if the clock had been a day ahead.
        let file = Connection::open(options.data_dir.join("streamgate.db")).unwrap();
        assert_eq!(file.execute("UPDATE events SET due_at = due_at + 86400000 WHERE due_at > 0", []).unwrap(), 1);
        drop(file);
        let store = Embedded::open(&options).unwrap();
        assert_eq!(next(&store).await.envelope.attempt, 2);
        store.close().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_start_shortens_no_wait() {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path().join("data"));
        let store = Embedded::open(&options).unwrap();
        store.enqueue(event("one")).await.unwrap();
        let delivery = next(&store).await;
        settle(&store, delivery, Settlement::Retry { delay: Duration::from_secs(3000), attempt: 2 }).await;
        store.close().await;
        let due = || -> i64 {
            let file = Connection::open(options.data_dir.join("streamgate.db")).unwrap();
            file.query_row("SELECT due_at FROM events", [], |row| row.get(0)).unwrap()
        };
        let before = due();
        Embedded::open(&options).unwrap().close().await;
        assert_eq!(due(), before);
    }
}
