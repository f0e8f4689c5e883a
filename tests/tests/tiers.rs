//! Which tier each pair of NATs reaches, and that data flows on it.

use std::time::{Duration, Instant};

use adit_tests::lab::{Link, NatKind, Neighbours, Topology};
use adit_tests::lab_tests;
use adit_tests::poll;
use adit_tests::traffic::{TransferServer, download, echo, echoed, upload};
use adit_tests::world::{AGENT, Forward, PATIENCE, Setup, World};
use anyhow::{Context, ensure};
use serde_json::Value;
use tokio::net::UdpSocket;
use tokio::time::sleep;

lab_tests!(
    cone_and_cone_are_direct,
    none_and_none_are_direct,
    none_and_cone_are_direct,
    cone_and_none_are_direct,
    none_and_symmetric_are_direct,
    symmetric_and_none_are_direct,
    firewall_and_firewall_are_direct,
    firewall_and_cone_are_direct,
    ipv6_only_and_ipv6_only_are_direct,
    ipv6_only_and_dual_stack_are_direct,
    dual_stack_and_dual_stack_are_direct,
    dual_stack_and_cone_are_direct,
    ipv6_only_and_cone_stay_on_the_relay,
    sequential_and_cone_are_direct,
    symmetric_and_cone_are_direct,
    rejecting_and_others_are_direct,
    cgnat_is_direct,
    open_cones_are_direct,
    sequential_and_firewall_are_direct,
    symmetric_and_symmetric_stay_on_the_relay,
    udp_blocked_at_the_agent_stays_on_the_relay,
    udp_blocked_at_the_technician_stays_on_the_relay,
    by_tcp_to_an_agent_that_can_be_reached,
    by_tcp_to_a_technician_who_can_be_reached,
    far_away_tcp_steps_in_for_quic,
    on_one_network_it_is_tcp_between_the_two,
    isolated_segments_need_a_router_that_hairpins,
    routers_that_map_ports_on_request,
    a_router_gets_its_ports_back_from_who_was_killed,
    a_router_that_somebody_has_set_up,
    only_the_tier_that_is_wanted,
    a_full_range_of_ports_is_told_and_the_relay_carries
);

async fn cone_and_cone_are_direct() -> anyhow::Result<()> {
    direct(NatKind::Cone, NatKind::Cone).await
}

async fn none_and_none_are_direct() -> anyhow::Result<()> {
    direct(NatKind::None, NatKind::None).await
}

async fn none_and_cone_are_direct() -> anyhow::Result<()> {
    direct(NatKind::None, NatKind::Cone).await
}

async fn cone_and_none_are_direct() -> anyhow::Result<()> {
    direct(NatKind::Cone, NatKind::None).await
}

async fn none_and_symmetric_are_direct() -> anyhow::Result<()> {
    direct(NatKind::None, NatKind::Symmetric).await
}

async fn symmetric_and_none_are_direct() -> anyhow::Result<()> {
    direct(NatKind::Symmetric, NatKind::None).await
}

async fn firewall_and_firewall_are_direct() -> anyhow::Result<()> {
    direct(NatKind::Firewall, NatKind::Firewall).await
}

async fn firewall_and_cone_are_direct() -> anyhow::Result<()> {
    direct(NatKind::Firewall, NatKind::Cone).await
}

async fn ipv6_only_and_ipv6_only_are_direct() -> anyhow::Result<()> {
    direct(NatKind::Ipv6Only, NatKind::Ipv6Only).await
}

async fn ipv6_only_and_dual_stack_are_direct() -> anyhow::Result<()> {
    direct(NatKind::Ipv6Only, NatKind::DualStack).await?;
    direct(NatKind::DualStack, NatKind::Ipv6Only).await
}

async fn dual_stack_and_dual_stack_are_direct() -> anyhow::Result<()> {
    direct(NatKind::DualStack, NatKind::DualStack).await
}

async fn dual_stack_and_cone_are_direct() -> anyhow::Result<()> {
    direct(NatKind::DualStack, NatKind::Cone).await
}

async fn sequential_and_cone_are_direct() -> anyhow::Result<()> {
    direct(NatKind::Sequential, NatKind::Cone).await?;
    direct(NatKind::Cone, NatKind::Sequential).await
}

async fn sequential_and_firewall_are_direct() -> anyhow::Result<()> {
    direct(NatKind::Sequential, NatKind::Firewall).await?;
    direct(NatKind::Firewall, NatKind::Sequential).await
}

/// They have no IP version in common; each reaches the relay by its own.
async fn ipv6_only_and_cone_stay_on_the_relay() -> anyhow::Result<()> {
    relayed(NatKind::Ipv6Only, NatKind::Cone).await?;
    relayed(NatKind::Cone, NatKind::Ipv6Only).await
}

async fn symmetric_and_cone_are_direct() -> anyhow::Result<()> {
    direct(NatKind::Symmetric, NatKind::Cone).await?;
    direct(NatKind::Cone, NatKind::Symmetric).await
}

async fn rejecting_and_others_are_direct() -> anyhow::Result<()> {
    direct(NatKind::Rejecting, NatKind::Rejecting).await?;
    direct(NatKind::Rejecting, NatKind::Cone).await?;
    direct(NatKind::Cone, NatKind::Rejecting).await?;
    direct(NatKind::Rejecting, NatKind::Symmetric).await?;
    direct(NatKind::Symmetric, NatKind::Rejecting).await
}

async fn cgnat_is_direct() -> anyhow::Result<()> {
    direct(NatKind::CgnatCone, NatKind::Cone).await?;
    direct(NatKind::CgnatSymmetric, NatKind::Cone).await?;
    direct(NatKind::Cone, NatKind::CgnatSymmetric).await?;
    direct(NatKind::CgnatCone, NatKind::CgnatSymmetric).await
}

async fn open_cones_are_direct() -> anyhow::Result<()> {
    direct(NatKind::FullCone, NatKind::Symmetric).await?;
    direct(NatKind::AddressRestricted, NatKind::Symmetric).await?;
    direct(NatKind::AddressRestricted, NatKind::FullCone).await
}

async fn symmetric_and_symmetric_stay_on_the_relay() -> anyhow::Result<()> {
    relayed(NatKind::Symmetric, NatKind::Symmetric).await
}

async fn udp_blocked_at_the_agent_stays_on_the_relay() -> anyhow::Result<()> {
    relayed(NatKind::UdpBlocked, NatKind::Cone).await
}

async fn udp_blocked_at_the_technician_stays_on_the_relay() -> anyhow::Result<()> {
    relayed(NatKind::Cone, NatKind::UdpBlocked).await
}

async fn by_tcp_to_an_agent_that_can_be_reached() -> anyhow::Result<()> {
    direct(NatKind::None, NatKind::UdpBlocked).await
}

async fn by_tcp_to_a_technician_who_can_be_reached() -> anyhow::Result<()> {
    direct(NatKind::UdpBlocked, NatKind::None).await
}

async fn far_away_tcp_steps_in_for_quic() -> anyhow::Result<()> {
    let link = Link { delay: Duration::from_millis(10), ..Link::default() };
    let world = World::up(Setup::new(Topology::new(NatKind::None, NatKind::None).link(link))).await?;
    let transfers = TransferServer::start(&world.lab.agent.host).await?;
    let forward = world.forward(&[&format!("127.0.0.1:{}", transfers.port)]).await?;
    let event = forward.reaches("direct", Duration::from_secs(10)).await?;
    ensure!(event["carrier"] == "quic", "{event}");
    // By then TCP would have taken QUIC's place.
    tokio::time::sleep(Duration::from_secs(3)).await;
    ensure!(forward.process.events("tier").last() == Some(&event));
    by_tcp_once_udp_is_blocked(&world, &forward).await
}

async fn on_one_network_it_is_tcp_between_the_two() -> anyhow::Result<()> {
    for nat in [NatKind::Symmetric, NatKind::CgnatSymmetric, NatKind::UdpBlocked] {
        let world = World::up(Setup::new(Topology::behind_one_router(nat, Neighbours::Reachable))).await?;
        let transfers = TransferServer::start(&world.lab.agent.host).await?;
        let by_tcp = |event: &Value| (event["carrier"] == "tcp").then(|| event.clone());
        // A machine that is busy just then takes the peer for one that is far.
        let mut reached = None;
        for _ in 0..3 {
            let forward = world.forward(&[&format!("127.0.0.1:{}", transfers.port)]).await?;
            let event = forward.process.event(Duration::from_millis(1500), "tier", 0, by_tcp).await;
            if let Ok(event) = event {
                reached = Some((forward, event));
                break;
            }
        }
        let (forward, event) = reached.context("never by TCP")?;
        println!(
            "behind one router ({nat}): tcp after {} ms, to {}",
            event["since_start_ms"], event["remote"]
        );
        let agents = world.lab.agent.host.address.to_string();
        ensure!(event["remote"].as_str().is_some_and(|remote| remote.starts_with(&agents)), "{event}");
        download(&world.lab.technician.host, forward.local[0], 1, BYTES, DEADLINE).await?;
    }
    Ok(())
}

async fn isolated_segments_need_a_router_that_hairpins() -> anyhow::Result<()> {
    for neighbours in [Neighbours::Hairpin, Neighbours::Isolated] {
        let topology = Topology::behind_one_router(NatKind::FullCone, neighbours);
        let world = World::up(Setup::new(topology)).await?;
        let transfers = TransferServer::start(&world.lab.agent.host).await?;
        let forward = world.forward(&[&format!("127.0.0.1:{}", transfers.port)]).await?;
        if neighbours == Neighbours::Hairpin {
            let event = forward.reaches("direct", Duration::from_secs(10)).await?;
            println!("{neighbours:?}: direct after {} ms, to {}", event["since_start_ms"], event["remote"]);
            let router = world.lab.agent.public_address()?.to_string();
            ensure!(event["remote"].as_str().is_some_and(|remote| remote.starts_with(&router)), "{event}");
        } else {
            forward.reaches("relay", Duration::from_secs(10)).await?;
            let direct = forward.reaches("direct", Duration::from_secs(4)).await;
            ensure!(direct.is_err(), "{neighbours:?}: {direct:?}");
        }
        download(&world.lab.technician.host, forward.local[0], 1, BYTES, DEADLINE).await?;
    }
    Ok(())
}

/// Both NATs take random ports: without the router's help these sessions stay on the relay. The port is given back.
async fn routers_that_map_ports_on_request() -> anyhow::Result<()> {
    for nat in [NatKind::Pcp, NatKind::NatPmp, NatKind::Upnp] {
        for (agent, technician) in [(nat, NatKind::Symmetric), (NatKind::Symmetric, nat)] {
            let world = World::up(Setup::new(Topology::new(agent, technician).relays(1))).await?;
            let transfers = TransferServer::start(&world.lab.agent.host).await?;
            let forward = world.forward(&[&format!("127.0.0.1:{}", transfers.port)]).await?;
            let event = forward.reaches("direct", Duration::from_secs(10)).await?;
            println!("agent {agent}, technician {technician}: direct after {} ms", event["since_start_ms"]);
            download(&world.lab.technician.host, forward.local[0], 1, BYTES, DEADLINE).await?;
            let mapping = if agent == nat { &world.lab.agent } else { &world.lab.technician };
            ensure!(mapping.mapped_ports()? > 0);
            forward.process.interrupt()?;
            forward.process.finish(Duration::from_secs(10)).await?;
            poll(Duration::from_secs(15), "the ports to be given back", async || {
                (mapping.mapped_ports().ok()? == 0).then_some(())
            })
            .await?;
        }
    }
    Ok(())
}

/// Sessions that are killed before, while and after their router is asked. Both NATs take random ports.
async fn a_router_gets_its_ports_back_from_who_was_killed() -> anyhow::Result<()> {
    for nat in [NatKind::Pcp, NatKind::NatPmp, NatKind::Upnp] {
        let world = World::up(Setup::new(Topology::new(NatKind::Symmetric, nat).relays(1))).await?;
        let router = &world.lab.technician;
        let mut most = 0;
        for millis in [300, 520, 600, 800, 1200, 2000] {
            let mut forward = world.forward(&["127.0.0.1:9"]).await?;
            // Not a wait for something: whatever it is doing by then.
            sleep(Duration::from_millis(millis)).await;
            most = most.max(router.mapped_ports()?);
            forward.process.kill().await?;
        }
        ensure!(most > 0, "{nat}: nothing was mapped");
        let start = Instant::now();
        poll(Duration::from_secs(20), "the ports to be given back", async || {
            (router.mapped_ports().ok()? == 0).then_some(())
        })
        .await?;
        println!("{nat}: {most} ports at once, and none {:?} after the last was killed", start.elapsed());
    }
    Ok(())
}

/// `[p2p] public_addresses`: both NATs take random ports, and the agent's forwards one.
async fn a_router_that_somebody_has_set_up() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::Symmetric, NatKind::Symmetric);
    let mut world = World::up(Setup::new(topology.relays(1))).await?;
    let public = world.lab.agent.public_address()?;
    world.lab.agent.forward_port(40_000)?;
    let file = format!("{}/config.toml", world.data("agent"));
    let settings = format!("[p2p]\nports = \"40000-40000\"\npublic_addresses = [\"{public}\"]\n");
    std::fs::write(&file, std::fs::read_to_string(&file)?.replace("[p2p]\n", &settings))?;
    world.agent.kill().await?;
    world.restart_agent().await?;
    let transfers = TransferServer::start(&world.lab.agent.host).await?;
    let forward = world.forward(&[&format!("127.0.0.1:{}", transfers.port)]).await?;
    let event = forward.reaches("direct", Duration::from_secs(10)).await?;
    println!("direct after {} ms, to {}", event["since_start_ms"], event["remote"]);
    ensure!(event["remote"] == format!("{public}:40000"), "{event}");
    by_tcp_once_udp_is_blocked(&world, &forward).await
}

async fn by_tcp_once_udp_is_blocked(world: &World, forward: &Forward) -> anyhow::Result<()> {
    world.lab.technician.block_udp()?;
    let by_tcp = |event: &Value| (event["carrier"] == "tcp").then(|| event.clone());
    let event = forward.process.event(Duration::from_secs(20), "tier", 0, by_tcp).await?;
    println!("after UDP was blocked: {event}");
    download(&world.lab.technician.host, forward.local[0], 1, BYTES, DEADLINE).await?;
    Ok(())
}

/// `--via`, where both ways work.
async fn only_the_tier_that_is_wanted() -> anyhow::Result<()> {
    let world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone))).await?;
    let target = echo(&world.lab.agent.host).await?;
    for wanted in ["relay", "direct"] {
        let (data, spec) = (world.data("technician"), format!("127.0.0.1:0:127.0.0.1:{}", target.port()));
        let forward =
            world.technician(&["forward", AGENT, "-L", &spec, "--via", wanted, "--json", "--data", &data])?;
        let local = |event: &Value| event["local"].as_str()?.parse().ok();
        let local = forward.event(PATIENCE, "listening", 0, local).await?;
        world.lab.technician.host.task(echoed(local))?.await??;
        // Not a wait for something: the other way would have come about in a tenth of that.
        sleep(Duration::from_secs(2)).await;
        let tiers: Vec<_> = forward.events("tier").into_iter().map(|event| event["tier"].clone()).collect();
        ensure!(!tiers.is_empty() && tiers.iter().all(|tier| *tier == wanted), "{wanted}: {tiers:?}");
    }
    Ok(())
}

/// `[p2p] ports` with one port, which somebody else has.
async fn a_full_range_of_ports_is_told_and_the_relay_carries() -> anyhow::Result<()> {
    let mut world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone))).await?;
    world.lab.agent.host.task(async {
        let _taken = UdpSocket::bind(("0.0.0.0", 40_000)).await?;
        std::future::pending::<anyhow::Result<()>>().await
    })?;
    let file = format!("{}/config.toml", world.data("agent"));
    let settings = std::fs::read_to_string(&file)?.replace("[p2p]\n", "[p2p]\nports = \"40000-40000\"\n");
    std::fs::write(&file, settings)?;
    world.agent.kill().await?;
    world.restart_agent().await?;
    let target = echo(&world.lab.agent.host).await?;
    let forward = world.forward(&[&format!("127.0.0.1:{}", target.port())]).await?;
    world.lab.technician.host.task(echoed(forward.local[0]))?.await??;
    let told = |line: &String| line.contains("no free UDP port in 40000-40000; [p2p] ports sets the range");
    ensure!(world.agent.error_lines().iter().any(told), "{:?}", world.agent.error_lines());
    ensure!(forward.tier().as_deref() == Some("relay"));
    Ok(())
}

const BYTES: u64 = 16 << 20;
const DEADLINE: Duration = Duration::from_secs(30);

async fn direct(agent: NatKind, technician: NatKind) -> anyhow::Result<()> {
    // Two servers tell whether a NAT takes ports in turn.
    let depends = |kind| matches!(kind, NatKind::Sequential | NatKind::Symmetric | NatKind::CgnatSymmetric);
    let relays = usize::from(depends(agent) || depends(technician));
    let world = World::up(Setup::new(Topology::new(agent, technician).relays(relays))).await?;
    let transfers = TransferServer::start(&world.lab.agent.host).await?;
    let forward = world.forward(&[&format!("127.0.0.1:{}", transfers.port)]).await?;
    let event = forward.reaches("direct", Duration::from_secs(10)).await?;
    let (took, remote) = (&event["since_start_ms"], &event["remote"]);
    println!("agent {agent}, technician {technician}: direct after {took} ms, to {remote}");
    let both_have_ipv6 = [agent, technician].iter().all(|kind| kind.has_ipv6());
    ensure!(remote.as_str().is_some_and(|remote| remote.starts_with('[')) == both_have_ipv6, "{event}");
    let has_udp = ![agent, technician].contains(&NatKind::UdpBlocked);
    ensure!(has_udp || event["carrier"] == "tcp", "{event}");
    let before = world.lab.technician.traffic()?;
    download(&world.lab.technician.host, forward.local[0], 1, BYTES, DEADLINE).await?;
    upload(&world.lab.technician.host, forward.local[0], 2, BYTES, DEADLINE).await?;
    let after = world.lab.technician.traffic()?;
    let (direct, relayed) = (after.direct - before.direct, after.relayed - before.relayed);
    println!("{direct} bytes direct, {relayed} relayed");
    ensure!(direct > 2 * BYTES && relayed < BYTES / 10);
    ensure!(forward.tier().as_deref() == Some("direct"));
    Ok(())
}

async fn relayed(agent: NatKind, technician: NatKind) -> anyhow::Result<()> {
    let world = World::up(Setup::new(Topology::new(agent, technician))).await?;
    let transfers = TransferServer::start(&world.lab.agent.host).await?;
    let forward = world.forward(&[&format!("127.0.0.1:{}", transfers.port)]).await?;
    forward.reaches("relay", Duration::from_secs(10)).await?;
    download(&world.lab.technician.host, forward.local[0], 1, BYTES, DEADLINE).await?;
    upload(&world.lab.technician.host, forward.local[0], 2, BYTES, DEADLINE).await?;
    let traffic = world.lab.technician.traffic()?;
    println!("agent {agent}, technician {technician}: {traffic:?}");
    ensure!(traffic.relayed > 2 * BYTES && traffic.direct < BYTES / 10);
    ensure!(forward.tiers().iter().all(|tier| tier == "relay"), "tiers: {:?}", forward.tiers());
    Ok(())
}
