//! Which routes a person has paused, as far as this worker knows. The records are polled, so that a pause takes effect within
//! a second.

use crate::router::Router;
use arc_swap::ArcSwap;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use streamgate_core::ports::RouteRecords;
use streamgate_core::route_record::{Known, PATIENCE, Pause, Records};
use tokio::sync::watch;

/// Interval between polls of the records, and the interval until the first successful one.
const LOOK: Duration = Duration::from_millis(200);
const FIRST_LOOK: Duration = Duration::from_millis(20);

/// The paused routes; `None` until they are known.
pub(crate) type Paused = Option<BTreeSet<Arc<str>>>;

/// Follows the records.
pub(crate) struct Pauses<R> {
    records: Arc<R>,
    router: Arc<ArcSwap<Router>>,
    paused: watch::Sender<Paused>,
    last: BTreeMap<String, Pause>,
}

impl<R: RouteRecords> Pauses<R> {
    pub(crate) fn new(records: Arc<R>, router: Arc<ArcSwap<Router>>) -> (Pauses<R>, watch::Receiver<Paused>) {
        let (paused, follow) = watch::channel(None);
        (Pauses { records, router, paused, last: BTreeMap::new() }, follow)
    }

    /// Runs until it is dropped.
    pub(crate) async fn run(mut self) {
        let mut known = Known::new(R::GRACE, Instant::now());
        loop {
            match self.records.read().await {
                Ok(found) => self.take(&mut known, &found).await,
                Err(error) => {
                    tracing::debug!(%error, "cannot read which routes are paused");
                    if known.failed(Instant::now()) {
                        tracing::warn!(
                            %error,
                            "cannot find out within {PATIENCE:?} which routes are paused: all run until that is known"
                        );
                    }
                }
            }
            if known.is_settled() {
                self.show(&known);
            }
            tokio::time::sleep(if known.is_settled() { LOOK } else { FIRST_LOOK }).await;
        }
    }

    async fn take(&self, known: &mut Known, found: &Records) {
        let router = self.router.load_full();
        for (route, record) in known.found(found, &router.names(), Instant::now()) {
            if let Err(error) = self.records.write(&route, &record).await {
                // Written again with the next poll.
                tracing::debug!(%error, route, "cannot write the record of a route");
                return;
            }
        }
    }

    fn show(&mut self, known: &Known) {
        let router = self.router.load_full();
        let pauses =
            router.names().into_iter().filter_map(|name| Some((name.to_owned(), known.pause_of(name)?.clone())));
        let pauses: BTreeMap<String, Pause> = pauses.collect();
        for (route, Pause { by, why }) in pauses.iter().filter(|(route, pause)| self.last.get(*route) != Some(pause)) {
            tracing::warn!(route, by, why, "the route is paused: its events are parked");
        }
        for route in
            self.last.keys().filter(|route| !pauses.contains_key(*route) && router.names().contains(&&***route))
        {
            tracing::info!(route, "the route is resumed");
        }
        self.last = pauses;
        // Includes routes that this worker does not have: a reload may bring them.
        let paused = known.records().iter().filter(|(_, record)| record.pause.is_some());
        let names: BTreeSet<Arc<str>> = paused.map(|(route, _)| Arc::from(route.as_str())).collect();
        self.paused.send_if_modified(|paused| {
            let is_new = paused.as_ref() != Some(&names);
            *paused = Some(names);
            is_new
        });
    }
}
