//! Address ranges that no entry opens by accident (RFC 6890 and its successors): they lead to the
//! agent itself, to its link, to a translator behind which any address may hide, or to the
//! credentials that a cloud hands to its machines.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::entry::Network;

/// A range of special addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Special {
    network: Network,
}

/// The special range that `address` (canonical) is in; the smallest, where they overlap.
pub fn range_of(address: IpAddr) -> Option<Special> {
    let v4 = V4.iter().map(|&(start, prefix)| (IpAddr::from(Ipv4Addr::from(start)), prefix));
    let v6 = V6.iter().map(|&(start, prefix)| (IpAddr::from(Ipv6Addr::from(start)), prefix));
    v4.chain(v6)
        .map(|(start, prefix)| Special { network: Network::of(start, prefix) })
        .filter(|special| special.network.contains(address))
        .max_by_key(|special| special.network.prefix())
}

impl Special {
    /// Whether `network` lies wholly within this range, so that it names it.
    pub(super) fn covers(self, network: &Network) -> bool {
        self.network.prefix() <= network.prefix() && self.network.contains(network.address())
    }
}

const V4: [([u8; 4], u8); 9] = [
    // "This network": most systems connect 0.0.0.0 to themselves.
    ([0, 0, 0, 0], 8),
    ([127, 0, 0, 0], 8),
    // Link-local (RFC 3927); the metadata service of most clouds.
    ([169, 254, 0, 0], 16),
    // Metadata services that are not link-local.
    ([100, 100, 100, 200], 32),
    ([168, 63, 129, 16], 32),
    // IETF protocol assignments, and the deprecated relay anycast of 6to4 (RFC 7526).
    ([192, 0, 0, 0], 24),
    ([192, 88, 99, 0], 24),
    // Multicast; reserved, and broadcast.
    ([224, 0, 0, 0], 4),
    ([240, 0, 0, 0], 4),
];

const V6: [([u16; 8], u8); 13] = [
    ([0, 0, 0, 0, 0, 0, 0, 0], 128),
    ([0, 0, 0, 0, 0, 0, 0, 1], 128),
    // IPv4-compatible (deprecated, RFC 4291 section 2.5.5.1) and IPv4-translated (RFC 2765). Mapped
    // addresses are unwrapped before they come here.
    ([0, 0, 0, 0, 0, 0, 0, 0], 96),
    ([0, 0, 0, 0, 0xffff, 0, 0, 0], 96),
    // NAT64 (RFC 6052, RFC 8215).
    ([0x64, 0xff9b, 0, 0, 0, 0, 0, 0], 96),
    ([0x64, 0xff9b, 1, 0, 0, 0, 0, 0], 48),
    // Discard (RFC 6666).
    ([0x100, 0, 0, 0, 0, 0, 0, 0], 64),
    // Teredo and other protocol assignments (RFC 2928), 6to4 (RFC 3056).
    ([0x2001, 0, 0, 0, 0, 0, 0, 0], 23),
    ([0x2002, 0, 0, 0, 0, 0, 0, 0], 16),
    // A metadata service.
    ([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254], 128),
    // Link-local, site-local (deprecated, RFC 3879), multicast.
    ([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10),
    ([0xfec0, 0, 0, 0, 0, 0, 0, 0], 10),
    ([0xff00, 0, 0, 0, 0, 0, 0, 0], 8),
];
