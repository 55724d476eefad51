//! A stream that notifies the connection's [`Activity`] when bytes arrive and when its socket blocks writes.

use crate::activity::Activity;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use streamgate_core::reason::Reason;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Enough bytes to distinguish protocols: the longest are the HTTP/2 preface and the PROXY signature.
const OPENING: usize = 16;
const TLS_HANDSHAKE: u8 = 0x16;
const HTTP2: &[u8] = b"PRI * HTTP/2.0";
const PROXY: [&[u8]; 2] = [b"PROXY ", b"\r\n\r\n\0\r\nQUIT\n"];

#[derive(Debug)]
pub(crate) struct Watched<S> {
    stream: S,
    activity: Arc<Activity>,
    opening: Opening,
}

/// The first bytes of a connection.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Opening {
    bytes: [u8; OPENING],
    length: usize,
}

impl Opening {
    fn extend(&mut self, bytes: &[u8]) {
        let more = bytes.len().min(OPENING - self.length);
        self.bytes[self.length..self.length + more].copy_from_slice(&bytes[..more]);
        self.length += more;
    }

    /// Why the connection cannot be read as HTTP/1.1.
    pub(crate) fn reason(&self, is_too_large: bool) -> Reason {
        let bytes = &self.bytes[..self.length];
        match bytes.first() {
            Some(&TLS_HANDSHAKE) => Reason::TlsOnPlainPort,
            _ if bytes.starts_with(HTTP2) => Reason::Http2OnPlainPort,
            _ if PROXY.iter().any(|header| bytes.starts_with(header)) => Reason::UnexpectedProxyHeader,
            _ if is_too_large => Reason::HeadTooLarge,
            _ => Reason::MalformedHttp,
        }
    }
}

impl<S> Watched<S> {
    pub(crate) fn new(stream: S, activity: Arc<Activity>) -> Watched<S> {
        Watched { stream, activity, opening: Opening::default() }
    }

    pub(crate) fn opening(&self) -> Opening {
        self.opening
    }

    /// Notes a socket that blocks. Only a flush shows that it accepts writes again, because TLS buffers what is written.
    fn wrote<T>(&self, polled: Poll<T>) -> Poll<T> {
        if polled.is_pending() {
            self.activity.note_blocked();
        }
        polled
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if buffer.filled().len() > before {
            self.opening.extend(&buffer.filled()[before..]);
            self.activity.bytes_arrived();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, buffer);
        self.wrote(polled)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_flush(cx);
        if polled.is_ready() {
            self.activity.note_flushed();
        }
        self.wrote(polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, buffers);
        self.wrote(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
