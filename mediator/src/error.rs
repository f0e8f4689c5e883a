//! What can go wrong in the operator's commands, with exit code and remedy.

use std::io;
use std::path::PathBuf;

use adit_client::exit::{Exit, Failure};
use adit_client::identity::InvalidKey;
use adit_client::identity::certificate::{CertificateError, MAX_TAGS};
use adit_client::identity::store::StoreError;
use adit_client::tls::TlsError;
use adit_relay::listen::ListenError;

/// Why a command of the mediator failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `init` in a directory that is in use.
    #[error("{} is not empty: it may hold an organisation already", .0.display())]
    NotEmpty(PathBuf),
    /// `run` or `token` before `init`.
    #[error("{} holds no organisation", .0.display())]
    NoOrganisation(PathBuf),
    /// `install` in a directory without an organisation, and without a name for one.
    #[error("{} holds no organisation yet, and a new one needs the name of this server", .0.display())]
    Nameless(PathBuf),
    /// `init` was cut off.
    #[error("init did not finish in {}", .0.display())]
    HalfMade(PathBuf),
    /// `restore` was cut off.
    #[error("restore did not finish in {}", .0.display())]
    HalfRestored(PathBuf),
    /// A backup cannot be written or read.
    #[error(transparent)]
    Backup(#[from] crate::backup::BackupError),
    /// A host that is no name and no address.
    #[error("{0:?} is not a host name or IP address")]
    Host(String),
    /// A tag of another form.
    #[error("{0:?} cannot be a tag")]
    Tag(String),
    /// More tags than a device can have.
    #[error("{0} tags are too many")]
    Tags(usize),
    /// A name with other characters, or too many.
    #[error("{0:?} cannot be a device's name")]
    Name(String),
    /// Another device has it.
    #[error("{name:?} is taken by the device {id}")]
    NameTaken {
        /// The name.
        name: String,
        /// Who has it.
        id: String,
    },
    /// No such device.
    #[error("no device {wanted:?}{}", there_are(names))]
    NoDevice {
        /// What was asked for.
        wanted: String,
        /// Some that there are.
        names: Vec<String>,
    },
    /// Several devices of that name.
    #[error("devices of several roles are called {0:?}")]
    Ambiguous(String),
    /// No such grant.
    #[error("{technician} has no grant {number}{}", there_are(has))]
    NoGrant {
        /// Its number.
        number: i64,
        /// Of this technician.
        technician: String,
        /// Those that it has.
        has: Vec<String>,
    },
    /// No such host.
    #[error("this server is not reached by {host:?}{}", there_are(hosts))]
    NoHost {
        /// What was named.
        host: String,
        /// Those that it has.
        hosts: Vec<String>,
    },
    /// The connection test has found something.
    #[error("{0} of the things looked at do not work")]
    Faults(usize),
    /// The enrolment key would be needed.
    #[error("the enrolment key is offline, and {0}")]
    KeyOffline(&'static str),
    /// No record, no change.
    #[error("the audit record cannot be written to {}: nothing was changed", .0.display())]
    NotWritten(PathBuf),
    /// The mediator that runs does not answer.
    #[error(transparent)]
    Admin(#[from] crate::admin::AskError),
    /// The mediator that runs could not take note.
    #[error("it is changed, but the mediator that runs has not taken note: {0}")]
    NotTaken(String),
    /// Another mediator runs on this directory.
    #[error("a mediator runs on {} already", .0.display())]
    Runs(PathBuf),
    /// A duration that cannot be read.
    #[error("{0:?} is not a duration")]
    Ttl(String),
    /// Tokens for a role that is not enrolled with tokens.
    #[error("there are no tokens for the role {0}")]
    TokenRole(String),
    /// The configuration file.
    #[error("{}: {why}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A file of the organisation is missing or damaged.
    #[error(transparent)]
    File(#[from] StoreError),
    /// A key is damaged.
    #[error("{}: {error}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: InvalidKey,
    },
    /// A port.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The database.
    #[error("the database {} cannot be used: {error}", path.display())]
    Database {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        error: sqlx::Error,
    },
    /// The audit log.
    #[error("the audit log {} cannot be opened: {error}", path.display())]
    Audit {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A certificate could not be made.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// The certificate for browsers.
    #[error(transparent)]
    Https(#[from] adit_relay::certificates::HttpsError),
    /// TLS could not be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Anything else from the system.
    #[error("{0}")]
    Io(#[from] io::Error),
}

fn there_are(names: &[String]) -> String {
    if names.is_empty() {
        "; there are none".to_owned()
    } else {
        format!("; there are: {}", names.join(", "))
    }
}

impl Failure for Error {
    fn exit(&self) -> Exit {
        match self {
            Self::Certificate(_)
            | Self::Tls(_)
            | Self::Io(_)
            | Self::NotWritten(_)
            | Self::NotTaken(_)
            | Self::Faults(_) => Exit::Failed,
            Self::Admin(_) => Exit::TimedOut,
            Self::Backup(error) => error.exit(),
            _ => Exit::Usage,
        }
    }

    fn remedy(&self) -> Option<String> {
        Some(match self {
            Self::NotEmpty(_) => "choose a new directory with --data".into(),
            Self::NoOrganisation(dir) => {
                format!("make one first: adit-mediator init --data {} --host NAME", dir.display())
            }
            Self::Nameless(_) => {
                "name it as devices reach it: adit-mediator install --host adit.example.org".into()
            }
            Self::HalfMade(_) => "run the same adit-mediator init again".into(),
            Self::HalfRestored(_) => "run the same adit-mediator restore again".into(),
            Self::Backup(error) => return error.remedy(),
            Self::Host(_) => "for example --host adit.example.org,203.0.113.7".into(),
            Self::Tag(_) => {
                "for example --tag site=berlin (A-Z a-z 0-9 . _ -, and : / @ + in the value)".into()
            }
            Self::Tags(_) => format!("a device has at most {MAX_TAGS}"),
            Self::Name(_) => "choose 1 to 63 of A-Z a-z 0-9 . _ -".into(),
            Self::NameTaken { .. } => "choose another, or revoke or rename that device first".into(),
            Self::NoDevice { .. } => "list them all with adit-mediator devices".into(),
            Self::Ambiguous(_) => "add --role, or give the device's id (adit-mediator devices --json)".into(),
            Self::Faults(_) => "each is named above, with what to do".into(),
            Self::NoHost { .. } => "list them with adit-mediator hosts".into(),
            Self::NoGrant { .. } => "list them with adit-mediator grants".into(),
            Self::KeyOffline(_) => {
                "put root-key.pem back into the directory, and take it away again afterwards".into()
            }
            Self::NotWritten(_) => {
                "check that the disk is not full and that this user may write there".into()
            }
            Self::Admin(_) | Self::NotTaken(_) => "restart the mediator, or see its log for the cause".into(),
            Self::Runs(_) => "stop that one first, or name another directory with --data".into(),
            Self::Ttl(_) => "for example --ttl 90s, 30m, 1h or 7d".into(),
            Self::TokenRole(_) => "choose agent, technician or relay".into(),
            Self::Config { .. } => "correct that line; init wrote every setting with its default".into(),
            Self::Https(_) => "correct [https] cert and key, or leave both out".into(),
            Self::File(_) | Self::Key { .. } => "restore that file from your backup of the directory".into(),
            Self::Listen(error) => return error.remedy(),
            Self::Database { .. } | Self::Audit { .. } => {
                "check that the directory can be written by this user, and that the disk is not full".into()
            }
            Self::Certificate(_) | Self::Tls(_) | Self::Io(_) => return None,
        })
    }
}
