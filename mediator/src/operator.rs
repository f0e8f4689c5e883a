//! What the operator's commands have in common: they change the database and the audit log themselves, also
//! while the mediator runs, and tell it to take note.

use std::path::{Path, PathBuf};

use adit_client::identity::certificate::Authority;
use adit_protocol::{DeviceId, Role};

use crate::admin::{self, Answer, Request};
use crate::audit::{Audit, Record};
use crate::broker::{Effect, party};
use crate::error::Error;
use crate::organisation::{AUDIT, DATABASE, Keyring, Organisation, unix_now};
use crate::store::{Device, Store};

/// Names that a refusal lists.
const NAMED: usize = 10;

/// The operator at work on the organisation in a directory.
pub struct Operator {
    /// The directory.
    pub dir: PathBuf,
    /// Its database.
    pub store: Store,
    /// `None`: it cannot be opened.
    audit: Option<Audit>,
    keyring: Keyring,
}

impl Operator {
    /// Opens the organisation in `dir`.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn open(dir: &Path) -> Result<Self, Error> {
        let keyring = Organisation::load(dir)?.keyring();
        let store = Store::open(&dir.join(DATABASE)).await?;
        Ok(Self { dir: dir.to_owned(), store, audit: Audit::open(&dir.join(AUDIT)).ok(), keyring })
    }

    /// The enrolment key; `None` while it is offline.
    pub fn authority(&self) -> Option<Authority> {
        self.keyring.authority()
    }

    /// The device of this name or id that is not revoked.
    ///
    /// # Errors
    /// [`Error::NoDevice`] names those that there are; [`Error::Ambiguous`].
    pub async fn device(&self, wanted: &str, role: Option<Role>) -> Result<Device, Error> {
        let mut devices = self.database(self.store.devices().await)?;
        devices.retain(|device| device.revoked == 0 && role.is_none_or(|role| role == device.role));
        let id = wanted.parse::<DeviceId>().ok();
        let fits = |device: &Device| id.map_or(device.name == wanted, |id| device.id == id);
        let mut found: Vec<Device> = devices.iter().filter(|device| fits(device)).cloned().collect();
        match (found.pop(), found.is_empty()) {
            (Some(device), true) => Ok(device),
            (Some(_), false) => Err(Error::Ambiguous(wanted.to_owned())),
            (None, _) => {
                let mut names: Vec<_> =
                    devices.into_iter().map(|device| device.name).take(NAMED + 1).collect();
                if names.len() > NAMED {
                    names[NAMED] = "…".into();
                }
                Err(Error::NoDevice { wanted: wanted.to_owned(), names })
            }
        }
    }

    /// Writes down what the operator is about to do.
    ///
    /// # Errors
    /// [`Error::NotWritten`]: then it is not done.
    pub async fn write_down(&self, event: &str, device: &Device, detail: &str) -> Result<(), Error> {
        let by = by();
        let record =
            Record { device: Some(party(device)), by: &by, reason: detail, ..Record::new(event, unix_now()) };
        self.append(&record).await
    }

    /// Writes down that somebody loses a right. A disk that takes no record keeps nobody in: the operator is warned.
    pub async fn write_down_loss(&self, event: &str, device: &Device, detail: &str) {
        if self.write_down(event, device, detail).await.is_err() {
            let log = self.dir.join(AUDIT);
            eprintln!("warning: no audit record of it can be written to {}", log.display());
        }
    }

    /// Writes down something that is about the organisation as a whole.
    ///
    /// # Errors
    /// [`Error::NotWritten`]: then it is not done.
    pub async fn write_down_deed(&self, event: &str, detail: &str) -> Result<(), Error> {
        let by = by();
        let record = Record { by: &by, reason: detail, ..Record::new(event, unix_now()) };
        self.append(&record).await
    }

    async fn append(&self, record: &Record<'_>) -> Result<(), Error> {
        let failed = || Error::NotWritten(self.dir.join(AUDIT));
        self.audit.as_ref().ok_or_else(failed)?.write(record).await.map_err(|_| failed())
    }

    /// Lets the change take effect on a mediator that runs; `None`: none does, and it counts from its start on.
    ///
    /// # Errors
    /// [`Error::Admin`].
    pub async fn tell(&self) -> Result<Option<Effect>, Error> {
        match admin::ask(&self.dir, &Request::Reload).await? {
            None => Ok(None),
            Some(Answer::Reloaded(effect)) => Ok(Some(effect)),
            Some(Answer::Failed { why }) => Err(Error::NotTaken(why)),
            Some(_) => Err(Error::NotTaken("it answered something else".into())),
        }
    }

    /// An error of the database as one of the command.
    ///
    /// # Errors
    /// [`Error::Database`].
    pub fn database<T>(&self, result: Result<T, sqlx::Error>) -> Result<T, Error> {
        result.map_err(|error| Error::Database { path: self.dir.join(DATABASE), error })
    }
}

/// The person at a command of the operator's, in the audit log.
pub fn by() -> String {
    format!("operator, uid {}", rustix::process::getuid().as_raw())
}

/// Root does the work as the owner of the directory, so that what it makes there is the service's own: starts
/// this very command again as that user.
///
/// # Errors
/// What the system said.
pub fn become_owner(dir: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::process::CommandExt;
    let Ok(owner) = std::fs::metadata(dir) else { return Ok(()) };
    if !rustix::process::geteuid().is_root() || owner.uid() == 0 {
        return Ok(());
    }
    let mut command = std::process::Command::new(std::env::current_exe()?);
    // Nothing from the environment can be lost on the way, and no group of root's is kept.
    Err(command.args(std::env::args_os().skip(1)).uid(owner.uid()).gid(owner.gid()).exec())
}
