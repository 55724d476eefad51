//! `streamgate dead`: dead letters, beside a running `up` or without one.

mod select;

use crate::cli::Global;
use crate::exit::BadUsage;
use crate::output;
use crate::wiring::Backends;
use anyhow::{Context, bail};
use clap::{Args, Subcommand, ValueEnum};
use select::Select;
use serde::{Serialize, Serializer};
use std::io::IsTerminal;
use std::process::ExitCode;
use streamgate_core::envelope::rfc3339;
use streamgate_core::letter::{Filter, Letter, LetterId};
use streamgate_core::ports::{Letters, Moved};
use streamgate_service::config::{Loaded, StoreKind};
use streamgate_service::shutdown::Shutdown;
use streamgate_store::rabbitmq::LetterQueue;
use streamgate_store::sqlite::LetterBox;
use tokio_util::sync::CancellationToken;

/// Letters read at a time: their bodies come along.
const PAGE: usize = 32;
/// Letters moved at a time.
const STEP: usize = 100;

#[derive(Debug, Args)]
pub struct Dead {
    #[command(subcommand)]
    action: Action,
    /// Which letters: the dead, or those of RabbitMQ that no queue was bound for
    #[arg(long, global = true, value_enum, default_value = "dead")]
    queue: Queue,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Queue {
    Dead,
    Unrouted,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the letters, oldest first; all of them where nothing is selected
    List {
        #[command(flatten)]
        select: Select,
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
    /// Show one letter with everything but its body
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
    /// Put letters back into the queue, as first attempts
    Replay {
        #[command(flatten)]
        select: Select,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Remove letters for good
    Drop {
        #[command(flatten)]
        select: Select,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

/// A letter as scripts see it.
#[derive(Debug, Serialize)]
struct View<'a> {
    /// A text: it may have 19 digits, and JavaScript and jq round those.
    #[serde(serialize_with = "as_text")]
    number: i64,
    id: &'a str,
    key: &'a str,
    app: &'a str,
    kind: &'a str,
    #[serde(rename = "type")]
    event_type: &'a str,
    cid: Option<&'a str>,
    route: Option<&'a str>,
    reason: &'a str,
    error: Option<&'a str>,
    attempts: u32,
    received_at: String,
    died_at: String,
    bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<String>,
}

fn as_text<S: Serializer>(number: &i64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(number)
}

impl View<'_> {
    fn of(letter: &Letter, body: bool) -> View<'_> {
        let envelope = &letter.envelope;
        View {
            number: letter.number,
            id: &envelope.id,
            key: &envelope.key,
            app: &envelope.app,
            kind: envelope.kind.as_str(),
            event_type: &envelope.event_type,
            cid: envelope.cid.as_deref(),
            route: envelope.route.as_deref(),
            reason: &letter.reason,
            error: letter.error.as_deref(),
            attempts: envelope.attempt,
            received_at: rfc3339(envelope.received_at_ms),
            died_at: rfc3339(letter.died_at_ms),
            bytes: envelope.body.len(),
            body: body.then(|| String::from_utf8_lossy(&envelope.body).into_owned()),
        }
    }
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

/// `interrupted`: what is in hand is settled, and nothing more is begun.
async fn run(loaded: &Loaded, args: Dead, interrupted: &CancellationToken) -> anyhow::Result<()> {
    match (loaded.config.store.kind, args.queue) {
        (StoreKind::Embedded, Queue::Dead) => {
            let letters = LetterBox::open(&loaded.config.store.data_dir)?;
            let drops = matches!(args.action, Action::Drop { .. });
            let acted = act(&letters, args.action, interrupted).await;
            // Whatever happened: what is dropped is gone.
            let emptied = if drops { letters.empty_log().await } else { Ok(()) };
            acted?;
            Ok(emptied?)
        }
        (StoreKind::Embedded, Queue::Unrouted) => {
            Err(BadUsage("the embedded store routes every event; only RabbitMQ has --queue unrouted".into()).into())
        }
        (StoreKind::RabbitMq, queue) => {
            let Backends { endpoint, topology, .. } = Backends::of(loaded)?;
            let letters = match queue {
                Queue::Dead => LetterQueue::dead(endpoint, &topology),
                Queue::Unrouted => LetterQueue::unrouted(endpoint, &topology),
            };
            let acted = act(&letters, args.action, interrupted).await;
            // Whatever happened: what is held goes back in order.
            let closed = letters.close().await;
            acted?;
            closed.context("cannot give the letters back in their order")
        }
    }
}

async fn act(letters: &impl Letters, action: Action, interrupted: &CancellationToken) -> anyhow::Result<()> {
    match action {
        Action::List { select, json } => list(letters, &select.filter(), json, interrupted).await,
        Action::Show { id, body, json } => show(letters, id, body, json, interrupted).await,
        Action::Replay { select, json } => {
            let chosen = choose(letters, &select.explicit()?, interrupted).await?;
            change("replayed", chosen, json, interrupted, |some| letters.replay(some)).await
        }
        Action::Drop { select, json } => {
            let chosen = choose(letters, &select.explicit()?, interrupted).await?;
            change("dropped", chosen, json, interrupted, |some| letters.discard(some)).await
        }
    }
}

/// Calls `with` for every letter that the filter means.
async fn each(
    letters: &impl Letters,
    filter: &Filter,
    interrupted: &CancellationToken,
    mut with: impl FnMut(&Letter) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut after = 0;
    loop {
        if interrupted.is_cancelled() {
            bail!("interrupted; nothing was changed");
        }
        let page = letters.page(after, PAGE).await?;
        let Some(last) = page.last() else { return Ok(()) };
        after = last.number;
        for letter in page.iter().filter(|letter| filter.matches(letter)) {
            with(letter)?;
        }
    }
}

async fn choose(
    letters: &impl Letters,
    filter: &Filter,
    interrupted: &CancellationToken,
) -> anyhow::Result<Vec<LetterId>> {
    let mut chosen = Vec::new();
    let mut unknown = filter.ids.clone();
    each(letters, filter, interrupted, |letter| {
        chosen.push(letter.id());
        unknown.retain(|id| !Filter { ids: vec![id.clone()], ..Filter::default() }.matches(letter));
        Ok(())
    })
    .await?;
    if !unknown.is_empty() {
        bail!("no such dead letter: {}; nothing was changed, `streamgate dead list` shows them", unknown.join(", "));
    }
    Ok(chosen)
}

async fn list(
    letters: &impl Letters,
    filter: &Filter,
    json: bool,
    interrupted: &CancellationToken,
) -> anyhow::Result<()> {
    let mut views = Vec::new();
    let mut count = 0;
    each(letters, filter, interrupted, |letter| {
        count += 1;
        let view = View::of(letter, false);
        if json {
            views.push(serde_json::to_value(view)?);
            return Ok(());
        }
        if count == 1 {
            output::line(format!("{:>8}  {:<24}  {:<18}  {:<24}  ID", "NUMBER", "DIED", "REASON", "TYPE"))?;
        }
        let View { number, died_at, reason, event_type, id, .. } = view;
        Ok(output::line(format!("{number:>8}  {died_at:<24}  {reason:<18}  {event_type:<24}  {id}"))?)
    })
    .await?;
    if json {
        output::line(serde_json::to_string(&views)?)?;
    } else if count == 0 {
        output::line("no dead letters")?;
    }
    Ok(())
}

async fn show(
    letters: &impl Letters,
    id: String,
    body: bool,
    json: bool,
    interrupted: &CancellationToken,
) -> anyhow::Result<()> {
    let filter = Filter { ids: vec![id], ..Filter::default() };
    let mut found = 0;
    each(letters, &filter, interrupted, |letter| {
        found += 1;
        if json {
            return Ok(output::line(serde_json::to_string(&View::of(letter, body))?)?);
        }
        let view = serde_json::to_value(View::of(letter, false))?;
        for (name, value) in view.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            output::line(format!("{name:<12} {text}"))?;
        }
        if body {
            output::line("")?;
            if std::io::stdout().is_terminal() {
                output::line(String::from_utf8_lossy(&letter.envelope.body))?;
            } else {
                output::bytes(&letter.envelope.body)?;
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

/// Moves the letters some at a time, so that there is progress to show, and says how many it were and how many are left.
async fn change<F>(
    word: &str,
    letters: Vec<LetterId>,
    json: bool,
    interrupted: &CancellationToken,
    mut each: impl FnMut(Vec<LetterId>) -> F,
) -> anyhow::Result<()>
where
    F: Future<Output = Moved>,
{
    let bar = output::bar(letters.len() as u64, "letters", json);
    let mut all = Moved::default();
    for some in letters.chunks(STEP) {
        if interrupted.is_cancelled() || all.stopped.is_some() {
            break;
        }
        let Moved { count, stopped } = each(some.to_vec()).await;
        all = Moved { count: all.count + count, stopped };
        bar.inc(some.len() as u64);
    }
    bar.finish_and_clear();
    let Moved { count, stopped } = all;
    let left = letters.len() - count;
    match (json, left) {
        (true, 0) => output::line(serde_json::json!({ word: count }))?,
        (true, _) => output::line(serde_json::json!({ word: count, "left": left }))?,
        (false, 0) => output::line(format!("{count} {word}"))?,
        (false, _) => output::line(format!("{count} {word}, {left} left"))?,
    }
    let go_on = "the same command goes on with those that are left";
    match stopped {
        Some(error) => Err(error).context(go_on),
        None if interrupted.is_cancelled() && left > 0 => bail!("interrupted; {go_on}"),
        None if left > 0 => bail!("{left} could not be reached, or somebody else has moved them; {go_on}"),
        None => Ok(()),
    }
}
