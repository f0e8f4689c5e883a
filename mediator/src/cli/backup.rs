//! `adit-mediator backup | restore`.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Read};
use std::path::{Path, PathBuf};

use age::secrecy::SecretString;
use clap::Args;

use super::Data;
use crate::backup::{self, BackupError, Restored, Seal, Sealed, Unseal, Written, read_identities};
use crate::config::parse_hosts;
use crate::error::Error;
use crate::organisation::unix_now;
use crate::times::ago;

/// Holds the passphrase.
const PASSPHRASE: &str = "ADIT_BACKUP_PASSPHRASE";
/// Longest passphrase file, in bytes.
const MAX_PASSPHRASE: u64 = 4096;

/// Arguments of `backup`.
#[derive(Debug, Args)]
pub struct Backup {
    #[command(flatten)]
    data: Data,
    /// The file to write; `-`: standard output.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Encrypt to this age recipient in the place of a passphrase; can be given several times.
    #[arg(long = "recipient", value_name = "age1…", conflicts_with = "passphrase_file")]
    recipients: Vec<String>,
    /// File whose first line is the passphrase. Without it: ADIT_BACKUP_PASSPHRASE, or it is asked for.
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
    /// Leave the enrolment key (root-key.pem) out: it is kept elsewhere.
    #[arg(long)]
    without_enrolment_key: bool,
    /// Overwrite the file if it is there.
    #[arg(long)]
    force: bool,
}

/// Arguments of `restore`.
#[derive(Debug, Args)]
pub struct Restore {
    #[command(flatten)]
    data: Data,
    /// The backup; `-`: standard input.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// File with the age identity that opens it.
    #[arg(long, value_name = "FILE", conflicts_with = "passphrase_file")]
    identity: Option<PathBuf>,
    /// File whose first line is the passphrase. Without it: ADIT_BACKUP_PASSPHRASE, or it is asked for.
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
    /// Names and addresses of the new server, where they are not those of the old one.
    #[arg(long = "host", value_name = "NAME_OR_IP[,…]")]
    hosts: Vec<String>,
}

// Root stays root here: the files that it names need not be readable to the service.

impl Backup {
    /// Writes a backup.
    ///
    /// # Errors
    /// [`Error`].
    pub(super) async fn run(self) -> Result<(), Error> {
        let dir = &self.data.dir;
        let to_stdout = self.file.as_os_str() == "-";
        let name = self.file.display().to_string();
        if to_stdout && io::stdout().is_terminal() {
            return Err(BackupError::Terminal.into());
        }
        if !to_stdout && !self.force && self.file.exists() {
            return Err(BackupError::Exists(name).into());
        }
        let seal = if self.recipients.is_empty() {
            Seal::passphrase(passphrase(self.passphrase_file.as_deref(), true)?)?
        } else {
            Seal::recipients(&self.recipients)?
        };
        let with_key = !self.without_enrolment_key;
        let written = if to_stdout {
            backup::write(dir, seal, with_key, io::stdout()).await?.0
        } else {
            let written = write_file(&self.file, self.force, dir, seal, with_key).await;
            written.map_err(|error| match error {
                Error::Io(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    BackupError::Exists(name.clone()).into()
                }
                Error::Io(error) => BackupError::Write(error).into(),
                error => error,
            })?
        };
        let Written { bytes, has_key } = written;
        let to = if to_stdout { "standard output".to_owned() } else { name };
        eprintln!("wrote a backup of {} to {to}: {}", dir.display(), size(bytes));
        match (has_key, self.without_enrolment_key) {
            (true, _) => eprintln!(
                "the enrolment key is in it: whoever opens it can make devices of this organisation"
            ),
            (false, true) => {
                eprintln!("the enrolment key is not in it, as you said: keep root-key.pem elsewhere")
            }
            (false, false) => eprintln!("the enrolment key is not in it: it is offline"),
        }
        Ok(())
    }
}

/// Whole or not at all; for its owner only, as temporary files are.
async fn write_file(
    file: &Path,
    force: bool,
    dir: &Path,
    seal: Seal,
    with_key: bool,
) -> Result<Written, Error> {
    let parent = match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let (temporary, path) =
        tempfile::Builder::new().prefix(".adit-backup-").tempfile_in(parent)?.into_parts();
    let (written, temporary) = backup::write(dir, seal, with_key, BufWriter::new(temporary)).await?;
    temporary.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    let kept = if force { path.persist(file) } else { path.persist_noclobber(file) };
    kept.map_err(|error| error.error)?;
    File::open(parent)?.sync_all()?;
    Ok(written)
}

impl Restore {
    /// Restores a backup.
    ///
    /// # Errors
    /// [`Error`].
    pub(super) async fn run(self) -> Result<(), Error> {
        let hosts = if self.hosts.is_empty() { None } else { Some(parse_hosts(&self.hosts)?) };
        let unreadable = |error| BackupError::Unreadable { path: self.file.display().to_string(), error };
        let input: Box<dyn Read + Send> = if self.file.as_os_str() == "-" {
            Box::new(io::stdin())
        } else {
            Box::new(io::BufReader::new(File::open(&self.file).map_err(unreadable)?))
        };
        let sealed = Sealed::read(input)?;
        let unseal = match &self.identity {
            Some(identity) => read_identities(identity)?,
            None if sealed.takes_passphrase() => {
                Unseal::Passphrase(passphrase(self.passphrase_file.as_deref(), false)?)
            }
            None => return Err(BackupError::WantsIdentity.into()),
        };
        let restored = backup::restore(&self.data.dir, sealed, unseal, hosts).await?;
        say(&self.data.dir, &restored);
        Ok(())
    }
}

fn say(dir: &Path, restored: &Restored) {
    let Restored { made, devices, tokens, has_key, old_hosts, hosts } = restored;
    eprintln!("restored to {}: {devices} devices, as it was {} ago", dir.display(), ago(unix_now(), *made));
    eprintln!(
        "what happened since is not in it: revoke again what was revoked since, enrol again what was enrolled since"
    );
    if *tokens > 0 {
        eprintln!("{tokens} enrolment tokens are void: make new ones (adit-mediator token)");
    }
    if !has_key {
        eprintln!(
            "the enrolment key is not there: put root-key.pem into the directory to enrol, renew or revoke"
        );
    }
    if hosts != old_hosts {
        eprintln!(
            "devices know this server as {}: let that lead here until all of them have been online once; from then on they use {}",
            old_hosts.join(", "),
            hosts.join(", ")
        );
        if !has_key {
            eprintln!(
                "the server's certificate still names the old hosts; devices do not mind, they check its key"
            );
        }
    }
    eprintln!("make sure that the old server does not run any more");
    eprintln!("next: adit-mediator run --data {}", dir.display());
}

/// From the file, the environment, or whoever sits at the terminal, who types a new one twice.
fn passphrase(file: Option<&Path>, new: bool) -> Result<SecretString, BackupError> {
    if let Some(path) = file {
        let unreadable = |error| BackupError::Unreadable { path: path.display().to_string(), error };
        let mut text = String::new();
        File::open(path)
            .and_then(|file| file.take(MAX_PASSPHRASE).read_to_string(&mut text))
            .map_err(unreadable)?;
        return Ok(text.lines().next().unwrap_or_default().to_owned().into());
    }
    if let Ok(text) = std::env::var(PASSPHRASE) {
        return Ok(text.into());
    }
    let ask = |prompt: &str| {
        rpassword::prompt_password(prompt).map(SecretString::from).map_err(|_| BackupError::NoPassphrase)
    };
    let first = ask(if new { "Passphrase for the backup: " } else { "Passphrase of the backup: " })?;
    if new && !same(&first, &ask("Again: ")?) {
        return Err(BackupError::Mistyped);
    }
    Ok(first)
}

fn same(one: &SecretString, other: &SecretString) -> bool {
    use age::secrecy::ExposeSecret;
    one.expose_secret() == other.expose_secret()
}

fn size(bytes: u64) -> String {
    match bytes {
        0..10_000 => format!("{bytes} bytes"),
        10_000..10_000_000 => format!("{} KiB", bytes / 1024),
        _ => format!("{} MiB", bytes / (1024 * 1024)),
    }
}
