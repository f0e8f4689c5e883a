//! `DIR/config.toml` of a device: what its owner has written down.

use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer};

use crate::allow::{AllowList, Entry};
use crate::exit::{Exit, Failure};

/// Name of the file in the state directory.
pub const FILE: &str = "config.toml";

/// What the file says; what it does not say has its default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// See [`Agent`].
    pub agent: Agent,
    /// See [`Network`].
    pub network: Network,
    /// See [`P2p`].
    pub p2p: P2p,
}

/// Section `[p2p]`: what is narrower here than the operator has it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct P2p {
    /// UDP ports of the direct path; `None`: the operator's.
    #[serde(deserialize_with = "ports")]
    pub ports: Option<RangeInclusive<u16>>,
    /// Whether many sockets may be tried, if the operator permits it.
    pub many_socket_probing: bool,
    /// Whether the router in front may be asked for a port, if the operator permits it.
    pub port_mapping: bool,
    /// Where others reach the ports of the direct path, by a router that somebody has set up.
    pub public_addresses: Vec<PublicAddress>,
}

impl Default for P2p {
    fn default() -> Self {
        Self { ports: None, many_socket_probing: true, port_mapping: true, public_addresses: vec![] }
    }
}

/// `IP`, which leads to each port as it is, or `IP:PORT`, which leads to one that is bound here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct PublicAddress {
    ip: IpAddr,
    port: Option<u16>,
}

impl PublicAddress {
    /// Where others reach this port.
    pub fn of_port(self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip, self.port.unwrap_or(port))
    }
}

impl TryFrom<String> for PublicAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let ip = text.parse().map(|ip| Self { ip, port: None });
        let with_port = |_| text.parse().map(|at: SocketAddr| Self { ip: at.ip(), port: Some(at.port()) });
        ip.or_else(with_port).map_err(|_| format!("{text:?} is neither IP nor IP:PORT"))
    }
}

/// Reads `FIRST-LAST`.
pub(crate) fn parse_ports(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-')?;
    let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    (first > 0 && first <= last).then_some(first..=last)
}

fn ports<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<RangeInclusive<u16>>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let ports = parse_ports(&text).ok_or_else(|| serde::de::Error::custom("ports must be FIRST-LAST"))?;
    Ok(Some(ports))
}

/// Section `[network]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// The proxy on the way to our servers, see [`crate::proxy`]; `None`: what the environment says.
    pub proxy: Option<SecretUrl>,
}

/// A URL that may hold a password: not shown.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct SecretUrl(pub String);

impl std::fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SecretUrl(..)")
    }
}

/// Section `[agent]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Agent {
    /// What technicians may reach from here; `None`: the default.
    #[serde(deserialize_with = "entries")]
    pub allow: Option<Vec<Entry>>,
    /// Whether the server may be an end of a session to these targets, and read what passes.
    pub redirector: bool,
}

impl Config {
    /// Reads the file in `dir`; without one everything has its default.
    ///
    /// # Errors
    /// [`ConfigError`] names file, line and what is wrong.
    pub fn load(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join(FILE);
        let failed = |why: String| ConfigError { path: path.clone(), why };
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(failed(error.to_string())),
        };
        let config: Self =
            toml::from_str(&text).map_err(|error| failed(error.to_string().trim_end().to_owned()))?;
        let P2p { ports, public_addresses, .. } = &config.p2p;
        let is_one = ports.as_ref().is_some_and(|ports| ports.start() == ports.end());
        if !is_one && public_addresses.iter().any(|public| public.port.is_some()) {
            let why = "[p2p] public_addresses: IP:PORT leads to one port: set ports to it, as \"PORT-PORT\"";
            return Err(failed(why.to_owned()));
        }
        Ok(config)
    }
}

/// The file as enrolment writes it for an agent: every setting with its default, commented, and the proxy by which it
/// was enrolled.
pub fn template(proxy: Option<&str>) -> String {
    let proxy =
        proxy.map_or("# proxy = \"none\"".to_owned(), |url| format!("proxy = {}", toml::Value::from(url)));
    let allow = AllowList::default();
    let entries: Vec<String> =
        allow.entries().iter().map(|entry| format!("{:?}", entry.to_string())).collect();
    format!(
        r#"# Settings of this device. Those with a # in front have that value by default. A change takes effect
# when the agent is started again.

[agent]
# What technicians may reach from here, on this machine and beside it: "HOST:PORTS[/udp]" and
# "NETWORK/BITS:PORTS[/udp]", for example "192.168.1.0/24:80,443,3389". Nothing else is reached, whatever
# the operator grants.
# allow = [{}]

# Whether the server itself may open sessions to these targets, so that technicians need nothing installed. It can read
# what passes then. The operator must permit it, too.
# redirector = false

[network]
# The HTTP proxy on the way to the servers' port 443: "http://[USER:PASSWORD@]HOST:PORT", or "none". Without this,
# HTTPS_PROXY and NO_PROXY of the environment. With a password in it keep this file from others.
{proxy}

[p2p]
# UDP ports of direct paths, a part of those that the operator has set.
# ports = "40000-41000"

# Whether many sockets may be tried where a NAT makes direct paths hard to find. Some firewalls take that for a scan.
# many_socket_probing = true

# Whether the router in front of this device may be asked for a port (PCP, NAT-PMP, UPnP), while a session finds no direct
# path without.
# port_mapping = true

# Where others reach this device, by a router that forwards ports here: "IP" where the ports stay as they are, or "IP:PORT"
# beside a range of one port above. UDP for QUIC, TCP for where UDP is blocked.
# public_addresses = []
"#,
        entries.join(", ")
    )
}

fn entries<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<Entry>>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    let parsed = texts.iter().map(|text| text.parse().map_err(|error| format!("{text:?}: {error}")));
    parsed.collect::<Result<_, _>>().map(Some).map_err(serde::de::Error::custom)
}

/// A configuration that was not taken.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", path.display())]
pub struct ConfigError {
    path: PathBuf,
    why: String,
}

impl Failure for ConfigError {
    fn exit(&self) -> Exit {
        Exit::Usage
    }

    fn remedy(&self) -> Option<String> {
        Some("correct that line, or remove the file for the defaults".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::write(dir.path().join(FILE), text).expect("writes");
        Config::load(dir.path())
    }

    #[test]
    fn the_template_and_no_file_are_the_defaults() {
        assert_eq!(read(&template(None)).expect("reads"), Config::default());
        let dir = tempfile::tempdir().expect("tempdir");
        assert_eq!(Config::load(dir.path()).expect("nothing there"), Config::default());
        let proxied =
            read(&template(Some("http://a:\"b\"@p:1"))).expect("reads").network.proxy.expect("is there");
        assert_eq!(proxied.0, "http://a:\"b\"@p:1");
        // What stands there as an example is what is in force.
        let uncommented = template(None).replace("# allow", "allow");
        let allow = read(&uncommented).expect("reads").agent.allow.expect("is there");
        assert_eq!(allow, AllowList::default().entries());
    }

    #[test]
    fn what_is_written_down_counts_and_what_is_wrong_is_named() {
        let config =
            read("[agent]\nallow = [\"192.168.1.0/24:80,443\", \"db.local:53/udp\"]").expect("reads");
        let allow = config.agent.allow.expect("is there");
        assert_eq!(
            allow.iter().map(Entry::to_string).collect::<Vec<_>>(),
            ["192.168.1.0/24:80,443", "db.local:53/udp"]
        );
        assert_eq!(read("[agent]\nallow = []").expect("reads").agent.allow, Some(vec![]));
        let public = "public_addresses = [\"192.0.2.1\", \"192.0.2.2:443\", \"2001:db8::1\"]";
        for ports in ["", "ports = \"40000-40001\"\n"] {
            let error = read(&format!("[p2p]\n{ports}{public}")).expect_err("which port is it?").to_string();
            assert!(error.contains("leads to one port"), "{error}");
        }
        let public = format!("[p2p]\nports = \"40000-40000\"\n{public}");
        let public = read(&public).expect("reads").p2p.public_addresses;
        assert_eq!(
            public.iter().map(|public| public.of_port(40_000).to_string()).collect::<Vec<_>>(),
            ["192.0.2.1:40000", "192.0.2.2:443", "[2001:db8::1]:40000"]
        );
        for (text, named) in [
            ("[agent]\nalow = []", "alow"),
            ("[agent]\nallow = [\"10.0.0.5/8:80\"]", "10.0.0.5/8:80"),
            ("[p2p]\npublic_addresses = [\"router\"]", "neither IP nor IP:PORT"),
            ("x", FILE),
        ] {
            let error = read(text).expect_err(text);
            assert!(error.to_string().contains(named), "{error}");
        }
    }
}
