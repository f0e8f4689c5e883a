//! Drives the path engine of one session, and dials QUIC over the paths that it confirms.

use std::collections::BTreeSet;
use std::future::{Future, pending};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use adit_protocol::{DeviceId, SessionId};
use adit_tunnel::path::{self, Confirmed, Credentials, Event, IceRole, LocalSocket, Path, PathAgent};
use futures_util::future::join_all;
use quinn::{ClientConfig, ConnectError, Connection, ConnectionError, Endpoint};
use tokio::net::{TcpStream, lookup_host};
use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc, oneshot, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{MissedTickBehavior, interval_at, sleep_until, timeout};

use super::demux::{Demux, Entry};
use super::interfaces::{self, Addresses};
use super::loss::lost_percent;
use super::mediator::Handshake;
use super::own_sockets::OwnSockets;
use super::port_mapping::{Mapped, PATIENCE, Port, PortMapper, Told, Transport};
use super::socket::DirectSocket;
use super::tcp::{self, Connected, Listener, Side, TcpError};
use super::tcp_schedule::TcpSchedule;
use super::turns::Turns;
use super::{BindConfig, DirectEvent, StunServers, quic};

/// A name that takes longer is left out.
const RESOLVE: Duration = Duration::from_secs(2);
/// A confirmed path takes two round trips; after this, the next round is the better bet.
const DIAL: Duration = Duration::from_secs(3);
/// How long a connection stays after the next one has taken its place, for the case that this one does not last.
const LINGER: Duration = Duration::from_secs(30);
/// How soon a new network is noticed that the system does not tell of. Listing the interfaces takes well below a millisecond.
const INTERFACES: Duration = Duration::from_secs(5);
/// After so many rounds in a row without a path, nothing works but perhaps what is left out before.
const NOTHING_WORKS: u64 = 2;
/// Authenticated connections of the peer that wait for the task.
const ACCEPTED: usize = 4;

/// What the session tells its search.
#[derive(Debug)]
pub(super) enum Command {
    /// A message of the peer.
    Message(Vec<u8>),
    /// The mediator saw the peer there.
    PeerSeen(SocketAddr),
    /// Nothing is heard on the current connection, and why that is thought.
    Silent(String),
    /// This connection is given up, and why.
    Poor { connection: usize, reason: String },
}

/// All that the task starts with.
pub(super) struct PathTask {
    pub(super) role: IceRole,
    pub(super) session: SessionId,
    pub(super) peer: DeviceId,
    pub(super) local: Credentials,
    pub(super) remote: Credentials,
    pub(super) stun_servers: StunServers,
    pub(super) handshake: Handshake,
    pub(super) client: ClientConfig,
    pub(super) own_sockets: OwnSockets,
    pub(super) many_socket_probing: bool,
    pub(super) turns: Arc<Turns>,
    /// Where TCP connections come in.
    pub(super) listener: Option<Arc<Listener>>,
    pub(super) side: Side,
    pub(super) peer_comes_from: Option<IpAddr>,
    pub(super) port: u16,
    pub(super) endpoint: BindConfig,
    pub(super) mapper: Arc<PortMapper>,
    /// Whether the router in front may be asked for ports.
    pub(super) port_mapping: bool,
    pub(super) network: watch::Receiver<u64>,
    pub(super) socket: Arc<DirectSocket>,
    pub(super) demux: Arc<Demux>,
    pub(super) quic: Endpoint,
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) events: mpsc::Sender<DirectEvent>,
}

impl PathTask {
    /// Runs until it is aborted, or nobody can give it commands any more.
    pub(super) async fn run(mut self) {
        // What comes in meanwhile waits in the queue of commands.
        let StunServers { mediator, others } = &self.stun_servers;
        let (mediator, others) = tokio::join!(resolve(mediator), resolve(others));
        let mut stun_servers = [&mediator[..], &others].concat();
        stun_servers.retain(|server| server.is_ipv4() || self.socket.has_ipv6());
        self.handshake.set_mediator(mediator);
        let ufrag = self.local.ufrag().to_owned();
        let config = path::Config {
            role: self.role,
            local: self.local.clone(),
            remote: self.remote.clone(),
            stun_servers,
            many_socket_probing: self.many_socket_probing,
            seed: rand::random(),
        };
        let (accepted_sender, accepted) = mpsc::channel(ACCEPTED);
        let (knocked_sender, knocked) = mpsc::channel(ACCEPTED);
        let entry = Arc::new(Entry {
            session: self.session,
            peer: self.peer,
            ufrag,
            agent: Mutex::new(PathAgent::new(Instant::now(), config)),
            wake: Notify::new(),
            accepted: accepted_sender,
            knocked: knocked_sender,
        });
        let _registration = self.demux.register(entry.clone());
        let moves = *self.network.borrow_and_update();
        let tcp = TcpSchedule::new(Instant::now(), self.role == IceRole::Controlled);
        let driver = Driver {
            task: self,
            entry,
            accepted,
            knocked,
            streams: JoinSet::new(),
            let_in: JoinSet::new(),
            stream: None,
            peer_listens: vec![],
            listening: vec![],
            hosts: vec![],
            others: vec![],
            failed: 0,
            worked: 0,
            ask_router: None,
            router: None,
            tcp,
            dialling: JoinSet::new(),
            confirmed: None,
            early: None,
            current: None,
            lingering: None,
            probing: None,
            moves,
        };
        driver.run().await;
    }
}

struct Driver {
    task: PathTask,
    entry: Arc<Entry>,
    accepted: mpsc::Receiver<(Connection, Path)>,
    knocked: mpsc::Receiver<TcpStream>,
    /// TCP connections that are dialled: one attempt at a time.
    streams: JoinSet<Result<Connected, TcpError>>,
    /// Those that are let in.
    let_in: JoinSet<Result<Connected, TcpError>>,
    /// The one that the session got last.
    stream: Option<Stream>,
    /// Where the peer takes TCP connections, as far as they may be dialled.
    peer_listens: Vec<SocketAddr>,
    /// Where this end does.
    listening: Vec<SocketAddr>,
    /// The addresses of the interfaces.
    hosts: Vec<IpAddr>,
    /// Those that are offered beside, since nothing else works on this network.
    others: Vec<IpAddr>,
    /// The last round that found no path.
    failed: u64,
    /// The last one that did, or that was on another network.
    worked: u64,
    /// When the router in front is asked to let the peer in, unless there is a path.
    ask_router: Option<Instant>,
    /// What it says, once it was asked.
    router: Option<Router>,
    tcp: TcpSchedule,
    /// At most one, beside those that were aborted.
    dialling: JoinSet<(Path, Result<Connection, DialError>)>,
    /// The path confirmed last, or about to be.
    confirmed: Option<Confirmed>,
    /// The round and path of a connection that was dialled before its path was confirmed.
    early: Option<(u64, Path)>,
    current: Option<Current>,
    /// The one before, and when it is closed. It stays if the current one is lost before.
    lingering: Option<(Instant, Connection)>,
    /// Held while this session probes.
    probing: Option<OwnedSemaphorePermit>,
    /// How often the way to others had become another one.
    moves: u64,
}

/// The connection that the session got last.
struct Current {
    connection: Connection,
    /// The connection's own address changes when a NAT maps it anew.
    path: Path,
    closed: Pin<Box<dyn Future<Output = ConnectionError> + Send>>,
}

/// The router in front, once it was asked.
struct Router {
    mapped: Arc<Mapped>,
    told: watch::Receiver<Told>,
}

/// A TCP connection that the session got.
struct Stream {
    /// Fails when it has ended.
    ended: oneshot::Receiver<()>,
    /// Ends it, for a better one.
    leave: oneshot::Sender<()>,
}

impl Driver {
    async fn run(mut self) {
        self.list_interfaces();
        self.want_router();
        let mut interfaces = interval_at(tokio::time::Instant::now() + INTERFACES, INTERFACES);
        interfaces.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let deadline = self.drive();
            tokio::select! {
                // Commands first: one says why a connection is being closed.
                biased;
                command = self.task.commands.recv() => match command {
                    Some(command) => self.obey(command),
                    None => return,
                },
                () = self.entry.wake.notified() => {}
                () = reached(deadline) => self.tell(|agent, now| agent.handle_timeout(now)),
                Some(dialled) = self.dialling.join_next() => self.dialled(dialled),
                Some((connection, path)) = self.accepted.recv() => self.connected(connection, path),
                Some(stream) = self.knocked.recv() => {
                    if self.let_in.len() < ACCEPTED {
                        self.let_in.spawn(tcp::shake(stream, self.task.side.clone()));
                    }
                }
                Some(shaken) = self.let_in.join_next() => match shaken {
                    Ok(Ok(connected)) => self.stream_connected(connected),
                    Ok(Err(error)) => tracing::debug!(session = %self.task.session, %error, "not let in"),
                    Err(_) => {}
                },
                Some(dialled) = self.streams.join_next() => self.dialled_tcp(dialled),
                () = reached(self.tcp.due()) => self.dial_tcp(),
                () = reached(self.tcp.leave_due()) => {
                    tracing::debug!(session = %self.task.session, "direct TCP left for QUIC");
                    self.leave_stream();
                }
                () = stream_ended(&mut self.stream) => {
                    self.stream = None;
                    self.tcp.ended(Instant::now());
                    self.want_router();
                }
                error = closed(&mut self.current) => match &error {
                    ConnectionError::ApplicationClosed(close) if lost_percent(close.error_code).is_some() => {
                        self.poor(&error.to_string());
                    }
                    _ => self.lost(&error.to_string()),
                },
                () = reached(self.lingering.as_ref().map(|(due, _)| *due)) => {
                    if let Some((_, connection)) = self.lingering.take()
                        && self.task.role == IceRole::Controlling
                    {
                        connection.close(0u32.into(), b"");
                    }
                }
                _ = interfaces.tick() => self.list_interfaces(),
                Ok(()) = self.task.network.changed() => self.network_changed(),
                () = reached(self.ask_router) => self.ask_router(),
                () = router_said(&mut self.router) => self.tell_addresses(),
            }
        }
    }

    /// Puts out what the engine has. Returns when it wants to be called again.
    fn drive(&mut self) -> Option<Instant> {
        loop {
            let (transmit, event) = {
                let mut agent = self.entry.agent();
                let transmit = agent.poll_transmit();
                let event = if transmit.is_none() { agent.poll_event() } else { None };
                if transmit.is_none() && event.is_none() {
                    if !agent.is_probing() {
                        self.probing = None;
                    }
                    drop(agent);
                    self.task.own_sockets.tidy(&self.entry);
                    return self.entry.agent().poll_timeout();
                }
                (transmit, event)
            };
            if let Some(transmit) = transmit {
                let transmit = self.task.handshake.seal(transmit);
                if transmit.socket == LocalSocket::DEVICE {
                    self.task.socket.send(transmit.destination, &transmit.payload);
                } else {
                    self.task.own_sockets.send(&self.entry, &transmit);
                }
            }
            if let Some(event) = event {
                self.heed(event);
            }
        }
    }

    fn heed(&mut self, event: Event) {
        match event {
            Event::Message(message) => self.push(DirectEvent::Message(message)),
            Event::Confirmed(confirmed) => {
                tracing::debug!(
                    session = %self.task.session, remote = %confirmed.remote.address, rtt = ?confirmed.rtt,
                    "direct path confirmed"
                );
                self.confirmed = Some(confirmed);
                let is_dialled = self.early.take() == Some((confirmed.round, confirmed.path()));
                if self.task.role == IceRole::Controlling && !is_dialled {
                    self.dial(confirmed);
                }
            }
            Event::Nominated(nominated) => {
                self.early = Some((nominated.round, nominated.path()));
                self.confirmed = Some(nominated);
                self.dial(nominated);
            }
            Event::PeerListens(addresses) => {
                let task = &self.task;
                let anywhere = task.role == IceRole::Controlling;
                let (seen, ports) = (task.peer_comes_from, &task.endpoint.peers);
                self.peer_listens = tcp::may_dial(addresses, seen, anywhere, ports, &self.listening);
                self.tcp.changed(Instant::now());
            }
            Event::ProbingWanted => {
                // If it is another session's, the engine asks again.
                let Some(turn) = self.task.turns.take(self.task.peer, Instant::now()) else { return };
                self.probing = Some(turn);
                self.tell(|agent, now| agent.start_probing(now));
            }
            Event::ServerReflexive(address) => {
                tracing::debug!(session = %self.task.session, %address, "seen from outside");
            }
            Event::Failed { round, next } => {
                let retry = next.map(|next| next.saturating_duration_since(Instant::now()));
                self.push(DirectEvent::Failed { reason: format!("round {round} found no path"), retry });
                self.tcp.lacking(Instant::now());
                self.want_router();
                self.failed = round;
                if self.stream.is_some() {
                    self.worked = round;
                }
                if self.failed >= self.worked + NOTHING_WORKS && self.others.is_empty() {
                    self.list_interfaces();
                }
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Message(message) => {
                self.tell(|agent, now| {
                    if let Err(error) = agent.handle_message(now, &message) {
                        tracing::debug!(%error, "candidate message of the peer ignored");
                    }
                });
            }
            Command::PeerSeen(address) => self.tell(|agent, now| agent.add_peer_seen(now, address)),
            Command::Silent(reason) => {
                self.lost(&reason);
                if self.stream.is_some() {
                    // It stays until there is another.
                    self.stream = None;
                    self.tcp.ended(Instant::now());
                    self.want_router();
                }
            }
            Command::Poor { connection, reason } => {
                if self.current.as_ref().is_some_and(|current| current.connection.stable_id() == connection) {
                    self.poor(&reason);
                }
            }
        }
    }

    fn dial(&mut self, confirmed: Confirmed) {
        self.dialling.abort_all();
        let path = confirmed.path();
        let config = quic::on_path(self.task.client.clone(), confirmed.rtt);
        let name = quic::server_name(self.task.session);
        let endpoint = match path.socket {
            LocalSocket::DEVICE => Some(&self.task.quic),
            own => self.task.own_sockets.quic(&self.entry, own),
        };
        let connecting = endpoint.map(|endpoint| endpoint.connect_with(config, path.remote, &name));
        self.dialling.spawn(async move {
            let dialled = async {
                let connecting = connecting.ok_or(DialError::NoSocket)??;
                Ok(timeout(DIAL, connecting).await.map_err(|_| DialError::Slow)??)
            };
            (path, dialled.await)
        });
    }

    fn dialled(&mut self, dialled: Result<(Path, Result<Connection, DialError>), JoinError>) {
        match dialled {
            Ok((path, Ok(connection))) => self.connected(connection, path),
            Ok((path, Err(error))) => {
                self.early = None;
                self.tell(|agent, now| agent.path_lost(now, path, &error.to_string()));
                self.push(DirectEvent::Failed { reason: error.to_string(), retry: None });
            }
            // A newer path was confirmed meanwhile.
            Err(_) => {}
        }
    }

    fn connected(&mut self, connection: Connection, path: Path) {
        let confirmed = self.confirmed.filter(|confirmed| confirmed.path() == path);
        let local = confirmed.map(|confirmed| confirmed.local.address);
        let watched = connection.clone();
        let closed = Box::pin(async move { watched.closed().await });
        let before = self.current.replace(Current { path, connection: connection.clone(), closed });
        self.lingering = before.map(|before| (Instant::now() + LINGER, before.connection));
        self.worked = confirmed.map_or(self.failed, |confirmed| confirmed.round);
        self.tcp.quic_came(Instant::now());
        self.tell(|agent, now| agent.path_in_use(now, path));
        self.push(DirectEvent::Connected { connection, local });
    }

    fn dial_tcp(&mut self) {
        if self.peer_listens.is_empty() || !self.streams.is_empty() {
            return self.tcp.put_off();
        }
        let only_near = self.tcp.start(Instant::now());
        let addresses = self.peer_listens.clone();
        self.streams.spawn(tcp::dial(addresses, only_near, self.entry.clone(), self.task.side.clone()));
    }

    fn dialled_tcp(&mut self, dialled: Result<Result<Connected, TcpError>, JoinError>) {
        let now = Instant::now();
        match dialled {
            Ok(Ok(connected)) => self.stream_connected(connected),
            Ok(Err(error)) => {
                tracing::debug!(session = %self.task.session, %error, "no direct TCP for now");
                match error {
                    TcpError::Far(_) => self.tcp.far(now),
                    _ => self.tcp.failed(now),
                }
            }
            Err(_) => {}
        }
    }

    /// The newest one counts: the peer would not have dialled, had it another.
    fn stream_connected(&mut self, connected: Connected) {
        let Connected { stream, local, remote, is_near } = connected;
        let ((alive, ended), (leave, left)) = (oneshot::channel(), oneshot::channel());
        if let Some(before) = self.stream.replace(Stream { ended, leave }) {
            let _ = before.leave.send(());
        }
        self.worked = self.failed;
        self.tcp.connected(Instant::now(), is_near);
        self.push(DirectEvent::Stream { stream: Box::new(stream), local, remote, alive, left });
    }

    /// The TCP connection is left, or of no more use.
    fn leave_stream(&mut self) {
        if let Some(stream) = self.stream.take() {
            let _ = stream.leave.send(());
        }
        self.tcp.ended(Instant::now());
    }

    /// The current connection is closed or silent.
    fn lost(&mut self, reason: &str) {
        if let Some(current) = self.current.take() {
            self.lingering = None;
            self.tcp.quic_lost(Instant::now(), false);
            self.want_router();
            self.tell(|agent, now| agent.path_lost(now, current.path, reason));
        }
    }

    /// The current connection is given up for a better way: by us, or by the peer.
    fn poor(&mut self, reason: &str) {
        if let Some(current) = self.current.take() {
            self.lingering = None;
            self.tcp.quic_lost(Instant::now(), true);
            self.tell(|agent, now| agent.path_poor(now, current.path, reason));
        }
    }

    fn network_changed(&mut self) {
        let moves = *self.task.network.borrow_and_update();
        let moved = std::mem::replace(&mut self.moves, moves) != moves;
        if moved {
            self.worked = self.failed;
            self.others.clear();
        }
        self.list_interfaces();
        if moved {
            if let Some(router) = &self.router {
                router.mapped.network_changed();
            }
            self.tcp.changed(Instant::now());
            self.tell(|agent, now| agent.network_changed(now));
        }
    }

    fn list_interfaces(&mut self) {
        let Addresses { own, others } = interfaces::addresses(self.task.endpoint.loopback);
        let has_ipv6 = self.task.socket.has_ipv6();
        let of_use = |ips: Vec<IpAddr>| -> Vec<IpAddr> {
            ips.into_iter().filter(|ip| ip.is_ipv4() || has_ipv6).collect()
        };
        let before = std::mem::replace(&mut self.hosts, of_use(own));
        if before != self.hosts {
            self.worked = self.failed;
            self.others.clear();
            self.tcp.changed(Instant::now());
        }
        // Once: they come and go with containers, and each time would look like another network.
        if self.failed >= self.worked + NOTHING_WORKS && self.others.is_empty() {
            self.others = of_use(others);
        }
        let by_ipv4 = |hosts: &[IpAddr]| -> BTreeSet<IpAddr> {
            hosts.iter().copied().filter(IpAddr::is_ipv4).collect()
        };
        if let Some(router) = self.router.as_ref().filter(|_| by_ipv4(&before) != by_ipv4(&self.hosts)) {
            router.mapped.network_changed();
        }
        self.tell_addresses();
    }

    /// Where this end is reached: at its interfaces, and by the router in front.
    fn tell_addresses(&mut self) {
        let (port, tcp_port) = (self.task.port, self.task.listener.as_ref().map(|listener| listener.port));
        let Told { udp, tcp } = self.router.as_ref().map(|router| *router.told.borrow()).unwrap_or_default();
        let public = &self.task.endpoint.public;
        let at = |ips: &[IpAddr], port| -> Vec<SocketAddr> {
            ips.iter().map(|ip| SocketAddr::new(*ip, port)).collect()
        };
        let hosts = at(&self.hosts, port);
        let public_udp = public.iter().map(|public| public.of_port(port));
        let mapped: Vec<_> = udp.into_iter().chain(public_udp).chain(at(&self.others, port)).collect();
        let listening = tcp_port.into_iter().flat_map(|port| {
            let public = public.iter().map(move |public| public.of_port(port));
            tcp.into_iter().chain(public).chain(at(&self.hosts, port)).chain(at(&self.others, port))
        });
        self.listening = listening.collect();
        let listening = &self.listening;
        self.tell(|agent, now| {
            agent.set_host_addresses(now, &hosts);
            agent.set_mapped_addresses(now, &mapped);
            agent.set_listening(now, listening);
        });
    }

    /// The router is to be asked, unless there is a path in a moment.
    fn want_router(&mut self) {
        if self.task.port_mapping && self.router.is_none() && self.ask_router.is_none() {
            self.ask_router = Some(Instant::now() + PATIENCE);
        }
    }

    /// There is no path yet: perhaps the router lets the peer in.
    fn ask_router(&mut self) {
        self.ask_router = None;
        if self.current.is_some() || self.stream.is_some() {
            return;
        }
        let port = |transport, number| Some(Port { transport, number: NonZeroU16::new(number)? });
        let listener = self.task.listener.as_ref();
        let tcp = listener.and_then(|listener| port(Transport::Tcp, listener.port));
        let ports: Vec<_> = port(Transport::Udp, self.task.port).into_iter().chain(tcp).collect();
        let mapped = self.task.mapper.start(&ports);
        self.router = Some(Router { told: mapped.told(), mapped });
        self.tell_addresses();
    }

    fn tell(&self, tell: impl FnOnce(&mut PathAgent, Instant)) {
        let mut agent = self.entry.agent();
        // Under the lock, so that time never runs backwards for the agent.
        tell(&mut agent, Instant::now());
    }

    fn push(&mut self, event: DirectEvent) {
        // A TCP connection that finds no room ends by being dropped.
        let Err(error) = self.task.events.try_send(event) else { return };
        if let DirectEvent::Connected { connection, .. } = error.into_inner() {
            // Its end makes the search start again.
            connection.close(0u32.into(), b"");
        }
    }
}

async fn reached(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline.into()).await,
        None => pending().await,
    }
}

/// The router says something else than before.
async fn router_said(router: &mut Option<Router>) {
    if let Some(router) = router
        && router.told.changed().await.is_ok()
    {
        return;
    }
    pending().await
}

async fn stream_ended(stream: &mut Option<Stream>) {
    match stream {
        Some(stream) => drop((&mut stream.ended).await),
        None => pending().await,
    }
}

async fn closed(current: &mut Option<Current>) -> ConnectionError {
    match current {
        Some(current) => current.closed.as_mut().await,
        None => pending().await,
    }
}

/// Each server's first IPv4 and first IPv6 address, in the order given.
async fn resolve(servers: &[String]) -> Vec<SocketAddr> {
    let lookups = servers.iter().map(|server| async move {
        let found = timeout(RESOLVE, lookup_host(server)).await.ok().and_then(Result::ok);
        let found: Vec<SocketAddr> = found.into_iter().flatten().collect();
        if found.is_empty() {
            tracing::debug!(server, "no address of this STUN server");
        }
        let first = |is_ipv4| found.iter().copied().find(|address| address.is_ipv4() == is_ipv4);
        first(true).into_iter().chain(first(false)).collect::<Vec<_>>()
    });
    join_all(lookups).await.concat()
}

#[derive(Debug, thiserror::Error)]
enum DialError {
    #[error("the socket of the direct path is gone")]
    NoSocket,
    #[error("QUIC over the direct path took too long")]
    Slow,
    #[error("QUIC over the direct path: {0}")]
    Connect(#[from] ConnectError),
    #[error("QUIC over the direct path: {0}")]
    Connection(#[from] ConnectionError),
}
