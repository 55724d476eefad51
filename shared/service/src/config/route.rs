//! `[[worker.routes]]`: which events a route takes, what handles them, and the worker settings that it overrides.

use super::{
    environment::Environment,
    handler::{HandlerConfig, Owner},
    is_name,
    reader::{Report, Section, duration, nearest},
};
use std::num::NonZeroU32;
use std::time::Duration;
use streamgate_core::breaker::BreakerPolicy;
use streamgate_core::event_types::{CHAT, OTHER_PRODUCTS};
use streamgate_core::pattern::Pattern;
use streamgate_core::rate::Rate;

/// Most handlers of one kind at a time.
pub(super) const MOST_HANDLERS: usize = 100_000;
/// Shortest interval between two events of a route with a rate.
const SHORTEST_INTERVAL: Duration = Duration::from_micros(10);

/// `[[worker.routes]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteConfig {
    /// Used as label and header. Default if there is one route: 1.
    pub name: String,
    /// Globs over the whole type.
    pub events: Vec<Pattern>,
    /// Only events of these apps; empty: of every app.
    pub apps: Vec<String>,
    /// Only events of channels of these types, the part of `cid` before the colon; empty: of any channel.
    pub channel_types: Vec<String>,
    pub handler: HandlerConfig,
    /// The waits between attempts; after the last one the event becomes a dead letter. Default: `worker.retry`.
    pub retry: Vec<Duration>,
    /// How long a handler may take. Default: `worker.handler_timeout`.
    pub handler_timeout: Duration,
    /// Most handlers of this route at a time. Default: `worker.concurrency`.
    pub concurrency: usize,
    /// Most events begun per unit of time, including failed attempts. Default: unlimited.
    pub rate: Option<Rate>,
    /// When calls to its service stop until a probe succeeds; `None`: never. Default: after 10 failures in a row, for 5
    /// s, then twice as long each time, 2 min at most.
    pub breaker: Option<BreakerPolicy>,
    /// Whether matching continues after it, and each further matching route gets its own copy. Default false.
    pub fan_out: bool,
}

/// The worker's settings, for a route that does not set its own.
#[derive(Clone, Debug)]
pub(super) struct RouteDefaults {
    pub(super) retry: Vec<Duration>,
    pub(super) handler_timeout: Duration,
    pub(super) concurrency: usize,
}

impl RouteConfig {
    pub(super) fn read(
        mut section: Section<'_>,
        (place, of): (usize, usize),
        defaults: &RouteDefaults,
        environment: &Environment,
    ) -> Option<RouteConfig> {
        let name = section.text("name").unwrap_or_else(|| {
            if of > 1 {
                section.problem("name", "is missing: several routes need names, by which they are parked and paused");
            }
            place.to_string()
        });
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
        let channel_types = section.texts("channel_types").unwrap_or_default();
        if channel_types.iter().any(|name| name.is_empty() || name.contains([':', '*'])) {
            section.problem(
                "channel_types",
                "takes the types of channels, like [\"messaging\"]: the part of a cid before its colon",
            );
        }
        let retry = ladder(&mut section).unwrap_or_else(|| defaults.retry.clone());
        let handler_timeout = section.duration("handler_timeout", defaults.handler_timeout);
        let concurrency = section.count("concurrency", defaults.concurrency, MOST_HANDLERS);
        let rate = section.parsed("rate", rate);
        let (breaker, fan_out) = (breaker(&mut section), section.flag("fan_out", false));
        let handler = HandlerConfig::read(&mut section, Owner::Route, environment);
        section.finish();
        Some(RouteConfig {
            name,
            events,
            apps,
            channel_types,
            handler: handler?,
            retry,
            handler_timeout,
            concurrency,
            rate,
            breaker,
            fan_out,
        })
    }
}

fn breaker(section: &mut Section<'_>) -> Option<BreakerPolicy> {
    let default = BreakerPolicy::default();
    let Some(given) = section.section_or_false("breaker") else { return Some(default) };
    let mut table = given?;
    let failures = table.count("failures", default.failures.get() as usize, 1_000_000);
    let failures = u32::try_from(failures).ok().and_then(NonZeroU32::new).unwrap_or(default.failures);
    let open = table.duration("open", default.open);
    let longest = table.duration("longest", default.longest.max(open));
    if longest < open {
        table.problem("longest", "is under open: the first wait would be over the longest; raise it, or lower open");
    }
    table.finish();
    Some(BreakerPolicy { failures, open, longest })
}

/// Parses "50/s" or "600/m".
fn rate(text: &str) -> Result<Rate, String> {
    const EXAMPLES: &str = "a number and a unit of time, like \"50/s\" or \"600/m\"";
    let invalid = || format!("invalid rate {text:?}: expected {EXAMPLES}");
    let (count, unit) = text.split_once('/').ok_or_else(invalid)?;
    let per = match unit {
        "s" => Duration::from_secs(1),
        "m" => Duration::from_secs(60),
        _ => return Err(invalid()),
    };
    let count: NonZeroU32 = count.parse().map_err(|_| invalid())?;
    let rate = Rate { count, per };
    if rate.interval() < SHORTEST_INTERVAL {
        return Err(format!("invalid rate {text:?}: expected at most 100000/s"));
    }
    Ok(rate)
}

/// The waits of a `retry` key; `None` if it is absent or wrong.
pub(super) fn ladder(section: &mut Section<'_>) -> Option<Vec<Duration>> {
    let steps: Result<_, _> = section.texts("retry")?.iter().map(|step| duration(step)).collect();
    steps.map_err(|what: String| section.problem("retry", what)).ok()
}

/// Warns about routes that get nothing, or match events that do not exist: most are slips.
pub(super) fn doubt_patterns(routes: &[RouteConfig], report: &Report) {
    for (place, route) in routes.iter().enumerate() {
        let key = format!("worker.routes[{}].events", place + 1);
        let covers_all = |others: &[String], own: &[String]| {
            others.is_empty() || (!own.is_empty() && own.iter().all(|one| others.contains(one)))
        };
        let takes_all = |other: &RouteConfig| {
            !other.fan_out
                && covers_all(&other.apps, &route.apps)
                && covers_all(&other.channel_types, &route.channel_types)
        };
        for pattern in &route.events {
            let covers = |other: &&RouteConfig| {
                takes_all(other) && other.events.iter().any(|earlier| earlier.matches(pattern.as_str()))
            };
            if let Some(earlier) = routes.iter().take(place).find(covers) {
                let what =
                    format!("has {:?}, whose events the earlier route {:?} takes", pattern.as_str(), earlier.name);
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
