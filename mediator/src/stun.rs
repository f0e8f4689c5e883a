//! 8002/udp: STUN, and the connection handshake that shows the mediator where an end of a session is.
//!
//! The answer to a handshake ([`handshake`]) is the plain STUN answer; what the mediator saw goes to the other
//! end of the session on its control channel.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_tunnel::path::handshake;
use adit_tunnel::path::stun::binding_response;
use tokio::net::UdpSocket;

use crate::broker::Broker;

/// Answers that one source may get in a second: a NAT with many devices behind it needs tens.
const ANSWERS_A_SECOND: u16 = 200;
/// Counters for sources. Two that share one share its limit.
const COUNTERS: usize = 1 << 16;
/// An answer has at most 1.6 times (IPv4) or 2.2 times (IPv6) the bytes of its request.
const MOST_TENTHS: (usize, usize) = (16, 22);
/// Larger than any Binding request.
const MAX_REQUEST: usize = 2048;

/// Answers until the socket breaks. Cancel safe.
///
/// # Errors
/// The socket's, when it can no longer be waited for.
pub async fn serve(socket: UdpSocket, broker: Arc<Broker>) -> std::io::Result<()> {
    let mut limit = Limit::new(Instant::now());
    let mut buffer = [0; MAX_REQUEST];
    loop {
        socket.readable().await?;
        // Errors of single datagrams (ICMP of an earlier answer, for example) end nothing.
        let Ok((length, source)) = socket.try_recv_from(&mut buffer) else { continue };
        let request = &buffer[..length];
        if !limit.allows(source.ip(), Instant::now()) {
            continue;
        }
        let Some(answer) = binding_response(request, source) else { continue };
        let most = if source.ip().to_canonical().is_ipv4() { MOST_TENTHS.0 } else { MOST_TENTHS.1 };
        if answer.len() * 10 > length * most {
            continue;
        }
        // UDP may lose it as well as we.
        let _ = socket.try_send_to(&answer, source);
        if let Some((session, role)) = handshake::claims(request)
            && let Some(password) = broker.ice_password(session, role)
            && handshake::proves(request, &password)
        {
            broker.seen(session, role, SocketAddr::new(source.ip().to_canonical(), source.port()));
        }
    }
}

/// Requests of each source in the second that runs, in a table of fixed size.
struct Limit {
    counters: Vec<u16>,
    hasher: RandomState,
    since: Instant,
}

impl Limit {
    fn new(now: Instant) -> Self {
        Self { counters: vec![0; COUNTERS], hasher: RandomState::new(), since: now }
    }

    fn allows(&mut self, source: IpAddr, now: Instant) -> bool {
        if now.duration_since(self.since) >= Duration::from_secs(1) {
            self.counters.fill(0);
            self.since = now;
        }
        // One customer of a provider holds a whole /64.
        let source = match source.to_canonical() {
            IpAddr::V4(ip) => u64::from(ip.to_bits()),
            IpAddr::V6(ip) => (ip.to_bits() >> 64) as u64,
        };
        let slot = self.hasher.hash_one(source) as usize % COUNTERS;
        let Some(counter) = self.counters.get_mut(slot) else { return false };
        *counter = counter.saturating_add(1);
        *counter <= ANSWERS_A_SECOND
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_is_limited_and_the_next_second_is_free() {
        let start = Instant::now();
        let mut limit = Limit::new(start);
        let source = IpAddr::from([192, 0, 2, 1]);
        let allowed = (0..1000).filter(|_| limit.allows(source, start)).count();
        assert_eq!(allowed, usize::from(ANSWERS_A_SECOND));
        assert!(limit.allows(source, start + Duration::from_secs(1)));
    }
}
