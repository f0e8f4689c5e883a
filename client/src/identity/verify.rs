//! Who may be at the other end: chain to our root, not revoked, validity with a day's grace, role, device id.
//!
//! Host names play no part: only the organisation's own root can vouch for a role.

use std::sync::Arc;
use std::time::Duration;

use adit_protocol::{DeviceId, Role};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, PeerIncompatible, SignatureScheme,
};
use webpki::{EndEntityCert, KeyUsage};

use super::Identity;
use super::certificate::{Peer, fingerprint, issuer};
use super::revocation::{Revocations, Revoked};

/// How wrong a clock may be before a certificate counts as out of date.
pub const GRACE: Duration = Duration::from_secs(24 * 60 * 60);

/// Whom this end is ready to talk to.
#[derive(Debug, Clone)]
pub struct Expected {
    /// Any of these roles.
    pub roles: Vec<Role>,
    /// When given: this one device.
    pub device: Option<DeviceId>,
}

impl Expected {
    /// Any device of this role.
    pub fn role(role: Role) -> Self {
        Self { roles: vec![role], device: None }
    }

    /// This one device, which must have this role.
    pub fn device(role: Role, device: DeviceId) -> Self {
        Self { roles: vec![role], device: Some(device) }
    }
}

/// Verifies one device certificate against the organisation's `root` and its list of `revoked` ones at `now`,
/// which counts as no earlier than the list.
///
/// # Errors
/// [`VerifyError`] says what did not hold.
pub fn verify_device(
    root: &TrustAnchor<'_>,
    leaf: &CertificateDer<'_>,
    expected: &Expected,
    revoked: &Revocations,
    now: UnixTime,
) -> Result<Peer, VerifyError> {
    let now = UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs().max(revoked.made)));
    let certificate = EndEntityCert::try_from(leaf).map_err(|_| VerifyError::Malformed)?;
    let provider = crate::tls::provider();
    let algorithms = provider.signature_verification_algorithms.all;
    let chain = |time| {
        let roots = std::slice::from_ref(root);
        // Every device certificate carries both usages.
        certificate
            .verify_for_usage(algorithms, roots, &[], time, KeyUsage::client_auth(), None, None)
            .map(drop)
    };
    let late = || UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs()).saturating_sub(GRACE));
    let early = || UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs()).saturating_add(GRACE));
    let verdict = match chain(now) {
        Err(webpki::Error::CertExpired { .. }) => chain(late()),
        Err(webpki::Error::CertNotValidYet { .. }) => chain(early()),
        verdict => verdict,
    };
    verdict.map_err(|error| match error {
        webpki::Error::CertExpired { .. } => VerifyError::Expired,
        webpki::Error::CertNotValidYet { .. } => VerifyError::NotYetValid,
        webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
            VerifyError::OtherOrganisation
        }
        _ => VerifyError::Malformed,
    })?;
    let peer = Peer::from_certificate(leaf).map_err(|_| VerifyError::Malformed)?;
    if revoked.has(&peer.public_key) {
        return Err(VerifyError::Revoked);
    }
    if !expected.roles.contains(&peer.role) {
        return Err(VerifyError::WrongRole(peer.role));
    }
    if expected.device.is_some_and(|device| device != peer.device_id) {
        return Err(VerifyError::OtherDevice(peer.device_id));
    }
    Ok(peer)
}

/// Why a certificate was not accepted. Comes wrapped in a [`rustls::Error`]: see [`VerifyError::of`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// Not a device certificate of adit.
    #[error("the other end's certificate is no device certificate of adit")]
    Malformed,
    /// Not signed by our root.
    #[error("the other end's certificate is not from this organisation")]
    OtherOrganisation,
    /// A server's certificate that is nothing of adit's: something in between answers in its place.
    #[error(
        "a certificate issued by {issuer:?} was shown in the place of the server's: something in between opens TLS"
    )]
    Intercepted {
        /// Common name, or what else the certificate names its issuer.
        issuer: String,
    },
    /// Expired for more than a day.
    #[error("the other end's certificate has expired, or this machine's clock is wrong")]
    Expired,
    /// Not valid before more than a day from now.
    #[error("the other end's certificate is not valid yet, or this machine's clock is wrong")]
    NotYetValid,
    /// On the organisation's list of revoked certificates.
    #[error("the other end's certificate was revoked")]
    Revoked,
    /// Another role than expected.
    #[error("the other end is enrolled as {0}, which may not do this")]
    WrongRole(Role),
    /// Another device than expected.
    #[error("the other end is another device ({0}) than the one expected")]
    OtherDevice(DeviceId),
    /// Enrolment: the server's root is not the one that the token pins.
    #[error("the server's root key is not the one that the token names: wrong fingerprint")]
    WrongFingerprint,
}

impl VerifyError {
    /// The verdict inside an I/O error of tokio-rustls, if it is one of ours.
    pub fn of(error: &std::io::Error) -> Option<Self> {
        match error.get_ref()?.downcast_ref::<rustls::Error>()? {
            rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) => {
                inner.downcast_ref().cloned()
            }
            _ => None,
        }
    }
}

impl From<VerifyError> for rustls::Error {
    fn from(error: VerifyError) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
    }
}

/// Verifies devices of our organisation, as TLS client and as TLS server.
#[derive(Debug)]
pub struct DeviceVerifier {
    root: TrustAnchor<'static>,
    expected: Expected,
    revoked: Arc<Revoked>,
    provider: Arc<CryptoProvider>,
}

impl DeviceVerifier {
    /// Verifies on behalf of this device, with its root certificate and the newest list that it has then.
    ///
    /// # Errors
    /// [`VerifyError::Malformed`] when the root is no certificate.
    pub fn new(of: &Identity, expected: Expected) -> Result<Self, VerifyError> {
        let root = webpki::anchor_from_trusted_cert(&of.root).map_err(|_| VerifyError::Malformed)?.to_owned();
        Ok(Self { root, expected, revoked: of.revoked.clone(), provider: crate::tls::provider() })
    }
}

/// What all verifiers have in common: TLS 1.3 with Ed25519, checked by rustls.
macro_rules! tls13_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(PeerIncompatible::Tls12NotOffered.into())
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
        }
    };
}

/// Ours have Ed25519 keys only. But with others not even offered, a proxy in between would end the handshake
/// without showing the certificate that gives it away.
macro_rules! shows_any_certificate {
    () => {
        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.provider.signature_verification_algorithms.supported_schemes()
        }
    };
}

/// Whether it is not even a certificate of some organisation's adit.
fn intercepted(error: VerifyError, certificate: &CertificateDer<'_>) -> VerifyError {
    let foreign = Peer::from_certificate(certificate).is_err();
    match error {
        VerifyError::Malformed | VerifyError::OtherOrganisation | VerifyError::WrongFingerprint
            if foreign =>
        {
            VerifyError::Intercepted { issuer: issuer(certificate) }
        }
        error => error,
    }
}

impl ServerCertVerifier for DeviceVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        verify_device(&self.root, end_entity, &self.expected, &self.revoked.newest(), now)
            .map_err(|error| intercepted(error, end_entity))?;
        Ok(ServerCertVerified::assertion())
    }

    tls13_signatures!();
    shows_any_certificate!();
}

impl ClientCertVerifier for DeviceVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        verify_device(&self.root, end_entity, &self.expected, &self.revoked.newest(), now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    tls13_signatures!();
}

/// For enrolment: the server's chain must end in the root whose fingerprint the token pins, and its
/// leaf must be a mediator's.
#[derive(Debug)]
pub struct PinnedVerifier {
    fingerprint: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl PinnedVerifier {
    /// Pins the SHA-256 of the root's SubjectPublicKeyInfo.
    pub fn new(fingerprint: [u8; 32]) -> Self {
        Self { fingerprint, provider: crate::tls::provider() }
    }
}

impl ServerCertVerifier for PinnedVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let pinned = intermediates.last().filter(|root| fingerprint(root) == Ok(self.fingerprint));
        let Some(root) = pinned else {
            return Err(intercepted(VerifyError::WrongFingerprint, end_entity).into());
        };
        let root = webpki::anchor_from_trusted_cert(root).map_err(|_| VerifyError::Malformed)?;
        let mediator = Expected::role(Role::Mediator);
        verify_device(&root, end_entity, &mediator, &Revocations::default(), now)?;
        Ok(ServerCertVerified::assertion())
    }

    tls13_signatures!();
    shows_any_certificate!();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::DeviceKey;
    use crate::identity::certificate::{Authority, DEVICE_VALIDITY, Subject};

    const NOW: u64 = 1_800_000_000;
    const DAY: u64 = 24 * 60 * 60;

    fn organisation() -> Authority {
        Authority::new(&DeviceKey::generate().expect("key"), NOW).expect("root")
    }

    fn device(authority: &Authority, role: Role) -> CertificateDer<'static> {
        let subject = Subject { device_id: DeviceId([1; 16]), role, name: "x".into(), tags: vec![] };
        authority.sign_server(&DeviceKey::generate().expect("key"), &subject, &[], NOW).expect("signs")
    }

    fn check(
        authority: &Authority,
        leaf: &CertificateDer<'_>,
        expected: Expected,
        now: u64,
    ) -> Result<DeviceId, VerifyError> {
        check_with(authority, leaf, expected, &Revocations::default(), now)
    }

    fn check_with(
        authority: &Authority,
        leaf: &CertificateDer<'_>,
        expected: Expected,
        revoked: &Revocations,
        now: u64,
    ) -> Result<DeviceId, VerifyError> {
        let anchor = webpki::anchor_from_trusted_cert(authority.certificate()).expect("anchor");
        let now = UnixTime::since_unix_epoch(Duration::from_secs(now));
        verify_device(&anchor, leaf, &expected, revoked, now).map(|peer| peer.device_id)
    }

    #[test]
    fn a_revoked_key_is_refused_and_no_clock_is_earlier_than_the_list() {
        let authority = organisation();
        let leaf = device(&authority, Role::Agent);
        let key = Peer::from_certificate(&leaf).expect("a device").public_key;
        let list = |keys: &[([u8; 32], u64)], made| {
            let der = authority.revocation_list(1, made, keys).expect("signs");
            Revocations::read(&der, authority.certificate()).expect("reads")
        };
        let at =
            |list: &Revocations, now| check_with(&authority, &leaf, Expected::role(Role::Agent), list, now);
        assert_eq!(at(&list(&[(key, NOW)], NOW), NOW), Err(VerifyError::Revoked));
        assert!(at(&list(&[([9; 32], NOW)], NOW), NOW).is_ok());
        // A clock of 1970 with a list of today, and a certificate that has expired by the list's time.
        assert!(at(&list(&[], NOW), 0).is_ok());
        assert_eq!(at(&list(&[], NOW + DEVICE_VALIDITY + 2 * DAY), NOW), Err(VerifyError::Expired));
    }

    #[test]
    fn validity_has_a_days_grace_on_both_sides() {
        let authority = organisation();
        let leaf = device(&authority, Role::Agent);
        let at = |now| check(&authority, &leaf, Expected::role(Role::Agent), now);
        let ok = Ok(DeviceId([1; 16]));
        assert_eq!(at(NOW), ok);
        // not_before lies a day before NOW; the grace gives one more
        assert_eq!(at(NOW - 2 * DAY), ok);
        assert_eq!(at(NOW - 2 * DAY - 1), Err(VerifyError::NotYetValid));
        assert_eq!(at(NOW + DEVICE_VALIDITY + DAY), ok);
        assert_eq!(at(NOW + DEVICE_VALIDITY + DAY + 1), Err(VerifyError::Expired));
    }

    #[test]
    fn role_device_and_organisation_must_fit() {
        let authority = organisation();
        let leaf = device(&authority, Role::Agent);
        let expect = |expected| check(&authority, &leaf, expected, NOW);
        assert!(expect(Expected::device(Role::Agent, DeviceId([1; 16]))).is_ok());
        assert_eq!(
            expect(Expected::device(Role::Agent, DeviceId([2; 16]))),
            Err(VerifyError::OtherDevice(DeviceId([1; 16])))
        );
        assert_eq!(expect(Expected::role(Role::Technician)), Err(VerifyError::WrongRole(Role::Agent)));
        let other = check(&organisation(), &leaf, Expected::role(Role::Agent), NOW);
        assert_eq!(other, Err(VerifyError::OtherOrganisation));
        let root = authority.certificate();
        assert_eq!(check(&authority, root, Expected::role(Role::Agent), NOW), Err(VerifyError::Malformed));
    }

    #[test]
    fn a_device_cannot_sign_another() {
        let authority = organisation();
        let key = DeviceKey::generate().expect("key");
        let subject =
            Subject { device_id: DeviceId([1; 16]), role: Role::Agent, name: "x".into(), tags: vec![] };
        let middle = authority.sign_server(&key, &subject, &[], NOW).expect("signs");
        let rogue = Authority::load(&key, middle).expect("any certificate with its key");
        let leaf = device(&rogue, Role::Mediator);
        let verdict = check(&authority, &leaf, Expected::role(Role::Mediator), NOW);
        assert_eq!(verdict, Err(VerifyError::OtherOrganisation));
    }

    #[test]
    fn the_pin_is_the_roots_key() {
        let authority = organisation();
        let now = UnixTime::since_unix_epoch(Duration::from_secs(NOW));
        let name = ServerName::try_from("adit.invalid").expect("a name");
        let pin = |fingerprint, role| {
            let leaf = device(&authority, role);
            PinnedVerifier::new(fingerprint)
                .verify_server_cert(&leaf, &[authority.certificate().clone()], &name, &[], now)
                .map(drop)
                .map_err(|error| VerifyError::of(&std::io::Error::other(error)))
        };
        let right = fingerprint(authority.certificate()).expect("a certificate");
        assert_eq!(pin(right, Role::Mediator), Ok(()));
        assert_eq!(pin(right, Role::Agent), Err(Some(VerifyError::WrongRole(Role::Agent))));
        assert_eq!(pin([0; 32], Role::Mediator), Err(Some(VerifyError::WrongFingerprint)));
    }
}
