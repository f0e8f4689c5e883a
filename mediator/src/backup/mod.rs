//! Everything that makes an organisation, in one encrypted file, and back: a tar archive in an `age` file
//! (age-encryption.org/v1).
//!
//! The archive's first entry says what it is ([`Manifest`]), the others are the files of the state directory
//! under their own names. The database is a consistent copy, taken while others use it; the audit log is read
//! after it, so that it has a line for all that the database knows.

mod restore;
mod seal;

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use adit_client::exit::{Exit, Failure};
use adit_relay::certificates;
use serde::{Deserialize, Serialize};

use crate::config;
use crate::error::Error;
use crate::operator::Operator;
use crate::organisation::{
    AUDIT, DATABASE, RELAY_ID, ROOT, ROOT_KEY, SERVER, SERVER_KEY, TICKET_KEY, unix_now,
};

pub use restore::{Restored, restore};
pub use seal::{MIN_PASSPHRASE, Seal, Sealed, Unseal, read_identities};

/// Name of the archive's first entry.
const MANIFEST: &str = "backup.json";
/// The form of the archive. A reader refuses one that it does not know.
const FORMAT: u32 = 1;

/// A file of the state directory that a backup has.
struct Kept {
    name: &'static str,
    /// There is no organisation without it.
    needed: bool,
    /// For its owner only.
    secret: bool,
    /// It grows with the organisation; the others are a few hundred bytes.
    grows: bool,
}

const fn kept(name: &'static str, needed: bool, secret: bool, grows: bool) -> Kept {
    Kept { name, needed, secret, grows }
}

/// In the order that they are written in.
const KEPT: [Kept; 13] = [
    kept(config::FILE, true, false, false),
    kept(ROOT, true, false, false),
    kept(ROOT_KEY, false, true, false),
    kept(SERVER, true, false, false),
    kept(SERVER_KEY, true, true, false),
    kept(TICKET_KEY, true, true, false),
    kept(RELAY_ID, true, false, false),
    kept(certificates::ROOT, false, false, false),
    kept(certificates::ROOT_KEY, false, true, false),
    kept(certificates::CERTIFICATE, false, false, false),
    kept(certificates::KEY, false, true, false),
    kept(DATABASE, true, true, true),
    kept(AUDIT, false, true, true),
];

/// What the archive's first entry says, as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    /// Seconds since 1970-01-01 UTC.
    made: u64,
    /// What wrote it.
    software: String,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Size of the backup, in bytes.
    pub bytes: u64,
    /// Whether the enrolment key is in it.
    pub has_key: bool,
}

/// Writes a backup of the organisation in `dir` to `output`, also while the mediator runs; `with_key`: with the
/// enrolment key, if it is there. The output is flushed, and not synced.
///
/// # Errors
/// [`Error`]. What was written until then is of no use.
pub async fn write<W>(dir: &Path, seal: Seal, with_key: bool, output: W) -> Result<(Written, W), Error>
where
    W: Write + Send + 'static,
{
    let operator = Operator::open(dir).await?;
    operator.write_down_deed("backed up", &seal.to_string()).await?;
    // In the directory, which is for its owner only; gone when dropped.
    let copy = tempfile::Builder::new().prefix(".backup-").suffix(".db").tempfile_in(dir)?;
    operator.database(operator.store.copy_to(copy.path()).await)?;
    operator.store.close().await;
    let dir = dir.to_owned();
    let packed = tokio::task::spawn_blocking(move || {
        let packed = pack(&dir, copy.path(), seal, with_key, output);
        packed.map_err(|error| Error::from(BackupError::Write(error)))
    });
    packed.await.map_err(io::Error::other)?
}

fn pack<W: Write>(dir: &Path, copy: &Path, seal: Seal, with_key: bool, out: W) -> io::Result<(Written, W)> {
    let counted = Counted { inner: out, bytes: 0 };
    let mut archive = tar::Builder::new(seal.encryptor()?.wrap_output(counted)?);
    let now = unix_now();
    let software = concat!("adit-mediator ", env!("CARGO_PKG_VERSION")).to_owned();
    let manifest = serde_json::to_vec(&Manifest { format: FORMAT, made: now, software })?;
    append(&mut archive, MANIFEST, now, manifest.len() as u64, manifest.as_slice())?;
    let mut has_key = false;
    for file in &KEPT {
        if file.name == ROOT_KEY && !with_key {
            continue;
        }
        let path = if file.name == DATABASE { copy.to_owned() } else { dir.join(file.name) };
        let open = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !file.needed => continue,
            open => open?,
        };
        // Whole lines of the audit log: its writers hold a lock.
        open.lock_shared()?;
        let size = open.metadata().map(|metadata| metadata.len());
        open.unlock()?;
        append(&mut archive, file.name, now, size?, open)?;
        has_key |= file.name == ROOT_KEY;
    }
    let mut counted = archive.into_inner()?.finish()?;
    counted.flush()?;
    Ok((Written { bytes: counted.bytes, has_key }, counted.inner))
}

/// Appends exactly `size` bytes: a file that grows meanwhile is cut there, one that shrinks is an error.
fn append(
    archive: &mut tar::Builder<impl Write>,
    name: &str,
    now: u64,
    size: u64,
    data: impl Read,
) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(size);
    header.set_mode(0o600);
    header.set_mtime(now);
    let mut data = data.take(size);
    archive.append_data(&mut header, name, &mut data)?;
    if data.limit() > 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{name} has become shorter")));
    }
    Ok(())
}

struct Counted<W> {
    inner: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(buffer)?;
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Why there is no backup, or why one was not restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// Somewhere on the way to the file.
    #[error("the backup cannot be written: {0}")]
    Write(io::Error),
    /// The backup is there already.
    #[error("{0} is there already")]
    Exists(String),
    /// It is binary.
    #[error("a backup is not written to a terminal")]
    Terminal,
    /// It cannot be opened.
    #[error("{path} cannot be read: {error}")]
    Unreadable {
        /// What.
        path: String,
        /// What the system said.
        error: io::Error,
    },
    /// No age recipient.
    #[error("{0:?} is not an age recipient")]
    Recipient(String),
    /// Nobody said how to encrypt, and nobody is there to ask.
    #[error("there is no passphrase, and no terminal to ask on")]
    NoPassphrase,
    /// It was typed twice, and differently.
    #[error("that was not the same passphrase twice")]
    Mistyped,
    /// Too easily guessed.
    #[error("the passphrase is shorter than {MIN_PASSPHRASE} characters")]
    Short,
    /// Encrypted to a recipient.
    #[error("the backup is encrypted to an age recipient, not with a passphrase")]
    WantsIdentity,
    /// Encrypted with a passphrase.
    #[error("the backup is encrypted with a passphrase, not to an age recipient")]
    WantsPassphrase,
    /// Another passphrase, another identity, or damage in the head of the file.
    #[error("this passphrase or identity does not open the backup")]
    Locked,
    /// Not one of ours, cut off or changed.
    #[error("the backup is damaged: {0}")]
    Damaged(String),
    /// Made by a later version.
    #[error("the backup was made by {0}, in a form that this version does not know")]
    Newer(String),
}

impl BackupError {
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Write(_) | Self::Damaged(_) => Exit::Failed,
            Self::Locked => Exit::Refused,
            _ => Exit::Usage,
        }
    }

    pub(crate) fn remedy(&self) -> Option<String> {
        Some(
            match self {
                Self::Write(_) => "check that the disk is not full and that you may write there",
                Self::Exists(_) => "choose another name, or add --force",
                Self::Terminal => "send it somewhere: adit-mediator backup - > FILE",
                Self::Recipient(_) => "for example --recipient age1…, as age-keygen prints it",
                Self::NoPassphrase => "give --passphrase-file FILE, ADIT_BACKUP_PASSPHRASE or --recipient",
                Self::Mistyped => "try again",
                Self::Short => "choose a longer one: whoever has the file can guess for years",
                Self::WantsIdentity => "give the identity's file: --identity FILE",
                Self::WantsPassphrase => "leave --identity out",
                Self::Locked => "check which one belongs to this file; a damaged file says this, too",
                Self::Damaged(_) => "nothing was changed; take another copy of the file, or an older backup",
                Self::Newer(_) => "restore it with that version or a later one",
                Self::Unreadable { .. } => return None,
            }
            .into(),
        )
    }
}

impl From<BackupError> for Box<dyn Failure> {
    fn from(error: BackupError) -> Self {
        Box::new(Error::from(error))
    }
}
