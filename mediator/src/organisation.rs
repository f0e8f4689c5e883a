//! The mediator's directory: keys, certificates and configuration, made once by `init`.
//!
//! | file | what |
//! | --- | --- |
//! | `root-key.pem` | enrolment key; needed for enrolments only, may be taken offline in between |
//! | `root.pem` | its certificate |
//! | `server-key.pem`, `server.pem` | this server's identity, role `mediator` |
//! | `ticket-key.pem` | signs tickets |
//! | `relay-id` | device id of the embedded relay |
//! | `config.toml` | settings |
//! | `state.db` | devices, tokens, grants, lists of revoked certificates |
//! | `audit.jsonl` | one line before each grant |

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use adit_client::identity::certificate::{Authority, DEVICE_VALIDITY, Subject, fingerprint};
use adit_client::identity::store::{self, Access, certificate_pem, read_certificate};
use adit_client::identity::{DeviceKey, Identity, Peer};
use adit_protocol::{DeviceId, Role};
use rustls::pki_types::CertificateDer;
use tracing::{info, warn};

use crate::config::{self, Config};
use crate::error::Error;

/// Name of the database in the directory.
pub const DATABASE: &str = "state.db";
/// Name of the audit log in the directory.
pub const AUDIT: &str = "audit.jsonl";

/// Name of the enrolment key's file in the directory.
pub const ROOT_KEY: &str = "root-key.pem";
pub(crate) const ROOT: &str = "root.pem";
pub(crate) const SERVER_KEY: &str = "server-key.pem";
pub(crate) const SERVER: &str = "server.pem";
pub(crate) const TICKET_KEY: &str = "ticket-key.pem";
pub(crate) const RELAY_ID: &str = "relay-id";
/// Stands there while `init` is at work.
const UNFINISHED: &str = ".init";
/// Directory that stands there while `restore` is at work.
pub(crate) const RESTORING: &str = ".restore";

/// Everything in the directory but the database.
pub struct Organisation {
    /// The directory.
    pub dir: PathBuf,
    /// Settings.
    pub config: Config,
    /// This server.
    pub identity: Identity,
    /// Signs tickets.
    pub ticket_key: DeviceKey,
    /// Device id of the embedded relay.
    pub relay_id: DeviceId,
}

impl Organisation {
    /// Makes a new organisation in `dir`, which must be empty or not there.
    ///
    /// # Errors
    /// [`Error::NotEmpty`], or what the system said. A run that was cut off can be repeated.
    pub fn init(dir: &Path, hosts: &[String]) -> Result<(), Error> {
        store::create_private_dir(dir)?;
        if !dir.join(UNFINISHED).exists() && fs::read_dir(dir)?.next().is_some() {
            return Err(Error::NotEmpty(dir.to_owned()));
        }
        store::write(dir, UNFINISHED, b"", Access::Public)?;
        let root_key = new_key(dir, ROOT_KEY)?;
        let authority = Authority::new(&root_key, unix_now())?;
        let server_key = new_key(dir, SERVER_KEY)?;
        let server = sign_server(&authority, &server_key, random_id(), hosts)?;
        new_key(dir, TICKET_KEY)?;
        store::write(dir, ROOT, certificate_pem(authority.certificate()).as_bytes(), Access::Public)?;
        store::write(dir, SERVER, certificate_pem(&server).as_bytes(), Access::Public)?;
        store::write(dir, RELAY_ID, random_id().to_string().as_bytes(), Access::Public)?;
        store::write(dir, config::FILE, config::template(hosts).as_bytes(), Access::Public)?;
        fs::remove_file(dir.join(UNFINISHED))?;
        Ok(())
    }

    /// Whether there is one in `dir`, whole or damaged.
    pub fn is_in(dir: &Path) -> bool {
        !dir.join(UNFINISHED).exists() && (dir.join(config::FILE).exists() || dir.join(SERVER).exists())
    }

    /// Reads what [`Organisation::init`] made.
    ///
    /// # Errors
    /// [`Error`] names the file that is missing or damaged.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        if dir.join(UNFINISHED).exists() {
            return Err(Error::HalfMade(dir.to_owned()));
        }
        if dir.join(RESTORING).exists() {
            return Err(Error::HalfRestored(dir.to_owned()));
        }
        if !Self::is_in(dir) {
            return Err(Error::NoOrganisation(dir.to_owned()));
        }
        let config = Config::load(dir)?;
        let certificate = read_certificate(dir, SERVER)?;
        let peer = Peer::from_certificate(&certificate)?;
        let relay_id = read(dir, RELAY_ID)?;
        let relay_id = std::str::from_utf8(&relay_id).ok().and_then(|text| text.trim().parse().ok());
        let identity = Identity {
            device_id: peer.device_id,
            role: peer.role,
            name: peer.name,
            tags: peer.tags,
            servers: config.reached_at(config.listen.https),
            hosts: config.hosts.clone(),
            ticket_key: None,
            certificate,
            root: read_certificate(dir, ROOT)?,
            key: Arc::new(read_key(dir, SERVER_KEY)?),
            revoked: Arc::default(),
            proxies: Default::default(),
            p2p: Default::default(),
        };
        let mut organisation = Self {
            dir: dir.to_owned(),
            config,
            identity,
            ticket_key: read_key(dir, TICKET_KEY)?,
            relay_id: relay_id.ok_or_else(|| bad_file(dir, RELAY_ID))?,
        };
        organisation.renew_server_certificate(peer.not_after)?;
        Ok(organisation)
    }

    /// The enrolment key with its certificate; `None` while it is offline.
    ///
    /// # Errors
    /// [`Error::Key`] when the file is there and damaged.
    pub fn authority(&self) -> Result<Option<Authority>, Error> {
        self.keyring().read()
    }

    /// The enrolment key for later.
    pub fn keyring(&self) -> Keyring {
        Keyring { dir: self.dir.clone(), root: self.identity.root.clone() }
    }

    /// What enrolment tokens pin.
    ///
    /// # Errors
    /// [`Error::Certificate`] when the root is damaged.
    pub fn fingerprint(&self) -> Result<[u8; 32], Error> {
        Ok(fingerprint(&self.identity.root)?)
    }

    /// In the last quarter of its life the server's certificate is made anew, when the enrolment key is
    /// there.
    fn renew_server_certificate(&mut self, not_after: u64) -> Result<(), Error> {
        if unix_now() + DEVICE_VALIDITY / 4 < not_after {
            return Ok(());
        }
        if self.sign_server_anew()? {
            info!("the server's certificate was renewed");
        } else {
            warn!(not_after, "the server's certificate ends soon: put root-key.pem back and start again");
        }
        Ok(())
    }

    /// Makes the server's certificate anew, with the hosts as they are now. Says whether it did: that takes the
    /// enrolment key.
    ///
    /// # Errors
    /// [`Error`].
    pub(crate) fn sign_server_anew(&mut self) -> Result<bool, Error> {
        let Some(authority) = self.authority()? else { return Ok(false) };
        let identity = &mut self.identity;
        identity.certificate = sign_server(&authority, &identity.key, identity.device_id, &identity.hosts)?;
        store::write(&self.dir, SERVER, certificate_pem(&identity.certificate).as_bytes(), Access::Public)?;
        Ok(true)
    }
}

/// The enrolment key, read each time it is used: taken offline or put back, it counts at once.
#[derive(Debug, Clone)]
pub struct Keyring {
    dir: PathBuf,
    root: CertificateDer<'static>,
}

impl Keyring {
    /// The enrolment key; `None` while it is offline. A damaged one counts as offline, and is logged.
    pub fn authority(&self) -> Option<Authority> {
        self.read().unwrap_or_else(|error| {
            warn!(%error, "the enrolment key cannot be used");
            None
        })
    }

    /// The organisation's root.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    fn read(&self) -> Result<Option<Authority>, Error> {
        if !self.dir.join(ROOT_KEY).exists() {
            return Ok(None);
        }
        let key = read_key(&self.dir, ROOT_KEY)?;
        Ok(Some(Authority::load(&key, self.root.clone())?))
    }
}

/// Seconds since 1970-01-01 UTC.
pub fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

/// Milliseconds since 1970-01-01 UTC.
pub fn unix_millis() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// A new device id.
pub fn random_id() -> DeviceId {
    DeviceId(rand::random())
}

fn sign_server(
    authority: &Authority,
    key: &DeviceKey,
    device_id: DeviceId,
    hosts: &[String],
) -> Result<CertificateDer<'static>, Error> {
    let subject = Subject { device_id, role: Role::Mediator, name: "mediator".into(), tags: vec![] };
    Ok(authority.sign_server(key, &subject, hosts, unix_now())?)
}

fn new_key(dir: &Path, file: &str) -> Result<DeviceKey, Error> {
    let key = DeviceKey::generate().map_err(|error| Error::Key { path: dir.join(file), error })?;
    store::write(dir, file, key.to_pem().as_bytes(), Access::Secret)?;
    Ok(key)
}

fn read_key(dir: &Path, file: &str) -> Result<DeviceKey, Error> {
    let pem = read(dir, file)?;
    DeviceKey::from_pem(&pem).map_err(|error| Error::Key { path: dir.join(file), error })
}

fn read(dir: &Path, file: &str) -> Result<Vec<u8>, Error> {
    let path = dir.join(file);
    fs::read(&path).map_err(|error| Error::File(store::StoreError::Io { path, error }))
}

fn bad_file(dir: &Path, file: &str) -> Error {
    let error = io::Error::from(io::ErrorKind::InvalidData);
    Error::File(store::StoreError::Io { path: dir.join(file), error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_runs_once_and_a_cut_off_run_can_be_repeated() {
        let parent = tempfile::tempdir().expect("tempdir");
        let dir = parent.path().join("d");
        let hosts = ["127.0.0.1".to_owned(), "adit.example.org".to_owned()];
        assert!(matches!(Organisation::load(&dir), Err(Error::NoOrganisation(_))));
        Organisation::init(&dir, &hosts).expect("makes");
        assert!(matches!(Organisation::init(&dir, &hosts), Err(Error::NotEmpty(_))));
        let first = Organisation::load(&dir).expect("loads");
        assert_eq!((first.identity.role, first.config.hosts.as_slice()), (Role::Mediator, &hosts[..]));
        assert!(first.authority().expect("reads").is_some());

        fs::write(dir.join(UNFINISHED), b"").expect("writes");
        assert!(matches!(Organisation::load(&dir), Err(Error::HalfMade(_))));
        Organisation::init(&dir, &hosts).expect("makes");
        let second = Organisation::load(&dir).expect("loads");
        assert_ne!(first.fingerprint().expect("root"), second.fingerprint().expect("root"));

        fs::remove_file(dir.join(ROOT_KEY)).expect("takes it offline");
        assert!(Organisation::load(&dir).expect("loads").authority().expect("reads").is_none());
    }
}
