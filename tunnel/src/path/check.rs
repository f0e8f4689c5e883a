//! Connectivity checks on the wire (RFC 8445 section 7): Binding requests and responses under the
//! session's short-term credentials.

use std::fmt;
use std::net::SocketAddr;

use stun_rs::attributes::StunAttribute;
use stun_rs::attributes::discovery::Padding;
use stun_rs::attributes::ice::{IceControlled, IceControlling, Priority, UseCandidate};
use stun_rs::attributes::stun::{ErrorCode, Fingerprint, MessageIntegrity, UserName, XorMappedAddress};
use stun_rs::methods::BINDING;
use stun_rs::{
    DecoderContextBuilder, HMACKey, MessageClass, MessageDecoder, MessageDecoderBuilder, MessageEncoder,
    StunMessage, StunMessageBuilder,
};

use super::candidate::CandidateKind;
use super::stun::{self, TransactionId};

/// Length in bytes (UDP payload) of the checks that prove that QUIC fits: its smallest datagram (RFC
/// 9000 section 14.1).
pub const FULL_SIZE: usize = 1200;

/// Bytes of a check apart from username, USE-CANDIDATE and padding: header, headers of USERNAME and
/// PADDING, PRIORITY, role, MESSAGE-INTEGRITY, FINGERPRINT.
const OVERHEAD: usize = stun::HEADER + 4 + 4 + 8 + 12 + 24 + 8;

/// Comprehension-required attributes of checks and their responses: USERNAME, MESSAGE-INTEGRITY,
/// ERROR-CODE, XOR-MAPPED-ADDRESS, PRIORITY, USE-CANDIDATE, PADDING. A message with others is not of an
/// adit, and is not shown to the decoder.
const EXPECTED: [u16; 7] = [0x0006, 0x0008, 0x0009, 0x0020, 0x0024, 0x0025, 0x0026];

/// Which end decides on the path (RFC 8445 section 2.3). The roles of a session are fixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IceRole {
    /// The technician: starts rounds and nominates.
    Controlling,
    /// The agent.
    Controlled,
}

/// Username fragment and password of one end (RFC 8445 section 5.3).
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    ufrag: String,
    key: HMACKey,
}

/// Not a username fragment of 4 to 64, and a password of 22 to 256, letters, digits, `+` and `/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("ICE credentials must be a fragment of 4 to 64 and a password of 22 to 256 letters, digits, + or /")]
pub struct InvalidCredentials;

impl Credentials {
    /// # Errors
    /// [`InvalidCredentials`] says what they must look like.
    pub fn new(ufrag: &str, password: &str) -> Result<Self, InvalidCredentials> {
        let plain = |text: &str| {
            text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'+' || byte == b'/')
        };
        let fits = (4..=64).contains(&ufrag.len()) && (22..=256).contains(&password.len());
        if !fits || !plain(ufrag) || !plain(password) {
            return Err(InvalidCredentials);
        }
        let key = HMACKey::new_short_term(password).map_err(|_| InvalidCredentials)?;
        Ok(Self { ufrag: ufrag.to_owned(), key })
    }

    /// The username fragment.
    pub fn ufrag(&self) -> &str {
        &self.ufrag
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The password is a secret.
        f.debug_struct("Credentials").field("ufrag", &self.ufrag).finish_non_exhaustive()
    }
}

/// A check that the peer sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) id: TransactionId,
    /// The role that the peer says it has.
    pub(super) role: IceRole,
    pub(super) use_candidate: bool,
    /// It is at least [`FULL_SIZE`] long.
    pub(super) full_size: bool,
}

/// What the peer answered to a check of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Response {
    /// It came, from this address.
    Success(SocketAddr),
    /// It was refused.
    Error,
}

/// A datagram that belongs to this agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// Authentic: the peer has our password.
    Request(Request),
    /// It bears our username but is not authentic, or makes no sense.
    Forged,
}

/// Encodes and decodes checks for one agent.
pub(super) struct Codec {
    role: IceRole,
    tie_breaker: u64,
    local: Credentials,
    /// USERNAME of requests that come in, and of those that go out.
    incoming: String,
    outgoing: UserName,
    remote: Credentials,
    requests: MessageDecoder,
    responses: MessageDecoder,
}

impl Codec {
    pub(super) fn new(role: IceRole, tie_breaker: u64, local: Credentials, remote: Credentials) -> Self {
        let decoder = |credentials: &Credentials| {
            let context =
                DecoderContextBuilder::default().with_key(credentials.key.clone()).with_validation();
            MessageDecoderBuilder::default().with_context(context.build()).build()
        };
        let outgoing = UserName::new(format!("{}:{}", remote.ufrag, local.ufrag))
            .expect("fragments are short and of plain characters");
        Self {
            role,
            tie_breaker,
            incoming: format!("{}:{}", local.ufrag, remote.ufrag),
            outgoing,
            requests: decoder(&local),
            responses: decoder(&remote),
            local,
            remote,
        }
    }

    /// A check. One of full size nominates, if we are the one that nominates (RFC 8445 section 8.1.1).
    pub(super) fn request(&self, id: TransactionId, full_size: bool) -> Vec<u8> {
        let mut message = StunMessageBuilder::new(BINDING, MessageClass::Request)
            .with_transaction_id(id.into())
            .with_attribute(self.outgoing.clone())
            .with_attribute(Priority::from(CandidateKind::PeerReflexive.priority()));
        message = match self.role {
            IceRole::Controlling => message.with_attribute(IceControlling::from(self.tie_breaker)),
            IceRole::Controlled => message.with_attribute(IceControlled::from(self.tie_breaker)),
        };
        if full_size {
            let mut padding = FULL_SIZE - OVERHEAD - self.incoming.len().next_multiple_of(4);
            if self.role == IceRole::Controlling {
                message = message.with_attribute(UseCandidate::default());
                padding -= 4;
            }
            message = message.with_attribute(Padding::new(" ".repeat(padding)).expect("spaces are text"));
        }
        self.seal(message, &self.remote)
    }

    /// The answer to a check from `source`.
    pub(super) fn success(&self, id: TransactionId, source: SocketAddr) -> Vec<u8> {
        let message = StunMessageBuilder::new(BINDING, MessageClass::SuccessResponse)
            .with_transaction_id(id.into())
            .with_attribute(XorMappedAddress::from(source));
        self.seal(message, &self.local)
    }

    /// The answer to a peer that says it has our role (RFC 8445 section 7.3.1.1). Roles are fixed: there
    /// is nothing to switch.
    pub(super) fn role_conflict(&self, id: TransactionId) -> Vec<u8> {
        let code = stun_rs::ErrorCode::new(487, "Role Conflict").expect("487 is an error code");
        let message = StunMessageBuilder::new(BINDING, MessageClass::ErrorResponse)
            .with_transaction_id(id.into())
            .with_attribute(ErrorCode::from(code));
        self.seal(message, &self.local)
    }

    /// A check for this agent, or `None` when the datagram is something else.
    pub(super) fn read_request(&self, datagram: &[u8]) -> Option<Received> {
        if stun::username(datagram)? != self.incoming {
            return None;
        }
        Some(self.authentic_request(datagram).map_or(Received::Forged, Received::Request))
    }

    /// The answer to a check of ours, whose transaction the caller knows. `None` when it is not authentic.
    pub(super) fn read_response(&self, datagram: &[u8]) -> Option<Response> {
        let message = decode(&self.responses, &self.remote.key, datagram)?;
        match message.class() {
            MessageClass::SuccessResponse => {
                let mapped = message.get::<XorMappedAddress>()?.as_xor_mapped_address().ok()?;
                Some(Response::Success(*mapped.socket_address()))
            }
            _ => Some(Response::Error),
        }
    }

    fn authentic_request(&self, datagram: &[u8]) -> Option<Request> {
        let message = decode(&self.requests, &self.local.key, datagram)?;
        let role = message.attributes().iter().find_map(|attribute| match attribute {
            StunAttribute::IceControlling(_) => Some(IceRole::Controlling),
            StunAttribute::IceControlled(_) => Some(IceRole::Controlled),
            _ => None,
        })?;
        Some(Request {
            id: *message.transaction_id().as_bytes(),
            role,
            use_candidate: message.get::<UseCandidate>().is_some(),
            full_size: datagram.len() >= FULL_SIZE,
        })
    }

    fn seal(&self, message: StunMessageBuilder, whose: &Credentials) -> Vec<u8> {
        let message = message
            .with_attribute(MessageIntegrity::new(whose.key.clone()))
            .with_attribute(Fingerprint::default())
            .build();
        let mut bytes = vec![0; FULL_SIZE];
        let length = MessageEncoder::default()
            .encode(&mut bytes, &message)
            .expect("no check is longer than FULL_SIZE");
        bytes.truncate(length);
        bytes
    }
}

/// Decodes a message of the peer. With a context that validates, the decoder checks MESSAGE-INTEGRITY
/// and FINGERPRINT where they are; here they must be there.
fn decode(decoder: &MessageDecoder, key: &HMACKey, datagram: &[u8]) -> Option<StunMessage> {
    let expected = |kind: Option<u16>| kind.is_some_and(|kind| kind >= 0x8000 || EXPECTED.contains(&kind));
    if !stun::attribute_types(datagram).all(expected) || !stun::is_authentic(datagram, key.as_bytes()) {
        return None;
    }
    let (message, _) = decoder.decode(datagram).ok()?;
    let sealed = message.get::<MessageIntegrity>().is_some() && has_fingerprint(datagram);
    (sealed && message.method() == BINDING).then_some(message)
}

/// FINGERPRINT stands last (RFC 8489 section 14.7).
fn has_fingerprint(datagram: &[u8]) -> bool {
    stun::attribute_types(datagram).last().flatten() == Some(0x8028)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: TransactionId = [7; 12];

    fn credentials(name: &str) -> Credentials {
        Credentials::new(name, &format!("secret/of/the/end/named/{name}")).expect("good credentials")
    }

    fn pair() -> (Codec, Codec) {
        let (technician, agent) = (credentials("tech"), credentials("agnt5"));
        (
            Codec::new(IceRole::Controlling, 1, technician.clone(), agent.clone()),
            Codec::new(IceRole::Controlled, 2, agent, technician),
        )
    }

    #[test]
    fn checks_are_understood_by_the_peer() {
        let (technician, agent) = pair();
        for full_size in [false, true] {
            let bytes = technician.request(ID, full_size);
            assert!(stun::is_stun(&bytes));
            assert_eq!(stun::local_ufrag(&bytes), Some("agnt5"));
            let role = IceRole::Controlling;
            let request = Request { id: ID, role, use_candidate: full_size, full_size };
            assert_eq!(agent.read_request(&bytes), Some(Received::Request(request)));

            let bytes = agent.request(ID, full_size);
            let role = IceRole::Controlled;
            let request = Request { id: ID, role, use_candidate: false, full_size };
            assert_eq!(technician.read_request(&bytes), Some(Received::Request(request)));
            assert_eq!(bytes.len() == FULL_SIZE, full_size);
        }
    }

    #[test]
    fn responses_are_understood_by_the_one_who_asked() {
        let (technician, agent) = pair();
        let source = "192.0.2.1:32853".parse().expect("an address");
        let bytes = agent.success(ID, source);
        assert_eq!(stun::answers(&bytes), Some(ID));
        assert_eq!(technician.read_response(&bytes), Some(Response::Success(source)));
        assert_eq!(agent.read_response(&bytes), None, "sealed with the other password");
        assert_eq!(technician.read_response(&agent.role_conflict(ID)), Some(Response::Error));
        assert!(bytes.len() < technician.request(ID, false).len());
    }

    #[test]
    fn a_check_of_another_session_is_not_ours() {
        let (technician, agent) = pair();
        let stranger = Codec::new(IceRole::Controlled, 3, credentials("other"), credentials("tech"));
        assert_eq!(stranger.read_request(&technician.request(ID, false)), None);
        assert_eq!(agent.read_request(&stun::binding_request(ID)), None);
    }

    #[test]
    fn without_seal_it_is_forged() {
        let (technician, agent) = pair();
        let plain = StunMessageBuilder::new(BINDING, MessageClass::Request)
            .with_attribute(technician.outgoing.clone())
            .with_attribute(IceControlling::from(1));
        let mut bytes = vec![0; 200];
        let length = MessageEncoder::default().encode(&mut bytes, &plain.build()).expect("it fits");
        assert_eq!(agent.read_request(&bytes[..length]), Some(Received::Forged));
    }

    #[test]
    fn bad_credentials_are_refused() {
        for (ufrag, password) in [("", "p"), ("abc", "p"), ("ab:c", "p"), ("größe", "p")] {
            assert_eq!(Credentials::new(ufrag, &password.repeat(24)), Err(InvalidCredentials));
        }
        assert_eq!(Credentials::new("abcd", "short"), Err(InvalidCredentials));
        assert_eq!(Credentials::new(&"u".repeat(65), &"p".repeat(24)), Err(InvalidCredentials));
        let (left, right) = (credentials(&"l".repeat(64)), credentials(&"r".repeat(64)));
        let longest = Codec::new(IceRole::Controlling, 0, left, right);
        assert_eq!(longest.request(ID, true).len(), FULL_SIZE);
    }

    proptest! {
        #[test]
        fn no_changed_byte_goes_unnoticed(at in 0usize..FULL_SIZE, flip in 1u8.., full_size: bool) {
            let (technician, agent) = pair();
            let mut request = technician.request(ID, full_size);
            let at = at % request.len();
            request[at] ^= flip;
            prop_assert!(!matches!(agent.read_request(&request), Some(Received::Request(_))));
            let mut response = agent.success(ID, "192.0.2.1:1".parse().expect("an address"));
            let at = at % response.len();
            response[at] ^= flip;
            prop_assert_eq!(technician.read_response(&response), None);
        }
    }
}
