//! The head of an HTTP/1.1 message (RFC 9112 section 2.1), read from a connection that goes on as something else.

use std::io;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

/// The longest head that is read.
pub(crate) const MAX_HEAD: usize = 16 * 1024;

/// Reads up to the empty line, and not a byte more: what follows comes from the server.
pub(crate) async fn read_head(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    const END: &[u8] = b"\r\n\r\n";
    let mut head = Vec::new();
    let mut peeked = [0; 2048];
    while head.len() < MAX_HEAD {
        let count = stream.peek(&mut peeked).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let before = head.len();
        head.extend_from_slice(&peeked[..count]);
        let from = before.saturating_sub(END.len() - 1);
        let end =
            head[from..].windows(END.len()).position(|four| four == END).map(|at| from + at + END.len());
        head.truncate(end.unwrap_or(head.len()));
        stream.read_exact(&mut peeked[..head.len() - before]).await?;
        if end.is_some() {
            return Ok(head);
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "too long for the head of an HTTP message"))
}
