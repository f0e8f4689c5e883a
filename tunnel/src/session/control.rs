//! What the session has to say beside stream data, on whichever carrier is active.

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::{CarrierId, StreamId};

/// How long an acknowledgement of a stream may wait for company.
const WINDOW_DELAY: Duration = Duration::from_millis(25);
/// Datagrams waiting for a carrier, all flows together. Bytes.
const MAX_DATAGRAMS: usize = 128 * 1024;
/// What a datagram costs beside its payload, which may be empty. Bytes.
const DATAGRAM_COST: usize = 64;
/// Answers to streams that are long gone: each was asked for by one frame.
const MAX_GONE: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Pending {
    /// To be acknowledged now.
    windows: VecDeque<StreamId>,
    in_windows: HashSet<StreamId>,
    /// To be acknowledged by `windows_at`.
    later: HashSet<StreamId>,
    pub(super) windows_at: Option<Instant>,
    pub(super) resets: VecDeque<StreamId>,
    gone: VecDeque<StreamId>,
    datagrams: VecDeque<(StreamId, Bytes)>,
    datagram_bytes: usize,
    pub(super) message: Option<Bytes>,
    /// The last message and the carrier that took it.
    pub(super) message_sent: Option<(Bytes, CarrierId)>,
}

impl Pending {
    pub(super) fn window_now(&mut self, id: StreamId) {
        self.later.remove(&id);
        if self.in_windows.insert(id) {
            self.windows.push_back(id);
        }
    }

    pub(super) fn window_soon(&mut self, now: Instant, id: StreamId) {
        if !self.in_windows.contains(&id) {
            self.later.insert(id);
            self.windows_at.get_or_insert(now + WINDOW_DELAY);
        }
    }

    /// The delay is over.
    pub(super) fn windows_due(&mut self) {
        self.windows_at = None;
        let mut due: Vec<_> = std::mem::take(&mut self.later).into_iter().collect();
        due.sort_unstable();
        due.into_iter().for_each(|id| self.window_now(id));
    }

    pub(super) fn pop_window(&mut self) -> Option<StreamId> {
        let id = self.windows.pop_front()?;
        self.in_windows.remove(&id);
        Some(id)
    }

    pub(super) fn reset_again(&mut self, id: StreamId) {
        if !self.resets.contains(&id) {
            self.resets.push_back(id);
        }
    }

    pub(super) fn push_gone(&mut self, id: StreamId) {
        if self.gone.len() < MAX_GONE && !self.gone.contains(&id) {
            self.gone.push_back(id);
        }
    }

    pub(super) fn pop_gone(&mut self) -> Option<StreamId> {
        self.gone.pop_front()
    }

    /// The oldest datagrams make room: a late one is worth less than a new one.
    pub(super) fn push_datagram(&mut self, flow: StreamId, payload: Bytes) {
        self.datagram_bytes += payload.len() + DATAGRAM_COST;
        self.datagrams.push_back((flow, payload));
        while self.datagram_bytes > MAX_DATAGRAMS {
            self.pop_datagram();
        }
    }

    pub(super) fn pop_datagram(&mut self) -> Option<(StreamId, Bytes)> {
        let (flow, payload) = self.datagrams.pop_front()?;
        self.datagram_bytes -= payload.len() + DATAGRAM_COST;
        Some((flow, payload))
    }

    /// Flow and payload length of the next datagram.
    pub(super) fn next_datagram(&self) -> Option<(StreamId, usize)> {
        self.datagrams.front().map(|(flow, payload)| (*flow, payload.len()))
    }

    pub(super) fn carrier_lost(&mut self, lost: CarrierId) {
        if self.message_sent.as_ref().is_some_and(|(_, on)| *on == lost) {
            let sent = self.message_sent.take().map(|(message, _)| message);
            self.message = self.message.take().or(sent);
        }
    }
}
