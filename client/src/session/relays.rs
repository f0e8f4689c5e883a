//! The relay legs of one session: which are dialled, when, and with which tickets.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use adit_protocol::DeviceId;
use adit_protocol::control::RelayTicket;
use adit_tunnel::session::{CarrierKind, End};
use bytes::Bytes;
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, ServerConfig};
use tokio::io::AsyncReadExt;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;

use crate::early::{self, Opening, Spliced};
use crate::identity::{Identity, Peer};
use crate::leg::{self, Leg, LegError, RelayRefused};
use crate::tls::{self, CarrierStream};
use crate::tunnel::{CarrierInfo, Tunnel, byte_carrier};
use crate::via::Via;

/// The first relay has this long before the others are dialled, too.
const HEAD_START: Duration = Duration::from_secs(2);
/// Connecting, waiting for the other leg (a relay waits 10 s), and the handshake.
const DIAL_TIMEOUT: Duration = Duration::from_secs(20);
/// A relay answers when the other leg has come, in a round trip or two. Some firewalls take every connection, and let
/// nothing through: after this time the other way is tried, too.
const UNHEARD: Duration = Duration::from_secs(3);
/// A technician whose handshake began with its request hears nothing either while the agent tries its other way.
const UNHEARD_EARLY: Duration = Duration::from_secs(4);
/// More relays than a mediator grants.
const MAX_RELAYS: usize = 8;
/// The longest pause while the session has no carrier at all. Milliseconds.
const URGENT: u64 = 3_000;
/// Pauses between attempts while nothing comes of them; then the last one again and again.
const PAUSES: [u64; 7] = [200, 500, 1_000, 2_000, 5_000, 10_000, 30_000];

pub(super) struct Relays {
    dialler: Arc<Dialler>,
    relays: Vec<Relay>,
    tasks: JoinSet<(usize, Outcome)>,
    /// Attempts since a leg was last paired.
    attempts: usize,
    /// When to dial: whom, is decided then.
    dial_at: Option<Instant>,
    /// Not only the first one.
    all: bool,
}

/// What a session begins with.
pub(super) struct Granted {
    /// One for each relay.
    pub(super) tickets: Vec<RelayTicket>,
    /// The handshake that has begun, for the first of them.
    pub(super) opening: Option<Opening>,
}

struct Relay {
    id: Vec<u8>,
    ticket: Option<RelayTicket>,
    dialling: bool,
    /// The way that is tried first: the one that led there the last time, and 8002 before that.
    first: CarrierKind,
}

/// A leg with a handshake done on it.
struct Shaken {
    connection: CarrierStream<Spliced<Leg>>,
    kind: CarrierKind,
    local: Option<SocketAddr>,
    remote: Option<SocketAddr>,
    /// Whether the relay has said a word. Where the handshake was done before, nothing shows yet that this way is open.
    heard: watch::Receiver<bool>,
}

enum Outcome {
    /// Both legs are there: the ticket that was shown is spent. And the way to try first the next time.
    Paired(Box<Shaken>, RelayTicket, CarrierKind),
    /// And now the relay has said a word.
    Heard(RelayTicket),
    /// It has not: this way is no way.
    Unheard(CarrierKind),
    /// The ticket that was shown is of no use any more.
    Spent(String, String),
    Failed(String),
    /// The carrier has ended.
    Ended,
}

struct Dialler {
    identity: Arc<Identity>,
    peer: DeviceId,
    called: Option<String>,
    tunnel: Tunnel,
    config: Result<Config, String>,
    /// The handshake that has begun with the request, until a leg to the first relay takes it.
    opening: Mutex<Option<Opening>>,
    first_relay: Vec<u8>,
}

enum Config {
    Technician(Arc<ClientConfig>),
    Agent(Arc<ServerConfig>),
}

impl Relays {
    pub(super) fn new(
        identity: Arc<Identity>,
        end: End,
        via: Via,
        peer: DeviceId,
        called: Option<String>,
        tunnel: Tunnel,
        granted: Granted,
    ) -> Self {
        let Granted { tickets, opening } = granted;
        let config = match end {
            End::Technician => {
                tls::tunnel_client(&identity, Some(peer)).map(|c| Config::Technician(Arc::new(c)))
            }
            End::Agent if via == Via::Redirector => {
                tls::redirector_server(&identity, peer).map(|c| Config::Agent(Arc::new(c)))
            }
            End::Agent => tls::tunnel_server(&identity, Some(peer)).map(|c| Config::Agent(Arc::new(c))),
        };
        let config = config.map_err(|error| error.to_string());
        let first_relay = tickets.first().map(|ticket| ticket.relay.clone()).unwrap_or_default();
        let opening = Mutex::new(opening);
        let relays = tickets.into_iter().map(Relay::new).collect();
        Self {
            dialler: Arc::new(Dialler { identity, peer, called, tunnel, config, opening, first_relay }),
            relays,
            tasks: JoinSet::new(),
            attempts: 0,
            dial_at: Some(Instant::now()),
            all: false,
        }
    }

    /// Goes on until something has changed. Cancel safe.
    pub(super) async fn progress(&mut self) {
        let due = async {
            match self.dial_at {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = due => self.dial(),
            Some(done) = self.tasks.join_next() => match done {
                Ok((index, outcome)) => self.on_outcome(index, outcome),
                Err(error) => debug!(%error, "a relay leg's task failed"),
            },
        }
    }

    /// A relay leg that was a carrier is lost: both ends dial every relay that they have a ticket for.
    pub(super) fn on_lost(&mut self) {
        if self.running_carriers() == 0 {
            self.dial_all();
        }
    }

    /// Dials every relay for which there is a ticket, now.
    pub(super) fn dial_all(&mut self) {
        self.all = true;
        self.dial_at = Some(Instant::now());
    }

    pub(super) fn on_tickets(&mut self, tickets: Vec<RelayTicket>) {
        for ticket in tickets {
            if let Some(relay) = self.relays.iter_mut().find(|relay| relay.id == ticket.relay) {
                relay.ticket = Some(ticket);
            } else if self.relays.len() < MAX_RELAYS {
                self.relays.push(Relay::new(ticket));
            }
        }
        if self.running_carriers() == 0 && !self.is_dialling() {
            (self.attempts, self.all, self.dial_at) = (0, true, Some(Instant::now()));
        }
    }

    /// Some ticket is spent and was not replaced yet.
    pub(super) fn lacks_tickets(&self) -> bool {
        self.relays.iter().any(|relay| relay.ticket.is_none() && !relay.dialling)
    }

    /// Waits until all carriers have ended.
    pub(super) async fn finish(&mut self) {
        while self.tasks.join_next().await.is_some() {}
    }

    fn running_carriers(&self) -> usize {
        let live = |carrier: &CarrierInfo| carrier.kind.tier() == "relay" && !carrier.silent;
        self.dialler.tunnel.carriers().iter().filter(|carrier| live(carrier)).count()
    }

    fn is_dialling(&self) -> bool {
        self.relays.iter().any(|relay| relay.dialling)
    }

    fn dial(&mut self) {
        self.dial_at = None;
        if self.running_carriers() > 0 {
            return;
        }
        let count = if self.all { self.relays.len() } else { 1 };
        for index in 0..count.min(self.relays.len()) {
            let relay = &mut self.relays[index];
            if relay.dialling {
                continue;
            }
            // Where there is no ticket, the mediator is asked for one; see `lacks_tickets`.
            if let Some(ticket) = relay.ticket.clone() {
                relay.dialling = true;
                let dialler = self.dialler.clone();
                let first = relay.first;
                self.tasks.spawn(async move { (index, dialler.dial(ticket, first).await) });
            }
        }
        if !self.all && self.relays.len() > 1 && self.running_carriers() == 0 {
            self.all = true;
            self.dial_at = Some(Instant::now() + HEAD_START);
        }
    }

    fn on_outcome(&mut self, index: usize, outcome: Outcome) {
        let Some(relay) = self.relays.get_mut(index) else { return };
        let paired = matches!(outcome, Outcome::Paired(..));
        match outcome {
            Outcome::Paired(shaken, ticket, first) => {
                let mut heard = shaken.heard.clone();
                let is_early = !*heard.borrow();
                if is_early {
                    // Not spent before both legs are there; until then it is being shown.
                    self.tasks.spawn(async move {
                        let is_heard = heard.wait_for(|heard| *heard).await.is_ok();
                        (index, if is_heard { Outcome::Heard(ticket) } else { Outcome::Ended })
                    });
                } else {
                    relay.spend(&ticket.ticket);
                }
                relay.first = first;
                (self.attempts, self.all) = (0, false);
                self.dial_at = None;
                let tunnel = self.dialler.tunnel.clone();
                self.tasks.spawn(async move {
                    let Shaken { connection, kind, local, remote, heard } = *shaken;
                    let mut word = heard.clone();
                    let unheard = async {
                        let is_heard =
                            matches!(timeout(UNHEARD_EARLY, word.wait_for(|heard| *heard)).await, Ok(Ok(_)));
                        if is_heard {
                            std::future::pending::<()>().await;
                        }
                    };
                    tokio::select! {
                        _ = byte_carrier::run(tunnel, kind, connection, local, remote) => {}
                        () = unheard => {}
                    }
                    let is_unheard = is_early && !*heard.borrow();
                    (index, if is_unheard { Outcome::Unheard(kind) } else { Outcome::Ended })
                });
            }
            Outcome::Heard(ticket) => relay.spend(&ticket.ticket),
            Outcome::Unheard(kind) => {
                debug!(
                    carrier = kind.as_str(),
                    "nothing is heard from the relay; trying the other way first"
                );
                relay.first = other_way(kind);
                relay.dialling = false;
                self.dial_at = Some(Instant::now());
            }
            Outcome::Ended => {}
            Outcome::Spent(reason, used) => {
                debug!(reason, "a ticket is of no use");
                relay.spend(&used);
            }
            Outcome::Failed(reason) => {
                debug!(reason, "no relay leg");
                relay.dialling = false;
            }
        }
        if self.running_carriers() == 0 && !self.is_dialling() && !paired && !self.dialler.tunnel.is_closed()
        {
            self.all = true;
            // Somebody waits for it, or nobody does.
            let most = if self.dialler.tunnel.carriers().is_empty() { URGENT } else { u64::MAX };
            let pause = PAUSES[self.attempts.min(PAUSES.len() - 1)].min(most);
            self.attempts += 1;
            // Half of it is jitter, so that a relay's return is not a stampede.
            let jittered = pause / 2 + rand::random_range(0..=pause / 2);
            self.dial_at.get_or_insert(Instant::now() + Duration::from_millis(jittered));
        }
    }
}

impl Relay {
    fn new(ticket: RelayTicket) -> Self {
        Self { id: ticket.relay.clone(), ticket: Some(ticket), dialling: false, first: CarrierKind::Relay }
    }

    /// The ticket that was `used` is gone; a fresher one that came meanwhile stays.
    fn spend(&mut self, used: &str) {
        self.dialling = false;
        self.ticket.take_if(|held| held.ticket == used);
    }
}

impl Dialler {
    async fn dial(&self, ticket: RelayTicket, first: CarrierKind) -> Outcome {
        match timeout(DIAL_TIMEOUT, self.connect(&ticket, first)).await {
            Ok(Ok((shaken, first))) => Outcome::Paired(Box::new(shaken), ticket, first),
            Ok(Err(outcome)) => outcome,
            Err(_) => Outcome::Failed("timed out".to_owned()),
        }
    }

    /// By the way that is there first; when nothing is heard on it, by the other one too. The relay lets a newer leg
    /// take an older one's place.
    async fn connect(
        &self,
        ticket: &RelayTicket,
        first: CarrierKind,
    ) -> Result<(Shaken, CarrierKind), Outcome> {
        let leg = leg::dial(&self.identity, ticket, first).await.map_err(|error| self.no_leg(&error))?;
        let (kind, heard) = (leg.kind(), leg.heard());
        let shaking = self.shake(leg, ticket);
        tokio::pin!(shaking);
        if let Ok(done) = timeout(UNHEARD, &mut shaking).await {
            return done.map(|connection| (connection, kind));
        }
        let other = other_way(kind);
        let leads_nowhere = match other {
            CarrierKind::RelayHttps => ticket.https.is_empty(),
            _ => ticket.addresses.is_empty(),
        };
        if leads_nowhere || *heard.borrow() {
            return shaking.await.map(|connection| (connection, kind));
        }
        debug!(carrier = kind.as_str(), "nothing is heard from the relay; trying the other way too");
        let second = async {
            let leg = leg::dial_by(&self.identity, ticket, other).await;
            self.shake(leg.map_err(|error| self.no_leg(&error))?, ticket).await
        };
        tokio::pin!(second);
        let connection = tokio::select! {
            done = &mut shaking => match done {
                Ok(connection) => return Ok((connection, kind)),
                Err(_) => second.await?,
            },
            done = &mut second => match done {
                Ok(connection) => connection,
                Err(_) => return shaking.await.map(|connection| (connection, kind)),
            },
        };
        // A word on the first way, if only that a newer leg took its place: that way is open, and the other end was late.
        Ok((connection, if *heard.borrow() { kind } else { other }))
    }

    /// The end-to-end handshake on a leg that has shown its ticket.
    async fn shake(&self, leg: Leg, ticket: &RelayTicket) -> Result<Shaken, Outcome> {
        let (kind, (local, remote), heard) = (leg.kind(), leg.addresses(), leg.heard());
        let connection = self.handshake(leg, &ticket.relay).await;
        let connection = connection.map_err(|error| match RelayRefused::of(&error) {
            Some(RelayRefused::Known(
                adit_protocol::leg::Status::NoPeer | adit_protocol::leg::Status::Busy,
            ))
            | None => Outcome::Failed(error.to_string()),
            Some(refused) => Outcome::Spent(refused.to_string(), ticket.ticket.clone()),
        })?;
        let certificates = connection.get_ref().1.peer_certificates();
        if !self.is_peer(certificates) || !super::is_called(certificates, self.called.as_deref()) {
            self.tunnel.close(super::OTHER_DEVICE);
            return Err(Outcome::Failed(super::OTHER_DEVICE.to_owned()));
        }
        Ok(Shaken { connection, kind, local, remote, heard })
    }

    async fn handshake(&self, mut leg: Leg, relay: &[u8]) -> io::Result<CarrierStream<Spliced<Leg>>> {
        match self.config.as_ref().map_err(|error| io::Error::other(error.clone()))? {
            Config::Technician(config) => {
                let mut opening = self.take_opening(relay);
                let flight = match &mut opening {
                    Some(opening) => opening.flight().await,
                    None => None,
                };
                match opening.zip(flight) {
                    Some((opening, flight)) => opening.finish(flight, leg).await,
                    None => tls::carrier_connect(config.clone(), leg.into()).await,
                }
            }
            Config::Agent(config) => {
                let first = leg.read_u8().await?;
                let ahead = Bytes::copy_from_slice(&[first]);
                if early::is_beginning(first) {
                    // Whatever was begun before: the technician knows nothing of it, or it was on a leg that is gone.
                    return tls::carrier_accept(config.clone(), Spliced::after(ahead, leg)).await;
                }
                let lost = || io::Error::other("the technician goes on with a handshake that has ended here");
                self.take_opening(relay).ok_or_else(lost)?.finish(ahead, leg).await
            }
        }
    }

    fn take_opening(&self, relay: &[u8]) -> Option<Opening> {
        let mut opening = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        opening.take_if(|_| relay == self.first_relay)
    }

    /// Whether this is the device that was granted: a handshake may have begun before it was known.
    fn is_peer(&self, certificates: Option<&[CertificateDer<'_>]>) -> bool {
        let peer = certificates.and_then(|chain| chain.first()).map(|leaf| Peer::from_certificate(leaf));
        peer.is_some_and(|peer| peer.is_ok_and(|peer| peer.device_id == self.peer))
    }

    /// Kept for whoever waits for this session.
    fn no_leg(&self, error: &LegError) -> Outcome {
        let remedy = error.remedy().map_or(String::new(), |remedy| format!("; {remedy}"));
        self.tunnel.note_trouble(format!("{error}{remedy}"));
        Outcome::Failed(error.to_string())
    }
}

fn other_way(kind: CarrierKind) -> CarrierKind {
    match kind {
        CarrierKind::RelayHttps => CarrierKind::Relay,
        _ => CarrierKind::RelayHttps,
    }
}
