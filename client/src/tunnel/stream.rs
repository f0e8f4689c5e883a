//! One stream of a tunnel as an asynchronous byte stream.

use std::io;
use std::pin::Pin;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, ready};

use adit_protocol::frame::ResetCode;
use adit_tunnel::session::StreamId;
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{Ending, StreamState, Tunnel};

/// A forwarded TCP connection inside a tunnel. Each direction ends for itself and can be used beside the
/// other, by one task each or by one for both. Dropping a stream that is not finished in both resets it.
#[derive(Debug)]
pub struct TunnelStream {
    tunnel: Tunnel,
    id: StreamId,
    finished: AtomicBool,
    at_end: AtomicBool,
}

/// Why a stream does not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The other end reset it.
    #[error("{}", describe(*.0))]
    Reset(ResetCode),
    /// The session is over.
    #[error("the session is over")]
    Closed,
    /// Written, but the other end has not confirmed it in time.
    #[error("the other end has not confirmed everything in time")]
    Unconfirmed,
}

impl TunnelStream {
    pub(super) fn new(tunnel: Tunnel, id: StreamId) -> Self {
        Self { tunnel, id, finished: AtomicBool::new(false), at_end: AtomicBool::new(false) }
    }

    /// Technician: waits until the agent has connected the target.
    ///
    /// # Errors
    /// [`StreamError`] says why it could not.
    pub async fn opened(&self) -> Result<(), StreamError> {
        std::future::poll_fn(|cx| {
            self.poll(|stream| match stream {
                _ if stream.opened => Poll::Ready(Ok(())),
                StreamState { end: Some(Ending::Reset(code)), .. } => {
                    Poll::Ready(Err(StreamError::Reset(*code)))
                }
                StreamState { end: Some(Ending::Finished), .. } => Poll::Ready(Ok(())),
                _ => {
                    stream.reader = Some(cx.waker().clone());
                    Poll::Pending
                }
            })
        })
        .await
    }

    /// Agent: tells the technician that the target is connected.
    pub fn accept(&self) {
        self.tunnel.with(|state, _| state.session.accept(self.id)).unwrap_or_default();
    }

    /// Ends the stream at once, in both directions.
    pub fn reset(self, code: ResetCode) {
        self.finished.store(true, Relaxed);
        self.at_end.store(true, Relaxed);
        self.tunnel.with(|state, _| {
            state.session.reset(self.id, code);
            state.streams.remove(&self.id);
        });
    }

    /// The next bytes, at most `max`; empty at the end.
    ///
    /// # Errors
    /// [`StreamError`] when the stream was reset.
    pub async fn read_chunk(&self, max: usize) -> Result<Bytes, StreamError> {
        std::future::poll_fn(|cx| self.poll_read_chunk(cx, max)).await
    }

    /// See [`TunnelStream::read_chunk`].
    pub fn poll_read_chunk(&self, cx: &mut Context<'_>, max: usize) -> Poll<Result<Bytes, StreamError>> {
        if self.at_end.load(Relaxed) {
            return Poll::Ready(Ok(Bytes::new()));
        }
        let result = self.tunnel.with(|state, now| {
            let read = state.session.read(now, self.id, max);
            let Some(stream) = state.streams.get_mut(&self.id) else {
                return Poll::Ready(Err(StreamError::Closed));
            };
            match read {
                Ok(Some(bytes)) => {
                    state.received += bytes.len() as u64;
                    Poll::Ready(Ok(bytes))
                }
                Err(_) => match stream.end {
                    Some(Ending::Reset(code)) => Poll::Ready(Err(StreamError::Reset(code))),
                    _ => Poll::Ready(Ok(Bytes::new())),
                },
                Ok(None) => {
                    stream.reader = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        });
        if let Poll::Ready(Ok(bytes)) = &result {
            self.at_end.store(bytes.is_empty(), Relaxed);
        }
        result
    }

    /// Waits until something can be written; returns how many bytes.
    ///
    /// # Errors
    /// [`StreamError`] when the stream was reset.
    pub async fn writable(&self) -> Result<usize, StreamError> {
        std::future::poll_fn(|cx| self.poll_writable(cx)).await
    }

    /// See [`TunnelStream::writable`].
    pub fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<Result<usize, StreamError>> {
        let mut state = self.tunnel.lock();
        let room = state.session.writable(self.id);
        let Some(stream) = state.streams.get_mut(&self.id) else {
            return Poll::Ready(Err(StreamError::Closed));
        };
        match room {
            Ok(0) => {
                stream.writer = Some(cx.waker().clone());
                Poll::Pending
            }
            Ok(room) => Poll::Ready(Ok(room)),
            Err(_) => Poll::Ready(Err(stream.error())),
        }
    }

    /// Waits until the stream is over at the other end's instance; for a writer that has nothing to write.
    pub async fn ended(&self) {
        std::future::poll_fn(|cx| {
            self.poll(|stream| match stream.end {
                Some(_) => Poll::Ready(Ok(())),
                None => {
                    stream.writer = Some(cx.waker().clone());
                    Poll::Pending
                }
            })
        })
        .await
        .unwrap_or_default();
    }

    /// Waits until the other end has everything and has finished, too.
    ///
    /// # Errors
    /// [`StreamError`] when the stream was reset before.
    pub async fn finished(&self) -> Result<(), StreamError> {
        self.ended().await;
        match self.tunnel.lock().streams.get(&self.id).and_then(|stream| stream.end) {
            Some(Ending::Finished) => Ok(()),
            Some(Ending::Reset(code)) => Err(StreamError::Reset(code)),
            None => Err(StreamError::Closed),
        }
    }

    /// Writes bytes without copying them; at most as many as [`TunnelStream::writable`] said.
    ///
    /// # Errors
    /// [`StreamError`] when the stream was reset.
    pub fn write_bytes(&self, bytes: Bytes) -> Result<(), StreamError> {
        let length = bytes.len() as u64;
        self.tunnel.with(|state, _| {
            state.sent += length;
            state
                .session
                .write(self.id, bytes)
                .map_err(|_| state.streams.get(&self.id).map_or(StreamError::Closed, StreamState::error))
        })
    }

    /// Ends the sending direction.
    pub fn finish(&self) {
        if !self.finished.swap(true, Relaxed) {
            self.tunnel.with(|state, _| state.session.finish(self.id)).unwrap_or_default();
        }
    }

    fn poll<T>(
        &self,
        work: impl FnOnce(&mut StreamState) -> Poll<Result<T, StreamError>>,
    ) -> Poll<Result<T, StreamError>> {
        match self.tunnel.lock().streams.get_mut(&self.id) {
            Some(stream) => work(stream),
            None => Poll::Ready(Err(StreamError::Closed)),
        }
    }
}

impl StreamState {
    fn error(&self) -> StreamError {
        match self.end {
            Some(Ending::Reset(code)) => StreamError::Reset(code),
            _ => StreamError::Closed,
        }
    }
}

impl Drop for TunnelStream {
    fn drop(&mut self) {
        let done = self.finished.load(Relaxed) && self.at_end.load(Relaxed);
        self.tunnel.with(|state, _| {
            if !done {
                state.session.reset(self.id, ResetCode::Aborted);
            }
            state.streams.remove(&self.id);
        });
        self.tunnel.0.room.notify_waiters();
    }
}

impl AsyncRead for TunnelStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // As much as fits: whoever reads through a buffer does as much work for a small piece as for a large one.
        let before = buf.filled().len();
        while buf.remaining() > 0 {
            match self.poll_read_chunk(cx, buf.remaining()) {
                Poll::Ready(Ok(bytes)) if !bytes.is_empty() => buf.put_slice(&bytes),
                Poll::Ready(Err(error)) if buf.filled().len() == before => {
                    return Poll::Ready(Err(error.into()));
                }
                Poll::Pending if buf.filled().len() == before => return Poll::Pending,
                _ => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let room = ready!(self.poll_writable(cx))?;
        let length = room.min(buf.len());
        self.write_bytes(Bytes::copy_from_slice(&buf[..length]))?;
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.finish();
        Poll::Ready(Ok(()))
    }
}

impl From<StreamError> for io::Error {
    fn from(error: StreamError) -> Self {
        io::Error::new(io::ErrorKind::ConnectionReset, error)
    }
}

fn describe(code: ResetCode) -> &'static str {
    match code {
        ResetCode::Aborted => "the connection was reset at the other end",
        ResetCode::NotAllowed => "the agent's allow list does not have this target",
        ResetCode::Refused => "the target refused the connection",
        ResetCode::Unreachable => "the target did not answer",
        ResetCode::NotFound => "the agent cannot resolve the target's name",
        ResetCode::Overloaded => "the agent has too many open connections",
        ResetCode::SessionEnded => "the session ended",
        ResetCode::Restarted => "the process at the other end is a new one",
        ResetCode::Unknown => "reset for a reason that this version does not know",
    }
}
