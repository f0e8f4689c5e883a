//! The table of sessions: who belongs to which, and what each end still has to be told.
//!
//! A session lives until one of its ends says that it is over. Channels come and go in between: a tunnel
//! outlives the mediator, and every channel of its ends.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_protocol::control::{IceCredentials, LiveSession};
use adit_protocol::{DeviceId, Role, SessionId};

use crate::presence::{Channel, ChannelId};
use crate::store::Device;

/// Sessions that one mediator keeps.
const MAX_SESSIONS: usize = 20_000;
/// Sessions that one technician may have at once.
const MAX_OF_TECHNICIAN: usize = 256;
/// Sessions that one agent may have at once, and that a device may name when it comes back.
const MAX_OF_AGENT: usize = 1024;
/// How long a session whose two ends have both no channel is kept.
const KEEP: Duration = Duration::from_secs(60 * 60);
/// How long one end's word for a session that the mediator does not know is kept.
const KEEP_CLAIM: Duration = Duration::from_secs(24 * 60 * 60);
/// Moves from carrier to carrier that are written down in a minute, of one session.
const MOVES: u32 = 10;
/// Within this time the two ends' wishes for new tickets are one wish.
const SAME_WISH: Duration = Duration::from_secs(2);

/// One end of a session.
#[derive(Debug, Clone)]
pub struct End {
    /// Who.
    pub device: Arc<Device>,
    /// Where it is told of this session; `None` while it is away.
    pub channel: Option<Channel>,
    /// Its ICE credentials; `None` in a session that outlived the mediator that made them.
    pub ice: Option<IceCredentials>,
    /// From where its last handshakes came: by IPv4, and by IPv6.
    pub seen: [Option<SocketAddr>; 2],
}

/// The end of a session in a server, in the technician's place.
#[derive(Debug, Clone)]
pub struct Redirecting {
    /// The relay's device, or the mediator's.
    pub end: End,
    /// The relay in the same process, through which it reaches the agent.
    pub relay: DeviceId,
    /// And its boot epoch.
    pub epoch: u64,
}

/// A session.
#[derive(Debug, Clone)]
pub struct Session {
    /// Session id.
    pub id: SessionId,
    /// The one that asked for it.
    pub technician: End,
    /// The one that is reached.
    pub agent: End,
    /// Who is the technician's end of the tunnel in its place, if that is not the technician itself.
    pub redirector: Option<Redirecting>,
    /// Relays and boot epochs that both ends hold tickets for.
    pub granted: Vec<(DeviceId, u64)>,
    /// When those tickets were made.
    pub ticketed: Instant,
    /// Whose wish for new tickets was fulfilled last, for both.
    wished: Option<(Role, Instant)>,
    /// Since when both ends have been away.
    away: Option<Instant>,
    /// The carrier that the agent named last.
    carrier: String,
    /// The request with which a flight came for the agent, until it has answered.
    pub request: Option<u64>,
    /// Changes of it that may still be written down in this minute, and when it began.
    moves: (u32, Instant),
}

impl Session {
    /// A session that begins now.
    pub fn new(id: SessionId, technician: End, agent: End, now: Instant) -> Self {
        Self {
            id,
            technician,
            agent,
            redirector: None,
            granted: vec![],
            ticketed: now,
            wished: None,
            away: None,
            carrier: String::new(),
            request: None,
            moves: (MOVES, now),
        }
    }

    /// The party that has this role. Of a tunnel's ends see [`Session::peer`].
    pub fn end(&self, role: Role) -> &End {
        match (role, &self.redirector) {
            (Role::Agent, _) => &self.agent,
            (Role::Relay | Role::Mediator, Some(redirector)) => &redirector.end,
            _ => &self.technician,
        }
    }

    /// The other end of the tunnel.
    pub fn other(&self, role: Role) -> &End {
        if role == Role::Agent { self.peer() } else { &self.agent }
    }

    /// The agent's other end of the tunnel: the technician, or the redirector in its place.
    pub fn peer(&self) -> &End {
        self.redirector.as_ref().map_or(&self.technician, |redirector| &redirector.end)
    }

    fn end_mut(&mut self, role: Role) -> &mut End {
        match (role, &mut self.redirector) {
            (Role::Agent, _) => &mut self.agent,
            (Role::Relay | Role::Mediator, Some(redirector)) => &mut redirector.end,
            _ => &mut self.technician,
        }
    }

    fn belongs_to(&self, device: DeviceId, role: Role) -> bool {
        self.end(role).device.id == device
    }

    fn attach(&mut self, role: Role, channel: &Channel) {
        self.end_mut(role).channel = Some(channel.clone());
        self.away = None;
        // What was seen of the other end may have been lost with the old channel.
        let other = if role == Role::Agent { Role::Technician } else { Role::Agent };
        self.end_mut(other).seen = [None; 2];
    }
}

/// One end's word for a session that the mediator does not know (it was restarted).
struct Claim {
    channel: Channel,
    peer: DeviceId,
    since: Instant,
}

impl Claim {
    fn permitted(&self, permits: impl Fn(DeviceId, DeviceId) -> bool) -> bool {
        let device = &self.channel.device;
        match device.role {
            Role::Technician => permits(device.id, self.peer),
            _ => permits(self.peer, device.id),
        }
    }
}

/// All sessions, and the claims on those that are not known yet.
#[derive(Default)]
pub struct Sessions {
    live: HashMap<SessionId, Session>,
    claims: HashMap<SessionId, Claim>,
}

/// What became of the sessions that a device named in its `Hello`.
#[derive(Default)]
pub struct Greeted {
    /// Both ends named it, and it is known again.
    pub restored: Vec<Session>,
    /// One end or both named it, but this technician may not reach this agent (any more): who is to hear it.
    pub forbidden: Vec<(SessionId, Channel)>,
    /// The agent does not know it (any more).
    pub gone: Vec<Session>,
}

impl Sessions {
    /// Keeps a new session, unless the table or one end's share is full.
    pub fn insert(&mut self, session: Session) -> bool {
        let same = |role: Role| {
            let device = session.end(role).device.id;
            self.live.values().filter(|other| other.end(role).device.id == device).count()
        };
        if self.live.len() >= MAX_SESSIONS
            || same(Role::Technician) >= MAX_OF_TECHNICIAN
            || same(Role::Agent) >= MAX_OF_AGENT
        {
            return false;
        }
        self.live.insert(session.id, session);
        true
    }

    /// The session, when `device` is the end of it that its role says.
    pub fn of(&self, id: SessionId, device: &Device) -> Option<&Session> {
        self.live.get(&id).filter(|session| session.belongs_to(device.id, device.role))
    }

    /// The session, whoever asks.
    pub fn get(&self, id: SessionId) -> Option<&Session> {
        self.live.get(&id)
    }

    /// Takes a session out that `device` says is over.
    pub fn remove(&mut self, id: SessionId, device: &Device) -> Option<Session> {
        self.of(id, device)?;
        self.live.remove(&id)
    }

    /// Drops the claim of the other end on a session that `device` says is over, and says where that
    /// other end is.
    pub fn drop_claim(&mut self, id: SessionId, device: &Device) -> Option<Channel> {
        self.claims.get(&id).filter(|claim| claim.peer == device.id)?;
        self.claims.remove(&id).map(|claim| claim.channel)
    }

    /// Takes note of the sessions that live at a device which has just come (back). `permits` says whether a
    /// technician may reach an agent.
    pub fn greet(
        &mut self,
        channel: &Channel,
        named: &[LiveSession],
        permits: impl Fn(DeviceId, DeviceId) -> bool,
        now: Instant,
    ) -> Greeted {
        let device = &channel.device;
        let mut greeted = Greeted::default();
        let named: Vec<(SessionId, DeviceId)> = named
            .iter()
            .take(MAX_OF_AGENT)
            .filter_map(|named| {
                let session = SessionId::try_from(named.session.as_slice()).ok()?;
                Some((session, DeviceId::try_from(named.peer.as_slice()).ok()?))
            })
            .collect();
        // A technician has a channel for each command that runs, each with its own sessions; an agent
        // that does not name a session has lost it.
        if device.role == Role::Agent {
            let gone: Vec<SessionId> = self
                .live
                .values()
                .filter(|session| session.agent.device.id == device.id)
                // One that was offered on this very channel meanwhile is not lost.
                .filter(|session| session.agent.channel.as_ref().is_none_or(|own| own.id != channel.id))
                .map(|session| session.id)
                .filter(|id| !named.iter().any(|(known, _)| known == id))
                .collect();
            greeted.gone.extend(gone.iter().filter_map(|id| self.live.remove(id)));
        }
        for (id, peer) in named {
            match self.live.get_mut(&id) {
                Some(session) if session.belongs_to(device.id, device.role) => {
                    session.attach(device.role, channel)
                }
                Some(_) => {}
                None => self.claim(id, peer, channel, &permits, now, &mut greeted),
            }
        }
        greeted
    }

    /// A channel is gone: its sessions stay.
    pub fn detach(&mut self, channel: ChannelId, now: Instant) {
        for session in self.live.values_mut() {
            for role in [Role::Technician, Role::Agent, Role::Relay] {
                let end = session.end_mut(role);
                if end.channel.as_ref().is_some_and(|own| own.id == channel) {
                    end.channel = None;
                }
            }
            if session.peer().channel.is_none() && session.agent.channel.is_none() {
                session.away.get_or_insert(now);
            }
        }
        self.claims.retain(|_, claim| claim.channel.id != channel);
    }

    /// Whether this end's wish for new tickets is one to fulfil. It is not when the other end's was
    /// fulfilled, for both, a moment ago.
    pub fn wish(&mut self, id: SessionId, device: &Device, now: Instant) -> bool {
        let Some(session) = self.live.get_mut(&id).filter(|s| s.belongs_to(device.id, device.role)) else {
            return false;
        };
        match session.wished.take() {
            Some((role, at)) if role != device.role && now.duration_since(at) < SAME_WISH => false,
            _ => {
                session.wished = Some((device.role, now));
                true
            }
        }
    }

    /// Notes which carrier a session runs on, in the agent's word; says whether that is the first. `None` when
    /// it is no news, or more of it than anybody wants to read.
    pub fn tier(
        &mut self,
        id: SessionId,
        device: &Device,
        carrier: &str,
        now: Instant,
    ) -> Option<(Session, bool)> {
        let session = self.live.get_mut(&id).filter(|session| session.agent.device.id == device.id)?;
        if now.duration_since(session.moves.1) >= Duration::from_secs(60) {
            session.moves = (MOVES, now);
        }
        if session.carrier == carrier || session.moves.0 == 0 {
            return None;
        }
        session.moves.0 -= 1;
        let first = std::mem::replace(&mut session.carrier, carrier.to_owned()).is_empty();
        Some((session.clone(), first))
    }

    /// The agent has answered, for the first time: which request, and on which channel it came.
    pub fn answered(&mut self, id: SessionId, device: &Device) -> Option<(u64, Channel)> {
        let session = self.live.get_mut(&id).filter(|session| session.agent.device.id == device.id)?;
        let request = session.request.take()?;
        Some((request, session.technician.channel.clone()?))
    }

    /// Notes which relays both ends hold tickets for.
    pub fn ticketed(&mut self, id: SessionId, granted: Vec<(DeviceId, u64)>, now: Instant) {
        if let Some(session) = self.live.get_mut(&id) {
            session.granted = granted;
            session.ticketed = now;
        }
    }

    /// Notes from where a handshake came. Says where to tell it, when it is news.
    pub fn seen(&mut self, id: SessionId, role: Role, from: SocketAddr) -> Option<Channel> {
        let session = self.live.get_mut(&id)?;
        let end = session.end_mut(role);
        if end.seen[usize::from(from.is_ipv6())].replace(from) == Some(from) {
            return None;
        }
        session.other(role).channel.clone()
    }

    /// Sessions that want new tickets: theirs are older than `life`, or for other relays than `relays`.
    pub fn stale(&self, relays: &[(DeviceId, u64)], life: Duration, now: Instant) -> Vec<SessionId> {
        let stale = |session: &&Session| {
            now.duration_since(session.ticketed) >= life
                || session.redirector.is_none() && relays.iter().any(|relay| !session.granted.contains(relay))
        };
        self.live.values().filter(stale).map(|session| session.id).collect()
    }

    /// Takes out the sessions that are no longer permitted, and the claims on such ones with the end that made
    /// each: the other end may never come.
    pub fn forbid(
        &mut self,
        permits: impl Fn(DeviceId, DeviceId) -> bool,
        redirects: impl Fn(&Session) -> bool,
    ) -> (Vec<Session>, Vec<(SessionId, Channel)>) {
        let live = self.live.extract_if(|_, session| {
            let (technician, agent) = (session.technician.device.id, session.agent.device.id);
            !match session.redirector {
                Some(_) => redirects(session),
                None => permits(technician, agent),
            }
        });
        let claims = self.claims.extract_if(|_, claim| !claim.permitted(&permits));
        (live.map(|(_, session)| session).collect(), claims.map(|(id, claim)| (id, claim.channel)).collect())
    }

    /// A relay has come (back): the redirected sessions of its process hear from it on this channel from now on. Takes out
    /// those of an earlier process, which is no more.
    pub fn redirected_by(&mut self, relay: DeviceId, epoch: u64, channel: Option<&Channel>) -> Vec<Session> {
        for session in self.live.values_mut() {
            let ours = session.redirector.as_mut().filter(|end| (end.relay, end.epoch) == (relay, epoch));
            if let (Some(redirector), Some(channel)) = (ours, channel) {
                redirector.end.channel = Some(channel.clone());
                session.away = None;
            }
        }
        let lost = |session: &Session| {
            session.redirector.as_ref().is_some_and(|end| end.relay == relay && end.epoch != epoch)
        };
        self.live.extract_if(|_, session| lost(session)).map(|(_, session)| session).collect()
    }

    /// How many redirected sessions this technician has.
    pub fn redirected_for(&self, technician: DeviceId) -> usize {
        let theirs =
            |session: &&Session| session.redirector.is_some() && session.technician.device.id == technician;
        self.live.values().filter(theirs).count()
    }

    /// Forgets sessions whose ends have both been away for long, and old claims.
    pub fn expire(&mut self, now: Instant) -> Vec<Session> {
        self.claims.retain(|_, claim| now.duration_since(claim.since) < KEEP_CLAIM);
        let lost = |session: &&Session| session.away.is_some_and(|since| now.duration_since(since) >= KEEP);
        let lost: Vec<SessionId> = self.live.values().filter(lost).map(|session| session.id).collect();
        lost.iter().filter_map(|id| self.live.remove(id)).collect()
    }

    /// All sessions.
    pub fn ids(&self) -> Vec<SessionId> {
        self.live.keys().copied().collect()
    }

    /// How many sessions there are.
    pub fn len(&self) -> usize {
        self.live.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    /// One end names a session that is not known. When the other end has named it too, it is restored.
    fn claim(
        &mut self,
        id: SessionId,
        peer: DeviceId,
        channel: &Channel,
        permits: &impl Fn(DeviceId, DeviceId) -> bool,
        now: Instant,
        greeted: &mut Greeted,
    ) {
        let claim = Claim { channel: channel.clone(), peer, since: now };
        if !claim.permitted(permits) {
            greeted.forbidden.push((id, claim.channel));
            return;
        }
        let mirrored = self.claims.get(&id).is_some_and(|other| {
            (other.channel.device.id, other.peer) == (peer, channel.device.id)
                && matches!(
                    (other.channel.device.role, channel.device.role),
                    (Role::Agent, Role::Technician) | (Role::Technician, Role::Agent)
                )
        });
        if !mirrored {
            // The first word stays: nobody else can take a session away by naming it.
            let own = self.claims.get(&id).is_none_or(|claim| claim.channel.device.id == channel.device.id);
            if own && self.claims.len() < MAX_SESSIONS {
                self.claims.insert(id, claim);
            }
            return;
        }
        let Some(other) = self.claims.remove(&id) else { return };
        let (technician, agent) = match channel.device.role {
            Role::Technician => (channel.clone(), other.channel),
            _ => (other.channel, channel.clone()),
        };
        let end = |channel: Channel| End {
            device: channel.device.clone(),
            channel: Some(channel),
            ice: None,
            seen: [None; 2],
        };
        let session = Session::new(id, end(technician), end(agent), now);
        if self.insert(session.clone()) {
            greeted.restored.push(session);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::presence::Presence;

    fn channel(presence: &Presence, role: Role, id: u8) -> Channel {
        presence.channel(crate::presence::arrival(role, id, 1), tokio::sync::mpsc::channel(1).0)
    }

    fn session(id: u8, technician: &Channel, agent: &Channel, now: Instant) -> Session {
        let end = |channel: &Channel| End {
            device: channel.device.clone(),
            channel: Some(channel.clone()),
            ice: None,
            seen: [None; 2],
        };
        Session::new(SessionId([id; 16]), end(technician), end(agent), now)
    }

    #[test]
    fn an_end_that_is_seen_by_both_ip_versions_is_news_once_by_each() {
        let (presence, now) = (Presence::default(), Instant::now());
        let (technician, agent) =
            (channel(&presence, Role::Technician, 1), channel(&presence, Role::Agent, 2));
        let mut sessions = Sessions::default();
        let session = session(1, &technician, &agent, now);
        let id = session.id;
        assert!(sessions.insert(session));
        let mut is_news =
            |from: &str| sessions.seen(id, Role::Agent, from.parse().expect("an address")).is_some();
        let (v4, v6) = ("192.0.2.1:40000", "[2001:db8::1]:40000");
        assert_eq!([v4, v6, v4, v6, "192.0.2.1:40001"].map(&mut is_news), [true, true, false, false, true]);
    }

    #[test]
    fn only_sessions_whose_ends_are_both_away_for_long_expire() {
        let (presence, now) = (Presence::default(), Instant::now());
        let (technician, agent) =
            (channel(&presence, Role::Technician, 1), channel(&presence, Role::Agent, 2));
        let mut sessions = Sessions::default();
        assert!(sessions.insert(session(1, &technician, &agent, now)));
        sessions.detach(agent.id, now);
        assert!(sessions.expire(now + 2 * KEEP).is_empty());
        sessions.detach(technician.id, now + KEEP);
        assert!(sessions.expire(now + 2 * KEEP - Duration::from_secs(1)).is_empty());
        assert_eq!(sessions.expire(now + 2 * KEEP).len(), 1);
        assert!(sessions.is_empty());
    }

    #[test]
    fn one_technician_cannot_fill_the_table() {
        let (presence, now) = (Presence::default(), Instant::now());
        let (technician, agent) =
            (channel(&presence, Role::Technician, 1), channel(&presence, Role::Agent, 2));
        let mut sessions = Sessions::default();
        for number in 0..=255 {
            assert!(sessions.insert(session(number, &technician, &agent, now)));
        }
        assert_eq!(sessions.len(), MAX_OF_TECHNICIAN);
        assert!(!sessions.insert(session(0, &technician, &agent, now)));
        let colleague = channel(&presence, Role::Technician, 3);
        assert!(sessions.insert(session(0, &colleague, &agent, now)));
    }

    #[test]
    fn what_is_no_longer_permitted_is_taken_out() {
        let (presence, now) = (Presence::default(), Instant::now());
        let agent = channel(&presence, Role::Agent, 2);
        let mut sessions = Sessions::default();
        for id in [1, 3] {
            sessions.insert(session(id, &channel(&presence, Role::Technician, id), &agent, now));
        }
        let (ended, _) = sessions.forbid(|technician, _| technician == DeviceId([3; 16]), |_| false);
        assert_eq!(ended.iter().map(|session| session.id).collect::<Vec<_>>(), [SessionId([1; 16])]);
        assert_eq!(sessions.len(), 1);
    }

    #[test]
    fn a_redirected_session_has_three_parties_and_a_rule_of_its_own() {
        let (presence, now) = (Presence::default(), Instant::now());
        let parties = [(Role::Technician, 1), (Role::Agent, 2), (Role::Relay, 3), (Role::Relay, 4)];
        let [technician, agent, server, other] = parties.map(|(role, id)| channel(&presence, role, id));
        let redirecting = session(1, &server, &agent, now).technician;
        let mut session = session(1, &technician, &agent, now);
        session.redirector = Some(Redirecting { end: redirecting, relay: server.device.id, epoch: 5 });
        let id = session.id;
        let mut sessions = Sessions::default();
        assert!(sessions.insert(session.clone()));
        assert_eq!(session.peer().device.id, server.device.id);
        assert_eq!(session.other(Role::Agent).device.id, server.device.id);
        assert_eq!(session.other(Role::Relay).device.id, agent.device.id);
        // All three may end it, and no other relay.
        assert!(sessions.of(id, &technician.device).is_some() && sessions.of(id, &server.device).is_some());
        assert!(sessions.remove(id, &other.device).is_none());
        // The grant for tunnels is not enough.
        let (ended, _) = sessions.forbid(|_, _| true, |_| false);
        assert_eq!(ended.len(), 1);
        assert!(sessions.insert(session));
        assert_eq!(sessions.redirected_for(technician.device.id), 1);
        // The same process on a new channel keeps it; another process has lost it.
        sessions.detach(server.id, now);
        let back = channel(&presence, Role::Relay, 3);
        assert!(sessions.redirected_by(other.device.id, 6, None).is_empty());
        assert!(sessions.redirected_by(server.device.id, 5, Some(&back)).is_empty());
        assert_eq!(sessions.get(id).and_then(|s| s.peer().channel.as_ref().map(|own| own.id)), Some(back.id));
        assert_eq!(sessions.redirected_by(server.device.id, 6, Some(&back)).len(), 1);
    }

    #[test]
    fn one_ends_word_for_a_session_that_is_not_permitted_is_refused_then_and_later() {
        let (presence, now) = (Presence::default(), Instant::now());
        let (technician, agent) =
            (channel(&presence, Role::Technician, 1), channel(&presence, Role::Agent, 2));
        let named = |id: u8, peer: u8| LiveSession { session: vec![id; 16], peer: vec![peer; 16] };
        let mut sessions = Sessions::default();
        let permits = |technician, _| technician == DeviceId([1; 16]);
        // With a technician who has no grant, at once.
        let greeted = sessions.greet(&agent, &[named(7, 1), named(8, 3)], permits, now);
        let ids = |closed: &[(SessionId, Channel)]| closed.iter().map(|(id, _)| *id).collect::<Vec<_>>();
        assert_eq!(ids(&greeted.forbidden), [SessionId([8; 16])]);
        // With one who loses it before it comes back itself, then.
        let (ended, claimants) = sessions.forbid(|_, _| false, |_| false);
        assert!(ended.is_empty());
        assert_eq!(ids(&claimants), [SessionId([7; 16])]);
        assert_eq!(claimants[0].1.id, agent.id);
        assert!(sessions.greet(&technician, &[named(7, 2)], permits, now).restored.is_empty());
    }

    #[test]
    fn nobody_else_can_end_or_take_a_session() {
        let (presence, now) = (Presence::default(), Instant::now());
        let (technician, agent) =
            (channel(&presence, Role::Technician, 1), channel(&presence, Role::Agent, 2));
        let (rival, thief) = (channel(&presence, Role::Technician, 3), channel(&presence, Role::Agent, 4));
        let id = SessionId([1; 16]);
        let mut sessions = Sessions::default();
        assert!(sessions.insert(session(1, &technician, &agent, now)));
        let named = |peer: u8| LiveSession { session: vec![1; 16], peer: vec![peer; 16] };
        for (other, peer) in [(&rival, 2), (&thief, 1)] {
            assert!(sessions.remove(id, &other.device).is_none());
            assert!(!sessions.wish(id, &other.device, now));
            let greeted = sessions.greet(other, &[named(peer)], |_, _| true, now);
            assert!(greeted.restored.is_empty() && greeted.gone.is_empty());
            assert_ne!(
                sessions.get(id).and_then(|s| s.end(other.device.role).channel.as_ref()).map(|c| c.id),
                Some(other.id)
            );
        }
        // Two strangers that name each other's session do not get it either.
        assert!(sessions.greet(&rival, &[named(4)], |_, _| true, now).restored.is_empty());
        assert!(sessions.greet(&thief, &[named(3)], |_, _| true, now).restored.is_empty());
        assert!(sessions.remove(id, &agent.device).is_some());
    }
}
