//! Transport addresses at which an end may be reached.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Where a candidate comes from (RFC 8445 section 5.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CandidateKind {
    /// An address of an interface.
    Host,
    /// The address that a STUN server saw.
    ServerReflexive,
    /// The address that the peer saw, in a check.
    PeerReflexive,
    /// An address that a NAT is expected to use next: one that counts its ports up or down (RFC 5128 section 3.4).
    Predicted,
    /// An address that leads here beside the ordinary ones: one that the router in front keeps for this end, by a port mapping
    /// (RFC 6886, RFC 6887) or because somebody has written it down, or one of a VPN.
    Mapped,
}

impl CandidateKind {
    /// RFC 8445 section 5.1.2.2, its recommended values.
    fn type_preference(self) -> u32 {
        match self {
            Self::Host => 126,
            Self::PeerReflexive => 110,
            Self::ServerReflexive => 100,
            // Ours: it may lead through a VPN.
            Self::Mapped => 90,
            // Ours: below all that is known, and above relayed (0).
            Self::Predicted => 50,
        }
    }

    /// RFC 8445 section 5.1.2.1, for the only component and with no preference among addresses.
    pub fn priority(self) -> u32 {
        const LOCAL_PREFERENCE: u32 = 65_535;
        const COMPONENT: u32 = 1;
        (self.type_preference() << 24) + (LOCAL_PREFERENCE << 8) + (256 - COMPONENT)
    }
}

/// A transport address and where it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Candidate {
    /// Where it comes from.
    pub kind: CandidateKind,
    /// The address.
    pub address: SocketAddr,
}

/// Whether a check may be sent to `remote`, an address that somebody else named. Loopback and
/// link-local addresses mean something only to an end that offers such addresses itself, and IPv6 ones only to an end that
/// has IPv6; one without IPv4 has IPv6.
pub(super) fn may_check(remote: SocketAddr, hosts: &[SocketAddr]) -> bool {
    let reaches = match remote.ip() {
        IpAddr::V4(ip) => {
            let offers = |scope: fn(&Ipv4Addr) -> bool| {
                hosts.iter().any(|host| matches!(host.ip(), IpAddr::V4(ip) if scope(&ip)))
            };
            let [first, ..] = ip.octets();
            // 224 and above: multicast, reserved, broadcast
            (1..224).contains(&first)
                && (hosts.is_empty() || hosts.iter().any(SocketAddr::is_ipv4))
                && (!ip.is_loopback() || offers(Ipv4Addr::is_loopback))
                && (!ip.is_link_local() || offers(Ipv4Addr::is_link_local))
        }
        IpAddr::V6(ip) => is_node(ip) && hosts.iter().any(SocketAddr::is_ipv6),
    };
    reaches && remote.port() != 0
}

/// Whether this address means another machine elsewhere: what it names is near, or behind a VPN (RFC 1918, RFC 3927, RFC 4193,
/// RFC 4291 section 2.5, RFC 6598).
pub fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let [first, second, ..] = ip.octets();
            ip.is_private() || ip.is_loopback() || ip.is_link_local() || (first == 100 && second & 0xc0 == 64)
        }
        IpAddr::V6(ip) => ip.is_unique_local() || ip.is_loopback() || ip.is_unicast_link_local(),
    }
}

/// Whether this is the address of one machine: global (2000::/3) or unique local (fc00::/7), and none with an IPv4 address in
/// it, by which somebody could aim at what the rules for IPv4 keep him from (6to4, Teredo; RFC 6890).
fn is_node(ip: Ipv6Addr) -> bool {
    let [first, second, ..] = ip.segments();
    let translated = first == 0x2002 || (first, second) == (0x2001, 0);
    (first & 0xe000 == 0x2000 && !translated) || ip.is_unique_local()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn addresses_that_nobody_may_aim_us_at() {
        let hosts = [address("192.168.1.2:40000")];
        for text in [
            "0.0.0.0:1",
            "0.1.2.3:1",
            "127.0.0.1:1",
            "127.9.9.9:1",
            "169.254.1.1:1",
            "224.0.0.251:5353",
            "240.0.0.1:1",
            "255.255.255.255:1",
            "198.51.100.1:0",
            "[2001:db8::1]:1",
        ] {
            assert!(!may_check(address(text), &hosts), "{text}");
        }
        let hosts = [address("[2001:db8::2]:40000")];
        for text in [
            "[::]:1",
            "[::1]:1",
            "[::ffff:192.0.2.1]:1",
            "[::192.0.2.1]:1",
            "[64:ff9b::c000:201]:1",
            "[2002:c000:201::1]:1",
            "[2001:0:1::1]:1",
            "[fe80::1]:1",
            "[ff02::1]:1",
            "[2001:db8::1]:0",
            "192.0.2.1:1",
        ] {
            assert!(!may_check(address(text), &hosts), "{text}");
        }
        for text in ["[2001:db8::1]:1", "[fd00::1]:40000"] {
            assert!(may_check(address(text), &hosts), "{text}");
        }
        let hosts = [address("192.168.1.2:40000")];
        for text in ["192.168.1.3:40000", "10.0.0.1:1", "198.51.100.1:65535", "100.64.0.1:1"] {
            assert!(may_check(address(text), &hosts), "{text}");
        }
    }

    #[test]
    fn loopback_and_link_local_among_their_own() {
        assert!(may_check(address("127.0.0.1:1"), &[address("127.0.0.1:2")]));
        assert!(may_check(address("169.254.1.1:1"), &[address("169.254.2.2:2")]));
        assert!(!may_check(address("169.254.1.1:1"), &[address("127.0.0.1:2")]));
        assert!(!may_check(address("127.0.0.1:1"), &[]));
    }

    #[test]
    fn priorities_of_rfc_8445() {
        assert_eq!(CandidateKind::Host.priority(), 2_130_706_431);
        assert!(CandidateKind::PeerReflexive.priority() > CandidateKind::ServerReflexive.priority());
    }
}
