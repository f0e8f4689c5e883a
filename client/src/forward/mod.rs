//! Local ports that lead through a tunnel: `-L [BIND:]PORT:HOST:PORT[/udp]` to one target, `-D [BIND:]PORT` to all.

mod complaint;
mod dynamic;
mod redirected;
mod spec;
mod tcp;
mod udp;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use adit_protocol::{Protocol, Wanted};
use tokio::net::{TcpListener, UdpSocket};

use crate::exit::{Exit, Failure};
use crate::tunnel::Tunnel;

pub use redirected::Traffic;
pub use spec::{ForwardSpec, InvalidForward, ProxySpec};

/// Ports that are tried after the preferred one before the system chooses.
const TRIES: u16 = 16;

/// A local port that is bound; connections wait in the system until it is served.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    local: SocketAddr,
    wanted: Wanted,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

impl Listener {
    /// Binds the local end of `spec`. Port 0 is the same one each time for the same `agent` (as the user
    /// names it) and target, where it is free: clients remember credentials by port.
    ///
    /// # Errors
    /// [`BindError`].
    pub async fn bind(spec: &ForwardSpec, agent: &str) -> Result<Self, BindError> {
        Self::bind_at((spec.bind, spec.port).into(), Wanted::One(spec.target.clone()), agent).await
    }

    /// Binds `address` for a proxy to everything that the agent allows. Port 0 as with [`Listener::bind`].
    ///
    /// # Errors
    /// [`BindError`].
    pub async fn bind_proxy(address: SocketAddr, agent: &str) -> Result<Self, BindError> {
        Self::bind_at(address, Wanted::Any, agent).await
    }

    /// Binds what another one had, which is gone.
    ///
    /// # Errors
    /// [`BindError`].
    pub async fn bind_again(local: SocketAddr, wanted: Wanted) -> Result<Self, BindError> {
        Self::bind_at(local, wanted, "").await
    }

    async fn bind_at(address: SocketAddr, wanted: Wanted, agent: &str) -> Result<Self, BindError> {
        let candidates: Vec<u16> = match address.port() {
            0 => spec::preferred_ports(agent, &wanted).take(TRIES.into()).chain([0]).collect(),
            port => vec![port],
        };
        let protocol = match &wanted {
            Wanted::One(target) => target.protocol,
            Wanted::Any => Protocol::Tcp,
        };
        let mut last = None;
        for port in candidates {
            let address = SocketAddr::new(address.ip(), port);
            match Socket::bind(address, protocol).await {
                Ok(socket) => {
                    let local = socket.local_addr().map_err(|error| BindError { address, error })?;
                    return Ok(Self { socket, local, wanted });
                }
                Err(error) => last = Some(BindError { address, error }),
            }
        }
        Err(last.expect("there is at least one candidate"))
    }

    /// The local address, with the port that was chosen.
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// Where connections and datagrams go.
    pub fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// Whether it is for connections, and not for datagrams.
    pub fn takes_connections(&self) -> bool {
        matches!(self.socket, Socket::Tcp(_))
    }

    /// Serves connections by others to `server` (`HOST:PORT`). Dropping the future ends them.
    pub async fn serve_by(self, server: String, traffic: Arc<Traffic>) {
        if let Socket::Tcp(listener) = self.socket {
            redirected::serve(listener, server, traffic).await;
        }
    }

    /// Serves connections or datagrams until the session is over. Dropping the future ends them.
    pub async fn serve(self, tunnel: Tunnel) {
        match (self.socket, self.wanted) {
            (Socket::Tcp(listener), Wanted::One(target)) => tcp::serve(listener, target, tunnel).await,
            (Socket::Tcp(listener), Wanted::Any) => dynamic::serve(listener, tunnel).await,
            (Socket::Udp(socket), Wanted::One(target)) => udp::serve(socket, target, tunnel).await,
            // There is no proxy over UDP.
            (Socket::Udp(_), Wanted::Any) => {}
        }
    }
}

impl Socket {
    async fn bind(address: SocketAddr, protocol: Protocol) -> io::Result<Self> {
        match protocol {
            Protocol::Tcp => TcpListener::bind(address).await.map(Self::Tcp),
            Protocol::Udp => UdpSocket::bind(address).await.map(Self::Udp),
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr(),
            Self::Udp(socket) => socket.local_addr(),
        }
    }
}

/// A local port cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {error}")]
pub struct BindError {
    address: SocketAddr,
    error: io::Error,
}

impl Failure for BindError {
    fn exit(&self) -> Exit {
        Exit::Usage
    }

    fn remedy(&self) -> Option<String> {
        let port = self.address.port();
        Some(match self.error.kind() {
            io::ErrorKind::AddrInUse => {
                format!("port {port} is taken: choose another one, or 0 to have a free one chosen")
            }
            io::ErrorKind::PermissionDenied => {
                format!("port {port} needs rights that this user lacks: choose one above 1023")
            }
            io::ErrorKind::AddrNotAvailable => format!("{} is no address of this machine", self.address.ip()),
            _ => return None,
        })
    }
}
