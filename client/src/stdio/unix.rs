//! Pipes and sockets are read and written without a thread in between; terminals and files go through
//! tokio's threads.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};
use rustix::net::SocketType;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;

use super::{Reader, Writer};

/// Standard input and output.
pub(super) fn streams() -> (Reader, Writer) {
    (stdin(), stdout())
}

fn stdin() -> Reader {
    match open(std::io::stdin().as_fd(), |fd| {
        pipe::Receiver::from_owned_fd(fd).map(|pipe| Box::new(pipe) as Reader)
    }) {
        Ok(Some((reader, restore))) => Box::new(Input { reader, _restore: restore }),
        Ok(None) | Err(_) => Box::new(tokio::io::stdin()),
    }
}

/// Shutting it down closes it for good, so that its reader sees the end of file.
fn stdout() -> Writer {
    match open(std::io::stdout().as_fd(), |fd| {
        pipe::Sender::from_owned_fd(fd).map(|pipe| Box::new(pipe) as Writer)
    }) {
        Ok(Some((writer, restore))) => Box::new(Output { writer: Some(writer), restore: Some(restore) }),
        Ok(None) | Err(_) => Box::new(Output { writer: Some(Box::new(tokio::io::stdout())), restore: None }),
    }
}

/// A pipe or stream socket that never blocks, and its flags of before. `None`: neither of the two.
fn open<T>(
    fd: BorrowedFd<'_>,
    pipe: impl FnOnce(OwnedFd) -> io::Result<T>,
) -> io::Result<Option<(T, Restore)>>
where
    T: FromSocket,
{
    let restore = Restore { fd: fd.try_clone_to_owned()?, flags: fcntl_getfl(fd)? };
    let own = fd.try_clone_to_owned()?;
    let opened = match FileType::from_raw_mode(fstat(fd)?.st_mode) {
        FileType::Fifo => pipe(own)?,
        FileType::Socket if rustix::net::sockopt::socket_type(fd)? == SocketType::STREAM => {
            let socket = std::os::unix::net::UnixStream::from(own);
            socket.set_nonblocking(true)?;
            T::from_socket(UnixStream::from_std(socket)?)
        }
        _ => return Ok(None),
    };
    Ok(Some((opened, restore)))
}

trait FromSocket {
    fn from_socket(socket: UnixStream) -> Self;
}

impl FromSocket for Reader {
    fn from_socket(socket: UnixStream) -> Self {
        Box::new(socket)
    }
}

impl FromSocket for Writer {
    fn from_socket(socket: UnixStream) -> Self {
        Box::new(socket)
    }
}

/// Other processes may use the same pipe before and after: they do not expect it to be non-blocking.
struct Restore {
    fd: OwnedFd,
    flags: OFlags,
}

impl Drop for Restore {
    fn drop(&mut self) {
        let _ = fcntl_setfl(&self.fd, self.flags);
    }
}

struct Input {
    reader: Reader,
    _restore: Restore,
}

impl AsyncRead for Input {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reader).poll_read(cx, buf)
    }
}

struct Output {
    writer: Option<Writer>,
    restore: Option<Restore>,
}

impl Output {
    fn poll<T>(
        mut self: Pin<&mut Self>,
        work: impl FnOnce(Pin<&mut Writer>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match &mut self.writer {
            Some(writer) => work(Pin::new(writer)),
            None => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }
}

impl AsyncWrite for Output {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll(|writer| writer.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll(|writer| writer.poll_write_vectored(cx, bufs))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(|writer| writer.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.writer.is_some() {
            let result = ready!(self.as_mut().poll(|writer| writer.poll_shutdown(cx)));
            // The flags first, while there is a descriptor left; then all descriptors of the pipe.
            self.restore = None;
            self.writer = None;
            rustix::stdio::dup2_stdout(File::options().write(true).open("/dev/null")?)?;
            return Poll::Ready(result);
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn flags(fd: &impl AsFd) -> OFlags {
        fcntl_getfl(fd).expect("flags")
    }

    #[tokio::test]
    async fn a_pipe_does_not_block_while_it_is_ours_and_does_again_afterwards() {
        let (reader, mut writer) = io::pipe().expect("pipe");
        let before = flags(&reader);
        let opened =
            open(reader.as_fd(), |fd| pipe::Receiver::from_owned_fd(fd).map(|pipe| Box::new(pipe) as Reader));
        let (mut ours, restore) = opened.expect("opens").expect("is a pipe");
        assert!(flags(&reader).contains(OFlags::NONBLOCK));
        writer.write_all(b"\0binary\xff\n").expect("writes");
        let mut bytes = [0; 9];
        ours.read_exact(&mut bytes).await.expect("reads");
        assert_eq!(&bytes, b"\0binary\xff\n");
        drop(writer);
        assert_eq!(ours.read(&mut bytes).await.expect("reads"), 0);
        drop((ours, restore));
        assert_eq!(flags(&reader), before);
    }

    #[tokio::test]
    async fn a_socket_is_read_and_written_too() {
        let (near, mut far) = std::os::unix::net::UnixStream::pair().expect("pair");
        let opened = open(near.as_fd(), |_| Err::<Writer, _>(io::ErrorKind::InvalidInput.into()));
        let (mut ours, _restore) = opened.expect("opens").expect("is a socket");
        ours.write_all(b"there").await.expect("writes");
        ours.shutdown().await.expect("ends");
        let mut bytes = Vec::new();
        far.read_to_end(&mut bytes).expect("reads");
        assert_eq!(bytes, b"there");
    }

    #[tokio::test]
    async fn a_file_goes_another_way() {
        let file = File::open("/dev/null").expect("is there");
        let opened =
            open(file.as_fd(), |fd| pipe::Receiver::from_owned_fd(fd).map(|pipe| Box::new(pipe) as Reader));
        assert!(opened.expect("asks").is_none());
    }
}
