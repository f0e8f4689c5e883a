//! Who this device is, and how it tells who others are.
//!
//! | module | what |
//! | --- | --- |
//! | [`certificate`] | makes, signs and reads device certificates |
//! | [`live`] | the identity of a running process, which the mediator may renew |
//! | [`revocation`] | lists of revoked certificates |
//! | [`store`] | the state directory that holds a device's identity |
//! | [`verify`] | rustls verifiers: chain to our root, role, device id |

pub mod certificate;
pub mod live;
pub mod revocation;
pub mod store;
pub mod verify;

use std::fmt;
use std::sync::Arc;

use adit_protocol::{DeviceId, Role};
use aws_lc_rs::encoding::AsBigEndian;
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

pub use certificate::Peer;
pub use live::Live;
use revocation::Revoked;

use crate::config::P2p;
use crate::proxy::Proxies;

/// This device: what its certificate says, and the key that proves it.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Device id.
    pub device_id: DeviceId,
    /// What it is enrolled as.
    pub role: Role,
    /// Its name.
    pub name: String,
    /// `key=value` each.
    pub tags: Vec<String>,
    /// Where the mediator is reached: `HOST:PORT` each, tried in turn.
    pub servers: Vec<String>,
    /// Relays only: the names and addresses that clients use.
    pub hosts: Vec<String>,
    /// Relays only: the mediator's key that signs tickets.
    pub ticket_key: Option<[u8; 32]>,
    /// Certificate of this device.
    pub certificate: CertificateDer<'static>,
    /// Certificate of the organisation's root.
    pub root: CertificateDer<'static>,
    /// Private key of this device.
    pub key: Arc<DeviceKey>,
    /// Whom to refuse, whatever their certificates say. Clones of an identity share it.
    pub revoked: Arc<Revoked>,
    /// The way out of this network: a setting of the process, not kept with the identity.
    pub proxies: Proxies,
    /// What its owner permits on the way to direct paths.
    pub p2p: P2p,
}

impl Identity {
    /// Ed25519 signature over `message` with this device's key.
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.key.sign(message)
    }

    /// This device's Ed25519 public key.
    pub fn public_key(&self) -> [u8; 32] {
        self.key.public_key()
    }
}

/// An Ed25519 private key. Its `Debug` shows nothing of it.
pub struct DeviceKey {
    pkcs8: Vec<u8>,
    pair: Ed25519KeyPair,
}

impl DeviceKey {
    /// A new key from the system's random source.
    ///
    /// # Errors
    /// [`InvalidKey`] when the system has no randomness to give.
    pub fn generate() -> Result<Self, InvalidKey> {
        let pkcs8 =
            Ed25519KeyPair::generate_pkcs8(&aws_lc_rs::rand::SystemRandom::new()).map_err(|_| InvalidKey)?;
        Self::from_pkcs8(pkcs8.as_ref())
    }

    /// Reads a PKCS #8 private key (DER).
    ///
    /// # Errors
    /// [`InvalidKey`] when that is no Ed25519 key.
    pub fn from_pkcs8(pkcs8: &[u8]) -> Result<Self, InvalidKey> {
        let pair = Ed25519KeyPair::from_pkcs8(pkcs8).map_err(|_| InvalidKey)?;
        Ok(Self { pkcs8: pkcs8.to_vec(), pair })
    }

    /// Reads a PKCS #8 private key (PEM).
    ///
    /// # Errors
    /// [`InvalidKey`] when that is no Ed25519 key.
    pub fn from_pem(text: &[u8]) -> Result<Self, InvalidKey> {
        let block = pem::parse(text).map_err(|_| InvalidKey)?;
        if block.tag() != "PRIVATE KEY" {
            return Err(InvalidKey);
        }
        Self::from_pkcs8(block.contents())
    }

    /// The key as PKCS #8 (PEM). Secret.
    pub fn to_pem(&self) -> String {
        pem::encode(&pem::Pem::new("PRIVATE KEY", self.pkcs8.clone()))
    }

    /// The key as rustls wants it. Secret.
    pub fn to_rustls(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.pkcs8.clone()))
    }

    /// The key as rcgen wants it. Secret.
    ///
    /// # Errors
    /// [`InvalidKey`] when rcgen cannot read it.
    pub fn to_rcgen(&self) -> Result<rcgen::KeyPair, InvalidKey> {
        let pkcs8 = PrivatePkcs8KeyDer::from(self.pkcs8.as_slice());
        rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8, &rcgen::PKCS_ED25519).map_err(|_| InvalidKey)
    }

    /// Ed25519 signature over `message`.
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.pair.sign(message).as_ref().try_into().expect("an Ed25519 signature has 64 bytes")
    }

    /// The public half.
    pub fn public_key(&self) -> [u8; 32] {
        self.pair.public_key().as_ref().try_into().expect("an Ed25519 key has 32 bytes")
    }

    /// Seed and public key, 64 bytes, as PASETO signing wants them. Secret.
    ///
    /// # Errors
    /// [`InvalidKey`] when the seed cannot be taken out.
    pub fn to_seed_and_public(&self) -> Result<[u8; 64], InvalidKey> {
        let seed = self.pair.seed().and_then(|seed| seed.as_be_bytes()).map_err(|_| InvalidKey)?;
        let mut bytes = [0; 64];
        bytes[..32].copy_from_slice(seed.as_ref());
        bytes[32..].copy_from_slice(&self.public_key());
        Ok(bytes)
    }
}

impl fmt::Debug for DeviceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DeviceKey(..)")
    }
}

/// Not an Ed25519 private key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an Ed25519 private key")]
pub struct InvalidKey;

#[cfg(test)]
mod tests {
    use super::*;
    use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};

    #[test]
    fn a_key_reads_back_and_stays_hidden() {
        let key = DeviceKey::generate().expect("randomness");
        let again = DeviceKey::from_pem(key.to_pem().as_bytes()).expect("a key");
        assert_eq!(key.public_key(), again.public_key());
        UnparsedPublicKey::new(&ED25519, key.public_key()).verify(b"m", &again.sign(b"m")).expect("verifies");
        assert_eq!(format!("{key:?}"), "DeviceKey(..)");
        let raw = key.to_seed_and_public().expect("a seed");
        let same = Ed25519KeyPair::from_seed_unchecked(&raw[..32]).expect("a seed");
        assert_eq!(same.public_key().as_ref(), &raw[32..]);
        assert!(
            DeviceKey::from_pem(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n").is_err()
        );
    }
}
