//! The redirector: the technician's end of sessions inside the server, for technicians with nothing installed. One TCP
//! port for each session; what arrives there goes through the session's tunnel to one target.
//!
//! It is a trust level of its own, because the server can read what passes. The mediator grants it, and the agent must
//! permit it. A port takes connections from one source, one at a time, and closes at the end of its time. Whoever comes
//! from elsewhere is closed before a byte of his reaches the agent.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use adit_client::control::Control;
use adit_client::copy::{abort, copy};
use adit_client::dial::tune;
use adit_client::identity::Live;
use adit_client::identity::revocation::Revocations;
use adit_client::session::{self, Parts, SessionEvent};
use adit_client::tunnel::Tunnel;
use adit_client::via::Via;
use adit_protocol::control::{Closed, Down, Serve, Served, Up};
use adit_protocol::{DeviceId, SessionId, Target};
use adit_tunnel::session::End;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
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
/// News of one session that may wait for it.
const QUEUE: usize = 64;

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
struct Known {
    news: mpsc::Sender<Down>,
    agent_key: Vec<u8>,
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
        let id = match &down {
            Down::Serve(_) => None,
            Down::Closed(closed) => SessionId::try_from(&closed.session[..]).ok(),
            Down::Tickets(tickets) => SessionId::try_from(&tickets.session[..]).ok(),
            _ => return,
        };
        match (down, id) {
            (Down::Serve(serve), _) => {
                tokio::spawn(self.clone().serve(serve));
            }
            (down, Some(id)) => {
                if let Some(session) = self.sessions().get(&id) {
                    // One that does not keep up asks for tickets again.
                    let _ = session.news.try_send(down);
                }
            }
            (_, None) => {}
        }
    }

    /// Ends the sessions with agents on this list.
    pub fn on_revoked(&self, list: &Revocations) {
        for (id, session) in self.sessions().iter() {
            if <[u8; 32]>::try_from(&session.agent_key[..]).is_ok_and(|key| list.has(&key)) {
                let (session_id, reason) = (id.as_bytes().to_vec(), "the agent was revoked".to_owned());
                let closed = Closed { session: session_id, reason, bytes_sent: 0, bytes_received: 0 };
                let _ = session.news.try_send(Down::Closed(closed));
            }
        }
    }

    async fn serve(self: Arc<Self>, serve: Serve) {
        let request = serve.request;
        let (port, error, opened) = match self.open(serve).await {
            Ok(opened) => (opened.port, String::new(), Some(opened)),
            Err(error) => (0, error, None),
        };
        let _ = self.control.send(Up::Served(Served { request, port: port.into(), error })).await;
        let Some(opened) = opened else { return };
        let id = opened.id;
        self.open.inc();
        let reason = opened.run(&self.turned_away).await;
        self.open.dec();
        info!(session = %id, reason, "redirected port closed");
        self.sessions().remove(&id);
    }

    /// From the mediator's order to an open port; or why not, in a line for people.
    async fn open(&self, serve: Serve) -> Result<Opened, String> {
        let nonsense = |_| "the mediator's order makes no sense".to_owned();
        let mut grant = serve.grant.unwrap_or_default();
        let id = SessionId::try_from(&grant.session[..]).map_err(nonsense)?;
        let peer = DeviceId::try_from(&grant.peer[..]).map_err(nonsense)?;
        let target: Target = serve.target.parse().map_err(|_| "that is no target".to_owned())?;
        let source: IpAddr = serve.source.parse().map_err(|_| "that is no source address".to_owned())?;
        // By the shortest way: the relay is in this process.
        for relay in &mut grant.relays {
            (relay.addresses, relay.https) = (vec![self.relay.to_string()], vec![]);
        }
        let (sender, downs) = mpsc::channel(QUEUE);
        {
            let mut sessions = self.sessions();
            if sessions.len() >= MAX_SESSIONS {
                return Err(format!("the redirector has {MAX_SESSIONS} sessions already"));
            }
            sessions.insert(id, Known { news: sender, agent_key: grant.peer_key.clone() });
        }
        let opening = self.begin(id, peer, grant, target, source, Duration::from_secs(serve.seconds), downs);
        let opened = opening.await;
        if opened.is_err() {
            self.sessions().remove(&id);
        }
        opened
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one order, taken apart")]
    async fn begin(
        &self,
        id: SessionId,
        peer: DeviceId,
        grant: adit_protocol::control::Grant,
        target: Target,
        source: IpAddr,
        time: Duration,
        mut news: mpsc::Receiver<Down>,
    ) -> Result<Opened, String> {
        let listener = self.bind()?;
        let port = listener.local_addr().map_err(|error| error.to_string())?.port();
        let (downs, receiver) = mpsc::channel(QUEUE);
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
            downs: receiver,
        });
        let closer = tunnel.clone();
        tokio::spawn(async move {
            while let Some(down) = news.recv().await {
                match down {
                    Down::Closed(closed) => closer.close(&closed.reason),
                    down => {
                        let _ = downs.send(down).await;
                    }
                }
            }
        });
        let opened = async {
            loop {
                match events.recv().await {
                    Some(SessionEvent::Tier { .. }) => break,
                    Some(SessionEvent::Closed { reason }) => return Err(reason),
                    Some(_) => {}
                    None => return Err("the session has ended".to_owned()),
                }
            }
            // Said now, and not when somebody has connected and finds nothing there.
            let tried = tunnel.open(&target).await.map_err(|error| error.to_string())?;
            tried.opened().await.map_err(|error| format!("{target}: {error}"))
        };
        let done = timeout(OPENED, opened).await;
        if let Err(error) =
            done.unwrap_or_else(|_| Err(format!("the agent did not answer within {} s", OPENED.as_secs())))
        {
            tunnel.close(&error);
            return Err(error);
        }
        let expires = Instant::now() + time.min(LONGEST);
        info!(session = %id, %target, port, "redirected port open: this server can read what passes");
        Ok(Opened { id, port, listener, tunnel, events, target, source, expires })
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

/// A port that leads somewhere.
struct Opened {
    id: SessionId,
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
        let mut client = None;
        let reason = loop {
            tokio::select! {
                (tcp, from) = listen::accept(&self.listener) => {
                    let ours = network(from.ip().to_canonical()) == network(self.source);
                    if ours && client.is_none() {
                        tune(&tcp);
                        client = Some(Box::pin(pass(tcp, self.tunnel.clone(), self.target.clone())));
                    } else {
                        turned_away.inc();
                        // A reset leaves nothing behind here.
                        abort(&tcp);
                    }
                }
                () = async { client.as_mut().expect("checked").await }, if client.is_some() => client = None,
                event = self.events.recv() => match event {
                    Some(SessionEvent::Closed { reason }) => return reason,
                    Some(_) => {}
                    None => return "the session has ended".to_owned(),
                },
                () = sleep_until(self.expires) => break "its time is over",
            }
        };
        // The port first: nobody comes in any more.
        drop((self.listener, client));
        self.tunnel.close(reason);
        let closed = async { while self.events.recv().await.is_some() {} };
        let _ = timeout(GOODBYE, closed).await;
        reason.to_owned()
    }
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
