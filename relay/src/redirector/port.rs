//! A TCP port that leads to a target: for any program, from one source, one connection at a time.

use std::convert::Infallible;
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::time::Duration;

use adit_client::copy::{abort, copy};
use adit_client::dial::tune;
use adit_client::tunnel::Tunnel;
use adit_protocol::Target;
use prometheus_client::metrics::counter::Counter;
use socket2::{SockRef, Socket};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep_until};

use crate::listen;
use crate::penalty::network;

/// How long a second connection from the right source waits for the first one's end.
const PATIENCE: Duration = Duration::from_secs(5);
/// Data that a client does not acknowledge for this long ends its connection.
#[cfg(target_os = "linux")]
const UNACKNOWLEDGED: Duration = Duration::from_secs(30);

/// The port. Dropped, it is closed, and what is cut ends with a reset, not as if it were whole.
pub(super) struct Port {
    listener: TcpListener,
    target: Target,
    source: IpAddr,
    client: Option<Client>,
    /// Who comes while another is here waits for a moment: programs close a connection and open the next at once.
    next: Option<(TcpStream, Instant)>,
}

impl Port {
    pub(super) fn new(listener: TcpListener, target: Target, source: IpAddr) -> Self {
        Self { listener, target, source: network(source), client: None, next: None }
    }

    /// Serves it for as long as this is awaited.
    pub(super) async fn serve(&mut self, tunnel: &Tunnel, turned_away: &Counter) -> Infallible {
        loop {
            if self.client.is_none()
                && let Some((tcp, _)) = self.next.take()
            {
                self.client = Some(Client::new(tcp, tunnel.clone(), self.target.clone()));
            }
            let waits = self.next.as_ref().map(|(_, until)| *until);
            let (client, next) = (&mut self.client, &mut self.next);
            tokio::select! {
                // Whoever floods the port does not hold up the one connection.
                biased;
                () = async { client.as_mut().expect("checked").run.as_mut().await }, if client.is_some() => *client = None,
                () = async { sleep_until(waits.expect("checked")).await }, if waits.is_some() => {
                    if let Some((tcp, _)) = next.take() {
                        turned_away.inc();
                        abort(&tcp);
                    }
                }
                (tcp, from) = listen::accept(&self.listener) => {
                    if network(from.ip()) == self.source {
                        prepare(&tcp);
                        if let Some((older, _)) = next.replace((tcp, Instant::now() + PATIENCE)) {
                            turned_away.inc();
                            abort(&older);
                        }
                    } else {
                        turned_away.inc();
                        // A reset leaves nothing behind here.
                        abort(&tcp);
                    }
                }
            }
        }
    }
}

/// The one connection.
struct Client {
    run: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// A second handle on its socket.
    socket: Option<Socket>,
}

impl Client {
    fn new(tcp: TcpStream, tunnel: Tunnel, target: Target) -> Self {
        let socket = SockRef::from(&tcp).try_clone().ok();
        Self { run: Box::pin(pass(tcp, tunnel, target)), socket }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        if let Some(socket) = self.client.as_ref().and_then(|client| client.socket.as_ref()) {
            let _ = socket.set_linger(Some(Duration::ZERO));
        }
    }
}

/// Low latency; and a client whose way has died gives its place free soon.
fn prepare(tcp: &TcpStream) {
    tune(tcp);
    #[cfg(target_os = "linux")]
    let _ = SockRef::from(tcp).set_tcp_user_timeout(Some(UNACKNOWLEDGED));
}

async fn pass(tcp: TcpStream, tunnel: Tunnel, target: Target) {
    let Ok(stream) = tunnel.open(&target).await else { return abort(&tcp) };
    if let Err(error) = copy(tcp, stream).await {
        tracing::debug!(%error, "a redirected connection broke");
    }
}
