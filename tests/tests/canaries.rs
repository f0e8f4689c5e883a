//! Row 4 of the threats: whatever way a target is spelled, an agent connects to nothing that its allow list has not.

use std::net::SocketAddr;
use std::process::Command;

use adit_tests::lab::{NatKind, Topology};
use adit_tests::lab_tests;
use adit_tests::world::{AGENT, PATIENCE, Setup, World};
use anyhow::{Context, ensure};
use tokio::net::UdpSocket;

lab_tests!(row_04_canaries_hear_nothing);

/// Loopback, link-local, metadata, translated and private addresses, as names, numbers and in wrappings.
const CANARIES: [&str; 19] = [
    "127.0.0.1",
    "127.1",
    "127.8.9.1",
    "localhost",
    "2130706433",
    "0177.0.0.1",
    "0x7f000001",
    "0.0.0.0",
    "169.254.169.254",
    "10.0.0.1",
    "192.168.10.1",
    "[::]",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:169.254.169.254]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "[fe80::1]",
    "[fd00::1]",
];
const PORT: u16 = 8086;

async fn row_04_canaries_hear_nothing() -> anyhow::Result<()> {
    // One that is allowed, so that counting can be seen to work.
    let topology = Topology::new(NatKind::HttpsOnly, NatKind::HttpsOnly);
    let world = World::up(Setup::new(topology).allow(&["127.77.0.1:1-65535"]).redirector()).await?;
    let agent = &world.lab.agent.host;
    agent.count_sent(world.lab.server.address, PORT)?;
    let data = world.data("technician");

    // TCP, through SOCKS and HTTP CONNECT.
    let forward = world.technician(&["forward", AGENT, "-D", "0", "--json", "--data", &data])?;
    let local: SocketAddr =
        forward.event(PATIENCE, "listening", 0, |event| event["local"].as_str()?.parse().ok()).await?;
    let mut tried = 0;
    for canary in CANARIES {
        for proxy in [format!("socks5h://{local}"), format!("http://{local}")] {
            let mut command = Command::new("curl");
            let url = format!("http://{canary}:{PORT}/");
            command.args(["-sS", "--max-time", "10", "--proxytunnel", "-x", &proxy, &url]);
            let curl = world.lab.technician.host.spawn(command)?.finish(PATIENCE).await?;
            ensure!(curl.code != 0 && curl.stdout.is_empty(), "{canary}: {curl:?}");
            tried += 1;
        }
        // A target of its own, and a port of the redirector.
        let target = format!("{canary}:{PORT}");
        for command in [&["stdio"][..], &["redirect"]] {
            let arguments = [command, &[AGENT, &target, "--data", &data]].concat();
            let finished = world.technician(&arguments)?.finish(PATIENCE).await?;
            ensure!(finished.code != 0 && finished.stdout.is_empty(), "{target}: {finished:?}");
            tried += 1;
        }
    }
    // UDP.
    let specs: Vec<String> = CANARIES.iter().map(|canary| format!("0:{canary}:{PORT}/udp")).collect();
    let mut arguments = vec!["forward", AGENT, "--json", "--data", &data];
    specs.iter().for_each(|spec| arguments.extend(["-L", spec]));
    let forward = world.technician(&arguments)?;
    forward.event(PATIENCE, "tier", 0, |_| Some(())).await?;
    let locals: Vec<SocketAddr> = forward
        .events("listening")
        .iter()
        .filter_map(|event| event["local"].as_str()?.parse().ok())
        .collect();
    ensure!(locals.len() == CANARIES.len(), "{locals:?}");
    let complained = world.lab.technician.host.task(async move {
        let socket = UdpSocket::bind("127.0.0.1:0").await?;
        for local in locals {
            socket.send_to(b"canary", local).await?;
        }
        anyhow::Ok(())
    })?;
    complained.await??;
    forward
        .error_output(PATIENCE, "refusals", |lines| {
            let refused = lines.iter().filter(|line| line.contains("allow list") || line.contains("resolve"));
            (refused.count() >= CANARIES.len()).then_some(())
        })
        .await?;
    tried += CANARIES.len();
    let sent = agent.sent()?;
    println!("{tried} tries at {} canaries: {sent} packets left the agent for them", CANARIES.len());
    ensure!(sent == 0, "something was sent");

    let allowed = format!("127.77.0.1:{PORT}");
    let finished = world.technician(&["stdio", AGENT, &allowed, "--data", &data])?.finish(PATIENCE).await?;
    ensure!(finished.code == 4, "{finished:?}");
    let counted = agent.sent().context("counted")?;
    ensure!(counted > 0, "an allowed connection is not counted: the counter counts nothing");
    Ok(())
}
