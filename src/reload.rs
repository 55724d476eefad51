//! Reads the configuration again: on SIGHUP, when one of its files changes, and a while after that failed.
//!
//! Files are compared by their metadata once a second. Watching them by events would miss what counts most here, secrets
//! and certificates that are mounted through chains of symbolic links and swapped somewhere else.

use crate::app::Code;
use crate::wiring;
use arc_swap::ArcSwap;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::ports::{Enqueue, Seen};
use streamgate_gateway::{Intake, Tls};
use streamgate_service::config::{self, AppConfig, Config, HooksConfig, RouteConfig, Source, TlsConfig};
use streamgate_worker::{Hooks, Router};
use tokio::sync::Notify;
use tokio::time::Instant;

const LOOK: Duration = Duration::from_secs(1);
/// What was wrong may pass without a change of the files: an authority file that can be read again, a right that is given.
const RETRY: Duration = Duration::from_secs(30);

/// Something of a service that can be swapped while it runs. It knows what it holds, and holds on to that where the new is wrong.
pub trait Part: Send {
    /// In the plural, for the log.
    fn name(&self) -> &'static str;
    /// Whether anything changed. `asked`: an operator asked for it.
    fn reload(&mut self, config: &Config, asked: bool) -> anyhow::Result<bool>;
}

/// What is swapped, and where its new version comes from.
pub struct Reload {
    pub source: Source,
    pub parts: Vec<Box<dyn Part>>,
}

impl std::fmt::Debug for Reload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.parts.iter().map(|part| part.name())).finish()
    }
}

/// Device, inode, length and time of change: what differs when a file was written or swapped.
type Stamp = (u64, u64, u64, i64, i64);

impl Reload {
    /// Runs until it is dropped. `now`: asks for a reload at once.
    pub async fn watch(mut self, first: Config, now: Arc<Notify>) {
        let mut config = first;
        // Nothing is known of the files yet: they may have changed since they were read at the start.
        let mut stamps = BTreeMap::new();
        let mut retry_at = None;
        let mut ticks = tokio::time::interval(LOOK);
        loop {
            let asked = tokio::select! {
                () = now.notified() => true,
                _ = ticks.tick() => false,
            };
            // Taken before the files are read, never after: a change in between must be seen next time.
            let found = self.stamps(&config);
            let is_due = retry_at.is_some_and(|at| Instant::now() >= at);
            if asked || is_due || found != stamps {
                stamps = found;
                retry_at = if self.reload(&mut config, asked) { None } else { Some(Instant::now() + RETRY) };
            }
        }
    }

    /// Whether all went well. What is wrong stays as it was, and keeps no other part back.
    fn reload(&mut self, config: &mut Config, asked: bool) -> bool {
        let loaded = match config::load(&self.source) {
            Ok(loaded) => loaded,
            Err(error) => {
                tracing::error!(%error, "not reloaded: everything stays as it runs");
                return false;
            }
        };
        if loaded.config.apps != config.apps {
            loaded.tell_doubts();
        }
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
        let files = self.source.path().into_iter().chain(self.source.environment.files()).chain(certificates);
        files
            .map(|file| {
                let stamp = file.metadata().ok();
                let stamp = stamp.map(|data| (data.dev(), data.ino(), data.size(), data.ctime(), data.ctime_nsec()));
                (file, stamp)
            })
            .collect()
    }
}

/// The apps that webhooks are taken for, with their secrets.
#[derive(Debug)]
pub struct Apps<E, S> {
    intake: Arc<Intake<E, S>>,
    held: Vec<AppConfig>,
}

impl<E, S> Apps<E, S> {
    /// `held`: those of the configuration, which the development app is not part of.
    pub fn new(intake: Arc<Intake<E, S>>, held: Vec<AppConfig>) -> Apps<E, S> {
        Apps { intake, held }
    }
}

impl<E: Enqueue, S: Seen> Part for Apps<E, S> {
    fn name(&self) -> &'static str {
        "apps"
    }

    fn reload(&mut self, config: &Config, _asked: bool) -> anyhow::Result<bool> {
        if config.apps == self.held {
            return Ok(false);
        }
        anyhow::ensure!(!config.apps.is_empty(), "the configuration names no app any more");
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
            (Some(_), None) | (None, Some(_)) => anyhow::bail!("gateway.tls came or went: that needs a restart"),
        }
    }
}

/// Routes, and who answers hooks: with their URLs, headers and rules.
#[derive(Debug)]
pub struct Handlers {
    pub router: Arc<ArcSwap<Router>>,
    pub hooks: Arc<ArcSwap<Hooks>>,
    /// Those that do not come from the configuration.
    pub code: Code,
    pub held: (Vec<RouteConfig>, HooksConfig),
}

impl Part for Handlers {
    fn name(&self) -> &'static str {
        "routes and hooks"
    }

    fn reload(&mut self, config: &Config, _asked: bool) -> anyhow::Result<bool> {
        let wanted = (&config.worker.routes, &config.hooks);
        if wanted == (&self.held.0, &self.held.1) {
            return Ok(false);
        }
        let router = wiring::router(config, self.code.routes.clone())?;
        let hooks = wiring::hooks(config, self.code.hooks.clone())?;
        let answers = |hooks: &Hooks| !hooks.is_empty();
        anyhow::ensure!(
            answers(&hooks) == answers(&self.hooks.load()),
            "whether hooks are answered here at all is settled at the start: that needs a restart"
        );
        self.router.store(Arc::new(router));
        self.hooks.store(Arc::new(hooks));
        self.held = (config.worker.routes.clone(), config.hooks.clone());
        Ok(true)
    }
}
