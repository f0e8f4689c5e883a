//! What goes out on a carrier.

use std::time::Instant;

use adit_protocol::PROTOCOL_VERSION;
use adit_protocol::frame::{Frame, Hello, Position, data_header};
use bytes::{Bytes, BytesMut};

use super::stream::Stream;
use super::{CarrierId, End, Lane, Session, StreamId, Transmit};

/// Control frames are gathered up to about this many bytes.
const GATHER: usize = 4 * 1024;
/// Most that a datagram frame adds to its payload: tag, length, number of the flow.
const DATAGRAM_HEAD: usize = 1 + 4 + 8;
/// A stream's turn when others wait: one TLS record. Bytes.
const TURN: usize = 16 * 1024 - 64;
/// A stream's turn when it is alone: with its header, four whole TLS records. Bytes.
pub const LONG_TURN: usize = 64 * 1024 - 64;

impl Session {
    /// The next bytes for one lane of a carrier, or `None` while there is nothing to send there.
    ///
    /// A multiplexed carrier asks for [`Lane::Control`], and for the lane of each stream that
    /// [`Session::poll_lane`] named, with the stream's number.
    pub fn poll_transmit(&mut self, now: Instant, id: CarrierId, lane: Lane) -> Option<Transmit> {
        match lane {
            Lane::Control => self.control_lane(now, id),
            Lane::Data(stream) => self.data_lane(now, id, StreamId(stream)),
        }
    }

    /// The next stream that has something to send on a multiplexed carrier.
    pub fn poll_lane(&mut self, id: CarrierId) -> Option<StreamId> {
        if !self.may_carry_data(id) {
            return None;
        }
        while let Some(stream) = self.ready.pop_front() {
            if let Some(Stream::Live(live)) = self.streams.get_mut(&stream) {
                live.queued = false;
                return Some(stream);
            }
        }
        None
    }

    /// Whether everything of the stream was handed out, up to its end, so that its lane can be closed.
    pub fn lane_is_done(&self, stream: StreamId) -> bool {
        self.streams.get(&stream).and_then(Stream::live).is_none_or(|live| live.send.is_handed_out())
    }

    /// The lane of a stream was closed. If there was more for it meanwhile, [`Session::poll_lane`] names
    /// the stream again.
    pub fn lane_closed(&mut self, stream: StreamId) {
        self.mark_ready(stream);
    }

    /// How large the carrier's transport datagrams may be. Larger datagrams, and all while this was not
    /// said, go on the control lane.
    pub fn set_datagram_limit(&mut self, id: CarrierId, bytes: usize) {
        if let Some(carrier) = self.carriers.get_mut(&id) {
            carrier.datagram_limit = bytes;
        }
    }

    /// The next transport datagram for a multiplexed carrier.
    pub fn poll_datagram(&mut self, id: CarrierId) -> Option<Bytes> {
        let limit = self.carriers.get(&id)?.datagram_limit;
        if !self.fits_datagram(limit)? || !self.may_carry_data(id) {
            return None;
        }
        let (flow, payload) = self.pending.pop_datagram()?;
        let mut out = BytesMut::with_capacity(payload.len() + DATAGRAM_HEAD);
        Frame::Datagram { flow: flow.0, payload }.encode(&mut out);
        Some(out.freeze())
    }

    /// Whether the next datagram can go as a transport datagram. Until the agent has answered, each goes
    /// behind the request to open its flow, which it must not overtake.
    fn fits_datagram(&self, limit: usize) -> Option<bool> {
        let (flow, length) = self.pending.next_datagram()?;
        Some(length + DATAGRAM_HEAD <= limit && !self.is_unanswered(flow))
    }

    fn is_unanswered(&self, flow: StreamId) -> bool {
        let live = self.streams.get(&flow).and_then(Stream::live);
        self.end == End::Technician && live.is_some_and(|live| !live.opened)
    }

    fn control_lane(&mut self, now: Instant, id: CarrierId) -> Option<Transmit> {
        let mut out = BytesMut::new();
        let wants_answer = self.control_frames(now, id, &mut out)?;
        let length = out.len();
        self.carriers.get_mut(&id)?.on_sent(now, length, wants_answer);
        let mut payload = Bytes::new();
        if !self.carriers.get(&id)?.kind.is_multiplexed() && self.may_carry_data(id) {
            payload = self.stream_turn(now, id, &mut out).unwrap_or_default();
        }
        (!out.is_empty()).then(|| Transmit { head: out.freeze(), payload })
    }

    /// Control frames go before all data. Returns whether one of them wants an answer.
    fn control_frames(&mut self, now: Instant, id: CarrierId, out: &mut BytesMut) -> Option<bool> {
        let usable = self.may_carry_data(id);
        if !self.carriers.get(&id)?.hello_sent {
            self.hello().encode(out);
        }
        let carrier = self.carriers.get_mut(&id)?;
        carrier.hello_sent = true;
        if let Some(number) = carrier.pong.take() {
            Frame::Pong(number).encode(out);
        }
        if std::mem::take(&mut carrier.ping) {
            Frame::Ping(carrier.take_ping(now)).encode(out);
        }
        if let Some(received) = carrier.take_ack(now) {
            Frame::Ack(received).encode(out);
        }
        if let Some(number) = carrier.nominate.take() {
            Frame::Nominate(number).encode(out);
        }
        if let Some(reason) = self.goodbye.clone().filter(|_| !carrier.goodbye_sent) {
            carrier.goodbye_sent = true;
            Frame::Goodbye { reason }.encode(out);
        }
        // Hello and what follows so far are answered by frames of their own, or not at all.
        let mut wants_answer = false;
        if !usable {
            return Some(wants_answer);
        }
        let datagram_limit = carrier.datagram_limit;
        while out.len() < GATHER {
            if let Some(stream) = self.pending.resets.pop_front() {
                if let Some(Stream::Resetting { code }) = self.streams.get(&stream) {
                    Frame::Reset { stream: stream.0, code: *code }.encode(out);
                }
            } else if let Some(stream) = self.pending.pop_window() {
                self.window(stream, out);
            } else if let Some(stream) = self.pending.pop_gone() {
                Frame::Gone { stream: stream.0 }.encode(out);
            } else if let Some(message) = self.pending.message.take() {
                Frame::Message(message.clone()).encode(out);
                self.pending.message_sent = Some((message, id));
                wants_answer = true;
            } else if self.fits_datagram(datagram_limit) == Some(false)
                && self.carriers.get(&id)?.room() > 0
                && let Some((flow, payload)) = self.pending.pop_datagram()
            {
                if let Some(live) =
                    self.streams.get(&flow).and_then(Stream::live).filter(|_| self.is_unanswered(flow))
                {
                    Frame::Open { stream: flow.0, target: live.target.clone() }.encode(out);
                }
                Frame::Datagram { flow: flow.0, payload }.encode(out);
                wants_answer = true;
            } else {
                break;
            }
        }
        Some(wants_answer)
    }

    fn data_lane(&mut self, now: Instant, id: CarrierId, stream: StreamId) -> Option<Transmit> {
        if !self.may_carry_data(id) {
            self.mark_ready(stream);
            return None;
        }
        let mut out = BytesMut::new();
        let payload = self.stream_frames(now, id, stream, LONG_TURN, &mut out).unwrap_or_default();
        (!out.is_empty()).then(|| Transmit { head: out.freeze(), payload })
    }

    /// One stream's turn on a carrier where all share one lane.
    fn stream_turn(&mut self, now: Instant, id: CarrierId, out: &mut BytesMut) -> Option<Bytes> {
        let room = self.carriers.get(&id)?.room() as usize;
        if room == 0 {
            return None;
        }
        let before = out.len();
        while let Some(stream) = self.poll_lane(id) {
            let turn = match std::mem::take(&mut self.turn_left) {
                0 if self.ready.is_empty() => LONG_TURN,
                0 => TURN,
                // Alone when it began, perhaps, and no longer.
                left => left.min(if self.ready.is_empty() { LONG_TURN } else { TURN }),
            };
            let payload = self.stream_frames(now, id, stream, turn.min(room), out);
            let sent = payload.as_ref().map_or(0, Bytes::len);
            // Its turn goes on while the carrier is full, and from one piece to the next: else others would get more.
            if sent < turn && self.mark_first(stream) {
                self.turn_left = turn - sent;
            } else {
                self.mark_ready(stream);
            }
            if out.len() > before {
                return payload;
            }
        }
        None
    }

    /// The request to open the stream, where it is due, and one data frame, whose payload is returned.
    fn stream_frames(
        &mut self,
        now: Instant,
        id: CarrierId,
        stream: StreamId,
        max: usize,
        out: &mut BytesMut,
    ) -> Option<Bytes> {
        let before = out.len();
        let technician = self.end == End::Technician;
        let Some(Stream::Live(live)) = self.streams.get_mut(&stream) else { return None };
        // Until the agent has answered, whatever carries the stream's bytes carries the request first.
        if technician && !live.opened && live.open_sent_on != Some(id) {
            live.open_sent_on = Some(id);
            Frame::Open { stream: stream.0, target: live.target.clone() }.encode(out);
        }
        let payload = live.send.next_chunk(id, max).map(|chunk| {
            out.extend_from_slice(&data_header(
                stream.0,
                chunk.offset,
                chunk.bytes.len(),
                chunk.fin,
                chunk.held,
            ));
            chunk.bytes
        });
        let length = out.len() - before + payload.as_ref().map_or(0, Bytes::len);
        if length > 0 {
            self.carriers.get_mut(&id)?.on_sent(now, length, true);
        }
        payload
    }

    fn window(&mut self, id: StreamId, out: &mut BytesMut) {
        let Some(Stream::Live(live)) = self.streams.get_mut(&id) else { return };
        live.recv.told();
        Frame::Window(live.position(id)).encode(out);
        self.forget_if_done(id);
    }

    fn hello(&mut self) -> Frame {
        let mut positions: Vec<Position> = Vec::new();
        for (id, stream) in &mut self.streams {
            if let Stream::Live(live) = stream
                && live.opened
            {
                live.recv.told();
                positions.push(live.position(*id));
            }
        }
        positions.sort_unstable_by_key(|position| position.stream);
        Frame::Hello(Hello {
            version: u64::from(PROTOCOL_VERSION),
            session: self.id,
            instance: self.instance,
            peer_instance: self.peer_instance.unwrap_or(0),
            positions,
        })
    }

    /// Whether streams, flows and the session's own words go out on this carrier.
    fn may_carry_data(&self, id: CarrierId) -> bool {
        self.active == Some(id) && !self.closed && self.carriers.get(&id).is_some_and(|c| self.is_usable(c))
    }
}
