//! The technician's side: lists agents and opens sessions with them.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use adit_protocol::control::{
    AgentInfo, Closed, Down, Examine, List, Open, PROOF, Reached, Redirect, Redirected, Refused, RefusedCode,
    Up, Web,
};
use adit_protocol::{Target, Wanted};
use adit_tunnel::session::End;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};

use crate::control::maintain::State;
use crate::exit::{Exit, Failure};
use crate::hub::{Hub, NotOpened, OpenSession, RequestError};
use crate::identity::Live;
use crate::via::Via;

/// How long the mediator may take to be reached: all of its addresses, each with its own deadline.
const CONNECT: Duration = Duration::from_secs(15);

/// How long the mediator may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// How long an agent may take to try everything.
const EXAMINED: Duration = Duration::from_secs(30);

/// How long a redirector may take until its port is open: the agent and the target have to answer.
const REDIRECTED: Duration = Duration::from_secs(30);

/// How long the port's name may take to resolve, and the port to see from where this machine comes: less than
/// [`adit_protocol::control::PROVING`], so that whoever uses it afterwards finds it ready.
const SEEN: Duration = Duration::from_secs(3);

/// How long it may take by the other IP version, when one has led there.
const OTHER: Duration = Duration::from_millis(300);

/// A technician's device with its control channel.
pub struct Technician {
    hub: Hub,
}

impl Technician {
    /// Begins to connect to the mediator, and keeps the channel up from then on. What is asked meanwhile is sent as soon
    /// as there is a channel, and fails where the first attempt does.
    pub fn connect(identity: Arc<Live>) -> Self {
        let (hub, _no_offers) = Hub::start(identity);
        Self { hub }
    }

    /// The answer to a request that may have `time`, beside what the first connection takes.
    async fn answer<T>(
        &self,
        time: Duration,
        asking: impl Future<Output = Result<T, RequestError>>,
    ) -> Result<T, TechnicianError> {
        tokio::pin!(asking);
        let mut state = self.hub.control().state();
        let first = timeout(CONNECT, state.wait_for(|state| !matches!(state, State::Connecting)));
        tokio::select! {
            // What was sent before the first attempt failed was sent for nothing.
            biased;
            first = first => match first {
                Ok(Ok(state)) => if let Some(error) = TechnicianError::no_mediator(&state) {
                    return Err(error);
                },
                Ok(Err(_)) => return Err(TechnicianError::Gone),
                Err(_) => return Err(TechnicianError::TimedOut),
            },
            // It may have failed between the two looks.
            answer = &mut asking => return answer.map_err(|error| {
                TechnicianError::no_mediator(&self.hub.control().state().borrow())
                    .unwrap_or_else(|| error.into())
            }),
        }
        Ok(timeout(time, asking).await.map_err(|_| RequestError::TimedOut)??)
    }

    /// The agents that this technician may reach, sorted by name.
    ///
    /// # Errors
    /// [`TechnicianError`].
    pub async fn list(&self) -> Result<Vec<AgentInfo>, TechnicianError> {
        let list = self.hub.request(CONNECT + ANSWER, |request| Up::List(List { request }));
        match self.answer(ANSWER, list).await? {
            Down::Agents(agents) => Ok(agents.agents),
            Down::Refused(refused) => Err(TechnicianError::refused(refused)),
            _ => Err(TechnicianError::Gone),
        }
    }

    /// What `agent`, a name or a device id, reaches from where it is.
    ///
    /// # Errors
    /// [`TechnicianError`].
    pub async fn examine(&self, agent: &str) -> Result<Vec<Reached>, TechnicianError> {
        let examine = |request| Up::Examine(Examine { request, agent: agent.to_owned() });
        match self.answer(EXAMINED, self.hub.request(CONNECT + EXAMINED, examine)).await? {
            Down::Examined(examined) => Ok(examined.results),
            Down::Refused(refused) => Err(TechnicianError::refused(refused)),
            _ => Err(TechnicianError::Gone),
        }
    }

    /// Opens a session with `agent`, a name or a device id. It is open, in the agent's word, when the
    /// first tier is told.
    ///
    /// # Errors
    /// [`TechnicianError`].
    pub async fn open(
        &self,
        agent: &str,
        wanted: &[Wanted],
        via: Via,
    ) -> Result<OpenSession, TechnicianError> {
        let open = |request, flight| {
            let targets = wanted.iter().map(Wanted::to_string).collect();
            Up::Open(Open { request, agent: agent.to_owned(), targets, via: via.as_str().to_owned(), flight })
        };
        let opened = self.hub.request_session(CONNECT + ANSWER, via, open);
        let (answer, opening) = self.answer(ANSWER, opened).await?;
        match answer {
            Down::Granted(grant) => {
                Ok(self.hub.open_session(End::Technician, grant, via, Some(agent), opening)?)
            }
            Down::Refused(refused) => Err(TechnicianError::refused(refused)),
            _ => Err(TechnicianError::Gone),
        }
    }

    /// Asks for a port on the server that leads to `target`, for `time`, for connections from `source` only; without one,
    /// from where the port sees this machine: see [`RedirectedPort::look`]. With `web`, for pages in place of the port. It is open
    /// when this returns.
    ///
    /// # Errors
    /// [`TechnicianError`].
    pub async fn redirect(
        &self,
        agent: &str,
        target: &Target,
        source: Option<IpAddr>,
        time: Duration,
        web: Option<Web>,
    ) -> Result<RedirectedPort, TechnicianError> {
        let proves = source.is_none() && web.is_none();
        let redirect = |request| {
            let source = source.map_or(String::new(), |ip| ip.to_string());
            let (agent, target) = (agent.to_owned(), target.to_string());
            Up::Redirect(Redirect {
                request,
                agent,
                target,
                source,
                seconds: time.as_secs(),
                web: web.clone(),
                proves,
            })
        };
        let redirected = self.hub.request(CONNECT + REDIRECTED, redirect);
        match self.answer(REDIRECTED, redirected).await? {
            Down::Redirected(redirected) => {
                let ended = self.hub.watch(&redirected.session);
                Ok(RedirectedPort { redirected, is_reached: true, ended })
            }
            Down::Refused(refused) => Err(TechnicianError::refused(refused)),
            _ => Err(TechnicianError::Gone),
        }
    }

    /// Gives a port of the redirector back. It is on its way when this returns.
    pub async fn end_redirected(&self, redirected: &Redirected) {
        let (session, reason) = (redirected.session.clone(), "closed by the technician".to_owned());
        let closed = Closed { session, reason, bytes_sent: 0, bytes_received: 0 };
        let _ = self.hub.control().send(Up::Closed(closed)).await;
    }

    /// Ends the control channel; what was sent before is on its way when this returns.
    pub async fn close(&self) {
        self.hub.control().close().await;
    }
}

/// A port of the redirector.
#[derive(Debug)]
pub struct RedirectedPort {
    /// Where it is, for whom (one address, or one of each IP version with a comma between), and until when.
    pub redirected: Redirected,
    /// Whether this machine itself reaches it, as far as that was tried.
    pub is_reached: bool,
    /// Why it was closed, when it is.
    pub ended: oneshot::Receiver<String>,
}

impl RedirectedPort {
    /// Shows the port from where this machine comes, where it waits for that; and finds an address of it that who may use it
    /// reaches it by.
    pub async fn look(&mut self) {
        let Self { redirected, is_reached, .. } = self;
        if !redirected.link.is_empty() {
            return;
        }
        let started = Instant::now();
        let resolving = timeout(SEEN, tokio::net::lookup_host(redirected.address.clone()));
        let found: Vec<SocketAddr> =
            resolving.await.map_or(vec![], |found| found.map_or(vec![], Iterator::collect));
        if !redirected.proof.is_empty() {
            let (proof4, proof6) = redirected.proof.split_at(PROOF.min(redirected.proof.len()));
            let ways = [(true, proof4), (false, proof6)].into_iter().filter_map(|(is_ipv4, proof)| {
                let port = found.iter().find(|address| address.is_ipv4() == is_ipv4)?;
                Some(seen_at(*port, proof))
            });
            let (mut ways, mut until) = (ways.collect::<FuturesUnordered<_>>(), started + SEEN);
            let mut seen = Vec::new();
            while let Ok(Some(way)) = timeout_at(until, ways.next()).await {
                match way {
                    // The other way may be a hole.
                    Ok(ip) => {
                        until = until.min(Instant::now() + OTHER);
                        seen.push(ip);
                    }
                    Err(error) => tracing::debug!(%error, "the port was not reached"),
                }
            }
            seen.sort();
            let seen: Vec<String> = seen.iter().map(IpAddr::to_string).collect();
            *is_reached = !seen.is_empty();
            if *is_reached {
                redirected.source = seen.join(", ");
            }
        }
        let (fit, misfit): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|address| may_come_by(&redirected.source, address.ip()));
        // Programs would take the other one of a name's addresses, and be turned away.
        if let Some(fit) = fit.first().filter(|_| !misfit.is_empty()) {
            redirected.address = fit.to_string();
        }
    }
}

/// From where this machine comes, in the words of the port there, which has `proof`'s twin.
async fn seen_at(port: SocketAddr, proof: &[u8]) -> io::Result<IpAddr> {
    let mut tcp = TcpStream::connect(port).await?;
    tcp.write_all(proof).await?;
    let mut told = String::new();
    // No address is longer.
    tcp.take(45).read_to_string(&mut told).await?;
    told.parse().map_err(io::Error::other)
}

/// Whether one of these sources is of the IP version of `address`.
fn may_come_by(sources: &str, address: IpAddr) -> bool {
    sources
        .split(", ")
        .any(|source| source.parse::<IpAddr>().is_ok_and(|source| source.is_ipv4() == address.is_ipv4()))
}

/// Why the mediator did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum TechnicianError {
    /// No control channel came about.
    #[error("{reason}")]
    NoMediator {
        /// Why.
        reason: String,
        /// What helps.
        remedy: Option<String>,
        /// The code to end with.
        exit: Exit,
    },
    /// It took too long.
    #[error("the mediator did not answer within {} s", CONNECT.as_secs())]
    TimedOut,
    /// The channel was lost in between.
    #[error("the connection to the mediator was lost")]
    Gone,
    /// It was granted, and came to nothing.
    #[error(transparent)]
    NotOpened(#[from] NotOpened),
    /// The mediator said no.
    #[error("{message}")]
    Refused {
        /// Kind of refusal.
        code: RefusedCode,
        /// The mediator's words.
        message: String,
    },
}

impl TechnicianError {
    /// The channel did not come about, if it did not.
    fn no_mediator(state: &State) -> Option<Self> {
        let State::Disconnected { reason, remedy, exit, .. } = state else { return None };
        Some(Self::NoMediator { reason: reason.clone(), remedy: remedy.clone(), exit: *exit })
    }

    fn refused(refused: Refused) -> Self {
        let message = refused.message.chars().filter(|c| !c.is_control()).take(1000).collect();
        Self::Refused { code: refused.code(), message }
    }
}

impl From<RequestError> for TechnicianError {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::NotConnected(_) => Self::Gone,
            RequestError::TimedOut => Self::TimedOut,
        }
    }
}

impl Failure for TechnicianError {
    fn exit(&self) -> Exit {
        match self {
            Self::NoMediator { exit, .. } => *exit,
            Self::TimedOut => Exit::TimedOut,
            Self::Gone => Exit::Unreachable,
            Self::NotOpened(_) => Exit::Failed,
            Self::Refused { code, .. } => match code {
                RefusedCode::UnknownAgent | RefusedCode::AgentRefused | RefusedCode::NotPermitted => {
                    Exit::Refused
                }
                RefusedCode::AgentOffline | RefusedCode::NoRelay | RefusedCode::Unreachable => {
                    Exit::Unreachable
                }
                RefusedCode::Unspecified | RefusedCode::Unavailable => Exit::Failed,
            },
        }
    }

    fn remedy(&self) -> Option<String> {
        match self {
            Self::NoMediator { remedy, .. } => remedy.clone(),
            Self::TimedOut | Self::Gone => {
                Some("check that the mediator runs and that no firewall blocks the way".to_owned())
            }
            Self::NotOpened(_) | Self::Refused { .. } => None,
        }
    }
}
