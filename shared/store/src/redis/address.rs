//! Where Redis is: one server, the master that Sentinels name, or a cluster.

use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::cluster::ClusterClientBuilder;
use redis::cluster_async::ClusterConnection;
use redis::io::tcp::TcpSettings;
use redis::sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType};
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, IntoConnectionInfo, Pipeline, RedisError, RedisFuture,
    RedisResult, TlsCertificates, TlsMode, Value,
};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

const PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

/// Why a URL or its file cannot be used. The messages contain nothing of the URL.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    #[error("is not a valid Redis URL: {0}; expected one like redis://user:password@host:6379/0")]
    Malformed(String),
    #[error("names no host")]
    NoHost,
    #[error("names no master; write it like redis+sentinel://host:26379,host:26379/mymaster")]
    NoMaster,
    #[error("cannot read {}: {error}", path.display())]
    File { path: PathBuf, error: std::io::Error },
}

/// How to reach Redis. Its `Debug` and `Display` show neither user nor password.
pub struct Address {
    shown: String,
    target: Target,
    source: Source,
}

/// The inputs of an address: the URL, and the contents of its CA file.
#[derive(PartialEq, Eq)]
struct Source(String, Option<Vec<u8>>);

enum Target {
    Single(Client),
    Sentinel(tokio::sync::Mutex<SentinelClient>),
    Cluster(redis::cluster::ClusterClient),
}

impl std::fmt::Debug for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Address").field(&self.shown).finish()
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.shown)
    }
}

/// The parts of a URL with several hosts, as `redis+sentinel://user:password@one:1,two:2/master/0`.
struct Parts<'u> {
    secure: bool,
    credentials: Option<&'u str>,
    hosts: Vec<&'u str>,
    path: Vec<&'u str>,
    /// The query: the Sentinels' own login.
    query: HashMap<&'u str, &'u str>,
}

/// Query parameters with the Sentinels' own login, where they have one: `…/master?sentinel_password=secret`.
const SENTINEL_LOGIN: [&str; 2] = ["sentinel_username", "sentinel_password"];

impl Address {
    pub fn parse(url: &str, ca: Option<&Path>) -> Result<Address, AddressError> {
        let read =
            |path: &Path| std::fs::read(path).map_err(|error| AddressError::File { path: path.to_owned(), error });
        let certificates = ca.map(read).transpose()?;
        let source = Source(url.to_owned(), certificates.clone());
        let certificates = certificates.map(|pem| TlsCertificates { client_tls: None, root_cert: Some(pem) });
        let (scheme, rest) = url.split_once("://").ok_or(AddressError::NoHost)?;
        let (scheme, topology) = scheme.split_once('+').unwrap_or((scheme, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (path, query) = match topology {
            "sentinel" => path.split_once('?').unwrap_or((path, "")),
            _ => (path, ""),
        };
        let query: HashMap<_, _> = query.split('&').filter_map(|pair| pair.split_once('=')).collect();
        // The query is not quoted in the error: it may be a part of a password.
        if query.keys().any(|name| !SENTINEL_LOGIN.contains(name)) {
            let known = SENTINEL_LOGIN.join(" and ");
            let what = format!("it may only have the parameters {known}; write an & in a password as %26");
            return Err(AddressError::Malformed(what));
        }
        let (credentials, hosts) = match authority.rsplit_once('@') {
            Some((credentials, hosts)) => (Some(credentials), hosts),
            None => (None, authority),
        };
        let parts = Parts {
            secure: scheme == "rediss",
            credentials,
            hosts: hosts.split(',').filter(|host| !host.is_empty()).collect(),
            path: path.split('/').filter(|part| !part.is_empty()).collect(),
            query,
        };
        if parts.hosts.is_empty() {
            return Err(AddressError::NoHost);
        }
        let target = match topology {
            "sentinel" => Target::Sentinel(tokio::sync::Mutex::new(sentinel(&parts, certificates)?)),
            "cluster" => Target::Cluster(cluster(&parts, certificates)?),
            _ => {
                let server = url.into_connection_info().map_err(malformed)?.set_tcp_settings(at_once());
                let client = match certificates {
                    Some(certificates) => Client::build_with_tls(server, certificates),
                    None => Client::open(server),
                };
                Target::Single(client.map_err(malformed)?)
            }
        };
        Ok(Address { shown: hosts.to_owned(), target, source })
    }

    /// Whether it was made from another URL or CA file.
    pub(super) fn differs(&self, other: &Address) -> bool {
        self.source != other.source
    }

    pub(super) async fn dial(&self, timeout: Duration) -> RedisResult<Connection> {
        let config = ||             // Around every command there is a timeout of our own.
            AsyncConnectionConfig::new().set_connection_timeout(Some(timeout)).set_response_timeout(None);
        match &self.target {
            Target::Single(client) => {
                client.get_multiplexed_async_connection_with_config(&config()).await.map(Connection::Server)
            }
            Target::Sentinel(client) => {
                let mut client = client.lock().await;
                client.get_async_connection_with_config(&config()).await.map(Connection::Server)
            }
            Target::Cluster(client) => client.get_async_connection().await.map(Connection::Cluster),
        }
    }
}

/// Sends every command at once. Callers share a connection, and by default the kernel may hold a small packet back
/// until the previous one is acknowledged, which is when another caller's reply arrives.
fn at_once() -> TcpSettings {
    TcpSettings::default().set_nodelay(true)
}

fn malformed(error: RedisError) -> AddressError {
    AddressError::Malformed(error.category().to_owned())
}

impl<'u> Parts<'u> {
    /// A URL for one of the hosts, as the library parses it.
    fn url(&self, host: &str, database: &str) -> String {
        let scheme = if self.secure { "rediss" } else { "redis" };
        let credentials = self.credentials.map(|text| format!("{text}@")).unwrap_or_default();
        format!("{scheme}://{credentials}{host}/{database}")
    }

    fn tls(&self) -> Option<TlsMode> {
        self.secure.then_some(TlsMode::Secure)
    }
}

fn sentinel(parts: &Parts<'_>, certificates: Option<TlsCertificates>) -> Result<SentinelClient, AddressError> {
    let (Some(master), database) = (parts.path.first(), parts.path.get(1).copied().unwrap_or("0")) else {
        return Err(AddressError::NoMaster);
    };
    let hosts = parts.hosts.iter().map(|host| match host.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => {
            let port = port.parse().map_err(|_| AddressError::Malformed("a port is not a number".to_owned()))?;
            Ok(ConnectionAddr::Tcp(name.trim_matches(['[', ']']).to_owned(), port))
        }
        _ => Ok(ConnectionAddr::Tcp(host.trim_matches(['[', ']']).to_owned(), SENTINEL_PORT)),
    });
    let hosts: Vec<_> = hosts.collect::<Result<_, AddressError>>()?;
    let mut builder = SentinelClientBuilder::new(hosts, *master, SentinelServerType::Master).map_err(malformed)?;
    // The library parses user, password and database from a URL; the host stands in for the master, which is not known
    // yet.
    let url = parts.url(&format!("master:{PORT}"), database);
    let known = Client::open(url.as_str()).map_err(malformed)?;
    let login = known.get_connection_info().redis_settings();
    builder = builder.set_client_to_redis_db(login.db()).set_client_to_redis_tcp_settings(at_once());
    if let Some(user) = login.username() {
        builder = builder.set_client_to_redis_username(user);
    }
    if let Some(password) = login.password() {
        builder = builder.set_client_to_redis_password(password);
    }
    let [user, password] = SENTINEL_LOGIN.map(|name| parts.query.get(name).copied());
    if user.is_some() || password.is_some() {
        // The library decodes the percent-encoding.
        let url = format!("redis://{}:{}@sentinel", user.unwrap_or_default(), password.unwrap_or_default());
        let known = Client::open(url.as_str()).map_err(malformed)?;
        let login = known.get_connection_info().redis_settings();
        if let Some(user) = login.username() {
            builder = builder.set_client_to_sentinel_username(user);
        }
        if let Some(password) = login.password() {
            builder = builder.set_client_to_sentinel_password(password);
        }
    }
    if let Some(tls) = parts.tls() {
        builder = builder.set_client_to_redis_tls_mode(tls).set_client_to_sentinel_tls_mode(tls);
    }
    if let Some(certificates) = certificates {
        builder = builder
            .set_client_to_redis_certificates(certificates.clone())
            .set_client_to_sentinel_certificates(certificates);
    }
    builder.build().map_err(malformed)
}

fn cluster(
    parts: &Parts<'_>,
    certificates: Option<TlsCertificates>,
) -> Result<redis::cluster::ClusterClient, AddressError> {
    let mut builder = ClusterClientBuilder::new(parts.hosts.iter().map(|host| parts.url(host, "")));
    // One retry, to follow a slot that moved. A command that takes longer goes on without Redis.
    builder = builder.retries(1).tcp_settings(at_once());
    if let Some(certificates) = certificates {
        builder = builder.certs(certificates);
    }
    builder.build().map_err(malformed)
}

/// An open connection; clones share it.
#[derive(Clone)]
pub(super) enum Connection {
    Server(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connection(…)")
    }
}

impl ConnectionLike for Connection {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Connection::Server(server) => server.req_packed_command(cmd),
            Connection::Cluster(cluster) => cluster.req_packed_command(cmd),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Connection::Server(server) => server.req_packed_commands(pipeline, offset, count),
            Connection::Cluster(cluster) => cluster.req_packed_commands(pipeline, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        match self {
            Connection::Server(server) => server.get_db(),
            Connection::Cluster(cluster) => cluster.get_db(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_each_kind() {
        let shown = |url: &str| Address::parse(url, None).map(|address| address.to_string()).map_err(|e| e.to_string());
        assert_eq!(shown("redis://ann:hunter2@host:1/2"), Ok("host:1".into()));
        assert_eq!(shown("redis+sentinel://:hunter2@a:1,b/main/3"), Ok("a:1,b".into()));
        assert_eq!(shown("redis+sentinel://a:1/main?sentinel_password=hunter2"), Ok("a:1".into()));
        let unknown = shown("redis+sentinel://a:1/main?password=hunter2").unwrap_err();
        assert!(unknown.contains("sentinel_password") && !unknown.contains("hunter2"), "{unknown}");
        assert_eq!(shown("rediss+cluster://ann:hunter2@a:1,b:2"), Ok("a:1,b:2".into()));
        for wrong in ["redis://", "redis+sentinel://a:1", "redis+cluster:///", "redis://ann:hunter2@host:port"] {
            let error = shown(wrong).unwrap_err();
            assert!(!error.contains("hunter2"), "{error}");
        }
        assert!(matches!(Address::parse("rediss://a", Some(Path::new("/none"))), Err(AddressError::File { .. })));
    }
}
