//! TLS configurations: 1.3 only, aws-lc-rs, hybrid post-quantum key exchange, no resumption, no 0-RTT.

use std::io;
use std::sync::{Arc, LazyLock};

use adit_protocol::{ALPN_CONTROL, ALPN_ENROL, ALPN_TUNNEL, DeviceId, Role};
use rustls::client::Resumption;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::NoServerSessionStorage;
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, BufReader};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use crate::identity::Identity;
use crate::identity::verify::{DeviceVerifier, Expected, PinnedVerifier, VerifyError};

/// Ciphertext that a carrier reads at once. rustls alone asks the system for 4 KiB at a time, which for a
/// record of 16 KiB is five system calls.
const READ_AHEAD: usize = 64 * 1024;

/// TLS of a carrier over a byte stream.
pub type CarrierStream<S> = TlsStream<BufReader<S>>;

/// Control channel, device's side: the other end must be a mediator of our organisation.
///
/// # Errors
/// [`TlsError`] when the identity's key or certificates cannot be used.
pub fn control_client(identity: &Identity) -> Result<ClientConfig, TlsError> {
    client(identity, Expected::role(Role::Mediator), ALPN_CONTROL)
}

/// A relay's HTTPS port, device's side: the other end must be a relay of our organisation, or the mediator with one in
/// it. Which relay it is, the ticket says: it is of no use to another.
///
/// # Errors
/// See [`control_client`].
pub fn relay_client(identity: &Identity) -> Result<ClientConfig, TlsError> {
    let expected = Expected { roles: vec![Role::Relay, Role::Mediator], device: None };
    client(identity, expected, ALPN_CONTROL)
}

/// Control channel, mediator's side: any agent, technician or relay of our organisation.
///
/// # Errors
/// See [`control_client`].
pub fn control_server(identity: &Identity) -> Result<ServerConfig, TlsError> {
    let expected = Expected { roles: vec![Role::Agent, Role::Technician, Role::Relay], device: None };
    server(identity, expected, ALPN_CONTROL)
}

/// Enrolment, device's side: no certificate yet; the server's root is pinned by `fingerprint`.
///
/// # Errors
/// See [`control_client`].
pub fn enrol_client(fingerprint: [u8; 32]) -> Result<ClientConfig, TlsError> {
    let config = client_builder(Arc::new(PinnedVerifier::new(fingerprint)))?.with_no_client_auth();
    Ok(finish_client(config, ALPN_ENROL))
}

/// Enrolment, mediator's side: asks for no certificate and sends the root in its chain.
///
/// # Errors
/// See [`control_client`].
pub fn enrol_server(identity: &Identity) -> Result<ServerConfig, TlsError> {
    let chain = vec![identity.certificate.clone(), identity.root.clone()];
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, identity.key.to_rustls())?;
    Ok(finish_server(config, ALPN_ENROL))
}

/// Carrier of a tunnel, technician's side (always the TLS and QUIC client): the other end must be
/// `agent`; with `None` any agent of our organisation, and the caller compares the peer with its session before any byte
/// is taken.
///
/// # Errors
/// See [`control_client`].
pub fn tunnel_client(identity: &Identity, agent: Option<DeviceId>) -> Result<ClientConfig, TlsError> {
    client(identity, Expected { roles: vec![Role::Agent], device: agent }, ALPN_TUNNEL)
}

/// Carrier of a tunnel, agent's side: the other end must be `technician`; with `None` any technician
/// of our organisation, and the caller compares the peer with its session before any byte is taken.
///
/// # Errors
/// See [`control_client`].
pub fn tunnel_server(identity: &Identity, technician: Option<DeviceId>) -> Result<ServerConfig, TlsError> {
    server(identity, Expected { roles: vec![Role::Technician], device: technician }, ALPN_TUNNEL)
}

/// Carrier of a session through a redirector, agent's side: the other end must be that `redirector`, in a relay or in the
/// mediator.
///
/// # Errors
/// See [`control_client`].
pub fn redirector_server(identity: &Identity, redirector: DeviceId) -> Result<ServerConfig, TlsError> {
    let roles = vec![Role::Relay, Role::Mediator];
    server(identity, Expected { roles, device: Some(redirector) }, ALPN_TUNNEL)
}

/// TLS handshake of a carrier over `stream`, technician's side. The deadline is the caller's.
///
/// # Errors
/// The stream's, and those of the handshake.
pub async fn carrier_connect<S>(config: Arc<ClientConfig>, stream: S) -> io::Result<CarrierStream<S>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let stream = BufReader::with_capacity(READ_AHEAD, stream);
    let mut tls = TlsConnector::from(config).connect(tunnel_server_name(), stream).await?;
    // The session engine bounds what is on the way; cut into pieces it would cost a system call each.
    tls.get_mut().1.set_buffer_limit(None);
    Ok(tls.into())
}

/// The same, agent's side.
///
/// # Errors
/// See [`carrier_connect`].
pub async fn carrier_accept<S>(config: Arc<ServerConfig>, stream: S) -> io::Result<CarrierStream<S>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let stream = BufReader::with_capacity(READ_AHEAD, stream);
    let mut tls = TlsAcceptor::from(config).accept(stream).await?;
    tls.get_mut().1.set_buffer_limit(None);
    Ok(tls.into())
}

/// The server name to dial `server` (`HOST:PORT`) with. Nothing depends on it: roles and device ids in
/// our own certificates are what counts.
pub fn server_name(server: &str) -> ServerName<'static> {
    let host = server.rsplit_once(':').map_or(server, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    ServerName::try_from(host.to_owned()).unwrap_or_else(|_| tunnel_server_name())
}

/// The server name of all carriers of tunnels.
pub fn tunnel_server_name() -> ServerName<'static> {
    ServerName::try_from("adit.invalid").expect("a DNS name")
}

/// The one cryptography provider: X25519MLKEM768 first; AES-128-GCM first where the processor has AES.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        let aes = cipher_suite::TLS13_AES_128_GCM_SHA256;
        let chacha = cipher_suite::TLS13_CHACHA20_POLY1305_SHA256;
        let (first, second) = if has_aes() { (aes, chacha) } else { (chacha, aes) };
        Arc::new(CryptoProvider {
            cipher_suites: vec![first, second, cipher_suite::TLS13_AES_256_GCM_SHA384],
            kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519],
            ..aws_lc_rs::default_provider()
        })
    });
    PROVIDER.clone()
}

fn client(identity: &Identity, expected: Expected, alpn: &[u8]) -> Result<ClientConfig, TlsError> {
    let config = client_builder(Arc::new(DeviceVerifier::new(identity, expected)?))?
        .with_client_auth_cert(chain(identity), identity.key.to_rustls())?;
    Ok(finish_client(config, alpn))
}

fn client_builder(
    verifier: Arc<dyn ServerCertVerifier>,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>, TlsError> {
    Ok(ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier))
}

fn finish_client(mut config: ClientConfig, alpn: &[u8]) -> ClientConfig {
    config.alpn_protocols = vec![alpn.to_vec()];
    // A resumed session would skip the certificate check.
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config
}

fn server(identity: &Identity, expected: Expected, alpn: &[u8]) -> Result<ServerConfig, TlsError> {
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(DeviceVerifier::new(identity, expected)?))
        .with_single_cert(chain(identity), identity.key.to_rustls())?;
    Ok(finish_server(config, alpn))
}

fn finish_server(mut config: ServerConfig, alpn: &[u8]) -> ServerConfig {
    config.alpn_protocols = vec![alpn.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    config
}

/// Everyone of our organisation has the root; only enrolment sends it along.
fn chain(identity: &Identity) -> Vec<CertificateDer<'static>> {
    vec![identity.certificate.clone()]
}

fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

/// An identity that TLS cannot use.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Key and certificate do not fit, or a build without what we need.
    #[error("TLS cannot be set up: {0}")]
    Setup(#[from] rustls::Error),
    /// The root is no certificate.
    #[error("the organisation's root certificate cannot be read")]
    Root(#[from] VerifyError),
}
