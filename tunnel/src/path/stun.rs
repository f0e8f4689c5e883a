//! STUN that needs no state (RFC 8489): telling it from what else shares the socket, and the server's
//! side of a Binding transaction.

use std::net::{IpAddr, SocketAddr};

use aws_lc_rs::hmac::{self, HMAC_SHA1_FOR_LEGACY_USE_ONLY, Key};

/// Length of a message without attributes, in bytes.
pub const HEADER: usize = 20;
/// Bytes 4 to 8 of every message (RFC 8489 section 5).
const MAGIC_COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];

const BINDING_REQUEST: u16 = 0x0001;
const BINDING_SUCCESS: u16 = 0x0101;
const BINDING_ERROR: u16 = 0x0111;

const MAPPED_ADDRESS: u16 = 0x0001;
const CHANGE_REQUEST: u16 = 0x0003;
const USERNAME: u16 = 0x0006;
const MESSAGE_INTEGRITY: u16 = 0x0008;
const ERROR_CODE: u16 = 0x0009;
const UNKNOWN_ATTRIBUTES: u16 = 0x000a;
const XOR_MAPPED_ADDRESS: u16 = 0x0020;

/// Comprehension-required attributes that a Binding request may carry and that change nothing in the
/// answer of a server that asks for no credentials: USERNAME, MESSAGE-INTEGRITY, REALM, NONCE,
/// MESSAGE-INTEGRITY-SHA256, PASSWORD-ALGORITHM, USERHASH (RFC 8489), PRIORITY, USE-CANDIDATE (RFC
/// 8445), PADDING (RFC 5780).
const UNDERSTOOD: [u16; 10] =
    [USERNAME, MESSAGE_INTEGRITY, 0x0014, 0x0015, 0x001c, 0x001d, 0x001e, 0x0024, 0x0025, 0x0026];

/// Names one transaction; nobody else can guess it.
pub type TransactionId = [u8; 12];

/// Whether a datagram is STUN, and not QUIC or anything else on the socket (RFC 8489 section 6.3, RFC
/// 9443): two zero bits, the magic cookie, and a length that fits.
pub fn is_stun(datagram: &[u8]) -> bool {
    Message::parse(datagram).is_some_and(|message| message.id[..4] == MAGIC_COOKIE)
}

/// To which of several [`PathAgent`](super::PathAgent)s on one socket a connectivity check is
/// addressed: the first part of its USERNAME (RFC 8445 section 7.2.2). `None` for all else, responses
/// too.
pub fn local_ufrag(datagram: &[u8]) -> Option<&str> {
    Some(username(datagram)?.split_once(':')?.0)
}

/// A Binding request without attributes, as one asks a STUN server.
pub fn binding_request(id: TransactionId) -> [u8; HEADER] {
    let mut request = [0; HEADER];
    request[..2].copy_from_slice(&BINDING_REQUEST.to_be_bytes());
    request[4..8].copy_from_slice(&MAGIC_COOKIE);
    request[8..].copy_from_slice(&id);
    request
}

/// The server's answer to `request` from `source`, if it deserves one.
///
/// It names the source's address and nothing else: at most 1.6 times the request's length on IPv4, 2.2
/// times on IPv6. A request without magic cookie (RFC 3489), for which [`is_stun`] does not hold, is
/// answered with MAPPED-ADDRESS instead of XOR-MAPPED-ADDRESS. Unknown comprehension-required attributes
/// are refused with error 420 (RFC 8489 section 6.3.1) when that is not longer than the request, and
/// otherwise not answered. The caller limits the rate.
pub fn binding_response(request: &[u8], source: SocketAddr) -> Option<Vec<u8>> {
    let message = Message::parse(request).filter(|message| message.kind == BINDING_REQUEST)?;
    let mut unknown = Vec::new();
    for attribute in message.attributes() {
        let (kind, value) = attribute?;
        // RFC 3489 clients send it always; without a flag it asks for nothing.
        let asks_nothing = kind == CHANGE_REQUEST && value == [0; 4];
        if kind < 0x8000 && !UNDERSTOOD.contains(&kind) && !asks_nothing && !unknown.contains(&kind) {
            unknown.push(kind);
        }
    }
    if unknown.is_empty() {
        Some(success(&message, source))
    } else {
        refusal(&message, &unknown, request.len())
    }
}

/// Whether a message has MESSAGE-INTEGRITY made with `key`, for a short-term credential the password (RFC 8489
/// section 14.5). Compares in constant time, which the decoder of stun-rs does not: ask here first.
pub fn is_authentic(datagram: &[u8], key: &[u8]) -> bool {
    let Some(message) = Message::parse(datagram) else { return false };
    let mut rest = message.body;
    while let Some((kind, value, behind)) = take_attribute(rest) {
        if kind == MESSAGE_INTEGRITY {
            // The length field as it was when this attribute was the last one.
            let before = HEADER + message.body.len() - rest.len();
            let length = before - HEADER + 4 + value.len();
            let mut covered = datagram[..before].to_vec();
            covered[2..4].copy_from_slice(&(length as u16).to_be_bytes());
            let key = Key::new(HMAC_SHA1_FOR_LEGACY_USE_ONLY, key);
            return hmac::verify(&key, &covered, value).is_ok();
        }
        rest = behind;
    }
    false
}

/// The USERNAME of a Binding request. What stands behind the MESSAGE-INTEGRITY, which does not cover it, does
/// not count (RFC 8489, 14.5).
pub(super) fn username(datagram: &[u8]) -> Option<&str> {
    let request = Message::parse(datagram).filter(|message| message.kind == BINDING_REQUEST)?;
    let (_, value) = request
        .attributes()
        .map_while(|attribute| attribute)
        .take_while(|(kind, _)| *kind != MESSAGE_INTEGRITY)
        .find(|(kind, _)| *kind == USERNAME)?;
    std::str::from_utf8(value).ok()
}

/// The transaction that a Binding success or error response answers.
pub(super) fn answers(datagram: &[u8]) -> Option<TransactionId> {
    let response =
        Message::parse(datagram).filter(|message| matches!(message.kind, BINDING_SUCCESS | BINDING_ERROR))?;
    response.id.strip_prefix(&MAGIC_COOKIE)?.try_into().ok()
}

/// The types of a message's attributes, or `None` where it is malformed.
pub(super) fn attribute_types(datagram: &[u8]) -> impl Iterator<Item = Option<u16>> {
    Message::parse(datagram).into_iter().flat_map(|message| message.attributes().map(|found| Some(found?.0)))
}

fn success(request: &Message<'_>, source: SocketAddr) -> Vec<u8> {
    let xor = request.id[..4] == MAGIC_COOKIE;
    let mut ip = match source.ip().to_canonical() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let mut port = source.port().to_be_bytes();
    if xor {
        // RFC 8489 section 14.2: cookie and transaction id, which stand one after the other
        ip.iter_mut().zip(request.id).for_each(|(byte, mask)| *byte ^= mask);
        port.iter_mut().zip(MAGIC_COOKIE).for_each(|(byte, mask)| *byte ^= mask);
    }
    let family = if ip.len() == 4 { 1 } else { 2 };
    let value = [&[0, family], &port[..], &ip].concat();
    response(BINDING_SUCCESS, request, &[(if xor { XOR_MAPPED_ADDRESS } else { MAPPED_ADDRESS }, value)])
}

fn refusal(request: &Message<'_>, unknown: &[u16], limit: usize) -> Option<Vec<u8>> {
    let code = vec![0, 0, 4, 20];
    let unknown = unknown.iter().flat_map(|kind| kind.to_be_bytes()).collect();
    let refusal = response(BINDING_ERROR, request, &[(ERROR_CODE, code), (UNKNOWN_ATTRIBUTES, unknown)]);
    (refusal.len() <= limit).then_some(refusal)
}

fn response(kind: u16, request: &Message<'_>, attributes: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut body = Vec::new();
    for (kind, value) in attributes {
        body.extend(kind.to_be_bytes());
        body.extend((value.len() as u16).to_be_bytes());
        body.extend(value);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    [&kind.to_be_bytes()[..], &(body.len() as u16).to_be_bytes(), request.id, &body].concat()
}

/// A datagram that has the form of a STUN message, with or without magic cookie.
struct Message<'a> {
    kind: u16,
    /// Magic cookie and transaction id, or the 16 bytes of an RFC 3489 transaction id.
    id: &'a [u8; 16],
    body: &'a [u8],
}

impl<'a> Message<'a> {
    fn parse(datagram: &'a [u8]) -> Option<Self> {
        let (kind, rest) = datagram.split_first_chunk()?;
        let (length, rest) = rest.split_first_chunk()?;
        let (id, body) = rest.split_first_chunk()?;
        let kind = u16::from_be_bytes(*kind);
        let length = usize::from(u16::from_be_bytes(*length));
        (kind < 0x4000 && length == body.len() && length % 4 == 0).then_some(Self { kind, id, body })
    }

    /// Type and value of each attribute; `None`, once, where they stop making sense.
    fn attributes(&self) -> impl Iterator<Item = Option<(u16, &'a [u8])>> + use<'a> {
        let mut rest = self.body;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let taken = take_attribute(rest);
            rest = taken.map_or(&[], |(_, _, rest)| rest);
            Some(taken.map(|(kind, value, _)| (kind, value)))
        })
    }
}

fn take_attribute(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let (kind, rest) = bytes.split_first_chunk()?;
    let (length, rest) = rest.split_first_chunk()?;
    let length = usize::from(u16::from_be_bytes(*length));
    let (padded, rest) = rest.split_at_checked(length.next_multiple_of(4))?;
    Some((u16::from_be_bytes(*kind), &padded[..length], rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use stun_rs::attributes::stun::XorMappedAddress;
    use stun_rs::{MessageClass, MessageDecoder};

    const ID: TransactionId = [0xb7, 0xe7, 0xa7, 1, 0xbc, 0x34, 0xd6, 0x86, 0xfa, 0x87, 0xdf, 0xae];

    fn with_attributes(attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let attributes: Vec<_> = attributes.iter().map(|(kind, value)| (*kind, value.to_vec())).collect();
        let header = binding_request(ID);
        let header = Message::parse(&header).expect("a message");
        response(BINDING_REQUEST, &header, &attributes)
    }

    #[test]
    fn answers_name_the_source_in_the_xored_form_of_rfc_5769() {
        // RFC 5769 sections 2.2 and 2.3: XOR-MAPPED-ADDRESS of 192.0.2.1:32853
        let response = binding_response(&binding_request(ID), "192.0.2.1:32853".parse().expect("an address"))
            .expect("a response");
        assert_eq!(response[..4], [0x01, 0x01, 0x00, 0x0c]);
        assert_eq!(response[20..], [0x00, 0x20, 0x00, 0x08, 0x00, 0x01, 0xa1, 0x47, 0xe1, 0x12, 0xa6, 0x43]);
        assert_eq!(answers(&response), Some(ID));

        let source = "[2001:db8:1234:5678:11:2233:4455:6677]:32853".parse().expect("an address");
        let response = binding_response(&binding_request(ID), source).expect("a response");
        assert_eq!(response[20..28], [0x00, 0x20, 0x00, 0x14, 0x00, 0x02, 0xa1, 0x47]);
        assert_eq!(response[28..32], [0x01, 0x13, 0xa9, 0xfa]);
        assert_eq!(response.len(), 44);
    }

    #[test]
    fn a_source_that_a_dual_stack_socket_saw() {
        let source: SocketAddr = "[::ffff:192.0.2.1]:9".parse().expect("an address");
        assert_eq!(binding_response(&binding_request(ID), source).map(|response| response.len()), Some(32));
    }

    #[test]
    fn a_client_of_rfc_3489() {
        let mut request = with_attributes(&[(CHANGE_REQUEST, &[0; 4])]);
        request[4..8].fill(9);
        let response = binding_response(&request, "192.0.2.1:258".parse().expect("an address"));
        let response = response.expect("a response");
        assert_eq!(response[4..20], request[4..20]);
        assert_eq!(response[20..], [0, 1, 0, 8, 0, 1, 1, 2, 192, 0, 2, 1]);
        assert!(!is_stun(&request));
    }

    #[test]
    fn what_is_not_understood_is_refused_or_dropped() {
        let source = "192.0.2.1:9".parse().expect("an address");
        assert_eq!(binding_response(&with_attributes(&[(0x7abc, &[])]), source), None);
        let refused = binding_response(&with_attributes(&[(0x7abc, &[0; 60]), (0x8abc, &[])]), source);
        let refused = refused.expect("a refusal");
        assert_eq!(refused[..2], [0x01, 0x11]);
        assert_eq!(refused[20..], [0, 9, 0, 4, 0, 0, 4, 20, 0, 10, 0, 2, 0x7a, 0xbc, 0, 0]);
        // asks for an answer from another address or port, which there is not
        assert_eq!(binding_response(&with_attributes(&[(CHANGE_REQUEST, &[0, 0, 0, 6])]), source), None);
        let response = binding_response(&binding_request(ID), source).expect("a response");
        assert_eq!(binding_response(&response, source), None, "servers do not talk to servers");
    }

    #[test]
    fn tells_stun_from_quic() {
        assert!(is_stun(&binding_request(ID)));
        assert!(!is_stun(&[0xc0; 1200]), "long header");
        assert!(!is_stun(&[0x40; 40]), "short header");
        assert!(!is_stun(&binding_request(ID)[..19]));
    }

    #[test]
    fn finds_the_agent() {
        let request = with_attributes(&[(0x8022, b"adit"), (USERNAME, b"left:right")]);
        assert_eq!(local_ufrag(&request), Some("left"));
        assert_eq!(username(&request), Some("left:right"));
        assert_eq!(local_ufrag(&with_attributes(&[(USERNAME, b"nobody")])), None);
        assert_eq!(local_ufrag(&with_attributes(&[(USERNAME, b"\xff:a")])), None);
        assert_eq!(local_ufrag(&binding_request(ID)), None);
    }

    proptest! {
        #[test]
        fn an_independent_decoder_agrees(id: TransactionId, ip: IpAddr, port: u16) {
            let source = SocketAddr::new(ip.to_canonical(), port);
            let response = binding_response(&binding_request(id), source).expect("a response");
            let (message, _) = MessageDecoder::default().decode(&response).expect("STUN");
            prop_assert_eq!(message.class(), MessageClass::SuccessResponse);
            prop_assert_eq!(message.transaction_id().as_bytes(), &id);
            let mapped = message.get::<XorMappedAddress>().expect("the attribute");
            prop_assert_eq!(*mapped.expect_xor_mapped_address().socket_address(), source);
        }

        #[test]
        fn hostile_bytes_get_a_bounded_answer(
            mut bytes in prop::collection::vec(any::<u8>(), 0..120), shaped: bool, source: SocketAddr,
        ) {
            if shaped && bytes.len() >= HEADER {
                bytes.truncate(bytes.len() / 4 * 4);
                let length = (bytes.len() - HEADER) as u16;
                bytes[..2].copy_from_slice(&BINDING_REQUEST.to_be_bytes());
                bytes[2..4].copy_from_slice(&length.to_be_bytes());
                bytes[4..8].copy_from_slice(&MAGIC_COOKIE);
            }
            let _ = (is_stun(&bytes), local_ufrag(&bytes), answers(&bytes), attribute_types(&bytes).count());
            if let Some(response) = binding_response(&bytes, source) {
                let most = if source.ip().to_canonical().is_ipv4() { 16 } else { 22 };
                prop_assert!(response.len() * 10 <= bytes.len() * most);
            }
        }
    }
}
