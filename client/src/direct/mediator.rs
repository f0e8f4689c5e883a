//! Shows the mediator where this end of a session is, on 8002/udp from the very socket that the peer will
//! be reached from.
//!
//! The path engine asks every STUN server for its address. What it asks the mediator is sealed here: the
//! same request, with session and role as USERNAME and MESSAGE-INTEGRITY under this end's ICE password.
//! So the mediator can tell the peer at once what it saw, and the engine's retransmissions serve both.

use std::net::SocketAddr;

use adit_protocol::{Role, SessionId};
use adit_tunnel::path::{IceRole, InvalidCredentials, Transmit, stun};
use stun_rs::attributes::stun::{MessageIntegrity, UserName};
use stun_rs::methods::BINDING;
use stun_rs::{HMACKey, MessageClass, MessageEncoder, StunMessageBuilder, TransactionId};

/// Longer than any handshake: header, 48 bytes of USERNAME, 24 of MESSAGE-INTEGRITY.
const MOST: usize = 128;

/// Seals requests for one session.
pub(super) struct Handshake {
    username: UserName,
    key: HMACKey,
    mediator: Vec<SocketAddr>,
}

impl Handshake {
    /// # Errors
    /// [`InvalidCredentials`] when `password` cannot be a key.
    pub(super) fn new(session: SessionId, role: IceRole, password: &str) -> Result<Self, InvalidCredentials> {
        let role = match role {
            IceRole::Controlling => Role::Technician,
            IceRole::Controlled => Role::Agent,
        };
        let username = UserName::new(format!("{session}:{role}")).map_err(|_| InvalidCredentials)?;
        let key = HMACKey::new_short_term(password).map_err(|_| InvalidCredentials)?;
        Ok(Self { username, key, mediator: vec![] })
    }

    /// Where the mediator is.
    pub(super) fn set_mediator(&mut self, mediator: Vec<SocketAddr>) {
        self.mediator = mediator;
    }

    /// Makes a handshake of a plain Binding request to the mediator; everything else stays as it is.
    pub(super) fn seal(&self, transmit: Transmit) -> Transmit {
        if !self.mediator.contains(&transmit.destination) || transmit.payload.len() != stun::HEADER {
            return transmit;
        }
        let Some(id) = transmit.payload.last_chunk::<12>() else { return transmit };
        let message = StunMessageBuilder::new(BINDING, MessageClass::Request)
            .with_transaction_id(TransactionId::from(*id))
            .with_attribute(self.username.clone())
            .with_attribute(MessageIntegrity::new(self.key.clone()))
            .build();
        let mut payload = vec![0; MOST];
        match MessageEncoder::default().encode(&mut payload, &message) {
            Ok(length) => {
                payload.truncate(length);
                Transmit { payload, ..transmit }
            }
            Err(_) => transmit,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use adit_tunnel::path::LocalSocket;
    use stun_rs::{DecoderContextBuilder, MessageDecoderBuilder};

    #[test]
    fn what_goes_to_the_mediator_names_and_proves_the_session() {
        let session = SessionId([7; 16]);
        let password = "a-password-of-24-letters";
        let mut handshake = Handshake::new(session, IceRole::Controlled, password).expect("good credentials");
        let mediator = "192.0.2.1:8002".parse().expect("an address");
        handshake.set_mediator(vec![mediator]);
        let socket = LocalSocket::DEVICE;
        let payload = stun::binding_request([9; 12]).to_vec();
        let plain = |destination| Transmit { socket, hops: None, destination, payload: payload.clone() };

        let sealed = handshake.seal(plain(mediator));
        let key = HMACKey::new_short_term(password).expect("a key");
        let context = DecoderContextBuilder::default().with_key(key).with_validation().build();
        let decoder = MessageDecoderBuilder::default().with_context(context).build();
        let (message, _) = decoder.decode(&sealed.payload).expect("authentic");
        assert_eq!(message.transaction_id().as_bytes(), &[9; 12], "the engine takes the answer for its own");
        let username = message.get::<UserName>().and_then(|name| name.as_user_name().ok()).expect("a name");
        assert_eq!(username.as_str(), format!("{session}:agent"));
        assert!(message.get::<MessageIntegrity>().is_some());

        let other = plain("192.0.2.2:8002".parse().expect("an address"));
        assert_eq!(handshake.seal(other.clone()), other);
        let check = Transmit { payload: vec![0; 100], ..plain(mediator) };
        assert_eq!(handshake.seal(check.clone()), check);
    }
}
