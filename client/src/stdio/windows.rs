//! Windows: through tokio's threads, as for a terminal.
//!
//! The standard library cannot close standard output before the process ends. Its reader would not see the
//! target's end of file while standard input is open, and ssh keeps its proxy's open until it has seen that.
//! So here the target's end of file ends both directions, and thereby the process.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use futures_util::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, Stdin, Stdout};

use super::{Reader, Writer};

/// Standard input and output.
pub(super) fn streams() -> (Reader, Writer) {
    let over = Arc::<Over>::default();
    let input = Input { stdin: tokio::io::stdin(), over: over.clone() };
    (Box::new(input), Box::new(Output { stdout: tokio::io::stdout(), over }))
}

/// Whether standard output has had its last byte.
#[derive(Default)]
struct Over {
    yes: AtomicBool,
    reader: AtomicWaker,
}

struct Input {
    stdin: Stdin,
    over: Arc<Over>,
}

impl AsyncRead for Input {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.over.reader.register(cx.waker());
        if self.over.yes.load(Ordering::Acquire) {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stdin).poll_read(cx, buf)
    }
}

struct Output {
    stdout: Stdout,
    over: Arc<Over>,
}

impl AsyncWrite for Output {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stdout).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stdout).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stdout).poll_shutdown(cx))?;
        self.over.yes.store(true, Ordering::Release);
        self.over.reader.wake();
        Poll::Ready(Ok(()))
    }
}
