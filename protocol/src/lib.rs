//! Wire types of adit: what crosses a network, and nothing else.
//!
//! This crate is pure: no sockets, no clock, no random source of its own. Time and randomness are
//! arguments.
//!
//! | module | what it encodes | who speaks it |
//! | --- | --- | --- |
//! | [`control`] | control channel messages (Protocol Buffers) | device and mediator |
//! | [`enrol`] | enrolment messages (Protocol Buffers) | new device and mediator |
//! | [`token`] | one-time enrolment tokens (text) | operator to device |
//! | [`ticket`] | signed grants for one leg of one session (PASETO v4.public) | mediator to relay |
//! | [`api`] | bearer tokens of the API (PASETO v4.public) | scripts to mediator |
//! | [`leg`] | what a device says first on 8002/tcp | device and relay |
//! | [`frame`] | frames inside a tunnel | agent and technician |
//! | [`target`] | `HOST:PORT[/udp]` | everywhere |

pub mod api;
pub mod control;
pub mod enrol;
pub mod frame;
pub mod id;
pub mod leg;
pub mod target;
pub mod ticket;
pub mod token;
pub mod varint;

pub use id::{DeviceId, Role, SessionId};
pub use target::{InvalidTarget, Protocol, Target, Wanted};

/// Version of the control and tunnel protocols that this build speaks. Both sides say theirs.
pub const PROTOCOL_VERSION: u32 = 1;

/// ALPN of the control channel: a client certificate is required.
pub const ALPN_CONTROL: &[u8] = b"adit";
/// ALPN of enrolment: no client certificate, a token instead.
pub const ALPN_ENROL: &[u8] = b"adit-enrol";
/// Path of the control channel's WebSocket, with ALPN [`ALPN_CONTROL`].
pub const CONTROL_PATH: &str = "/control";
/// Path of a relay's WebSocket, with the same ALPN: its binary messages, one after the other, are the byte stream
/// that [`leg`] begins. Where they are cut means nothing.
pub const RELAY_PATH: &str = "/relay";
/// ALPN of the end-to-end carriers, both TLS and QUIC.
pub const ALPN_TUNNEL: &[u8] = b"adit-tunnel";

/// Default port of STUN and the connection handshake (UDP) and of the relay (TCP).
pub const DEFAULT_RELAY_PORT: u16 = 8002;
/// Default port of the control channel.
pub const DEFAULT_HTTPS_PORT: u16 = 443;
