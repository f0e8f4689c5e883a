//! HTTP with what users use: curl, and a load generator.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use adit_tests::lab::{Host, Lab, NatKind, Topology};
use adit_tests::lab_tests;
use adit_tests::proxy::ProxyKind;
use adit_tests::traffic::{HttpServer, sha256};
use adit_tests::world::{Setup, World};
use anyhow::{Context, ensure};

lab_tests!(curl_gets_a_gibibyte_on_direct, curl_gets_a_gibibyte_on_the_relay, curl_gets_a_gibibyte_where_only_443_is_open, curl_gets_a_gibibyte_behind_a_proxy, two_hundred_connections_at_once; as ordinary user: the_programs_do_it_without_adit);

async fn curl_gets_a_gibibyte_on_direct() -> anyhow::Result<()> {
    curl(setup(NatKind::Cone), "direct", "quic").await
}

async fn curl_gets_a_gibibyte_on_the_relay() -> anyhow::Result<()> {
    curl(setup(NatKind::UdpBlocked), "relay", "relay").await
}

async fn curl_gets_a_gibibyte_where_only_443_is_open() -> anyhow::Result<()> {
    curl(setup(NatKind::HttpsOnly), "relay", "relay-https").await
}

async fn curl_gets_a_gibibyte_behind_a_proxy() -> anyhow::Result<()> {
    curl(Setup::behind(ProxyKind::SquidBasic), "relay", "relay-https").await
}

fn setup(nat: NatKind) -> Setup {
    Setup::new(Topology::new(nat, nat))
}

async fn two_hundred_connections_at_once() -> anyhow::Result<()> {
    let world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone))).await?;
    let web = HttpServer::start(&world.lab.agent.host).await?;
    let forward = world.forward(&[&format!("127.0.0.1:{}", web.port)]).await?;
    load(&world.lab.technician.host, forward.local[0]).await
}

/// If this fails, the others say nothing about adit.
async fn the_programs_do_it_without_adit() -> anyhow::Result<()> {
    let lab = Lab::up(&Topology::new(NatKind::None, NatKind::None)).await?;
    let web = HttpServer::start(&lab.agent.host).await?;
    let at = SocketAddr::new(lab.agent.host.address.into(), web.port);
    fetch(&lab.technician.host, at, 64 << 20, "no tunnel").await?;
    load(&lab.technician.host, at).await
}

async fn curl(setup: Setup, tier: &str, carrier: &str) -> anyhow::Result<()> {
    let world = World::up(setup).await?;
    let web = HttpServer::start(&world.lab.agent.host).await?;
    let forward = world.forward(&[&format!("127.0.0.1:{}", web.port)]).await?;
    let event = forward.reaches(tier, Duration::from_secs(10)).await?;
    ensure!(event["carrier"] == carrier, "{event}");
    fetch(&world.lab.technician.host, forward.local[0], 1 << 30, carrier).await
}

/// Gets `bytes` with curl and compares their SHA-256.
async fn fetch(host: &Host, server: SocketAddr, bytes: u64, how: &str) -> anyhow::Result<()> {
    let seed: u32 = rand::random();
    let mut command = Command::new("bash");
    let script = format!(
        "set -o pipefail; curl -sS --fail -w '%{stderr}%{speed_download}' http://{server}/{seed}/{bytes} | sha256sum",
        stderr = "{stderr}",
        speed_download = "{speed_download}",
    );
    command.args(["-c", &script]);
    let curl = host.spawn(command)?.finish(Duration::from_secs(150)).await?;
    ensure!(curl.code == 0, "curl: {}", curl.stderr);
    let speed: f64 = curl.stderr.trim().parse().context("curl shows no speed")?;
    println!("{bytes} bytes on {how}: {:.0} Mbit/s", speed * 8.0 / 1e6);
    ensure!(curl.stdout.starts_with(&sha256(seed.into(), bytes)), "SHA-256 differs");
    Ok(())
}

/// 200 connections at once for 10 s, and no error.
async fn load(host: &Host, server: SocketAddr) -> anyhow::Result<()> {
    let mut command = Command::new("wrk");
    command.args(["-t1", "-c200", "-d10s", "--timeout", "5s", &format!("http://{server}/")]);
    let wrk = host.spawn(command)?.finish(Duration::from_secs(60)).await?.ok()?;
    println!("{wrk}");
    // wrk prints these lines only where there is something to say.
    ensure!(!wrk.contains("Socket errors") && !wrk.contains("Non-2xx"), "not without errors");
    let requests = wrk.lines().find_map(|line| line.trim().split_once(" requests in")?.0.parse::<u64>().ok());
    ensure!(requests.context("wrk shows no requests")? > 1000);
    Ok(())
}
