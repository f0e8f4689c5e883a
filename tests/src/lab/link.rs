//! A line in user space: takes every packet that a router would forward, and sends it on when its
//! time has come.
//!
//! The kernel's own `netem` is often absent, and a TUN device is often closed to ordinary users. A
//! packet socket sees what arrives at the router; an nftables rule keeps the kernel from forwarding
//! it too; a raw socket sends it on. Both are open to whoever owns the network namespace.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use patchbay::Ipv4Net;
use socket2::{Domain, Protocol, Socket, Type};

use super::shaper::{Fate, Link, Shaper};

/// Rules of a router on which a line runs: what the kernel would forward itself.
pub(super) const NOTHING_ELSE: &str = "table ip adit_line {
         chain forward { type filter hook forward priority filter; policy drop; }
     }";

/// What a line has done so far.
#[derive(Debug, Default)]
pub struct LinkStats {
    /// Packets sent on, copies included.
    pub forwarded: AtomicU64,
    /// Packets lost on purpose.
    pub lost: AtomicU64,
    /// Packets that found the queue before the line full.
    pub overflowed: AtomicU64,
    /// Packets that could not be sent on: none, or the lab is broken.
    pub failed: AtomicU64,
}

/// A running line. It ends when this is dropped.
pub(super) struct RunningLink {
    line: Arc<Line>,
}

struct Line {
    stats: Arc<LinkStats>,
    ended: AtomicBool,
    under_way: Mutex<BinaryHeap<Reverse<UnderWay>>>,
    /// Told when an earlier packet than all before is under way, and at the end.
    earlier: Condvar,
}

/// Ordered by arrival, then by entry.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct UnderWay {
    arrives: Instant,
    entered: u64,
    packet: Vec<u8>,
}

impl RunningLink {
    /// Puts `link` in the way of what `router` forwards from and to `site`, in each direction.
    pub(super) fn start(router: &patchbay::Router, site: Vec<Ipv4Net>, link: Link) -> anyhow::Result<Self> {
        let line = Arc::new(Line {
            stats: Arc::default(),
            ended: AtomicBool::new(false),
            under_way: Mutex::default(),
            earlier: Condvar::new(),
        });
        let (receiver, sender) = (line.clone(), line.clone());
        // Sockets belong to the namespace of the thread that makes them.
        let incoming = router.run_sync(|| Ok(packet_socket()?))?;
        let outgoing =
            router.run_sync(|| Ok(Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255)))?))?;
        router.spawn_thread(move || Ok(receiver.receive(incoming, &site, link)?))?;
        router.spawn_thread(move || {
            sender.send(&outgoing);
            Ok(())
        })?;
        Ok(Self { line })
    }

    pub(super) fn stats(&self) -> Arc<LinkStats> {
        self.line.stats.clone()
    }
}

impl Drop for RunningLink {
    fn drop(&mut self) {
        self.line.ended.store(true, Relaxed);
        self.line.earlier.notify_all();
    }
}

impl Line {
    fn receive(&self, mut incoming: Socket, site: &[Ipv4Net], link: Link) -> io::Result<()> {
        let mut shapers = [Shaper::new(link, 0), Shaper::new(link, 1)];
        let mut buffer = vec![0; 65_536];
        let mut entered = 0;
        while !self.ended.load(Relaxed) {
            let length = match incoming.read(&mut buffer) {
                Ok(length) => length,
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) =>
                {
                    continue;
                }
                Err(error) => return Err(error),
            };
            let now = Instant::now();
            let Some((packet, outward)) = routed(&mut buffer[..length], site) else { continue };
            match shapers[usize::from(outward)].push(now, packet.len()) {
                Fate::Lost => {
                    self.stats.lost.fetch_add(1, Relaxed);
                }
                Fate::Overflowed => {
                    self.stats.overflowed.fetch_add(1, Relaxed);
                }
                Fate::Arrives(arrives, copies) => {
                    let mut under_way = self.under_way();
                    for _ in 0..copies {
                        entered += 1;
                        under_way.push(Reverse(UnderWay { arrives, entered, packet: packet.to_vec() }));
                    }
                    if under_way.peek().is_some_and(|Reverse(first)| first.arrives == arrives) {
                        self.earlier.notify_one();
                    }
                }
            }
        }
        Ok(())
    }

    fn send(&self, outgoing: &Socket) {
        let mut under_way = self.under_way();
        while !self.ended.load(Relaxed) {
            let now = Instant::now();
            let wait = under_way.peek().map(|Reverse(first)| first.arrives.saturating_duration_since(now));
            match wait {
                Some(Duration::ZERO) => {
                    let Some(Reverse(first)) = under_way.pop() else { continue };
                    drop(under_way);
                    self.send_on(outgoing, &first.packet);
                    under_way = self.under_way();
                }
                wait => {
                    let wait = wait.unwrap_or(Duration::from_secs(1));
                    under_way =
                        self.earlier.wait_timeout(under_way, wait).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }

    fn send_on(&self, outgoing: &Socket, packet: &[u8]) {
        let to = Ipv4Addr::new(packet[16], packet[17], packet[18], packet[19]);
        match outgoing.send_to(packet, &SocketAddrV4::new(to, 0).into()) {
            Ok(_) => self.stats.forwarded.fetch_add(1, Relaxed),
            // An event may forbid the packet on its way out, as it may any other.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => 0,
            Err(_) => self.stats.failed.fetch_add(1, Relaxed),
        };
    }

    fn under_way(&self) -> MutexGuard<'_, BinaryHeap<Reverse<UnderWay>>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The IPv4 packet in `buffer`, one hop older, if the router forwards it, and whether it leaves `site`.
fn routed<'a>(buffer: &'a mut [u8], site: &[Ipv4Net]) -> Option<(&'a [u8], bool)> {
    if buffer.len() < 20 || buffer[0] >> 4 != 4 {
        return None;
    }
    let length = usize::from(u16::from_be_bytes([buffer[2], buffer[3]]));
    let packet = buffer.get_mut(..length).filter(|packet| packet.len() >= 20)?;
    let inside = |at: usize, packet: &[u8]| {
        let address = Ipv4Addr::new(packet[at], packet[at + 1], packet[at + 2], packet[at + 3]);
        // The router has the first address of each network.
        site.iter().any(|net| net.contains(&address) && net.hosts().next() != Some(address))
    };
    let outward = inside(12, packet);
    // What neither comes from nor goes to the site is the router's own. The kernel fills in the checksum.
    if outward == inside(16, packet) || packet[8] <= 1 {
        return None;
    }
    packet[8] -= 1;
    Some((packet, outward))
}

/// A socket that gets every IPv4 packet that arrives in this namespace, from its IP header on.
fn packet_socket() -> io::Result<Socket> {
    const ETH_P_IP: u16 = 0x0800;
    let protocol = Protocol::from(i32::from(ETH_P_IP.to_be()));
    let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol))?;
    // The kernel lowers it to net.core.rmem_max. A burst that does not fit is lost.
    socket.set_recv_buffer_size(8 << 20)?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    Ok(socket)
}
