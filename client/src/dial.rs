//! TCP and TLS connections to our servers: every wait has a deadline, addresses are tried in turn.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::identity::verify::VerifyError;
use crate::tls;

/// How long one address may take to answer.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a name may take to resolve.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// More addresses of one name than anyone needs.
const MAX_ADDRESSES: usize = 8;
/// A quiet connection is asked for a sign of life after this time, and then this often.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(10));

/// Connects to `server` (`HOST:PORT`): resolves it and tries each address in turn.
///
/// # Errors
/// [`DialError`] of the last address tried.
pub async fn tcp(server: &str) -> Result<TcpStream, DialError> {
    let addresses = timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host(server))
        .await
        .map_err(|_| DialError::TimedOut)?
        .map_err(DialError::Unreachable)?;
    let mut last = DialError::Unreachable(io::Error::other("the name has no address"));
    for address in addresses.take(MAX_ADDRESSES) {
        match timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                tune(&stream);
                return Ok(stream);
            }
            Ok(Err(error)) => last = DialError::Unreachable(error),
            Err(_) => last = DialError::TimedOut,
        }
    }
    Err(last)
}

/// Connects to `server` (`HOST:PORT`) and does the TLS handshake.
///
/// # Errors
/// [`DialError`].
pub async fn tls(server: &str, config: Arc<ClientConfig>) -> Result<TlsStream<TcpStream>, DialError> {
    let stream = tcp(server).await?;
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
    /// This end does not accept the other's certificate.
    #[error(transparent)]
    Verify(#[from] VerifyError),
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
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(alert @ rustls::Error::AlertReceived(_)) => Self::NotAccepted(alert.clone()),
            _ => Self::Unreachable(error),
        }
    }
}
