//! The lab by hand: a topology with the real binaries in it, and a shell on any of its hosts.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use adit_tests::harness;
use adit_tests::lab::{Host, Lab, Link, NatKind, Neighbours, Rate, Topology};
use adit_tests::matrix::{KINDS, Matrix, behind_one_router, one_router_table, tables};
use adit_tests::process::Process;
use adit_tests::world::{self, AGENT, Setup, World, binary};
use anyhow::Context;
use clap::{Args, Parser, Subcommand};

/// Two sites behind NATs and a server, in network namespaces on this machine.
///
/// Needs nft, tc and ip (Debian: nftables, iproute2), ethtool for --delay, --loss and the like, and
/// no root.
#[derive(Parser)]
#[command(name = "lab", after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Do,
}

const EXAMPLES: &str = "Examples:
  cargo build --release --workspace --bins
  target/release/lab up --agent cone --technician symmetric --rate 100mbit --delay 20ms
  target/release/lab shell agent        in another terminal, while it is up
  target/release/lab up --networks-only --shell agent";

#[derive(Subcommand)]
enum Do {
    /// Bring a lab up, with a shell in it; leaving the shell takes it down.
    Up(Up),
    /// Open a shell on a host of the lab that is up: agent, technician, server, relay1, ...
    Shell {
        /// The host.
        host: String,
    },
    /// Run every kind of network against every other, and both ends behind one router; print tier and times as Markdown.
    Matrix {
        /// Sessions of each cell.
        #[arg(long, default_value_t = 1)]
        rounds: usize,
        /// Sessions at once. More than one make the times longer than they are.
        #[arg(long, default_value_t = 2)]
        jobs: usize,
        /// Only these kinds, for example cone,symmetric.
        #[arg(long, value_delimiter = ',', default_values_t = KINDS)]
        kinds: Vec<NatKind>,
        /// Show what all programs say when it is over, with this ADIT_LOG, for example adit_tunnel=debug.
        #[arg(long)]
        log: Option<String>,
    },
}

#[derive(Args)]
struct Up {
    /// NAT of the agent's site: none, firewall, full-cone, address-restricted, cone, rejecting, symmetric, sequential,
    /// cgnat-cone, cgnat-symmetric, udp-blocked, https-only, dual-stack, ipv6-only, pcp, nat-pmp, upnp.
    #[arg(long, default_value = "cone")]
    agent: NatKind,
    /// NAT of the technician's site.
    #[arg(long, default_value = "cone")]
    technician: NatKind,
    /// Both behind the agent's router: on one network, or on isolated segments (the router hairpins: with full-cone).
    #[arg(long, value_enum)]
    one_router: Option<Neighbours>,
    /// Relays beside the one in the mediator.
    #[arg(long, default_value_t = 0)]
    relays: usize,
    /// Rate of each site's line, for example 100mbit.
    #[arg(long)]
    rate: Option<Rate>,
    /// Delay of each site's line, one way, for example 20ms.
    #[arg(long, default_value = "0ms", value_parser = milliseconds)]
    delay: Duration,
    /// Percent of the packets that each site's line loses, each way.
    #[arg(long, default_value_t = 0.0)]
    loss: f64,
    /// Percent of the packets that others overtake.
    #[arg(long, default_value_t = 0.0)]
    reorder: f64,
    /// Percent of the packets that arrive twice.
    #[arg(long, default_value_t = 0.0)]
    duplicate: f64,
    /// Which packets are lost, reordered and duplicated.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Networks only: no server, agent or technician is started.
    #[arg(long)]
    networks_only: bool,
    /// Where the shell is.
    #[arg(long, default_value = "technician")]
    shell: String,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        // Before any thread is started.
        Do::Up(up) => {
            let entries = Entries::path();
            harness::enter().and_then(|()| harness::runtime()?.block_on(up_and_wait(&up, entries)))
        }
        Do::Shell { host } => shell(&host),
        Do::Matrix { rounds, jobs, kinds, log } => {
            harness::enter().and_then(|()| harness::runtime()?.block_on(matrix(rounds, jobs, &kinds, log)))
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            adit_tests::process::print_outputs();
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn matrix(rounds: usize, jobs: usize, kinds: &[NatKind], log: Option<String>) -> anyhow::Result<()> {
    let shown = log.is_some();
    if let Some(filter) = log {
        world::log(filter.leak());
    }
    let matrix = Matrix::up(kinds).await?;
    let (cells, wrong) = matrix.measure(jobs, |_, _| rounds).await;
    wrong.iter().for_each(|wrong| eprintln!("lab: {wrong}"));
    print!("{}", tables(matrix.kinds(), &cells));
    drop(matrix);
    print!("{}", one_router_table(&behind_one_router(rounds).await?));
    if shown {
        adit_tests::process::print_outputs();
    }
    Ok(())
}

async fn up_and_wait(up: &Up, entries: PathBuf) -> anyhow::Result<()> {
    let link = Link {
        delay: up.delay,
        rate: up.rate,
        loss: up.loss,
        reorder: up.reorder,
        duplicate: up.duplicate,
        seed: up.seed,
    };
    let topology = match up.one_router {
        Some(neighbours) => Topology::behind_one_router(up.agent, neighbours),
        None => Topology::new(up.agent, up.technician),
    };
    let topology = topology.relays(up.relays).link(link);
    if up.networks_only {
        let lab = Lab::up(&topology).await?;
        return wait_in_shell(&lab, &up.shell, entries, "");
    }
    let world = World::up(Setup::new(topology)).await?;
    let hints = format!(
        "  adit, adit-mediator and adit-relay are in the PATH. For example, on the technician:\n    \
         adit forward {AGENT} -L 0:127.0.0.1:22 --data {}\n  State: {}\n",
        world.data("technician"),
        world.scratch().display()
    );
    wait_in_shell(&world.lab, &up.shell, entries, &hints)
}

fn wait_in_shell(lab: &Lab, host: &str, path: PathBuf, hints: &str) -> anyhow::Result<()> {
    let sites = [&lab.agent.host, &lab.technician.host, &lab.server];
    let hosts: Vec<&Host> = sites.into_iter().chain(&lab.relays).collect();
    let inside = hosts.iter().find(|one| one.name == host).context("no such host")?;
    println!("The lab is up:");
    for host in &hosts {
        println!("  {:<11} {}", host.name, host.address);
    }
    println!("{hints}  `lab shell HOST` in another terminal opens a shell on another host.");
    println!("This is the {host}'s shell; leaving it takes the lab down.");
    let _entries = Entries::write(path, &hosts)?;
    let mut command = Command::new("bash");
    command.args(["--norc", "-i"]).env("PS1", prompt(host)).env("PATH", path_with_binaries());
    inside.spawn_attached(command)?.wait()?;
    Ok(())
}

/// Enters the namespaces of a lab that another process holds.
fn shell(host: &str) -> anyhow::Result<()> {
    let entries =
        std::fs::read_to_string(Entries::path()).context("no lab is up: start one with `lab up`")?;
    let id = entries.lines().find_map(|line| line.strip_prefix(host)?.strip_prefix(' '));
    let id = id.with_context(|| format!("no such host: {host}; there are:\n{entries}"))?;
    let mut command = Command::new("nsenter");
    command.args(["--preserve-credentials", "-U", "-n", "-m", "-t", id, "bash", "--norc", "-i"]);
    command.env("PS1", prompt(host)).env("PATH", path_with_binaries());
    Err(harness::become_command(command)).context("cannot start nsenter (Debian: util-linux)")
}

/// A file that says how to enter each host: its name, and the id of a process there.
struct Entries {
    path: PathBuf,
    _doormen: Vec<Process>,
}

impl Entries {
    /// Of this user; to be called outside of the lab, where one is still oneself.
    fn path() -> PathBuf {
        let user = rustix::process::getuid().as_raw();
        std::env::temp_dir().join(format!("adit-lab-{user}.hosts"))
    }

    fn write(path: PathBuf, hosts: &[&Host]) -> anyhow::Result<Self> {
        let (mut text, mut doormen) = (String::new(), Vec::new());
        for host in hosts {
            let mut command = Command::new("sleep");
            command.arg("infinity");
            let doorman = host.spawn(command)?;
            text += &format!("{} {}\n", host.name, doorman.id()?);
            doormen.push(doorman);
        }
        std::fs::write(&path, text)?;
        Ok(Self { path, _doormen: doormen })
    }
}

impl Drop for Entries {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn prompt(host: &str) -> String {
    format!("[{host}] \\w\\$ ")
}

fn path_with_binaries() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    match binary("adit").ok().as_deref().and_then(std::path::Path::parent) {
        Some(dir) => format!("{}:{path}:/usr/sbin:/sbin", dir.display()),
        None => format!("{path}:/usr/sbin:/sbin"),
    }
}

fn milliseconds(text: &str) -> Result<Duration, String> {
    let number = text.strip_suffix("ms").and_then(|number| number.parse::<f64>().ok());
    let number = number.filter(|number| (0.0..=60_000.0).contains(number));
    number
        .map(|ms| Duration::from_secs_f64(ms / 1e3))
        .ok_or_else(|| format!("not a delay: {text:?} (for example 20ms)"))
}
