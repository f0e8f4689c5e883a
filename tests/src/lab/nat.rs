//! What kinds of NAT a site can be behind, as nftables rules on its router.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use patchbay::IpSupport;

use super::port_mapper;

/// So many ports a [`NatKind::Sequential`] takes in turn, before it begins anew.
const SEQUENCE: u32 = 4096;

/// The NAT of a site's router, in the words of RFC 4787.
///
/// patchbay has presets for some of these. The lab has rules of its own, because a reboot must lead
/// to other mappings, and because a home router drops what it did not ask for: without that, the
/// router answers an early packet of the peer, the answer occupies the port, and the mapping moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NatKind {
    /// No NAT and no firewall: the device has a public address.
    None,
    /// No NAT: the device has a public address, and the router drops what it did not ask for.
    Firewall,
    /// Port-restricted cone: endpoint-independent mapping, address- and port-dependent filtering.
    Cone,
    /// Endpoint-independent mapping; once something has gone out from a port, everybody gets in there.
    FullCone,
    /// Endpoint-independent mapping, address-dependent filtering.
    AddressRestricted,
    /// As [`NatKind::Cone`], on a router that rejects what it did not ask for, and remembers it: a plain Linux masquerade.
    Rejecting,
    /// [`NatKind::Cone`] at home behind [`NatKind::Cone`] at the provider's.
    CgnatCone,
    /// [`NatKind::Cone`] at home behind [`NatKind::Symmetric`] at the provider's.
    CgnatSymmetric,
    /// Symmetric: a new random port for each destination, address- and port-dependent filtering.
    Symmetric,
    /// As [`NatKind::Symmetric`], with one port after the other.
    Sequential,
    /// As [`NatKind::Cone`], and no UDP but DNS passes, in either direction.
    UdpBlocked,
    /// As [`NatKind::Cone`], and nothing passes but DNS and TCP connections to port 443.
    HttpsOnly,
    /// As [`NatKind::Cone`], and beside it IPv6 as [`NatKind::Firewall`] has it.
    DualStack,
    /// IPv6 as [`NatKind::Firewall`] has it, and no IPv4 at all.
    Ipv6Only,
    /// As [`NatKind::Symmetric`], on a router that maps ports on request, by PCP (RFC 6887).
    Pcp,
    /// The same by NAT-PMP (RFC 6886).
    NatPmp,
    /// The same by UPnP IGD.
    Upnp,
}

impl NatKind {
    /// All kinds.
    pub const ALL: [Self; 17] = [
        Self::None,
        Self::Firewall,
        Self::Cone,
        Self::FullCone,
        Self::AddressRestricted,
        Self::Rejecting,
        Self::CgnatCone,
        Self::CgnatSymmetric,
        Self::Symmetric,
        Self::Sequential,
        Self::UdpBlocked,
        Self::HttpsOnly,
        Self::DualStack,
        Self::Ipv6Only,
        Self::Pcp,
        Self::NatPmp,
        Self::Upnp,
    ];

    /// How its router is asked for ports.
    pub(super) fn port_mapper(self) -> Option<port_mapper::Protocol> {
        match self {
            Self::Pcp => Some(port_mapper::Protocol::Pcp),
            Self::NatPmp => Some(port_mapper::Protocol::NatPmp),
            Self::Upnp => Some(port_mapper::Protocol::Upnp),
            _ => None,
        }
    }

    /// The router maps ports on request.
    pub fn maps_ports(self) -> bool {
        self.port_mapper().is_some()
    }

    /// The device has an IPv6 address.
    pub fn has_ipv6(self) -> bool {
        self.ip_support().has_v6()
    }

    pub(super) fn ip_support(self) -> IpSupport {
        match self {
            // Its device loses its IPv4 addresses afterwards: patchbay's routers behind routers must have them.
            Self::DualStack | Self::Ipv6Only => IpSupport::DualStack,
            _ => IpSupport::V4Only,
        }
    }

    /// The device's IPv4 address is its own in the whole internet.
    pub(super) fn is_public(self) -> bool {
        matches!(self, Self::None | Self::Firewall)
    }

    /// The NAT at the provider's, if there is one.
    pub(super) fn carrier(self) -> Option<Self> {
        match self {
            Self::CgnatCone => Some(Self::Cone),
            Self::CgnatSymmetric => Some(Self::Symmetric),
            _ => None,
        }
    }

    /// The rules of the router whose outer interface is `wan` with the address `address`, as one
    /// nftables transaction that replaces those of an earlier call. `boot` stands for everything
    /// that a reboot changes: a cone maps the port p to `p ^ (boot & 0x3ff)`, so ports from 1024 up
    /// stay there. `device` is whom the less restricted kinds let others reach; they keep ports as they are.
    pub(super) fn rules(self, wan: &str, address: Ipv4Addr, device: Ipv4Addr, boot: u16) -> String {
        // Who may come in, beside answers: those whom this set lists.
        let (open_to, element, inbound) = match self {
            Self::FullCone => ("inet_service", "udp sport", "udp dport"),
            Self::AddressRestricted => {
                ("ipv4_addr . inet_service", "ip daddr . udp sport", "ip saddr . udp dport")
            }
            _ => ("inet_service", "", ""),
        };
        let (note, admit) = match element {
            "" => (String::new(), String::new()),
            element => (
                format!("oifname {wan} ip protocol udp add @open {{ {element} }}"),
                format!("iifname {wan} {inbound} @open dnat ip to {device}"),
            ),
        };
        let input = match self {
            Self::Rejecting => String::new(),
            _ => format!("iifname {wan} drop"),
        };
        let mapping = match self {
            Self::None => return String::new(),
            Self::Firewall => String::new(),
            Self::Rejecting => format!("oifname {wan} masquerade"),
            Self::FullCone | Self::AddressRestricted => format!("oifname {wan} snat ip to {address}"),
            Self::Cone
            | Self::UdpBlocked
            | Self::HttpsOnly
            | Self::DualStack
            | Self::Ipv6Only
            | Self::CgnatCone
            | Self::CgnatSymmetric => {
                let mask = boot & 0x3ff;
                format!(
                    "oifname {wan} meta l4proto udp snat ip to {address} : udp sport ^ {mask}
                     oifname {wan} meta l4proto tcp snat ip to {address} : tcp sport ^ {mask}
                     oifname {wan} snat ip to {address}"
                )
            }
            Self::Symmetric | Self::Pcp | Self::NatPmp | Self::Upnp => {
                format!("oifname {wan} masquerade fully-random")
            }
            Self::Sequential => {
                let first = 20_000 + u32::from(boot) * 16;
                let ports =
                    (0..SEQUENCE).map(|n| format!("{n} : {}", first + n)).collect::<Vec<_>>().join(", ");
                format!(
                    "oifname {wan} meta l4proto udp snat ip to {address} : numgen inc mod {SEQUENCE} map {{ {ports} }}
                     oifname {wan} masquerade fully-random"
                )
            }
        };
        format!(
            "add table ip adit_nat
             delete table ip adit_nat
             add table inet adit_firewall
             delete table inet adit_firewall
             table ip adit_nat {{
                 set open {{ type {open_to}; flags dynamic,timeout; timeout 120s; }}
                 chain note {{
                     type filter hook forward priority filter;
                     {note}
                 }}
                 chain prerouting {{
                     type nat hook prerouting priority dstnat;
                     {admit}
                 }}
                 chain postrouting {{
                     type nat hook postrouting priority srcnat;
                     {mapping}
                 }}
             }}
             table inet adit_firewall {{
                 chain input {{
                     type filter hook input priority filter;
                     iifname {wan} icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert }} accept
                     iifname {wan} ct state established,related accept
                     {input}
                 }}
                 chain forward {{
                     type filter hook forward priority filter;
                     iifname {wan} ct state established,related accept
                     iifname {wan} ct status dnat accept
                     iifname {wan} drop
                 }}
             }}"
        )
    }
}

impl fmt::Display for NatKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Firewall => "firewall",
            Self::Cone => "cone",
            Self::FullCone => "full-cone",
            Self::AddressRestricted => "address-restricted",
            Self::Rejecting => "rejecting",
            Self::CgnatCone => "cgnat-cone",
            Self::CgnatSymmetric => "cgnat-symmetric",
            Self::Symmetric => "symmetric",
            Self::Sequential => "sequential",
            Self::UdpBlocked => "udp-blocked",
            Self::HttpsOnly => "https-only",
            Self::DualStack => "dual-stack",
            Self::Ipv6Only => "ipv6-only",
            Self::Pcp => "pcp",
            Self::NatPmp => "nat-pmp",
            Self::Upnp => "upnp",
        })
    }
}

impl FromStr for NatKind {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|kind| kind.to_string() == text).ok_or_else(|| {
            let all = Self::ALL.map(|kind| kind.to_string()).join(", ");
            format!("no such NAT: {text:?} (there are {all})")
        })
    }
}
