//! Local ports that lead through a tunnel: `-L [BIND:]PORT:HOST:PORT[/udp]`.

mod complaint;
mod spec;
mod tcp;
mod udp;

use std::io;
use std::net::SocketAddr;

use adit_protocol::{Protocol, Target};
use tokio::net::{TcpListener, UdpSocket};

use crate::exit::{Exit, Failure};
use crate::tunnel::Tunnel;

pub use spec::{ForwardSpec, InvalidForward};

/// Ports that are tried after the preferred one before the system chooses.
const TRIES: u16 = 16;

/// A local port that is bound; connections wait in the system until it is served.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    local: SocketAddr,
    target: Target,
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
        let candidates: Vec<u16> = match spec.port {
            0 => spec::preferred_ports(agent, &spec.target).take(TRIES.into()).chain([0]).collect(),
            port => vec![port],
        };
        let mut last = None;
        for port in candidates {
            let address = SocketAddr::new(spec.bind, port);
            match Socket::bind(address, spec.target.protocol).await {
                Ok(socket) => {
                    let local = socket.local_addr().map_err(|error| BindError { address, error })?;
                    return Ok(Self { socket, local, target: spec.target.clone() });
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
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Serves connections or datagrams until the session is over. Dropping the future ends them.
    pub async fn serve(self, tunnel: Tunnel) {
        match self.socket {
            Socket::Tcp(listener) => tcp::serve(listener, self.target, tunnel).await,
            Socket::Udp(socket) => udp::serve(socket, self.target, tunnel).await,
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
