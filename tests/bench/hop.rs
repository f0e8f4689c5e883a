//! The bare relay: two directions of splice, each through a pipe of its own.

use std::io;
use std::net::Shutdown;

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Bytes of each pipe, as in `relay/src/pool.rs`.
const PIPE: usize = 512 * 1024;

/// Forwards both directions until both have ended or one has failed.
pub(crate) async fn forward(one: TcpStream, other: TcpStream) -> anyhow::Result<()> {
    tokio::try_join!(way(&one, &other), way(&other, &one))?;
    Ok(())
}

async fn way(from: &TcpStream, to: &TcpStream) -> io::Result<()> {
    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    fcntl_setpipe_size(&writer, PIPE)?;
    loop {
        let fill = || Ok(splice(from, None, &writer, None, PIPE, flags)?);
        let mut inside = from.async_io(Interest::READABLE, fill).await?;
        if inside == 0 {
            return SockRef::from(to).shutdown(Shutdown::Write);
        }
        while inside > 0 {
            let drain = || Ok(splice(&reader, None, to, None, inside, flags)?);
            inside -= to.async_io(Interest::WRITABLE, drain).await?;
        }
    }
}
