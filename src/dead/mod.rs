//! `streamgate dead`: dead letters, alongside a running `up` or without one.

mod causes;
mod change;
mod select;
mod table;
mod view;

use crate::backends::rabbitmq::Servers;
use crate::exit::BadUsage;
use crate::global::Global;
use crate::output;
use crate::wiring;
use anyhow::{Context, bail};
pub(crate) use causes::Cause;
use causes::Causes;
use change::{Change, change};
use clap::{Args, Subcommand};
use select::Select;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::str::FromStr;
use streamgate_core::dead_letter::{DeadLetter, DeadLetterId, Filter};
use streamgate_core::ports::{DeadLetters, Page};
use streamgate_service::config::{Loaded, StoreKind};
use streamgate_service::shutdown::Shutdown;
use streamgate_store::rabbitmq::DeadLetterQueue;
use streamgate_store::sqlite::DeadLetterBox;
use table::Table;
use tokio_util::sync::CancellationToken;
use view::View;

/// Dead letters read at a time: their bodies are read too.
const PAGE: usize = 32;

#[derive(Debug, Args)]
pub struct Dead {
    #[command(subcommand)]
    action: Action,
    /// Which queue: dead (the dead letters), unrouted (events that RabbitMQ had no queue for), or parked.ROUTE (events
    /// that wait for that route)
    #[arg(long, global = true, value_name = "QUEUE", default_value = "dead")]
    queue: Queue,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Queue {
    Dead,
    Unrouted,
    /// The route of that name, which may no longer be in the configuration.
    Parked(String),
}

impl FromStr for Queue {
    type Err = String;

    fn from_str(text: &str) -> Result<Queue, String> {
        match text.split_once('.') {
            None if text == "dead" => Ok(Queue::Dead),
            None if text == "unrouted" => Ok(Queue::Unrouted),
            Some(("parked", route)) if !route.is_empty() => Ok(Queue::Parked(route.to_owned())),
            None | Some(_) => Err("expected dead, unrouted, or parked.ROUTE, like parked.app".to_owned()),
        }
    }
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List dead letters, oldest first; all of them without a selection
    List {
        #[command(flatten)]
        select: Select,
        /// Print only a count for each cause (reason, route and error), with the first and last time
        #[arg(long)]
        group: bool,
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
    /// Show one dead letter with everything but its body
    Show {
        /// Number, webhook id or idempotency key
        id: String,
        /// Print the body too: it holds people's messages
        #[arg(long)]
        body: bool,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Put dead letters back into the queue, as first attempts
    Replay(Change),
    /// Remove dead letters for good
    Drop(Change),
}

pub async fn command(global: &Global, args: Dead) -> anyhow::Result<ExitCode> {
    let loaded = global.load_without_secrets()?;
    let stop = Shutdown::new();
    stop.listen().context("cannot listen to signals")?;
    tokio::select! {
        ended = run(&loaded, args, &stop.drain) => ended.map(|()| ExitCode::SUCCESS),
        () = stop.abort.cancelled() => bail!("aborted; `streamgate dead list` shows what is left"),
    }
}

/// `interrupted`: dead letters in hand are settled, and no more are begun.
async fn run(loaded: &Loaded, args: Dead, interrupted: &CancellationToken) -> anyhow::Result<()> {
    let is_gone = |route: &str| !wiring::route_names(&loaded.config).contains(&route);
    match (loaded.config.store.kind, args.queue) {
        (StoreKind::Embedded, Queue::Unrouted) => {
            Err(BadUsage("the embedded store routes every event; only RabbitMQ has --queue unrouted".into()).into())
        }
        (StoreKind::Embedded, queue) => {
            let data_dir = &loaded.config.store.data_dir;
            let dead_letters = match queue {
                Queue::Parked(route) => DeadLetterBox::open_parked(data_dir, &route, is_gone(&route))?,
                Queue::Dead | Queue::Unrouted => DeadLetterBox::open(data_dir)?,
            };
            let drops = matches!(args.action, Action::Drop { .. });
            let acted = act(&dead_letters, args.action, interrupted).await;
            // Also after an error: some may have been dropped.
            let emptied = if drops { dead_letters.empty_log().await } else { Ok(()) };
            acted?;
            Ok(emptied?)
        }
        (StoreKind::RabbitMq, queue) => {
            let Servers { endpoint, topology, .. } = Servers::of(loaded)?;
            let dead_letters = match queue {
                Queue::Dead => DeadLetterQueue::dead(endpoint, &topology),
                Queue::Unrouted => DeadLetterQueue::unrouted(endpoint, &topology),
                Queue::Parked(route) => DeadLetterQueue::parked(endpoint, &topology, &route, is_gone(&route)),
            };
            let acted = act(&dead_letters, args.action, interrupted).await;
            // Also after an error: held dead letters go back in order.
            let closed = dead_letters.close().await;
            acted?;
            closed.context("cannot give the dead letters back in their order")
        }
    }
}

/// The causes of all dead letters.
pub(crate) async fn causes_of(loaded: &Loaded) -> anyhow::Result<Vec<Cause>> {
    let (all, never) = (Filter::default(), CancellationToken::new());
    let causes = match loaded.config.store.kind {
        StoreKind::Embedded => counted(&DeadLetterBox::open(&loaded.config.store.data_dir)?, &all, &never).await?,
        StoreKind::RabbitMq => {
            let Servers { endpoint, topology, .. } = Servers::of(loaded)?;
            let dead_letters = DeadLetterQueue::dead(endpoint, &topology);
            let counted = counted(&dead_letters, &all, &never).await;
            dead_letters.close().await?;
            counted?
        }
    };
    Ok(causes.list())
}

async fn act(dead_letters: &impl DeadLetters, action: Action, interrupted: &CancellationToken) -> anyhow::Result<()> {
    match action {
        Action::List { select, group: true, json } => {
            counted(dead_letters, &select.filter(), interrupted).await?.show(json)
        }
        Action::List { select, group: false, json } => list(dead_letters, &select.filter(), json, interrupted).await,
        Action::Show { id, body, json } => show(dead_letters, id, body, json, interrupted).await,
        Action::Replay(how) => {
            change(dead_letters, "replayed", how, interrupted, |some| dead_letters.replay(some)).await
        }
        Action::Drop(how) => change(dead_letters, "dropped", how, interrupted, |some| dead_letters.discard(some)).await,
    }
}

/// Calls `with` for every dead letter that the filter selects.
async fn each(
    dead_letters: &impl DeadLetters,
    filter: &Filter,
    interrupted: &CancellationToken,
    mut with: impl FnMut(&DeadLetter) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut from = None;
    loop {
        if interrupted.is_cancelled() {
            bail!("interrupted; nothing was changed");
        }
        let Page { dead_letters: page, next } = dead_letters.page(from, PAGE).await?;
        for dead_letter in page.iter().filter(|dead_letter| filter.matches(dead_letter)) {
            with(dead_letter)?;
        }
        if next.is_none() && !interrupted.is_cancelled() {
            return Ok(());
        }
        from = next;
    }
}

async fn choose(
    dead_letters: &impl DeadLetters,
    filter: &Filter,
    interrupted: &CancellationToken,
) -> anyhow::Result<Vec<DeadLetterId>> {
    let mut chosen = Vec::new();
    let mut unknown = filter.ids.clone();
    each(dead_letters, filter, interrupted, |dead_letter| {
        chosen.push(dead_letter.id());
        unknown.retain(|id| !Filter { ids: vec![id.clone()], ..Filter::default() }.matches(dead_letter));
        Ok(())
    })
    .await?;
    if !unknown.is_empty() {
        bail!("no such dead letter: {}; nothing was changed, `streamgate dead list` shows them", unknown.join(", "));
    }
    Ok(chosen)
}

async fn list(
    dead_letters: &impl DeadLetters,
    filter: &Filter,
    json: bool,
    interrupted: &CancellationToken,
) -> anyhow::Result<()> {
    let mut views = Vec::new();
    let mut table: Option<Table> = None;
    each(dead_letters, filter, interrupted, |dead_letter| {
        if json {
            views.push(serde_json::to_value(View::of(dead_letter, false))?);
            return Ok(());
        }
        let table = match &table {
            Some(table) => table,
            None => {
                // Numbers increase; those made from the time all have the same length.
                let made = table.insert(Table::new(output::width(), dead_letter.number.to_string().len()));
                made.heading()?;
                made
            }
        };
        Ok(table.row(dead_letter)?)
    })
    .await?;
    if json {
        output::line(serde_json::to_string(&views)?)?;
    } else if table.is_none() {
        output::line("no dead letters")?;
    }
    Ok(())
}

async fn counted(
    dead_letters: &impl DeadLetters,
    filter: &Filter,
    interrupted: &CancellationToken,
) -> anyhow::Result<Causes> {
    let mut causes = Causes::default();
    each(dead_letters, filter, interrupted, |dead_letter| {
        causes.count(dead_letter);
        Ok(())
    })
    .await?;
    Ok(causes)
}

async fn show(
    dead_letters: &impl DeadLetters,
    id: String,
    body: bool,
    json: bool,
    interrupted: &CancellationToken,
) -> anyhow::Result<()> {
    let filter = Filter { ids: vec![id], ..Filter::default() };
    let mut found = 0;
    each(dead_letters, &filter, interrupted, |dead_letter| {
        found += 1;
        if body {
            tracing::info!(
                number = dead_letter.number,
                key = dead_letter.envelope.key,
                "showed the body of a dead letter"
            );
        }
        if json {
            return Ok(output::line(serde_json::to_string(&View::of(dead_letter, body))?)?);
        }
        view::whole(dead_letter)?;
        if body {
            output::line("")?;
            if std::io::stdout().is_terminal() {
                output::line(String::from_utf8_lossy(&dead_letter.envelope.body))?;
            } else {
                output::bytes(&dead_letter.envelope.body)?;
                output::line("")?;
            }
        }
        Ok(())
    })
    .await?;
    if found == 0 {
        bail!("no such dead letter; `streamgate dead list` shows them");
    }
    Ok(())
}
