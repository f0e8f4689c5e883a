//! The session engine: streams and flows that outlive the carriers under them.
//!
//! A [`Session`] is one end of a tunnel. It numbers each stream's bytes, keeps what the other end has
//! not acknowledged, and puts it on whichever [carrier](CarrierKind) the [policy] names. When a
//! carrier dies, only what was on it is sent again on the next one; a byte is delivered once, in order,
//! or the stream is reset. The technician's end opens streams, the agent's end accepts them.
//!
//! # Driving it
//! The engine does no I/O, reads no clock and draws no random number. Whoever drives it
//!
//! 1. calls [`Session::attach`] for each authenticated transport connection and hands in what arrives
//!    on it with [`Session::receive`], at once, whatever the streams' readers do;
//! 2. after every call takes [`Session::take_wakes`] and, for each carrier named, sends everything that
//!    [`Session::poll_transmit`] (and for multiplexed ones [`Session::poll_lane`] and
//!    [`Session::poll_datagram`]) returns;
//! 3. drains [`Session::poll_event`];
//! 4. calls [`Session::handle_timeout`] when [`Session::poll_timeout`] has passed;
//! 5. calls [`Session::detach`] when a transport ends, for whatever reason. An end of file on a carrier
//!    is a lost carrier, nothing more.
//!
//! # Bounds
//! Bytes retained for sending and buffered for reading are each within [`Config::budget`]; streams
//! are within [`Config::max_streams`]; datagrams that do not fit are dropped.

mod carrier;
mod control;
mod policy;
mod ranges;
mod receive;
mod recv;
mod send;
mod stream;
mod transmit;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use adit_protocol::frame::{FrameError, ResetCode};
use adit_protocol::{SessionId, Target};
use bytes::Bytes;

use carrier::Carrier;
use ranges::RangeSet;
pub use recv::INITIAL_WINDOW;
use stream::{Live, Stream};
pub use transmit::LONG_TURN;

/// Which end of the tunnel this is. The technician's end is the TLS and QUIC client, opens the streams
/// and names the carrier to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Opens streams.
    Technician,
    /// Accepts them.
    Agent,
}

/// A concrete transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CarrierKind {
    /// QUIC over the punched UDP path.
    Quic,
    /// TLS over a direct TCP connection.
    Tcp,
    /// TLS end to end over a relayed byte stream.
    Relay,
    /// The same inside WebSocket frames on 443.
    RelayHttps,
}

impl CarrierKind {
    /// The name in events and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            CarrierKind::Quic => "quic",
            CarrierKind::Tcp => "tcp",
            CarrierKind::Relay => "relay",
            CarrierKind::RelayHttps => "relay-https",
        }
    }

    /// What the user is told: `direct` or `relay`.
    pub fn tier(self) -> &'static str {
        if matches!(self, CarrierKind::Quic | CarrierKind::Tcp) { "direct" } else { "relay" }
    }

    /// Whether each stream has a transport stream of its own, so that one lost packet holds up one
    /// stream only, and whether the transport has a congestion control of its own to rely on.
    pub fn is_multiplexed(self) -> bool {
        self == CarrierKind::Quic
    }
}

/// Names a carrier of one session. Later ones are larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CarrierId(pub u32);

/// Names a stream or flow of one session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(pub u64);

/// One ordered byte stream of a carrier. Carriers that are not multiplexed have the first one only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Opened first; on carriers that are not multiplexed everything runs here.
    Control,
    /// A transport stream that carries one stream, numbered by the receiving end as it likes.
    Data(u64),
}

/// Limits of a session.
#[derive(Debug, Clone)]
pub struct Config {
    /// Bytes in each direction over all streams.
    pub budget: u64,
    /// Streams and flows at once.
    pub max_streams: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { budget: 32 << 20, max_streams: 256 }
    }
}

/// Bytes for a carrier: first `head`, then `payload`.
#[derive(Debug, Clone)]
pub struct Transmit {
    /// Whole frames and the header of a data frame.
    pub head: Bytes,
    /// Payload of that data frame, shared with what the session retains.
    pub payload: Bytes,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Agent: the technician asks for a target; answer with [`Session::accept`] or [`Session::reset`].
    Incoming {
        /// The new stream or flow.
        stream: StreamId,
        /// Where to connect it to.
        target: Target,
    },
    /// Technician: the agent has connected the stream to its target.
    Opened(StreamId),
    /// There is something to read, or the end was reached.
    Readable(StreamId),
    /// More can be written.
    Writable(StreamId),
    /// The other end ended the stream; nothing more comes of it.
    Reset {
        /// Which.
        stream: StreamId,
        /// Why.
        code: ResetCode,
    },
    /// Both directions are done; the stream is forgotten.
    Finished(StreamId),
    /// A datagram of a flow.
    Datagram {
        /// Which flow.
        flow: StreamId,
        /// The payload.
        payload: Bytes,
    },
    /// A message from the other end's path engine.
    Message(Bytes),
    /// The other end has said hello on this carrier: the session is open, and the carrier can be used.
    Ready(CarrierId),
    /// The session sends on this carrier from now on.
    Active {
        /// The carrier.
        carrier: CarrierId,
        /// Why.
        reason: Reason,
    },
    /// Nothing was heard on the carrier in use, and there is no other: dial more.
    Silent(CarrierId),
    /// The engine gave the carrier up: close it.
    Lost {
        /// The carrier.
        carrier: CarrierId,
        /// How long nothing was heard.
        silent_for: Duration,
    },
    /// The session is over, all streams are reset.
    Closed {
        /// For people.
        reason: String,
    },
}

/// Why the session sends on another carrier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The first one.
    Opened,
    /// A better one came up.
    Better,
    /// The one before was silent for so long.
    Silent(Duration),
    /// The one before was lost.
    Lost,
    /// The other end moved.
    Nominated,
}

/// Bytes that no correct peer sends. The carrier they came on is of no further use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PeerMisbehaved {
    /// Not a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Something came before the hello, or a second one, or for another session.
    #[error("the peer did not say hello as it should")]
    Hello,
    /// More than its credit, or behind the end of a stream.
    #[error("the peer sent more than it may")]
    FlowControl,
    /// An acknowledgement of what was never sent.
    #[error("the peer acknowledged what was never sent")]
    Acknowledged,
    /// A stream that cannot exist.
    #[error("the peer named a stream that cannot exist")]
    Stream,
}

/// Why a stream cannot be opened now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// As many as may be are open: wait until one ends.
    #[error("too many streams are open")]
    Full,
    /// The session is over.
    #[error("the session is closed")]
    Closed,
}

/// The stream is unknown: finished, reset, or never opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no such stream")]
pub struct NoStream;

/// What a carrier has done so far.
#[derive(Debug, Clone, Copy)]
pub struct CarrierStats {
    /// Which transport.
    pub kind: CarrierKind,
    /// Bytes handed out for it.
    pub sent: u64,
    /// Bytes that arrived on it.
    pub received: u64,
    /// Smoothed round trip.
    pub rtt: Option<Duration>,
    /// Nothing was heard for too long.
    pub silent: bool,
}

/// One end of a tunnel. See the [module](self) for how to drive it.
#[derive(Debug)]
pub struct Session {
    end: End,
    id: SessionId,
    instance: u64,
    peer_instance: Option<u64>,
    config: Config,

    carriers: BTreeMap<CarrierId, Carrier>,
    next_carrier: u32,
    active: Option<CarrierId>,
    nomination: u64,

    streams: HashMap<StreamId, Stream>,
    /// Technician: the next stream's number. Agent: unused.
    next_stream: u64,
    /// Agent: the numbers that were opened so far.
    seen: RangeSet,
    /// Sum of all streams' receive windows.
    windows_total: u64,
    /// A stream wanted more of a window, and less was left than its equal share.
    scarce: bool,
    /// Sum of what all streams retain.
    retained: u64,

    /// Streams with something for the active carrier.
    ready: VecDeque<StreamId>,
    /// What is left of the first one's turn, in bytes; 0: all of it.
    turn_left: usize,
    pending: control::Pending,
    wakes: Vec<CarrierId>,
    events: VecDeque<Event>,
    closed: bool,
    /// Said to the other end on every carrier.
    goodbye: Option<String>,
}

impl Session {
    /// One end of session `id`. `instance` is a random number that this process uses for nothing else.
    pub fn new(end: End, id: SessionId, instance: u64, config: Config) -> Self {
        Self {
            end,
            id,
            instance: instance.max(1),
            peer_instance: None,
            config,
            carriers: BTreeMap::new(),
            next_carrier: 0,
            active: None,
            nomination: 0,
            streams: HashMap::new(),
            next_stream: 0,
            seen: RangeSet::default(),
            windows_total: 0,
            scarce: false,
            retained: 0,
            ready: VecDeque::new(),
            turn_left: 0,
            pending: control::Pending::default(),
            wakes: Vec::new(),
            events: VecDeque::new(),
            closed: false,
            goodbye: None,
        }
    }

    /// Adds an authenticated transport connection to the other end's device.
    pub fn attach(&mut self, now: Instant, kind: CarrierKind) -> CarrierId {
        let id = CarrierId(self.next_carrier);
        self.next_carrier += 1;
        self.carriers.insert(id, Carrier::new(now, kind));
        if self.active.is_none() {
            // Streams need not wait for the other end's hello where it can say nothing new.
            self.choose(now, Reason::Opened);
        }
        self.wake(id);
        id
    }

    /// The transport connection has ended. What was on it and not acknowledged goes to another carrier,
    /// now or when there is one.
    pub fn detach(&mut self, now: Instant, id: CarrierId) {
        if self.carriers.remove(&id).is_some() {
            self.requeue(id);
            self.choose(now, Reason::Lost);
        }
    }

    /// Technician: opens a stream or flow to `target`. Bytes may be written at once.
    ///
    /// # Errors
    /// [`OpenError`]; nothing has happened then.
    pub fn open(&mut self, target: Target) -> Result<StreamId, OpenError> {
        if self.closed {
            return Err(OpenError::Closed);
        }
        if self.streams.len() >= self.config.max_streams {
            return Err(OpenError::Full);
        }
        let id = StreamId(self.next_stream);
        self.next_stream += 1;
        self.insert_stream(id, target);
        self.mark_ready(id);
        Ok(id)
    }

    /// Agent: the target of `stream` is connected.
    ///
    /// # Errors
    /// [`NoStream`] when the technician has ended it meanwhile.
    pub fn accept(&mut self, id: StreamId) -> Result<(), NoStream> {
        self.live(id)?.opened = true;
        self.pending.window_now(id);
        self.wake_active();
        Ok(())
    }

    /// How many bytes can be written now.
    ///
    /// # Errors
    /// [`NoStream`].
    pub fn writable(&self, id: StreamId) -> Result<usize, NoStream> {
        let Some(Stream::Live(live)) = self.streams.get(&id) else { return Err(NoStream) };
        // A peer that grants without limit does not make this end keep more than its budget.
        let room = self.config.budget.saturating_sub(self.retained);
        let room = room.max(INITIAL_WINDOW.saturating_sub(live.send.retained()));
        Ok(live.send.writable().min(room) as usize)
    }

    /// Writes bytes, at most [`Session::writable`]; they are retained until the other end has them.
    ///
    /// # Errors
    /// [`NoStream`].
    ///
    /// # Panics
    /// When there are more bytes than can be written.
    pub fn write(&mut self, id: StreamId, bytes: Bytes) -> Result<(), NoStream> {
        let live = self.live(id)?;
        let length = bytes.len() as u64;
        // Its own credit only: other streams may have taken of the budget since.
        assert!(length <= live.send.writable());
        live.send.write(bytes);
        self.retained += length;
        self.mark_ready(id);
        Ok(())
    }

    /// Ends the sending direction behind what was written. The other direction goes on.
    ///
    /// # Errors
    /// [`NoStream`].
    pub fn finish(&mut self, id: StreamId) -> Result<(), NoStream> {
        self.live(id)?.send.finish();
        self.mark_ready(id);
        Ok(())
    }

    /// The next bytes, at most `max`; empty: the other end has finished; `None`: nothing yet.
    ///
    /// # Errors
    /// [`NoStream`].
    pub fn read(&mut self, now: Instant, id: StreamId, max: usize) -> Result<Option<Bytes>, NoStream> {
        let live = self.live(id)?;
        let bytes = live.recv.read(max);
        if bytes.is_some() {
            self.grow_window(id);
            self.window_news(now, id);
            self.forget_if_done(id);
            return Ok(bytes);
        }
        Ok(live.recv.is_at_end().then(Bytes::new))
    }

    /// Ends a stream at once, in both directions. The other end is told.
    pub fn reset(&mut self, id: StreamId, code: ResetCode) {
        if let Some(Stream::Live(live)) = self.streams.get(&id) {
            (self.windows_total, self.retained) =
                (self.windows_total - live.recv.window, self.retained - live.send.retained());
            self.streams.insert(id, Stream::Resetting { code: code as u64 });
            self.pending.resets.push_back(id);
            self.wake_active();
        }
    }

    /// Sends one datagram of a flow, or drops it when the carrier is full or there is none.
    ///
    /// # Errors
    /// [`NoStream`].
    pub fn send_datagram(&mut self, flow: StreamId, payload: Bytes) -> Result<(), NoStream> {
        self.live(flow)?;
        self.pending.push_datagram(flow, payload);
        self.wake_active();
        Ok(())
    }

    /// Sends a message to the other end's path engine. A newer message replaces one that was not sent
    /// yet; one whose carrier dies is sent again.
    pub fn send_message(&mut self, message: Bytes) {
        self.pending.message = Some(message);
        self.wake_active();
    }

    /// Ends the session: the other end is told on every carrier. Drive it until nothing is left to
    /// transmit, then close the carriers.
    pub fn close(&mut self, reason: &str) {
        if !self.closed {
            self.goodbye = Some(reason.chars().take(250).collect());
            self.end_all(ResetCode::SessionEnded, reason.to_owned());
            let all: Vec<_> = self.carriers.keys().copied().collect();
            all.into_iter().for_each(|id| self.wake(id));
        }
    }

    /// Whether the session is over.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether the session is over and there is nothing left to say about it on this carrier.
    pub fn has_parted(&self, id: CarrierId) -> bool {
        let said = self.carriers.get(&id).is_none_or(|carrier| carrier.goodbye_sent);
        self.closed && (self.goodbye.is_none() || said)
    }

    /// Whether everything written on every stream has been acknowledged by the other end.
    pub fn is_drained(&self) -> bool {
        self.retained == 0 && self.ready.is_empty()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// The carriers that may have something to transmit since the last call.
    pub fn take_wakes(&mut self) -> Vec<CarrierId> {
        std::mem::take(&mut self.wakes)
    }

    /// When [`Session::handle_timeout`] is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let carriers = self.carriers.values().filter_map(Carrier::next_timeout);
        carriers.chain(self.pending.windows_at).min()
    }

    /// Does what is due by `now`.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.pending.windows_at.is_some_and(|at| at <= now) {
            self.pending.windows_due();
            self.wake_active();
        }
        let ids: Vec<_> = self.carriers.keys().copied().collect();
        for id in ids {
            let in_use = self.active == Some(id);
            let Some(carrier) = self.carriers.get_mut(&id) else { continue };
            let silent_for = carrier.on_timeout(now, in_use);
            if carrier.ack_due || carrier.ping {
                self.wake(id);
            }
            if let Some(silent_for) = silent_for {
                self.on_silence(now, id, silent_for);
            }
        }
    }

    /// Probes every carrier at once: after waking from sleep, or when an address changed.
    pub fn probe_all(&mut self, now: Instant) {
        self.carriers.values_mut().for_each(|carrier| carrier.probe_now(now));
    }

    /// Bytes held in memory for the streams: retained for sending, and buffered for reading.
    pub fn memory(&self) -> (u64, u64) {
        let buffered = self.streams.values().filter_map(Stream::live).map(|live| live.recv.buffered()).sum();
        (self.retained, buffered)
    }

    /// Streams and flows that are open, or whose end is not confirmed yet.
    pub fn stream_count(&self) -> usize {
        self.streams.len()
    }

    /// The carrier that the session sends on.
    pub fn active(&self) -> Option<CarrierId> {
        self.active
    }

    /// Whether the other end has said hello on this carrier.
    pub fn is_ready(&self, id: CarrierId) -> bool {
        self.carriers.get(&id).is_some_and(|carrier| carrier.hello_received)
    }

    /// What a carrier has done so far.
    pub fn carrier_stats(&self, id: CarrierId) -> Option<CarrierStats> {
        let c = self.carriers.get(&id)?;
        let (kind, silent, rtt) = (c.kind, c.silent, c.smoothed_rtt());
        Some(CarrierStats { kind, sent: c.sent, received: c.received, rtt, silent })
    }

    /// Every attached carrier, oldest first.
    pub fn carriers(&self) -> impl Iterator<Item = CarrierId> + '_ {
        self.carriers.keys().copied()
    }

    fn live(&mut self, id: StreamId) -> Result<&mut Live, NoStream> {
        match self.streams.get_mut(&id) {
            Some(Stream::Live(live)) => Ok(live),
            _ => Err(NoStream),
        }
    }

    fn insert_stream(&mut self, id: StreamId, target: Target) {
        self.windows_total += INITIAL_WINDOW;
        self.streams.insert(id, Stream::Live(Box::new(Live::new(target))));
    }

    /// Enlarges a stream's window when that helps and the budget has room: every stream that may still
    /// be opened keeps its least, and beyond its equal share no stream takes more than half of what is left. Who came
    /// first may have taken most of it; once another is short of its equal share, those above theirs give it back as they are read.
    fn grow_window(&mut self, id: StreamId) {
        let reserve = (self.config.max_streams.saturating_sub(self.streams.len())) as u64 * INITIAL_WINDOW;
        let room = self.config.budget.saturating_sub(reserve);
        let left = room.saturating_sub(self.windows_total);
        let share = (room / self.streams.len().max(1) as u64).max(INITIAL_WINDOW);
        let Some(Stream::Live(live)) = self.streams.get_mut(&id) else { return };
        if left > room / 4 {
            self.scarce = false;
        }
        if self.scarce && live.recv.window > share {
            self.windows_total -= live.recv.shrink(share);
        } else if live.recv.wants_growth() {
            // Up to its share it may have all that is left.
            let due = share.saturating_sub(live.recv.window).min(left);
            let more = live.recv.window.min(due.max(left / 2));
            self.scarce |= more < live.recv.window && live.recv.window + more < share;
            live.recv.grow(more);
            self.windows_total += more;
        }
    }

    /// Schedules an acknowledgement when there is something to acknowledge.
    fn window_news(&mut self, now: Instant, id: StreamId) {
        let agent = self.end == End::Agent;
        let Ok(live) = self.live(id) else { return };
        // From the agent a window says that the target is connected.
        if live.is_flow || !live.recv.has_news() || (agent && !live.opened) {
            return;
        }
        if live.recv.is_urgent() {
            self.pending.window_now(id);
            self.wake_active();
        } else {
            self.pending.window_soon(now, id);
        }
    }

    /// Forgets a stream that is finished in both directions, and of which both ends know.
    fn forget_if_done(&mut self, id: StreamId) {
        let Some(Stream::Live(live)) = self.streams.get(&id) else { return };
        if live.send.is_complete() && live.recv.is_at_end() && !live.recv.has_news() {
            self.windows_total -= live.recv.window;
            self.streams.remove(&id);
            self.events.push_back(Event::Finished(id));
        }
    }

    /// A stream has something for the active carrier, perhaps.
    fn mark_ready(&mut self, id: StreamId) {
        self.mark(id, VecDeque::push_back);
    }

    /// The same, before all others. Whether it has.
    fn mark_first(&mut self, id: StreamId) -> bool {
        self.mark(id, VecDeque::push_front)
    }

    fn mark(&mut self, id: StreamId, push: impl FnOnce(&mut VecDeque<StreamId>, StreamId)) -> bool {
        let technician = self.end == End::Technician;
        let Some(Stream::Live(live)) = self.streams.get_mut(&id) else { return false };
        let wants = live.send.has_pending() || (technician && !live.opened && live.open_sent_on.is_none());
        if wants && !live.queued {
            live.queued = true;
            push(&mut self.ready, id);
        }
        if wants {
            self.wake_active();
        }
        wants
    }

    /// What went out on a carrier that is gone, and may not have arrived, is said again.
    fn requeue(&mut self, lost: CarrierId) {
        let ids: Vec<_> = self.streams.keys().copied().collect();
        for id in ids {
            match self.streams.get_mut(&id) {
                Some(Stream::Live(live)) => {
                    live.send.carrier_lost(lost);
                    live.open_sent_on = live.open_sent_on.filter(|on| *on != lost);
                    if live.opened {
                        self.pending.window_now(id);
                    }
                    self.mark_ready(id);
                }
                Some(Stream::Resetting { .. }) => self.pending.reset_again(id),
                None => {}
            }
        }
        self.pending.carrier_lost(lost);
    }

    /// Asks the policy which carrier to send on, and moves there.
    fn choose(&mut self, now: Instant, reason: Reason) {
        // The technician decides when to move up: one end alone, so that they do not pull apart.
        let current = self.active.and_then(|id| self.carriers.get(&id));
        if self.end == End::Agent && current.is_some_and(|carrier| !carrier.silent) {
            return;
        }
        let usable = self.carriers.iter().filter(|(_, c)| self.is_usable(c));
        let chosen =
            policy::choose(usable.map(|(&id, c)| policy::Choice { id, kind: c.kind, silent: c.silent }));
        if chosen != self.active {
            self.move_to(now, chosen, reason);
        }
    }

    fn move_to(&mut self, now: Instant, chosen: Option<CarrierId>, reason: Reason) {
        let reason = if self.active.is_none() && self.nomination == 0 { Reason::Opened } else { reason };
        let before = std::mem::replace(&mut self.active, chosen);
        let Some(id) = chosen else { return };
        if self.end == End::Technician {
            self.nomination += 1;
        }
        let nomination = self.nomination;
        // What went to nobody yet is said here.
        let unheard =
            before.filter(|it| self.carriers.get(it).is_some_and(|carrier| !carrier.hello_received));
        if let Some(unheard) = unheard {
            self.requeue(unheard);
        }
        if let Some(carrier) = self.carriers.get_mut(&id) {
            if self.end == End::Technician {
                carrier.nominate = Some(nomination);
            }
            carrier.first_probe(now);
        }
        self.events.push_back(Event::Active { carrier: id, reason });
        self.wake(id);
        // The one before stands by while it drains; silent, it is of no use.
        if let Some(before) = before.filter(|b| self.carriers.get(b).is_some_and(|c| c.silent)) {
            self.give_up(now, before);
        }
    }

    fn on_silence(&mut self, now: Instant, id: CarrierId, silent_for: Duration) {
        if !self.is_ready(id) {
            // Nobody is there.
            return self.lose(now, id, silent_for);
        }
        if self.active != Some(id) {
            // Nothing hangs on a carrier that stands by: replace it before it is needed.
            if self.carriers.values().any(|c| !c.silent && c.hello_received) {
                self.lose(now, id, silent_for);
            }
            return;
        }
        self.choose(now, Reason::Silent(silent_for));
        if self.active == Some(id) {
            self.events.push_back(Event::Silent(id));
        }
    }

    fn give_up(&mut self, now: Instant, id: CarrierId) {
        let silent_for = self.carriers.get(&id).map_or(Duration::ZERO, |c| c.heard_ago(now));
        self.lose(now, id, silent_for);
    }

    fn lose(&mut self, now: Instant, id: CarrierId, silent_for: Duration) {
        self.events.push_back(Event::Lost { carrier: id, silent_for });
        self.detach(now, id);
    }

    /// Both ends have said hello; or this is the technician's first word to an agent of which nothing is
    /// known yet, so that there is nothing to agree on either.
    fn is_usable(&self, carrier: &Carrier) -> bool {
        carrier.hello_received || (self.peer_instance.is_none() && self.end == End::Technician)
    }

    fn end_all(&mut self, code: ResetCode, reason: String) {
        self.closed = true;
        for (id, stream) in std::mem::take(&mut self.streams) {
            if matches!(stream, Stream::Live(_)) {
                self.events.push_back(Event::Reset { stream: id, code });
            }
        }
        (self.retained, self.windows_total) = (0, 0);
        self.ready.clear();
        self.pending = control::Pending::default();
        self.events.push_back(Event::Closed { reason });
    }

    fn wake(&mut self, id: CarrierId) {
        if !self.wakes.contains(&id) {
            self.wakes.push(id);
        }
    }

    fn wake_active(&mut self) {
        if let Some(id) = self.active {
            self.wake(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that this end says on its carrier now, as bytes.
    fn say(session: &mut Session, now: Instant, carrier: CarrierId) -> Bytes {
        let mut said = Vec::new();
        while let Some(transmit) = session.poll_transmit(now, carrier, Lane::Control) {
            said.extend([&transmit.head[..], &transmit.payload].concat());
        }
        said.into()
    }

    #[test]
    fn the_technicians_first_words_go_with_its_hello() {
        let (now, id) = (Instant::now(), SessionId([1; 16]));
        let mut technician = Session::new(End::Technician, id, 1, Config::default());
        let mut agent = Session::new(End::Agent, id, 2, Config::default());
        let target: Target = "127.0.0.1:22".parse().expect("a target");
        let stream = technician.open(target.clone()).expect("opens");
        let fits = technician.writable(stream).expect("it is open");
        technician.write(stream, vec![7; fits.min(100_000)].into()).expect("writes");
        let [one, other] = [&mut technician, &mut agent].map(|end| end.attach(now, CarrierKind::Relay));
        let said = say(&mut technician, now, one);
        let first = said.len();
        // No more than a request, as long as nobody knows the line.
        assert!((10_000..20_000).contains(&first), "{first} bytes");

        agent.receive(now, other, Lane::Control, said).expect("makes sense");
        let events: Vec<Event> = std::iter::from_fn(|| agent.poll_event()).collect();
        let incoming = Event::Incoming { stream, target };
        assert!(events.contains(&incoming) && events.contains(&Event::Ready(other)), "{events:?}");
        agent.accept(stream).expect("it is there");
        let mut read = 0;
        while let Some(bytes) = agent.read(now, stream, 4096).expect("it is open") {
            read += bytes.len();
        }
        assert!(read > 10_000, "{read} bytes");

        // The agent's hello opens the rest of the way; an agent itself says nothing before it knows the technician.
        technician.receive(now, one, Lane::Control, say(&mut agent, now, other)).expect("makes sense");
        let rest = say(&mut technician, now, one).len();
        assert!(rest > 10_000 && first + rest > fits, "{first} and {rest} bytes of {fits}");
    }
}
