//! Lists of revoked certificates: X.509 CRLs (RFC 5280 section 5) signed by the organisation's root.
//!
//! A certificate's serial number is made from its key ([`serial`]), so that one entry revokes every
//! certificate that a key ever got, and whoever knows a key (a relay, from a ticket) can look it up. Lists
//! are numbered, the newest counts, and no device ever goes back to an older one.

use std::collections::HashSet;
use std::sync::{Arc, PoisonError, RwLock};

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};

/// Serial number of every certificate of one key.
pub type Serial = [u8; 20];

/// The serial number that certificates of this Ed25519 key have: its SHA-256, cut to the 20 bytes that
/// RFC 5280 section 4.1.2.2 allows, positive and without leading zeros.
pub fn serial(key: &[u8; 32]) -> Serial {
    let mut serial = Serial::default();
    serial.copy_from_slice(&digest(&SHA256, key).as_ref()[..20]);
    serial[0] = (serial[0] & 0x7f) | 0x40;
    serial
}

/// One list. The default is the empty one that every device begins with: number 0.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Revocations {
    /// Grows with every list.
    pub number: u64,
    /// When it was made, in seconds since 1970-01-01 UTC. No device's clock counts as earlier.
    pub made: u64,
    serials: HashSet<Serial>,
    der: Vec<u8>,
}

impl Revocations {
    /// Reads a list (DER) that `root` has signed.
    ///
    /// # Errors
    /// [`InvalidList`].
    pub fn read(der: &[u8], root: &CertificateDer<'_>) -> Result<Self, InvalidList> {
        let (rest, list) = CertificateRevocationList::from_der(der).map_err(|_| InvalidList)?;
        let (_, root) = X509Certificate::from_der(root).map_err(|_| InvalidList)?;
        // Both fields name the algorithm, and only one of them is signed (RFC 5280 section 5.1.1.2).
        let one_algorithm = list.signature_algorithm == list.tbs_cert_list.signature;
        if !rest.is_empty() || !one_algorithm || list.issuer().as_raw() != root.subject().as_raw() {
            return Err(InvalidList);
        }
        UnparsedPublicKey::new(&ED25519, root.public_key().subject_public_key.data.as_ref())
            .verify(list.tbs_cert_list.as_ref(), &list.signature_value.data)
            .map_err(|_| InvalidList)?;
        let serials = list.iter_revoked_certificates().map(|entry| entry.raw_serial().try_into());
        Ok(Self {
            number: list.crl_number().and_then(|number| number.try_into().ok()).ok_or(InvalidList)?,
            made: u64::try_from(list.last_update().timestamp()).map_err(|_| InvalidList)?,
            serials: serials.collect::<Result<_, _>>().map_err(|_| InvalidList)?,
            der: der.to_vec(),
        })
    }

    /// Whether this key's certificates are revoked.
    pub fn has(&self, key: &[u8; 32]) -> bool {
        !self.serials.is_empty() && self.serials.contains(&serial(key))
    }

    /// The list as it was signed (DER); empty for the empty one.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// How many keys are on it.
    pub fn len(&self) -> usize {
        self.serials.len()
    }

    /// Whether it revokes nothing.
    pub fn is_empty(&self) -> bool {
        self.serials.is_empty()
    }
}

/// The newest list that this device knows. Shared by everything that verifies.
#[derive(Debug, Default)]
pub struct Revoked(RwLock<Arc<Revocations>>);

impl Revoked {
    /// Begins with this list.
    pub fn new(list: Revocations) -> Self {
        Self(RwLock::new(Arc::new(list)))
    }

    /// The newest list.
    pub fn newest(&self) -> Arc<Revocations> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes a list; says whether it is newer than the one before. An older one is left.
    pub fn advance(&self, list: Revocations) -> bool {
        let mut newest = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let newer = list.number > newest.number;
        if newer {
            *newest = Arc::new(list);
        }
        newer
    }
}

/// Not a list of revoked certificates, or not one of this organisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a list of revoked certificates of this organisation")]
pub struct InvalidList;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::DeviceKey;
    use crate::identity::certificate::{Authority, Peer, Subject, request};
    use adit_protocol::{DeviceId, Role};

    const NOW: u64 = 1_800_000_000;

    /// Signature algorithm, signature: what stands behind the signed part.
    const OUTSIDE: usize = 7 + 67;

    fn root() -> Authority {
        Authority::new(&DeviceKey::generate().expect("key"), NOW).expect("root")
    }

    #[test]
    fn a_signed_list_reads_back_and_no_flipped_bit_changes_it() {
        let root = root();
        let keys = [[1; 32], [2; 32]];
        let der = root.revocation_list(7, NOW, &keys.map(|key| (key, NOW - 5))).expect("signs");
        let list = Revocations::read(&der, root.certificate()).expect("reads");
        assert_eq!((list.number, list.made, list.len()), (7, NOW, 2));
        assert!(list.has(&[1; 32]) && list.has(&[2; 32]) && !list.has(&[3; 32]));
        for at in 0..der.len() {
            let mut bad = der.clone();
            bad[at] ^= 1;
            // A bit of the field that is not signed may pass; what is signed cannot change.
            if let Ok(read) = Revocations::read(&bad, root.certificate()) {
                assert_eq!((read.number, read.made, &read.serials), (7, NOW, &list.serials), "byte {at}");
                assert!(at >= der.len() - OUTSIDE, "byte {at}");
            }
            assert_eq!(Revocations::read(&der[..at], root.certificate()), Err(InvalidList));
        }
        assert_eq!(Revocations::read(&der, self::root().certificate()), Err(InvalidList));
    }

    #[test]
    fn a_certificate_has_the_serial_of_its_key() {
        let key = DeviceKey::generate().expect("key");
        let subject =
            Subject { device_id: DeviceId([1; 16]), role: Role::Agent, name: "a".into(), tags: vec![] };
        let der = root().sign_request(&request(&key).expect("csr"), &subject, NOW).expect("signs");
        let (_, parsed) = X509Certificate::from_der(&der).expect("parses");
        assert_eq!(parsed.raw_serial(), serial(&key.public_key()));
        assert_eq!(Peer::from_certificate(&der).expect("a device").public_key, key.public_key());
    }

    #[test]
    fn lists_never_run_backwards() {
        let root = root();
        let list = |number| {
            let der = root.revocation_list(number, NOW, &[([number as u8; 32], NOW)]).expect("signs");
            Revocations::read(&der, root.certificate()).expect("reads")
        };
        let revoked = Revoked::default();
        assert!(revoked.advance(list(3)));
        assert!(
            !revoked.advance(list(3))
                && !revoked.advance(list(2))
                && !revoked.advance(Revocations::default())
        );
        assert!(revoked.newest().has(&[3; 32]));
        assert!(revoked.advance(list(4)));
        assert!(!revoked.newest().has(&[3; 32]) && revoked.newest().has(&[4; 32]));
    }
}
