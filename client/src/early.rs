//! The beginning of a relay carrier's TLS handshake travels in the messages that open the session, while both legs
//! to the relay are being dialled: the first byte is there a round trip between the ends earlier.
//!
//! The technician's first flight (ClientHello) goes with its request, the agent's (ServerHello to Finished) with its
//! answer, everything later over the leg. For TLS (RFC 8446 section 2) it is one stream, [`Spliced`]. What the mediator
//! passes on is what the relay would: public keys, and the agent's certificate encrypted to the technician.
//!
//! It is worth one attempt. Where the other end, or the mediator, is of an older version, or a message was lost, the
//! handshake is made on the leg from its beginning.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use adit_protocol::DeviceId;
use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::identity::Identity;
use crate::leg::Leg;
use crate::tls::{self, CarrierStream, TlsError};

/// How long the agent's flight may take when the leg is there: it set out before.
const FLIGHT: Duration = Duration::from_secs(1);
/// First byte of a TLS record with a ClientHello in it.
const HANDSHAKE: u8 = 22;

/// A TLS handshake that has begun without its leg. Dropping it gives it up.
#[derive(Debug)]
pub struct Opening {
    handshake: Handshake,
    rest: oneshot::Sender<(Bytes, Leg)>,
    /// The technician's: the agent's flight, when it comes.
    answer: Option<Flight>,
}

/// The task of a handshake, which ends with its owner.
#[derive(Debug)]
struct Handshake(JoinHandle<io::Result<CarrierStream<Spliced<Leg>>>>);

impl Drop for Handshake {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Comes when it is computed, or has arrived. None or an empty one: there is none.
pub type Flight = oneshot::Receiver<Vec<u8>>;

/// Whether a handshake begins with this byte on a leg: a ClientHello's first. What comes after a server's flight has others
/// (RFC 8446 section 5.1).
pub fn is_beginning(first: u8) -> bool {
    first == HANDSHAKE
}

impl Opening {
    /// Begins the technician's handshake with an agent that is not known yet: its certificate is to be compared when the
    /// handshake is done. With it, the first flight.
    ///
    /// # Errors
    /// See [`tls::tunnel_client`].
    pub fn technician(identity: &Identity) -> Result<(Self, Flight), TlsError> {
        let config = Arc::new(tls::tunnel_client(identity, None)?);
        let (stream, flight, rest) = Spliced::later(Bytes::new());
        let handshake = Handshake(tokio::spawn(tls::carrier_connect(config, stream)));
        Ok((Self { handshake, rest, answer: None }, flight))
    }

    /// Answers the first flight of `technician`. With it, this end's.
    ///
    /// # Errors
    /// See [`tls::tunnel_server`].
    pub fn agent(
        identity: &Identity,
        technician: DeviceId,
        first: Vec<u8>,
    ) -> Result<(Self, Flight), TlsError> {
        let config = Arc::new(tls::tunnel_server(identity, Some(technician))?);
        let (stream, flight, rest) = Spliced::later(first.into());
        let handshake = Handshake(tokio::spawn(tls::carrier_accept(config, stream)));
        Ok((Self { handshake, rest, answer: None }, flight))
    }

    /// The technician's: where the agent's flight will come from.
    pub fn answered_by(&mut self, answer: Flight) {
        self.answer = Some(answer);
    }

    /// The technician's: the agent's flight. `None`: the handshake is to be made on the leg, from its beginning.
    pub async fn flight(&mut self) -> Option<Bytes> {
        let flight = timeout(FLIGHT, self.answer.as_mut()?).await.ok()?.ok()?;
        Some(Bytes::from(flight)).filter(|flight| !flight.is_empty())
    }

    /// Goes on: with `ahead`, and with what comes on the leg. A technician has not heard from the relay when it is done.
    ///
    /// # Errors
    /// The leg's, and those of the handshake.
    pub async fn finish(self, ahead: Bytes, leg: Leg) -> io::Result<CarrierStream<Spliced<Leg>>> {
        let Self { mut handshake, rest, .. } = self;
        // Its task waits for nothing else.
        let _ = rest.send((ahead, leg));
        (&mut handshake.0).await.map_err(io::Error::other)?
    }
}

/// A byte stream of which the beginning is there, and the rest may come later.
#[derive(Debug)]
pub struct Spliced<S> {
    /// Read first.
    ahead: Bytes,
    rest: Rest<S>,
}

#[derive(Debug)]
enum Rest<S> {
    Here(S),
    /// What is written meanwhile is this end's first flight: handed out when something is to be read, which nobody has sent.
    Awaited {
        written: Vec<u8>,
        flight: Option<oneshot::Sender<Vec<u8>>>,
        rest: oneshot::Receiver<(Bytes, S)>,
    },
}

impl<S> From<S> for Spliced<S> {
    fn from(stream: S) -> Self {
        Self::after(Bytes::new(), stream)
    }
}

type Later<S> = (Spliced<S>, Flight, oneshot::Sender<(Bytes, S)>);

impl<S> Spliced<S> {
    /// `stream`, of which `ahead` has been read already.
    pub fn after(ahead: Bytes, stream: S) -> Self {
        Self { ahead, rest: Rest::Here(stream) }
    }
}

impl<S: Unpin> Spliced<S> {
    /// The stream, what it says first, and where to put what comes after `ahead`.
    fn later(ahead: Bytes) -> Later<S> {
        let ((flight, said), (sender, rest)) = (oneshot::channel(), oneshot::channel());
        let rest = Rest::Awaited { written: Vec::new(), flight: Some(flight), rest };
        (Self { ahead, rest }, said, sender)
    }

    /// The stream itself, when it is there.
    fn poll_here(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<&mut S>> {
        if let Rest::Awaited { written, flight, rest } = &mut self.rest {
            if let Some(flight) = flight.take() {
                let _ = flight.send(std::mem::take(written));
            }
            let (ahead, stream) =
                ready!(Pin::new(rest).poll(cx)).map_err(|_| io::ErrorKind::UnexpectedEof)?;
            *self = Self { ahead, rest: Rest::Here(stream) };
        }
        match &mut self.rest {
            Rest::Here(stream) => Poll::Ready(Ok(stream)),
            Rest::Awaited { .. } => Poll::Pending,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Spliced<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() {
            ready!(self.poll_here(cx))?;
        }
        if !self.ahead.is_empty() {
            let length = self.ahead.len().min(buf.remaining());
            buf.put_slice(&self.ahead[..length]);
            self.ahead.advance(length);
            return Poll::Ready(Ok(()));
        }
        Pin::new(ready!(self.poll_here(cx))?).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Spliced<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if let Rest::Awaited { written, flight: Some(_), .. } = &mut self.rest {
            written.extend_from_slice(buf);
            return Poll::Ready(Ok(buf.len()));
        }
        Pin::new(ready!(self.poll_here(cx))?).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.rest {
            Rest::Here(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Rest::Awaited { .. } => self.poll_write(cx, bufs.first().map_or(&[], |buf| buf)),
        }
    }

    fn is_write_vectored(&self) -> bool {
        matches!(&self.rest, Rest::Here(stream) if stream.is_write_vectored())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.rest {
            Rest::Here(stream) => Pin::new(stream).poll_flush(cx),
            Rest::Awaited { .. } => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.rest {
            Rest::Here(stream) => Pin::new(stream).poll_shutdown(cx),
            Rest::Awaited { .. } => Poll::Ready(Ok(())),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn the_beginning_travels_apart_and_the_rest_follows() {
        let (stream, flight, rest) = Spliced::later(Bytes::from_static(b"hello"));
        let end = tokio::spawn(async move {
            let mut stream = stream;
            let mut read = [0; 5];
            stream.read_exact(&mut read).await.expect("what is there");
            stream.write_all(b"first").await.expect("writes");
            stream.write_all(b" flight").await.expect("writes");
            stream.flush().await.expect("flushes");
            let mut more = [0; 8];
            stream.read_exact(&mut more).await.expect("what comes later");
            stream.write_all(b"later").await.expect("writes");
            (read, more)
        });
        assert_eq!(flight.await.expect("a flight"), b"first flight");
        let (leg, mut other) = duplex(64);
        other.write_all(b"leg").await.expect("writes");
        rest.send((Bytes::from_static(b"ahead"), leg)).expect("is awaited");
        assert_eq!(end.await.expect("ends"), (*b"hello", *b"aheadleg"));
        let mut rest = [0; 5];
        other.read_exact(&mut rest).await.expect("reads");
        assert_eq!(&rest, b"later");
    }

    #[tokio::test]
    async fn without_a_leg_it_ends() {
        let (mut stream, flight, rest) = Spliced::<tokio::io::DuplexStream>::later(Bytes::new());
        drop(rest);
        let error = stream.read_u8().await.expect_err("there is nothing to read");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(flight.await.expect("an empty one"), b"");
    }
}
