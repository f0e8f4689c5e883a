//! A web server with large files that need no disk.

use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpSocket, TcpStream};

use super::Noise;
use crate::lab::Host;

/// Serves `/` (a short text) and `/SEED/BYTES` (that much of that [`Noise`]) over HTTP/1.1 with
/// connections that are kept. It ends with the lab.
pub struct HttpServer {
    /// The port, on all of the host's addresses.
    pub port: u16,
}

/// A connection that asks nothing for so long is closed.
const IDLE: Duration = Duration::from_secs(60);

impl HttpServer {
    /// Listens on all addresses of `host`.
    pub async fn start(host: &Host) -> anyhow::Result<Self> {
        let (port, listening) = tokio::sync::oneshot::channel();
        host.task(async move {
            let socket = TcpSocket::new_v4()?;
            socket.bind(([0, 0, 0, 0], 0).into())?;
            // Deep enough for a load generator that opens all its connections at once.
            let listener = socket.listen(1024)?;
            let _ = port.send(listener.local_addr()?.port());
            loop {
                let (stream, _) = listener.accept().await?;
                tokio::spawn(serve(stream));
            }
            #[allow(unreachable_code)]
            anyhow::Ok(())
        })?;
        Ok(Self { port: listening.await? })
    }
}

async fn serve(stream: TcpStream) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let (from, mut to) = stream.into_split();
    let mut lines = BufReader::new(from).lines();
    while let Ok(Ok(Some(request))) = tokio::time::timeout(IDLE, lines.next_line()).await {
        while lines.next_line().await?.is_some_and(|line| !line.is_empty()) {}
        let path = request.split(' ').nth(1).unwrap_or_default();
        match path.trim_start_matches('/').split_once('/') {
            Some((seed, bytes)) => {
                let (seed, bytes): (u64, u64) = (seed.parse()?, bytes.parse()?);
                to.write_all(head("200 OK", bytes).as_bytes()).await?;
                Noise::new(seed).send(&mut to, bytes).await?;
            }
            None if path == "/" => to.write_all((head("200 OK", 6) + "adit\r\n").as_bytes()).await?,
            None => to.write_all(head("404 Not Found", 0).as_bytes()).await?,
        }
    }
    Ok(())
}

fn head(status: &str, bytes: u64) -> String {
    format!("HTTP/1.1 {status}\r\nContent-Length: {bytes}\r\nContent-Type: application/octet-stream\r\n\r\n")
}
