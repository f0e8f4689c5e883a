//! UDP through a forwarded port: real DNS.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use adit_tests::lab::{Host, Lab, NatKind, Topology};
use adit_tests::process::{Finished, Process};
use adit_tests::world::{PATIENCE, Setup, World};
use adit_tests::{lab_tests, poll};
use anyhow::ensure;

lab_tests!(dig_asks_dnsmasq_on_direct, dig_asks_dnsmasq_on_the_relay; as ordinary user: the_programs_do_it_without_adit);

async fn dig_asks_dnsmasq_on_direct() -> anyhow::Result<()> {
    dig(NatKind::Cone, "direct").await
}

async fn dig_asks_dnsmasq_on_the_relay() -> anyhow::Result<()> {
    dig(NatKind::UdpBlocked, "relay").await
}

/// If this fails, the others say nothing about adit.
async fn the_programs_do_it_without_adit() -> anyhow::Result<()> {
    let lab = Lab::up(&Topology::new(NatKind::None, NatKind::None)).await?;
    let _server = dns_server(&lab.agent.host).await?;
    let at = SocketAddr::new(lab.agent.host.address.into(), PORT);
    ensure!(ask(&lab.technician.host, at).await?.ok()? == ANSWER);
    Ok(())
}

const PORT: u16 = 5353;
const ANSWER: &str = "192.0.2.77";

async fn dig(nat: NatKind, tier: &str) -> anyhow::Result<()> {
    let world = World::up(Setup::new(Topology::new(nat, nat))).await?;
    let mut server = dns_server(&world.lab.agent.host).await?;
    let forward = world.forward(&[&format!("127.0.0.1:{PORT}/udp")]).await?;
    forward.reaches(tier, Duration::from_secs(10)).await?;
    for n in 0..20 {
        let answer = ask(&world.lab.technician.host, forward.local[0]).await?.ok()?;
        ensure!(answer == ANSWER, "answer {n}: {answer:?}");
    }
    println!("20 answers on {tier}");
    ensure!(server.is_running());
    Ok(())
}

/// dnsmasq on `host`, once it answers.
async fn dns_server(host: &Host) -> anyhow::Result<Process> {
    let mut command = Command::new("dnsmasq");
    // `--no-daemon` also keeps it from becoming another user: the lab's user namespace has no other.
    command.args(["--no-daemon", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--pid-file"]);
    command.arg(format!("--port={PORT}")).arg(format!("--address=/marker.test/{ANSWER}"));
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let server = host.spawn(command)?;
    poll(PATIENCE, "dnsmasq to answer", async || {
        let answer = ask(host, ([127, 0, 0, 1], PORT).into()).await.ok()?;
        (answer.code == 0 && answer.stdout == ANSWER).then_some(())
    })
    .await?;
    Ok(server)
}

async fn ask(host: &Host, server: SocketAddr) -> anyhow::Result<Finished> {
    let mut command = Command::new("dig");
    command.arg(format!("@{}", server.ip())).args(["-p", &server.port().to_string()]);
    command.args(["+short", "+tries=1", "+timeout=2", "marker.test"]);
    host.spawn(command)?.finish(PATIENCE).await
}
