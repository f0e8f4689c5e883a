//! The certificate that browsers see on the HTTPS port: from files of the operator's, or made here.
//!
//! Browsers take no Ed25519 certificates, so there is a second root for them, ECDSA P-256, which vouches for
//! host names only: no device ever trusts it.
//!
//! | file | what |
//! | --- | --- |
//! | `web-root-key.pem`, `web-root.pem` | the root that browsers are told to trust |
//! | `https-key.pem`, `https.pem` | this server's, for the host names in `config.toml` |

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use adit_client::identity::certificate::valid;
use adit_client::identity::store::{self, Access};
use adit_client::tls::provider;
use rcgen::{
    BasicConstraints, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tracing::{info, warn};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::config::Https;
use crate::server::unix_now;

/// Name of the file in the directory, as are the next three.
pub const ROOT_KEY: &str = "web-root-key.pem";
/// See [`ROOT_KEY`].
pub const ROOT: &str = "web-root.pem";
/// See [`ROOT_KEY`].
pub const KEY: &str = "https-key.pem";
/// See [`ROOT_KEY`].
pub const CERTIFICATE: &str = "https.pem";
const DAY: u64 = 24 * 60 * 60;
/// Browsers refuse more than 398 days.
const VALIDITY: u64 = 397 * DAY;
const ROOT_VALIDITY: u64 = 20 * 365 * DAY;
/// How often files are looked at.
const LOOK: Duration = Duration::from_secs(5);

/// Where certificate and key are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// The chain, the server's own first (PEM).
    pub certificate: PathBuf,
    /// Its key (PEM).
    pub key: PathBuf,
}

/// The certificate in use, and the files that it came from.
#[derive(Debug)]
pub struct Certificates {
    files: Files,
    /// Made here, and to be kept fit for use.
    own: Option<PathBuf>,
    current: RwLock<(Stamp, Arc<CertifiedKey>)>,
}

/// When both files were last changed, and how long they are.
type Stamp = [Option<(SystemTime, u64)>; 2];

impl Certificates {
    /// Those of the operator.
    ///
    /// # Errors
    /// [`HttpsError`] names the file.
    pub fn open(files: Files) -> Result<Arc<Self>, HttpsError> {
        let current = RwLock::new((stamp(&files), read(&files)?));
        Ok(Arc::new(Self { files, own: None, current }))
    }

    /// Those that a server shows: the operator's, when there are both files, else its own for `hosts`.
    ///
    /// # Errors
    /// [`HttpsError`].
    pub fn of(dir: &Path, https: &Https, hosts: &[String]) -> Result<Arc<Self>, HttpsError> {
        match (&https.cert, &https.key) {
            (Some(certificate), Some(key)) => {
                Self::open(Files { certificate: certificate.clone(), key: key.clone() })
            }
            _ => Self::own(dir, hosts),
        }
    }

    /// Those made here for `hosts`; they are made when they are not there, or are for others.
    ///
    /// # Errors
    /// [`HttpsError`].
    pub fn own(dir: &Path, hosts: &[String]) -> Result<Arc<Self>, HttpsError> {
        make(dir, hosts)?;
        let files = Files { certificate: dir.join(CERTIFICATE), key: dir.join(KEY) };
        let current = RwLock::new((stamp(&files), read(&files)?));
        Ok(Arc::new(Self { files, own: Some(dir.to_owned()), current }))
    }

    /// Makes what was made here anew when it ends soon or is for other hosts, and takes files that have changed.
    pub fn refresh(&self, hosts: &[String]) {
        if let Some(dir) = &self.own
            && let Err(error) = make(dir, hosts)
        {
            warn!(%error, "the certificate for browsers could not be made");
        }
        let now = stamp(&self.files);
        if self.current.read().unwrap_or_else(PoisonError::into_inner).0 == now {
            return;
        }
        match read(&self.files) {
            Ok(key) => {
                info!(certificate = %self.files.certificate.display(), "a new certificate for browsers is in use");
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = (now, key);
            }
            // Perhaps one of the two files is not written yet: they are looked at again.
            Err(error) => warn!(%error, "the certificate for browsers stays as it is"),
        }
    }

    /// Looks at the files again and again. Cancel safe.
    pub async fn watch(&self, hosts: impl Fn() -> Vec<String>) {
        let mut ticks = tokio::time::interval(LOOK);
        loop {
            ticks.tick().await;
            self.refresh(&hosts());
        }
    }

    fn current(&self) -> Arc<CertifiedKey> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).1.clone()
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

fn stamp(files: &Files) -> Stamp {
    [&files.certificate, &files.key].map(|file| {
        let metadata = fs::metadata(file).ok()?;
        Some((metadata.modified().ok()?, metadata.len()))
    })
}

fn read(files: &Files) -> Result<Arc<CertifiedKey>, HttpsError> {
    let bad = |path: &Path, why: String| HttpsError { path: path.to_owned(), why };
    let chain: Result<Vec<CertificateDer<'static>>, _> =
        CertificateDer::pem_file_iter(&files.certificate).and_then(Iterator::collect);
    let chain = chain.map_err(|error| bad(&files.certificate, error.to_string()))?;
    if chain.is_empty() {
        return Err(bad(&files.certificate, "no certificate in it".into()));
    }
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| bad(&files.key, error.to_string()))?;
    let key = CertifiedKey::from_der(chain, key, &provider())
        .map_err(|error| bad(&files.key, error.to_string()))?;
    Ok(Arc::new(key))
}

/// Makes root and certificate where they are missing, for other hosts, or near their end.
fn make(dir: &Path, hosts: &[String]) -> Result<(), HttpsError> {
    let failed = |file: &str, why: String| HttpsError { path: dir.join(file), why };
    if fits(&dir.join(CERTIFICATE), hosts) && dir.join(KEY).exists() {
        return Ok(());
    }
    let written = |file: &str, text: &str, access| {
        store::write(dir, file, text.as_bytes(), access).map_err(|error| failed(file, error.to_string()))
    };
    let made = |file: &'static str| move |error: rcgen::Error| failed(file, error.to_string());
    let now = unix_now();
    let root_key = match fs::read_to_string(dir.join(ROOT_KEY)) {
        Ok(pem) => KeyPair::from_pem(&pem).map_err(made(ROOT_KEY))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(made(ROOT_KEY))?;
            let mut params = valid(now, ROOT_VALIDITY);
            params.distinguished_name.push(DnType::CommonName, "adit root for browsers");
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            let root = params.self_signed(&key).map_err(made(ROOT))?;
            written(ROOT, &root.pem(), Access::Public)?;
            written(ROOT_KEY, &key.serialize_pem(), Access::Secret)?;
            key
        }
        Err(error) => return Err(failed(ROOT_KEY, error.to_string())),
    };
    let root = fs::read_to_string(dir.join(ROOT)).map_err(|error| failed(ROOT, error.to_string()))?;
    let issuer = Issuer::from_ca_cert_pem(&root, &root_key).map_err(made(ROOT))?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(made(KEY))?;
    let mut params = valid(now, VALIDITY);
    let name = hosts.first().map_or("adit", String::as_str);
    // A common name has 64 characters at most; what counts are the alternative names.
    params.distinguished_name.push(DnType::CommonName, name.chars().take(64).collect::<String>());
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    for host in hosts {
        params.subject_alt_names.push(match host.parse::<IpAddr>() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => SanType::DnsName(host.as_str().try_into().map_err(made(CERTIFICATE))?),
        });
    }
    let certificate = params.signed_by(&key, &issuer).map_err(made(CERTIFICATE))?;
    written(KEY, &key.serialize_pem(), Access::Secret)?;
    written(CERTIFICATE, &format!("{}{root}", certificate.pem()), Access::Public)
}

/// Whether the certificate in this file is for just these hosts, and has a third of its life left.
fn fits(file: &Path, hosts: &[String]) -> bool {
    let Ok((mut named, ends)) = inspect(file) else { return false };
    let mut wanted: Vec<String> = hosts.iter().map(|host| canonical(host)).collect();
    named.sort_unstable();
    wanted.sort_unstable();
    named == wanted && ends > unix_now() + VALIDITY / 3
}

/// Whether a certificate with these names is good for `host`; a wildcard stands for one label (RFC 6125 section
/// 6.4.3).
pub fn covers(names: &[String], host: &str) -> bool {
    let host = canonical(host);
    let wildcard = host.split_once('.').map(|(_, rest)| format!("*.{rest}"));
    names.iter().any(|name| *name == host || wildcard.as_deref() == Some(name))
}

/// A host name in lower case, or an address as it is usually written.
pub fn canonical(host: &str) -> String {
    host.parse::<IpAddr>().map_or_else(|_| host.to_ascii_lowercase(), |ip| ip.to_string())
}

/// The names (in lower case) and addresses of the first certificate in a file (PEM), and when it ends, in seconds since
/// 1970-01-01 UTC.
///
/// # Errors
/// What is wrong, with the file's name.
pub fn inspect(file: &Path) -> Result<(Vec<String>, u64), String> {
    let bad = |why: &dyn std::fmt::Display| format!("{}: {why}", file.display());
    let der = CertificateDer::from_pem_file(file).map_err(|error| bad(&error))?;
    let (_, certificate) = X509Certificate::from_der(&der).map_err(|error| bad(&error))?;
    let names = certificate.subject_alternative_name().ok().flatten();
    let named: Vec<String> = names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| match name {
            x509_parser::prelude::GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
            x509_parser::prelude::GeneralName::IPAddress(bytes) => match bytes.len() {
                4 => <[u8; 4]>::try_from(*bytes).ok().map(|ip| IpAddr::from(ip).to_string()),
                _ => <[u8; 16]>::try_from(*bytes).ok().map(|ip| IpAddr::from(ip).to_string()),
            },
            _ => None,
        })
        .collect();
    let ends = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
    Ok((named, ends))
}

/// Certificate or key for browsers cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", path.display())]
pub struct HttpsError {
    path: PathBuf,
    why: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(list: &[&str]) -> Vec<String> {
        list.iter().map(|host| (*host).to_owned()).collect()
    }

    #[test]
    fn a_certificate_is_made_once_and_anew_for_other_hosts() {
        let dir = tempfile::tempdir().expect("tempdir");
        let first = Certificates::own(dir.path(), &hosts(&["adit.example.org", "192.0.2.1"])).expect("makes");
        let again = Certificates::own(dir.path(), &hosts(&["192.0.2.1", "Adit.example.org"])).expect("reads");
        assert_eq!(first.current().cert, again.current().cert);
        assert_eq!(first.current().cert.len(), 2, "the root is sent along");
        let root = fs::read(dir.path().join(ROOT)).expect("reads");
        first.refresh(&hosts(&["New.example.org"]));
        assert_ne!(first.current().cert[0], again.current().cert[0]);
        assert_eq!(
            root,
            fs::read(dir.path().join(ROOT)).expect("reads"),
            "browsers trust the same root as before"
        );
        assert!(fits(&dir.path().join(CERTIFICATE), &hosts(&["new.example.org"])));
    }

    #[test]
    fn wildcards_stand_for_one_label() {
        let names = hosts(&["*.example.org", "192.0.2.1"]);
        assert!(covers(&names, "A.example.org") && covers(&names, "192.0.2.1"));
        assert!(!covers(&names, "example.org") && !covers(&names, "a.b.example.org"));
    }

    #[test]
    fn the_operators_files_are_taken_when_they_change_and_broken_ones_are_not() {
        let (dir, other) = (tempfile::tempdir().expect("tempdir"), tempfile::tempdir().expect("tempdir"));
        make(dir.path(), &hosts(&["a.example.org"])).expect("makes");
        make(other.path(), &hosts(&["a.example.org"])).expect("makes");
        let files = Files { certificate: dir.path().join(CERTIFICATE), key: dir.path().join(KEY) };
        let certificates = Certificates::open(files.clone()).expect("reads");
        let before = certificates.current();
        // A new certificate whose key is not there yet, then the key.
        fs::copy(other.path().join(CERTIFICATE), &files.certificate).expect("copies");
        certificates.refresh(&[]);
        assert_eq!(certificates.current().cert, before.cert);
        fs::copy(other.path().join(KEY), &files.key).expect("copies");
        certificates.refresh(&[]);
        assert_ne!(certificates.current().cert, before.cert);
        fs::write(&files.key, "nonsense").expect("writes");
        let after = certificates.current();
        certificates.refresh(&[]);
        assert_eq!(certificates.current().cert, after.cert);
        let error = Certificates::open(files).expect_err("is broken");
        assert!(error.to_string().contains(KEY), "{error}");
    }
}
