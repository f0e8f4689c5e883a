//! NATs as RFC 4787 describes them, for one network behind each.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

/// How long home routers keep a mapping that nothing goes out by (RFC 4787 section 4.3 wants two minutes, many take less).
pub(crate) const IDLE: Duration = Duration::from_secs(30);

/// What stands between a network and the rest of the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Nothing: hosts have public addresses, everything comes in.
    Open,
    /// Hosts have public addresses; nothing comes in but from where something went.
    Firewall,
    /// Endpoint-independent mapping, no filtering.
    FullCone,
    /// Endpoint-independent mapping, address dependent filtering.
    AddressRestricted,
    /// Endpoint-independent mapping, address and port dependent filtering.
    PortRestricted,
    /// As a plain Linux router: the inside port is kept where it can be. What nobody asked for is rejected, and remembered: the
    /// mapping to its sender gets another port, and so do those to new destinations then.
    Rejecting,
    /// Address dependent mapping and filtering, random ports.
    AddressDependent,
    /// Address and port dependent mapping and filtering, random ports.
    Symmetric,
    /// The same with one port after the other, of which somebody else takes some.
    Sequential,
    /// No UDP goes through.
    Blocked,
}

impl Kind {
    pub(crate) const ALL: [Self; 10] = [
        Self::Open,
        Self::Firewall,
        Self::FullCone,
        Self::AddressRestricted,
        Self::PortRestricted,
        Self::Rejecting,
        Self::AddressDependent,
        Self::Symmetric,
        Self::Sequential,
        Self::Blocked,
    ];

    /// Hosts have public addresses.
    pub(crate) fn is_public(self) -> bool {
        matches!(self, Self::Open | Self::Firewall)
    }

    /// A new destination gets a port that nobody can tell.
    pub(crate) fn is_random(self) -> bool {
        matches!(self, Self::AddressDependent | Self::Symmetric)
    }
}

pub(crate) struct Nat {
    pub(crate) kind: Kind,
    public: IpAddr,
    /// Inside address, and the destination where it counts, to outside port.
    mappings: HashMap<(SocketAddr, Option<SocketAddr>), u16>,
    /// Outside port and remote address that was sent to, and when last.
    sent: HashMap<(u16, SocketAddr), Instant>,
    /// When what is too old was forgotten last.
    tidied: Option<Instant>,
    /// After so long without anything going out, a mapping and what it lets in are forgotten.
    pub(crate) idle: Duration,
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
    /// The provider's NAT, behind which this one is (RFC 6888).
    provider: Option<Box<Nat>>,
}

impl Nat {
    pub(crate) fn new(kind: Kind, public: IpAddr) -> Self {
        Self {
            kind,
            public,
            mappings: HashMap::new(),
            sent: HashMap::new(),
            tidied: None,
            idle: IDLE,
            rejected: HashSet::new(),
            newest: HashMap::new(),
            ports_used: 0,
            kept: HashMap::new(),
            came: HashMap::new(),
            hairpins: false,
            is_busy: true,
            provider: None,
        }
    }

    /// The provider puts a NAT of this kind before it: the two look to the world like one.
    pub(crate) fn put_behind(&mut self, provider: Kind) {
        let public = std::mem::replace(&mut self.public, Ipv4Addr::new(100, 64, 0, 1).into());
        self.provider = Some(Box::new(Self { idle: self.idle, ..Self::new(provider, public) }));
    }

    /// The kind that the world sees.
    pub(crate) fn outward_kind(&self) -> Kind {
        let Some(provider) = &self.provider else { return self.kind };
        match (self.kind, provider.kind) {
            (Kind::Blocked, _) => Kind::Blocked,
            // Whatever comes to it, for each destination it takes the next port.
            (_, Kind::Sequential) => Kind::Sequential,
            (home, provider) if home.is_random() || provider.is_random() => Kind::Symmetric,
            // Each of its ports gets another one there.
            (Kind::Sequential, _) => Kind::Symmetric,
            // What comes too early does not get to the router at home.
            (_, Kind::PortRestricted) => Kind::PortRestricted,
            (home, _) => home,
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

    /// Forgets what nothing has gone out by for too long.
    fn tidy(&mut self, now: Instant) {
        const EVERY: Duration = Duration::from_secs(1);
        if self.tidied.is_some_and(|tidied| now.saturating_duration_since(tidied) < EVERY) {
            return;
        }
        self.tidied = Some(now);
        let before = self.sent.len();
        self.sent.retain(|_, last| now.saturating_duration_since(*last) < self.idle);
        if self.sent.len() < before {
            let ports: HashSet<u16> = self.sent.keys().map(|(port, _)| *port).collect();
            self.mappings.retain(|_, port| ports.contains(port));
        }
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
        self.provider.as_ref().map_or(self.public, |provider| provider.public) == ip
    }

    /// The source address that the world sees.
    pub(crate) fn outbound(
        &mut self,
        now: Instant,
        inside: SocketAddr,
        destination: SocketAddr,
    ) -> Option<SocketAddr> {
        let mapped = self.map(now, inside, destination)?;
        match &mut self.provider {
            Some(provider) => provider.outbound(now, mapped, destination),
            None => Some(mapped),
        }
    }

    fn map(&mut self, now: Instant, inside: SocketAddr, destination: SocketAddr) -> Option<SocketAddr> {
        self.tidy(now);
        let key = match self.kind {
            Kind::Blocked => return None,
            Kind::Open => return Some(inside),
            Kind::Firewall => {
                self.sent.insert((inside.port(), destination), now);
                return Some(inside);
            }
            Kind::FullCone | Kind::AddressRestricted | Kind::PortRestricted => (inside, None),
            Kind::AddressDependent => (inside, Some(SocketAddr::new(destination.ip(), 0))),
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
        self.sent.insert((port, destination), now);
        Some(SocketAddr::new(self.public, port))
    }

    /// The inside address that a datagram is for, if it may come in.
    pub(crate) fn inbound(
        &mut self,
        now: Instant,
        source: SocketAddr,
        destination: SocketAddr,
    ) -> Option<SocketAddr> {
        let destination = match &mut self.provider {
            Some(provider) => provider.inbound(now, source, destination)?,
            None => destination,
        };
        self.tidy(now);
        let port = destination.port();
        if let Some(inside) = self.kept.get(&port).filter(|_| self.kind != Kind::Blocked) {
            self.came.insert((*inside, source), port);
            return Some(*inside);
        }
        let permitted = match self.kind {
            Kind::Blocked => return None,
            Kind::Open => return Some(destination),
            Kind::Firewall => return self.sent.contains_key(&(port, source)).then_some(destination),
            Kind::FullCone => true,
            Kind::AddressRestricted | Kind::AddressDependent => {
                self.sent.keys().any(|(from, to)| *from == port && to.ip() == source.ip())
            }
            Kind::PortRestricted | Kind::Rejecting | Kind::Symmetric | Kind::Sequential => {
                self.sent.contains_key(&(port, source))
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
