//! What an agent and a technician have in common: the control channel, the sessions on it, and the
//! one UDP socket for direct paths.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use adit_protocol::control::{Closed, Down, Grant, LiveSession, Up, Welcome};
use adit_protocol::{DeviceId, SessionId};
use adit_tunnel::session::End;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tracing::{debug, warn};

use crate::control::hello;
use crate::control::maintain::{Control, NotConnected, State, maintain};
use crate::direct::{DirectEndpoint, StunServers};
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
/// How long the mediator may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// Ports of the direct path while the mediator has not said which.
const DEFAULT_PORTS: RangeInclusive<u16> = 40000..=41000;

/// A device's connection to its organisation.
pub struct Hub {
    identity: Arc<Live>,
    control: Control,
    sessions: Sessions,
    requests: Arc<Mutex<HashMap<u64, oneshot::Sender<Down>>>>,
    next_request: AtomicU64,
    direct: Mutex<Option<Arc<DirectEndpoint>>>,
    _reader: tokio::task::JoinHandle<()>,
}

type Sessions = Arc<Mutex<Known>>;

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
    /// Connects, and keeps connected. Session offers (agents get them) come out of the receiver.
    pub fn start(identity: Arc<Live>) -> (Self, mpsc::Receiver<Grant>) {
        let sessions = Sessions::default();
        let live = sessions.clone();
        let (control, downs) = maintain(identity.clone(), move || hello(live_sessions(&live)));
        let (offers, receiver) = mpsc::channel(SESSION_QUEUE);
        let requests = Arc::default();
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

    /// Asks the mediator something; `message` is given the request's number.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn request(&self, message: impl FnOnce(u64) -> Up) -> Result<Down, RequestError> {
        self.request_within(ANSWER, message).await
    }

    /// The same where the mediator has to ask others.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn request_within(
        &self,
        time: Duration,
        message: impl FnOnce(u64) -> Up,
    ) -> Result<Down, RequestError> {
        let number = self.next_request.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        lock(&self.requests).insert(number, sender);
        let answer = async {
            self.control.send(message(number)).await?;
            receiver.await.map_err(|_| NotConnected)
        };
        let answer = tokio::time::timeout(time, answer).await;
        lock(&self.requests).remove(&number);
        Ok(answer.map_err(|_| RequestError::TimedOut)??)
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
    /// asked for: whatever the mediator says, the other end's certificate must have it.
    ///
    /// # Errors
    /// [`NotOpened`].
    pub fn open_session(
        &self,
        end: End,
        grant: Grant,
        via: Via,
        called: Option<&str>,
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
            downs,
            grant,
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
            let ports = parse_ports(&welcome.p2p_ports).unwrap_or(DEFAULT_PORTS);
            let loopback = welcome.stun.iter().any(|server| is_loopback(server));
            match DirectEndpoint::bind(self.identity.clone(), ports, loopback) {
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
    requests: Arc<Mutex<HashMap<u64, oneshot::Sender<Down>>>>,
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
            // The channel's keeper has taken it; or it is for relays.
            Down::Welcome(_) | Down::Update(_) | Down::Serve(_) => continue,
            Down::Agents(agents) => (agents.request, None),
            Down::Granted(grant) => (grant.request, None),
            Down::Redirected(redirected) => (redirected.request, None),
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
        } else if let Some(waiting) = lock(&requests).remove(&request) {
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

fn parse_ports(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-')?;
    let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    (first > 0 && first <= last).then_some(first..=last)
}

/// A server on this very machine: everything runs here, as in the demo.
fn is_loopback(server: &str) -> bool {
    let host = server.rsplit_once(':').map_or(server, |(host, _)| host).trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}
