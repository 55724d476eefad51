//! `[rabbitmq]` and `[redis]`: the backends of the two services.

use super::{MIB, environment::Environment, reader::Section};
use crate::secret::Secret;
use std::path::PathBuf;
use std::time::Duration;

/// `[rabbitmq]`
#[derive(Clone, Debug)]
pub struct RabbitMqConfig {
    /// amqp:// or amqps://, with user, password and virtual host; may be `env:NAME` or `file:PATH`.
    /// Default amqp://guest:guest@127.0.0.1:5672/%2f.
    pub url: Secret,
    /// For amqps://: a PEM file of authorities to trust in addition to the system's.
    pub ca: Option<PathBuf>,
    /// For amqps://: a PEM file with the client's certificate, and one with its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Prefix of every exchange and queue. Default `streamgate`.
    pub prefix: String,
    /// Most bytes of events in their queue; beyond it RabbitMQ refuses. Default 4 GiB.
    pub events_max: usize,
    /// Most bytes of one route's parked events in their queue; events beyond it go to the dead letters. Default:
    /// `events_max`.
    pub parked_max: usize,
    /// When the oldest unconfirmed publish is this old, new events go to the spool at once. Default 250 ms.
    pub spool_after: Duration,
    /// How long a publish waits for its confirm; then its event goes to the spool too. `gateway.answer_deadline`
    /// applies if it is shorter. Default 2 s.
    pub confirm_timeout: Duration,
    /// URL of RabbitMQ's management API, as http://user:password@host:15672; may be `env:NAME` or `file:PATH`. Only
    /// `streamgate check` uses it, for policies that AMQP does not show. Default none.
    pub management_url: Option<Secret>,
    /// Whether the services declare exchanges and queues; otherwise operators declare them and the services verify
    /// them. Default true.
    pub declare: bool,
}

/// `[redis]`
#[derive(Clone, Debug)]
pub struct RedisConfig {
    /// redis:// or rediss://, redis+sentinel://…/master or redis+cluster:// with several hosts; may be `env:NAME` or
    /// `file:PATH`. Default redis://127.0.0.1:6379.
    pub url: Secret,
    /// For TLS: a PEM file with the authorities to trust instead of the system's.
    pub ca: Option<PathBuf>,
    /// Prefix of every key. Default `streamgate`.
    pub prefix: String,
    /// Timeout of every command; after it the event goes on without Redis. Default 100 ms.
    pub timeout: Duration,
}

impl RabbitMqConfig {
    /// The files that a connection is made from.
    pub fn files(&self) -> impl Iterator<Item = PathBuf> {
        let (cert, key) = self.identity.clone().unzip();
        [self.ca.clone(), cert, key].into_iter().flatten()
    }

    pub(super) fn read(mut section: Section<'_>, environment: &Environment) -> RabbitMqConfig {
        let url = url(&mut section, environment, "amqp://guest:guest@127.0.0.1:5672/%2f", &["amqp", "amqps"]);
        let files = (file(&mut section, "cert"), file(&mut section, "key"));
        let identity = match files {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => {
                section.problem("cert", "and key go together: name both files or none");
                None
            }
        };
        let events_max = section.size("events_max", 4 << 30);
        let config = RabbitMqConfig {
            url,
            ca: file(&mut section, "ca"),
            identity,
            prefix: prefix(&mut section),
            events_max,
            parked_max: section.size("parked_max", events_max),
            spool_after: section.duration("spool_after", Duration::from_millis(250)),
            confirm_timeout: section.duration("confirm_timeout", Duration::from_secs(2)),
            management_url: section.reference("management_url").and_then(|text| {
                let resolved = environment.backend_url(&text, "http");
                let url = resolved.map_err(|what| section.problem("management_url", what)).ok()?;
                management_doubt(&url).into_iter().for_each(|doubt| section.doubt("management_url", doubt));
                Some(url)
            }),
            declare: section.flag("declare", true),
        };
        if config.events_max < MIB {
            section.problem("events_max", "must be at least 1MiB");
        }
        let secure = config.url.expose().starts_with("amqps:");
        if !secure && (config.ca.is_some() || config.identity.is_some()) {
            section.problem("url", "must be amqps:// where ca, cert or key is set");
        }
        section.finish();
        config
    }
}

impl RedisConfig {
    pub(super) fn read(mut section: Section<'_>, environment: &Environment) -> RedisConfig {
        const SCHEMES: [&str; 6] =
            ["redis", "rediss", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"];
        let config = RedisConfig {
            url: url(&mut section, environment, "redis://127.0.0.1:6379", &SCHEMES),
            ca: file(&mut section, "ca"),
            prefix: prefix(&mut section),
            timeout: section.duration("timeout", Duration::from_millis(100)),
        };
        if config.ca.is_some() && !config.url.expose().starts_with("rediss") {
            section.problem("url", "must be rediss:// where ca is set");
        }
        section.finish();
        config
    }
}

/// Checks only the URL's shape; the rest is the adapter's to judge. Never quoted, because it holds a password.
fn url(section: &mut Section<'_>, environment: &Environment, default: &str, schemes: &[&str]) -> Secret {
    let text = section.reference("url").unwrap_or_else(|| default.to_owned());
    let url = match environment.backend_url(&text, schemes.last().copied().unwrap_or_default()) {
        Ok(url) => url,
        Err(what) => {
            section.problem("url", what);
            return Secret::new(default.to_owned());
        }
    };
    let rest = url.expose().split_once("://").filter(|(scheme, _)| schemes.contains(scheme)).map(|(_, rest)| rest);
    let host = rest.and_then(|rest| rest.split(['/', '?', '#']).next()?.rsplit('@').next());
    if let Some(Err(what)) = host.map(super::url_port) {
        section.problem("url", what);
    }
    if host.is_none_or(str::is_empty) {
        let schemes = schemes.iter().map(|scheme| format!("{scheme}://")).collect::<Vec<_>>().join(", ");
        section.problem("url", format!("takes a URL with a host and one of the schemes {schemes}"));
    }
    url
}

/// Only `check` uses this URL, so a mistake in it is a doubt. Never quoted, because it holds a password.
fn management_doubt(url: &Secret) -> Option<String> {
    let parsed: Option<hyper::Uri> = url.expose().parse().ok();
    let is_http = |uri: &hyper::Uri| matches!(uri.scheme_str(), Some("http" | "https"));
    match parsed.filter(is_http).as_ref().and_then(hyper::Uri::authority) {
        Some(authority) => super::url_port(authority.as_str().rsplit('@').next().unwrap_or_default()).err(),
        None => Some("takes an http:// or https:// URL, like http://user:password@host:15672".to_owned()),
    }
}

fn file(section: &mut Section<'_>, key: &'static str) -> Option<PathBuf> {
    section.text(key).map(PathBuf::from)
}

fn prefix(section: &mut Section<'_>) -> String {
    let parse = |text: &str| {
        let safe = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
        if (1..=64).contains(&text.len()) && text.bytes().all(safe) {
            Ok(text.to_owned())
        } else {
            Err("takes 1 to 64 characters of A-Z, a-z, 0-9, _, . and -".to_owned())
        }
    };
    section.parsed("prefix", parse).unwrap_or_else(|| "streamgate".to_owned())
}
