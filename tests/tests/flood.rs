//! What a flood from the internet does to those who work: how long it takes to open a session, from the command to
//! the first byte, and what is left of it in the server's memory and log.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use adit_tests::lab::{Host, NatKind, Topology};
use adit_tests::traffic::greeter;
use adit_tests::world::{AGENT, PATIENCE, Setup, World};
use adit_tests::{lab_tests, poll};
use anyhow::{Context, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};

lab_tests!(junk_from_one_source, junk_from_two_hundred_sources);

/// Sessions opened in each quiet time, and in each flood; one after the other, so that both meet the same machine.
const SESSIONS: usize = 40;
const ROUNDS: usize = 3;
/// A minute's worth, at least.
const CONNECTIONS: u64 = 5_000;
const DATAGRAMS: u64 = 100_000;
/// Datagrams at once; one connection is made for every two such batches.
const BATCH: u64 = 10;
const BATCHES: Duration = Duration::from_millis(5);
/// The server drives out whoever says nothing after 5 s.
const SILENT: Duration = Duration::from_secs(8);

async fn junk_from_one_source() -> anyhow::Result<()> {
    flood(1).await
}

async fn junk_from_two_hundred_sources() -> anyhow::Result<()> {
    flood(200).await
}

async fn flood(sources: u8) -> anyhow::Result<()> {
    let world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone).stranger())).await?;
    let stranger = world.lab.stranger.clone().context("a stranger")?;
    let sources = addresses(&stranger, sources).await?;
    let port = greeter(&world.lab.agent.host).await?;
    open_sessions(&world, port, 5).await?;
    let (cold, lines) = (resident(&world)?, logged(&world).await?);
    // Of a server that has worked and was flooded before: the first time fills tables and caches for good.
    let mut before = 0;

    let (mut quiet, mut under) = (vec![], vec![]);
    let (mut connections, mut datagrams, mut time) = (0, 0, Duration::ZERO);
    for round in 0..ROUNDS {
        quiet.extend(open_sessions(&world, port, SESSIONS).await?);
        let flood = Flood::start(&stranger, world.lab.server.address, sources.clone())?;
        under.extend(open_sessions(&world, port, SESSIONS).await?);
        let done = flood.stop().await?;
        (connections, datagrams, time) = (connections + done.0, datagrams + done.1, time + done.2);
        until_quiet(&world).await?;
        if round == 0 {
            // The allocator gives back what was not used for a second.
            tokio::time::sleep(Duration::from_secs(3)).await;
            before = resident(&world)?;
        }
    }
    let a_minute = |count: u64| (count as f64 * 60.0 / time.as_secs_f64()) as u64;
    let (connections_a_minute, datagrams_a_minute) = (a_minute(connections), a_minute(datagrams));
    println!(
        "{} sources: {connections} connections and {datagrams} datagrams in {time:.1?}: {connections_a_minute} and \
         {datagrams_a_minute} a minute",
        sources.len()
    );
    ensure!(connections_a_minute >= CONNECTIONS && datagrams_a_minute >= DATAGRAMS, "too weak a flood");

    let (quiet, under) = (Spread::of(quiet), Spread::of(under));
    println!("a session from command to first byte: quiet: {quiet}; under the flood: {under}");
    // A session on these lines takes less than ten: nobody feels the rest, and the flood's own program takes its share of
    // two processors.
    let most = 2 * quiet.p99.max(Duration::from_millis(20));
    ensure!(under.p99 <= most, "p99 {:?} under the flood, {:?} without", under.p99, quiet.p99);

    let lines = logged(&world).await? - lines;
    println!("{lines} lines were logged");
    // The technician's coming and going, and one for each source that is turned away.
    let most = sources.len() + 4 * 2 * SESSIONS * ROUNDS;
    ensure!(lines <= most, "{lines} lines were logged");

    let back = || resident(&world).is_ok_and(|now| now <= before + before / 20).then_some(());
    let settled = poll(PATIENCE, "the memory to come back", async || back()).await;
    let after = resident(&world)?;
    println!(
        "memory: {} KiB cold, {} after the first flood, {} after {ROUNDS}",
        cold >> 10,
        before >> 10,
        after >> 10
    );
    settled
}

/// Gives the host more addresses, so that it has this many.
async fn addresses(host: &Host, count: u8) -> anyhow::Result<Vec<Ipv4Addr>> {
    let mut all = vec![host.address];
    let [a, b, c, _] = host.address.octets();
    // The servers stand at the lower end.
    for d in 50..49 + count {
        let address = Ipv4Addr::new(a, b, c, d);
        let mut add = Command::new("ip");
        add.args(["address", "add", &format!("{address}/24"), "dev", "eth0"]);
        host.spawn(add)?.finish(PATIENCE).await?.ok()?;
        all.push(address);
    }
    Ok(all)
}

/// From the command to the first byte, again and again.
async fn open_sessions(world: &World, port: u16, count: usize) -> anyhow::Result<Vec<Duration>> {
    let (data, target) = (world.data("technician"), format!("127.0.0.1:{port}"));
    let mut times = vec![];
    for _ in 0..count {
        let start = Instant::now();
        let session = world.technician(&["stdio", AGENT, &target, "--data", &data])?;
        session.output(PATIENCE, "the first byte", |lines| lines.first().map(drop)).await?;
        times.push(start.elapsed());
        session.finish(PATIENCE).await?.ok()?;
    }
    Ok(times)
}

struct Spread {
    p50: Duration,
    p90: Duration,
    p99: Duration,
    max: Duration,
}

impl Spread {
    fn of(mut times: Vec<Duration>) -> Self {
        times.sort();
        let at = |share: usize| times[(times.len() - 1) * share / 100];
        Self { p50: at(50), p90: at(90), p99: at(99), max: at(100) }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { p50, p90, p99, max } = self;
        write!(f, "p50 {p50:.1?}, p90 {p90:.1?}, p99 {p99:.1?}, max {max:.1?}")
    }
}

/// Waits until nobody is left who has not shown who it is.
async fn until_quiet(world: &World) -> anyhow::Result<()> {
    poll(PATIENCE, "the flood to be over", async || {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "http://127.0.0.1:9464/metrics"]);
        let metrics = world.lab.server.spawn(curl).ok()?.finish(PATIENCE).await.ok()?.ok().ok()?;
        let left = |line: &&str| {
            line.contains("_unauthenticated ") && !line.ends_with(" 0") && !line.starts_with('#')
        };
        (metrics.contains("_unauthenticated 0") && !metrics.lines().any(|line| left(&line))).then_some(())
    })
    .await
}

fn resident(world: &World) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", world.mediator.id()?))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("a size")?;
    Ok(line.split_whitespace().next().context("a number")?.parse::<u64>()? << 10)
}

async fn logged(world: &World) -> anyhow::Result<usize> {
    world.mediator.error_output(PATIENCE, "its log", |lines| Some(lines.len())).await
}

/// Junk connections to both TCP ports, of which every second one says nothing, and junk datagrams.
struct Flood {
    connections: Arc<AtomicU64>,
    datagrams: Arc<AtomicU64>,
    start: Instant,
    task: JoinHandle<()>,
}

impl Flood {
    fn start(from: &Host, server: Ipv4Addr, sources: Vec<Ipv4Addr>) -> anyhow::Result<Self> {
        let (connections, datagrams) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let (made, sent) = (connections.clone(), datagrams.clone());
        let task = from.task(async move {
            let mut sockets = vec![];
            for source in &sources {
                sockets.extend(UdpSocket::bind((*source, 0)).await);
            }
            let mut pace = interval(BATCHES);
            pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
            let mut junk = [0; 120];
            for number in 0.. {
                pace.tick().await;
                for n in 0..BATCH {
                    rand::fill(&mut junk[..]);
                    // Some of it looks like STUN.
                    if n % 2 == 0 {
                        junk[..8].copy_from_slice(&[0, 1, 0, 100, 0x21, 0x12, 0xa4, 0x42]);
                    }
                    let socket = &sockets[(number * BATCH + n) as usize % sockets.len()];
                    if socket.send_to(&junk, (server, 8002)).await.is_ok() {
                        sent.fetch_add(1, Ordering::Relaxed);
                    }
                }
                if number % 2 == 0 {
                    let source = sources[(number / 2) as usize % sources.len()];
                    let port = if number % 4 == 0 { 443 } else { 8002 };
                    tokio::spawn(connect(source, (server, port).into(), number % 8 < 4, made.clone()));
                }
            }
        })?;
        Ok(Self { connections, datagrams, start: Instant::now(), task })
    }

    /// Connections and datagrams so far, and in how long.
    async fn stop(self) -> anyhow::Result<(u64, u64, Duration)> {
        let time = self.start.elapsed();
        self.task.abort();
        Ok((self.connections.load(Ordering::Relaxed), self.datagrams.load(Ordering::Relaxed), time))
    }
}

/// One junk connection. It counts when it stood, also where the server has closed it by the time that we look: a
/// source that has earned a penalty is turned away so.
async fn connect(source: Ipv4Addr, to: SocketAddr, silent: bool, made: Arc<AtomicU64>) {
    let Ok(socket) = TcpSocket::new_v4() else { return };
    if socket.bind((IpAddr::V4(source), 0).into()).is_err() {
        return;
    }
    let Ok(connected) = timeout(SILENT, socket.connect(to)).await else { return };
    if connected.as_ref().err().is_none_or(|error| error.kind() == ErrorKind::ConnectionReset) {
        made.fetch_add(1, Ordering::Relaxed);
    }
    let Ok(mut stream) = connected else { return };
    if !silent {
        let mut junk = [0; 200];
        rand::fill(&mut junk[..]);
        let _ = stream.write_all(&junk).await;
    }
    // Until it is driven out.
    let _ = timeout(SILENT, stream.read_to_end(&mut vec![])).await;
}
