//! Connections that record how they were used: whether a failure can be the fault of a reused connection, and how old
//! it is.

use hyper::Uri;
use hyper::rt::{Read, ReadBuf, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{Connected, Connection};
use std::future::Future;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tower_service::Service;

/// Bytes of one read: replies to webhooks are short.
const READ: usize = 4096;

/// How one connection was used so far. Every reply and every error of the client carries the usage of its connection.
#[derive(Clone, Debug)]
pub(super) struct Usage(Arc<State>);

#[derive(Debug)]
struct State {
    opened: Instant,
    /// Something was read at any time.
    was_heard: AtomicBool,
    /// Nothing was read since the last write. That is also true if the rest of a large request is written after the
    /// first byte of its reply: then it is sent twice, which costs less than parsing the reply here.
    is_silent: AtomicBool,
}

impl Usage {
    fn new() -> Usage {
        let (was_heard, is_silent) = (AtomicBool::new(false), AtomicBool::new(false));
        Usage(Arc::new(State { opened: Instant::now(), was_heard, is_silent }))
    }

    pub(super) fn age(&self) -> Duration {
        self.0.opened.elapsed()
    }

    /// Whether nothing was read since the last write.
    pub(super) fn is_silent(&self) -> bool {
        self.0.is_silent.load(Ordering::Relaxed)
    }

    /// Whether a request that began at `began` and failed on this connection says nothing about the service: the
    /// connection existed before, and no byte of this request's reply was read.
    pub(super) fn failed_before_a_reply(&self, began: Instant) -> bool {
        let was_there = self.0.opened < began || self.0.was_heard.load(Ordering::Relaxed);
        was_there && self.is_silent()
    }
}

/// Connects as `C` does, and watches the connection.
#[derive(Clone, Debug)]
pub(super) struct Watching<C>(pub(super) C);

impl<C> Service<Uri> for Watching<C>
where
    C: Service<Uri>,
    C::Future: Send + 'static,
{
    type Response = Watched<C::Response>;
    type Error = C::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, C::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), C::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let connecting = self.0.call(to);
        Box::pin(async { Ok(Watched { stream: connecting.await?, usage: Usage::new() }) })
    }
}

/// A stream that records when bytes are read and written.
#[derive(Debug)]
pub(super) struct Watched<S> {
    stream: S,
    usage: Usage,
}

impl<S: Connection> Connection for Watched<S> {
    fn connected(&self) -> Connected {
        self.stream.connected().extra(self.usage.clone())
    }
}

impl<S: Read + Unpin> Read for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, mut to: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        // The caller's buffer does not show how much was read into it.
        let mut space = [MaybeUninit::uninit(); READ];
        let room = to.remaining().min(READ);
        let mut read = ReadBuf::uninit(&mut space[..room]);
        std::task::ready!(Pin::new(&mut self.stream).poll_read(cx, read.unfilled()))?;
        if !read.filled().is_empty() {
            self.usage.0.is_silent.store(false, Ordering::Relaxed);
            self.usage.0.was_heard.store(true, Ordering::Relaxed);
            to.put_slice(read.filled());
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: Write + Unpin> Write for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        self.usage.0.is_silent.store(true, Ordering::Relaxed);
        Pin::new(&mut self.stream).poll_write(cx, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.usage.0.is_silent.store(true, Ordering::Relaxed);
        Pin::new(&mut self.stream).poll_write_vectored(cx, from)
    }
}
