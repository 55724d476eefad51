//! Which handler gets an event: the first route whose globs match its type.

use crate::handler::{Handler, raw_type};
use std::cell::LazyCell;
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::{envelope::Envelope, pattern::Pattern, retry::Ladder};

/// A handler and the events that it is for.
#[derive(Clone)]
pub struct Route {
    pub name: Arc<str>,
    pub events: Vec<Pattern>,
    /// Empty: every app.
    pub apps: Vec<String>,
    /// Empty: whatever the channel.
    pub channel_types: Vec<String>,
    pub handler: Arc<dyn Handler>,
    /// None: that of the worker.
    pub ladder: Option<Ladder>,
    /// None: that of the worker.
    pub handler_timeout: Option<Duration>,
}

impl std::fmt::Debug for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Route").field("name", &self.name).field("events", &self.events).finish_non_exhaustive()
    }
}

impl Route {
    /// For events of every app and channel, with the worker's own ladder and timeout.
    pub fn new(name: impl Into<Arc<str>>, events: Vec<Pattern>, handler: Arc<dyn Handler>) -> Route {
        let (apps, channel_types) = (Vec::new(), Vec::new());
        Route { name: name.into(), events, apps, channel_types, handler, ladder: None, handler_timeout: None }
    }

    /// `event_type`: asked only where it decides, for it is read from the body.
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
pub struct Router(Vec<Route>);

impl Router {
    pub fn new(routes: Vec<Route>) -> Router {
        Router(routes)
    }

    /// The names of all routes.
    pub fn names(&self) -> Vec<&str> {
        self.0.iter().map(|route| &*route.name).collect()
    }

    /// The pattern that an event's type comes near to, the nearest first.
    pub(crate) fn nearest(&self, event_type: &str) -> Option<&str> {
        const LIKE: f64 = 0.8;
        let likeness = |pattern: &&str| strsim::jaro_winkler(pattern, event_type);
        let patterns = self.0.iter().flat_map(|route| &route.events).map(Pattern::as_str);
        let near = patterns.filter(|pattern| likeness(pattern) >= LIKE);
        near.max_by(|one, other| likeness(one).total_cmp(&likeness(other)))
    }

    /// A retried or replayed event goes back to the route that it failed on, as long as there is one of that name.
    pub fn pick(&self, envelope: &Envelope) -> Option<&Route> {
        let named = envelope.route.as_deref().and_then(|name| self.0.iter().find(|route| *route.name == *name));
        named.or_else(|| {
            let event_type = LazyCell::new(|| raw_type(envelope).unwrap_or_default());
            self.0.iter().find(|route| route.takes(envelope, || &event_type))
        })
    }
}
