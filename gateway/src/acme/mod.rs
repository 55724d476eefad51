//! Gets a certificate from an ACME authority and renews it while the gateway serves.
//!
//! The old certificate is served until there is a new one, however long that takes; the log and /readyz say why it takes
//! long.

mod authority;
mod authority_folder;
mod challenge;
mod schedule;

pub(crate) use challenge::{Challenges, PROTOCOL};

use crate::certificate::Certificate;
use crate::tls::Current;
use authority::Failure;
use authority_folder::{Attempt, AuthorityFolder};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use schedule::{Cause, Failures, least_between, renewal};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use streamgate_service::config::AcmeConfig;
use streamgate_service::metrics::Metrics;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// How often the wall clock is read, because it may step.
const LOOK: Duration = Duration::from_secs(60);
/// Limit of one whole attempt.
const ATTEMPT: Duration = Duration::from_secs(900);

/// Keeps a certificate valid.
#[derive(Debug)]
pub(crate) struct Acme {
    data_dir: PathBuf,
    wish: watch::Sender<Wish>,
    current: Arc<Current>,
    metrics: Arc<Metrics>,
    state: Mutex<State>,
}

/// What the operator wants.
#[derive(Clone, Debug)]
struct Wish {
    config: AcmeConfig,
    /// How often an immediate attempt was requested.
    asks: u64,
}

#[derive(Debug, Default)]
struct State {
    /// The authority whose certificate is served.
    served: Option<AuthorityFolder>,
    /// Why the last attempt failed, while another certificate is due.
    trouble: Option<String>,
    /// The served certificate and its folder, while the disk does not accept it.
    unkept: Option<(AuthorityFolder, String)>,
}

impl Acme {
    /// Serves the kept certificate, if there is one.
    pub(crate) fn open(config: &AcmeConfig, data_dir: &Path, current: Arc<Current>, metrics: Arc<Metrics>) -> Acme {
        let wish = watch::Sender::new(Wish { config: config.clone(), asks: 0 });
        let acme = Acme { data_dir: data_dir.to_owned(), wish, current, metrics, state: Mutex::default() };
        acme.serve_kept(&acme.authority_folder(config));
        acme
    }

    /// Uses this configuration from now on. `at_once` ignores the wait after a failure.
    pub(crate) fn reload(&self, config: &AcmeConfig, at_once: bool) {
        self.wish.send_if_modified(|wish| {
            let is_other = wish.config != *config;
            wish.config.clone_from(config);
            wish.asks += u64::from(at_once);
            is_other || at_once
        });
    }

    /// An error if there is no certificate; else a warning if something is wrong with it.
    pub(crate) fn ready(&self) -> Result<Option<String>, String> {
        let state = self.state();
        let why = state.trouble.as_deref().unwrap_or("the authority was asked for one");
        let Some(validity) = self.current.validity() else { return Err(format!("there is no certificate yet: {why}")) };
        let expiry = time(validity.not_after);
        if validity.not_after <= now() {
            return Ok(Some(format!("the certificate expired on {expiry}: {why}")));
        }
        let not_kept = state.unkept.is_some().then_some("the certificate cannot be written to the data directory");
        let not_renewed =
            state.trouble.as_ref().map(|why| format!("the certificate that expires on {expiry} is not renewed: {why}"));
        Ok(not_renewed.or_else(|| not_kept.map(str::to_owned)))
    }

    /// Runs until it is dropped.
    pub(crate) async fn run(&self) {
        let mut wishes = self.wish.subscribe();
        let mut wish = wishes.borrow_and_update().clone();
        let mut authority_folder = self.authority_folder(&wish.config);
        let (mut failures, mut not_before) = self.last_attempt(&authority_folder, &wish.config);
        loop {
            self.keep_again().await;
            let due = self.due(&authority_folder, &wish.config);
            if due.is_some_and(|due| due > now()) {
                self.state().trouble = None;
            }
            let left = due.map_or(0, |due| due - now());
            let left = Duration::from_secs(left.max(0).unsigned_abs());
            let left = left.max(not_before.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                match self.attempt(&authority_folder, &wish.config, failures).await {
                    Ok(least) => (failures, not_before) = (None, Instant::now() + least),
                    Err(failure) => {
                        let row = Failures::and(failures, failure.cause);
                        self.failed(&authority_folder, &wish.config, &failure, row).await;
                        (failures, not_before) = (Some(row), Instant::now() + row.wait());
                    }
                }
            } else {
                tokio::select! {
                    () = tokio::time::sleep(left.min(LOOK)) => {}
                    changed = wishes.changed() => drop(changed),
                }
            }
            let next = wishes.borrow_and_update().clone();
            if next.config != wish.config {
                authority_folder = self.authority_folder(&next.config);
                if self.state().served.as_ref() != Some(&authority_folder) {
                    self.serve_kept(&authority_folder);
                }
                (failures, not_before) = self.last_attempt(&authority_folder, &next.config);
            }
            if next.asks != wish.asks {
                not_before = Instant::now();
            }
            wish = next;
        }
    }

    fn authority_folder(&self, config: &AcmeConfig) -> AuthorityFolder {
        AuthorityFolder::at(&self.data_dir, &config.directory)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves the kept certificate of an authority. If it is unusable, a new one is due.
    fn serve_kept(&self, authority_folder: &AuthorityFolder) {
        let text = match authority_folder.certificate() {
            Ok(Some(text)) => text,
            Ok(None) => return,
            Err(error) => return tracing::error!(%error, "cannot read the kept certificate"),
        };
        match Certificate::from_pem(&text) {
            Ok(certificate) => self.serve(certificate, authority_folder),
            Err(error) => tracing::warn!(%error, "cannot use the kept certificate; requesting another"),
        }
    }

    fn serve(&self, certificate: Certificate, authority_folder: &AuthorityFolder) {
        self.current.serve(certificate, &self.metrics);
        self.state().served = Some(authority_folder.clone());
    }

    /// When the next certificate is due, in seconds since the Unix epoch. `None` means now: there is no certificate of this
    /// authority, or it lacks a name.
    fn due(&self, authority_folder: &AuthorityFolder, config: &AcmeConfig) -> Option<i64> {
        if self.state().served.as_ref() != Some(authority_folder) || !self.current.has_names(&config.domains) {
            return None;
        }
        self.current.validity().map(renewal)
    }

    /// Failures in a row for these names from before a restart, and until when to wait after them.
    fn last_attempt(&self, authority_folder: &AuthorityFolder, config: &AcmeConfig) -> (Option<Failures>, Instant) {
        let Some(last) = authority_folder.attempt().filter(|last| last.domains == config.domains) else {
            return (None, Instant::now());
        };
        let left = Duration::from_secs((last.retry_at - now()).max(0).unsigned_abs());
        // The clock may have stepped.
        let left = left.min(last.failures.wait());
        if self.due(authority_folder, config).is_none_or(|due| due <= now()) {
            tracing::warn!(why = last.why, again_in = ?left, "the last attempt to get a certificate failed; SIGHUP tries again at once");
            self.state().trouble = Some(last.why);
        }
        (Some(last.failures), Instant::now() + left)
    }

    /// Makes one attempt. On success returns the least time until the next one.
    async fn attempt(
        &self,
        authority_folder: &AuthorityFolder,
        config: &AcmeConfig,
        failures: Option<Failures>,
    ) -> Result<Duration, Failure> {
        // The attempt is noted before anything is asked of the authority, so that a process that dies in each attempt, or one
        // that cannot write to its disk, does not ask at every start.
        let unended = "the process ended during the attempt";
        self.note(authority_folder, config, Failures::unended(failures), unended).await?;
        let refused = Acme::noted(config, Failures::and(failures, Cause::Refused), unended);
        let (current, held, asked) = (Arc::clone(&self.current), authority_folder.clone(), config.clone());
        // In a task of its own, so that a panic of the library at an unexpected answer ends only the attempt.
        let task = tokio::spawn(async move { authority::obtain(&asked, &held, &current.challenges, &refused).await });
        let pem = match tokio::time::timeout(ATTEMPT, AbortOnDropHandle::new(task)).await {
            Ok(Ok(obtained)) => obtained?,
            Ok(Err(error)) => return Err(Failure::new(Cause::Refused, format!("the attempt broke off: {error}"))),
            Err(_) => return Err(Failure::new(Cause::Refused, format!("no certificate within {ATTEMPT:?}"))),
        };
        let certificate = Certificate::from_pem(&pem);
        let certificate = certificate.map_err(|error| Failure::new(Cause::Refused, error))?;
        let validity = certificate.validity;
        self.serve(certificate, authority_folder);
        authority_folder.forget_attempt();
        self.state().trouble = None;
        tracing::info!(
            domains = config.domains.join(", "),
            expires = time(validity.not_after),
            renewal = time(renewal(validity)),
            "got a certificate"
        );
        self.state().unkept = Some((authority_folder.clone(), pem));
        self.keep_again().await;
        Ok(least_between(validity))
    }

    /// Writes the served certificate, if it is not written yet.
    async fn keep_again(&self) {
        let Some((authority_folder, pem)) = self.state().unkept.clone() else { return };
        match authority_folder.keep_certificate(pem).await {
            Ok(()) => self.state().unkept = None,
            Err(error) => {
                tracing::error!(%error, "cannot keep the served certificate, and a restart would lose it; trying again")
            }
        }
    }

    async fn note(
        &self,
        authority_folder: &AuthorityFolder,
        config: &AcmeConfig,
        failures: Failures,
        why: &str,
    ) -> Result<(), Failure> {
        Ok(authority_folder.keep_attempt(&Acme::noted(config, failures, why)).await?)
    }

    fn noted(config: &AcmeConfig, failures: Failures, why: &str) -> Attempt {
        let wait = i64::try_from(failures.wait().as_secs()).unwrap_or(i64::MAX);
        let (domains, retry_at) = (config.domains.clone(), now().saturating_add(wait));
        Attempt { domains, failures, why: why.to_owned(), retry_at }
    }

    async fn failed(&self, authority_folder: &AuthorityFolder, config: &AcmeConfig, failure: &Failure, row: Failures) {
        let why = failure.to_string();
        self.state().trouble = Some(why.clone());
        let domains = config.domains.join(", ");
        tracing::error!(domains, %failure, again_in = ?row.wait(), "cannot get a certificate; SIGHUP tries again at once");
        if let Err(failure) = self.note(authority_folder, config, row, &why).await {
            tracing::warn!(%failure, "cannot note the failed attempt: a restart would try again at once");
        }
    }
}

fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

fn time(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds).map_or_else(|_| seconds.to_string(), |time| time.to_string())
}

/// The last certificate that the authority gave, for clients on this machine.
pub(crate) fn leaf(config: &AcmeConfig, data_dir: &Path) -> Result<CertificateDer<'static>, String> {
    let authority_folder =
        AuthorityFolder::at(data_dir, &config.directory).certificate().map_err(|error| error.to_string())?;
    let text = authority_folder.ok_or("the authority has given no certificate yet")?;
    CertificateDer::from_pem_slice(text.as_bytes()).map_err(|error| streamgate_service::pem::problem(&error))
}

/// The report of `check`, which makes neither an account nor an order.
pub(crate) async fn inspect(config: &AcmeConfig, data_dir: &Path) -> Result<String, String> {
    let authority_folder = AuthorityFolder::at(data_dir, &config.directory);
    let certificate = match authority_folder.certificate().map_err(|error| error.to_string())? {
        Some(text) => {
            let certificate = Certificate::from_pem(&text).map_err(|error| error.to_string())?;
            format!("a certificate until {}", time(certificate.validity.not_after))
        }
        None => "no certificate yet".to_owned(),
    };
    authority::answers(config).await.map_err(|failure| format!("{}: {failure}", config.directory))?;
    Ok(format!("{}: {certificate}; {} answers", config.domains.join(", "), config.directory))
}
