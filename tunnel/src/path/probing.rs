//! Many-socket probing: between an end whose NAT takes a random port for each destination, and one that is seen at the same
//! address by everybody.
//!
//! The first opens [`SOCKETS`] sockets and sends one datagram through each to the other's address: so many ports of its NAT
//! let the other in from now on. The other sends to random ports there, [`PROBES`] at the most. With 64,512 ports to choose
//! from, one of them meets one of the [`SOCKETS`] with a probability of 98 %; on average after 252.
//!
//! It looks like a scan. So it is paced, done only where nothing simpler can work, in tries that are far apart, and only
//! towards the address at which the mediator has seen the peer. A peer that can send under a false address can still name
//! somebody else's: 1024 small datagrams for each try are the harm then.

use std::net::SocketAddr;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::local::{LocalSocket, Path};

/// Sockets of the end that opens.
pub(super) const SOCKETS: u32 = 256;
/// Datagrams of the end that probes, in one try.
pub const PROBES: u32 = 1024;
/// Between two datagrams: 500 new mappings a second at the most, and 250. A home router's table holds some thousands.
const OPEN_PACING: Duration = Duration::from_millis(2);
const PROBE_PACING: Duration = Duration::from_millis(4);
/// What a coarse timer missed is made up for, up to this.
const CATCH_UP: Duration = Duration::from_millis(20);
/// How long a try takes, at each end: all probes, and the time until the other end knows that it has begun.
pub(super) const TRY: Duration = Duration::from_secs(7);
/// From the start of one try to the next.
const WAITS: [Duration; 6] = [
    Duration::from_secs(30),
    Duration::from_secs(60),
    Duration::from_secs(120),
    Duration::from_secs(300),
    Duration::from_secs(600),
    Duration::from_secs(3600),
];
/// Ports that NATs use.
const FIRST_PORT: u16 = 1024;
const PORTS: u16 = u16::MAX - FIRST_PORT + 1;

/// The tries of one agent.
#[derive(Debug, Default)]
pub(super) struct Prober {
    tries: usize,
    /// Not before this time.
    next: Option<Instant>,
    active: Option<Try>,
}

#[derive(Debug)]
struct Try {
    work: Work,
    sent: u32,
    /// `None`: enough was sent.
    due: Option<Instant>,
    ends: Instant,
}

#[derive(Debug)]
enum Work {
    /// One datagram through each of [`SOCKETS`] sockets from this one on.
    Open { first: u32, to: SocketAddr },
    /// Through this socket to random ports of this address.
    Probe { from: LocalSocket, to: SocketAddr },
}

impl Prober {
    /// The earliest time for a try.
    pub(super) fn ready_at(&self, now: Instant) -> Instant {
        self.next.map_or(now, |next| next.max(now))
    }

    /// Opens sockets with these numbers and the following ones.
    pub(super) fn open(&mut self, now: Instant, first: u32, to: SocketAddr) {
        self.start(now, Work::Open { first, to });
    }

    /// Probes ports of this address.
    pub(super) fn probe(&mut self, now: Instant, from: LocalSocket, to: SocketAddr) {
        self.start(now, Work::Probe { from, to });
    }

    fn start(&mut self, now: Instant, work: Work) {
        self.next = Some(now + WAITS[self.tries.min(WAITS.len() - 1)]);
        self.tries += 1;
        self.active = Some(Try { work, sent: 0, due: Some(now), ends: now + TRY });
    }

    /// The peer is heard: nothing more is sent. Its sockets stay until the try ends.
    pub(super) fn pause(&mut self) {
        if let Some(active) = &mut self.active {
            active.due = None;
        }
    }

    /// The try is over.
    pub(super) fn stop(&mut self) {
        self.active = None;
    }

    /// What was is no measure any more: another network, or a path that lasted. The next try comes as after the first, and still
    /// not before its time.
    pub(super) fn forget(&mut self) {
        self.next = self.next.map(|next| next - WAITS[(self.tries - 1).min(WAITS.len() - 1)] + WAITS[0]);
        self.tries = self.tries.min(1);
    }

    /// A try is under way.
    pub(super) fn is_active(&self) -> bool {
        self.active.is_some()
    }

    /// The sockets that the try has opened.
    pub(super) fn sockets(&self) -> Range<u32> {
        match &self.active {
            Some(Try { work: Work::Open { first, .. }, sent, .. }) => *first..first + sent,
            _ => 0..0,
        }
    }

    /// This end opens, and the peer should probe.
    pub(super) fn is_open(&self) -> bool {
        matches!(&self.active, Some(Try { work: Work::Open { .. }, .. }))
    }

    /// When [`Self::send`] has something to do.
    pub(super) fn due(&self) -> Option<Instant> {
        self.active.as_ref().map(|active| active.due.unwrap_or(active.ends).min(active.ends))
    }

    /// The next datagram's path, if one is due. Ends the try when it is time.
    pub(super) fn send(&mut self, now: Instant, random: u64) -> Option<Path> {
        let active = self.active.as_mut()?;
        if active.ends <= now {
            self.active = None;
            return None;
        }
        let due = active.due.filter(|due| *due <= now)?;
        let (path, most, pacing) = match active.work {
            Work::Open { first, to } => {
                (Path { socket: LocalSocket(first + active.sent), remote: to }, SOCKETS, OPEN_PACING)
            }
            Work::Probe { from, to } => {
                let port = FIRST_PORT + (random % u64::from(PORTS)) as u16;
                (Path { socket: from, remote: SocketAddr::new(to.ip(), port) }, PROBES, PROBE_PACING)
            }
        };
        active.sent += 1;
        active.due = Some(due.max(now - CATCH_UP) + pacing).filter(|_| active.sent < most);
        Some(path)
    }
}

#[cfg(test)]
mod tests {
    use super::super::random::Random;
    use super::*;
    use std::collections::HashSet;

    /// All that a try sends, and when.
    fn run(prober: &mut Prober, start: Instant) -> Vec<(Duration, Path)> {
        let mut sent = Vec::new();
        while let Some(due) = prober.due() {
            let random = Random::new(&[sent.len() as u8; 32]).u64() ^ sent.len() as u64;
            sent.extend(prober.send(due, random).map(|path| (due - start, path)));
        }
        sent
    }

    #[test]
    fn opens_as_many_sockets_as_it_says() {
        let start = Instant::now();
        let mut prober = Prober::default();
        let to = ([198, 51, 100, 1], 4000).into();
        prober.open(start, 7, to);
        let sent = run(&mut prober, start);
        let sockets: HashSet<_> = sent.iter().map(|(_, path)| path.socket).collect();
        assert_eq!((sent.len(), sockets.len()), (256, 256));
        assert!(sent.iter().all(|(_, path)| path.remote == to && path.socket != LocalSocket::DEVICE));
        assert_eq!(sent.last().map(|(at, _)| *at), Some(Duration::from_millis(510)));
    }

    #[test]
    fn probes_so_many_ports_at_a_bounded_rate() {
        let start = Instant::now();
        let mut prober = Prober::default();
        prober.probe(start, LocalSocket(3), ([198, 51, 100, 1], 1).into());
        let sent = run(&mut prober, start);
        let ports: HashSet<_> = sent.iter().map(|(_, path)| path.remote.port()).collect();
        assert_eq!(sent.len(), 1024);
        assert!(ports.len() > 200 && ports.iter().all(|port| *port >= 1024), "{} ports", ports.len());
        assert!(sent.iter().all(|(_, path)| path.socket == LocalSocket(3)));
        assert_eq!(sent.iter().filter(|(at, _)| *at < Duration::from_secs(1)).count(), 250);
        assert!(!prober.is_active());
        assert_eq!((FIRST_PORT, PORTS), (1024, 64_512));
    }

    #[test]
    fn tries_are_far_apart() {
        let mut now = Instant::now();
        let mut prober = Prober::default();
        let mut waits = Vec::new();
        for _ in 0..6 {
            prober.open(now, 1, ([198, 51, 100, 1], 1).into());
            let next = prober.ready_at(now);
            waits.push((next - now).as_secs());
            now = next;
        }
        assert_eq!(waits, [30, 60, 120, 300, 600, 3600]);
        prober.open(now, 1, ([198, 51, 100, 1], 1).into());
        prober.forget();
        assert_eq!(prober.ready_at(now), now + Duration::from_secs(30));
        prober.forget();
        assert_eq!(prober.ready_at(now), now + Duration::from_secs(30), "never sooner");
    }
}
