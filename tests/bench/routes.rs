//! The ways from the technician's side to the service, all open at the same time on 127.0.0.1.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::programs::{Program, run};

/// How long a server may take until it accepts connections.
const PATIENCE: Duration = Duration::from_secs(20);
const AGENT: &str = "agent";

/// Where the programs are that are measured.
pub(crate) struct Binaries {
    pub(crate) pipe: PathBuf,
    pub(crate) adit: PathBuf,
    pub(crate) mediator: PathBuf,
    pub(crate) relay: PathBuf,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, clap::ValueEnum)]
pub(crate) enum Kind {
    /// Straight to the service.
    Raw,
    /// TLS through a relay: `pipe tls-client`, `pipe hop`, `pipe tls-server`.
    BareRelay,
    /// QUIC: `pipe quic-client`, `pipe quic-server`.
    BareQuic,
    /// `adit forward --via relay`.
    Relay,
    /// `adit forward --via direct`.
    Quic,
}

impl Kind {
    pub(crate) const ALL: [Kind; 5] = [Kind::Raw, Kind::BareRelay, Kind::Relay, Kind::BareQuic, Kind::Quic];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Raw => "raw tcp",
            Kind::BareRelay => "bare relay",
            Kind::BareQuic => "bare quic",
            Kind::Relay => "adit relay",
            Kind::Quic => "adit quic",
        }
    }
}

/// One way, and the processes on it.
pub(crate) struct Route {
    pub(crate) kind: Kind,
    /// Where to connect to.
    pub(crate) entry: SocketAddr,
    pub(crate) agent: Option<Rc<Program>>,
    pub(crate) technician: Option<Rc<Program>>,
    pub(crate) relay: Option<Rc<Program>>,
}

impl Route {
    /// The ends of its processes' logs.
    pub(crate) fn complaints(&self) -> String {
        let programs = [&self.agent, &self.technician, &self.relay];
        programs.into_iter().flatten().map(|program| program.complaint()).collect::<Vec<_>>().join("\n")
    }
}

/// All ways. Dropping it ends every process.
pub(crate) struct Routes {
    /// In the order of [`Kind::ALL`].
    pub(crate) all: Vec<Route>,
    /// The relay's `/metrics`.
    metrics: SocketAddr,
    _mediator: Program,
}

impl Routes {
    /// Starts everything, with its state in `dir`; each way leads to `service`.
    pub(crate) fn open(dir: &Path, binaries: &Binaries, service: SocketAddr, only: &[Kind]) -> Result<Self> {
        let raw = Route { kind: Kind::Raw, entry: service, agent: None, technician: None, relay: None };
        let [bare_relay, bare_quic] = bare(dir, &binaries.pipe, service)?;

        let [https, relay, of_mediator, metrics] = ports(|address| TcpListener::bind(address)?.local_addr())?;
        let [udp, of_relay] = ports(|address| UdpSocket::bind(address)?.local_addr())?;
        let data = |name: &str| dir.join(name).to_string_lossy().into_owned();
        let configure = |name: &str, listen: &str| {
            let text = format!("hosts = [\"127.0.0.1\"]\n[listen]\n{listen}");
            fs::write(dir.join(name).join("config.toml"), text)
        };

        let server = data("server");
        run(&binaries.mediator, &["init", "--data", &server, "--host", "127.0.0.1"])?;
        configure(
            "server",
            &format!("udp = \"{udp}\"\nhttps = \"{https}\"\ndiagnostics = \"{of_mediator}\"\n"),
        )?;
        let mediator =
            Program::start(dir, &binaries.mediator, &["run", "--data", &server, "--relay", "off"])?;
        accepts(https)?;
        let token = |role: &str, more: &[&str]| {
            let arguments = [&["token", "--data", &server, "--role", role], more].concat();
            run(&binaries.mediator, &arguments)
        };

        let enrol = ["enroll", &token("relay", &[])?, "--data", &data("relay"), "--host", "127.0.0.1"];
        run(&binaries.relay, &enrol)?;
        configure(
            "relay",
            &format!(
                "relay = \"{relay}\"\nudp = \"{of_relay}\"\nhttps = \"\"\ndiagnostics = \"{metrics}\"\n"
            ),
        )?;
        let relay_run = Rc::new(Program::start(dir, &binaries.relay, &["run", "--data", &data("relay")])?);
        accepts(relay)?;

        let token_of_agent = token("agent", &[])?;
        run(&binaries.adit, &["enroll", &token_of_agent, "--data", &data("agent"), "--name", AGENT])?;
        let token_of_technician = token("technician", &["--all-agents"])?;
        run(&binaries.adit, &["enroll", &token_of_technician, "--data", &data("technician")])?;
        let allow = service.to_string();
        let agent = Program::start(
            dir,
            &binaries.adit,
            &["agent", "--json", "--data", &data("agent"), "--allow", &allow],
        )?;
        agent.says("the agent to be online", |line| (event(line)?["event"] == "online").then_some(()))?;
        let agent = Rc::new(agent);

        let forward = |kind: Kind, via: &str, carrier: &str| {
            let spec = format!("127.0.0.1:0:{service}");
            let data = data("technician");
            let arguments = ["forward", AGENT, "-L", &spec, "--via", via, "--json", "--data", &data];
            let program = Program::start(dir, &binaries.adit, &arguments)?;
            let (mut entry, mut on_carrier) = (None, false);
            let entry = program.says(&format!("a port, and the carrier {carrier}"), |line| {
                let event = event(line)?;
                match event["event"].as_str()? {
                    "listening" => entry = event["local"].as_str()?.parse().ok(),
                    "tier" => on_carrier = event["carrier"] == carrier,
                    _ => {}
                }
                entry.filter(|_| on_carrier)
            })?;
            let relay = (kind == Kind::Relay).then(|| relay_run.clone());
            Ok::<_, anyhow::Error>(Route {
                kind,
                entry,
                agent: Some(agent.clone()),
                technician: Some(Rc::new(program)),
                relay,
            })
        };
        let relayed = forward(Kind::Relay, "relay", "relay")?;
        let direct = forward(Kind::Quic, "direct", "quic")?;
        let mut all = vec![raw, bare_relay, relayed, bare_quic, direct];
        all.retain(|route| only.is_empty() || only.contains(&route.kind));
        Ok(Self { all, metrics, _mediator: mediator })
    }

    /// Bytes that the relay has spliced, and copied, so far.
    pub(crate) fn forwarded(&self) -> Result<(u64, u64)> {
        let text = get(self.metrics, "/metrics")?;
        let count = |method: &str| {
            let name = format!("adit_relay_forwarded_bytes_total{{method=\"{method}\"}} ");
            let line = text.lines().find_map(|line| line.strip_prefix(&name)).unwrap_or("0");
            line.parse::<u64>().with_context(|| format!("the relay's metric: {line:?}"))
        };
        Ok((count("splice")?, count("copy")?))
    }
}

/// The bare carriers.
fn bare(dir: &Path, pipe: &Path, service: SocketAddr) -> Result<[Route; 2]> {
    let start = |mode: &str, listen: SocketAddr, target: SocketAddr, certificate: &str| {
        let arguments = [mode, &listen.to_string(), &target.to_string(), "--certificate", certificate];
        let program = Program::start(dir, pipe, &arguments)?;
        program.says("that it listens", |line| (line == "listening").then_some(()))?;
        Ok::<_, anyhow::Error>(Some(Rc::new(program)))
    };
    let [server, hop, entry, quic_entry] = ports(|address| TcpListener::bind(address)?.local_addr())?;
    let [quic_server] = ports(|address| UdpSocket::bind(address)?.local_addr())?;
    let relayed = Route {
        kind: Kind::BareRelay,
        entry,
        agent: start("tls-server", server, service, "tls.der")?,
        relay: start("hop", hop, server, "unused.der")?,
        technician: start("tls-client", entry, hop, "tls.der")?,
    };
    let direct = Route {
        kind: Kind::BareQuic,
        entry: quic_entry,
        agent: start("quic-server", quic_server, service, "quic.der")?,
        relay: None,
        technician: start("quic-client", quic_entry, quic_server, "quic.der")?,
    };
    Ok([relayed, direct])
}

/// Free ports of 127.0.0.1, all different.
fn ports<const N: usize>(
    bind: impl Fn(SocketAddr) -> std::io::Result<SocketAddr>,
) -> Result<[SocketAddr; N]> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut found = Vec::new();
    while found.len() < N {
        let address = bind(any)?;
        if !found.contains(&address) {
            found.push(address);
        }
    }
    found.try_into().map_err(|_| anyhow::anyhow!("no ports"))
}

fn accepts(address: SocketAddr) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while TcpStream::connect(address).is_err() {
        ensure!(Instant::now() < deadline, "nothing accepts connections on {address} after {PATIENCE:?}");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn get(address: SocketAddr, path: &str) -> Result<String> {
    let mut connection = TcpStream::connect(address)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    write!(connection, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    Ok(answer)
}

fn event(line: &str) -> Option<Value> {
    serde_json::from_str(line).ok()
}
