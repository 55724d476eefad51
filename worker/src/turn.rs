//! A delivery's turn: it waits in its route's lane, then holds a place there while its handler runs.

use crate::lanes::{Item, Lanes, Room};
use crate::router::Route;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use streamgate_core::breaker::{Change, Health, Probe};
use streamgate_core::duration::rounded;
use streamgate_core::ports::{Delivery, Handle};
use streamgate_core::retry::Precaution;
use tokio::sync::Notify;

/// A delivery that waits for its turn.
#[derive(Debug)]
pub(crate) struct Waiting<H> {
    pub(crate) delivery: Delivery<H>,
    pub(crate) route: Arc<Route>,
}

impl<H: Handle> Item for Waiting<H> {
    fn bytes(&self) -> usize {
        self.delivery.envelope.body.len()
    }

    fn is_parked(&self) -> bool {
        self.delivery.parked.is_some()
    }

    fn is_suspect(&self) -> bool {
        Precaution::of(self.delivery.abandoned) != Precaution::None
    }

    fn is_live(&self) -> bool {
        self.delivery.is_live()
    }
}

/// The lanes, shared with the handlers that run.
#[derive(Debug)]
pub(crate) struct Shared<H> {
    lanes: Mutex<Lanes<Waiting<H>>>,
    /// Notified when a handler ends that others wait for, and when a breaker changes.
    pub(crate) freed: Notify,
}

impl<H: Handle> Shared<H> {
    pub(crate) fn new(room: Room) -> Shared<H> {
        Shared { lanes: Mutex::new(Lanes::new(room)), freed: Notify::new() }
    }

    pub(crate) fn lanes(&self) -> MutexGuard<'_, Lanes<Waiting<H>>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in a lane, held while a handler runs.
pub(crate) struct Turn<H: Handle> {
    pub(crate) shared: Arc<Shared<H>>,
    pub(crate) route: Arc<str>,
    /// Length of the event's body.
    pub(crate) bytes: usize,
    /// `None` once the probe is judged.
    pub(crate) probe: Option<Probe>,
}

impl<H: Handle> Turn<H> {
    /// Reports what the attempt says about the route's service.
    pub(crate) fn judged(&mut self, health: Health) {
        let probe = self.probe.take();
        let change = self.shared.lanes().judged(&self.route, probe, health, Instant::now());
        let Some(change) = change else {
            // After a probe that did not reach the service, the next one may start at once. Other attempts have changed nothing.
            return if probe.is_some() {
                self.shared.freed.notify_one()
            };
        };
        let route = &*self.route;
        match change {
            Change::Opened { wait } => tracing::warn!(
                route,
                next_attempt_in = ?rounded(wait),
                "the route's breaker is open: its service failed too many times in a row, so its events are parked"
            ),
            Change::StillOpen { wait } => {
                tracing::warn!(route, next_attempt_in = ?rounded(wait), "the route's service still fails: its events stay parked");
            }
            Change::Closed => tracing::info!(route, "the route runs again: its service answers"),
        }
        self.shared.freed.notify_one();
    }
}

impl<H: Handle> Drop for Turn<H> {
    fn drop(&mut self) {
        // The service was not called, or the attempt was cut off.
        if self.probe.is_some() {
            self.judged(Health::Unknown);
        }
        if self.shared.lanes().ended(&self.route, self.bytes) {
            self.shared.freed.notify_one();
        }
    }
}
