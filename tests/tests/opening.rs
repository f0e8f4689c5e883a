//! How soon a session is there, on lines with delay.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use adit_tests::lab::{Link, NatKind, Topology};
use adit_tests::process::Process;
use adit_tests::traffic::{echo, echoed};
use adit_tests::world::{AGENT, PATIENCE, Setup, World};
use adit_tests::{lab_tests, slack};
use anyhow::{Context, ensure};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::sleep;

lab_tests!(
    the_first_byte_on_slow_lines,
    commands_outlive_adit_up,
    a_port_outlives_its_command_beside_adit_up
);

const ROUNDS: usize = 5;
/// One way: at the sites, and before the servers. 50 ms from a site to the server and back, 100 ms through the relay
/// to the other site and back, 80 ms directly.
const SITE: Duration = Duration::from_millis(20);
const SERVERS: Duration = Duration::from_millis(5);
/// First byte back at the local socket after the command, without and with `adit up`.
const COLD: Duration = Duration::from_millis(420);
const WARM: Duration = Duration::from_millis(230);
/// Tier `direct` after the command, with `adit up`.
const DIRECT: Duration = Duration::from_millis(380);

async fn the_first_byte_on_slow_lines() -> anyhow::Result<()> {
    let mut world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone))).await?;
    world.lab.set_links(Link { delay: SITE, ..Link::default() })?;
    world.lab.set_servers_link(Link { delay: SERVERS, ..Link::default() })?;
    let echo = echo(&world.lab.agent.host).await?.port();
    let mut measured = Vec::new();
    let mut up = None;
    for name in ["cold", "warm"] {
        if name == "warm" {
            up = Some(adit_up(&world).await?);
        }
        let (mut bytes, mut directs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let (byte, direct) = open(&world, echo).await?;
            println!("{name}: an echoed byte after {byte:?}, direct after {direct:?}");
            bytes.push(byte);
            directs.push(direct);
        }
        measured.push((median(bytes)?, median(directs)?));
    }
    drop(up);
    let ((cold, cold_direct), (warm, warm_direct)) = (measured[0], measured[1]);
    println!("cold: first byte {cold:?} (mark {COLD:?}), direct {cold_direct:?}; medians of {ROUNDS}");
    println!("warm: first byte {warm:?} (mark {WARM:?}), direct {warm_direct:?} (mark {DIRECT:?})");
    // A slow machine takes longer for what is computed. A round trip between the ends is 80 ms or 100.
    let slack = Duration::from_millis(60).mul_f64(slack() - 1.0);
    for (what, time, mark) in [("cold", cold, COLD), ("warm", warm, WARM), ("direct", warm_direct, DIRECT)] {
        ensure!(time <= mark + slack, "{what}: {time:?}");
    }
    Ok(())
}

/// What runs on the channel of `adit up` goes on when that is killed, and what comes after finds its own way.
async fn commands_outlive_adit_up() -> anyhow::Result<()> {
    let world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone))).await?;
    let channels = || {
        let said = world.mediator.error_lines();
        said.iter()
            .filter(|line| line.contains("device is online") && line.contains("role=technician"))
            .count()
    };
    let before = channels();
    let mut up = adit_up(&world).await?;
    let echo = echo(&world.lab.agent.host).await?.port();
    let forward = world.forward(&[&format!("127.0.0.1:{echo}")]).await?;
    world.lab.technician.host.task(echoed(forward.local[0]))?.await??;
    let listed = world.technician(&["ls", "--json", "--data", &world.data("technician")])?;
    ensure!(listed.finish(PATIENCE).await?.ok()?.contains(AGENT));
    ensure!(channels() == before + 1, "{} channels for adit up and two commands", channels() - before);

    let again = world.technician(&["up", "--data", &world.data("technician")])?.finish(PATIENCE).await?;
    ensure!(again.code == 2 && again.stderr.contains("another adit up"), "{again:?}");

    up.kill().await?;
    world.lab.technician.host.task(echoed(forward.local[0]))?.await??;
    // The forward's own channel.
    adit_tests::poll(PATIENCE, "a channel of the forward's own", async || {
        (channels() == before + 2).then_some(())
    })
    .await?;
    let (byte, _) = open(&world, echo).await?;
    println!("without adit up, that was killed: {byte:?}");
    // What is left of the one before is in nobody's way.
    let _up = adit_up(&world).await?;
    open(&world, echo).await?;
    ensure!(channels() == before + 4, "{} channels", channels() - before);
    Ok(())
}

async fn a_port_outlives_its_command_beside_adit_up() -> anyhow::Result<()> {
    let world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone)).redirector()).await?;
    let echo = echo(&world.lab.agent.host).await?.port();
    let _up = adit_up(&world).await?;
    let (data, target) = (world.data("technician"), format!("127.0.0.1:{echo}"));
    let redirect = ["redirect", AGENT, &target, "--ttl", "10m", "--json", "--data", &data];
    let opened: Value = serde_json::from_str(&world.technician(&redirect)?.finish(PATIENCE).await?.ok()?)?;
    let address = opened["address"].as_str().context("an address")?.parse()?;
    for _ in 0..3 {
        world.lab.technician.host.task(echoed(address))?.await??;
        // The end of the command has been told by now.
        sleep(Duration::from_millis(300)).await;
    }
    Ok(())
}

async fn adit_up(world: &World) -> anyhow::Result<Process> {
    let up = world.technician(&["up", "--json", "--data", &world.data("technician")])?;
    up.event(PATIENCE, "online", 0, |_| Some(())).await?;
    Ok(up)
}

/// Runs `adit forward`; when a byte has come back, and when the tier is direct, after the command.
async fn open(world: &World, echo: u16) -> anyhow::Result<(Duration, Duration)> {
    static PORT: AtomicU16 = AtomicU16::new(20_000);
    let port = PORT.fetch_add(1, Ordering::Relaxed);
    let (data, spec) = (world.data("technician"), format!("127.0.0.1:{port}:127.0.0.1:{echo}"));
    let local = SocketAddr::from(([127, 0, 0, 1], port));
    let start = Instant::now();
    let forward = world.technician(&["forward", AGENT, "-L", &spec, "--json", "--data", &data])?;
    let first = async move {
        let mut tcp = loop {
            match TcpStream::connect(local).await {
                Ok(tcp) => break tcp,
                Err(_) if start.elapsed() < PATIENCE => sleep(Duration::from_millis(1)).await,
                Err(error) => return Err(error.into()),
            }
        };
        tcp.write_all(b"x").await?;
        ensure!(tcp.read_u8().await? == b'x');
        Ok(start.elapsed())
    };
    let byte = world.lab.technician.host.task(first)?;
    let direct = forward
        .event(PATIENCE, "tier", 0, |event| (event["tier"] == "direct").then(|| start.elapsed()))
        .await?;
    Ok((byte.await??, direct))
}

fn median(mut times: Vec<Duration>) -> anyhow::Result<Duration> {
    times.sort();
    times.get(times.len() / 2).copied().context("nothing measured")
}
