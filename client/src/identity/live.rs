//! The identity of a running process. The mediator may renew its certificate, move to other addresses, and
//! extend the list of revoked certificates; all of it is verified here before it counts, and kept.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use adit_protocol::control::Update;
use rustls::pki_types::{CertificateDer, UnixTime};
use tracing::{info, warn};

use super::revocation::{InvalidList, Revocations};
use super::store::{self, StoreError};
use super::verify::{Expected, VerifyError, verify_device};
use super::{Identity, Peer};
use crate::config::P2p;
use crate::proxy::Proxies;

/// More addresses than a mediator has.
const MAX_SERVERS: usize = 16;
/// Longest `HOST:PORT`, in bytes.
const MAX_SERVER: usize = 262;

/// An identity that may change while it is used.
#[derive(Debug)]
pub struct Live {
    /// `None`: changes are not kept (tests, and a server of its own).
    dir: Option<PathBuf>,
    identity: RwLock<Arc<Identity>>,
}

impl Live {
    /// The identity in a state directory, where changes are kept.
    ///
    /// # Errors
    /// See [`store::load`].
    pub fn load(dir: &Path) -> Result<Arc<Self>, StoreError> {
        Self::load_behind(dir, Proxies::default(), P2p::default())
    }

    /// The same in a network that is left through `proxies`, with what its owner permits on the way to direct paths.
    ///
    /// # Errors
    /// See [`store::load`].
    pub fn load_behind(dir: &Path, proxies: Proxies, p2p: P2p) -> Result<Arc<Self>, StoreError> {
        let identity = RwLock::new(Arc::new(Identity { proxies, p2p, ..store::load(dir)? }));
        Ok(Arc::new(Self { dir: Some(dir.to_owned()), identity }))
    }

    /// An identity whose changes are forgotten with the process.
    pub fn new(identity: Identity) -> Arc<Self> {
        Arc::new(Self { dir: None, identity: RwLock::new(Arc::new(identity)) })
    }

    /// The state directory, if it has one.
    pub fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    /// The identity as it is now.
    pub fn get(&self) -> Arc<Identity> {
        self.identity.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes a new certificate and new servers. A certificate for another device, role or key, or one that
    /// our root has not signed, is refused.
    ///
    /// # Errors
    /// [`ChangeError`]; everything is as before then.
    pub fn update(&self, update: Update) -> Result<(), ChangeError> {
        let now = self.get();
        let mut next = Identity::clone(&now);
        if !update.certificate.is_empty() {
            let certificate = CertificateDer::from(update.certificate);
            let peer = verified(&now, &certificate)?;
            (next.name, next.tags, next.certificate) = (peer.name, peer.tags, certificate);
        }
        if !update.servers.is_empty() {
            let sane = |server: &String| server.len() <= MAX_SERVER && server.contains(':');
            if update.servers.len() > MAX_SERVERS || !update.servers.iter().all(sane) {
                return Err(ChangeError::Servers);
            }
            next.servers = update.servers;
        }
        if next.certificate == now.certificate && next.servers == now.servers {
            return Ok(());
        }
        if let Some(dir) = &self.dir {
            store::save_changes(dir, &next)?;
        }
        info!(name = next.name, servers = ?next.servers, "this device's identity was renewed");
        *self.identity.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
        Ok(())
    }

    /// Takes a list of revoked certificates (DER); says whether it is newer than the one before.
    ///
    /// # Errors
    /// [`ChangeError`]. A list that cannot be kept counts all the same while this process lives.
    pub fn revoke(&self, list: &[u8]) -> Result<bool, ChangeError> {
        let identity = self.get();
        let list = Revocations::read(list, &identity.root)?;
        if !identity.revoked.advance(list) {
            return Ok(false);
        }
        if let Some(dir) = &self.dir {
            store::save_revocations(dir, &identity.revoked.newest(), &identity.root)?;
        }
        Ok(true)
    }

    /// [`Live::update`] with what the mediator sent; what is wrong with it is logged.
    pub(crate) fn take_update(&self, update: Update) {
        if let Err(error) = self.update(update) {
            warn!(%error, "the mediator's change of this device's identity was not taken");
        }
    }

    /// [`Live::revoke`] with what the mediator sent; what is wrong with it is logged. Says whether the list is
    /// newer.
    pub(crate) fn take_list(&self, list: &[u8]) -> bool {
        match self.revoke(list) {
            Ok(newer) => newer,
            Err(error) => {
                warn!(%error, "the mediator's list of revoked certificates");
                !matches!(error, ChangeError::List(_))
            }
        }
    }
}

fn verified(own: &Identity, certificate: &CertificateDer<'_>) -> Result<Peer, ChangeError> {
    let root = webpki::anchor_from_trusted_cert(&own.root).map_err(|_| VerifyError::Malformed)?;
    let expected = Expected::device(own.role, own.device_id);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let revoked = own.revoked.newest();
    let peer = verify_device(&root, certificate, &expected, &revoked, UnixTime::since_unix_epoch(now))?;
    if peer.public_key == own.public_key() { Ok(peer) } else { Err(ChangeError::OtherKey) }
}

/// Why a change was not taken, or not kept.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// The certificate is not acceptable.
    #[error(transparent)]
    Certificate(#[from] VerifyError),
    /// It is for another key.
    #[error("the certificate is for another key than this device's")]
    OtherKey,
    /// The servers are no addresses.
    #[error("the mediator's addresses are not HOST:PORT")]
    Servers,
    /// The list is not one.
    #[error(transparent)]
    List(#[from] InvalidList),
    /// It could not be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::DeviceKey;
    use crate::identity::certificate::{Authority, Subject};
    use adit_protocol::{DeviceId, Role};

    fn now() -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
    }

    fn subject(name: &str) -> Subject {
        Subject {
            device_id: DeviceId([1; 16]),
            role: Role::Agent,
            name: name.into(),
            tags: vec!["a=b".into()],
        }
    }

    fn enrolled(dir: &Path) -> (Authority, Arc<Live>) {
        let authority = Authority::new(&DeviceKey::generate().expect("key"), now()).expect("root");
        let key = DeviceKey::generate().expect("key");
        let certificate = authority.sign_key(&key.public_key(), &subject("old"), now()).expect("signs");
        let identity = Identity {
            device_id: DeviceId([1; 16]),
            role: Role::Agent,
            name: "old".into(),
            tags: vec![],
            servers: vec!["a.example:443".into()],
            hosts: vec![],
            ticket_key: None,
            certificate,
            root: authority.certificate().clone(),
            key: Arc::new(key),
            revoked: Arc::default(),
            proxies: Default::default(),
            p2p: Default::default(),
        };
        store::save(dir, &identity).expect("saves");
        (authority, Live::load(dir).expect("loads"))
    }

    #[test]
    fn a_renewed_certificate_and_new_servers_are_kept() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (authority, live) = enrolled(dir.path());
        let key = live.get().public_key();
        let certificate = authority.sign_key(&key, &subject("new"), now()).expect("signs");
        let servers = vec!["b.example:443".to_owned()];
        let update = Update { certificate: certificate.to_vec(), servers: servers.clone() };
        live.update(update).expect("takes it");
        for identity in [live.get(), Live::load(dir.path()).expect("loads").get()] {
            assert_eq!((identity.name.as_str(), &identity.servers), ("new", &servers));
            assert_eq!((&identity.certificate, identity.public_key()), (&certificate, key));
        }
        live.update(Update::default()).expect("nothing to do");
    }

    #[test]
    fn nobody_elses_certificate_is_taken() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (authority, live) = enrolled(dir.path());
        let key = live.get().public_key();
        let stranger = Authority::new(&DeviceKey::generate().expect("key"), now()).expect("root");
        let other = Subject { device_id: DeviceId([2; 16]), ..subject("x") };
        let technician = Subject { role: Role::Technician, ..subject("x") };
        for certificate in [
            stranger.sign_key(&key, &subject("x"), now()),
            authority.sign_key(&key, &other, now()),
            authority.sign_key(&key, &technician, now()),
            authority.sign_key(&[9; 32], &subject("x"), now()),
        ] {
            let certificate = certificate.expect("signs").to_vec();
            assert!(live.update(Update { certificate, servers: vec![] }).is_err());
        }
        let servers = vec!["no port".to_owned()];
        assert!(live.update(Update { certificate: vec![], servers }).is_err());
        assert_eq!(live.get().name, "old");
    }

    #[test]
    fn a_list_outlives_the_process_and_an_older_one_is_left() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (authority, live) = enrolled(dir.path());
        let list =
            |number, key| authority.revocation_list(number, now(), &[([key; 32], now())]).expect("signs");
        assert!(live.revoke(&list(2, 7)).expect("takes it"));
        assert!(!live.revoke(&list(1, 8)).expect("reads it"));
        assert!(live.revoke(b"nonsense").is_err());
        let again = Live::load(dir.path()).expect("loads").get().revoked.newest();
        assert!(again.has(&[7; 32]) && !again.has(&[8; 32]));
        // Another process that is behind does not take the newer list away.
        let behind = Live::load(dir.path()).expect("loads");
        assert!(live.revoke(&list(4, 9)).expect("takes it"));
        assert!(behind.revoke(&list(3, 8)).expect("takes it"));
        assert_eq!(Live::load(dir.path()).expect("loads").get().revoked.newest().number, 4);
    }
}
