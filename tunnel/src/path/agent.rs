//! The agent: what comes in, what is due, what goes out.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use stun_rs::attributes::stun::{MappedAddress, XorMappedAddress};
use stun_rs::{MessageClass, MessageDecoder};

use super::budget::Budget;
use super::candidate::{Candidate, CandidateKind, is_private, may_check};
use super::check::{Codec, Credentials, IceRole, Received, Request, Response};
use super::checklist::{CandidatePair, Checklist, LATE};
use super::exchange::Exchange;
use super::gather::{AHEAD, Gatherer, Mapping};
use super::local::{LocalSocket, Path};
use super::message::{CandidateMessage, InvalidMessage, MAX_LISTENING, State};
use super::probing::{self, Prober};
use super::random::Random;
use super::schedule::{Due, GOOD_PATH, Schedule};
use super::stun::{self, TransactionId};

/// How long a round goes on without success, at each end. The exchange of candidates is part of it.
const ROUND: Duration = Duration::from_secs(5);
/// How long a round goes on in which each end knows all of the other, and nothing of the peer has come in: at least this time, and
/// so many times as long as it took until they knew. Another one is the better bet then: it has other ports.
const HOPELESS: Duration = Duration::from_millis(600);
const HOPELESS_TIMES: u32 = 4;
/// The same for an ordinary one where the careful one can try many sockets: what works without them has worked by then.
const BEFORE_PROBING: Duration = Duration::from_millis(300);
/// A peer that says nothing for so long did not run, or had no way to say it: each round brings messages.
const AWAY: Duration = Duration::from_secs(90);
/// When the caller is asked again whether this agent may probe.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// Routers that an opener passes: a home router and a carrier's. It ends at the next one.
const OPENER_HOPS: u8 = 3;
/// Most own addresses that are offered.
const MAX_HOSTS: usize = 16;
/// Most addresses that routers keep for us.
const MAX_MAPPED: usize = 4;
/// Most of them, of both ends, that are remembered.
const MAX_NEWS: usize = 16;
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
    /// Whether many sockets may be tried where one NAT takes random ports. Firewalls may take it for a scan.
    pub many_socket_probing: bool,
    /// All randomness comes from it. A secret, new for every agent.
    pub seed: [u8; 32],
}

/// A datagram to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// Through which socket. One that is new is to be opened.
    pub socket: LocalSocket,
    /// How many routers it may pass (TTL, hop limit). `None`: as many as usual. Only for sockets other than
    /// [`LocalSocket::DEVICE`].
    pub hops: Option<u8>,
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
    /// Controlling side: this path has worked both ways, and will be confirmed when datagrams of QUIC's size pass. A
    /// carrier that is dialled at once, and comes about, proves the same a round trip sooner.
    Nominated(Confirmed),
    /// A STUN server saw us at an address that it did not say before.
    ServerReflexive(SocketAddr),
    /// Where the peer takes TCP connections: none that nobody may aim us at, and at most 4.
    PeerListens(Vec<SocketAddr>),
    /// Many-socket probing could find a path. It begins with [`PathAgent::start_probing`]: one agent of a process at a time.
    ProbingWanted,
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
    /// Our socket: the path is this socket and the address of `remote`.
    pub socket: LocalSocket,
    /// This end as the peer sees it.
    pub local: Candidate,
    /// The other end. Datagrams go to its address.
    pub remote: Candidate,
    /// Shortest round trip of a check.
    pub rtt: Duration,
}

impl Confirmed {
    /// The path.
    pub fn path(&self) -> Path {
        Path { socket: self.socket, remote: self.remote.address }
    }
}

/// One end's search for a direct path in one session: a sans-IO ICE agent on the device's UDP socket, of IPv4, IPv6 or both,
/// and on sockets of its own where that does not do. IPv4 addresses are IPv4 here, never IPv4-mapped IPv6.
///
/// # Driving it
/// `now` never runs backwards. After every call with a `now`:
/// 1. [`Self::poll_transmit`] until `None`, sending each datagram (errors and a full socket count as loss);
/// 2. [`Self::poll_event`] until `None`;
/// 3. close the sockets that it does not use any more ([`Self::uses`]);
/// 4. call [`Self::handle_timeout`] at [`Self::poll_timeout`], or soon after.
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
    /// Those that routers keep for us.
    mapped: Vec<SocketAddr>,
    /// Mapped addresses of both ends that have begun a round, the newest last.
    news: VecDeque<SocketAddr>,
    /// How often the way to others has become another one, modulo 4.
    moves: u8,
    /// Where this end takes TCP connections.
    listening: Vec<SocketAddr>,
    peer_seen: Vec<SocketAddr>,
    /// Those of them that are checked in this round.
    seen_in_time: Vec<SocketAddr>,
    /// When its last message came.
    peer_heard: Option<Instant>,
    gatherer: Gatherer,
    /// How our NAT maps, by the last answers that showed it.
    mapping: Mapping,
    many_socket_probing: bool,
    prober: Prober,
    /// Sockets opened so far, beside the device's own.
    sockets: u32,
    exchange: Exchange,
    /// Controlling side only: the other one follows.
    schedule: Option<Schedule>,
    round_number: u64,
    round: Option<Round>,
    /// Controlled side only: the path is gone, and no round has started since.
    want_round: bool,
    /// A path that was confirmed and is not in use yet, and the one in use, until they are lost.
    confirmed: Option<Confirmed>,
    in_use: Option<InUse>,
    /// Nominated last, and not confirmed yet.
    nominated: Option<Confirmed>,
    transmits: VecDeque<Transmit>,
    message: Option<Vec<u8>>,
    events: VecDeque<Event>,
}

/// A path with a carrier.
#[derive(Clone, Copy)]
struct InUse {
    path: Path,
    kind: CandidateKind,
    since: Instant,
}

struct Round {
    checklist: Checklist,
    began: Instant,
    ends: Instant,
    confirmed: Option<Path>,
    /// Begun because a check came in; the message that says its number may still be on the way.
    implicit: bool,
    /// A careful round's own socket, and what servers say of it.
    own: Option<(LocalSocket, Gatherer)>,
    /// Since when the peer is in the round and has all our candidates.
    settled: Option<Instant>,
    /// When the caller was asked whether we may probe.
    asked_to_probe: Option<Instant>,
}

impl Round {
    fn socket(&self) -> LocalSocket {
        self.own.as_ref().map_or(LocalSocket::DEVICE, |(socket, _)| *socket)
    }

    /// It has a socket of its own, for which our NAT takes one port after the other.
    fn counts_ports(&self) -> bool {
        self.own.as_ref().is_some_and(|(_, gatherer)| gatherer.mapping() == Mapping::Sequential)
    }

    /// Something of the peer has come in.
    fn is_alive(&self) -> bool {
        self.checklist.pairs().iter().any(CandidatePair::is_alive)
    }
}

/// Every timer. Deadlines are derived from the state, so none can be stale.
#[derive(Debug, Clone, Copy)]
enum Timer {
    RoundEnd,
    NextRound,
    Nomination,
    Gather,
    Check,
    Probing,
    Probe,
    /// Last, so that one message tells all that the others changed.
    Message,
}

impl Timer {
    const ALL: [Self; 8] = [
        Self::RoundEnd,
        Self::NextRound,
        Self::Nomination,
        Self::Gather,
        Self::Check,
        Self::Probing,
        Self::Probe,
        Self::Message,
    ];
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
            mapped: Vec::new(),
            moves: 0,
            listening: Vec::new(),
            peer_seen: Vec::new(),
            seen_in_time: Vec::new(),
            news: VecDeque::new(),
            peer_heard: None,
            gatherer,
            mapping: Mapping::Unknown,
            many_socket_probing: config.many_socket_probing,
            prober: Prober::default(),
            sockets: 0,
            exchange: Exchange::new(),
            schedule: (config.role == IceRole::Controlling).then(|| Schedule::new(now)),
            round_number: 0,
            round: None,
            want_round: false,
            confirmed: None,
            in_use: None,
            nominated: None,
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
            self.mapping = Mapping::Unknown;
            self.prober.forget();
            if let Some(schedule) = &mut self.schedule {
                schedule.network_changed(now);
            }
            // Addresses that we may check depend on our own.
            self.add_candidates(now);
            if !self.exchange.theirs().listening.is_empty() {
                self.tell_listening();
            }
        }
        self.run(now);
    }

    /// The way to the others may be another one, although the addresses are the same: another default route, or the machine was
    /// asleep.
    pub fn network_changed(&mut self, now: Instant) {
        self.moves = (self.moves + 1) % 4;
        self.mapping = Mapping::Unknown;
        self.prober.forget();
        if let Some(schedule) = &mut self.schedule {
            schedule.network_changed(now);
        }
        self.run(now);
    }

    /// The addresses that lead to the device's socket beside those of the interfaces and those that STUN servers see: port
    /// mappings, what somebody has written down, and addresses of VPNs where nothing else works. All of them, each time they change; at most 4 are told.
    pub fn set_mapped_addresses(&mut self, now: Instant, addresses: &[SocketAddr]) {
        let mapped = &addresses[..addresses.len().min(MAX_MAPPED)];
        self.mapped = mapped.to_vec();
        // What failed without them may do now.
        if self.are_news(mapped)
            && let Some(schedule) = &mut self.schedule
        {
            schedule.network_changed(now);
        }
        self.run(now);
    }

    /// Where this end takes TCP connections that begin with a check ([`Self::is_stream_check`]), the best first; at most 4 are
    /// told: public ones before private ones, of which there may be many, and one of the network it is on.
    pub fn set_listening(&mut self, now: Instant, addresses: &[SocketAddr]) {
        let (private, mut listening): (Vec<_>, Vec<_>) =
            addresses.iter().copied().partition(|address| is_private(address.ip()));
        listening.truncate(MAX_LISTENING - usize::from(!private.is_empty()));
        listening.extend(private);
        listening.truncate(MAX_LISTENING);
        self.listening = listening;
        self.run(now);
    }

    /// The check with which a TCP connection to the peer begins.
    pub fn stream_check(&mut self) -> Vec<u8> {
        let id = self.random.bytes();
        self.codec.request(id, false)
    }

    /// Whether a TCP connection that begins with this check comes from the peer, who alone has the password.
    pub fn is_stream_check(&self, check: &[u8]) -> bool {
        let role = match self.role {
            IceRole::Controlling => IceRole::Controlled,
            IceRole::Controlled => IceRole::Controlling,
        };
        matches!(self.codec.read_request(check), Some(Received::Request(request)) if request.role == role)
    }

    /// A message of the peer's agent ([`Event::Message`]). Duplicates and old ones do no harm.
    ///
    /// # Errors
    /// [`InvalidMessage`]: nothing has changed.
    pub fn handle_message(&mut self, now: Instant, bytes: &[u8]) -> Result<(), InvalidMessage> {
        let message = CandidateMessage::decode(bytes)?;
        let was_away =
            self.peer_heard.replace(now).is_some_and(|at| now.saturating_duration_since(at) >= AWAY);
        if let Some(schedule) = self.schedule.as_mut().filter(|_| was_away) {
            schedule.peer_is_back(now);
        }
        if let Some(before) = self.exchange.receive(now, message) {
            tracing::trace!(theirs = ?self.exchange.theirs(), "candidates");
            match self.role {
                IceRole::Controlling => self.heed(now, &before),
                IceRole::Controlled => self.follow(now),
            }
            if before.listening != self.exchange.theirs().listening {
                self.tell_listening();
            }
            self.add_candidates(now);
        }
        self.run(now);
        Ok(())
    }

    /// An address of the peer's sockets as the mediator saw it.
    pub fn add_peer_seen(&mut self, now: Instant, address: SocketAddr) {
        let is_ipv4 = address.is_ipv4();
        let is_first = self.peer_seen.iter().all(|seen| seen.is_ipv4() != is_ipv4);
        let told = |candidate: &Candidate| {
            candidate.kind == CandidateKind::ServerReflexive && candidate.address.is_ipv4() == is_ipv4
        };
        // The newest of each version counts.
        self.peer_seen.retain(|seen| seen.is_ipv4() != is_ipv4);
        self.peer_seen.push(address);
        // Another one than before may be that of the socket with which the peer begins a careful round: a check that comes
        // there before its openers spoils the round. The peer's next message tells.
        if is_first && !self.exchange.theirs().candidates.iter().any(told) {
            self.seen_in_time.push(address);
            self.add_candidates(now);
        }
        self.run(now);
    }

    /// A datagram from that socket. `true`: it was ours.
    pub fn handle_datagram(
        &mut self,
        now: Instant,
        socket: LocalSocket,
        source: SocketAddr,
        datagram: &[u8],
    ) -> bool {
        let ours = self.receive(now, Path { socket, remote: source }, datagram);
        self.run(now);
        ours
    }

    /// Starts what [`Event::ProbingWanted`] asked for, if it still makes sense. It is over when
    /// [`Self::is_probing`] says so.
    pub fn start_probing(&mut self, now: Instant) {
        if self.probing_due().is_some_and(|due| due <= now)
            && let Some(peer) = self.peer_to_probe()
        {
            tracing::debug!(%peer, mapping = ?self.mapping, "trying many sockets");
            if let Some(round) = &mut self.round {
                round.ends = round.ends.max(now + probing::TRY);
                if self.mapping == Mapping::Random {
                    self.prober.open(now, self.sockets + 1, peer);
                    self.sockets += probing::SOCKETS;
                } else {
                    self.prober.probe(now, round.socket(), peer);
                }
            }
        }
        self.run(now);
    }

    /// Whether many-socket probing is under way.
    pub fn is_probing(&self) -> bool {
        self.prober.is_active()
    }

    /// Whether datagrams may still go through `socket`, or be expected on it. One that is not used any more never is again.
    pub fn uses(&self, socket: LocalSocket) -> bool {
        let in_use = self.in_use.map(|in_use| in_use.path);
        let confirmed = self.confirmed.map(|confirmed| confirmed.path());
        let pairs = self.pairs().iter().map(CandidatePair::path);
        let paths = in_use.into_iter().chain(confirmed).chain(pairs);
        socket == LocalSocket::DEVICE
            || self.round.as_ref().is_some_and(|round| round.socket() == socket)
            || self.prober.sockets().contains(&socket.0)
            || paths.into_iter().any(|path| path.socket == socket)
    }

    /// The carrier over `path` is up. No rounds while it is, unless the network changes.
    pub fn path_in_use(&mut self, now: Instant, path: Path) {
        let known = [self.describe(path), self.nominated, self.confirmed].into_iter().flatten();
        let known = known.into_iter().find(|known| known.path() == path);
        self.settle_on(now, path);
        // Its checks took too long, and the carrier proves the same.
        let proved = self.nominated.take_if(|nominated| nominated.path() == path);
        self.events.extend(proved.map(Event::Confirmed));
        let kind = known.map_or(CandidateKind::PeerReflexive, |known| known.remote.kind);
        self.in_use = Some(InUse { path, kind, since: now });
        self.confirmed = None;
        self.want_round = false;
        if let Some(schedule) = &mut self.schedule {
            schedule.in_use(now);
            // It is said to be near and is not: through a VPN, perhaps, and others had no chance to answer.
            if is_private(path.remote.ip()) && known.is_some_and(|known| known.rtt > LATE) {
                schedule.look_later(now);
            }
            self.round = None;
            self.gatherer.stop();
            self.prober.stop();
        }
        self.run(now);
    }

    /// The carrier over `path` has died, or could not be set up. Says nothing about a path
    /// that has been confirmed since, or is in use in its place.
    pub fn path_lost(&mut self, now: Instant, path: Path, reason: &str) {
        let used = self.in_use.take_if(|in_use| in_use.path == path);
        if used.is_some_and(|used| now.saturating_duration_since(used.since) >= GOOD_PATH) {
            self.prober.forget();
        }
        if used.is_some() || self.confirmed.take_if(|confirmed| confirmed.path() == path).is_some() {
            tracing::debug!(%path, reason, "direct path lost");
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

    /// The carrier over `path` was given up, because another way is better: as [`Self::path_lost`], but rounds come later, and
    /// later each time.
    pub fn path_poor(&mut self, now: Instant, path: Path, reason: &str) {
        if self.in_use.take_if(|in_use| in_use.path == path).is_some() {
            tracing::debug!(%path, reason, "direct path left");
            let jitter = self.random.u64();
            if let Some(schedule) = &mut self.schedule {
                schedule.poor(now, jitter);
                self.round = None;
                self.prober.stop();
            }
        }
        self.run(now);
    }

    /// Whether a QUIC connection may come on `path`: checked in both directions, and nominated.
    pub fn is_confirmed(&self, path: Path) -> bool {
        self.in_use.is_some_and(|in_use| in_use.path == path)
            || self.confirmed.is_some_and(|confirmed| confirmed.path() == path)
            || self.pairs().iter().any(|pair| pair.path() == path && pair.is_valid())
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
        // After a long sleep a round may begin and end in one go.
        while let Some(transmit) = self.transmits.pop_front() {
            if self.uses(transmit.socket) {
                return Some(transmit);
            }
        }
        None
    }

    /// What has happened.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.message.take().map(Event::Message).or_else(|| self.events.pop_front())
    }

    fn run(&mut self, now: Instant) {
        self.tell(now);
        while let Some(timer) = self.expired(now) {
            self.fire(now, timer);
            self.tell(now);
        }
    }

    /// What is new for the peer goes out, and we see whether it has all.
    fn tell(&mut self, now: Instant) {
        let state = self.state();
        self.exchange.tell(now, state);
        let peer_is_in = self.exchange.is_settled() && self.exchange.theirs().round == self.round_number;
        let is_gathered = self.gatherer().has_news();
        let Some(round) = self.round.as_mut().filter(|round| round.settled.is_none()) else { return };
        if peer_is_in && is_gathered {
            round.settled = Some(now);
            tracing::trace!(round = self.round_number, "each end knows all of the other");
            round.checklist.release(now);
        }
    }

    /// Asks about the socket that the round is on.
    fn gatherer(&self) -> &Gatherer {
        self.round
            .as_ref()
            .and_then(|round| round.own.as_ref())
            .map_or(&self.gatherer, |(_, gatherer)| gatherer)
    }

    fn gatherer_mut(&mut self) -> &mut Gatherer {
        let own = self.round.as_mut().and_then(|round| round.own.as_mut());
        own.map_or(&mut self.gatherer, |(_, gatherer)| gatherer)
    }

    fn expired(&self, now: Instant) -> Option<Timer> {
        Timer::ALL.into_iter().find(|timer| self.deadline(*timer).is_some_and(|deadline| deadline <= now))
    }

    fn deadline(&self, timer: Timer) -> Option<Instant> {
        let round = self.round.as_ref();
        let within_budget = |due: Instant| due.max(self.budget.ready_at());
        match timer {
            Timer::RoundEnd => round.map(|round| self.round_ends(round)),
            Timer::NextRound => self.schedule.as_ref().and_then(Schedule::due),
            Timer::Nomination if self.role == IceRole::Controlling => round?.checklist.nomination_due(),
            Timer::Nomination => None,
            Timer::Gather => self.gatherer().due().map(within_budget),
            Timer::Check => round?.checklist.due().map(within_budget),
            Timer::Probing => {
                let asked = round?.asked_to_probe;
                self.probing_due().map(|due| asked.map_or(due, |asked| due.max(asked + ASK_AGAIN)))
            }
            Timer::Probe => self.prober.due(),
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
                if let Some(server) = self.gatherer_mut().send(now, id) {
                    let socket = self.round.as_ref().map_or(LocalSocket::DEVICE, Round::socket);
                    self.transmit(Path { socket, remote: server }, None, stun::binding_request(id).to_vec());
                }
            }
            Timer::Check => {
                let Some(id) = self.request_id(now) else { return };
                if let Some(check) = self.round.as_mut().and_then(|round| round.checklist.send(now, id)) {
                    let hops = check.opener.then_some(OPENER_HOPS);
                    tracing::trace!(path = %check.path, check.opener, check.full_size, "check");
                    self.transmit(check.path, hops, self.codec.request(id, check.full_size));
                }
            }
            Timer::Probing => {
                if let Some(round) = &mut self.round {
                    round.asked_to_probe = Some(now);
                    self.push(Event::ProbingWanted);
                }
            }
            Timer::Probe => {
                let opens = self.prober.is_open();
                if let Some(path) = self.prober.send(now, self.random.u64()) {
                    // The one that opens waits for the other's.
                    let request = self.codec.request(self.random.bytes(), false);
                    self.transmit(path, opens.then_some(OPENER_HOPS), request);
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
                // NATs are for IPv4.
                let has_ipv4 = self.hosts.is_empty() || self.hosts.iter().any(SocketAddr::is_ipv4);
                let careful = has_ipv4 && self.schedule.as_ref().is_some_and(Schedule::is_careful);
                if let Some(schedule) = &mut self.schedule {
                    schedule.started();
                }
                self.round_number += 1;
                self.begin_round(now, false, careful);
            }
            Some(Due::Unused) => self.fail(now),
            None => {}
        }
    }

    fn begin_round(&mut self, now: Instant, implicit: bool, careful: bool) {
        tracing::debug!(round = self.round_number, implicit, careful, "looking for a direct path");
        self.want_round = false;
        self.seen_in_time.clone_from(&self.peer_seen);
        self.prober.stop();
        let (checklist, own) = if careful {
            self.gatherer.stop();
            self.sockets += 1;
            (Checklist::careful(), Some((LocalSocket(self.sockets), self.gatherer.anew(now))))
        } else {
            self.gatherer.start(now);
            let mut checklist = Checklist::default();
            // To be compared with what this round finds, whatever its socket.
            if let Some(InUse { path, kind, .. }) = self.in_use {
                checklist.add(now, path.socket, Candidate { kind, address: path.remote });
            }
            (checklist, None)
        };
        self.round = Some(Round {
            checklist,
            began: now,
            ends: now + ROUND,
            confirmed: None,
            implicit,
            own,
            settled: None,
            asked_to_probe: None,
        });
        self.add_candidates(now);
    }

    /// When a round ends that finds nothing.
    fn round_ends(&self, round: &Round) -> Instant {
        let may_be_hopeless = self.role == IceRole::Controlling && !round.is_alive();
        let early = round.settled.filter(|_| may_be_hopeless).and_then(|settled| {
            let patience = HOPELESS.max((settled - round.began) * HOPELESS_TIMES);
            match (self.could_probe(), &round.own) {
                (false, _) => Some(settled + patience),
                (true, None) => Some(settled + BEFORE_PROBING),
                // Probing takes as long as it takes.
                (true, Some(_)) => None,
            }
        });
        early.map_or(round.ends, |early| early.min(round.ends))
    }

    /// One NAT takes random ports, and the other has one address for all.
    fn could_probe(&self) -> bool {
        let mappings = [self.mapping, self.exchange.theirs().mapping];
        self.many_socket_probing
            && mappings.contains(&Mapping::Random)
            && mappings.contains(&Mapping::Independent)
    }

    /// Where the peer is: at the IPv4 address at which the mediator has seen it, nobody else's word is taken for that. The port
    /// of this round's socket it knows best itself.
    fn peer_to_probe(&self) -> Option<SocketAddr> {
        let seen = self.peer_seen.iter().copied().find(SocketAddr::is_ipv4)?;
        let candidates = self.exchange.theirs().candidates.iter();
        let reflexive = candidates.filter(|candidate| candidate.kind == CandidateKind::ServerReflexive);
        let told = reflexive.map(|candidate| candidate.address).find(|address| address.ip() == seen.ip());
        Some(told.unwrap_or(seen)).filter(|address| may_check(*address, &self.hosts))
    }

    /// When many sockets should be tried, if they should: in a careful round, since a NAT may know a socket that is old by
    /// another port than the servers do.
    fn probing_due(&self) -> Option<Instant> {
        let round = self.round.as_ref().filter(|round| round.own.is_some() && round.confirmed.is_none())?;
        if !self.could_probe() || round.is_alive() || self.prober.is_active() {
            return None;
        }
        self.peer_to_probe()?;
        // The one with the random ports begins.
        match self.mapping {
            Mapping::Random => Some(self.prober.ready_at(round.settled?)),
            _ => {
                let theirs = self.exchange.theirs();
                let is_open = theirs.open && theirs.round == self.round_number;
                is_open.then(|| self.prober.ready_at(round.began))
            }
        }
    }

    fn end_round(&mut self, now: Instant) {
        self.gatherer.stop();
        self.prober.stop();
        let found = self.round.take().and_then(|round| round.confirmed);
        if found.is_none() {
            let (ours, theirs) = (self.mapping, self.exchange.theirs().mapping);
            tracing::debug!(round = self.round_number, ?ours, ?theirs, "no direct path in this round");
        }
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
        if self.in_use.is_some() {
            // There was nothing better.
            return;
        }
        let next = self.schedule.as_ref().and_then(Schedule::due);
        self.push(Event::Failed { round: self.round_number, next });
    }

    /// Whether one of these mapped addresses was not there before: one that comes and goes says nothing new.
    fn are_news(&mut self, mapped: &[SocketAddr]) -> bool {
        let unheard = mapped.iter().copied().filter(|address| !self.news.contains(address));
        let unheard: Vec<_> = unheard.collect();
        self.news.extend(&unheard);
        self.news.drain(..self.news.len().saturating_sub(MAX_NEWS));
        !unheard.is_empty()
    }

    /// The controlling side takes note of what the peer tells, beside its candidates.
    fn heed(&mut self, now: Instant, before: &State) {
        let theirs = self.exchange.theirs();
        let asks = theirs.want_round && theirs.round == self.round_number;
        let has_moved = theirs.moves != before.moves;
        let of_kind = |state: &State, kind| -> Vec<SocketAddr> {
            let of_kind = state.candidates.iter().filter(|candidate| candidate.kind == kind);
            of_kind.map(|candidate| candidate.address).collect()
        };
        let moved = of_kind(theirs, CandidateKind::Host) != of_kind(before, CandidateKind::Host);
        let mapped = of_kind(theirs, CandidateKind::Mapped);
        let moved = self.are_news(&mapped) || moved;
        let jitter = self.random.u64();
        if let Some(schedule) = &mut self.schedule {
            if asks {
                schedule.lost(now, jitter);
            }
            if moved {
                schedule.network_changed(now);
            } else if has_moved {
                schedule.peer_moved(now);
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
            Some(round) if round.implicit && !self.exchange.theirs().careful => {
                round.implicit = false;
                round.ends = now + ROUND;
                self.want_round = false;
            }
            _ => self.begin_round(now, false, self.exchange.theirs().careful),
        }
    }

    /// All that is known of the peer goes onto the checklist, unless the round has its path.
    fn add_candidates(&mut self, now: Instant) {
        let depends_on_destination = self.mapping.depends_on_destination();
        let is_in = self.exchange.theirs().round == self.round_number;
        let Some(round) = self.round.as_mut().filter(|round| round.confirmed.is_none()) else { return };
        // In a careful round the peer has another socket than before.
        if round.own.is_some() && !is_in {
            return;
        }
        let seen = self
            .seen_in_time
            .iter()
            .map(|address| Candidate { kind: CandidateKind::ServerReflexive, address: *address });
        if round.own.is_some() && [self.mapping, self.exchange.theirs().mapping] == [Mapping::Sequential; 2] {
            // Both NATs count: the nth opener of each end is to meet the nth of the other, so nothing else takes a port before,
            // and none before the servers were asked.
            if !round.counts_ports() {
                return;
            }
            for candidate in in_turn(&self.exchange.theirs().candidates, self.role) {
                if may_check(candidate.address, &self.hosts) {
                    round.checklist.add(now, round.socket(), candidate);
                }
            }
            return;
        }
        for candidate in self.exchange.theirs().candidates.iter().copied().chain(seen) {
            // Each check of ours would take a port of our NAT, and the peer's own guesses would be wrong.
            let hopeless = candidate.kind == CandidateKind::Predicted && depends_on_destination;
            let is_ours = self.hosts.contains(&candidate.address) || self.mapped.contains(&candidate.address);
            // No NAT stands between IPv6 addresses: ordinary rounds are enough for them.
            let needless = round.own.is_some() && candidate.address.is_ipv6();
            let is_fit = !is_ours && !hopeless && !needless;
            if is_fit && may_check(candidate.address, &self.hosts) {
                round.checklist.add(now, round.socket(), candidate);
            }
        }
    }

    fn receive(&mut self, now: Instant, path: Path, datagram: &[u8]) -> bool {
        if !stun::is_stun(datagram) || !self.uses(path.socket) {
            return false;
        }
        match self.codec.read_request(datagram) {
            Some(Received::Request(request)) => {
                self.answer(now, path, request);
                return true;
            }
            Some(Received::Forged) => return true,
            None => {}
        }
        let Some(id) = stun::answers(datagram) else { return false };
        if self.gathered(now, path, id, datagram) {
            return true;
        }
        let Some(round) = self.round.as_mut().filter(|round| round.checklist.asked(path, id)) else {
            return false;
        };
        match self.codec.read_response(datagram) {
            Some(Response::Success(mapped)) => round.checklist.answered(now, path, id, mapped),
            Some(Response::Error) => round.checklist.refused(path),
            None => {}
        }
        self.judge(now);
        true
    }

    /// Answers the peer's check, and checks back (RFC 8445 section 7.3).
    fn answer(&mut self, now: Instant, path: Path, request: Request) {
        if request.role == self.role {
            self.transmit(path, None, self.codec.role_conflict(request.id));
            return;
        }
        self.transmit(path, None, self.codec.success(request.id, path.remote));
        let idle = self.round.is_none() && self.confirmed.is_none() && self.in_use.is_none();
        if idle && self.role == IceRole::Controlled {
            // The peer is in a round already: its message is late or lost.
            self.begin_round(now, true, false);
        }
        let nominated = request.use_candidate && self.role == IceRole::Controlled;
        if let Some(round) = self.round.as_mut().filter(|_| may_check(path.remote, &self.hosts)) {
            round.checklist.heard(now, path, request.full_size, nominated);
            self.prober.pause();
        }
        self.judge(now);
    }

    /// Takes a server's answer. `false`: it is none.
    fn gathered(&mut self, now: Instant, path: Path, id: TransactionId, datagram: &[u8]) -> bool {
        let own = self.round.as_mut().and_then(|round| round.own.as_mut());
        let gatherer = match own {
            Some((socket, gatherer)) if *socket == path.socket => gatherer,
            _ if path.socket == LocalSocket::DEVICE => &mut self.gatherer,
            _ => return false,
        };
        if !gatherer.asked(path.remote, id) {
            return false;
        }
        if let Some(mapped) = mapped_address(datagram).filter(|mapped| may_check(*mapped, &self.hosts)) {
            let is_new = gatherer.answered(path.remote, mapped);
            let mapping = gatherer.mapping();
            tracing::trace!(server = %path.remote, %mapped, ?mapping, "server-reflexive");
            if mapping != Mapping::Unknown {
                self.mapping = mapping;
            }
            if is_new {
                self.push(Event::ServerReflexive(mapped));
                self.add_candidates(now);
            }
        }
        true
    }

    /// Nominates, and sees whether the round has its path.
    fn judge(&mut self, now: Instant) {
        let Some(round) = &mut self.round else { return };
        let nominated = if self.role == IceRole::Controlling { round.checklist.nominate(now) } else { None };
        let kept = self.in_use.filter(|_| self.schedule.as_ref().is_some_and(Schedule::is_in_use));
        let nominee = nominated.and_then(|path| round.checklist.get(path));
        let kept = kept.and_then(|kept| round.checklist.get(kept.path));
        if nominee.zip(kept).is_some_and(|(nominee, kept)| kept.is_kept_rather_than(nominee)) {
            // The network has changed, and the path in use still works.
            self.round = None;
            self.gatherer.stop();
            return;
        }
        if let Some(nominated) = nominated.and_then(|path| self.describe(path)) {
            self.nominated = Some(nominated);
            self.push(Event::Nominated(nominated));
        }
        let Some(round) = &self.round else { return };
        // The controlling side may have dropped the pair that it nominated first: the newest counts.
        let pairs = round.checklist.pairs().iter().filter(|pair| pair.is_confirmed());
        if let Some(path) = pairs.max_by_key(|pair| pair.nominated).map(CandidatePair::path) {
            self.settle_on(now, path);
        }
    }

    /// The round has its path, if it did not know: full size has passed in checks or, on the controlled
    /// side, in the carrier that was quicker.
    fn settle_on(&mut self, now: Instant, path: Path) {
        let Some(round) = self.round.as_ref().filter(|round| round.confirmed != Some(path)) else { return };
        if !round.checklist.get(path).is_some_and(CandidatePair::is_valid) {
            return;
        }
        let confirmed = self.describe(path);
        let Some(round) = &mut self.round else { return };
        round.confirmed = Some(path);
        round.ends = now + ROUND;
        round.checklist.stop();
        self.gatherer_mut().stop();
        self.prober.stop();
        self.confirmed = confirmed;
        self.nominated.take_if(|nominated| nominated.path() == path);
        self.events.extend(confirmed.map(Event::Confirmed));
        if let Some(schedule) = &mut self.schedule {
            // The controlled side's round goes on for a while: a response of ours may be lost, and we
            // nominate another pair.
            schedule.confirmed(now);
            self.round = None;
        }
    }

    fn tell_listening(&mut self) {
        let listening = self.exchange.theirs().listening.iter().copied();
        let listening = listening.filter(|address| may_check(*address, &self.hosts)).collect();
        self.push(Event::PeerListens(listening));
    }

    fn describe(&self, path: Path) -> Option<Confirmed> {
        let pair = self.round.as_ref()?.checklist.get(path)?;
        let local = self.local_candidate(pair.mapped.unwrap_or(path.remote));
        let (socket, remote, rtt) = (pair.socket, pair.remote, pair.rtt.unwrap_or_default());
        Some(Confirmed { round: self.round_number, socket, local, remote, rtt })
    }

    fn local_candidate(&self, address: SocketAddr) -> Candidate {
        let kind = if self.hosts.contains(&address) {
            CandidateKind::Host
        } else if self.mapped.contains(&address) {
            CandidateKind::Mapped
        } else if self.gatherer().mapped().contains(&address) {
            CandidateKind::ServerReflexive
        } else {
            CandidateKind::PeerReflexive
        };
        Candidate { kind, address }
    }

    /// What the peer should know about us.
    fn state(&self) -> State {
        let hosts = self.hosts.iter().map(|address| (CandidateKind::Host, *address));
        let mapped = self.gatherer().mapped();
        let mapped = mapped
            .iter()
            .filter(|address| !self.hosts.contains(address))
            .map(|address| (CandidateKind::ServerReflexive, *address));
        let predicted = self.gatherer().predicted();
        let predicted = predicted.iter().map(|address| (CandidateKind::Predicted, *address));
        let kept = self.mapped.iter().map(|address| (CandidateKind::Mapped, *address));
        let candidates = hosts.chain(kept).chain(mapped).chain(predicted);
        let candidates = candidates.map(|(kind, address)| Candidate { kind, address }).collect();
        let controls = self.role == IceRole::Controlling;
        State {
            round: self.round_number,
            want_round: self.want_round,
            // A NAT that counts is of use without many sockets, too.
            mapping: if self.many_socket_probing || self.mapping == Mapping::Sequential {
                self.mapping
            } else {
                Mapping::Unknown
            },
            careful: controls && self.round.as_ref().is_some_and(|round| round.own.is_some()),
            open: self.prober.is_open(),
            moves: self.moves,
            candidates,
            listening: self.listening.clone(),
        }
    }

    fn transmit(&mut self, path: Path, hops: Option<u8>, payload: Vec<u8>) {
        if self.transmits.len() < MAX_QUEUE {
            let Path { socket, remote: destination } = path;
            self.transmits.push_back(Transmit { socket, hops, destination, payload });
        }
    }

    fn push(&mut self, event: Event) {
        if self.events.len() == MAX_QUEUE {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }
}

/// The ports that a NAT which counts is expected to take next, in the order in which an end sends to them whose own NAT counts,
/// too. Datagram k leaves by our port a + k, to the peer's b + k; its datagram k the other way round, so both NATs let them in. If
/// others have taken n ports since the servers were asked, at both NATs together, one end has to be n ports ahead: the
/// controlling one leaves out each fifth.
fn in_turn(candidates: &[Candidate], role: IceRole) -> impl Iterator<Item = Candidate> {
    let predicted = candidates.iter().filter(|candidate| candidate.kind == CandidateKind::Predicted);
    let leaves_out = move |n: usize| role == IceRole::Controlling && n % 5 == 4;
    predicted
        .take(AHEAD.into())
        .enumerate()
        .filter(move |(n, _)| !leaves_out(*n))
        .map(|(_, candidate)| *candidate)
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
