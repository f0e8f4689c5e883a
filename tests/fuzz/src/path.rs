//! The path engine of either end, fed by a peer, by strangers, and by its real other end.

use std::net::SocketAddr;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use adit_tunnel::path::{Config, Credentials, Event, FULL_SIZE, IceRole, LocalSocket, PathAgent};

pub(crate) const ADDRESSES: [&str; 2] = ["192.0.2.2:40000", "192.0.2.1:40000"];

/// One of two ends that know each other.
pub(crate) fn end(role: IceRole, now: Instant) -> PathAgent {
    let credentials = |role| {
        let (ufrag, password) = match role {
            IceRole::Controlling => ("tech", "the-technicians-password".replace('-', "+")),
            IceRole::Controlled => ("agent", "the-agents-own-long-password".replace('-', "+")),
        };
        Credentials::new(ufrag, &password).expect("good credentials")
    };
    let other = match role {
        IceRole::Controlling => IceRole::Controlled,
        IceRole::Controlled => IceRole::Controlling,
    };
    let mut agent = PathAgent::new(
        now,
        Config {
            role,
            local: credentials(role),
            remote: credentials(other),
            stun_servers: vec!["203.0.113.1:8002".parse().expect("an address")],
            many_socket_probing: true,
            seed: [role as u8; 32],
        },
    );
    agent.set_host_addresses(now, &[address(role)]);
    agent.set_mapped_addresses(now, &["198.51.100.9:9000".parse().expect("an address")]);
    agent.set_listening(now, &[address(role)]);
    agent
}

pub(crate) fn address(role: IceRole) -> SocketAddr {
    ADDRESSES[usize::from(role == IceRole::Controlling)].parse().expect("an address")
}

/// Byte 0: which end. Then one operation after the other: what, length, that many bytes.
pub fn path(bytes: &[u8]) -> bool {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    let Some((which, mut rest)) = bytes.split_first() else { return false };
    let (role, other) = match which % 2 {
        0 => (IceRole::Controlled, IceRole::Controlling),
        _ => (IceRole::Controlling, IceRole::Controlled),
    };
    let mut now = *START;
    let (mut agent, mut twin) = (end(role, now), end(other, now));
    let mut taken = false;
    while let Some(([what, length], following)) = rest.split_first_chunk() {
        let (datagram, following) = following.split_at(usize::from(*length).min(following.len()));
        rest = following;
        match what % 6 {
            0 => taken |= agent.handle_datagram(now, LocalSocket::DEVICE, address(other), datagram),
            1 => {
                taken |= agent.handle_datagram(
                    now,
                    LocalSocket::DEVICE,
                    ([198, 51, 100, *length], 9).into(),
                    datagram,
                )
            }
            2 => taken |= agent.handle_message(now, datagram).is_ok(),
            3 => now += Duration::from_millis(u64::from(*length) * 20),
            4 => agent.add_peer_seen(now, address(other)),
            // What its real other end sends, with some bits changed.
            _ => {
                twin.add_peer_seen(now, address(role));
                twin.handle_timeout(now);
                while let Some(event) = twin.poll_event() {
                    if let Event::Message(mut message) = event {
                        message.iter_mut().zip(datagram).for_each(|(byte, change)| *byte ^= change);
                        taken |= agent.handle_message(now, &message).is_ok();
                    }
                }
                while let Some(mut sent) = twin.poll_transmit() {
                    sent.payload.iter_mut().zip(datagram).for_each(|(byte, change)| *byte ^= change);
                    taken |= agent.handle_datagram(now, LocalSocket::DEVICE, address(other), &sent.payload);
                }
            }
        }
        agent.handle_timeout(now);
        assert!(agent.poll_timeout().is_none_or(|at| at > now), "it would spin");
        assert!(agent.pairs().len() <= 64);
        let mut sent = 0;
        while let Some(transmit) = agent.poll_transmit() {
            sent += 1;
            assert!(transmit.payload.len() <= FULL_SIZE);
            if transmit.destination == address(other) {
                twin.handle_datagram(now, LocalSocket::DEVICE, address(role), &transmit.payload);
            }
        }
        assert!(sent <= 256);
        while let Some(event) = agent.poll_event() {
            if let Event::Message(message) = event {
                twin.handle_message(now, &message).expect("we keep to the form");
            }
        }
    }
    taken
}
