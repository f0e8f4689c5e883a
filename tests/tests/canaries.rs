//! Rows 4 and 5 of the threats: whatever way a target is spelled, and wherever its name points from one moment to the next,
//! an agent connects to nothing that its allow list has not.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use adit_tests::lab::{Host, NatKind, Topology};
use adit_tests::lab_tests;
use adit_tests::world::{AGENT, PATIENCE, Setup, World};
use anyhow::{Context, ensure};
use tokio::net::UdpSocket;

lab_tests!(row_04_canaries_hear_nothing, row_05_a_name_that_turns_to_loopback);

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
        // A target of its own, and a port and pages of the redirector.
        let (target, url) = (format!("{canary}:{PORT}"), format!("http://{canary}:{PORT}/"));
        for (command, target) in [("stdio", &target), ("redirect", &target), ("redirect", &url)] {
            let arguments = [command, AGENT, target, "--data", &data];
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

/// Its first address is public and allowed, and the next one loopback; then again.
async fn row_05_a_name_that_turns_to_loopback() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::Cone, NatKind::Cone);
    let allow = ["198.18.0.0/15:1-65535", "rebind.example:8086"];
    let world = World::up(Setup::new(topology).allow(&allow).redirector()).await?;
    let (agent, server) = (&world.lab.agent.host, world.lab.server.address);
    let answers = flipping_resolver(agent, server).await?;
    // Connections to the server are not counted: that is the public address.
    agent.count_sent(server, PORT)?;
    let data = world.data("technician");
    let forward = world.technician(&["forward", AGENT, "-D", "0", "--json", "--data", &data])?;
    let local: SocketAddr =
        forward.event(PATIENCE, "listening", 0, |event| event["local"].as_str()?.parse().ok()).await?;
    let mut tried = 0;
    for _ in 0..12 {
        let mut command = Command::new("curl");
        let url = format!("http://rebind.example:{PORT}/");
        command.args(["-sS", "--max-time", "10", "-x", &format!("socks5h://{local}"), &url]);
        world.lab.technician.host.spawn(command)?.finish(PATIENCE).await?;
        for command in [&["stdio"][..], &["redirect"]] {
            let target = format!("rebind.example:{PORT}");
            let arguments = [command, &[AGENT, &target, "--data", &data]].concat();
            let finished = world.technician(&arguments)?.finish(PATIENCE).await?;
            ensure!(finished.code == 3 || finished.code == 4, "{finished:?}");
        }
        tried += 3;
    }
    let (public, loopback) = (answers[0].load(Ordering::Relaxed), answers[1].load(Ordering::Relaxed));
    let sent = agent.sent()?;
    println!(
        "{tried} tries, the name was public {public} times and loopback {loopback} times: {sent} packets to others"
    );
    ensure!(sent == 0, "the agent connected to loopback");
    ensure!(public >= 10 && loopback >= 10, "it did not flip");
    Ok(())
}

/// A name server for `host`: every name is `public`, and at the next question loopback. How often it said which.
async fn flipping_resolver(host: &Host, public: Ipv4Addr) -> anyhow::Result<Arc<[AtomicUsize; 2]>> {
    let said: Arc<[AtomicUsize; 2]> = Arc::default();
    let (counts, (ready, is_ready)) = (said.clone(), tokio::sync::oneshot::channel());
    host.task(async move {
        // Where the lab's hosts look for one.
        let socket = UdpSocket::bind("127.0.0.53:53").await?;
        let _ = ready.send(());
        // One for each version: both are asked for at once.
        let mut turns = [0; 2];
        let mut question = [0; 512];
        loop {
            let (length, from) = socket.recv_from(&mut question).await?;
            let asked = &question[..length];
            // Behind the header: the name, then type and class (RFC 1035 section 4.1).
            let Some(end) = asked.iter().skip(12).position(|byte| *byte == 0).map(|at| 12 + at + 5) else {
                continue;
            };
            let Some(section) = asked.get(12..end) else { continue };
            let ipv6 = section[section.len() - 3] == 28;
            let turn = turns[usize::from(ipv6)] % 2;
            let address: IpAddr = match (turn, ipv6) {
                (0, false) => public.into(),
                (_, false) => Ipv4Addr::LOCALHOST.into(),
                (0, true) => public.to_ipv6_mapped().into(),
                (_, true) => Ipv6Addr::LOCALHOST.into(),
            };
            counts[turn].fetch_add(1, Ordering::Relaxed);
            turns[usize::from(ipv6)] += 1;
            let mut answer =
                [&asked[..2], &[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0], section, &[0xc0, 12]].concat();
            answer.extend_from_slice(&section[section.len() - 4..]);
            // For no time at all.
            answer.extend_from_slice(&[0; 4]);
            match address {
                IpAddr::V4(ip) => answer.extend([&[0, 4][..], &ip.octets()].concat()),
                IpAddr::V6(ip) => answer.extend([&[0, 16][..], &ip.octets()].concat()),
            }
            socket.send_to(&answer, from).await?;
        }
        #[allow(unreachable_code)]
        anyhow::Ok(())
    })?;
    is_ready.await?;
    Ok(said)
}
