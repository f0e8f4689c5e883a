//! RDP with a real server and a real client: the technician's screen shows what the agent's shows.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use adit_tests::desktop::{Desktop, Marker};
use adit_tests::lab::{Host, Lab, NatKind, Topology};
use adit_tests::lab_tests;
use adit_tests::process::Process;
use adit_tests::proxy::ProxyKind;
use adit_tests::world::{AGENT, PATIENCE, Setup, World, binary};
use anyhow::{Context, bail, ensure};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::time::{Instant, interval};

lab_tests!(a_screen_is_shown_on_direct, a_screen_is_shown_on_the_relay, a_screen_is_shown_where_only_443_is_open, a_screen_is_shown_behind_a_proxy, adit_rdp_starts_the_client, a_screen_is_shown_through_the_redirector; as ordinary user: the_programs_do_it_without_adit);

async fn a_screen_is_shown_on_direct() -> anyhow::Result<()> {
    through_a_tunnel(setup(NatKind::Cone), "direct", "quic").await
}

async fn a_screen_is_shown_on_the_relay() -> anyhow::Result<()> {
    through_a_tunnel(setup(NatKind::UdpBlocked), "relay", "relay").await
}

async fn a_screen_is_shown_where_only_443_is_open() -> anyhow::Result<()> {
    through_a_tunnel(setup(NatKind::HttpsOnly), "relay", "relay-https").await
}

async fn a_screen_is_shown_behind_a_proxy() -> anyhow::Result<()> {
    through_a_tunnel(Setup::behind(ProxyKind::SquidBasic), "relay", "relay-https").await
}

/// `adit rdp` with the client that it finds: here one that is already on the technician's desktop.
async fn adit_rdp_starts_the_client() -> anyhow::Result<()> {
    let world = World::up(setup(NatKind::Cone)).await?;
    let service = RdpServer::start(&world.lab.agent.host).await?;
    let scratch = tempfile::tempdir()?;
    let desktop = Desktop::start(&world.lab.technician.host).await?;
    let (adit, data, target) = (binary("adit")?, world.data("technician"), format!("127.0.0.1:{PORT}"));
    let rdp = ["rdp", AGENT, &target, "--data", &data, "--json", "--"];
    let client = ["/u:x", "/p:x", "/cert:ignore", "/sec:tls", "/size:800x600"];
    let mut process =
        desktop.spawn(&adit.to_string_lossy(), &[&rdp[..], &client].concat(), scratch.path())?;
    see(&desktop, &mut process, &service, scratch.path()).await?;
    let tiers = process.events("tier");
    ensure!(tiers.iter().any(|event| event["tier"] == "direct"), "{tiers:?}");
    process.interrupt()?;
    process.finish(PATIENCE).await?.ok()?;
    Ok(())
}

/// The client's machine has nothing of adit: somebody else asked for the port, and named it.
async fn a_screen_is_shown_through_the_redirector() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::Cone, NatKind::Cone).stranger();
    let world = World::up(Setup::new(topology).redirector()).await?;
    let client = world.lab.stranger.as_ref().context("another machine")?;
    let service = RdpServer::start(&world.lab.agent.host).await?;
    let (data, target) = (world.data("technician"), format!("127.0.0.1:{PORT}"));
    let source = client.address.to_string();
    let redirect = ["redirect", AGENT, &target, "--source", &source, "--json", "--data", &data];
    let redirect = world.technician(&redirect)?;
    let opened: serde_json::Value = serde_json::from_str(&redirect.finish(PATIENCE).await?.ok()?)?;
    let at: SocketAddr = opened["address"].as_str().unwrap_or_default().parse()?;
    ensure!(at.ip() == world.lab.server.address && opened["source"] == source, "{opened}");
    shows(client, at, &service).await?;
    let tier = world.agent.event(PATIENCE, "tier", 0, |event| Some(event["tier"].clone())).await?;
    ensure!(tier == "redirector", "{tier}");
    Ok(())
}

fn setup(nat: NatKind) -> Setup {
    Setup::new(Topology::new(nat, nat))
}

/// If this fails, the others say nothing about adit.
async fn the_programs_do_it_without_adit() -> anyhow::Result<()> {
    let lab = Lab::up(&Topology::new(NatKind::None, NatKind::None)).await?;
    let service = RdpServer::start(&lab.agent.host).await?;
    let at = SocketAddr::new(lab.agent.host.address.into(), PORT);
    shows(&lab.technician.host, at, &service).await
}

async fn through_a_tunnel(setup: Setup, tier: &str, carrier: &str) -> anyhow::Result<()> {
    let world = World::up(setup).await?;
    let service = RdpServer::start(&world.lab.agent.host).await?;
    let forward = world.forward(&[&format!("127.0.0.1:{PORT}")]).await?;
    let event = forward.reaches(tier, Duration::from_secs(10)).await?;
    ensure!(event["carrier"] == carrier, "{event}");
    shows(&world.lab.technician.host, forward.local[0], &service).await?;
    ensure!(forward.tier().as_deref() == Some(tier));
    println!("the marker was found on {tier}");
    Ok(())
}

const PORT: u16 = 3390;

/// A desktop with a marker on it, shared over RDP on port 3390.
struct RdpServer {
    marker: Marker,
    desktop: Desktop,
    scratch: TempDir,
    _program: Process,
}

impl RdpServer {
    async fn start(host: &Host) -> anyhow::Result<Self> {
        let scratch = tempfile::tempdir()?;
        let desktop = Desktop::start(host).await?;
        let marker = Marker::random();
        desktop.draw(&marker, scratch.path()).await?;
        let port = format!("/port:{PORT}");
        // Right after its start a display may refuse its first client: the server then ends at once.
        for _ in 0..10 {
            let server =
                desktop.spawn("freerdp-shadow-cli", &[&port, "-auth", "/sec:tls"], scratch.path())?;
            let accepting = host.task(tokio::time::timeout(PATIENCE / 10, async {
                let mut pace = interval(Duration::from_millis(50));
                while TcpStream::connect(("127.0.0.1", PORT)).await.is_err() {
                    pace.tick().await;
                }
            }))?;
            if accepting.await?.is_ok() {
                return Ok(Self { marker, desktop, scratch, _program: server });
            }
        }
        bail!("freerdp-shadow-cli does not come up")
    }
}

/// Connects a client on `host` to `server`, and looks at its screen until the marker is there.
async fn shows(host: &Host, at: SocketAddr, server: &RdpServer) -> anyhow::Result<()> {
    let scratch = tempfile::tempdir()?;
    let (desktop, marker) = (Desktop::start(host).await?, &server.marker);
    ensure!(!desktop.shows(marker, scratch.path()).await?, "the marker is there before anyone connected");
    let to = format!("/v:{at}");
    let arguments = [&to, "/u:x", "/p:x", "/cert:ignore", "/sec:tls", "/size:800x600"];
    let mut client = desktop.spawn("xfreerdp", &arguments, scratch.path())?;
    see(&desktop, &mut client, server, scratch.path()).await
}

/// Looks at the screen of `client` until the server's marker is there.
async fn see(
    desktop: &Desktop,
    client: &mut Process,
    server: &RdpServer,
    scratch: &Path,
) -> anyhow::Result<()> {
    let marker = &server.marker;
    let (start, mut pace) = (Instant::now(), interval(Duration::from_millis(500)));
    while !desktop.shows(marker, scratch).await? {
        ensure!(client.is_running(), "the client gave up");
        if start.elapsed() > PATIENCE {
            bail!("the marker is not on the technician's screen");
        }
        pace.tick().await;
        // The server sends what changes.
        server.desktop.draw(marker, server.scratch.path()).await?;
    }
    println!("the technician saw the agent's screen after {:?}", start.elapsed());
    Ok(())
}
