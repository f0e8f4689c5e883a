//! What a peer, or anybody else, may send.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use adit_tunnel::path::{
    Event, FULL_SIZE, IceRole, InvalidMessage, LocalSocket, PROBES, Path, PathAgent, Transmit, stun,
};
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
    assert!((1_550..=1_650).contains(&datagrams), "{datagrams} datagrams in a minute");
    assert!(messages <= 6_000);
}

/// What this end's shell and two STUN servers do: answer, and let it probe. Where all that goes that is for nobody else.
fn answered_by_servers(agent: &mut PathAgent, now: Instant, seen_at: SocketAddr) -> Vec<SocketAddr> {
    let servers = config(IceRole::Controlled, 1).stun_servers;
    let mut others = Vec::new();
    for Transmit { socket, destination, payload, .. } in transmits(agent) {
        if !servers.contains(&destination) {
            others.push(destination);
        } else if let Some(answer) = stun::binding_response(&payload, seen_at) {
            agent.handle_datagram(now, socket, destination, &answer);
        }
    }
    while let Some(event) = agent.poll_event() {
        if matches!(event, Event::ProbingWanted) {
            agent.start_probing(now);
        }
    }
    others
}

/// A peer says that its NAT takes random ports and that its sockets are open, and names a victim's addresses: the many
/// datagrams of probing go where the mediator has seen the peer, and no more of them than one try has.
#[test]
fn who_lies_about_its_nat_aims_us_at_nobody() {
    let (start, mut agent) = agent(IceRole::Controlled, 1);
    let seen = SocketAddr::from(([198, 51, 100, 66], 40_000));
    let victim = SocketAddr::from(([203, 0, 113, 7], 7));
    agent.add_peer_seen(start, seen);
    let (mut to_peer, mut to_victim, mut tries) = (0, 0, 0);
    let (mut round, mut number) = (0, 0);
    for step in 0..6_000u32 {
        let now = start + Duration::from_millis(10) * step;
        if step % 20 == 0 {
            // Another careful round each two seconds, and what it takes to be believed.
            round += u16::from(step % 200 == 0);
            number += 1;
            let mut lie = message(number, &[victim]);
            lie[1] = 0b11_1110;
            let acknowledged = step / 20 % 10;
            lie[4] = acknowledged as u8;
            lie[5..7].copy_from_slice(&(0x4000 | round).to_be_bytes());
            agent.handle_message(now, &lie).expect("a good message");
        }
        agent.handle_timeout(now);
        let was_probing = agent.is_probing();
        for destination in answered_by_servers(&mut agent, now, ([192, 0, 2, 2], 40_000).into()) {
            to_peer += usize::from(destination.ip() == seen.ip());
            to_victim += usize::from(destination == victim);
            assert!([seen.ip(), victim.ip()].contains(&destination.ip()), "to {destination}");
        }
        tries += usize::from(!was_probing && agent.is_probing());
    }
    println!("{tries} tries, {to_peer} datagrams to the peer, {to_victim} to the victim in a minute");
    assert!((1..=4).contains(&tries), "{tries} tries in a minute");
    assert!(to_peer <= tries * PROBES as usize + 800, "{to_peer} datagrams to the peer");
    // What checks are for: named addresses, within the budget.
    assert!(to_victim <= 300, "{to_victim} datagrams to the victim");
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
    assert!(agent.handle_datagram(now, LocalSocket::DEVICE, source, &checks(1)[0]));
    let sent = transmits(&mut agent);
    assert!(sent.iter().any(|sent| sent.destination == source && stun::local_ufrag(&sent.payload).is_none()));
    assert!(sent.iter().any(|sent| sent.destination == source && stun::local_ufrag(&sent.payload).is_some()));
    assert!(sent.iter().all(|sent| sent.payload.len() < FULL_SIZE), "nothing of full size before it answers");
    assert!(!agent.is_confirmed(Path::to(source)));
}

#[test]
fn two_that_both_control_leave_it_at_that() {
    let now = Instant::now();
    let mut config = config(IceRole::Controlled, 2);
    config.role = IceRole::Controlling;
    let mut other = PathAgent::new(now, config);
    assert!(other.handle_datagram(now, LocalSocket::DEVICE, PEER.into(), &checks(1)[0]));
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
        assert!(!technician.handle_datagram(now, LocalSocket::DEVICE, PEER.into(), datagram));
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
                2 => drop(agent.handle_datagram(now, LocalSocket::DEVICE, (ip, 9).into(), &noise)),
                _ => {
                    let mut datagram = good[0].clone();
                    let at = at.index(datagram.len());
                    let end = datagram.len().min(at + noise.len());
                    datagram[at..end].copy_from_slice(&noise[..end - at]);
                    agent.handle_datagram(now, LocalSocket::DEVICE, (ip, 9).into(), &datagram);
                }
            }
            agent.handle_timeout(now);
            prop_assert!(agent.poll_timeout().is_none_or(|at| at > now));
            prop_assert!(agent.pairs().len() <= 64);
        }
        prop_assert!(transmits(&mut agent).len() <= 256);
    }
}
