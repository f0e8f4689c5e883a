//! Networks in which agents and technicians really sit: nothing but 443 goes out, or only a proxy leads there.

use std::time::{Duration, Instant};

use adit_tests::lab::{NatKind, Rate, Topology};
use adit_tests::process::Process;
use adit_tests::proxy::{self, ProxyKind};
use adit_tests::traffic::{TransferServer, download, upload};
use adit_tests::world::{AGENT, Forward, PATIENCE, Setup, World};
use adit_tests::{lab_tests, slack};
use anyhow::{Context, ensure};
use serde_json::Value;

lab_tests!(
    only_443_is_enough_for_everything,
    the_end_whose_8002_is_open_uses_it,
    behind_squid,
    behind_squid_with_a_password,
    behind_squid_with_a_digest,
    behind_tinyproxy,
    behind_tinyproxy_with_a_password,
    a_proxy_that_says_no_is_quoted,
    the_flag_then_the_file_then_the_environment,
    a_proxy_that_opens_tls_is_named,
    all_but_443_is_blocked_in_mid_session,
    a_firewall_that_takes_8002_and_lets_nothing_through,
    a_proxy_that_lets_nobody_to_the_relay_is_quoted,
    what_443_costs_against_8002,
);

const BYTES: u64 = 16 << 20;
const DEADLINE: Duration = Duration::from_secs(60);

async fn only_443_is_enough_for_everything() -> anyhow::Result<()> {
    let open = World::up(Setup::new(Topology::new(NatKind::UdpBlocked, NatKind::UdpBlocked))).await?;
    let ordinary = opened(&open, "relay").await?;
    drop(open);
    let world = World::up(Setup::new(Topology::new(NatKind::HttpsOnly, NatKind::HttpsOnly))).await?;
    let narrow = opened(&world, "relay-https").await?;
    println!("first byte {ordinary:?} after the command on 8002, {narrow:?} where only 443 is open");
    // The head start that 8002 has, and a handshake more at each end; what is guarded against costs five seconds.
    ensure!(narrow < ordinary + Duration::from_secs(1), "8002 is waited for");
    through(&world, "relay-https", "relay-https").await
}

async fn the_end_whose_8002_is_open_uses_it() -> anyhow::Result<()> {
    let world = World::up(Setup::new(Topology::new(NatKind::HttpsOnly, NatKind::UdpBlocked))).await?;
    through(&world, "relay-https", "relay").await?;
    drop(world);
    let topology = Topology::new(NatKind::UdpBlocked, NatKind::HttpsOnly).relays(1);
    let world = World::up(Setup::new(topology).bare_mediator()).await?;
    through(&world, "relay", "relay-https").await
}

async fn behind_squid() -> anyhow::Result<()> {
    behind(ProxyKind::Squid).await
}

async fn behind_squid_with_a_password() -> anyhow::Result<()> {
    behind(ProxyKind::SquidBasic).await
}

async fn behind_squid_with_a_digest() -> anyhow::Result<()> {
    behind(ProxyKind::SquidDigest).await
}

async fn behind_tinyproxy() -> anyhow::Result<()> {
    behind(ProxyKind::Tinyproxy).await
}

async fn behind_tinyproxy_with_a_password() -> anyhow::Result<()> {
    behind(ProxyKind::TinyproxyBasic).await
}

async fn behind(kind: ProxyKind) -> anyhow::Result<()> {
    let world = World::up(Setup::behind(kind)).await?;
    through(&world, "relay-https", "relay-https").await?;
    let log = world.proxy.as_ref().context("a proxy")?.log();
    let requests = log.lines().filter(|line| line.contains("CONNECT")).count();
    println!("{kind:?}: {requests} lines about CONNECT in its log");
    ensure!(requests > 0, "nothing went through it: {log:?}");
    Ok(())
}

async fn a_proxy_that_says_no_is_quoted() -> anyhow::Result<()> {
    let mut world = World::up(Setup::behind(ProxyKind::SquidBasic)).await?;
    let proxy = world.proxy.as_ref().context("a proxy")?;
    let host = proxy.bare_url.trim_start_matches("http://").to_owned();
    for (url, said, remedy) in [
        (proxy.bare_url.clone(), "wants a name and a password", "USER:PASSWORD"),
        (format!("http://anna:wrong@{host}"), "does not accept the name and password", "USER:PASSWORD"),
        (format!("http://{}:9", world.lab.server.address), "cannot be reached", "--proxy none"),
        (format!("https://{host}"), "only http:// proxies", "http://"),
    ] {
        let list = ["ls", "--data", &world.data("technician"), "--proxy", &url].map(str::to_owned);
        let list: Vec<&str> = list.iter().map(String::as_str).collect();
        let finished = world.technician(&list)?.finish(PATIENCE).await?;
        println!("{}", finished.stderr.trim());
        ensure!(finished.code == if url.starts_with("https") { 2 } else { 4 }, "{finished:?}");
        ensure!(finished.stderr.contains(said) && finished.stderr.contains(remedy), "{finished:?}");
        ensure!(!finished.stderr.contains("wrong@") && finished.stderr.lines().count() <= 2, "{finished:?}");
    }
    // Port 8002 is none that this proxy lets through, and the mediator's 443 is closed: what it says is passed on.
    world.mediator.kill().await?;
    let list = world.technician(&["ls", "--data", &world.data("technician")])?.finish(PATIENCE).await?;
    println!("{}", list.stderr.trim());
    ensure!(list.code == 4 && list.stderr.contains("does not get through: 503"), "{list:?}");
    Ok(())
}

/// Which proxy is taken.
async fn the_flag_then_the_file_then_the_environment() -> anyhow::Result<()> {
    // The environment has one that works.
    let world = World::up(Setup::behind(ProxyKind::Tinyproxy)).await?;
    let right = world.proxy.as_ref().context("a proxy")?.url.clone();
    // Nobody is there.
    let wrong = "127.0.0.1:9";
    let (data, host) = (world.data("technician"), &world.lab.technician.host);
    let file = format!("{data}/config.toml");
    let list = async |flag: &[&str]| {
        let list = [&["ls", "--data", &data], flag].concat();
        world.technician(&list)?.finish(PATIENCE).await
    };
    let named = |proxy: &str| format!("[network]\nproxy = {proxy:?}\n");

    ensure!(list(&[]).await?.code == 0, "the environment's alone");
    std::fs::write(&file, named(&format!("http://{wrong}")))?;
    let finished = list(&[]).await?;
    println!("{}", finished.stderr.trim());
    ensure!(
        finished.code == 4 && finished.stderr.contains(wrong),
        "the file's before the environment's: {finished:?}"
    );
    ensure!(list(&["--proxy", &right]).await?.code == 0, "the flag's before the file's");

    host.set_env("HTTPS_PROXY", &format!("http://{wrong}"));
    let finished = list(&["--proxy", &right]).await?;
    ensure!(finished.code == 0, "the flag's before the environment's: {finished:?}");
    std::fs::write(&file, named(&right))?;
    ensure!(list(&[]).await?.code == 0, "the file's before the environment's");
    let finished = list(&["--proxy", "none"]).await?;
    ensure!(finished.code == 5 && !finished.stderr.contains("proxy"), "none is none: {finished:?}");
    std::fs::write(&file, "")?;
    ensure!(list(&[]).await?.code == 4, "the environment's where nothing else is said");
    host.set_env("NO_PROXY", &world.lab.server.address.to_string());
    let finished = list(&[]).await?;
    println!("{}", finished.stderr.trim());
    ensure!(finished.code == 5 && !finished.stderr.contains("proxy"), "NO_PROXY: {finished:?}");
    Ok(())
}

/// Its certificates are never accepted, and the user hears whose they are.
async fn a_proxy_that_opens_tls_is_named() -> anyhow::Result<()> {
    let setup = Setup::new(Topology::new(NatKind::Cone, NatKind::Cone).stranger());
    let world = World::up(setup).await?;
    let host = world.lab.stranger.as_ref().context("a host for the proxy")?;
    let opens = proxy::ProxyServer::start(host, ProxyKind::SquidOpensTls).await?;
    let token = world.token(&["--role", "agent"]).await?;
    let (data, new) = (world.data("technician"), world.data("new"));
    for arguments in [
        vec!["ls", "--data", &data, "--proxy", &opens.url],
        vec!["forward", AGENT, "-L", "0:127.0.0.1:22", "--data", &data, "--proxy", &opens.url],
        vec!["enroll", &token, "--data", &new, "--proxy", &opens.url],
    ] {
        let finished = world.technician(&arguments)?.finish(PATIENCE).await?;
        println!("{}", finished.stderr.trim());
        ensure!(finished.code == 4, "{finished:?}");
        ensure!(finished.stderr.contains(proxy::AUTHORITY), "{finished:?}");
        ensure!(finished.stderr.contains("let its TLS through unopened"), "{finished:?}");
    }
    Ok(())
}

async fn all_but_443_is_blocked_in_mid_session() -> anyhow::Result<()> {
    let world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone))).await?;
    let transfers = TransferServer::start(&world.lab.agent.host).await?;
    let forward = world.forward(&[&format!("127.0.0.1:{}", transfers.port)]).await?;
    forward.reaches("direct", Duration::from_secs(10)).await?;
    let technician = world.lab.technician.host.clone();
    let local = forward.local[0];
    let (blocked, open) = (Duration::from_secs(10), Duration::from_secs(60));
    let events = async {
        world.lab.agent.only_https()?;
        world.lab.technician.only_https()?;
        let started = Instant::now();
        let event = last_carrier(&forward, "relay-https", blocked).await?;
        println!("on 443 after {:?}: {}", started.elapsed(), event["reason"]);
        world.lab.agent.not_only_https()?;
        world.lab.technician.not_only_https()?;
        let started = Instant::now();
        let event = last_carrier(&forward, "quic", open).await?;
        println!("direct again after {:?}: {}", started.elapsed(), event["reason"]);
        anyhow::Ok(())
    };
    // Enough for all of it; whatever happens, not a byte is lost.
    let transfer = async {
        for round in 0.. {
            download(&technician, local, round, BYTES, DEADLINE).await?;
        }
        anyhow::Ok(())
    };
    tokio::select! {
        done = events => done?,
        failed = transfer => failed?,
    }
    download(&world.lab.technician.host, local, 99, BYTES, DEADLINE).await?;
    let tiers = forward.tiers();
    println!("tiers: {tiers:?}");
    ensure!(tiers.len() <= 6, "it flaps");
    Ok(())
}

async fn a_firewall_that_takes_8002_and_lets_nothing_through() -> anyhow::Result<()> {
    for (at_agent, at_technician) in [(true, false), (false, true), (true, true)] {
        let world = World::up(Setup::new(Topology::new(NatKind::UdpBlocked, NatKind::UdpBlocked))).await?;
        for (swallows, site) in [(at_agent, &world.lab.agent), (at_technician, &world.lab.technician)] {
            if swallows {
                site.swallow_relay()?;
            }
        }
        let started = Instant::now();
        let transfers = TransferServer::start(&world.lab.agent.host).await?;
        let forward = world.forward(&[&format!("127.0.0.1:{}", transfers.port)]).await?;
        forward.reaches("relay", Duration::from_secs(12)).await?;
        println!(
            "swallowed at agent {at_agent}, technician {at_technician}: open after {:?}",
            started.elapsed()
        );
        download(&world.lab.technician.host, forward.local[0], 1, BYTES, DEADLINE).await?;
        for (swallows, process) in [(at_agent, &world.agent), (at_technician, &forward.process)] {
            let last = process.events("tier").pop().context("no tier")?;
            ensure!(!swallows || last["carrier"] == "relay-https", "{last}");
        }
    }
    Ok(())
}

/// The mediator is let through, the relay's host is not: the user hears it in the proxy's words.
async fn a_proxy_that_lets_nobody_to_the_relay_is_quoted() -> anyhow::Result<()> {
    let mut setup = Setup::behind(ProxyKind::Squid).bare_mediator();
    setup.topology.relays = 1;
    let world = World::up(setup).await?;
    world.lab.relays[0].refuse(&[443])?;
    let data = world.data("technician");
    let forward = ["forward", AGENT, "-L", "0:127.0.0.1:22", "--data", &data];
    let finished = world.technician(&forward)?.finish(Duration::from_secs(40)).await?;
    println!("{}", finished.stderr.trim());
    ensure!(finished.code == 5, "{finished:?}");
    ensure!(
        finished.stderr.contains("the relay: the proxy at") && finished.stderr.contains(": 503 "),
        "{finished:?}"
    );
    Ok(())
}

/// What the WebSocket and its TLS cost: on both legs, against plain legs, in turn in one run.
async fn what_443_costs_against_8002() -> anyhow::Result<()> {
    for (rate, bytes, least) in [(None, 512 << 20, 0.4), (Some(Rate(100_000_000)), 16 << 20, 0.95)] {
        let mut topology = Topology::new(NatKind::UdpBlocked, NatKind::UdpBlocked);
        topology.link.rate = rate;
        let world = World::up(Setup::new(topology)).await?;
        let transfers = TransferServer::start(&world.lab.agent.host).await?;
        let target = format!("127.0.0.1:{}", transfers.port);
        let plain = world.forward(&[&target]).await?;
        last_carrier(&plain, "relay", Duration::from_secs(10)).await?;
        world.lab.agent.only_https()?;
        world.lab.technician.only_https()?;
        let web = world.forward(&[&target]).await?;
        last_carrier(&web, "relay-https", Duration::from_secs(10)).await?;
        world.lab.agent.not_only_https()?;
        world.lab.technician.not_only_https()?;
        let mut times = [vec![], vec![]];
        for round in 0..3 {
            for (forward, times) in [&plain, &web].into_iter().zip(&mut times) {
                let host = &world.lab.technician.host;
                times.push(download(host, forward.local[0], round, bytes, DEADLINE).await?.as_secs_f64());
            }
        }
        let [plain_time, web_time] = times.map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[1]
        });
        let speed = |time: f64| bytes as f64 * 8.0 / time / 1e6;
        let ratio = plain_time / web_time;
        println!(
            "{rate:?}: relay {:.0} Mbit/s, relay-https {:.0} Mbit/s: {ratio:.2}",
            speed(plain_time),
            speed(web_time)
        );
        for (forward, carrier) in [(&plain, "relay"), (&web, "relay-https")] {
            last_carrier(forward, carrier, Duration::from_secs(1)).await?;
        }
        let least = if rate.is_none() { least / slack() } else { least };
        ensure!(ratio >= least, "less than {least}");
    }
    Ok(())
}

/// Both directions through a tunnel, on the carriers wanted at either end.
async fn through(world: &World, at_agent: &str, at_technician: &str) -> anyhow::Result<()> {
    let transfers = TransferServer::start(&world.lab.agent.host).await?;
    let forward = world.forward(&[&format!("127.0.0.1:{}", transfers.port)]).await?;
    forward.reaches("relay", Duration::from_secs(10)).await?;
    let host = &world.lab.technician.host;
    let started = Instant::now();
    download(host, forward.local[0], 1, BYTES, DEADLINE).await?;
    upload(host, forward.local[0], 2, BYTES, DEADLINE).await?;
    println!("{at_agent} and {at_technician}: 2 x {BYTES} bytes in {:?}", started.elapsed());
    for (process, wanted) in [(&forward.process, at_technician), (&world.agent, at_agent)] {
        let events = process.events("tier");
        let last = events.last().context("no tier")?;
        ensure!(last["tier"] == "relay" && last["carrier"] == wanted, "{}: {last}", process.name);
    }
    let status = world.technician(&["status", "--json", "--data", &world.data("technician")])?;
    let status = status.finish(PATIENCE).await?.ok()?;
    ensure!(status.contains(&format!("\"{at_technician}\"")), "{status}");
    end(forward.process).await
}

/// From the command to the first byte through a session, which is on this carrier; of three the median.
async fn opened(world: &World, carrier: &str) -> anyhow::Result<Duration> {
    let transfers = TransferServer::start(&world.lab.agent.host).await?;
    let mut times = Vec::new();
    for _ in 0..3 {
        let started = Instant::now();
        let forward = world.forward(&[&format!("127.0.0.1:{}", transfers.port)]).await?;
        download(&world.lab.technician.host, forward.local[0], 1, 1, DEADLINE).await?;
        times.push(started.elapsed());
        last_carrier(&forward, carrier, Duration::from_secs(1)).await?;
        end(forward.process).await?;
    }
    times.sort_unstable();
    Ok(times[1])
}

async fn last_carrier(forward: &Forward, carrier: &str, deadline: Duration) -> anyhow::Result<Value> {
    let what = format!("the carrier {carrier}");
    forward
        .process
        .output(deadline, &what, |lines| {
            let event = lines.iter().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let last = event.into_iter().find(|event| event["event"] == "tier")?;
            (last["carrier"] == carrier).then_some(last)
        })
        .await
}

async fn end(process: Process) -> anyhow::Result<()> {
    process.interrupt()?;
    process.finish(PATIENCE).await?.ok().map(drop)
}
