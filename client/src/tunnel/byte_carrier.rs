//! A carrier over one ordered byte stream: TLS on a relayed or direct TCP connection.
//!
//! One task does both directions, so that neither takes a lock of the TLS session.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use adit_tunnel::session::{CarrierId, CarrierKind, Lane, Transmit};
use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_util::io::poll_read_buf;

use super::Tunnel;

/// Read buffers: four TLS records.
const READ_BUFFER: usize = 64 * 1024;
/// Below this room a new buffer is taken: no TLS record is cut in two.
const READ_LEAST: usize = 16 * 1024;
/// How long the end of a session may take to arrive.
const PARTING: Duration = Duration::from_millis(300);
/// Reads and writes in one go before other tasks get their turn.
const TURNS: usize = 32;

/// Runs a carrier until its connection ends or the session gives it up. `connection` is authenticated:
/// at its other end is the session's other device. Returns why it ended.
pub async fn run<C>(
    tunnel: Tunnel,
    kind: CarrierKind,
    connection: C,
    local: Option<SocketAddr>,
    remote: Option<SocketAddr>,
) -> String
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    debug_assert!(!kind.is_multiplexed());
    let id = tunnel.attach(kind, local, remote);
    let guard = Detach { tunnel: &tunnel, id };
    let mut carrier = Carrier {
        tunnel: &tunnel,
        id,
        connection,
        writing: None,
        unflushed: false,
        buffer: BytesMut::with_capacity(READ_BUFFER),
    };
    let reason = match poll_fn(|cx| carrier.poll(cx)).await {
        Ok(reason) => {
            if tunnel.is_closed() {
                let _ = timeout(PARTING, part(&mut carrier.connection)).await;
            }
            reason
        }
        Err(error) => error.to_string(),
    };
    std::mem::forget(guard);
    tunnel.detach(id, &reason);
    reason
}

/// Ends the connection such that what was said last arrives: closing it with something unread would
/// reset it.
async fn part(connection: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<()> {
    connection.shutdown().await?;
    tokio::io::copy(connection, &mut tokio::io::sink()).await.map(drop)
}

/// A task that is aborted detaches its carrier, too.
struct Detach<'a> {
    tunnel: &'a Tunnel,
    id: CarrierId,
}

impl Drop for Detach<'_> {
    fn drop(&mut self) {
        self.tunnel.detach(self.id, "closed");
    }
}

struct Carrier<'a, C> {
    tunnel: &'a Tunnel,
    id: CarrierId,
    connection: C,
    /// Taken from the engine, not written yet.
    writing: Option<Transmit>,
    unflushed: bool,
    buffer: BytesMut,
}

impl<C: AsyncRead + AsyncWrite + Unpin> Carrier<'_, C> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<String>> {
        for _ in 0..TURNS {
            if let Some(reason) = self.given_up() {
                return Poll::Ready(Ok(reason));
            }
            let wrote = self.write(cx)?;
            let read = match self.read(cx)? {
                Poll::Ready(true) => true,
                Poll::Ready(false) => return Poll::Ready(Ok("closed by the other side".to_owned())),
                Poll::Pending => false,
            };
            if !wrote && !read && self.rest(cx) {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Leaves the waker with the engine; `false` when there was something new meanwhile.
    fn rest(&self, cx: &Context<'_>) -> bool {
        let mut state = self.tunnel.lock();
        // Everything was said: the session's end, too.
        let over = state.session.has_parted(self.id) && self.writing.is_none() && !self.unflushed;
        let Some(carrier) = state.carriers.get_mut(&self.id) else { return true };
        let rest = !std::mem::take(&mut carrier.again) && !over;
        carrier.task = rest.then(|| cx.waker().clone());
        rest
    }

    fn given_up(&self) -> Option<String> {
        let mut state = self.tunnel.lock();
        let drained = state.session.has_parted(self.id) && self.writing.is_none() && !self.unflushed;
        let carrier = state.carriers.get_mut(&self.id)?;
        // What comes from here on is news for `rest`.
        carrier.again = false;
        carrier.given_up.clone().or_else(|| drained.then(|| "the session is over".to_owned()))
    }

    /// Writes what there is and fits. Returns whether there may be more.
    fn write(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        for _ in 0..TURNS {
            if self.writing.is_none() {
                self.writing =
                    self.tunnel.with(|state, now| state.session.poll_transmit(now, self.id, Lane::Control));
            }
            let Some(transmit) = &mut self.writing else {
                if self.unflushed && Pin::new(&mut self.connection).poll_flush(cx)?.is_ready() {
                    self.unflushed = false;
                }
                return Ok(false);
            };
            let slices = [IoSlice::new(&transmit.head), IoSlice::new(&transmit.payload)];
            let Poll::Ready(written) = Pin::new(&mut self.connection).poll_write_vectored(cx, &slices)?
            else {
                return Ok(false);
            };
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.unflushed = true;
            let head = written.min(transmit.head.len());
            transmit.head.advance(head);
            transmit.payload.advance(written - head);
            if transmit.payload.is_empty() && transmit.head.is_empty() {
                self.writing = None;
            }
        }
        Ok(true)
    }

    /// Reads what is there, up to a buffer full. `Ready(false)`: the connection has ended.
    fn read(&mut self, cx: &mut Context<'_>) -> io::Result<Poll<bool>> {
        if self.buffer.capacity() - self.buffer.len() < READ_LEAST {
            self.buffer = BytesMut::with_capacity(READ_BUFFER);
        }
        // TLS hands out a record at a time: a few of them make one visit to the engine.
        let end = loop {
            if !self.buffer.is_empty() && self.buffer.capacity() - self.buffer.len() < READ_LEAST {
                break None;
            }
            match poll_read_buf(Pin::new(&mut self.connection), cx, &mut self.buffer) {
                Poll::Ready(Ok(0)) => break Some(Ok(false)),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => break Some(Err(error)),
                Poll::Pending if self.buffer.is_empty() => return Ok(Poll::Pending),
                Poll::Pending => break None,
            }
        };
        if !self.buffer.is_empty() {
            let bytes = self.buffer.split().freeze();
            let taken =
                self.tunnel.with(|state, now| state.session.receive(now, self.id, Lane::Control, bytes));
            taken.map_err(io::Error::other)?;
        }
        end.unwrap_or(Ok(true)).map(Poll::Ready)
    }
}
