//! One leg to a relay: shows the ticket and hands on the byte stream behind it.
//!
//! The relay is reached by plain TCP (8002) or, in networks that let nothing else out, by WebSocket over TLS (443). The
//! two are raced, a moment apart, and the ticket is shown on the connection that was there first.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use adit_protocol::RELAY_PATH;
use adit_protocol::control::RelayTicket;
use adit_protocol::leg::{self, Status};
use adit_protocol::ticket::Ticket;
use adit_tunnel::session::CarrierKind;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsStream;
use tokio_tungstenite::client_async_with_config;
use tokio_util::either::Either;

use crate::control::INTERCEPTED;
use crate::dial::{self, DialError};
use crate::identity::Identity;
use crate::os;
use crate::tls;
use crate::websocket::{self, WebSocketBytes};

/// Unsent bytes that the kernel may hold: more would stand in front of a keystroke, less would let a
/// fast line run dry (TCP_NOTSENT_LOWAT).
const NOTSENT: u32 = 128 * 1024;
/// What one way has before the other is tried beside it. On a line with a longer round trip the second one is given up
/// before its connection is there, so that no server sees anything of it.
const HEAD_START: Duration = Duration::from_millis(50);
/// The head start of 443 where connections to 8002 came about and led nowhere: those are quick.
const SWALLOWED: Duration = Duration::from_secs(3);
/// How long the WebSocket's handshake may take.
const UPGRADE: Duration = Duration::from_secs(5);

/// A byte stream to or from a relay: plain TCP, or inside WebSocket messages on TLS.
pub type LegStream = Either<TcpStream, Box<WebSocketBytes<TlsStream<TcpStream>>>>;

/// A connection to a relay. The relay's one status byte is taken off its front: what is read comes
/// from the other leg. Nobody waits for that byte; bytes may be written at once.
#[derive(Debug)]
pub struct Leg {
    stream: LegStream,
    paired: bool,
    heard: watch::Sender<bool>,
}

/// Connects to the relay and shows the ticket. The way of `first` (8002 or 443) has a head start on the other.
///
/// # Errors
/// [`LegError`].
pub async fn dial(identity: &Identity, grant: &RelayTicket, first: CarrierKind) -> Result<Leg, LegError> {
    let ticket = Ticket::peek(&grant.ticket).map_err(|_| LegError::Ticket)?;
    let preamble = leg::encode(&grant.ticket, &ticket, |message| identity.sign(message));
    let plain = async { plain(grant).await.map(Either::Left) };
    let web = async { web(identity, grant).await.map(|stream| Either::Right(Box::new(stream))) };
    let mut stream: LegStream = match first {
        CarrierKind::RelayHttps => race(web, plain, SWALLOWED).await?,
        _ => race(plain, web, HEAD_START).await?,
    };
    show(&mut stream, &preamble).await?;
    Ok(Leg::new(stream))
}

/// The same by this way only.
///
/// # Errors
/// [`LegError`].
pub async fn dial_by(identity: &Identity, grant: &RelayTicket, way: CarrierKind) -> Result<Leg, LegError> {
    let ticket = Ticket::peek(&grant.ticket).map_err(|_| LegError::Ticket)?;
    let preamble = leg::encode(&grant.ticket, &ticket, |message| identity.sign(message));
    let mut stream: LegStream = match way {
        CarrierKind::RelayHttps => Either::Right(Box::new(web(identity, grant).await?)),
        _ => Either::Left(plain(grant).await?),
    };
    show(&mut stream, &preamble).await?;
    Ok(Leg::new(stream))
}

async fn show(stream: &mut LegStream, preamble: &[u8]) -> Result<(), LegError> {
    stream.write_all(preamble).await.map_err(DialError::Unreachable)?;
    stream.flush().await.map_err(DialError::Unreachable)?;
    Ok(())
}

/// The first to come about; `second` begins after `head_start`, or when `first` has failed. The error is that of the
/// way that got further: a name that is known is more than an address that does not answer.
async fn race<T>(
    first: impl Future<Output = Result<T, LegError>>,
    second: impl Future<Output = Result<T, LegError>>,
    head_start: Duration,
) -> Result<T, LegError> {
    tokio::pin!(first, second);
    let both = |one: LegError, other: LegError| if other.tells_more() { other } else { one };
    let early = tokio::select! {
        done = &mut first => Some(done),
        () = sleep(head_start) => None,
    };
    match early {
        Some(Ok(stream)) => Ok(stream),
        Some(Err(error)) => second.await.map_err(|other| both(error, other)),
        None => tokio::select! {
            done = &mut first => match done {
                Ok(stream) => Ok(stream),
                Err(error) => second.await.map_err(|other| both(error, other)),
            },
            done = &mut second => match done {
                Ok(stream) => Ok(stream),
                Err(other) => first.await.map_err(|error| both(error, other)),
            },
        },
    }
}

async fn plain(grant: &RelayTicket) -> Result<TcpStream, LegError> {
    let mut last = LegError::Nowhere;
    for address in &grant.addresses {
        match dial::tcp(address).await {
            Ok(stream) => {
                os::limit_unsent(&stream, NOTSENT);
                return Ok(stream);
            }
            Err(error) => last = error.into(),
        }
    }
    Err(last)
}

async fn web(
    identity: &Identity,
    grant: &RelayTicket,
) -> Result<WebSocketBytes<TlsStream<TcpStream>>, LegError> {
    let config = tls::relay_client(identity).map_err(|error| LegError::Tls(error.to_string()))?;
    let config = Arc::new(config);
    let mut last = LegError::Nowhere;
    for server in &grant.https {
        match dial::tls(server, config.clone(), &identity.proxies).await {
            Ok(stream) => {
                os::limit_unsent(stream.get_ref().0, NOTSENT);
                let request = format!("wss://{server}{RELAY_PATH}");
                let stream = TlsStream::from(stream);
                let upgraded = client_async_with_config(request, stream, Some(websocket::config()));
                match timeout(UPGRADE, upgraded).await {
                    Ok(Ok((socket, _))) => return Ok(WebSocketBytes::new(socket)),
                    Ok(Err(error)) => last = LegError::Upgrade(error.to_string()),
                    Err(_) => last = DialError::TimedOut.into(),
                }
            }
            Err(error) => last = error.into(),
        }
    }
    Err(last)
}

impl Leg {
    fn new(stream: LegStream) -> Self {
        Self { stream, paired: false, heard: watch::Sender::new(false) }
    }

    /// Whether the relay has said a word; also when the leg itself is elsewhere by then.
    pub fn heard(&self) -> watch::Receiver<bool> {
        self.heard.subscribe()
    }

    /// What carries it.
    pub fn kind(&self) -> CarrierKind {
        match self.stream {
            Either::Left(_) => CarrierKind::Relay,
            Either::Right(_) => CarrierKind::RelayHttps,
        }
    }

    /// Its own address and that of the relay, or of the proxy before it.
    pub fn addresses(&self) -> (Option<SocketAddr>, Option<SocketAddr>) {
        let tcp = tcp_of(&self.stream);
        (tcp.local_addr().ok(), tcp.peer_addr().ok())
    }
}

/// The connection under a leg.
pub fn tcp_of(stream: &LegStream) -> &TcpStream {
    match stream {
        Either::Left(tcp) => tcp,
        Either::Right(web) => web.get_ref().get_ref().0,
    }
}

/// Why there is no leg.
#[derive(Debug, thiserror::Error)]
pub enum LegError {
    /// The mediator sent a ticket that is none.
    #[error("the mediator's ticket cannot be used")]
    Ticket,
    /// The relay is not reached this way.
    #[error("the relay has no such address")]
    Nowhere,
    /// No connection.
    #[error("{0}")]
    Dial(#[from] DialError),
    /// What answers on the HTTPS port takes no WebSocket there.
    #[error("what answers there is no relay: {0}")]
    Upgrade(String),
    /// TLS could not be set up.
    #[error("{0}")]
    Tls(String),
}

impl LegError {
    /// Somebody in between has said what is wrong.
    fn tells_more(&self) -> bool {
        use DialError::{Foreign, Proxy, Verify};
        matches!(self, Self::Upgrade(_) | Self::Dial(Foreign(_) | Proxy { .. } | Verify(_)))
    }

    /// What helps, where that is known.
    pub fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::Dial(DialError::Proxy { error, .. }) => Some(error.remedy()),
            Self::Upgrade(_) | Self::Dial(DialError::Foreign(_) | DialError::Verify(_)) => Some(INTERCEPTED),
            _ => None,
        }
    }
}

/// The relay has refused the leg.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RelayRefused {
    /// See [`Status`].
    #[error("the relay refused: {}", describe(*.0))]
    Known(Status),
    /// A newer relay's word.
    #[error("the relay refused with status {0:#04x}")]
    Unknown(u8),
}

impl RelayRefused {
    /// The refusal behind an I/O error.
    pub fn of(error: &io::Error) -> Option<Self> {
        error.get_ref()?.downcast_ref().copied()
    }
}

fn describe(status: Status) -> &'static str {
    match status {
        Status::Paired => "paired",
        Status::Refused => "the ticket is not valid here, or has expired",
        Status::Spent => "the ticket was used before",
        Status::NoPeer => "the other end did not come",
        Status::Replaced => "a newer connection took this one's place",
        Status::Busy => "the relay is full",
    }
}

impl AsyncRead for Leg {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.paired {
            let mut byte = [0];
            let mut status = ReadBuf::new(&mut byte);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut status))?;
            let Some(&byte) = status.filled().first() else { return Poll::Ready(Ok(())) };
            self.heard.send_replace(true);
            match Status::try_from(byte) {
                Ok(Status::Paired) => self.paired = true,
                Ok(status) => return Poll::Ready(Err(io::Error::other(RelayRefused::Known(status)))),
                Err(unknown) => return Poll::Ready(Err(io::Error::other(RelayRefused::Unknown(unknown.0)))),
            }
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Leg {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
