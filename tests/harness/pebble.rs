//! Pebble, Let's Encrypt's own ACME server for tests, on private ports, with a DNS server that knows every name as loopback.

use super::process::Site;
use super::servers::{Guard, certificates, directory, free_port};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full};
use hyper::Request;
use hyper_util::rt::TokioIo;
use instant_acme::{Account, BodyWrapper, BytesResponse, Key};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, pem::PemObject};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::Command;
use streamgate_service::http_client;
use tokio::net::TcpStream;

/// How one Pebble behaves.
#[derive(Clone, Copy, Debug)]
pub struct Manners {
    /// How long its certificates are valid.
    pub validity_seconds: u64,
    /// How many of 100 good nonces it refuses.
    pub refused_nonces: u32,
    /// The longest that it waits before it checks a challenge.
    pub sleep_seconds: u32,
}

impl Default for Manners {
    fn default() -> Manners {
        Manners { validity_seconds: 90 * 86_400, refused_nonces: 0, sleep_seconds: 0 }
    }
}

/// A Pebble server. At each start it forgets accounts and orders and makes a new root.
#[derive(Debug)]
pub struct Pebble {
    /// The port at which it checks challenges, instead of 443.
    pub challenge_port: u16,
    port: u16,
    management: u16,
    dns: u16,
    files: PathBuf,
    /// The authority of its own web server.
    ca: PathBuf,
    guards: Vec<Guard>,
    _site: Site,
}

impl Pebble {
    pub async fn start(manners: Manners) -> Pebble {
        let site = Site::new();
        let (ca, ..) = certificates(&site);
        let (port, management, dns, challenge_port) = (free_port(), free_port(), free_port(), free_port());
        let files = directory();
        std::fs::write(files.join("keep"), "").unwrap();
        let ca = PathBuf::from(ca);
        let mut pebble = Pebble { challenge_port, port, management, dns, files, ca, guards: Vec::new(), _site: site };
        pebble.restart(manners).await;
        pebble
    }

    pub async fn restart(&mut self, manners: Manners) {
        assert!(self.guards.is_empty(), "Pebble already runs");
        let names = free_port();
        let mut dns = Command::new("pebble-challtestsrv");
        dns.args(["-dns01", &format!("127.0.0.1:{}", self.dns), "-management", &format!("127.0.0.1:{names}")]);
        dns.args(["-defaultIPv6", "", "-http01", "", "-https01", "", "-tlsalpn01", ""]);
        let config = format!(
            r#"{{"pebble": {{"listenAddress": "127.0.0.1:{}", "managementListenAddress": "127.0.0.1:{}",
                "certificate": "{}", "privateKey": "{}", "httpPort": 1, "tlsPort": {}, "ocspResponderURL": "",
                "externalAccountBindingRequired": false, "certificateValidityPeriod": {}}}}}"#,
            self.port,
            self.management,
            self.ca.with_file_name("cert.pem").display(),
            self.ca.with_file_name("key.pem").display(),
            self.challenge_port,
            manners.validity_seconds
        );
        let file = self.files.join("pebble.json");
        std::fs::write(&file, config).unwrap();
        let mut pebble = Command::new("pebble");
        pebble.arg("-config").arg(&file).args(["-dnsserver", &format!("127.0.0.1:{}", self.dns)]);
        pebble.env("PEBBLE_WFE_NONCEREJECT", manners.refused_nonces.to_string());
        pebble.env("PEBBLE_AUTHZREUSE", "0");
        match manners.sleep_seconds {
            0 => pebble.env("PEBBLE_VA_NOSLEEP", "1"),
            seconds => pebble.env("PEBBLE_VA_SLEEPTIME", seconds.to_string()),
        };
        self.guards = [dns, pebble].iter().map(|command| Guard::start(command, &self.files)).collect();
        for port in [names, self.port, self.management] {
            let open = || async { TcpStream::connect(("127.0.0.1", port)).await.is_ok() };
            super::eventually("Pebble starts", open).await;
        }
    }

    pub fn kill(&mut self) {
        self.guards.clear();
    }

    /// The log of Pebble and its DNS server.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.files.join("output")).unwrap()
    }

    /// A gateway's table for this authority; the gateway must listen at [`address`](Pebble::address), where challenges are checked.
    pub fn tls(&self, domains: &str) -> String {
        format!(
            "[gateway.tls.acme]\ndomains = {domains}\ncontact = \"ops@example.com\"\n\
             directory = \"https://localhost:{}/dir\"\nca = \"{}\"\n",
            self.port,
            self.ca.display()
        )
    }

    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.challenge_port))
    }

    /// Closes the account of this key, as its owner can.
    pub async fn deactivate(&self, key: &str) {
        let der = PrivatePkcs8KeyDer::from_pem_slice(key.as_bytes()).unwrap();
        let key = (Key::from_pkcs8_der(der.clone_key()).unwrap(), der.into());
        let client = Web(http_client::client(Some(&self.ca)).unwrap());
        let directory = format!("https://localhost:{}/dir", self.port);
        let (account, _) = Account::builder_with_http(Box::new(client)).from_key(key, directory).await.unwrap();
        account.deactivate().await.unwrap();
    }

    /// The root of the certificates that it makes.
    pub async fn root(&self) -> CertificateDer<'static> {
        let ca = CertificateDer::from_pem_file(&self.ca).unwrap();
        let stream = TcpStream::connect(("127.0.0.1", self.management)).await.unwrap();
        let stream = super::wire::tls(stream, &ca, b"http/1.1").await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let request = Request::get("/roots/0").header("host", "localhost").body(Empty::<Bytes>::new()).unwrap();
        let pem = sender.send_request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
        CertificateDer::from_pem_slice(&pem).unwrap()
    }
}

/// The HTTP client of the ACME library.
struct Web(http_client::HttpClient);

impl instant_acme::HttpClient for Web {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, instant_acme::Error>> + Send>> {
        let client = self.0.clone();
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            let body = Full::new(body.collect().await.unwrap().to_bytes());
            Ok(client.request(Request::from_parts(parts, body)).await.unwrap().into())
        })
    }
}

impl Drop for Pebble {
    fn drop(&mut self) {
        drop(std::fs::remove_file(self.files.join("keep")));
        self.guards.clear();
        drop(std::fs::remove_dir_all(&self.files));
    }
}
