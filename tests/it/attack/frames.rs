//! HTTP/2 frame by frame (RFC 9113), for peers that behave as no library does.

use crate::harness::wire::{Webhook, tls};
use rustls_pki_types::CertificateDer;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
pub const INITIAL_WINDOW_SIZE: u16 = 4;

/// A connection that answers nothing by itself: no SETTINGS, no PING, no WINDOW_UPDATE.
pub struct Peer {
    stream: TlsStream<TcpStream>,
    next: u32,
}

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// HPACK (RFC 7541): each field a literal without indexing, with a new name.
fn fields(fields: &[(String, String)]) -> Vec<u8> {
    let mut block = Vec::new();
    let string = |text: &str, block: &mut Vec<u8>| {
        // A length with a prefix of 7 bits.
        let mut length = text.len();
        if length < 127 {
            block.push(length as u8);
        } else {
            block.push(127);
            length -= 127;
            while length >= 128 {
                block.push((length % 128 + 128) as u8);
                length /= 128;
            }
            block.push(length as u8);
        }
        block.extend_from_slice(text.as_bytes());
    };
    for (name, value) in fields {
        block.push(0);
        string(name, &mut block);
        string(value, &mut block);
    }
    block
}

impl Peer {
    /// Opens a connection and sends these settings.
    pub async fn open(to: SocketAddr, root: &CertificateDer<'static>, settings: &[(u16, u32)]) -> Option<Peer> {
        let stream = TcpStream::connect(to).await.ok()?;
        let mut stream = tls(stream, root, b"h2").await.ok()?;
        let settings: Vec<_> = settings
            .iter()
            .flat_map(|(key, value)| [key.to_be_bytes().as_slice(), &value.to_be_bytes()].concat())
            .collect();
        let hello = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), &frame(SETTINGS, 0, 0, &settings)].concat();
        stream.write_all(&hello).await.ok()?;
        Some(Peer { stream, next: 1 })
    }

    /// Begins a request with the head of a webhook. Returns its stream, or `None` when the connection is closed.
    pub async fn begin(&mut self, webhook: &Webhook, ends: bool) -> Option<u32> {
        let pseudo = [(":method", webhook.method), (":scheme", "https"), (":authority", "localhost")];
        let mut all: Vec<_> = pseudo.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        all.push((":path".to_owned(), webhook.path.clone()));
        all.extend(webhook.headers.iter().cloned());
        let stream = self.next;
        self.next += 2;
        let flags = END_HEADERS | if ends { END_STREAM } else { 0 };
        self.write(&frame(HEADERS, flags, stream, &fields(&all))).await?;
        Some(stream)
    }

    pub async fn data(&mut self, stream: u32, bytes: &[u8], ends: bool) -> Option<()> {
        for piece in bytes.chunks(16_000) {
            self.write(&frame(DATA, 0, stream, piece)).await?;
        }
        if ends { self.write(&frame(DATA, END_STREAM, stream, b"")).await } else { Some(()) }
    }

    pub async fn ping(&mut self, flags: u8) -> Option<()> {
        self.write(&frame(PING, flags, 0, b"12345678")).await
    }

    async fn write(&mut self, bytes: &[u8]) -> Option<()> {
        self.stream.write_all(bytes).await.ok()?;
        self.stream.flush().await.ok()
    }

    /// Reads and discards bytes until the server closes the connection.
    pub async fn closed(mut self) {
        let mut buffer = [0; 4096];
        while self.stream.read(&mut buffer).await.is_ok_and(|length| length > 0) {}
    }
}
