//! What happens to a tunnel when the network or a server fails under it: 256 MiB at 100 Mbit/s and
//! a stream that ticks every 10 ms each way go through, whole and in order, with short gaps.

use std::time::Duration;

use adit_tests::lab::{NatKind, Rate, Topology, Traffic};
use adit_tests::process::Process;
use adit_tests::traffic::{TickServer, TransferServer, download, tick};
use adit_tests::world::{Forward, Setup, World};
use adit_tests::{lab_tests, poll};
use anyhow::{Context, bail, ensure};
use serde_json::Value;

lab_tests!(
    udp_opened_while_on_the_relay,
    udp_blocked_while_direct,
    both_nats_rebooted_while_direct,
    both_nats_rebooted_while_on_the_relay,
    relay_killed_with_a_second_one,
    embedded_relay_killed_with_the_only_mediator,
    mediator_killed_while_on_a_relay,
    mediator_killed_while_direct,
    a_direct_path_that_drops_a_third,
    another_address_at_the_technician,
    another_address_at_the_agent,
    ipv6_gone_at_the_technician,
    interface_down_for_5_s,
    technician_stopped,
    agent_stopped
);

/// Longest gap between ticks.
const MARK: Duration = Duration::from_secs(2);
const MARK_RELAY_KILLED: Duration = Duration::from_secs(3);
/// "None": no more than the line and a busy machine make anyhow.
const MARK_NONE: Duration = Duration::from_millis(300);

const BYTES: u64 = 256 << 20;
/// The event happens when so many bytes have passed.
const EVENT_AT: u64 = 64 << 20;
/// A tier that was used has moved more than this.
const USED: u64 = 16 << 20;

async fn udp_opened_while_on_the_relay() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::UdpBlocked, NatKind::Cone);
    let traffic = during(Setup::new(topology), "relay", MARK, async |world, forward| {
        world.lab.agent.unblock_udp()?;
        forward.reaches("direct", TO_MOVE).await?;
        Ok(())
    })
    .await?;
    ensure!(traffic.relayed > USED && traffic.direct > USED, "both tiers must have moved bytes: {traffic:?}");
    Ok(())
}

async fn udp_blocked_while_direct() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::Cone, NatKind::Cone);
    let traffic = during(Setup::new(topology), "direct", MARK, async |world, forward| {
        world.lab.technician.block_udp()?;
        forward.reaches("relay", TO_MOVE).await?;
        Ok(())
    })
    .await?;
    ensure!(traffic.relayed > USED && traffic.direct > USED, "both tiers must have moved bytes: {traffic:?}");
    Ok(())
}

async fn both_nats_rebooted_while_direct() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::Cone, NatKind::Cone);
    during(Setup::new(topology), "direct", MARK, async |world, _| {
        world.lab.agent.reboot_nat()?;
        world.lab.technician.reboot_nat()
    })
    .await?;
    Ok(())
}

async fn both_nats_rebooted_while_on_the_relay() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::UdpBlocked, NatKind::UdpBlocked);
    during(Setup::new(topology), "relay", MARK, async |world, _| {
        world.lab.agent.reboot_nat()?;
        world.lab.technician.reboot_nat()
    })
    .await?;
    Ok(())
}

async fn relay_killed_with_a_second_one() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::UdpBlocked, NatKind::UdpBlocked).relays(2);
    during(Setup::new(topology).bare_mediator(), "relay", MARK_RELAY_KILLED, async |world, forward| {
        let used = relay_in_use(world, forward)?;
        world.relays[used].kill().await
    })
    .await?;
    Ok(())
}

async fn embedded_relay_killed_with_the_only_mediator() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::UdpBlocked, NatKind::UdpBlocked).relays(1);
    let mut world = World::up(Setup::new(topology.rate(Rate::mbit(100)))).await?;
    // The tunnel starts where the mediator is, while the other relay is out of reach.
    world.lab.relays[0].refuse(&[443, 8002])?;
    let through = Through::start(&world, "relay").await?;
    world.lab.relays[0].refuse(&[])?;
    through
        .happens(&mut world, MARK_RELAY_KILLED, async |world, forward| {
            ensure!(relay_in_use(world, forward).is_err(), "the tunnel is not on the embedded relay");
            world.mediator.kill().await
        })
        .await?;
    Ok(())
}

async fn mediator_killed_while_on_a_relay() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::UdpBlocked, NatKind::UdpBlocked).relays(1);
    during(Setup::new(topology).bare_mediator(), "relay", MARK_NONE, async |world, _| {
        world.mediator.kill().await
    })
    .await?;
    Ok(())
}

async fn mediator_killed_while_direct() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::Cone, NatKind::Cone).relays(1);
    during(Setup::new(topology).bare_mediator(), "direct", MARK_NONE, async |world, _| {
        world.mediator.kill().await
    })
    .await?;
    Ok(())
}

/// How long a move to another tier may take to be reported.
const TO_MOVE: Duration = Duration::from_secs(10);
/// The transfer takes 22 s at the line's rate.
const TRANSFER: Duration = Duration::from_secs(60);

async fn a_direct_path_that_drops_a_third() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::Cone, NatKind::Cone);
    let traffic = during(Setup::new(topology), "direct", MARK, async |world, forward| {
        world.lab.technician.set_direct_loss(30)?;
        // By chance it is silent for too long before that is known: then it is left for that reason, and found again.
        let left = |event: &Value| {
            let reason = event["reason"].as_str()?;
            (reason.starts_with("direct path left: ") && reason.contains(" % of the packets")).then_some(())
        };
        forward.process.event(Duration::from_secs(60), "tier", 0, left).await
    })
    .await?;
    ensure!(traffic.relayed > USED, "{traffic:?}");
    Ok(())
}

async fn another_address_at_the_technician() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::Cone, NatKind::Cone);
    during(Setup::new(topology), "direct", MARK, async |world, _| world.lab.technician.host.change_address())
        .await
        .map(drop)
}

async fn another_address_at_the_agent() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::Cone, NatKind::Cone);
    during(Setup::new(topology), "direct", MARK, async |world, _| world.lab.agent.host.change_address())
        .await
        .map(drop)
}

async fn ipv6_gone_at_the_technician() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::DualStack, NatKind::DualStack);
    during(Setup::new(topology), "direct", MARK, async |world, _| world.lab.technician.host.lose_ipv6())
        .await
        .map(drop)
}

async fn interface_down_for_5_s() -> anyhow::Result<()> {
    const DOWN: Duration = Duration::from_secs(5);
    let topology = Topology::new(NatKind::Cone, NatKind::Cone);
    during(Setup::new(topology), "direct", DOWN + MARK, async |world, _| {
        world.lab.technician.host.set_interface(false)?;
        tokio::time::sleep(DOWN).await;
        world.lab.technician.host.set_interface(true)
    })
    .await
    .map(drop)
}

async fn technician_stopped() -> anyhow::Result<()> {
    stopped(async |_, forward, time| stop(&forward.process, time).await).await
}

async fn agent_stopped() -> anyhow::Result<()> {
    stopped(async |world, _, time| stop(&world.agent, time).await).await
}

/// `stop`s an end for 15 s, in the long form for ten minutes.
async fn stopped(
    stop: impl AsyncFnOnce(&World, &Forward, Duration) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let time = Duration::from_secs(if std::env::var_os("ADIT_TEST_LONG").is_some() { 600 } else { 15 });
    let topology = Topology::new(NatKind::Cone, NatKind::Cone);
    let event = async |world: &mut World, forward: &Forward| stop(world, forward, time).await;
    during(Setup::new(topology), "direct", time + MARK_RELAY_KILLED, event).await.map(drop)
}

/// As a lid that is closed does.
async fn stop(process: &Process, time: Duration) -> anyhow::Result<()> {
    process.pause()?;
    tokio::time::sleep(time).await;
    process.go_on()
}

/// Brings `setup` up with lines of 100 Mbit/s, waits for `tier`, and lets `event` happen while bytes
/// flow. What passed the technician's router.
async fn during(
    mut setup: Setup,
    tier: &str,
    mark: Duration,
    event: impl AsyncFnOnce(&mut World, &Forward) -> anyhow::Result<()>,
) -> anyhow::Result<Traffic> {
    setup.topology.link.rate = Some(Rate::mbit(100));
    let mut world = World::up(setup).await?;
    Through::start(&world, tier).await?.happens(&mut world, mark, event).await
}

/// A tunnel with a tick server and a transfer server behind it.
struct Through {
    forward: Forward,
    ticks: TickServer,
}

impl Through {
    async fn start(world: &World, tier: &str) -> anyhow::Result<Self> {
        let agent = &world.lab.agent.host;
        let (ticks, transfers) = (TickServer::start(agent).await?, TransferServer::start(agent).await?);
        let targets = [format!("127.0.0.1:{}", ticks.port), format!("127.0.0.1:{}", transfers.port)];
        let forward = world.forward(&[&targets[0], &targets[1]]).await?;
        forward.reaches(tier, TO_MOVE).await?;
        Ok(Self { forward, ticks })
    }

    async fn happens(
        self,
        world: &mut World,
        mark: Duration,
        event: impl AsyncFnOnce(&mut World, &Forward) -> anyhow::Result<()>,
    ) -> anyhow::Result<Traffic> {
        let (technician, ticks, transfers) =
            (world.lab.technician.host.clone(), self.forward.local[0], self.forward.local[1]);
        let start = world.lab.technician.traffic()?;
        let ticking = tick(&technician, ticks).await?;
        let seed: u32 = rand::random();
        let transfer = tokio::spawn(async move {
            download(&technician, transfers, seed.into(), BYTES, TRANSFER + mark).await
        });
        poll(TRANSFER, "the transfer to be under way", async || {
            let now = world.lab.technician.traffic().ok()?;
            (now.relayed + now.direct - start.relayed - start.direct > EVENT_AT).then_some(())
        })
        .await?;
        // What a busy line does by itself is not the event's.
        self.ticks.new_lap();
        ticking.new_lap();
        event(world, &self.forward).await?;
        let moved = transfer.await?.context("the transfer");
        let took = moved?;
        let (here, there) = ticking.stop().await.context("the ticks")?;
        let end = world.lab.technician.traffic()?;
        let traffic = Traffic { relayed: end.relayed - start.relayed, direct: end.direct - start.direct };
        println!("technician: {here}\nagent: {there}\ntransfer: {took:?}; {traffic:?}");
        for event in self.forward.process.events("tier") {
            println!("{event}");
        }
        let gap = here.longest_gap.max(there.longest_gap);
        ensure!(gap <= mark, "the longest gap was {gap:?}; the mark is {mark:?}");
        Ok(traffic)
    }
}

/// Which of [`World::relays`] carries the tunnel, by what the last event about tiers says.
fn relay_in_use(world: &World, forward: &Forward) -> anyhow::Result<usize> {
    let events = forward.process.events("tier");
    let remote =
        events.last().and_then(|event: &Value| event["remote"].as_str()).context("no remote address")?;
    match world.lab.relays.iter().position(|host| remote.starts_with(&format!("{}:", host.address))) {
        Some(position) => Ok(position),
        None => bail!("{remote} is none of the relays"),
    }
}
