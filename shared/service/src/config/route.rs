//! `[[worker.routes]]`.

use super::{
    ForwardConfig, is_name,
    load::Environment,
    reader::{Report, Section, nearest},
};
use streamgate_core::event_types::{CHAT, OTHER_PRODUCTS};
use streamgate_core::pattern::Pattern;

/// `[[worker.routes]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteConfig {
    /// Label and header. Default: its place, from 1.
    pub name: String,
    /// Globs over the whole type.
    pub events: Vec<Pattern>,
    /// Only events of these apps; empty: of every app.
    pub apps: Vec<String>,
    pub forward: ForwardConfig,
}

impl RouteConfig {
    pub(super) fn read(mut section: Section<'_>, place: usize, environment: &Environment) -> Option<RouteConfig> {
        let name = section.text("name").unwrap_or_else(|| place.to_string());
        if !is_name(&name) {
            section.problem("name", super::NAME);
        }
        let patterns: Result<Vec<_>, _> =
            section.texts("events").unwrap_or_default().iter().map(|text| Pattern::parse(text)).collect();
        let events = patterns.unwrap_or_else(|error| {
            section.problem("events", error.to_string());
            vec![]
        });
        if events.is_empty() {
            section.problem("events", "takes a list of globs over the event's type; [\"*\"] is every event");
        }
        let apps = section.texts("apps").unwrap_or_default();
        let forward = section.section("forward");
        if forward.is_none() {
            section.problem(
                "forward",
                "is missing: say where to, forward = { url = \"http://127.0.0.1:3000/webhooks/stream\" }",
            );
        }
        section.finish();
        Some(RouteConfig { name, events, apps, forward: ForwardConfig::read(forward?, environment, &[])? })
    }
}

/// Routes that get nothing, or wait for events that do not come: most are slips.
pub(super) fn doubt_patterns(routes: &[RouteConfig], report: &Report) {
    for (place, route) in routes.iter().enumerate() {
        let key = format!("worker.routes[{}].events", place + 1);
        let takes_all_apps = |other: &RouteConfig| {
            other.apps.is_empty() || (!route.apps.is_empty() && route.apps.iter().all(|app| other.apps.contains(app)))
        };
        for pattern in &route.events {
            let covers = |other: &&RouteConfig| {
                takes_all_apps(other) && other.events.iter().any(|earlier| earlier.matches(pattern.as_str()))
            };
            if let Some(earlier) = routes.iter().take(place).find(covers) {
                let what =
                    format!("has {:?}, whose events the route {:?} takes before", pattern.as_str(), earlier.name);
                report.doubt(&key, what);
            }
            let is_streams = CHAT.iter().any(|known| pattern.matches(known))
                || OTHER_PRODUCTS.iter().any(|start| pattern.as_str().starts_with(start));
            if !is_streams {
                let meant = nearest(pattern.as_str(), CHAT.into_iter());
                let meant = meant.map(|meant| format!(", did you mean {meant:?}?")).unwrap_or_default();
                let what = format!(
                    "has {:?}, which no event of Stream's matches{meant} (it may be a custom event)",
                    pattern.as_str()
                );
                report.doubt(&key, what);
            }
        }
    }
}
