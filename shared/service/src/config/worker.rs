//! `[worker]` and its routes.

use super::{
    AppConfig, KIB, MIB, is_name,
    load::Environment,
    reader::{Report, Section, is_reference, nearest},
};
use crate::http_client;
use crate::secret::Secret;
use hyper::Uri;
use hyper::header::{HeaderName, HeaderValue};
use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;
use streamgate_core::event_types::{CHAT, OTHER_PRODUCTS};
use streamgate_core::pattern::Pattern;

/// What a forwarded request carries of itself: a configured header may not replace it.
const OWN_HEADERS: [&str; 12] = [
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "host",
    "te",
    "traceparent",
    "transfer-encoding",
    "x-api-key",
    "x-signature",
    "x-webhook-attempt",
    "x-webhook-id",
];

/// RabbitMQ's limit for a consumer of a quorum queue.
const MOST_UNACKED: usize = 2000;
/// RabbitMQ's default consumer_timeout.
const CONSUMER_TIMEOUT: Duration = Duration::from_secs(30 * 60);
/// The most milliseconds that x-message-ttl takes.
const LONGEST_TTL: Duration = Duration::from_millis(u32::MAX as u64);

/// `[worker]`
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// Where `worker` answers /metrics, /healthz and /readyz. Default 127.0.0.1:9465.
    pub ops_listen: SocketAddr,
    /// Most handlers at a time. Default 64.
    pub concurrency: usize,
    /// Most deliveries in hand, running or about to; at least `concurrency`. Default 256.
    pub prefetch: usize,
    /// Most bytes of bodies in hand. Default 64 MiB.
    pub memory_budget: usize,
    /// How long a handler may take. Default 30 s.
    pub handler_timeout: Duration,
    /// How long handlers may take to finish after SIGTERM. Default: that of the gateway.
    pub drain_timeout: Option<Duration>,
    /// How long a handled key is remembered. Default 24 h.
    pub claim_window: Duration,
    /// The waits between attempts, then the dead letters. Default 1s, 5s, 30s, 2m, 10m, 1h.
    pub retry: Vec<Duration>,
    /// What becomes of an event that no route matches, where there are routes. Default `ack`.
    pub unmatched: Unmatched,
    /// First match wins. Without any, events are logged and acknowledged.
    pub routes: Vec<RouteConfig>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmatched {
    Ack,
    Dead,
}

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

/// `forward = { url, timeout, headers, ca }`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardConfig {
    pub url: Uri,
    /// From connecting to the answer; `handler_timeout` cuts a longer one short. Default 10 s.
    pub timeout: Duration,
    /// Whether the configuration says so itself.
    pub(super) timeout_is_given: bool,
    /// Sent with each request. The values may be secrets.
    pub headers: Vec<(HeaderName, Secret)>,
    /// A PEM file of certificate authorities to trust beside the system's: what it holds.
    pub ca: Option<String>,
}

impl WorkerConfig {
    pub(super) fn read(mut section: Section<'_>, environment: &Environment) -> WorkerConfig {
        let retry =
            section.texts("retry").map(|steps| steps.iter().map(|step| super::reader::duration(step)).collect());
        let retry = match retry.transpose() {
            Ok(steps) => steps.unwrap_or_else(default_ladder),
            Err(what) => {
                section.problem("retry", what);
                default_ladder()
            }
        };
        let unmatched = section.parsed("unmatched", |text| match text {
            "ack" => Ok(Unmatched::Ack),
            "dead" => Ok(Unmatched::Dead),
            other => Err(format!("{other:?} is neither \"ack\" nor \"dead\"")),
        });
        let routes = section.sections("routes").into_iter().enumerate();
        let routes = routes.filter_map(|(place, route)| RouteConfig::read(route, place + 1, environment)).collect();
        let config = WorkerConfig {
            ops_listen: super::address(&mut section, "ops_listen", ([127, 0, 0, 1], 9465)),
            concurrency: section.count("concurrency", 64, 100_000),
            prefetch: section.count("prefetch", 256, 2000),
            memory_budget: section.size("memory_budget", 64 * MIB),
            handler_timeout: section.duration("handler_timeout", Duration::from_secs(30)),
            drain_timeout: section.parsed("drain_timeout", super::reader::duration),
            claim_window: section.duration("claim_window", Duration::from_secs(24 * 3600)),
            unmatched: unmatched.unwrap_or(Unmatched::Ack),
            retry,
            routes,
        };
        section.finish();
        config
    }
}

impl WorkerConfig {
    /// What RabbitMQ may hand out before the first is settled. The last of the prefetched waits for all before it, so where
    /// handlers may be slow and few there are fewer of them: RabbitMQ takes back what is not settled in 30 minutes.
    pub fn broker_prefetch(&self) -> u16 {
        let rounds = (CONSUMER_TIMEOUT / 2).as_millis() / self.handler_timeout.as_millis().max(1);
        let in_time = self.concurrency.saturating_mul(usize::try_from(rounds).unwrap_or(usize::MAX));
        let prefetch = self.prefetch.min(in_time).max(self.concurrency).min(MOST_UNACKED);
        u16::try_from(prefetch).unwrap_or(u16::MAX)
    }
}

fn default_ladder() -> Vec<Duration> {
    [1, 5, 30, 120, 600, 3600].map(Duration::from_secs).to_vec()
}

impl RouteConfig {
    fn read(mut section: Section<'_>, place: usize, environment: &Environment) -> Option<RouteConfig> {
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

impl ForwardConfig {
    /// `places`: what its URL may have in braces.
    pub(super) fn read(mut section: Section<'_>, environment: &Environment, places: &[&str]) -> Option<ForwardConfig> {
        let url = section.reference("url").map(|text| match environment.route_secret(&text) {
            // Left unread, on a gateway.
            Ok(url) if url.expose().is_empty() => Ok(Uri::from_static(UNREAD)),
            Ok(url) => {
                url_doubt(url.expose()).into_iter().for_each(|doubt| section.doubt("url", doubt));
                forward_url(url.expose(), places)
            }
            Err(what) => Err(what),
        });
        let url = match url {
            Some(Ok(url)) => Some(url),
            Some(Err(what)) => {
                section.problem("url", what);
                None
            }
            None => {
                section.problem("url", "is missing: say where to forward");
                None
            }
        };
        let timeout = section.duration("timeout", Duration::from_secs(10));
        let timeout_is_given = section.was_given("timeout");
        let mut headers = Vec::new();
        for (name, text) in section.text_table("headers") {
            match forward_header(&name, &text, environment) {
                Ok(header) => headers.push(header),
                Err(what) => section.problem(&format!("headers.{name}"), what),
            }
        }
        let ca = section.text("ca").and_then(|path| match authorities(&path, environment) {
            Ok(pem) => Some(pem),
            Err(what) => {
                section.problem("ca", what);
                None
            }
        });
        let is_plain = url.as_ref().is_some_and(|url| url.scheme_str() == Some("http") && *url != UNREAD);
        if is_plain && section.was_given("ca") {
            section.doubt("ca", "goes with an https:// URL: there is no TLS with http://");
        }
        section.finish();
        Some(ForwardConfig { url: url?, timeout, timeout_is_given, headers, ca: ca.filter(|pem| !pem.is_empty()) })
    }
}

fn forward_header(name: &str, text: &str, environment: &Environment) -> Result<(HeaderName, Secret), String> {
    let name: HeaderName = name.parse().map_err(|_| "is no name for a header".to_owned())?;
    if OWN_HEADERS.contains(&name.as_str()) || name.as_str().starts_with("x-streamgate-") {
        return Err("is set by Streamgate itself".to_owned());
    }
    let value = environment.route_secret(text)?;
    let shown = value.expose();
    if shown.split_whitespace().skip(usize::from(!shown.starts_with(char::is_whitespace))).any(is_reference) {
        return Err("has a reference within a text, which would be sent as it stands: put the whole value into the variable or file".into());
    }
    if shown.trim() != shown {
        return Err("has white space around it".to_owned());
    }
    HeaderValue::from_str(value.expose()).map_err(|_| "has a value that no header can carry".to_owned())?;
    Ok((name, value))
}

/// Stands for a URL that is not read because nothing is forwarded here.
const UNREAD: &str = "http://unread.invalid/";

/// What a file of authorities holds; nothing where it is not read, on a gateway.
fn authorities(path: &str, environment: &Environment) -> Result<String, String> {
    let pem = environment.route_secret(&format!("file:{path}"))?.expose().to_owned();
    if !pem.is_empty() {
        http_client::authorities(pem.as_bytes()).map_err(|error| format!("names the file {path}, which {error}"))?;
    }
    Ok(pem)
}

/// A place in braces, where it is one: what is not closed may be anything.
fn shown(place: &str) -> &str {
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let name = place.strip_prefix('{').and_then(|place| place.strip_suffix('}'));
    if name.is_some_and(|name| name.len() <= 32 && name.bytes().all(is_name)) { place } else { "a brace" }
}

/// What is sent otherwise than it was probably meant.
fn url_doubt(text: &str) -> Option<&'static str> {
    let is_escape = |rest: &str| rest.bytes().take(2).filter(u8::is_ascii_hexdigit).count() == 2;
    if text.contains('#') {
        return Some("has a fragment, #…, which is never sent: write a # that is meant as such as %23");
    }
    let are_escapes = text.split('%').skip(1).all(is_escape);
    (!are_escapes).then_some("has a % without two hex digits behind it: write a % that is meant as such as %25")
}

fn forward_url(text: &str, places: &[&str]) -> Result<Uri, String> {
    if !text.is_ascii() {
        return Err("takes ASCII only: write what else there is in a path as %XX, in a host as xn--…".to_owned());
    }
    let url: Uri =
        text.parse().map_err(|_| "is no URL; write it like http://127.0.0.1:3000/webhooks/stream".to_owned())?;
    for place in
        text.split('{').skip(1).map(|rest| format!("{{{}", rest.split_inclusive('}').next().unwrap_or_default()))
    {
        if !places.contains(&&*place) {
            let known = match places {
                [] => "nothing is filled in here".to_owned(),
                places => format!("there is {}", places.join(", ")),
            };
            return Err(format!(
                "has {}, and {known}; write a brace that is meant as such as %7B or %7D",
                shown(&place)
            ));
        }
    }
    let scheme = url.scheme_str();
    if !matches!(scheme, Some("http" | "https")) || url.host().is_none_or(str::is_empty) {
        return Err("takes an http:// or https:// URL with a host".to_owned());
    }
    if url.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err("takes no user and password; send them in headers = { Authorization = \"env:…\" }".to_owned());
    }
    url.authority().map_or(Ok(()), |authority| super::url_port(authority.as_str()))?;
    Ok(url)
}

pub(super) fn cross_check(worker: &WorkerConfig, apps: &[AppConfig], report: &Report) {
    if worker.memory_budget < 64 * KIB {
        report.problem("worker.memory_budget", "must be at least 64KiB");
    }
    doubt_patterns(&worker.routes, report);
    let mut names = HashSet::new();
    for (place, route) in worker.routes.iter().enumerate() {
        let path = |key: &str| format!("worker.routes[{}].{key}", place + 1);
        if !names.insert(&route.name) {
            report.problem(path("name"), format!("{:?} is the name of an earlier route", route.name));
        }
        if route.forward.timeout_is_given && route.forward.timeout > worker.handler_timeout {
            report.doubt(path("forward.timeout"), "is over worker.handler_timeout, which cuts it short");
        }
        for app in route.apps.iter().filter(|name| !apps.is_empty() && apps.iter().all(|app| app.name != **name)) {
            report.problem(path("apps"), format!("there is no app {app:?}"));
        }
    }
}

/// Routes that get nothing, or wait for events that do not come: most are slips.
fn doubt_patterns(routes: &[RouteConfig], report: &Report) {
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

/// What RabbitMQ does not do.
pub(super) fn cross_check_broker(worker: &WorkerConfig, report: &Report) {
    if worker.concurrency > MOST_UNACKED {
        report.problem("worker.concurrency", format!("must be at most {MOST_UNACKED} with RabbitMQ: run more workers"));
    }
    if worker.handler_timeout >= CONSUMER_TIMEOUT / 2 {
        report.problem("worker.handler_timeout", "must be under 15m with RabbitMQ: at 30m it takes a delivery back");
    }
    for step in worker.retry.iter().filter(|step| **step > LONGEST_TTL) {
        report.problem("worker.retry", format!("{} is over RabbitMQ's 49 days", humantime::format_duration(*step)));
    }
}
