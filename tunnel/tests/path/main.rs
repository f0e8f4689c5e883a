//! The path engine against simulated NATs, two agents in virtual time.

mod hostile;
mod nat;
mod world;

use std::time::Duration;

use adit_tunnel::path::CandidateKind;
use proptest::prelude::*;

use nat::Kind;
use world::{Link, World};

const fn millis(count: u64) -> Duration {
    Duration::from_millis(count)
}

const fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// Which pairs must become direct. Whatever a symmetric NAT does to its ports, its first datagram gets
/// through to an end that does not filter; one that does waits for the wrong port, unless that can be predicted.
fn becomes_direct(one: Kind, other: Kind) -> bool {
    let filters =
        |kind| matches!(kind, Kind::Firewall | Kind::PortRestricted | Kind::Symmetric | Kind::Sequential);
    match (one, other) {
        (Kind::Blocked, _) | (_, Kind::Blocked) => false,
        (Kind::Symmetric, other) | (other, Kind::Symmetric) => !filters(other),
        (Kind::Sequential, Kind::Sequential) => false,
        _ => true,
    }
}

#[test]
fn every_pair_of_nats() {
    for technician in Kind::ALL {
        for agent in Kind::ALL {
            let mut world = World::new(technician, agent, 1);
            let took = world.run_while_not(seconds(90), World::is_direct);
            let expected = becomes_direct(technician, agent);
            assert_eq!(took.is_some(), expected, "{technician:?} x {agent:?}: {took:?}");
            if let Some(took) = took {
                let sequential = [technician, agent].contains(&Kind::Sequential);
                let most = millis(if sequential { 400 } else { 250 });
                assert!(took <= most, "{technician:?} x {agent:?} took {took:?}");
                assert_eq!(world.agent.refused_initials, 0, "{technician:?} x {agent:?}");
            }
        }
    }
}

#[test]
fn ipv6_is_taken_where_both_have_it() {
    for technician in Kind::ALL {
        for agent in Kind::ALL {
            let mut world = World::with_ipv6(technician, agent, [true, true], 1);
            let took = world.run_while_not(seconds(5), World::is_direct);
            assert!(took.is_some_and(|took| took <= millis(250)), "{technician:?} x {agent:?}: {took:?}");
            let (_, confirmed) = world.technician.confirmed[0];
            let public = agent.is_public();
            assert!(confirmed.remote.address.is_ipv6() || public, "{technician:?} x {agent:?}");
            assert_eq!(confirmed.remote.kind, CandidateKind::Host);
        }
    }
}

#[test]
fn ipv6_at_one_end_changes_nothing() {
    for (index, technician, agent) in
        [(0, Kind::PortRestricted, Kind::Open), (1, Kind::PortRestricted, Kind::PortRestricted)]
    {
        let mut has_ipv6 = [false; 2];
        has_ipv6[index] = true;
        let mut world = World::with_ipv6(technician, agent, has_ipv6, 1);
        world.run_while_not(millis(250), World::is_direct).expect("a direct path");
        assert!(world.technician.carrier_remote().is_some_and(|remote| remote.is_ipv4()));
    }
}

#[test]
fn ipv6_comes_and_goes() {
    let mut world = World::with_ipv6(Kind::PortRestricted, Kind::PortRestricted, [true, true], 1);
    world.run_while_not(seconds(1), World::is_direct).expect("a direct path");
    assert!(world.technician.carrier_remote().is_some_and(|remote| remote.is_ipv6()));
    world.run_for(seconds(31));
    world.lose_ipv6(1);
    let moved = world.run_while_not(seconds(5), |world| {
        world.is_direct() && world.technician.carrier_remote().is_some_and(|remote| remote.is_ipv4())
    });
    assert!(moved.is_some_and(|took| took <= seconds(2)), "{moved:?}");
    // No common version but IPv6, after a time.
    let mut world = World::new(Kind::Symmetric, Kind::PortRestricted, 1);
    world.run_for(seconds(300));
    assert!(!world.is_direct());
    world.gain_ipv6(0);
    world.gain_ipv6(1);
    world.run_while_not(seconds(1), World::is_direct).expect("a direct path");
}

#[test]
fn neighbours_use_the_lan() {
    for kind in [Kind::PortRestricted, Kind::Symmetric, Kind::Blocked] {
        let mut world = World::on_one_network(kind, 1);
        world.internet = Link::good(millis(1));
        world.run_while_not(seconds(1), World::is_direct).expect("a direct path");
        let (_, confirmed) = world.technician.confirmed[0];
        assert_eq!(confirmed.remote.address, world.agent.address);
        assert_eq!((confirmed.local.kind, confirmed.remote.kind), (CandidateKind::Host, CandidateKind::Host));
        assert_eq!(confirmed.rtt, millis(2));
    }
}

#[test]
fn a_path_is_found_within_some_round_trips() {
    let mut world = World::new(Kind::PortRestricted, Kind::PortRestricted, 1);
    world.internet = Link::good(Duration::from_micros(100));
    world.relay = Link::good(Duration::from_micros(200));
    let took = world.run_while_not(seconds(1), World::is_direct).expect("a direct path");
    assert!(took <= millis(35), "{took:?}");
}

#[test]
fn udp_opened_while_on_the_relay() {
    for opened in (2..80).step_by(3).chain((300..420).step_by(10)) {
        let most = seconds(if opened < 80 { 15 } else { 60 });
        let mut world = World::new(Kind::PortRestricted, Kind::Blocked, opened);
        world.run_for(seconds(opened));
        assert!(!world.is_direct());
        world.nats[1].kind = Kind::PortRestricted;
        let took = world.run_while_not(most, World::is_direct);
        assert!(took.is_some(), "opened after {opened} s: {:?}", world.technician.failed);
    }
}

#[test]
fn udp_blocked_and_opened_again() {
    let mut world = World::new(Kind::PortRestricted, Kind::PortRestricted, 1);
    world.run_while_not(seconds(1), World::is_direct).expect("a direct path");
    world.run_for(seconds(40));
    assert!(world.is_direct());
    world.nats[0].kind = Kind::Blocked;
    world.run_while_not(seconds(2), |world| !world.is_direct()).expect("the path is lost");
    world.run_for(seconds(20));
    assert!(!world.is_direct());
    world.nats[0].kind = Kind::PortRestricted;
    world.run_while_not(seconds(15), World::is_direct).expect("a direct path again");
}

#[test]
fn both_nats_rebooted() {
    for seed in 0..20 {
        let mut world = World::new(Kind::PortRestricted, Kind::PortRestricted, seed);
        world.run_while_not(seconds(1), World::is_direct).expect("a direct path");
        world.run_for(seconds(31) + millis(seed * 37));
        let before = world.technician.confirmed[0].1;
        world.nats.iter_mut().for_each(nat::Nat::reboot);
        world.run_while_not(seconds(2), |world| !world.is_direct()).expect("the path is lost");
        let took = world.run_while_not(seconds(5), World::is_direct);
        assert!(took.is_some_and(|took| took <= millis(1500)), "{took:?}");
        let after = world.technician.confirmed.last().expect("another path").1;
        assert_ne!((before.local, before.remote), (after.local, after.remote));
    }
}

#[test]
fn a_path_that_comes_and_goes_is_left_alone() {
    let mut world = World::new(Kind::PortRestricted, Kind::PortRestricted, 1);
    while world.elapsed() < seconds(600) {
        if world.run_while_not(seconds(60), World::is_direct).is_some() {
            // checks get through, the carrier does not last
            world.run_for(seconds(2));
            world.nats.iter_mut().for_each(nat::Nat::reboot);
            world.run_while_not(seconds(3), |world| !world.is_direct()).expect("the path is lost");
        }
    }
    let found = world.technician.confirmed.len();
    assert!((8..=22).contains(&found), "{found} paths in 10 minutes");
}

#[test]
fn both_directions_must_carry_full_size() {
    for longest in [[1199, 2000], [2000, 1199]] {
        let mut world = World::new(Kind::PortRestricted, Kind::PortRestricted, 1);
        world.longest = longest;
        assert_eq!(world.run_while_not(seconds(60), World::is_direct), None);
        assert!(world.technician.confirmed.is_empty());
        world.longest = [1200; 2];
        world.run_while_not(seconds(20), World::is_direct).expect("a direct path");
    }
}

#[test]
fn when_no_message_gets_through_checks_do() {
    // The mediator has told both where the other is; what carries messages is gone.
    let mut world = World::new(Kind::Open, Kind::Open, 1);
    world.relay.lost = 1000;
    let (technician, agent) = (world.technician.address, world.agent.address);
    world.technician.path.add_peer_seen(world.now, agent);
    world.agent.path.add_peer_seen(world.now, technician);
    world.run_while_not(seconds(1), World::is_direct).expect("a direct path");
    // Messages that come later do not disturb it.
    world.relay.lost = 0;
    world.run_for(seconds(100));
    assert!(world.is_direct());
    assert_eq!((world.technician.confirmed.len(), world.technician.lost), (1, 0));
}

#[test]
fn without_a_stun_server_an_open_end_is_enough() {
    for (technician, agent) in [(Kind::Symmetric, Kind::Open), (Kind::Open, Kind::PortRestricted)] {
        let mut world = World::new(technician, agent, 1);
        world.stun_answers = false;
        world.run_while_not(seconds(1), World::is_direct).expect("a direct path");
        let kinds =
            [world.technician.confirmed[0].1, world.agent.confirmed[0].1].map(|found| found.remote.kind);
        assert!(kinds.contains(&CandidateKind::PeerReflexive), "{kinds:?}");
    }
}

#[test]
fn customers_whose_networks_overlap() {
    let mut world = World::new(Kind::PortRestricted, Kind::PortRestricted, 1);
    world.agent.address = world.technician.address;
    world.agent.path.set_host_addresses(world.now, &[world.agent.address]);
    world.run_while_not(seconds(1), World::is_direct).expect("a direct path");
    assert_eq!(world.technician.confirmed[0].1.remote.kind, CandidateKind::ServerReflexive);
}

#[test]
fn everything_on_loopback() {
    let mut world = World::on_one_network(Kind::Blocked, 1);
    for (end, port) in [(&mut world.technician, 40000), (&mut world.agent, 40001)] {
        end.address = ([127, 0, 0, 1], port).into();
        end.path.set_host_addresses(world.now, &[end.address]);
    }
    world.run_while_not(seconds(1), World::is_direct).expect("a direct path");
}

#[test]
fn one_end_alone_notices_the_loss() {
    let mut world = World::new(Kind::PortRestricted, Kind::PortRestricted, 1);
    world.run_while_not(seconds(1), World::is_direct).expect("a direct path");
    for (rounds, agent) in [(2, true), (3, false)] {
        world.run_for(seconds(31));
        let end = if agent { &mut world.agent } else { &mut world.technician };
        let remote = end.carrier_remote().expect("a carrier");
        end.path.path_lost(world.now, remote, "reset");
        let found = world.run_while_not(seconds(1), |world| world.technician.confirmed.len() == rounds);
        assert!(found.is_some(), "agent: {agent}");
    }
    // Not about the path that is in use now:
    world.run_for(seconds(1));
    world.technician.path.path_lost(world.now, ([192, 0, 2, 99], 1).into(), "late news");
    world.run_for(seconds(100));
    assert_eq!(world.technician.confirmed.len(), 3);
}

#[test]
fn the_agent_notices_late() {
    for rebooted in [false, true] {
        let mut world = World::new(Kind::PortRestricted, Kind::PortRestricted, 1);
        world.agent.silence = seconds(1000);
        world.run_while_not(seconds(1), World::is_direct).expect("a direct path");
        world.run_for(seconds(31));
        let old = world.agent.carrier_remote().expect("a carrier");
        world.carriers_pass = false;
        if rebooted {
            world.nats.iter_mut().for_each(nat::Nat::reboot);
        }
        world.run_while_not(seconds(2), |world| world.agent.confirmed.len() == 2).expect("another round");
        // The old carrier, perhaps to the same address, is given up when the new path is there.
        world.agent.path.path_lost(world.now, old, "silent");
        let new = world.agent.confirmed[1].1.remote.address;
        assert_eq!(new != old, rebooted);
        assert!(world.agent.path.is_confirmed(new));
        world.run_for(millis(100));
        assert_eq!(world.technician.confirmed.len(), 2, "the agent asks for no other");
    }
}

#[test]
fn checks_that_are_faster_than_messages() {
    // The technician's checks are there long before the message that says why, and the agent, whose
    // carrier is fine as far as it knows, has no reason to look for a path.
    let mut world = World::new(Kind::PortRestricted, Kind::FullCone, 1);
    world.relay = Link::good(seconds(2));
    world.run_while_not(seconds(5), World::is_direct).expect("a direct path");
    world.run_for(seconds(31));
    let remote = world.technician.carrier_remote().expect("a carrier");
    world.technician.path.path_lost(world.now, remote, "broken");
    world.run_while_not(seconds(4), |world| world.technician.confirmed.len() == 2).expect("another round");
}

#[test]
fn a_path_that_only_checks_can_pass_is_tried_less_and_less_often() {
    let mut world = World::new(Kind::PortRestricted, Kind::PortRestricted, 1);
    world.carriers_pass = false;
    world.run_for(seconds(600));
    let found = world.technician.confirmed.len();
    assert!((10..=25).contains(&found), "{found} paths in 10 minutes");
    world.carriers_pass = true;
    world.run_while_not(seconds(60), World::is_direct).expect("a direct path");
}

#[test]
fn hopeless_rounds_are_cheap() {
    let mut world = World::new(Kind::Symmetric, Kind::Symmetric, 1);
    world.run_for(seconds(3600));
    for end in [&world.technician, &world.agent] {
        assert!(end.failed.len() >= 60);
        assert!(end.datagrams / end.failed.len() <= 40, "{} datagrams", end.datagrams);
        assert!(end.messages / end.failed.len() <= 6, "{} messages", end.messages);
    }
}

#[test]
fn another_network_is_tried_at_once() {
    for agent_moves in [false, true] {
        let kinds = if agent_moves { [Kind::Open, Kind::Blocked] } else { [Kind::Blocked, Kind::Open] };
        let mut world = World::new(kinds[0], kinds[1], 1);
        // until all patience is used up, and well before the next round
        world.run_for(seconds(300));
        let rounds = world.technician.failed.len();
        world.run_while_not(seconds(60), |world| world.technician.failed.len() > rounds).expect("a round");
        let site = usize::from(agent_moves);
        world.nats[site].kind = Kind::FullCone;
        let end = if agent_moves { &mut world.agent } else { &mut world.technician };
        end.address = ([10, 1, 1, 1], 40000).into();
        end.path.set_host_addresses(world.now, &[end.address]);
        world.run_while_not(seconds(1), World::is_direct).expect("a direct path");
    }
}

#[test]
fn the_same_seed_the_same_life() {
    let life = || {
        let mut world = World::new(Kind::PortRestricted, Kind::Open, 3);
        world.internet = Link { jitter: millis(5), lost: 200, ..world.internet };
        world.run_for(seconds(10));
        (world.technician.confirmed, world.technician.datagrams, world.agent.datagrams, world.agent.messages)
    };
    assert_eq!(life(), life());
}

fn any_link(lost: u64) -> impl Strategy<Value = Link> {
    (0u64..300, 0u64..100, 0..=lost, 0u64..300).prop_map(|(latency, jitter, lost, doubled)| Link {
        latency: millis(latency),
        jitter: millis(jitter),
        lost,
        doubled,
    })
}

/// What happens to a network.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// The NAT of that end restarts, as another kind perhaps.
    Nat(usize, Kind),
    /// That end's carrier breaks, and only it notices.
    Carrier(bool),
}

fn any_kind() -> impl Strategy<Value = Kind> {
    prop::sample::select(&Kind::ALL[..])
}

fn any_fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        // An end does not get a public address meanwhile.
        3 => (0usize..2, any_kind().prop_filter("public", |kind| !kind.is_public()))
            .prop_map(|(end, kind)| Fault::Nat(end, kind)),
        1 => any::<bool>().prop_map(Fault::Carrier),
    ]
}

fn strike(world: &mut World, fault: Fault) {
    match fault {
        Fault::Nat(end, kind) => {
            world.nats[end].reboot();
            world.nats[end].kind = kind;
        }
        Fault::Carrier(agents) => {
            let end = if agents { &mut world.agent } else { &mut world.technician };
            if let Some(remote) = end.carrier_remote() {
                end.path.path_lost(world.now, remote, "broken");
            }
        }
    }
}

/// A path is confirmed and no carrier comes on it: that must not keep the agent from a later round, in which its peer's
/// check is there before the message.
#[test]
fn a_path_that_is_confirmed_and_not_used_is_forgotten() {
    let mut world = World::new(Kind::PortRestricted, Kind::FullCone, 1);
    world.relay.latency = millis(80);
    world.carriers_pass = false;
    world.run_for(seconds(20));
    assert!(!world.agent.confirmed.is_empty() && !world.is_direct());
    world.carriers_pass = true;
    strike(&mut world, Fault::Nat(0, Kind::Symmetric));
    let took = world.run_while_not(seconds(150), World::is_direct);
    assert!(took.is_some_and(|took| took < seconds(60)), "{took:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn whatever_happened_before(
        faults in prop::collection::vec((0u64..40_000, any_fault()), 0..8),
        internet in any_link(20),
        relay in any_link(300),
        seed: u64,
    ) {
        let mut world = World::new(Kind::PortRestricted, Kind::PortRestricted, seed);
        (world.internet, world.relay) = (internet, relay);
        for (wait, fault) in faults {
            world.run_for(millis(wait));
            strike(&mut world, fault);
        }
        let [technician, agent] = [world.nats[0].kind, world.nats[1].kind];
        // What is left of an old path goes silent.
        world.run_for(seconds(3));
        let direct = world.run_while_not(seconds(150), World::is_direct).is_some();
        // A port is predicted from mappings to the servers. Those that are old say nothing of a destination that is new.
        let needs_prediction = |one: Kind, other: Kind| {
            one == Kind::Sequential && matches!(other, Kind::Firewall | Kind::PortRestricted)
        };
        let excused = !direct && (needs_prediction(technician, agent) || needs_prediction(agent, technician));
        let expected = becomes_direct(technician, agent);
        prop_assert!(direct == expected || excused, "{technician:?} x {agent:?}: direct: {direct}");
        let sent = world.technician.datagrams.max(world.agent.datagrams) as u64;
        prop_assert!(sent <= 200 + 15 * world.elapsed().as_secs(), "{} datagrams", sent);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5_000))]

    #[test]
    fn on_lines_as_they_are(
        technician in any_kind(),
        agent in any_kind(),
        internet in any_link(100),
        relay in any_link(300),
        seed: u64,
    ) {
        let mut world = World::new(technician, agent, seed);
        (world.internet, world.relay) = (internet, relay);
        if becomes_direct(technician, agent) {
            let took = world.run_while_not(seconds(60), World::is_direct);
            let failed = (&world.technician.failed, &world.agent.failed);
            prop_assert!(took.is_some(), "failed rounds: {failed:?}");
            for (_, confirmed) in world.technician.confirmed.iter().chain(&world.agent.confirmed) {
                prop_assert!(confirmed.rtt >= internet.latency * 2);
            }
            // Each end is where the other believes it to be.
            let last = |end: &world::End| end.confirmed.last().expect("confirmed when it is in use").1;
            let (technician, agent) = (last(&world.technician), last(&world.agent));
            prop_assert_eq!(technician.local.address, agent.remote.address);
            prop_assert_eq!(technician.remote.address, agent.local.address);
            prop_assert_eq!(world.technician.carrier_remote(), Some(technician.remote.address));
            prop_assert_eq!(world.agent.carrier_remote(), Some(agent.remote.address));
        } else {
            prop_assert!(world.run_while_not(seconds(20), World::is_direct).is_none());
            prop_assert!(world.technician.confirmed.is_empty() && world.agent.confirmed.is_empty());
        }
    }
}
