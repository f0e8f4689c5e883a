//! A browser's connection of which an HTTP server reads only what [`Framing`] lets through.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::strict::{Framing, Refused};

/// For a refused client to read why and hang up: with its bytes unread, closing would be a reset.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 256 * 1024;

/// The connection.
pub(super) struct Guarded<S> {
    stream: S,
    framing: Framing,
    watch: Arc<Watch>,
    /// A byte was refused: nothing is read any more.
    ended: bool,
    lingering: Option<(Pin<Box<Sleep>>, usize)>,
}

/// What the one who answers has to do with the bytes.
#[derive(Default)]
pub(super) struct Watch {
    switched: AtomicBool,
    refused: AtomicBool,
    reader: AtomicWaker,
}

impl Watch {
    /// Both sides speak another protocol from here on: every byte passes.
    pub(super) fn switched(&self) {
        self.switched.store(true, Ordering::Release);
        self.reader.wake();
    }

    /// Whether a byte was refused.
    pub(super) fn has_refused(&self) -> bool {
        self.refused.load(Ordering::Acquire)
    }
}

impl<S> Guarded<S> {
    pub(super) fn new(stream: S, watch: Arc<Watch>) -> Self {
        Self { stream, framing: Framing::new(), watch, ended: false, lingering: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.framing.is_switching() {
            this.watch.reader.register(cx.waker());
            if !this.watch.switched.load(Ordering::Acquire) {
                return Poll::Pending;
            }
            return Pin::new(&mut this.stream).poll_read(cx, buf);
        }
        if this.ended {
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        let Err(Refused { fine, in_head }) = this.framing.read(&buf.filled()[before..]) else {
            return Poll::Ready(Ok(()));
        };
        this.ended = true;
        this.watch.refused.store(true, Ordering::Release);
        buf.set_filled(before + fine);
        if in_head {
            // No HTTP server takes this byte: it answers 400 by itself, and has no whole head to act on.
            buf.put_slice(b"\0");
            return Poll::Ready(Ok(()));
        }
        Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "the body is not framed as it should be")))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.lingering.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
        }
        if !this.watch.has_refused() {
            return Poll::Ready(Ok(()));
        }
        let (until, left) = this.lingering.get_or_insert_with(|| (Box::pin(sleep(LINGER)), LINGER_BYTES));
        let mut buffer = [0; 4096];
        while until.as_mut().poll(cx).is_pending() && *left > 0 {
            let mut buf = ReadBuf::new(&mut buffer);
            match ready!(Pin::new(&mut this.stream).poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => *left = left.saturating_sub(buf.filled().len()),
                _ => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}
