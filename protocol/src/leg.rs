//! What a device says first on a connection to a relay (8002/tcp), and the one byte it hears.
//!
//! ```text
//! u16 length of all that follows · u16 length of the ticket · ticket · signature (64 bytes)
//! ```
//! Integers are big-endian. The signature is Ed25519 with the ticket holder's key over
//! [`signed_bytes`]. There is no challenge to wait for: a leg may be sent in the first flight.

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};

use crate::id::Role;
use crate::ticket::{MAX_TICKET, Ticket, TicketError};

const SIGNATURE: usize = 64;
/// The largest value of the length field.
pub const MAX_PREAMBLE: usize = 2 + MAX_TICKET + SIGNATURE;
/// The smallest: an empty ticket, which no relay takes.
const MIN_PREAMBLE: usize = 2 + SIGNATURE;

/// What a relay answers, once, when it has paired the leg or refused it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Paired: every further byte comes from the other leg.
    Paired = 0x01,
    /// Malformed preamble, wrong signature, other relay, older boot epoch, or expired.
    Refused = 0x10,
    /// The ticket's two legs have paired before.
    Spent = 0x11,
    /// The other leg did not come in time.
    NoPeer = 0x12,
    /// A newer leg with a valid proof has taken this leg's place.
    Replaced = 0x13,
    /// The relay is full.
    Busy = 0x14,
}

impl TryFrom<u8> for Status {
    type Error = UnknownStatus;
    fn try_from(byte: u8) -> Result<Self, UnknownStatus> {
        [Self::Paired, Self::Refused, Self::Spent, Self::NoPeer, Self::Replaced, Self::Busy]
            .into_iter()
            .find(|status| *status as u8 == byte)
            .ok_or(UnknownStatus(byte))
    }
}

/// A status byte that this version does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("unknown status byte {0:#04x} from the relay")]
pub struct UnknownStatus(pub u8);

/// The bytes that the holder signs: purpose, SHA-256 of the ticket's text, relay, boot epoch, leg.
pub fn signed_bytes(ticket_text: &str, ticket: &Ticket) -> Vec<u8> {
    let mut bytes = b"adit leg v1".to_vec();
    bytes.extend_from_slice(digest(&SHA256, ticket_text.as_bytes()).as_ref());
    bytes.extend_from_slice(ticket.relay.as_bytes());
    bytes.extend_from_slice(&ticket.epoch.to_be_bytes());
    bytes.push(if ticket.leg == Role::Agent { 1 } else { 0 });
    bytes
}

/// Encodes the preamble, its own length field included. `sign` is the holder's Ed25519 signature.
pub fn encode(ticket_text: &str, ticket: &Ticket, sign: impl FnOnce(&[u8]) -> [u8; SIGNATURE]) -> Vec<u8> {
    let signature = sign(&signed_bytes(ticket_text, ticket));
    let mut bytes = Vec::with_capacity(2 + MIN_PREAMBLE + ticket_text.len());
    bytes.extend_from_slice(&((MIN_PREAMBLE + ticket_text.len()) as u16).to_be_bytes());
    bytes.extend_from_slice(&(ticket_text.len() as u16).to_be_bytes());
    bytes.extend_from_slice(ticket_text.as_bytes());
    bytes.extend_from_slice(&signature);
    bytes
}

/// How many bytes follow the length field `header`.
///
/// # Errors
/// [`LegError::Malformed`] when no preamble has that length.
pub fn body_length(header: [u8; 2]) -> Result<usize, LegError> {
    let length = usize::from(u16::from_be_bytes(header));
    if (MIN_PREAMBLE..=MAX_PREAMBLE).contains(&length) { Ok(length) } else { Err(LegError::Malformed) }
}

/// Reads the `body` behind the length field, verifies ticket and proof of possession. The caller
/// still compares relay and boot epoch with its own.
///
/// # Errors
/// [`LegError`] says what did not hold.
pub fn verify(body: &[u8], mediator_key: &[u8; 32], now: u64) -> Result<Ticket, LegError> {
    let (length, rest) = body.split_first_chunk::<2>().ok_or(LegError::Malformed)?;
    let length = usize::from(u16::from_be_bytes(*length));
    let (text, signature) = rest.split_at_checked(length).ok_or(LegError::Malformed)?;
    if signature.len() != SIGNATURE {
        return Err(LegError::Malformed);
    }
    let text = std::str::from_utf8(text).map_err(|_| LegError::Malformed)?;
    let ticket = Ticket::verify(text, mediator_key, now)?;
    UnparsedPublicKey::new(&ED25519, &ticket.holder)
        .verify(&signed_bytes(text, &ticket), signature)
        .map_err(|_| LegError::Possession)?;
    Ok(ticket)
}

/// Why a leg was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LegError {
    /// Not a preamble.
    #[error("malformed preamble")]
    Malformed,
    /// The ticket itself is no good.
    #[error(transparent)]
    Ticket(#[from] TicketError),
    /// Not signed by the ticket's holder.
    #[error("the holder's signature is wrong")]
    Possession,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{DeviceId, SessionId};
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};

    fn pair(seed: u8) -> (Ed25519KeyPair, [u8; 32]) {
        let pair = Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).expect("a seed has 32 bytes");
        let public = pair.public_key().as_ref().try_into().expect("a key has 32 bytes");
        (pair, public)
    }

    fn sample() -> (Vec<u8>, [u8; 32], Ticket) {
        let (_, mediator) = pair(1);
        let (holder, holder_public) = pair(2);
        let ticket = Ticket {
            session: SessionId([1; 16]),
            serial: 1,
            relay: DeviceId([2; 16]),
            epoch: 3,
            leg: Role::Technician,
            holder: holder_public,
            peer: [4; 32],
            expires: 100,
            max_bytes: 0,
            max_seconds: 0,
        };
        let mut secret = [1; 64];
        secret[32..].copy_from_slice(&mediator);
        let text = ticket.sign(&secret).expect("signs");
        let bytes = encode(&text, &ticket, |m| holder.sign(m).as_ref().try_into().expect("64 bytes"));
        (bytes, mediator, ticket)
    }

    #[test]
    fn verifies_what_was_encoded() {
        let (bytes, mediator, ticket) = sample();
        let (header, body) = bytes.split_first_chunk::<2>().expect("has a header");
        assert_eq!(body_length(*header), Ok(body.len()));
        assert_eq!(verify(body, &mediator, 0), Ok(ticket));
    }

    #[test]
    fn every_prefix_and_every_flipped_byte_is_refused() {
        let (bytes, mediator, _) = sample();
        let body = &bytes[2..];
        for end in 0..body.len() {
            assert!(verify(&body[..end], &mediator, 0).is_err());
        }
        for at in 0..body.len() {
            let mut bad = body.to_vec();
            bad[at] ^= 1;
            assert!(verify(&bad, &mediator, 0).is_err(), "byte {at}");
        }
    }

    #[test]
    fn lengths_out_of_range_are_refused() {
        assert_eq!(body_length([0, 0]), Err(LegError::Malformed));
        assert_eq!(body_length([0, 65]), Err(LegError::Malformed));
        assert_eq!(body_length([0, 66]), Ok(66));
        assert_eq!(body_length([0xff, 0xff]), Err(LegError::Malformed));
    }
}
