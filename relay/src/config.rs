//! `DIR/config.toml` of a relay.

use std::fs;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use adit_client::exit::{Exit, Failure};
use adit_protocol::{DEFAULT_HTTPS_PORT, DEFAULT_RELAY_PORT};
use serde::{Deserialize, Deserializer};

use crate::server::Limits;

/// Name of the file in the state directory.
pub const FILE: &str = "config.toml";

/// What the file says; what it does not say has its default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConfigFile {
    /// Names and addresses that clients use. Empty: those given at enrolment.
    pub hosts: Vec<String>,
    /// See [`Listen`].
    pub listen: Listen,
    /// See [`Https`].
    pub https: Https,
    /// See [`Redirector`].
    pub redirector: Redirector,
    /// See [`Limits`].
    pub limits: Limits,
}

/// Section `[https]`: the certificate that browsers see. Both or none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Https {
    /// Certificate chain (PEM).
    pub cert: Option<PathBuf>,
    /// Its key (PEM).
    pub key: Option<PathBuf>,
}

/// Section `[redirector]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Redirector {
    /// TCP ports, one for each granted session.
    #[serde(deserialize_with = "off_or_range")]
    pub ports: Option<Ports>,
    /// A domain of which every name leads to this server: each session that shows pages has one of them.
    #[serde(deserialize_with = "off_or_domain")]
    pub domain: Option<String>,
}

impl Default for Redirector {
    fn default() -> Self {
        Self { ports: Some(Ports(49_152..=65_535)), domain: None }
    }
}

impl Redirector {
    /// Whether there is one.
    pub fn is_on(&self) -> bool {
        self.ports.is_some() || self.domain.is_some()
    }

    /// The names that a browser's certificate has to be for: the server's, and each one below the domain.
    pub fn names(&self, hosts: &[String]) -> Vec<String> {
        let wildcard = self.domain.iter().map(|domain| format!("*.{domain}"));
        hosts.iter().cloned().chain(wildcard).collect()
    }
}

/// `FIRST-LAST`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ports(pub RangeInclusive<u16>);

impl FromStr for Ports {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let range = text.split_once('-').and_then(|(first, last)| {
            let (first, last): (u16, u16) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            (first > 0 && first <= last).then_some(first..=last)
        });
        range.map(Self).ok_or_else(|| format!("{text:?} is no range of ports: expected FIRST-LAST"))
    }
}

/// Where the relay listens.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Listen {
    /// The relay itself (TCP).
    pub relay: SocketAddr,
    /// STUN (UDP).
    #[serde(deserialize_with = "off_or_address")]
    pub udp: Option<SocketAddr>,
    /// The relay over WebSocket and TLS (TCP).
    #[serde(deserialize_with = "off_or_address")]
    pub https: Option<SocketAddr>,
    /// `/metrics`, `/healthz`, `/readyz` (HTTP).
    #[serde(deserialize_with = "off_or_address")]
    pub diagnostics: Option<SocketAddr>,
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            relay: SocketAddr::from(([0; 16], DEFAULT_RELAY_PORT)),
            udp: Some(SocketAddr::from(([0; 16], DEFAULT_RELAY_PORT))),
            https: Some(SocketAddr::from(([0; 16], DEFAULT_HTTPS_PORT))),
            diagnostics: Some(SocketAddr::from(([127, 0, 0, 1], 9465))),
        }
    }
}

impl ConfigFile {
    /// Reads the file in `dir`; without one everything has its default.
    ///
    /// # Errors
    /// [`ConfigError`] names file, line and key.
    pub fn load(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join(FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(ConfigError::Read { path, error }),
        };
        toml::from_str(&text).map_err(|error| ConfigError::Wrong { path, error: Box::new(error) })
    }
}

/// The file as enrolment writes it: every setting with its default, commented.
pub fn template(hosts: &[String]) -> String {
    let hosts: Vec<String> = hosts.iter().map(|host| format!("{host:?}")).collect();
    let (listen, limits) = (Listen::default(), Limits::default());
    let https = DEFAULT_HTTPS_PORT;
    let (relay, Limits { unauthenticated, per_source, waiting, pairs, spent, .. }) = (listen.relay, limits);
    format!(
        r#"# An adit relay. Settings with a # in front have that value by default.

# Names and addresses under which clients reach this relay.
hosts = [{}]

[listen]
# The relay (TCP). [::] takes IPv4 and IPv6.
# relay = "{relay}"

# STUN (UDP); "" turns it off.
# udp = "{relay}"

# The same relay by WebSocket over TLS (TCP), for networks that let nothing but 443 out; "" turns it off.
# https = "[::]:{https}"

# /metrics, /healthz and /readyz (HTTP without a password: keep it private); "" turns it off.
# diagnostics = "127.0.0.1:9465"

[https]
# The certificate that browsers see (PEM): the chain, and its key. Changed files are taken without a restart. Without them
# one is made here, signed by web-root.pem. Devices do not look at it. For example:
#cert = "/etc/ssl/adit/fullchain.pem"
#key = "/etc/ssl/adit/privkey.pem"

[redirector]
# TCP ports for technicians with nothing installed, one for each session that the mediator grants and the agent permits.
# The server can read what passes there; "" turns it off.
# ports = "49152-65535"

# A domain of which every name leads to this server (a wildcard record in DNS): each session that shows pages to a browser
# has a name there, on [listen] https. "": each has a port instead, and less between them.
# domain = ""

[limits]
# Connections that have not shown a ticket yet; and the same of one source (an IPv6 source is a /64).
# unauthenticated = {unauthenticated}
# per_source = {per_source}

# Addresses without penalties and with no limit of their own: of a proxy behind which everybody comes.
# exempt = []

# Legs that wait for their other leg (10 s at most).
# waiting = {waiting}

# Pairs that are forwarded. Each takes two descriptors, and up to four more while bytes are on the way.
# pairs = {pairs}

# Used tickets that are remembered until they expire.
# spent = {spent}
"#,
        hosts.join(", ")
    )
}

/// Why a configuration was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// An unknown key, or a value of the wrong kind.
    #[error("{}: {}", path.display(), error.to_string().trim_end())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// Line, column, key and what was expected.
        error: Box<toml::de::Error>,
    },
}

impl Failure for ConfigError {
    fn exit(&self) -> Exit {
        Exit::Usage
    }

    fn remedy(&self) -> Option<String> {
        Some(match self {
            Self::Read { .. } => "check that the file can be read by this user".into(),
            Self::Wrong { .. } => "correct that line, or put a # before it to have the default".into(),
        })
    }
}

/// A range of ports, or `""` for off.
///
/// # Errors
/// It is neither.
pub fn off_or_range<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Ports>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.is_empty() { Ok(None) } else { text.parse().map(Some).map_err(serde::de::Error::custom) }
}

/// A domain, or `""` for none.
///
/// # Errors
/// It is neither.
pub fn off_or_domain<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(deserializer)?.to_ascii_lowercase();
    let label = |label: &str| {
        let allowed = |c: u8| c.is_ascii_alphanumeric() || c == b'-';
        !label.is_empty() && label.len() <= 63 && label.bytes().all(allowed)
    };
    match &text[..] {
        "" => Ok(None),
        // A session's label and a dot come before it.
        name if name.len() <= 220 && name.split('.').all(label) && name.parse::<IpAddr>().is_err() => {
            Ok(Some(text))
        }
        _ => Err(serde::de::Error::custom(format!(
            "{text:?} is no domain: expected a name such as r.example.org"
        ))),
    }
}

/// An address, or `""` for off.
fn off_or_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        serde::de::Error::custom(format!("{text:?} is no address: expected IP:PORT, or \"\" for off"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_is_the_default_commented_and_uncommented() {
        let text = template(&["relay.example.org".into(), "2001:db8::1".into()]);
        let expected = ConfigFile {
            hosts: vec!["relay.example.org".into(), "2001:db8::1".into()],
            ..ConfigFile::default()
        };
        assert_eq!(toml::from_str::<ConfigFile>(&text).expect("reads"), expected);
        let is_setting = |line: &str| line.starts_with("# ") && line.contains(" = ");
        let uncommented: Vec<&str> =
            text.lines().map(|line| if is_setting(line) { &line[2..] } else { line }).collect();
        assert!(uncommented.len() > text.lines().filter(|line| line.starts_with("# ")).count());
        assert_eq!(toml::from_str::<ConfigFile>(&uncommented.join("\n")).expect("reads"), expected);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let dir = tempfile::tempdir().expect("tempdir");
        assert_eq!(ConfigFile::load(dir.path()).expect("defaults"), ConfigFile::default());
        for (text, named) in [
            ("[listen]\nrelais = \"x\"", "relais"),
            ("host = []", "host"),
            ("[listen]\nudp = \"8002\"", "8002"),
            ("[listen]\nhttps = \"443\"", "443"),
            ("[limits]\npairs = -1", "pairs"),
        ] {
            fs::write(dir.path().join(FILE), text).expect("writes");
            let error = ConfigFile::load(dir.path()).expect_err(text);
            assert!(error.to_string().contains(named), "{error}");
            assert!(error.to_string().contains(FILE), "{error}");
            assert_eq!(error.exit(), Exit::Usage);
        }
    }

    #[test]
    fn off_is_off() {
        let config: ConfigFile =
            toml::from_str("[listen]\nudp = \"\"\nhttps = \"\"\ndiagnostics = \"\"").expect("reads");
        assert_eq!((config.listen.udp, config.listen.https, config.listen.diagnostics), (None, None, None));
    }
}
