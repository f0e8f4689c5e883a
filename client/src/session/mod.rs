//! Keeps one session's tunnel supplied with carriers, on either end.
//!
//! The relay is dialled at once and the direct path is sought at the same time; the tunnel moves up
//! while data flows, and down again when the path dies. A relay leg that is lost is dialled again, with
//! the ticket that is held for every granted relay, so that this works while the mediator is away.

mod relays;

use std::convert::Infallible;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use adit_protocol::control::{self, Closed, Down, Grant, Renew, Up};
use adit_protocol::{DeviceId, SessionId};
use adit_tunnel::path::IceRole;
use adit_tunnel::session::{CarrierId, CarrierKind, End, Reason};
use rustls::pki_types::CertificateDer;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use crate::control::maintain::{Control, State};
use crate::direct::{
    DirectEndpoint, DirectEvent, DirectHandle, DirectSession, SessionConfig, StunServers, loss,
};
use crate::early::Opening;
use crate::identity::{Identity, Peer};
use crate::tunnel::{CarrierInfo, Flow, Notice, Tunnel, TunnelStream, byte_carrier, quic_carrier};
use crate::via::Via;
use relays::{Granted, Relays};

/// An agent keeps a session without any carrier for this long: longer than a laptop sleeps at lunch,
/// shorter than for ever.
const ABANDONED: Duration = Duration::from_secs(2 * 60 * 60);
/// Tickets that were asked for and did not come are asked for again after this time: longer than the
/// mediator takes two ends' wishes for one.
const ASK_AGAIN: Duration = Duration::from_secs(3);
/// Why a session with a device that nobody asked for ends.
const OTHER_DEVICE: &str = "the mediator named another device than the one asked for";
/// How long the carriers get to say goodbye.
const GOODBYE: Duration = Duration::from_millis(500);

/// What the owner of a session hears.
#[derive(Debug)]
pub enum SessionEvent {
    /// The session is open and sends on this carrier; said at the start and at every change.
    Tier {
        /// `direct`, `relay` or `redirector`.
        tier: &'static str,
        /// Which, with its addresses and round trip.
        carrier: CarrierInfo,
        /// Why, for people.
        reason: String,
        /// Since the session was granted.
        since_start: Duration,
    },
    /// Agent: the technician asks for a TCP target.
    Incoming(TunnelStream, adit_protocol::Target),
    /// Agent: the technician asks for a UDP target.
    IncomingFlow(Flow, adit_protocol::Target),
    /// The session is over.
    Closed {
        /// Why, for people.
        reason: String,
    },
}

/// What a session is made of.
pub struct Parts {
    /// This device.
    pub identity: Arc<Identity>,
    /// Which end it is.
    pub end: End,
    /// Session id.
    pub id: SessionId,
    /// Device id of the other end.
    pub peer: DeviceId,
    /// Name or device id that the user asked for.
    pub called: Option<String>,
    /// What the mediator granted.
    pub grant: Grant,
    /// Which tiers it may take.
    pub via: Via,
    /// For tickets and candidates.
    pub control: Control,
    /// `None`: no port of the range is free, or direct paths are not wanted.
    pub direct: Option<Arc<DirectEndpoint>>,
    /// Who tells this end its addresses.
    pub stun: StunServers,
    /// See [`SessionConfig::many_socket_probing`].
    pub many_socket_probing: bool,
    /// See [`SessionConfig::port_mapping`].
    pub port_mapping: bool,
    /// What the mediator says about this session.
    pub downs: mpsc::Receiver<Down>,
    /// The handshake that has begun on the way here, for the first leg to the first relay.
    pub opening: Option<Opening>,
}

/// Starts a session. It ends with [`Tunnel::close`], when the other end or the mediator ends it, or
/// when the receiver of its events is dropped.
pub fn start(parts: Parts) -> (Tunnel, mpsc::Receiver<SessionEvent>) {
    let (tunnel, notices) = Tunnel::new(parts.end, parts.id);
    let (events, receiver) = mpsc::channel(1024);
    tokio::spawn(Runner::new(parts, tunnel.clone(), events).run(notices));
    (tunnel, receiver)
}

struct Runner {
    end: End,
    id: SessionId,
    via: Via,
    called: Option<String>,
    control: Control,
    tunnel: Tunnel,
    events: mpsc::Sender<SessionEvent>,
    relays: Option<Relays>,
    direct: Option<DirectSession>,
    downs: Option<mpsc::Receiver<Down>>,
    direct_carriers: JoinSet<()>,
    started: Instant,
    expires: Option<Instant>,
    /// The carrier that was told, and why the next one will be.
    told: Option<CarrierId>,
    active: Option<(CarrierId, String)>,
    /// The tier in use before, for the reason of a move.
    before: Option<CarrierKind>,
    alone_since: Option<Instant>,
    /// Why the carrier that was lost last was given up, if it was.
    why_lost: Option<String>,
    closing: Option<String>,
}

impl Runner {
    fn new(parts: Parts, tunnel: Tunnel, events: mpsc::Sender<SessionEvent>) -> Self {
        let now = Instant::now();
        let direct = parts.direct.as_ref().filter(|_| parts.via.wants_direct()).map(|endpoint| {
            endpoint.session(SessionConfig {
                session: parts.id,
                role: match parts.end {
                    End::Technician => IceRole::Controlling,
                    End::Agent => IceRole::Controlled,
                },
                peer: parts.peer,
                local: parts.grant.local_ice.clone().unwrap_or_default(),
                remote: parts.grant.remote_ice.clone().unwrap_or_default(),
                stun_servers: parts.stun.clone(),
                peer_comes_from: parts.grant.peer_comes_from.parse().ok(),
                many_socket_probing: parts.many_socket_probing,
                port_mapping: parts.port_mapping,
            })
        });
        let direct = match direct.transpose() {
            Ok(direct) => direct,
            Err(error) => {
                warn!(session = %parts.id, %error, "no direct path for this session");
                None
            }
        };
        let relays = parts.via.wants_relay().then(|| {
            let called = parts.called.clone();
            Relays::new(
                parts.identity.clone(),
                parts.end,
                parts.via,
                parts.peer,
                called,
                tunnel.clone(),
                Granted { tickets: parts.grant.relays, opening: parts.opening },
            )
        });
        Self {
            end: parts.end,
            id: parts.id,
            via: parts.via,
            called: parts.called,
            control: parts.control,
            tunnel,
            events,
            relays,
            direct,
            downs: Some(parts.downs),
            direct_carriers: JoinSet::new(),
            started: now,
            expires: expiry(now, parts.grant.expires),
            told: None,
            active: None,
            before: None,
            alone_since: Some(now),
            why_lost: None,
            closing: None,
        }
    }

    async fn run(mut self, mut notices: mpsc::Receiver<Notice>) {
        let mut control_state = self.control.state();
        let mut asked_at: Option<Instant> = None;
        while self.closing.is_none() {
            let deadline = self.deadline();
            let lacks_tickets = self.relays.as_ref().is_some_and(Relays::lacks_tickets);
            // What was asked on a channel that died, or swallowed as the echo of the other end's wish.
            let ask_again = asked_at.filter(|_| lacks_tickets).map(|at| at + ASK_AGAIN);
            tokio::select! {
                notice = notices.recv() => match notice {
                    Some(notice) => self.on_notice(notice).await,
                    None => self.closing = Some("the tunnel is gone".to_owned()),
                },
                down = recv(&mut self.downs) => match down {
                    Some(down) => self.on_down(down),
                    None => self.downs = None,
                },
                event = direct_event(&mut self.direct) => self.on_direct(event),
                () = relays_progress(&mut self.relays) => {}
                Some(_) = self.direct_carriers.join_next() => {}
                Ok(()) = control_state.changed() => asked_at = None,
                () = sleep_until(ask_again) => asked_at = None,
                () = sleep_until(deadline) => self.on_deadline(),
                () = self.events.closed() => self.tunnel.close("closed by its user"),
            }
            let (connected, refused) = match &*control_state.borrow_and_update() {
                State::Connected(_) => (true, None),
                State::Disconnected { reason, turned_away: true, .. } => (false, Some(reason.clone())),
                _ => (false, None),
            };
            let lacks_tickets = self.relays.as_ref().is_some_and(Relays::lacks_tickets);
            if !lacks_tickets {
                asked_at = None;
            } else if connected && asked_at.is_none() {
                asked_at = Some(Instant::now());
                let _ = self.control.send(Up::Renew(Renew { session: self.id.as_bytes().to_vec() })).await;
            }
            if self.tunnel.is_closed() && notices.is_empty() {
                // The notice of it found no room, or is not here yet.
                let ended = || self.tunnel.ended().unwrap_or_else(|| "the session is over".to_owned());
                self.closing.get_or_insert_with(ended);
            }
            let alone = self.tunnel.carriers().is_empty();
            // Without a mediator that knows this device there will be no other way. The mediator's own word for the
            // end of this session may have been lost with its connection.
            if let Some(reason) = refused.filter(|_| alone) {
                self.tunnel.close(&reason);
            }
            self.alone_since = if alone { self.alone_since.or(Some(Instant::now())) } else { None };
        }
        self.end().await;
    }

    async fn on_notice(&mut self, notice: Notice) {
        match notice {
            Notice::Incoming(stream, target) => {
                let _ = self.events.send(SessionEvent::Incoming(stream, target)).await;
            }
            Notice::IncomingFlow(flow, target) => {
                let _ = self.events.send(SessionEvent::IncomingFlow(flow, target)).await;
            }
            Notice::Ready(_) => self.tell_tier().await,
            Notice::Active(carrier, reason) => {
                let reason = self.describe(carrier, reason);
                self.active = Some((carrier, reason));
                self.why_lost = None;
                self.tell_tier().await;
            }
            Notice::Silent => {
                debug!(session = %self.id, "nothing is heard on the only carrier");
                if let Some(direct) = &self.direct {
                    direct.handle.silent("nothing is heard on it");
                }
                self.relays.iter_mut().for_each(Relays::dial_all);
            }
            Notice::CarrierLost { kind, reason } => {
                self.why_lost =
                    Some(reason.clone()).filter(|why| kind.tier() == "direct" && loss::is_reason(why));
                info!(session = %self.id, carrier = kind.as_str(), reason, "carrier lost");
                // The search for a direct path notices by itself that its connection is closed.
                if kind.tier() == "relay" {
                    self.relays.iter_mut().for_each(Relays::on_lost);
                }
            }
            Notice::Message(message) => {
                if let Some(direct) = &self.direct {
                    direct.handle.handle_message(message.to_vec());
                }
            }
            Notice::Closed(reason) => self.closing = Some(reason),
        }
    }

    fn on_down(&mut self, down: Down) {
        match down {
            Down::Candidates(candidates) => {
                let Some(direct) = &self.direct else { return };
                if !candidates.candidates.is_empty() {
                    direct.handle.handle_message(candidates.candidates);
                }
                if let Ok(seen) = candidates.seen.parse() {
                    direct.handle.peer_seen(seen);
                }
            }
            Down::Tickets(tickets) => {
                self.relays.iter_mut().for_each(|r| r.on_tickets(tickets.relays.clone()))
            }
            _ => {}
        }
    }

    fn on_direct(&mut self, event: DirectEvent) {
        match event {
            DirectEvent::Message(message) => {
                // By both ways: the mediator's is there first, the tunnel's is there without a mediator.
                self.tunnel.send_message(message.clone());
                let candidates = control::Candidates {
                    session: self.id.as_bytes().to_vec(),
                    candidates: message,
                    seen: String::new(),
                };
                let control = self.control.clone();
                tokio::spawn(async move { control.send(Up::Candidates(candidates)).await });
            }
            DirectEvent::Connected { connection, local } => {
                let certificates = connection.peer_identity();
                let certificates =
                    certificates.and_then(|any| any.downcast::<Vec<CertificateDer<'_>>>().ok());
                if !is_called(certificates.as_deref().map(Vec::as_slice), self.called.as_deref()) {
                    return self.tunnel.close(OTHER_DEVICE);
                }
                debug!(session = %self.id, "direct path connected");
                let tunnel = self.tunnel.clone();
                let handle = self.direct.as_ref().map(|direct| direct.handle.clone());
                self.direct_carriers.spawn(async move {
                    let (watched, why) = (connection.clone(), OnceLock::new());
                    tokio::select! {
                        _ = quic_carrier::run(tunnel.clone(), connection, local, &why) => {}
                        never = leave_if_lossy(&tunnel, &watched, handle, &why) => match never {},
                    }
                });
            }
            DirectEvent::Stream { stream, local, remote, alive, left } => {
                if !is_called(stream.get_ref().1.peer_certificates(), self.called.as_deref()) {
                    return self.tunnel.close(OTHER_DEVICE);
                }
                debug!(session = %self.id, ?remote, "direct TCP connected");
                let tunnel = self.tunnel.clone();
                self.direct_carriers.spawn(async move {
                    let told = async {
                        if left.await.is_err() {
                            std::future::pending::<()>().await;
                        }
                    };
                    tokio::select! {
                        _ = byte_carrier::run(tunnel, CarrierKind::Tcp, *stream, local, remote) => {}
                        () = told => {}
                    }
                    drop(alive);
                });
            }
            DirectEvent::Failed { reason, retry } => {
                debug!(session = %self.id, reason, ?retry, "no direct path for now");
            }
        }
    }

    async fn tell_tier(&mut self) {
        let Some((id, reason)) = &self.active else { return };
        let Some(carrier) = self.tunnel.carrier(*id).filter(|carrier| carrier.ready) else { return };
        if self.told != Some(*id) {
            self.told = Some(*id);
            self.before = Some(carrier.kind);
            let tier = self.via.tier(carrier.kind);
            info!(session = %self.id, tier, carrier = carrier.kind.as_str(), reason, "tier");
            let (reason, since_start) = (reason.clone(), self.started.elapsed());
            let _ = self.events.send(SessionEvent::Tier { tier, carrier, reason, since_start }).await;
        }
    }

    /// Why the tunnel moved, in the user's words.
    fn describe(&self, to: CarrierId, reason: Reason) -> String {
        let name = |kind: Option<CarrierKind>| match kind.map(CarrierKind::tier) {
            Some("direct") => "direct path",
            _ => "relay",
        };
        let to = self.tunnel.carrier(to).map(|carrier| carrier.kind);
        match reason {
            Reason::Opened | Reason::Better | Reason::Nominated if name(to) == "direct path" => {
                "direct path confirmed".to_owned()
            }
            Reason::Opened => "session opened".to_owned(),
            Reason::Better => "relay connected".to_owned(),
            Reason::Nominated => "the technician's end moved".to_owned(),
            Reason::Silent(time) => format!("{} silent for {} ms", name(self.before), time.as_millis()),
            Reason::Lost => match &self.why_lost {
                Some(why) => format!("{} left: {why}", name(self.before)),
                None => format!("{} lost", name(self.before)),
            },
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let abandoned = self.alone_since.filter(|_| self.end == End::Agent).map(|since| since + ABANDONED);
        self.expires.into_iter().chain(abandoned).min()
    }

    fn on_deadline(&mut self) {
        let expired = self.expires.is_some_and(|at| at <= Instant::now());
        self.tunnel.close(if expired {
            "the session has expired"
        } else {
            "the technician did not come back"
        });
    }

    async fn end(mut self) {
        let reason = self.closing.take().unwrap_or_default();
        info!(session = %self.id, reason, "session closed");
        let (bytes_sent, bytes_received) = self.tunnel.bytes();
        let session = self.id.as_bytes().to_vec();
        let closed = Closed { session, reason: reason.clone(), bytes_sent, bytes_received };
        let _ = self.control.send(Up::Closed(closed)).await;
        // Carriers end by themselves once they have said goodbye.
        let goodbye = async {
            while self.direct_carriers.join_next().await.is_some() {}
            if let Some(relays) = &mut self.relays {
                relays.finish().await;
            }
        };
        let _ = tokio::time::timeout(GOODBYE, goodbye).await;
        let _ = self.events.send(SessionEvent::Closed { reason }).await;
    }
}

/// Gives a direct path up that loses too much, as soon as there is a relay to go on with. The path engine leaves it alone for
/// a while then.
async fn leave_if_lossy(
    tunnel: &Tunnel,
    connection: &quinn::Connection,
    direct: Option<DirectHandle>,
    why: &OnceLock<String>,
) -> Infallible {
    loop {
        let percent = loss::too_much(connection).await;
        if tunnel
            .carriers()
            .iter()
            .any(|carrier| carrier.ready && !carrier.silent && carrier.kind.tier() == "relay")
        {
            let reason = loss::reason(percent);
            if let Some(direct) = &direct {
                direct.poor(connection.stable_id(), &reason);
            }
            let _ = why.set(reason);
            connection.close(loss::code(percent), b"");
        }
    }
}

/// Whether the device with these certificates is the one that the user asked for.
fn is_called(certificates: Option<&[CertificateDer<'_>]>, called: Option<&str>) -> bool {
    let Some(called) = called else { return true };
    let peer = certificates.and_then(|chain| chain.first()).map(|leaf| Peer::from_certificate(leaf));
    let Some(Ok(peer)) = peer else { return false };
    peer.name == called || peer.device_id.to_string() == called
}

/// The moment of a wall-clock time, for a process that may sleep in between: good enough to end a
/// session on the right day, and never before its time.
fn expiry(now: Instant, expires: u64) -> Option<Instant> {
    let wall = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).ok()?.as_secs();
    if expires == 0 { None } else { now.checked_add(Duration::from_secs(expires.saturating_sub(wall))) }
}

async fn recv(downs: &mut Option<mpsc::Receiver<Down>>) -> Option<Down> {
    match downs {
        Some(downs) => downs.recv().await,
        None => std::future::pending().await,
    }
}

async fn direct_event(direct: &mut Option<DirectSession>) -> DirectEvent {
    match direct {
        Some(direct) => match direct.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

async fn relays_progress(relays: &mut Option<Relays>) {
    match relays {
        Some(relays) => relays.progress().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
