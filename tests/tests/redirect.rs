//! The redirector's TCP ports: for programs on machines without adit, when policy and agent both permit it.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use adit_tests::lab::{Host, NatKind, Topology};
use adit_tests::process::Finished;
use adit_tests::proxy::{ProxyKind, ProxyServer};
use adit_tests::traffic::{TransferServer, download, upload};
use adit_tests::world::{AGENT, PATIENCE, Setup, World};
use adit_tests::{lab_tests, poll, within};
use anyhow::{Context, ensure};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

lab_tests!(
    a_port_leads_to_the_target_and_only_from_its_source,
    a_port_of_a_relay_elsewhere,
    the_source_is_the_one_that_the_port_sees,
    a_port_by_ipv6,
    a_port_closes_at_the_end_of_its_time,
    without_permission_there_is_no_port,
    what_cannot_be_opened_is_said_in_a_line,
    a_full_range_is_said_in_a_line,
    a_grant_taken_away_closes_the_port,
    a_local_port_leads_to_the_redirector,
    a_script_opens_a_port,
    row_20_the_redirector_is_the_last_tier_and_never_a_silent_one,
);

const BYTES: u64 = 16 << 20;
const DEADLINE: Duration = Duration::from_secs(60);

async fn a_port_leads_to_the_target_and_only_from_its_source() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::Cone, NatKind::Cone).stranger();
    let world = World::up(Setup::new(topology).redirector()).await?;
    let transfers = TransferServer::start(&world.lab.agent.host).await?;
    let opened = redirect(&world, &format!("127.0.0.1:{}", transfers.port), &[]).await?;
    println!("{opened}");
    let at = address(&opened)?;
    ensure!((49_152..=65_535).contains(&at.port()) && opened["tier"] == "redirector", "{opened}");
    ensure!(opened["source"] == world.lab.technician.public_address()?.to_string(), "{opened}");

    // Nothing of adit is at this end.
    let host = &world.lab.technician.host;
    let before = world.lab.technician.traffic()?;
    download(host, at, 1, BYTES, DEADLINE).await?;
    upload(host, at, 2, BYTES, DEADLINE).await?;
    let after = world.lab.technician.traffic()?;
    ensure!(after.direct - before.direct > 2 * BYTES, "not on the redirector's port: {before:?} {after:?}");

    // Both sides are told, and it is written down.
    let event = world.agent.event(PATIENCE, "tier", 0, |event| Some(event.clone())).await?;
    println!("the agent: {event}");
    ensure!(
        event["tier"] == "redirector"
            && event["peer"].as_str().is_some_and(|peer| peer.contains("redirector"))
    );
    let data = world.data("agent");
    let status = ["status", "--json", "--data", &data];
    let status = adit_tests::world::run(&world.lab.agent.host, "adit", &status).await?;
    ensure!(status.contains("\"tier\":\"redirector\""), "{status}");
    let audit = std::fs::read_to_string(format!("{}/audit.jsonl", world.data("server")))?;
    let granted = audit.lines().find(|line| line.contains("\"event\":\"grant\"")).context("a grant")?;
    ensure!(granted.contains("\"via\":\"redirector\"") && granted.contains("redirector too"), "{granted}");
    ensure!(
        audit
            .lines()
            .any(|line| line.contains("\"event\":\"opened\"") && line.contains("\"tier\":\"redirector\""))
    );

    let logged =
        |lines: &[String]| lines.iter().any(|line| line.contains("tier=\"redirector\"")).then_some(());
    world.agent.error_output(PATIENCE, "the tier in the agent's log", logged).await?;
    world.mediator.error_output(PATIENCE, "the tier in the server's log", logged).await?;

    // 5,000 a minute from elsewhere, and nothing of it arrives at the agent.
    let (counter, port) = counting(&world.lab.agent.host).await?;
    let opened = redirect(&world, &format!("127.0.0.1:{port}"), &[]).await?;
    let (at, stranger) = (address(&opened)?, world.lab.stranger.as_ref().context("a stranger")?);
    // One connection tried the target when the port was opened.
    poll(PATIENCE, "the first try", async || (counter.load(Ordering::Relaxed) == 1).then_some(())).await?;
    let started = Instant::now();
    let answered = stranger.task(async move {
        let mut answered = 0;
        let mut pace = tokio::time::interval(Duration::from_millis(11));
        for _ in 0..500 {
            pace.tick().await;
            let Ok(mut tcp) = TcpStream::connect(at).await else { continue };
            let _ = tcp.write_all(b"GET / HTTP/1.1\r\n\r\n").await;
            answered += tcp.read(&mut [0; 10]).await.unwrap_or(0);
        }
        answered
    })?;
    let answered = within(DEADLINE, "the probes", async { Ok(answered.await?) }).await?;
    let rate = 500.0 / started.elapsed().as_secs_f64() * 60.0;
    println!(
        "{rate:.0} probes a minute: {answered} bytes back, {} connections at the agent",
        counter.load(Ordering::Relaxed)
    );
    ensure!(
        rate >= 5_000.0 && answered == 0 && counter.load(Ordering::Relaxed) == 1,
        "something got through"
    );
    // And the port is as it was.
    let greeted = host.task(async move {
        let mut tcp = TcpStream::connect(at).await?;
        let mut greeting = [0; 5];
        tcp.read_exact(&mut greeting).await?;
        // While this one is here, there is no other.
        let second = match TcpStream::connect(at).await {
            Ok(mut second) => second.read(&mut [0; 5]).await.unwrap_or(0),
            Err(_) => 0,
        };
        anyhow::Ok((greeting, second))
    })?;
    let (greeting, second) = within(PATIENCE, "a greeting", async { greeted.await? }).await?;
    ensure!(&greeting == b"hello" && second == 0);
    Ok(())
}

async fn a_port_of_a_relay_elsewhere() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::HttpsOnly, NatKind::Cone).relays(1);
    let world = World::up(Setup::new(topology).bare_mediator().redirector()).await?;
    let transfers = TransferServer::start(&world.lab.agent.host).await?;
    let opened = redirect(&world, &format!("127.0.0.1:{}", transfers.port), &[]).await?;
    println!("{opened}");
    ensure!(address(&opened)?.ip() == world.lab.relays[0].address, "{opened}");
    download(&world.lab.technician.host, address(&opened)?, 1, BYTES, DEADLINE).await.map(drop)
}

/// The control channel comes from a proxy, and the connections to the port do not.
async fn the_source_is_the_one_that_the_port_sees() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::Cone, NatKind::Cone).stranger();
    let world = World::up(Setup::new(topology).redirector()).await?;
    let elsewhere = world.lab.stranger.as_ref().context("a host for the proxy")?;
    let proxy = ProxyServer::start(elsewhere, ProxyKind::Tinyproxy).await?;
    let transfers = TransferServer::start(&world.lab.agent.host).await?;
    let target = format!("127.0.0.1:{}", transfers.port);
    let opened = redirect(&world, &target, &["--proxy", &proxy.url]).await?;
    println!("{opened}");
    ensure!(opened["source"] == world.lab.technician.public_address()?.to_string(), "{opened}");
    download(&world.lab.technician.host, address(&opened)?, 1, BYTES, DEADLINE).await?;
    ensure!(
        download(elsewhere, address(&opened)?, 1, 1, DEADLINE).await.is_err(),
        "the mediator's view counts, too"
    );

    // Where the machine does not reach the port, it is said at once, and the mediator's view counts.
    world.lab.technician.forbid_tcp(world.lab.server.address, &["49152-65535"])?;
    let refused = try_redirect(&world, &target, &["--proxy", &proxy.url]).await?;
    println!("{}", refused.stderr);
    ensure!(refused.stderr.contains("does not reach the server's port") && refused.code == 0, "{refused:?}");
    let opened: Value = serde_json::from_str(&refused.ok()?)?;
    ensure!(opened["source"] == elsewhere.address.to_string(), "{opened}");
    poll(PATIENCE, "the mediator's view to count", async || {
        download(elsewhere, address(&opened).ok()?, 1, 1, DEADLINE).await.ok()
    })
    .await?;
    Ok(())
}

async fn a_port_by_ipv6() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::Cone, NatKind::Ipv6Only).stranger();
    let world = World::up(Setup::new(topology).redirector()).await?;
    let transfers = TransferServer::start(&world.lab.agent.host).await?;
    let opened = redirect(&world, &format!("127.0.0.1:{}", transfers.port), &[]).await?;
    println!("{opened}");
    let (host, at) = (&world.lab.technician.host, address(&opened)?);
    let own = host.address6.context("an address")?.to_string();
    ensure!(at.is_ipv6() && opened["source"] == own, "{opened}");
    download(host, at, 1, BYTES, DEADLINE).await?;
    let stranger = world.lab.stranger.as_ref().context("a stranger")?;
    ensure!(download(stranger, at, 1, 1, DEADLINE).await.is_err(), "a stranger got through");
    Ok(())
}

async fn a_port_closes_at_the_end_of_its_time() -> anyhow::Result<()> {
    let world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone)).redirector()).await?;
    let (_, port) = counting(&world.lab.agent.host).await?;
    let file = world.scratch().join("pc.rdp");
    let rdp = file.to_string_lossy().into_owned();
    let opened = redirect(&world, &format!("127.0.0.1:{port}"), &["--ttl", "2s", "--rdp", &rdp]).await?;
    let at = address(&opened)?;
    let text = std::fs::read_to_string(&file)?;
    ensure!(text.contains(&format!("full address:s:{at}\r\n")), "{text:?}");
    let started = Instant::now();
    let ended = world.lab.technician.host.task(async move {
        let mut tcp = TcpStream::connect(at).await?;
        let mut all = Vec::new();
        let end = tcp.read_to_end(&mut all).await;
        let again =
            poll(PATIENCE, "the port to be closed", async || TcpStream::connect(at).await.err()).await;
        anyhow::Ok((all, end.is_err(), again))
    })?;
    let (all, _, again) = within(PATIENCE, "the end of its time", async { ended.await? }).await?;
    println!("closed after {:?}: {:?}", started.elapsed(), again?);
    ensure!(all == b"hello" && started.elapsed() > Duration::from_secs(1));
    let reason = world.agent.event(PATIENCE, "closed", 0, |event| Some(event["reason"].clone())).await?;
    ensure!(
        reason.as_str().is_some_and(|reason| reason.contains("expired") || reason.contains("time is over")),
        "{reason}"
    );
    Ok(())
}

async fn without_permission_there_is_no_port() -> anyhow::Result<()> {
    let world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone))).await?;
    let (counter, port) = counting(&world.lab.agent.host).await?;
    let target = format!("127.0.0.1:{port}");
    let refused = try_redirect(&world, &target, &[]).await?;
    println!("{}", refused.stderr);
    ensure!(
        refused.code == 3 && refused.stderr.contains("adit-mediator allow technician --redirector"),
        "{refused:?}"
    );
    let allow = ["allow", "--data", &world.data("server"), "technician", "--all-agents", "--redirector"];
    adit_tests::world::run(&world.lab.server, "adit-mediator", &allow).await?;
    let refused = try_redirect(&world, &target, &[]).await?;
    println!("{}", refused.stderr);
    ensure!(refused.code == 3 && refused.stderr.contains("[agent] redirector = true"), "{refused:?}");
    ensure!(counter.load(Ordering::Relaxed) == 0, "the target was reached");
    let audit = std::fs::read_to_string(format!("{}/audit.jsonl", world.data("server")))?;
    let refusals =
        audit.lines().filter(|line| line.contains("\"refused\"") && line.contains("redirector")).count();
    ensure!(refusals >= 2, "{audit}");
    Ok(())
}

async fn what_cannot_be_opened_is_said_in_a_line() -> anyhow::Result<()> {
    let mut world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone)).redirector()).await?;
    for (target, code, said) in [
        ("127.0.0.1:9", 4, "127.0.0.1:9: the target refused the connection"),
        ("198.51.100.1:22", 3, "198.51.100.1:22: the agent's allow list"),
    ] {
        let failed = try_redirect(&world, target, &[]).await?;
        println!("{}", failed.stderr);
        ensure!(
            failed.code == code && failed.stderr.contains(said) && failed.stderr.lines().count() <= 2,
            "{failed:?}"
        );
    }
    world.agent.kill().await?;
    let failed = poll(PATIENCE, "the agent to be offline", async || {
        let failed = try_redirect(&world, "127.0.0.1:9", &[]).await.ok()?;
        (failed.code == 4).then_some(failed)
    })
    .await?;
    println!("{}", failed.stderr);
    ensure!(failed.stderr.contains("is offline"), "{failed:?}");
    Ok(())
}

async fn a_full_range_is_said_in_a_line() -> anyhow::Result<()> {
    let mut world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone)).redirector()).await?;
    let file = format!("{}/config.toml", world.data("server"));
    let config = std::fs::read_to_string(&file)?.replace("\"49152-65535\"", "\"50000-50000\"");
    std::fs::write(&file, config)?;
    world.mediator.kill().await?;
    world.mediator = adit_tests::world::start(
        &world.lab.server,
        "adit-mediator",
        &["run", "--data", &world.data("server")],
    )?;
    world.agent_online().await?;
    let (_, port) = counting(&world.lab.agent.host).await?;
    let target = format!("127.0.0.1:{port}");
    let opened = redirect(&world, &target, &[]).await?;
    ensure!(address(&opened)?.port() == 50_000, "{opened}");
    let failed = try_redirect(&world, &target, &[]).await?;
    println!("{}", failed.stderr);
    ensure!(
        failed.code == 4
            && failed.stderr.contains("all ports of the redirector are taken")
            && failed.stderr.lines().count() <= 2,
        "{failed:?}"
    );
    Ok(())
}

async fn a_grant_taken_away_closes_the_port() -> anyhow::Result<()> {
    let world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone)).redirector()).await?;
    let (_, port) = counting(&world.lab.agent.host).await?;
    let opened = redirect(&world, &format!("127.0.0.1:{port}"), &[]).await?;
    let at = address(&opened)?;
    let cut = world.lab.technician.host.task(async move {
        let mut tcp = TcpStream::connect(at).await?;
        tcp.read_exact(&mut [0; 5]).await?;
        let started = Instant::now();
        let _ = tcp.read(&mut [0; 1]).await;
        anyhow::Ok(started.elapsed())
    })?;
    let deny = ["deny", "--data", &world.data("server"), "technician", "--all"];
    adit_tests::world::run(&world.lab.server, "adit-mediator", &deny).await?;
    let cut = within(PATIENCE, "the cut", async { cut.await? }).await?;
    println!("cut after {cut:?}");
    ensure!(cut < Duration::from_secs(5));
    Ok(())
}

/// `adit forward --via redirector`: no tunnel at this end, and the user is told.
async fn a_local_port_leads_to_the_redirector() -> anyhow::Result<()> {
    let world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone)).redirector()).await?;
    let transfers = TransferServer::start(&world.lab.agent.host).await?;
    let data = world.data("technician");
    let spec = format!("0:127.0.0.1:{}", transfers.port);
    let forward = ["forward", AGENT, "-L", &spec, "--via", "redirector", "--json", "--data", &data];
    let forward = world.technician(&forward)?;
    let local: SocketAddr =
        forward.event(PATIENCE, "listening", 0, |event| event["local"].as_str()?.parse().ok()).await?;
    let tier = forward.event(PATIENCE, "tier", 0, |event| Some(event.clone())).await?;
    println!("{tier}");
    ensure!(tier["tier"] == "redirector" && tier["carrier"] == "redirector", "{tier}");
    let said =
        |lines: &[String]| lines.iter().any(|line| line.contains("can read what passes")).then_some(());
    forward.error_output(PATIENCE, "that the server can read along", said).await?;
    // One after the other, as fast as they come: each takes the place of the one before.
    for round in 0..5 {
        download(&world.lab.technician.host, local, round, BYTES, DEADLINE).await?;
    }
    let agent = world.agent.event(PATIENCE, "tier", 0, |event| Some(event["tier"].clone())).await?;
    ensure!(agent == "redirector", "{agent}");
    let status = ["status", "--json", "--data", &data];
    let status = adit_tests::world::run(&world.lab.technician.host, "adit", &status).await?;
    let shown: Value = serde_json::from_str(status.trim())?;
    println!("{shown}");
    let session = &shown["sessions"][0];
    ensure!(session["tier"] == "redirector" && session["received"].as_u64() >= Some(5 * BYTES), "{shown}");

    // Ctrl-C closes the door on the server, too.
    let first: SocketAddr = tier["remote"].as_str().unwrap_or_default().parse()?;
    forward.interrupt()?;
    forward.finish(PATIENCE).await?.ok()?;
    world.agent.event(PATIENCE, "closed", 0, |event| Some(event["reason"].clone())).await?;
    let closed = world.lab.technician.host.task(async move {
        poll(PATIENCE, "the port to be closed", async || TcpStream::connect(first).await.err()).await
    })?;
    println!("after Ctrl-C: {}", within(PATIENCE, "the port to be closed", async { closed.await? }).await?);

    let again = ["forward", AGENT, "-L", &spec, "--via", "redirector", "--json", "--data", &data];
    let forward = world.technician(&again)?;
    forward.event(PATIENCE, "tier", 0, |_| Some(())).await?;
    let deny = ["deny", "--data", &world.data("server"), "technician", "--all"];
    adit_tests::world::run(&world.lab.server, "adit-mediator", &deny).await?;
    let finished = forward.finish(PATIENCE).await?;
    println!("{}", finished.stderr);
    ensure!(finished.code == 1 && finished.stdout.contains("\"closed\""), "{finished:?}");
    for arguments in [
        &["forward", AGENT, "-D", "0", "--via", "redirector", "--data", &data][..],
        &["forward", AGENT, "-L", "0:127.0.0.1:53/udp", "--via", "redirector", "--data", &data],
        &["stdio", AGENT, "127.0.0.1:22", "--via", "redirector", "--data", &data],
    ] {
        let finished = world.technician(arguments)?.finish(PATIENCE).await?;
        println!("{}", finished.stderr);
        ensure!(finished.code == 2, "{finished:?}");
    }
    Ok(())
}

/// UDP and the relay blocked at the technician's: the session fails unless both permit the redirector, and then both
/// hear of it.
async fn row_20_the_redirector_is_the_last_tier_and_never_a_silent_one() -> anyhow::Result<()> {
    for (granted, permitted, missing) in
        [(false, false, "--redirector"), (true, false, "[agent] redirector = true"), (true, true, "nothing")]
    {
        let topology = Topology::new(NatKind::UdpBlocked, NatKind::UdpBlocked).relays(1);
        let setup = Setup::new(topology).bare_mediator();
        let mut world = World::up(if granted { setup.redirector() } else { setup }).await?;
        if granted && !permitted {
            let file = format!("{}/config.toml", world.data("agent"));
            let config = std::fs::read_to_string(&file)?;
            std::fs::write(&file, config.replace("redirector = true", "redirector = false"))?;
            world.agent.kill().await?;
            world.restart_agent().await?;
        }
        let relay = world.lab.relays[0].address;
        world.lab.technician.forbid_tcp(relay, &[443, 8002])?;
        let transfers = TransferServer::start(&world.lab.agent.host).await?;
        let data = world.data("technician");
        let spec = format!("0:127.0.0.1:{}", transfers.port);
        let forward = ["forward", AGENT, "-L", &spec, "--json", "--data", &data];
        let forward = world.technician(&forward)?;
        let audit = || std::fs::read_to_string(format!("{}/audit.jsonl", world.data("server")));
        if !permitted {
            let finished = forward.finish(DEADLINE).await?;
            println!("{}", finished.stderr);
            ensure!(finished.code == 5 && finished.stderr.contains(missing), "{finished:?}");
            ensure!(!finished.stdout.contains("\"tier\""), "{finished:?}");
            ensure!(audit()?.lines().any(|line| line.contains("\"refused\"") && line.contains("redirector")));
            ensure!(!audit()?.lines().any(|line| line.contains("\"opened\"")));
            continue;
        }
        let tier = forward.event(DEADLINE, "tier", 0, |event| Some(event.clone())).await?;
        println!("{tier}");
        ensure!(
            tier["tier"] == "redirector"
                && tier["reason"].as_str().is_some_and(|why| why.contains("did not open"))
        );
        let local: SocketAddr =
            forward.event(PATIENCE, "listening", 0, |event| event["local"].as_str()?.parse().ok()).await?;
        download(&world.lab.technician.host, local, 1, BYTES, DEADLINE).await?;
        let agent = world.agent.event(PATIENCE, "tier", 0, |event| Some(event["tier"].clone())).await?;
        ensure!(agent == "redirector", "{agent}");
        ensure!(
            audit()?
                .lines()
                .any(|line| line.contains("\"grant\"") && line.contains("\"tier\":\"redirector\""))
        );
    }
    Ok(())
}

async fn try_redirect(world: &World, target: &str, options: &[&str]) -> anyhow::Result<Finished> {
    let data = world.data("technician");
    let arguments = [&["redirect", AGENT, target, "--json", "--data", &data], options].concat();
    world.technician(&arguments)?.finish(PATIENCE).await
}

async fn redirect(world: &World, target: &str, options: &[&str]) -> anyhow::Result<Value> {
    Ok(serde_json::from_str(&try_redirect(world, target, options).await?.ok()?)?)
}

fn address(opened: &Value) -> anyhow::Result<SocketAddr> {
    Ok(opened["address"].as_str().context("an address")?.parse()?)
}

/// A server that says hello and counts who comes.
async fn counting(host: &Host) -> anyhow::Result<(Arc<AtomicUsize>, u16)> {
    let counter = Arc::new(AtomicUsize::new(0));
    let (port, listening) = tokio::sync::oneshot::channel();
    let counted = counter.clone();
    host.task(async move {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let _ = port.send(listener.local_addr()?.port());
        loop {
            let (mut tcp, _) = listener.accept().await?;
            counted.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(async move {
                let _ = tcp.write_all(b"hello").await;
                let _ = tcp.read(&mut [0; 100]).await;
            });
        }
        #[allow(unreachable_code)]
        anyhow::Ok(())
    })?;
    Ok((counter, listening.await?))
}

/// The same over the API: with a token of the technician's, and nothing at all without.
async fn a_script_opens_a_port() -> anyhow::Result<()> {
    let world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone)).redirector()).await?;
    let technician = &world.lab.technician.host;
    let transfers = TransferServer::start(&world.lab.agent.host).await?;
    let data = world.data("technician");
    let token =
        world.technician(&["api-token", "--ttl", "5m", "--data", &data])?.finish(PATIENCE).await?.ok()?;
    let api = async |token: &str, method: &str, path: &str, body: &str| {
        let mut command = Command::new("curl");
        let root = format!("{}/web-root.pem", world.data("server"));
        let url = format!("https://{}{path}", world.lab.server.address);
        let authorization = format!("Authorization: Bearer {token}");
        command.args(["-sS", "--max-time", "30", "--cacert", &root, "-X", method, "-H", &authorization]);
        command.args(["-w", " %{http_code}", "-d", body, &url]);
        let said = technician.spawn(command)?.finish(PATIENCE).await?.ok()?;
        let (body, status) = said.rsplit_once(' ').context("a status")?;
        println!("{method} {path} {body}: {status}");
        anyhow::Ok((status.parse::<u16>()?, body.to_owned()))
    };
    let (status, agents) = api(&token, "GET", "/api/v1/agents", "").await?;
    let agents: Value = serde_json::from_str(&agents)?;
    ensure!(status == 200 && agents[0]["name"] == AGENT && agents[0]["online"] == true, "{agents}");
    let wish = format!(r#"{{"agent": "{AGENT}", "target": "127.0.0.1:{}", "ttl": 60}}"#, transfers.port);
    let (status, opened) = api(&token, "POST", "/api/v1/redirect", &wish).await?;
    let opened: Value = serde_json::from_str(&opened)?;
    ensure!(
        status == 200 && opened["source"] == world.lab.technician.public_address()?.to_string(),
        "{opened}"
    );
    let at = address(&opened)?;
    download(technician, at, 1, BYTES, DEADLINE).await?;
    let session = format!("/api/v1/sessions/{}", opened["session"].as_str().context("a session")?);
    ensure!(api(&token, "DELETE", &session, "").await?.0 == 204);
    let closed = technician.task(async move {
        poll(PATIENCE, "the port to be closed", async || TcpStream::connect(at).await.err()).await
    })?;
    within(PATIENCE, "the port to be closed", async { closed.await? }).await?;

    for (body, code, said) in [
        ("{", 400, "EOF"),
        (r#"{"agent": "x"}"#, 400, "target"),
        (r#"{"agent": "x", "target": "vnc"}"#, 400, "expected rdp"),
        (r#"{"agent": "x", "target": "rdp"}"#, 404, "x"),
        (r#"{"agent": "agent", "target": "198.51.100.1:22"}"#, 403, "allow list"),
        (r#"{"agent": "agent", "target": "http://127.0.0.1:9/"}"#, 502, "refused the connection"),
    ] {
        let (status, answer) = api(&token, "POST", "/api/v1/redirect", body).await?;
        ensure!(status == code && answer.contains(said), "{body}: {status} {answer}");
    }
    let audit = std::fs::read_to_string(format!("{}/audit.jsonl", world.data("server")))?;
    ensure!(audit.lines().any(|line| line.contains("\"grant\"") && line.contains("a port of ")), "{audit}");
    // Nobody without a token learns that there is an API.
    let server = world.data("server");
    for (token, path) in [
        ("", "/api/v1/agents"),
        ("x", "/api/v1/agents"),
        (&token[..token.len() - 1], "/api/v1/agents"),
        (&token, "/api/v1/agents/"),
        (&token, "/api/v2/agents"),
    ] {
        let (status, body) = api(token, "GET", path, "").await?;
        ensure!(status == 404 && body == "Nothing is here.\r\n", "{token} {path}: {body}");
    }
    adit_tests::world::run(&world.lab.server, "adit-mediator", &["revoke", "--data", &server, "technician"])
        .await?;
    let (status, body) = api(&token, "GET", "/api/v1/agents", "").await?;
    ensure!(status == 404 && body == "Nothing is here.\r\n", "a revoked device: {body}");
    let audit = std::fs::read_to_string(format!("{server}/audit.jsonl"))?;
    ensure!(!audit.contains(&token), "the token is in the audit log");
    Ok(())
}
