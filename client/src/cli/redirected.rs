//! Local ports that lead to the redirector instead of through a tunnel of ours: the third tier, openly.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use adit_protocol::control::Redirected;
use adit_protocol::{SessionId, Wanted};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::launch::{self, Launch};
use super::redirect::UNREACHED;
use super::technician::SessionArgs;
use super::{CliError, Failed, signals};
use crate::events::{Event, Events, complain};
use crate::forward::{Listener, Traffic};
use crate::status::{self, RedirectedInfo, SessionStatus};
use crate::technician::Technician;

/// For how long a port is asked for: a working session, and no longer than a door should stand open behind a program that
/// was killed.
const TIME: Duration = Duration::from_secs(4 * 60 * 60);

/// Opens a port of the redirector for each listener, and serves them until Ctrl-C, until the server closes one, or until
/// the program that is launched has ended. `reason`: why this tier.
pub(super) async fn serve(
    technician: &Technician,
    session: &SessionArgs,
    command: &'static str,
    listeners: Vec<Listener>,
    events: Events,
    reason: &str,
    launch: Launch,
) -> Result<(), Failed> {
    let mut ports = Vec::new();
    let shown: Arc<Mutex<Vec<RedirectedInfo>>> = Arc::default();
    let (dir, identity, _) = session.check()?;
    let (all, device) = (shown.clone(), identity.get().name.clone());
    let sessions =
        move || all.lock().unwrap_or_else(PoisonError::into_inner).iter().map(SessionStatus::from).collect();
    let _status = status::serve(&dir, status::Process { command, device }, sessions);
    let agent = &session.agent;
    let done = tokio::select! {
        done = serve_all(technician, agent, listeners, events, reason, launch, &mut ports, &shown) => done,
        () = signals::stop() => Ok(()),
    };
    // Whatever it ended with, the server keeps no door open.
    for port in &ports {
        technician.end_redirected(port).await;
    }
    technician.close().await;
    match &done {
        Ok(()) => events.emit(&Event::Closed { reason: "closed by the technician" }),
        Err(Failed(error)) if !ports.is_empty() => events.emit(&Event::Closed { reason: &error.to_string() }),
        Err(_) => {}
    }
    done
}

#[expect(clippy::too_many_arguments, reason = "the parts of one command")]
async fn serve_all(
    technician: &Technician,
    agent: &str,
    listeners: Vec<Listener>,
    events: Events,
    reason: &str,
    launch: Launch,
    ports: &mut Vec<Redirected>,
    shown: &Mutex<Vec<RedirectedInfo>>,
) -> Result<(), Failed> {
    let started = Instant::now();
    let mut targets = Vec::new();
    for listener in &listeners {
        match listener.wanted() {
            Wanted::One(target) if listener.takes_connections() => targets.push(target.clone()),
            wanted => return Err(CliError::NotRedirected(wanted.to_string()).into()),
        }
    }
    let (mut serving, mut ends) = (JoinSet::new(), JoinSet::new());
    for (listener, target) in listeners.into_iter().zip(targets) {
        let mut port = technician.redirect(agent, &target, None, TIME, None).await?;
        // Whatever happens from here on, it is closed.
        ports.push(port.redirected.clone());
        port.look().await;
        let address = port.redirected.address.clone();
        if !port.is_reached {
            complain(UNREACHED);
        }
        let traffic = Arc::<Traffic>::default();
        if let Ok(session) = SessionId::try_from(&port.redirected.session[..]) {
            let (peer, remote, since) = (agent.to_owned(), address.clone(), SystemTime::now());
            let info = RedirectedInfo { session, peer, since, remote, traffic: traffic.clone() };
            shown.lock().unwrap_or_else(PoisonError::into_inner).push(info);
        }
        tracing::warn!(%target, address, "tier redirector: the server can read what passes");
        events.emit(&Event::Listening { local: listener.local(), target: listener.wanted() });
        events.emit(&Event::Redirected { remote: &address, reason, since_start: started.elapsed() });
        serving.spawn(listener.serve_by(address, traffic));
        ends.spawn(port.ended);
    }
    complain(
        "tier redirector: the server is an end of this and can read what passes; one connection at a time",
    );
    let mut program = launch.start();
    let reason = tokio::select! {
        Some(ended) = ends.join_next() => {
            ended.ok().and_then(Result::ok).unwrap_or_else(|| "the server closed the port".to_owned())
        }
        () = sleep(TIME) => "its time is over".to_owned(),
        _ = launch::ended(&mut program) => return Ok(()),
    };
    serving.shutdown().await;
    Err(CliError::Ended(reason).into())
}
