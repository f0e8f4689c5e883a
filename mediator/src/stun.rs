//! 8002/udp: STUN, and the connection handshake that shows the mediator where an end of a session is.
//!
//! The answer to a handshake ([`handshake`]) is the plain STUN answer; what the mediator saw goes to the other
//! end of the session on its control channel.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use adit_relay::stun::RateLimit;
use adit_tunnel::path::handshake;
use adit_tunnel::path::stun::binding_response;
use tokio::net::UdpSocket;

use crate::broker::Broker;

/// Answers that one source may get in a second: a NAT with many devices behind it needs tens.
const ANSWERS_A_SECOND: u16 = 200;
/// Larger than any Binding request.
const MAX_REQUEST: usize = 2048;

/// Answers for ever. Cancel safe.
///
/// # Errors
/// None so far; a part of a server may have some.
pub async fn serve(socket: UdpSocket, broker: Arc<Broker>) -> std::io::Result<()> {
    let mut limit = RateLimit::new(ANSWERS_A_SECOND, Instant::now());
    let mut buffer = [0; MAX_REQUEST];
    loop {
        // Errors of single datagrams (ICMP of an earlier answer, for example) end nothing. Waits for each one
        // by `recv_from`, which lets other tasks have their turn in a flood.
        let Ok((length, source)) = socket.recv_from(&mut buffer).await else { continue };
        let request = &buffer[..length];
        if !limit.allows(source.ip(), Instant::now()) {
            continue;
        }
        let Some(answer) = binding_response(request, source) else { continue };
        // UDP may lose it as well as we.
        let _ = socket.try_send_to(&answer, source);
        if let Some((session, role)) = handshake::claims(request)
            && let Some(password) = broker.ice_password(session, role)
            && handshake::proves(request, &password)
        {
            broker.seen(session, role, SocketAddr::new(source.ip().to_canonical(), source.port()));
        }
    }
}
