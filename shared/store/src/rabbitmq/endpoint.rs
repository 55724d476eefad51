//! Where RabbitMQ is and which user we log in as; what a failed dial means to an operator.

use arc_swap::ArcSwap;
use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Connection, ConnectionProperties, ErrorKind};
use std::io::ErrorKind::{ConnectionAborted, ConnectionReset, UnexpectedEof};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Seconds between heartbeats: two missed ones end the connection, on either side.
const HEARTBEAT: u16 = 10;
/// Time limit from the first packet to an open connection.
const DIAL: Duration = Duration::from_secs(5);
/// Time limit for a reply of the broker to a request that it answers at once.
pub(super) const REPLY_TIMEOUT: Duration = Duration::from_secs(5);
const ACCESS_REFUSED: u16 = 403;
const NOT_ALLOWED: u16 = 530;

/// A broker's address with credentials. It can be replaced: each dial uses the latest. Its `Debug` shows neither user
/// nor password.
#[derive(Clone)]
pub struct Endpoint(Arc<ArcSwap<Login>>);

struct Login {
    uri: AMQPUri,
    tls: OwnedTLSConfig,
    /// The inputs that it was made from, to compare.
    source: Source,
}

#[derive(PartialEq, Eq)]
struct Source {
    url: String,
    /// The contents of authority, certificate and key.
    files: [Option<String>; 3],
}

/// Why a URL or its files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    #[error("is not a valid AMQP URL: expected one like amqp://user:password@host:5672/%2f")]
    Malformed,
    #[error("names the virtual host \"\"; the default one is written %2f")]
    NoVirtualHost,
    #[error("cannot read {}: {error}", path.display())]
    File { path: PathBuf, error: std::io::Error },
}

/// Why there is no connection.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DialError {
    #[error("cannot reach RabbitMQ at {at}: {error}; is it running, and is rabbitmq.url right?")]
    Unreachable { at: String, error: String },
    #[error(
        "no answer in AMQP from {at} within {DIAL:?}; is it a RabbitMQ, on its AMQP port, and should the URL say amqp or amqps?"
    )]
    Silent { at: String },
    #[error(
        "the server at {at} does not speak AMQP 0-9-1 as RabbitMQ does ({error}); is it RabbitMQ's AMQP port, and should the URL say amqp or amqps?"
    )]
    WrongServer { at: String, error: String },
    #[error("RabbitMQ at {at} refuses the login of user {user:?}; check user and password in rabbitmq.url")]
    Login { at: String, user: String },
    #[error(
        "RabbitMQ at {at} does not let user {user:?} into virtual host {vhost:?}: {error}; create it (rabbitmqctl add_vhost) or grant it (rabbitmqctl set_permissions)"
    )]
    VirtualHost { at: String, user: String, vhost: String, error: String },
    #[error(
        "RabbitMQ at {at} takes no further connection of user {user:?} to virtual host {vhost:?}: {error}; raise that limit \
         (rabbitmqctl set_vhost_limits, set_user_limits), or close connections that nobody needs"
    )]
    Full { at: String, user: String, vhost: String, error: String },
    #[error(
        "TLS with RabbitMQ at {at} fails: {error}; is its authority in rabbitmq.ca, and is the host's name the certificate's?"
    )]
    Tls { at: String, error: String },
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Endpoint").field(&self.address()).finish()
    }
}

impl Endpoint {
    pub fn parse(url: &str, ca: Option<&Path>, identity: Option<(&Path, &Path)>) -> Result<Endpoint, EndpointError> {
        let mut uri: AMQPUri = url.parse().map_err(|_| EndpointError::Malformed)?;
        // For an IPv6 address the parser finds no host, and falls back to localhost.
        let authority = url.split("://").nth(1).and_then(|rest| rest.split(['/', '?']).next()).unwrap_or_default();
        let host = authority.rsplit('@').next().unwrap_or_default();
        if let Some((address, _)) = host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            uri.authority.host = address.to_owned();
        }
        if uri.vhost.is_empty() {
            return Err(EndpointError::NoVirtualHost);
        }
        uri.query.heartbeat.get_or_insert(HEARTBEAT);
        let read = |path: &Path| {
            std::fs::read_to_string(path).map_err(|error| EndpointError::File { path: path.to_owned(), error })
        };
        let files = [ca, identity.map(|(cert, _)| cert), identity.map(|(_, key)| key)];
        let [ca, cert, key] = files.map(|path| path.map(read).transpose());
        let (ca, cert, key) = (ca?, cert?, key?);
        let identity = cert
            .as_ref()
            .zip(key.as_ref())
            .map(|(cert, key)| OwnedIdentity::PKCS8 { pem: cert.clone().into_bytes(), key: key.clone().into_bytes() });
        let tls = OwnedTLSConfig { cert_chain: ca.clone(), identity };
        let source = Source { url: url.to_owned(), files: [ca, cert, key] };
        Ok(Endpoint(Arc::new(ArcSwap::from_pointee(Login { uri, tls, source }))))
    }

    /// Replaces the address for every holder of this endpoint, from the next dial on. Returns whether the new one
    /// differs.
    pub fn replace(&self, new: &Endpoint) -> bool {
        let (held, new) = (self.0.load(), new.0.load_full());
        let differs = held.source != new.source;
        if differs {
            self.0.store(new);
        }
        differs
    }

    /// Host and port, for logs and errors.
    pub fn address(&self) -> String {
        self.0.load().address()
    }

    pub fn virtual_host(&self) -> String {
        self.0.load().uri.vhost.clone()
    }

    /// `name` shows in RabbitMQ's list of connections.
    pub(super) async fn dial(&self, name: &str) -> Result<Connection, DialError> {
        let properties = ConnectionProperties::default().with_connection_name(name.into());
        let login = self.0.load_full();
        let at = login.address();
        let runtime = match lapin::runtime::default_runtime() {
            Ok(runtime) => runtime,
            Err(error) => return Err(DialError::Unreachable { at, error: error.to_string() }),
        };
        let dial = Connection::connect_uri_with_config(login.uri.clone(), properties, login.tls.clone(), runtime);
        match tokio::time::timeout(DIAL, dial).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => Err(login.judge(&error)),
            Err(_) => Err(DialError::Silent { at }),
        }
    }
}

impl Login {
    fn address(&self) -> String {
        format!("{}:{}", self.uri.authority.host, self.uri.authority.port)
    }

    fn judge(&self, error: &lapin::Error) -> DialError {
        let (at, user) = (self.address(), self.uri.authority.userinfo.username.clone());
        let text = error.to_string().trim_start_matches("IO error: ").to_owned();
        if let ErrorKind::ProtocolError(refusal) = error.kind() {
            match refusal.get_id() {
                ACCESS_REFUSED => return DialError::Login { at, user },
                NOT_ALLOWED => {
                    let (vhost, error) = (self.uri.vhost.clone(), refusal.get_message().to_string());
                    return match error.contains("limit") {
                        true => DialError::Full { at, user, vhost, error },
                        false => DialError::VirtualHost { at, user, vhost, error },
                    };
                }
                _ => {}
            }
        }
        let ErrorKind::IOError(io) = error.kind() else { return DialError::WrongServer { at, error: text } };
        if self.uri.scheme == AMQPScheme::AMQPS && is_tls(io) {
            return DialError::Tls { at, error: text };
        }
        // The server ended the handshake: it expects another protocol.
        if [ConnectionAborted, ConnectionReset, UnexpectedEof].contains(&io.kind()) {
            return DialError::WrongServer { at, error: text };
        }
        DialError::Unreachable { at, error: text }
    }
}

fn is_tls(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::InvalidData || error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_holder_of_an_endpoint_gets_its_replacement() {
        let parse = |url| Endpoint::parse(url, None, None).unwrap();
        let endpoint = parse("amqp://ann:old@one:1/v");
        let other = endpoint.clone();
        assert!(!endpoint.replace(&parse("amqp://ann:old@one:1/v")));
        assert!(endpoint.replace(&parse("amqp://ann:new@two:2/v")));
        assert_eq!(
            (other.address().as_str(), other.0.load().uri.authority.userinfo.password.as_str()),
            ("two:2", "new")
        );
    }

    #[test]
    fn urls_are_read_whole_and_never_shown() {
        let endpoint = Endpoint::parse("amqp://ann:hunter2@[::1]:1234/my%2fhost", None, None).unwrap();
        assert_eq!((endpoint.address().as_str(), &*endpoint.virtual_host()), ("::1:1234", "my/host"));
        assert_eq!(endpoint.0.load().uri.query.heartbeat, Some(HEARTBEAT));
        assert!(!format!("{endpoint:?}").contains("hunter2"));
        assert_eq!(Endpoint::parse("amqp://host", None, None).unwrap().virtual_host(), "/");
        let error = Endpoint::parse("amqp://ann:hunter2@host:port/", None, None).unwrap_err().to_string();
        assert!(!error.contains("hunter2"), "{error}");
        assert!(matches!(Endpoint::parse("amqp://host/", None, None), Err(EndpointError::NoVirtualHost)));
        let missing = Endpoint::parse("amqps://host", Some(Path::new("/none.pem")), None).unwrap_err().to_string();
        assert!(missing.contains("/none.pem"), "{missing}");
    }
}
