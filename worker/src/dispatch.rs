//! The worker's loop: queues each delivery in its route's lane, starts those whose turn it is, and parks those that block
//! other lanes.

use crate::delivery::Processor;
use crate::lanes::{Item, Room, Start};
use crate::pauses::Paused;
use crate::router::{Pick, Route, Router};
use crate::turn::{Shared, Turn, Waiting};
use futures_util::{StreamExt, stream};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use streamgate_core::ports::{Claims, Deliveries, Delivery};
use tokio::runtime;
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Wait between tries to get a delivery while the store fails.
const STORE_BACKOFF: Duration = Duration::from_secs(1);
/// Interval between checks whether the routes were reloaded, if no delivery comes.
const LOOK: Duration = Duration::from_secs(1);
/// How long a stop may take to give back deliveries that no handler has begun; after it they go back with the connection.
const GIVE_BACK: Duration = Duration::from_secs(1);
/// Deliveries given back at a time.
const GIVEN_BACK_AT_ONCE: usize = 16;

/// Deliveries that return to the dispatcher once each of their routes has its own copy.
type Copied<D> = mpsc::UnboundedReceiver<Delivery<<D as Deliveries>::Handle>>;

/// Takes deliveries from the store and hands them to tasks.
pub(crate) struct Dispatcher<D: Deliveries, C> {
    processor: Arc<Processor<D, C>>,
    /// The threads on which handlers run.
    threads: runtime::Handle,
    next_holder: u64,
    cut: CancellationToken,
    tasks: TaskTracker,
    shared: Arc<Shared<D::Handle>>,
    /// The routes that the lanes were made from.
    router: Arc<Router>,
    /// The routes whose parked events are delivered.
    taking: Vec<Arc<str>>,
    /// At the last look all routes ran and took their parked events.
    all_ran: bool,
    /// Returns deliveries whose copies are durable.
    copied: mpsc::UnboundedSender<Delivery<D::Handle>>,
}

impl<D: Deliveries, C: Claims> Dispatcher<D, C> {
    /// From the `cut` on, what is in hand is left where it is.
    pub(crate) fn new(
        processor: Arc<Processor<D, C>>,
        threads: runtime::Handle,
        holder_seed: u64,
        cut: CancellationToken,
    ) -> (Dispatcher<D, C>, Copied<D>) {
        // Bounded by the number of deliveries that the store hands out.
        let (copied, came) = mpsc::unbounded_channel();
        let policy = &processor.policy;
        let room = Room { deliveries: policy.prefetch, bytes: policy.memory_budget, longest_wait: policy.longest_wait };
        let shared = Arc::new(Shared::new(room));
        let router = processor.router.load_full();
        let (tasks, taking, all_ran) = (TaskTracker::new(), Vec::new(), false);
        let dispatcher = Dispatcher {
            processor,
            threads,
            next_holder: holder_seed,
            cut,
            tasks,
            shared,
            router,
            taking,
            all_ran,
            copied,
        };
        (dispatcher, came)
    }

    /// Runs until the drain begins, and returns the tasks that settle what is in hand then. Takes no delivery before `paused`
    /// says which routes are paused.
    pub(crate) async fn run(
        mut self,
        mut copied: Copied<D>,
        mut paused: watch::Receiver<Paused>,
        drain: &CancellationToken,
    ) -> TaskTracker {
        tokio::select! {
            _ = paused.wait_for(Option::is_some) => {}
            () = drain.cancelled() => {
                self.tasks.close();
                return self.tasks;
            }
        }
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let processor = Arc::clone(&self.processor);
        let mut next = pin!(next(&*processor.deliveries));
        let shared = Arc::clone(&self.shared);
        self.adopt();
        self.pause(&mut paused);
        loop {
            let due = self.turn();
            let paced = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = drain.cancelled() => break,
                () = shared.freed.notified() => {}
                Some(delivery) = copied.recv() => self.offer(delivery),
                Ok(()) = paused.changed() => self.pause(&mut paused),
                delivery = &mut next => {
                    next.set(self::next(&*processor.deliveries));
                    self.look_at_routes();
                    self.offer(delivery);
                }
                () = processor.deliveries.recalled() => self.give_back_waiting(),
                () = paced => {}
                _ = looks.tick() => {
                    self.look_at_routes();
                    self.shared.lanes().look(Instant::now());
                }
            }
        }
        while let Ok(delivery) = copied.try_recv() {
            self.offer(delivery);
        }
        self.give_back_all().await;
        self.tasks.close();
        self.tasks
    }

    fn pause(&mut self, paused: &mut watch::Receiver<Paused>) {
        let paused = paused.borrow_and_update().clone().unwrap_or_default();
        self.shared.lanes().pause(paused);
    }

    fn look_at_routes(&mut self) {
        if !Arc::ptr_eq(&self.router, &self.processor.router.load()) {
            self.router = self.processor.router.load_full();
            self.adopt();
        }
    }

    /// Makes the lanes match the routes, and offers waiting deliveries to the routes as they are now.
    fn adopt(&mut self) {
        let policy = &self.processor.policy;
        let limits = |route: &Route| route.limits(policy.concurrency, policy.handler_timeout);
        let routes: Vec<_> =
            self.router.routes().iter().map(|route| (Arc::clone(&route.name), limits(route))).collect();
        for (route, _) in self.shared.lanes().states() {
            if routes.iter().all(|(name, _)| *name != route) {
                // The gauge of a removed route would keep its last value.
                self.processor.metrics.worker_route_state.remove_label_values(&[&*route]).ok();
            }
        }
        self.all_ran = false;
        let waited = self.shared.lanes().adopt(routes);
        for Waiting { delivery, .. } in waited {
            self.offer(delivery);
        }
    }

    /// Queues a delivery in its lane, or settles it if no route matches.
    fn offer(&mut self, delivery: Delivery<D::Handle>) {
        let (processor, cut) = (Arc::clone(&self.processor), self.cut.clone());
        match self.router.pick(&delivery.envelope, delivery.parked.as_deref()) {
            Pick::Route(route) => {
                let name = Arc::clone(&route.name);
                // The lanes were made from this router's routes, so its lane exists.
                let offered = self.shared.lanes().offer(&name, Waiting { delivery, route });
                if let Err(Waiting { delivery, .. }) = offered {
                    self.give_back(delivery);
                }
            }
            Pick::Each(routes) => self.copy(delivery, routes),
            // The route's queue is not consumed any more, and the delivery stays there.
            Pick::Unknown(_) if delivery.parked.is_some() => self.give_back(delivery),
            Pick::Unknown(route) => {
                let work = async move {
                    cut.run_until_cancelled(processor.unknown_route(delivery, &route)).await;
                };
                self.tasks.spawn(work);
            }
            Pick::Unmatched => {
                let router = Arc::clone(&self.router);
                let work = async move {
                    cut.run_until_cancelled(processor.unmatched(delivery, &router)).await;
                };
                self.tasks.spawn(work);
            }
        }
    }

    /// Makes an event for each route. This delivery, which is the first one's, is offered again when all copies are durable.
    fn copy(&self, mut delivery: Delivery<D::Handle>, routes: Vec<Arc<Route>>) {
        let (processor, cut, copied) = (Arc::clone(&self.processor), self.cut.clone(), self.copied.clone());
        let work = async move {
            let names: Vec<_> = routes.iter().map(|route| Arc::clone(&route.name)).collect();
            let copy = cut.run_until_cancelled(processor.deliveries.copy(&mut delivery, &names));
            match copy.await {
                Some(Ok(())) => drop(copied.send(delivery)),
                Some(Err(error)) => {
                    let key = &delivery.envelope.key;
                    tracing::error!(%error, key, "cannot copy an event for its routes; it will be delivered again");
                }
                None => {}
            }
        };
        self.tasks.spawn(work);
    }

    /// Starts whatever may start, then parks deliveries that block other lanes. Returns when a rate lets the next one start.
    fn turn(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let all_run = self.shared.lanes().all_run();
        if !(all_run && self.all_ran) {
            self.follow_states(now);
            self.all_ran = all_run;
        }
        loop {
            let next = self.shared.lanes().next_start(now);
            let Some(start) = next else { break };
            self.start(start);
        }
        loop {
            let next = self.shared.lanes().next_park(now);
            let Some(waiting) = next else { break };
            self.park(waiting);
        }
        loop {
            let next = self.shared.lanes().next_give_back(now);
            let Some(Waiting { delivery, .. }) = next else { break };
            self.give_back(delivery);
        }
        self.shared.lanes().due(now)
    }

    /// Takes parked events of the routes that run, and shows each route's state.
    fn follow_states(&mut self, now: Instant) {
        let (taking, states) = {
            let lanes = self.shared.lanes();
            (lanes.taking_parked(now), lanes.states())
        };
        if self.taking != taking {
            self.processor.deliveries.take_parked(&taking);
            self.taking = taking;
        }
        for (route, state) in states {
            self.processor.metrics.worker_route_state.with_label_values(&[&*route]).set(state as i64);
        }
    }

    fn start(&mut self, Start { item: Waiting { delivery, route }, probe }: Start<Waiting<D::Handle>>) {
        let bytes = delivery.envelope.body.len();
        let mut turn = Turn { shared: Arc::clone(&self.shared), route: Arc::clone(&route.name), bytes, probe };
        let (processor, cut, holder) = (Arc::clone(&self.processor), self.cut.clone(), self.next_holder);
        self.next_holder = self.next_holder.wrapping_add(1);
        processor.deliveries.begin(&delivery);
        let work = async move {
            processor.work(delivery, &route, holder, &cut, |health| turn.judged(health)).await;
            drop(turn);
        };
        self.tasks.spawn_on(work, &self.threads);
    }

    fn park(&self, Waiting { delivery, route }: Waiting<D::Handle>) {
        let (processor, cut) = (Arc::clone(&self.processor), self.cut.clone());
        let work = async move {
            cut.run_until_cancelled(processor.park(delivery, &route.name)).await;
        };
        self.tasks.spawn(work);
    }

    fn give_back(&self, delivery: Delivery<D::Handle>) {
        let processor = Arc::clone(&self.processor);
        self.tasks.spawn(async move { processor.deliveries.give_back(delivery).await });
    }

    /// Gives back all waiting deliveries but suspects: the store has an event that may end the process, and must hand it out
    /// alone.
    fn give_back_waiting(&self) {
        let waiting = self.shared.lanes().take_waiting();
        // The event that must run alone may be here already.
        let (suspects, others): (Vec<_>, Vec<_>) = waiting.into_iter().partition(Item::is_suspect);
        others.into_iter().for_each(|waiting| self.give_back(waiting.delivery));
        for waiting in suspects {
            let name = Arc::clone(&waiting.route.name);
            let offered = self.shared.lanes().offer(&name, waiting);
            offered.err().into_iter().for_each(|waiting| self.give_back(waiting.delivery));
        }
    }

    /// Gives back what no handler has begun, for other workers.
    async fn give_back_all(&self) {
        let waiting = self.shared.lanes().take_waiting();
        let give_back = |Waiting { delivery, .. }| self.processor.deliveries.give_back(delivery);
        let all = stream::iter(waiting).for_each_concurrent(GIVEN_BACK_AT_ONCE, give_back);
        drop(tokio::time::timeout(GIVE_BACK, all).await);
    }
}

/// The next delivery; retries as long as the store fails.
async fn next<D: Deliveries>(deliveries: &D) -> Delivery<D::Handle> {
    loop {
        match deliveries.next().await {
            Ok(delivery) => return delivery,
            Err(error) => {
                tracing::error!(%error, "cannot get events from the store");
                tokio::time::sleep(STORE_BACKOFF).await;
            }
        }
    }
}
