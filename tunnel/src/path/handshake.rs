//! The mediator's side of the connection handshake (8002/udp), which shows it where an end of a session is.
//!
//! It is a Binding request whose USERNAME is `<session id>:<role>` and whose MESSAGE-INTEGRITY is keyed with
//! that end's own ICE password.

use adit_protocol::{Role, SessionId};

use super::stun::{is_authentic, username};

/// Session and role in the USERNAME of a request that claims to be a handshake.
pub fn claims(request: &[u8]) -> Option<(SessionId, Role)> {
    let (session, role) = username(request)?.split_once(':')?;
    Some((session.parse().ok()?, role.parse().ok()?))
}

/// Whether the request's MESSAGE-INTEGRITY was made with this password.
pub fn proves(request: &[u8], password: &str) -> bool {
    is_authentic(request, password.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use stun_rs::attributes::stun::{MessageIntegrity, UserName};
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
        assert_eq!(claims(&bytes), Some((session, Role::Agent)));
        assert!(proves(&bytes, "secret-of-that-end"));
        assert!(!proves(&bytes, "another"));
        for at in 20..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(!proves(&bad, "secret-of-that-end"), "byte {at}");
        }
        assert_eq!(claims(&request("nonsense", "x")), None);
        assert_eq!(claims(b"nonsense"), None);
    }
}
