//! From where a session's door may be used.

use std::net::IpAddr;

use crate::penalty::network;

/// The networks that may: one of each IP version, because programs take either.
pub(crate) struct Sources {
    pinned: [Option<IpAddr>; 2],
    exact: bool,
}

impl Sources {
    /// `exact`: no other than this one, not even one of the other IP version.
    pub(crate) fn new(source: IpAddr, exact: bool) -> Self {
        let mut sources = Self { pinned: [None; 2], exact };
        sources.pin(source);
        sources
    }

    /// Whether somebody from there may be the one that it is for.
    pub(crate) fn may(&self, from: IpAddr) -> bool {
        match self.pinned[version(from)] {
            Some(pinned) => pinned == network(from),
            None => !self.exact,
        }
    }

    /// Whether that is the network of the one that it is for.
    pub(crate) fn has(&self, from: IpAddr) -> bool {
        self.pinned[version(from)] == Some(network(from))
    }

    /// Those of them that are known.
    pub(crate) fn known(&self) -> impl Iterator<Item = IpAddr> {
        self.pinned.into_iter().flatten()
    }

    /// The first one of its IP version stays.
    pub(crate) fn pin(&mut self, from: IpAddr) {
        self.pinned[version(from)].get_or_insert(network(from));
    }
}

/// 0 for IPv4, 1 for IPv6.
pub(crate) fn version(ip: IpAddr) -> usize {
    usize::from(ip.to_canonical().is_ipv6())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_of_each_version() {
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        let mut sources = Sources::new(ip("192.0.2.1"), false);
        assert!(
            sources.may(ip("192.0.2.1"))
                && sources.may(ip("::ffff:192.0.2.1"))
                && !sources.may(ip("192.0.2.2"))
        );
        assert!(sources.may(ip("2001:db8::1")) && !sources.has(ip("2001:db8::1")));
        sources.pin(ip("2001:db8::1"));
        sources.pin(ip("2001:db8:1::1"));
        assert!(sources.may(ip("2001:db8::2")) && !sources.may(ip("2001:db8:1::1")));
        let exact = Sources::new(ip("2001:db8::1"), true);
        assert!(exact.may(ip("2001:db8::ffff")) && !exact.may(ip("192.0.2.1")));
    }
}
