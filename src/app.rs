//! Streamgate as a library: handlers in Rust instead of services that events are forwarded to.

use crate::backends;
use crate::code::Code;
use crate::exit;
use crate::up;
#[cfg(feature = "services")]
use crate::worker;
use std::future::Future;
use std::process::ExitCode;
use std::sync::Arc;
use streamgate_core::pattern::Pattern;
use streamgate_service::config::{self, Config, Environment, Loaded, Source};
use streamgate_service::telemetry::{self, Host, LogFormat};
use streamgate_worker::{Answer, AnsweredBy, BeforeMessageSend, Command, Context, Event, HandlerError, Route};

/// Why Streamgate does not run: a mistake in the configuration, a port that is taken, a store that cannot be opened.
///
/// A `main` that returns this error prints its message and exits with 1, which is all that Rust offers. To exit as the
/// command does, with 64 for a mistake in the configuration, return [`Error::report`].
#[derive(thiserror::Error)]
#[error("{0:#}")]
pub struct Error(anyhow::Error);

/// Rust prints this for a `main` that returns the error.
impl std::fmt::Debug for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl Error {
    /// Prints the error on stderr, as the command does, and returns the exit code.
    pub fn report(&self) -> ExitCode {
        exit::report(&self.0)
    }

    /// 64 for a mistake in the configuration, else 1.
    pub fn exit_code(&self) -> ExitCode {
        exit::code(&self.0)
    }
}

/// An app with handlers of its own.
///
/// ```no_run
/// # async fn run() -> Result<(), streamgate::Error> {
/// use streamgate::{BeforeMessageSend, Command, Context, Event, Streamgate};
///
/// Streamgate::from_env()?
///     .on("message.new", |event: Event, _: Context| async move {
///         println!("{} in {}", event.id(), event.cid().unwrap_or("no channel"));
///         Ok(())
///     })
///     .before_message_send(|hook: BeforeMessageSend| async move {
///         Ok(if hook.text()?.contains("http") { hook.reject("no links please") } else { hook.pass() })
///     })
///     .command("ticket", |command: Command| async move { Ok(command.ephemeral("Ticket opened")) })
///     .up()
///     .await
/// # }
/// ```
#[derive(Debug)]
pub struct Streamgate {
    from: Origin,
    code: Code,
    mistakes: Vec<String>,
}

#[derive(Debug)]
enum Origin {
    Source(Source),
    Config(Box<Config>),
}

impl Streamgate {
    /// Loads the configuration as the command does: the file that STREAMGATE_CONFIG names, else `streamgate.toml` in
    /// the working directory if there is one, overridden by the environment.
    pub fn from_env() -> Result<Streamgate, Error> {
        let source = Source { file: None, environment: Environment::of_process() };
        // Which secrets must exist depends on what is run later.
        let blind = Source { environment: source.environment.clone().without_secrets(), ..source.clone() };
        config::load(&blind, backends::problems).map_err(|error| Error(error.into()))?;
        Ok(Streamgate::of(Origin::Source(source)))
    }

    /// Uses the given configuration. Its apps and certificates are not read again while it runs.
    pub fn new(config: Config) -> Streamgate {
        Streamgate::of(Origin::Config(Box::new(config)))
    }

    fn of(from: Origin) -> Streamgate {
        Streamgate { from, code: Code::default(), mistakes: Vec::new() }
    }

    /// Handles events whose type matches the glob. The first match wins; routes of the configuration come after these.
    /// The glob is the route's name in metrics and dead letters.
    ///
    /// A handler that blocks its thread, or computes for long, delays other events, but neither hooks nor incoming
    /// webhooks. Nothing can stop it at its timeout then: run blocking code in `tokio::task::spawn_blocking`.
    pub fn on<F, R>(mut self, events: &str, handler: F) -> Streamgate
    where
        F: Fn(Event, Context) -> R + Send + Sync + 'static,
        R: Future<Output = Result<(), HandlerError>> + Send + 'static,
    {
        match Pattern::parse(events) {
            Ok(pattern) if self.code.routes.iter().all(|route| *route.name != *events) => {
                let handler = Arc::new(handler);
                self.code.routes.push(Route::new(events, vec![pattern], handler));
            }
            Ok(_) => self.mistakes.push(format!("on({events:?}) is called twice: the second handler would never run")),
            Err(error) => self.mistakes.push(format!("on({events:?}): {error}")),
        }
        self
    }

    /// Answers before-message-send. Rules of the configuration that reject come before it.
    ///
    /// The handler must not block its thread: other hooks, and with [`up`](Streamgate::up) all webhooks, are taken on
    /// the same one. Run blocking code in `tokio::task::spawn_blocking`.
    pub fn before_message_send<F, R>(mut self, handler: F) -> Streamgate
    where
        F: Fn(BeforeMessageSend) -> R + Send + Sync + 'static,
        R: Future<Output = Result<Answer, HandlerError>> + Send + 'static,
    {
        if self
            .code
            .hooks
            .before_message_send
            .replace(AnsweredBy::<F, BeforeMessageSend>::moderation(handler))
            .is_some()
        {
            self.mistakes.push("before_message_send is called twice".to_owned());
        }
        self
    }

    /// Answers the custom command of that name, and the clicks on its buttons. The handler must not block its thread
    /// either.
    pub fn command<F, R>(mut self, name: &str, handler: F) -> Streamgate
    where
        F: Fn(Command) -> R + Send + Sync + 'static,
        R: Future<Output = Result<Answer, HandlerError>> + Send + 'static,
    {
        let name = name.trim_start_matches('/');
        if self.code.hooks.commands.insert(name.to_owned(), AnsweredBy::<F, Command>::command(handler)).is_some() {
            self.mistakes.push(format!("command({name:?}) is called twice"));
        }
        self
    }

    /// Runs gateway and worker in this process, on the embedded store. Returns after SIGTERM or SIGINT, when it has
    /// drained.
    pub async fn up(self) -> Result<(), Error> {
        let (loaded, source, code) = self.load(|environment| environment)?;
        let ended = up::start(loaded, source, code).await.map(drop).map_err(Error);
        telemetry::flush();
        ended
    }

    /// Runs a worker on RabbitMQ and Redis; needs the feature `services`. Returns after SIGTERM or SIGINT, when it has
    /// drained.
    #[cfg(feature = "services")]
    pub async fn worker(self) -> Result<(), Error> {
        let (loaded, source, code) = self.load(Environment::without_app_secrets)?;
        let ended = worker::start(loaded, source, code).await.map(drop).map_err(Error);
        telemetry::flush();
        ended
    }

    fn load(self, see: impl FnOnce(Environment) -> Environment) -> Result<(Loaded, Option<Source>, Code), Error> {
        let filter = std::env::var("STREAMGATE_LOG").ok();
        telemetry::init(LogFormat::Auto, filter.as_deref(), Host::Another).map_err(|error| Error(error.into()))?;
        if !self.mistakes.is_empty() {
            return Err(Error(anyhow::anyhow!("{}", self.mistakes.join("; "))));
        }
        match self.from {
            Origin::Source(source) => {
                let source = Source { environment: see(source.environment), ..source };
                let loaded = config::load(&source, backends::problems).map_err(|error| Error(error.into()))?;
                loaded.log_doubts();
                Ok((loaded, Some(source), self.code))
            }
            Origin::Config(config) => Ok((Loaded { config: *config, path: None, doubts: Vec::new() }, None, self.code)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use streamgate_service::config::ConfigError;

    #[test]
    fn an_error_reads_alike_however_it_is_shown() {
        let wrong = ConfigError::Unreadable { path: "a.toml".into(), error: "no such file".into() };
        let error = Error(anyhow::Error::from(wrong).context("cannot start"));
        let text = "cannot start: cannot read the config file a.toml: no such file";
        assert_eq!((format!("{error}"), format!("{error:?}")), (text.to_owned(), text.to_owned()));
        let codes = [error, Error(anyhow::anyhow!("a port is taken"))].map(|error| format!("{:?}", error.exit_code()));
        assert_eq!(codes, [64, 1].map(|code| format!("{:?}", ExitCode::from(code))));
    }
}
