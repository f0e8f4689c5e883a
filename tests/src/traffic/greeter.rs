//! A service that speaks first, as SSH does.

use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;

use crate::lab::Host;

/// Says `hello` and a line's end to whoever connects on the host's loopback, and ends; its port.
pub async fn greeter(host: &Host) -> anyhow::Result<u16> {
    let listener = host.task(TcpListener::bind("127.0.0.1:0"))?.await??;
    let port = listener.local_addr()?.port();
    host.task(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(b"hello\n").await;
        }
    })?;
    Ok(port)
}
