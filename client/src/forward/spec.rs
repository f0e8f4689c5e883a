//! `[BIND:]PORT:HOST:PORT[/udp]`, as with `ssh -L`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use adit_protocol::{Target, Wanted};

/// Ports that are chosen for port 0: below the ephemeral ports of most systems.
const FIRST_PORT: u16 = 20_000;
const PORTS: u16 = 20_000;

/// One local port and where it leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardSpec {
    /// The local address; 127.0.0.1 unless written. Others than loopback let others in, so nothing but
    /// writing it makes it so.
    pub bind: IpAddr,
    /// The local port; 0: one is chosen.
    pub port: u16,
    /// Where it leads, as seen from the agent.
    pub target: Target,
}

impl fmt::Display for ForwardSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bind {
            IpAddr::V4(ip) => write!(f, "{ip}:{}:{}", self.port, self.target),
            IpAddr::V6(ip) => write!(f, "[{ip}]:{}:{}", self.port, self.target),
        }
    }
}

impl FromStr for ForwardSpec {
    type Err = InvalidForward;
    fn from_str(text: &str) -> Result<Self, InvalidForward> {
        let (bind, port, target) = match split(text)?.as_slice() {
            [port, host, target_port] => (None, *port, format!("{host}:{target_port}")),
            [bind, port, host, target_port] => (Some(*bind), *port, format!("{host}:{target_port}")),
            _ => return Err(InvalidForward::Form),
        };
        let port = port.parse().map_err(|_| InvalidForward::Port(port.to_owned()))?;
        let target = target.parse().map_err(|_| InvalidForward::Target(target))?;
        let bind = bind.map_or(Ok(Ipv4Addr::LOCALHOST.into()), parse_bind)?;
        Ok(Self { bind, port, target })
    }
}

/// `[BIND:]PORT`, as with `ssh -D`: where a local proxy listens. 127.0.0.1 unless written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProxySpec(pub SocketAddr);

impl FromStr for ProxySpec {
    type Err = InvalidForward;
    fn from_str(text: &str) -> Result<Self, InvalidForward> {
        let (bind, port) = match split(text)?.as_slice() {
            [port] => (Ipv4Addr::LOCALHOST.into(), *port),
            [bind, port] => (parse_bind(bind)?, *port),
            _ => return Err(InvalidForward::ProxyForm),
        };
        let port = port.parse().map_err(|_| InvalidForward::Port(port.to_owned()))?;
        Ok(Self(SocketAddr::new(bind, port)))
    }
}

/// The local ports for `agent` and `target` when none is asked for: always the same ones, the first one
/// first.
pub(super) fn preferred_ports(agent: &str, wanted: &Wanted) -> impl Iterator<Item = u16> {
    let start = fnv1a(format!("{agent} {wanted}").as_bytes());
    // A step that is prime to the number of ports visits all of them.
    (0..u64::from(PORTS))
        .map(move |step| FIRST_PORT + ((start % u64::from(PORTS) + step * 7919) % u64::from(PORTS)) as u16)
}

/// Splits at the colons outside brackets.
fn split(text: &str) -> Result<Vec<&str>, InvalidForward> {
    let (mut parts, mut start, mut inside) = (Vec::new(), 0, false);
    for (at, c) in text.char_indices() {
        match c {
            '[' if !inside && at == start => inside = true,
            ']' if inside => inside = false,
            '[' | ']' => return Err(InvalidForward::Form),
            ':' if !inside => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if inside {
        return Err(InvalidForward::Form);
    }
    parts.push(&text[start..]);
    Ok(parts)
}

fn parse_bind(text: &str) -> Result<IpAddr, InvalidForward> {
    let invalid = || InvalidForward::Bind(text.to_owned());
    match text.strip_prefix('[') {
        Some(rest) => {
            let inner = rest.strip_suffix(']').ok_or_else(invalid)?;
            inner.parse::<Ipv6Addr>().map(IpAddr::from).map_err(|_| invalid())
        }
        None if text == "localhost" => Ok(Ipv4Addr::LOCALHOST.into()),
        None if text == "*" => Ok(Ipv4Addr::UNSPECIFIED.into()),
        None => text.parse::<Ipv4Addr>().map(IpAddr::from).map_err(|_| invalid()),
    }
}

/// FNV-1a, 64 bits: must stay the same in all versions, which the standard library's hash does not.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Not a forward.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidForward {
    /// Another number of parts, or brackets in a wrong place.
    #[error("expected [BIND:]PORT:HOST:PORT[/udp], IPv6 in brackets, for example 13389:127.0.0.1:3389")]
    Form,
    /// The same of a proxy's local port.
    #[error("expected [BIND:]PORT, IPv6 in brackets, for example 1080")]
    ProxyForm,
    /// Not a local port.
    #[error("{0:?} is no local port: 0 to 65535, 0 chooses one")]
    Port(String),
    /// Not a local address.
    #[error("{0:?} is no local address: expected one such as 127.0.0.1, [::1], or * for all")]
    Bind(String),
    /// Not a target.
    #[error("{0:?} is no target: expected HOST:PORT or HOST:PORT/udp, IPv6 in brackets")]
    Target(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_usual_forms() {
        for (text, shown) in [
            ("13389:127.0.0.1:3389", "127.0.0.1:13389:127.0.0.1:3389"),
            ("0:db.internal:5432", "127.0.0.1:0:db.internal:5432"),
            ("localhost:8080:web:80", "127.0.0.1:8080:web:80"),
            ("192.168.1.5:8080:web:80", "192.168.1.5:8080:web:80"),
            ("*:8080:web:80", "0.0.0.0:8080:web:80"),
            ("5353:10.0.0.53:53/udp", "127.0.0.1:5353:10.0.0.53:53/udp"),
            ("[::1]:8080:[fd00::7]:80", "[::1]:8080:[fd00::7]:80"),
            ("8080:[::1]:80/udp", "127.0.0.1:8080:[::1]:80/udp"),
            ("[::]:0:web:80", "[::]:0:web:80"),
        ] {
            let spec: ForwardSpec = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(spec.to_string(), shown);
            assert_eq!(shown.parse::<ForwardSpec>().as_ref(), Ok(&spec));
        }
    }

    #[test]
    fn nothing_but_loopback_unless_written() {
        for text in ["80:h:80", "0:h:80", "80:[fd00::1]:80"] {
            assert!(text.parse::<ForwardSpec>().expect(text).bind.is_loopback());
        }
    }

    #[test]
    fn refuses_what_is_no_forward() {
        use InvalidForward::*;
        for (text, wrong) in [
            ("", Form),
            ("80", Form),
            ("80:h", Form),
            ("1:2:3:4:5", Form),
            ("::1:80:h:80", Form),
            ("[::1:80:h:80", Form),
            ("80:x[::1]:80", Form),
            ("65536:h:80", Port("65536".into())),
            ("http:h:80", Port("http".into())),
            (":h:80", Port("".into())),
            ("myhost:80:h:80", Bind("myhost".into())),
            (":80:h:80", Bind("".into())),
            ("[db]:80:h:80", Bind("[db]".into())),
            ("80::80", Target(":80".into())),
            ("80:h:0", Target("h:0".into())),
            ("80:h:http", Target("h:http".into())),
            ("80:[h]:80", Target("[h]:80".into())),
        ] {
            assert_eq!(text.parse::<ForwardSpec>(), Err(wrong), "{text:?}");
        }
    }

    #[test]
    fn a_chosen_port_stays_the_same() {
        let ports = |agent: &str, target: &str| -> Vec<u16> {
            preferred_ports(agent, &target.parse().expect(target)).collect()
        };
        // Locked: another value here means that saved credentials no longer fit.
        assert_eq!(ports("office-pc", "127.0.0.1:3389")[..2], [36_831, 24_750]);
        assert_ne!(ports("office-pc", "127.0.0.1:22")[0], ports("office-pc", "127.0.0.1:3389")[0]);
        assert_ne!(ports("other-pc", "127.0.0.1:3389")[0], ports("office-pc", "127.0.0.1:3389")[0]);
        let mut all = ports("office-pc", "127.0.0.1:3389");
        all.sort_unstable();
        assert_eq!(all, (20_000..40_000).collect::<Vec<_>>());
    }
}
