//! Which tier each pair of NATs reaches, and that data flows on it.

use std::time::Duration;

use adit_tests::lab::{NatKind, Topology};
use adit_tests::lab_tests;
use adit_tests::traffic::{TransferServer, download, upload};
use adit_tests::world::{Setup, World};
use anyhow::ensure;

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
    sequential_and_firewall_are_direct,
    symmetric_and_symmetric_stay_on_the_relay,
    udp_blocked_at_the_agent_stays_on_the_relay,
    udp_blocked_at_the_technician_stays_on_the_relay
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

async fn symmetric_and_symmetric_stay_on_the_relay() -> anyhow::Result<()> {
    relayed(NatKind::Symmetric, NatKind::Symmetric).await
}

async fn udp_blocked_at_the_agent_stays_on_the_relay() -> anyhow::Result<()> {
    relayed(NatKind::UdpBlocked, NatKind::Cone).await
}

async fn udp_blocked_at_the_technician_stays_on_the_relay() -> anyhow::Result<()> {
    relayed(NatKind::Cone, NatKind::UdpBlocked).await
}

const BYTES: u64 = 16 << 20;
const DEADLINE: Duration = Duration::from_secs(30);

async fn direct(agent: NatKind, technician: NatKind) -> anyhow::Result<()> {
    // Two servers tell whether a NAT takes ports in turn.
    let relays = usize::from([agent, technician].contains(&NatKind::Sequential));
    let world = World::up(Setup::new(Topology::new(agent, technician).relays(relays))).await?;
    let transfers = TransferServer::start(&world.lab.agent.host).await?;
    let forward = world.forward(&[&format!("127.0.0.1:{}", transfers.port)]).await?;
    let event = forward.reaches("direct", Duration::from_secs(10)).await?;
    let (took, remote) = (&event["since_start_ms"], &event["remote"]);
    println!("agent {agent}, technician {technician}: direct after {took} ms, to {remote}");
    let both_have_ipv6 = [agent, technician].iter().all(|kind| kind.has_ipv6());
    ensure!(remote.as_str().is_some_and(|remote| remote.starts_with('[')) == both_have_ipv6, "{event}");
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
