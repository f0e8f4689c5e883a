//! Copies between a local connection and a stream of a tunnel, both ways, in one task.
//!
//! Both directions are polled by the same task and neither is ever dropped while the other goes on: an
//! end of file ends one direction only. What is read locally is never more than what the stream takes,
//! and what is read from the stream is bounded, so back-pressure passes through.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use adit_protocol::frame::ResetCode;
use adit_tunnel::session::LONG_TURN;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_util::io::poll_read_buf;

use crate::tunnel::{StreamError, TunnelStream};

/// Buffer of a connection that has moved little so far; thousands of idle ones cost little.
const SMALL_BUFFER: usize = 8 * 1024;
/// Buffer of one that moves much: a read of it is one frame.
const LARGE_BUFFER: usize = LONG_TURN;
/// Taken from the stream and not written yet, at most; and in how many pieces.
const GATHER: usize = 64 * 1024;
const PIECES: usize = 16;

/// Copies between a TCP connection and a stream until both directions have ended. Returns how the
/// stream broke, if it did: the local end then gets a reset, too, and not an end of file. A local
/// connection that breaks resets the stream.
///
/// # Errors
/// [`StreamError`] says why the stream ended early.
pub async fn copy(mut tcp: TcpStream, mut stream: TunnelStream) -> Result<(), StreamError> {
    let (reader, writer) = tcp.split();
    match copy_halves(reader, writer, &mut stream).await {
        Ok(()) => Ok(()),
        Err(CopyError::Local(_)) => {
            stream.reset(ResetCode::Aborted);
            abort(&tcp);
            Ok(())
        }
        Err(CopyError::Stream(error)) => {
            abort(&tcp);
            Err(error)
        }
    }
}

/// Copies between any reader and writer and a stream until both directions have ended. At the stream's
/// end of file the writer is shut down.
///
/// # Errors
/// [`CopyError`]; the stream is of no more use then.
pub async fn copy_halves<R, W>(reader: R, writer: W, stream: &mut TunnelStream) -> Result<(), CopyError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut copy = Copy {
        stream,
        up: Up { reader, buffer: BytesMut::new(), size: SMALL_BUFFER, done: false },
        down: Down {
            writer,
            pieces: [const { Bytes::new() }; PIECES],
            first: 0,
            count: 0,
            unflushed: false,
            state: DownState::Open,
        },
    };
    poll_fn(|cx| copy.poll(cx)).await
}

/// Closes a connection such that the other side sees a reset (RFC 9293 section 3.5) and not an orderly end.
pub fn abort(tcp: &TcpStream) {
    let _ = SockRef::from(tcp).set_linger(Some(std::time::Duration::ZERO));
}

/// Which side broke.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The local connection.
    #[error(transparent)]
    Local(#[from] io::Error),
    /// The stream.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

struct Copy<'a, R, W> {
    stream: &'a mut TunnelStream,
    up: Up<R>,
    down: Down<W>,
}

/// From the local reader to the stream.
struct Up<R> {
    reader: R,
    buffer: BytesMut,
    size: usize,
    done: bool,
}

/// From the stream to the local writer.
struct Down<W> {
    writer: W,
    /// What was taken from the stream: `count` pieces from `first` on.
    pieces: [Bytes; PIECES],
    first: usize,
    count: usize,
    unflushed: bool,
    state: DownState,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum DownState {
    Open,
    /// The stream has ended; what was taken is still to be written.
    Ended,
    Done,
}

/// Whether a direction got any further.
type Step = Result<Poll<()>, CopyError>;

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Copy<'_, R, W> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), CopyError>> {
        // Each direction gets its turn; tokio's budget of the task ends the loop when both run on and on.
        loop {
            let up = self.up.step(self.stream, cx)?;
            let down = self.down.step(self.stream, cx)?;
            if self.up.done && self.down.state == DownState::Done {
                return Poll::Ready(Ok(()));
            }
            if up.is_pending() && down.is_pending() {
                return self.watch(cx);
            }
        }
    }

    /// Nothing to do: but a reset must end both directions, also while each waits for the local side.
    fn watch(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), CopyError>> {
        if pin!(self.stream.ended()).poll(cx).is_pending() {
            return Poll::Pending;
        }
        match self.stream.poll_writable(cx) {
            Poll::Ready(Err(error @ StreamError::Reset(_))) => Poll::Ready(Err(error.into())),
            // An orderly end at the engine: what was taken is still to be written.
            _ if self.up.done => Poll::Pending,
            _ => Poll::Ready(Err(StreamError::Closed.into())),
        }
    }
}

impl<R: AsyncRead + Unpin> Up<R> {
    fn step(&mut self, stream: &mut TunnelStream, cx: &mut Context<'_>) -> Step {
        if self.done {
            return Ok(Poll::Pending);
        }
        let room = match stream.poll_writable(cx) {
            Poll::Ready(room) => room?,
            Poll::Pending => return Ok(Poll::Pending),
        };
        if self.buffer.capacity() < self.size / 4 {
            // Takes the old memory again where the stream does not need it any more. The rest is left: small
            // system calls cost more.
            self.buffer.reserve(self.size);
        }
        let most = room.min(self.buffer.capacity()).min(LARGE_BUFFER);
        let mut limited = (&mut self.buffer).limit(most);
        match poll_read_buf(Pin::new(&mut self.reader), cx, &mut limited) {
            Poll::Pending => Ok(Poll::Pending),
            Poll::Ready(Ok(0)) => {
                stream.finish();
                (self.done, self.buffer) = (true, BytesMut::new());
                Ok(Poll::Ready(()))
            }
            Poll::Ready(Ok(read)) => {
                if read >= SMALL_BUFFER / 2 {
                    self.size = LARGE_BUFFER;
                }
                stream.write_bytes(self.buffer.split().freeze())?;
                Ok(Poll::Ready(()))
            }
            Poll::Ready(Err(error)) => Err(error.into()),
        }
    }
}

impl<W: AsyncWrite + Unpin> Down<W> {
    fn step(&mut self, stream: &mut TunnelStream, cx: &mut Context<'_>) -> Step {
        if self.count == 0 && self.state == DownState::Open {
            self.take(stream, cx)?;
        }
        if self.count > 0 {
            return self.write(cx);
        }
        match self.state {
            DownState::Open if self.unflushed => {
                if Pin::new(&mut self.writer).poll_flush(cx)?.is_ready() {
                    self.unflushed = false;
                }
                Ok(Poll::Pending)
            }
            DownState::Open | DownState::Done => Ok(Poll::Pending),
            DownState::Ended => match Pin::new(&mut self.writer).poll_shutdown(cx) {
                Poll::Pending => Ok(Poll::Pending),
                Poll::Ready(result) => {
                    self.state = DownState::Done;
                    // The local side may have closed already; everything was written.
                    match result {
                        Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error.into()),
                        _ => Ok(Poll::Ready(())),
                    }
                }
            },
        }
    }

    /// Takes what the stream has, up to a bound.
    fn take(&mut self, stream: &mut TunnelStream, cx: &mut Context<'_>) -> Result<(), CopyError> {
        (self.first, self.count) = (0, 0);
        let mut room = GATHER;
        while self.count < PIECES && room > 0 {
            let Poll::Ready(piece) = stream.poll_read_chunk(cx, room) else { return Ok(()) };
            let piece = piece?;
            if piece.is_empty() {
                self.state = DownState::Ended;
                return Ok(());
            }
            room -= piece.len();
            self.pieces[self.count] = piece;
            self.count += 1;
        }
        Ok(())
    }

    fn write(&mut self, cx: &mut Context<'_>) -> Step {
        let pieces = &self.pieces[self.first..self.first + self.count];
        let mut slices = [IoSlice::new(&[]); PIECES];
        for (slice, piece) in slices.iter_mut().zip(pieces) {
            *slice = IoSlice::new(piece);
        }
        let writer = Pin::new(&mut self.writer);
        let poll = match self.count {
            1 => writer.poll_write(cx, &pieces[0]),
            count => writer.poll_write_vectored(cx, &slices[..count]),
        };
        let mut written = match poll {
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(Ok(0)) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
            Poll::Ready(written) => written?,
        };
        self.unflushed = true;
        while written > 0 {
            let piece = &mut self.pieces[self.first];
            let step = written.min(piece.len());
            piece.advance(step);
            written -= step;
            if piece.is_empty() {
                // Lets go of the memory at once.
                *piece = Bytes::new();
                self.first += 1;
                self.count -= 1;
            }
        }
        Ok(Poll::Ready(()))
    }
}
