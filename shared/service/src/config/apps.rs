//! `[[apps]]`: the apps whose webhooks are accepted, and the secrets that may have signed them.

use super::{
    environment::Environment,
    is_name,
    reader::{Report, Section},
};
use crate::secret::Secret;
use std::collections::HashSet;
use std::sync::Arc;
use streamgate_core::{
    apps::{AppKey, Apps},
    signature::SigningKey,
};

/// One Stream app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppConfig {
    /// Used in labels and routing keys: `[a-z0-9_-]{1,64}`.
    pub name: String,
    pub keys: Vec<KeyConfig>,
}

/// One API key of an app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyConfig {
    /// Compared with X-Api-Key.
    pub api_key: String,
    /// Any of them may verify; `streamgate send` signs with the first one.
    pub secrets: Vec<Secret>,
}

impl AppConfig {
    /// An app with one key and one secret.
    pub fn single(name: &str, api_key: String, secret: Secret) -> AppConfig {
        let key = KeyConfig { api_key, secrets: vec![secret] };
        AppConfig { name: name.to_owned(), keys: vec![key] }
    }

    /// The names of all apps.
    pub fn names(apps: &[AppConfig]) -> Vec<&str> {
        apps.iter().map(|app| app.name.as_str()).collect()
    }

    /// The table that verifies requests.
    pub fn table(apps: &[AppConfig]) -> Apps {
        let mut table = Apps::default();
        for app in apps {
            let name: Arc<str> = app.name.as_str().into();
            for key in &app.keys {
                let secrets = key.secrets.iter().map(|secret| SigningKey::new(secret.expose().as_bytes())).collect();
                table.insert(key.api_key.clone(), AppKey { app: Arc::clone(&name), secrets });
            }
        }
        table
    }
}

pub(super) fn read(sections: Vec<Section<'_>>, environment: &Environment, report: &Report) -> Vec<AppConfig> {
    if sections.is_empty() {
        return from_environment(environment, report).into_iter().collect();
    }
    sections
        .into_iter()
        .map(|mut section| {
            let name = section.text("name").unwrap_or_default();
            if !is_name(&name) {
                section.problem("name", super::NAME);
            }
            let keys: Vec<_> = section.sections("keys").into_iter().map(|key| read_key(key, environment)).collect();
            if keys.is_empty() {
                section.problem("keys", "is missing: add [[apps.keys]] with api_key and secrets");
            }
            section.finish();
            AppConfig { name, keys }
        })
        .collect()
}

fn read_key(mut section: Section<'_>, environment: &Environment) -> KeyConfig {
    let given = section.text("api_key");
    let is_reported = given.is_none() && section.was_given("api_key");
    let api_key = given.unwrap_or_default();
    if is_reported {
        // The mistake was reported when the value was read.
    } else if api_key.is_empty() || api_key.len() > 128 || !api_key.bytes().all(|byte| byte.is_ascii_graphic()) {
        section.problem("api_key", "takes your app's API key: 1 to 128 printable characters without spaces");
    }
    let mut secrets = Vec::new();
    let texts = section.references("secrets").unwrap_or_default();
    if texts.is_empty() {
        section.problem("secrets", "takes a list of at least one secret, like [\"env:STREAM_API_SECRET\"]");
    }
    for text in texts {
        match environment.app_secret(&api_key, &text).and_then(judged) {
            Ok((secret, doubt)) => {
                secrets.push(secret);
                if let Some(doubt) = doubt {
                    section.doubt("secrets", doubt);
                }
            }
            Err(what) => section.problem("secrets", what),
        }
    }
    section.finish();
    KeyConfig { api_key, secrets }
}

/// Stream's secrets have 64 characters; a secret shorter than this can be guessed from one signed request.
const SHORT: usize = 16;

/// Rejects ambiguous texts: they would verify nothing, or anything. Quotes nothing of the secret. An empty secret was
/// left unread.
fn judged(secret: Secret) -> Result<(Secret, Option<&'static str>), String> {
    let text = secret.expose();
    let trimmed = text.trim();
    let quoted = |quote: char| trimmed.len() > 1 && trimmed.starts_with(quote) && trimmed.ends_with(quote);
    let what = if text.is_empty() {
        return Ok((secret, None));
    } else if trimmed.is_empty() {
        "holds a secret of nothing but white space: write the API secret of the app"
    } else if trimmed.starts_with("file:") || trimmed.starts_with("env:") {
        "holds a reference with white space in front, which would be taken as the secret itself: remove it"
    } else if trimmed.len() < text.len() {
        "holds a secret with white space around it: remove it"
    } else if quoted('"') || quoted('\'') {
        "holds a secret with quotes around it, which would be part of it: remove them"
    } else {
        let is_short = text.chars().count() < SHORT;
        let doubt = "holds a secret of under 16 characters, which can be guessed: is it the app's API secret?";
        return Ok((secret, is_short.then_some(doubt)));
    };
    Err(what.to_owned())
}

/// The app of the environment variables that Stream's own SDKs and CLI read. Half a pair is a mistake: unreported,
/// every webhook of that app would be refused for good.
fn from_environment(environment: &Environment, report: &Report) -> Option<AppConfig> {
    let given = |name| environment.get(name).filter(|value| !value.is_empty());
    [("STREAM_API_KEY", "STREAM_API_SECRET"), ("STREAM_KEY", "STREAM_SECRET")].into_iter().find_map(|(key, secret)| {
        match (given(key), given(secret)) {
            (Some(api_key), Some(value)) => match judged(Secret::new(value.to_owned())) {
                Ok((judged, doubt)) => {
                    if let Some(doubt) = doubt {
                        report.doubt(format!("the environment variable {secret}"), doubt);
                    }
                    Some(AppConfig::single("chat", api_key.to_owned(), judged))
                }
                Err(what) => {
                    report.problem(format!("the environment variable {secret}"), what);
                    None
                }
            },
            // A command that reads no secret does not require one.
            (Some(api_key), None) if !environment.reads_secrets_of(api_key) => {
                Some(AppConfig::single("chat", api_key.to_owned(), Secret::new(String::new())))
            }
            (None, Some(_)) if !environment.reads_secrets_of("") => None,
            (Some(_), None) => {
                report.problem("apps", format!("the environment has {key} but not {secret}"));
                None
            }
            (None, Some(_)) => {
                report.problem("apps", format!("the environment has {secret} but not {key}"));
                None
            }
            (None, None) => None,
        }
    })
}

pub(super) fn cross_check(apps: &[AppConfig], report: &Report) {
    let (mut names, mut keys) = (HashSet::new(), HashSet::new());
    for (place, app) in apps.iter().enumerate() {
        if !names.insert(&app.name) {
            report
                .problem(format!("apps[{}].name", place + 1), format!("{:?} is the name of an earlier app", app.name));
        }
        for (key_place, key) in app.keys.iter().enumerate() {
            if !keys.insert(&key.api_key) {
                let path = format!("apps[{}].keys[{}].api_key", place + 1, key_place + 1);
                report.problem(path, "appears twice: put all its secrets under one entry");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_secrets() {
        let said = |text: &str| match judged(Secret::new(text.to_owned())) {
            Ok((_, None)) => "good".to_owned(),
            Ok((_, Some(doubt))) => format!("doubt: {doubt}"),
            Err(what) => what,
        };
        let cases = [
            ("0123456789abcdef", "good"),
            ("it's a \"quoted\" word", "good"),
            ("", "good"),
            ("0123456789abcde", "doubt: holds a secret of under 16 characters"),
            ("   \t", "nothing but white space"),
            (" file:/run/secrets/app", "a reference with white space in front"),
            ("\tenv:SECRET", "a reference with white space in front"),
            ("0123456789abcdef\n\n", "white space around it"),
            (" 0123456789abcdef", "white space around it"),
            ("\"0123456789abcdef\"", "quotes around it"),
            ("'0123456789abcdef'", "quotes around it"),
        ];
        for (text, expected) in cases {
            assert!(said(text).contains(expected), "{text:?}: {}", said(text));
            assert!(text.trim().is_empty() || !said(text).contains(text.trim()), "{text:?} is quoted");
        }
    }
}
