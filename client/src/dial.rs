//! TCP and TLS connections to our servers: every wait has a deadline, addresses are tried in turn.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::identity::verify::VerifyError;
use crate::proxy::{self, Proxies, ProxyError};
use crate::tls;

/// How long one address may take to answer.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a name may take to resolve.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// More addresses of one name than anyone needs.
const MAX_ADDRESSES: usize = 8;
/// How long an address has before the next one is tried beside it (RFC 8305 section 8).
const HEAD_START: Duration = Duration::from_millis(250);
/// A quiet connection is asked for a sign of life after this time, and then this often.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(10));

/// Connects to `server` (`HOST:PORT`): resolves it and races its addresses, IPv6 and IPv4 by turns, each with a
/// head start on the next (RFC 8305 sections 4 and 5).
///
/// # Errors
/// [`DialError`] of the last address tried.
pub async fn tcp(server: &str) -> Result<TcpStream, DialError> {
    let addresses = timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host(server))
        .await
        .map_err(|_| DialError::TimedOut)?
        .map_err(DialError::Unreachable)?;
    let mut waiting = by_turns(addresses.collect()).into_iter().take(MAX_ADDRESSES).peekable();
    // Dropped with this future, or as soon as one has won: the others end.
    let mut attempts = JoinSet::new();
    let mut last = DialError::Unreachable(io::Error::other("the name has no address"));
    loop {
        match waiting.next() {
            Some(address) => {
                attempts.spawn(async move { timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await });
            }
            None if attempts.is_empty() => return Err(last),
            None => {}
        }
        let next = async {
            match waiting.peek() {
                Some(_) => sleep(HEAD_START).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(done) = attempts.join_next() => match done {
                Ok(Ok(Ok(stream))) => {
                    tune(&stream);
                    return Ok(stream);
                }
                Ok(Ok(Err(error))) => last = DialError::Unreachable(error),
                Ok(Err(_)) => last = DialError::TimedOut,
                Err(error) => last = DialError::Unreachable(io::Error::other(error)),
            },
            () = next => {}
        }
    }
}

/// One of each family by turns, beginning with the family of the first (the resolver's preference).
fn by_turns(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first_is_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == first_is_v6);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut ordered = Vec::new();
    loop {
        let turn: Vec<_> = first.next().into_iter().chain(second.next()).collect();
        if turn.is_empty() {
            return ordered;
        }
        ordered.extend(turn);
    }
}

/// Connects to `server` (`HOST:PORT`), through a proxy where there is one for it, and does the TLS handshake.
///
/// # Errors
/// [`DialError`].
pub async fn tls(
    server: &str,
    config: Arc<ClientConfig>,
    proxies: &Proxies,
) -> Result<TlsStream<TcpStream>, DialError> {
    let stream = match proxies.to(server) {
        Some(proxy) => proxy::connect(proxy, server)
            .await
            .map_err(|error| DialError::Proxy { proxy: proxy.address.clone(), error })?,
        None => tcp(server).await?,
    };
    let handshake = TlsConnector::from(config).connect(tls::server_name(server), stream);
    timeout(HANDSHAKE_TIMEOUT, handshake).await.map_err(|_| DialError::TimedOut)?.map_err(DialError::from_tls)
}

/// Low latency, and a dead peer is noticed. Failures are no reason to give up a connection.
pub fn tune(stream: &TcpStream) {
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE.0).with_interval(KEEPALIVE.1);
    let socket = SockRef::from(stream);
    let _ = socket.set_tcp_nodelay(true);
    let _ = socket.set_tcp_keepalive(&keepalive);
}

/// Why no connection came about.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The name does not resolve, or nobody answers there.
    #[error("{0}")]
    Unreachable(io::Error),
    /// No answer in time.
    #[error("no answer in time")]
    TimedOut,
    /// No way through the proxy.
    #[error("the proxy at {proxy} {error}")]
    Proxy {
        /// `HOST:PORT`.
        proxy: String,
        /// Why.
        error: ProxyError,
    },
    /// This end does not accept the other's certificate.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// Something answers that is no server of ours.
    #[error("what answers there is no server of adit: {0}")]
    Foreign(String),
    /// The other end does not accept this device's certificate.
    #[error("the server does not accept this device's certificate ({0})")]
    NotAccepted(rustls::Error),
}

impl DialError {
    /// Sorts an error of a TLS stream: whose verdict was it, or was it the network?
    pub fn from_tls(error: io::Error) -> Self {
        if let Some(verdict) = VerifyError::of(&error) {
            return Self::Verify(verdict);
        }
        use rustls::AlertDescription::{
            HandshakeFailure, NoApplicationProtocol, ProtocolVersion, UnrecognisedName,
        };
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            // Ours speak TLS 1.3 with our protocols and ask for no server name.
            Some(rustls::Error::AlertReceived(
                alert @ (HandshakeFailure | NoApplicationProtocol | ProtocolVersion | UnrecognisedName),
            )) => Self::Foreign(format!("it ended the handshake: {alert:?}")),
            Some(rustls::Error::InvalidMessage(_)) => Self::Foreign("it does not speak TLS".to_owned()),
            Some(alert @ rustls::Error::AlertReceived(_)) => Self::NotAccepted(alert.clone()),
            _ => Self::Unreachable(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_take_turns() {
        let address = |text: &str| text.parse::<SocketAddr>().expect("an address");
        let [a, b, c] = ["192.0.2.1:1", "192.0.2.2:1", "192.0.2.3:1"].map(address);
        let [x, y] = ["[2001:db8::1]:1", "[2001:db8::2]:1"].map(address);
        assert_eq!(by_turns(vec![a, b, c, x, y]), [a, x, b, y, c]);
        assert_eq!(by_turns(vec![x, a, b]), [x, a, b]);
        assert_eq!(by_turns(vec![x, y]), [x, y]);
        assert_eq!(by_turns(vec![]), []);
    }
}
