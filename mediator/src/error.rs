//! What can go wrong in the operator's commands, with exit code and remedy.

use std::io;
use std::path::PathBuf;

use adit_client::exit::{Exit, Failure};
use adit_client::identity::InvalidKey;
use adit_client::identity::certificate::CertificateError;
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
    NoHost(PathBuf),
    /// `init` was cut off.
    #[error("init did not finish in {}", .0.display())]
    HalfMade(PathBuf),
    /// A host that is no name and no address.
    #[error("{0:?} is not a host name or IP address")]
    Host(String),
    /// A tag of another form.
    #[error("{0:?} cannot be a tag")]
    Tag(String),
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
    /// TLS could not be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Anything else from the system.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Failure for Error {
    fn exit(&self) -> Exit {
        match self {
            Self::Certificate(_) | Self::Tls(_) | Self::Io(_) => Exit::Failed,
            _ => Exit::Usage,
        }
    }

    fn remedy(&self) -> Option<String> {
        Some(match self {
            Self::NotEmpty(_) => "choose a new directory with --data".into(),
            Self::NoOrganisation(dir) => {
                format!("make one first: adit-mediator init --data {} --host NAME", dir.display())
            }
            Self::NoHost(_) => {
                "name it as devices reach it: adit-mediator install --host adit.example.org".into()
            }
            Self::HalfMade(_) => "run the same adit-mediator init again".into(),
            Self::Host(_) => "for example --host adit.example.org,203.0.113.7".into(),
            Self::Tag(_) => {
                "for example --tag site=berlin (A-Z a-z 0-9 . _ -, and : / @ + in the value)".into()
            }
            Self::Ttl(_) => "for example --ttl 90s, 30m, 1h or 7d".into(),
            Self::TokenRole(_) => "choose agent, technician or relay".into(),
            Self::Config { .. } => "correct that line; init wrote every setting with its default".into(),
            Self::File(_) | Self::Key { .. } => "restore that file from your backup of the directory".into(),
            Self::Listen(error) => return error.remedy(),
            Self::Database { .. } | Self::Audit { .. } => {
                "check that the directory can be written by this user, and that the disk is not full".into()
            }
            Self::Certificate(_) | Self::Tls(_) | Self::Io(_) => return None,
        })
    }
}
