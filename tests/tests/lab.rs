//! The lab does what its names say: nothing that is measured in it is worth more than this.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use adit_tests::lab::{Host, Lab, Link, NatKind, Rate, Reflector, Topology, UdpProbe};
use adit_tests::traffic::{TickServer, TransferServer, download, tick, upload};
use adit_tests::{lab_tests, within};
use anyhow::{Context, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

lab_tests!(
    none_maps_nothing_and_filters_nothing,
    cone_maps_alike_and_filters,
    symmetric_maps_anew_and_filters,
    udp_blocked_passes_tcp_only,
    udp_is_blocked_and_opened_while_it_flows,
    a_reboot_changes_mappings_and_breaks_tcp,
    a_cut_line_passes_nothing_until_it_is_mended,
    a_line_delays_each_way,
    a_line_loses_and_duplicates_as_asked,
    a_line_reorders,
    rates_hold_in_both_directions,
    traffic_is_told_apart,
    ticks_and_transfers_arrive,
    ticks_beside_a_transfer_have_short_gaps;
    as ordinary user: an_ordinary_user_can_do_it_all
);

async fn none_maps_nothing_and_filters_nothing() -> anyhow::Result<()> {
    let lab = Lab::up(&Topology::new(NatKind::None, NatKind::None).relays(1)).await?;
    let (near, far, probe) = reflectors(&lab)?;
    let own = SocketAddr::new(lab.agent.host.address.into(), probe.port()?);
    ensure!(probe.mapping(&near)? == Some(own));
    far.send(own)?;
    ensure!(probe.receive()? == Some(far.address), "an unasked packet must arrive");
    let other = UdpProbe::open(&lab.technician.host)?;
    let reflector = Reflector::start(&lab.agent.host)?;
    let seen = other.mapping(&reflector)?.context("the sites do not reach each other")?;
    ensure!(seen.ip() == lab.technician.host.address);
    Ok(())
}

async fn cone_maps_alike_and_filters() -> anyhow::Result<()> {
    let lab = Lab::up(&Topology::new(NatKind::Cone, NatKind::None).relays(1)).await?;
    port_restricted_cone(&lab)
}

fn port_restricted_cone(lab: &Lab) -> anyhow::Result<()> {
    let (near, far, probe) = reflectors(lab)?;
    let mapping = probe.mapping(&near)?.context("no answer")?;
    ensure!(mapping.ip() == lab.agent.public_address()?);
    // An early packet is dropped, and does not move the mapping.
    far.send(mapping)?;
    ensure!(probe.receive()?.is_none(), "an unasked packet must not arrive");
    ensure!(probe.mapping(&far)? == Some(mapping), "the mapping depends on the destination");
    // Another port of an address that was asked is unasked all the same.
    let same_host = Reflector::start(&lab.relays[0])?;
    same_host.send(mapping)?;
    ensure!(probe.receive()?.is_none(), "the filter does not look at ports");
    far.send(mapping)?;
    ensure!(probe.receive()? == Some(far.address), "what was asked must answer");
    Ok(())
}

async fn symmetric_maps_anew_and_filters() -> anyhow::Result<()> {
    let lab = Lab::up(&Topology::new(NatKind::Symmetric, NatKind::None).relays(1)).await?;
    let (near, far, probe) = reflectors(&lab)?;
    let mapping = probe.mapping(&near)?.context("no answer")?;
    ensure!(mapping.ip() == lab.agent.public_address()?);
    ensure!(probe.mapping(&near)? == Some(mapping), "one destination has one mapping");
    far.send(mapping)?;
    ensure!(probe.receive()?.is_none(), "an unasked packet must not arrive");
    // Ports are random: not the same, not the next, not the socket's own.
    let other = probe.mapping(&far)?.context("no answer")?;
    ensure!(other.ip() == mapping.ip() && other.port().abs_diff(mapping.port()) > 2);
    ensure!(mapping.port() != probe.port()? && other.port() != probe.port()?);
    Ok(())
}

async fn udp_blocked_passes_tcp_only() -> anyhow::Result<()> {
    let lab = Lab::up(&Topology::new(NatKind::UdpBlocked, NatKind::None).relays(1)).await?;
    let (near, _, probe) = reflectors(&lab)?;
    ensure!(probe.mapping(&near)?.is_none());
    echo(&lab.agent.host, &lab.server).await?;
    lab.agent.unblock_udp()?;
    port_restricted_cone(&lab)
}

async fn udp_is_blocked_and_opened_while_it_flows() -> anyhow::Result<()> {
    for nat in [NatKind::None, NatKind::Cone, NatKind::Symmetric] {
        let lab = Lab::up(&Topology::new(nat, NatKind::None).relays(1)).await?;
        let (near, _, probe) = reflectors(&lab)?;
        let mapping = probe.mapping(&near)?.context("no answer")?;
        lab.agent.block_udp()?;
        ensure!(probe.mapping(&near)?.is_none(), "{nat}: UDP must be blocked");
        near.send(mapping)?;
        ensure!(probe.receive()?.is_none(), "{nat}: UDP must be blocked inwards");
        echo(&lab.agent.host, &lab.server).await?;
        lab.agent.unblock_udp()?;
        ensure!(probe.mapping(&near)? == Some(mapping), "{nat}: the router did not reboot");
    }
    Ok(())
}

async fn a_reboot_changes_mappings_and_breaks_tcp() -> anyhow::Result<()> {
    for nat in [NatKind::Cone, NatKind::Symmetric] {
        let mut lab = Lab::up(&Topology::new(nat, NatKind::None).relays(1)).await?;
        let (near, far, probe) = reflectors(&lab)?;
        let before = probe.mapping(&near)?.context("no answer")?;
        let mut tcp = connect_echo(&lab.agent.host, &lab.server).await?;
        lab.agent.reboot_nat()?;
        near.send(before)?;
        ensure!(probe.receive()?.is_none(), "{nat}: the old mapping is alive");
        let after = probe.mapping(&near)?.context("no answer after the reboot")?;
        ensure!(after.port() != before.port() && after.ip() == before.ip(), "{nat}: the mapping is the same");
        ensure!((probe.mapping(&far)? == Some(after)) == (nat == NatKind::Cone));
        let answer = tcp.write_all(b"x").await.is_ok()
            && matches!(tokio::time::timeout(Duration::from_secs(1), tcp.read_u8()).await, Ok(Ok(_)));
        ensure!(!answer, "{nat}: a TCP connection outlived the reboot");
        echo(&lab.agent.host, &lab.server).await?;
    }
    Ok(())
}

async fn a_cut_line_passes_nothing_until_it_is_mended() -> anyhow::Result<()> {
    let lab = Lab::up(&Topology::new(NatKind::Cone, NatKind::None).relays(1)).await?;
    let (near, _, probe) = reflectors(&lab)?;
    let mapping = probe.mapping(&near)?;
    lab.agent.cut()?;
    ensure!(probe.mapping(&near)?.is_none());
    lab.agent.mend()?;
    ensure!(probe.mapping(&near)? == mapping);
    Ok(())
}

async fn a_line_delays_each_way() -> anyhow::Result<()> {
    let delay = Duration::from_millis(20);
    let topology =
        Topology::new(NatKind::Cone, NatKind::None).relays(1).link(Link { delay, ..Link::default() });
    let mut lab = Lab::up(&topology).await?;
    let (near, _, probe) = reflectors(&lab)?;
    let (through, through_most) = round_trips(&probe, &near, 20)?;
    lab.set_links(Link::default())?;
    let (without, without_most) = round_trips(&probe, &near, 20)?;
    println!(
        "round trip: {through:?} (at most {through_most:?}) with 20 ms each way, {without:?} ({without_most:?}) without"
    );
    ensure!(through >= 2 * delay && through < 2 * delay + Duration::from_millis(8), "{through:?}");
    ensure!(without < Duration::from_millis(8), "{without:?}");
    Ok(())
}

async fn a_line_loses_and_duplicates_as_asked() -> anyhow::Result<()> {
    let mut lab = Lab::up(&Topology::new(NatKind::Cone, NatKind::None).relays(1)).await?;
    let (near, _, probe) = reflectors(&lab)?;
    const PACKETS: usize = 2000;

    let link = Link { loss: 10.0, duplicate: 20.0, seed: 1, ..Link::default() };
    let stats = lab.set_agent_link(link)?.context("a line with loss is in user space")?;
    let answers = paced(&probe, &near, PACKETS)?;
    println!("{answers} answers to {PACKETS} packets with 10 % loss and 20 % duplicates each way: {stats:?}");
    // 0.9 x 1.2 there, and again back: 1.17.
    ensure!((1.07..1.27).contains(&(answers as f64 / PACKETS as f64)));
    ensure!(stats.failed.load(std::sync::atomic::Ordering::Relaxed) == 0);

    lab.set_agent_link(Link::default())?;
    lab.agent.set_loss(10)?;
    let answers = paced(&probe, &near, PACKETS)?;
    println!("{answers} answers to {PACKETS} packets with 10 % loss on the router");
    ensure!((0.75..0.87).contains(&(answers as f64 / PACKETS as f64)));
    lab.agent.set_loss(0)?;
    ensure!(paced(&probe, &near, 200)? == 200);
    Ok(())
}

async fn a_line_reorders() -> anyhow::Result<()> {
    let link = Link { reorder: 10.0, ..Link::default() };
    let mut lab = Lab::up(&Topology::new(NatKind::Cone, NatKind::None).relays(1)).await?;
    let (near, _, probe) = reflectors(&lab)?;
    let in_order = order(&probe, &near, 500)?;
    lab.set_agent_link(link)?;
    let out_of_order = order(&probe, &near, 500)?;
    println!("overtaken: {in_order} of 500 without, {out_of_order} with 10 % each way");
    ensure!(in_order == 0 && (25..250).contains(&out_of_order));
    Ok(())
}

async fn rates_hold_in_both_directions() -> anyhow::Result<()> {
    let mut lab = Lab::up(&Topology::new(NatKind::Cone, NatKind::None).relays(1)).await?;
    let server = TransferServer::start(&lab.server).await?;
    let at = SocketAddr::new(lab.server.address.into(), server.port);
    let free = download(&lab.agent.host, at, 0, 64 << 20, Duration::from_secs(30)).await?;
    println!("free: {:.0} Mbit/s", mbit(64 << 20, free));
    ensure!(mbit(64 << 20, free) > 300.0);
    let kernel = Link { rate: Some(Rate::mbit(100)), ..Link::default() };
    for link in [kernel, Link { delay: Duration::from_millis(5), ..kernel }] {
        let stats = lab.set_agent_link(link)?;
        let down = download(&lab.agent.host, at, 1, 24 << 20, Duration::from_secs(30)).await?;
        let up = upload(&lab.agent.host, at, 2, 24 << 20, Duration::from_secs(30)).await?;
        let (down, up) = (mbit(24 << 20, down), mbit(24 << 20, up));
        println!("{link:?}: {down:.0} Mbit/s down, {up:.0} up {stats:?}");
        ensure!((75.0..101.0).contains(&down) && (75.0..101.0).contains(&up));
    }
    Ok(())
}

async fn traffic_is_told_apart() -> anyhow::Result<()> {
    let lab = Lab::up(&Topology::new(NatKind::Cone, NatKind::None).relays(1)).await?;
    let (near, _, probe) = reflectors(&lab)?;
    let before = lab.agent.traffic()?;
    ensure!((before.relayed, before.direct) == (0, 0));
    probe.mapping(&near)?.context("no answer")?;
    let direct = lab.agent.traffic()?;
    ensure!(direct.direct > 56 && direct.relayed == 0, "{direct:?}");
    echo_on(&lab.agent.host, &lab.server, 8002).await?;
    let both = lab.agent.traffic()?;
    ensure!(both.relayed > 0 && both.direct == direct.direct, "{both:?}");
    Ok(())
}

async fn ticks_and_transfers_arrive() -> anyhow::Result<()> {
    let lab = Lab::up(&Topology::new(NatKind::Cone, NatKind::Cone)).await?;
    let (ticks, transfers) =
        (TickServer::start(&lab.server).await?, TransferServer::start(&lab.server).await?);
    let at = |port| SocketAddr::new(lab.server.address.into(), port);
    let ticking = tick(&lab.technician.host, at(ticks.port)).await?;
    download(&lab.technician.host, at(transfers.port), 3, 32 << 20, Duration::from_secs(30)).await?;
    lab.technician.cut()?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    lab.technician.mend()?;
    upload(&lab.technician.host, at(transfers.port), 4, 32 << 20, Duration::from_secs(30)).await?;
    let (here, there) = ticking.stop().await?;
    println!("technician: {here}; server: {there}");
    // TCP backs off by up to its next retransmission.
    ensure!(here.longest_gap >= Duration::from_millis(450) && here.longest_gap < Duration::from_secs(2));
    ensure!(there.longest_gap >= Duration::from_millis(450) && there.longest_gap < Duration::from_secs(2));
    Ok(())
}

/// The floor of every gap that is measured through adit.
async fn ticks_beside_a_transfer_have_short_gaps() -> anyhow::Result<()> {
    let lab = Lab::up(&Topology::new(NatKind::None, NatKind::None).rate(Rate::mbit(100))).await?;
    let agent = &lab.agent.host;
    let (ticks, transfers) = (TickServer::start(agent).await?, TransferServer::start(agent).await?);
    let at = |port| SocketAddr::new(agent.address.into(), port);
    let ticking = tick(&lab.technician.host, at(ticks.port)).await?;
    let took =
        download(&lab.technician.host, at(transfers.port), 5, 64 << 20, Duration::from_secs(30)).await?;
    let (here, there) = ticking.stop().await?;
    println!("technician: {here}; agent: {there}; {:.0} Mbit/s", mbit(64 << 20, took));
    ensure!(here.longest_gap < Duration::from_secs(1) && there.longest_gap < Duration::from_secs(1));
    Ok(())
}

async fn an_ordinary_user_can_do_it_all() -> anyhow::Result<()> {
    let map = std::fs::read_to_string("/proc/self/uid_map")?;
    ensure!(map.split_whitespace().nth(1) != Some("0"), "this runs as root: {map}");
    let mut lab = Lab::up(&Topology::new(NatKind::Cone, NatKind::Symmetric).relays(1)).await?;
    port_restricted_cone(&lab)?;
    lab.agent.reboot_nat()?;
    lab.set_links(Link { delay: Duration::from_millis(10), rate: Some(Rate::mbit(100)), ..Link::default() })?;
    port_restricted_cone(&lab)?;
    lab.technician.block_udp()?;
    let mut command = std::process::Command::new("id");
    command.arg("-u");
    let id = lab.technician.host.spawn(command)?.finish(Duration::from_secs(10)).await?.ok()?;
    ensure!(id == "0", "inside, programs have the network to themselves");
    Ok(())
}

/// Two reflectors on different hosts of the server network, and a socket at the agent's site.
fn reflectors(lab: &Lab) -> anyhow::Result<(Reflector, Reflector, UdpProbe)> {
    Ok((Reflector::start(&lab.server)?, Reflector::start(&lab.relays[0])?, UdpProbe::open(&lab.agent.host)?))
}

/// Median and longest of `n` round trips.
fn round_trips(probe: &UdpProbe, reflector: &Reflector, n: usize) -> anyhow::Result<(Duration, Duration)> {
    let mut times = Vec::new();
    for number in 0..n {
        let start = Instant::now();
        probe.ask(reflector, number as u32)?;
        ensure!(probe.answer()? == Some(number as u32), "not the answer to this question");
        times.push(start.elapsed());
    }
    times.sort();
    Ok((times[n / 2], times[n - 1]))
}

/// How many answers come to `n` packets, a few at a time.
fn paced(probe: &UdpProbe, reflector: &Reflector, n: usize) -> anyhow::Result<usize> {
    let mut answers = 0;
    for _ in 0..n / 200 {
        for _ in 0..200 {
            probe.ask(reflector, 0)?;
        }
        while probe.answer()?.is_some() {
            answers += 1;
        }
    }
    Ok(answers)
}

/// How many of `n` answers are overtaken by a later one.
fn order(probe: &UdpProbe, reflector: &Reflector, n: u32) -> anyhow::Result<usize> {
    let (mut overtaken, mut newest) = (0, None);
    for number in 0..n {
        probe.ask(reflector, number)?;
        // 10 packets in 5 ms: as far apart that the line has time for each.
        std::thread::sleep(Duration::from_micros(500));
    }
    while let Some(number) = probe.answer()? {
        overtaken += usize::from(newest > Some(number));
        newest = newest.max(Some(number));
    }
    Ok(overtaken)
}

fn mbit(bytes: u64, took: Duration) -> f64 {
    bytes as f64 * 8.0 / took.as_secs_f64() / 1e6
}

async fn echo(from: &Host, to: &Host) -> anyhow::Result<()> {
    connect_echo(from, to).await.map(drop)
}

async fn connect_echo(from: &Host, to: &Host) -> anyhow::Result<TcpStream> {
    echo_on(from, to, 0).await
}

/// A TCP connection between the two, after one byte went there and back.
async fn echo_on(from: &Host, to: &Host, port: u16) -> anyhow::Result<TcpStream> {
    let address = SocketAddr::new(to.address.into(), port);
    let listener = to.task(TcpListener::bind(address))?.await??;
    let address = listener.local_addr()?;
    to.task(async move {
        let (mut stream, _) = listener.accept().await?;
        let (mut from, mut to) = stream.split();
        tokio::io::copy(&mut from, &mut to).await
    })?;
    let connecting = from.task(async move {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(b"x").await?;
        ensure!(stream.read_u8().await? == b'x');
        Ok(stream)
    })?;
    within(Duration::from_secs(5), "a TCP echo", async { connecting.await? }).await
}
