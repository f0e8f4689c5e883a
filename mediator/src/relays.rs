//! Which relays there are, and tickets for them.

use std::sync::{Mutex, PoisonError};

use adit_protocol::control::RelayTicket;
use adit_protocol::ticket::Ticket;
use adit_protocol::{DeviceId, Role, SessionId};
use adit_relay::certificates::canonical;

use crate::presence::ChannelId;

/// How long a ticket may lie unused, in seconds. A session gets new ones at half of it.
pub const TICKET_LIFE: u64 = 3600;
/// More relays than one mediator needs.
const MAX_RELAYS: usize = 256;
/// More addresses than one relay needs.
const MAX_ADDRESSES: usize = 8;
const MAX_ADDRESS: usize = 262;

/// One relay that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relay {
    /// Device id.
    pub id: DeviceId,
    /// Boot epoch.
    pub epoch: u64,
    /// `HOST:PORT` (TCP) each.
    pub addresses: Vec<String>,
    /// `HOST:PORT` (UDP) of its STUN server; empty: none.
    pub stun: String,
    /// `HOST:PORT` (TCP) each, by WebSocket over TLS.
    pub https: Vec<String>,
    /// It has a redirector.
    pub redirector: bool,
    /// Its control channel; `None`: embedded.
    pub channel: Option<ChannelId>,
}

impl Relay {
    /// Whether what a relay says of itself is within bounds.
    pub fn is_sane(&self) -> bool {
        let sane =
            |address: &String| address.len() <= MAX_ADDRESS && address.bytes().all(|b| b.is_ascii_graphic());
        (1..=MAX_ADDRESSES).contains(&self.addresses.len())
            && self.https.len() <= MAX_ADDRESSES
            && self.addresses.iter().chain(&self.https).all(sane)
            && sane(&self.stun)
    }

    /// Leaves only the addresses on hosts that the operator gave when the relay was enrolled: one that was
    /// taken over cannot send devices elsewhere.
    pub fn keep_hosts(&mut self, enrolled: &[String]) {
        let known = |address: &String| {
            let host = address.rsplit_once(':').map_or("", |(host, _)| host).trim_matches(['[', ']']);
            enrolled.iter().any(|known| canonical(known) == canonical(host))
        };
        self.addresses.retain(known);
        self.https.retain(known);
        if !known(&self.stun) {
            self.stun.clear();
        }
    }

    fn hosts(&self) -> impl Iterator<Item = &str> {
        self.addresses.iter().filter_map(|address| address.rsplit_once(':')).map(|(host, _)| host)
    }
}

/// All relays that are there.
#[derive(Debug, Default)]
pub struct Relays {
    list: Mutex<Vec<Relay>>,
}

impl Relays {
    /// Adds a relay, in the place of what was known of it. Says whether that is news to sessions: a new
    /// relay, or a new epoch, which voids all older tickets.
    pub fn up(&self, relay: Relay) -> bool {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        let news = !list.iter().any(|known| (known.id, known.epoch) == (relay.id, relay.epoch));
        list.retain(|known| known.id != relay.id);
        if list.len() < MAX_RELAYS {
            list.push(relay);
        }
        news
    }

    /// A relay is reached at other addresses; says whether that is news.
    pub fn moved(&self, id: DeviceId, addresses: Vec<String>, https: Vec<String>) -> bool {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(relay) = list.iter_mut().find(|relay| relay.id == id) else { return false };
        let news = relay.addresses != addresses || relay.https != https;
        (relay.addresses, relay.https) = (addresses, https);
        news
    }

    /// Removes the relay that came by this channel.
    pub fn down(&self, channel: ChannelId) {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|relay| relay.channel != Some(channel));
    }

    /// The relays that a session is granted: the embedded one first, two on different hosts where there
    /// are two.
    pub fn choose(&self) -> Vec<Relay> {
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sorted: Vec<&Relay> = list.iter().collect();
        sorted.sort_by_key(|relay| relay.channel.is_some());
        let Some((first, rest)) = sorted.split_first() else { return vec![] };
        let elsewhere = |relay: &&&Relay| !relay.hosts().any(|host| first.hosts().any(|taken| taken == host));
        let second = rest.iter().find(elsewhere).or(rest.first());
        [*first].into_iter().chain(second.copied()).cloned().collect()
    }

    /// This relay, if it is there.
    pub fn get(&self, id: DeviceId) -> Option<Relay> {
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.iter().find(|relay| relay.id == id).cloned()
    }

    /// A relay with a redirector, the embedded one first.
    pub fn redirector(&self) -> Option<Relay> {
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.iter().filter(|relay| relay.redirector).min_by_key(|relay| relay.channel.is_some()).cloned()
    }

    /// `HOST:PORT` (TCP) of all relays.
    pub fn addresses(&self) -> Vec<String> {
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.iter().flat_map(|relay| relay.addresses.clone()).collect()
    }

    /// STUN servers of all relays.
    pub fn stun(&self) -> Vec<String> {
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.iter().map(|relay| relay.stun.clone()).filter(|stun| !stun.is_empty()).collect()
    }
}

/// One pairing of one session, for which both ends get tickets.
#[derive(Debug, Clone, Copy)]
pub struct Pairing {
    /// Session id.
    pub session: SessionId,
    /// Unique, also over restarts of the mediator.
    pub serial: u64,
    /// Public key of the technician.
    pub technician: [u8; 32],
    /// Public key of the agent.
    pub agent: [u8; 32],
    /// Seconds since 1970-01-01 UTC.
    pub expires: u64,
}

impl Pairing {
    /// The tickets of one end, `leg`, for these relays. `key` signs: seed and public key.
    pub fn tickets(&self, leg: Role, relays: &[Relay], key: &[u8; 64]) -> Vec<RelayTicket> {
        let (holder, peer) = match leg {
            Role::Agent => (self.agent, self.technician),
            _ => (self.technician, self.agent),
        };
        let ticket = |relay: &Relay| {
            let ticket = Ticket {
                session: self.session,
                serial: self.serial,
                relay: relay.id,
                epoch: relay.epoch,
                leg,
                holder,
                peer,
                expires: self.expires,
                max_bytes: 0,
                max_seconds: 0,
            };
            let ticket = ticket.sign(key).ok()?;
            let (addresses, https) = (relay.addresses.clone(), relay.https.clone());
            Some(RelayTicket { relay: relay.id.0.to_vec(), addresses, ticket, https })
        };
        relays.iter().filter_map(ticket).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn relay(id: u8, host: &str, epoch: u64) -> Relay {
        let addresses = vec![format!("{host}:8002")];
        let channel = (id != 0).then(crate::presence::Presence::default);
        let channel = channel.map(|presence| {
            let arrival = crate::presence::arrival(Role::Relay, id, 1);
            presence.channel(arrival, tokio::sync::mpsc::channel(1).0).id
        });
        Relay {
            id: DeviceId([id; 16]),
            epoch,
            addresses,
            stun: String::new(),
            https: vec![],
            redirector: false,
            channel,
        }
    }

    #[test]
    fn the_embedded_one_comes_first_and_the_second_is_elsewhere() {
        let relays = Relays::default();
        assert!(relays.choose().is_empty());
        assert!(relays.up(relay(1, "a", 1)));
        assert!(relays.up(relay(0, "a", 1)));
        assert!(relays.up(relay(2, "b", 1)));
        let ids: Vec<u8> = relays.choose().iter().map(|relay| relay.id.0[0]).collect();
        assert_eq!(ids, [0, 2]);
        assert!(!relays.up(relay(2, "b", 1)));
        assert!(relays.up(relay(2, "b", 2)));
    }

    #[test]
    fn a_relay_is_only_where_it_was_enrolled() {
        let mut relay = relay(1, "a.example", 1);
        relay.addresses.extend(["evil.example:8002".to_owned(), "[2001:db8::1]:8002".to_owned()]);
        relay.https.push("evil.example:443".to_owned());
        relay.stun = "evil.example:8002".to_owned();
        relay.keep_hosts(&["A.example".to_owned(), "2001:DB8:0::1".to_owned()]);
        assert_eq!(relay.addresses, ["a.example:8002", "[2001:db8::1]:8002"]);
        assert_eq!((relay.stun.as_str(), relay.https.len()), ("", 0));
        relay.keep_hosts(&["c.example".to_owned()]);
        assert!(!relay.is_sane());
    }

    #[test]
    fn both_ends_get_mirrored_tickets() {
        let key = adit_client::identity::DeviceKey::generate().expect("key");
        let secret = key.to_seed_and_public().expect("seed");
        let pairing = Pairing {
            session: SessionId([1; 16]),
            serial: 9,
            technician: [2; 32],
            agent: [3; 32],
            expires: 100,
        };
        let read = |leg| {
            let tickets = pairing.tickets(leg, &[relay(0, "a", 5)], &secret);
            Ticket::verify(&tickets[0].ticket, &key.public_key(), 100).expect("verifies")
        };
        let (technician, agent) = (read(Role::Technician), read(Role::Agent));
        assert_eq!((technician.holder, technician.peer), (agent.peer, agent.holder));
        assert_eq!((technician.holder, technician.serial, technician.epoch), ([2; 32], 9, 5));
        assert_eq!((agent.serial, agent.session, agent.relay), (9, technician.session, technician.relay));
    }
}
