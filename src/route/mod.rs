//! `streamgate route`: which routes run, and which are paused.

pub(crate) mod states;

use crate::exit::BadUsage;
use crate::global::Global;
use crate::output;
use crate::wiring;
use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use serde::Serialize;
use states::RouteStates;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;
use streamgate_core::route_record::{Pause, Records, RouteRecord};
use streamgate_core::timestamp::rfc3339;
use streamgate_service::config::reader::nearest;

#[derive(Debug, Args)]
pub struct Route {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the routes of the configuration, and others that had a worker before
    List {
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
    /// Stop handling a route's events: they are parked until it is resumed
    Pause {
        /// The route's name
        name: String,
        /// The reason, shown by `route list` and in the workers' logs
        #[arg(long, value_name = "TEXT")]
        why: Option<String>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Handle a route's events again, parked ones first
    Resume {
        /// The route's name
        name: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

/// A route as it is shown.
#[derive(Debug, Serialize)]
pub(crate) struct View {
    pub(crate) name: String,
    /// `running` or `paused`. That a service is down, which workers find out by themselves, is in their metrics.
    pub(crate) state: &'static str,
    pub(crate) by: Option<String>,
    pub(crate) why: Option<String>,
    pub(crate) since: Option<String>,
    /// How many events wait for the route; `None` if it is not known.
    pub(crate) parked: Option<u64>,
    /// Whether the route is in the configuration.
    pub(crate) configured: bool,
}

pub async fn command(global: &Global, args: Route) -> anyhow::Result<ExitCode> {
    let loaded = global.load_without_secrets()?;
    let configured = wiring::route_names(&loaded.config).into_iter().map(str::to_owned).collect::<Vec<_>>();
    let states = RouteStates::of(&loaded.config)?;
    act(&states, &configured, args.action).await?;
    Ok(ExitCode::SUCCESS)
}

async fn act(states: &RouteStates, configured: &[String], action: Action) -> anyhow::Result<()> {
    let records = states.read().await.context("cannot read the routes' states; nothing was changed")?;
    match action {
        Action::List { json } => list(states, configured, &records, json).await,
        Action::Pause { name, why, json } => {
            let pause = Pause { by: person(), why };
            set(states, configured, &records, &name, Some(pause), json).await
        }
        Action::Resume { name, json } => set(states, configured, &records, &name, None, json).await,
    }
}

async fn list(states: &RouteStates, configured: &[String], records: &Records, json: bool) -> anyhow::Result<()> {
    let parked = states.parked(&names(configured, records)).await;
    let views = views(configured, records, parked.as_ref().ok());
    if json {
        return Ok(output::line(serde_json::to_string(&views)?)?);
    }
    let width = views.iter().map(|view| view.name.len()).max().unwrap_or_default().max("ROUTE".len());
    output::line(format!("{:width$} {:8} {:>8} SINCE, BY WHOM, WHY", "ROUTE", "STATE", "PARKED"))?;
    for view in &views {
        let events = view.parked.map_or_else(|| "?".to_owned(), |events| events.to_string());
        output::line(format!("{:width$} {:8} {events:>8} {}", view.name, view.state, story(view)))?;
    }
    if let Err(error) = parked {
        output::line(format!("how many events are parked is not known: {error:#}"))?;
    }
    Ok(())
}

/// The routes of the configuration, then the former ones.
fn names(configured: &[String], records: &Records) -> Vec<String> {
    let former = records.keys().filter(|name| !configured.contains(name));
    configured.iter().chain(former).cloned().collect()
}

/// The routes that are shown. `parked`: how many events wait for each, if that is known.
pub(crate) fn views(configured: &[String], records: &Records, parked: Option<&BTreeMap<String, u64>>) -> Vec<View> {
    let views = names(configured, records).into_iter().map(|name| {
        let events = parked.map(|parked| parked.get(&name).copied().unwrap_or_default());
        view(name, configured, records, events)
    });
    // A removed route without parked events is not worth a line.
    views.filter(|view| view.configured || view.parked != Some(0) || view.state == "paused").collect()
}

fn view(name: String, configured: &[String], records: &Records, parked: Option<u64>) -> View {
    let record = records.get(&name);
    let pause = record.and_then(|record| record.pause.as_ref());
    let since = record.filter(|record| record.epoch > 0).and_then(|record| i64::try_from(record.epoch).ok());
    View {
        state: if pause.is_some() { "paused" } else { "running" },
        by: pause.map(|pause| pause.by.clone()),
        why: pause.and_then(|pause| pause.why.clone()),
        since: since.map(rfc3339),
        parked,
        configured: configured.contains(&name),
        name,
    }
}

/// The rest of a route's line.
fn story(view: &View) -> String {
    let since = view.since.clone().unwrap_or_else(|| "-".to_owned());
    let by = view.by.as_ref().map(|by| format!(", {by}")).unwrap_or_default();
    let why = view.why.as_ref().map(|why| format!(", {why}")).unwrap_or_default();
    let gone = match (view.configured, view.parked) {
        (false, Some(1..)) => format!(
            " (not in the configuration; put its events back by: streamgate dead replay --queue parked.{} --all)",
            view.name
        ),
        (false, _) => " (not in the configuration)".to_owned(),
        (true, _) => String::new(),
    };
    format!("{since}{by}{why}{gone}")
}

async fn set(
    states: &RouteStates,
    configured: &[String],
    records: &Records,
    name: &str,
    pause: Option<Pause>,
    json: bool,
) -> anyhow::Result<()> {
    if !configured.iter().any(|known| known == name) && !records.contains_key(name) {
        let known = configured.iter().map(String::as_str).chain(records.keys().map(String::as_str));
        let meant = nearest(name, known).map(|meant| format!(", did you mean {meant:?}?")).unwrap_or_default();
        return Err(BadUsage(format!("there is no route {name:?}{meant}; `streamgate route list` shows them")).into());
    }
    let record = write(states, records.get(name).cloned(), name, pause).await?;
    let records = [(name.to_owned(), record)].into();
    let view = view(name.to_owned(), configured, &records, None);
    if json {
        return Ok(output::line(serde_json::to_string(&view)?)?);
    }
    let what = match view.state {
        "paused" => {
            "is paused: workers stop within a second, and its events are parked until `streamgate route resume`"
        }
        _ => "runs: workers take parked and fresh events in turns",
    };
    Ok(output::line(format!("{name} {what}"))?)
}

/// Retries until the record is the current one, and reads it once more after a while: after Redis lost its data, a
/// worker may write back a newer record.
async fn write(
    states: &RouteStates,
    mut before: Option<RouteRecord>,
    name: &str,
    pause: Option<Pause>,
) -> anyhow::Result<RouteRecord> {
    const TRIES: usize = 5;
    const WRITTEN_BACK: Duration = Duration::from_millis(500);
    for _ in 0..TRIES {
        let record = RouteRecord::next(before.as_ref(), pause.clone(), jiff::Timestamp::now().as_millisecond());
        let stands = states.write(name, &record).await.context("cannot change the route's state")?;
        if stands && !states.is_alone() {
            tokio::time::sleep(WRITTEN_BACK).await;
        }
        before = states.read().await.context("cannot read the route's state after it was changed")?.remove(name);
        if stands && before.as_ref() == Some(&record) {
            return Ok(record);
        }
    }
    bail!("somebody else changes the route's state at the same time; `streamgate route list` shows it")
}

/// The user and host that run the command.
fn person() -> String {
    let variable = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
    let user = variable("SUDO_USER").or_else(|| variable("USER")).or_else(|| variable("LOGNAME"));
    let user = user.unwrap_or_else(|| format!("uid {}", rustix::process::getuid().as_raw()));
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    format!("{user}@{host}")
}
