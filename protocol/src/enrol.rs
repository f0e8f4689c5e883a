//! Enrolment: one request and one answer, each a length-prefixed (u32, big-endian) Protocol Buffers
//! message on a TLS connection with ALPN [`crate::ALPN_ENROL`].
//!
//! The device verifies that the server's chain ends in the enrolment key which its token pins before
//! it sends anything.

use prost::Message;

/// Largest enrolment message, in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// What a new device asks.
#[derive(Clone, PartialEq, Message)]
pub struct Request {
    /// [`crate::PROTOCOL_VERSION`] of the device.
    #[prost(uint32, tag = "1")]
    pub protocol_version: u32,
    /// The token's secret, 16 bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub secret: Vec<u8>,
    /// PKCS #10 certification request (DER); proves possession of the device's key.
    #[prost(bytes = "vec", tag = "3")]
    pub csr: Vec<u8>,
    /// Wanted name, 1 to 63 of `[A-Za-z0-9._-]`.
    #[prost(string, tag = "4")]
    pub name: String,
    /// Further tags `key=value`; the token's own tags win.
    #[prost(string, repeated, tag = "5")]
    pub tags: Vec<String>,
    /// Relays only: the names and addresses that clients use.
    #[prost(string, repeated, tag = "6")]
    pub hosts: Vec<String>,
    /// The machine was installed anew: the device that has the name now is revoked.
    #[prost(bool, tag = "7")]
    pub replace: bool,
}

/// What the mediator answers.
#[derive(Clone, PartialEq, Message)]
pub struct Response {
    /// Granted, or refused with a reason.
    #[prost(oneof = "Outcome", tags = "1, 2")]
    pub outcome: Option<Outcome>,
}

/// The two outcomes of an enrolment.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Outcome {
    /// The device is enrolled.
    #[prost(message, tag = "1")]
    Granted(Granted),
    /// It is not.
    #[prost(message, tag = "2")]
    Refused(Refused),
}

/// The device's new identity.
#[derive(Clone, PartialEq, Message)]
pub struct Granted {
    /// Device id, 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub device_id: Vec<u8>,
    /// The device's certificate (DER).
    #[prost(bytes = "vec", tag = "2")]
    pub certificate: Vec<u8>,
    /// The organisation's root certificate (DER); its key is the one that the token pinned.
    #[prost(bytes = "vec", tag = "3")]
    pub root: Vec<u8>,
    /// `agent`, `technician` or `relay`.
    #[prost(string, tag = "4")]
    pub role: String,
    /// The name given.
    #[prost(string, tag = "5")]
    pub name: String,
    /// Where the control channel is reached: `HOST:PORT` each.
    #[prost(string, repeated, tag = "6")]
    pub servers: Vec<String>,
    /// Tags of the device, `key=value`.
    #[prost(string, repeated, tag = "7")]
    pub tags: Vec<String>,
    /// Relays only: the mediator's 32-byte Ed25519 key that signs tickets.
    #[prost(bytes = "vec", tag = "8")]
    pub ticket_key: Vec<u8>,
}

/// Why not.
#[derive(Clone, PartialEq, Message)]
pub struct Refused {
    /// One line with the remedy, for people.
    #[prost(string, tag = "1")]
    pub message: String,
    /// The mediator failed; the token is as good as before.
    #[prost(bool, tag = "2")]
    pub unavailable: bool,
}
