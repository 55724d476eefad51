//! A certificate that is got from an ACME authority and renewed while the gateway serves.
//!
//! The old certificate is served until there is a new one, however long that takes; why it takes long stands in the log and
//! in /readyz.

mod authority;
mod challenge;
mod kept;
mod schedule;

pub(crate) use challenge::{Challenges, PROTOCOL};

use crate::certificate::Certificate;
use crate::tls::{Current, TlsError};
use authority::Failure;
use kept::{Kept, KeptError};
use schedule::{Cause, renewal, renewal_of_new};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use streamgate_service::config::AcmeConfig;
use streamgate_service::metrics::Metrics;
use tokio::sync::watch;
use tokio::time::Instant;

/// The wall clock is looked at this often: it may step.
const LOOK: Duration = Duration::from_secs(60);

/// Keeps a certificate valid.
#[derive(Debug)]
pub(crate) struct Acme {
    data_dir: PathBuf,
    config: watch::Sender<AcmeConfig>,
    current: Arc<Current>,
    metrics: Arc<Metrics>,
    /// Why there is no new certificate, since the last failure.
    trouble: Mutex<Option<String>>,
}

impl Acme {
    /// Serves the certificate that is kept, if there is one.
    pub(crate) fn open(
        config: &AcmeConfig,
        data_dir: &Path,
        current: Arc<Current>,
        metrics: Arc<Metrics>,
    ) -> Result<Acme, TlsError> {
        let kept = Kept::at(data_dir, &config.directory);
        let text = kept.certificate().map_err(|error| TlsError::Kept(error.to_string()))?;
        let acme = Acme {
            data_dir: data_dir.to_owned(),
            config: watch::Sender::new(config.clone()),
            current,
            metrics,
            trouble: Mutex::default(),
        };
        match text.map(|text| Certificate::from_pem(&text)) {
            Some(Ok(certificate)) => acme.current.serve(certificate, &acme.metrics),
            Some(Err(error)) => {
                let path = kept.certificate_file();
                tracing::warn!(%error, path = %path.display(), "cannot use the certificate that is kept; getting another");
            }
            None => {}
        }
        Ok(acme)
    }

    /// Uses this configuration from now on. Also ends the wait after a failure.
    pub(crate) fn reload(&self, config: &AcmeConfig) {
        self.config.send_replace(config.clone());
    }

    /// Whether there is a certificate, and what keeps the next one away.
    pub(crate) fn ready(&self) -> Result<Option<String>, String> {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match (self.current.expiry(), trouble) {
            (Some(_), None) => Ok(None),
            (Some(expiry), Some(why)) => {
                Ok(Some(format!("the certificate that expires on {} is not renewed: {why}", time(expiry))))
            }
            (None, Some(why)) => Err(format!("there is no certificate yet: {why}")),
            (None, None) => Err("there is no certificate yet; the authority was asked for one".to_owned()),
        }
    }

    /// Runs until it is dropped.
    pub(crate) async fn run(&self) {
        let mut changes = self.config.subscribe();
        let (mut failures, mut retry_at) = (0, Instant::now());
        let mut got = None;
        loop {
            let config = changes.borrow_and_update().clone();
            let due = match &got {
                Some((of, renewal)) if *of == config => Some(*renewal),
                _ => self.due(&config),
            };
            let left = due.map_or(0, |due| due - jiff::Timestamp::now().as_second());
            let left = Duration::from_secs(left.max(0).unsigned_abs());
            let left = left.max(retry_at.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                match self.renew(&config).await {
                    Ok(renewal) => (got, failures) = (Some((config, renewal)), 0),
                    Err(failure) => {
                        failures += 1;
                        let wait = failure.cause.wait(failures);
                        self.failed(&config, &failure, wait);
                        retry_at = Instant::now() + wait;
                    }
                }
                continue;
            }
            tokio::select! {
                () = tokio::time::sleep(left.min(LOOK)) => {}
                Ok(()) = changes.changed() => (failures, retry_at) = (0, Instant::now()),
            }
        }
    }

    /// When the next certificate is due, in seconds since the Unix epoch. None where the one that is kept cannot be used, or
    /// lacks a name.
    fn due(&self, config: &AcmeConfig) -> Option<i64> {
        let text = Kept::at(&self.data_dir, &config.directory).certificate().ok().flatten()?;
        let certificate = Certificate::from_pem(&text).ok()?;
        let has_all = config.domains.iter().all(|domain| certificate.names.contains(domain));
        has_all.then(|| renewal(certificate.validity))
    }

    /// When the certificate that was got is due for renewal.
    async fn renew(&self, config: &AcmeConfig) -> Result<i64, Failure> {
        let kept = Kept::at(&self.data_dir, &config.directory);
        let account = authority::account(config, &kept).await?;
        let begun = authority::order(&account, &config.domains).await;
        let mut order = match begun {
            Err(failure) if failure.cause == Cause::Account => {
                tracing::warn!(%failure, "the certificate authority does not take the account; making a new one");
                let account = authority::new_account(config, &kept).await?;
                authority::order(&account, &config.domains).await?
            }
            begun => begun?,
        };
        let pem = authority::certificate(&mut order, &self.current.challenges).await?;
        let certificate = Certificate::from_pem(&pem).map_err(Failure::setup)?;
        let validity = certificate.validity;
        self.current.serve(certificate, &self.metrics);
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let renewal = renewal_of_new(validity, jiff::Timestamp::now().as_second());
        tracing::info!(
            domains = config.domains.join(", "), expires = %time(validity.not_after), renewal = %time(renewal),
            "got a certificate"
        );
        if let Err(error) = kept.keep_certificate(pem).await {
            // It serves; only a restart needs another one.
            tracing::error!(%error, "cannot keep the certificate: after a restart there will be none");
        }
        Ok(renewal)
    }

    fn failed(&self, config: &AcmeConfig, failure: &Failure, wait: Duration) {
        let domains = config.domains.join(", ");
        tracing::error!(domains, %failure, again_in = ?wait, "cannot get a certificate; SIGHUP tries again at once");
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure.to_string());
    }
}

fn time(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds).map_or_else(|_| seconds.to_string(), |time| time.to_string())
}

/// What `check` says: looks, and makes neither an account nor an order.
pub(crate) async fn inspect(config: &AcmeConfig, data_dir: &Path) -> Result<String, String> {
    let kept = Kept::at(data_dir, &config.directory);
    let certificate = match kept.certificate().map_err(|error: KeptError| error.to_string())? {
        Some(text) => {
            let certificate = Certificate::from_pem(&text).map_err(|error| error.to_string())?;
            format!("a certificate until {}", time(certificate.validity.not_after))
        }
        None => "no certificate yet".to_owned(),
    };
    authority::answers(config).await.map_err(|failure| format!("{}: {failure}", config.directory))?;
    Ok(format!("{}: {certificate}; {} answers", config.domains.join(", "), config.directory))
}
