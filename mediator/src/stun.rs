//! 8002/udp: STUN, and the connection handshake that shows the mediator where an end of a session is.
//!
//! The handshake is a Binding request whose USERNAME is `<session id>:<role>` and whose
//! MESSAGE-INTEGRITY is keyed with that end's own ICE password. Its answer is the plain STUN answer;
//! what the mediator saw goes to the other end of the session on its control channel.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use adit_protocol::{Role, SessionId};
use adit_relay::stun::RateLimit;
use adit_tunnel::path::stun::{binding_response, is_authentic, is_stun};
use stun_rs::MessageDecoderBuilder;
use stun_rs::attributes::stun::{MessageIntegrity, UserName};
use tokio::net::UdpSocket;

use crate::broker::Broker;

/// Answers that one source may get in a second: a NAT with many devices behind it needs tens.
const ANSWERS_A_SECOND: u16 = 200;
/// An answer has at most 1.6 times (IPv4) or 2.2 times (IPv6) the bytes of its request.
const MOST_TENTHS: (usize, usize) = (16, 22);
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
        let most = if source.ip().to_canonical().is_ipv4() { MOST_TENTHS.0 } else { MOST_TENTHS.1 };
        if answer.len() * 10 > length * most {
            continue;
        }
        // UDP may lose it as well as we.
        let _ = socket.try_send_to(&answer, source);
        if let Some((session, role)) = handshake(request)
            && let Some(password) = broker.ice_password(session, role)
            && proves(request, &password)
        {
            broker.seen(session, role, SocketAddr::new(source.ip().to_canonical(), source.port()));
        }
    }
}

/// Session and role in the USERNAME of a request that claims to be a handshake.
fn handshake(request: &[u8]) -> Option<(SessionId, Role)> {
    if !is_stun(request) {
        return None;
    }
    let (message, _) = MessageDecoderBuilder::default().build().decode(request).ok()?;
    let username = message.get::<UserName>()?.as_user_name().ok()?.as_str().to_owned();
    message.get::<MessageIntegrity>()?;
    let (session, role) = username.split_once(':')?;
    Some((session.parse().ok()?, role.parse().ok()?))
}

/// Whether the request's MESSAGE-INTEGRITY was made with this password.
fn proves(request: &[u8], password: &str) -> bool {
    is_authentic(request, password.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use stun_rs::methods::BINDING;
    use stun_rs::{HMACKey, MessageClass, MessageEncoderBuilder, StunMessageBuilder};

    fn request(username: &str, password: &str) -> Vec<u8> {
        let message = StunMessageBuilder::new(BINDING, MessageClass::Request)
            .with_attribute(UserName::new(username).expect("a name"))
            .with_attribute(MessageIntegrity::new(HMACKey::new_short_term(password).expect("a key")))
            .build();
        let mut buffer = vec![0; 256];
        let length = MessageEncoderBuilder::default().build().encode(&mut buffer, &message).expect("fits");
        buffer.truncate(length);
        buffer
    }

    #[test]
    fn a_handshake_names_its_session_and_proves_it() {
        let session = SessionId([7; 16]);
        let bytes = request(&format!("{session}:agent"), "secret-of-that-end");
        assert_eq!(handshake(&bytes), Some((session, Role::Agent)));
        assert!(proves(&bytes, "secret-of-that-end"));
        assert!(!proves(&bytes, "another"));
        for at in 20..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(!proves(&bad, "secret-of-that-end"), "byte {at}");
        }
        assert_eq!(handshake(&request("nonsense", "x")), None);
        assert_eq!(handshake(b"nonsense"), None);
    }
}
