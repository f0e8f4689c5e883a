//! Pure forwarding between two paired legs: two directions, each with an end of its own.

use std::future::Future;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::metrics::Metrics;
use crate::pool::{IN_TRANSIT, Lease, Pool};

/// What one direction moves before the other tasks get their turn.
const TURN_BYTES: usize = 1024 * 1024;
/// The same for pairs that send many small pieces.
const TURN_ROUNDS: usize = 32;
/// A direction that moved this much at once gets a large pipe the next time.
const MUCH: usize = 16 * 1024;
/// After one direction has ended, how long the other may be silent.
pub(crate) const HALF_OPEN: Duration = Duration::from_secs(60);

/// The limits that a pair's tickets set.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caps {
    /// Bytes in both directions together.
    pub(crate) bytes: Option<u64>,
    /// Life of the pair.
    pub(crate) time: Option<Duration>,
}

/// Why a pair ended.
#[derive(Debug)]
pub(crate) enum End {
    /// Both directions came to their end.
    Finished,
    /// A leg broke.
    Lost(io::Error),
    /// One direction had ended and the other stayed silent.
    Silent,
    /// The tickets' byte limit.
    ByteCap,
    /// The tickets' time limit.
    TimeCap,
    /// One of the two devices was revoked.
    Revoked,
}

/// Forwards between two legs until both directions have ended. Dropping it closes both.
///
/// Either direction's end of file is passed on as such and leaves the other direction alone.
pub(crate) struct Forward {
    legs: [TcpStream; 2],
    ways: [Way; 2],
    shared: Shared,
    ends: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
    /// Bytes moved when the half-open timer was set.
    mark: Option<u64>,
}

struct Shared {
    pool: Arc<Pool>,
    metrics: Arc<Metrics>,
    moved: u64,
    allowed: u64,
}

/// One direction.
#[derive(Default)]
struct Way {
    transit: Option<Lease>,
    much: bool,
    done: bool,
}

impl Forward {
    pub(crate) fn new(legs: [TcpStream; 2], caps: Caps, pool: Arc<Pool>, metrics: Arc<Metrics>) -> Self {
        let ends = caps.time.and_then(|time| Instant::now().checked_add(time));
        Self {
            legs,
            ways: Default::default(),
            shared: Shared { pool, metrics, moved: 0, allowed: caps.bytes.unwrap_or(u64::MAX) },
            ends,
            timer: ends.map(|ends| Box::pin(sleep_until(ends))),
            mark: None,
        }
    }

    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let half_open = self.ways[0].done || self.ways[1].done;
        if half_open && self.mark.is_none() {
            self.arm();
        }
        while let Some(timer) = &mut self.timer {
            ready!(timer.as_mut().poll(cx));
            if self.ends.is_some_and(|ends| ends <= Instant::now()) {
                return Poll::Ready(End::TimeCap);
            }
            if self.mark == Some(self.shared.moved) {
                return Poll::Ready(End::Silent);
            }
            self.arm();
        }
        Poll::Pending
    }

    fn arm(&mut self) {
        let silent = Instant::now() + HALF_OPEN;
        self.mark = Some(self.shared.moved);
        self.timer = Some(Box::pin(sleep_until(self.ends.map_or(silent, |ends| ends.min(silent)))));
    }
}

impl Future for Forward {
    type Output = End;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<End> {
        let this = &mut *self;
        let [left, right] = &this.legs;
        for (way, from, to) in [(0, left, right), (1, right, left)] {
            let way = &mut this.ways[way];
            if way.done {
                continue;
            }
            match way.poll(cx, from, to, &mut this.shared) {
                Poll::Ready(Ok(())) => {
                    way.done = true;
                    way.transit = None;
                }
                Poll::Ready(Err(end)) => return Poll::Ready(end),
                Poll::Pending => {}
            }
        }
        if this.ways.iter().all(|way| way.done) {
            return Poll::Ready(End::Finished);
        }
        this.poll_timer(cx)
    }
}

impl Way {
    /// Ready when this direction is over: `Ok` leaves the other direction alone, `Err` ends the pair.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
        to: &TcpStream,
        shared: &mut Shared,
    ) -> Poll<Result<(), End>> {
        let mut turn = 0;
        for _ in 0..TURN_ROUNDS {
            if turn >= TURN_BYTES {
                break;
            }
            // A peer that takes nothing more may still have sent something: not the pair's end.
            let Ok(count) = ready!(self.poll_drain(cx, to, shared)) else { return Poll::Ready(Ok(())) };
            turn += count;
            match ready!(self.poll_fill(cx, from, shared)) {
                Ok(true) => {}
                Ok(false) => {
                    // Not connected any more: then there is nobody to tell.
                    let _ = SockRef::from(to).shutdown(Shutdown::Write);
                    return Poll::Ready(Ok(()));
                }
                Err(end) => return Poll::Ready(Err(end)),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Ready with the bytes written when nothing is in transit any more.
    fn poll_drain(
        &mut self,
        cx: &mut Context<'_>,
        to: &TcpStream,
        shared: &mut Shared,
    ) -> Poll<io::Result<usize>> {
        let mut total = 0;
        if let Some(lease) = &mut self.transit {
            while lease.filled() > 0 {
                ready!(to.poll_write_ready(cx))?;
                match lease.drain(to) {
                    Ok(0) => return Poll::Ready(Err(ErrorKind::WriteZero.into())),
                    Ok(count) => {
                        total += count;
                        shared.moved += count as u64;
                        shared.metrics.forwarded(lease.splices(), count);
                    }
                    Err(error) if retries(&error) => {}
                    Err(error) => return Poll::Ready(Err(error)),
                }
            }
            self.transit = None;
        }
        Poll::Ready(Ok(total))
    }

    /// Ready with whether there is something in transit now; `false` is the end of file.
    fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
        shared: &mut Shared,
    ) -> Poll<Result<bool, End>> {
        loop {
            ready!(from.poll_read_ready(cx)).map_err(End::Lost)?;
            if shared.allowed == 0 {
                return Poll::Ready(Err(End::ByteCap));
            }
            let mut lease = shared.pool.lend(self.much);
            let limit = usize::try_from(shared.allowed).unwrap_or(usize::MAX).min(IN_TRANSIT);
            match lease.fill(from, limit) {
                Ok(0) => return Poll::Ready(Ok(false)),
                Ok(count) => {
                    if shared.allowed != u64::MAX {
                        shared.allowed -= count as u64;
                    }
                    self.much = count >= MUCH;
                    self.transit = Some(lease);
                    return Poll::Ready(Ok(true));
                }
                Err(error) if retries(&error) => {}
                Err(error) if lease.splices() && is_unsupported(&error) => {
                    shared.pool.give_up_splicing(&error)
                }
                Err(error) => return Poll::Ready(Err(End::Lost(error))),
            }
        }
    }
}

fn retries(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// EINVAL, ENOSYS, EOPNOTSUPP: what a kernel or sandbox without splice for sockets says.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported)
}
