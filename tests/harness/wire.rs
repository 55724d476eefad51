//! Webhooks as Stream sends them, over each transport, down to the raw bytes.

use bytes::Bytes;
use flate2::{
    Compression,
    write::{GzEncoder, ZlibEncoder},
};
use http_body_util::{BodyExt, Full};
use hyper::{Request, StatusCode, header::HeaderMap};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName};
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use streamgate_core::envelope::Envelope;
use streamgate_core::id::Kind;
use streamgate_core::signature::SigningKey;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

pub const API_KEY: &str = "testkey12345";
pub const SECRET: &str = "test_secret_do_not_use_in_production";
pub const PUSH: &str = "/webhooks/stream/push";
pub const MODERATION: &str = "/webhooks/stream/before-message-send";
pub const COMMANDS: &str = "/webhooks/stream/custom-commands";

pub fn sign(body: &[u8]) -> String {
    SigningKey::new(SECRET.as_bytes()).sign(body).to_hex()
}

pub fn gzip(body: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(body).unwrap();
    encoder.finish().unwrap()
}

pub fn zlib(body: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(body).unwrap();
    encoder.finish().unwrap()
}

pub fn brotli(body: &[u8]) -> Vec<u8> {
    let params = brotli::enc::BrotliEncoderParams { quality: 5, ..Default::default() };
    let mut encoded = Vec::new();
    brotli::BrotliCompress(&mut &*body, &mut encoded, &params).unwrap();
    encoded
}

/// An event as a gateway hands it to its store.
pub fn envelope(id: &str, body: Bytes) -> Envelope {
    Envelope {
        app: "chat".into(),
        kind: Kind::Push,
        key: format!("chat:push:{id}:0"),
        id: id.into(),
        event_type: "message.new".into(),
        webhook_attempt: 1,
        api_key: API_KEY.into(),
        signature: "0".repeat(64),
        received_at_ms: 1,
        attempt: 1,
        attempts: Default::default(),
        cid: None,
        route: None,
        replay: None,
        traceparent: None,
        further: streamgate_core::further::FurtherHeaders::default(),
        body,
    }
}

/// Bodies that Stream might send some day, and bodies that nobody should.
pub fn odd_bodies() -> Vec<Vec<u8>> {
    let members: Vec<_> = (0..50).map(|n| serde_json::json!({"user_id": format!("u{n}"), "role": "member"})).collect();
    vec![
        br#"{"type":"message.new","html":"\u003cp\u003ea \u0026 b\u003c/p\u003e"}"#.to_vec(),
        r#"{"type":"message.new","text":"héllo wörld 你好 🎉"}"#.into(),
        br#"{"type":"message.new","created_at":1778198400000000000}"#.to_vec(),
        br#"{"type":"message.new","created_at":"2026-04-08T14:23:35.879421674Z"}"#.to_vec(),
        serde_json::json!({"type": "member.added", "members": members}).to_string().into_bytes(),
        br#"{"type":"never.heard.of.it","custom":{"a":[1,2,3]}}"#.to_vec(),
        format!(r#"{{"type":"{}"}}"#, "t".repeat(5000)).into_bytes(),
        br#"{"type":"my own type / with * # spaces"}"#.to_vec(),
        br#"{"message":{"text":"no type"}}"#.to_vec(),
        br#"{"type":42}"#.to_vec(),
        b"{\"type\":\"message.new\",\"text\":\"\xff\xfe\"}".to_vec(),
        format!(r#"{{"type":"deep","a":{}{}}}"#, "[".repeat(5000), "]".repeat(5000)).into_bytes(),
        br#"{"type":"a","type":"b"}"#.to_vec(),
        b"{\"type\":\"message.new\"}\n\n  ".to_vec(),
        b"no JSON at all".to_vec(),
        b"[]".to_vec(),
        b"{".to_vec(),
        b"".to_vec(),
    ]
}

/// Sends webhooks of one kind until one is refused: how many were taken, and the refusal.
pub async fn until_refused(to: SocketAddr, webhook: impl Fn(u32) -> Webhook) -> (u32, Answer) {
    for taken in 0..40 {
        let answer = send(to, &webhook(taken)).await.unwrap();
        if answer.status != 200 {
            return (taken, answer);
        }
    }
    panic!("no webhook was refused");
}

/// A webhook that can be changed in any part before it is sent.
#[derive(Clone, Debug)]
pub struct Webhook {
    pub method: &'static str,
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
}

impl Webhook {
    /// A push with this body, well signed.
    pub fn push(id: &str, body: impl Into<Bytes>) -> Webhook {
        let body = body.into();
        let headers = [
            ("content-type", "application/json"),
            ("x-api-key", API_KEY),
            ("x-signature", &sign(&body)),
            ("x-webhook-id", id),
            ("x-webhook-attempt", "1"),
        ];
        let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        Webhook { method: "POST", path: PUSH.into(), headers, body }
    }

    /// A unique push: its id and its body are new.
    pub fn fresh() -> Webhook {
        let number = super::unique();
        Webhook::push(&format!("fresh-{number}"), format!(r#"{{"type":"message.new","number":{number}}}"#))
    }

    /// A before-message-send with this message, well signed, under an id of its own.
    pub fn moderation(message: &str) -> Webhook {
        let body = format!(
            r#"{{"message":{message},"user":{{"id":"ann","role":"user"}},"channel":{{"cid":"messaging:x"}},"request_info":{{"type":"client"}}}}"#
        );
        Webhook::moderation_of(body)
    }

    /// A before-message-send with this body, well signed, under an id of its own.
    pub fn moderation_of(body: impl Into<Bytes>) -> Webhook {
        Webhook { path: MODERATION.into(), ..Webhook::push(&format!("hook-{}", super::unique()), body) }
    }

    /// A custom command, or with `form` a click on a button of its answer.
    pub fn command(name: &str, args: &str, form: Option<&str>) -> Webhook {
        let form = form.map(|form| format!(r#","form_data":{form}"#)).unwrap_or_default();
        let body = format!(
            r#"{{"message":{{"id":"m","text":"/{name} {args}","command":"{name}","args":"{args}","cid":"messaging:x","type":"regular","attachments":[],"custom":{{"n":1.10}}}},"user":{{"id":"ann","name":"Ann"}}{form}}}"#
        );
        let path = format!("{COMMANDS}?type={name}");
        Webhook { path, ..Webhook::push(&format!("hook-{}", super::unique()), body) }
    }

    pub fn set(mut self, name: &str, value: &str) -> Webhook {
        self = self.without(name);
        self.add(name, value)
    }

    pub fn add(mut self, name: &str, value: &str) -> Webhook {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn without(mut self, name: &str) -> Webhook {
        self.headers.retain(|(header, _)| header != name);
        self
    }

    /// The same signature over another body on the wire.
    pub fn on_the_wire(mut self, body: impl Into<Bytes>) -> Webhook {
        self.body = body.into();
        self
    }

    pub fn zipped(self) -> Webhook {
        let body = gzip(&self.body);
        self.on_the_wire(body).set("content-encoding", "gzip")
    }

    /// Compressed anew, as a tunnel does it: `deflate` or `br`.
    pub fn encoded(self, encoding: &str) -> Webhook {
        let body = match encoding {
            "br" => brotli(&self.body),
            "deflate" => zlib(&self.body),
            other => panic!("nothing makes {other:?} here"),
        };
        self.on_the_wire(body).set("content-encoding", encoding)
    }

    pub fn id(&self) -> &str {
        self.headers.iter().find(|(name, _)| name == "x-webhook-id").map_or("", |(_, value)| value)
    }

    /// The head of an HTTP/1.1 request, without the headers that frame the body.
    pub fn head(&self) -> String {
        let mut head = format!("{} {} HTTP/1.1\r\nhost: test\r\n", self.method, self.path);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head
    }

    /// The whole request, as bytes.
    pub fn raw(&self) -> Vec<u8> {
        let mut raw = format!("{}content-length: {}\r\n\r\n", self.head(), self.body.len()).into_bytes();
        raw.extend_from_slice(&self.body);
        raw
    }
}

#[derive(Clone, Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn outcome(&self) -> &str {
        self.headers.get("x-streamgate-outcome").map_or("", |value| value.to_str().unwrap())
    }

    /// The `code` of a refusal.
    pub fn code(&self) -> String {
        let refusal: serde_json::Value = serde_json::from_slice(&self.body).unwrap_or_default();
        refusal["code"].as_str().unwrap_or_default().to_owned()
    }
}

/// How a webhook travels.
#[derive(Clone, Debug)]
pub enum Transport {
    Http1,
    /// HTTP/1.1 or HTTP/2 over TLS, trusting this certificate.
    Tls {
        root: CertificateDer<'static>,
        http2: bool,
    },
}

pub type Failure = Box<dyn std::error::Error + Send + Sync>;

impl Transport {
    /// One webhook on a connection of its own.
    pub async fn send(&self, to: SocketAddr, webhook: &Webhook) -> Result<Answer, Failure> {
        let stream = TcpStream::connect(to).await?;
        match self {
            Transport::Http1 => http1(TokioIo::new(stream), webhook).await,
            Transport::Tls { root, http2: false } => {
                http1(TokioIo::new(tls(stream, root, b"http/1.1").await?), webhook).await
            }
            Transport::Tls { root, http2: true } => {
                let io = TokioIo::new(tls(stream, root, b"h2").await?);
                let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await?;
                tokio::spawn(connection);
                let request = request(webhook, &format!("https://localhost{}", webhook.path))?;
                answer(sender.send_request(request).await?).await
            }
        }
    }
}

/// One webhook over plain HTTP/1.1.
pub async fn send(to: SocketAddr, webhook: &Webhook) -> Result<Answer, Failure> {
    Transport::Http1.send(to, webhook).await
}

pub async fn tls(
    stream: TcpStream,
    root: &CertificateDer<'static>,
    alpn: &[u8],
) -> Result<TlsStream<TcpStream>, Failure> {
    let mut roots = RootCertStore::empty();
    roots.add(root.clone())?;
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    let stream = TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("localhost")?, stream).await?;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(alpn));
    Ok(stream)
}

async fn http1<IO>(io: TokioIo<IO>, webhook: &Webhook) -> Result<Answer, Failure>
where
    IO: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
    tokio::spawn(connection);
    answer(sender.send_request(request(webhook, &webhook.path)?).await?).await
}

fn request(webhook: &Webhook, uri: &str) -> Result<Request<Full<Bytes>>, Failure> {
    let mut request = Request::builder().method(webhook.method).uri(uri);
    if !uri.starts_with("https:") {
        request = request.header("host", "localhost");
    }
    for (name, value) in &webhook.headers {
        request = request.header(name, value);
    }
    Ok(request.body(Full::new(webhook.body.clone()))?)
}

async fn answer(response: hyper::Response<hyper::body::Incoming>) -> Result<Answer, Failure> {
    let (parts, body) = response.into_parts();
    Ok(Answer { status: parts.status, headers: parts.headers, body: body.collect().await?.to_bytes() })
}

/// Everything that the server sends on this connection until it closes it.
pub async fn read_to_end(mut stream: impl tokio::io::AsyncRead + Unpin) -> String {
    let mut received = Vec::new();
    // A reset after the answer is how a server closes on a client that still sends.
    drop(stream.read_to_end(&mut received).await);
    String::from_utf8_lossy(&received).into_owned()
}

/// Sends raw bytes on a new connection, and leaves it open.
pub async fn raw(to: SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(to).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    stream
}

/// The status of the next answer on a raw connection, once its head has arrived.
pub async fn status(stream: &mut TcpStream) -> u16 {
    let mut head = Vec::new();
    while !head.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
        let mut piece = [0; 1024];
        let length = stream.read(&mut piece).await.unwrap();
        assert!(length > 0, "closed before an answer: {:?}", String::from_utf8_lossy(&head));
        head.extend_from_slice(&piece[..length]);
    }
    let text = String::from_utf8_lossy(&head);
    text.split(' ').nth(1).unwrap().parse().unwrap()
}
