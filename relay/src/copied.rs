//! Forwarding between two legs of which at least one came by WebSocket: its bytes have to be looked at, so they go
//! through user space. For two plain legs there is [`crate::forward`].

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use adit_client::leg::LegStream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional_with_sizes};
use tokio::time::sleep;

use crate::forward::{Caps, End, HALF_OPEN};
use crate::metrics::Metrics;

/// What one direction has on the way in user space, beside what TLS and WebSocket hold: a TLS record.
const BUFFER: usize = 16 * 1024;

/// Forwards until both directions have ended. Dropping it closes both legs.
pub(crate) async fn forward(legs: [LegStream; 2], caps: Caps, metrics: Arc<Metrics>) -> End {
    let account = Arc::new(Account {
        moved: AtomicU64::new(0),
        allowed: caps.bytes.unwrap_or(u64::MAX),
        half_open: AtomicBool::new(false),
        metrics,
    });
    let [mut one, mut other] = legs.map(|leg| Counted { leg, account: account.clone() });
    let copying = copy_bidirectional_with_sizes(&mut one, &mut other, BUFFER, BUFFER);
    let over = async {
        match caps.time {
            Some(time) => sleep(time).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        done = copying => match done {
            Ok(_) => End::Finished,
            Err(error) if error.get_ref().is_some_and(|inner| inner.is::<ByteCap>()) => End::ByteCap,
            Err(error) => End::Lost(error),
        },
        () = over => End::TimeCap,
        () = account.silence() => End::Silent,
    }
}

/// What both directions of a pair share.
struct Account {
    moved: AtomicU64,
    allowed: u64,
    /// One direction has ended.
    half_open: AtomicBool,
    metrics: Arc<Metrics>,
}

impl Account {
    fn note(&self, count: usize) -> io::Result<()> {
        if count == 0 {
            self.half_open.store(true, Ordering::Relaxed);
            return Ok(());
        }
        let moved = self.moved.fetch_add(count as u64, Ordering::Relaxed) + count as u64;
        self.metrics.forwarded(false, count);
        if moved > self.allowed { Err(io::Error::other(ByteCap)) } else { Ok(()) }
    }

    /// Completes when one direction has ended and nothing came on the other for a while.
    async fn silence(&self) {
        let mut mark = None;
        loop {
            let half_open = self.half_open.load(Ordering::Relaxed);
            let moved = self.moved.load(Ordering::Relaxed);
            if half_open && mark == Some(moved) {
                return;
            }
            mark = half_open.then_some(moved);
            sleep(HALF_OPEN).await;
        }
    }
}

/// The tickets' byte limit is reached.
#[derive(Debug, thiserror::Error)]
#[error("the byte limit is reached")]
struct ByteCap;

/// A leg whose bytes are counted as they are read.
struct Counted {
    leg: LegStream,
    account: Arc<Account>,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.leg).poll_read(cx, buf))?;
        Poll::Ready(self.account.note(buf.filled().len() - before))
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.leg).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.leg).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.leg).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio_util::either::Either;

    /// A leg, and the device's end of it.
    async fn leg() -> (LegStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let address = listener.local_addr().expect("bound");
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        (Either::Left(far.expect("accepts").0), near.expect("connects"))
    }

    async fn pair(caps: Caps) -> (tokio::task::JoinHandle<End>, TcpStream, TcpStream) {
        let ((one, near), (other, far)) = (leg().await, leg().await);
        (tokio::spawn(forward([one, other], caps, Arc::new(Metrics::new()))), near, far)
    }

    #[tokio::test]
    async fn each_direction_ends_by_itself() {
        let (task, mut near, mut far) = pair(Caps { bytes: None, time: None }).await;
        near.write_all(b"there").await.expect("writes");
        near.shutdown().await.expect("ends");
        let mut got = String::new();
        far.read_to_string(&mut got).await.expect("reads");
        far.write_all(b"back").await.expect("writes");
        drop(far);
        got.push(' ');
        near.read_to_string(&mut got).await.expect("reads");
        assert_eq!(got, "there back");
        assert!(matches!(task.await.expect("ends"), End::Finished));
    }

    #[tokio::test]
    async fn limits_end_it() {
        let (task, mut near, mut far) = pair(Caps { bytes: Some(10), time: None }).await;
        near.write_all(b"0123456789").await.expect("writes");
        far.read_exact(&mut [0; 10]).await.expect("reads");
        far.write_all(b"x").await.expect("writes");
        assert!(matches!(task.await.expect("ends"), End::ByteCap));
        assert_eq!(near.read(&mut [0; 1]).await.unwrap_or(0), 0);
        let (task, _near, _far) = pair(Caps { bytes: None, time: Some(Duration::from_millis(20)) }).await;
        assert!(matches!(task.await.expect("ends"), End::TimeCap));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_half_is_given_up() {
        let (task, mut near, mut far) = pair(Caps { bytes: None, time: None }).await;
        near.shutdown().await.expect("ends");
        assert_eq!(far.read(&mut [0; 1]).await.expect("the end"), 0);
        assert!(matches!(task.await.expect("ends"), End::Silent));
    }
}
