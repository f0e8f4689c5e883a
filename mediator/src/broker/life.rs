//! What happens to sessions after they were granted: answers, candidates, tickets, channels that come and
//! go, and their end.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use adit_protocol::control::{
    Answer, Answered, Candidates, Closed, Down, LiveSession, MAX_FLIGHT, Tickets, Tier,
};
use adit_protocol::{DeviceId, Role, SessionId};
use tracing::{info, warn};

use super::{Broker, FORBIDDEN, closed, epochs, record, shorten, tell, tell_all};
use crate::audit::Record;
use crate::presence::Channel;
use crate::relays::{Relay, TICKET_LIFE};
use crate::store::Device;

/// Bytes of candidates that one message may carry.
const MAX_CANDIDATES: usize = 32 * 1024;
/// How often tickets are looked after and lost sessions swept out.
const SWEEP: Duration = Duration::from_secs(60);
/// How often visits are written to the database.
const FLUSH: Duration = Duration::from_secs(5);

impl Broker {
    /// An agent takes the session offered, or does not.
    pub async fn answer(&self, device: &Device, answer: Answer) {
        let Ok(id) = SessionId::try_from(answer.session.as_slice()) else { return };
        if device.role != Role::Agent {
            return;
        }
        if answer.accepted {
            let answered = self.sessions().answered(id, device);
            if let Some((request, technician)) = answered {
                let flight = Some(answer.flight).filter(|flight| flight.len() <= MAX_FLIGHT);
                technician.send(Down::Answered(Answered { request, flight: flight.unwrap_or_default() }));
            }
            return;
        }
        let Some(session) = self.sessions().remove(id, device) else { return };
        let reason = shorten(&answer.reason);
        let said =
            format!("the agent refused: {}", if reason.is_empty() { "it gave no reason" } else { reason });
        tell_all(&session, &closed(id, &said), Some(device.id));
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
        let other = self.sessions().of(id, device).and_then(|s| s.other(device.role).channel.clone());
        if let Some(channel) = other {
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
            tell_all(&session, &closed(id, &reason), Some(device.id));
            self.write_down(&session, "closed", &reason, Some((device.role, &said))).await;
        } else if let Some(claimant) = claimant {
            claimant.send(Down::Closed(closed(id, &reason)));
        }
    }

    /// An agent says on which tier a session runs.
    pub async fn tier(&self, device: &Device, said: Tier) {
        let Ok(id) = SessionId::try_from(said.session.as_slice()) else { return };
        let noted = self.sessions().tier(id, device, shorten(&said.carrier), Instant::now());
        let Some((session, first)) = noted else { return };
        let record = Record {
            tier: shorten(&said.tier),
            carrier: shorten(&said.carrier),
            reason: shorten(&said.reason),
            ..record(if first { "opened" } else { "moved" }, &session)
        };
        if self.audit.write(&record).await.is_err() {
            warn!(session = %session.id, "an audit record was lost");
        }
    }

    /// An end wants a new pair of tickets.
    pub fn renew(&self, device: &Device, session: &[u8]) {
        let Ok(id) = SessionId::try_from(session) else { return };
        // Who is no end of the tunnel has no use for tickets.
        let peer = self.sessions().get(id).is_some_and(|session| session.peer().device.id == device.id);
        if device.role != Role::Agent && !peer {
            return;
        }
        if self.sessions().wish(id, device, Instant::now()) {
            self.push_tickets(id);
        }
    }

    /// A device has come (back) with these sessions.
    pub async fn hello(&self, channel: &Channel, named: &[LiveSession]) {
        let permits = |technician, agent| self.may_reach(technician, agent);
        let greeted = self.sessions().greet(channel, named, permits, Instant::now());
        for session in &greeted.gone {
            let reason = "the agent has been restarted";
            tell_all(session, &closed(session.id, reason), Some(session.agent.device.id));
            self.write_down(session, "closed", reason, None).await;
        }
        for (id, claimant) in &greeted.forbidden {
            claimant.send(Down::Closed(closed(*id, FORBIDDEN)));
        }
        for session in &greeted.restored {
            let rule =
                self.permits(session.technician.device.id, session.agent.device.id).unwrap_or_default();
            // No record, no tickets: the tunnel itself lives on what it has.
            if self.audit.write(&Record { rule: &rule, ..record("restored", session) }).await.is_err() {
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
        let channel = relay.channel.and_then(|_| self.presence.newest(relay.id));
        let lost = self.sessions().redirected_by(relay.id, relay.epoch, channel.as_ref());
        for session in lost {
            let reason = "the redirector was restarted";
            tell_all(&session, &closed(session.id, reason), None);
            self.write_down(&session, "closed", reason, None).await;
        }
        if self.relays.up(relay) {
            self.push_stale().await;
        }
    }

    /// The relay in this process is reached at these addresses from now on.
    pub fn relay_moved(&self, id: DeviceId, addresses: Vec<String>, https: Vec<String>) {
        if self.relays.moved(id, addresses, https) {
            let sessions = self.sessions().ids();
            sessions.into_iter().for_each(|session| self.push_tickets(session));
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

    /// Keeps tickets and certificates fresh, writes visits, and sweeps out sessions that are lost, for ever.
    pub async fn look_after(&self) {
        let mut ticks = tokio::time::interval(SWEEP);
        let mut flushes = tokio::time::interval(FLUSH);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                _ = flushes.tick() => {
                    self.flush().await;
                    continue;
                }
            }
            let lost = self.sessions().expire(Instant::now());
            for session in lost {
                self.write_down(&session, "closed", "both ends have been away for an hour", None).await;
            }
            self.push_stale().await;
            // Without the enrolment key nothing can be renewed: that was said when each device came.
            if self.keyring.authority().is_some() {
                for channel in self.presence.all() {
                    self.refresh(&channel).await;
                }
            }
        }
    }

    /// Writes visits to the database.
    pub async fn flush(&self) {
        if let Err(error) = self.directory.flush().await {
            warn!(%error, "the database failed");
        }
    }

    /// Both ends get tickets of one new pairing, at once.
    fn push_tickets(&self, id: SessionId) {
        let Some(session) = self.sessions().get(id).cloned() else { return };
        let relays = match &session.redirector {
            // The relay that it is in, or none.
            Some(redirector) => self.relays.get(redirector.relay).into_iter().collect(),
            None => self.relays.choose(),
        };
        if relays.is_empty() {
            return;
        }
        let pairing = self.pairing(&session);
        self.sessions().ticketed(id, epochs(&relays), Instant::now());
        for (role, end) in [(Role::Agent, &session.agent), (Role::Technician, session.peer())] {
            let relays = pairing.tickets(role, &relays, &self.ticket_key);
            tell(end, Down::Tickets(Tickets { session: id.0.to_vec(), relays }));
        }
    }

    pub(super) async fn push_stale(&self) {
        let relays = epochs(&self.relays.choose());
        let life = Duration::from_secs(TICKET_LIFE / 2);
        let stale = self.sessions().stale(&relays, life, Instant::now());
        for id in stale {
            self.push_tickets(id);
            // Thousands of signatures: others want to get on in between.
            tokio::task::yield_now().await;
        }
    }
}
