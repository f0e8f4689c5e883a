//! The audit log: one JSON object a line, on the disk before what it tells of happens.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use adit_client::identity::store::hand_over;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::error::Error;

/// Records that may wait for the disk. More are refused.
const QUEUE: usize = 256;
/// Records that one flush takes along.
const BATCH: usize = 64;
/// How long the disk may take.
const DEADLINE: Duration = Duration::from_secs(2);

/// One line.
#[derive(Debug, Serialize)]
pub struct Record<'a> {
    /// Seconds since 1970-01-01 UTC.
    pub time: u64,
    /// Of sessions: `grant`, `refused`, `opened`, `moved`, `restored`, `closed`; of devices: `enrolled`, `replaced`,
    /// `renamed`, `tagged`, `revoked`, `cloned`; of what may be: `allowed`, `denied`; of the
    /// organisation: `backed up`, `restored backup`.
    pub event: &'a str,
    /// Session id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// Technician: device id and name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub technician: Option<Party<'a>>,
    /// Agent: device id and name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<Party<'a>>,
    /// Any other device that this is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<Party<'a>>,
    /// Which agent the technician asked for, when it may not have it.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub wanted: &'a str,
    /// Who did it, when it was nobody at a device.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub by: &'a str,
    /// Where the technician's, or that other device's, connection comes from.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub from: &'a str,
    /// Where the agent's connection comes from.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub agent_from: &'a str,
    /// The rule that allowed it.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub rule: &'a str,
    /// `direct`, `relay` or `redirector`, in the agent's word.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub tier: &'a str,
    /// The carrier of that tier.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub carrier: &'a str,
    /// What the technician says it wants.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub targets: &'a [String],
    /// Which tiers the technician wants; empty: any.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub via: &'a str,
    /// For people.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub reason: &'a str,
    /// Role of the device that said how many bytes there were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub counted_by: Option<&'a str>,
    /// Payload bytes that device sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_sent: Option<u64>,
    /// Payload bytes that device received.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_received: Option<u64>,
}

/// A device in the audit log.
#[derive(Debug, Serialize)]
pub struct Party<'a> {
    /// Device id.
    pub id: String,
    /// Its name.
    pub name: &'a str,
}

impl<'a> Record<'a> {
    /// A record of `event` at `time` with nothing else in it.
    pub fn new(event: &'a str, time: u64) -> Self {
        Self {
            time,
            event,
            session: None,
            technician: None,
            agent: None,
            device: None,
            wanted: "",
            by: "",
            from: "",
            agent_from: "",
            rule: "",
            tier: "",
            carrier: "",
            targets: &[],
            via: "",
            reason: "",
            counted_by: None,
            bytes_sent: None,
            bytes_received: None,
        }
    }
}

/// Handle on the writer, which ends with the last clone.
#[derive(Debug, Clone)]
pub struct Audit {
    queue: mpsc::Sender<Job>,
}

type Job = (Vec<u8>, oneshot::Sender<bool>);

impl Audit {
    /// Opens the log for appending.
    ///
    /// # Errors
    /// [`Error::Audit`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let mut options = OpenOptions::new();
        options.create(true).append(true);
        // Who reached what is nobody else's business.
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let failed = |error| Error::Audit { path: path.to_owned(), error };
        let mut file = options.read(true).open(path).map_err(failed)?;
        mend(&mut file).map_err(failed)?;
        hand_over(path).map_err(failed)?;
        let (queue, jobs) = mpsc::channel(QUEUE);
        tokio::task::spawn_blocking(move || write_all(file, jobs));
        Ok(Self { queue })
    }

    /// Returns once the record is on the disk.
    ///
    /// # Errors
    /// [`NotWritten`]: it is not, or too many wait.
    pub async fn write(&self, record: &Record<'_>) -> Result<(), NotWritten> {
        let mut line = serde_json::to_vec(record).map_err(|_| NotWritten)?;
        line.push(b'\n');
        let (done, written) = oneshot::channel();
        self.queue.try_send((line, done)).map_err(|_| NotWritten)?;
        match timeout(DEADLINE, written).await {
            Ok(Ok(true)) => Ok(()),
            _ => Err(NotWritten),
        }
    }
}

/// The audit record could not be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the audit record could not be written")]
pub struct NotWritten;

fn write_all(mut file: File, mut jobs: mpsc::Receiver<Job>) {
    let mut batch = Vec::with_capacity(BATCH);
    while let Some(job) = jobs.blocking_recv() {
        batch.push(job);
        while batch.len() < BATCH
            && let Ok(job) = jobs.try_recv()
        {
            batch.push(job);
        }
        let written = append(&mut file, &batch);
        if let Err(error) = &written {
            tracing::error!(%error, "the audit log cannot be written: no session is granted");
        }
        for (_, done) in batch.drain(..) {
            let _ = done.send(written.is_ok());
        }
    }
}

/// A line that was cut off by a power failure must not spoil the next one.
fn mend(file: &mut File) -> io::Result<()> {
    let length = file.metadata()?.len();
    let mut last = [b'\n'];
    if length > 0 {
        file.seek(SeekFrom::Start(length - 1))?;
        file.read_exact(&mut last)?;
    }
    if last != *b"\n" { file.write_all(b"\n") } else { Ok(()) }
}

/// All lines of the batch, or none.
fn append(file: &mut File, batch: &[Job]) -> io::Result<()> {
    // The operator's commands write here, too.
    file.lock()?;
    let written = append_locked(file, batch);
    let _ = file.unlock();
    written
}

fn append_locked(file: &mut File, batch: &[Job]) -> io::Result<()> {
    let before = file.seek(SeekFrom::End(0))?;
    let lines: Vec<u8> = batch.iter().flat_map(|(line, _)| line).copied().collect();
    let written = file.write_all(&lines).and_then(|()| file.sync_data());
    if written.is_err() {
        // Half a line would spoil the next one.
        let _ = file.set_len(before);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_there_when_write_returns() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("audit.jsonl");
        let audit = Audit::open(&path).expect("opens");
        for time in 0..3 {
            audit.write(&Record::new("grant", time)).await.expect("writes");
            let text = std::fs::read_to_string(&path).expect("reads");
            assert_eq!(text.lines().count() as u64, time + 1);
            assert_eq!(text.lines().last(), Some(format!(r#"{{"time":{time},"event":"grant"}}"#).as_str()));
        }
    }

    #[tokio::test]
    async fn a_line_that_was_cut_off_spoils_no_other() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("audit.jsonl");
        std::fs::write(&path, "{\"time\":1,\"ev").expect("writes");
        Audit::open(&path).expect("opens").write(&Record::new("grant", 2)).await.expect("writes");
        let text = std::fs::read_to_string(&path).expect("reads");
        assert_eq!(text, "{\"time\":1,\"ev\n{\"time\":2,\"event\":\"grant\"}\n");
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_full_disk_is_reported() {
        let audit = Audit::open(Path::new("/dev/full")).expect("opens");
        assert_eq!(audit.write(&Record::new("grant", 0)).await, Err(NotWritten));
    }
}
