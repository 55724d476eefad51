//! What `status` knows, and what of it needs a person: a pure decision.

use crate::dead::Cause;
use serde::Serialize;
use std::collections::BTreeSet;
use std::time::Duration;
use streamgate_core::instance::{Instance, Role};

/// A spooled event of this age needs a person: a hand-over takes seconds.
const SPOOLED_TOO_LONG: i64 = 60;

/// As scripts see it.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Whether nothing needs a person.
    pub(super) ok: bool,
    /// What needs a person, the most urgent first.
    pub(super) attention: Vec<Need>,
    pub(super) servers: Vec<Server>,
    pub(super) instances: Known<Vec<Instance>>,
    pub(super) queues: Known<Vec<Queue>>,
    pub(super) routes: Known<Vec<RouteState>>,
    pub(super) dead_letters: Known<DeadLetters>,
}

/// Something that needs a person, with the command that helps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Need {
    pub(super) what: String,
    pub(super) command: Option<String>,
}

/// A part of the report, or why it is not known.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Known<T> {
    Yes(T),
    No { error: String },
}

impl<T> Known<T> {
    pub(super) fn of(result: Result<T, String>) -> Known<T> {
        match result {
            Ok(value) => Known::Yes(value),
            Err(error) => Known::No { error },
        }
    }

    fn as_ref(&self) -> Option<&T> {
        match self {
            Known::Yes(value) => Some(value),
            Known::No { .. } => None,
        }
    }
}

/// RabbitMQ, Redis, or the embedded store.
#[derive(Debug, Serialize)]
pub(super) struct Server {
    pub(super) name: &'static str,
    pub(super) at: String,
    /// Why it cannot be used, as seen from here.
    pub(super) error: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Queue {
    pub(super) name: String,
    pub(super) kind: QueueKind,
    pub(super) messages: u64,
    /// `None` in the embedded store.
    pub(super) consumers: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum QueueKind {
    Waiting,
    Retrying,
    Parked,
    Dead,
    Unrouted,
    Calls,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct RouteState {
    pub(super) name: String,
    /// `running` or `paused`.
    pub(super) state: &'static str,
    pub(super) since: Option<String>,
    pub(super) by: Option<String>,
    pub(super) why: Option<String>,
    /// `None` if it is not known.
    pub(super) parked: Option<u64>,
    /// The instances whose breaker for this route is open.
    pub(super) open_in: Vec<String>,
    /// Whether the route is in the configuration.
    pub(super) configured: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct DeadLetters {
    pub(super) count: u64,
    /// `None` if there are too many to read them all.
    pub(super) causes: Option<Vec<Cause>>,
}

impl Report {
    /// Fills in what needs a person.
    pub(super) fn judged(mut self, roles: &[Role]) -> Report {
        let mut needs = Vec::new();
        needs.extend(self.servers.iter().filter_map(Server::need));
        if let Some(instances) = self.instances.as_ref() {
            missing(roles, instances, &mut needs);
            instances.iter().for_each(|instance| of_instance(instance, &mut needs));
            of_versions(instances, &mut needs);
        }
        self.queues.as_ref().into_iter().flatten().for_each(|queue| of_queue(queue, &mut needs));
        self.routes.as_ref().into_iter().flatten().for_each(|route| of_route(route, &mut needs));
        if let Some(dead) = self.dead_letters.as_ref().filter(|dead| dead.count > 0) {
            let what = format!("{} dead letters wait to be replayed or dropped", dead.count);
            needs.push(Need { what, command: Some("streamgate dead list --group".into()) });
        }
        (self.ok, self.attention) = (needs.is_empty(), needs);
        self
    }
}

impl Server {
    fn need(&self) -> Option<Need> {
        let error = self.error.as_ref()?;
        let what = format!("{} cannot be used from here: {error}", self.name);
        Some(Need { what, command: Some("streamgate check".into()) })
    }
}

fn missing(roles: &[Role], instances: &[Instance], needs: &mut Vec<Need>) {
    for role in roles.iter().filter(|role| instances.iter().all(|instance| instance.role != **role)) {
        let what = format!("no `streamgate {}` runs", role.as_str());
        needs.push(Need { what, command: Some(format!("streamgate {}", role.as_str())) });
    }
}

fn of_instance(instance: &Instance, needs: &mut Vec<Need>) {
    let name = short(instance);
    if let Some(trouble) = &instance.trouble {
        let what = if instance.ready { "is impaired" } else { "is not ready" };
        needs.push(Need { what: format!("{name} {what}: {trouble}"), command: None });
    }
    if let Some(spool) = instance.spool.filter(|spool| spool.events > 0 && spool.oldest_seconds >= SPOOLED_TOO_LONG) {
        let age = Duration::from_secs(spool.oldest_seconds.unsigned_abs());
        let what = format!("{} events wait in the spool of {name}, the oldest for {age:?}", spool.events);
        needs.push(Need { what, command: None });
    }
}

fn of_versions(instances: &[Instance], needs: &mut Vec<Need>) {
    let versions: BTreeSet<&str> = instances.iter().map(|instance| instance.version.as_str()).collect();
    if versions.len() > 1 {
        let versions = versions.into_iter().collect::<Vec<_>>().join(", ");
        needs.push(Need { what: format!("processes of several versions run: {versions}"), command: None });
    }
}

fn of_queue(queue: &Queue, needs: &mut Vec<Need>) {
    match queue.kind {
        QueueKind::Waiting if queue.messages > 0 && queue.consumers == Some(0) => {
            let what = format!("{} events wait, and no worker takes any", queue.messages);
            needs.push(Need { what, command: Some("streamgate worker".into()) });
        }
        QueueKind::Unrouted if queue.messages > 0 => {
            let what = format!("{} messages had no queue to go to: a queue or a binding is missing", queue.messages);
            needs.push(Need { what, command: Some("streamgate check".into()) });
        }
        QueueKind::Waiting
        | QueueKind::Retrying
        | QueueKind::Parked
        | QueueKind::Dead
        | QueueKind::Unrouted
        | QueueKind::Calls => {}
    }
}

fn of_route(route: &RouteState, needs: &mut Vec<Need>) {
    let name = &route.name;
    if route.state == "paused" {
        let by = route.by.as_deref().unwrap_or("somebody");
        let why = route.why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        let since = route.since.as_ref().map(|since| format!(" since {since}")).unwrap_or_default();
        let what = format!("the route {name} is paused by {by}{since}{why}");
        needs.push(Need { what, command: Some(format!("streamgate route resume {name}")) });
    }
    if !route.open_in.is_empty() {
        let what = format!("the service of the route {name} fails, as seen by {}", route.open_in.join(", "));
        needs.push(Need { what, command: None });
    }
    if let Some(events) = route.parked.filter(|events| *events > 0 && !route.configured) {
        let what = format!("{events} events are parked for the route {name}, which is not in the configuration");
        needs.push(Need { what, command: Some(format!("streamgate dead replay --queue parked.{name} --all")) });
    }
}

/// How a person names an instance.
pub(super) fn short(instance: &Instance) -> String {
    format!("{}@{}:{}", instance.role.as_str(), instance.host, instance.pid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use streamgate_core::instance::SpoolUse;

    fn instance(role: Role) -> Instance {
        Instance {
            id: format!("{}@one:7:1", role.as_str()),
            role,
            host: "one".into(),
            pid: 7,
            version: "0.1.0".into(),
            started_at_ms: 0,
            ready: true,
            trouble: None,
            in_hand: 0,
            spool: None,
            open_routes: Vec::new(),
        }
    }

    fn route(name: &str) -> RouteState {
        let (since, by, why) = (None, None, None);
        let (parked, open_in) = (Some(0), Vec::new());
        RouteState { name: name.into(), state: "running", since, by, why, parked, open_in, configured: true }
    }

    fn healthy() -> Report {
        Report {
            ok: false,
            attention: Vec::new(),
            servers: vec![Server { name: "Redis", at: "127.0.0.1:6379".into(), error: None }],
            instances: Known::Yes(vec![instance(Role::Gateway), instance(Role::Worker)]),
            queues: Known::Yes(vec![queue(QueueKind::Waiting, 5, 2), queue(QueueKind::Retrying, 3, 0)]),
            routes: Known::Yes(vec![route("app")]),
            dead_letters: Known::Yes(DeadLetters { count: 0, causes: Some(Vec::new()) }),
        }
    }

    fn queue(kind: QueueKind, messages: u64, consumers: u32) -> Queue {
        Queue { name: "q".into(), kind, messages, consumers: Some(consumers) }
    }

    const ROLES: [Role; 2] = [Role::Gateway, Role::Worker];

    #[test]
    fn a_healthy_system_needs_nobody_and_an_unknown_part_is_not_healthy_by_itself() {
        let report = healthy().judged(&ROLES);
        assert!(report.ok && report.attention.is_empty(), "{:?}", report.attention);
    }

    #[test]
    fn a_table_of_what_needs_a_person() {
        type Break = fn(&mut Report);
        let table: [(Break, &str, Option<&str>); 9] = [
            (
                |report| report.servers[0].error = Some("away".into()),
                "Redis cannot be used from here: away",
                Some("streamgate check"),
            ),
            (
                |report| report.instances = Known::Yes(vec![instance(Role::Gateway)]),
                "no `streamgate worker` runs",
                Some("streamgate worker"),
            ),
            (
                |report| {
                    let gone = Instance { ready: false, trouble: Some("draining".into()), ..instance(Role::Worker) };
                    report.instances = Known::Yes(vec![instance(Role::Gateway), gone]);
                },
                "worker@one:7 is not ready: draining",
                None,
            ),
            (
                |report| {
                    let spool = Some(SpoolUse { events: 9, bytes: 1, oldest_seconds: 90 });
                    let full = Instance { spool, ..instance(Role::Gateway) };
                    report.instances = Known::Yes(vec![full, instance(Role::Worker)]);
                },
                "9 events wait in the spool of gateway@one:7, the oldest for 90s",
                None,
            ),
            (
                |report| report.queues = Known::Yes(vec![queue(QueueKind::Waiting, 5, 0)]),
                "5 events wait, and no worker takes any",
                Some("streamgate worker"),
            ),
            (
                |report| report.queues = Known::Yes(vec![queue(QueueKind::Unrouted, 1, 0)]),
                "1 messages had no queue to go to: a queue or a binding is missing",
                Some("streamgate check"),
            ),
            (
                |report| {
                    let (by, why) = (Some("ann".into()), Some("deploying".into()));
                    report.routes = Known::Yes(vec![RouteState { state: "paused", by, why, ..route("app") }]);
                },
                "the route app is paused by ann: deploying",
                Some("streamgate route resume app"),
            ),
            (
                |report| {
                    report.routes = Known::Yes(vec![RouteState { parked: Some(4), configured: false, ..route("old") }])
                },
                "4 events are parked for the route old, which is not in the configuration",
                Some("streamgate dead replay --queue parked.old --all"),
            ),
            (
                |report| report.dead_letters = Known::Yes(DeadLetters { count: 2, causes: None }),
                "2 dead letters wait to be replayed or dropped",
                Some("streamgate dead list --group"),
            ),
        ];
        for (make, what, command) in table {
            let mut report = healthy();
            make(&mut report);
            let report = report.judged(&ROLES);
            let expected = Need { what: what.into(), command: command.map(str::to_owned) };
            assert!(!report.ok);
            assert_eq!(report.attention, [expected]);
        }
    }
}
