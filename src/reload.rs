//! Reloads the configuration: on SIGHUP, when one of its files changes, and again some time after a failure.
//!
//! Files are compared by their metadata once a second. File system events would miss the most important case: secrets
//! and certificates that are mounted through chains of symbolic links and swapped somewhere else.

use crate::code::Code;
use crate::wiring;
use arc_swap::ArcSwap;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::ports::Enqueue;
use streamgate_gateway::{Intake, Tls};
use streamgate_service::config::{
    AppConfig, Config, ConfigError, HooksConfig, Loaded, RouteConfig, Source, StoreKind, TlsConfig,
};
use streamgate_worker::{Hooks, Route, Router};
use tokio::sync::Notify;
use tokio::time::Instant;

const LOOK: Duration = Duration::from_secs(1);
/// A failure may end without a change of the files: a CA file becomes readable, a permission is granted.
const RETRY: Duration = Duration::from_secs(30);

/// A part of a service that can be swapped while it runs. It knows its current value, and keeps it if the new one is
/// wrong.
pub trait Part: Send {
    /// Its name in the plural, for the log.
    fn name(&self) -> &'static str;
    /// Returns whether anything changed. `asked`: an operator requested the reload.
    fn reload(&mut self, config: &Config, asked: bool) -> anyhow::Result<bool>;
}

/// The parts to swap, and the source of their new versions.
pub struct Reload {
    pub source: Source,
    pub parts: Vec<Box<dyn Part>>,
    /// Loads the configuration as the service requires it at its start.
    load: Load,
    /// The last doubts; they are logged when they change.
    doubts: Option<Vec<(String, String)>>,
}

impl std::fmt::Debug for Reload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.parts.iter().map(|part| part.name())).finish()
    }
}

/// Loads a configuration for a service, or says what is wrong with it for that service.
pub type Load = fn(&Source) -> Result<Loaded, ConfigError>;

/// Device, inode, length and change time: at least one differs when a file was written or swapped.
type Stamp = (u64, u64, u64, i64, i64);

impl Reload {
    /// The first doubts were logged when the configuration was loaded.
    pub fn new(source: Source, load: Load, parts: Vec<Box<dyn Part>>) -> Reload {
        Reload { source, parts, load, doubts: None }
    }

    /// Runs until it is dropped. `now`: requests a reload at once.
    pub async fn watch(mut self, first: Config, now: Arc<Notify>) {
        let mut config = first;
        // A file that existed at the start must still exist: without it everything would fall back to defaults.
        let file = self.source.path();
        // No stamps yet: the files may have changed since they were read at the start.
        let mut stamps = BTreeMap::new();
        let mut retry_at = None;
        let mut ticks = tokio::time::interval(LOOK);
        loop {
            let asked = tokio::select! {
                () = now.notified() => true,
                _ = ticks.tick() => false,
            };
            // The stamps are taken before the files are read, never after: a change in between must be seen next time.
            let found = self.stamps(&config);
            let is_due = retry_at.is_some_and(|at| Instant::now() >= at);
            if asked || is_due || found != stamps {
                stamps = found;
                retry_at =
                    if self.reload(&mut config, file.as_deref(), asked) { None } else { Some(Instant::now() + RETRY) };
            }
        }
    }

    /// Returns whether everything succeeded. A part that fails stays as it was, and blocks no other part.
    fn reload(&mut self, config: &mut Config, file: Option<&Path>, asked: bool) -> bool {
        let loaded = match (self.load)(&self.source) {
            Ok(loaded) if file.is_some() && loaded.path.is_none() => {
                let file = file.map(|file| file.display().to_string());
                tracing::error!(
                    file,
                    "not reloaded: the configuration file no longer exists; the running configuration stays"
                );
                return false;
            }
            Ok(loaded) => loaded,
            Err(error) => {
                tracing::error!(%error, "not reloaded: the running configuration stays");
                return false;
            }
        };
        // Line numbers are left out: they change with every edit.
        let doubts: Vec<_> = loaded.doubts.iter().map(|doubt| (doubt.key.clone(), doubt.what.clone())).collect();
        if self.doubts.as_ref().is_some_and(|known| *known != doubts) {
            loaded.log_doubts();
        }
        self.doubts = Some(doubts);
        let (mut changed, mut is_well) = (Vec::new(), true);
        for part in &mut self.parts {
            match part.reload(&loaded.config, asked) {
                Ok(true) => changed.push(part.name()),
                Ok(false) => {}
                Err(error) => {
                    is_well = false;
                    tracing::error!(
                        error = format!("{error:#}"),
                        "{} are not reloaded: the running ones stay",
                        part.name()
                    );
                }
            }
        }
        if changed.is_empty() {
            tracing::debug!("read the configuration again");
        } else {
            tracing::info!("reloaded {}; other changes need a restart", changed.join(", "));
        }
        *config = loaded.config;
        is_well
    }

    fn stamps(&self, config: &Config) -> BTreeMap<PathBuf, Option<Stamp>> {
        let certificates = config.gateway.tls.iter().flat_map(TlsConfig::files);
        let backends = config.rabbitmq.files().chain(config.redis.ca.clone());
        let named = self.source.path().into_iter().chain(self.source.environment.files());
        let files = named.chain(certificates).chain(backends);
        files
            .map(|file| {
                let stamp = file.metadata().ok();
                let stamp = stamp.map(|data| (data.dev(), data.ino(), data.size(), data.ctime(), data.ctime_nsec()));
                (file, stamp)
            })
            .collect()
    }
}

/// The apps whose webhooks are accepted, with their secrets.
#[derive(Debug)]
pub struct Apps<E> {
    intake: Arc<Intake<E>>,
    held: Vec<AppConfig>,
}

impl<E> Apps<E> {
    /// `held`: the apps of the configuration, without the development app.
    pub fn new(intake: Arc<Intake<E>>, held: Vec<AppConfig>) -> Apps<E> {
        Apps { intake, held }
    }
}

impl<E: Enqueue> Part for Apps<E> {
    fn name(&self) -> &'static str {
        "apps"
    }

    fn reload(&mut self, config: &Config, _asked: bool) -> anyhow::Result<bool> {
        if config.apps == self.held {
            return Ok(false);
        }
        anyhow::ensure!(!config.apps.is_empty(), "the configuration has no app any more");
        self.intake.set_apps(AppConfig::table(&config.apps));
        self.held.clone_from(&config.apps);
        Ok(true)
    }
}

/// The gateway's certificate.
#[derive(Debug)]
pub struct Certificates(pub Option<Tls>);

impl Part for Certificates {
    fn name(&self) -> &'static str {
        "certificates"
    }

    fn reload(&mut self, config: &Config, asked: bool) -> anyhow::Result<bool> {
        match (&self.0, &config.gateway.tls) {
            (Some(tls), Some(config)) => Ok(tls.reload(config, asked)?),
            (None, None) => Ok(false),
            (Some(_), None) | (None, Some(_)) => {
                anyhow::bail!("gateway.tls was added or removed: that needs a restart")
            }
        }
    }
}

/// The routes, with the services' URLs and headers.
#[derive(Debug)]
pub struct Routes {
    pub router: Arc<ArcSwap<Router>>,
    /// Routes in code, which come before those of the configuration.
    pub code: Vec<Route>,
    pub held: Vec<RouteConfig>,
    /// Retry steps that have had queues since the start.
    pub steps: Vec<Duration>,
    /// The longest handler timeout at the start: the store is sized for it.
    pub longest: Duration,
    /// How many handlers all routes may run together: the store hands out enough for that many.
    pub handlers: usize,
    /// The routes whose queues for parked events operators have declared, if they declare them.
    pub declared: Option<Vec<String>>,
}

impl Part for Routes {
    fn name(&self) -> &'static str {
        "routes"
    }

    fn reload(&mut self, config: &Config, _asked: bool) -> anyhow::Result<bool> {
        let wanted = &config.worker.routes;
        if *wanted == self.held {
            return Ok(false);
        }
        // Without routes every event would be logged and acknowledged: too risky for a file that is just being written.
        anyhow::ensure!(!wanted.is_empty(), "the configuration has no route any more: that needs a restart");
        if let Some(step) = config.worker.retry_steps().iter().find(|step| !self.steps.contains(step)) {
            anyhow::bail!(
                "{step:?} is a new step of a retry ladder, which is prepared at the start: that needs a restart"
            );
        }
        let longest = config.worker.longest_handler_timeout();
        anyhow::ensure!(
            longest <= self.longest,
            "a handler_timeout of {longest:?} is over the longest at the start, {:?}: that needs a restart",
            self.longest
        );
        let router = wiring::router(config, self.code.clone())?;
        let handlers = wiring::handlers(&wiring::limits(config, &router));
        anyhow::ensure!(
            handlers <= self.handlers,
            "the routes may have {handlers} handlers at a time together, over the {} that there is room for since the start: that needs \
             a restart",
            self.handlers
        );
        let is_new = |name: &&str| self.declared.as_ref().is_some_and(|names| !names.iter().any(|known| known == name));
        if let Some(new) = router.names().into_iter().find(is_new) {
            anyhow::bail!(
                "the route {new:?} is new, and its queue of parked events is not declared here: that needs a restart"
            );
        }
        self.router.store(Arc::new(router));
        self.held.clone_from(wanted);
        Ok(true)
    }
}

/// The hook handlers: services, rules and replies.
#[derive(Debug)]
pub struct HookHandlers {
    pub hooks: Arc<ArcSwap<Hooks>>,
    /// Hook handlers in code.
    pub code: Hooks,
    pub held: HooksConfig,
}

impl Part for HookHandlers {
    fn name(&self) -> &'static str {
        "handlers of hooks"
    }

    fn reload(&mut self, config: &Config, _asked: bool) -> anyhow::Result<bool> {
        if config.hooks == self.held {
            return Ok(false);
        }
        let hooks = wiring::hooks(config, self.code.clone())?;
        anyhow::ensure!(
            hooks.is_empty() == self.hooks.load().is_empty(),
            "whether hooks are answered here at all is settled at the start: that needs a restart"
        );
        self.hooks.store(Arc::new(hooks));
        self.held.clone_from(&config.hooks);
        Ok(true)
    }
}

/// The reloadable parts of a service that handles events and hooks: routes and hook handlers.
pub fn handlers(
    router: Arc<ArcSwap<Router>>,
    hooks: Arc<ArcSwap<Hooks>>,
    code: Code,
    config: &Config,
) -> [Box<dyn Part>; 2] {
    let worker = &config.worker;
    let limits = wiring::limits(config, &router.load());
    let operators_declare = config.store.kind == StoreKind::RabbitMq && !config.rabbitmq.declare;
    let declared = operators_declare.then(|| router.load().names().into_iter().map(str::to_owned).collect());
    let routes = Routes {
        code: code.routes,
        held: worker.routes.clone(),
        steps: worker.retry_steps(),
        longest: worker.longest_handler_timeout(),
        handlers: wiring::in_hand(config, &limits) / 2,
        declared,
        router,
    };
    [Box::new(routes), Box::new(HookHandlers { hooks, code: code.hooks, held: config.hooks.clone() })]
}
