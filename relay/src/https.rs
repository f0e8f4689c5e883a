//! A relay's HTTPS port: legs of devices whose networks let nothing else out, as WebSockets over TLS.

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use adit_client::dial::tune;
use adit_client::identity::Live;
use adit_client::tls;
use adit_client::websocket::{self, WebSocketBytes};
use adit_protocol::RELAY_PATH;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsStream};

use crate::gate::Visit;
use crate::penalty::Offence;
use crate::server::Relay;
use crate::upgrade::Upgrade;

/// From accepting a connection to its whole request. A silent one is closed within 5 s.
const AUTHENTICATE: Duration = Duration::from_millis(4500);

/// Serves devices with this relay's own certificate until `shutdown`; then closes all that came from `listener`.
/// Dropping the future does the same.
pub async fn serve(
    listener: TcpListener,
    relay: Arc<Relay>,
    identity: Arc<Live>,
    shutdown: impl Future<Output = ()>,
) {
    let mut tasks = JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            (stream, from, visit) = relay.door().accept(&listener) => {
                tune(&stream);
                tasks.spawn(enter(relay.clone(), identity.clone(), stream, from.ip(), visit));
            }
            Some(_) = tasks.join_next() => {}
        }
    }
    tasks.shutdown().await;
}

async fn enter(relay: Arc<Relay>, identity: Arc<Live>, stream: TcpStream, from: IpAddr, mut visit: Visit) {
    let request = tokio::select! {
        request = timeout(AUTHENTICATE, request(&identity, stream)) => request,
        () = visit.driven_out() => return,
    };
    let offence = match request {
        Ok(Ok(Some(upgrade))) => {
            drop(visit);
            return serve_upgrade(relay, upgrade, from).await;
        }
        Ok(Ok(None)) => return,
        Ok(Err(error)) => {
            tracing::debug!(%error, "connection refused");
            Offence::of_handshake(&error)
        }
        Err(_) => Offence::Silent,
    };
    relay.door().offended(from, offence);
}

/// `None`: a device of ours, which then wanted nothing.
async fn request(identity: &Live, stream: TcpStream) -> io::Result<Option<Upgrade<TlsStream<TcpStream>>>> {
    // The identity may have been renewed since the last one.
    let config = tls::control_server(&identity.get()).map_err(io::Error::other)?;
    let stream = TlsAcceptor::from(Arc::new(config)).accept(stream).await?;
    Ok(Upgrade::read(TlsStream::from(stream)).await.ok())
}

/// Takes a leg from a device that has shown its certificate; everything else is not there.
pub async fn serve_upgrade(relay: Arc<Relay>, upgrade: Upgrade<TlsStream<TcpStream>>, from: IpAddr) {
    if upgrade.path() != RELAY_PATH {
        let _ = timeout(AUTHENTICATE, upgrade.refuse()).await;
        return;
    }
    if let Ok(Ok(socket)) = timeout(AUTHENTICATE, upgrade.accept(websocket::config())).await {
        relay.handle_web(WebSocketBytes::new(socket), from).await;
    }
}
