//! Connections to our own gateway: its certificate may be trusted for any name, and a PROXY header comes first if the
//! gateway expects a balancer.

use hyper::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::{DigitallySignedStruct, Error, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::error;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tower_service::Service;

/// The header of a sender that connects on its own behalf.
const PROXY_HEADER: &[u8] = b"PROXY UNKNOWN\r\n";

/// Trusts these certificates for any name, and others if their authorities vouch for them.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) certificates: Vec<CertificateDer<'static>>,
    pub(super) others: Arc<WebPkiServerVerifier>,
}

impl ServerCertVerifier for Known {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.certificates.iter().any(|known| known == end_entity) {
            return Ok(ServerCertVerified::assertion());
        }
        self.others.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.others.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.others.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.others.supported_verify_schemes()
    }
}

/// Connects over TCP, and sends a PROXY header first if configured.
#[derive(Clone, Debug)]
pub struct ProxyHeaderConnector {
    pub(super) tcp: HttpConnector,
    pub(super) with_header: bool,
}

impl Service<Uri> for ProxyHeaderConnector {
    type Response = TokioIo<TcpStream>;
    type Error = Box<dyn error::Error + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.tcp.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let (connecting, with_header) = (self.tcp.call(to), self.with_header);
        Box::pin(async move {
            let mut stream = connecting.await?;
            if with_header {
                stream.inner_mut().write_all(PROXY_HEADER).await?;
            }
            Ok(stream)
        })
    }
}
