//! What an agent and a technician have in common: the control channel, the sessions on it, and the
//! one UDP socket for direct paths.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use adit_protocol::control::{Closed, Down, Grant, LiveSession, Up, Welcome};
use adit_protocol::{DeviceId, Role, SessionId};
use adit_tunnel::session::End;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tracing::{debug, warn};

use crate::config::{P2p, parse_ports};
use crate::control::hello;
use crate::control::maintain::{Control, NotConnected, State, maintain};
use crate::direct::{BindConfig, DirectEndpoint, StunServers};
use crate::early::{Flight, Opening};
use crate::identity::Live;
use crate::identity::revocation::Revocations;
use crate::probe;
use crate::session::{self, Parts, SessionEvent};
use crate::tunnel::Tunnel;
use crate::via::Via;

/// Messages about one session that may wait for it.
const SESSION_QUEUE: usize = 64;
/// Ended sessions that are remembered: an offer and its end stand close together.
const MAX_ENDED: usize = SESSION_QUEUE;
/// Ports of the direct path while the mediator has not said which.
const DEFAULT_PORTS: RangeInclusive<u16> = 40000..=41000;

/// A device's connection to its organisation.
pub struct Hub {
    identity: Arc<Live>,
    control: Control,
    sessions: Sessions,
    requests: Requests,
    next_request: AtomicU64,
    direct: Mutex<Option<Arc<DirectEndpoint>>>,
    _reader: tokio::task::JoinHandle<()>,
}

type Sessions = Arc<Mutex<Known>>;
type Requests = Arc<Mutex<Waiting>>;

/// Who waits for what the mediator says to a request.
#[derive(Default)]
struct Waiting {
    answers: HashMap<u64, oneshot::Sender<Down>>,
    /// For the agent's flight, which comes after the answer ([`Down::Answered`]).
    flights: HashMap<u64, oneshot::Sender<Vec<u8>>>,
}

#[derive(Default)]
struct Known {
    open: HashMap<SessionId, Entry>,
    /// Sessions of which a redirector is this end, and who waits for their end.
    redirected: HashMap<SessionId, oneshot::Sender<String>>,
    /// Ended by the mediator before they were open here, and why: the newest ones.
    ended: VecDeque<(SessionId, String)>,
}

struct Entry {
    peer: DeviceId,
    peer_key: Vec<u8>,
    tunnel: Tunnel,
    downs: mpsc::Sender<Down>,
}

/// A session that is running.
pub struct OpenSession {
    /// Its id.
    pub id: SessionId,
    /// Name of the other end.
    pub peer_name: String,
    /// This end of its tunnel.
    pub tunnel: Tunnel,
    /// What happens to it.
    pub events: mpsc::Receiver<SessionEvent>,
}

/// Why a session that was granted is not opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotOpened {
    /// What the mediator said is no grant.
    #[error("the mediator's grant makes no sense")]
    Nonsense,
    /// The mediator has taken it back meanwhile.
    #[error("the session has ended: {0}")]
    Ended(String),
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// There is no control channel.
    #[error(transparent)]
    NotConnected(#[from] NotConnected),
    /// The mediator did not answer.
    #[error("the mediator did not answer in time")]
    TimedOut,
}

impl Hub {
    /// Connects, and keeps connected; a technician by the channel of `adit up` where that runs. Session offers (agents get them) come out of the receiver.
    pub fn start(identity: Arc<Live>) -> (Self, mpsc::Receiver<Grant>) {
        let is_technician = identity.get().role == Role::Technician;
        let shared = identity.dir().filter(|_| is_technician).map(Path::to_owned);
        let sessions = Sessions::default();
        let live = sessions.clone();
        let (control, downs) = maintain(identity.clone(), move || hello(live_sessions(&live)), shared);
        let (offers, receiver) = mpsc::channel(SESSION_QUEUE);
        let requests = Requests::default();
        let reader = tokio::spawn(read(
            downs,
            control.clone(),
            identity.clone(),
            sessions.clone(),
            Arc::clone(&requests),
            offers,
        ));
        let hub = Self {
            identity,
            control,
            sessions,
            requests,
            next_request: AtomicU64::new(1),
            direct: Mutex::new(None),
            _reader: reader,
        };
        (hub, receiver)
    }

    /// The control channel.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Asks the mediator something; `message` is given the request's number. The answer may take `time`.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn request(
        &self,
        time: Duration,
        message: impl FnOnce(u64) -> Up,
    ) -> Result<Down, RequestError> {
        let number = self.next_request.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        lock(&self.requests).answers.insert(number, sender);
        let answer = async {
            self.control.send(message(number)).await?;
            receiver.await.map_err(|_| NotConnected)
        };
        let answer = tokio::time::timeout(time, answer).await;
        lock(&self.requests).answers.remove(&number);
        Ok(answer.map_err(|_| RequestError::TimedOut)??)
    }

    /// Asks for a session; `message` is given the request's number and the first flight of a handshake. With the answer,
    /// the handshake, if it was passed on.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn request_session(
        &self,
        time: Duration,
        via: Via,
        message: impl FnOnce(u64, Vec<u8>) -> Up,
    ) -> Result<(Down, Option<Opening>), RequestError> {
        let begun = via.wants_relay().then(|| Opening::technician(&self.identity.get()).ok()).flatten();
        let (mut opening, flight) = match begun {
            Some((opening, flight)) => (Some(opening), flight.await.unwrap_or_default()),
            None => (None, vec![]),
        };
        let (sender, receiver) = oneshot::channel();
        let requests = self.requests.clone();
        let message = |number| {
            let mut requests = lock(&requests);
            requests.flights.retain(|_, waiting| !waiting.is_closed());
            requests.flights.insert(number, sender);
            message(number, flight)
        };
        let answer = self.request(time, message).await?;
        opening.take_if(|_| !matches!(&answer, Down::Granted(grant) if grant.flight_passed));
        if let Some(opening) = &mut opening {
            opening.answered_by(receiver);
        }
        Ok((answer, opening))
    }

    /// The agent's answer to the handshake that comes with an offer.
    pub fn take_flight(&self, offer: &mut Grant) -> Option<(Opening, Flight)> {
        let technician = DeviceId::try_from(&offer.peer[..]).ok()?;
        let first = Some(std::mem::take(&mut offer.flight)).filter(|flight| !flight.is_empty())?;
        Opening::agent(&self.identity.get(), technician, first).ok()
    }

    /// Completes with the reason when the mediator says that this session, of which a redirector is this end, is over.
    pub fn watch(&self, session: &[u8]) -> oneshot::Receiver<String> {
        let (sender, receiver) = oneshot::channel();
        if let Ok(id) = SessionId::try_from(session) {
            let mut sessions = lock(&self.sessions);
            sessions.redirected.retain(|_, waiting| !waiting.is_closed());
            // Its end may have come right behind the word that it is there.
            match sessions.ended.iter().find(|(ended, _)| *ended == id) {
                Some((_, reason)) => drop(sender.send(reason.clone())),
                None => drop(sessions.redirected.insert(id, sender)),
            }
        }
        receiver
    }

    /// Starts this end of a session that was granted. `called` is the name or device id that the user
    /// asked for: whatever the mediator says, the other end's certificate must have it. `opening` is the handshake that
    /// has begun with the request.
    ///
    /// # Errors
    /// [`NotOpened`].
    pub fn open_session(
        &self,
        end: End,
        grant: Grant,
        via: Via,
        called: Option<&str>,
        opening: Option<Opening>,
    ) -> Result<OpenSession, NotOpened> {
        let id = SessionId::try_from(&grant.session[..]).map_err(|_| NotOpened::Nonsense)?;
        let peer = DeviceId::try_from(&grant.peer[..]).map_err(|_| NotOpened::Nonsense)?;
        let welcome = match &*self.control.state().borrow() {
            State::Connected(welcome) => welcome.clone(),
            _ => Arc::default(),
        };
        let (sender, downs) = mpsc::channel(SESSION_QUEUE);
        let (peer_name, peer_key) = (grant.peer_name.clone(), grant.peer_key.clone());
        // Nothing is heard of it meanwhile.
        let mut sessions = lock(&self.sessions);
        if let Some((_, reason)) = sessions.ended.iter().find(|(ended, _)| *ended == id) {
            return Err(NotOpened::Ended(reason.clone()));
        }
        let (tunnel, mut inner) = session::start(Parts {
            identity: self.identity.get(),
            end,
            id,
            peer,
            called: called.map(str::to_owned),
            via,
            control: self.control.clone(),
            direct: if via.wants_direct() { self.direct_endpoint(&welcome) } else { None },
            stun: StunServers::of(&welcome),
            many_socket_probing: self.identity.get().p2p.many_socket_probing
                && !welcome.no_many_socket_probing,
            port_mapping: self.identity.get().p2p.port_mapping && !welcome.no_port_mapping,
            downs,
            grant,
            opening,
        });
        sessions.open.insert(id, Entry { peer, peer_key, tunnel: tunnel.clone(), downs: sender });
        drop(sessions);
        // The session is forgotten here when it is over there.
        let (outer, events) = mpsc::channel(SESSION_QUEUE);
        let sessions = self.sessions.clone();
        tokio::spawn(async move {
            loop {
                let event = tokio::select! {
                    event = inner.recv() => event,
                    () = outer.closed() => None,
                };
                let Some(event) = event else { break };
                if outer.send(event).await.is_err() {
                    break;
                }
            }
            lock(&sessions).open.remove(&id);
        });
        Ok(OpenSession { id, peer_name, tunnel, events })
    }

    /// The one UDP socket, bound when it is first needed.
    fn direct_endpoint(&self, welcome: &Welcome) -> Option<Arc<DirectEndpoint>> {
        let mut direct = lock(&self.direct);
        if direct.is_none() {
            let loopback = welcome.stun.iter().any(|server| is_loopback(server));
            let peers = operators_ports(welcome);
            let p2p = &self.identity.get().p2p;
            let config = BindConfig {
                ports: ports(&peers, p2p),
                peers,
                loopback,
                public: p2p.public_addresses.clone(),
            };
            match DirectEndpoint::bind(self.identity.clone(), config) {
                Ok(endpoint) => *direct = Some(endpoint),
                Err(error) => warn!(%error, "no direct paths: sessions run on the relay"),
            }
        }
        direct.clone()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self._reader.abort();
    }
}

/// Sorts what the mediator says: answers, session offers, and news of sessions.
async fn read(
    mut downs: mpsc::Receiver<Down>,
    control: Control,
    identity: Arc<Live>,
    sessions: Sessions,
    requests: Requests,
    offers: mpsc::Sender<Grant>,
) {
    let probing = Arc::new(Semaphore::new(1));
    while let Some(down) = downs.recv().await {
        let (request, session) = match &down {
            Down::Offer(grant) => {
                if offers.try_send(grant.clone()).is_err() {
                    warn!("too many sessions are offered at once");
                }
                continue;
            }
            Down::Revocations(_) => {
                close_revoked(&identity.get().revoked.newest(), &sessions);
                continue;
            }
            Down::Probe(probe) => {
                // One at a time: who asks again meanwhile gets no answer.
                if let Ok(permit) = probing.clone().try_acquire_owned() {
                    let (identity, control, probe) = (identity.get(), control.clone(), probe.clone());
                    tokio::spawn(async move {
                        let _ = control.send(Up::Probed(probe::run(identity, probe).await)).await;
                        drop(permit);
                    });
                }
                continue;
            }
            Down::Answered(answered) => {
                if let Some(waiting) = lock(&requests).flights.remove(&answered.request) {
                    let _ = waiting.send(answered.flight.clone());
                }
                continue;
            }
            // The channel's keeper has taken it; or it is for relays.
            Down::Welcome(_) | Down::Update(_) | Down::Serve(_) => continue,
            Down::Agents(agents) => (agents.request, None),
            Down::Granted(grant) => (grant.request, None),
            Down::Redirected(redirected) => (redirected.request, None),
            Down::Examined(examined) => (examined.request, None),
            Down::Refused(refused) => (refused.request, None),
            Down::Closed(closed) => {
                close(closed, &sessions);
                continue;
            }
            Down::Candidates(candidates) => (0, Some(&candidates.session)),
            Down::Tickets(tickets) => (0, Some(&tickets.session)),
        };
        if let Some(session) = session {
            let id = SessionId::try_from(&session[..]).ok();
            let sender = id.and_then(|id| lock(&sessions).open.get(&id).map(|entry| entry.downs.clone()));
            if let Some(sender) = sender {
                // A session that does not keep up loses candidates, which are said again.
                let _ = sender.try_send(down);
            }
        } else if let Some(waiting) = lock(&requests).answers.remove(&request) {
            let _ = waiting.send(down);
        } else {
            debug!(request, "an answer that nobody waits for");
        }
    }
}

/// Ends the session that the mediator ends: at once, or before it begins.
fn close(closed: &Closed, sessions: &Sessions) {
    let Ok(id) = SessionId::try_from(&closed.session[..]) else { return };
    let mut sessions = lock(sessions);
    if let Some(waiting) = sessions.redirected.remove(&id) {
        let _ = waiting.send(closed.reason.clone());
        return;
    }
    match sessions.open.get(&id) {
        Some(entry) => entry.tunnel.close(&closed.reason),
        None => {
            sessions.ended.truncate(MAX_ENDED - 1);
            sessions.ended.push_front((id, closed.reason.clone()));
        }
    }
}

/// Ends every session whose other end is on the list.
fn close_revoked(list: &Revocations, sessions: &Sessions) {
    for entry in lock(sessions).open.values() {
        if <[u8; 32]>::try_from(&entry.peer_key[..]).is_ok_and(|key| list.has(&key)) {
            entry.tunnel.close("the other device was revoked");
        }
    }
}

fn live_sessions(sessions: &Sessions) -> Vec<LiveSession> {
    let live = |(id, entry): (&SessionId, &Entry)| LiveSession {
        session: id.as_bytes().to_vec(),
        peer: entry.peer.as_bytes().to_vec(),
    };
    lock(sessions).open.iter().map(live).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn operators_ports(welcome: &Welcome) -> RangeInclusive<u16> {
    parse_ports(&welcome.p2p_ports).unwrap_or(DEFAULT_PORTS)
}

/// Those of the operator's ports that this machine's owner permits.
fn ports(operators: &RangeInclusive<u16>, own: &P2p) -> RangeInclusive<u16> {
    own.ports.clone().map_or(operators.clone(), |own| {
        let narrower = *own.start().max(operators.start())..=*own.end().min(operators.end());
        if narrower.is_empty() {
            let (own, operators) = (format_args!("{own:?}"), format_args!("{operators:?}"));
            warn!(%own, %operators, "[p2p] ports of this device has nothing in common with the operator's");
        }
        narrower
    })
}

/// A server on this very machine: everything runs here, as in the demo.
fn is_loopback(server: &str) -> bool {
    let host = server.rsplit_once(':').map_or(server, |(host, _)| host).trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_only_narrows_the_operators_ports() {
        let welcome = |p2p_ports: &str| Welcome { p2p_ports: p2p_ports.into(), ..Welcome::default() };
        let own = |ports: Option<RangeInclusive<u16>>| P2p { ports, ..P2p::default() };
        for (operators, own_ports, expected) in [
            ("40000-41000", None, 40_000..=41_000),
            ("40000-41000", Some(40_500..=40_600), 40_500..=40_600),
            ("40000-41000", Some(39_000..=40_010), 40_000..=40_010),
            ("40000-41000", Some(40_990..=65_535), 40_990..=41_000),
            ("no ports", None, DEFAULT_PORTS),
        ] {
            assert_eq!(ports(&operators_ports(&welcome(operators)), &own(own_ports)), expected);
        }
        assert!(ports(&(40_000..=41_000), &own(Some(20_000..=20_100))).is_empty());
    }

    #[test]
    fn loopback_is_recognised_in_every_form() {
        for server in ["127.0.0.1:8002", "[::1]:8002", "localhost:8002", "127.1.2.3:1"] {
            assert!(is_loopback(server), "{server}");
        }
        for server in ["192.0.2.1:8002", "[2001:db8::1]:8002", "localhost.example:8002"] {
            assert!(!is_loopback(server), "{server}");
        }
    }
}
