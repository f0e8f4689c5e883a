//! The agent: what comes in, what is due, what goes out.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use stun_rs::attributes::stun::{MappedAddress, XorMappedAddress};
use stun_rs::{MessageClass, MessageDecoder};

use super::budget::Budget;
use super::candidate::{Candidate, CandidateKind, may_check};
use super::check::{Codec, Credentials, IceRole, Received, Request, Response};
use super::checklist::{CandidatePair, Checklist};
use super::exchange::Exchange;
use super::gather::Gatherer;
use super::message::{CandidateMessage, InvalidMessage, State};
use super::random::Random;
use super::schedule::{Due, Schedule};
use super::stun::{self, TransactionId};

/// How long a round goes on without success, at each end. The exchange of candidates is part of it.
const ROUND: Duration = Duration::from_secs(5);
/// Most own addresses that are offered.
const MAX_HOSTS: usize = 16;
/// Most addresses of the peer that others than the peer told us.
const MAX_PEER_SEEN: usize = 4;
/// Most datagrams and events that wait for the caller. A caller that polls as it should never gets there.
const MAX_QUEUE: usize = 256;

/// What an agent is made of. Secrets are among it, so there is no `Debug`.
#[derive(Clone)]
pub struct Config {
    /// The technician controls, the agent is controlled.
    pub role: IceRole,
    /// Credentials of this end.
    pub local: Credentials,
    /// Credentials of the other end.
    pub remote: Credentials,
    /// Servers that tell us our address, at most 8. IPv4 and IPv6 addresses of one are two.
    pub stun_servers: Vec<SocketAddr>,
    /// All randomness comes from it. A secret, new for every agent.
    pub seed: [u8; 32],
}

/// A datagram to send from the one socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// Where to.
    pub destination: SocketAddr,
    /// UDP payload.
    pub payload: Vec<u8>,
}

/// What the caller should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Give this to the peer's [`PathAgent::handle_message`], by whatever way there is. It may be lost.
    Message(Vec<u8>),
    /// A path, checked in both directions. The controlling side dials it, then calls
    /// [`PathAgent::path_in_use`]; if that comes to nothing, [`PathAgent::path_lost`]. It may be the path
    /// in use once more, when the peer's carrier died and ours did not. On the controlled side the
    /// carrier may be there first: [`PathAgent::is_confirmed`] is what lets it in.
    Confirmed(Confirmed),
    /// A STUN server saw us at an address that it did not say before.
    ServerReflexive(SocketAddr),
    /// A round found no path. The controlling side says when the next one starts.
    Failed {
        /// The round's number.
        round: u64,
        /// When the next one starts.
        next: Option<Instant>,
    },
}

/// See [`Event::Confirmed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Confirmed {
    /// The round that found it.
    pub round: u64,
    /// This end as the peer sees it.
    pub local: Candidate,
    /// The other end. Datagrams go to its address, from the one socket.
    pub remote: Candidate,
    /// Shortest round trip of a check.
    pub rtt: Duration,
}

/// One end's search for a direct path in one session: a sans-IO ICE agent on one UDP socket, of IPv4, IPv6 or both. IPv4
/// addresses are IPv4 here, never IPv4-mapped IPv6.
///
/// # Driving it
/// `now` never runs backwards. After every call with a `now`:
/// 1. [`Self::poll_transmit`] until `None`, sending each datagram (errors and a full socket count as loss);
/// 2. [`Self::poll_event`] until `None`;
/// 3. call [`Self::handle_timeout`] at [`Self::poll_timeout`], or soon after.
///
/// Datagrams for which [`stun::is_stun`] holds go to [`Self::handle_datagram`] of the agent whose
/// fragment is [`stun::local_ufrag`]; responses have none and go to each agent until one says `true`.
///
/// # A life
/// [`Event::Confirmed`] → the controlling side's caller dials, both call [`Self::path_in_use`] when the
/// carrier is up → it falls silent, [`Self::path_lost`] → the next round. Rounds without success repeat
/// for ever, with pauses that grow to a minute.
pub struct PathAgent {
    role: IceRole,
    codec: Codec,
    random: Random,
    budget: Budget,
    hosts: Vec<SocketAddr>,
    peer_seen: VecDeque<SocketAddr>,
    gatherer: Gatherer,
    exchange: Exchange,
    /// Controlling side only: the other one follows.
    schedule: Option<Schedule>,
    round_number: u64,
    round: Option<Round>,
    /// Controlled side only: the path is gone, and no round has started since.
    want_round: bool,
    /// A path that was confirmed and is not in use yet, and the one in use, until they are lost.
    confirmed: Option<SocketAddr>,
    in_use: Option<SocketAddr>,
    transmits: VecDeque<Transmit>,
    message: Option<Vec<u8>>,
    events: VecDeque<Event>,
}

struct Round {
    checklist: Checklist,
    ends: Instant,
    confirmed: Option<SocketAddr>,
    /// Begun because a check came in; the message that says its number may still be on the way.
    implicit: bool,
}

/// Every timer. Deadlines are derived from the state, so none can be stale.
#[derive(Debug, Clone, Copy)]
enum Timer {
    RoundEnd,
    NextRound,
    Nomination,
    Gather,
    Check,
    /// Last, so that one message tells all that the others changed.
    Message,
}

impl Timer {
    const ALL: [Self; 6] =
        [Self::RoundEnd, Self::NextRound, Self::Nomination, Self::Gather, Self::Check, Self::Message];
}

impl PathAgent {
    /// Starts to gather. The controlling side's first round starts with the next call that has a `now`.
    pub fn new(now: Instant, config: Config) -> Self {
        let mut random = Random::new(&config.seed);
        let mut gatherer = Gatherer::new(config.stun_servers);
        gatherer.start(now);
        Self {
            role: config.role,
            codec: Codec::new(config.role, random.u64(), config.local, config.remote),
            random,
            budget: Budget::new(now),
            hosts: Vec::new(),
            peer_seen: VecDeque::new(),
            gatherer,
            exchange: Exchange::new(),
            schedule: (config.role == IceRole::Controlling).then(|| Schedule::new(now)),
            round_number: 0,
            round: None,
            want_round: false,
            confirmed: None,
            in_use: None,
            transmits: VecDeque::new(),
            message: None,
            events: VecDeque::new(),
        }
    }

    /// The addresses of this machine's interfaces, with the socket's port: all of them, each time they
    /// change. IPv4 ones come first, and what goes beyond 16 is left out.
    pub fn set_host_addresses(&mut self, now: Instant, addresses: &[SocketAddr]) {
        let mut hosts = addresses.to_vec();
        hosts.sort();
        hosts.dedup();
        hosts.truncate(MAX_HOSTS);
        if hosts != self.hosts {
            self.hosts = hosts;
            if let Some(schedule) = &mut self.schedule {
                schedule.network_changed(now);
            }
            // Addresses that we may check depend on our own.
            self.add_candidates(now);
        }
        self.run(now);
    }

    /// A message of the peer's agent ([`Event::Message`]). Duplicates and old ones do no harm.
    ///
    /// # Errors
    /// [`InvalidMessage`]: nothing has changed.
    pub fn handle_message(&mut self, now: Instant, bytes: &[u8]) -> Result<(), InvalidMessage> {
        let message = CandidateMessage::decode(bytes)?;
        if let Some(before) = self.exchange.receive(now, message) {
            match self.role {
                IceRole::Controlling => self.heed(now, &before),
                IceRole::Controlled => self.follow(now),
            }
            self.add_candidates(now);
        }
        self.run(now);
        Ok(())
    }

    /// An address of the peer's socket as the mediator saw it.
    pub fn add_peer_seen(&mut self, now: Instant, address: SocketAddr) {
        if !self.peer_seen.contains(&address) {
            if self.peer_seen.len() == MAX_PEER_SEEN {
                self.peer_seen.pop_front();
            }
            self.peer_seen.push_back(address);
            self.add_candidates(now);
        }
        self.run(now);
    }

    /// A datagram from the socket. `true`: it was ours.
    pub fn handle_datagram(&mut self, now: Instant, source: SocketAddr, datagram: &[u8]) -> bool {
        let ours = self.receive(now, source, datagram);
        self.run(now);
        ours
    }

    /// The carrier over the path to `remote` is up. No rounds while it is.
    pub fn path_in_use(&mut self, now: Instant, remote: SocketAddr) {
        self.settle_on(now, remote);
        self.in_use = Some(remote);
        self.confirmed = None;
        self.want_round = false;
        if let Some(schedule) = &mut self.schedule {
            schedule.in_use(now);
            self.round = None;
            self.gatherer.stop();
        }
        self.run(now);
    }

    /// The carrier over the path to `remote` has died, or could not be set up. Says nothing about a path
    /// that has been confirmed since, or is in use in its place.
    pub fn path_lost(&mut self, now: Instant, remote: SocketAddr, reason: &str) {
        let path = if self.in_use == Some(remote) { &mut self.in_use } else { &mut self.confirmed };
        if path.take_if(|path| *path == remote).is_some() {
            tracing::debug!(%remote, reason, "direct path lost");
            if self.in_use.is_none() && self.confirmed.is_none() {
                let jitter = self.random.u64();
                match &mut self.schedule {
                    Some(schedule) => schedule.lost(now, jitter),
                    None => self.want_round = true,
                }
            }
        }
        self.run(now);
    }

    /// Whether a QUIC connection may come from `remote`: checked in both directions, and nominated.
    pub fn is_confirmed(&self, remote: SocketAddr) -> bool {
        self.in_use == Some(remote)
            || self.confirmed == Some(remote)
            || self.pairs().iter().any(|pair| pair.remote.address == remote && pair.is_valid())
    }

    /// The pairs of the round under way, for people.
    pub fn pairs(&self) -> &[CandidatePair] {
        self.round.as_ref().map_or(&[], |round| round.checklist.pairs())
    }

    /// When to call [`Self::handle_timeout`] next. `None`: not before something else comes in.
    pub fn poll_timeout(&self) -> Option<Instant> {
        Timer::ALL.into_iter().filter_map(|timer| self.deadline(timer)).min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.run(now);
    }

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// What has happened.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.message.take().map(Event::Message).or_else(|| self.events.pop_front())
    }

    fn run(&mut self, now: Instant) {
        let state = self.state();
        self.exchange.tell(now, state);
        while let Some(timer) = self.expired(now) {
            self.fire(now, timer);
            let state = self.state();
            self.exchange.tell(now, state);
        }
    }

    fn expired(&self, now: Instant) -> Option<Timer> {
        Timer::ALL.into_iter().find(|timer| self.deadline(*timer).is_some_and(|deadline| deadline <= now))
    }

    fn deadline(&self, timer: Timer) -> Option<Instant> {
        let round = self.round.as_ref();
        let within_budget = |due: Instant| due.max(self.budget.ready_at());
        match timer {
            Timer::RoundEnd => round.map(|round| round.ends),
            Timer::NextRound => self.schedule.as_ref().and_then(Schedule::due),
            Timer::Nomination if self.role == IceRole::Controlling => round?.checklist.nomination_due(),
            Timer::Nomination => None,
            Timer::Gather => self.gatherer.due().map(within_budget),
            Timer::Check => round?.checklist.due().map(within_budget),
            Timer::Message => self.exchange.due(),
        }
    }

    fn fire(&mut self, now: Instant, timer: Timer) {
        match timer {
            Timer::RoundEnd => self.end_round(now),
            Timer::NextRound => self.next_round(now),
            Timer::Nomination => self.judge(now),
            Timer::Gather => {
                let Some(id) = self.request_id(now) else { return };
                if let Some(server) = self.gatherer.send(now, id) {
                    self.transmit(server, stun::binding_request(id).to_vec());
                }
            }
            Timer::Check => {
                let Some(id) = self.request_id(now) else { return };
                if let Some(check) = self.round.as_mut().and_then(|round| round.checklist.send(now, id)) {
                    self.transmit(check.remote, self.codec.request(id, check.full_size));
                }
            }
            Timer::Message => {
                if let Some(bytes) = self.exchange.send(now) {
                    self.message = Some(bytes);
                }
            }
        }
    }

    fn request_id(&mut self, now: Instant) -> Option<TransactionId> {
        self.budget.spend(now).then(|| self.random.bytes())
    }

    fn next_round(&mut self, now: Instant) {
        match self.schedule.as_ref().and_then(|schedule| schedule.poll(now)) {
            Some(Due::Round) => {
                if let Some(schedule) = &mut self.schedule {
                    schedule.started();
                }
                self.round_number += 1;
                self.begin_round(now, false);
            }
            Some(Due::Unused) => self.fail(now),
            None => {}
        }
    }

    fn begin_round(&mut self, now: Instant, implicit: bool) {
        tracing::debug!(round = self.round_number, implicit, "looking for a direct path");
        self.want_round = false;
        self.gatherer.start(now);
        let checklist = Checklist::default();
        self.round = Some(Round { checklist, ends: now + ROUND, confirmed: None, implicit });
        self.add_candidates(now);
    }

    fn end_round(&mut self, now: Instant) {
        self.gatherer.stop();
        let found = self.round.take().and_then(|round| round.confirmed);
        // The peer has not come on it by now: it does not know of it, or has given it up.
        if self.role == IceRole::Controlled && self.confirmed.take().is_some() && self.in_use.is_none() {
            self.want_round = true;
        }
        if found.is_none() {
            self.fail(now);
        }
    }

    fn fail(&mut self, now: Instant) {
        let jitter = self.random.u64();
        if let Some(schedule) = &mut self.schedule {
            schedule.failed(now, jitter);
        }
        let next = self.schedule.as_ref().and_then(Schedule::due);
        self.push(Event::Failed { round: self.round_number, next });
    }

    /// The controlling side takes note of what the peer tells, beside its candidates.
    fn heed(&mut self, now: Instant, before: &State) {
        let theirs = self.exchange.theirs();
        let asks = theirs.want_round && theirs.round == self.round_number;
        let hosts = |state: &State| -> Vec<_> {
            state
                .candidates
                .iter()
                .filter(|candidate| candidate.kind == CandidateKind::Host)
                .copied()
                .collect()
        };
        let moved = hosts(theirs) != hosts(before);
        let jitter = self.random.u64();
        if let Some(schedule) = &mut self.schedule {
            if asks {
                schedule.lost(now, jitter);
            }
            if moved {
                schedule.network_changed(now);
            }
        }
    }

    /// The controlled side joins the round that the peer is in.
    fn follow(&mut self, now: Instant) {
        let number = self.exchange.theirs().round;
        if number <= self.round_number {
            return;
        }
        self.round_number = number;
        match &mut self.round {
            Some(round) if round.implicit => {
                round.implicit = false;
                round.ends = now + ROUND;
                self.want_round = false;
            }
            _ => self.begin_round(now, false),
        }
    }

    /// All that is known of the peer goes onto the checklist, unless the round has its path.
    fn add_candidates(&mut self, now: Instant) {
        let Some(round) = self.round.as_mut().filter(|round| round.confirmed.is_none()) else { return };
        let seen = self
            .peer_seen
            .iter()
            .map(|address| Candidate { kind: CandidateKind::ServerReflexive, address: *address });
        for candidate in self.exchange.theirs().candidates.iter().copied().chain(seen) {
            // Each check of ours would take a port of our NAT, and the peer's own guesses would be wrong.
            let hopeless =
                candidate.kind == CandidateKind::Predicted && self.gatherer.depends_on_destination();
            let is_ours = self.hosts.contains(&candidate.address);
            if may_check(candidate.address, &self.hosts) && !is_ours && !hopeless {
                round.checklist.add(now, candidate);
            }
        }
    }

    fn receive(&mut self, now: Instant, source: SocketAddr, datagram: &[u8]) -> bool {
        if !stun::is_stun(datagram) {
            return false;
        }
        match self.codec.read_request(datagram) {
            Some(Received::Request(request)) => {
                self.answer(now, source, request);
                return true;
            }
            Some(Received::Forged) => return true,
            None => {}
        }
        let Some(id) = stun::answers(datagram) else { return false };
        if self.gatherer.asked(source, id) {
            self.gathered(source, datagram);
            return true;
        }
        let Some(round) = self.round.as_mut().filter(|round| round.checklist.asked(source, id)) else {
            return false;
        };
        match self.codec.read_response(datagram) {
            Some(Response::Success(mapped)) => round.checklist.answered(now, source, id, mapped),
            Some(Response::Error) => round.checklist.refused(source),
            None => {}
        }
        self.judge(now);
        true
    }

    /// Answers the peer's check, and checks back (RFC 8445 section 7.3).
    fn answer(&mut self, now: Instant, source: SocketAddr, request: Request) {
        if request.role == self.role {
            self.transmit(source, self.codec.role_conflict(request.id));
            return;
        }
        self.transmit(source, self.codec.success(request.id, source));
        let idle = self.round.is_none() && self.confirmed.is_none() && self.in_use.is_none();
        if idle && self.role == IceRole::Controlled {
            // The peer is in a round already: its message is late or lost.
            self.begin_round(now, true);
        }
        let nominated = request.use_candidate && self.role == IceRole::Controlled;
        if let Some(round) = self.round.as_mut().filter(|_| may_check(source, &self.hosts)) {
            round.checklist.heard(now, source, request.full_size, nominated);
        }
        self.judge(now);
    }

    fn gathered(&mut self, server: SocketAddr, datagram: &[u8]) {
        if let Some(mapped) = mapped_address(datagram).filter(|mapped| may_check(*mapped, &self.hosts))
            && self.gatherer.answered(server, mapped)
        {
            self.push(Event::ServerReflexive(mapped));
        }
    }

    /// Nominates, and sees whether the round has its path.
    fn judge(&mut self, now: Instant) {
        let Some(round) = &mut self.round else { return };
        if self.role == IceRole::Controlling {
            round.checklist.nominate(now);
        }
        // The controlling side may have dropped the pair that it nominated first: the newest counts.
        let pairs = round.checklist.pairs().iter().filter(|pair| pair.is_confirmed());
        if let Some(remote) = pairs.max_by_key(|pair| pair.nominated).map(|pair| pair.remote.address) {
            self.settle_on(now, remote);
        }
    }

    /// The round has its path, if it did not know: full size has passed in checks or, on the controlled
    /// side, in the carrier that was quicker.
    fn settle_on(&mut self, now: Instant, remote: SocketAddr) {
        let Some(round) = self.round.as_mut().filter(|round| round.confirmed != Some(remote)) else { return };
        let Some(pair) = round.checklist.get(remote).filter(|pair| pair.is_valid()) else { return };
        let (remote, mapped, rtt) = (pair.remote, pair.mapped, pair.rtt.unwrap_or_default());
        round.confirmed = Some(remote.address);
        round.ends = now + ROUND;
        round.checklist.stop();
        self.gatherer.stop();
        self.confirmed = Some(remote.address);
        let local = self.local_candidate(mapped.unwrap_or(remote.address));
        self.push(Event::Confirmed(Confirmed { round: self.round_number, local, remote, rtt }));
        if let Some(schedule) = &mut self.schedule {
            // The controlled side's round goes on for a while: a response of ours may be lost, and we
            // nominate another pair.
            schedule.confirmed(now);
            self.round = None;
        }
    }

    fn local_candidate(&self, address: SocketAddr) -> Candidate {
        let kind = if self.hosts.contains(&address) {
            CandidateKind::Host
        } else if self.gatherer.mapped().contains(&address) {
            CandidateKind::ServerReflexive
        } else {
            CandidateKind::PeerReflexive
        };
        Candidate { kind, address }
    }

    /// What the peer should know about us.
    fn state(&self) -> State {
        let hosts = self.hosts.iter().map(|address| (CandidateKind::Host, *address));
        let mapped = self.gatherer.mapped();
        let mapped = mapped
            .iter()
            .filter(|address| !self.hosts.contains(address))
            .map(|address| (CandidateKind::ServerReflexive, *address));
        let predicted = self.gatherer.predicted();
        let predicted = predicted.iter().map(|address| (CandidateKind::Predicted, *address));
        let candidates = hosts.chain(mapped).chain(predicted);
        let candidates = candidates.map(|(kind, address)| Candidate { kind, address }).collect();
        State { round: self.round_number, want_round: self.want_round, candidates }
    }

    fn transmit(&mut self, destination: SocketAddr, payload: Vec<u8>) {
        if self.transmits.len() < MAX_QUEUE {
            self.transmits.push_back(Transmit { destination, payload });
        }
    }

    fn push(&mut self, event: Event) {
        if self.events.len() == MAX_QUEUE {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }
}

/// What a STUN server says, in today's form or that of RFC 3489.
fn mapped_address(datagram: &[u8]) -> Option<SocketAddr> {
    // MAPPED-ADDRESS, SOURCE-ADDRESS, CHANGED-ADDRESS, XOR-MAPPED-ADDRESS, and what may be ignored; a
    // server that wants credentials is none of ours, and the decoder need not see it.
    let expected = |kind: Option<u16>| kind.is_some_and(|kind| matches!(kind, 1 | 4 | 5 | 0x20 | 0x8000..));
    if !stun::attribute_types(datagram).all(expected) {
        return None;
    }
    let (message, _) = MessageDecoder::default().decode(datagram).ok()?;
    if message.class() != MessageClass::SuccessResponse {
        return None;
    }
    let xored = message.get::<XorMappedAddress>().and_then(|found| found.as_xor_mapped_address().ok());
    let plain = message.get::<MappedAddress>().and_then(|found| found.as_mapped_address().ok());
    xored.map(|found| *found.socket_address()).or_else(|| plain.map(|found| *found.socket_address()))
}
