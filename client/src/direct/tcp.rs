//! Direct TCP: each end takes connections while it has sessions, and tells the peer where. It is the direct way where UDP
//! is blocked, and the faster one on the same network.
//!
//! A connection begins with a check of the path engine (RFC 8445 section 7), framed as in RFC 4571: whoever does not have
//! the session's password is cut off before TLS, and hears nothing. Whoever dialled, the technician is the TLS client.
//!
//! The agent cannot be aimed at others: it dials only the address from which the mediator sees its technician. The
//! technician dials what its agent names: four addresses, every two seconds at most; on ports of the operator's range, or, where
//! the mediator sees the agent, on any, because the router in front chooses it. That is a public address: a private one at the
//! mediator's may be somebody else's here.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_tunnel::path::{is_private, stun};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use rustls::{ClientConfig, ServerConfig};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::Task;
use super::demux::{Demux, Entry as Session};
use super::socket::bind_one_of;
use crate::allow::canonical;
use crate::dial::tune;
use crate::os;
use crate::tls::{self, CarrierStream};

/// How long who connects may take to show the check.
const FIRST: Duration = Duration::from_secs(2);
/// Connections at once that have not shown one yet: in all, and from one source.
const MAX_STRANGERS: usize = 64;
const MAX_OF_SOURCE: usize = 4;
/// Longer than any check.
const MAX_CHECK: usize = 512;
/// How long a connection may take to come about, and the handshake on it.
const CONNECT: Duration = Duration::from_secs(3);
const HANDSHAKE: Duration = Duration::from_secs(5);
/// A round trip below this is of one network: TCP in the kernel is faster there than QUIC, and next to nothing is lost that
/// would hold up all streams.
const NEAR: Duration = Duration::from_millis(5);
/// Unsent bytes that the kernel may hold: as on a leg to a relay.
const NOTSENT: u32 = 128 * 1024;
/// Pause after an error that the next accept may meet again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// A port of the range that takes TCP connections of this process's sessions.
pub(super) struct Listener {
    pub(super) port: u16,
    _task: Task,
}

impl Listener {
    /// `None`: the system refuses, or no port is free.
    pub(super) fn bind(ports: RangeInclusive<u16>, demux: Arc<Demux>) -> Option<Self> {
        let bound = bind_one_of(ports, bind).map_err(io::Error::other);
        let bound = bound.and_then(TcpListener::from_std);
        let listener = bound.inspect_err(|error| tracing::debug!(%error, "no direct TCP")).ok()?;
        let port = listener.local_addr().ok()?.port();
        Some(Self { port, _task: Task(tokio::spawn(accept(listener, demux))) })
    }
}

fn bind(port: u16) -> io::Result<std::net::TcpListener> {
    let both = bind_to(Domain::IPV6, (Ipv6Addr::UNSPECIFIED, port).into());
    match both {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            bind_to(Domain::IPV4, (Ipv4Addr::UNSPECIFIED, port).into())
        }
        both => both,
    }
}

fn bind_to(domain: Domain, address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    if domain == Domain::IPV6 {
        socket.set_only_v6(false)?;
    }
    socket.bind(&address.into())?;
    socket.listen(16)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

async fn accept(listener: TcpListener, demux: Arc<Demux>) {
    let mut strangers = JoinSet::new();
    let mut sources: HashMap<IpAddr, usize> = HashMap::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, from)) => {
                    let source = from.ip().to_canonical();
                    let of_source = sources.entry(source).or_default();
                    if *of_source < MAX_OF_SOURCE && strangers.len() < MAX_STRANGERS {
                        *of_source += 1;
                        let demux = demux.clone();
                        strangers.spawn(async move {
                            let _ = timeout(FIRST, let_in(stream, demux)).await;
                            source
                        });
                    } else if *of_source == 0 {
                        sources.remove(&source);
                    }
                }
                Err(_) => sleep(ACCEPT_PAUSE).await,
            },
            Some(Ok(source)) = strangers.join_next() => {
                if let Entry::Occupied(mut of_source) = sources.entry(source) {
                    *of_source.get_mut() -= 1;
                    if *of_source.get() == 0 {
                        of_source.remove();
                    }
                }
            }
        }
    }
}

/// Hands the connection to the session whose peer it comes from.
async fn let_in(mut stream: TcpStream, demux: Arc<Demux>) -> io::Result<()> {
    let length = usize::from(stream.read_u16().await?);
    if length > MAX_CHECK {
        return Ok(());
    }
    let mut check = vec![0; length];
    stream.read_exact(&mut check).await?;
    if let Some(entry) = stun::local_ufrag(&check).and_then(|ufrag| demux.session(ufrag))
        && entry.agent().is_stream_check(&check)
    {
        let _ = entry.knocked.try_send(stream);
    }
    Ok(())
}

/// This end's part of the handshake.
#[derive(Clone)]
pub(super) enum Side {
    Technician(Arc<ClientConfig>),
    Agent(Arc<ServerConfig>),
}

/// A TCP connection to the session's peer, authenticated by both.
pub(super) struct Connected {
    pub(super) stream: CarrierStream<TcpStream>,
    pub(super) local: Option<SocketAddr>,
    pub(super) remote: Option<SocketAddr>,
    /// The peer is on the same network, as far as this end knows.
    pub(super) is_near: bool,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum TcpError {
    #[error("direct TCP: {0}")]
    Io(#[from] io::Error),
    #[error("direct TCP: too slow")]
    Slow,
    #[error("direct TCP: nobody answers")]
    Nobody,
    /// It is there, and QUIC would do better.
    #[error("direct TCP is no shortcut: the peer is {0:?} away")]
    Far(Duration),
}

/// Connects to the peer: the first of `addresses` where the peer itself answers. With `only_near` one is left alone where
/// QUIC does as well.
pub(super) async fn dial(
    addresses: Vec<SocketAddr>,
    only_near: bool,
    entry: Arc<Session>,
    side: Side,
) -> Result<Connected, TcpError> {
    let mut dialling: FuturesUnordered<_> = addresses
        .into_iter()
        .map(|address| dial_one(address, only_near, entry.clone(), side.clone()))
        .collect();
    let mut why = TcpError::Nobody;
    while let Some(dialled) = dialling.next().await {
        match dialled {
            Err(far @ TcpError::Far(_)) => why = far,
            Err(error) => tracing::debug!(%error, "not there"),
            connected => return connected,
        }
    }
    Err(why)
}

/// The connection, and how long it took: a round trip, or more on a busy machine.
async fn connect(address: SocketAddr) -> Result<(TcpStream, Duration), TcpError> {
    let began = Instant::now();
    let stream = timeout(CONNECT, TcpStream::connect(address)).await.map_err(|_| TcpError::Slow)??;
    Ok((stream, began.elapsed()))
}

async fn dial_one(
    address: SocketAddr,
    only_near: bool,
    entry: Arc<Session>,
    side: Side,
) -> Result<Connected, TcpError> {
    let (mut stream, mut rtt) = connect(address).await?;
    if rtt > NEAR {
        // Perhaps it was the processor, or the neighbour's hardware address, that was waited for.
        let (again, second) = connect(address).await?;
        (stream, rtt) = (again, rtt.min(second));
    }
    let is_near = rtt <= NEAR;
    if only_near && !is_near {
        return Err(TcpError::Far(rtt));
    }
    let check = entry.agent().stream_check();
    let length = u16::try_from(check.len()).expect("checks are short");
    // In one segment.
    stream.write_all(&[&length.to_be_bytes()[..], &check].concat()).await?;
    Ok(Connected { is_near, ..shake(stream, side).await? })
}

/// The handshake on a connection that has shown the check, or been shown it.
pub(super) async fn shake(stream: TcpStream, side: Side) -> Result<Connected, TcpError> {
    tune(&stream);
    os::limit_unsent(&stream, NOTSENT);
    let address = |address: io::Result<SocketAddr>| address.ok().map(canonical);
    let (local, remote) = (address(stream.local_addr()), address(stream.peer_addr()));
    let shaking = async {
        match side {
            Side::Technician(config) => tls::carrier_connect(config, stream).await,
            Side::Agent(config) => tls::carrier_accept(config, stream).await,
        }
    };
    let stream = timeout(HANDSHAKE, shaking).await.map_err(|_| TcpError::Slow)??;
    Ok(Connected { stream, local, remote, is_near: true })
}

/// Which of the addresses that the peer names may be dialled: see the module's documentation. Not this end's `own`. `seen`:
/// where the mediator sees the peer; `anywhere`: others, too.
pub(super) fn may_dial(
    named: Vec<SocketAddr>,
    seen: Option<IpAddr>,
    anywhere: bool,
    ports: &RangeInclusive<u16>,
    own: &[SocketAddr],
) -> Vec<SocketAddr> {
    let is_fit = |address: &SocketAddr| {
        let is_there = seen == Some(address.ip());
        let is_permitted = if is_there && !is_private(address.ip()) {
            true
        } else {
            (is_there || anywhere) && ports.contains(&address.port())
        };
        is_permitted && !own.contains(address)
    };
    named.into_iter().filter(is_fit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn strangers_hear_nothing() {
        let listener = Listener::bind(20_000..=29_999, Arc::default()).expect("a free port");
        let check = |length: u16, bytes: &[u8]| [&length.to_be_bytes()[..], bytes].concat();
        let binding = stun::binding_request([7; 12]);
        let silent = vec![];
        for said in [check(4, b"GET "), check(0xffff, b"\x16\x03"), check(20, &binding), silent] {
            let mut stranger =
                TcpStream::connect((Ipv4Addr::LOCALHOST, listener.port)).await.expect("connects");
            stranger.write_all(&said).await.expect("writes");
            let mut heard = Vec::new();
            // An end or a reset.
            let _ = timeout(2 * FIRST, stranger.read_to_end(&mut heard)).await.expect("is cut off");
            assert_eq!(heard, b"");
        }
        // One source has four places, and finds them free again.
        let mut crowd = Vec::new();
        for _ in 0..=MAX_OF_SOURCE {
            crowd.push(TcpStream::connect((Ipv4Addr::LOCALHOST, listener.port)).await.expect("connects"));
        }
        let mut last = crowd.pop().expect("one more than it has places");
        let turned_away = timeout(FIRST / 2, last.read_to_end(&mut Vec::new())).await;
        assert!(turned_away.is_ok(), "it waits among the others");
        let waiting = timeout(FIRST / 4, crowd[0].read_to_end(&mut Vec::new())).await;
        assert!(waiting.is_err(), "the first ones were turned away, too");
        let port = listener.port;
        drop(listener);
        tokio::task::yield_now().await;
        assert!(
            TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.is_err(),
            "open after the last session"
        );
    }

    #[test]
    fn nobody_is_aimed_at_others() {
        let named: Vec<SocketAddr> = ["10.0.0.1:40000", "10.0.0.1:22", "192.0.2.1:40001", "192.0.2.1:22"]
            .map(|text| text.parse().expect("an address"))
            .into();
        let ports = 40_000..=41_000;
        let technician = |seen, own: &[SocketAddr]| may_dial(named.clone(), seen, true, &ports, own);
        assert_eq!(technician(None, &[]), [named[0], named[2]]);
        assert_eq!(technician(None, &named[2..]), [named[0]]);
        // A private address may be somebody else's here.
        assert_eq!(technician(Some(named[1].ip()), &[]), [named[0], named[2]]);
        assert_eq!(technician(Some(named[3].ip()), &[]), [named[0], named[2], named[3]]);
        let agent = |seen| may_dial(named.clone(), seen, false, &ports, &[]);
        assert_eq!(agent(None), []);
        assert_eq!(agent(Some(named[2].ip())), named[2..]);
        assert_eq!(agent(Some(named[1].ip())), [named[0]]);
    }
}
