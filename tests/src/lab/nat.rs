//! What kinds of NAT a site can be behind, as nftables rules on its router.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// The NAT of a site's router, in the words of RFC 4787.
///
/// patchbay has presets for some of these. The lab has rules of its own, because a reboot must lead
/// to other mappings, and because a home router drops what it did not ask for: without that, the
/// router answers an early packet of the peer, the answer occupies the port, and the mapping moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NatKind {
    /// No NAT and no firewall: the device has a public address.
    None,
    /// Port-restricted cone: endpoint-independent mapping, address- and port-dependent filtering.
    Cone,
    /// Symmetric: a new random port for each destination, address- and port-dependent filtering.
    Symmetric,
    /// As [`NatKind::Cone`], and no UDP but DNS passes, in either direction.
    UdpBlocked,
    /// As [`NatKind::Cone`], and nothing passes but DNS and TCP connections to port 443.
    HttpsOnly,
}

impl NatKind {
    /// All kinds.
    pub const ALL: [Self; 5] = [Self::None, Self::Cone, Self::Symmetric, Self::UdpBlocked, Self::HttpsOnly];

    /// The rules of the router whose outer interface is `wan` with the address `address`, as one
    /// nftables transaction that replaces those of an earlier call. `boot` stands for everything
    /// that a reboot changes: a cone maps the port p to `p ^ (boot & 0x3ff)`, so ports from 1024 up
    /// stay there.
    pub(super) fn rules(self, wan: &str, address: Ipv4Addr, boot: u16) -> String {
        let mapping = match self {
            Self::None => return String::new(),
            Self::Cone | Self::UdpBlocked | Self::HttpsOnly => {
                let mask = boot & 0x3ff;
                format!(
                    "oifname {wan} meta l4proto udp snat ip to {address} : udp sport ^ {mask}
                     oifname {wan} meta l4proto tcp snat ip to {address} : tcp sport ^ {mask}
                     oifname {wan} snat ip to {address}"
                )
            }
            Self::Symmetric => format!("oifname {wan} masquerade fully-random"),
        };
        format!(
            "add table ip adit_nat
             delete table ip adit_nat
             table ip adit_nat {{
                 chain postrouting {{
                     type nat hook postrouting priority srcnat;
                     {mapping}
                 }}
                 chain input {{
                     type filter hook input priority filter;
                     iifname {wan} ct state established,related accept
                     iifname {wan} drop
                 }}
                 chain forward {{
                     type filter hook forward priority filter;
                     iifname {wan} ct state established,related accept
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
            Self::Cone => "cone",
            Self::Symmetric => "symmetric",
            Self::UdpBlocked => "udp-blocked",
            Self::HttpsOnly => "https-only",
        })
    }
}

impl FromStr for NatKind {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|kind| kind.to_string() == text).ok_or_else(|| {
            format!("no such NAT: {text:?} (there are none, cone, symmetric, udp-blocked, https-only)")
        })
    }
}
