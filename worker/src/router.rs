//! Which handler gets an event: the first route whose globs match its type.

use crate::handler::{Handler, raw_type};
use crate::lanes::Limits;
use std::cell::LazyCell;
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::{breaker::BreakerPolicy, envelope::Envelope, pattern::Pattern, rate::Rate, retry::Ladder};

/// A handler and the events it handles.
#[derive(Clone)]
pub struct Route {
    pub name: Arc<str>,
    pub events: Vec<Pattern>,
    /// Empty: every app.
    pub apps: Vec<String>,
    /// Empty: every type of channel.
    pub channel_types: Vec<String>,
    pub handler: Arc<dyn Handler>,
    /// `None`: the worker's ladder.
    pub ladder: Option<Ladder>,
    /// `None`: the worker's timeout.
    pub handler_timeout: Option<Duration>,
    /// Most handlers of this route at a time. `None`: the worker's `concurrency`.
    pub concurrency: Option<usize>,
    /// Most handlers that may start in a period. `None`: unlimited.
    pub rate: Option<Rate>,
    /// When to stop calling the route's service. `None`: never.
    pub breaker: Option<BreakerPolicy>,
    /// Matching goes on after this route: the next route that matches gets a copy of its own.
    pub fan_out: bool,
}

impl std::fmt::Debug for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Route").field("name", &self.name).field("events", &self.events).finish_non_exhaustive()
    }
}

impl Route {
    /// A route for events of every app and channel, with the worker's own policies.
    pub fn new(name: impl Into<Arc<str>>, events: Vec<Pattern>, handler: Arc<dyn Handler>) -> Route {
        Route {
            name: name.into(),
            events,
            apps: Vec::new(),
            channel_types: Vec::new(),
            handler,
            ladder: None,
            handler_timeout: None,
            concurrency: None,
            rate: None,
            breaker: Some(BreakerPolicy::default()),
            fan_out: false,
        }
    }

    /// The route's limits; the arguments are the worker's defaults.
    pub fn limits(&self, concurrency: usize, handler_timeout: Duration) -> Limits {
        Limits {
            concurrency: self.concurrency.unwrap_or(concurrency),
            rate: self.rate,
            handler_timeout: self.handler_timeout.unwrap_or(handler_timeout),
            breaker: self.breaker,
        }
    }

    /// `event_type` is called only where it decides, because it is read from the body.
    fn takes<'t>(&self, envelope: &Envelope, event_type: impl FnOnce() -> &'t str) -> bool {
        let channel_type = || envelope.cid.as_deref().and_then(|cid| Some(cid.split_once(':')?.0));
        (self.apps.is_empty() || self.apps.contains(&envelope.app))
            && (self.channel_types.is_empty()
                || channel_type().is_some_and(|found| self.channel_types.iter().any(|name| name == found)))
            && (self.events.iter().any(Pattern::is_everything) || {
                let event_type = event_type();
                self.events.iter().any(|pattern| pattern.matches(event_type))
            })
    }
}

/// All routes, in the order in which they are tried.
#[derive(Clone, Debug, Default)]
pub struct Router(Vec<Arc<Route>>);

/// Which routes an event belongs to.
#[derive(Clone, Debug)]
pub(crate) enum Pick {
    Route(Arc<Route>),
    /// Each of these at least two routes gets an event of its own.
    Each(Vec<Arc<Route>>),
    /// The event names a route that does not exist here.
    Unknown(String),
    /// No route takes it.
    Unmatched,
}

impl Router {
    pub fn new(routes: Vec<Route>) -> Router {
        Router(routes.into_iter().map(Arc::new).collect())
    }

    /// The names of all routes.
    pub fn names(&self) -> Vec<&str> {
        self.0.iter().map(|route| &*route.name).collect()
    }

    pub fn routes(&self) -> &[Arc<Route>] {
        &self.0
    }

    /// The pattern most similar to the event's type, if any is similar enough.
    pub(crate) fn nearest(&self, event_type: &str) -> Option<&str> {
        const LIKE: f64 = 0.8;
        let likeness = |pattern: &&str| strsim::jaro_winkler(pattern, event_type);
        let patterns = self.0.iter().flat_map(|route| &route.events).map(Pattern::as_str);
        let near = patterns.filter(|pattern| likeness(pattern) >= LIKE);
        near.max_by(|one, other| likeness(one).total_cmp(&likeness(other)))
    }

    /// An event that was parked for a route, or that failed on one before, belongs to that route alone and is never copied.
    /// `parked` names the former.
    pub(crate) fn pick(&self, envelope: &Envelope, parked: Option<&str>) -> Pick {
        if let Some(name) = parked.or(envelope.route.as_deref()) {
            let named = self.0.iter().find(|route| *route.name == *name);
            return named.map_or_else(|| Pick::Unknown(name.to_owned()), |route| Pick::Route(Arc::clone(route)));
        }
        let event_type = LazyCell::new(|| raw_type(envelope).unwrap_or_default());
        let mut taking = Vec::new();
        for route in self.0.iter().filter(|route| route.takes(envelope, || &event_type)) {
            taking.push(Arc::clone(route));
            if !route.fan_out {
                break;
            }
        }
        match taking.len() {
            0 | 1 => taking.pop().map_or(Pick::Unmatched, Pick::Route),
            _ => Pick::Each(taking),
        }
    }
}
