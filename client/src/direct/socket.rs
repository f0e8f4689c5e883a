//! The UDP socket, and the adapter through which quinn uses it (quinn 0.12 will change this trait).
//!
//! An error of one datagram must not end what the others carry: any receive error but ConnectionReset
//! ends quinn's endpoint, any send error but WouldBlock its connection. So both are swallowed here.

use std::fmt;
use std::future::Future;
use std::io::{self, ErrorKind, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncUdpSocket, UdpPoller};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::BindError;
use super::demux::Demux;

/// Room for what arrives at 1 Gbit/s while the process does not run for 20 ms; the system may grant less.
const BUFFER: usize = 4 * 1024 * 1024;
/// Receive errors in a row, before other tasks get their turn.
const ERRORS_A_TURN: usize = 16;

/// The one socket, bound to all IPv4 addresses.
pub(super) struct DirectSocket {
    io: UdpSocket,
    state: UdpSocketState,
    address: SocketAddr,
    demux: Arc<Demux>,
    errors: AtomicU64,
}

impl DirectSocket {
    pub(super) fn bind(ports: RangeInclusive<u16>, demux: Arc<Demux>) -> Result<Self, BindError> {
        let std = bind_one_of(ports)?;
        let wrap = || {
            let address = std.local_addr()?;
            let state = UdpSocketState::new((&std).into())?;
            Ok((UdpSocket::from_std(std)?, state, address))
        };
        let (io, state, address) = wrap().map_err(BindError::Socket)?;
        Ok(Self { io, state, address, demux, errors: AtomicU64::new(0) })
    }

    pub(super) fn port(&self) -> u16 {
        self.address.port()
    }

    /// Sends a datagram of the path engine. A full socket and errors count as loss.
    pub(super) fn send(&self, destination: SocketAddr, payload: &[u8]) {
        if let Err(error) = self.io.try_send_to(payload, destination) {
            self.count(&error);
        }
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
        match self.io.try_io(Interest::WRITABLE, || self.state.try_send((&self.io).into(), transmit)) {
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
                let receive = || self.state.recv((&self.io).into(), buffers, meta);
                match self.io.try_io(Interest::READABLE, receive) {
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
        self.state.max_gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.state.gro_segments()
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
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

/// The range overlaps the systems' ephemeral ports: some may be taken.
fn bind_one_of(ports: RangeInclusive<u16>) -> Result<std::net::UdpSocket, BindError> {
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
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())?;
    // Best effort: smaller buffers are slower, that is all.
    let _ = socket.set_recv_buffer_size(BUFFER);
    let _ = socket.set_send_buffer_size(BUFFER);
    Ok(socket.into())
}
