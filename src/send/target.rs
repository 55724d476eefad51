//! Where webhooks are sent: to the configuration's gateway, or to another one.

use super::Send;
use crate::exit::BadUsage;
use crate::greeting::base_at;
use hyper::Uri;
use std::net::{IpAddr, SocketAddr};
use streamgate_gateway::tls_leaf;
use streamgate_service::config::Config;
use streamgate_service::http_client::{HttpClient, OwnGatewayClient};

#[derive(Debug)]
pub(super) struct Target {
    pub(super) url: Uri,
    pub(super) client: HttpClient,
}

impl Target {
    pub(super) fn of(args: &Send, config: &Config) -> anyhow::Result<Target> {
        let base = match &args.url {
            Some(url) => url.clone(),
            None => own(config)?,
        };
        let url = url(&base, &args.kind.path(args.event_type.as_deref()))?;
        let address = own_address(config, &url);
        let certificate = match (&config.gateway.tls, address) {
            (Some(tls), Some(_)) => tls_leaf(tls, &config.store.data_dir)
                .map_err(|error| tracing::warn!("{error}; only the system's certificate authorities are trusted"))
                .ok(),
            (Some(_), None) | (None, _) => None,
        };
        let expected = || address.is_some_and(|address| config.gateway.peers.has_header(address));
        let proxy_header = args.proxy_header.unwrap_or_else(expected);
        let client = OwnGatewayClient { ca: args.ca.as_deref(), certificate, proxy_header }.client()?;
        Ok(Target { url, client })
    }
}

/// The base URL of the configuration's own gateway, for a client on its machine.
fn own(config: &Config) -> Result<String, BadUsage> {
    let gateway = &config.gateway;
    if gateway.listen.port() == 0 {
        let what = "gateway.listen has port 0, so the port is not known: pass the --url that the gateway printed";
        return Err(BadUsage(what.to_owned()));
    }
    Ok(base_at(config, gateway.listen))
}

/// The address, if the configuration's own gateway listens on it. Not for a host name: that says nothing about the
/// listener, and the certificate has to be for the name.
fn own_address(config: &Config, url: &Uri) -> Option<IpAddr> {
    let listen = config.gateway.listen;
    let host = url.host()?.trim_start_matches('[').trim_end_matches(']');
    let default = if url.scheme_str() == Some("https") { 443 } else { 80 };
    let address = SocketAddr::new(host.parse().ok()?, url.port_u16().unwrap_or(default));
    let is_port = listen.port() == 0 || listen.port() == address.port();
    // A gateway on one network address is not what the same port of loopback leads to.
    let is_here = listen.ip().is_unspecified() || listen.ip().is_loopback();
    let is_host = listen.ip() == address.ip() || (is_here && address.ip().is_loopback());
    (is_port && is_host).then(|| address.ip())
}

/// Adds the path of the kind to a base URL; a URL that has a path is used as it is.
fn url(text: &str, path: &str) -> Result<Uri, BadUsage> {
    let wrong = || BadUsage(format!("--url takes a URL like http://127.0.0.1:8080, not {text:?}"));
    if text.contains('@') {
        return Err(BadUsage("--url takes no user and password".to_owned()));
    }
    let url: Uri = text.parse().map_err(|_| wrong())?;
    if !matches!(url.scheme_str(), Some("http" | "https")) || url.host().is_none_or(str::is_empty) {
        return Err(wrong());
    }
    if url.path() != "/" || url.query().is_some() {
        return Ok(url);
    }
    let mut parts = url.into_parts();
    parts.path_and_query = Some(path.parse().map_err(|_| BadUsage(format!("--type is not valid in a URL: {path:?}")))?);
    Uri::from_parts(parts).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::super::KindArg;
    use super::*;
    use streamgate_service::config::{Environment, from_text};

    #[test]
    fn a_base_url_gets_the_path() {
        let path =
            |text| url(text, &KindArg::Push.path(None)).map(|url| url.to_string()).map_err(|error| error.to_string());
        assert_eq!(path("http://127.0.0.1:8080").unwrap(), "http://127.0.0.1:8080/webhooks/stream/push");
        assert_eq!(path("https://host/").unwrap(), "https://host/webhooks/stream/push");
        assert_eq!(path("http://host/other?x=1").unwrap(), "http://host/other?x=1");
        let command = url("http://h", &KindArg::CustomCommand.path(Some("giphy"))).unwrap();
        assert_eq!(command.to_string(), "http://h/webhooks/stream/custom-commands?type=giphy");
        let pending = url("http://h", &KindArg::Push.path(Some("pending_message.deleted"))).unwrap();
        assert_eq!(pending.path(), "/webhooks/stream/pending-message/DeletedPendingMessage");
        assert!(path("127.0.0.1:8080").is_err() && path("ftp://host").is_err() && path("").is_err());
    }

    #[test]
    fn the_configurations_own_address_is_known() {
        for (listen, expected) in [
            ("0.0.0.0:9000", "http://127.0.0.1:9000"),
            ("[::]:9000", "http://[::1]:9000"),
            ("10.0.0.5:80", "http://10.0.0.5:80"),
        ] {
            let text = format!("[gateway]\nlisten = '{listen}'");
            let config = from_text(None, Some(&text), &Environment::of([])).unwrap().config;
            assert_eq!(own(&config).unwrap(), expected);
            assert!(own_address(&config, &expected.parse().unwrap()).is_some(), "{expected}");
            for other in ["http://127.0.0.1:9001", "http://localhost:9000", "http://192.0.2.1:9000"] {
                assert_eq!(own_address(&config, &other.parse().unwrap()), None, "{other}");
            }
        }
        let config = from_text(None, Some("[gateway]\nlisten = '127.0.0.1:0'"), &Environment::of([])).unwrap().config;
        assert!(own(&config).unwrap_err().to_string().contains("--url"));
    }
}
