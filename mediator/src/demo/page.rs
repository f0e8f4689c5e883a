//! The web page on the agent's side, and a check that what goes through the tunnel comes back.

use std::net::SocketAddr;

use aws_lc_rs::digest::{SHA256, digest};
use axum::Router;
use axum::body::Body;
use axum::response::Html;
use axum::routing::{get, post};
use data_encoding::HEXLOWER;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::Anything;

/// A web server that ends with its handle.
pub(super) struct Page {
    address: SocketAddr,
    task: JoinHandle<std::io::Result<()>>,
}

impl Page {
    pub(super) async fn start() -> Result<Self, Anything> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let router = Router::new()
            .route("/", get(async || Html(include_str!("page.html"))))
            .route("/echo", post(async |body: Body| body));
        let task = tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(Self { address, task })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Random bytes, new for each run.
pub(super) fn sample(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    rand::Rng::fill_bytes(&mut rand::rng(), &mut bytes);
    bytes
}

/// Sends `sample` through the tunnel to `/echo` and compares what comes back. Returns its SHA-256.
pub(super) async fn exchange(local: SocketAddr, sample: &[u8]) -> Result<String, Anything> {
    let mut stream = TcpStream::connect(local).await?;
    let (mut from, mut to) = stream.split();
    let length = sample.len();
    let head =
        format!("POST /echo HTTP/1.1\r\nHost: demo\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    let send = async {
        to.write_all(head.as_bytes()).await?;
        to.write_all(sample).await
    };
    let mut answer = Vec::with_capacity(length + length / 8);
    let (sent, received) = tokio::join!(send, from.read_to_end(&mut answer));
    sent?;
    received?;
    let head = answer.windows(4).position(|four| four == b"\r\n\r\n").map_or(answer.len(), |at| at + 4);
    let (head, body) = answer.split_at(head);
    let head = String::from_utf8_lossy(head).to_ascii_lowercase();
    let body = if head.contains("transfer-encoding: chunked") { join_chunks(body) } else { body.to_vec() };
    let hash = |bytes: &[u8]| HEXLOWER.encode(digest(&SHA256, bytes).as_ref());
    let (there, back) = (hash(sample), hash(&body));
    if there != back {
        let (len, want) = (body.len(), sample.len());
        return Err(Anything::from(format!(
            "{len} bytes of {want} came back, SHA-256 {back} and not {there}"
        )));
    }
    Ok(there)
}

/// Bodies of RFC 9112 section 7.1, as far as they are well-formed.
fn join_chunks(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::with_capacity(rest.len());
    while let Some(at) = rest.windows(2).position(|two| two == b"\r\n") {
        let size =
            std::str::from_utf8(&rest[..at]).ok().and_then(|text| usize::from_str_radix(text, 16).ok());
        let Some(chunk) = size.filter(|size| *size > 0).and_then(|size| rest.get(at + 2..at + 2 + size))
        else {
            break;
        };
        body.extend_from_slice(chunk);
        rest = rest.get(at + 4 + chunk.len()..).unwrap_or_default();
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_joined() {
        assert_eq!(join_chunks(b"3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n"), b"abc0123456789");
        assert_eq!(join_chunks(b"zz\r\nabc"), b"");
    }

    #[tokio::test]
    async fn what_is_sent_comes_back() {
        let page = Page::start().await.expect("starts");
        let sample = sample(300_000);
        let hash = exchange(page.address(), &sample).await.expect("equal");
        assert_eq!(hash, HEXLOWER.encode(digest(&SHA256, &sample).as_ref()));
    }
}
