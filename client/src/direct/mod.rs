//! The direct tier: one UDP socket of this process, the path engine on it, and QUIC over the paths found.
//!
//! | module | what it does |
//! | --- | --- |
//! | `socket` | the UDP socket, and the adapter through which quinn uses it |
//! | `demux` | sorts what arrives: STUN to the sessions' path engines, QUIC to quinn |
//! | `own_sockets` | the sockets of a session whose path is hard to find |
//! | `path_task` | drives one session's [`adit_tunnel::path::PathAgent`] and dials the paths it confirms |
//! | `accept` | the agent's side: takes connections from confirmed addresses and authenticated peers |
//! | `tcp` | direct TCP connections: listening, dialling, letting in |
//! | `tcp_schedule` | when TCP is dialled, and when it is left for QUIC |
//! | `quic` | quinn's configuration, each number with its reason |
//! | `mediator` | shows the mediator where this end is |
//! | `loss` | when a path loses so much that the relay is better, and how the ends say so |
//! | `turns` | who may try many sockets, and when |
//! | `interfaces` | the addresses of this machine |
//! | `network` | notices that they have changed |
//! | `port_mapping` | has the router in front let others in |
//!
//! # The story of a direct path
//! [`DirectEndpoint::bind`] once, [`DirectEndpoint::session`] for each session. Its
//! [`DirectEvent::Message`]s go to the peer's [`DirectHandle::handle_message`] by whatever way there is.
//! When both path engines have confirmed a path, the technician dials QUIC over it, and both ends get
//! [`DirectEvent::Connected`]. When the connection closes, or the session says that it fell silent
//! ([`DirectHandle::silent`]), the search starts again.

mod accept;
mod demux;
mod interfaces;
pub(crate) mod loss;
mod mediator;
mod network;
mod own_sockets;
mod path_task;
pub(crate) mod port_mapping;
mod quic;
mod socket;
mod tcp;
mod tcp_schedule;
#[cfg(test)]
mod tests;
mod turns;

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use adit_protocol::control::{IceCredentials, Welcome};
use adit_protocol::{DeviceId, SessionId};
use adit_tunnel::path::{Credentials, IceRole, InvalidCredentials};
use quinn::Connection;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::config::PublicAddress;
use crate::identity::{Identity, Live};
use crate::tls::{self, CarrierStream, TlsError};
use demux::Demux;
#[doc(hidden)]
pub use demux::sort_without_sessions;
use mediator::Handshake;
use own_sockets::OwnSockets;
use path_task::{Command, PathTask};
use port_mapping::PortMapper;
use socket::DirectSocket;
use tcp::{Listener, Side};
use turns::Turns;

/// Commands and events that wait, for each session. Messages are repeated until they arrive, so those
/// that find no room are no loss.
const QUEUE: usize = 64;

/// What direct paths of this process may use.
#[derive(Debug, Clone)]
pub struct BindConfig {
    /// Ports that this end binds.
    pub ports: RangeInclusive<u16>,
    /// Ports that its peers may have.
    pub peers: RangeInclusive<u16>,
    /// This end offers 127.0.0.1, too, which is of use only where both ends are on one machine.
    pub loopback: bool,
    /// Where others reach the ports anyway.
    pub public: Vec<PublicAddress>,
}

/// One UDP socket with one quinn endpoint on it: all that a process has for ordinary direct paths.
pub struct DirectEndpoint {
    identity: Arc<Live>,
    /// The one that the endpoint shows as a server.
    shown: Mutex<Arc<Identity>>,
    config: BindConfig,
    port: u16,
    mapper: Arc<PortMapper>,
    socket: Arc<DirectSocket>,
    demux: Arc<Demux>,
    quic: quinn::Endpoint,
    turns: Arc<Turns>,
    /// While there are sessions.
    tcp: Mutex<Weak<Listener>>,
    network: watch::Receiver<u64>,
    _accepting: Option<Task>,
}

impl DirectEndpoint {
    /// Binds a free port of this end's range, beginning with a random one. An agent accepts connections of its sessions from
    /// now on.
    ///
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`BindError`]; sessions then run on the relay.
    pub fn bind(identity: Arc<Live>, config: BindConfig) -> Result<Arc<Self>, BindError> {
        let demux = Arc::new(Demux::default());
        let socket = Arc::new(DirectSocket::bind(config.ports.clone(), demux.clone())?);
        let port = socket.port();
        let shown = identity.get();
        let server = quic::server_config(&shown)?;
        let accepts = server.is_some();
        let quic = quic::endpoint(socket.clone(), server).map_err(BindError::Socket)?;
        let accepting = accepts.then(|| Task(tokio::spawn(accept::run(quic.clone(), demux.clone()))));
        let network = network::notice();
        tracing::debug!(port, "direct paths use this UDP port");
        Ok(Arc::new(Self {
            identity,
            shown: Mutex::new(shown),
            mapper: Arc::default(),
            config,
            port,
            socket,
            demux,
            quic,
            turns: Arc::default(),
            tcp: Mutex::default(),
            network,
            _accepting: accepting,
        }))
    }

    /// UDP port of the socket.
    pub fn local_port(&self) -> u16 {
        self.port
    }

    /// This device's identity as it is now, which the endpoint shows from now on.
    fn identity(&self) -> Arc<Identity> {
        let now = self.identity.get();
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&shown, &now) {
            // An identity that was verified can be used; if not, the one before is shown.
            if let Ok(config) = quic::server_config(&now) {
                self.quic.set_server_config(config);
            }
            *shown = now.clone();
        }
        now
    }

    /// Takes TCP connections from now on, until the last session has ended.
    fn listener(&self, role: IceRole) -> Option<Arc<Listener>> {
        // On a desktop the firewall asks the user about every program that listens: a technician's does without.
        let is_welcome = role == IceRole::Controlled || cfg!(target_os = "linux");
        // Where both ends are on one machine, there is no network to be faster on.
        if self.config.loopback || !is_welcome {
            return None;
        }
        let mut listener = self.tcp.lock().unwrap_or_else(PoisonError::into_inner);
        listener.upgrade().or_else(|| {
            let bound = Arc::new(Listener::bind(self.config.ports.clone(), self.demux.clone())?);
            *listener = Arc::downgrade(&bound);
            Some(bound)
        })
    }

    /// Starts to look for a path. It goes on until the [`DirectSession`] is dropped.
    ///
    /// # Errors
    /// [`SessionError`] when the grant's ICE credentials or this device's certificate are of no use.
    pub fn session(self: &Arc<Self>, config: SessionConfig) -> Result<DirectSession, SessionError> {
        let identity = self.identity();
        let side = match config.role {
            IceRole::Controlling => {
                Side::Technician(Arc::new(tls::tunnel_client(&identity, Some(config.peer))?))
            }
            IceRole::Controlled => Side::Agent(Arc::new(tls::tunnel_server(&identity, Some(config.peer))?)),
        };
        let (command_sender, commands) = mpsc::channel(QUEUE);
        let (event_sender, events) = mpsc::channel(QUEUE);
        let task = PathTask {
            role: config.role,
            session: config.session,
            peer: config.peer,
            local: Credentials::new(&config.local.ufrag, &config.local.password)?,
            remote: Credentials::new(&config.remote.ufrag, &config.remote.password)?,
            stun_servers: config.stun_servers,
            handshake: Handshake::new(config.session, config.role, &config.local.password)?,
            client: quic::client_config(&identity, config.peer)?,
            own_sockets: OwnSockets::new(self.config.ports.clone(), quic::server_config(&identity)?),
            many_socket_probing: config.many_socket_probing,
            turns: self.turns.clone(),
            listener: self.listener(config.role),
            side,
            peer_comes_from: config.peer_comes_from,
            port: self.port,
            endpoint: self.config.clone(),
            mapper: self.mapper.clone(),
            // Where both ends are on one machine, there is no router between them.
            port_mapping: config.port_mapping && !self.config.loopback,
            network: self.network.clone(),
            socket: self.socket.clone(),
            demux: self.demux.clone(),
            quic: self.quic.clone(),
            commands,
            events: event_sender,
        };
        Ok(DirectSession {
            events,
            handle: DirectHandle { commands: command_sender },
            _task: Task(tokio::spawn(task.run())),
            _endpoint: self.clone(),
        })
    }
}

/// What a session's search for a path needs, most of it from its grant.
// No `Debug`: it holds passwords.
#[derive(Clone)]
pub struct SessionConfig {
    /// Session id.
    pub session: SessionId,
    /// The technician controls, the agent is controlled.
    pub role: IceRole,
    /// Device id of the other end: nobody else is let in.
    pub peer: DeviceId,
    /// ICE credentials of this end.
    pub local: IceCredentials,
    /// ICE credentials of the other end.
    pub remote: IceCredentials,
    /// Who tells this end its addresses.
    pub stun_servers: StunServers,
    /// The address from which the mediator sees the other end.
    pub peer_comes_from: Option<IpAddr>,
    /// Whether many sockets may be tried where one NAT takes random ports (up to 256 sockets, or 1,024 datagrams).
    pub many_socket_probing: bool,
    /// Whether the router in front may be asked for ports.
    pub port_mapping: bool,
}

/// STUN servers, `HOST:PORT` (UDP) each. Names are resolved when a session begins, to an IPv4 and an IPv6 address.
#[derive(Debug, Clone, Default)]
pub struct StunServers {
    /// The mediator's: what is asked there is a handshake, too.
    pub mediator: Vec<String>,
    /// Relays'.
    pub others: Vec<String>,
}

impl StunServers {
    /// Those that the mediator tells of.
    pub fn of(welcome: &Welcome) -> Self {
        let own = welcome.mediator_stun.max(1) as usize;
        let (mediator, others) = welcome.stun.split_at(own.min(welcome.stun.len()));
        Self { mediator: mediator.to_vec(), others: others.to_vec() }
    }
}

/// One session's search for a path, and the connections that came of it. Dropping it ends the search
/// and lets nobody in any more; connections handed out stay.
pub struct DirectSession {
    /// What happens.
    pub events: mpsc::Receiver<DirectEvent>,
    /// Tells the search what the session knows.
    pub handle: DirectHandle,
    _task: Task,
    // Lives as long as any session.
    _endpoint: Arc<DirectEndpoint>,
}

/// What a session should do or know.
#[derive(Debug)]
pub enum DirectEvent {
    /// Give this to the peer's [`DirectHandle::handle_message`], by whatever way there is. It may be lost.
    Message(Vec<u8>),
    /// A connection with the session's peer, authenticated. On the technician's side the agent may yet
    /// refuse; then the connection closes.
    Connected {
        /// The connection.
        connection: Connection,
        /// This end as the peer sees it, where known.
        local: Option<SocketAddr>,
    },
    /// A direct TCP connection with the session's peer, authenticated.
    Stream {
        /// The connection.
        stream: Box<CarrierStream<TcpStream>>,
        /// This end's address.
        local: Option<SocketAddr>,
        /// The other end's.
        remote: Option<SocketAddr>,
        /// To be dropped when it has ended.
        alive: oneshot::Sender<()>,
        /// Says that it is to end, because another one does better. Its failure says nothing.
        left: oneshot::Receiver<()>,
    },
    /// No path was found this time, or it could not be used. For logs.
    Failed {
        /// For people.
        reason: String,
        /// When the next attempt starts, from now, where this end knows.
        retry: Option<Duration>,
    },
}

/// Tells a [`DirectSession`] what the session knows. Never waits.
#[derive(Debug, Clone)]
pub struct DirectHandle {
    commands: mpsc::Sender<Command>,
}

impl DirectHandle {
    /// A message of the peer ([`DirectEvent::Message`]).
    pub fn handle_message(&self, message: Vec<u8>) {
        self.tell(Command::Message(message));
    }

    /// An address of the peer's socket as the mediator saw it.
    pub fn peer_seen(&self, address: SocketAddr) {
        self.tell(Command::PeerSeen(address));
    }

    /// Nothing is heard on the connection handed out last: the search starts again, and the connection
    /// is left as it is. One that closes, at whichever end, is noticed without this call.
    pub fn silent(&self, reason: &str) {
        self.tell(Command::Silent(reason.to_owned()));
    }

    /// The connection with this [`Connection::stable_id`] loses too much, and is being closed for that reason. If it is the one
    /// handed out last, the search starts again after a while, and later each time.
    pub fn poor(&self, connection: usize, reason: &str) {
        self.tell(Command::Poor { connection, reason: reason.to_owned() });
    }

    fn tell(&self, command: Command) {
        // Only a flood of messages from the peer fills the queue: the harm is its own.
        if self.commands.try_send(command).is_err() {
            tracing::debug!("the search for a direct path is over or does not keep up");
        }
    }
}

/// Why there is no socket for direct paths.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Every port of the range is taken.
    #[error("no free UDP port in {first}-{last}; [p2p] ports sets the range")]
    NoFreePort {
        /// First port of the range.
        first: u16,
        /// Last port of the range.
        last: u16,
    },
    /// The system refuses.
    #[error("no UDP socket for direct paths: {0}")]
    Socket(#[source] std::io::Error),
    /// Key or certificate of this device cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Why a session cannot look for a direct path.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The mediator's fault.
    #[error(transparent)]
    Credentials(#[from] InvalidCredentials),
    /// Key or certificate of this device cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// A task that ends with its owner.
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}
