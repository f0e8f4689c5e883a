//! Device certificates: X.509 with an Ed25519 key, signed by the organisation's root.
//!
//! What a device is stands in URI SANs: `urn:adit:id:<hex>`, `urn:adit:role:<role>`,
//! `urn:adit:name:<name>` and one `urn:adit:tag:<key=value>` for each tag.

use std::net::IpAddr;
use std::time::Duration;

use adit_protocol::{DeviceId, Role};
use aws_lc_rs::digest::{SHA256, digest};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertificateSigningRequestParams,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyUsagePurpose, PublicKeyData,
    RevokedCertParams, SanType, SerialNumber, SignatureAlgorithm,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::DeviceKey;
use super::revocation::serial;

/// How long a device certificate is valid. Seconds.
pub const DEVICE_VALIDITY: u64 = 365 * DAY;
/// How long the organisation's root is valid. Seconds.
pub const ROOT_VALIDITY: u64 = 20 * 365 * DAY;
/// How far back validity starts: room for clocks that are behind. Seconds.
pub const BACKDATE: u64 = DAY;
/// Most tags of a device.
pub const MAX_TAGS: usize = 32;

const DAY: u64 = 24 * 60 * 60;
const MAX_NAME: usize = 63;
const MAX_TAG: usize = 128;
const PREFIX: &str = "urn:adit:";

/// What a certificate says about its device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// Device id.
    pub device_id: DeviceId,
    /// What it may be.
    pub role: Role,
    /// See [`is_name`].
    pub name: String,
    /// See [`is_tag`].
    pub tags: Vec<String>,
}

/// The device at the other end, as its certificate names it. Reading is not verifying: see
/// [`super::verify`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Device id.
    pub device_id: DeviceId,
    /// What it may be.
    pub role: Role,
    /// Its name.
    pub name: String,
    /// `key=value` each.
    pub tags: Vec<String>,
    /// Ed25519 public key.
    pub public_key: [u8; 32],
    /// First second after which it is no longer valid, since 1970-01-01 UTC.
    pub not_after: u64,
}

impl Peer {
    /// Reads a device certificate (DER).
    ///
    /// # Errors
    /// [`CertificateError::NotADevice`] when it is no X.509 certificate with an Ed25519 key and exactly
    /// one id, one role and one name.
    pub fn from_certificate(der: &[u8]) -> Result<Self, CertificateError> {
        let (rest, certificate) = X509Certificate::from_der(der).map_err(|_| CertificateError::NotADevice)?;
        if !rest.is_empty() {
            return Err(CertificateError::NotADevice);
        }
        let names =
            certificate.subject_alternative_name().ok().flatten().ok_or(CertificateError::NotADevice)?;
        let (mut ids, mut roles, mut device_names, mut tags) = (vec![], vec![], vec![], vec![]);
        for name in &names.value.general_names {
            let GeneralName::URI(uri) = name else { continue };
            match uri.strip_prefix(PREFIX).and_then(|rest| rest.split_once(':')) {
                Some(("id", id)) => ids.push(id.parse().map_err(|_| CertificateError::NotADevice)?),
                Some(("role", role)) => roles.push(role.parse().map_err(|_| CertificateError::NotADevice)?),
                Some(("name", name)) => device_names.push(name.to_owned()),
                Some(("tag", tag)) => tags.push(tag.to_owned()),
                _ => {}
            }
        }
        let (&[device_id], &[role], [name]) = (ids.as_slice(), roles.as_slice(), device_names.as_slice())
        else {
            return Err(CertificateError::NotADevice);
        };
        let key = certificate.public_key();
        if key.algorithm.algorithm != x509_parser::oid_registry::OID_SIG_ED25519 {
            return Err(CertificateError::NotADevice);
        }
        let public_key =
            key.subject_public_key.data.as_ref().try_into().map_err(|_| CertificateError::NotADevice)?;
        let not_after = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
        Ok(Self { device_id, role, name: name.clone(), tags, public_key, not_after })
    }
}

/// The organisation's root: makes certificates.
pub struct Authority {
    key: rcgen::KeyPair,
    certificate: CertificateDer<'static>,
}

impl Authority {
    /// A root with this key, valid from `now` (seconds since 1970-01-01 UTC).
    ///
    /// # Errors
    /// [`CertificateError::Make`] when rcgen fails.
    pub fn new(key: &DeviceKey, now: u64) -> Result<Self, CertificateError> {
        let key = key.to_rcgen().map_err(|_| CertificateError::Make)?;
        let mut params = valid(now, ROOT_VALIDITY);
        params.distinguished_name.push(DnType::CommonName, "adit organisation root");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?.der().clone();
        Ok(Self { key, certificate })
    }

    /// An existing root.
    ///
    /// # Errors
    /// [`CertificateError::Make`] when key and certificate do not belong together.
    pub fn load(key: &DeviceKey, certificate: CertificateDer<'static>) -> Result<Self, CertificateError> {
        let (_, parsed) = X509Certificate::from_der(&certificate).map_err(|_| CertificateError::Make)?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.public_key() {
            return Err(CertificateError::Make);
        }
        let key = key.to_rcgen().map_err(|_| CertificateError::Make)?;
        Ok(Self { key, certificate })
    }

    /// The root's own certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// A device certificate for the key in a PKCS #10 request, whose signature (proof of possession)
    /// is verified. Nothing but the key is taken from the request.
    ///
    /// # Errors
    /// [`CertificateError::Request`] when the request is malformed, its signature wrong, or its key not
    /// Ed25519; [`CertificateError::Subject`] when the subject cannot stand in a certificate.
    pub fn sign_request(
        &self,
        csr: &[u8],
        subject: &Subject,
        now: u64,
    ) -> Result<CertificateDer<'static>, CertificateError> {
        let request = read_request(csr)?;
        self.sign(&request.public_key, subject, &[], now)
    }

    /// A new certificate for a device whose key is known and was proven: a renewal, or another name.
    ///
    /// # Errors
    /// [`CertificateError::Subject`] when the subject cannot stand in a certificate.
    pub fn sign_key(
        &self,
        key: &[u8; 32],
        subject: &Subject,
        now: u64,
    ) -> Result<CertificateDer<'static>, CertificateError> {
        self.sign(&RawKey(key), subject, &[], now)
    }

    /// A list (DER) of revoked keys, each with the time of its revocation. `number` grows with every list.
    ///
    /// # Errors
    /// [`CertificateError::Make`] when rcgen fails.
    pub fn revocation_list(
        &self,
        number: u64,
        now: u64,
        revoked: &[([u8; 32], u64)],
    ) -> Result<Vec<u8>, CertificateError> {
        let time = |seconds| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds);
        let entry = |&(key, at): &([u8; 32], u64)| RevokedCertParams {
            serial_number: SerialNumber::from_slice(&serial(&key)),
            revocation_time: time(at),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: time(now),
            // The number decides which list counts; as long as there is no newer one, this one does.
            next_update: time(now.saturating_add(ROOT_VALIDITY)),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let issuer =
            Issuer::from_ca_cert_der(&self.certificate, &self.key).map_err(|_| CertificateError::Make)?;
        Ok(params.signed_by(&issuer)?.der().to_vec())
    }

    /// A certificate for a server of ours: a device certificate with the names and addresses it is
    /// reached by in addition.
    ///
    /// # Errors
    /// [`CertificateError::Subject`] when subject or hosts cannot stand in a certificate.
    pub fn sign_server(
        &self,
        key: &DeviceKey,
        subject: &Subject,
        hosts: &[String],
        now: u64,
    ) -> Result<CertificateDer<'static>, CertificateError> {
        let key = key.to_rcgen().map_err(|_| CertificateError::Make)?;
        self.sign(&key, subject, hosts, now)
    }

    fn sign(
        &self,
        key: &impl PublicKeyData,
        subject: &Subject,
        hosts: &[String],
        now: u64,
    ) -> Result<CertificateDer<'static>, CertificateError> {
        if !is_name(&subject.name) || subject.tags.len() > MAX_TAGS || !subject.tags.iter().all(|t| is_tag(t))
        {
            return Err(CertificateError::Subject);
        }
        let mut params = valid(now, DEVICE_VALIDITY);
        let raw = key.der_bytes().try_into().map_err(|_| CertificateError::Subject)?;
        params.serial_number = Some(SerialNumber::from_slice(&serial(raw)));
        params.distinguished_name.push(DnType::CommonName, subject.name.as_str());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let mut uris = vec![
            format!("{PREFIX}id:{}", subject.device_id),
            format!("{PREFIX}role:{}", subject.role),
            format!("{PREFIX}name:{}", subject.name),
        ];
        uris.extend(subject.tags.iter().map(|tag| format!("{PREFIX}tag:{tag}")));
        for uri in uris {
            let uri = uri.try_into().map_err(|_| CertificateError::Subject)?;
            params.subject_alt_names.push(SanType::URI(uri));
        }
        for host in hosts {
            params.subject_alt_names.push(match host.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(host.as_str().try_into().map_err(|_| CertificateError::Subject)?),
            });
        }
        let issuer =
            Issuer::from_ca_cert_der(&self.certificate, &self.key).map_err(|_| CertificateError::Make)?;
        Ok(params.signed_by(key, &issuer)?.der().clone())
    }
}

/// An Ed25519 public key for rcgen.
struct RawKey<'a>(&'a [u8; 32]);

impl PublicKeyData for RawKey<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_ED25519
    }
}

/// A PKCS #10 request (DER) for this key.
///
/// # Errors
/// [`CertificateError::Make`] when rcgen fails.
pub fn request(key: &DeviceKey) -> Result<Vec<u8>, CertificateError> {
    let key = key.to_rcgen().map_err(|_| CertificateError::Make)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    Ok(params.serialize_request(&key)?.der().to_vec())
}

/// The Ed25519 key in a PKCS #10 request, once its signature is verified.
///
/// # Errors
/// [`CertificateError::Request`], see [`Authority::sign_request`].
pub fn request_key(csr: &[u8]) -> Result<[u8; 32], CertificateError> {
    read_request(csr)?.public_key.der_bytes().try_into().map_err(|_| CertificateError::Request)
}

/// SHA-256 over the SubjectPublicKeyInfo of a certificate: what enrolment tokens pin.
///
/// # Errors
/// [`CertificateError::NotADevice`] when it is no X.509 certificate.
pub fn fingerprint(der: &[u8]) -> Result<[u8; 32], CertificateError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| CertificateError::NotADevice)?;
    let hash = digest(&SHA256, certificate.public_key().raw);
    Ok(hash.as_ref().try_into().expect("SHA-256 has 32 bytes"))
}

/// How a certificate (DER) names its issuer: common name, organisation, or nothing.
pub fn issuer(der: &[u8]) -> String {
    let Ok((_, certificate)) = X509Certificate::from_der(der) else { return "?".to_owned() };
    let issuer = certificate.issuer();
    let mut names = issuer.iter_common_name().chain(issuer.iter_organization());
    names.next().and_then(|name| name.as_str().ok()).unwrap_or("?").chars().take(100).collect()
}

/// Whether a device may have this name: 1 to 63 of `[A-Za-z0-9._-]`.
pub fn is_name(name: &str) -> bool {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    // A name that reads like an id could be taken for another device.
    let reads_like_an_id = name.parse::<DeviceId>().is_ok();
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(allowed) && !reads_like_an_id
}

/// Whether a device may have this tag: `key=value`, at most 128 bytes; the key like a name, the value
/// of `[A-Za-z0-9._:/@+-]`.
pub fn is_tag(tag: &str) -> bool {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || b"._:/@+-".contains(&c);
    tag.len() <= MAX_TAG
        && tag.split_once('=').is_some_and(|(key, value)| is_name(key) && value.bytes().all(allowed))
}

/// What stands before the `=` of a tag.
pub fn tag_key(tag: &str) -> &str {
    tag.split_once('=').map_or(tag, |(key, _)| key)
}

/// Parameters of a certificate without a name, valid for so many seconds from `now` (since 1970-01-01 UTC) on, and
/// [`BACKDATE`] back.
pub fn valid(now: u64, seconds: u64) -> CertificateParams {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.not_before = epoch + Duration::from_secs(now.saturating_sub(BACKDATE));
    params.not_after = epoch + Duration::from_secs(now.saturating_add(seconds));
    params
}

fn read_request(csr: &[u8]) -> Result<CertificateSigningRequestParams, CertificateError> {
    let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr))
        .map_err(|_| CertificateError::Request)?;
    if request.public_key.algorithm() != &rcgen::PKCS_ED25519 {
        return Err(CertificateError::Request);
    }
    Ok(request)
}

/// Why a certificate was not made or not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// Not a certificate of a device of adit.
    #[error("not a device certificate of adit")]
    NotADevice,
    /// Malformed request, wrong signature, or another kind of key.
    #[error("not a certification request with an Ed25519 key and its signature")]
    Request,
    /// Name, tag or host with characters that cannot stand in a certificate.
    #[error("name, tag or host cannot stand in a certificate")]
    Subject,
    /// Making it failed.
    #[error("the certificate could not be made")]
    Make,
}

impl From<rcgen::Error> for CertificateError {
    fn from(_: rcgen::Error) -> Self {
        Self::Make
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn subject() -> Subject {
        Subject {
            device_id: DeviceId([7; 16]),
            role: Role::Agent,
            name: "desk-1".into(),
            tags: vec!["site=berlin".into(), "net=10.0.0.0/8".into()],
        }
    }

    #[test]
    fn a_signed_request_reads_back() {
        let root = Authority::new(&DeviceKey::generate().expect("key"), NOW).expect("root");
        let key = DeviceKey::generate().expect("key");
        let csr = request(&key).expect("csr");
        assert_eq!(request_key(&csr), Ok(key.public_key()));
        let der = root.sign_request(&csr, &subject(), NOW).expect("signs");
        let peer = Peer::from_certificate(&der).expect("a device");
        assert_eq!(
            (peer.device_id, peer.role, peer.name.as_str()),
            (DeviceId([7; 16]), Role::Agent, "desk-1")
        );
        assert_eq!(peer.tags, subject().tags);
        assert_eq!(peer.public_key, key.public_key());
        assert_eq!(peer.not_after, NOW + DEVICE_VALIDITY);
    }

    #[test]
    fn a_request_needs_its_own_keys_signature() {
        let mut csr = request(&DeviceKey::generate().expect("key")).expect("csr");
        let last = csr.len() - 1;
        csr[last] ^= 1;
        assert_eq!(request_key(&csr), Err(CertificateError::Request));
        assert_eq!(request_key(b"nonsense"), Err(CertificateError::Request));
        let ecdsa = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).expect("key");
        let csr = CertificateParams::default().serialize_request(&ecdsa).expect("csr");
        assert_eq!(request_key(csr.der()), Err(CertificateError::Request));
    }

    #[test]
    fn a_root_is_no_device_and_loads_only_with_its_key() {
        let key = DeviceKey::generate().expect("key");
        let root = Authority::new(&key, NOW).expect("root");
        assert_eq!(Peer::from_certificate(root.certificate()), Err(CertificateError::NotADevice));
        assert!(Authority::load(&key, root.certificate().clone()).is_ok());
        let other = DeviceKey::generate().expect("key");
        assert!(Authority::load(&other, root.certificate().clone()).is_err());
    }

    #[test]
    fn names_and_tags_are_plain() {
        assert!(is_name("desk-1.example_x") && !is_name("") && !is_name("a b") && !is_name(&"x".repeat(64)));
        assert!(is_tag("site=") && is_tag("a=b:c/d") && !is_tag("site") && !is_tag("=x") && !is_tag("a=b,c"));
    }
}
