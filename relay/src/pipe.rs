//! A kernel pipe through which bytes go from socket to socket without entering this process.

use std::io;
use std::os::fd::OwnedFd;

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Both ends of a pipe, and how many bytes are inside. Because the number is known, a splice that
/// would block is never ambiguous: into an empty pipe it means that the socket has nothing, out of
/// one with bytes in it that the socket takes nothing.
pub(crate) struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
    filled: usize,
    capacity: usize,
}

impl Pipe {
    /// A new pipe of the kernel's default size: 64 KiB, or 8 KiB when the user's quota is used up.
    pub(crate) fn new() -> io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let capacity = fcntl_getpipe_size(&writer)?;
        Ok(Self { reader, writer, filled: 0, capacity })
    }

    /// Asks for at least `bytes` of room.
    ///
    /// # Errors
    /// The kernel refuses when the user's quota is used up; the pipe stays as it was.
    pub(crate) fn grow(&mut self, bytes: usize) -> io::Result<()> {
        self.capacity = fcntl_setpipe_size(&self.writer, bytes)?;
        Ok(())
    }

    /// Room in bytes, were each slot full. A slot holds one fragment of a packet, often less.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes inside.
    pub(crate) fn filled(&self) -> usize {
        self.filled
    }

    /// Takes at most `limit` bytes from the socket; 0 is its end of file.
    pub(crate) fn fill(&mut self, from: &TcpStream, limit: usize) -> io::Result<usize> {
        let count = from.try_io(Interest::READABLE, || {
            Ok(splice(from, None, &self.writer, None, limit, SpliceFlags::NONBLOCK | SpliceFlags::MOVE)?)
        })?;
        self.filled += count;
        Ok(count)
    }

    /// Gives the socket as much as it takes now.
    pub(crate) fn drain(&mut self, to: &TcpStream) -> io::Result<usize> {
        let count = to.try_io(Interest::WRITABLE, || {
            Ok(splice(&self.reader, None, to, None, self.filled, SpliceFlags::NONBLOCK | SpliceFlags::MOVE)?)
        })?;
        self.filled = self.filled.saturating_sub(count);
        Ok(count)
    }
}
