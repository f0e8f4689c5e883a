//! The agent's side of QUIC: takes connections from confirmed addresses, for a session that it has, and
//! from that session's technician.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use adit_protocol::DeviceId;
use quinn::crypto::rustls::HandshakeData;
use quinn::{Connection, ConnectionError, Endpoint, Incoming, VarInt};
use rustls::pki_types::CertificateDer;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::demux::Demux;
use super::quic;
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
                if handshakes.len() < MAX_HANDSHAKES && demux.is_confirmed(incoming.remote_address()) {
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
    let remote = incoming.remote_address();
    let mut connecting = incoming.accept()?;
    let data = connecting.handshake_data().await?;
    let name = data.downcast::<HandshakeData>().ok().and_then(|data| data.server_name);
    let session = name.as_deref().and_then(quic::named_session).ok_or(Refusal::NoSession)?;
    let entry = demux.confirmed_session(session, remote).ok_or(Refusal::NoSession)?;
    let connection = connecting.await?;
    let peer = peer_of(&connection);
    if peer != Some(entry.peer) {
        connection.close(REFUSED, b"not the peer of this session");
        return Err(Refusal::OtherDevice);
    }
    entry.accepted.try_send(connection).map_err(|_| Refusal::TooMany(remote))
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
    #[error("it names no session whose path leads to it")]
    NoSession,
    #[error("it is not the peer of the session that it names")]
    OtherDevice,
    #[error("{0} connects faster than connections are taken")]
    TooMany(SocketAddr),
}
