//! The redirector: the technician's end of sessions inside the server, for technicians with nothing installed. One TCP
//! port for each session; what arrives there goes through the session's tunnel to one target.
//!
//! It is a trust level of its own, because the server can read what passes. The mediator grants it, and the agent must
//! permit it. A port takes connections from one source, one at a time, and closes at the end of its time. Whoever comes
//! from elsewhere is closed before a byte of his reaches the agent.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use adit_client::control::Control;
use adit_client::copy::{abort, copy};
use adit_client::dial::tune;
use adit_client::identity::Live;
use adit_client::identity::revocation::Revocations;
use adit_client::session::{self, Parts, SessionEvent};
use adit_client::tunnel::{StreamError, Tunnel};
use adit_client::via::Via;
use adit_protocol::control::{Down, Grant, RelayTicket, Serve, Served, Up};
use adit_protocol::frame::ResetCode;
use adit_protocol::{DeviceId, SessionId, Target};
use adit_tunnel::session::End;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use socket2::{SockRef, Socket};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{info, warn};

use crate::listen;
use crate::penalty::network;

/// How long agent and target may take until the port is open.
const OPENED: Duration = Duration::from_secs(15);
/// How long the agent gets to hear that the session ends.
const GOODBYE: Duration = Duration::from_secs(1);
/// The longest time that a port is open, whatever was granted.
const LONGEST: Duration = Duration::from_secs(12 * 60 * 60);
/// Sessions at once: each may hold its budget of memory.
const MAX_SESSIONS: usize = 512;
/// Tickets of one session that may wait for it.
const QUEUE: usize = 8;
/// How long a second connection from the right source waits for the first one's end.
const PATIENCE: Duration = Duration::from_secs(5);
/// Data that a client does not acknowledge for this long ends its connection.
#[cfg(target_os = "linux")]
const UNACKNOWLEDGED: Duration = Duration::from_secs(30);
/// What is said of an order that cannot be followed.
const NONSENSE: &str = "the mediator's order makes no sense";

/// The redirector of one server.
pub struct Redirector {
    identity: Arc<Live>,
    control: Control,
    /// Where its ports are.
    ports: RangeInclusive<u16>,
    /// The relay in this process, which brings its legs and the agents' together.
    relay: SocketAddr,
    sessions: Mutex<HashMap<SessionId, Known>>,
    open: Gauge,
    turned_away: Counter,
}

/// A session, from the mediator's order on.
#[derive(Clone)]
struct Known {
    /// New tickets.
    tickets: mpsc::Sender<Down>,
    /// Why it is to end: set once, and never lost.
    end: watch::Sender<Option<String>>,
    agent_key: Vec<u8>,
}

impl Known {
    fn end(&self, reason: &str) {
        self.end.send_if_modified(|end| {
            let first = end.is_none();
            end.get_or_insert_with(|| reason.to_owned());
            first
        });
    }
}

/// A session's ears.
struct News {
    tickets: mpsc::Receiver<Down>,
    end: watch::Receiver<Option<String>>,
}

impl Redirector {
    /// A redirector whose sessions run through the relay that listens on `relay`.
    pub fn new(
        identity: Arc<Live>,
        control: Control,
        ports: RangeInclusive<u16>,
        relay: SocketAddr,
    ) -> Arc<Self> {
        Arc::new(Self {
            identity,
            control,
            ports,
            relay: local(relay),
            sessions: Mutex::default(),
            open: Gauge::default(),
            turned_away: Counter::default(),
        })
    }

    /// Shows its numbers in `registry`.
    pub fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("adit_redirector");
        r.register("sessions", "Sessions of which the server is an end", self.open.clone());
        r.register(
            "turned_away",
            "Connections closed at once: from elsewhere, or beside another",
            self.turned_away.clone(),
        );
    }

    /// Takes what the mediator says; what is not for a redirector is ignored.
    pub fn on(self: &Arc<Self>, down: Down) {
        match down {
            // Known at once: its end may stand right behind it.
            Down::Serve(serve) => match self.enlist(&serve) {
                Ok(news) => drop(tokio::spawn(self.clone().serve(serve, news))),
                Err(error) => {
                    let (control, request) = (self.control.clone(), serve.request);
                    let served = Served { request, port: 0, error, unreachable: true };
                    tokio::spawn(async move { control.send(Up::Served(served)).await });
                }
            },
            Down::Closed(closed) => self.with(&closed.session, |session| session.end(&closed.reason)),
            Down::Tickets(mut tickets) => {
                self.reach_from_within(&mut tickets.relays);
                let id = tickets.session.clone();
                // One that does not keep up asks for tickets again.
                self.with(&id, |session| drop(session.tickets.try_send(Down::Tickets(tickets))));
            }
            _ => {}
        }
    }

    /// Ends the sessions with agents on this list.
    pub fn on_revoked(&self, list: &Revocations) {
        for session in self.sessions().values() {
            if <[u8; 32]>::try_from(&session.agent_key[..]).is_ok_and(|key| list.has(&key)) {
                session.end("the agent was revoked");
            }
        }
    }

    fn with(&self, id: &[u8], act: impl FnOnce(&Known)) {
        let id = SessionId::try_from(id).ok();
        if let Some(session) = id.and_then(|id| self.sessions().get(&id).cloned()) {
            act(&session);
        }
    }

    fn enlist(&self, serve: &Serve) -> Result<News, String> {
        let grant = serve.grant.as_ref();
        let id = grant.and_then(|grant| SessionId::try_from(&grant.session[..]).ok()).ok_or(NONSENSE)?;
        let mut sessions = self.sessions();
        if sessions.len() >= MAX_SESSIONS {
            return Err(format!("the redirector has {MAX_SESSIONS} sessions already"));
        }
        let ((tickets, receiver), (end, ended)) = (mpsc::channel(QUEUE), watch::channel(None));
        let agent_key = grant.map(|grant| grant.peer_key.clone()).unwrap_or_default();
        sessions.insert(id, Known { tickets, end, agent_key });
        Ok(News { tickets: receiver, end: ended })
    }

    /// By the shortest way: the relay is in this process.
    fn reach_from_within(&self, relays: &mut [RelayTicket]) {
        for relay in relays {
            (relay.addresses, relay.https) = (vec![self.relay.to_string()], vec![]);
        }
    }

    async fn serve(self: Arc<Self>, serve: Serve, news: News) {
        let request = serve.request;
        let id = serve.grant.as_ref().and_then(|grant| SessionId::try_from(&grant.session[..]).ok());
        match self.open(serve, news).await {
            Ok(opened) => {
                let served =
                    Served { request, port: opened.port.into(), error: String::new(), unreachable: false };
                if self.control.send(Up::Served(served)).await.is_err() {
                    // Nobody would ever know of it.
                    opened.tunnel.close("the mediator is away");
                }
                self.open.inc();
                let reason = opened.run(&self.turned_away).await;
                self.open.dec();
                info!(session = ?id, reason, "redirected port closed");
            }
            Err(NotOpened { error, unreachable }) => {
                let served = Served { request, port: 0, error, unreachable };
                let _ = self.control.send(Up::Served(served)).await;
            }
        }
        if let Some(id) = id {
            self.sessions().remove(&id);
        }
    }

    /// From the mediator's order to an open port.
    async fn open(&self, serve: Serve, news: News) -> Result<Opened, NotOpened> {
        let mut grant = serve.grant.unwrap_or_default();
        let id = SessionId::try_from(&grant.session[..]).map_err(|_| NONSENSE)?;
        let peer = DeviceId::try_from(&grant.peer[..]).map_err(|_| NONSENSE)?;
        let target: Target = serve.target.parse().map_err(|_| NONSENSE)?;
        let source: IpAddr = serve.source.parse().map_err(|_| NONSENSE)?;
        self.reach_from_within(&mut grant.relays);
        self.begin(id, peer, grant, target, source, Duration::from_secs(serve.seconds), news).await
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one order, taken apart")]
    async fn begin(
        &self,
        id: SessionId,
        peer: DeviceId,
        grant: Grant,
        target: Target,
        source: IpAddr,
        time: Duration,
        news: News,
    ) -> Result<Opened, NotOpened> {
        let listener = self.bind()?;
        let port = listener.local_addr().map_err(|error| error.to_string())?.port();
        let News { tickets, mut end } = news;
        let (tunnel, mut events) = session::start(Parts {
            identity: self.identity.get(),
            end: End::Technician,
            id,
            peer,
            called: Some(peer.to_string()),
            grant,
            via: Via::Redirector,
            control: self.control.clone(),
            direct: None,
            stun: vec![],
            downs: tickets,
        });
        let closer = tunnel.clone();
        // Ends with the session, which is taken out of the table then.
        tokio::spawn(async move {
            if let Ok(reason) = end.wait_for(Option::is_some).await {
                closer.close(reason.as_deref().unwrap_or_default());
            }
        });
        let opened = async {
            loop {
                match events.recv().await {
                    Some(SessionEvent::Tier { .. }) => break,
                    Some(SessionEvent::Closed { reason }) => return Err(NotOpened::refused(reason)),
                    Some(_) => {}
                    None => return Err(NotOpened::refused("the session has ended".to_owned())),
                }
            }
            // Said now, and not when somebody has connected and finds nothing there.
            let failed = |error: StreamError| {
                let refused = error == StreamError::Reset(ResetCode::NotAllowed);
                NotOpened { error: format!("{target}: {error}"), unreachable: !refused }
            };
            let tried = tunnel.open(&target).await.map_err(failed)?;
            tried.opened().await.map_err(failed)
        };
        let done = timeout(OPENED, opened).await;
        let late = || {
            let error = format!(
                "the agent did not answer within {} s (is it of an older version?)",
                OPENED.as_secs()
            );
            Err(NotOpened { error, unreachable: true })
        };
        if let Err(error) = done.unwrap_or_else(|_| late()) {
            tunnel.close(&error.error);
            return Err(error);
        }
        let expires = Instant::now() + time.min(LONGEST);
        info!(session = %id, %target, port, "redirected port open: this server can read what passes");
        Ok(Opened { port, listener, tunnel, events, target, source, expires })
    }

    /// A free port of the range, from a random one on.
    fn bind(&self) -> Result<TcpListener, String> {
        let (first, last) = (u32::from(*self.ports.start()), u32::from(*self.ports.end()));
        let count = last - first + 1;
        let start = rand::random_range(0..count);
        for step in 0..count {
            let port = first + (start + step) % count;
            let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port as u16));
            match listen::try_tcp(address) {
                Ok(listener) => return Ok(listener),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                Err(error) => {
                    warn!(%error, port, "a port of the redirector cannot be opened");
                    return Err(format!("the server cannot open a port: {error}"));
                }
            }
        }
        Err(format!("all ports of the redirector are taken ([redirector] ports = \"{first}-{last}\")"))
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<SessionId, Known>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why there is no port.
struct NotOpened {
    error: String,
    /// Nobody said no.
    unreachable: bool,
}

impl NotOpened {
    fn refused(error: String) -> Self {
        Self { error, unreachable: false }
    }
}

impl From<String> for NotOpened {
    fn from(error: String) -> Self {
        Self { error, unreachable: true }
    }
}

impl From<&str> for NotOpened {
    fn from(error: &str) -> Self {
        Self::from(error.to_owned())
    }
}

/// A port that leads somewhere.
struct Opened {
    port: u16,
    listener: TcpListener,
    tunnel: Tunnel,
    events: mpsc::Receiver<SessionEvent>,
    target: Target,
    source: IpAddr,
    expires: Instant,
}

impl Opened {
    /// Serves it to its end; says why it ended.
    async fn run(mut self, turned_away: &Counter) -> String {
        let mut client: Option<Client> = None;
        // Who comes while another is here waits for a moment: programs close a connection and open the next at once.
        let mut next: Option<(TcpStream, Instant)> = None;
        let reason = loop {
            if client.is_none()
                && let Some((tcp, _)) = next.take()
            {
                client = Some(Client::new(tcp, self.tunnel.clone(), self.target.clone()));
            }
            let until = next.as_ref().map_or(self.expires, |(_, until)| (*until).min(self.expires));
            tokio::select! {
                // Whoever floods the port holds up neither its end nor the one connection.
                biased;
                () = async { client.as_mut().expect("checked").run.as_mut().await }, if client.is_some() => client = None,
                event = self.events.recv() => match event {
                    Some(SessionEvent::Closed { reason }) => break reason,
                    Some(_) => {}
                    None => break "the session has ended".to_owned(),
                },
                () = sleep_until(until) => {
                    if Instant::now() >= self.expires {
                        break "its time is over".to_owned();
                    }
                    if let Some((tcp, _)) = next.take() {
                        turned_away.inc();
                        abort(&tcp);
                    }
                }
                (tcp, from) = listen::accept(&self.listener) => {
                    if network(from.ip().to_canonical()) == network(self.source) {
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
        };
        // The port first: nobody comes in any more. What is cut ends with a reset, and not as if it were whole.
        drop(self.listener);
        client.iter().for_each(Client::abort);
        drop(client);
        self.tunnel.close(&reason);
        let closed = async { while self.events.recv().await.is_some() {} };
        let _ = timeout(GOODBYE, closed).await;
        reason
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

    fn abort(&self) {
        if let Some(socket) = &self.socket {
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

/// How this machine itself reaches what listens on `address`.
fn local(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        ip if !ip.is_unspecified() => ip,
        // [::] takes IPv4, too; and there may be no IPv6 at all.
        _ => IpAddr::from([127, 0, 0, 1]),
    };
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_relay_is_found_from_within() {
        for (listens, found) in [
            ("[::]:8002", "127.0.0.1:8002"),
            ("0.0.0.0:8002", "127.0.0.1:8002"),
            ("192.0.2.1:1", "192.0.2.1:1"),
            ("[2001:db8::1]:1", "[2001:db8::1]:1"),
        ] {
            assert_eq!(local(listens.parse().expect("an address")).to_string(), found);
        }
    }
}
