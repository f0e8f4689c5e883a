//! The agent's side of streams and flows: checks the target, connects it, copies.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use adit_protocol::Target;
use adit_protocol::frame::{MAX_DATAGRAM, ResetCode};
use bytes::Bytes;
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::debug;

use crate::allow::AllowList;
use crate::copy::copy;
use crate::dial::tune;
use crate::os::out_of_descriptors;
use crate::tunnel::{Flow, TunnelStream};

/// How long a target may take to accept a connection, over all of its addresses.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// One address of several must not use up all of that.
const ADDRESS_TIMEOUT: Duration = Duration::from_secs(4);

/// How long a flow to `port` lives without a datagram: two minutes, as RFC 4787 REQ-5 wants of a NAT. Half
/// of that for well-known ports, for which REQ-5a allows less: what is there (DNS, NTP, SNMP) answers at
/// once, and its clients take a new port for every question.
pub fn idle_timeout(port: u16) -> Duration {
    Duration::from_secs(if port < 1024 { 60 } else { 120 })
}

/// Serves one stream: connects `target` if the allow list has it, and copies until both directions have
/// ended. The technician hears why not.
pub async fn serve_stream(stream: TunnelStream, target: Target, allow: Arc<AllowList>) {
    let connected = tokio::select! {
        connected = connect(&target, &allow) => connected,
        // The technician does not want it any more.
        () = stream.ended() => return,
    };
    match connected {
        Ok(tcp) => {
            tune(&tcp);
            stream.accept();
            if let Err(error) = copy(tcp, stream).await {
                debug!(%target, %error, "stream ended early");
            }
        }
        Err(code) => {
            debug!(%target, ?code, "target not connected");
            stream.reset(code);
        }
    }
}

/// Serves one flow: sends its datagrams to `target` if the allow list has it, and the answers back, until
/// nothing comes for [`idle_timeout`]. Datagrams that do not fit are dropped, as UDP does.
pub async fn serve_flow(flow: Flow, target: Target, allow: Arc<AllowList>) {
    match open_socket(&target, &allow).await {
        Ok(socket) => {
            flow.accept();
            if let Some(code) = pass_datagrams(&flow, &socket, idle_timeout(target.port)).await {
                flow.reset(code);
            }
        }
        Err(code) => {
            debug!(%target, ?code, "target not connected");
            flow.reset(code);
        }
    }
}

async fn connect(target: &Target, allow: &AllowList) -> Result<TcpStream, ResetCode> {
    let addresses = allow.resolve_and_check(target).await.map_err(|denied| denied.code())?;
    let mut code = ResetCode::Unreachable;
    let each = if addresses.len() > 1 { ADDRESS_TIMEOUT } else { CONNECT_TIMEOUT };
    let in_turn = async {
        for address in &addresses {
            match timeout(each, TcpStream::connect(address)).await {
                Ok(Ok(tcp)) => return Some(tcp),
                Ok(Err(error)) => code = why(&error),
                Err(_) => code = ResetCode::Unreachable,
            }
        }
        None
    };
    let connected = timeout(CONNECT_TIMEOUT, in_turn).await.ok().flatten();
    connected.ok_or(code)
}

/// A socket that takes datagrams from the target only.
async fn open_socket(target: &Target, allow: &AllowList) -> Result<UdpSocket, ResetCode> {
    let addresses = allow.resolve_and_check(target).await.map_err(|denied| denied.code())?;
    let mut code = ResetCode::Unreachable;
    for address in addresses {
        match connected_socket(address).await {
            Ok(socket) => return Ok(socket),
            Err(error) => code = why(&error),
        }
    }
    Err(code)
}

async fn connected_socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(address).await?;
    Ok(socket)
}

/// Returns why the target refuses, if it does.
async fn pass_datagrams(flow: &Flow, socket: &UdpSocket, idle: Duration) -> Option<ResetCode> {
    let mut buffer = vec![0; MAX_DATAGRAM];
    let mut deadline = Instant::now() + idle;
    loop {
        tokio::select! {
            datagram = flow.recv() => {
                let Ok(datagram) = datagram else { return None };
                if let Err(error) = socket.send(&datagram).await && is_refusal(&error) {
                    return Some(ResetCode::Refused);
                }
            }
            received = socket.recv(&mut buffer) => match received {
                // Copied, so that a small datagram in a queue does not hold a large buffer.
                Ok(length) => if flow.send(Bytes::copy_from_slice(&buffer[..length])).is_err() {
                    return None;
                },
                Err(error) if is_refusal(&error) => return Some(ResetCode::Refused),
                Err(_) => {}
            },
            () = sleep_until(deadline) => return None,
        }
        deadline = Instant::now() + idle;
    }
}

/// Nobody listens on the port (ICMP said so, which Windows calls a reset when it was UDP). Any other error
/// may be over with the next datagram.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset)
}

fn why(error: &io::Error) -> ResetCode {
    match error.kind() {
        _ if is_refusal(error) => ResetCode::Refused,
        // No port or no memory to connect from.
        io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse | io::ErrorKind::OutOfMemory => {
            ResetCode::Overloaded
        }
        _ if out_of_descriptors(error) => ResetCode::Overloaded,
        _ => ResetCode::Unreachable,
    }
}
