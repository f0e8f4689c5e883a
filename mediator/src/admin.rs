//! How the operator's commands talk to a mediator that runs on the same directory: a socket for its owner
//! only, one JSON object each way. Commands change the database themselves; the mediator is told to take note.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use adit_protocol::DeviceId;
use adit_protocol::control::Reached;
use futures_util::stream::{FuturesUnordered, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{sleep, timeout};
use tracing::warn;

use crate::broker::{Addresses, Broker, Effect};
use crate::error::Error;

const SOCKET: &str = "admin.sock";
/// Longest request, in bytes.
const MAX_REQUEST: u64 = 64 * 1024;
/// How long a request may take to arrive.
const ARRIVE: Duration = Duration::from_secs(2);
/// How long the mediator may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause after an error that the next accept may meet again.
const REST: Duration = Duration::from_millis(500);

/// What a command asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    /// The database has changed: let it take effect.
    Reload,
    /// Who is online?
    Presence,
    /// Lets an agent try whether this server can be reached from there.
    Probe {
        /// Its device id.
        agent: DeviceId,
    },
    /// What this server listens on and says of itself.
    About,
}

/// What the mediator answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// The change has taken effect.
    Reloaded(Effect),
    /// Who is online.
    Presence {
        /// One for each control channel.
        channels: Vec<Present>,
    },
    /// What the agent found.
    Probed {
        /// One for each address.
        results: Vec<Found>,
    },
    /// What this server says of itself.
    About(About),
    /// It could not be done.
    Failed {
        /// Why, for people.
        why: String,
    },
}

/// Whether one address was reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// `https`, `relay` or `stun`.
    pub what: String,
    /// `HOST:PORT`.
    pub address: String,
    /// It was reached, and is what it should be.
    pub ok: bool,
    /// How long that took.
    pub micros: u64,
    /// What was found out, or why not.
    pub detail: String,
}

impl From<Found> for Reached {
    fn from(found: Found) -> Self {
        let Found { what, address, ok, micros, detail } = found;
        Self { what, address, ok, micros, detail }
    }
}

impl From<Reached> for Found {
    fn from(reached: Reached) -> Self {
        let Reached { what, address, ok, micros, detail } = reached;
        Self { what, address, ok, micros, detail }
    }
}

/// A mediator that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// What its process listens on: `tcp` or `udp`, and the address. Only the process itself may always look.
    pub listening: Vec<(String, SocketAddr)>,
    /// `HOST:PORT` by which its mediator, its relays and its STUN servers are reached.
    pub https: Vec<String>,
    /// See `https`.
    pub relay: Vec<String>,
    /// See `https`.
    pub stun: Vec<String>,
}

/// A control channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Present {
    /// Device id.
    pub device: DeviceId,
    /// `IP:PORT` that it comes from.
    pub address: String,
    /// Seconds since 1970-01-01 UTC.
    pub since: u64,
    /// What runs there, as it said itself.
    pub software: String,
}

/// Asks the mediator that runs on `dir`; `None` when there is none.
///
/// # Errors
/// [`AskError`]: there is one, and it does not answer.
pub async fn ask(dir: &Path, request: &Request) -> Result<Option<Answer>, AskError> {
    let socket = match UnixStream::connect(dir.join(SOCKET)).await {
        Ok(socket) => socket,
        Err(error) => {
            use io::ErrorKind::{ConnectionRefused, NotFound};
            return if matches!(error.kind(), ConnectionRefused | NotFound) {
                Ok(None)
            } else {
                Err(AskError(error))
            };
        }
    };
    let answer = async {
        let (reader, mut writer) = socket.into_split();
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        writer.write_all(&line).await?;
        let mut text = Vec::new();
        let mut reader = reader;
        reader.read_to_end(&mut text).await?;
        Ok(serde_json::from_slice(&text)?)
    };
    let late = || AskError(io::Error::from(io::ErrorKind::TimedOut));
    timeout(PATIENCE, answer).await.map_err(|_| late())?.map(Some).map_err(AskError)
}

/// The mediator on this directory does not answer.
#[derive(Debug, thiserror::Error)]
#[error("the mediator that runs here does not answer: {0}")]
pub struct AskError(io::Error);

/// The socket; removed when dropped.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
}

impl Server {
    /// Takes the place of a socket that a process left which is gone.
    ///
    /// # Errors
    /// What the system said; `AddrInUse` when another mediator runs on this directory.
    pub async fn bind(dir: &Path) -> io::Result<Self> {
        let path = dir.join(SOCKET);
        if UnixStream::connect(&path).await.is_ok() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        // The directory itself is its owner's only, too.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener, path })
    }

    /// Answers until dropped: a probe that waits for its device holds up no revocation. `apply` lets new settings
    /// take effect.
    pub async fn serve(self, broker: Arc<Broker>, apply: impl Fn() -> Result<(), Error> + Sync) {
        let mut commands = FuturesUnordered::new();
        loop {
            let accept = async {
                match self.listener.accept().await {
                    Ok((socket, _)) => Some(socket),
                    Err(_) => {
                        sleep(REST).await;
                        None
                    }
                }
            };
            tokio::select! {
                socket = accept => commands.extend(socket.map(|socket| serve_one(socket, &broker, &apply))),
                Some(answered) = commands.next() => if let Err(error) = answered {
                    warn!(%error, "a command of the operator was not answered");
                },
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

async fn serve_one(
    socket: UnixStream,
    broker: &Broker,
    apply: &(impl Fn() -> Result<(), Error> + Sync),
) -> io::Result<()> {
    let (reader, mut writer) = socket.into_split();
    let mut line = String::new();
    timeout(ARRIVE, BufReader::new(reader.take(MAX_REQUEST)).read_line(&mut line)).await??;
    let answer = match serde_json::from_str(&line) {
        Ok(request) => answer(request, broker, apply).await,
        Err(error) => Answer::Failed { why: format!("this mediator does not know that request: {error}") },
    };
    timeout(ARRIVE, writer.write_all(&serde_json::to_vec(&answer)?)).await?
}

async fn answer(
    request: Request,
    broker: &Broker,
    apply: &(impl Fn() -> Result<(), Error> + Sync),
) -> Answer {
    match request {
        Request::Reload => {
            // A mistake in the settings keeps nobody in who was revoked.
            let applied = apply().map_err(|error| error.to_string());
            let reloaded = broker.reload().await.map_err(|error| error.to_string());
            match applied.and(reloaded) {
                Ok(effect) => Answer::Reloaded(effect),
                Err(why) => Answer::Failed { why },
            }
        }
        Request::Probe { agent } => match broker.probe(agent).await {
            Ok(results) => Answer::Probed { results: results.into_iter().map(Found::from).collect() },
            Err(why) => Answer::Failed { why: why.to_owned() },
        },
        Request::About => {
            let Addresses { https, relay, stun } = broker.addresses();
            let listening = crate::doctor::own_sockets();
            Answer::About(About { listening, https, relay, stun })
        }
        Request::Presence => {
            let present = |channel: crate::presence::Channel| Present {
                device: channel.device.id,
                address: channel.from.to_string(),
                since: channel.since,
                software: broker
                    .directory
                    .get(channel.device.id)
                    .map(|d| d.seen.software.clone())
                    .unwrap_or_default(),
            };
            Answer::Presence { channels: broker.presence.all().into_iter().map(present).collect() }
        }
    }
}
