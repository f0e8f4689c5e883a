//! `config.toml`: every setting with its default, and reading it back.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use adit_client::identity::store::{self, Access};
use adit_relay::config::{Https, Ports, off_or_domain, off_or_range};
use adit_relay::door::Crowd;
use adit_relay::run::host_port;
use serde::Deserialize;

use crate::error::Error;

/// Name of the file in the mediator's directory.
pub const FILE: &str = "config.toml";

/// Settings of a mediator.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Names and addresses that clients use.
    pub hosts: Vec<String>,
    /// What listens where.
    #[serde(default)]
    pub listen: Listen,
    /// The certificate that browsers see.
    #[serde(default)]
    pub https: Https,
    /// The direct path.
    #[serde(default)]
    pub p2p: P2p,
    /// The redirector.
    #[serde(default)]
    pub redirector: Redirector,
    /// Section `[limits]`: the doors of `https` and of the embedded relay.
    #[serde(default)]
    pub limits: Crowd,
}

/// Section `[listen]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Listen {
    /// STUN and the connection handshake (UDP).
    pub udp: SocketAddr,
    /// The embedded relay (TCP).
    pub relay: SocketAddr,
    /// Control channel and enrolment (TCP).
    pub https: SocketAddr,
    /// `/metrics`, `/healthz`, `/readyz` (TCP).
    pub diagnostics: SocketAddr,
}

/// Section `[p2p]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct P2p {
    /// UDP ports of the direct path at the devices, `FIRST-LAST`.
    pub ports: String,
    /// Whether devices may probe with many sockets.
    pub many_socket_probing: bool,
    /// Whether devices may ask the routers in front of them for ports.
    pub port_mapping: bool,
}

/// Section `[redirector]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Redirector {
    /// TCP ports of the redirector in this process, one for each granted session.
    #[serde(deserialize_with = "off_or_range")]
    pub ports: Option<Ports>,
    /// A domain of which every name leads to this server: each session that shows pages has one of them.
    #[serde(deserialize_with = "off_or_domain")]
    pub domain: Option<String>,
    /// Names of relays elsewhere that may be redirectors, too, and so read what passes.
    pub relays: Vec<String>,
}

impl Default for Redirector {
    fn default() -> Self {
        let adit_relay::config::Redirector { ports, domain } = Default::default();
        Self { ports, domain, relays: vec![] }
    }
}

impl Redirector {
    /// The part that a relay has, too.
    pub fn own(&self) -> adit_relay::config::Redirector {
        adit_relay::config::Redirector { ports: self.ports.clone(), domain: self.domain.clone() }
    }
}

impl Config {
    /// Reads the file in `dir`.
    ///
    /// # Errors
    /// [`Error::Config`] names the file and what is wrong.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(FILE);
        let bad = |why: String| Error::Config { path: path.clone(), why };
        let text = std::fs::read_to_string(&path).map_err(|error| bad(error.to_string()))?;
        let config: Self = toml::from_str(&text).map_err(|error| bad(error.to_string().trim().to_owned()))?;
        config.check(&path)?;
        Ok(config)
    }

    /// `HOST:PORT` of each host, with the port that `address` listens on.
    pub fn reached_at(&self, address: SocketAddr) -> Vec<String> {
        self.hosts.iter().map(|host| host_port(host, address.port())).collect()
    }

    fn check(&self, path: &Path) -> Result<(), Error> {
        let bad = |why: &str| Err(Error::Config { path: PathBuf::from(path), why: why.to_owned() });
        if let Some(host) = self.hosts.iter().find(|host| !is_host(host)) {
            return bad(&format!("in hosts, {host:?} is not a host name or IP address"));
        }
        if self.hosts.is_empty() || self.hosts.len() > MAX_HOSTS {
            return bad("hosts must name 1 to 8 host names or IP addresses");
        }
        if self.https.cert.is_some() != self.https.key.is_some() {
            return bad("[https] cert and key go together");
        }
        if !is_range(&self.p2p.ports) {
            return bad("[p2p] ports must be FIRST-LAST");
        }
        Ok(())
    }
}

/// The text of a new configuration file.
pub fn template(hosts: &[String]) -> String {
    let hosts = hosts.iter().map(|host| format!("{host:?}")).collect::<Vec<_>>().join(", ");
    let Listen { udp, relay, https, diagnostics } = Listen::default();
    let P2p { ports, many_socket_probing, port_mapping } = P2p::default();
    let redirector = Redirector::default().ports.unwrap_or(Ports(0..=0)).0;
    let redirector = format!("{}-{}", redirector.start(), redirector.end());
    let Crowd { unauthenticated, per_source, .. } = Crowd::default();
    format!(
        r#"# Settings of this mediator, each with its default. A change takes effect at the next start.

# Names and addresses that clients use to reach this server.
hosts = [{hosts}]

# "[::]:PORT" listens on IPv6 and IPv4, "0.0.0.0:PORT" on IPv4 only.
[listen]
# STUN and the connection handshake (UDP).
udp = "{udp}"
# The embedded relay (TCP).
relay = "{relay}"
# Control channel, enrolment, HTTPS (TCP).
https = "{https}"
# /metrics, /healthz and /readyz (TCP). Without authentication: keep it on a private address.
diagnostics = "{diagnostics}"

[https]
# The certificate that browsers see (PEM), for example from a public authority: the chain, and its key. Changed
# files are taken without a restart. Without them one is made here, signed by web-root.pem. Devices do not
# look at it: they trust the organisation's own root only.
# cert = "/etc/ssl/adit/fullchain.pem"
# key = "/etc/ssl/adit/privkey.pem"

[p2p]
# UDP ports that devices use for the direct path, FIRST-LAST.
ports = "{ports}"
# Whether devices may try many sockets where one NAT takes a random port for each destination and the other does not: 256
# sockets at one end, up to 1024 datagrams to random ports of the other end's address in 4 s, one try at a time, and with one
# peer at most every 15 s. To some firewalls that looks like a scan. A device's own file may say no, too.
many_socket_probing = {many_socket_probing}
# Whether devices may ask the router in front of them for a port (PCP, NAT-PMP, UPnP), while a session finds no direct path
# without. A device's own file may say no, too.
port_mapping = {port_mapping}

[redirector]
# TCP ports for technicians with nothing installed, one for each session that a grant with --redirector allows and the
# agent permits, FIRST-LAST; "" turns it off. The server can read what passes there.
ports = "{redirector}"
# A domain of which every name leads to this server (a wildcard record in DNS): each session that shows pages to a browser
# has a name there, on [listen] https. "": each has a port instead, and less between them.
domain = ""
# Relays on other machines that may be redirectors, too, by name: as a relay, one sees ciphertext only.
relays = []

[limits]
# Connections that have not shown who they are; and the same of one source (an IPv6 source is a /64).
unauthenticated = {unauthenticated}
per_source = {per_source}
# Addresses without penalties and with no limit of their own: of a proxy behind which everybody comes.
exempt = []
"#
    )
}

/// Writes other hosts into the file in `dir`, and leaves all else as it is.
///
/// # Errors
/// [`Error::Config`].
pub fn set_hosts(dir: &Path, hosts: &[String]) -> Result<(), Error> {
    let path = dir.join(FILE);
    let bad = |why: String| Error::Config { path: path.clone(), why };
    let text = std::fs::read_to_string(&path).map_err(|error| bad(error.to_string()))?;
    let text = with_hosts(&text, hosts).map_err(bad)?;
    store::write(dir, FILE, text.as_bytes(), Access::Public)?;
    Ok(())
}

/// Writes other hosts into the text of a configuration file, and leaves all else as it is, comments too.
///
/// # Errors
/// What is wrong with the text.
fn with_hosts(text: &str, hosts: &[String]) -> Result<String, String> {
    let mut document: toml_edit::DocumentMut =
        text.parse().map_err(|error: toml_edit::TomlError| error.to_string())?;
    let array: toml_edit::Array = hosts.iter().map(String::as_str).collect();
    match document.get_mut("hosts").and_then(toml_edit::Item::as_value_mut) {
        Some(value) => {
            let decor = value.decor().clone();
            *value = array.into();
            *value.decor_mut() = decor;
        }
        None => return Err("there is no list of hosts".into()),
    }
    Ok(document.to_string())
}

/// Reads the hosts of `--host NAME_OR_IP[,…]`.
///
/// # Errors
/// [`Error::Host`].
pub fn parse_hosts(text: &[String]) -> Result<Vec<String>, Error> {
    let hosts: Vec<String> =
        text.iter().flat_map(|text| text.split(',')).map(|host| host.trim().to_owned()).collect();
    match hosts.iter().find(|host| !is_host(host)) {
        Some(host) => Err(Error::Host(host.clone())),
        None if hosts.is_empty() || hosts.len() > MAX_HOSTS => Err(Error::Host(hosts.join(","))),
        None => Ok(hosts),
    }
}

const MAX_HOSTS: usize = 8;

fn is_host(host: &str) -> bool {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'-');
    host.parse::<IpAddr>().is_ok() || (!host.is_empty() && host.len() <= 253 && host.bytes().all(allowed))
}

fn is_range(text: &str) -> bool {
    let Some((first, last)) = text.split_once('-') else { return false };
    matches!((first.parse::<u16>(), last.parse::<u16>()), (Ok(first), Ok(last)) if 0 < first && first <= last)
}

impl Default for Listen {
    fn default() -> Self {
        let all = |port| SocketAddr::from(([0; 16], port));
        Self {
            udp: all(adit_protocol::DEFAULT_RELAY_PORT),
            relay: all(adit_protocol::DEFAULT_RELAY_PORT),
            https: all(adit_protocol::DEFAULT_HTTPS_PORT),
            diagnostics: SocketAddr::from(([127, 0, 0, 1], 9464)),
        }
    }
}

impl Default for P2p {
    fn default() -> Self {
        Self { ports: "40000-41000".into(), many_socket_probing: true, port_mapping: true }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_reads_back_as_the_defaults() {
        let config: Config = toml::from_str(&template(&["a.example".into(), "::1".into()])).expect("reads");
        assert_eq!(format!("{:?}", config.listen), format!("{:?}", Listen::default()));
        assert_eq!(config.limits, Crowd::default());
        assert_eq!(format!("{:?}", config.p2p), format!("{:?}", P2p::default()));
        assert_eq!(config.reached_at(config.listen.https), ["a.example:443", "[::1]:443"]);
        assert!(config.check(Path::new("x")).is_ok());
    }

    #[test]
    fn other_hosts_leave_everything_else_as_it_is() {
        let dir = tempfile::tempdir().expect("tempdir");
        let before = template(&["a.example".into()]);
        std::fs::write(dir.path().join(FILE), &before).expect("writes");
        set_hosts(dir.path(), &["b.example".into(), "192.0.2.1".into()]).expect("writes");
        let after = std::fs::read_to_string(dir.path().join(FILE)).expect("reads");
        assert_eq!(after, before.replace("[\"a.example\"]", "[\"b.example\", \"192.0.2.1\"]"));
        assert_eq!(Config::load(dir.path()).expect("loads").hosts, ["b.example", "192.0.2.1"]);
        let before = template(&["a.example".into()]).replace("]\n\n#", "] # ours\n\n#");
        let after = with_hosts(&before, &["b.example".into(), "::1".into()]).expect("writes");
        assert!(before.contains("# ours"));
        assert_eq!(after, before.replace(r#"["a.example"]"#, r#"["b.example", "::1"]"#));
        assert!(with_hosts("x = 1", &["b".into()]).is_err() && with_hosts("hosts = [", &[]).is_err());
    }

    #[test]
    fn bad_settings_are_refused() {
        for text in
            ["hosts = []", "hosts = ['a b']", "hosts = ['a']\n[p2p]\nports = '9-1'", "hosts = ['a']\nx = 1"]
        {
            let verdict = toml::from_str::<Config>(text).map(|config| config.check(Path::new("x")).is_ok());
            assert!(!matches!(verdict, Ok(true)), "{text}");
        }
        assert!(parse_hosts(&["a,,b".into()]).is_err());
        assert_eq!(parse_hosts(&["a, 10.0.0.1".into()]).expect("hosts"), ["a", "10.0.0.1"]);
    }
}
