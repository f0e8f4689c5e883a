//! What the processes of a state directory are doing: each long-running one serves a document on a local
//! socket, `adit status` asks them all.
//!
//! Unix only for now: elsewhere nothing is served, and asking says so.

#[cfg(unix)]
mod unix;

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use adit_protocol::SessionId;
use serde::{Deserialize, Serialize};

use crate::events::millis;
use crate::exit::{Exit, Failure};
use crate::tunnel::{CarrierInfo, Tunnel};

#[cfg(unix)]
pub use unix::Server;

/// One session, as its process knows it.
#[derive(Debug, Clone)]
pub struct SessionInfo {
    /// Session id.
    pub session: SessionId,
    /// Name of the other end.
    pub peer: String,
    /// When it began.
    pub since: SystemTime,
    /// Its tunnel.
    pub tunnel: Tunnel,
}

/// Who serves the document.
#[derive(Debug, Clone)]
pub struct Process {
    /// `agent`, `forward` or `stdio`.
    pub command: &'static str,
    /// Name of the device.
    pub device: String,
}

/// What one process is doing. Times are seconds since 1970-01-01 UTC.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Document {
    /// Process id.
    pub pid: u32,
    /// `agent`, `forward` or `stdio`.
    pub command: String,
    /// Name of the device.
    pub device: String,
    /// When the process began.
    pub since: u64,
    /// Its sessions.
    pub sessions: Vec<SessionStatus>,
}

/// One session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// Session id.
    pub session: String,
    /// Name of the other end.
    pub peer: String,
    /// When it began.
    pub since: u64,
    /// `direct` or `relay`; none while there is no carrier.
    pub tier: Option<String>,
    /// Streams and flows that are open.
    pub streams: usize,
    /// Payload bytes sent.
    pub sent: u64,
    /// Payload bytes received.
    pub received: u64,
    /// All carriers, oldest first.
    pub carriers: Vec<CarrierStatus>,
}

/// One carrier.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CarrierStatus {
    /// `quic`, `tcp`, `relay` or `relay-https`.
    pub carrier: String,
    /// `direct` or `relay`.
    pub tier: String,
    /// Whether the session sends on it.
    pub active: bool,
    /// This end's address.
    pub local: Option<String>,
    /// The peer's, or the relay's.
    pub remote: Option<String>,
    /// Smoothed round trip in milliseconds.
    pub rtt_ms: Option<f64>,
    /// Bytes sent.
    pub sent: u64,
    /// Bytes received.
    pub received: u64,
}

/// Serves the status of this process in the state directory `dir` until the returned value is dropped.
/// `None` when that cannot be: a process without a status is better than none.
#[cfg(unix)]
pub fn serve(
    dir: &Path,
    process: Process,
    sessions: impl Fn() -> Vec<SessionInfo> + Send + 'static,
) -> Option<Server> {
    let since = seconds(SystemTime::now());
    let document = move || Document {
        pid: std::process::id(),
        command: process.command.to_owned(),
        device: process.device.clone(),
        since,
        sessions: sessions().iter().map(SessionStatus::from).collect(),
    };
    unix::serve(dir, document)
        .inspect_err(|error| tracing::warn!(%error, "the status of this process cannot be served"))
        .ok()
}

/// Not on this system yet.
#[cfg(not(unix))]
pub fn serve(_: &Path, _: Process, _: impl Fn() -> Vec<SessionInfo> + Send + 'static) -> Option<()> {
    None
}

/// Asks every process that uses the state directory `dir`; sorted by process id.
///
/// # Errors
/// [`StatusError`].
pub async fn ask(dir: &Path) -> Result<Vec<Document>, StatusError> {
    #[cfg(unix)]
    return unix::ask(dir).await.map_err(|error| StatusError::Io { dir: dir.to_owned(), error });
    #[cfg(not(unix))]
    Err(StatusError::NotSupported)
}

/// Why nothing could be asked.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// No local sockets here.
    #[error("`adit status` is not supported on this system yet")]
    NotSupported,
    /// The state directory.
    #[error("{}: {error}", dir.display())]
    Io {
        /// The state directory.
        dir: std::path::PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
}

impl Failure for StatusError {
    fn exit(&self) -> Exit {
        match self {
            Self::NotSupported => Exit::Failed,
            Self::Io { .. } => Exit::Usage,
        }
    }

    fn remedy(&self) -> Option<String> {
        match self {
            Self::NotSupported => {
                Some("the commands themselves tell their tiers: adit forward --json".to_owned())
            }
            Self::Io { .. } => Some("check that the directory can be read by this user".to_owned()),
        }
    }
}

impl From<&SessionInfo> for SessionStatus {
    fn from(info: &SessionInfo) -> Self {
        let carriers: Vec<CarrierStatus> =
            info.tunnel.carriers().into_iter().map(CarrierStatus::from).collect();
        let (sent, received) = info.tunnel.bytes();
        Self {
            session: info.session.to_string(),
            peer: info.peer.clone(),
            since: seconds(info.since),
            tier: carriers.iter().find(|carrier| carrier.active).map(|carrier| carrier.tier.clone()),
            streams: info.tunnel.stream_count(),
            sent,
            received,
            carriers,
        }
    }
}

impl From<CarrierInfo> for CarrierStatus {
    fn from(info: CarrierInfo) -> Self {
        Self {
            carrier: info.kind.as_str().to_owned(),
            tier: info.kind.tier().to_owned(),
            active: info.active,
            local: info.local.map(|address| address.to_string()),
            remote: info.remote.map(|address| address.to_string()),
            rtt_ms: info.rtt.map(millis),
            sent: info.bytes.0,
            received: info.bytes.1,
        }
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}
