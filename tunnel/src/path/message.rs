//! The candidate message: all that one end tells the other about itself, in full, each time.
//!
//! ```text
//! u8 format (1) · u8 flags · varint sequence · varint acknowledged · varint round · varint count
//! count x ( u8 kind · u8 length · address (4 or 16 bytes) · u16 port )
//! ```
//! Integers are big-endian, varints as in RFC 9000 section 16. `length` counts address and port: a
//! candidate of an unknown kind or length is skipped, and so is whatever follows the last candidate. Kind 4 is an
//! address where the sender takes TCP connections (RFC 6544 calls it passive), the others are UDP addresses (`candidate`).
//!
//! | bits of `flags` | meaning |
//! | --- | --- |
//! | 0 | another round is wanted |
//! | 1 | an acknowledgement is wanted |
//! | 2, 3 | how the sender's NAT maps: 0 unknown, 1 independently of the destination, 2 in turn, 3 at random |
//! | 4 | the round is a careful one |
//! | 5 | sockets are open for probing |
//! | 6, 7 | how often the sender's way to others has become another one, modulo 4 |

use std::net::{IpAddr, SocketAddr};

use adit_protocol::varint;

use super::candidate::{Candidate, CandidateKind};
use super::gather::Mapping;

/// Most candidates in one message.
pub const MAX_CANDIDATES: usize = 32;
/// Longest message, in bytes.
pub const MAX_MESSAGE: usize = 4096;

/// Most addresses where one end takes TCP connections.
pub(super) const MAX_LISTENING: usize = 4;

const FORMAT: u8 = 1;
const LISTENING: u8 = 4;
const WANT_ROUND: u8 = 1 << 0;
const WANT_ACKNOWLEDGEMENT: u8 = 1 << 1;
const MAPPING_SHIFT: u8 = 2;
const CAREFUL: u8 = 1 << 4;
const OPEN: u8 = 1 << 5;
const MOVES_SHIFT: u8 = 6;

/// See the module's documentation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct CandidateMessage {
    /// Grows with every change of `state`.
    pub(super) sequence: u64,
    /// The highest sequence number that the sender has received.
    pub(super) acknowledged: u64,
    /// The sender does not know whether the receiver has this sequence number.
    pub(super) want_acknowledgement: bool,
    /// What is told.
    pub(super) state: State,
}

/// What one end tells about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct State {
    /// The round that the sender is in.
    pub(super) round: u64,
    /// The sender lost the path of that round, and would like another round.
    pub(super) want_round: bool,
    /// How the sender's NAT maps.
    pub(super) mapping: Mapping,
    /// The round is one with sockets of its own, in which nobody sends before the other's NAT is open.
    pub(super) careful: bool,
    /// Many sockets are open: the peer should probe.
    pub(super) open: bool,
    /// How often its way to others has become another one, modulo 4.
    pub(super) moves: u8,
    /// Where it may be reached.
    pub(super) candidates: Vec<Candidate>,
    /// Where it takes TCP connections, at most [`MAX_LISTENING`].
    pub(super) listening: Vec<SocketAddr>,
}

/// Why a candidate message was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidMessage {
    /// It ends too early.
    #[error("the candidate message is truncated")]
    Truncated,
    /// It is longer than [`MAX_MESSAGE`].
    #[error("the candidate message is longer than {MAX_MESSAGE} bytes")]
    TooLong,
    /// A peer of a later version, which no longer speaks ours.
    #[error("unknown format {0} of a candidate message")]
    UnknownFormat(u8),
    /// More than [`MAX_CANDIDATES`].
    #[error("more than {MAX_CANDIDATES} candidates")]
    TooManyCandidates,
}

impl CandidateMessage {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![FORMAT];
        let flags = [
            (self.state.want_round, WANT_ROUND),
            (self.want_acknowledgement, WANT_ACKNOWLEDGEMENT),
            (self.state.careful, CAREFUL),
            (self.state.open, OPEN),
        ];
        let flags = flags.into_iter().filter(|(set, _)| *set).fold(0, |all, (_, flag)| all | flag);
        let numbers = mapping_bits(self.state.mapping) << MAPPING_SHIFT | self.state.moves << MOVES_SHIFT;
        bytes.push(flags | numbers);
        for number in [self.sequence, self.acknowledged, self.state.round] {
            varint::put(&mut bytes, number);
        }
        let listening = self.state.listening.iter().take(MAX_LISTENING).map(|address| (LISTENING, *address));
        let most = MAX_CANDIDATES - listening.len();
        let candidates = self.state.candidates.iter().take(most);
        let candidates = candidates.map(|candidate| (kind_byte(candidate.kind), candidate.address));
        varint::put(&mut bytes, (candidates.len() + listening.len()) as u64);
        for (kind, address) in candidates.chain(listening) {
            bytes.push(kind);
            match address.ip() {
                IpAddr::V4(ip) => {
                    bytes.push(6);
                    bytes.extend(ip.octets());
                }
                IpAddr::V6(ip) => {
                    bytes.push(18);
                    bytes.extend(ip.octets());
                }
            }
            bytes.extend(address.port().to_be_bytes());
        }
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, InvalidMessage> {
        if bytes.len() > MAX_MESSAGE {
            return Err(InvalidMessage::TooLong);
        }
        let mut rest = bytes;
        let [format, flags] = take(&mut rest)?;
        if format != FORMAT {
            return Err(InvalidMessage::UnknownFormat(format));
        }
        let sequence = number(&mut rest)?;
        let acknowledged = number(&mut rest)?;
        let round = number(&mut rest)?;
        let count = number(&mut rest)?;
        if count > MAX_CANDIDATES as u64 {
            return Err(InvalidMessage::TooManyCandidates);
        }
        let (mut candidates, mut listening) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let [kind, length] = take(&mut rest)?;
            let (body, tail) = rest.split_at_checked(length.into()).ok_or(InvalidMessage::Truncated)?;
            rest = tail;
            match kind {
                LISTENING if listening.len() < MAX_LISTENING => listening.extend(transport_address(body)),
                _ => candidates.extend(candidate(kind, body)),
            }
        }
        let mapping =
            Mapping::ALL.into_iter().find(|known| mapping_bits(*known) == flags >> MAPPING_SHIFT & 3);
        Ok(Self {
            sequence,
            acknowledged,
            want_acknowledgement: flags & WANT_ACKNOWLEDGEMENT != 0,
            state: State {
                round,
                want_round: flags & WANT_ROUND != 0,
                mapping: mapping.unwrap_or_default(),
                careful: flags & CAREFUL != 0,
                open: flags & OPEN != 0,
                moves: flags >> MOVES_SHIFT,
                candidates,
                listening,
            },
        })
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], InvalidMessage> {
    let (head, tail) = bytes.split_first_chunk().ok_or(InvalidMessage::Truncated)?;
    *bytes = tail;
    Ok(*head)
}

fn number(bytes: &mut &[u8]) -> Result<u64, InvalidMessage> {
    varint::take(bytes).ok_or(InvalidMessage::Truncated)
}

fn candidate(kind: u8, body: &[u8]) -> Option<Candidate> {
    use CandidateKind::{Host, Mapped, PeerReflexive, Predicted, ServerReflexive};
    let all = [Host, ServerReflexive, PeerReflexive, Predicted, Mapped];
    let kind = all.into_iter().find(|known| kind_byte(*known) == kind)?;
    Some(Candidate { kind, address: transport_address(body)? })
}

fn transport_address(body: &[u8]) -> Option<SocketAddr> {
    let (ip, port) = body.split_last_chunk()?;
    let ip = <[u8; 4]>::try_from(ip)
        .map(IpAddr::from)
        .or_else(|_| <[u8; 16]>::try_from(ip).map(IpAddr::from))
        .ok()?;
    Some(SocketAddr::new(ip, u16::from_be_bytes(*port)))
}

fn mapping_bits(mapping: Mapping) -> u8 {
    match mapping {
        Mapping::Unknown => 0,
        Mapping::Independent => 1,
        Mapping::Sequential => 2,
        Mapping::Random => 3,
    }
}

fn kind_byte(kind: CandidateKind) -> u8 {
    match kind {
        CandidateKind::Host => 0,
        CandidateKind::ServerReflexive => 1,
        CandidateKind::PeerReflexive => 2,
        CandidateKind::Predicted => 3,
        CandidateKind::Mapped => 5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> CandidateMessage {
        let candidate = |kind, text: &str| Candidate { kind, address: text.parse().expect("an address") };
        CandidateMessage {
            sequence: 5,
            acknowledged: 300,
            want_acknowledgement: true,
            state: State {
                round: 2,
                want_round: true,
                mapping: Mapping::Random,
                careful: true,
                open: true,
                moves: 2,
                candidates: vec![
                    candidate(CandidateKind::Host, "192.0.2.1:40000"),
                    candidate(CandidateKind::ServerReflexive, "[2001:db8::1]:443"),
                    candidate(CandidateKind::Mapped, "192.0.2.3:40000"),
                ],
                listening: vec!["192.0.2.1:40001".parse().expect("an address")],
            },
        }
    }

    #[test]
    fn bytes_are_locked() {
        let bytes = [
            0x01,
            0xbf, // format 1 · flags: round and acknowledgement wanted, random ports, careful, open, moved twice
            0x05, // sequence 5
            0x41, 0x2c, // acknowledged 300
            0x02, // round 2
            0x04, // four candidates
            0x00, 0x06, 192, 0, 2, 1, 0x9c, 0x40, // host, 6 bytes: 192.0.2.1:40000
            0x01, 0x12, // server-reflexive, 18 bytes
            0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x01, 0x01, 0xbb, 0x05, 0x06, 192, 0, 2,
            3, 0x9c, 0x40, // mapped
            0x04, 0x06, 192, 0, 2, 1, 0x9c, 0x41, // TCP
        ];
        assert_eq!(sample().encode(), bytes);
        assert_eq!(CandidateMessage::decode(&bytes), Ok(sample()));
    }

    #[test]
    fn what_a_later_version_adds_is_skipped() {
        let mut bytes = vec![0x01, 0x80, 0x01, 0x00, 0x01, 0x03];
        bytes.extend([0x09, 0x06, 192, 0, 2, 1, 0, 1]); // unknown kind
        bytes.extend([0x00, 0x03, 1, 2, 3]); // unknown length
        bytes.extend([0x00, 0x06, 192, 0, 2, 1, 0, 1]);
        bytes.extend([0xff; 9]); // more
        let message = CandidateMessage::decode(&bytes).expect("a message");
        assert_eq!(message.state.candidates.len(), 1);
    }

    #[test]
    fn bounds() {
        assert_eq!(CandidateMessage::decode(&[1; MAX_MESSAGE + 1]), Err(InvalidMessage::TooLong));
        assert_eq!(CandidateMessage::decode(&[2, 0]), Err(InvalidMessage::UnknownFormat(2)));
        let bytes = [0x01, 0, 0, 0, 0, MAX_CANDIDATES as u8 + 1];
        assert_eq!(CandidateMessage::decode(&bytes), Err(InvalidMessage::TooManyCandidates));
        let mut message = sample();
        message.state.candidates = vec![message.state.candidates[1]; 100];
        let bytes = message.encode();
        assert!(bytes.len() <= MAX_MESSAGE);
        let decoded = CandidateMessage::decode(&bytes).expect("a message");
        assert_eq!(decoded.state.candidates.len(), MAX_CANDIDATES - 1);
        message.state.listening = vec![message.state.listening[0]; 100];
        let decoded = CandidateMessage::decode(&message.encode()).expect("a message");
        assert_eq!(decoded.state.listening.len(), MAX_LISTENING);
    }

    prop_compose! {
        fn any_candidate()(kind in prop::sample::select(&[0u8, 1, 2, 3, 5][..]), v6: bool, ip: [u8; 16], port: u16) -> Candidate {
            let mut body = if v6 { ip.to_vec() } else { ip[..4].to_vec() };
            body.extend(port.to_be_bytes());
            candidate(kind, &body).expect("a candidate")
        }
    }

    prop_compose! {
        fn any_message()(
            sequence in 0..=varint::MAX, acknowledged in 0..=varint::MAX, round in 0..=varint::MAX,
            want_round: bool, want_acknowledgement: bool, careful: bool, open: bool, moves in 0u8..4,
            mapping in prop::sample::select(&Mapping::ALL[..]),
            candidates in prop::collection::vec(any_candidate(), 0..=MAX_CANDIDATES - MAX_LISTENING),
            listening in prop::collection::vec(any_candidate(), 0..=MAX_LISTENING),
        ) -> CandidateMessage {
            let listening = listening.into_iter().map(|candidate| candidate.address).collect();
            let state = State { round, want_round, mapping, careful, open, moves, candidates, listening };
            CandidateMessage { sequence, acknowledged, want_acknowledgement, state }
        }
    }

    proptest! {
        #[test]
        fn reads_back_what_it_wrote_and_refuses_every_prefix(message in any_message()) {
            let bytes = message.encode();
            for length in 0..bytes.len() {
                prop_assert_eq!(CandidateMessage::decode(&bytes[..length]), Err(InvalidMessage::Truncated));
            }
            prop_assert_eq!(CandidateMessage::decode(&bytes), Ok(message));
        }

        #[test]
        fn hostile_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = CandidateMessage::decode(&bytes) {
                prop_assert!(message.state.candidates.len() <= MAX_CANDIDATES);
            }
        }
    }
}
