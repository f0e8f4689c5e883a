//! A relay's HTTPS port: legs of devices whose networks let nothing else out, as WebSockets over TLS; and browsers.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use adit_client::dial::tune;
use adit_client::identity::Live;
use adit_client::tls;
use adit_client::websocket::{self, WebSocketBytes};
use adit_protocol::{ALPN_CONTROL, RELAY_PATH};
use rustls::server::Acceptor;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::{LazyConfigAcceptor, StartHandshake, TlsStream, server};

use crate::gate::Visit;
use crate::penalty::Offence;
use crate::server::Relay;
use crate::upgrade::Upgrade;
use crate::web::Web;

/// From accepting a connection to its certificate. A silent one is closed within 5 s.
const AUTHENTICATE: Duration = Duration::from_millis(4500);
/// For a device's request, and for the answer to it, each.
const REQUEST: Duration = Duration::from_secs(5);
/// For a refused device to read the alert and hang up.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 16 * 1024;
/// Ciphertext that a leg which takes nothing may have waiting, in bytes: a record.
const SEND_BUFFER: usize = 16 * 1024;

/// Serves devices with this relay's own certificate, and browsers with `web`, until `shutdown`; then closes all that came from `listener`.
/// Dropping the future does the same.
pub async fn serve(
    listener: TcpListener,
    relay: Arc<Relay>,
    identity: Arc<Live>,
    web: Option<Arc<Web>>,
    shutdown: impl Future<Output = ()>,
) {
    let mut tasks = JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            (stream, from, visit) = relay.door().accept(&listener) => {
                tune(&stream);
                let web = web.clone();
                tasks.spawn(enter(relay.clone(), identity.clone(), web, stream, from, visit));
            }
            Some(_) = tasks.join_next() => {}
        }
    }
    tasks.shutdown().await;
}

async fn enter(
    relay: Arc<Relay>,
    identity: Arc<Live>,
    web: Option<Arc<Web>>,
    stream: TcpStream,
    from: SocketAddr,
    mut visit: Visit,
) {
    let shown = tokio::select! {
        shown = timeout(AUTHENTICATE, handshake(&identity, stream)) => shown,
        () = visit.driven_out() => return,
    };
    let offence = match shown {
        Ok(Ok(Shown::Device(stream))) => {
            // It has shown who it is: from here on nothing is an offence.
            let request = tokio::select! {
                request = timeout(REQUEST, Upgrade::read(TlsStream::from(*stream))) => request,
                () = visit.driven_out() => return,
            };
            if let Ok(Ok(upgrade)) = request {
                serve_upgrade(relay, upgrade, visit).await;
            }
            return;
        }
        // A browser, or somebody's check whether the port answers.
        Ok(Ok(Shown::Other(hello))) => match web {
            Some(web) if web.serve(*hello, from, visit).await => return,
            _ => Offence::Left,
        },
        Ok(Err(error)) => {
            tracing::debug!(%error, "connection refused");
            Offence::of_handshake(&error)
        }
        Err(_) => Offence::Silent,
    };
    relay.door().offended(from.ip(), offence);
}

/// Who is there.
enum Shown {
    /// A device of the organisation.
    Device(Box<server::TlsStream<TcpStream>>),
    /// Somebody who wants something else than devices do.
    Other(Box<StartHandshake<TcpStream>>),
}

async fn handshake(identity: &Live, stream: TcpStream) -> io::Result<Shown> {
    let hello = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
    let ours =
        hello.client_hello().alpn().is_some_and(|mut offered| offered.any(|alpn| alpn == ALPN_CONTROL));
    if !ours {
        return Ok(Shown::Other(Box::new(hello)));
    }
    // The identity may have been renewed since the last one.
    let config = tls::control_server(&identity.get()).map_err(io::Error::other)?;
    match hello.into_stream(Arc::new(config)).into_fallible().await {
        Ok(stream) => Ok(Shown::Device(Box::new(stream))),
        Err((error, stream)) => {
            linger(stream).await;
            Err(error)
        }
    }
}

/// A device that is refused has sent more already. Closing with that unread would be a reset, and the
/// device would never read the alert that says why.
pub async fn linger(mut stream: TcpStream) {
    let drained = async {
        let mut left = LINGER_BYTES;
        let mut buffer = [0; 1024];
        stream.shutdown().await?;
        while left > 0 {
            match stream.read(&mut buffer).await? {
                0 => break,
                count => left = left.saturating_sub(count),
            }
        }
        io::Result::Ok(())
    };
    let _ = timeout(LINGER, drained).await;
}

/// Takes a leg from a device that has shown its certificate; everything else is not there. It is one of the crowd at
/// the door until it has shown its ticket.
pub async fn serve_upgrade(relay: Arc<Relay>, mut upgrade: Upgrade<TlsStream<TcpStream>>, visit: Visit) {
    if upgrade.path() != RELAY_PATH {
        let _ = timeout(REQUEST, upgrade.refuse()).await;
        return;
    }
    if let TlsStream::Server(stream) = upgrade.stream_mut() {
        stream.get_mut().1.set_buffer_limit(Some(SEND_BUFFER));
    }
    if let Ok(Ok(socket)) = timeout(REQUEST, upgrade.accept(websocket::config())).await {
        relay.handle_web(WebSocketBytes::new(socket), visit).await;
    }
}
