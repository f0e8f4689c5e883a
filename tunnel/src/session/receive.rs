//! What arrives on a carrier.

use std::time::Instant;

use adit_protocol::Target;
use adit_protocol::frame::{Data, Decoder, Frame, Hello, Item, Position, ResetCode};
use bytes::Bytes;

use super::stream::Stream;
use super::{CarrierId, End, Event, Lane, PeerMisbehaved, Reason, Session, StreamId};

/// How far a stream's number may run ahead of the lowest one that is missing: streams are numbered
/// in the order they are opened, and lanes may overtake each other only so far.
const MAX_AHEAD: u64 = 4096;
/// Gaps in the numbers seen.
const MAX_GAPS: usize = 1024;

impl Session {
    /// Takes bytes that arrived on one lane of a carrier, in any pieces. On a multiplexed carrier no
    /// other lane may be handed in before [`Event::Ready`].
    ///
    /// # Errors
    /// [`PeerMisbehaved`]: close the transport and [`Session::detach`] the carrier.
    pub fn receive(
        &mut self,
        now: Instant,
        id: CarrierId,
        lane: Lane,
        bytes: Bytes,
    ) -> Result<(), PeerMisbehaved> {
        let Some(carrier) = self.carriers.get_mut(&id) else { return Ok(()) };
        let length = bytes.len();
        let was_silent = carrier.silent;
        carrier.on_heard(now, length);
        let mut decoder = std::mem::take(carrier.decoders.entry(lane).or_default());
        decoder.push(bytes);
        let result = self.receive_items(now, id, &mut decoder, length);
        if let Some(carrier) = self.carriers.get_mut(&id) {
            carrier.decoders.insert(lane, decoder);
        }
        if was_silent {
            self.choose(now, Reason::Better);
        }
        result
    }

    /// A lane of a multiplexed carrier has ended.
    pub fn lane_ended(&mut self, id: CarrierId, lane: Lane) {
        if let Some(carrier) = self.carriers.get_mut(&id) {
            carrier.decoders.remove(&lane);
        }
    }

    /// Takes one transport datagram of a multiplexed carrier.
    ///
    /// # Errors
    /// As [`Session::receive`].
    pub fn receive_datagram(
        &mut self,
        now: Instant,
        id: CarrierId,
        bytes: Bytes,
    ) -> Result<(), PeerMisbehaved> {
        let Some(carrier) = self.carriers.get_mut(&id) else { return Ok(()) };
        carrier.on_heard(now, 0);
        let mut decoder = Decoder::default();
        decoder.push(bytes);
        match decoder.next()? {
            Some(Item::Frame(frame @ Frame::Datagram { .. })) => self.on_frame(now, id, frame).map(drop),
            _ => Err(PeerMisbehaved::Frame(adit_protocol::frame::FrameError::Malformed)),
        }
    }

    fn receive_items(
        &mut self,
        now: Instant,
        id: CarrierId,
        decoder: &mut Decoder,
        length: usize,
    ) -> Result<(), PeerMisbehaved> {
        let mut eliciting = false;
        while let Some(item) = decoder.next()? {
            if self.closed {
                return Ok(());
            }
            eliciting |= match item {
                Item::Data(data) => {
                    self.on_data(now, id, data)?;
                    true
                }
                Item::Frame(frame) => self.on_frame(now, id, frame)?,
            };
        }
        if let Some(carrier) = self.carriers.get_mut(&id).filter(|_| eliciting) {
            carrier.on_eliciting(now, length);
            if carrier.ack_due {
                self.wake(id);
            }
        }
        Ok(())
    }

    /// Returns whether the frame wants to be acknowledged.
    fn on_frame(&mut self, now: Instant, id: CarrierId, frame: Frame) -> Result<bool, PeerMisbehaved> {
        if let Frame::Hello(hello) = frame {
            return self.on_hello(now, id, hello).map(|()| false);
        }
        let Some(carrier) = self.carriers.get_mut(&id) else { return Ok(false) };
        if !carrier.hello_received {
            return Err(PeerMisbehaved::Hello);
        }
        match frame {
            Frame::Hello(_) => {}
            Frame::Ping(number) => {
                carrier.pong = Some(number);
                self.wake(id);
            }
            Frame::Pong(number) => carrier.on_pong(now, number),
            Frame::Ack(received) => {
                carrier.on_ack(now, received).map_err(|()| PeerMisbehaved::Acknowledged)?;
                self.wake(id);
            }
            Frame::Nominate(number) => self.on_nominate(now, id, number),
            Frame::Open { stream, target } => {
                self.on_open(StreamId(stream), target)?;
                return Ok(true);
            }
            Frame::Window(position) => self.on_window(now, position)?,
            Frame::Reset { stream, code } => self.on_reset(StreamId(stream), code)?,
            Frame::Gone { stream } => self.on_gone(StreamId(stream)),
            Frame::Datagram { flow, payload } => {
                if self.live(StreamId(flow)).is_ok_and(|live| live.is_flow) {
                    // A small slice must not keep a large read buffer alive.
                    let small = payload.len() < super::send::SMALL;
                    let payload = if small { Bytes::copy_from_slice(&payload) } else { payload };
                    self.events.push_back(Event::Datagram { flow: StreamId(flow), payload });
                }
                return Ok(true);
            }
            Frame::Message(message) => {
                self.events.push_back(Event::Message(message));
                return Ok(true);
            }
            Frame::Goodbye { reason } => self.end_all(ResetCode::SessionEnded, reason),
        }
        Ok(false)
    }

    fn on_hello(&mut self, now: Instant, id: CarrierId, hello: Hello) -> Result<(), PeerMisbehaved> {
        let in_use = self.active == Some(id);
        let Some(carrier) = self.carriers.get_mut(&id) else { return Ok(()) };
        if carrier.hello_received || hello.session != self.id || hello.instance == 0 {
            return Err(PeerMisbehaved::Hello);
        }
        carrier.hello_received = true;
        let restarted = self.peer_instance.is_some_and(|known| known != hello.instance);
        let means_another = hello.peer_instance != 0 && hello.peer_instance != self.instance;
        if restarted || means_another {
            self.goodbye = Some("the process at the other end is a new one".to_owned());
            self.end_all(ResetCode::Restarted, "the process at the other end is a new one".to_owned());
            self.wake(id);
            return Ok(());
        }
        self.peer_instance = Some(hello.instance);
        carrier.schedule_probe(now, in_use);
        carrier.probe_now(now);
        for position in hello.positions {
            self.on_window(now, position)?;
        }
        self.events.push_back(Event::Ready(id));
        self.wake(id);
        self.choose(now, Reason::Better);
        Ok(())
    }

    fn on_nominate(&mut self, now: Instant, id: CarrierId, number: u64) {
        if self.end == End::Agent && number > self.nomination {
            let reason = if self.nomination == 0 { Reason::Opened } else { Reason::Nominated };
            self.nomination = number;
            if self.active != Some(id) {
                self.move_to(now, Some(id), reason);
            }
        }
    }

    fn on_open(&mut self, id: StreamId, target: Target) -> Result<(), PeerMisbehaved> {
        if self.end != End::Agent {
            return Err(PeerMisbehaved::Stream);
        }
        if self.seen.contains(id.0) {
            return Ok(());
        }
        self.note_seen(id)?;
        // The technician counts for itself. Here some may not be over yet that are over there, because
        // what ends them was overtaken; a correct technician never has twice as many.
        if self.streams.len() >= 4 * self.config.max_streams {
            return Err(PeerMisbehaved::Stream);
        }
        if self.streams.values().filter_map(Stream::live).count() >= 2 * self.config.max_streams {
            self.streams.insert(id, Stream::Resetting { code: ResetCode::Overloaded as u64 });
            self.pending.resets.push_back(id);
            self.wake_active();
            return Ok(());
        }
        self.insert_stream(id, target.clone());
        self.events.push_back(Event::Incoming { stream: id, target });
        Ok(())
    }

    fn on_data(&mut self, now: Instant, id: CarrierId, data: Data) -> Result<(), PeerMisbehaved> {
        if !self.carriers.get(&id).is_some_and(|carrier| carrier.hello_received) {
            return Err(PeerMisbehaved::Hello);
        }
        if self.active != Some(id)
            && let Some(carrier) = self.active.and_then(|active| self.carriers.get_mut(&active))
        {
            // The other end sends elsewhere: perhaps it knows something of ours.
            carrier.probe_now(now);
        }
        let stream = StreamId(data.stream);
        let Some(live) = self.streams.get_mut(&stream) else {
            if !self.was_open(stream) {
                return Err(PeerMisbehaved::Stream);
            }
            self.pending.push_gone(stream);
            self.wake_active();
            return Ok(());
        };
        if let Stream::Live(live) = live
            && !live.is_flow
        {
            let news = live.recv.receive(data.offset, data.bytes, data.fin, data.held);
            let news = news.map_err(|_| PeerMisbehaved::FlowControl)?;
            self.mark_opened(stream);
            if news {
                self.events.push_back(Event::Readable(stream));
            }
            self.window_news(now, stream);
            self.forget_if_done(stream);
        }
        Ok(())
    }

    fn on_window(&mut self, now: Instant, position: Position) -> Result<(), PeerMisbehaved> {
        let id = StreamId(position.stream);
        let Some(Stream::Live(live)) = self.streams.get_mut(&id) else {
            if !self.was_open(id) {
                return Err(PeerMisbehaved::Stream);
            }
            if !self.streams.contains_key(&id) {
                // It does not know yet that everything has arrived here.
                self.pending.push_gone(id);
                self.wake_active();
            }
            return Ok(());
        };
        let before = live.send.retained();
        let news = live.send.acknowledge(position.acked).map_err(|()| PeerMisbehaved::Acknowledged)?;
        let grew = live.send.grant(position.credit);
        self.retained -= before - live.send.retained();
        if news > 0 || grew {
            self.events.push_back(Event::Writable(id));
        }
        self.mark_opened(id);
        self.mark_ready(id);
        self.window_news(now, id);
        self.forget_if_done(id);
        Ok(())
    }

    fn on_reset(&mut self, id: StreamId, code: u64) -> Result<(), PeerMisbehaved> {
        if !self.was_open(id) {
            // An agent may hear of the end before it hears of the beginning.
            self.note_seen(id)?;
        }
        if let Some(stream) = self.streams.remove(&id)
            && let Stream::Live(live) = stream
        {
            self.windows_total -= live.recv.window;
            self.retained -= live.send.retained();
            self.events.push_back(Event::Reset { stream: id, code: code.into() });
        }
        self.pending.push_gone(id);
        self.wake_active();
        Ok(())
    }

    /// The other end holds nothing of the stream any more.
    fn on_gone(&mut self, id: StreamId) {
        match self.streams.get_mut(&id) {
            Some(Stream::Live(live)) => {
                // It forgot the stream because it had everything, and knew that this end had, too. What the
                // application has not read yet stays.
                self.retained -= live.send.retained();
                live.send.acknowledge_all();
                live.recv.told();
                self.forget_if_done(id);
            }
            Some(Stream::Resetting { .. }) => drop(self.streams.remove(&id)),
            None => {}
        }
    }

    fn mark_opened(&mut self, id: StreamId) {
        let technician = self.end == End::Technician;
        if let Ok(live) = self.live(id)
            && technician
            && !live.opened
        {
            live.opened = true;
            live.open_sent_on = None;
            self.events.push_back(Event::Opened(id));
        }
    }

    /// Agent: the number is taken from now on.
    fn note_seen(&mut self, id: StreamId) -> Result<(), PeerMisbehaved> {
        let first_missing = self.seen.first().filter(|range| range.start == 0).map_or(0, |range| range.end);
        if self.end != End::Agent || id.0 >= first_missing + MAX_AHEAD || self.seen.len() > MAX_GAPS {
            return Err(PeerMisbehaved::Stream);
        }
        self.seen.insert(id.0..id.0 + 1);
        Ok(())
    }

    /// Whether the stream exists or existed.
    fn was_open(&self, id: StreamId) -> bool {
        match self.end {
            End::Technician => id.0 < self.next_stream,
            End::Agent => self.seen.contains(id.0),
        }
    }
}
