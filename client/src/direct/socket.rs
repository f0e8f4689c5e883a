//! The UDP socket, and the adapter through which quinn uses it (quinn 0.12 will change this trait).
//!
//! An error of one datagram must not end what the others carry: any receive error but ConnectionReset
//! ends quinn's endpoint, any send error but WouldBlock its connection. So both are swallowed here.
//!
//! quinn's own way to pass datagrams (batches, ECN, no fragments) needs more of the system than every one
//! has: Wine, and Windows before it could tell ECN, refuse it. There the datagrams go one by one: slower,
//! and direct all the same.

use std::fmt;
use std::future::Future;
use std::io::{self, ErrorKind, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncUdpSocket, UdpPoller};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::BindError;
use super::demux::Demux;

/// Room for what arrives at 1 Gbit/s while the process does not run for 20 ms; the system may grant less.
const BUFFER: usize = 4 * 1024 * 1024;
/// Receive errors in a row, before other tasks get their turn.
const ERRORS_A_TURN: usize = 16;

/// A socket, bound to all addresses. The device's is for IPv6 and IPv4, or IPv4 only where the system has no IPv6; a session's own
/// is for IPv4. On one for both the
/// system, and so quinn, has IPv4 addresses in the form `::ffff:192.0.2.1`; everybody else here has them as IPv4.
pub(super) struct DirectSocket {
    io: Arc<UdpSocket>,
    /// quinn's own way, where the system has what it needs.
    state: Option<UdpSocketState>,
    address: SocketAddr,
    demux: Arc<Demux>,
    errors: AtomicU64,
}

impl DirectSocket {
    pub(super) fn bind(ports: RangeInclusive<u16>, demux: Arc<Demux>) -> Result<Self, BindError> {
        let std = bind_one_of(ports, bind)?;
        let io = UdpSocket::from_std(std).map_err(BindError::Socket)?;
        Self::on(Arc::new(io), demux).map_err(BindError::Socket)
    }

    /// On a socket that is there. Who read from it before may take one more datagram.
    pub(super) fn on(io: Arc<UdpSocket>, demux: Arc<Demux>) -> io::Result<Self> {
        let address = io.local_addr()?;
        // Best effort: smaller buffers are slower, that is all.
        let socket = SockRef::from(&*io);
        let _ = socket.set_recv_buffer_size(BUFFER);
        let _ = socket.set_send_buffer_size(BUFFER);
        let state = UdpSocketState::new((&*io).into())
            .inspect_err(|error| tracing::info!(%error, "direct paths are slower: datagrams go one by one"));
        Ok(Self { io, state: state.ok(), address, demux, errors: AtomicU64::new(0) })
    }

    pub(super) fn port(&self) -> u16 {
        self.address.port()
    }

    pub(super) fn has_ipv6(&self) -> bool {
        self.address.is_ipv6()
    }

    /// Sends a datagram of the path engine. A full socket and errors count as loss.
    pub(super) fn send(&self, destination: SocketAddr, payload: &[u8]) {
        let destination = match destination.ip() {
            IpAddr::V4(ip) if self.has_ipv6() => (ip.to_ipv6_mapped(), destination.port()).into(),
            _ => destination,
        };
        // Not tokio's way: it does not know of a new socket yet that it is writable, and what a session sends first is lost.
        if let Err(error) = SockRef::from(&*self.io).send_to(payload, &destination.into()) {
            self.count(&error);
        }
    }

    fn receive_one(&self, buffers: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> io::Result<usize> {
        let (Some(buffer), Some(meta)) = (buffers.first_mut(), meta.first_mut()) else { return Ok(0) };
        let (len, addr) = self.io.try_recv_from(buffer)?;
        *meta = RecvMeta { addr, len, stride: len, ecn: None, dst_ip: None };
        Ok(1)
    }

    fn count(&self, error: &io::Error) {
        // Unreachable networks and prohibited destinations are everyday life of a path engine.
        let errors = self.errors.fetch_add(1, Ordering::Relaxed) + 1;
        if errors.is_power_of_two() {
            tracing::debug!(%error, errors, "UDP datagrams lost at the socket");
        }
    }
}

impl AsyncUdpSocket for DirectSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(WritePoller { socket: self, waiting: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let sent = match &self.state {
            Some(state) => {
                self.io.try_io(Interest::WRITABLE, || state.try_send((&*self.io).into(), transmit))
            }
            // One datagram: `max_transmit_segments` says so.
            None => self.io.try_send_to(transmit.contents, transmit.destination).map(drop),
        };
        match sent {
            Err(error) if error.kind() != ErrorKind::WouldBlock => {
                self.count(&error);
                Ok(())
            }
            sent => sent,
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        for _ in 0..ERRORS_A_TURN {
            let received = loop {
                // Fails only when the runtime is gone.
                ready!(self.io.poll_recv_ready(cx))?;
                let received = match &self.state {
                    Some(state) => {
                        self.io.try_io(Interest::READABLE, || state.recv((&*self.io).into(), buffers, meta))
                    }
                    None => self.receive_one(buffers, meta),
                };
                match received {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    received => break received,
                }
            };
            match received {
                Ok(count) => {
                    for (buffer, meta) in buffers.iter_mut().zip(meta).take(count) {
                        self.demux.sort(buffer, meta);
                    }
                    return Poll::Ready(Ok(count));
                }
                Err(error) => self.count(&error),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }

    fn max_transmit_segments(&self) -> usize {
        self.state.as_ref().map_or(1, UdpSocketState::max_gso_segments)
    }

    fn max_receive_segments(&self) -> usize {
        self.state.as_ref().map_or(1, UdpSocketState::gro_segments)
    }

    fn may_fragment(&self) -> bool {
        // Then MTU discovery is off: datagrams stay at 1200 bytes.
        self.state.as_ref().is_none_or(UdpSocketState::may_fragment)
    }
}

impl fmt::Debug for DirectSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirectSocket").field("address", &self.address).finish_non_exhaustive()
    }
}

/// Waits for room in the socket, for one of quinn's connections.
struct WritePoller {
    socket: Arc<DirectSocket>,
    waiting: Option<Pin<Box<dyn Future<Output = io::Result<()>> + Send + Sync>>>,
}

impl UdpPoller for WritePoller {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let socket = self.socket.clone();
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(async move { socket.io.writable().await }));
        let writable = ready!(waiting.as_mut().poll(cx));
        self.waiting = None;
        Poll::Ready(writable)
    }
}

impl fmt::Debug for WritePoller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WritePoller").finish_non_exhaustive()
    }
}

/// A socket for IPv4 alone, with a free port of the range.
pub(super) fn bind_ipv4(ports: RangeInclusive<u16>) -> Result<std::net::UdpSocket, BindError> {
    bind_one_of(ports, |port| {
        let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        Ok(socket.into())
    })
}

/// Binds a free port of the range, beginning with a random one. The range overlaps the systems' ephemeral ports: some may be
/// taken. Random each time, so that one that a router still knows by an old mapping says nothing of the next.
pub(super) fn bind_one_of<S>(
    ports: RangeInclusive<u16>,
    bind: impl Fn(u16) -> io::Result<S>,
) -> Result<S, BindError> {
    let (first, last) = (*ports.start(), *ports.end());
    let count = ports.count();
    let start = if count == 0 { 0 } else { rand::random_range(0..count) };
    let ports = (first..=last).cycle().skip(start).take(count);
    for port in ports {
        match bind(port) {
            // Windows reserves ranges, and says that permission is lacking.
            Err(error) if matches!(error.kind(), ErrorKind::AddrInUse | ErrorKind::PermissionDenied) => {}
            bound => return bound.map_err(BindError::Socket),
        }
    }
    Err(BindError::NoFreePort { first, last })
}

fn bind(port: u16) -> io::Result<std::net::UdpSocket> {
    let both = bind_to(Domain::IPV6, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)));
    match both {
        Err(error) if !matches!(error.kind(), ErrorKind::AddrInUse | ErrorKind::PermissionDenied) => {
            bind_to(Domain::IPV4, SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))
        }
        both => both,
    }
}

fn bind_to(domain: Domain, address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    if domain == Domain::IPV6 {
        socket.set_only_v6(false)?;
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    /// Sends datagrams from one socket to another as quinn does; what arrives.
    async fn pass(plain: bool) -> Vec<Vec<u8>> {
        let socket = || {
            let socket = DirectSocket::bind(20_000..=29_999, Arc::default()).expect("a free port");
            Arc::new(DirectSocket { state: socket.state.filter(|_| !plain), ..socket })
        };
        let (from, to) = (socket(), socket());
        // As quinn has it on a socket for both.
        let ip = Ipv4Addr::LOCALHOST;
        let ip = if from.has_ipv6() { IpAddr::V6(ip.to_ipv6_mapped()) } else { ip.into() };
        let destination = SocketAddr::new(ip, to.port());
        let mut arrived = Vec::new();
        for datagram in [&[0x40; 1][..], &[0x41; 1200], &[0x42; 7]] {
            let transmit =
                Transmit { destination, ecn: None, contents: datagram, segment_size: None, src_ip: None };
            let mut writable = from.clone().create_io_poller();
            poll_fn(|cx| writable.as_mut().poll_writable(cx)).await.expect("a socket");
            from.try_send(&transmit).expect("sends");
            let mut bytes = [0; 2000];
            let mut meta = [RecvMeta::default()];
            let received = poll_fn(|cx| to.poll_recv(cx, &mut [IoSliceMut::new(&mut bytes)], &mut meta));
            assert_eq!(received.await.expect("receives"), 1);
            assert_eq!((meta[0].addr.port(), meta[0].stride), (from.port(), datagram.len()));
            arrived.push(bytes[..meta[0].len].to_vec());
        }
        if plain {
            assert_eq!((from.max_transmit_segments(), from.may_fragment()), (1, true));
        }
        arrived
    }

    #[tokio::test]
    async fn what_is_sent_first_arrives() {
        let to = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
        to.set_read_timeout(Some(std::time::Duration::from_secs(5))).expect("a timeout");
        for byte in 0..20 {
            let from = DirectSocket::bind(20_000..=29_999, Arc::default()).expect("a free port");
            // Nothing was awaited since.
            from.send(to.local_addr().expect("bound"), &[byte]);
            let mut bytes = [0; 2];
            assert_eq!(to.recv(&mut bytes).expect("arrives"), 1);
            assert_eq!(bytes[0], byte);
        }
    }

    #[tokio::test]
    async fn datagrams_pass_with_and_without_what_quinn_needs() {
        let sent = [vec![0x40; 1], vec![0x41; 1200], vec![0x42; 7]];
        assert_eq!(pass(false).await, sent);
        assert_eq!(pass(true).await, sent);
    }
}
