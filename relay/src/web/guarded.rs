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

/// For a client to read the answer and hang up when not all of its request was read, because it was refused or its target is
/// away: with bytes unread, closing would be a reset, and it would read nothing.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 64 << 20;

/// What an HTTP server answers with 400, wherever in a head it stands: no head may have a NUL, and the end of one makes sure
/// that it is looked at.
const POISON: &[u8] = b"\0\r\n\r\n";

/// The connection.
pub(super) struct Guarded<S> {
    stream: S,
    framing: Framing,
    watch: Arc<Watch>,
    /// A byte was refused: nothing is read any more.
    ended: Option<Ended>,
    lingering: Option<(Pin<Box<Sleep>>, usize)>,
}

/// What is read in place of a byte that was refused.
enum Ended {
    /// In a head: this.
    Poison(&'static [u8]),
    /// In a body: an error.
    Broken,
    /// And then nothing. An end would be taken for a client that has left, and nobody would answer it.
    Silent,
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
        Self { stream, framing: Framing::new(), watch, ended: None, lingering: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Some(ended) = &mut this.ended {
            return ended.poll_read(buf);
        }
        if this.framing.is_switching() {
            this.watch.reader.register(cx.waker());
            // Where the other side stays with this one, nothing more is read.
            if !this.watch.switched.load(Ordering::Acquire) {
                return Poll::Pending;
            }
            return Pin::new(&mut this.stream).poll_read(cx, buf);
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        let Err(Refused { fine, in_head }) = this.framing.read(&buf.filled()[before..]) else {
            return Poll::Ready(Ok(()));
        };
        this.watch.refused.store(true, Ordering::Release);
        buf.set_filled(before + fine);
        let ended = this.ended.insert(if in_head { Ended::Poison(POISON) } else { Ended::Broken });
        // What is fine comes first.
        if fine > 0 { Poll::Ready(Ok(())) } else { ended.poll_read(buf) }
    }
}

impl Ended {
    fn poll_read(&mut self, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Poison(poison) => {
                let (now, later) = poison.split_at(poison.len().min(buf.remaining()));
                buf.put_slice(now);
                *poison = later;
                Poll::Ready(Ok(()))
            }
            Self::Broken => {
                *self = Self::Silent;
                Poll::Ready(Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "a body that is not framed as it should be",
                )))
            }
            Self::Silent => Poll::Pending,
        }
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
        if !this.watch.has_refused() && !this.framing.is_within() {
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

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn read_all(bytes: &[u8], buffer: usize) -> (Vec<u8>, bool) {
        let (mut near, far) = tokio::io::duplex(1 << 20);
        near.write_all(bytes).await.expect("room");
        drop(near);
        let mut guarded = Guarded::new(far, Arc::default());
        let (mut all, mut buffer) = (Vec::new(), vec![0; buffer]);
        loop {
            match guarded.read(&mut buffer).await {
                Ok(0) => return (all, false),
                Ok(count) => all.extend_from_slice(&buffer[..count]),
                Err(_) => return (all, true),
            }
        }
    }

    #[tokio::test]
    async fn what_is_refused_in_a_head_is_poison_and_in_a_body_an_error() {
        let head = "GET / HTTP/1.1\r\nHost: a\r\n";
        for buffer in [1, 2, 3, 100] {
            let (all, broken) = read_all(format!("{head}X: y\nZ: a\r\n\r\n").as_bytes(), buffer).await;
            assert_eq!((all, broken), (format!("{head}X: y\0\r\n\r\n").into_bytes(), false));
            let chunked = format!("{head}Transfer-Encoding: chunked\r\n\r\n5\r\nhello");
            let (all, broken) = read_all(format!("{chunked}!").as_bytes(), buffer).await;
            assert!(broken && chunked.as_bytes().starts_with(&all));
        }
    }

    #[tokio::test]
    async fn behind_a_wish_to_switch_nothing_is_read_until_both_have() {
        let wish = b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n";
        let (mut near, far) = tokio::io::duplex(1000);
        let watch: Arc<Watch> = Arc::default();
        let mut guarded = Guarded::new(far, watch.clone());
        near.write_all(wish).await.expect("room");
        let mut buffer = [0; 100];
        assert_eq!(guarded.read(&mut buffer).await.expect("a wish"), wish.len());
        near.write_all(b"frame").await.expect("room");
        let reading = tokio::spawn(async move {
            let count = guarded.read(&mut buffer).await.expect("open");
            buffer[..count].to_vec()
        });
        tokio::task::yield_now().await;
        assert!(!reading.is_finished());
        watch.switched();
        assert_eq!(reading.await.expect("read"), b"frame");
    }
}
