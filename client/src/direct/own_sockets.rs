//! The sockets that a session opens beside the device's: one for a careful round, many for probing, and in the end the one
//! of the path that was found, with a quinn endpoint of its own.
//!
//! They are for IPv4: no NAT stands between IPv6 addresses.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use adit_tunnel::path::{LocalSocket, Transmit};
use quinn::{Endpoint, ServerConfig};
use socket2::SockRef;
use tokio::net::UdpSocket;

use super::demux::{Demux, Entry, Registration};
use super::socket::{self, DirectSocket};
use super::{Task, accept, quic};

/// Longer than every check. What is longer is not for a socket without an endpoint.
const LONGEST: usize = 1500;
/// What systems give a datagram on its way, if nobody says otherwise.
const USUAL_HOPS: u32 = 64;

/// All of one session.
pub(super) struct OwnSockets {
    ports: RangeInclusive<u16>,
    server: Option<ServerConfig>,
    open: HashMap<LocalSocket, Own>,
    /// No more than what is open can be opened at present.
    full: bool,
}

struct Own {
    io: Arc<UdpSocket>,
    /// Takes what arrives, as long as there is no endpoint.
    reader: Option<Task>,
    endpoint: Option<OwnEndpoint>,
}

/// QUIC on such a socket.
struct OwnEndpoint {
    quic: Endpoint,
    _registration: Registration,
    _accepting: Option<Task>,
}

impl OwnSockets {
    /// Sockets get ports of this range. `server`: connections are accepted.
    pub(super) fn new(ports: RangeInclusive<u16>, server: Option<ServerConfig>) -> Self {
        Self { ports, server, open: HashMap::new(), full: false }
    }

    /// Sends a datagram of the path engine of `entry`, and opens its socket if it is new. What fails is lost.
    pub(super) fn send(&mut self, entry: &Arc<Entry>, transmit: &Transmit) {
        if !self.open.contains_key(&transmit.socket) {
            // Half of the range is for others on this machine.
            if self.full || self.open.len() >= (self.ports.len() / 2).max(1) {
                return;
            }
            match open(&self.ports, transmit.socket, entry.clone()) {
                Ok(own) => drop(self.open.insert(transmit.socket, own)),
                Err(error) => {
                    tracing::info!(%error, "not enough UDP sockets for a path that is hard to find");
                    self.full = true;
                    return;
                }
            }
        }
        let Some(own) = self.open.get(&transmit.socket) else { return };
        let set_hops = |hops: u32| drop(own.io.set_ttl(hops));
        if let Some(hops) = transmit.hops {
            set_hops(hops.into());
        }
        // Not tokio's way: it does not know of a new socket yet that it is writable.
        let sent = SockRef::from(&*own.io).send_to(&transmit.payload, &transmit.destination.into());
        if let Err(error) = sent {
            tracing::trace!(%error, "UDP datagram lost at the socket");
        }
        if transmit.hops.is_some() {
            set_hops(USUAL_HOPS);
        }
    }

    /// Closes what the engine does not use any more, and gives an endpoint to what may become a path.
    pub(super) fn tidy(&mut self, entry: &Arc<Entry>) {
        if self.open.is_empty() {
            self.full = false;
            return;
        }
        let agent = entry.agent();
        let unused: Vec<_> = self.open.keys().copied().filter(|socket| !agent.uses(*socket)).collect();
        let valid = agent.pairs().iter().filter(|pair| pair.is_valid());
        let valid: Vec<LocalSocket> = valid.map(|pair| pair.socket).collect();
        // An endpoint's own lock is held where its datagrams are given to the engine: none is dropped under the engine's.
        drop(agent);
        for socket in unused {
            self.open.remove(&socket);
        }
        for socket in valid {
            self.quic(entry, socket);
        }
    }

    /// QUIC on this socket, from now on.
    pub(super) fn quic(&mut self, entry: &Arc<Entry>, socket: LocalSocket) -> Option<&Endpoint> {
        let own = self.open.get_mut(&socket)?;
        if own.endpoint.is_none() {
            match endpoint(own.io.clone(), socket, entry.clone(), self.server.clone()) {
                Ok(endpoint) => {
                    own.endpoint = Some(endpoint);
                    own.reader = None;
                }
                Err(error) => tracing::debug!(%error, "no QUIC on this socket"),
            }
        }
        own.endpoint.as_ref().map(|endpoint| &endpoint.quic)
    }
}

fn open(
    ports: &RangeInclusive<u16>,
    socket: LocalSocket,
    entry: Arc<Entry>,
) -> Result<Own, super::BindError> {
    let io = socket::bind_ipv4(ports.clone())?;
    let io = Arc::new(UdpSocket::from_std(io).map_err(super::BindError::Socket)?);
    let reader = Task(tokio::spawn(read(io.clone(), socket, entry)));
    Ok(Own { io, reader: Some(reader), endpoint: None })
}

async fn read(io: Arc<UdpSocket>, socket: LocalSocket, entry: Arc<Entry>) {
    let mut buffer = [0; LONGEST];
    loop {
        // An error is a datagram's, not the socket's: somebody refused one of ours.
        let Ok((length, source)) = io.recv_from(&mut buffer).await else { continue };
        entry.receive(socket, source, &buffer[..length]);
    }
}

fn endpoint(
    io: Arc<UdpSocket>,
    socket: LocalSocket,
    entry: Arc<Entry>,
    server: Option<ServerConfig>,
) -> std::io::Result<OwnEndpoint> {
    let demux = Arc::new(Demux::of(socket));
    let direct = Arc::new(DirectSocket::on(io, demux.clone())?);
    let accepts = server.is_some();
    let quic = quic::endpoint(direct, server)?;
    let accepting = accepts.then(|| Task(tokio::spawn(accept::run(quic.clone(), demux.clone()))));
    Ok(OwnEndpoint { quic, _registration: demux.register(entry), _accepting: accepting })
}
