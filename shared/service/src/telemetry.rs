//! Logs: on stderr, human on a terminal, JSON lines otherwise.

use std::io::IsTerminal;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt};

/// `--log-format`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Human on a terminal, JSON otherwise.
    #[default]
    Auto,
    Human,
    Json,
}

/// Always off, whatever the filter says: this crate logs messages that come back with their bodies, and frames with
/// everything. What an operator needs of it, the store tells itself.
const SILENCED: &str = "lapin";

/// Starts logging for the process. `filter` as in RUST_LOG, `info` where it is absent or wrong.
pub fn init(format: LogFormat, filter: Option<&str>) {
    let filter = filter.and_then(|text| EnvFilter::try_new(text).ok()).unwrap_or_else(|| EnvFilter::new("info"));
    let json = match format {
        LogFormat::Auto => !std::io::stderr().is_terminal(),
        LogFormat::Human => false,
        LogFormat::Json => true,
    };
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    let audible = filter_fn(|metadata| !metadata.target().starts_with(SILENCED));
    let started = if json {
        let builder = builder.json().flatten_event(true).with_current_span(false).with_span_list(false);
        builder.finish().with(audible).try_init()
    } else {
        builder.with_ansi(std::io::stderr().is_terminal()).finish().with(audible).try_init()
    };
    // What a panic says may hold a message's text: the place it happened at is told, never the words.
    std::panic::set_hook(Box::new(|panic| {
        let at = panic.location().map(ToString::to_string);
        tracing::error!(at, "panicked");
    }));
    // Already started: a second server in one process, as in tests, logs where the first one does.
    drop(started);
}
