//! The environment that a configuration is read with: its variables, the files that it names, and which secrets are
//! read at all.

use super::reader::is_reference;
use crate::secret::Secret;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// The process environment, copied once, so that tests can provide their own.
#[derive(Clone, Default)]
pub struct Environment {
    pub(super) variables: BTreeMap<String, String>,
    /// The secrets that are left unread.
    blind: Blind,
    /// The files that values were read from, through any clone.
    files: Arc<Mutex<BTreeSet<PathBuf>>>,
}

#[derive(Clone, Debug, Default)]
struct Blind {
    apps: AppSecrets,
    routes: bool,
    backends: bool,
}

/// Which of Stream's secrets are read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum AppSecrets {
    #[default]
    All,
    None,
    /// Those of one API key.
    Of(String),
}

impl AppSecrets {
    fn are_read(&self, of: &str) -> bool {
        match self {
            AppSecrets::All => true,
            AppSecrets::None => false,
            AppSecrets::Of(api_key) => api_key == of,
        }
    }
}

impl std::fmt::Debug for Environment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Environment(…)")
    }
}

impl Environment {
    /// Ignores variables that are not UTF-8: none of ours are.
    pub fn of_process() -> Environment {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Environment { variables: std::env::vars_os().filter_map(text).collect(), ..Environment::default() }
    }

    pub fn of<const N: usize>(variables: [(&str, &str); N]) -> Environment {
        let variables = variables.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Environment { variables, ..Environment::default() }
    }

    /// For commands that need no secret: they work where the secrets are not available.
    pub fn without_secrets(self) -> Environment {
        Environment { blind: Blind { apps: AppSecrets::None, routes: true, backends: false }, ..self }
    }

    /// For commands that talk only to the gateway: reads the secrets of one API key, or none.
    pub fn with_secrets_of(self, api_key: Option<&str>) -> Environment {
        let apps = api_key.map_or(AppSecrets::None, |api_key| AppSecrets::Of(api_key.to_owned()));
        Environment { blind: Blind { apps, routes: true, backends: true }, ..self }
    }

    /// For workers: they verify no webhooks, so Stream's secrets may be absent.
    pub fn without_app_secrets(self) -> Environment {
        Environment { blind: Blind { apps: AppSecrets::None, ..self.blind }, ..self }
    }

    /// For gateways: they forward nothing, so the services' secrets may be absent.
    pub fn without_route_secrets(self) -> Environment {
        Environment { blind: Blind { routes: true, ..self.blind }, ..self }
    }

    /// The files that values were read from, or should have been.
    pub fn files(&self) -> BTreeSet<PathBuf> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str)
    }

    /// A secret that Stream signs with; empty if it is not to be read.
    pub(super) fn app_secret(&self, api_key: &str, reference: &str) -> Result<Secret, String> {
        if self.reads_secrets_of(api_key) { self.resolve(reference) } else { Ok(Secret::new(String::new())) }
    }

    pub(super) fn reads_secrets_of(&self, api_key: &str) -> bool {
        self.blind.apps.are_read(api_key)
    }

    /// The URL of RabbitMQ or Redis, with its password; if it is not to be read, a placeholder of this scheme.
    pub(super) fn backend_url(&self, reference: &str, scheme: &str) -> Result<Secret, String> {
        if self.blind.backends && is_reference(reference) {
            return Ok(Secret::new(format!("{scheme}://localhost")));
        }
        self.resolve(reference)
    }

    /// A secret that is sent to a service.
    pub(super) fn route_secret(&self, reference: &str) -> Result<Secret, String> {
        if self.blind.routes { Ok(Secret::new(String::new())) } else { self.resolve(reference) }
    }

    /// Resolves `env:NAME`, `file:PATH` (one line break at the end of either is not part of the secret), or the secret
    /// itself.
    pub fn resolve(&self, reference: &str) -> Result<Secret, String> {
        let value = if let Some(name) = reference.strip_prefix("env:") {
            let text = self.get(name).ok_or_else(|| format!("the environment variable {name} is not set"))?;
            without_line_break(text).to_owned()
        } else if let Some(path) = reference.strip_prefix("file:") {
            self.files.lock().unwrap_or_else(PoisonError::into_inner).insert(path.into());
            let text =
                std::fs::read_to_string(path).map_err(|error| format!("cannot read the file {path}: {error}"))?;
            without_line_break(&text).to_owned()
        } else {
            reference.to_owned()
        };
        if value.is_empty() { Err("is empty".to_owned()) } else { Ok(Secret::new(value)) }
    }
}

fn without_line_break(text: &str) -> &str {
    let text = text.strip_suffix('\n').unwrap_or(text);
    text.strip_suffix('\r').unwrap_or(text)
}
