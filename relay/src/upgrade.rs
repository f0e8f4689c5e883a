//! The HTTP request with which a device's WebSocket begins (RFC 6455 section 4). Its path says what it is for.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::machine::TryParse;
use tokio_tungstenite::tungstenite::handshake::server::{create_response, write_response};
use tokio_tungstenite::tungstenite::http::Request;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

/// The longest request that is read: a device's has 200 bytes.
const MAX_REQUEST: usize = 4 * 1024;
const NOT_FOUND: &[u8] = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

/// A device that asks for a WebSocket.
#[derive(Debug)]
pub struct Upgrade<S> {
    stream: S,
    request: Request<()>,
    /// What came behind the request.
    rest: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Upgrade<S> {
    /// Reads the request. The deadline is the caller's.
    ///
    /// # Errors
    /// The stream's; `InvalidData` when that is no request, or a long one.
    pub async fn read(mut stream: S) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        let mut head = Vec::new();
        loop {
            if let Some((length, request)) = Request::try_parse(&head).map_err(|_| invalid())? {
                let rest = head.split_off(length);
                return Ok(Self { stream, request, rest });
            }
            if head.len() >= MAX_REQUEST {
                return Err(invalid());
            }
            if stream.read_buf(&mut head).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// The stream under it.
    pub fn stream_mut(&mut self) -> &mut S {
        &mut self.stream
    }

    /// The path that it asks for.
    pub fn path(&self) -> &str {
        self.request.uri().path()
    }

    /// Takes it: from here on the stream is a WebSocket.
    ///
    /// # Errors
    /// The stream's; `InvalidData` when the request asks for none.
    pub async fn accept(mut self, config: WebSocketConfig) -> io::Result<WebSocketStream<S>> {
        let response = create_response(&self.request)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        let mut head = Vec::new();
        write_response(&mut head, &response).map_err(io::Error::other)?;
        self.stream.write_all(&head).await?;
        self.stream.flush().await?;
        Ok(WebSocketStream::from_partially_read(self.stream, self.rest, Role::Server, Some(config)).await)
    }

    /// Says that nothing is there, and closes.
    ///
    /// # Errors
    /// The stream's.
    pub async fn refuse(mut self) -> io::Result<()> {
        self.stream.write_all(NOT_FOUND).await?;
        self.stream.shutdown().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::{SinkExt, StreamExt};
    use tokio_tungstenite::client_async;
    use tokio_tungstenite::tungstenite::Message;

    #[tokio::test]
    async fn a_websocket_begins_with_its_path_and_loses_no_byte() {
        let (near, far) = tokio::io::duplex(100);
        let client = async {
            let (mut socket, _) = client_async("ws://x/relay", near).await.expect("opens");
            socket.send(Message::binary(vec![7; 300])).await.expect("sends");
        };
        let server = async {
            let upgrade = Upgrade::read(far).await.expect("a request");
            assert_eq!(upgrade.path(), "/relay");
            let mut socket = upgrade.accept(WebSocketConfig::default()).await.expect("opens");
            socket.next().await.expect("a message").expect("whole").into_data()
        };
        let ((), got) = tokio::join!(client, server);
        assert_eq!(got, vec![7; 300]);
    }

    #[tokio::test]
    async fn what_is_no_request_is_refused_and_read_no_further() {
        for bytes in [&b"SSH-2.0-x\r\n\r\n"[..], &[b'x'; 2 * MAX_REQUEST], b"GET / HTTP/1.1\r\nHost"] {
            let (mut near, far) = tokio::io::duplex(3 * MAX_REQUEST);
            near.write_all(bytes).await.expect("writes");
            drop(near);
            assert!(Upgrade::read(far).await.is_err());
        }
        let (mut near, far) = tokio::io::duplex(1000);
        near.write_all(b"GET /control HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("writes");
        let upgrade = Upgrade::read(far).await.expect("a request");
        let error = upgrade.accept(WebSocketConfig::default()).await.expect_err("no WebSocket");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
