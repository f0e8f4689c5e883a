//! The state directory of a device: `key.pem` (secret), `cert.pem`, `root.pem`, `device.toml`, and, once
//! there is one, `revoked.pem`, the newest list of revoked certificates.
//!
//! Files are written whole or not at all. `pending-key.pem` exists while an enrolment is under way: a
//! lost answer, tried again with the same token and key, gives the same identity.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use adit_protocol::{DeviceId, Role};
use data_encoding::HEXLOWER;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::revocation::{Revocations, Revoked};
use super::{DeviceKey, Identity, Peer};
use crate::exit::{Exit, Failure};
use crate::os;

const KEY: &str = "key.pem";
const CERTIFICATE: &str = "cert.pem";
const ROOT: &str = "root.pem";
const DEVICE: &str = "device.toml";
const PENDING: &str = "pending-key.pem";
const REVOKED: &str = "revoked.pem";
const REVOKED_TAG: &str = "X509 CRL";
const LOCK: &str = ".lock";

/// Reads the identity in `dir`.
///
/// # Errors
/// [`StoreError`] names the file that is missing or damaged.
pub fn load(dir: &Path) -> Result<Identity, StoreError> {
    if !dir.join(DEVICE).exists() && !dir.join(KEY).exists() {
        return Err(StoreError::NotEnrolled { dir: dir.to_owned() });
    }
    let damaged = |file: &str, why: &str| StoreError::damaged(dir, file, why);
    let text = String::from_utf8(read(dir, DEVICE)?).map_err(|_| damaged(DEVICE, "not text"))?;
    let device: DeviceFile = toml::from_str(&text).map_err(|error| damaged(DEVICE, error.message()))?;
    let key = DeviceKey::from_pem(&read(dir, KEY)?).map_err(|error| damaged(KEY, &error.to_string()))?;
    let certificate = read_certificate(dir, CERTIFICATE)?;
    let root = read_certificate(dir, ROOT)?;
    let peer =
        Peer::from_certificate(&certificate).map_err(|error| damaged(CERTIFICATE, &error.to_string()))?;
    if peer.public_key != key.public_key() {
        return Err(damaged(KEY, "it does not belong to the certificate in cert.pem"));
    }
    if (peer.device_id, peer.role) != (device.id, device.role) {
        return Err(damaged(DEVICE, "it does not belong to the certificate in cert.pem"));
    }
    let ticket_key = match device.ticket_key {
        Some(hex) => {
            let bytes = HEXLOWER.decode(hex.as_bytes()).ok().and_then(|bytes| bytes.try_into().ok());
            Some(bytes.ok_or_else(|| damaged(DEVICE, "ticket_key is not 64 hexadecimal digits"))?)
        }
        None => None,
    };
    let revoked = read_revocations(dir, &root)?;
    Ok(Identity {
        device_id: device.id,
        role: device.role,
        name: peer.name,
        tags: peer.tags,
        servers: device.servers,
        hosts: device.hosts,
        ticket_key,
        certificate,
        root,
        key: Arc::new(key),
        revoked: Arc::new(Revoked::new(revoked)),
        proxies: Default::default(),
        p2p: Default::default(),
    })
}

/// The list in `dir`; the empty one while there is none.
fn read_revocations(dir: &Path, root: &CertificateDer<'_>) -> Result<Revocations, StoreError> {
    let text = match fs::read(dir.join(REVOKED)) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Revocations::default()),
        Err(error) => return Err(StoreError::io(dir, REVOKED, error)),
    };
    let block = pem::parse(text).ok().filter(|block| block.tag() == REVOKED_TAG);
    let list = block.and_then(|block| Revocations::read(block.contents(), root).ok());
    list.ok_or_else(|| StoreError::damaged(dir, REVOKED, "not a list of this organisation"))
}

/// Keeps a newer list. Several processes may share `dir`: an older one never takes the place of a newer.
///
/// # Errors
/// [`StoreError`].
pub fn save_revocations(dir: &Path, list: &Revocations, root: &CertificateDer<'_>) -> Result<(), StoreError> {
    let _lock = lock(dir)?;
    if read_revocations(dir, root).is_ok_and(|kept| kept.number >= list.number) {
        return Ok(());
    }
    let text = pem::encode(&pem::Pem::new(REVOKED_TAG, list.der()));
    write(dir, REVOKED, text.as_bytes(), Access::Public)
}

/// Keeps a new certificate or new servers of the device that is enrolled in `dir` already.
///
/// # Errors
/// [`StoreError`]; [`StoreError::NotEnrolled`] when it holds another device by now.
pub fn save_changes(dir: &Path, identity: &Identity) -> Result<(), StoreError> {
    let _lock = lock(dir)?;
    if load(dir)?.public_key() != identity.public_key() {
        return Err(StoreError::NotEnrolled { dir: dir.to_owned() });
    }
    write(dir, CERTIFICATE, certificate_pem(&identity.certificate).as_bytes(), Access::Public)?;
    write_device(dir, identity)
}

/// One process at a time changes what is in `dir`; the lock ends with the file.
fn lock(dir: &Path) -> Result<fs::File, StoreError> {
    let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(dir.join(LOCK));
    let file = file.map_err(|error| StoreError::io(dir, LOCK, error))?;
    file.lock().map_err(|error| StoreError::io(dir, LOCK, error))?;
    Ok(file)
}

/// Stores a whole new identity in `dir`, in the place of what was there, and ends the enrolment that
/// was under way.
///
/// # Errors
/// [`StoreError::Io`].
pub fn save(dir: &Path, identity: &Identity) -> Result<(), StoreError> {
    create_private_dir(dir)?;
    write(dir, KEY, identity.key.to_pem().as_bytes(), Access::Secret)?;
    write(dir, CERTIFICATE, certificate_pem(&identity.certificate).as_bytes(), Access::Public)?;
    write(dir, ROOT, certificate_pem(&identity.root).as_bytes(), Access::Public)?;
    write_device(dir, identity)?;
    // A list of another organisation would be one of this identity.
    remove(dir, REVOKED)?;
    // Last: until here, trying again finds the same key.
    remove(dir, PENDING)
}

fn remove(dir: &Path, file: &str) -> Result<(), StoreError> {
    match fs::remove_file(dir.join(file)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::io(dir, file, error)),
        _ => Ok(()),
    }
}

fn write_device(dir: &Path, identity: &Identity) -> Result<(), StoreError> {
    let device = DeviceFile {
        id: identity.device_id,
        role: identity.role,
        name: identity.name.clone(),
        tags: identity.tags.clone(),
        servers: identity.servers.clone(),
        hosts: identity.hosts.clone(),
        ticket_key: identity.ticket_key.map(|key| HEXLOWER.encode(&key)),
    };
    let device =
        toml::to_string(&device).map_err(|error| StoreError::io(dir, DEVICE, io::Error::other(error)))?;
    write(dir, DEVICE, device.as_bytes(), Access::Public)
}

/// The key of the enrolment under way in `dir`; a new one is made and kept when there is none.
///
/// # Errors
/// [`StoreError::Io`]; [`StoreError::Key`] when the system has no randomness to give.
pub fn pending_key(dir: &Path) -> Result<DeviceKey, StoreError> {
    create_private_dir(dir)?;
    if let Ok(text) = fs::read(dir.join(PENDING))
        && let Ok(key) = DeviceKey::from_pem(&text)
    {
        return Ok(key);
    }
    let key = DeviceKey::generate().map_err(|_| StoreError::Key)?;
    write(dir, PENDING, key.to_pem().as_bytes(), Access::Secret)?;
    Ok(key)
}

/// Whether an enrolment in `dir` was started and not finished.
pub fn is_pending(dir: &Path) -> bool {
    dir.join(PENDING).exists()
}

/// Who may read a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Its owner only (Unix: mode 0600; Windows: as its directory says).
    Secret,
    /// Whoever may enter the directory (Unix: mode 0644).
    Public,
}

/// Writes `dir/file` whole or not at all: temporary file, fsync, rename, fsync of the directory.
///
/// # Errors
/// [`StoreError::Io`].
pub fn write(dir: &Path, file: &str, contents: &[u8], access: Access) -> Result<(), StoreError> {
    let temporary = dir.join(format!(".{file}.{}.tmp", std::process::id()));
    // Of a process that was cut off and had this number.
    let _ = fs::remove_file(&temporary);
    let written = (|| {
        let mut options = fs::OpenOptions::new();
        // Never through a symbolic link: root writes here, too, and the directory is a service's.
        options.write(true).create_new(true);
        os::set_access(&mut options, access == Access::Secret);
        let mut handle = options.open(&temporary)?;
        handle.write_all(contents)?;
        hand_over(&temporary)?;
        handle.sync_all()?;
        fs::rename(&temporary, dir.join(file))?;
        os::sync_dir(dir)
    })();
    written.map_err(|error| {
        let _ = fs::remove_file(&temporary);
        StoreError::io(dir, file, error)
    })
}

/// Gives a file that root made to the owner of its directory: a service reads what an operator makes with
/// sudo beside it. Does nothing for anybody else, nor on Windows, where files inherit who may read them.
///
/// # Errors
/// What the system said.
pub fn hand_over(path: &Path) -> io::Result<()> {
    os::hand_over(path)
}

/// Makes `dir`, which only its owner may enter (Unix: mode 0700; Windows: and the administrators), if it is
/// not there.
///
/// # Errors
/// [`StoreError::Io`].
pub fn create_private_dir(dir: &Path) -> Result<(), StoreError> {
    if dir.is_dir() {
        return Ok(());
    }
    os::create_private_dir(dir).map_err(|error| StoreError::io(dir, "", error))
}

/// A certificate (DER) as PEM.
pub fn certificate_pem(der: &CertificateDer<'_>) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE", der.to_vec()))
}

/// Reads one certificate in PEM.
///
/// # Errors
/// [`StoreError`] names the file.
pub fn read_certificate(dir: &Path, file: &str) -> Result<CertificateDer<'static>, StoreError> {
    match pem::parse(read(dir, file)?) {
        Ok(block) if block.tag() == "CERTIFICATE" => Ok(CertificateDer::from(block.into_contents())),
        _ => Err(StoreError::damaged(dir, file, "not a certificate in PEM")),
    }
}

fn read(dir: &Path, file: &str) -> Result<Vec<u8>, StoreError> {
    fs::read(dir.join(file)).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => StoreError::damaged(dir, file, "the file is missing"),
        _ => StoreError::io(dir, file, error),
    })
}

#[derive(Serialize, Deserialize)]
struct DeviceFile {
    id: DeviceId,
    role: Role,
    name: String,
    #[serde(default)]
    tags: Vec<String>,
    servers: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    hosts: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ticket_key: Option<String>,
}

/// Why a state directory was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Nothing is there.
    #[error("{} holds no identity: this device is not enrolled", dir.display())]
    NotEnrolled {
        /// The directory.
        dir: PathBuf,
    },
    /// A file is missing or not what it should be.
    #[error("{} is damaged: {why}", dir.join(file).display())]
    Damaged {
        /// The directory.
        dir: PathBuf,
        /// The file in it.
        file: String,
        /// What is wrong with it.
        why: String,
    },
    /// The system said no.
    #[error("{}: {error}", path.display())]
    Io {
        /// What was read or written.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// No randomness.
    #[error("no key could be made: the system gives no random numbers")]
    Key,
}

impl StoreError {
    fn damaged(dir: &Path, file: &str, why: &str) -> Self {
        Self::Damaged { dir: dir.to_owned(), file: file.to_owned(), why: why.trim().to_owned() }
    }

    fn io(dir: &Path, file: &str, error: io::Error) -> Self {
        Self::Io { path: dir.join(file), error }
    }
}

impl Failure for StoreError {
    fn exit(&self) -> Exit {
        match self {
            Self::NotEnrolled { .. } | Self::Damaged { .. } | Self::Io { .. } => Exit::Usage,
            Self::Key => Exit::Failed,
        }
    }

    fn remedy(&self) -> Option<String> {
        match self {
            Self::NotEnrolled { dir } => Some(format!(
                "enrol it with a token from the operator: adit enroll TOKEN --data {}",
                dir.display()
            )),
            Self::Damaged { dir, .. } => {
                Some(format!("enrol this device again: adit enroll TOKEN --data {} --replace", dir.display()))
            }
            Self::Io { .. } => Some("check that the directory can be read and written by this user".into()),
            Self::Key => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::certificate::{Authority, Subject, request};

    fn sample() -> Identity {
        let authority = Authority::new(&DeviceKey::generate().expect("key"), 1_800_000_000).expect("root");
        let key = DeviceKey::generate().expect("key");
        let subject = Subject {
            device_id: DeviceId([9; 16]),
            role: Role::Relay,
            name: "relay-1".into(),
            tags: vec!["a=b".into()],
        };
        let csr = request(&key).expect("csr");
        let certificate = authority.sign_request(&csr, &subject, 1_800_000_000).expect("signs");
        Identity {
            device_id: subject.device_id,
            role: subject.role,
            name: subject.name,
            tags: subject.tags,
            servers: vec!["adit.example.org:443".into()],
            hosts: vec!["relay.example.org".into()],
            ticket_key: Some([5; 32]),
            certificate,
            root: authority.certificate().clone(),
            key: Arc::new(key),
            revoked: Arc::default(),
            proxies: Default::default(),
            p2p: Default::default(),
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_link_in_the_place_of_a_file_is_not_followed() {
        let dir = tempfile::tempdir().expect("tempdir");
        let elsewhere = dir.path().join("elsewhere");
        fs::write(&elsewhere, "before").expect("writes");
        let temporary = dir.path().join(format!(".file.{}.tmp", std::process::id()));
        std::os::unix::fs::symlink(&elsewhere, temporary).expect("links");
        write(dir.path(), "file", b"new", Access::Secret).expect("writes");
        assert_eq!(fs::read(&elsewhere).expect("reads"), b"before");
        assert_eq!(fs::read(dir.path().join("file")).expect("reads"), b"new");
    }

    #[cfg(unix)]
    #[test]
    fn what_root_writes_belongs_to_the_owner_of_the_directory() {
        use std::os::unix::fs::{MetadataExt, chown};
        let dir = tempfile::tempdir().expect("tempdir");
        // Only root can give things away; for others nothing changes.
        let given = chown(dir.path(), Some(65534), Some(65534)).is_ok();
        write(dir.path(), "file", b"new", Access::Secret).expect("writes");
        let owner = |path: &Path| fs::metadata(path).map(|file| (file.uid(), file.mode() & 0o777)).ok();
        let uid = owner(dir.path()).expect("is there").0;
        println!("given away: {given}; the file belongs to {uid}");
        assert_eq!(owner(&dir.path().join("file")), Some((uid, 0o600)));
    }

    #[test]
    fn what_was_saved_is_loaded() {
        let parent = tempfile::tempdir().expect("tempdir");
        let dir = parent.path().join("state");
        let identity = sample();
        save(&dir, &identity).expect("saves");
        let loaded = load(&dir).expect("loads");
        assert_eq!(
            (loaded.device_id, loaded.role, &loaded.name, &loaded.tags, &loaded.servers, &loaded.hosts),
            (
                identity.device_id,
                identity.role,
                &identity.name,
                &identity.tags,
                &identity.servers,
                &identity.hosts
            )
        );
        assert_eq!(loaded.ticket_key, identity.ticket_key);
        assert_eq!(loaded.public_key(), identity.public_key());
        assert_eq!((loaded.certificate, loaded.root), (identity.certificate, identity.root));
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = |path: &Path| fs::metadata(path).expect("is there").permissions().mode() & 0o777;
            assert_eq!((mode(&dir), mode(&dir.join(KEY))), (0o700, 0o600));
        }
    }

    #[test]
    fn every_damaged_or_missing_file_is_named() {
        let parent = tempfile::tempdir().expect("tempdir");
        let dir = parent.path();
        assert!(matches!(load(dir), Err(StoreError::NotEnrolled { .. })));
        for name in [KEY, CERTIFICATE, ROOT, DEVICE] {
            for contents in [None, Some(&b""[..]), Some(b"\xff\xfe"), Some(b"name = 3")] {
                save(dir, &sample()).expect("saves");
                match contents {
                    None => fs::remove_file(dir.join(name)).expect("removes"),
                    Some(contents) => fs::write(dir.join(name), contents).expect("writes"),
                }
                let error = load(dir).expect_err("damaged");
                assert!(error.to_string().contains(name), "{error}");
                assert_eq!(error.exit(), Exit::Usage);
                assert!(error.remedy().expect("has one").contains("--replace"));
            }
        }
        save(dir, &sample()).expect("saves");
        fs::write(dir.join(KEY), DeviceKey::generate().expect("key").to_pem()).expect("writes");
        assert!(matches!(load(dir), Err(StoreError::Damaged { .. })));
    }

    #[test]
    fn a_pending_key_stays_until_the_identity_is_saved() {
        let parent = tempfile::tempdir().expect("tempdir");
        let dir = parent.path();
        let first = pending_key(dir).expect("key");
        assert_eq!(pending_key(dir).expect("key").public_key(), first.public_key());
        assert!(is_pending(dir));
        save(dir, &sample()).expect("saves");
        assert!(!is_pending(dir));
    }
}
