//! A service that speaks HTTP byte by byte, as no library would: for replies that are odd, cut short or never come.

use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

/// One request as it came.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Which request of its connection this is, from 0.
    pub nth: usize,
    pub head: String,
}

impl Asked {
    pub fn header(&self, name: &str) -> &str {
        let value =
            |line: &'_ str| line.split_once(": ").filter(|(known, _)| known.eq_ignore_ascii_case(name)).is_some();
        let line = self.head.lines().find(|line| value(line)).unwrap_or_default();
        line.split_once(": ").map_or("", |(_, value)| value)
    }
}

/// The bytes of a reply, and whether the connection ends with it.
#[derive(Clone, Debug)]
pub struct Raw {
    pub bytes: Vec<u8>,
    pub closes: bool,
}

impl Raw {
    pub fn new(bytes: impl Into<Vec<u8>>) -> Raw {
        Raw { bytes: bytes.into(), closes: false }
    }

    pub fn last(bytes: impl Into<Vec<u8>>) -> Raw {
        Raw { closes: true, ..Raw::new(bytes) }
    }

    /// 200 with this body, after which the connection stays open.
    pub fn ok(body: &str) -> Raw {
        Raw::new(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()))
    }
}

type Reply = dyn Fn(&Asked) -> Raw + Send + Sync;

/// Serves until it is dropped.
#[derive(Debug)]
pub struct RawService {
    pub address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    _server: AbortOnDropHandle<()>,
}

impl RawService {
    pub async fn start(reply: impl Fn(&Asked) -> Raw + Send + Sync + 'static) -> RawService {
        RawService::over(None, reply).await
    }

    /// Over TLS, with the PEM files of a certificate and its key.
    pub async fn over_tls(
        (cert, key): (&str, &str),
        reply: impl Fn(&Asked) -> Raw + Send + Sync + 'static,
    ) -> RawService {
        let chain = CertificateDer::pem_file_iter(cert).unwrap().collect::<Result<_, _>>().unwrap();
        let key = PrivateKeyDer::from_pem_file(key).unwrap();
        let builder = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
        let acceptor = TlsAcceptor::from(Arc::new(builder.with_single_cert(chain, key).unwrap()));
        RawService::over(Some(acceptor), reply).await
    }

    async fn over(tls: Option<TlsAcceptor>, reply: impl Fn(&Asked) -> Raw + Send + Sync + 'static) -> RawService {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (reply, log): (Arc<Reply>, _) = (Arc::new(reply), Arc::clone(&asked));
        let server = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (tls, reply, log) = (tls.clone(), Arc::clone(&reply), Arc::clone(&log));
                tokio::spawn(async move {
                    match tls {
                        None => serve(stream, reply, log).await,
                        // A client that rejects the certificate disconnects.
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(stream, reply, log).await;
                            }
                        }
                    }
                });
            }
        });
        RawService { address, asked, _server: AbortOnDropHandle::new(server) }
    }

    pub fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, reply: Arc<Reply>, log: Arc<Mutex<Vec<Asked>>>) {
    let mut bytes = Vec::new();
    for nth in 0.. {
        let Some(head) = request(&mut stream, &mut bytes).await else { return };
        let asked = Asked { nth, head };
        let Raw { bytes, closes } = reply(&asked);
        log.lock().unwrap().push(asked);
        if stream.write_all(&bytes).await.is_err() || stream.flush().await.is_err() || closes {
            return;
        }
    }
}

/// Reads one request with its body and returns its head.
async fn request<S: AsyncRead + Unpin>(stream: &mut S, bytes: &mut Vec<u8>) -> Option<String> {
    loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
            let length =
                head.to_lowercase().lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
            let whole = end + 4 + length.unwrap_or(0_usize);
            if bytes.len() >= whole {
                bytes.drain(..whole);
                return Some(head);
            }
        }
        match stream.read_buf(bytes).await {
            Ok(1..) => {}
            Ok(0) | Err(_) => return None,
        }
    }
}
