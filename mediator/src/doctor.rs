//! The connection test: from this server, and, with an agent's help, from outside. Every finding comes with its
//! remedy.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use adit_client::doctor::{Finding, tried};
use adit_client::identity::Peer;
use adit_client::probe;
use adit_protocol::Role;
use adit_protocol::control::Probe;
use adit_relay::certificates;

use crate::admin::{self, About, Answer, Request};
use crate::config::Config;
use crate::error::Error;
use crate::operator::Operator;
use crate::organisation::{Organisation, ROOT_KEY, unix_now};

/// Free space below this is a finding. Bytes.
const LITTLE: u64 = 500 << 20;
/// A certificate that ends within this time should have been renewed. Seconds.
const SOON: u64 = 30 * 24 * 60 * 60;

/// Looks at everything on this server, and from `agent` where one is named.
///
/// # Errors
/// [`Error`]: there is nothing to look at, or no such agent.
pub async fn examine(dir: &Path, agent: Option<&str>) -> Result<Vec<Finding>, Error> {
    let organisation = Organisation::load(dir)?;
    let operator = Operator::open(dir).await?;
    let mut findings = state(dir, &operator).await;
    findings.extend(certificates(&organisation));
    findings.extend(hosts(&organisation.config).await);
    let about = match admin::ask(dir, &Request::About).await? {
        Some(Answer::About(about)) => about,
        _ => {
            findings.push(Finding::fault(
                format!("no mediator runs on {}", dir.display()),
                "start it: systemctl start adit-mediator, or adit-mediator run",
            ));
            return Ok(findings);
        }
    };
    findings.extend(listeners(&about, &organisation.config));
    let About { https, relay, stun, .. } = about;
    let probe = Probe { request: 0, https, relay, stun, vantage: vec![], port_mapping: false };
    let probed = probe::run(organisation.identity.into(), probe).await;
    // From the server itself there is no NAT to know about.
    let mut servers = probed.results;
    servers.retain(|found| ["https", "relay", "stun"].contains(&found.what.as_str()));
    findings.extend(tried("here", &servers));
    if let Some(name) = agent {
        let agent = operator.device(name, Some(Role::Agent)).await?;
        match admin::ask(dir, &Request::Probe { agent: agent.id }).await? {
            Some(Answer::Probed { results }) => {
                let results: Vec<_> = results.into_iter().map(Into::into).collect();
                findings.extend(tried(&agent.name, &results));
            }
            Some(Answer::Failed { why }) => findings.push(Finding::fault(
                format!("{} could not try it: {why}", agent.name),
                "choose an agent that is online (adit-mediator devices)",
            )),
            _ => {
                findings.push(Finding::fault("the mediator does not know that test", "restart the mediator"))
            }
        }
    }
    Ok(findings)
}

async fn state(dir: &Path, operator: &Operator) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.push(match operator.store.check().await {
        Ok(None) => Finding::fine("the database is whole"),
        Ok(Some(wrong)) => Finding::fault(format!("the database: {wrong}"), "restore the last backup"),
        Err(error) => Finding::fault(format!("the database: {error}"), "restore the last backup"),
    });
    let free = rustix::fs::statvfs(dir).map(|disk| disk.f_bavail * disk.f_frsize);
    findings.push(match free {
        Ok(free) if free < LITTLE => Finding::fault(
            format!("{} MiB free in {}", free >> 20, dir.display()),
            "make room: without an audit record no session is granted",
        ),
        Ok(free) => Finding::fine(format!("{} GiB free in {}", free >> 30, dir.display())),
        Err(error) => Finding::fault(format!("{}: {error}", dir.display()), "check the disk"),
    });
    findings.push(if dir.join(ROOT_KEY).exists() {
        Finding::note(
            "the enrolment key is on this server: who takes the server over can make devices",
            "take root-key.pem away while nobody enrols (SECURITY.md says what then waits for it)",
        )
    } else {
        Finding::note(
            "the enrolment key is offline: nobody can enrol, no certificate is renewed",
            "put root-key.pem back for that, and take it away again",
        )
    });
    findings
}

fn certificates(organisation: &Organisation) -> Vec<Finding> {
    let now = unix_now();
    let ends = |what: &str, at: u64, remedy: &str| match at {
        at if at <= now => Finding::fault(format!("{what} has ended"), remedy),
        at if at < now + SOON => {
            Finding::fault(format!("{what} ends in {} days", (at - now) / 86_400), remedy)
        }
        at => Finding::fine(format!("{what} is good for {} days", (at - now) / 86_400)),
    };
    let mut findings = Vec::new();
    let identity = &organisation.identity;
    if let Ok(peer) = Peer::from_certificate(&identity.certificate) {
        let remedy = "put root-key.pem back and restart the mediator";
        findings.push(ends("this server's certificate for devices", peer.not_after, remedy));
    }
    let config = &organisation.config;
    let file = config.https.cert.clone().unwrap_or_else(|| organisation.dir.join(certificates::CERTIFICATE));
    match certificates::inspect(&file) {
        // Made at the first start.
        Err(_) if config.https.cert.is_none() && !file.exists() => {}
        Err(why) => findings.push(Finding::fault(why, "correct [https] cert and key in config.toml")),
        Ok((names, at)) => {
            findings.push(ends(
                "the certificate for browsers",
                at,
                "renew it; the files are taken without a restart",
            ));
            let wanted = config.redirector.own().names(&config.hosts);
            let missing: Vec<&str> = wanted
                .iter()
                .filter(|name| !names.contains(name) && !certificates::covers(&names, name))
                .map(String::as_str)
                .collect();
            if !missing.is_empty() {
                findings.push(Finding::fault(
                    format!("the certificate for browsers is not for {}", missing.join(", ")),
                    "get one for all of this server's names, or remove those names (adit-mediator hosts)",
                ));
            }
        }
    }
    findings
}

async fn hosts(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    // Any name below the redirector's domain stands for all.
    let below = config.redirector.domain.iter().map(|domain| format!("any-name.{domain}"));
    for host in config.hosts.iter().cloned().chain(below) {
        let resolved = tokio::net::lookup_host((host.as_str(), 443)).await;
        let addresses: Vec<IpAddr> = match resolved {
            Ok(addresses) => {
                addresses.map(|address| address.ip()).collect::<BTreeSet<_>>().into_iter().collect()
            }
            Err(error) => {
                let remedy = match host.starts_with("any-name.") {
                    true => {
                        "give *.DOMAIN of [redirector] domain this server's address in DNS, or remove the setting"
                    }
                    false => "give it an address in DNS, or remove it: adit-mediator hosts remove",
                };
                findings.push(Finding::fault(format!("{host} does not resolve: {error}"), remedy));
                continue;
            }
        };
        let shown: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        findings.push(if addresses.iter().any(IpAddr::is_loopback) {
            Finding::note(
                format!("{host} is {}: only this machine reaches that", shown.join(", ")),
                "add the name or address that devices use: adit-mediator hosts add",
            )
        } else {
            Finding::fine(format!("{host} is {}", shown.join(", ")))
        });
    }
    findings
}

/// What the mediator's process listens on, and nothing else.
fn listeners(about: &About, config: &Config) -> Vec<Finding> {
    let listen = &config.listen;
    let expected = [
        ("tcp", listen.https),
        ("tcp", listen.relay),
        ("tcp", listen.diagnostics),
        ("udp", listen.udp),
        // The second STUN port.
        ("udp", listen.https),
    ];
    let found = &about.listening;
    if found.is_empty() {
        return vec![Finding::note(
            "what the mediator listens on cannot be seen",
            "look with ss -lntup; /proc must be there for the mediator",
        )];
    }
    let known = |(protocol, address): &&(String, SocketAddr)| {
        expected.iter().any(|(p, e)| p == protocol && (e.port() == address.port() || e.port() == 0))
    };
    let mut findings: Vec<Finding> = found
        .iter()
        .filter(|socket| !known(socket))
        .map(|(protocol, address)| {
            Finding::fault(
                format!("the mediator listens on {address}/{protocol}, which no setting asks for"),
                "restart it; if that stays, report it",
            )
        })
        .collect();
    let diagnostics = listen.diagnostics;
    if !diagnostics.ip().is_loopback() {
        findings.push(Finding::note(
            format!("metrics are open to whoever reaches {diagnostics}"),
            "set [listen] diagnostics to a private address",
        ));
    }
    if findings.is_empty() {
        let shown: Vec<String> =
            found.iter().map(|(protocol, address)| format!("{address}/{protocol}")).collect();
        findings
            .push(Finding::fine(format!("the mediator listens on {} and nothing else", shown.join(", "))));
    }
    findings
}

/// What this process listens on; empty where that cannot be seen.
#[cfg(target_os = "linux")]
pub fn own_sockets() -> Vec<(String, SocketAddr)> {
    use procfs::net::TcpState;
    use procfs::process::{FDTarget, Process};
    let look = || {
        let process = Process::myself()?;
        let mut inodes = BTreeSet::new();
        for fd in process.fd()? {
            if let FDTarget::Socket(inode) = fd?.target {
                inodes.insert(inode);
            }
        }
        let tcp = process.tcp()?.into_iter().chain(process.tcp6().unwrap_or_default());
        let udp = process.udp()?.into_iter().chain(process.udp6().unwrap_or_default());
        let tcp = tcp
            .filter(|socket| socket.state == TcpState::Listen && inodes.contains(&socket.inode))
            .map(|socket| ("tcp".to_owned(), socket.local_address));
        let udp = udp
            .filter(|socket| inodes.contains(&socket.inode))
            .map(|socket| ("udp".to_owned(), socket.local_address));
        Ok::<_, procfs::ProcError>(tcp.chain(udp).collect())
    };
    look().unwrap_or_default()
}

/// The same where there is no /proc.
#[cfg(not(target_os = "linux"))]
pub fn own_sockets() -> Vec<(String, SocketAddr)> {
    vec![]
}
