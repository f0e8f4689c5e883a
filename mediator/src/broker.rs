//! The broker: authorises, writes the audit record, mints tickets, tells both ends at once.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use adit_protocol::control::{
    AgentInfo, Answer, Candidates, Closed, Down, Grant, IceCredentials, LiveSession, Open, Refused,
    RefusedCode, Tickets,
};
use adit_protocol::{Role, SessionId, Target};
use tracing::{info, warn};

use crate::audit::{Audit, Party, Record};
use crate::organisation::unix_now;
use crate::presence::{Channel, Presence};
use crate::relays::{Pairing, Relay, Relays, TICKET_LIFE};
use crate::sessions::{End, Session, Sessions};
use crate::store::{Device, Store};

/// Targets that one request may name.
const MAX_TARGETS: usize = 64;
/// Bytes of candidates that one message may carry.
const MAX_CANDIDATES: usize = 32 * 1024;
/// Longest reason that is passed on or written down, in bytes.
const MAX_REASON: usize = 256;
/// Agents that a refusal names.
const NAMED: usize = 10;
/// How often tickets are looked after and lost sessions swept out.
const SWEEP: Duration = Duration::from_secs(60);

/// Everything that sessions need, in one place. Nothing here blocks but the database and the audit log.
pub struct Broker {
    /// Who is there.
    pub presence: Presence,
    /// Which relays are there.
    pub relays: Relays,
    /// Devices and tokens.
    pub store: Store,
    /// The audit log.
    pub audit: Audit,
    sessions: Mutex<Sessions>,
    ticket_key: [u8; 64],
    serial: AtomicU64,
}

impl Broker {
    /// A broker without sessions. `ticket_key`: seed and public key.
    pub fn new(store: Store, audit: Audit, ticket_key: [u8; 64]) -> Arc<Self> {
        // Unique over restarts: nobody makes a million pairs of tickets a second.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Arc::new(Self {
            presence: Presence::default(),
            relays: Relays::default(),
            store,
            audit,
            sessions: Mutex::default(),
            ticket_key,
            serial: AtomicU64::new(now.as_micros() as u64),
        })
    }

    /// The agents that a technician may reach, sorted by name.
    ///
    /// # Errors
    /// [`Denied`]: the device is no technician, or the database failed.
    pub async fn list(&self, device: &Device) -> Result<Vec<AgentInfo>, Denied> {
        let info = |agent: Device| AgentInfo {
            online: self.presence.is_online(agent.id),
            device: agent.id.0.to_vec(),
            name: agent.name,
            tags: agent.tags,
            last_seen: agent.last_seen,
            software: agent.software,
        };
        Ok(self.reachable(device).await?.into_iter().map(info).collect())
    }

    /// Grants a session, or says why not. Grant and offer are on their way when it returns.
    pub async fn open(&self, channel: &Channel, open: Open) {
        let request = open.request;
        if let Err(denied) = self.try_open(channel, open).await {
            info!(technician = %channel.device.id, code = ?denied.code, "session refused");
            channel.send(denied.into_message(request));
        }
    }

    /// An agent takes the session offered, or does not.
    pub async fn answer(&self, device: &Device, answer: Answer) {
        let Ok(id) = SessionId::try_from(answer.session.as_slice()) else { return };
        if answer.accepted || device.role != Role::Agent {
            return;
        }
        let Some(session) = self.sessions().remove(id, device) else { return };
        let reason = shorten(&answer.reason);
        let said =
            format!("the agent refused: {}", if reason.is_empty() { "it gave no reason" } else { reason });
        tell(&session.technician, Down::Closed(closed(id, &said)));
        self.write_down(&session, "refused", &said, None).await;
    }

    /// Passes candidates on to the other end.
    pub fn candidates(&self, device: &Device, mut candidates: Candidates) {
        let Ok(id) = SessionId::try_from(candidates.session.as_slice()) else { return };
        if candidates.candidates.len() > MAX_CANDIDATES {
            return;
        }
        // Only the mediator itself says what it saw.
        candidates.seen.clear();
        let other = self.sessions().of(id, device).map(|session| session.other(device.role).clone());
        if let Some(channel) = other.and_then(|other| other.channel) {
            channel.pass_on(Down::Candidates(candidates));
        }
    }

    /// An end says that its session is over.
    pub async fn closed(&self, device: &Device, said: Closed) {
        let Ok(id) = SessionId::try_from(said.session.as_slice()) else { return };
        let reason = shorten(&said.reason).to_owned();
        let (session, claimant) = {
            let mut sessions = self.sessions();
            (sessions.remove(id, device), sessions.drop_claim(id, device))
        };
        if let Some(session) = session {
            tell(session.other(device.role), Down::Closed(closed(id, &reason)));
            self.write_down(&session, "closed", &reason, Some((device.role, &said))).await;
        } else if let Some(claimant) = claimant {
            claimant.send(Down::Closed(closed(id, &reason)));
        }
    }

    /// An end wants a new pair of tickets.
    pub fn renew(&self, device: &Device, session: &[u8]) {
        let Ok(id) = SessionId::try_from(session) else { return };
        if self.sessions().wish(id, device, Instant::now()) {
            self.push_tickets(id);
        }
    }

    /// A device has come (back) with these sessions.
    pub async fn hello(&self, channel: &Channel, named: &[LiveSession]) {
        let greeted = self.sessions().greet(channel, named, Instant::now());
        for session in &greeted.gone {
            let reason = "the agent has been restarted";
            tell(&session.technician, Down::Closed(closed(session.id, reason)));
            self.write_down(session, "closed", reason, None).await;
        }
        for (id, technician, agent) in &greeted.forbidden {
            let message = closed(*id, "this technician may not reach this agent");
            technician.send(Down::Closed(message.clone()));
            agent.send(Down::Closed(message));
        }
        for session in &greeted.restored {
            // No record, no tickets: the tunnel itself lives on what it has.
            if self.audit.write(&record("restored", session)).await.is_err() {
                warn!(session = %session.id, "not restored: the audit record cannot be written");
                self.sessions().remove(session.id, &session.agent.device);
                continue;
            }
            info!(session = %session.id, "session restored");
            self.push_tickets(session.id);
        }
    }

    /// A channel is gone. Its sessions go on.
    pub fn gone(&self, channel: &Channel) {
        self.presence.leave(channel);
        self.relays.down(channel.id);
        self.sessions().detach(channel.id, Instant::now());
    }

    /// A relay is there. Sessions that hold no ticket for it, or one of an older epoch, get new ones.
    pub async fn relay_up(&self, relay: Relay) {
        info!(relay = %relay.id, epoch = relay.epoch, "relay is up");
        if self.relays.up(relay) {
            self.push_stale().await;
        }
    }

    /// ICE password of one end of a session.
    pub fn ice_password(&self, id: SessionId, role: Role) -> Option<String> {
        let sessions = self.sessions();
        sessions.get(id)?.end(role).ice.as_ref().map(|ice| ice.password.clone())
    }

    /// A handshake of one end came from this address: tells the other end.
    pub fn seen(&self, id: SessionId, role: Role, from: SocketAddr) {
        let channel = self.sessions().seen(id, role, from);
        if let Some(channel) = channel {
            let candidates = vec![];
            channel.pass_on(Down::Candidates(Candidates {
                session: id.0.to_vec(),
                candidates,
                seen: from.to_string(),
            }));
        }
    }

    /// Keeps tickets fresh and sweeps out sessions that are lost, for ever.
    pub async fn look_after(&self) {
        let mut ticks = tokio::time::interval(SWEEP);
        loop {
            ticks.tick().await;
            let lost = self.sessions().expire(Instant::now());
            for session in lost {
                self.write_down(&session, "closed", "both ends have been away for an hour", None).await;
            }
            self.push_stale().await;
        }
    }

    /// How many sessions there are.
    pub fn session_count(&self) -> usize {
        self.sessions().len()
    }

    async fn try_open(&self, channel: &Channel, open: Open) -> Result<(), Denied> {
        let targets = open.targets;
        if targets.len() > MAX_TARGETS || targets.iter().any(|target| target.parse::<Target>().is_err()) {
            return Err(Denied::new(RefusedCode::NotPermitted, "a target is not HOST:PORT[/udp]".into()));
        }
        if !["", "auto", "direct", "relay"].contains(&open.via.as_str()) {
            return Err(Denied::new(
                RefusedCode::NotPermitted,
                "this mediator does not know that tier".into(),
            ));
        }
        let reachable = self.reachable(&channel.device).await?;
        let wanted = |agent: &&Device| agent.name == open.agent || agent.id.to_string() == open.agent;
        let agent = reachable.iter().find(wanted).ok_or_else(|| unknown_agent(&open.agent, &reachable))?;
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
            seen: None,
        };
        let id = SessionId(rand::random());
        let session = Session::new(id, end(channel), end(&agent_channel), Instant::now());
        if !self.sessions().insert(session.clone()) {
            let message = "too many sessions: close some first";
            return Err(Denied::new(RefusedCode::Unavailable, message.into()));
        }
        let record = Record { targets: &targets, via: &open.via, ..record("grant", &session) };
        if self.audit.write(&record).await.is_err() {
            self.sessions().remove(id, &channel.device);
            let message =
                "the mediator cannot write its audit record: the operator checks disk and permissions";
            return Err(Denied::new(RefusedCode::Unavailable, message.into()));
        }
        // The agent may have come back without it meanwhile, and then it is closed already.
        if self.sessions().get(id).is_none() {
            return Err(offline(agent));
        }
        let (to_technician, to_agent) = self.grants(&session, &relays, open.request, &open.via, &targets);
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

    async fn reachable(&self, device: &Device) -> Result<Vec<Device>, Denied> {
        if device.role != Role::Technician {
            let message =
                format!("this device is enrolled as {}: only a technician may do this", device.role);
            return Err(Denied::new(RefusedCode::NotPermitted, message));
        }
        let mut agents = self.store.devices(Role::Agent).await.map_err(|error| {
            warn!(%error, "the database failed");
            Denied::new(
                RefusedCode::Unavailable,
                "the mediator's database failed: the operator checks its disk".into(),
            )
        })?;
        agents.retain(|agent| device.reach.covers(&agent.tags));
        Ok(agents)
    }

    fn grants(
        &self,
        session: &Session,
        relays: &[Relay],
        request: u64,
        via: &str,
        targets: &[String],
    ) -> (Grant, Grant) {
        let pairing = self.pairing(session);
        let grant = |role: Role| {
            let peer = session.other(role);
            Grant {
                request: if role == Role::Technician { request } else { 0 },
                session: session.id.0.to_vec(),
                peer: peer.device.id.0.to_vec(),
                peer_name: peer.device.name.clone(),
                peer_key: peer.device.public_key.to_vec(),
                local_ice: session.end(role).ice.clone(),
                remote_ice: peer.ice.clone(),
                relays: pairing.tickets(role, relays, &self.ticket_key),
                expires: 0,
                targets: if role == Role::Agent { targets.to_vec() } else { vec![] },
                via: via.to_owned(),
            }
        };
        (grant(Role::Technician), grant(Role::Agent))
    }

    /// Both ends get tickets of one new pairing, at once.
    fn push_tickets(&self, id: SessionId) {
        let relays = self.relays.choose();
        let Some(session) = self.sessions().get(id).cloned() else { return };
        if relays.is_empty() {
            return;
        }
        let pairing = self.pairing(&session);
        self.sessions().ticketed(id, epochs(&relays), Instant::now());
        for role in [Role::Agent, Role::Technician] {
            let relays = pairing.tickets(role, &relays, &self.ticket_key);
            tell(session.end(role), Down::Tickets(Tickets { session: id.0.to_vec(), relays }));
        }
    }

    async fn push_stale(&self) {
        let relays = epochs(&self.relays.choose());
        let life = Duration::from_secs(TICKET_LIFE / 2);
        let stale = self.sessions().stale(&relays, life, Instant::now());
        for id in stale {
            self.push_tickets(id);
            // Thousands of signatures: others want to get on in between.
            tokio::task::yield_now().await;
        }
    }

    fn pairing(&self, session: &Session) -> Pairing {
        Pairing {
            session: session.id,
            serial: self.serial.fetch_add(1, Ordering::Relaxed),
            technician: session.technician.device.public_key,
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

fn closed(session: SessionId, reason: &str) -> Closed {
    Closed { session: session.0.to_vec(), reason: reason.to_owned(), bytes_sent: 0, bytes_received: 0 }
}

fn record<'a>(event: &'a str, session: &'a Session) -> Record<'a> {
    let party = |end: &'a End| Some(Party { id: end.device.id.to_string(), name: &end.device.name });
    Record {
        session: Some(session.id.to_string()),
        technician: party(&session.technician),
        agent: party(&session.agent),
        ..Record::new(event, unix_now())
    }
}

fn epochs(relays: &[Relay]) -> Vec<(adit_protocol::DeviceId, u64)> {
    relays.iter().map(|relay| (relay.id, relay.epoch)).collect()
}

fn unknown_agent(wanted: &str, reachable: &[Device]) -> Denied {
    let names: Vec<&str> = reachable.iter().take(NAMED).map(|agent| agent.name.as_str()).collect();
    let wanted = shorten(wanted);
    let message = match (names.as_slice(), reachable.len().saturating_sub(NAMED)) {
        ([], _) => format!("no agent {wanted:?}: this technician may reach none (its token's tags decide)"),
        (names, 0) => format!("no agent {wanted:?}; there are: {}", names.join(", ")),
        (names, more) => {
            format!("no agent {wanted:?}; there are: {}, and {more} more (adit ls)", names.join(", "))
        }
    };
    Denied::new(RefusedCode::UnknownAgent, message)
}

fn offline(agent: &Device) -> Denied {
    let seen = match agent.last_seen {
        0 => "it was never online".to_owned(),
        at => format!("last seen {} ago", ago(unix_now().saturating_sub(at))),
    };
    let message = format!(
        "agent {} is offline: {seen}. Is the machine on, and does `adit agent` run there?",
        agent.name
    );
    Denied::new(RefusedCode::AgentOffline, message)
}

fn ago(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// At most [`MAX_REASON`] bytes, without control characters' effect on logs: those are JSON.
fn shorten(text: &str) -> &str {
    let end = (0..=MAX_REASON.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    &text[..end]
}

/// Characters of ICE credentials (RFC 8445 section 5.3); 64 of them, so that each carries 6 bits.
fn random_text(length: usize) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    (0..length).map(|_| char::from(ALPHABET[usize::from(rand::random::<u8>() & 63)])).collect()
}
