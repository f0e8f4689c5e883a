//! One entry of an allow list: `HOST:PORT[/udp]` or `CIDR:PORTS[/udp]`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::str::FromStr;

use adit_protocol::{Protocol, Target};

/// One entry. Ports are one or several of `PORT` and `FIRST-LAST`, separated by commas; IPv6 is in
/// brackets (`[fd00::/8]:443`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub(super) host: Host,
    ports: Vec<RangeInclusive<u16>>,
    protocol: Protocol,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Host {
    /// In lower case.
    Name(String),
    /// A single address, too.
    Network(Network),
}

/// A range of addresses of one family, canonical: no IPv4 in the clothes of IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Network {
    /// The first address of the range.
    address: IpAddr,
    prefix: u8,
}

impl Entry {
    /// Whether there are addresses with which this entry allows `target`.
    pub(super) fn may_match(&self, target: &Target) -> bool {
        self.protocol == target.protocol
            && self.ports.iter().any(|ports| ports.contains(&target.port))
            && match &self.host {
                Host::Name(name) => name == target.host(),
                Host::Network(network) => target.ip().is_none_or(|ip| network.contains(ip.to_canonical())),
            }
    }

    pub(super) fn is_localhost(&self) -> bool {
        matches!(&self.host, Host::Name(name) if name == "localhost" || name.ends_with(".localhost"))
    }
}

impl Network {
    /// The network of `prefix` bits that `address` is in.
    pub(super) fn of(address: IpAddr, prefix: u8) -> Self {
        let address = match address {
            IpAddr::V4(ip) => Ipv4Addr::from_bits(ip.to_bits() & mask(32, prefix) as u32).into(),
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & mask(128, prefix)).into(),
        };
        Self { address, prefix }
    }

    pub(super) fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4() && Self::of(address, self.prefix).address == self.address
    }

    pub(super) fn address(&self) -> IpAddr {
        self.address
    }

    pub(super) fn prefix(&self) -> u8 {
        self.prefix
    }

    fn is_single(&self) -> bool {
        self.prefix == if self.address.is_ipv4() { 32 } else { 128 }
    }

    fn parse(address: IpAddr, prefix: Option<&str>) -> Result<Self, Wrong> {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            Some(text) => {
                text.parse::<u8>().ok().filter(|prefix| *prefix <= bits).ok_or(Wrong::Prefix(bits))?
            }
            None => bits,
        };
        // ::ffff:10.0.0.0/104 is 10.0.0.0/8.
        let (address, prefix) = match (address.to_canonical(), address) {
            (ip @ IpAddr::V4(_), IpAddr::V6(_)) if prefix >= 96 => (ip, prefix - 96),
            _ => (address, prefix),
        };
        let network = Self::of(address, prefix);
        if network.address == address { Ok(network) } else { Err(Wrong::HostBits(network.to_string())) }
    }
}

/// The `prefix` high bits of a number of `bits` bits.
fn mask(bits: u32, prefix: u8) -> u128 {
    let ones = if bits == 128 { u128::MAX } else { (1 << bits) - 1 };
    let low = bits.saturating_sub(u32::from(prefix));
    ones & u128::MAX.checked_shl(low).unwrap_or(0)
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.address)?;
        if self.is_single() { Ok(()) } else { write!(f, "/{}", self.prefix) }
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Name(name) => write!(f, "{name}:")?,
            Host::Network(network) if network.address.is_ipv6() => write!(f, "[{network}]:")?,
            Host::Network(network) => write!(f, "{network}:")?,
        }
        for (index, ports) in self.ports.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            match (ports.start(), ports.end()) {
                (first, last) if first == last => write!(f, "{comma}{first}")?,
                (first, last) => write!(f, "{comma}{first}-{last}")?,
            }
        }
        if self.protocol == Protocol::Udp { f.write_str("/udp") } else { Ok(()) }
    }
}

impl FromStr for Entry {
    type Err = InvalidEntry;
    fn from_str(text: &str) -> Result<Self, InvalidEntry> {
        parse(text).map_err(|wrong| InvalidEntry { text: text.chars().take(100).collect(), wrong })
    }
}

fn parse(text: &str) -> Result<Entry, Wrong> {
    let (rest, protocol) = match text.strip_suffix("/udp") {
        Some(rest) => (rest, Protocol::Udp),
        None => (text.strip_suffix("/tcp").unwrap_or(text), Protocol::Tcp),
    };
    let (host, ports) = rest.rsplit_once(':').ok_or(Wrong::NoPort)?;
    // A port after the last colon of a bare IPv6 address would be a guess.
    if ports.ends_with(']') || (host.contains(':') && !host.starts_with('[')) {
        return Err(if host.contains('[') { Wrong::NoPort } else { Wrong::Brackets });
    }
    Ok(Entry { host: parse_host(host)?, ports: parse_ports(ports)?, protocol })
}

fn parse_host(text: &str) -> Result<Host, Wrong> {
    if let Some(inner) = text.strip_prefix('[') {
        // [fd00::/8] and [fd00::]/8 are both in use.
        let (inside, after) = inner.split_once(']').ok_or(Wrong::Brackets)?;
        let (address, prefix) = match (inside.split_once('/'), after.strip_prefix('/')) {
            (Some((address, prefix)), None) if after.is_empty() => (address, Some(prefix)),
            (None, Some(prefix)) => (inside, Some(prefix)),
            (None, None) if after.is_empty() => (inside, None),
            _ => return Err(Wrong::Brackets),
        };
        let address: Ipv6Addr = address.parse().map_err(|_| Wrong::Address)?;
        return Network::parse(address.into(), prefix).map(Host::Network);
    }
    if let Some((address, prefix)) = text.split_once('/') {
        let address: Ipv4Addr = address.parse().map_err(|_| Wrong::Address)?;
        return Network::parse(address.into(), Some(prefix)).map(Host::Network);
    }
    if let Ok(address) = text.parse::<Ipv4Addr>() {
        return Network::parse(address.into(), None).map(Host::Network);
    }
    // 0177.0.0.1, 0X7F.1, 127.1 or 2130706433: one resolver reads an address there, another one a name.
    let text = text.to_ascii_lowercase();
    let last = text.rsplit('.').next().unwrap_or_default();
    if last.strip_prefix("0x").unwrap_or(last).bytes().all(|b| b.is_ascii_hexdigit())
        && last.starts_with(|c: char| c.is_ascii_digit())
    {
        return Err(Wrong::Address);
    }
    Target::new(&text, 1, Protocol::Tcp)
        .map(|target| Host::Name(target.host().to_owned()))
        .map_err(|_| Wrong::Name)
}

fn parse_ports(text: &str) -> Result<Vec<RangeInclusive<u16>>, Wrong> {
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0).ok_or(Wrong::Ports);
    text.split(',')
        .map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let range = port(first)?..=port(last)?;
            if range.is_empty() { Err(Wrong::Ports) } else { Ok(range) }
        })
        .collect()
}

/// Not an entry of an allow list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} cannot be in an allow list: {wrong}")]
pub struct InvalidEntry {
    text: String,
    wrong: Wrong,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Wrong {
    #[error("expected HOST:PORT or CIDR:PORTS, for example 192.168.1.0/24:80,443 or db.local:53/udp")]
    NoPort,
    #[error("IPv6 addresses are written in brackets, for example [fd00::/8]:443")]
    Brackets,
    #[error("the address is not written in full, for example 10.0.0.0/8 or [fd00::/8]")]
    Address,
    #[error("the number behind the slash is 0 to {0}")]
    Prefix(u8),
    #[error("the address is not the first of its network; did you mean {0}?")]
    HostBits(String),
    #[error("that is no host name")]
    Name,
    #[error("ports are 1 to 65535, for example 80,443 or 1000-2000")]
    Ports,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        for (text, shown) in [
            ("127.0.0.1:22", "127.0.0.1:22"),
            ("127.0.0.1:22/tcp", "127.0.0.1:22"),
            ("Db.Internal:5432", "db.internal:5432"),
            ("10.0.0.0/8:80,443,1000-2000", "10.0.0.0/8:80,443,1000-2000"),
            ("0.0.0.0/0:1-65535/udp", "0.0.0.0/0:1-65535/udp"),
            ("[::1]:22", "[::1]:22"),
            ("[fd00::/8]:443/udp", "[fd00::/8]:443/udp"),
            ("[fd00::]/8:443", "[fd00::/8]:443"),
            ("[::/0]:53", "[::/0]:53"),
            ("[::ffff:10.0.0.0/104]:80", "10.0.0.0/8:80"),
            ("[::ffff:10.0.0.7]:80", "10.0.0.7:80"),
            ("10.0.0.7/32:80", "10.0.0.7:80"),
            ("3com.example:80", "3com.example:80"),
        ] {
            let entry: Entry = text.parse().unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(entry.to_string(), shown);
            assert_eq!(shown.parse::<Entry>().as_ref(), Ok(&entry));
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, why) in [
            ("", "expected HOST:PORT"),
            ("10.0.0.1", "expected HOST:PORT"),
            ("[::1]", "expected HOST:PORT"),
            ("::1:22", "brackets"),
            ("fd00::/8:22", "brackets"),
            ("[fd00::/8:22", "brackets"),
            ("[fd00::/8]/8:22", "brackets"),
            ("[db.internal]:22", "not written in full"),
            ("10/8:22", "not written in full"),
            ("0177.0.0.1:22", "not written in full"),
            ("2130706433:22", "not written in full"),
            ("0x7f000001:22", "not written in full"),
            ("0X7F.1:22", "not written in full"),
            ("127.1:22", "not written in full"),
            ("10.0.0.0/33:22", "0 to 32"),
            ("[fd00::/129]:22", "0 to 128"),
            ("10.0.0.0/:22", "0 to 32"),
            ("10.0.0.5/8:22", "did you mean 10.0.0.0/8"),
            ("a b:22", "no host name"),
            ("*:22", "no host name"),
            ("host:", "ports"),
            ("host:0", "ports"),
            ("host:65536", "ports"),
            ("host:20-10", "ports"),
            ("host:22,", "ports"),
            ("host:ssh", "ports"),
            ("host:22/sctp", "ports"),
        ] {
            match text.parse::<Entry>() {
                Ok(entry) => panic!("{text:?} was read as {entry}"),
                Err(error) => assert!(error.to_string().contains(why), "{text:?}: {error}"),
            }
        }
    }
}
