//! NATs as RFC 4787 describes them, for one network behind each.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

/// What stands between a network and the rest of the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Nothing: hosts have public addresses, everything comes in.
    Open,
    /// Hosts have public addresses; nothing comes in but from where something went.
    Firewall,
    /// Endpoint-independent mapping, no filtering.
    FullCone,
    /// Endpoint-independent mapping, address and port dependent filtering.
    PortRestricted,
    /// As a plain Linux router: the inside port is kept where it can be. What nobody asked for is rejected, and remembered: the
    /// mapping to its sender gets another port, and so do those to new destinations then.
    Rejecting,
    /// Address and port dependent mapping and filtering, random ports.
    Symmetric,
    /// The same with one port after the other, of which somebody else takes some.
    Sequential,
    /// No UDP goes through.
    Blocked,
}

impl Kind {
    pub(crate) const ALL: [Self; 8] = [
        Self::Open,
        Self::Firewall,
        Self::FullCone,
        Self::PortRestricted,
        Self::Rejecting,
        Self::Symmetric,
        Self::Sequential,
        Self::Blocked,
    ];

    /// Hosts have public addresses.
    pub(crate) fn is_public(self) -> bool {
        matches!(self, Self::Open | Self::Firewall)
    }
}

pub(crate) struct Nat {
    pub(crate) kind: Kind,
    public: IpAddr,
    /// Inside address, and the destination where it counts, to outside port.
    mappings: HashMap<(SocketAddr, Option<SocketAddr>), u16>,
    /// Outside port and remote address that was sent to.
    sent: HashSet<(u16, SocketAddr)>,
    /// Outside port and remote address that came too early.
    rejected: HashSet<(u16, SocketAddr)>,
    /// The outside port that an inside address used last, for a new destination.
    newest: HashMap<SocketAddr, u16>,
    ports_used: u16,
    /// Outside ports that it keeps for inside addresses, since somebody asked for it.
    kept: HashMap<u16, SocketAddr>,
    /// Inside and remote address of what came in by a port that is kept: answers leave from there.
    came: HashMap<(SocketAddr, SocketAddr), u16>,
    /// Whether what is inside reaches it by its outside address (RFC 4787 section 6).
    pub(crate) hairpins: bool,
    /// Whether others take ports, too, where it takes one after the other.
    pub(crate) is_busy: bool,
}

impl Nat {
    pub(crate) fn new(kind: Kind, public: IpAddr) -> Self {
        Self {
            kind,
            public,
            mappings: HashMap::new(),
            sent: HashSet::new(),
            rejected: HashSet::new(),
            newest: HashMap::new(),
            ports_used: 0,
            kept: HashMap::new(),
            came: HashMap::new(),
            hairpins: false,
            is_busy: true,
        }
    }

    /// Keeps an outside port for an inside address (RFC 6887).
    pub(crate) fn keep(&mut self, inside: SocketAddr) -> SocketAddr {
        let port = 9_000 + self.kept.len() as u16;
        self.kept.insert(port, inside);
        SocketAddr::new(self.public, port)
    }

    /// Somebody else takes so many ports.
    pub(crate) fn take(&mut self, ports: u16) {
        self.ports_used += ports;
    }

    /// Forgets everything; new mappings get other ports.
    pub(crate) fn reboot(&mut self) {
        self.mappings.clear();
        self.sent.clear();
        self.rejected.clear();
        self.newest.clear();
        self.kept.clear();
        self.came.clear();
        self.ports_used += 5_000;
        self.ports_used %= 30_000;
    }

    pub(crate) fn is_public(&self, ip: IpAddr) -> bool {
        self.public == ip
    }

    /// The source address that the world sees.
    pub(crate) fn outbound(&mut self, inside: SocketAddr, destination: SocketAddr) -> Option<SocketAddr> {
        let key = match self.kind {
            Kind::Blocked => return None,
            Kind::Open => return Some(inside),
            Kind::Firewall => {
                self.sent.insert((inside.port(), destination));
                return Some(inside);
            }
            Kind::FullCone | Kind::PortRestricted => (inside, None),
            Kind::Symmetric | Kind::Sequential | Kind::Rejecting => (inside, Some(destination)),
        };
        if let Some(port) = self.came.get(&(inside, destination)) {
            return Some(SocketAddr::new(self.public, *port));
        }
        let is_new = !self.mappings.contains_key(&key);
        if self.kind == Kind::Rejecting && is_new {
            let wanted = self.newest.get(&inside).copied().unwrap_or(inside.port());
            if !self.rejected.contains(&(wanted, destination)) {
                self.mappings.insert(key, wanted);
            }
        }
        let port = *self.mappings.entry(key).or_insert_with(|| {
            self.ports_used += 1;
            match self.kind {
                // Every third one is somebody else's.
                Kind::Sequential if self.is_busy => 10_000 + self.ports_used + self.ports_used / 2,
                Kind::Sequential => 10_000 + self.ports_used,
                // Meets every port of a range once.
                _ => 30_000 + (u32::from(self.ports_used) * 7_919 % 35_000) as u16,
            }
        });
        if is_new {
            self.newest.insert(inside, port);
        }
        self.sent.insert((port, destination));
        Some(SocketAddr::new(self.public, port))
    }

    /// The inside address that a datagram is for, if it may come in.
    pub(crate) fn inbound(&mut self, source: SocketAddr, destination: SocketAddr) -> Option<SocketAddr> {
        let port = destination.port();
        if let Some(inside) = self.kept.get(&port).filter(|_| self.kind != Kind::Blocked) {
            self.came.insert((*inside, source), port);
            return Some(*inside);
        }
        let permitted = match self.kind {
            Kind::Blocked => return None,
            Kind::Open => return Some(destination),
            Kind::Firewall => return self.sent.contains(&(port, source)).then_some(destination),
            Kind::FullCone => true,
            Kind::PortRestricted | Kind::Rejecting | Kind::Symmetric | Kind::Sequential => {
                self.sent.contains(&(port, source))
            }
        };
        if self.kind == Kind::Rejecting && !permitted {
            self.rejected.insert((port, source));
        }
        let mapping = self.mappings.iter().find(|(_, outside)| **outside == port)?;
        if permitted {
            self.came.remove(&(mapping.0.0, source));
        }
        permitted.then_some(mapping.0.0)
    }
}
