//! The path engine against simulated NATs, two agents in virtual time.

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
/// through to an end that does not filter; one that does waits for the wrong port.
fn becomes_direct(one: Kind, other: Kind) -> bool {
    let filters = |kind| matches!(kind, Kind::PortRestricted | Kind::Symmetric);
    match (one, other) {
        (Kind::Blocked, _) | (_, Kind::Blocked) => false,
        (Kind::Symmetric, other) | (other, Kind::Symmetric) => !filters(other),
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
                assert!(took <= millis(600), "{technician:?} x {agent:?} took {took:?}");
                assert_eq!(world.agent.refused_initials, 0, "{technician:?} x {agent:?}");
            }
        }
    }
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
    assert!(took <= millis(30), "{took:?}");
}
