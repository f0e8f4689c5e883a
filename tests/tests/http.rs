//! HTTP with what users use: curl, and a load generator.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use adit_tests::lab::{Host, Lab, NatKind, Topology};
use adit_tests::proxy::ProxyKind;
use adit_tests::traffic::{HttpServer, sha256};
use adit_tests::world::{AGENT, PATIENCE, Setup, World};
use adit_tests::{lab_tests, poll};
use anyhow::{Context, ensure};

lab_tests!(curl_gets_a_gibibyte_on_direct, curl_gets_a_gibibyte_on_the_relay, curl_gets_a_gibibyte_where_only_443_is_open, curl_gets_a_gibibyte_behind_a_proxy, two_hundred_connections_at_once, a_local_proxy_reaches_what_the_agent_allows, adit_http_opens_the_browser; as ordinary user: the_programs_do_it_without_adit);

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

/// SOCKS5 and HTTP CONNECT on one port; names are the agent's to resolve, and its allow list has the last word.
async fn a_local_proxy_reaches_what_the_agent_allows() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::Cone, NatKind::Cone);
    let world = World::up(Setup::new(topology).allow(&["127.0.0.1:1-60000", "localhost:1-60000"])).await?;
    let web = HttpServer::start(&world.lab.agent.host).await?;
    let data = world.data("technician");
    let forward = world.technician(&["forward", AGENT, "-D", "0", "--json", "--data", &data])?;
    let local: SocketAddr = forward
        .event(PATIENCE, "listening", 0, |event| {
            (event["target"] == "any").then(|| event["local"].as_str()?.parse().ok())?
        })
        .await?;
    let host = &world.lab.technician.host;
    let closed = 1;
    for (proxy, url, wanted) in [
        (format!("socks5h://{local}"), format!("http://localhost:{}/", web.port), "adit"),
        (format!("socks5://{local}"), format!("http://127.0.0.1:{}/", web.port), "adit"),
        (format!("http://{local}"), format!("http://localhost:{}/", web.port), "adit"),
        (format!("socks5h://{local}"), format!("http://127.0.0.1:{closed}/"), "(5)"),
        (format!("socks5h://{local}"), format!("http://{}:443/", world.lab.server.address), "(2)"),
        (format!("socks5h://{local}"), "http://no-such-name:80/".to_owned(), "(4)"),
        (format!("http://{local}"), format!("http://127.0.0.1:{closed}/"), "502"),
        (format!("http://{local}"), format!("http://{}:443/", world.lab.server.address), "403"),
        // Spellings of 127.0.0.1 that resolvers know, and it is allowed.
        (format!("socks5h://{local}"), format!("http://2130706433:{}/", web.port), "adit"),
        (format!("socks5h://{local}"), format!("http://0177.0.0.1:{}/", web.port), "adit"),
        (format!("socks5h://{local}"), format!("http://[::ffff:127.0.0.1]:{}/", web.port), "adit"),
        (format!("socks5h://{local}"), format!("http://0.0.0.0:{}/", web.port), "(2)"),
        (format!("socks5h://{local}"), "http://169.254.169.254/".to_owned(), "(2)"),
    ] {
        let mut command = Command::new("curl");
        // As a URL is written: curl would make an address of these numbers by itself.
        command.args(["-sS", "--max-time", "10", "--proxytunnel", "-x", &proxy, &url]);
        let curl = host.spawn(command)?.finish(PATIENCE).await?;
        println!("{proxy} {url}: {} {}", curl.stdout.trim(), curl.stderr.trim());
        ensure!(curl.stdout.contains(wanted) || curl.stderr.contains(wanted), "{proxy} {url}: {curl:?}");
    }
    let audit = std::fs::read_to_string(format!("{}/audit.jsonl", world.data("server")))?;
    ensure!(audit.contains("\"targets\":[\"any\"]"), "{audit}");
    fetch_through(host, &format!("socks5h://{local}"), &format!("localhost:{}", web.port), 256 << 20).await
}

/// `adit http` with a browser that is a script.
async fn adit_http_opens_the_browser() -> anyhow::Result<()> {
    let world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone))).await?;
    let web = HttpServer::start(&world.lab.agent.host).await?;
    let (bin, seen) = (world.scratch().join("bin"), world.scratch().join("seen"));
    std::fs::create_dir(&bin)?;
    let script = bin.join("xdg-open");
    std::fs::write(
        &script,
        format!("#!/bin/sh\ncurl -sS \"$1\" > {0}.part && mv {0}.part {0}\n", seen.display()),
    )?;
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let path = format!("{}:{}", bin.display(), std::env::var("PATH")?);
    world.lab.technician.host.set_env("PATH", &path);
    let (port, data) = (web.port.to_string(), world.data("technician"));
    let opened = world.technician(&["http", AGENT, &port, "--data", &data])?;
    let page = poll(PATIENCE, "the browser", async || std::fs::read_to_string(&seen).ok()).await?;
    ensure!(page.trim() == "adit", "{page:?}");
    opened.interrupt()?;
    let said = opened.finish(PATIENCE).await?.ok()?;
    println!("{said}");
    ensure!(said.contains("listening on 127.0.0.1:"));
    Ok(())
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

async fn fetch_through(host: &Host, proxy: &str, server: &str, bytes: u64) -> anyhow::Result<()> {
    fetch_with(host, &format!("-x {proxy}"), server, bytes, proxy).await
}

/// Gets `bytes` with curl and compares their SHA-256.
async fn fetch(host: &Host, server: SocketAddr, bytes: u64, how: &str) -> anyhow::Result<()> {
    fetch_with(host, "", &server.to_string(), bytes, how).await
}

async fn fetch_with(host: &Host, options: &str, server: &str, bytes: u64, how: &str) -> anyhow::Result<()> {
    let seed: u32 = rand::random();
    let mut command = Command::new("bash");
    let script = format!(
        "set -o pipefail; curl {options} -sS --fail -w '%{stderr}%{speed_download}' http://{server}/{seed}/{bytes} | sha256sum",
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
