//! Reads apps and certificates again: on SIGHUP, and when one of their files changes.
//!
//! Files are compared by their metadata once a second. Watching them by events would miss what counts most here, secrets
//! and certificates that are mounted through chains of symbolic links and swapped somewhere else.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::ports::{Enqueue, Seen};
use streamgate_gateway::{Intake, Tls};
use streamgate_service::config::{self, AppConfig, Config, Source, TlsConfig};
use tokio::sync::Notify;

const LOOK: Duration = Duration::from_secs(1);

/// What is swapped, and where its new version comes from.
#[derive(Debug)]
pub struct Reload<E, S> {
    pub source: Source,
    pub intake: Arc<Intake<E, S>>,
    pub tls: Option<Tls>,
}

/// Device, inode, length and time of change: what differs when a file was written or swapped.
type Stamp = (u64, u64, u64, i64, i64);

impl<E: Enqueue, S: Seen> Reload<E, S> {
    /// Runs until it is dropped. `now`: asks for a reload at once.
    pub async fn watch(self, first: Config, now: Arc<Notify>) {
        let mut config = first;
        // Nothing is known of the files yet: they may have changed since they were read at the start.
        let mut stamps = BTreeMap::new();
        let mut ticks = tokio::time::interval(LOOK);
        loop {
            let asked = tokio::select! {
                () = now.notified() => true,
                _ = ticks.tick() => false,
            };
            // Taken before the files are read, never after: a change in between must be seen next time.
            let found = self.stamps(&config);
            if asked || found != stamps {
                stamps = found;
                if let Some(loaded) = self.reload(&config, asked) {
                    config = loaded;
                }
            }
        }
    }

    /// The new configuration where it was taken; whatever is wrong keeps the old. Certificates and apps do not hold each other up.
    fn reload(&self, old: &Config, asked: bool) -> Option<Config> {
        let loaded = match config::load(&self.source) {
            Ok(loaded) => {
                if loaded.config.apps != old.apps {
                    loaded.tell_doubts();
                }
                loaded.config
            }
            Err(error) => {
                tracing::error!(%error, "not reloaded: the running apps and certificates stay");
                return None;
            }
        };
        let mut what = "apps and certificates";
        match (&self.tls, &loaded.gateway.tls) {
            (Some(tls), Some(files)) => {
                if let Err(error) = tls.reload(files, asked) {
                    tracing::error!(%error, "the certificate is not reloaded: the running one stays");
                    what = "apps";
                }
            }
            (None, None) => {}
            (Some(_), None) | (None, Some(_)) => tracing::warn!("gateway.tls came or went: that needs a restart"),
        }
        // The development app has no configuration to be read again.
        if !loaded.apps.is_empty() {
            self.intake.set_apps(AppConfig::table(&loaded.apps));
        } else if !old.apps.is_empty() {
            tracing::error!("the configuration names no app any more: the running ones stay");
        }
        if loaded.apps == old.apps && loaded.gateway.tls == old.gateway.tls {
            tracing::debug!("read {what} again");
        } else {
            tracing::info!(apps = loaded.apps.len(), "reloaded {what}; other changes need a restart");
        }
        Some(loaded)
    }

    fn stamps(&self, config: &Config) -> BTreeMap<PathBuf, Option<Stamp>> {
        let secrets = config.apps.iter().flat_map(|app| &app.keys).flat_map(|key| key.files.iter().cloned());
        let certificates = config.gateway.tls.iter().flat_map(TlsConfig::files);
        let files = self.source.path().into_iter().chain(secrets).chain(certificates);
        files
            .map(|file| {
                let stamp = file.metadata().ok();
                let stamp = stamp.map(|data| (data.dev(), data.ino(), data.size(), data.ctime(), data.ctime_nsec()));
                (file, stamp)
            })
            .collect()
    }
}
