//! What a peer, or anybody else, may send.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use adit_tunnel::path::{Event, FULL_SIZE, IceRole, InvalidMessage, PathAgent, Transmit, stun};
use proptest::prelude::*;
use proptest::sample::Index;

use crate::world::config;

const PEER: ([u8; 4], u16) = ([192, 0, 2, 1], 40000);

fn agent(role: IceRole, seed: u64) -> (Instant, PathAgent) {
    let now = Instant::now();
    let mut agent = PathAgent::new(now, config(role, seed));
    agent.set_host_addresses(now, &[([192, 0, 2, 2], 40000).into()]);
    (now, agent)
}

fn transmits(agent: &mut PathAgent) -> Vec<Transmit> {
    std::iter::from_fn(|| agent.poll_transmit()).collect()
}

/// A candidate message: sequence and round in two bytes each, host candidates.
fn message(number: u16, candidates: &[SocketAddr]) -> Vec<u8> {
    let mut bytes = vec![1, 0b10];
    let varint = 0x4000 | number;
    bytes.extend(varint.to_be_bytes());
    bytes.push(0);
    bytes.extend(varint.to_be_bytes());
    bytes.push(candidates.len() as u8);
    for candidate in candidates {
        let SocketAddr::V4(candidate) = candidate else { panic!("IPv4 only") };
        bytes.extend([0, 6]);
        bytes.extend(candidate.ip().octets());
        bytes.extend(candidate.port().to_be_bytes());
    }
    bytes
}

/// A technician's checks of an address.
fn checks(seed: u64) -> Vec<Vec<u8>> {
    let (now, mut technician) = agent(IceRole::Controlling, seed);
    technician.add_peer_seen(now, PEER.into());
    transmits(&mut technician)
        .into_iter()
        .filter(|sent| sent.destination == PEER.into())
        .map(|sent| sent.payload)
        .collect()
}

#[test]
fn a_peer_cannot_make_a_flood() {
    let (start, mut agent) = agent(IceRole::Controlled, 1);
    let (mut datagrams, mut messages) = (0, 0);
    let minute = Duration::from_secs(60);
    for step in 0..6_000u16 {
        let now = start + minute * u32::from(step) / 6_000;
        // another round, and 32 other ports of a victim, every 10 ms
        let victims: Vec<_> =
            (0..32).map(|port| ([203, 0, 113, 7], 1 + port + 32 * (step % 2_000)).into()).collect();
        agent.handle_message(now, &message(1 + step, &victims)).expect("a good message");
        for sent in transmits(&mut agent) {
            assert!(sent.payload.len() < 200);
            datagrams += 1;
        }
        while let Some(event) = agent.poll_event() {
            messages += usize::from(matches!(event, Event::Message(_)));
        }
    }
    assert!((600..=700).contains(&datagrams), "{datagrams} datagrams in a minute");
    assert!(messages <= 6_000);
}

#[test]
fn nobody_aims_us_at_ourselves() {
    let (now, mut agent) = agent(IceRole::Controlled, 1);
    let own = [([127, 0, 0, 1], 22), ([224, 0, 0, 251], 5353), ([0, 0, 0, 0], 22), ([192, 0, 2, 2], 40000)];
    agent.handle_message(now, &message(1, &own.map(SocketAddr::from))).expect("a good message");
    agent.add_peer_seen(now, ([127, 0, 0, 1], 25).into());
    assert!(agent.pairs().is_empty());
}

#[test]
fn a_check_is_answered_and_checked_back() {
    let (now, mut agent) = agent(IceRole::Controlled, 1);
    transmits(&mut agent);
    let source = PEER.into();
    assert!(agent.handle_datagram(now, source, &checks(1)[0]));
    let sent = transmits(&mut agent);
    assert!(sent.iter().any(|sent| sent.destination == source && stun::local_ufrag(&sent.payload).is_none()));
    assert!(sent.iter().any(|sent| sent.destination == source && stun::local_ufrag(&sent.payload).is_some()));
    assert!(sent.iter().all(|sent| sent.payload.len() < FULL_SIZE), "nothing of full size before it answers");
    assert!(!agent.is_confirmed(source));
}

#[test]
fn two_that_both_control_leave_it_at_that() {
    let now = Instant::now();
    let mut config = config(IceRole::Controlled, 2);
    config.role = IceRole::Controlling;
    let mut other = PathAgent::new(now, config);
    assert!(other.handle_datagram(now, PEER.into(), &checks(1)[0]));
    let refusal = transmits(&mut other).into_iter().find(|sent| sent.destination == PEER.into());
    let refusal = refusal.expect("an answer").payload;
    assert_eq!((&refusal[..2], &refusal[26..28]), (&[0x01, 0x11][..], &[4, 87][..]));
}

#[test]
fn what_is_for_others_is_left_to_them() {
    let (now, mut technician) = agent(IceRole::Controlling, 1);
    let ours = stun::binding_request([1; 12]);
    let response = stun::binding_response(&ours, PEER.into()).expect("a response");
    for datagram in [&ours[..], &response, &[0xc0; 1200], &[], &checks(1)[0]] {
        assert!(!technician.handle_datagram(now, PEER.into(), datagram));
    }
    assert_eq!(technician.handle_message(now, &[]), Err(InvalidMessage::Truncated));
}

fn any_noise() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..150)
}

proptest! {
    #[test]
    fn nothing_that_comes_in_does_harm(
        inputs in prop::collection::vec((any_noise(), 0u8..4, any::<Index>(), any::<[u8; 4]>()), 1..30),
        controlling: bool,
    ) {
        let role = if controlling { IceRole::Controlling } else { IceRole::Controlled };
        let (mut now, mut agent) = agent(role, 1);
        let good = checks(1);
        for (noise, what, at, ip) in inputs {
            now += Duration::from_millis(noise.len() as u64);
            match what {
                0 => drop(agent.handle_message(now, &noise)),
                1 => drop(agent.handle_message(now, &message(u16::from(ip[0]), &[(ip, 9).into()]))),
                2 => drop(agent.handle_datagram(now, (ip, 9).into(), &noise)),
                _ => {
                    let mut datagram = good[0].clone();
                    let at = at.index(datagram.len());
                    let end = datagram.len().min(at + noise.len());
                    datagram[at..end].copy_from_slice(&noise[..end - at]);
                    agent.handle_datagram(now, (ip, 9).into(), &datagram);
                }
            }
            agent.handle_timeout(now);
            prop_assert!(agent.poll_timeout().is_none_or(|at| at > now));
            prop_assert!(agent.pairs().len() <= 64);
        }
        prop_assert!(transmits(&mut agent).len() <= 256);
    }
}
