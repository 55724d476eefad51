//! Logs: on stderr, human on a terminal, JSON lines otherwise. Best effort: logging never blocks anything.
//!
//! Lines go through a bounded queue to a thread of their own. A line is dropped and counted if it finds the queue full,
//! because stderr is a pipe that nobody reads, or cannot be written, because stderr is a file on a full disk.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder};
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
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

/// Which program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// The `streamgate` command: panics are logged.
    Ours,
    /// A program that embeds the library: it decides itself what happens on a panic.
    Another,
}

#[derive(Debug, thiserror::Error)]
#[error("invalid log filter {filter:?} (STREAMGATE_LOG): {what}")]
pub struct FilterError {
    filter: String,
    what: String,
}

/// Always off, whatever the filter says: this crate logs returned messages with their bodies, and whole frames. The
/// store itself logs what an operator needs.
const SILENCED: &str = "lapin";
/// Most lines that wait for the writing thread: a burst of some seconds, commonly under a megabyte.
const MOST_WAITING: usize = 4096;
/// Handlers' errors may be of any length. Longer lines are cut, so that waiting lines take at most 64 MiB.
const LONGEST_LINE: usize = 16 << 10;
/// How long a process waits for its last lines when it ends.
const LAST_LINES: Duration = Duration::from_millis(500);

static LOG: OnceLock<Log> = OnceLock::new();

/// The process's log, once it is started.
#[derive(Debug)]
struct Log {
    full: ErrorCounter,
    written: Arc<Written>,
    sent: Arc<AtomicU64>,
}

/// Counts of the lines that were written or failed.
#[derive(Debug, Default)]
struct Written {
    lines: Mutex<u64>,
    changed: Condvar,
    failed: AtomicU64,
}

/// Starts logging for the process. `filter`: levels and `target=level`, as in RUST_LOG; absent: `info`.
pub fn init(format: LogFormat, filter: Option<&str>, host: Host) -> Result<(), FilterError> {
    let filter = filter.map_or_else(|| Ok(EnvFilter::new("info")), parse)?;
    let json = match format {
        LogFormat::Auto => !io::stderr().is_terminal(),
        LogFormat::Human => false,
        LogFormat::Json => true,
    };
    let written = Arc::new(Written::default());
    let builder = NonBlockingBuilder::default().buffered_lines_limit(MOST_WAITING).thread_name("log");
    let (queue, guard) = builder.finish(Stderr(Arc::clone(&written)));
    let log = Log { full: queue.error_counter(), written, sent: Arc::default() };
    let lines = Lines { queue, sent: Arc::clone(&log.sent) };
    let builder = fmt().with_env_filter(filter).with_writer(lines).with_target(false).log_internal_errors(false);
    let audible = filter_fn(|metadata| !metadata.target().starts_with(SILENCED));
    let started = if json {
        let builder = builder.json().flatten_event(true).with_current_span(false).with_span_list(false);
        builder.finish().with(audible).try_init()
    } else {
        builder.with_ansi(io::stderr().is_terminal()).finish().with(audible).try_init()
    };
    // If logging is started already, a second server in one process, as in tests, uses the first one's.
    if started.is_ok() {
        // Dropping the guard prints to stdout if the queue is stuck; `flush` waits instead.
        std::mem::forget(guard);
        drop(LOG.set(log));
    }
    if host == Host::Ours {
        // A panic's message may hold a chat message's text: only its location is logged.
        std::panic::set_hook(Box::new(|panic| {
            let at = panic.location().map(ToString::to_string);
            tracing::error!(at, "panicked");
        }));
    }
    Ok(())
}

/// Lines that were dropped since the start.
pub fn dropped_lines() -> u64 {
    LOG.get().map_or(0, |log| log.full.dropped_lines() as u64 + log.written.failed.load(Ordering::Relaxed))
}

/// Waits until all logged lines are written, half a second at most.
pub fn flush() {
    let Some(log) = LOG.get() else { return };
    let all = || log.sent.load(Ordering::Relaxed).saturating_sub(log.full.dropped_lines() as u64);
    let lines = log.written.lines.lock().unwrap_or_else(PoisonError::into_inner);
    drop(log.written.changed.wait_timeout_while(lines, LAST_LINES, |lines| *lines < all()));
}

/// The library takes an unknown level for a target, and mutes everything else: here it is a mistake.
fn parse(filter: &str) -> Result<EnvFilter, FilterError> {
    let wrong = |what: String| FilterError { filter: filter.to_owned(), what };
    let directives: Vec<_> = filter.split(',').map(str::trim).collect();
    for directive in &directives {
        // Spans and fields have their own syntax, which the library checks.
        if directive.contains('[') {
            continue;
        }
        let level = directive.rsplit('=').next().unwrap_or_default().trim();
        if level.is_empty() || level.parse::<LevelFilter>().is_err() {
            return Err(wrong(format!(
                "unknown level {level:?}: expected off, error, warn, info, debug or trace, or target=level, with commas between"
            )));
        }
    }
    // Targets without a level would mute everything else, our own errors too.
    let has_level = directives.iter().any(|directive| !directive.contains(['=', '[']));
    let default = if has_level { "" } else { "info," };
    EnvFilter::try_new(default.to_owned() + &directives.join(",")).map_err(|error| wrong(error.to_string()))
}

/// The subscriber's writer: it gets each line in one piece.
#[derive(Clone, Debug)]
struct Lines {
    queue: NonBlocking,
    sent: Arc<AtomicU64>,
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Lines;

    fn make_writer(&'a self) -> Lines {
        self.clone()
    }
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let kept =
            if line.len() > LONGEST_LINE { [&line[..LONGEST_LINE], b"\xe2\x80\xa6\n"].concat() } else { line.to_vec() };
        self.sent.fetch_add(1, Ordering::Relaxed);
        self.queue.write_all(&kept)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Stderr, on the thread that may block on it. A failed line is counted, and is not an error: the next one may succeed.
#[derive(Debug)]
struct Stderr(Arc<Written>);

impl Write for Stderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if io::stderr().lock().write_all(line).is_err() {
            self.0.failed.fetch_add(1, Ordering::Relaxed);
        }
        *self.0.lines.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.changed.notify_all();
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_would_mute_everything_is_a_mistake() {
        for good in
            ["info", "DEBUG", "off", "warn,streamgate_gateway=debug", "info, hyper=off", "info,[span{field=1}]=debug"]
        {
            assert!(parse(good).is_ok(), "{good}");
        }
        for (wrong, level) in
            [("", ""), ("verbose", "verbose"), ("warning", "warning"), ("info,hyper=loud", "loud"), ("info,", "")]
        {
            let error = parse(wrong).unwrap_err().to_string();
            let expected = format!("(STREAMGATE_LOG): unknown level {level:?}");
            assert!(error.contains(&expected), "{wrong}: {error}");
        }
    }
}
