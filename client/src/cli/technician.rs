//! What the technician's commands have in common.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use adit_protocol::{Role, Wanted};
use clap::Args;
use clap::builder::PossibleValuesParser;
use tokio::time::{Instant, sleep_until, timeout};

use super::data::Data;
use super::{CliError, Failed};
use crate::hub::OpenSession;
use crate::identity::Live;
use crate::session::SessionEvent;
use crate::status::{self, SessionInfo, SessionStatus};
use crate::technician::Technician;
use crate::via::Via;

/// How long a granted session may take until the agent has said that it is open.
const OPENED: Duration = Duration::from_secs(20);
/// How long the agent gets to hear that the session ends. More than a session takes for it by itself.
const GOODBYE: Duration = Duration::from_secs(1);

/// Which session with which agent.
#[derive(Debug, Args)]
pub(super) struct SessionArgs {
    /// Name or device id of the agent; `adit ls` lists them.
    #[arg(value_name = "AGENT")]
    pub(super) agent: String,
    #[command(flatten)]
    pub(super) data: Data,
    /// Which way: auto starts on the relay and moves to the direct path; direct and relay use that or nothing; redirector
    /// is no tunnel but a port of the server, which can read what passes. Where the operator and the agent permit it, auto
    /// takes that when there is no other way, and says so.
    #[arg(long, default_value = "auto", value_name = "TIER",
          value_parser = PossibleValuesParser::new(["auto", "direct", "relay", "redirector"]))]
    via: String,
}

/// A technician with one session.
pub(super) struct Connected {
    pub(super) session: OpenSession,
    agent: String,
    pub(super) via: Via,
    /// Keeps the control channel up: tickets are renewed through it.
    pub(super) technician: Technician,
    pub(super) status: Option<status::Server>,
    /// The session is open, in the agent's word.
    opened: bool,
    deadline: Instant,
}

impl SessionArgs {
    /// What can be wrong without asking anyone.
    pub(super) fn check(&self) -> Result<(PathBuf, Arc<Live>, Via), Failed> {
        let via = self.via.parse().unwrap_or_default();
        let (dir, identity) = self.data.identity(Role::Technician)?;
        Ok((dir, identity, via))
    }

    /// The options with which another `adit` does the same.
    pub(super) fn repeated(&self) -> Vec<OsString> {
        let mut words = self.data.repeated();
        words.extend(["--via".into(), self.via.clone().into()]);
        words
    }

    /// A connection to the mediator, for what needs no session.
    pub(super) fn connect(&self) -> Result<Technician, Failed> {
        let (_, identity, _) = self.check()?;
        Ok(Technician::connect(identity))
    }

    /// Asks the mediator for a session, and starts it.
    pub(super) async fn open(&self, command: &'static str, wanted: &[Wanted]) -> Result<Connected, Failed> {
        let (dir, identity, via) = self.check()?;
        if via == Via::Redirector {
            return Err(CliError::NoRedirector.into());
        }
        let device = identity.get().name.clone();
        let technician = Technician::connect(identity);
        let session = technician.open(&self.agent, wanted, via).await?;
        let info = SessionInfo {
            session: session.id,
            peer: session.peer_name.clone(),
            since: SystemTime::now(),
            tunnel: session.tunnel.clone(),
            via,
        };
        let status = status::serve(&dir, status::Process { command, device }, move || {
            vec![SessionStatus::from(&info)]
        });
        Ok(Connected {
            session,
            agent: self.agent.clone(),
            via,
            technician,
            status,
            opened: false,
            deadline: Instant::now() + OPENED,
        })
    }
}

impl Connected {
    /// What happens to the session; `None` when nothing will any more.
    ///
    /// Cancel safe.
    pub(super) async fn next(&mut self) -> Result<Option<SessionEvent>, Failed> {
        tokio::select! {
            event = self.session.events.recv() => {
                self.opened |= matches!(event, Some(SessionEvent::Tier { .. }));
                Ok(event)
            }
            () = sleep_until(self.deadline), if !self.opened => {
                self.session.tunnel.close("no way to the agent was found");
                self.parted().await;
                let detail = match self.via {
                    Via::Direct => ": no direct path was found, and --via direct allows nothing else".to_owned(),
                    _ => self.session.tunnel.trouble().map_or(String::new(), |why| format!(": the relay: {why}")),
                };
                Err(CliError::NotOpened { agent: self.agent.clone(), seconds: OPENED.as_secs(), detail }.into())
            }
        }
    }

    /// Whether the session has ended.
    pub(super) fn is_over(&self) -> bool {
        self.session.tunnel.is_closed()
    }

    /// Ends the session and waits, for a moment, until the agent has heard it. The event that says so.
    pub(super) async fn close(mut self, reason: &str) -> SessionEvent {
        self.session.tunnel.close(reason);
        self.parted().await.unwrap_or_else(|| SessionEvent::Closed { reason: reason.to_owned() })
    }

    /// Waits, for a moment, until the agent and the mediator have heard that the session is over.
    async fn parted(&mut self) -> Option<SessionEvent> {
        let closed = async {
            while let Some(event) = self.session.events.recv().await {
                if matches!(event, SessionEvent::Closed { .. }) {
                    return Some(event);
                }
            }
            None
        };
        timeout(GOODBYE, closed).await.ok().flatten()
    }
}
