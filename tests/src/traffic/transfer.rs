//! Transfers of known bytes over one TCP connection, hashed at both ends.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use aws_lc_rs::digest::{Context, SHA256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::noise::{Noise, hex, sha256};
use crate::lab::Host;
use crate::within;

/// Serves [`download`] and [`upload`]. It ends with the lab.
pub struct TransferServer {
    /// The port, on all of the host's addresses.
    pub port: u16,
}

/// First byte of a request; the length (8 bytes) and, for a download, the seed (8 bytes) follow.
const DOWNLOAD: u8 = b'D';
const UPLOAD: u8 = b'U';

impl TransferServer {
    /// Listens on all addresses of `host`.
    pub async fn start(host: &Host) -> anyhow::Result<Self> {
        let (port, listening) = tokio::sync::oneshot::channel();
        host.task(async move {
            let listener = TcpListener::bind("0.0.0.0:0").await?;
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

/// Downloads `bytes` through `local`, a TCP port on `host` that leads to a [`TransferServer`]; how
/// long it took. Fails if a byte is wrong, missing or late.
pub async fn download(
    host: &Host,
    local: SocketAddr,
    seed: u64,
    bytes: u64,
    deadline: Duration,
) -> anyhow::Result<Duration> {
    let (took, got, hash) = host
        .task(within(deadline, "a download", async move {
            let start = Instant::now();
            let mut stream = TcpStream::connect(local).await?;
            stream.write_u8(DOWNLOAD).await?;
            stream.write_u64(bytes).await?;
            stream.write_u64(seed).await?;
            let (got, hash) = hash_to_end(&mut stream, bytes).await?;
            Ok((start.elapsed(), got, hash))
        }))?
        .await??;
    // Not on the host's own thread, where ticks may be running.
    ensure!(got == bytes, "{got} of {bytes} bytes arrived");
    ensure!(hash == sha256(seed, bytes), "the bytes are not those sent: SHA-256 differs");
    Ok(took)
}

/// Uploads `bytes` through `local`, as [`download`] does the other way.
pub async fn upload(
    host: &Host,
    local: SocketAddr,
    seed: u64,
    bytes: u64,
    deadline: Duration,
) -> anyhow::Result<Duration> {
    let (took, hash) = host
        .task(within(deadline, "an upload", async move {
            let start = Instant::now();
            let mut stream = TcpStream::connect(local).await?;
            stream.write_u8(UPLOAD).await?;
            stream.write_u64(bytes).await?;
            Noise::new(seed).send(&mut stream, bytes).await?;
            stream.shutdown().await?;
            let mut hash = String::new();
            stream.read_to_string(&mut hash).await?;
            Ok((start.elapsed(), hash))
        }))?
        .await??;
    ensure!(hash == sha256(seed, bytes), "the bytes are not those sent: SHA-256 differs ({hash})");
    Ok(took)
}

/// Asks for `bytes` as [`download`] does, and never reads one. The connection is open until it is
/// dropped.
pub async fn stall(host: &Host, local: SocketAddr, bytes: u64) -> anyhow::Result<TcpStream> {
    host.task(async move {
        let mut stream = TcpStream::connect(local).await?;
        stream.write_u8(DOWNLOAD).await?;
        stream.write_u64(bytes).await?;
        stream.write_u64(0).await?;
        Ok(stream)
    })?
    .await?
}

async fn serve(mut stream: TcpStream) -> anyhow::Result<()> {
    match stream.read_u8().await? {
        DOWNLOAD => {
            let (bytes, seed) = (stream.read_u64().await?, stream.read_u64().await?);
            Noise::new(seed).send(&mut stream, bytes).await?;
        }
        UPLOAD => {
            let bytes = stream.read_u64().await?;
            let (got, hash) = hash_to_end(&mut stream, bytes).await?;
            let answer = if got == bytes { hash } else { format!("{got} of {bytes} bytes arrived") };
            stream.write_all(answer.as_bytes()).await?;
        }
        other => bail!("unknown request {other}"),
    }
    stream.shutdown().await?;
    Ok(())
}

/// Reads until the end of the stream, or one piece past `most` bytes.
async fn hash_to_end(stream: &mut TcpStream, most: u64) -> anyhow::Result<(u64, String)> {
    let (mut hash, mut buffer, mut got) = (Context::new(&SHA256), vec![0; 64 * 1024], 0);
    while got <= most {
        match stream.read(&mut buffer).await? {
            0 => break,
            length => {
                hash.update(&buffer[..length]);
                got += length as u64;
            }
        }
    }
    Ok((got, hex(&hash.finish())))
}
