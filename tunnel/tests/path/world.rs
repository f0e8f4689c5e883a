//! Two agents in virtual time: networks behind NATs, a lossy internet with a STUN server, a relay that
//! loses, repeats and reorders messages, and the shells that drive the agents.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use adit_tunnel::path::{
    Config, Confirmed, Credentials, Event, IceRole, LocalSocket, Path, PathAgent, Transmit, stun,
};

use crate::nat::{Kind, Nat};

/// Two by IPv4 on different machines, and one by IPv6.
const STUN_SERVERS: [&str; 3] = ["203.0.113.53:8002", "203.0.113.54:8002", "[2001:db8:53::1]:8002"];
/// A datagram of the carrier: not STUN. QUIC's first is of full size.
const INITIAL: [u8; 1200] = [0xc0; 1200];
const PING: [u8; 40] = [0x40; 40];
const PING_EVERY: Duration = Duration::from_millis(200);

/// How one kind of network treats what it carries.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Link {
    /// One way, and how much longer it may take: more than the time between two datagrams reorders them.
    pub(crate) latency: Duration,
    pub(crate) jitter: Duration,
    /// Of 1000.
    pub(crate) lost: u64,
    pub(crate) doubled: u64,
}

impl Link {
    pub(crate) fn good(latency: Duration) -> Self {
        Self { latency, jitter: Duration::ZERO, lost: 0, doubled: 0 }
    }
}

pub(crate) struct World {
    pub(crate) now: Instant,
    start: Instant,
    random: u64,
    /// By time, then by order of sending.
    queue: BTreeMap<(Instant, u64), Delivery>,
    sent: u64,
    pub(crate) internet: Link,
    /// How much longer the way is by IPv6.
    pub(crate) ipv6_detour: Duration,
    pub(crate) relay: Link,
    pub(crate) nats: [Nat; 2],
    /// What stands between the networks and the rest of the world by IPv6.
    pub(crate) firewalls: [Nat; 2],
    pub(crate) technician: End,
    pub(crate) agent: End,
    /// Longest datagram that gets from the technician to the agent, and back.
    pub(crate) longest: [usize; 2],
    /// Whose checks get no answer: it is lost on the way back.
    pub(crate) unanswered: [bool; 2],
    /// Neighbours do not reach each other but through their router.
    pub(crate) are_isolated: bool,
    pub(crate) stun_answers: bool,
    /// Whether anything but STUN gets through.
    pub(crate) carriers_pass: bool,
    stopped: Option<usize>,
    /// Messages for the end that is stopped.
    waiting: Vec<Delivery>,
    /// How many ports others take at each NAT, each time before an end's first opener from a socket.
    pub(crate) others_take: [u16; 2],
    opened: HashSet<(usize, LocalSocket)>,
}

enum Delivery {
    /// Source as the destination sees it.
    Datagram {
        source: SocketAddr,
        destination: SocketAddr,
        payload: Vec<u8>,
        from: usize,
    },
    Message {
        to: usize,
        bytes: Vec<u8>,
    },
    /// The mediator has seen the other end there.
    Seen {
        to: usize,
        address: SocketAddr,
    },
}

/// One end: its agent, and a shell with a carrier that pings.
pub(crate) struct End {
    pub(crate) path: PathAgent,
    pub(crate) address: SocketAddr,
    /// Its IPv6 address, if it has one.
    pub(crate) address6: Option<SocketAddr>,
    /// The network that it is in: an index of [`World::nats`].
    site: usize,
    /// After this time without a sign of life a carrier is dead.
    pub(crate) silence: Duration,
    controlling: bool,
    carrier: Option<Carrier>,
    /// The round and path of a carrier that was dialled before its path was confirmed.
    early: Option<(u64, Path)>,
    /// Open ones, beside the device's own. The n-th has the n-th port after the device's.
    sockets: Vec<LocalSocket>,
    /// Whether it may probe, and how often it did.
    pub(crate) probing_is_free: bool,
    pub(crate) probed: usize,
    pub(crate) confirmed: Vec<(Duration, Confirmed)>,
    pub(crate) failed: Vec<(u64, Duration)>,
    pub(crate) lost: usize,
    pub(crate) refused_initials: usize,
    pub(crate) messages: usize,
    pub(crate) datagrams: usize,
}

struct Carrier {
    path: Path,
    up: bool,
    /// It sends datagrams of full size, as QUIC's handshake does at either end.
    shaking: bool,
    heard: Instant,
    next_ping: Instant,
}

impl World {
    pub(crate) fn new(technician: Kind, agent: Kind, seed: u64) -> Self {
        Self::at_sites(technician, agent, [0, 1], seed)
    }

    /// Ends of which these have IPv6, too, behind stateful firewalls.
    pub(crate) fn with_ipv6(technician: Kind, agent: Kind, has_ipv6: [bool; 2], seed: u64) -> Self {
        let mut world = Self::new(technician, agent, seed);
        for (index, has_ipv6) in has_ipv6.into_iter().enumerate() {
            if has_ipv6 {
                world.gain_ipv6(index);
            }
        }
        world
    }

    /// Neither end may try many sockets.
    pub(crate) fn without_probing(technician: Kind, agent: Kind, seed: u64) -> Self {
        let mut world = Self::new(technician, agent, seed);
        for (index, role) in [IceRole::Controlling, IceRole::Controlled].into_iter().enumerate() {
            let now = world.now;
            let config = Config { many_socket_probing: false, ..config(role, seed) };
            let end = world.end(index);
            end.path = PathAgent::new(now, config);
            end.list_addresses(now);
        }
        world
    }

    pub(crate) fn gain_ipv6(&mut self, index: usize) {
        let now = self.now;
        let end = self.end(index);
        end.address6 = Some(format!("[2001:db8:{index}::10]:40000").parse().expect("an address"));
        end.list_addresses(now);
    }

    pub(crate) fn lose_ipv6(&mut self, index: usize) {
        let now = self.now;
        let end = self.end(index);
        end.address6 = None;
        end.list_addresses(now);
    }

    /// That end's router keeps an outside port for it from now on.
    pub(crate) fn map_port(&mut self, index: usize) {
        let now = self.now;
        let (site, address) = (self.end(index).site, self.end(index).address);
        let kept = self.nats[site].keep(address);
        self.end(index).path.set_mapped_addresses(now, &[kept]);
    }

    /// Both behind the first NAT.
    pub(crate) fn on_one_network(kind: Kind, seed: u64) -> Self {
        Self::at_sites(kind, kind, [0, 0], seed)
    }

    fn at_sites(technician: Kind, agent: Kind, sites: [usize; 2], seed: u64) -> Self {
        let now = Instant::now();
        let kinds = [technician, agent];
        let nats = ["198.51.100.1", "198.51.100.2"].map(|text| text.parse().expect("an address"));
        let nats = [Nat::new(technician, nats[0]), Nat::new(agent, nats[1])];
        let [technician, agent] = [IceRole::Controlling, IceRole::Controlled].map(|role| {
            let index = usize::from(role == IceRole::Controlled);
            let public = kinds[index].is_public();
            let address = match (public, index) {
                (true, 0) => "192.0.2.10:40000",
                (true, _) => "192.0.2.20:40000",
                (false, 0) => "192.168.1.10:40000",
                (false, _) => "192.168.1.20:40000",
            };
            End::new(now, role, address.parse().expect("an address"), sites[index], seed)
        });
        let firewalls = ["2001:db8::", "2001:db8:1::"];
        let firewalls = firewalls.map(|net| Nat::new(Kind::Firewall, net.parse().expect("an address")));
        let link = Link::good(Duration::from_millis(20));
        Self {
            now,
            start: now,
            random: seed,
            queue: BTreeMap::new(),
            stopped: None,
            waiting: Vec::new(),
            others_take: [0; 2],
            opened: HashSet::new(),
            sent: 0,
            internet: link,
            ipv6_detour: Duration::ZERO,
            relay: link,
            nats,
            firewalls,
            technician,
            agent,
            longest: [usize::MAX; 2],
            unanswered: [false; 2],
            are_isolated: false,
            stun_answers: true,
            carriers_pass: true,
        }
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.now - self.start
    }

    /// Both ends have a carrier on a direct path.
    pub(crate) fn is_direct(&self) -> bool {
        let up = |end: &End| end.carrier.as_ref().is_some_and(|carrier| carrier.up);
        up(&self.technician) && up(&self.agent)
    }

    pub(crate) fn run_for(&mut self, time: Duration) {
        let until = self.now + time;
        self.run_until(until, |_| false);
        self.now = until;
    }

    /// Runs until `done`, for at most `time`. Returns how long it took, if it was done.
    pub(crate) fn run_while_not(&mut self, time: Duration, done: impl Fn(&Self) -> bool) -> Option<Duration> {
        let begin = self.now;
        self.run_until(begin + time, &done);
        let done = done(self);
        if !done {
            self.now = begin + time;
        }
        done.then(|| self.now - begin)
    }

    fn run_until(&mut self, until: Instant, done: impl Fn(&Self) -> bool) {
        self.flush();
        while !done(self) {
            let delivery = self.queue.first_key_value().map(|((at, _), _)| *at);
            let timers = [self.technician.timeout(), self.agent.timeout()];
            let timers = self.running().filter_map(|index| timers[index]);
            let Some(next) = timers.chain(delivery).min() else { break };
            if next > until {
                break;
            }
            self.now = self.now.max(next);
            if delivery.is_some_and(|at| at <= self.now)
                && let Some((_, delivery)) = self.queue.pop_first()
            {
                self.deliver(delivery);
            }
            for index in self.running() {
                let now = self.now;
                self.end(index).handle_timeout(now);
            }
            self.flush();
        }
    }

    /// The ends that are not stopped.
    fn running(&self) -> impl Iterator<Item = usize> + use<> {
        let stopped = self.stopped;
        (0..2).filter(move |index| stopped != Some(*index))
    }

    /// That end's process does not run any more (0: the technician's, 1: the agent's).
    pub(crate) fn stop(&mut self, index: usize) {
        self.stopped = Some(index);
    }

    /// It runs again: timers are late, datagrams are lost, and messages have waited.
    pub(crate) fn go_on(&mut self) {
        let Some(index) = self.stopped.take() else { return };
        let now = self.now;
        self.end(index).handle_timeout(now);
        std::mem::take(&mut self.waiting).into_iter().for_each(|delivery| self.deliver(delivery));
        self.flush();
    }

    fn deliver(&mut self, delivery: Delivery) {
        match delivery {
            Delivery::Message { to, .. } | Delivery::Seen { to, .. } if self.stopped == Some(to) => {
                self.waiting.push(delivery);
            }
            Delivery::Message { to, bytes } => {
                let now = self.now;
                self.end(to).path.handle_message(now, &bytes).expect("the peer's message is good");
            }
            Delivery::Seen { to, address } => {
                let now = self.now;
                self.end(to).path.add_peer_seen(now, address);
            }
            Delivery::Datagram { source, destination, payload, from }
                if STUN_SERVERS.map(|server| server.parse()).contains(&Ok(destination)) =>
            {
                if let Some(payload) = stun::binding_response(&payload, source).filter(|_| self.stun_answers)
                {
                    if destination == STUN_SERVERS[0].parse().expect("an address") {
                        self.post(Delivery::Seen { to: 1 - from, address: source });
                    }
                    self.post(Delivery::Datagram {
                        source: destination,
                        destination: source,
                        payload,
                        from: 2,
                    });
                }
            }
            Delivery::Datagram { source, destination, payload, from } => {
                let passes = self.carriers_pass || stun::is_stun(&payload);
                // A success response to a Binding request (RFC 8489 section 5).
                let is_lost = from < 2 && payload.starts_with(&[0x01, 0x01]) && self.unanswered[1 - from];
                if from < 2 && (payload.len() > self.longest[from] || !passes || is_lost) {
                    return;
                }
                let now = self.now;
                for index in self.running() {
                    let (site, address) = (self.end(index).site, self.end(index).own(destination));
                    let Some(address) = address else { continue };
                    let from_inside = from < 2 && from != index && self.end(from).site == site;
                    let (is_isolated, hairpins) = (self.are_isolated, self.nat(site, destination).hairpins);
                    let inside = if from_inside && destination.ip() == address.ip() {
                        Some(destination).filter(|_| !is_isolated)
                    } else if from_inside && !hairpins {
                        None
                    } else {
                        let nat = self.nat(site, destination);
                        let reaches = nat.is_public(destination.ip()) || nat.kind.is_public();
                        reaches.then(|| nat.inbound(now, source, destination)).flatten()
                    };
                    if let Some(inside) = inside.filter(|inside| inside.ip() == address.ip() && from != index)
                    {
                        let offset = inside.port().wrapping_sub(address.port());
                        self.end(index).receive(now, offset, source, &payload);
                    }
                }
            }
        }
    }

    fn flush(&mut self) {
        for index in self.running() {
            let now = self.now;
            let start = self.start;
            let (transmits, messages) = self.end(index).drain(now, start);
            for bytes in messages {
                self.post(Delivery::Message { to: 1 - index, bytes });
            }
            for Transmit { socket, hops, destination, payload } in transmits {
                let (site, address) = (self.end(index).site, self.end(index).own(destination));
                let Some(mut address) = address else { continue };
                address.set_port(address.port() + self.end(index).offset(socket));
                let neighbour = !self.are_isolated
                    && self.end(1 - index).site == site
                    && self.end(1 - index).own(destination) == Some(destination);
                let source = if neighbour {
                    Some(address)
                } else {
                    if hops.is_some() && self.opened.insert((index, socket)) {
                        self.nats[site].take(self.others_take[site]);
                    }
                    self.nat(site, destination).outbound(now, address, destination)
                };
                if let Some(source) = source.filter(|_| hops.is_none() || neighbour) {
                    self.post(Delivery::Datagram { source, destination, payload, from: index });
                }
            }
        }
    }

    fn post(&mut self, delivery: Delivery) {
        let link = match delivery {
            Delivery::Datagram { destination: SocketAddr::V6(_), .. } => {
                Link { latency: self.internet.latency + self.ipv6_detour, ..self.internet }
            }
            Delivery::Datagram { .. } => self.internet,
            Delivery::Message { .. } => self.relay,
            // From the mediator it is half the way.
            Delivery::Seen { .. } => Link { latency: self.relay.latency / 2, ..self.relay },
        };
        if self.random(1000) < link.lost {
            return;
        }
        let doubled = self.random(1000) < link.doubled;
        if doubled && let Delivery::Message { to, bytes } = &delivery {
            let again = Delivery::Message { to: *to, bytes: bytes.clone() };
            self.put(link, again);
        }
        self.put(link, delivery);
    }

    fn put(&mut self, link: Link, delivery: Delivery) {
        let jitter = Duration::from_micros(self.random(1 + link.jitter.as_micros() as u64));
        self.sent += 1;
        self.queue.insert((self.now + link.latency + jitter, self.sent), delivery);
    }

    /// SplitMix64: a number below `bound`.
    fn random(&mut self, bound: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    /// What stands between this site and addresses of that version.
    fn nat(&mut self, site: usize, version: SocketAddr) -> &mut Nat {
        if version.is_ipv4() { &mut self.nats[site] } else { &mut self.firewalls[site] }
    }

    fn end(&mut self, index: usize) -> &mut End {
        if index == 0 { &mut self.technician } else { &mut self.agent }
    }
}

/// Credentials of the two ends.
pub(crate) fn credentials(role: IceRole) -> Credentials {
    let (ufrag, password) = match role {
        IceRole::Controlling => ("technici", "passwordOfTheTechnician/"),
        IceRole::Controlled => ("agentage", "passwordOfTheAgent//////"),
    };
    Credentials::new(ufrag, password).expect("good credentials")
}

/// The configuration of the end with that role.
pub(crate) fn config(role: IceRole, seed: u64) -> Config {
    let other = match role {
        IceRole::Controlling => IceRole::Controlled,
        IceRole::Controlled => IceRole::Controlling,
    };
    let mut bytes = [role as u8; 32];
    bytes[..8].copy_from_slice(&seed.to_be_bytes());
    Config {
        role,
        local: credentials(role),
        remote: credentials(other),
        stun_servers: STUN_SERVERS.map(|server| server.parse().expect("an address")).into(),
        many_socket_probing: true,
        seed: bytes,
    }
}

impl End {
    fn new(now: Instant, role: IceRole, address: SocketAddr, site: usize, seed: u64) -> Self {
        let mut path = PathAgent::new(now, config(role, seed));
        path.set_host_addresses(now, &[address]);
        Self {
            path,
            address,
            address6: None,
            site,
            silence: Duration::from_secs(1),
            controlling: role == IceRole::Controlling,
            carrier: None,
            early: None,
            sockets: Vec::new(),
            probing_is_free: true,
            probed: 0,
            confirmed: Vec::new(),
            failed: Vec::new(),
            lost: 0,
            refused_initials: 0,
            messages: 0,
            datagrams: 0,
        }
    }

    /// From where it sends to addresses of that version.
    fn own(&self, version: SocketAddr) -> Option<SocketAddr> {
        if version.is_ipv4() { Some(self.address) } else { self.address6 }
    }

    fn list_addresses(&mut self, now: Instant) {
        let addresses: Vec<_> = [self.address].into_iter().chain(self.address6).collect();
        self.path.set_host_addresses(now, &addresses);
    }

    pub(crate) fn carrier_remote(&self) -> Option<SocketAddr> {
        self.carrier_path().map(|path| path.remote)
    }

    pub(crate) fn carrier_path(&self) -> Option<Path> {
        self.carrier.as_ref().map(|carrier| carrier.path)
    }

    /// How far its port is from the device's. Opens one that is new.
    fn offset(&mut self, socket: LocalSocket) -> u16 {
        if socket == LocalSocket::DEVICE {
            return 0;
        }
        let known = self.sockets.iter().position(|open| *open == socket);
        let at = known.unwrap_or_else(|| {
            assert!(self.path.uses(socket), "a datagram through a socket that is not used");
            self.sockets.push(socket);
            self.sockets.len() - 1
        });
        1 + at as u16
    }

    fn timeout(&self) -> Option<Instant> {
        let carrier =
            self.carrier.as_ref().map(|carrier| carrier.next_ping.min(carrier.heard + self.silence));
        self.path.poll_timeout().into_iter().chain(carrier).min()
    }

    fn handle_timeout(&mut self, now: Instant) {
        if self.path.poll_timeout().is_some_and(|at| at <= now) {
            self.path.handle_timeout(now);
            assert!(self.path.poll_timeout().is_none_or(|at| at > now), "a timer did not move on");
        }
        if let Some(carrier) = self.carrier.take_if(|carrier| carrier.heard + self.silence <= now) {
            self.path.path_lost(now, carrier.path, "silent");
            self.lost += 1;
        }
    }

    fn receive(&mut self, now: Instant, offset: u16, source: SocketAddr, payload: &[u8]) {
        let socket = match offset.checked_sub(1) {
            None => LocalSocket::DEVICE,
            Some(at) => match self.sockets.get(usize::from(at)) {
                Some(socket) if self.path.uses(*socket) => *socket,
                _ => return,
            },
        };
        let path = Path { socket, remote: source };
        if stun::is_stun(payload) {
            self.path.handle_datagram(now, socket, source, payload);
        } else if self.controlling {
            let Some(carrier) = self.carrier.as_mut().filter(|carrier| carrier.path == path) else {
                return;
            };
            carrier.heard = now;
            carrier.shaking = false;
            if !std::mem::replace(&mut carrier.up, true) {
                self.path.path_in_use(now, path);
            }
        } else if let Some(carrier) = self.carrier.as_mut().filter(|carrier| carrier.path == path) {
            carrier.heard = now;
            // A new connection takes the old one's place on the same path.
            carrier.shaking = payload == INITIAL;
            if carrier.shaking {
                self.path.path_in_use(now, path);
            }
        } else if self.path.is_confirmed(path) {
            let carrier = Carrier { path, up: true, shaking: true, heard: now, next_ping: now };
            let old = self.carrier.replace(carrier);
            self.path.path_in_use(now, path);
            if let Some(old) = old {
                self.path.path_lost(now, old.path, "replaced");
            }
        } else {
            self.refused_initials += 1;
        }
    }

    fn dial(&mut self, now: Instant, path: Path) {
        self.carrier = Some(Carrier { path, up: false, shaking: true, heard: now, next_ping: now });
    }

    /// What goes out: datagrams, and messages for the peer.
    fn drain(&mut self, now: Instant, start: Instant) -> (Vec<Transmit>, Vec<Vec<u8>>) {
        let mut transmits: Vec<_> = std::iter::from_fn(|| self.path.poll_transmit()).collect();
        self.datagrams += transmits.len();
        let mut messages = Vec::new();
        while let Some(event) = self.path.poll_event() {
            match event {
                Event::Message(bytes) => messages.push(bytes),
                Event::Confirmed(confirmed) => {
                    self.confirmed.push((now - start, confirmed));
                    let is_dialled = self.early.take() == Some((confirmed.round, confirmed.path()));
                    if self.controlling && !is_dialled {
                        self.dial(now, confirmed.path());
                    }
                }
                Event::Nominated(nominated) => {
                    self.early = Some((nominated.round, nominated.path()));
                    self.dial(now, nominated.path());
                }
                Event::Failed { round, .. } => self.failed.push((round, now - start)),
                Event::ServerReflexive(_) | Event::PeerListens(_) => {}
                Event::ProbingWanted if self.probing_is_free => {
                    self.path.start_probing(now);
                    self.probed += usize::from(self.path.is_probing());
                }
                Event::ProbingWanted => {}
            }
        }
        self.messages += messages.len();
        if let Some(carrier) = self.carrier.as_mut().filter(|carrier| carrier.next_ping <= now) {
            carrier.next_ping = now + PING_EVERY;
            let payload = if carrier.shaking { INITIAL.to_vec() } else { PING.to_vec() };
            let Path { socket, remote: destination } = carrier.path;
            transmits.push(Transmit { socket, hops: None, destination, payload });
        }
        (transmits, messages)
    }
}
