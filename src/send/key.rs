//! The key that signs webhooks: from the configuration, of the development app, or typed in.

use crate::exit::BadUsage;
use crate::global::Global;
use crate::{dev, prompt};
use anyhow::Context;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use std::io::{self, BufRead, Write};
use streamgate_service::config::{ConfigError, Environment, Loaded, Source};
use streamgate_service::secret::Secret;

/// An API key with its secret.
#[derive(Debug)]
pub(super) struct Key {
    pub(super) api_key: String,
    pub(super) secret: Secret,
}

/// Loads the configuration without secrets: enough to know which app's secret is needed.
pub(super) fn load(global: &Global) -> Result<Loaded, ConfigError> {
    global.load_from(&source(global, None))
}

fn source(global: &Global, api_key: Option<&str>) -> Source {
    let source = global.source();
    Source { environment: source.environment.with_secrets_of(api_key), ..source }
}

impl Key {
    /// `named`: the API key to sign for; without it, the first one found.
    pub(super) fn find(global: &Global, loaded: &Loaded, named: Option<&str>) -> anyhow::Result<Key> {
        let apps = &loaded.config.apps;
        let mut keys = apps.iter().flat_map(|app| &app.keys).map(|key| key.api_key.as_str());
        let found = match named {
            Some(named) => keys.find(|key| *key == named),
            None => keys.next(),
        };
        if let Some(api_key) = found {
            return Key::configured(global, api_key);
        }
        let development = if apps.is_empty() { dev::existing(&loaded.config.store.data_dir)? } else { None };
        let mut development = development.into_iter().flat_map(|app| app.keys);
        let development = development.find(|key| named.is_none_or(|named| named == key.api_key));
        if let Some(key) = development {
            let secret = key.secrets.into_iter().next().context("the development app has no secret")?;
            return Ok(Key { api_key: key.api_key, secret });
        }
        match named {
            Some(named) if apps.is_empty() => Key::named(&global.source().environment, named),
            Some(named) => Err(BadUsage(format!("no app in the configuration has the API key {named:?}")).into()),
            None => {
                let what = format!(
                    "there is no secret to sign with: set STREAM_API_KEY and STREAM_API_SECRET, name a --config with an app, \
                     or name the --data-dir of a running `streamgate up` (looked in {})",
                    loaded.config.store.data_dir.display()
                );
                Err(BadUsage(what).into())
            }
        }
    }

    /// A key of the configuration. Asks for a secret that cannot be read here.
    fn configured(global: &Global, api_key: &str) -> anyhow::Result<Key> {
        let loaded = match global.load_quietly(&source(global, Some(api_key))) {
            Ok(loaded) => loaded,
            Err(error) => return Key::typed(api_key, error.into()),
        };
        let mut keys = loaded.config.apps.into_iter().flat_map(|app| app.keys);
        let key = keys.find(|key| key.api_key == api_key).context("the configuration has changed meanwhile")?;
        let secret = key.secrets.into_iter().next().context("the app has no secret")?;
        Ok(Key { api_key: key.api_key, secret })
    }

    /// A key outside the configuration, with the environment's secret or one that is typed in.
    fn named(environment: &Environment, api_key: &str) -> anyhow::Result<Key> {
        let given = ["STREAM_API_SECRET", "STREAM_SECRET"].into_iter().find_map(|name| environment.get(name));
        match given.filter(|secret| !secret.is_empty()) {
            Some(secret) => Ok(Key { api_key: api_key.to_owned(), secret: Secret::new(secret.to_owned()) }),
            None => {
                let what = format!(
                    "no secret is configured for the API key {api_key:?}: set STREAM_API_SECRET, or name a --config with the app"
                );
                Key::typed(api_key, BadUsage(what).into())
            }
        }
    }

    /// Asks on the terminal; without one, returns `why` as the error.
    fn typed(api_key: &str, why: anyhow::Error) -> anyhow::Result<Key> {
        if !prompt::is_possible() {
            return Err(why);
        }
        let question = format!("{why:#}\nAPI secret of {api_key} (it is not shown): ");
        let secret = hidden(&question).context("cannot read the secret from the terminal")?;
        if secret.is_empty() {
            return Err(why);
        }
        Ok(Key { api_key: api_key.to_owned(), secret: Secret::new(secret) })
    }
}

/// Reads a line with echo off. The question is shown after echo is off, so that not even input typed ahead is shown.
fn hidden(question: &str) -> io::Result<String> {
    let echo = NoEcho::start()?;
    write!(io::stderr(), "{question}")?;
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    drop(echo);
    writeln!(io::stderr())?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

/// The terminal's former settings, restored on drop.
struct NoEcho(Termios);

impl NoEcho {
    fn start() -> io::Result<NoEcho> {
        let before = tcgetattr(io::stdin())?;
        let mut quiet = before.clone();
        quiet.local_modes.remove(LocalModes::ECHO);
        tcsetattr(io::stdin(), OptionalActions::Flush, &quiet)?;
        Ok(NoEcho(before))
    }
}

impl Drop for NoEcho {
    fn drop(&mut self) {
        // A terminal that is gone shows nothing.
        tcsetattr(io::stdin(), OptionalActions::Now, &self.0).ok();
    }
}
