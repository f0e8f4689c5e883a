//! A server that says what it hears.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::lab::Host;
use crate::world::PATIENCE;

/// Starts one on `host`'s loopback. It ends with the lab.
pub async fn echo(host: &Host) -> anyhow::Result<SocketAddr> {
    let listener = host.task(TcpListener::bind("127.0.0.1:0"))?.await??;
    let address = listener.local_addr()?;
    host.task(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    })?;
    Ok(address)
}

/// A byte there and back: to be run on the host from where it is sent.
pub async fn echoed(at: SocketAddr) -> anyhow::Result<()> {
    let exchange = async {
        let mut stream = TcpStream::connect(at).await?;
        stream.write_all(b"a").await?;
        anyhow::ensure!(stream.read_u8().await? == b'a');
        Ok(())
    };
    tokio::time::timeout(PATIENCE, exchange).await?
}
