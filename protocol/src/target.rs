//! Targets: what a technician asks an agent to connect to.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

/// Longest host name accepted, in bytes (RFC 1035 section 2.3.4).
pub const MAX_HOST: usize = 255;

/// The transport protocol of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// A byte stream.
    Tcp,
    /// Datagrams.
    Udp,
}

/// `HOST:PORT[/udp]` as seen from the agent. The host is a name, an IPv4 address, or an IPv6 address
/// in brackets.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    host: String,
    /// TCP or UDP port, 1 to 65535.
    pub port: u16,
    /// TCP unless said otherwise.
    pub protocol: Protocol,
}

impl Target {
    /// A target from its parts. `host` has no brackets.
    ///
    /// # Errors
    /// [`InvalidTarget`] when the host is empty, too long, or holds a character that no host name and
    /// no address has, or when the port is 0.
    pub fn new(host: &str, port: u16, protocol: Protocol) -> Result<Self, InvalidTarget> {
        let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'-' | b'_');
        let is_name = !host.is_empty() && host.len() <= MAX_HOST && host.bytes().all(allowed);
        if (!is_name && host.parse::<Ipv6Addr>().is_err()) || port == 0 {
            return Err(InvalidTarget);
        }
        Ok(Self { host: host.to_ascii_lowercase(), port, protocol })
    }

    /// The host, without brackets, in lower case.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The host as an address, when it is written as one.
    pub fn ip(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)?;
        } else {
            write!(f, "{}:{}", self.host, self.port)?;
        }
        if self.protocol == Protocol::Udp { f.write_str("/udp") } else { Ok(()) }
    }
}

impl FromStr for Target {
    type Err = InvalidTarget;
    fn from_str(text: &str) -> Result<Self, InvalidTarget> {
        let (address, protocol) = match text.strip_suffix("/udp") {
            Some(address) => (address, Protocol::Udp),
            None => (text.strip_suffix("/tcp").unwrap_or(text), Protocol::Tcp),
        };
        let (host, port) = address.rsplit_once(':').ok_or(InvalidTarget)?;
        let host = match host.strip_prefix('[') {
            Some(rest) => {
                let inner = rest.strip_suffix(']').ok_or(InvalidTarget)?;
                inner.parse::<Ipv6Addr>().map_err(|_| InvalidTarget)?;
                inner
            }
            None if host.contains(':') => return Err(InvalidTarget),
            None => host,
        };
        Target::new(host, port.parse().map_err(|_| InvalidTarget)?, protocol)
    }
}

/// What a session is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Wanted {
    /// Every target that the agent allows, written `any`: for proxies, which learn later where to. An agent that does
    /// not know the word takes it for no target.
    Any,
    /// This one.
    One(Target),
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str(ANY),
            Self::One(target) => target.fmt(f),
        }
    }
}

impl FromStr for Wanted {
    type Err = InvalidTarget;
    fn from_str(text: &str) -> Result<Self, InvalidTarget> {
        if text == ANY { Ok(Self::Any) } else { text.parse().map(Self::One) }
    }
}

const ANY: &str = "any";

/// Not of the form `HOST:PORT[/udp]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a target: expected HOST:PORT or HOST:PORT/udp, IPv6 addresses in brackets")]
pub struct InvalidTarget;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_usual_forms() {
        for text in ["127.0.0.1:3389", "db.internal:5432", "[::1]:22", "10.0.0.53:53/udp"] {
            assert_eq!(text.parse::<Target>().map(|t| t.to_string()), Ok(text.to_owned()));
        }
        assert_eq!("Web:80/tcp".parse::<Target>().map(|t| t.to_string()), Ok("web:80".to_owned()));
    }

    #[test]
    fn any_is_a_word_of_its_own() {
        for (text, wanted) in
            [("any", Wanted::Any), ("any:1", Wanted::One("any:1".parse().expect("a target")))]
        {
            assert_eq!(text.parse(), Ok(wanted.clone()));
            assert_eq!(wanted.to_string(), text);
        }
        assert_eq!("any".parse::<Target>(), Err(InvalidTarget));
    }

    #[test]
    fn refuses_what_is_no_target() {
        for text in
            ["", "host", ":80", "host:0", "host:65536", "::1:22", "[::1:22", "a b:1", "a\u{7}:1", "[x]:1"]
        {
            assert_eq!(text.parse::<Target>(), Err(InvalidTarget), "{text:?}");
        }
    }
}
