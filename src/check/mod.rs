//! `streamgate check`: checks the configuration, then everything it names.

mod handlers;
mod parked;
mod policies;

use crate::backends::rabbitmq::Servers;
use crate::backends::rabbitmq::for_services;
use crate::connect::{self, Drift, STREAM_URL};
use crate::global::Global;
use crate::{exit, output, wiring};
use clap::{Args, ValueEnum};
use rustix::fs::{Access, access};
use serde::Serialize;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use streamgate_gateway::{doubt_tls, inspect_tls};
use streamgate_service::config::reader::Problem;
use streamgate_service::config::{Config, ConfigError, Loaded, Source, StoreKind, TlsConfig, log_doubts};
use streamgate_store::rabbitmq::{self, Inspection};
use streamgate_store::redis;
use streamgate_store::sqlite::{self, OpenError};
use streamgate_worker::Hooks;

#[derive(Debug, Args)]
pub struct Check {
    /// Check what this service needs, as seen from its host; without it, everything in the configuration
    #[arg(value_enum)]
    role: Option<Role>,
    /// Do not connect to the services that events and hooks are forwarded to
    #[arg(long)]
    offline: bool,
    /// Also ask Stream whether each app's settings still fit: hooks that deliver here, events that routes wait for,
    /// deadlines
    #[arg(long)]
    stream: bool,
    /// With --stream: the base URL under which Stream reaches this gateway [default: any gateway that the settings lead
    /// to]
    #[arg(long, value_name = "URL", requires = "stream")]
    url: Option<String>,
    /// Stream's API, for --stream
    #[arg(long, value_name = "URL", default_value = STREAM_URL)]
    stream_url: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Role {
    Up,
    Gateway,
    Worker,
}

/// The result of one check.
#[derive(Debug, Serialize)]
struct Finding {
    what: String,
    ok: bool,
    /// Nothing wrong was found from here, but something may be.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    warning: bool,
    detail: String,
    /// The line in the configuration file, if it is about a key.
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<usize>,
}

impl From<Problem> for Finding {
    fn from(Problem { key, what, line }: Problem) -> Finding {
        Finding { line, ..Finding::new(key, Err(what)) }
    }
}

impl Finding {
    fn new(what: impl Into<String>, result: Result<String, String>) -> Finding {
        let ok = result.is_ok();
        Finding { what: what.into(), ok, warning: false, detail: result.unwrap_or_else(|error| error), line: None }
    }

    fn warning(what: &str, detail: String) -> Finding {
        Finding { warning: true, ..Finding::new(what, Ok(detail)) }
    }

    fn verdict(&self) -> &'static str {
        match (self.ok, self.warning) {
            (true, false) => "ok",
            (true, true) => "warn",
            (false, _) => "FAIL",
        }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    ok: bool,
    checks: Vec<Finding>,
}

pub async fn command(global: &Global, args: &Check) -> anyhow::Result<ExitCode> {
    let (checks, code) = match load(global, args.role).and_then(with_backends) {
        Ok((loaded, backends)) => {
            let place =
                loaded.path.as_ref().map_or_else(|| "defaults, no file".to_owned(), |path| path.display().to_string());
            let mut checks = vec![Finding::new("configuration", Ok(place))];
            checks.extend(loaded.doubts.into_iter().map(doubtful));
            checks.extend(named(&loaded.config, backends, args).await);
            if args.stream {
                checks.extend(stream(&loaded.config, args).await);
            }
            let ok = checks.iter().all(|check| check.ok);
            (checks, if ok { 0 } else { exit::FAILED })
        }
        Err(ConfigError::Invalid { problems, doubts, .. }) if args.json => {
            let mistakes = problems.into_iter().map(Finding::from);
            (mistakes.chain(doubts.into_iter().map(doubtful)).collect(), exit::USAGE)
        }
        Err(error @ ConfigError::Invalid { .. }) => {
            if let ConfigError::Invalid { doubts, .. } = &error {
                log_doubts(doubts);
            }
            return Err(error.into());
        }
        Err(error) if args.json => (vec![Finding::new("configuration", Err(error.to_string()))], exit::USAGE),
        Err(error) => return Err(error.into()),
    };
    let report = Report { ok: code == 0, checks };
    if args.json {
        output::line(serde_json::to_string(&report)?)?;
    } else {
        for finding in &report.checks {
            let line = finding.line.map(|line| format!("line {line}: ")).unwrap_or_default();
            output::line(format!("{:<5} {line}{}: {}", finding.verdict(), finding.what, finding.detail))?;
        }
    }
    Ok(ExitCode::from(code))
}

/// A setting that works and is probably not what was meant.
fn doubtful(doubt: Problem) -> Finding {
    Finding { ok: true, warning: true, ..Finding::from(doubt) }
}

/// Loads the configuration as the service of this role does: a worker's host has none of Stream's secrets, a gateway's
/// none of the services'.
fn load(global: &Global, role: Option<Role>) -> Result<Loaded, ConfigError> {
    let source = global.source();
    let environment = match role {
        Some(Role::Gateway) => source.environment.without_route_secrets(),
        Some(Role::Worker) => source.environment.without_app_secrets(),
        Some(Role::Up) | None => source.environment,
    };
    let loaded = global.load_quietly(&Source { environment, file: source.file })?;
    match role {
        Some(Role::Gateway | Role::Worker) => for_services(loaded),
        Some(Role::Up) => {
            let names_backends = loaded.config.store.kind == StoreKind::RabbitMq;
            let mut loaded = loaded.for_one_process()?;
            let what = "and [redis] are for `gateway` and `worker`: `up` connects to neither";
            loaded.doubts.extend(names_backends.then(|| Problem::new("rabbitmq", what)));
            Ok(loaded)
        }
        None => Ok(loaded),
    }
}

/// Reads the backends' addresses, where the configuration names backends.
fn with_backends(loaded: Loaded) -> Result<(Loaded, Option<Servers>), ConfigError> {
    let backends = match loaded.config.store.kind {
        StoreKind::RabbitMq => Some(Servers::of(&loaded)?),
        StoreKind::Embedded => None,
    };
    Ok((loaded, backends))
}

async fn named(config: &Config, backends: Option<Servers>, args: &Check) -> Vec<Finding> {
    let mut checks = Vec::new();
    match args.role {
        Some(Role::Worker) => {}
        Some(Role::Gateway) if config.apps.is_empty() => {
            let what = "none is configured: add [[apps]], or set STREAM_API_KEY and STREAM_API_SECRET";
            checks.push(Finding::new("apps", Err(what.to_owned())));
        }
        Some(Role::Gateway | Role::Up) | None => checks.push(Finding::new("apps", Ok(apps(config)))),
    }
    if args.role == Some(Role::Gateway) {
        checks.push(Finding::new("store", store(config)));
    }
    let hooks = wiring::hooks(config, Hooks::default());
    match backends {
        Some(backends) => {
            let answers = hooks.as_ref().is_ok_and(|hooks| !hooks.is_empty());
            checks.extend(services(config, backends, answers).await);
            if args.role != Some(Role::Gateway) && checks.iter().all(|check| check.ok) {
                checks.extend(parked::look(config).await);
            }
        }
        None => {
            checks.push(Finding::new("store", store(config)));
            checks.extend(parked::look(config).await);
        }
    }
    if args.role != Some(Role::Worker) && config.gateway.listen.port() == 0 {
        let what = "has port 0, a different port at each start: Stream needs a fixed address";
        checks.push(Finding::warning("gateway.listen", what.to_owned()));
    }
    let (gateway, worker) = (args.role != Some(Role::Worker), args.role != Some(Role::Gateway));
    if let Some(tls) = config.gateway.tls.as_ref().filter(|_| gateway) {
        checks.push(Finding::new("gateway.tls", inspect_tls(tls, &config.store.data_dir).await));
        checks.extend(doubts(tls, config.gateway.listen));
    }
    if !worker {
        return checks;
    }
    let routes = wiring::router(config, Vec::new()).map(|_| match config.worker.routes.len() {
        0 => "none: events are logged and acknowledged".to_owned(),
        count => count.to_string(),
    });
    checks.push(Finding::new("worker.routes", routes.map_err(|error| error.to_string())));
    let hooks = hooks.map(|hooks| crate::greeting::hooks(&hooks));
    checks.push(Finding::new("hooks", hooks.map_err(|error| error.to_string())));
    checks.extend(handlers::commands(config));
    if !args.offline {
        checks.extend(handlers::look(config).await);
    }
    checks
}

/// Checks Stream's settings of each app.
async fn stream(config: &Config, args: &Check) -> Vec<Finding> {
    if config.apps.is_empty() {
        return vec![Finding::new(
            "stream",
            Err("no app is configured, so there is nothing to ask Stream about".to_owned()),
        )];
    }
    let mut checks = Vec::new();
    for app in &config.apps {
        let what = format!("stream, app {}", app.name);
        match connect::look(app, config, &args.stream_url, args.url.as_deref()).await {
            Ok(found) => {
                if !found.drift.iter().any(|drift| matches!(drift, Drift::Broken(_))) {
                    checks.push(Finding::new(what.as_str(), Ok(found.summary)));
                }
                checks.extend(found.drift.into_iter().map(|drift| match drift {
                    Drift::Broken(why) => Finding::new(what.as_str(), Err(why)),
                    Drift::Doubtful(why) => Finding::warning(&what, why),
                }));
            }
            Err(why) => checks.push(Finding::new(what, Err(why))),
        }
    }
    checks
}

/// Warnings about what cannot be checked from here.
fn doubts(tls: &TlsConfig, listen: SocketAddr) -> Vec<Finding> {
    let TlsConfig::Acme(acme) = tls else {
        return doubt_tls(tls).into_iter().map(|doubt| Finding::warning("gateway.tls.cert", doubt)).collect();
    };
    let names = acme.domains.join(", ");
    let mut doubts = vec![Finding::warning(
        "gateway.tls.acme",
        format!(
            "one gateway for each name: behind a balancer the authority's connection may come to another gateway than the one \
             that asked; use gateway.tls.cert and key there ({names})"
        ),
    )];
    if listen.port() != 443 || listen.ip().is_loopback() {
        let what = format!(
            "the authority connects to port 443 of {names}: forward that, as TCP and whatever /readyz says, to {listen}"
        );
        doubts.push(Finding::warning("gateway.listen", what));
    }
    doubts
}

fn apps(config: &Config) -> String {
    let names: Vec<_> = config.apps.iter().map(|app| app.name.as_str()).collect();
    if names.is_empty() { "none: `up` makes a development app".to_owned() } else { names.join(", ") }
}

/// `answers`: whether the configuration answers hooks.
async fn services(config: &Config, backends: Servers, answers: bool) -> Vec<Finding> {
    let Servers { endpoint, topology, address } = backends;
    let topology = topology.with_steps(&config.worker.retry_steps()).with_calls();
    let topology = topology.with_parked(&wiring::route_names(config), config.rabbitmq.parked_max as u64);
    let mut checks = Vec::new();
    match rabbitmq::inspect(&endpoint, &topology).await {
        Ok(Inspection { absent, hooks }) => {
            let (at, vhost) = (endpoint.address(), endpoint.virtual_host());
            let state = match absent.len() {
                0 => "all exchanges and queues are as they should be".to_owned(),
                count => format!("{count} exchanges and queues do not exist yet; `gateway` and `worker` declare them"),
            };
            checks.push(Finding::new("rabbitmq", Ok(format!("{at}, virtual host {vhost}: {state}"))));
            // Only hooks need this; even without a configured hook, a handler in code may answer some.
            checks.extend(hooks.map(|why| match answers {
                true => Finding::new("rabbitmq, hooks", Err(why)),
                false => Finding::warning("rabbitmq, hooks", why),
            }));
        }
        Err(errors) => checks.extend(errors.into_iter().map(|error| Finding::new("rabbitmq", Err(error)))),
    }
    if let Some(url) = &config.rabbitmq.management_url {
        let (vhost, queues) = (endpoint.virtual_host(), topology.queues());
        checks.extend(policies::look(url.expose(), &vhost, queues, &topology.dead()).await);
    }
    checks.push(Finding::new("redis", redis::inspect(&address, &config.redis.prefix).await));
    checks
}

/// Checks without changing anything: a store that `up` would create or migrate is fine too.
fn store(config: &Config) -> Result<String, String> {
    let data_dir = std::path::absolute(&config.store.data_dir).unwrap_or_else(|_| config.store.data_dir.clone());
    let data_dir = data_dir.display();
    match sqlite::inspect(&config.store.data_dir) {
        Ok(()) => Ok(format!("{data_dir} holds a store of this version")),
        Err(OpenError::Absent { .. }) => creatable(&config.store.data_dir),
        Err(error @ OpenError::Older { .. }) => Ok(error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

/// Whether `up` could create a store there.
fn creatable(data_dir: &Path) -> Result<String, String> {
    let absolute = std::path::absolute(data_dir).map_err(|error| error.to_string())?;
    let existing = absolute.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let result = match access(existing, Access::WRITE_OK | Access::EXEC_OK) {
        _ if !existing.is_dir() => Err("is not a directory".to_owned()),
        result => result.map_err(|error| format!("cannot be written to: {error}")),
    };
    match result {
        Ok(()) => Ok(format!("{} holds no store yet; it is created at the start", absolute.display())),
        Err(what) => Err(format!("{} {what}; set store.data_dir to another place", existing.display())),
    }
}
