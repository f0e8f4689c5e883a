//! quinn's configuration.

use std::sync::Arc;
use std::time::Duration;

use adit_protocol::{DeviceId, Role, SessionId};
use quinn::congestion::BbrConfig;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Endpoint, EndpointConfig, IdleTimeout, ServerConfig, TransportConfig, VarInt};

use super::socket::DirectSocket;
use crate::identity::Identity;
use crate::tls::{self, TlsError};

/// Only the engine's credit binds: its budget of 32 MiB a direction, and room for what was sent again
/// and for control frames. Bytes.
const WINDOW: u32 = 40 * 1024 * 1024;
/// One for each tunnel stream (256), one for control, and those whose end the peer has not seen yet.
const STREAMS: u32 = 4096;
/// Flows are dropped, not queued: some 20 ms at 100 Mbit/s. Bytes.
const DATAGRAMS: usize = 256 * 1024;
/// The engine pings and notices silence long before; this only frees what nobody uses. Milliseconds.
const IDLE: u32 = 60_000;
/// Before anything was measured: typical of a distant peer. QUIC's 333 ms mean a second until a lost
/// first datagram is sent again.
const INITIAL_RTT: Duration = Duration::from_millis(100);
/// Less than this would repeat the first flight before a busy peer has answered.
const LEAST_INITIAL_RTT: Duration = Duration::from_millis(20);
/// Handshakes under way that quinn keeps for us.
const MAX_INCOMING: usize = 64;

/// The endpoint on `socket`.
pub(super) fn endpoint(
    socket: Arc<DirectSocket>,
    server: Option<ServerConfig>,
) -> Result<Endpoint, std::io::Error> {
    let mut config = EndpointConfig::default();
    // The bit tells QUIC from STUN (RFC 9443).
    config.grease_quic_bit(false);
    Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(quinn::TokioRuntime))
}

/// Agents accept; nobody else does. Which technician belongs to which session is checked afterwards.
pub(super) fn server_config(identity: &Identity) -> Result<Option<ServerConfig>, TlsError> {
    if identity.role != Role::Agent {
        return Ok(None);
    }
    let crypto = QuicServerConfig::try_from(tls::tunnel_server(identity, None)?).map_err(no_suite)?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(Arc::new(transport(INITIAL_RTT)));
    config.max_incoming(MAX_INCOMING);
    Ok(Some(config))
}

/// A technician's, for dialling `agent`.
pub(super) fn client_config(identity: &Identity, agent: DeviceId) -> Result<ClientConfig, TlsError> {
    let crypto = QuicClientConfig::try_from(tls::tunnel_client(identity, Some(agent))?).map_err(no_suite)?;
    Ok(ClientConfig::new(Arc::new(crypto)))
}

/// The same for a path with this measured round trip.
pub(super) fn on_path(mut config: ClientConfig, rtt: Duration) -> ClientConfig {
    config.transport_config(Arc::new(transport(rtt.clamp(LEAST_INITIAL_RTT, INITIAL_RTT * 3))));
    config
}

/// The server name that tells the agent which session is meant.
pub(super) fn server_name(session: SessionId) -> String {
    format!("s{session}{DOMAIN}")
}

/// The session that a server name means.
pub(super) fn named_session(server_name: &str) -> Option<SessionId> {
    server_name.strip_prefix('s')?.strip_suffix(DOMAIN)?.parse().ok()
}

const DOMAIN: &str = ".adit.invalid";

fn transport(initial_rtt: Duration) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        // On a line that loses packets Cubic collapses, and BBR holds.
        .congestion_controller_factory(Arc::new(BbrConfig::default()))
        .stream_receive_window(VarInt::from_u32(WINDOW))
        .receive_window(VarInt::from_u32(WINDOW))
        .send_window(WINDOW.into())
        .max_concurrent_uni_streams(VarInt::from_u32(STREAMS))
        // The carrier has none.
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(Some(DATAGRAMS))
        .datagram_send_buffer_size(DATAGRAMS)
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE))))
        .keep_alive_interval(None)
        .initial_rtt(initial_rtt);
    // MTU discovery starts at 1200 bytes, which the path's checks have proved, and is on by default.
    config
}

fn no_suite(_: quinn::crypto::rustls::NoInitialCipherSuite) -> TlsError {
    TlsError::Setup(rustls::Error::General("QUIC needs TLS13_AES_128_GCM_SHA256".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_names_name_sessions() {
        let session = SessionId([0xa5; 16]);
        let name = server_name(session);
        assert_eq!(named_session(&name), Some(session));
        assert!(name.split('.').all(|label| label.len() <= 63));
        for other in ["", "adit.invalid", "s.adit.invalid", "sx.adit.invalid", &name[1..], &name[..40]] {
            assert_eq!(named_session(other), None, "{other}");
        }
    }
}
