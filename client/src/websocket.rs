//! A byte stream in binary WebSocket messages (RFC 6455). Where the messages are cut means nothing.
//!
//! There is no half-close: a Close frame ends both directions (RFC 6455 section 5.5.1). What was sent before it
//! arrives.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

/// The longest message, in bytes: a TLS record. What a relay holds for each of thousands of legs is a few of them.
const MAX_MESSAGE: usize = 16 * 1024;
/// What is taken from the connection at once.
const READ_BUFFER: usize = 8 * 1024;

/// A WebSocket as a byte stream.
#[derive(Debug)]
pub struct WebSocketBytes<S> {
    socket: WebSocketStream<S>,
    /// Of the message that came last: what was not read yet.
    rest: Bytes,
    /// This end has said that it is done.
    closed: bool,
}

/// Limits of a WebSocket under a [`WebSocketBytes`].
pub fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE))
        .read_buffer_size(READ_BUFFER)
        // What is written goes out; the stream under it has a buffer of its own.
        .write_buffer_size(0)
        .max_write_buffer_size(2 * MAX_MESSAGE)
}

impl<S> WebSocketBytes<S> {
    /// The byte stream in `socket`, which has [`config`].
    pub fn new(socket: WebSocketStream<S>) -> Self {
        Self { socket, rest: Bytes::new(), closed: false }
    }

    /// The stream under the WebSocket.
    pub fn get_ref(&self) -> &S
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.socket.get_ref()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> WebSocketBytes<S> {
    fn send(&mut self, cx: &mut Context<'_>, message: impl FnOnce() -> Message) -> Poll<io::Result<()>> {
        let mut socket = Pin::new(&mut self.socket);
        ready!(socket.as_mut().poll_ready(cx)).map_err(into_io)?;
        Poll::Ready(socket.start_send(message()).map_err(into_io))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for WebSocketBytes<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(Pin::new(&mut self.socket).poll_next(cx)) {
                Some(Ok(Message::Binary(bytes))) => self.rest = bytes,
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                Some(Ok(Message::Text(_))) => return Poll::Ready(Err(io::ErrorKind::InvalidData.into())),
                Some(Ok(Message::Close(_)) | Err(WsError::ConnectionClosed | WsError::AlreadyClosed))
                | None => {
                    return Poll::Ready(Ok(()));
                }
                Some(Err(error)) => return Poll::Ready(Err(into_io(error))),
            }
        }
        let count = self.rest.len().min(buf.remaining());
        buf.put_slice(&self.rest[..count]);
        self.rest.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for WebSocketBytes<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let count = buf.len().min(MAX_MESSAGE);
        ready!(self.send(cx, || Message::Binary(Bytes::copy_from_slice(&buf[..count]))))?;
        Poll::Ready(Ok(count))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let count = bufs.iter().map(|buf| buf.len()).sum::<usize>().min(MAX_MESSAGE);
        let gather = || {
            let mut message = BytesMut::with_capacity(count);
            for buf in bufs {
                let room = count - message.len();
                message.extend_from_slice(&buf[..buf.len().min(room)]);
            }
            Message::Binary(message.freeze())
        };
        ready!(self.send(cx, gather))?;
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx).map_err(into_io)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.closed {
            over(ready!(self.send(cx, || Message::Close(None))))?;
            self.closed = true;
        }
        Poll::Ready(over(ready!(self.poll_flush(cx))))
    }
}

/// That it is closed already is no failure to close it.
fn over(closed: io::Result<()>) -> io::Result<()> {
    closed.or_else(|error| if error.kind() == io::ErrorKind::BrokenPipe { Ok(()) } else { Err(error) })
}

/// Who ends the connection without a Close frame does what a lost one does.
fn into_io(error: WsError) -> io::Error {
    match error {
        WsError::Io(error) => error,
        WsError::ConnectionClosed
        | WsError::AlreadyClosed
        | WsError::Protocol(ProtocolError::SendAfterClosing) => io::ErrorKind::BrokenPipe.into(),
        WsError::Protocol(ProtocolError::ResetWithoutClosingHandshake) => io::ErrorKind::UnexpectedEof.into(),
        error => io::Error::new(io::ErrorKind::InvalidData, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
    use tokio_tungstenite::tungstenite::protocol::Role;

    async fn ends() -> (WebSocketBytes<DuplexStream>, WebSocketBytes<DuplexStream>) {
        let (one, other) = tokio::io::duplex(1000);
        let one = WebSocketStream::from_raw_socket(one, Role::Client, Some(config())).await;
        let other = WebSocketStream::from_raw_socket(other, Role::Server, Some(config())).await;
        (WebSocketBytes::new(one), WebSocketBytes::new(other))
    }

    #[tokio::test]
    async fn bytes_come_as_they_went_and_one_end_ends_both() {
        let (mut one, mut other) = ends().await;
        let bytes: Vec<u8> = (0..500_000_u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
        let sending = async {
            let mut back = [0; 5];
            one.read_exact(&mut back).await.expect("reads");
            one.write_all(&bytes).await.expect("writes");
            one.shutdown().await.expect("closes");
            assert_eq!(one.read(&mut [0; 10]).await.expect("the end"), 0);
            back
        };
        let receiving = async {
            other.write_all(b"early").await.expect("writes");
            other.flush().await.expect("flushes");
            let mut got = Vec::new();
            other.read_to_end(&mut got).await.expect("reads");
            other.shutdown().await.expect("closes");
            assert!(other.write(b"late").await.is_err());
            got
        };
        let (back, got) = tokio::join!(sending, receiving);
        assert!(got == bytes, "{} bytes", got.len());
        assert_eq!(&back, b"early");
    }

    #[tokio::test]
    async fn many_slices_are_one_message() {
        let (mut one, mut other) = ends().await;
        let pieces = [vec![1; 10_000], vec![2; 10_000], vec![3; 10]];
        let slices: Vec<_> = pieces.iter().map(|piece| io::IoSlice::new(piece)).collect();
        let writing = async {
            let written = one.write_vectored(&slices).await.expect("writes");
            one.flush().await.expect("flushes");
            written
        };
        let mut got = vec![0; MAX_MESSAGE];
        let (written, read) = tokio::join!(writing, other.read_exact(&mut got));
        assert_eq!((written, read.expect("reads")), (MAX_MESSAGE, MAX_MESSAGE));
        assert!(got[..10_000].iter().all(|b| *b == 1) && got[10_000..].iter().all(|b| *b == 2));
    }

    #[tokio::test]
    async fn what_ends_without_a_close_frame_is_an_error() {
        let (one, mut other) = ends().await;
        drop(one);
        let error = other.read(&mut [0; 10]).await.expect_err("lost");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
