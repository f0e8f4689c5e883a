//! The agent's side of QUIC: takes connections from confirmed addresses, for a session that it has, and
//! from that session's technician.

use std::sync::Arc;
use std::time::Duration;

use adit_protocol::{DeviceId, SessionId};
use quinn::crypto::rustls::HandshakeData;
use quinn::{Connection, ConnectionError, Endpoint, Incoming, VarInt};
use rustls::pki_types::CertificateDer;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::demux::Demux;
use super::quic;
use crate::allow::canonical;
use crate::identity::Peer;

/// As long as the technician waits.
const HANDSHAKE: Duration = Duration::from_secs(3);
/// Handshakes at once. One peer has one under way in each session.
const MAX_HANDSHAKES: usize = 64;
/// Sent to a peer that is not let in.
const REFUSED: VarInt = VarInt::from_u32(1);

/// Accepts until the endpoint is gone.
pub(super) async fn run(endpoint: Endpoint, demux: Arc<Demux>) {
    let mut handshakes = JoinSet::new();
    loop {
        tokio::select! {
            incoming = endpoint.accept() => {
                let Some(incoming) = incoming else { return };
                if handshakes.len() < MAX_HANDSHAKES && demux.is_confirmed(canonical(incoming.remote_address())) {
                    let handshake = handshake(incoming, demux.clone());
                    handshakes.spawn(async move {
                        if let Err(error) = timeout(HANDSHAKE, handshake).await.unwrap_or(Err(Refusal::Slow)) {
                            tracing::debug!(%error, "direct connection refused");
                        }
                    });
                } else {
                    incoming.ignore();
                }
            }
            Some(_) = handshakes.join_next() => {}
        }
    }
}

async fn handshake(incoming: Incoming, demux: Arc<Demux>) -> Result<(), Refusal> {
    // The address of the path; the connection's own may change.
    let remote = canonical(incoming.remote_address());
    // From now on it is a technician of our organisation.
    let connection = incoming.accept()?.await?;
    let session = session_of(&connection).and_then(|session| demux.confirmed_session(session, remote));
    let Some(entry) = session.filter(|entry| peer_of(&connection) == Some(entry.peer)) else {
        connection.close(REFUSED, b"not the peer of a session here");
        return Err(Refusal::Stranger);
    };
    entry.accepted.try_send((connection, demux.path(remote))).map_err(|_| Refusal::TooMany)
}

fn session_of(connection: &Connection) -> Option<SessionId> {
    let data = connection.handshake_data()?.downcast::<HandshakeData>().ok()?;
    quic::named_session(data.server_name.as_deref()?)
}

fn peer_of(connection: &Connection) -> Option<DeviceId> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    Peer::from_certificate(chain.first()?).ok().map(|peer| peer.device_id)
}

#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("the handshake took too long")]
    Slow,
    #[error("the handshake failed: {0}")]
    Handshake(#[from] ConnectionError),
    #[error("it is not the peer of a session whose path leads to it")]
    Stranger,
    #[error("the session takes no more connections")]
    TooMany,
}
