//! Frames inside a tunnel.
//!
//! A carrier's byte stream is a sequence of frames; integers are [`crate::varint`]s.
//!
//! ```text
//! data:   tag (0x40 | flags) · stream · offset · length · payload
//! other:  tag · length of the body · body
//! ```
//! A frame of an unknown tag below 0x40 is skipped. The payload of a data frame is handed on piece by
//! piece as it arrives, without a copy; only headers and other frames are ever gathered.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::id::SessionId;
use crate::target::Target;
use crate::varint;

/// Largest body of a frame that carries no stream data.
pub const MAX_BODY: usize = 72 * 1024;
/// Largest payload of one data frame.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Largest UDP payload of a flow (RFC 768: 65,535 less the headers).
pub const MAX_DATAGRAM: usize = 65_507;
/// Longest reason of a [`Frame::Goodbye`], in bytes.
pub const MAX_REASON: usize = 256;
/// Most streams that a [`Hello`] may list.
pub const MAX_POSITIONS: usize = 1024;

const DATA: u8 = 0x40;
const DATA_FIN: u8 = 0x01;
const DATA_HELD: u8 = 0x02;

/// All frame tags. Retired ones stay listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Tag {
    Hello = 0x01,
    Open = 0x02,
    Window = 0x03,
    Reset = 0x04,
    Gone = 0x05,
    Ping = 0x06,
    Pong = 0x07,
    Ack = 0x08,
    Nominate = 0x09,
    Datagram = 0x0a,
    Message = 0x0b,
    Goodbye = 0x0c,
}

/// Every frame but data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// First on every carrier, in both directions.
    Hello(Hello),
    /// The technician opens a stream or flow.
    Open {
        /// Its number: 0, 1, 2 … within the session.
        stream: u64,
        /// Where the agent shall connect it to.
        target: Target,
    },
    /// Acknowledgement and credit of one stream. From the agent it also says that the target is connected.
    Window(Position),
    /// The stream is over at once, in both directions.
    Reset {
        /// Which.
        stream: u64,
        /// Why; see [`ResetCode`].
        code: u64,
    },
    /// This end holds nothing of the stream any more: all that the other sent has arrived, or the
    /// stream was reset.
    Gone {
        /// Which.
        stream: u64,
    },
    /// Asks for a [`Frame::Pong`] with the same number on the same carrier.
    Ping(u64),
    /// Answers a [`Frame::Ping`].
    Pong(u64),
    /// How many bytes have arrived on this carrier in all.
    Ack(u64),
    /// The technician will send on this carrier, and the agent shall. The highest number counts.
    Nominate(u64),
    /// One datagram of a flow.
    Datagram {
        /// Which flow.
        flow: u64,
        /// Its payload, at most [`MAX_DATAGRAM`].
        payload: Bytes,
    },
    /// A message between the two path engines, opaque here.
    Message(Bytes),
    /// The session ends.
    Goodbye {
        /// One line for people, at most [`MAX_REASON`] bytes.
        reason: String,
    },
}

/// What each end says first on a carrier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// [`crate::PROTOCOL_VERSION`].
    pub version: u64,
    /// The session that the carrier belongs to.
    pub session: SessionId,
    /// Nonce of this end's engine: a restarted process has another one.
    pub instance: u64,
    /// The other end's nonce as known here, 0 when not known yet.
    pub peer_instance: u64,
    /// How far each live stream got at this end.
    pub positions: Vec<Position>,
}

/// How far one end got with one stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Which stream.
    pub stream: u64,
    /// Everything before this sequence number has arrived. The end of the stream counts as one.
    pub acked: u64,
    /// The peer may send bytes up to this offset.
    pub credit: u64,
}

/// Why a stream was reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum ResetCode {
    /// The application at the other end closed or reset its connection.
    Aborted = 1,
    /// The agent's allow list does not have the target.
    NotAllowed = 2,
    /// The target refused the connection.
    Refused = 3,
    /// The target did not answer, or there is no route to it.
    Unreachable = 4,
    /// The target's name could not be resolved.
    NotFound = 5,
    /// Too many streams, or out of descriptors.
    Overloaded = 6,
    /// The session ended.
    SessionEnded = 7,
    /// The process at the other end is a new one.
    Restarted = 8,
    /// A code that this version does not know.
    Unknown = 0,
}

impl From<u64> for ResetCode {
    fn from(code: u64) -> Self {
        use ResetCode::*;
        [Aborted, NotAllowed, Refused, Unreachable, NotFound, Overloaded, SessionEnded, Restarted]
            .into_iter()
            .find(|known| *known as u64 == code)
            .unwrap_or(Unknown)
    }
}

/// The header of a data frame; `length` bytes of payload follow it.
pub fn data_header(stream: u64, offset: u64, length: usize, fin: bool, held: bool) -> Bytes {
    let mut out = BytesMut::with_capacity(24);
    out.put_u8(DATA | if fin { DATA_FIN } else { 0 } | if held { DATA_HELD } else { 0 });
    varint::put(&mut out, stream);
    varint::put(&mut out, offset);
    varint::put(&mut out, length as u64);
    out.freeze()
}

impl Frame {
    /// Appends the whole frame.
    pub fn encode(&self, out: &mut BytesMut) {
        let mut body = BytesMut::new();
        let mut integers = |tag: Tag, values: &[u64]| {
            values.iter().for_each(|value| varint::put(&mut body, *value));
            tag
        };
        let tag = match self {
            Frame::Window(p) => integers(Tag::Window, &[p.stream, p.acked, p.credit]),
            Frame::Reset { stream, code } => integers(Tag::Reset, &[*stream, *code]),
            Frame::Gone { stream } => integers(Tag::Gone, &[*stream]),
            Frame::Ping(n) => integers(Tag::Ping, &[*n]),
            Frame::Pong(n) => integers(Tag::Pong, &[*n]),
            Frame::Ack(n) => integers(Tag::Ack, &[*n]),
            Frame::Nominate(n) => integers(Tag::Nominate, &[*n]),
            Frame::Hello(hello) => {
                varint::put(&mut body, hello.version);
                body.put_slice(hello.session.as_bytes());
                body.put_u64(hello.instance);
                body.put_u64(hello.peer_instance);
                for p in &hello.positions {
                    [p.stream, p.acked, p.credit].iter().for_each(|value| varint::put(&mut body, *value));
                }
                Tag::Hello
            }
            Frame::Open { stream, target } => {
                varint::put(&mut body, *stream);
                body.put_slice(target.to_string().as_bytes());
                Tag::Open
            }
            Frame::Datagram { flow, payload } => {
                varint::put(&mut body, *flow);
                body.put_slice(payload);
                Tag::Datagram
            }
            Frame::Message(bytes) => {
                body.put_slice(bytes);
                Tag::Message
            }
            Frame::Goodbye { reason } => {
                body.put_slice(reason.as_bytes());
                Tag::Goodbye
            }
        };
        out.put_u8(tag as u8);
        varint::put(out, body.len() as u64);
        out.put_slice(&body);
    }

    fn decode(tag: u8, body: Bytes) -> Result<Option<Self>, FrameError> {
        let mut rest = &body[..];
        let mut integer = || varint::take(&mut rest).ok_or(FrameError::Malformed);
        let frame = match tag {
            t if t == Tag::Window as u8 => {
                Frame::Window(Position { stream: integer()?, acked: integer()?, credit: integer()? })
            }
            t if t == Tag::Reset as u8 => Frame::Reset { stream: integer()?, code: integer()? },
            t if t == Tag::Gone as u8 => Frame::Gone { stream: integer()? },
            t if t == Tag::Ping as u8 => Frame::Ping(integer()?),
            t if t == Tag::Pong as u8 => Frame::Pong(integer()?),
            t if t == Tag::Ack as u8 => Frame::Ack(integer()?),
            t if t == Tag::Nominate as u8 => Frame::Nominate(integer()?),
            t if t == Tag::Hello as u8 => return Hello::decode(rest).map(|hello| Some(Frame::Hello(hello))),
            t if t == Tag::Open as u8 => {
                let stream = integer()?;
                let text = std::str::from_utf8(rest).map_err(|_| FrameError::Malformed)?;
                let target = text.parse().map_err(|_| FrameError::Malformed)?;
                return Ok(Some(Frame::Open { stream, target }));
            }
            t if t == Tag::Datagram as u8 => {
                let flow = integer()?;
                let payload = body.slice(body.len() - rest.len()..);
                if payload.len() > MAX_DATAGRAM {
                    return Err(FrameError::TooLarge);
                }
                return Ok(Some(Frame::Datagram { flow, payload }));
            }
            t if t == Tag::Message as u8 => return Ok(Some(Frame::Message(body))),
            t if t == Tag::Goodbye as u8 => {
                let text = String::from_utf8_lossy(&body[..body.len().min(MAX_REASON)]);
                let mut reason: String = text.chars().filter(|c| !c.is_control()).collect();
                // What stands for a byte that is no text is longer than that byte.
                reason.truncate(reason.floor_char_boundary(MAX_REASON));
                return Ok(Some(Frame::Goodbye { reason }));
            }
            _ => return Ok(None),
        };
        if rest.is_empty() { Ok(Some(frame)) } else { Err(FrameError::Malformed) }
    }
}

impl Hello {
    fn decode(mut rest: &[u8]) -> Result<Self, FrameError> {
        let version = varint::take(&mut rest).ok_or(FrameError::Malformed)?;
        let (session, rest) = rest.split_first_chunk::<16>().ok_or(FrameError::Malformed)?;
        let (instance, rest) = rest.split_first_chunk::<8>().ok_or(FrameError::Malformed)?;
        let (peer_instance, mut rest) = rest.split_first_chunk::<8>().ok_or(FrameError::Malformed)?;
        let mut positions = Vec::new();
        while !rest.is_empty() {
            if positions.len() == MAX_POSITIONS {
                return Err(FrameError::TooLarge);
            }
            let mut integer = || varint::take(&mut rest).ok_or(FrameError::Malformed);
            positions.push(Position { stream: integer()?, acked: integer()?, credit: integer()? });
        }
        Ok(Self {
            version,
            session: SessionId(*session),
            instance: u64::from_be_bytes(*instance),
            peer_instance: u64::from_be_bytes(*peer_instance),
            positions,
        })
    }
}

/// What a [`Decoder`] finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// A whole frame.
    Frame(Frame),
    /// A piece of a data frame, never empty unless it ends the stream.
    Data(Data),
}

/// A piece of stream data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Data {
    /// Which stream.
    pub stream: u64,
    /// Offset of the first byte of `bytes`.
    pub offset: u64,
    /// The bytes.
    pub bytes: Bytes,
    /// The stream ends behind `bytes`.
    pub fin: bool,
    /// The sender had no credit left behind `bytes`.
    pub held: bool,
}

/// Reads frames out of a byte stream that arrives in pieces of any size.
#[derive(Debug, Default)]
pub struct Decoder {
    /// Arrived, not read yet.
    input: Bytes,
    /// The data frame whose payload is arriving, and how much of it is to come.
    payload: Option<(Data, usize)>,
}

impl Decoder {
    /// Hands in what arrived. Call [`Decoder::next`] until it returns `None` before the next piece.
    pub fn push(&mut self, bytes: Bytes) {
        if self.input.is_empty() {
            self.input = bytes;
        } else {
            // A header was cut in two: rare, so gathering it costs nothing to speak of.
            let mut joined = BytesMut::with_capacity(self.input.len() + bytes.len());
            joined.put_slice(&self.input);
            joined.put_slice(&bytes);
            self.input = joined.freeze();
        }
    }

    /// The next item, or `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError`]: the carrier is of no further use.
    #[allow(clippy::should_implement_trait, reason = "fallible, and ends for now only")]
    pub fn next(&mut self) -> Result<Option<Item>, FrameError> {
        loop {
            if let Some((data, remaining)) = &mut self.payload {
                if self.input.is_empty() {
                    return Ok(None);
                }
                let bytes = self.input.split_to(self.input.len().min(*remaining));
                let offset = data.offset;
                data.offset += bytes.len() as u64;
                *remaining -= bytes.len();
                let last = *remaining == 0;
                let piece = Data {
                    offset,
                    bytes,
                    fin: data.fin && last,
                    held: data.held && last,
                    stream: data.stream,
                };
                if last {
                    self.payload = None;
                }
                return Ok(Some(Item::Data(piece)));
            }
            let mut rest = &self.input[..];
            let Some(tag) = rest.split_off_first().copied() else { return Ok(None) };
            if tag & DATA != 0 {
                let (Some(stream), Some(offset), Some(length)) =
                    (varint::take(&mut rest), varint::take(&mut rest), varint::take(&mut rest))
                else {
                    return Ok(None);
                };
                if length > MAX_PAYLOAD as u64 || offset + length > varint::MAX || tag & !0x43 != 0 {
                    return Err(FrameError::TooLarge);
                }
                let header = self.input.len() - rest.len();
                self.input.advance(header);
                let (fin, held) = (tag & DATA_FIN != 0, tag & DATA_HELD != 0);
                let data = Data { stream, offset, bytes: Bytes::new(), fin, held };
                if length == 0 {
                    return Ok(Some(Item::Data(data)));
                }
                self.payload = Some((data, length as usize));
                continue;
            }
            let Some(length) = varint::take(&mut rest) else { return Ok(None) };
            if length > MAX_BODY as u64 {
                return Err(FrameError::TooLarge);
            }
            if (rest.len() as u64) < length {
                return Ok(None);
            }
            let header = self.input.len() - rest.len();
            self.input.advance(header);
            let body = self.input.split_to(length as usize);
            if let Some(frame) = Frame::decode(tag, body)? {
                return Ok(Some(Item::Frame(frame)));
            }
        }
    }
}

/// Bytes that are no frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A frame whose body is not what its tag says.
    #[error("malformed frame")]
    Malformed,
    /// A length beyond its limit.
    #[error("frame over its limit")]
    TooLarge,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn samples() -> Vec<(Frame, &'static [u8])> {
        let hello = Hello {
            version: 1,
            session: SessionId(*b"session session!"),
            instance: 0x0102_0304_0506_0708,
            peer_instance: 0,
            positions: vec![Position { stream: 3, acked: 64, credit: 16384 }],
        };
        vec![
            (
                Frame::Hello(hello),
                b"\x01\x28\x01session session!\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\0\0\0\0\0\x03\x40\x40\x80\x00\x40\x00",
            ),
            (
                Frame::Open { stream: 5, target: "127.0.0.1:22".parse().expect("a target") },
                b"\x02\x0d\x05127.0.0.1:22",
            ),
            (Frame::Window(Position { stream: 1, acked: 2, credit: 3 }), b"\x03\x03\x01\x02\x03"),
            (Frame::Reset { stream: 1, code: 3 }, b"\x04\x02\x01\x03"),
            (Frame::Gone { stream: 63 }, b"\x05\x01\x3f"),
            (Frame::Ping(64), b"\x06\x02\x40\x40"),
            (Frame::Pong(0), b"\x07\x01\x00"),
            (Frame::Ack(7), b"\x08\x01\x07"),
            (Frame::Nominate(9), b"\x09\x01\x09"),
            (Frame::Datagram { flow: 2, payload: Bytes::from_static(b"hi") }, b"\x0a\x03\x02hi"),
            (Frame::Message(Bytes::from_static(b"x")), b"\x0b\x01x"),
            (Frame::Goodbye { reason: "done".into() }, b"\x0c\x04done"),
        ]
    }

    fn decode_all(decoder: &mut Decoder, bytes: &[u8], step: usize) -> Vec<Item> {
        let mut items = Vec::new();
        for piece in bytes.chunks(step) {
            decoder.push(Bytes::copy_from_slice(piece));
            while let Some(item) = decoder.next().expect("valid frames") {
                items.push(item);
            }
        }
        items
    }

    #[test]
    fn bytes_are_locked_and_read_back_in_pieces_of_any_size() {
        let mut all = BytesMut::new();
        for (frame, expected) in samples() {
            let mut out = BytesMut::new();
            frame.encode(&mut out);
            assert_eq!(out, expected, "{frame:?}");
            all.put_slice(&out);
        }
        let frames: Vec<Item> = samples().into_iter().map(|(frame, _)| Item::Frame(frame)).collect();
        for step in 1..all.len() {
            assert_eq!(decode_all(&mut Decoder::default(), &all, step), frames, "pieces of {step}");
        }
    }

    #[test]
    fn data_is_handed_on_as_it_arrives() {
        let header = data_header(1, 100, 5, true, true);
        assert_eq!(&header[..], b"\x43\x01\x40\x64\x05");
        let mut bytes = header.to_vec();
        bytes.extend_from_slice(b"hello\x06\x01\x07");
        let items = decode_all(&mut Decoder::default(), &bytes, 7);
        let piece = |offset, bytes: &'static [u8], last| {
            Item::Data(Data { stream: 1, offset, bytes: Bytes::from_static(bytes), fin: last, held: last })
        };
        assert_eq!(items, [piece(100, b"he", false), piece(102, b"llo", true), Item::Frame(Frame::Ping(7))]);
    }

    #[test]
    fn an_empty_data_frame_can_end_a_stream() {
        let items = decode_all(&mut Decoder::default(), &data_header(1, 9, 0, true, false), 64);
        let end = Data { stream: 1, offset: 9, bytes: Bytes::new(), fin: true, held: false };
        assert_eq!(items, [Item::Data(end)]);
    }

    #[test]
    fn unknown_frames_are_skipped() {
        let items = decode_all(&mut Decoder::default(), b"\x3f\x02xx\x07\x01\x05", 64);
        assert_eq!(items, [Item::Frame(Frame::Pong(5))]);
    }

    #[test]
    fn a_reason_keeps_to_its_limit_whatever_it_is() {
        let bytes = [&[Tag::Goodbye as u8, 0x41, 0x2c][..], &[0xff; 300]].concat();
        let items = decode_all(&mut Decoder::default(), &bytes, 1000);
        let [Item::Frame(Frame::Goodbye { reason })] = &items[..] else { panic!("{items:?}") };
        assert!((200..=MAX_REASON).contains(&reason.len()), "{} bytes", reason.len());
    }

    #[test]
    fn lengths_over_their_limits_are_refused_at_once() {
        for bytes in [&b"\x0b\x80\x02\x00\x00"[..], b"\x40\x00\x00\x80\x20\x00\x00", b"\x60\x00\x00\x00"] {
            let mut decoder = Decoder::default();
            decoder.push(Bytes::copy_from_slice(bytes));
            assert_eq!(decoder.next(), Err(FrameError::TooLarge), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300), step in 1usize..40) {
            let mut decoder = Decoder::default();
            'all: for piece in bytes.chunks(step) {
                decoder.push(Bytes::copy_from_slice(piece));
                loop {
                    match decoder.next() {
                        Ok(Some(_)) => {}
                        Ok(None) => break,
                        Err(_) => break 'all,
                    }
                }
            }
        }
    }
}
