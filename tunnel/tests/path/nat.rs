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
    /// Address and port dependent mapping and filtering, random ports.
    Symmetric,
    /// The same with one port after the other, of which somebody else takes some.
    Sequential,
    /// No UDP goes through.
    Blocked,
}

impl Kind {
    pub(crate) const ALL: [Self; 7] = [
        Self::Open,
        Self::Firewall,
        Self::FullCone,
        Self::PortRestricted,
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
    ports_used: u16,
}

impl Nat {
    pub(crate) fn new(kind: Kind, public: IpAddr) -> Self {
        Self { kind, public, mappings: HashMap::new(), sent: HashSet::new(), ports_used: 0 }
    }

    /// Forgets everything; new mappings get other ports.
    pub(crate) fn reboot(&mut self) {
        self.mappings.clear();
        self.sent.clear();
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
            Kind::Symmetric | Kind::Sequential => (inside, Some(destination)),
        };
        let port = *self.mappings.entry(key).or_insert_with(|| {
            self.ports_used += 1;
            match self.kind {
                // Every third one is somebody else's.
                Kind::Sequential => 10_000 + self.ports_used + self.ports_used / 2,
                // Meets every port of a range once.
                _ => 30_000 + (u32::from(self.ports_used) * 7_919 % 35_000) as u16,
            }
        });
        self.sent.insert((port, destination));
        Some(SocketAddr::new(self.public, port))
    }

    /// The inside address that a datagram is for, if it may come in.
    pub(crate) fn inbound(&self, source: SocketAddr, destination: SocketAddr) -> Option<SocketAddr> {
        let port = destination.port();
        let permitted = match self.kind {
            Kind::Blocked => return None,
            Kind::Open => return Some(destination),
            Kind::Firewall => return self.sent.contains(&(port, source)).then_some(destination),
            Kind::FullCone => true,
            Kind::PortRestricted | Kind::Symmetric | Kind::Sequential => self.sent.contains(&(port, source)),
        };
        let mapping = self.mappings.iter().find(|(_, outside)| **outside == port)?;
        permitted.then_some(mapping.0.0)
    }
}
