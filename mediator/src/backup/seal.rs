//! Encryption of backups.

use std::fmt;
use std::io::{self, Read};
use std::path::Path;

use age::secrecy::{ExposeSecret, SecretString};
use age::{DecryptError, Decryptor, Encryptor, Identity, IdentityFile, scrypt, x25519};

use super::BackupError;

/// Shortest passphrase of a new backup, in characters.
pub const MIN_PASSPHRASE: usize = 10;
/// scrypt's N is 2^17 for a new backup: half a second and 128 MiB, which a small server has beside the mediator.
const WORK: u8 = 17;
/// More than this is not tried: 8 GiB.
const MAX_WORK: u8 = 23;

/// How a new backup is encrypted.
pub enum Seal {
    /// With a passphrase.
    Passphrase(SecretString),
    /// To these recipients, at least one; each of them opens it.
    Recipients(Vec<x25519::Recipient>),
}

impl Seal {
    /// A passphrase.
    ///
    /// # Errors
    /// [`BackupError::Short`].
    pub fn passphrase(secret: SecretString) -> Result<Self, BackupError> {
        if secret.expose_secret().chars().count() < MIN_PASSPHRASE {
            return Err(BackupError::Short);
        }
        Ok(Self::Passphrase(secret))
    }

    /// Recipients `age1…`.
    ///
    /// # Errors
    /// [`BackupError::Recipient`].
    pub fn recipients(texts: &[String]) -> Result<Self, BackupError> {
        let read = |text: &String| text.trim().parse().map_err(|_| BackupError::Recipient(text.clone()));
        texts.iter().map(read).collect::<Result<_, _>>().map(Self::Recipients)
    }

    pub(super) fn encryptor(&self) -> io::Result<Encryptor> {
        match self {
            Self::Passphrase(secret) => {
                let mut recipient = scrypt::Recipient::new(secret.clone());
                recipient.set_work_factor(WORK);
                Encryptor::with_recipients(std::iter::once(&recipient as &dyn age::Recipient))
            }
            Self::Recipients(recipients) => Encryptor::with_recipients(
                recipients.iter().map(|recipient| recipient as &dyn age::Recipient),
            ),
        }
        .map_err(io::Error::other)
    }
}

/// For the audit log: who can open it.
impl fmt::Display for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passphrase(_) => f.write_str("encrypted with a passphrase"),
            Self::Recipients(recipients) => {
                f.write_str("encrypted to")?;
                recipients.iter().try_for_each(|recipient| write!(f, " {recipient}"))
            }
        }
    }
}

/// What opens a backup.
pub enum Unseal {
    /// The passphrase.
    Passphrase(SecretString),
    /// age identities, of which one fits.
    Identities(Vec<Box<dyn Identity + Send + Sync>>),
}

/// Reads a file of age identities, as `age-keygen` writes it.
///
/// # Errors
/// [`BackupError::Unreadable`].
pub fn read_identities(path: &Path) -> Result<Unseal, BackupError> {
    let unreadable = |error| BackupError::Unreadable { path: path.display().to_string(), error };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let file = IdentityFile::from_buffer(io::BufReader::new(file)).map_err(unreadable)?;
    let identities = file.into_identities().map_err(|error| unreadable(io::Error::other(error)))?;
    Ok(Unseal::Identities(identities))
}

/// A backup of which the head is read.
pub struct Sealed<R> {
    decryptor: Decryptor<R>,
}

impl<R: Read> Sealed<R> {
    /// Reads the head.
    ///
    /// # Errors
    /// [`BackupError::Damaged`].
    pub fn read(input: R) -> Result<Self, BackupError> {
        let decryptor = Decryptor::new(input).map_err(|error| match error {
            DecryptError::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                BackupError::Damaged("it is cut off".into())
            }
            _ => BackupError::Damaged("it is not an age file".into()),
        })?;
        Ok(Self { decryptor })
    }

    /// Whether it takes a passphrase; an identity otherwise.
    pub fn takes_passphrase(&self) -> bool {
        self.decryptor.is_scrypt()
    }

    pub(super) fn open(self, unseal: &Unseal) -> Result<impl Read + use<R>, BackupError> {
        let opened = match (unseal, self.takes_passphrase()) {
            (Unseal::Passphrase(_), false) => return Err(BackupError::WantsIdentity),
            (Unseal::Identities(_), true) => return Err(BackupError::WantsPassphrase),
            (Unseal::Passphrase(secret), true) => {
                let mut identity = scrypt::Identity::new(secret.clone());
                identity.set_max_work_factor(MAX_WORK);
                self.decryptor.decrypt(std::iter::once(&identity as &dyn Identity))
            }
            (Unseal::Identities(identities), false) => {
                self.decryptor.decrypt(identities.iter().map(|identity| &**identity as &dyn Identity))
            }
        };
        opened.map_err(|error| match error {
            DecryptError::NoMatchingKeys
            | DecryptError::DecryptionFailed
            | DecryptError::KeyDecryptionFailed => BackupError::Locked,
            other => BackupError::Damaged(other.to_string()),
        })
    }
}
