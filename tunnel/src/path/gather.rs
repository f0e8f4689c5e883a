//! Asks STUN servers how they see our socket: the server-reflexive candidates.

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

/// All servers of one agent.
pub(super) struct Gatherer {
    servers: Vec<Server>,
}

struct Server {
    address: SocketAddr,
    /// As this server saw us last. Kept while it does not answer: the mapping may well still be there.
    mapped: Option<SocketAddr>,
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
        let server = |address| Server { address, mapped: None, requests: Vec::new(), due: None };
        Self { servers: distinct.into_iter().map(server).collect() }
    }

    /// Asks all servers anew, except those that are being asked.
    pub(super) fn start(&mut self, now: Instant) {
        for server in self.servers.iter_mut().filter(|server| server.due.is_none()) {
            server.requests.clear();
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
        server.requests.clear();
        server.mapped.replace(mapped) != Some(mapped)
    }
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
}
