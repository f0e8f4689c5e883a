//! The redirector: the technician's end of sessions inside the server, for technicians with nothing installed. One door
//! for each session, a TCP port or pages for a browser; what arrives there goes through the session's tunnel to one target.
//!
//! It is a trust level of its own, because the server can read what passes. The mediator grants it, and the agent must
//! permit it. A door is for one source of each IP version and closes at the end of its time. Whoever comes from elsewhere is turned away before
//! a byte of his reaches the agent.

mod pages;
mod port;

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use adit_client::control::Control;
use adit_client::direct::StunServers;
use adit_client::identity::Live;
use adit_client::identity::revocation::Revocations;
use adit_client::session::{self, Parts, SessionEvent};
use adit_client::tunnel::{StreamError, Tunnel};
use adit_client::via::Via;
use adit_protocol::control::{Down, RelayTicket, Serve, Served, Up, Web as Wanted};
use adit_protocol::frame::ResetCode;
use adit_protocol::{DeviceId, SessionId, Target};
use adit_tunnel::session::End;
use pages::Pages;
use port::{Port, Proofs};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{info, warn};

use crate::listen;
use crate::web::headers::Names;
use crate::web::target::{Failure, Fingerprint, WebTarget};
use crate::web::{Web, site};

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
/// What is said of an order that cannot be followed.
const NONSENSE: &str = "the mediator's order makes no sense";

/// The redirector of one server.
pub struct Redirector {
    identity: Arc<Live>,
    control: Control,
    /// Where its ports are.
    ports: Option<RangeInclusive<u16>>,
    web: Arc<Web>,
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
        ports: Option<RangeInclusive<u16>>,
        web: Arc<Web>,
        relay: SocketAddr,
    ) -> Arc<Self> {
        Arc::new(Self {
            identity,
            control,
            ports,
            web,
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
                    let served = Served { request, error, unreachable: true, ..Served::default() };
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
            Ok(mut opened) => {
                let served = Served { request, ..std::mem::take(&mut opened.served) };
                if self.control.send(Up::Served(served)).await.is_err() {
                    // Nobody would ever know of it.
                    opened.tunnel.close("the mediator is away");
                }
                self.open.inc();
                let reason = opened.run(&self.turned_away).await;
                self.open.dec();
                info!(session = ?id, reason, "redirected session over");
            }
            Err(NotOpened { error, unreachable }) => {
                let served = Served { request, error, unreachable, ..Served::default() };
                let _ = self.control.send(Up::Served(served)).await;
            }
        }
        if let Some(id) = id {
            self.sessions().remove(&id);
        }
    }

    /// From the mediator's order to an open door.
    async fn open(&self, serve: Serve, news: News) -> Result<Opened, NotOpened> {
        let mut grant = serve.grant.unwrap_or_default();
        let id = SessionId::try_from(&grant.session[..]).map_err(|_| NONSENSE)?;
        let peer = DeviceId::try_from(&grant.peer[..]).map_err(|_| NONSENSE)?;
        let target: Target = serve.target.parse().map_err(|_| NONSENSE)?;
        let source: IpAddr = serve.source.parse().map_err(|_| NONSENSE)?;
        let expires = Instant::now() + Duration::from_secs(serve.seconds).min(LONGEST);
        self.reach_from_within(&mut grant.relays);
        let agent = grant.peer_name.clone();
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
            stun: StunServers::default(),
            many_socket_probing: false,
            port_mapping: false,
            downs: tickets,
            opening: None,
        });
        let closer = tunnel.clone();
        // Ends with the session, which is taken out of the table then.
        tokio::spawn(async move {
            if let Ok(reason) = end.wait_for(Option::is_some).await {
                closer.close(reason.as_deref().unwrap_or_default());
            }
        });
        let opening = async {
            loop {
                match events.recv().await {
                    Some(SessionEvent::Tier { .. }) => break,
                    Some(SessionEvent::Closed { reason }) => return Err(NotOpened::refused(reason)),
                    Some(_) => {}
                    None => return Err(NotOpened::refused("the session has ended".to_owned())),
                }
            }
            match &serve.web {
                Some(web) => self.open_pages(tunnel.clone(), &target, source, agent, web).await,
                None => self.open_port(&tunnel, &target, source, serve.proves).await,
            }
        };
        let opened = timeout(OPENED, opening).await.unwrap_or_else(|_| {
            let waited = OPENED.as_secs();
            let error = format!("the agent did not answer within {waited} s (is it of an older version?)");
            Err(NotOpened { error, unreachable: true })
        });
        match opened {
            Ok((door, served)) => {
                let port = served.port;
                info!(session = %id, %target, port, "redirected session open: this server can read what passes");
                Ok(Opened { door, tunnel, events, expires, served })
            }
            Err(error) => {
                tunnel.close(&error.error);
                Err(error)
            }
        }
    }

    async fn open_port(
        &self,
        tunnel: &Tunnel,
        target: &Target,
        source: IpAddr,
        proves: bool,
    ) -> Result<(Door, Served), NotOpened> {
        // Said now, and not when somebody has connected and finds nothing there.
        let failed = |error: StreamError| {
            let refused = error == StreamError::Reset(ResetCode::NotAllowed);
            NotOpened { error: format!("{target}: {error}"), unreachable: !refused }
        };
        tunnel.open(target).await.map_err(failed)?.opened().await.map_err(failed)?;
        let (listener, port) = self.bind()?;
        let proof = proves.then(rand::random::<Proofs>);
        let served = Served {
            port: port.into(),
            proof: proof.map(|proofs| proofs.concat()).unwrap_or_default(),
            ..Served::default()
        };
        Ok((Door::Port(Box::new(Port::new(listener, target.clone(), source, proof))), served))
    }

    async fn open_pages(
        &self,
        tunnel: Tunnel,
        target: &Target,
        source: IpAddr,
        agent: String,
        wanted: &Wanted,
    ) -> Result<(Door, Served), NotOpened> {
        let known = match &wanted.certificate[..] {
            [] => None,
            bytes => Some(Fingerprint::try_from(bytes).map_err(|_| NONSENSE)?),
        };
        let leads_to = WebTarget::new(tunnel, target.clone(), wanted.tls, known);
        let leads_to = leads_to.map_err(|error| error.to_string())?;
        let certificate = leads_to.probe().await?.map(Vec::from).unwrap_or_default();
        let parts = |shared| site::Parts {
            names: Names::new(wanted.tls, target.host(), target.port, shared),
            target: leads_to,
            agent,
            path: wanted.path.clone(),
            source,
            exact: wanted.exact,
        };
        let (pages, port) = match self.web.domain() {
            Some(domain) => (Pages::Named(self.web.publish(domain, parts(None))), domain.port),
            None => {
                let (listener, port) = self.bind()?;
                let label = site::secret();
                (Pages::on_port(self.web.clone(), listener, parts(Some((port, &label)))), port)
            }
        };
        let (host, path) = (pages.host().to_owned(), pages.path().to_owned());
        let served = Served { port: port.into(), host, path, certificate, ..Served::default() };
        Ok((Door::Pages(pages), served))
    }

    /// A free port of the range, from a random one on.
    fn bind(&self) -> Result<(TcpListener, u16), String> {
        let Some(ports) = &self.ports else {
            return Err("this redirector has no ports ([redirector] ports)".to_owned());
        };
        let (first, last) = (u32::from(*ports.start()), u32::from(*ports.end()));
        let count = last - first + 1;
        let start = rand::random_range(0..count);
        for step in 0..count {
            let port = (first + (start + step) % count) as u16;
            match listen::try_tcp(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))) {
                Ok(listener) => return Ok((listener, port)),
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

impl From<Failure> for NotOpened {
    fn from(failure: Failure) -> Self {
        Self { error: failure.what, unreachable: failure.unreachable }
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

/// A session whose door is open.
struct Opened {
    door: Door,
    tunnel: Tunnel,
    events: mpsc::Receiver<SessionEvent>,
    expires: Instant,
    /// What the mediator is told.
    served: Served,
}

/// How technicians come in.
enum Door {
    Port(Box<Port>),
    Pages(Pages),
}

impl Opened {
    /// Serves it to its end; says why it ended.
    async fn run(mut self, turned_away: &Counter) -> String {
        let reason = tokio::select! {
            // Whoever floods the door does not hold up its end.
            biased;
            reason = ended(&mut self.events) => reason,
            () = sleep_until(self.expires) => "its time is over".to_owned(),
            never = self.door.serve(&self.tunnel, turned_away) => match never {},
        };
        // The door first: nobody comes in any more.
        drop(self.door);
        self.tunnel.close(&reason);
        let closed = async { while self.events.recv().await.is_some() {} };
        let _ = timeout(GOODBYE, closed).await;
        reason
    }
}

impl Door {
    async fn serve(&mut self, tunnel: &Tunnel, turned_away: &Counter) -> Infallible {
        match self {
            Self::Port(port) => port.serve(tunnel, turned_away).await,
            Self::Pages(pages) => pages.serve(turned_away).await,
        }
    }
}

async fn ended(events: &mut mpsc::Receiver<SessionEvent>) -> String {
    loop {
        match events.recv().await {
            Some(SessionEvent::Closed { reason }) => return reason,
            Some(_) => {}
            None => return "the session has ended".to_owned(),
        }
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
