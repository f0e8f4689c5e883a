//! What a browser gets on the HTTPS port: nothing is there for it yet, and it is told so. Whoever has no
//! business here learns nothing else either.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_rustls::StartHandshake;

use crate::https::Certificates;

/// The protocol that is spoken with browsers (RFC 7301 section 6).
pub const ALPN_HTTP: &[u8] = b"http/1.1";
/// Longest request that is read.
const MAX_REQUEST: usize = 16 * 1024;
/// For the browser to read the answer and hang up.
const LINGER: Duration = Duration::from_secs(1);
const ANSWER: &[u8] =
    b"HTTP/1.1 404 Not Found\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 18\r\n\
Strict-Transport-Security: max-age=31536000\r\nX-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n\
Connection: close\r\n\r\nNothing is here.\r\n";

/// TLS towards browsers: 1.3 only, and nobody is asked for a certificate.
///
/// # Errors
/// When rustls does not take the configuration.
pub fn config(certificates: Arc<Certificates>) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(adit_client::tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(certificates);
    config.alpn_protocols = vec![ALPN_HTTP.to_vec()];
    Ok(config)
}

/// Serves one connection. The caller sets the deadline.
///
/// # Errors
/// The connection's.
pub async fn serve<S>(hello: StartHandshake<S>, config: Arc<ServerConfig>) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut stream = hello.into_stream(config).await?;
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    loop {
        let count = stream.read(&mut buffer).await?;
        // Only what is new, so that a request in single bytes costs no more than any other.
        let from = request.len().saturating_sub(3);
        request.extend_from_slice(&buffer[..count]);
        if count == 0 || request.len() > MAX_REQUEST {
            return Ok(());
        }
        if request[from..].windows(4).any(|end| end == b"\r\n\r\n") {
            break;
        }
    }
    stream.write_all(ANSWER).await?;
    stream.shutdown().await?;
    let _ = timeout(LINGER, stream.read(&mut buffer)).await;
    Ok(())
}
