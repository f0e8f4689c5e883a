//! `adit-mediator demo`: everything on this machine's loopback with throwaway keys.
//!
//! Server, agent and technician are processes of their own, which enrol with tokens and talk over
//! sockets, as they would in the field. This process only starts them and looks on; without `--target`
//! it also serves a small web page for the agent to reach.

mod children;
mod page;

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use adit_client::exit::{Exit, Failure};
use adit_client::status;
use adit_protocol::{Protocol, Role, Target};
use clap::Args;
use serde_json::Value;
use tokio::time::timeout;

use crate::config;
use crate::organisation::Organisation;
use crate::token::{self, Wanted};
use children::{Child, spawn};

/// How long any one step may take on a busy machine.
const STEP: Duration = Duration::from_secs(30);
/// How long `--once` waits for the direct path.
const DIRECT: Duration = Duration::from_secs(20);
/// A target that refuses has done so by then: everything is on this machine.
const REFUSED: Duration = Duration::from_millis(500);
/// Between two updates of the live line.
const TICK: Duration = Duration::from_secs(1);
/// Bytes that `--once` sends each way, twice.
const SAMPLE: usize = 8 << 20;

/// Arguments of `demo`.
#[derive(Debug, Args)]
pub struct Demo {
    /// Reach this service of this machine instead of the built-in web page.
    #[arg(long, value_name = "HOST:PORT")]
    target: Option<Target>,
    /// Check everything once, end to end, and exit with 0 when it works.
    #[arg(long)]
    once: bool,
}

/// Why the demo ended early.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// A step failed.
    #[error("the demo failed: {0}")]
    Step(String),
    /// A step took too long.
    #[error("the demo failed: {what} took longer than {} s", limit.as_secs())]
    TimedOut {
        /// Which.
        what: &'static str,
        /// How long it may take.
        limit: Duration,
    },
}

impl Failure for DemoError {
    fn exit(&self) -> Exit {
        match self {
            Self::Step(_) => Exit::Failed,
            Self::TimedOut { .. } => Exit::TimedOut,
        }
    }

    fn remedy(&self) -> Option<String> {
        Some("see the lines above; ADIT_LOG=debug says more".to_owned())
    }
}

/// Whatever fails inside; [`run`] makes a [`DemoError`] of it.
type Anything = Box<dyn std::error::Error + Send + Sync>;

impl From<Anything> for DemoError {
    fn from(error: Anything) -> Self {
        error.downcast::<Self>().map_or_else(|error| Self::Step(error.to_string()), |known| *known)
    }
}

/// Runs the demo until Ctrl-C, or once.
///
/// # Errors
/// [`DemoError`].
pub async fn run(arguments: Demo) -> Result<(), DemoError> {
    prepare_and_play(arguments).await.map_err(DemoError::from)
}

async fn prepare_and_play(arguments: Demo) -> Result<(), Anything> {
    let dir = Scratch::new()?;
    let (target, _page) = match arguments.target.clone() {
        Some(target) if target.protocol == Protocol::Tcp => (target, None),
        Some(target) => return Err(format!("{target}: only TCP targets").into()),
        None => {
            let page = page::Page::start().await?;
            let address = page.address();
            (Target::new(&address.ip().to_string(), address.port(), Protocol::Tcp)?, Some(page))
        }
    };
    let stop = crate::cli::stop_signal();
    tokio::pin!(stop);
    tokio::select! {
        done = play(&arguments, &dir.0, &target) => done,
        () = &mut stop => {
            eprintln!("\nstopped");
            Ok(())
        }
    }
}

async fn play(arguments: &Demo, dir: &Path, target: &Target) -> Result<(), Anything> {
    let started = Instant::now();
    let (server, agent, technician) = (dir.join("server"), dir.join("agent"), dir.join("technician"));

    Organisation::init(&server, &["127.0.0.1".to_owned()])?;
    std::fs::write(server.join(config::FILE), settings()?)?;
    let mut mediator = spawn(["run", "--data"], &server, &[])?;
    let wanted = |role, all_agents| Wanted {
        role,
        ttl: 600,
        uses: 1,
        tags: Vec::new(),
        all_agents,
        may_replace: false,
    };
    let agent_token = token::make(&server, wanted(Role::Agent, false)).await?;
    let technician_token = token::make(&server, wanted(Role::Technician, true)).await?;
    step("enrolling", enrol(&agent, "demo-agent", &agent_token.to_string(), &mut mediator)).await?;
    step("enrolling", enrol(&technician, "demo-technician", &technician_token.to_string(), &mut mediator))
        .await?;

    let allow = target.to_string();
    let mut agent = spawn(["adit", "agent", "--json", "--data"], &agent, &["--allow", &allow])?;
    step("connecting the agent", agent.event("online")).await?;
    let forward = format!("0:{target}");
    let mut forwarding =
        spawn(["adit", "forward", "demo-agent", "--json", "--data"], &technician, &["-L", &forward])?;
    let listening = step("opening the tunnel", forwarding.event("listening")).await?;
    let local: SocketAddr = text(&listening, "local").parse()?;
    let first = step("opening the session", forwarding.event("tier")).await?;
    eprintln!("server, agent and technician are up after {} ms", started.elapsed().as_millis());
    say_tier(&first);

    if arguments.once {
        return once(arguments, local, first, &mut forwarding).await;
    }
    match arguments.target {
        None => {
            println!("\n  click here:  http://{local}/\n\nThe page comes from the agent, through the tunnel.")
        }
        Some(_) => println!("\n  connect to:  {local}\n\nThat is {target} at the agent, through the tunnel."),
    }
    println!("Ctrl-C ends the demo.\n");
    live(&technician, &mut [mediator, agent, forwarding]).await
}

/// Data both ways, on the relay or wherever the session began, and again on the direct path.
async fn once(
    arguments: &Demo,
    local: SocketAddr,
    first: Value,
    forwarding: &mut Child,
) -> Result<(), Anything> {
    let sample = if arguments.target.is_none() { Some(page::sample(SAMPLE)) } else { None };
    let check = async |tier: &str| {
        match &sample {
            Some(sample) => {
                let started = Instant::now();
                let hash = step("a transfer", page::exchange(local, sample)).await?;
                let seconds = started.elapsed().as_secs_f64();
                let rate = 2.0 * SAMPLE as f64 * 8.0 / 1e6 / seconds;
                println!(
                    "{SAMPLE} bytes there and back from tier {tier} on: SHA-256 {hash} equal, {rate:.0} Mbit/s"
                );
            }
            None => {
                step("connecting to the target", connect(local)).await?;
                println!(
                    "connected to the target from tier {tier} on; its bytes are its own, so none were compared"
                );
            }
        }
        Ok::<_, Anything>(())
    };
    check(text(&first, "tier")).await?;
    let mut tier = first;
    let direct = async {
        while text(&tier, "tier") != "direct" {
            tier = forwarding.event("tier").await?;
            say_tier(&tier);
        }
        Ok::<_, Anything>(())
    };
    timeout(DIRECT, direct)
        .await
        .map_err(|_| DemoError::TimedOut { what: "reaching the direct tier", limit: DIRECT })??;
    check("direct").await?;
    println!("demo: ok");
    Ok(())
}

/// Connects through the tunnel. A target that refused shows as a connection that ends at once.
async fn connect(local: SocketAddr) -> Result<(), Anything> {
    let stream = tokio::net::TcpStream::connect(local).await?;
    let mut byte = [0];
    match timeout(REFUSED, stream.peek(&mut byte)).await {
        // It waits for its client to speak first.
        Err(_) => Ok(()),
        Ok(Ok(read)) if read > 0 => Ok(()),
        Ok(Ok(_)) => Err("the target closed the connection at once".into()),
        Ok(Err(error)) => Err(format!("the target cannot be reached from the agent: {error}").into()),
    }
}

/// One line that follows tier, carrier, round trip and throughput.
async fn live(technician: &Path, children: &mut [Child]) -> Result<(), Anything> {
    let terminal = std::io::stdout().is_terminal();
    let (mut before, mut said) = ((0, 0), String::new());
    loop {
        tokio::time::sleep(TICK).await;
        for child in &mut *children {
            child.check()?;
        }
        let processes = status::ask(technician).await.unwrap_or_default();
        let Some(session) = processes.iter().flat_map(|process| &process.sessions).next() else { continue };
        let carrier = session.carriers.iter().find(|carrier| carrier.active);
        let mbit = |now: u64, before: u64| now.saturating_sub(before) as f64 * 8.0 / 1e6 / TICK.as_secs_f64();
        let tier = session.tier.as_deref().unwrap_or("none");
        let name = carrier.map_or("-", |carrier| carrier.carrier.as_str());
        let line = format!(
            "tier {tier}, carrier {name}, round trip {} ms, up {:.1} Mbit/s, down {:.1} Mbit/s",
            carrier.and_then(|carrier| carrier.rtt_ms).map_or("-".to_owned(), |ms| format!("{ms:.1}")),
            mbit(session.sent, before.0),
            mbit(session.received, before.1),
        );
        before = (session.sent, session.received);
        if terminal {
            print!("\r\x1b[K{line}");
            std::io::stdout().flush()?;
        } else if said != tier {
            // A log file gets a line for each change, not one a second.
            println!("{line}");
            tier.clone_into(&mut said);
        }
    }
}

async fn enrol(dir: &Path, name: &str, token: &str, mediator: &mut Child) -> Result<(), Anything> {
    // The server may need a moment before it listens.
    for attempt in 0.. {
        let mut child = spawn(["adit", "enroll", "-", "--json", "--data"], dir, &["--name", name])?;
        child.feed(token).await?;
        match child.wait().await? {
            Ok(()) => return Ok(()),
            Err(why) if attempt == 20 => return Err(format!("{name} could not enrol: {why}").into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
        mediator.check()?;
    }
    Ok(())
}

/// Settings with free ports.
fn settings() -> Result<String, Anything> {
    let tcp = || std::net::TcpListener::bind("127.0.0.1:0");
    let udp = std::net::UdpSocket::bind("127.0.0.1:0")?;
    // All are held until all are chosen, so that they differ.
    let (relay, https, diagnostics) = (tcp()?, tcp()?, tcp()?);
    Ok(format!(
        "hosts = [\"127.0.0.1\"]\n[listen]\nudp = \"{}\"\nrelay = \"{}\"\nhttps = \"{}\"\ndiagnostics = \"{}\"\n",
        udp.local_addr()?,
        relay.local_addr()?,
        https.local_addr()?,
        diagnostics.local_addr()?
    ))
}

async fn step<T, E: Into<Anything>>(
    what: &'static str,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, Anything> {
    timeout(STEP, work).await.map_err(|_| DemoError::TimedOut { what, limit: STEP })?.map_err(Into::into)
}

fn say_tier(event: &Value) {
    let ms = event.get("since_start_ms").and_then(Value::as_u64).unwrap_or_default();
    println!(
        "tier {} over {} after {ms} ms: {}",
        text(event, "tier"),
        text(event, "carrier"),
        text(event, "reason")
    );
}

fn text<'a>(event: &'a Value, key: &str) -> &'a str {
    event.get(key).and_then(Value::as_str).unwrap_or("?")
}

/// A directory that is gone after the demo.
struct Scratch(std::path::PathBuf);

impl Scratch {
    fn new() -> Result<Self, Anything> {
        let dir = std::env::temp_dir().join(format!("adit-demo-{:016x}", rand::random::<u64>()));
        adit_client::identity::store::create_private_dir(&dir)?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
