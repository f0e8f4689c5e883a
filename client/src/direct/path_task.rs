//! Drives the path engine of one session, and dials QUIC over the paths that it confirms.

use std::future::{Future, pending};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use adit_protocol::{DeviceId, SessionId};
use adit_tunnel::path::{self, Confirmed, Credentials, Event, IceRole, PathAgent};
use futures_util::future::join_all;
use quinn::{ClientConfig, ConnectError, Connection, ConnectionError, Endpoint};
use tokio::net::lookup_host;
use tokio::sync::{Notify, mpsc};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{MissedTickBehavior, interval_at, sleep_until, timeout};

use super::demux::{Demux, Entry};
use super::mediator::Handshake;
use super::socket::DirectSocket;
use super::{DirectEvent, StunServers, interfaces, quic};

/// A name that takes longer is left out.
const RESOLVE: Duration = Duration::from_secs(2);
/// A confirmed path takes two round trips; after this, the next round is the better bet.
const DIAL: Duration = Duration::from_secs(3);
/// How soon a new network is noticed.
const INTERFACES: Duration = Duration::from_secs(5);
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
    pub(super) port: u16,
    pub(super) loopback: bool,
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
            seed: rand::random(),
        };
        let (accepted_sender, accepted) = mpsc::channel(ACCEPTED);
        let entry = Arc::new(Entry {
            session: self.session,
            peer: self.peer,
            ufrag,
            agent: Mutex::new(PathAgent::new(Instant::now(), config)),
            wake: Notify::new(),
            accepted: accepted_sender,
        });
        let _registration = self.demux.register(entry.clone());
        let driver =
            Driver { task: self, entry, accepted, dialling: JoinSet::new(), confirmed: None, current: None };
        driver.run().await;
    }
}

struct Driver {
    task: PathTask,
    entry: Arc<Entry>,
    accepted: mpsc::Receiver<(Connection, SocketAddr)>,
    /// At most one, beside those that were aborted.
    dialling: JoinSet<(SocketAddr, Result<Connection, DialError>)>,
    /// The path confirmed last.
    confirmed: Option<Confirmed>,
    current: Option<Current>,
}

/// The connection that the session got last.
struct Current {
    /// The path's address. The connection's own changes when a NAT maps it anew.
    path: SocketAddr,
    closed: Pin<Box<dyn Future<Output = ConnectionError> + Send>>,
}

impl Driver {
    async fn run(mut self) {
        self.list_interfaces();
        let mut interfaces = interval_at(tokio::time::Instant::now() + INTERFACES, INTERFACES);
        interfaces.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let deadline = self.drive();
            tokio::select! {
                command = self.task.commands.recv() => match command {
                    Some(command) => self.obey(command),
                    None => return,
                },
                () = self.entry.wake.notified() => {}
                () = reached(deadline) => self.tell(|agent, now| agent.handle_timeout(now)),
                Some(dialled) = self.dialling.join_next() => self.dialled(dialled),
                Some((connection, remote)) = self.accepted.recv() => self.connected(connection, remote),
                error = closed(&mut self.current) => self.lost(&error.to_string()),
                _ = interfaces.tick() => self.list_interfaces(),
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
                    return agent.poll_timeout();
                }
                (transmit, event)
            };
            if let Some(transmit) = transmit {
                let transmit = self.task.handshake.seal(transmit);
                self.task.socket.send(transmit.destination, &transmit.payload);
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
                if self.task.role == IceRole::Controlling {
                    self.dial(confirmed);
                }
            }
            Event::ServerReflexive(address) => {
                tracing::debug!(session = %self.task.session, %address, "seen from outside");
            }
            Event::Failed { round, next } => {
                let retry = next.map(|next| next.saturating_duration_since(Instant::now()));
                self.push(DirectEvent::Failed { reason: format!("round {round} found no path"), retry });
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
            Command::Silent(reason) => self.lost(&reason),
        }
    }

    fn dial(&mut self, confirmed: Confirmed) {
        self.dialling.abort_all();
        let remote = confirmed.remote.address;
        let config = quic::on_path(self.task.client.clone(), confirmed.rtt);
        let name = quic::server_name(self.task.session);
        let connecting = self.task.quic.connect_with(config, remote, &name);
        self.dialling.spawn(async move {
            let dialled = async { Ok(timeout(DIAL, connecting?).await.map_err(|_| DialError::Slow)??) };
            (remote, dialled.await)
        });
    }

    fn dialled(&mut self, dialled: Result<(SocketAddr, Result<Connection, DialError>), JoinError>) {
        match dialled {
            Ok((remote, Ok(connection))) => self.connected(connection, remote),
            Ok((remote, Err(error))) => {
                self.tell(|agent, now| agent.path_lost(now, remote, &error.to_string()));
                self.push(DirectEvent::Failed { reason: error.to_string(), retry: None });
            }
            // A newer path was confirmed meanwhile.
            Err(_) => {}
        }
    }

    fn connected(&mut self, connection: Connection, remote: SocketAddr) {
        let confirmed = self.confirmed.filter(|confirmed| confirmed.remote.address == remote);
        let local = confirmed.map(|confirmed| confirmed.local.address);
        let watched = connection.clone();
        let closed = Box::pin(async move { watched.closed().await });
        self.current = Some(Current { path: remote, closed });
        self.tell(|agent, now| agent.path_in_use(now, remote));
        self.push(DirectEvent::Connected { connection, local });
    }

    /// The current connection is closed or silent.
    fn lost(&mut self, reason: &str) {
        if let Some(current) = self.current.take() {
            self.tell(|agent, now| agent.path_lost(now, current.path, reason));
        }
    }

    fn list_interfaces(&mut self) {
        let addresses = interfaces::addresses(self.task.loopback);
        let addresses: Vec<_> = addresses
            .into_iter()
            .filter(|ip| ip.is_ipv4() || self.task.socket.has_ipv6())
            .map(|ip| SocketAddr::new(ip, self.task.port))
            .collect();
        self.tell(|agent, now| agent.set_host_addresses(now, &addresses));
    }

    fn tell(&self, tell: impl FnOnce(&mut PathAgent, Instant)) {
        let mut agent = self.entry.agent();
        // Under the lock, so that time never runs backwards for the agent.
        tell(&mut agent, Instant::now());
    }

    fn push(&mut self, event: DirectEvent) {
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
    #[error("QUIC over the direct path took too long")]
    Slow,
    #[error("QUIC over the direct path: {0}")]
    Connect(#[from] ConnectError),
    #[error("QUIC over the direct path: {0}")]
    Connection(#[from] ConnectionError),
}
