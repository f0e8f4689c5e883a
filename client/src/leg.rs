//! One leg to a relay: shows the ticket and hands on the byte stream behind it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use adit_protocol::control::RelayTicket;
use adit_protocol::leg::{self, Status};
use adit_protocol::ticket::Ticket;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

use crate::dial::{self, DialError};
use crate::identity::Identity;
use crate::os;

/// Unsent bytes that the kernel may hold: more would stand in front of a keystroke, less would let a
/// fast line run dry (TCP_NOTSENT_LOWAT).
const NOTSENT: u32 = 128 * 1024;

/// A connection to a relay. The relay's one status byte is taken off its front: what is read comes
/// from the other leg. Nobody waits for that byte; bytes may be written at once.
#[derive(Debug)]
pub struct Leg {
    stream: TcpStream,
    paired: bool,
}

/// Connects to the relay, trying its addresses in turn, and shows the ticket.
///
/// # Errors
/// [`LegError`].
pub async fn dial(identity: &Identity, grant: &RelayTicket) -> Result<Leg, LegError> {
    let ticket = Ticket::peek(&grant.ticket).map_err(|_| LegError::Ticket)?;
    let preamble = leg::encode(&grant.ticket, &ticket, |message| identity.sign(message));
    let mut last = LegError::Ticket;
    for address in &grant.addresses {
        match dial::tcp(address).await {
            Ok(mut stream) => {
                os::limit_unsent(&stream, NOTSENT);
                stream.write_all(&preamble).await.map_err(DialError::Unreachable)?;
                return Ok(Leg { stream, paired: false });
            }
            Err(error) => last = error.into(),
        }
    }
    Err(last)
}

impl Leg {
    /// The connection itself, for its addresses.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }
}

/// Why there is no leg.
#[derive(Debug, thiserror::Error)]
pub enum LegError {
    /// The mediator sent a ticket that is none, or one without an address.
    #[error("the mediator's ticket cannot be used")]
    Ticket,
    /// No connection.
    #[error("{0}")]
    Dial(#[from] DialError),
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
