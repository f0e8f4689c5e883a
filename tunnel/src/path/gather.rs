//! Asks STUN servers how they see our socket: the server-reflexive candidates, and from two of them how the NAT maps.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::stun::TransactionId;

/// Most servers that are asked.
const MAX_SERVERS: usize = 8;
/// A request is repeated after these times without an answer, then given up until the next round.
/// Shorter than RFC 8489 section 6.2.1 has it: the user waits, and the requests are 20 bytes.
const RETRANSMIT: [Duration; 5] =
    [Duration::from_millis(200), Duration::from_millis(400), MILLIS_800, MILLIS_800, MILLIS_800];
const MILLIS_800: Duration = Duration::from_millis(800);

/// A NAT that takes ports in turn is at most so many further when the next server is asked: others take ports, too.
const MAX_STEP: u16 = 32;
/// So many ports ahead are expected for the peer: ours to each of its addresses, and what others take meanwhile. And so many
/// behind, for a NAT that has restarted: our checks may have been there before the servers were asked anew.
pub(super) const AHEAD: u16 = 12;
const BEHIND: u16 = 6;
/// Below it no NAT takes ports in turn.
const LEAST_PORT: u16 = 1024;

/// How this end's NAT maps IPv4 (RFC 4787 section 4.1), as far as two servers show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Mapping {
    /// Less than two servers have answered.
    #[default]
    Unknown,
    /// One address for all destinations, or no NAT at all. Where all servers have one address, perhaps for all ports of one
    /// destination only.
    Independent,
    /// Another port for another destination, one after the other.
    Sequential,
    /// Another port for another destination, which nobody can tell.
    Random,
}

impl Mapping {
    /// All of them.
    pub(super) const ALL: [Self; 4] = [Self::Unknown, Self::Independent, Self::Sequential, Self::Random];

    /// What it is by the addresses that servers saw, in the order in which they were asked.
    pub fn of(seen: &[SocketAddr]) -> Self {
        match seen {
            [] | [_] => Self::Unknown,
            [first, rest @ ..] if rest.iter().all(|other| other == first) => Self::Independent,
            _ if !predicted(seen).is_empty() => Self::Sequential,
            _ => Self::Random,
        }
    }

    /// Each destination sees another address.
    pub(super) fn depends_on_destination(self) -> bool {
        matches!(self, Self::Sequential | Self::Random)
    }
}

/// All servers of one agent.
pub(super) struct Gatherer {
    servers: Vec<Server>,
}

struct Server {
    address: SocketAddr,
    /// As this server saw us last. Kept while it does not answer: the mapping may well still be there.
    mapped: Option<SocketAddr>,
    /// It said so since all were asked last.
    is_news: bool,
    requests: Vec<TransactionId>,
    due: Option<Instant>,
}

impl Gatherer {
    pub(super) fn new(servers: Vec<SocketAddr>) -> Self {
        let mut distinct: Vec<SocketAddr> = Vec::new();
        for address in servers {
            if !distinct.contains(&address) && distinct.len() < MAX_SERVERS {
                distinct.push(address);
            }
        }
        let server =
            |address| Server { address, mapped: None, is_news: false, requests: Vec::new(), due: None };
        Self { servers: distinct.into_iter().map(server).collect() }
    }

    /// The same servers, asked by IPv4 through another socket.
    pub(super) fn anew(&self, now: Instant) -> Self {
        let addresses = self.servers.iter().map(|server| server.address);
        let mut anew = Self::new(addresses.filter(SocketAddr::is_ipv4).collect());
        anew.start(now);
        anew
    }

    /// Asks all servers anew, except those that are being asked.
    pub(super) fn start(&mut self, now: Instant) {
        for server in self.servers.iter_mut().filter(|server| server.due.is_none()) {
            server.requests.clear();
            server.is_news = false;
            server.due = Some(now);
        }
    }

    /// Asks no more; answers are still welcome.
    pub(super) fn stop(&mut self) {
        self.servers.iter_mut().for_each(|server| server.due = None);
    }

    /// The addresses that we are seen at, each once.
    pub(super) fn mapped(&self) -> Vec<SocketAddr> {
        let mut mapped: Vec<_> = self.servers.iter().filter_map(|server| server.mapped).collect();
        mapped.sort();
        mapped.dedup();
        mapped
    }

    /// What the answers say about our NAT.
    pub(super) fn mapping(&self) -> Mapping {
        Mapping::of(&self.seen_by_ipv4())
    }

    /// The addresses that the NAT is expected to use for others, the likeliest first, where it takes one port after the other.
    pub(super) fn predicted(&self) -> Vec<SocketAddr> {
        predicted(&self.seen_by_ipv4())
    }

    /// Some server has answered since all were asked last.
    pub(super) fn has_news(&self) -> bool {
        self.servers.iter().any(|server| server.is_news)
    }

    /// As each server sees us now, in the order in which they are asked.
    fn seen_by_ipv4(&self) -> Vec<SocketAddr> {
        let news = self.servers.iter().filter(|server| server.is_news);
        news.filter_map(|server| server.mapped).filter(SocketAddr::is_ipv4).collect()
    }

    pub(super) fn due(&self) -> Option<Instant> {
        self.servers.iter().filter_map(|server| server.due).min()
    }

    /// The server to ask now, under this transaction.
    pub(super) fn send(&mut self, now: Instant, id: TransactionId) -> Option<SocketAddr> {
        let server = self.servers.iter_mut().find(|server| server.due.is_some_and(|due| due <= now))?;
        server.due = RETRANSMIT.get(server.requests.len()).map(|wait| now + *wait);
        server.requests.push(id);
        Some(server.address)
    }

    /// Whether a response belongs to a request of ours.
    pub(super) fn asked(&self, source: SocketAddr, id: TransactionId) -> bool {
        self.servers.iter().any(|server| server.address == source && server.requests.contains(&id))
    }

    /// The server's answer to a request of ours. Returns whether it is news.
    pub(super) fn answered(&mut self, source: SocketAddr, mapped: SocketAddr) -> bool {
        let Some(server) = self.servers.iter_mut().find(|server| server.address == source) else {
            return false;
        };
        server.due = None;
        server.is_news = true;
        server.requests.clear();
        server.mapped.replace(mapped) != Some(mapped)
    }
}

/// See [`Gatherer::predicted`].
fn predicted(seen: &[SocketAddr]) -> Vec<SocketAddr> {
    // A NAT may have one port for all ports of one destination.
    let mut seen = seen.to_vec();
    seen.dedup();
    let (Some(first), Some(last)) = (seen.first(), seen.last()) else { return vec![] };
    let is_step = |from: &SocketAddr, to: &SocketAddr| {
        from.ip() == to.ip() && (1..=MAX_STEP).contains(&to.port().wrapping_sub(from.port()))
    };
    let up = seen.windows(2).all(|pair| is_step(&pair[0], &pair[1]));
    let down = seen.windows(2).all(|pair| is_step(&pair[1], &pair[0]));
    // Neither, or only one is known.
    if up == down {
        return vec![];
    }
    let step = if up { 1 } else { u16::MAX };
    let ports = |from: &SocketAddr, step: u16, count| {
        let from = from.port();
        (1..=count).map(move |n: u16| from.wrapping_add(step.wrapping_mul(n)))
    };
    ports(last, step, AHEAD)
        .chain(ports(first, step.wrapping_neg(), BEHIND))
        .filter(|port| *port >= LEAST_PORT)
        .map(|port| SocketAddr::new(last.ip(), port))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn gives_up_on_a_silent_server_and_keeps_what_it_said() {
        let start = Instant::now();
        let server = address("192.0.2.1:8002");
        let mut gatherer = Gatherer::new(vec![server, server]);
        gatherer.start(start);
        assert_eq!(gatherer.send(start, [1; 12]), Some(server));
        assert_eq!(gatherer.send(start, [2; 12]), None);
        assert!(gatherer.asked(server, [1; 12]) && !gatherer.asked(address("192.0.2.2:1"), [1; 12]));
        assert!(gatherer.answered(server, address("198.51.100.1:1")));
        assert_eq!(gatherer.due(), None);

        gatherer.start(start);
        let mut times = Vec::new();
        while let Some(due) = gatherer.due() {
            assert_eq!(gatherer.send(due, [3; 12]), Some(server));
            times.push((due - start).as_millis());
        }
        assert_eq!(times, [0, 200, 600, 1400, 2200, 3000]);
        assert_eq!(gatherer.mapped(), [address("198.51.100.1:1")]);
        assert!(!gatherer.answered(server, address("198.51.100.1:1")));
        assert!(gatherer.answered(server, address("198.51.100.1:2")));
    }

    fn seen_at(ports: &[u16]) -> Gatherer {
        let servers = (0..ports.len()).map(|n| address(&format!("192.0.2.{n}:8002"))).collect::<Vec<_>>();
        let mut gatherer = Gatherer::new(servers.clone());
        gatherer.start(Instant::now());
        for (server, port) in servers.iter().zip(ports) {
            gatherer.answered(*server, address(&format!("198.51.100.1:{port}")));
        }
        gatherer
    }

    #[test]
    fn ports_that_are_taken_in_turn_are_predicted() {
        let ports =
            |seen: &[u16]| -> Vec<u16> { seen_at(seen).predicted().iter().map(SocketAddr::port).collect() };
        let up = |ahead: u16, behind: u16| -> Vec<u16> {
            (ahead..ahead + AHEAD).chain((behind - BEHIND..behind).rev()).collect()
        };
        assert_eq!(ports(&[5000, 5001]), up(5002, 5000));
        // Others take some, too.
        assert_eq!(ports(&[5000, 5003, 5004]), up(5005, 5000));
        // Two ports of one server.
        assert_eq!(ports(&[5000, 5000, 5001]), up(5002, 5000));
        let down: Vec<u16> = (5000 - AHEAD..5000).rev().chain(5005..5005 + BEHIND).collect();
        assert_eq!(ports(&[5004, 5003, 5000]), down);
        assert_eq!(
            ports(&[65_533, 65_535]),
            [65_532, 65_531, 65_530, 65_529, 65_528, 65_527],
            "0 is no port"
        );
        for seen in [&[5000][..], &[5000, 5000], &[5000, 40_000], &[5000, 5001, 4999], &[5000, 5033], &[]] {
            assert_eq!(ports(seen), Vec::<u16>::new(), "{seen:?}");
        }
        for (seen, mapping) in [
            (&[][..], Mapping::Unknown),
            (&[5000], Mapping::Unknown),
            (&[5000, 5000, 5000], Mapping::Independent),
            (&[5000, 5002], Mapping::Sequential),
            (&[5000, 5000, 9000], Mapping::Random),
            (&[5000, 40_000], Mapping::Random),
        ] {
            assert_eq!(seen_at(seen).mapping(), mapping, "{seen:?}");
        }
    }
}
