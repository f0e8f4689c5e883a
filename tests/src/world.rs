//! The lab with the real binaries in it: a server, relays, an agent and a technician, enrolled with
//! tokens and running, as they would in the field.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::lab::{Host, Lab, NatKind, Topology};
use crate::process::{Process, named};
use crate::proxy::{self, ProxyKind, ProxyServer};
use crate::{poll, within};

/// How long a command may take that does no more than talk to the server, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// The redirector's domain.
pub const DOMAIN: &str = "r.example.org";
/// The agent's name.
pub const AGENT: &str = "agent";

/// What to bring up.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The networks. Each of its relay hosts runs a relay.
    pub topology: Topology,
    /// Whether the mediator embeds a relay.
    pub embedded_relay: bool,
    /// The agent's `--allow`: `HOST:PORT[/udp]`. Empty: the agent's own default.
    pub allow: Vec<String>,
    /// The only way out of both sites.
    pub proxy: Option<ProxyKind>,
    /// Agent and policy permit the redirector.
    pub redirector: bool,
    /// Each session of the redirector that shows pages has a host name below [`DOMAIN`].
    pub domain: bool,
}

/// `ADIT_LOG` of all programs of this test, see [`log`].
static LOG: OnceLock<&'static str> = OnceLock::new();

/// All programs of this test log what `filter` says.
pub fn log(filter: &'static str) {
    let _ = LOG.set(filter);
}

impl Setup {
    /// An embedded relay, and an agent that allows everything on its loopback, TCP and UDP.
    pub fn new(topology: Topology) -> Self {
        let allow = ["127.0.0.0/8:1-65535", "127.0.0.0/8:1-65535/udp"].map(str::to_owned).to_vec();
        Self { topology, embedded_relay: true, allow, proxy: None, redirector: false, domain: false }
    }

    /// Agent and technician behind NATs through which nothing passes but connections to this proxy, which runs on
    /// the stranger's host.
    pub fn behind(proxy: ProxyKind) -> Self {
        let topology = Topology::new(NatKind::Cone, NatKind::Cone).stranger();
        Self { proxy: Some(proxy), ..Self::new(topology) }
    }

    /// Agent and policy permit the redirector.
    pub fn redirector(mut self) -> Self {
        self.redirector = true;
        self
    }

    /// Agent and policy permit the redirector, and its pages have host names of their own.
    pub fn pages(mut self) -> Self {
        (self.redirector, self.domain) = (true, true);
        self
    }

    /// The mediator embeds no relay.
    pub fn bare_mediator(mut self) -> Self {
        self.embedded_relay = false;
        self
    }

    /// With these entries in the agent's allow list, and no others.
    pub fn allow(mut self, entries: &[&str]) -> Self {
        self.allow = entries.iter().map(|&entry| entry.to_owned()).collect();
        self
    }
}

/// Everything up and running. Dropping it kills all.
pub struct World {
    /// The networks: events happen here.
    pub lab: Lab,
    /// `adit-mediator run`.
    pub mediator: Process,
    /// `adit-relay run`, in the order of [`Lab::relays`].
    pub relays: Vec<Process>,
    /// `adit agent`.
    pub agent: Process,
    /// See [`Setup::behind`].
    pub proxy: Option<ProxyServer>,
    setup: Setup,
    state: TempDir,
}

impl World {
    /// Brings everything up. Returns once the technician sees the agent online.
    pub async fn up(setup: Setup) -> anyhow::Result<Self> {
        let state = tempfile::Builder::new().prefix("adit-lab-").tempdir()?;
        let lab = Lab::up(&setup.topology).await?;
        let dir = |name: &str| state.path().join(name).to_string_lossy().into_owned();
        let proxy = match setup.proxy {
            Some(kind) => {
                let host = lab.stranger.as_ref().context("a host for the proxy")?;
                let proxy = ProxyServer::start(host, kind).await?;
                for site in [&lab.agent, &lab.technician] {
                    site.only_to(host.address, proxy::PORT)?;
                    site.host.set_env("HTTPS_PROXY", &proxy.url);
                    // Other programs read it, too: the RDP client.
                    site.host.set_env("NO_PROXY", "127.0.0.1,localhost");
                }
                Some(proxy)
            }
            None => None,
        };

        let server = &lab.server;
        run(server, "adit-mediator", &["init", "--data", &dir("server"), "--host", &hosts(server)]).await?;
        if setup.redirector && !lab.relays.is_empty() {
            let file = format!("{}/config.toml", dir("server"));
            let names: Vec<String> =
                lab.relays.iter().map(|host| format!("{:?}", host.address.to_string())).collect();
            let relays = format!("\nrelays = [{}]\n", names.join(", "));
            let config = std::fs::read_to_string(&file)?.replace("\nrelays = []\n", &relays);
            std::fs::write(&file, config)?;
        }
        if setup.domain {
            let file = format!("{}/config.toml", dir("server"));
            let domain = format!("\ndomain = {DOMAIN:?}\n");
            let config = std::fs::read_to_string(&file)?.replace("\ndomain = \"\"\n", &domain);
            std::fs::write(&file, config)?;
        }
        let relay = if setup.embedded_relay { "on" } else { "off" };
        let mediator = start(server, "adit-mediator", &["run", "--data", &dir("server"), "--relay", relay])?;
        accepts(server, (server.address, 443).into()).await?;

        let mut relays = Vec::new();
        for host in &lab.relays {
            let (token, data) = (token(&lab, &dir("server"), &["--role", "relay"]).await?, dir(&host.name));
            run(host, "adit-relay", &["enroll", &token, "--data", &data, "--host", &hosts(host)]).await?;
            relays.push(start(host, "adit-relay", &["run", "--data", &data])?);
            accepts(host, (host.address, 8002).into()).await?;
        }

        let token_of_agent = token(&lab, &dir("server"), &["--role", "agent"]).await?;
        let enrol = ["enroll", &token_of_agent, "--data", &dir("agent"), "--name", AGENT];
        run(&lab.agent.host, "adit", &enrol).await?;
        let of_technician = token(&lab, &dir("server"), &["--role", "technician", "--all-agents"]).await?;
        let enrol = ["enroll", &of_technician, "--data", &dir("technician"), "--name", "technician"];
        run(&lab.technician.host, "adit", &enrol).await?;

        if setup.redirector {
            let file = format!("{}/config.toml", dir("agent"));
            let config = std::fs::read_to_string(&file)?.replace("# redirector = false", "redirector = true");
            std::fs::write(&file, config)?;
            let allow = ["allow", "--data", &dir("server"), "technician", "--all-agents", "--redirector"];
            run(&lab.server, "adit-mediator", &allow).await?;
        }
        let agent = start_agent(&lab, &dir("agent"), &setup.allow)?;
        let world = Self { lab, mediator, relays, agent, proxy, setup, state };
        world.agent_online().await?;
        Ok(world)
    }

    /// State directory of `server`, `relay1`, ..., `agent` or `technician`; another name gives a new one.
    pub fn data(&self, name: &str) -> String {
        self.state.path().join(name).to_string_lossy().into_owned()
    }

    /// A directory that goes away with this world.
    pub fn scratch(&self) -> &Path {
        self.state.path()
    }

    /// Waits until the technician sees the agent online.
    pub async fn agent_online(&self) -> anyhow::Result<()> {
        let technician = self.data("technician");
        poll(PATIENCE, "the agent to be online", async || {
            let listed = self.technician(&["ls", "--json", "--data", &technician]).ok()?;
            let listed = listed.finish(PATIENCE).await.ok()?.ok().ok()?;
            let mut agents = listed.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            agents.any(|agent| agent["name"] == AGENT && agent["online"] == true).then_some(())
        })
        .await
    }

    /// Starts `adit` on the technician's device with exactly these arguments.
    pub fn technician(&self, arguments: &[&str]) -> anyhow::Result<Process> {
        start(&self.lab.technician.host, "adit", arguments)
    }

    /// A new token, from `adit-mediator token` with these arguments.
    pub async fn token(&self, arguments: &[&str]) -> anyhow::Result<String> {
        token(&self.lab, &self.data("server"), arguments).await
    }

    /// Starts the agent again, after its end.
    pub async fn restart_agent(&mut self) -> anyhow::Result<()> {
        self.agent = start_agent(&self.lab, &self.data("agent"), &self.setup.allow)?;
        self.agent_online().await
    }

    /// `adit forward AGENT -L 127.0.0.1:0:TARGET ...`: one local port for each target.
    pub async fn forward(&self, targets: &[&str]) -> anyhow::Result<Forward> {
        let listen: Vec<String> = targets.iter().map(|target| format!("127.0.0.1:0:{target}")).collect();
        let data = self.data("technician");
        let mut arguments = vec!["forward", AGENT, "--json", "--data", &data];
        for listen in &listen {
            arguments.extend(["-L", listen]);
        }
        let process = self.technician(&arguments)?;
        let mut local = Vec::new();
        for target in targets {
            let wanted = target.trim_end_matches("/udp");
            local.push(
                process
                    .event(PATIENCE, "listening", 0, |event| {
                        let target = event["target"].as_str()?.trim_end_matches("/udp");
                        if target == wanted { event["local"].as_str()?.parse().ok() } else { None }
                    })
                    .await?,
            );
        }
        Ok(Forward { process, local })
    }
}

/// A running `adit forward --json`.
pub struct Forward {
    /// The program.
    pub process: Process,
    /// Its local addresses, in the order of the targets asked for.
    pub local: Vec<SocketAddr>,
}

impl Forward {
    /// The events about tiers so far, oldest first.
    pub fn tiers(&self) -> Vec<String> {
        let events = self.process.events("tier");
        events.iter().filter_map(|event| Some(event["tier"].as_str()?.to_owned())).collect()
    }

    /// Waits until the tunnel is on `tier` (it may be already); the event that says so.
    pub async fn reaches(&self, tier: &str, deadline: Duration) -> anyhow::Result<Value> {
        let what = format!("the tier {tier}");
        let last = self.process.output(deadline, &what, |lines| {
            let last = named(lines, "tier").last()?;
            (last["tier"] == tier).then_some(last)
        });
        last.await.with_context(|| format!("tiers so far: {:?}", self.tiers()))
    }

    /// The tier now, as the last event says.
    pub fn tier(&self) -> Option<String> {
        self.tiers().pop()
    }
}

/// Where the binary `name` is: in `ADIT_BIN_DIR`, else where cargo puts it beside this executable.
pub fn binary(name: &str) -> anyhow::Result<PathBuf> {
    let beside = || {
        let me = std::env::current_exe().ok()?;
        let dirs = me.ancestors().skip(1).take(2).map(Path::to_owned).collect::<Vec<_>>();
        dirs.into_iter().map(|dir| dir.join(name)).find(|path| path.is_file())
    };
    match std::env::var_os("ADIT_BIN_DIR") {
        Some(dir) => Some(Path::new(&dir).join(name)).filter(|path| path.is_file()),
        None => beside(),
    }
    .with_context(|| format!("{name} is not built: cargo build --workspace --bins, or set ADIT_BIN_DIR"))
}

/// Starts one of adit's programs on `host`.
pub fn start(host: &Host, program: &str, arguments: &[&str]) -> anyhow::Result<Process> {
    let mut command = Command::new(binary(program)?);
    // The caller's own settings must not leak in.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("ADIT_")) {
        command.env_remove(name);
    }
    if let Some(filter) = LOG.get() {
        command.env("ADIT_LOG", filter);
    }
    command.args(arguments);
    host.spawn(command)
}

/// Runs one of adit's programs on `host` to its successful end; its standard output.
pub async fn run(host: &Host, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let finished = start(host, program, arguments)?.finish(PATIENCE).await?;
    finished.ok().with_context(|| format!("{program} {} on {}", arguments.join(" "), host.name))
}

/// All addresses of a host, for `--host`.
pub(crate) fn hosts(host: &Host) -> String {
    let v6 = host.address6.map_or(String::new(), |v6| format!(",{v6}"));
    format!("{}{v6}", host.address)
}

fn start_agent(lab: &Lab, data: &str, allow: &[String]) -> anyhow::Result<Process> {
    let mut arguments = vec!["agent", "--json", "--data", data];
    for entry in allow {
        arguments.extend(["--allow", entry]);
    }
    start(&lab.agent.host, "adit", &arguments)
}

async fn token(lab: &Lab, server: &str, arguments: &[&str]) -> anyhow::Result<String> {
    token_at(&lab.server, server, arguments).await
}

/// A new token of the mediator on that host, whose state is in `server`.
pub(crate) async fn token_at(host: &Host, server: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let arguments: Vec<&str> =
        ["token", "--data", server].into_iter().chain(arguments.iter().copied()).collect();
    let token = run(host, "adit-mediator", &arguments).await?;
    ensure!(token.trim().lines().count() == 1, "not a token and nothing else: {token:?}");
    Ok(token.trim().to_owned())
}

/// Waits until something on `host` accepts TCP connections at `address`.
pub(crate) async fn accepts(host: &Host, address: SocketAddr) -> anyhow::Result<()> {
    let asking = host.task(async move {
        let mut pace = tokio::time::interval(Duration::from_millis(20));
        while tokio::net::TcpStream::connect(address).await.is_err() {
            pace.tick().await;
        }
    })?;
    within(PATIENCE, &format!("{} to accept on {address}", host.name), async { Ok(asking.await?) }).await
}
