//! One stream or flow.

use adit_protocol::frame::Position;
use adit_protocol::{Protocol, Target};

use super::recv::{INITIAL_WINDOW, RecvHalf};
use super::send::SendHalf;
use super::{CarrierId, StreamId};

#[derive(Debug)]
pub(super) enum Stream {
    Live(Box<Live>),
    /// Ended by this end; the other has not confirmed it yet.
    Resetting {
        code: u64,
    },
}

#[derive(Debug)]
pub(super) struct Live {
    pub(super) target: Target,
    pub(super) send: SendHalf,
    pub(super) recv: RecvHalf,
    /// UDP: no stream data in either direction.
    pub(super) is_flow: bool,
    /// The target is connected, as far as this end knows.
    pub(super) opened: bool,
    /// Technician: the carrier that took the request last, while it is not answered.
    pub(super) open_sent_on: Option<CarrierId>,
    /// Stands in the session's queue.
    pub(super) queued: bool,
}

impl Live {
    pub(super) fn new(target: Target) -> Self {
        Self {
            is_flow: target.protocol == Protocol::Udp,
            target,
            send: SendHalf::new(INITIAL_WINDOW),
            recv: RecvHalf::new(),
            opened: false,
            open_sent_on: None,
            queued: false,
        }
    }

    /// What the other end is told of the stream.
    pub(super) fn position(&self, id: StreamId) -> Position {
        Position { stream: id.0, acked: self.recv.acked(), credit: self.recv.credit() }
    }
}

impl Stream {
    pub(super) fn live(&self) -> Option<&Live> {
        match self {
            Stream::Live(live) => Some(live),
            Stream::Resetting { .. } => None,
        }
    }
}
