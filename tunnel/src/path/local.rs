//! Which of our sockets a datagram goes through. One serves all ordinary paths; a path that is hard to find may have one of
//! its own.

use std::fmt;
use std::net::SocketAddr;

/// A UDP socket of this end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LocalSocket(pub(super) u32);

impl LocalSocket {
    /// The one that the device has for all its sessions. Every other is opened when the first datagram is to go through it,
    /// serves one [`PathAgent`](super::PathAgent), and is closed when [`uses`](super::PathAgent::uses) denies it.
    pub const DEVICE: Self = Self(0);
}

/// A path: from a socket of ours to an address of the peer's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Path {
    /// Our socket.
    pub socket: LocalSocket,
    /// Where datagrams go to, and come from.
    pub remote: SocketAddr,
}

impl Path {
    /// From the device's own socket.
    pub fn to(remote: SocketAddr) -> Self {
        Self { socket: LocalSocket::DEVICE, remote }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.socket {
            LocalSocket::DEVICE => write!(f, "{}", self.remote),
            LocalSocket(number) => write!(f, "{} (socket {number})", self.remote),
        }
    }
}
