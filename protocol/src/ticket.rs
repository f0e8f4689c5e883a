//! Tickets: the mediator's grant for one leg of one session at one relay, verified offline.
//!
//! A ticket is a PASETO v4.public token (Ed25519) whose payload is the JSON of [`Ticket`]. It lets
//! bytes through a relay. It never opens an agent: that takes the peer's certificate and the agent's
//! own allow list.

use pasetors::keys::{AsymmetricPublicKey, AsymmetricSecretKey};
use pasetors::token::{Public, UntrustedToken};
use pasetors::version4::{PublicToken, V4};
use serde::{Deserialize, Serialize};

use crate::id::{DeviceId, Role, SessionId};

/// Longest ticket that a relay reads, in bytes. A real one has about 600.
pub const MAX_TICKET: usize = 2048;

/// How long after its expiry a ticket is still taken: room for clocks that differ. Seconds.
pub const LEEWAY_SECONDS: u64 = 30;

/// Which part of the PASETO standard's "implicit assertion" this is, so that no other token signed
/// with the same key is ever taken for a ticket.
const PURPOSE: &[u8] = b"adit ticket v1";

/// What a ticket says. Every field is signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ticket {
    /// The session that this leg belongs to.
    pub session: SessionId,
    /// Which pairing of that session: both legs of a pair carry the same number.
    pub serial: u64,
    /// The one relay that may take this ticket.
    pub relay: DeviceId,
    /// The relay's boot epoch: a restarted relay takes no older ticket.
    pub epoch: u64,
    /// Which leg: [`Role::Agent`] or [`Role::Technician`].
    pub leg: Role,
    /// Ed25519 public key of the device that holds the ticket; it must sign the leg's preamble.
    #[serde(with = "key")]
    pub holder: [u8; 32],
    /// Ed25519 public key of the device at the other end.
    #[serde(with = "key")]
    pub peer: [u8; 32],
    /// When the ticket ends. Seconds since 1970-01-01 UTC.
    pub expires: u64,
    /// How many bytes the pair may carry in both directions together; 0: no limit.
    pub max_bytes: u64,
    /// How long the pair may live, in seconds; 0: no limit.
    pub max_seconds: u64,
}

impl Ticket {
    /// The signed text of this ticket.
    ///
    /// # Errors
    /// [`TicketError::Key`] when `key` is not a 64-byte Ed25519 key (seed and public key).
    pub fn sign(&self, key: &[u8]) -> Result<String, TicketError> {
        let key = AsymmetricSecretKey::<V4>::from(key).map_err(|_| TicketError::Key)?;
        let claims = serde_json::to_vec(self).map_err(|_| TicketError::Key)?;
        PublicToken::sign(&key, &claims, None, Some(PURPOSE)).map_err(|_| TicketError::Key)
    }

    /// What a ticket says, without any check: for its holder, who got it from the mediator itself.
    ///
    /// # Errors
    /// [`TicketError::Malformed`].
    pub fn peek(text: &str) -> Result<Self, TicketError> {
        if text.len() > MAX_TICKET {
            return Err(TicketError::Malformed);
        }
        let token = UntrustedToken::<Public, V4>::try_from(text).map_err(|_| TicketError::Malformed)?;
        serde_json::from_slice(token.untrusted_payload()).map_err(|_| TicketError::Malformed)
    }

    /// Reads a ticket and checks its signature with the mediator's 32-byte public key, and that it
    /// has not expired at `now` (seconds since 1970-01-01 UTC).
    ///
    /// # Errors
    /// [`TicketError`] says which of these did not hold.
    pub fn verify(text: &str, key: &[u8; 32], now: u64) -> Result<Self, TicketError> {
        if text.len() > MAX_TICKET {
            return Err(TicketError::Malformed);
        }
        let key = AsymmetricPublicKey::<V4>::from(key).map_err(|_| TicketError::Key)?;
        let token = UntrustedToken::<Public, V4>::try_from(text).map_err(|_| TicketError::Malformed)?;
        let trusted =
            PublicToken::verify(&key, &token, None, Some(PURPOSE)).map_err(|_| TicketError::Signature)?;
        let ticket: Ticket = serde_json::from_str(trusted.payload()).map_err(|_| TicketError::Malformed)?;
        if now > ticket.expires.saturating_add(LEEWAY_SECONDS) {
            return Err(TicketError::Expired);
        }
        if !matches!(ticket.leg, Role::Agent | Role::Technician) {
            return Err(TicketError::Malformed);
        }
        Ok(ticket)
    }
}

/// Why a ticket was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// Not a PASETO v4.public token with a ticket inside.
    #[error("malformed ticket")]
    Malformed,
    /// Not signed by this mediator.
    #[error("the ticket's signature is wrong")]
    Signature,
    /// Older than it may be.
    #[error("the ticket has expired")]
    Expired,
    /// The key handed in is none.
    #[error("not an Ed25519 key")]
    Key,
}

/// Keys stand in the JSON as base64url without padding.
mod key {
    use data_encoding::BASE64URL_NOPAD;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(key: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64URL_NOPAD.encode(key))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        let bytes = BASE64URL_NOPAD.decode(text.as_bytes()).map_err(D::Error::custom)?;
        bytes.try_into().map_err(|_| D::Error::custom("a key has 32 bytes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
    use proptest::prelude::*;

    fn keys(seed: u8) -> ([u8; 64], [u8; 32]) {
        let pair = Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).expect("a seed has 32 bytes");
        let public: [u8; 32] = pair.public_key().as_ref().try_into().expect("a key has 32 bytes");
        let mut secret = [seed; 64];
        secret[32..].copy_from_slice(&public);
        (secret, public)
    }

    fn sample() -> Ticket {
        Ticket {
            session: SessionId([1; 16]),
            serial: 7,
            relay: DeviceId([2; 16]),
            epoch: 99,
            leg: Role::Agent,
            holder: [3; 32],
            peer: [4; 32],
            expires: 1_000_000,
            max_bytes: 0,
            max_seconds: 0,
        }
    }

    #[test]
    fn verifies_what_was_signed() {
        let (secret, public) = keys(5);
        let text = sample().sign(&secret).expect("signs");
        println!("a ticket has {} bytes", text.len());
        assert_eq!(Ticket::verify(&text, &public, 1_000_030), Ok(sample()));
        assert_eq!(Ticket::verify(&text, &public, 1_000_031), Err(TicketError::Expired));
        assert_eq!(Ticket::peek(&text), Ok(sample()));
        assert_eq!(Ticket::verify(&text, &keys(6).1, 0), Err(TicketError::Signature));
        assert_eq!(Ticket::verify("v4.public.", &public, 0), Err(TicketError::Malformed));
    }

    proptest! {
        #[test]
        fn one_flipped_bit_is_refused(position in any::<prop::sample::Index>(), bit in 0u8..7) {
            let (secret, public) = keys(5);
            let mut bytes = sample().sign(&secret).expect("signs").into_bytes();
            let at = position.index(bytes.len());
            bytes[at] ^= 1 << bit;
            let text = String::from_utf8(bytes).expect("ASCII stays ASCII");
            prop_assert!(Ticket::verify(&text, &public, 0).is_err());
        }
    }
}
