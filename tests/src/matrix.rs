//! Every kind of network against every other: which tier a session reaches, and how soon.
//!
//! One server, one relay on a machine of its own, and for each kind a site with an agent and one with a technician. At least
//! two routers lie between the NATs: each site's provider's.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Context;
use futures_util::stream::{self, StreamExt};
use serde_json::Value;
use tempfile::TempDir;

use crate::lab::{Host, NatKind, Neighbours, Site, Sites, Topology};
use crate::poll;
use crate::process::{Process, named};
use crate::traffic::{echo, echoed};
use crate::world::{AGENT, PATIENCE, Setup, World, accepts, hosts, run, start, token_at};

/// The kinds of the matrix.
pub const KINDS: [NatKind; 16] = [
    NatKind::None,
    NatKind::Firewall,
    NatKind::FullCone,
    NatKind::AddressRestricted,
    NatKind::Cone,
    NatKind::Rejecting,
    NatKind::Symmetric,
    NatKind::Sequential,
    NatKind::CgnatCone,
    NatKind::CgnatSymmetric,
    NatKind::UdpBlocked,
    NatKind::Ipv6Only,
    NatKind::DualStack,
    NatKind::Pcp,
    NatKind::NatPmp,
    NatKind::Upnp,
];

/// How long a session may take to become direct.
const LIMIT: Duration = Duration::from_secs(10);
/// How long one is watched that should stay on the relay.
const WATCHED: Duration = Duration::from_secs(3);

/// What a pair of networks permits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// Direct, each time.
    Direct,
    /// Direct by chance: many sockets meet many probes, or a guess.
    Likely,
    /// No way past the relay.
    Relay,
}

/// What the pair of an agent's and a technician's network permits.
pub fn expected(one: NatKind, other: NatKind) -> Expected {
    use NatKind::{AddressRestricted, CgnatSymmetric, FullCone, Ipv6Only, None, Sequential, Symmetric};
    let pair = [one, other];
    if pair.iter().all(|kind| kind.has_ipv6()) {
        return Expected::Direct;
    }
    if pair.contains(&Ipv6Only) {
        return Expected::Relay;
    }
    let is_reachable = |kind: &NatKind| *kind == None || kind.maps_ports();
    if pair.contains(&NatKind::UdpBlocked) {
        // By TCP to the one that can be reached.
        return if pair.iter().any(is_reachable) { Expected::Direct } else { Expected::Relay };
    }
    if pair.iter().any(|kind| kind.maps_ports()) {
        return Expected::Direct;
    }
    let depends = |kind: NatKind| matches!(kind, Symmetric | Sequential | CgnatSymmetric);
    // Others let in whoever has the address right.
    let filters_ports = |kind: NatKind| !matches!(kind, None | FullCone | AddressRestricted);
    match (depends(one), depends(other)) {
        (true, true) if pair == [Sequential; 2] => Expected::Likely,
        (true, true) => Expected::Relay,
        (true, false) if filters_ports(other) => Expected::Likely,
        (false, true) if filters_ports(one) => Expected::Likely,
        _ => Expected::Direct,
    }
}

/// One session.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// From the start of the command to an echoed byte.
    pub first_byte: Duration,
    /// From the start of the command to the tier `direct`, as the command says.
    pub direct: Option<Duration>,
}

/// What was measured, by agent's and technician's kind.
pub type Cells = BTreeMap<(usize, usize), Vec<Run>>;

/// Everything up and running.
pub struct Matrix {
    agents: Vec<(Site, Process, SocketAddr)>,
    technicians: Vec<Site>,
    kinds: Vec<NatKind>,
    state: TempDir,
    _servers: [Process; 2],
    _hosts: [Host; 2],
    _sites: Sites,
}

impl Matrix {
    /// Brings up an agent and a technician behind each of these.
    pub async fn up(kinds: &[NatKind]) -> anyhow::Result<Self> {
        let state = tempfile::Builder::new().prefix("adit-matrix-").tempdir()?;
        let dir = |name: &str| state.path().join(name).to_string_lossy().into_owned();
        let name = |role: &str, kind: &NatKind| format!("{role}-{kind}");
        let names: Vec<(String, NatKind)> = ["agent", "tech"]
            .iter()
            .flat_map(|role| kinds.iter().map(move |kind| (name(role, kind), *kind)))
            .collect();
        let mut lab = Sites::up(&names).await?;
        let (server, relay) = (lab.server.clone(), lab.relay.clone());

        run(&server, "adit-mediator", &["init", "--data", &dir("server"), "--host", &hosts(&server)]).await?;
        let mediator = start(&server, "adit-mediator", &["run", "--data", &dir("server")])?;
        accepts(&server, (server.address, 443).into()).await?;
        let token = token_at(&server, &dir("server"), &["--role", "relay"]).await?;
        run(&relay, "adit-relay", &["enroll", &token, "--data", &dir("relay"), "--host", &hosts(&relay)])
            .await?;
        let relaying = start(&relay, "adit-relay", &["run", "--data", &dir("relay")])?;
        accepts(&relay, (relay.address, 8002).into()).await?;

        let technicians = lab.sites.split_off(kinds.len());
        let mut agents = Vec::new();
        for (site, kind) in lab.sites.drain(..).zip(kinds) {
            let name = name("agent", kind);
            let token = token_at(&server, &dir("server"), &["--role", "agent"]).await?;
            run(&site.host, "adit", &["enroll", &token, "--data", &dir(&name), "--name", &name]).await?;
            let allow = ["agent", "--data", &dir(&name), "--allow", "127.0.0.1:1-65535"];
            let agent = start(&site.host, "adit", &allow)?;
            let echo = echo(&site.host).await?;
            agents.push((site, agent, echo));
        }
        for (site, kind) in technicians.iter().zip(kinds) {
            let name = name("tech", kind);
            let token = token_at(&server, &dir("server"), &["--role", "technician", "--all-agents"]).await?;
            run(&site.host, "adit", &["enroll", &token, "--data", &dir(&name), "--name", &name]).await?;
        }
        let (_servers, _hosts) = ([mediator, relaying], [server, relay]);
        let matrix =
            Self { agents, technicians, kinds: kinds.to_vec(), state, _servers, _hosts, _sites: lab };
        matrix.agents_online().await?;
        Ok(matrix)
    }

    async fn agents_online(&self) -> anyhow::Result<()> {
        let site = self.technicians.first().context("no technician")?;
        let data = self.data("tech", self.kinds[0]);
        poll(PATIENCE, "all agents to be online", async || {
            let listed = start(&site.host, "adit", &["ls", "--json", "--data", &data]).ok()?;
            let listed = listed.finish(PATIENCE).await.ok()?.ok().ok()?;
            let agents = listed.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let online = agents.filter(|agent| agent["online"] == true).count();
            (online == self.kinds.len()).then_some(())
        })
        .await
    }

    fn data(&self, role: &str, kind: NatKind) -> String {
        self.state.path().join(format!("{role}-{kind}")).to_string_lossy().into_owned()
    }

    /// Runs each cell as often as `times` says, `jobs` at once, and no agent and no technician twice at once. Also what went
    /// wrong in sessions that are not among them.
    pub async fn measure(
        &self,
        jobs: usize,
        times: impl Fn(NatKind, NatKind) -> usize,
    ) -> (Cells, Vec<String>) {
        let count = self.kinds.len();
        let (mut cells, mut wrong) = (Cells::new(), Vec::new());
        let most =
            (0..count * count).map(|cell| times(self.kinds[cell / count], self.kinds[cell % count])).max();
        for round in 0..most.unwrap_or_default() {
            for shift in 0..count {
                let cells_of_shift = (0..count).map(|agent| (agent, (agent + shift) % count));
                let due = cells_of_shift.filter(|(a, t)| times(self.kinds[*a], self.kinds[*t]) > round);
                let runs = due.map(|(a, t)| async move { ((a, t), self.run(a, t).await) });
                let mut runs = stream::iter(runs).buffer_unordered(jobs);
                while let Some((cell, run)) = runs.next().await {
                    let (agent, technician) = (self.kinds[cell.0], self.kinds[cell.1]);
                    match run {
                        Ok(run) => cells.entry(cell).or_default().push(run),
                        Err(error) => {
                            wrong.push(format!("agent {agent}, technician {technician}: {error:#}"))
                        }
                    }
                }
            }
        }
        (cells, wrong)
    }

    async fn run(&self, agent: usize, technician: usize) -> anyhow::Result<Run> {
        let kinds = (self.kinds[agent], self.kinds[technician]);
        let expected = expected(kinds.0, kinds.1);
        let host = &self.technicians[technician].host;
        let (name, data) = (format!("agent-{}", kinds.0), self.data("tech", kinds.1));
        Run::of(host, &name, &data, self.agents[agent].2, expected).await
    }

    /// Routers that map ports on request have none left of the sessions that were.
    pub async fn ports_given_back(&self) -> anyhow::Result<()> {
        let sites = self.agents.iter().map(|(site, ..)| site).chain(&self.technicians);
        for site in sites.filter(|site| site.nat.maps_ports()) {
            poll(PATIENCE, &format!("{} to have given its ports back", site.host.name), async || {
                (site.mapped_ports().ok()? == 0).then_some(())
            })
            .await?;
        }
        Ok(())
    }

    /// The kinds, in the order of the cells.
    pub fn kinds(&self) -> &[NatKind] {
        &self.kinds
    }
}

/// Both ends behind one router, with so many sessions each: what is expected, and what came.
pub async fn behind_one_router(rounds: usize) -> anyhow::Result<Vec<(Neighbours, Expected, Vec<Run>)>> {
    let mut measured = Vec::new();
    for (neighbours, expected) in [
        (Neighbours::Reachable, Expected::Direct),
        (Neighbours::Hairpin, Expected::Direct),
        (Neighbours::Isolated, Expected::Relay),
    ] {
        let topology = Topology::behind_one_router(NatKind::FullCone, neighbours);
        let world = World::up(Setup::new(topology)).await?;
        let target = echo(&world.lab.agent.host).await?;
        let data = world.data("technician");
        let mut runs = Vec::new();
        for _ in 0..rounds {
            runs.push(Run::of(&world.lab.technician.host, AGENT, &data, target, expected).await?);
        }
        measured.push((neighbours, expected, runs));
    }
    Ok(measured)
}

impl Run {
    /// One session, from command to end.
    async fn of(
        host: &Host,
        agent: &str,
        data: &str,
        target: SocketAddr,
        expected: Expected,
    ) -> anyhow::Result<Self> {
        let listen = format!("127.0.0.1:0:{target}");
        let started = Instant::now();
        let forward = start(host, "adit", &["forward", agent, "--json", "--data", data, "-L", &listen])?;
        let local: SocketAddr =
            forward.event(PATIENCE, "listening", 0, |event| event["local"].as_str()?.parse().ok()).await?;
        host.task(echoed(local))?.await?.context("no echo through the tunnel")?;
        let first_byte = started.elapsed();
        let limit = match expected {
            Expected::Relay => WATCHED,
            _ => LIMIT,
        };
        let direct = forward.output(limit.saturating_sub(started.elapsed()), "the tier direct", |lines| {
            let mut tiers = named(lines, "tier");
            tiers.find_map(|event| event["since_start_ms"].as_u64().filter(|_| event["tier"] == "direct"))
        });
        let direct = direct.await.ok().map(Duration::from_millis);
        if direct.is_none() && expected != Expected::Relay {
            // With a log there is more than warnings.
            forward.error_lines().iter().for_each(|line| eprintln!("lab: {agent}, {data}: {line}"));
        }
        forward.interrupt()?;
        forward.finish(PATIENCE).await?;
        Ok(Self { first_byte, direct })
    }
}

fn millis(times: Vec<Duration>) -> String {
    median(times).map_or_else(|| "-".to_owned(), |time| time.as_millis().to_string())
}

fn direct(runs: &[Run]) -> Vec<Duration> {
    runs.iter().filter_map(|run| run.direct).collect()
}

fn tier(runs: &[Run]) -> String {
    match direct(runs).len() {
        0 => "relay".to_owned(),
        count if count == runs.len() => format!("**{count}/{count}**"),
        count => format!("{count}/{}", runs.len()),
    }
}

fn first(runs: &[Run]) -> String {
    millis(runs.iter().map(|run| run.first_byte).collect())
}

fn slowest(runs: &[Run]) -> String {
    match direct(runs).into_iter().max() {
        Some(slowest) if runs.len() > 1 => format!("{} ({})", millis(direct(runs)), slowest.as_millis()),
        _ => millis(direct(runs)),
    }
}

/// Markdown: what [`behind_one_router`] measured.
pub fn one_router_table(measured: &[(Neighbours, Expected, Vec<Run>)]) -> String {
    let mut text = "## Both behind one router\n\n| ends | tier | first byte | direct |\n|".to_owned();
    text += &(" --- |".repeat(4) + "\n");
    for (neighbours, _, runs) in measured {
        let name = match neighbours {
            Neighbours::Reachable => "on one network",
            Neighbours::Hairpin => "isolated, the router hairpins",
            Neighbours::Isolated => "isolated",
        };
        let _ = writeln!(text, "| {name} | {} | {} | {} |", tier(runs), first(runs), slowest(runs));
    }
    text
}

/// Markdown: tier, time to the first byte, time to direct.
pub fn tables(kinds: &[NatKind], cells: &Cells) -> String {
    let mut text = String::new();
    let mut table = |title: &str, show: &dyn Fn(&[Run]) -> String| {
        let _ = writeln!(text, "## {title}\n");
        let head: Vec<String> = kinds.iter().map(NatKind::to_string).collect();
        let _ = writeln!(text, "| agent \\ technician | {} |", head.join(" | "));
        let _ = writeln!(text, "|{}", " --- |".repeat(kinds.len() + 1));
        for (row, kind) in kinds.iter().enumerate() {
            let shown: Vec<String> = (0..kinds.len())
                .map(|column| cells.get(&(row, column)).map_or_else(|| "-".to_owned(), |runs| show(runs)))
                .collect();
            let _ = writeln!(text, "| {kind} | {} |", shown.join(" | "));
        }
        let _ = writeln!(text);
    };
    table(
        "Tier: how many of the sessions were direct within 10 s (where that is not expected: within 3 s)",
        &tier,
    );
    table("Milliseconds from command to first echoed byte (median)", &first);
    table("Milliseconds from command to direct (median, slowest)", &slowest);
    text
}

fn median(mut times: Vec<Duration>) -> Option<Duration> {
    times.sort();
    times.get(times.len() / 2).copied()
}
