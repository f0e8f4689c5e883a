//! The broker: authorises, writes the audit record, mints tickets, tells both ends at once.
//!
//! | module | what |
//! | --- | --- |
//! | this one | requests of technicians: which agents there are, and sessions with them |
//! | [`life`] | what happens to sessions afterwards |
//! | [`redirect`] | sessions of which the server itself is an end |
//! | [`probe`] | the connection test from outside |
//! | [`change`] | the operator has changed who may do what |

mod change;
mod life;
mod probe;
mod redirect;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use adit_client::identity::revocation::Revoked;
use adit_protocol::control::{
    AgentInfo, Closed, Down, Grant, IceCredentials, MAX_FLIGHT, Open, Reached, Refused, RefusedCode, Served,
};
use adit_protocol::{DeviceId, Role, SessionId, Wanted};
use tokio::sync::oneshot;
use tracing::{info, warn};

use crate::audit::{Audit, Party, Record};
use crate::channel::Greeting;
use crate::directory::Directory;
use crate::organisation::{Keyring, unix_now};
use crate::presence::{Channel, Presence};
use crate::relays::{Pairing, Relay, Relays, TICKET_LIFE};
use crate::sessions::{End, Session, Sessions};
use crate::store::{Device, Store};
use crate::times::ago;

pub use change::Effect;
pub use probe::Addresses;

/// Targets that one request may name.
const MAX_TARGETS: usize = 64;
/// Longest reason that is passed on or written down, in bytes.
const MAX_REASON: usize = 512;
/// What a device hears that is not one of ours any more.
const REVOKED: &str = "this device was revoked: enrol it again with a new token";
/// What a device hears while there is no record of what it asks for: then it is not done.
pub const UNRECORDED: &str =
    "the mediator cannot write its audit record: the operator checks disk and permissions";
/// What the ends of a session hear that no grant covers any more.
const FORBIDDEN: &str = "this technician may not reach this agent (any more)";
/// Agents that a refusal names.
const NAMED: usize = 10;

/// Ports that were ordered: from which device, and who waits for its answer.
type Orders = HashMap<u64, (DeviceId, oneshot::Sender<Served>)>;
/// Connection tests under way: which agent was asked, and who waits for its answer.
type Probes = HashMap<u64, (DeviceId, oneshot::Sender<Vec<Reached>>)>;

/// Everything that sessions need, in one place. Nothing here blocks but the database and the audit log.
pub struct Broker {
    /// Who is there.
    pub presence: Presence,
    /// Which relays are there.
    pub relays: Relays,
    /// What must last.
    pub store: Store,
    /// Who is enrolled and may do what.
    pub directory: Directory,
    /// The enrolment key, while it is there.
    pub keyring: Keyring,
    /// The newest list of revoked certificates.
    pub revoked: Revoked,
    greeting: RwLock<Arc<Greeting>>,
    /// The relay in this process.
    embedded: OnceLock<Arc<adit_relay::Relay>>,
    /// The audit log.
    pub audit: Audit,
    sessions: Mutex<Sessions>,
    probes: Mutex<Probes>,
    tests: Mutex<HashMap<DeviceId, Arc<probe::Test>>>,
    orders: Mutex<Orders>,
    /// The redirector in this process.
    redirector: OnceLock<Channel>,
    /// Names of relays elsewhere that may be redirectors, too.
    redirectors: RwLock<Vec<String>>,
    /// Technicians for whom ports are being opened, and how many.
    redirecting: Mutex<HashMap<DeviceId, usize>>,
    ticket_key: [u8; 64],
    serial: AtomicU64,
}

impl Broker {
    /// A broker without sessions. `ticket_key`: seed and public key.
    ///
    /// # Errors
    /// The database's.
    pub async fn new(
        store: Store,
        audit: Audit,
        keyring: Keyring,
        ticket_key: [u8; 64],
    ) -> Result<Arc<Self>, sqlx::Error> {
        // Unique over restarts: nobody makes a million pairs of tickets a second.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Ok(Arc::new(Self {
            presence: Presence::default(),
            relays: Relays::default(),
            directory: Directory::load(store.clone()).await?,
            store,
            keyring,
            revoked: Revoked::default(),
            greeting: RwLock::default(),
            embedded: OnceLock::new(),
            audit,
            sessions: Mutex::default(),
            probes: Mutex::default(),
            tests: Mutex::default(),
            orders: Mutex::default(),
            redirector: OnceLock::new(),
            redirectors: RwLock::default(),
            redirecting: Mutex::default(),
            ticket_key,
            serial: AtomicU64::new(now.as_micros() as u64),
        }))
    }

    /// The agents that a technician may reach, sorted by name.
    ///
    /// # Errors
    /// [`Denied`]: the device is no technician.
    pub fn list(&self, device: &Device) -> Result<Vec<AgentInfo>, Denied> {
        let info = |agent: &Arc<Device>| AgentInfo {
            online: self.presence.is_online(agent.id),
            device: agent.id.0.to_vec(),
            name: agent.name.clone(),
            tags: agent.tags.clone(),
            last_seen: agent.seen.at,
            software: agent.seen.software.clone(),
        };
        let technician = self.technician(device)?;
        Ok(self.directory.reachable(&technician).iter().map(info).collect())
    }

    /// Grants a session, or says why not. Grant and offer are on their way when it returns.
    pub async fn open(&self, channel: &Channel, mut open: Open) {
        if open.flight.len() > MAX_FLIGHT {
            open.flight.clear();
        }
        if let Err(denied) = self.try_open(channel, &open).await {
            info!(technician = %channel.device.id, code = ?denied.code, "session refused");
            let from = channel.from.to_string();
            let record = Record {
                technician: Some(party(&channel.device)),
                wanted: shorten(&open.agent),
                targets: &open.targets[..open.targets.len().min(MAX_TARGETS)],
                from: &from,
                reason: &denied.message,
                ..Record::new("refused", unix_now())
            };
            // Of no use to anybody who wants to fill the disk.
            if channel.may_note_refusal() && self.audit.write(&record).await.is_err() {
                warn!("an audit record was lost");
            }
            channel.send(denied.into_message(open.request));
        }
    }

    /// How many sessions there are.
    pub fn session_count(&self) -> usize {
        self.sessions().len()
    }

    async fn try_open(&self, channel: &Channel, open: &Open) -> Result<(), Denied> {
        let targets = &open.targets;
        if targets.len() > MAX_TARGETS || targets.iter().any(|target| target.parse::<Wanted>().is_err()) {
            return Err(Denied::new(RefusedCode::NotPermitted, "a target is not HOST:PORT[/udp]".into()));
        }
        if !["", "auto", "direct", "relay"].contains(&open.via.as_str()) {
            return Err(Denied::new(
                RefusedCode::NotPermitted,
                "this mediator does not know that tier".into(),
            ));
        }
        let technician = self.technician(&channel.device)?;
        let agent = self.directory.agent(&open.agent);
        let (agent, rule) = agent
            .as_ref()
            .and_then(|agent| Some((agent, technician.reaches(agent)?.to_string())))
            .ok_or_else(|| unknown_agent(&open.agent, &self.directory.reachable(&technician)))?;
        let Some(agent_channel) = self.presence.newest(agent.id) else { return Err(offline(agent)) };
        let relays = self.relays.choose();
        if relays.is_empty() && open.via != "direct" {
            let message = "no relay is there: the operator starts one, or runs the mediator with --relay on";
            return Err(Denied::new(RefusedCode::NoRelay, message.into()));
        }
        let end = |channel: &Channel| End {
            device: channel.device.clone(),
            channel: Some(channel.clone()),
            ice: Some(IceCredentials { ufrag: random_text(8), password: random_text(24) }),
            seen: [None; 2],
        };
        let id = SessionId(rand::random());
        let mut session = Session::new(id, end(channel), end(&agent_channel), Instant::now());
        session.request = (!open.flight.is_empty()).then_some(open.request);
        if !self.sessions().insert(session.clone()) {
            let message = "too many sessions: close some first";
            return Err(Denied::new(RefusedCode::Unavailable, message.into()));
        }
        let (from, agent_from) = (channel.from.to_string(), agent_channel.from.to_string());
        let record = Record {
            targets,
            via: &open.via,
            rule: &rule,
            from: &from,
            agent_from: &agent_from,
            ..record("grant", &session)
        };
        if self.audit.write(&record).await.is_err() {
            self.sessions().remove(id, &channel.device);
            return Err(Denied::new(RefusedCode::Unavailable, UNRECORDED.into()));
        }
        // Meanwhile the grant may have been taken away, or the agent have come back without the session.
        if !self.may_reach(technician.id, agent.id) {
            let removed = self.sessions().remove(id, &channel.device);
            if let Some(session) = removed {
                self.write_down(&session, "closed", "the grant was taken away", None).await;
            }
            let technician = self.technician(&channel.device)?;
            return Err(unknown_agent(&open.agent, &self.directory.reachable(&technician)));
        }
        if self.sessions().get(id).is_none() {
            return Err(offline(agent));
        }
        let (to_technician, to_agent) = self.grants(&session, &relays, open);
        self.sessions().ticketed(id, epochs(&relays), Instant::now());
        if !agent_channel.send(Down::Offer(to_agent)) {
            self.sessions().remove(id, &channel.device);
            self.write_down(&session, "closed", "the agent's channel was lost", None).await;
            return Err(offline(agent));
        }
        channel.send(Down::Granted(to_technician));
        info!(session = %id, technician = %channel.device.id, agent = %agent.id, "session granted");
        Ok(())
    }

    /// The rule by which a technician reaches an agent now; `None`: it does not.
    pub fn permits(&self, technician: DeviceId, agent: DeviceId) -> Option<String> {
        let (technician, agent) = (self.directory.get(technician)?, self.directory.get(agent)?);
        technician.reaches(&agent).map(ToString::to_string)
    }

    /// Whether a redirected session may go on: by its rule, and its redirector is still one of ours.
    fn may_go_on(&self, session: &Session) -> bool {
        let Some(redirector) = &session.redirector else { return false };
        let server = &redirector.end.device;
        let known = server.role == Role::Mediator || self.directory.get(server.id).is_some();
        known && self.may_redirect(session.technician.device.id, session.agent.device.id)
    }

    fn may_redirect(&self, technician: DeviceId, agent: DeviceId) -> bool {
        let (technician, agent) = (self.directory.get(technician), self.directory.get(agent));
        technician.zip(agent).is_some_and(|(technician, agent)| technician.redirects(&agent).is_some())
    }

    fn may_reach(&self, technician: DeviceId, agent: DeviceId) -> bool {
        let (technician, agent) = (self.directory.get(technician), self.directory.get(agent));
        technician.zip(agent).is_some_and(|(technician, agent)| technician.reaches(&agent).is_some())
    }

    /// A technician as it is enrolled now.
    fn technician(&self, device: &Device) -> Result<Arc<Device>, Denied> {
        if device.role != Role::Technician {
            let message =
                format!("this device is enrolled as {}: only a technician may do this", device.role);
            return Err(Denied::new(RefusedCode::NotPermitted, message));
        }
        let gone = || Denied::new(RefusedCode::NotPermitted, REVOKED.into());
        self.directory.get(device.id).ok_or_else(gone)
    }

    fn grants(&self, session: &Session, relays: &[Relay], open: &Open) -> (Grant, Grant) {
        let pairing = self.pairing(session);
        // Of no use to who wants the relay only.
        let comes_from = |end: &End| {
            let channel = end.channel.as_ref().filter(|_| open.via != "relay");
            channel.map_or(String::new(), |channel| channel.from.ip().to_canonical().to_string())
        };
        let grant = |role: Role| {
            let peer = session.other(role);
            Grant {
                request: if role == Role::Technician { open.request } else { 0 },
                session: session.id.0.to_vec(),
                peer: peer.device.id.0.to_vec(),
                peer_name: peer.device.name.clone(),
                peer_key: peer.device.public_key.to_vec(),
                local_ice: session.end(role).ice.clone(),
                remote_ice: peer.ice.clone(),
                relays: pairing.tickets(role, relays, &self.ticket_key),
                expires: 0,
                targets: if role == Role::Agent { open.targets.clone() } else { vec![] },
                via: open.via.clone(),
                flight: if role == Role::Agent { open.flight.clone() } else { vec![] },
                flight_passed: role == Role::Technician && !open.flight.is_empty(),
                peer_comes_from: comes_from(peer),
            }
        };
        (grant(Role::Technician), grant(Role::Agent))
    }

    fn pairing(&self, session: &Session) -> Pairing {
        Pairing {
            session: session.id,
            serial: self.serial.fetch_add(1, Ordering::Relaxed),
            technician: session.peer().device.public_key,
            agent: session.agent.device.public_key,
            expires: unix_now() + TICKET_LIFE,
        }
    }

    async fn write_down(
        &self,
        session: &Session,
        event: &str,
        reason: &str,
        counted: Option<(Role, &Closed)>,
    ) {
        let mut record = Record { reason, ..record(event, session) };
        if let Some((role, closed)) = counted {
            record.counted_by = Some(role.as_str());
            record.bytes_sent = Some(closed.bytes_sent);
            record.bytes_received = Some(closed.bytes_received);
        }
        if self.audit.write(&record).await.is_err() {
            warn!(session = %session.id, event, "an audit record was lost");
        }
    }

    fn probes(&self) -> MutexGuard<'_, Probes> {
        self.probes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a request was not granted.
#[derive(Debug)]
pub struct Denied {
    /// For exit codes.
    pub code: RefusedCode,
    /// For people.
    pub message: String,
}

impl Denied {
    fn new(code: RefusedCode, message: String) -> Self {
        Self { code, message }
    }

    /// The message that says so.
    pub fn into_message(self, request: u64) -> Down {
        Down::Refused(Refused { request, code: self.code.into(), message: self.message })
    }
}

fn tell(end: &End, message: Down) {
    if let Some(channel) = &end.channel {
        channel.send(message);
    }
}

/// Tells all parties of a session but the one that said it.
fn tell_all(session: &Session, message: &Closed, but: Option<DeviceId>) {
    let redirector = session.redirector.as_ref().map(|redirector| &redirector.end);
    for end in [Some(&session.technician), Some(&session.agent), redirector].into_iter().flatten() {
        if but != Some(end.device.id) {
            tell(end, Down::Closed(message.clone()));
        }
    }
}

fn closed(session: SessionId, reason: &str) -> Closed {
    Closed { session: session.0.to_vec(), reason: reason.to_owned(), bytes_sent: 0, bytes_received: 0 }
}

fn record<'a>(event: &'a str, session: &'a Session) -> Record<'a> {
    Record {
        session: Some(session.id.to_string()),
        technician: Some(party(&session.technician.device)),
        agent: Some(party(&session.agent.device)),
        ..Record::new(event, unix_now())
    }
}

/// A device in the audit log.
pub fn party(device: &Device) -> Party<'_> {
    Party { id: device.id.to_string(), name: &device.name }
}

fn epochs(relays: &[Relay]) -> Vec<(DeviceId, u64)> {
    relays.iter().map(|relay| (relay.id, relay.epoch)).collect()
}

fn unknown_agent(wanted: &str, reachable: &[Arc<Device>]) -> Denied {
    let names: Vec<&str> = reachable.iter().take(NAMED).map(|agent| agent.name.as_str()).collect();
    let wanted = shorten(wanted);
    let message = match (names.as_slice(), reachable.len().saturating_sub(NAMED)) {
        ([], _) => {
            format!("no agent {wanted:?}: this technician reaches none (the operator: adit-mediator allow)")
        }
        (names, 0) => format!("no agent {wanted:?}; there are: {}", names.join(", ")),
        (names, more) => {
            format!("no agent {wanted:?}; there are: {}, and {more} more (adit ls)", names.join(", "))
        }
    };
    Denied::new(RefusedCode::UnknownAgent, message)
}

fn offline(agent: &Device) -> Denied {
    let seen = match agent.seen.at {
        0 => "it was never online".to_owned(),
        at => format!("last seen {} ago", ago(unix_now(), at)),
    };
    let message = format!(
        "agent {} is offline: {seen}. Is the machine on, and does `adit agent` run there?",
        agent.name
    );
    Denied::new(RefusedCode::AgentOffline, message)
}

/// At most [`MAX_REASON`] bytes, without control characters' effect on logs: those are JSON.
fn shorten(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_REASON)]
}

/// Characters of ICE credentials (RFC 8445 section 5.3); 64 of them, so that each carries 6 bits.
fn random_text(length: usize) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    (0..length).map(|_| char::from(ALPHABET[usize::from(rand::random::<u8>() & 63)])).collect()
}
