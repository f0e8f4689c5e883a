//! A backup becomes an organisation again.
//!
//! Everything is unpacked and checked in a directory inside the new one, and only then put in place. What
//! happened after the backup is lost with the old server, and this is what follows from it:
//!
//! - Lists of revoked certificates are numbered with the time ([`crate::store::revoke`]), and so are the serials of
//!   tickets: what this organisation signs from now on is newer than anything that a device has seen.
//! - Which tokens were used since is not known: none of them can be used any more.
//! - Devices that were enrolled since are unknown, and those that were revoked since are not revoked here.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::path::Path;

use adit_client::identity::store::{create_private_dir, hand_over};

use super::{BackupError, FORMAT, KEPT, Kept, MANIFEST, Manifest, Sealed, Unseal};
use crate::audit::{Audit, Record};
use crate::config;
use crate::error::Error;
use crate::operator::by;
use crate::organisation::{AUDIT, DATABASE, Organisation, RESTORING, unix_now};
use crate::store::Store;

/// Largest of the files that do not grow, in bytes.
const MAX_SMALL: u64 = 64 * 1024;

/// What was restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// When the backup was made, in seconds since 1970-01-01 UTC.
    pub made: u64,
    /// Devices that are not revoked.
    pub devices: usize,
    /// Tokens that were made useless.
    pub tokens: u64,
    /// Whether the enrolment key is there.
    pub has_key: bool,
    /// Names and addresses of the old server.
    pub old_hosts: Vec<String>,
    /// Names and addresses of the new one.
    pub hosts: Vec<String>,
}

/// Puts a backup in place in `dir`, which must be empty or not there. With other `hosts`, if given. All of it or
/// nothing; a run that was cut off can be repeated.
///
/// # Errors
/// [`Error::NotEmpty`], [`BackupError`], or what is wrong with the files.
pub async fn restore<R>(
    dir: &Path,
    sealed: Sealed<R>,
    unseal: Unseal,
    hosts: Option<Vec<String>>,
) -> Result<Restored, Error>
where
    R: Read + Send + 'static,
{
    let fresh = !dir.exists();
    create_private_dir(dir)?;
    let staging = dir.join(RESTORING);
    if staging.exists() {
        // No organisation was ever used here: one that is half restored cannot be loaded.
        clear(dir)?;
    } else if fs::read_dir(dir)?.next().is_some() {
        return Err(Error::NotEmpty(dir.to_owned()));
    }
    create_private_dir(&staging)?;
    let restored = async {
        let into = staging.clone();
        let unpacked = tokio::task::spawn_blocking(move || unpack(sealed, &unseal, &into));
        let manifest = unpacked.await.map_err(io::Error::other)??;
        check(&staging, manifest, hosts).await
    };
    let restored = match restored.await {
        Ok(restored) => restored,
        Err(error) => {
            clear(dir)?;
            if fresh {
                fs::remove_dir(dir)?;
            }
            return Err(error);
        }
    };
    for file in &KEPT {
        let from = staging.join(file.name);
        if from.exists() {
            fs::rename(from, dir.join(file.name))?;
            hand_over(&dir.join(file.name))?;
        }
    }
    fs::remove_dir_all(&staging)?;
    File::open(dir)?.sync_all()?;
    Ok(restored)
}

/// Takes away what a restore put into `dir`, the sign that there was one last.
fn clear(dir: &Path) -> io::Result<()> {
    for file in &KEPT {
        match fs::remove_file(dir.join(file.name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    fs::remove_dir_all(dir.join(RESTORING))
}

/// Unpacks into `staging`, to the last byte: only then it is certain that nothing was cut off or changed.
fn unpack<R: Read>(sealed: Sealed<R>, unseal: &Unseal, staging: &Path) -> Result<Manifest, Error> {
    let damaged = |error: io::Error| match error.kind() {
        // The disk's errors are not the file's.
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::Io(error),
        _ => BackupError::Damaged("it is cut off, or it was changed".into()).into(),
    };
    let strange = |why: String| Error::from(BackupError::Damaged(why));
    let mut archive = tar::Archive::new(sealed.open(unseal)?);
    let mut manifest: Option<Manifest> = None;
    for entry in archive.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let size = entry.header().size().map_err(damaged)?;
        if !entry.header().entry_type().is_file() {
            return Err(strange(format!("{name:?} is not a file")));
        }
        if name == MANIFEST && manifest.is_none() && size <= MAX_SMALL {
            manifest = Some(read_manifest(&mut entry).map_err(damaged)??);
            continue;
        }
        if manifest.is_none() {
            return Err(strange(format!("it begins with {name:?}")));
        }
        let Some(file) = KEPT.iter().find(|file| file.name == name) else {
            return Err(strange(format!("{name:?} does not belong into it")));
        };
        if !file.grows && size > MAX_SMALL {
            return Err(strange(format!("{name:?} is too large")));
        }
        place(&mut entry, file, size, staging).map_err(damaged)?;
    }
    // What stands behind the archive's end is nothing, and is authenticated, too.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(damaged)?;
    if let Some(file) = KEPT.iter().find(|file| file.needed && !staging.join(file.name).exists()) {
        return Err(strange(format!("{:?} is missing", file.name)));
    }
    manifest.ok_or_else(|| strange("it is empty".into()))
}

fn read_manifest(entry: &mut impl Read) -> io::Result<Result<Manifest, BackupError>> {
    let mut text = Vec::new();
    entry.read_to_end(&mut text)?;
    let manifest: Manifest = serde_json::from_slice(&text)?;
    if manifest.format > FORMAT {
        return Ok(Err(BackupError::Newer(manifest.software)));
    }
    Ok(Ok(manifest))
}

/// Writes one file, and never over another one.
fn place(entry: &mut impl Read, file: &Kept, size: u64, staging: &Path) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mode = if file.secret { 0o600 } else { 0o644 };
    let mut out = OpenOptions::new().write(true).create_new(true).mode(mode).open(staging.join(file.name))?;
    if io::copy(entry, &mut out)? != size {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    out.sync_all()
}

/// Loads what was unpacked, as the mediator will, and makes it the new server's.
async fn check(staging: &Path, manifest: Manifest, hosts: Option<Vec<String>>) -> Result<Restored, Error> {
    let old_hosts = config::Config::load(staging)?.hosts;
    if let Some(hosts) = &hosts {
        config::set_hosts(staging, hosts)?;
    }
    let mut organisation = Organisation::load(staging)?;
    let hosts = organisation.config.hosts.clone();
    let has_key = if hosts == old_hosts {
        organisation.authority()?.is_some()
    } else {
        organisation.sign_server_anew()?
    };
    let path = staging.join(DATABASE);
    let store = Store::open(&path).await?;
    let looked = look_into(&store).await;
    // Leaves nothing but the database itself, on every way out.
    store.close().await;
    let (devices, tokens) = match looked {
        Ok(Ok(looked)) => looked,
        Ok(Err(found)) => return Err(BackupError::Damaged(format!("in the database: {found}")).into()),
        Err(error) => return Err(Error::Database { path, error }),
    };
    let by = by();
    let reason = format!("made at {}", manifest.made);
    let record = Record { by: &by, reason: &reason, ..Record::new("restored backup", unix_now()) };
    let audit = Audit::open(&staging.join(AUDIT))?;
    audit.write(&record).await.map_err(|_| Error::NotWritten(staging.join(AUDIT)))?;
    Ok(Restored { made: manifest.made, devices, tokens, has_key, old_hosts, hosts })
}

/// How many devices that are not revoked there are, and tokens that are void from now on; or what is wrong.
async fn look_into(store: &Store) -> Result<Result<(usize, u64), String>, sqlx::Error> {
    if let Some(found) = store.check().await? {
        return Ok(Err(found));
    }
    let devices = store.devices().await?;
    let devices = devices.iter().filter(|device| device.revoked == 0).count();
    Ok(Ok((devices, store.void_tokens().await?)))
}
