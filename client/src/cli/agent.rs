//! `adit agent`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use adit_protocol::{Role, SessionId};
use clap::Args;
use tokio::sync::mpsc;

use super::data::Data;
use super::{Failed, signals};
use crate::agent::{self, AgentEvent};
use crate::allow::{AllowList, Entry};
use crate::config::Config;
use crate::events::{Event, Events};
use crate::os;
use crate::service;
use crate::session::SessionEvent;
use crate::status::{self, SessionInfo, SessionStatus};

/// Events that wait to be written.
const EVENTS: usize = 256;

/// Serve technicians on this machine: connect them to the targets on the allow list.
///
/// It runs until Ctrl-C, which closes all connections and sessions (exit code 0), and reconnects for ever. At
/// SIGUSR1 it ends as soon as no session is open: so an upgrade cuts nobody off.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: adit agent --allow 127.0.0.1:22 --allow 192.168.1.0/24:80,443 --allow dns.local:53/udp"
)]
pub(super) struct Agent {
    #[command(flatten)]
    pub(super) data: Data,
    /// What technicians may reach from here. Can be given several times; goes before `[agent] allow` in
    /// config.toml of the state directory.
    /// Loopback, link-local and other special addresses need an entry that names them.
    /// [default: 127.0.0.1 and ::1 on 22, 3389, 5900]
    #[arg(long, value_name = "HOST:PORT[/udp]|CIDR:PORTS[/udp]", verbatim_doc_comment)]
    pub(super) allow: Vec<Entry>,
    /// Events as JSON, one object a line.
    #[arg(long)]
    pub(super) json: bool,
}

impl Agent {
    pub(super) async fn run(self) -> Result<(), Failed> {
        self.run_until(signals::stop()).await
    }

    /// Runs the agent until `stop` completes, and then until the technicians know.
    pub(super) async fn run_until(self, stop: impl Future<Output = ()>) -> Result<(), Failed> {
        let (dir, identity) = self.data.identity(Role::Agent)?;
        let crate::config::Agent { allow: written, redirector } = Config::load(&dir)?.agent;
        let given = Some(self.allow).filter(|entries| !entries.is_empty());
        let allow = given.or(written).map_or_else(AllowList::default, AllowList::from_iter);
        let events = Events::new(self.json);
        let entries: Vec<String> = allow.entries().iter().map(Entry::to_string).collect();
        events.emit(&Event::Allowing { entries: &entries });
        if redirector {
            tracing::warn!(
                "the redirector is permitted: the server may open sessions to these targets and read them"
            );
        }

        let sessions = Arc::<Sessions>::default();
        let process = status::Process { command: "agent", device: identity.get().name.clone() };
        let shown = sessions.clone();
        let _status =
            status::serve(&dir, process, move || shown.all().iter().map(SessionStatus::from).collect());

        service::ready();
        let (sender, mut receiver) = mpsc::channel(EVENTS);
        let telling = async move {
            while let Some(event) = receiver.recv().await {
                sessions.note(&event);
                tell(events, &event);
            }
        };
        let permits = agent::Permits { allow: Arc::new(allow), redirector };
        let running = agent::run(identity, permits, sender, stop, os::asked_to_retire());
        tokio::join!(running, telling);
        Ok(())
    }
}

fn tell(events: Events, event: &AgentEvent) {
    match event {
        AgentEvent::Online => events.emit(&Event::Online),
        AgentEvent::Offline { reason } => events.emit(&Event::Offline { reason }),
        // The first tier says it.
        AgentEvent::Opened { .. } => {}
        AgentEvent::Session { session, peer, event } => {
            events.emit(&Event::Session { whose: Some((&session.to_string(), peer)), event });
        }
    }
}

/// The sessions that are running, for the status.
#[derive(Debug, Default)]
struct Sessions(Mutex<HashMap<SessionId, SessionInfo>>);

impl Sessions {
    fn note(&self, event: &AgentEvent) {
        let mut sessions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            AgentEvent::Opened { session, peer, via, tunnel } => {
                let (peer, tunnel, since) = (peer.clone(), tunnel.clone(), SystemTime::now());
                let info = SessionInfo { session: *session, peer, via: *via, since, tunnel };
                sessions.insert(*session, info);
            }
            AgentEvent::Session { session, event: SessionEvent::Closed { .. }, .. } => {
                sessions.remove(session);
            }
            _ => {}
        }
    }

    /// Oldest first.
    fn all(&self) -> Vec<SessionInfo> {
        let sessions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<SessionInfo> = sessions.values().cloned().collect();
        all.sort_by_key(|info| info.since);
        all
    }
}
