//! One flow of a tunnel: datagrams that may be lost, never delayed by a lost one.

use std::task::Poll;

use adit_protocol::frame::ResetCode;
use adit_tunnel::session::StreamId;
use bytes::Bytes;

use super::{Ending, StreamError, Tunnel};

/// A forwarded UDP association inside a tunnel. Ends when it is dropped at either end.
#[derive(Debug)]
pub struct Flow {
    tunnel: Tunnel,
    id: StreamId,
}

impl Flow {
    pub(super) fn new(tunnel: Tunnel, id: StreamId) -> Self {
        Self { tunnel, id }
    }

    /// Agent: tells the technician that the target's socket is there.
    pub fn accept(&self) {
        self.tunnel.with(|state, _| state.session.accept(self.id)).unwrap_or_default();
    }

    /// Ends the flow, and says why.
    pub fn reset(self, code: ResetCode) {
        self.tunnel.with(|state, _| state.session.reset(self.id, code));
    }

    /// Sends one datagram, or drops it when the carrier is full.
    ///
    /// # Errors
    /// [`StreamError`] when the flow is over.
    pub fn send(&self, payload: Bytes) -> Result<(), StreamError> {
        let length = payload.len() as u64;
        let error = self.tunnel.with(|state, _| {
            state.sent += length;
            state.session.send_datagram(self.id, payload).err()
        });
        error.map_or(Ok(()), |_| Err(self.error()))
    }

    /// The next datagram.
    ///
    /// # Errors
    /// [`StreamError`] when the flow is over.
    pub async fn recv(&self) -> Result<Bytes, StreamError> {
        std::future::poll_fn(|cx| {
            let mut state = self.tunnel.lock();
            let Some(flow) = state.streams.get_mut(&self.id) else {
                return Poll::Ready(Err(StreamError::Closed));
            };
            if let Some(payload) = flow.datagrams.pop_front() {
                flow.datagram_bytes -= payload.len() + super::DATAGRAM_COST;
                return Poll::Ready(Ok(payload));
            }
            match flow.end {
                Some(Ending::Reset(code)) => Poll::Ready(Err(StreamError::Reset(code))),
                Some(Ending::Finished) => Poll::Ready(Err(StreamError::Closed)),
                None => {
                    flow.reader = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }

    fn error(&self) -> StreamError {
        match self.tunnel.lock().streams.get(&self.id).and_then(|flow| flow.end) {
            Some(Ending::Reset(code)) => StreamError::Reset(code),
            _ => StreamError::Closed,
        }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.tunnel.with(|state, _| {
            state.session.reset(self.id, ResetCode::Aborted);
            state.streams.remove(&self.id);
        });
        self.tunnel.0.room.notify_waiters();
    }
}
