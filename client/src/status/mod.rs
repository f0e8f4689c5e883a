//! What the processes of a state directory are doing: each long-running one serves a document on a local
//! socket (Windows: a named pipe), `adit status` asks them all. What a process serves is found in `DIR/run`.

#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use adit_protocol::SessionId;
use serde::{Deserialize, Serialize};
use tokio::task::AbortHandle;
use tokio::time::timeout;
#[cfg(unix)]
use unix as system;
#[cfg(windows)]
use windows as system;

use crate::events::millis;
use crate::exit::{Exit, Failure};
use crate::forward::Traffic;
use crate::tunnel::{CarrierInfo, Tunnel};
use crate::via::Via;

/// Where a process leaves what leads to it, below its state directory.
const RUN: &str = "run";
/// How long a process may take to answer, or to be read by who asked.
const PATIENCE: Duration = Duration::from_secs(2);
/// More than any process has to say.
const MAX_DOCUMENT: u64 = 4 << 20;
/// Pause after an error that the next accept may meet again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// A served status; ends when dropped.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    task: AbortHandle,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        let _ = fs::remove_file(&self.path);
    }
}

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
    /// Which tiers it may take.
    pub via: Via,
}

/// A session of which a redirector is this end.
#[derive(Debug, Clone)]
pub struct RedirectedInfo {
    /// Session id.
    pub session: SessionId,
    /// Name of the agent.
    pub peer: String,
    /// When it began.
    pub since: SystemTime,
    /// `HOST:PORT` of the redirector's port.
    pub remote: String,
    /// What has gone there.
    pub traffic: Arc<Traffic>,
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
    /// `direct`, `relay` or `redirector`; none while there is no carrier.
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
    /// `quic`, `tcp`, `relay`, `relay-https` or `redirector`.
    pub carrier: String,
    /// `direct`, `relay` or `redirector`.
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
pub fn serve(
    dir: &Path,
    process: Process,
    sessions: impl Fn() -> Vec<SessionStatus> + Send + 'static,
) -> Option<Server> {
    let since = seconds(SystemTime::now());
    let document = move || Document {
        pid: std::process::id(),
        command: process.command.to_owned(),
        device: process.device.clone(),
        since,
        sessions: sessions(),
    };
    system::serve(&dir.join(RUN), document)
        .inspect_err(|error| tracing::warn!(%error, "the status of this process cannot be served"))
        .ok()
}

/// Asks every process that uses the state directory `dir`; sorted by process id.
///
/// # Errors
/// [`StatusError`].
pub async fn ask(dir: &Path) -> Result<Vec<Document>, StatusError> {
    ask_all(&dir.join(RUN)).await.map_err(|error| StatusError::Io { dir: dir.to_owned(), error })
}

async fn ask_all(run: &Path) -> io::Result<Vec<Document>> {
    let entries = match std::fs::read_dir(run) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut documents = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == system::EXTENSION) {
            // Nothing from a process that is gone, or does not answer in time.
            let text = timeout(PATIENCE, system::ask(&path)).await.ok().flatten();
            documents.extend(text.and_then(|text| serde_json::from_slice::<Document>(&text).ok()));
        }
    }
    documents.sort_by_key(|document| document.pid);
    Ok(documents)
}

/// Why nothing could be asked.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// The state directory.
    #[error("{}: {error}", dir.display())]
    Io {
        /// The state directory.
        dir: std::path::PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

impl Failure for StatusError {
    fn exit(&self) -> Exit {
        Exit::Usage
    }

    fn remedy(&self) -> Option<String> {
        Some("check that the directory can be read by this user".to_owned())
    }
}

impl From<&SessionInfo> for SessionStatus {
    fn from(info: &SessionInfo) -> Self {
        let carriers: Vec<CarrierStatus> =
            info.tunnel.carriers().into_iter().map(|carrier| CarrierStatus::of(carrier, info.via)).collect();
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

impl From<&RedirectedInfo> for SessionStatus {
    fn from(info: &RedirectedInfo) -> Self {
        let tier = "redirector".to_owned();
        let (streams, sent, received) = info.traffic.counted();
        let carrier = CarrierStatus {
            carrier: tier.clone(),
            tier: tier.clone(),
            active: true,
            local: None,
            remote: Some(info.remote.clone()),
            rtt_ms: None,
            sent,
            received,
        };
        Self {
            session: info.session.to_string(),
            peer: info.peer.clone(),
            since: seconds(info.since),
            tier: Some(tier),
            streams,
            sent,
            received,
            carriers: vec![carrier],
        }
    }
}

impl CarrierStatus {
    fn of(info: CarrierInfo, via: Via) -> Self {
        Self {
            carrier: info.kind.as_str().to_owned(),
            tier: via.tier(info.kind).to_owned(),
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
