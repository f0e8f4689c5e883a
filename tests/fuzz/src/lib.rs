//! Every parser that sees bytes of a peer that has not shown who it is, and those that a hostile peer reaches
//! afterwards. Each is one function over bytes, which the fuzzer calls, and which the ordinary tests call with the
//! committed corpora and with every prefix of every valid message (`tests/tests/parsers.rs`).
//!
//! Not here, because they are others' own: TLS and the ClientHello (rustls), QUIC's packets (quinn-proto), HTTP behind
//! [`http()`] and on the diagnostics port (hyper). The WebSocket upgrade and its frames (tungstenite) are reached with a client certificate
//! only; what they carry is [`control`].

mod path;
mod seeds;

use std::net::SocketAddr;
use std::sync::LazyLock;

use adit_client::allow::Entry;
use adit_client::enrol::read_message;
use adit_client::forward::ForwardSpec;
use adit_client::identity::certificate::{Authority, fingerprint, is_name, is_tag, request_key};
use adit_client::identity::revocation::Revocations;
use adit_client::identity::verify::{Expected, verify_device};
use adit_client::identity::{DeviceKey, Peer};
use adit_client::place::Place;
use adit_protocol::api::ApiToken;
use adit_protocol::control::{ToDevice, ToMediator};
use adit_protocol::enrol::{Request, Response};
use adit_protocol::frame::{self, Data, Decoder, Frame, FrameError, Item};
use adit_protocol::ticket::Ticket;
use adit_protocol::token::EnrolmentToken;
use adit_protocol::{Role, Target, leg};
use adit_relay::web::strict::{Framing, MAX_FIELDS};
use adit_tunnel::path::{handshake, stun};
use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use prost::Message;
use rustls::pki_types::{CertificateDer, UnixTime};
use stun_rs::MessageDecoderBuilder;

pub use path::path;

/// One parser.
pub struct Parser {
    /// Name of the fuzz target and of its corpus.
    pub name: &'static str,
    /// Gives the parser these bytes. Panics when a promise does not hold; says whether it took them all as valid.
    pub run: fn(&[u8]) -> bool,
    /// Valid messages of each kind.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// No proper prefix of a valid message is a valid message.
    pub whole: bool,
}

/// All of them.
pub const PARSERS: [Parser; 11] = [
    Parser { name: "stun", run: stun, seeds: seeds::stun, whole: true },
    Parser { name: "path", run: path, seeds: seeds::path, whole: false },
    Parser { name: "demux", run: demux, seeds: seeds::demux, whole: false },
    Parser { name: "leg", run: leg, seeds: seeds::leg, whole: true },
    Parser { name: "ticket", run: ticket, seeds: seeds::ticket, whole: true },
    Parser { name: "enrolment", run: enrolment, seeds: seeds::enrolment, whole: true },
    Parser { name: "certificate", run: certificate, seeds: seeds::certificate, whole: true },
    Parser { name: "text", run: text, seeds: seeds::text, whole: false },
    Parser { name: "http", run: http, seeds: seeds::http, whole: false },
    Parser { name: "frames", run: frames, seeds: seeds::frames, whole: false },
    Parser { name: "control", run: control, seeds: seeds::control, whole: false },
];

/// The seconds that the seeds are made at.
const NOW: u64 = 1_800_000_000;
/// Password of the seeds' handshakes.
const PASSWORD: &str = "a-password-of-24-letters";

fn key(seed: u8) -> DeviceKey {
    // RFC 8410 section 7: PKCS #8 of an Ed25519 key, up to the seed.
    let head = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
    DeviceKey::from_pkcs8(&[&head[..], &[seed; 32]].concat()).expect("a key")
}

static ROOT: LazyLock<Authority> = LazyLock::new(|| Authority::new(&key(1), NOW).expect("a root"));

/// 8002/udp at mediator and relay: a STUN server, and the handshake.
pub fn stun(bytes: &[u8]) -> bool {
    let mut answered = false;
    for (source, most) in [("192.0.2.1:32853", 16), ("[2001:db8::1]:1", 22), ("[::ffff:192.0.2.1]:9", 16)] {
        let source: SocketAddr = source.parse().expect("an address");
        let Some(answer) = stun::binding_response(bytes, source) else { continue };
        answered = true;
        assert!(answer.len() * 10 <= bytes.len() * most, "{} bytes for {}", answer.len(), bytes.len());
        assert_eq!(stun::binding_response(&answer, source), None, "two servers would talk for ever");
        // A client of RFC 3489 has no magic cookie, and another decoder does not know it.
        if stun::is_stun(bytes) {
            MessageDecoderBuilder::default().build().decode(&answer).expect("STUN, to another decoder, too");
        }
    }
    let claims = handshake::claims(bytes);
    let proves = handshake::proves(bytes, PASSWORD);
    let _ = (stun::local_ufrag(bytes), stun::is_stun(bytes));
    answered || claims.is_some() || proves
}

/// The first byte of a datagram at a device decides whose it is. Byte 0: the stride of the batch.
pub fn demux(bytes: &[u8]) -> bool {
    let Some((stride, batch)) = bytes.split_first() else { return false };
    let stride = usize::from(*stride);
    let mut buffer = batch.to_vec();
    let source = "192.0.2.1:40000".parse().expect("an address");
    let kept = adit_client::direct::sort_without_sessions(&mut buffer, stride, source);
    // RFC 9443: 0b01 is a short header; nobody whose address is not confirmed gets a handshake.
    let datagrams = batch.chunks(stride.max(1)).filter(|datagram| datagram[0] >> 6 == 0b01);
    assert_eq!(buffer[..kept], datagrams.flatten().copied().collect::<Vec<u8>>());
    kept > 0
}

/// 8002/tcp at a relay.
pub fn leg(bytes: &[u8]) -> bool {
    let Some((header, rest)) = bytes.split_first_chunk() else { return false };
    let Ok(length) = leg::body_length(*header) else { return false };
    assert!(length <= leg::MAX_PREAMBLE);
    let Some(body) = rest.get(..length) else { return false };
    leg::verify(body, &key(1).public_key(), NOW).is_ok()
}

/// The ticket inside, also as its holder reads it.
pub fn ticket(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let Ok(read) = Ticket::peek(text) else { return false };
    let secret = key(1).to_seed_and_public().expect("a key");
    let again = read.sign(&secret).expect("signs");
    assert_eq!(Ticket::peek(&again).as_ref(), Ok(&read));
    let verified = Ticket::verify(text, &key(1).public_key(), NOW);
    assert!(verified.is_err() || verified == Ok(read));
    verified.is_ok()
}

/// 443/tcp with the ALPN of enrolment: the request, and what the device reads.
pub fn enrolment(bytes: &[u8]) -> bool {
    // All bytes are there: what does not end at once wants more of them.
    let request = read_message::<_, Request>(&mut &bytes[..]).now_or_never().expect("never waits");
    let response = read_message::<_, Response>(&mut &bytes[..]).now_or_never().expect("never waits");
    if let Ok(response) = &response {
        same(response);
    }
    let Ok(request) = request else { return response.is_ok_and(|response| response.outcome.is_some()) };
    same(&request);
    let fits = is_name(&request.name) && request.tags.iter().all(|tag| is_tag(tag));
    let _ = Peer::from_certificate(&request.csr);
    (fits && request_key(&request.csr).is_ok()) || response.is_ok_and(|response| response.outcome.is_some())
}

/// What a TLS handshake brings: a device's certificate, before or after its signature is verified; lists of revoked
/// ones; a certification request.
pub fn certificate(bytes: &[u8]) -> bool {
    static ANCHOR: LazyLock<CertificateDer<'static>> = LazyLock::new(|| ROOT.certificate().clone());
    let read = Peer::from_certificate(bytes);
    let anchor = webpki::anchor_from_trusted_cert(&ANCHOR).expect("our root");
    let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(NOW));
    let expected = Expected { roles: vec![Role::Agent, Role::Relay], device: None };
    let none = Revocations::default();
    let verified = verify_device(&anchor, &CertificateDer::from(bytes), &expected, &none, now);
    if let Ok(peer) = &verified {
        assert_eq!(read.as_ref(), Ok(peer), "verified, and read in another way");
    }
    let _ = fingerprint(bytes);
    let list = Revocations::read(bytes, &ANCHOR);
    if let Ok(list) = &list {
        assert_eq!(list.der(), bytes);
    }
    verified.is_ok() || list.is_ok() || request_key(bytes).is_ok()
}

/// What people and messages write: tokens, targets, allow lists, forwardings.
pub fn text(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let token = text.parse::<EnrolmentToken>();
    if let Ok(token) = &token {
        assert_eq!(token.to_string().parse().as_ref(), Ok(token));
    }
    let target = text.parse::<Target>();
    if let Ok(target) = &target {
        assert_eq!(target.to_string().parse().as_ref(), Ok(target));
    }
    let entry = text.parse::<Entry>();
    if let Ok(entry) = &entry {
        let shown = entry.to_string();
        assert_eq!(shown.parse::<Entry>().expect("reads back").to_string(), shown);
    }
    let forward = text.parse::<ForwardSpec>();
    if let Ok(forward) = &forward {
        let shown = forward.to_string();
        assert_eq!(shown.parse::<ForwardSpec>().expect("reads back").to_string(), shown);
    }
    let place = text.parse::<Place>();
    let bearer = ApiToken::verify(text, |_| Some(key(1).public_key()), NOW);
    token.is_ok() || target.is_ok() || entry.is_ok() || forward.is_ok() || place.is_ok() || bearer.is_ok()
}

/// 443/tcp, a browser's requests, before the HTTP library sees them: in one piece and in pieces the verdict is the same, and
/// a head that passes is one to another parser, too. Byte 0: the size of the pieces.
pub fn http(bytes: &[u8]) -> bool {
    let Some((size, bytes)) = bytes.split_first() else { return false };
    let whole = Framing::new().read(bytes);
    let (mut framing, mut at) = (Framing::new(), 0);
    let pieces = bytes.chunks(usize::from(*size).max(1)).try_for_each(|piece| {
        if framing.is_switching() {
            // Nothing is read on.
            return Err(at - 1);
        }
        let read = framing.read(piece).map_err(|refused| at + refused.fine);
        at += piece.len();
        read
    });
    assert_eq!(pieces, whole.map_err(|refused| refused.fine));
    let fine = &bytes[..whole.map_or_else(|refused| refused.fine, |()| bytes.len())];
    if let Some(end) = fine.windows(4).position(|end| end == b"\r\n\r\n") {
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let parsed = httparse::Request::new(&mut fields).parse(fine);
        assert_eq!(parsed, Ok(httparse::Status::Complete(end + 4)), "read in another way");
    }
    whole.is_ok()
}

/// A carrier's bytes: in one piece and in pieces they mean the same. Byte 0: the size of the pieces.
pub fn frames(bytes: &[u8]) -> bool {
    let Some((piece, stream)) = bytes.split_first() else { return false };
    let (whole, end) = decode(stream, stream.len());
    // Pieces of one byte of a large frame would take the square of its length.
    let pieces = usize::from(*piece).max(1 + stream.len() / 256);
    assert_eq!(decode(stream, pieces), (whole.clone(), end));
    let mut again = BytesMut::new();
    let mut payload = 0;
    for item in &whole {
        match item {
            Item::Frame(frame) => frame.encode(&mut again),
            Item::Data(Data { stream, offset, bytes, fin, held }) => {
                payload += bytes.len();
                // Neighbours were joined: they may be longer than one frame by now.
                if bytes.len() <= frame::MAX_PAYLOAD {
                    again.extend_from_slice(&frame::data_header(*stream, *offset, bytes.len(), *fin, *held));
                    again.extend_from_slice(bytes);
                }
            }
        }
        if let Item::Frame(Frame::Goodbye { reason }) = item {
            assert!(reason.len() <= frame::MAX_REASON && !reason.chars().any(char::is_control), "{reason:?}");
        }
    }
    assert!(payload <= stream.len());
    if payload <= frame::MAX_PAYLOAD {
        assert_eq!(decode(&again, again.len().max(1)), (whole.clone(), None));
    }
    !whole.is_empty() && end.is_none()
}

fn decode(stream: &[u8], piece: usize) -> (Vec<Item>, Option<FrameError>) {
    let mut decoder = Decoder::default();
    let mut items: Vec<Item> = vec![];
    for bytes in stream.chunks(piece.max(1)) {
        decoder.push(Bytes::copy_from_slice(bytes));
        loop {
            match decoder.next() {
                Ok(None) => break,
                Ok(Some(item)) => join(&mut items, item),
                Err(error) => return (items, Some(error)),
            }
        }
    }
    (items, None)
}

/// Data of one stream that follows on becomes one piece, however it came.
fn join(items: &mut Vec<Item>, item: Item) {
    if let (Some(Item::Data(before)), Item::Data(data)) = (items.last_mut(), &item)
        && before.stream == data.stream
        && before.offset + before.bytes.len() as u64 == data.offset
        && !before.fin
        && !before.held
    {
        before.bytes = [&before.bytes[..], &data.bytes].concat().into();
        (before.fin, before.held) = (data.fin, data.held);
        return;
    }
    items.push(item);
}

/// The control channel, either way.
pub fn control(bytes: &[u8]) -> bool {
    let up = ToMediator::decode(bytes);
    let down = ToDevice::decode(bytes);
    if let Ok(up) = &up {
        same(up);
    }
    if let Ok(down) = &down {
        same(down);
    }
    up.is_ok_and(|up| up.message.is_some()) || down.is_ok_and(|down| down.message.is_some())
}

fn same<M: Message + Default + PartialEq + std::fmt::Debug>(message: &M) {
    assert_eq!(M::decode(&message.encode_to_vec()[..]).as_ref(), Ok(message));
}
