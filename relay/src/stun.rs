//! A STUN server (RFC 8489): tells whoever asks from where it was asked, within a rate for each source.

use std::collections::hash_map::RandomState;
use std::future::Future;
use std::hash::BuildHasher;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use adit_tunnel::path::stun::binding_response;
use tokio::net::UdpSocket;

use crate::penalty::network;

/// Larger than any request that deserves an answer.
const DATAGRAM: usize = 1500;
/// Answers a second for one source: an office of devices behind one address, and no more use than that
/// to somebody who reflects.
const RATE: u16 = 50;
/// Sources told apart. A power of two.
const SLOTS: usize = 1 << 16;

/// Answers on `socket` until `shutdown`.
pub async fn serve(socket: UdpSocket, shutdown: impl Future<Output = ()>) {
    let mut limit = RateLimit::new(RATE, Instant::now());
    let mut datagram = [0; DATAGRAM];
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => return,
            received = socket.recv_from(&mut datagram) => {
                // An error here is about one datagram sent earlier (ICMP), never about the socket.
                if let Ok((length, source)) = received {
                    let _ = answer(&socket, &datagram[..length], source, &mut limit);
                }
            }
        }
    }
}

/// At most one datagram; dropped, as UDP may be, when the socket is full.
fn answer(
    socket: &UdpSocket,
    request: &[u8],
    source: SocketAddr,
    limit: &mut RateLimit,
) -> io::Result<usize> {
    match binding_response(request, source) {
        Some(response) if limit.allows(source.ip(), Instant::now()) => socket.try_send_to(&response, source),
        _ => Ok(0),
    }
}

/// How many answers each source got in the current second, in a table of fixed size. Sources that meet
/// in a slot share its rate; nobody knows beforehand who meets whom. IPv6 sources count by their /64.
pub struct RateLimit {
    counts: Box<[u16]>,
    hasher: RandomState,
    since: Instant,
    rate: u16,
}

impl RateLimit {
    /// Nobody has asked yet. `rate`: answers a second for one source.
    pub fn new(rate: u16, now: Instant) -> Self {
        Self { counts: vec![0; SLOTS].into_boxed_slice(), hasher: RandomState::new(), since: now, rate }
    }

    /// Whether `source` may have one more answer.
    pub fn allows(&mut self, source: IpAddr, now: Instant) -> bool {
        if now.saturating_duration_since(self.since) >= Duration::from_secs(1) {
            self.since = now;
            self.counts.fill(0);
        }
        let slot = self.hasher.hash_one(network(source)) as usize % SLOTS;
        let count = &mut self.counts[slot];
        *count = count.saturating_add(1);
        *count <= self.rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listen::Setting;
    use adit_tunnel::path::stun::binding_request;

    #[test]
    fn a_source_has_its_rate_each_second() {
        let start = Instant::now();
        let mut limit = RateLimit::new(RATE, start);
        let greedy = IpAddr::from([192, 0, 2, 1]);
        let allowed = (0..10 * RATE).filter(|_| limit.allows(greedy, start)).count();
        assert_eq!(allowed, usize::from(RATE));
        // One of these could share the greedy one's slot, not all.
        assert!((2..10).any(|host| limit.allows(IpAddr::from([192, 0, 2, host]), start)));
        assert!(limit.allows(greedy, start + Duration::from_secs(1)));
        let neighbours = (0..100_u16).filter(|n| {
            limit.allows(IpAddr::from([0x2001, 0xdb8, 0, 0, *n, 0, 0, 1]), start + Duration::from_secs(1))
        });
        assert!(neighbours.count() <= usize::from(RATE));
    }

    #[tokio::test]
    async fn answers_a_binding_request_and_nothing_else() {
        // Both families on one socket, as by default: the IPv4 client must see its IPv4 address.
        let setting = Setting { key: "[listen] udp", file: "config.toml".as_ref() };
        let server = crate::listen::udp(setting, "[::]:0".parse().expect("address")).expect("binds");
        let port = server.local_addr().expect("bound").port();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let serving = tokio::spawn(serve(server, std::future::pending()));
        let client = UdpSocket::bind("127.0.0.1:0").await.expect("binds");
        client.send_to(b"garbage", address).await.expect("sends");
        let request = binding_request([7; 12]);
        client.send_to(&request, address).await.expect("sends");
        let mut answer = [0; 200];
        let received = tokio::time::timeout(Duration::from_secs(5), client.recv_from(&mut answer));
        let (length, from) = received.await.expect("in time").expect("an answer");
        assert_eq!(from, address);
        // RFC 8489 section 5: Binding success, and our transaction.
        assert_eq!((&answer[..2], &answer[8..20]), (&[1, 1][..], &[7; 12][..]));
        // RFC 8489 section 14.2: XOR-MAPPED-ADDRESS of family IPv4, at most 1.6 times the request.
        assert_eq!((&answer[20..22], answer[25]), (&[0x00, 0x20][..], 1));
        assert!(length * 10 <= request.len() * 16);
        serving.abort();
    }
}
