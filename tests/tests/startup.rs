//! How long it takes from the command to the first byte.

use std::time::{Duration, Instant};

use adit_tests::lab::{NatKind, Topology};
use adit_tests::lab_tests;
use adit_tests::traffic::greeter;
use adit_tests::world::{AGENT, PATIENCE, Setup, World};
use anyhow::{Context, ensure};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

lab_tests!(the_first_byte_comes_at_once_where_udp_is_blocked, an_idle_agent_is_quiet);

/// Listening, and the first byte back.
const MARK: Duration = Duration::from_millis(100);

/// Packets that an idle agent sends in a minute, all in all.
const QUIET: u64 = 5;

async fn an_idle_agent_is_quiet() -> anyhow::Result<()> {
    let world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone))).await?;
    let agent = &world.lab.agent.host;
    agent.count_packets()?;
    // Time is what this is about.
    tokio::time::sleep(Duration::from_secs(120)).await;
    let sent = agent.packets_sent()?;
    println!("{sent} packets in two minutes");
    ensure!(sent > 0 && sent <= 2 * QUIET, "{sent} packets in two minutes");
    Ok(())
}

async fn the_first_byte_comes_at_once_where_udp_is_blocked() -> anyhow::Result<()> {
    let world = World::up(Setup::new(Topology::new(NatKind::UdpBlocked, NatKind::UdpBlocked))).await?;
    let port = greeter(&world.lab.agent.host).await?;
    let (data, listen) = (world.data("technician"), format!("127.0.0.1:0:127.0.0.1:{port}"));
    let mut times = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        let forward = world.technician(&["forward", AGENT, "-L", &listen, "--json", "--data", &data])?;
        let local: std::net::SocketAddr =
            forward.event(PATIENCE, "listening", 0, |event| event["local"].as_str()?.parse().ok()).await?;
        let listening = start.elapsed();
        let first = async move {
            let mut stream = TcpStream::connect(local).await?;
            anyhow::Ok(stream.read_u8().await?)
        };
        let byte = world.lab.technician.host.task(tokio::time::timeout(PATIENCE, first))?.await???;
        let first_byte = start.elapsed();
        ensure!(byte == b'h');
        println!("listening after {listening:?}, first byte after {first_byte:?}");
        times.push(first_byte);
    }
    times.sort();
    let median = times.get(times.len() / 2).context("nothing measured")?;
    println!("median {median:?}");
    ensure!(*median <= MARK, "the first byte took {median:?}");
    Ok(())
}
