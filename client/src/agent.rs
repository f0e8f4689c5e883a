//! The agent's side: takes sessions and connects their streams to targets.

use std::sync::Arc;

use adit_protocol::control::{Answer, Grant, Tier, Up};
use adit_protocol::frame::ResetCode;
use adit_protocol::{Target, Wanted};
use adit_tunnel::session::End;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::allow::AllowList;
use crate::control::maintain::{Control, State};
use crate::hub::{Hub, OpenSession};
use crate::identity::Live;
use crate::session::SessionEvent;
use crate::target;
use crate::tunnel::Tunnel;
use crate::via::Via;

/// Sessions at once: each may hold its budget of memory.
const MAX_SESSIONS: usize = 64;

/// What this agent's owner lets the organisation do.
#[derive(Debug, Clone, Default)]
pub struct Permits {
    /// The targets that may be reached.
    pub allow: Arc<AllowList>,
    /// Whether the server may be an end of a session and read what passes.
    pub redirector: bool,
}

/// What the owner of an agent hears.
#[derive(Debug)]
pub enum AgentEvent {
    /// The control channel is up.
    Online,
    /// It is down; the agent goes on trying.
    Offline {
        /// Why, for people.
        reason: String,
    },
    /// A technician was let in.
    Opened {
        /// Session id.
        session: adit_protocol::SessionId,
        /// Name of the technician.
        peer: String,
        /// Which tiers it may take.
        via: Via,
        /// This end of the tunnel.
        tunnel: Tunnel,
    },
    /// Something about a session.
    Session {
        /// Session id.
        session: adit_protocol::SessionId,
        /// Name of the technician.
        peer: String,
        /// What; never [`SessionEvent::Incoming`].
        event: SessionEvent,
    },
}

/// Runs an agent until the task is dropped or `shutdown` completes; then every session is told. When `retire`
/// completes it goes on until no session is open.
pub async fn run(
    identity: Arc<Live>,
    permits: Permits,
    events: mpsc::Sender<AgentEvent>,
    shutdown: impl Future<Output = ()>,
    retire: impl Future<Output = ()>,
) {
    let (hub, mut offers) = Hub::start(identity);
    let mut state = hub.control().state();
    let mut sessions: Vec<(Tunnel, JoinHandle<()>)> = Vec::new();
    // Why it is offline: said once, and not at every attempt.
    let mut offline = None;
    let mut retiring = false;
    tokio::pin!(shutdown, retire);
    loop {
        sessions.retain(|(_, task)| !task.is_finished());
        tokio::select! {
            // An offer comes before the end of the last session: nobody who was let in is sent away.
            biased;
            offer = offers.recv() => {
                let Some(offer) = offer else { break };
                // A session whose technician is gone makes room, the oldest first.
                if sessions.len() >= MAX_SESSIONS
                    && let Some(at) = sessions.iter().position(|(tunnel, _)| tunnel.carriers().is_empty())
                {
                    sessions.remove(at).0.close("made room for a new session");
                }
                sessions.extend(take_offer(&hub, offer, sessions.len(), &permits, &events).await);
            }
            changed = state.changed() => {
                if changed.is_err() {
                    break;
                }
                let event = match &*state.borrow_and_update() {
                    State::Connected(_) => {
                        offline = None;
                        Some(AgentEvent::Online)
                    }
                    state => {
                        let news = state.why_offline().filter(|why| offline.replace(why.clone()).as_ref() != Some(why));
                        news.map(|reason| AgentEvent::Offline { reason })
                    }
                };
                if let Some(event) = event {
                    let _ = events.send(event).await;
                }
            }
            () = &mut shutdown => break,
            () = &mut retire, if !retiring => {
                retiring = true;
                info!(sessions = sessions.len(), "this agent ends when no session is open");
            }
            () = all_ended(&mut sessions), if retiring => break,
        }
    }
    sessions.iter().for_each(|(tunnel, _)| tunnel.close("the agent was stopped"));
    for (_, task) in sessions {
        let _ = task.await;
    }
}

/// Completes when every one of these sessions has ended.
async fn all_ended(sessions: &mut [(Tunnel, JoinHandle<()>)]) {
    for (_, task) in sessions {
        let _ = task.await;
    }
}

async fn take_offer(
    hub: &Hub,
    mut offer: Grant,
    running: usize,
    permits: &Permits,
    events: &mpsc::Sender<AgentEvent>,
) -> Option<(Tunnel, JoinHandle<()>)> {
    let id = offer.session.clone();
    let granted: Vec<Wanted> = offer.targets.iter().filter_map(|target| target.parse().ok()).collect();
    let via: Via = offer.via.parse().unwrap_or_default();
    let mut answer = None;
    let opened = if via == Via::Redirector && !permits.redirector {
        Err("it does not permit the redirector ([agent] redirector = true in its config.toml)".to_owned())
    } else if running < MAX_SESSIONS {
        let begun = hub.take_flight(&mut offer);
        let (opening, flight) = begun.map_or((None, None), |(opening, flight)| (Some(opening), Some(flight)));
        answer = flight;
        hub.open_session(End::Agent, offer, via, None, opening).map_err(|error| error.to_string())
    } else {
        Err(format!("{running} sessions are open"))
    };
    let reason = opened.as_ref().err().cloned().unwrap_or_default();
    let flight = match answer.filter(|_| opened.is_ok()) {
        Some(flight) => flight.await.unwrap_or_default(),
        None => vec![],
    };
    let answer = Answer { session: id, accepted: opened.is_ok(), reason, flight };
    let _ = hub.control().send(Up::Answer(answer)).await;
    let session = opened.ok()?;
    if via == Via::Redirector {
        warn!(session = %session.id, technician = session.peer_name, "session opened: the server can read what passes");
    } else {
        info!(session = %session.id, technician = session.peer_name, "session opened");
    }
    let (tunnel, peer) = (session.tunnel.clone(), session.peer_name.clone());
    let _ = events.send(AgentEvent::Opened { session: session.id, peer, via, tunnel: tunnel.clone() }).await;
    Some((
        tunnel,
        tokio::spawn(serve(session, granted, permits.allow.clone(), hub.control().clone(), events.clone())),
    ))
}

/// Connects what the technician asks for, until the session is over. What the mediator did not grant,
/// and so did not audit, is refused.
async fn serve(
    mut session: OpenSession,
    granted: Vec<Wanted>,
    allow: Arc<AllowList>,
    control: Control,
    events: mpsc::Sender<AgentEvent>,
) {
    let granted = |to: &Target| {
        let covers = |wanted: &Wanted| {
            matches!(wanted, Wanted::Any) || matches!(wanted, Wanted::One(one) if one == to)
        };
        granted.iter().any(covers)
    };
    while let Some(event) = session.events.recv().await {
        match event {
            SessionEvent::Incoming(stream, to) if !granted(&to) => {
                stream.reset(ResetCode::NotAllowed);
            }
            SessionEvent::IncomingFlow(flow, to) if !granted(&to) => {
                flow.reset(ResetCode::NotAllowed);
            }
            SessionEvent::Incoming(stream, to) => {
                tokio::spawn(target::serve_stream(stream, to, allow.clone()));
            }
            SessionEvent::IncomingFlow(flow, to) => {
                tokio::spawn(target::serve_flow(flow, to, allow.clone()));
            }
            event => {
                let over = matches!(event, SessionEvent::Closed { .. });
                if let SessionEvent::Tier { tier, carrier, reason, .. } = &event {
                    let said = Tier {
                        session: session.id.as_bytes().to_vec(),
                        tier: (*tier).to_owned(),
                        carrier: carrier.kind.as_str().to_owned(),
                        reason: reason.clone(),
                    };
                    let _ = control.send(Up::Tier(said)).await;
                }
                let peer = session.peer_name.clone();
                let _ = events.send(AgentEvent::Session { session: session.id, peer, event }).await;
                if over {
                    return;
                }
            }
        }
    }
}
