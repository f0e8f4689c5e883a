//! Streams of one tunnel do not hold each other up.

use std::net::SocketAddr;
use std::time::Duration;

use adit_tests::lab::{Link, NatKind, Rate, Topology};
use adit_tests::lab_tests;
use adit_tests::process::Process;
use adit_tests::traffic::{STALL, TickServer, TransferServer, download, stall, tick};
use adit_tests::world::{Setup, World};
use anyhow::{Context, ensure};
use tokio::time::sleep;

lab_tests!(
    loss_on_a_direct_path_holds_up_single_streams,
    a_reader_that_never_reads_on_direct,
    a_reader_that_never_reads_on_the_relay
);

const TO_MOVE: Duration = Duration::from_secs(10);

async fn loss_on_a_direct_path_holds_up_single_streams() -> anyhow::Result<()> {
    const STREAMS: usize = 16;
    let link = Link { delay: Duration::from_millis(10), loss: 1.0, seed: 1, ..Link::default() };
    let world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone).link(link))).await?;
    let ticks = TickServer::start(&world.lab.agent.host).await?;
    let forward = world.forward(&[&format!("127.0.0.1:{}", ticks.port)]).await?;
    forward.reaches("direct", TO_MOVE).await?;
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        streams.push(tick(&world.lab.technician.host, forward.local[0]).await?);
    }
    // A measurement over time, not a wait for something.
    sleep(Duration::from_secs(15)).await;
    let mut stalls = Vec::new();
    for (n, stream) in streams.into_iter().enumerate() {
        let (here, there) = stream.stop().await?;
        println!("stream {n:2}: technician {here}; agent {there}");
        let gap = here.longest_gap.max(there.longest_gap);
        ensure!(gap < Duration::from_secs(1), "stream {n} stood still for {gap:?}");
        stalls.push(here.stalls);
    }
    // On one byte stream for all, whatever holds up one holds up each of them for as long, but for a tick or two.
    let long = || stalls.iter().flatten().filter(|(from, to)| *to - *from >= STALL + STALL / 2);
    let alone = long().filter(|(from, to)| {
        stalls.iter().any(|other| other.iter().all(|(since, until)| until < from || since > to))
    });
    let (long, alone) = (long().count(), alone.count());
    println!("{long} stalls of 60 ms or more; during {alone} of them another stream ticked on");
    ensure!(alone > 0, "every stall held up every stream");
    ensure!(forward.tier().as_deref() == Some("direct"));
    Ok(())
}

async fn a_reader_that_never_reads_on_direct() -> anyhow::Result<()> {
    never_reads(NatKind::Cone, "direct").await
}

async fn a_reader_that_never_reads_on_the_relay() -> anyhow::Result<()> {
    never_reads(NatKind::UdpBlocked, "relay").await
}

async fn never_reads(nat: NatKind, tier: &str) -> anyhow::Result<()> {
    /// Twice the session's budget: it may be held at both ends of the engine.
    const BOUND: u64 = 64 << 20;
    let topology = Topology::new(nat, nat).rate(Rate::mbit(100));
    let world = World::up(Setup::new(topology)).await?;
    let (host, agent) = (&world.lab.technician.host, &world.lab.agent.host);
    let (ticks, transfers) = (TickServer::start(agent).await?, TransferServer::start(agent).await?);
    let (ticks_at, transfers_at) =
        (format!("127.0.0.1:{}", ticks.port), format!("127.0.0.1:{}", transfers.port));
    let forward = world.forward(&[&ticks_at, &transfers_at]).await?;
    // Another session between the same two, which must not notice either.
    let other = world.forward(&[&ticks_at]).await?;
    forward.reaches(tier, TO_MOVE).await?;
    other.reaches(tier, TO_MOVE).await?;
    let before = (memory(&world.agent)?, memory(&forward.process)?);
    let ticking = [tick(host, forward.local[0]).await?, tick(host, other.local[0]).await?];

    let local: SocketAddr = forward.local[1];
    let _stalled = stall(host, local, 1 << 30).await?;
    let took = download(host, local, 2, 64 << 20, Duration::from_secs(30)).await?;
    for (session, ticking) in ["the same", "the other"].into_iter().zip(ticking) {
        let (here, there) = ticking.stop().await?;
        println!("{session} session: technician {here}; agent {there}");
        let gap = here.longest_gap.max(there.longest_gap);
        ensure!(gap < Duration::from_millis(500), "{session} session stood still for {gap:?}");
    }
    let after = (memory(&world.agent)?, memory(&forward.process)?);
    println!(
        "64 MiB beside it in {took:?}; memory of agent and technician: {before:?}, then {after:?} bytes"
    );
    ensure!(after.0.saturating_sub(before.0) < BOUND && after.1.saturating_sub(before.1) < BOUND);
    Ok(())
}

/// Resident memory in bytes.
fn memory(process: &Process) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id()?))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}
