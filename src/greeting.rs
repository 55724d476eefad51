//! The greeting that a service prints on stdout once it is open, with a command to paste that works as printed.

use crate::dev;
use anyhow::Context;
use std::net::SocketAddr;
use std::path::PathBuf;
use streamgate_core::peer::Networks;
use streamgate_service::config::{Config, Loaded, TlsConfig};
use streamgate_worker::Hooks;
use tokio::net::TcpListener;

/// Binds a listener; the error says which key to set.
pub async fn bind(address: SocketAddr, key: &str) -> anyhow::Result<TcpListener> {
    let bound = TcpListener::bind(address).await;
    let denied = bound.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied);
    bound.with_context(|| {
        let variable = format!("STREAMGATE__{}", key.to_uppercase().replace('.', "__"));
        let allow = if denied { "allow it (ports under 1024 need CAP_NET_BIND_SERVICE), or " } else { "" };
        format!(
            "cannot listen on {address}; {allow}set {key} (or {variable}) to another address, port 0 for any free one"
        )
    })
}

/// Lines of names and values.
#[derive(Debug)]
pub struct Greeting {
    text: String,
}

impl Greeting {
    /// `what`: "Streamgate" or "Streamgate worker".
    pub fn new(what: &str) -> Greeting {
        Greeting { text: format!("{what} {} is up.\n\n", env!("CARGO_PKG_VERSION")) }
    }

    pub fn line(mut self, name: &str, value: impl std::fmt::Display) -> Greeting {
        self.text.push_str(&format!("  {name:<8}  {value}\n"));
        self
    }

    pub fn metrics(self, ops_listener: &TcpListener) -> anyhow::Result<Greeting> {
        let ops = reachable(ops_listener.local_addr()?);
        Ok(self.line("metrics", format_args!("http://{ops}/metrics")))
    }

    /// Adds the command that sends an event to this gateway.
    pub fn try_it(mut self, loaded: &Loaded, is_dev: bool, listener: &TcpListener) -> anyhow::Result<Greeting> {
        let config = &loaded.config;
        let (base, peer) = (base(loaded, listener)?, reachable(listener.local_addr()?).ip());
        let mut words = vec![program(), "send".into(), "--url".into(), base];
        // The certificate is for a name, not for this address.
        if let Some(TlsConfig::Files(files)) = &config.gateway.tls {
            words.extend(["--ca".into(), std::path::absolute(&files.cert)?.display().to_string()]);
        }
        if config.gateway.peers.has_header(peer) {
            words.push("--proxy-header".into());
        }
        // The data directory holds the development app's secret, and a certificate from an authority.
        if is_dev || matches!(config.gateway.tls, Some(TlsConfig::Acme(_))) {
            let data_dir = std::path::absolute(&config.store.data_dir)?;
            words.extend(["--data-dir".into(), data_dir.display().to_string()]);
        }
        let key = config.apps.first().and_then(|app| app.keys.first());
        if let Some(path) = &loaded.path {
            words.extend(["--config".into(), std::path::absolute(path)?.display().to_string()]);
        }
        // Named even if the file has the key: the app may come from the environment.
        if let Some(key) = key.filter(|_| !is_dev) {
            words.extend(["--api-key".into(), key.api_key.clone()]);
        }
        let command = shlex::try_join(words.iter().map(String::as_str)).context("a path holds a zero byte")?;
        let is_shut_out = |networks: &Networks| !networks.contain(peer);
        let note = match &config.gateway.peers.allow_from {
            Some(networks) if is_shut_out(networks) => " (gateway.allow_from excludes this machine: expect a 403)",
            Some(_) | None => "",
        };
        self.text.push_str(&format!("\nSend a signed event from another terminal{note}:\n\n  {command}\n"));
        Ok(self)
    }

    pub fn into_text(self) -> String {
        self.text
    }
}

/// Lists the hooks that are answered here.
pub fn hooks(hooks: &Hooks) -> String {
    if hooks.is_empty() { "none: gateways answer them by their policy".to_owned() } else { hooks.names().join(", ") }
}

/// `http://address`, as a client on this machine can use it.
pub fn base(loaded: &Loaded, listener: &TcpListener) -> anyhow::Result<String> {
    Ok(base_at(&loaded.config, listener.local_addr()?))
}

/// The base URL of a gateway with this configuration that listens on `address`.
pub fn base_at(config: &Config, address: SocketAddr) -> String {
    let scheme = if config.gateway.tls.is_some() { "https" } else { "http" };
    format!("{scheme}://{}", reachable(address))
}

/// The first API key, and the path of its secret if we made it.
pub fn key(loaded: &Loaded, is_dev: bool) -> anyhow::Result<String> {
    let key = loaded.config.apps.first().and_then(|app| app.keys.first()).map_or("", |key| key.api_key.as_str());
    if !is_dev {
        return Ok(key.to_owned());
    }
    let data_dir = std::path::absolute(&loaded.config.store.data_dir)?;
    Ok(format!("{key}, secret in {}", dev::secret_file(&data_dir).display()))
}

/// The address that a client on this machine can use.
pub fn reachable(address: SocketAddr) -> SocketAddr {
    let mut reachable = address;
    if address.ip().is_unspecified() {
        reachable.set_ip(if address.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() });
    }
    reachable
}

/// The command, by a path that works from any directory. A program that embeds the library has no `send`.
fn program() -> String {
    let path = std::env::current_exe().ok().filter(|path| path.file_stem().is_some_and(|name| name == "streamgate"));
    path.unwrap_or_else(|| PathBuf::from("streamgate")).display().to_string()
}
