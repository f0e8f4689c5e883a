//! Control channel: Protocol Buffers, one message in each binary WebSocket message, on a TLS
//! connection with ALPN [`crate::ALPN_CONTROL`] and the device's certificate.
//!
//! Unknown fields and unknown messages are ignored, so that a device two years old still talks to a
//! new mediator. Ids are 16 bytes, keys 32, times seconds since 1970-01-01 UTC.

use std::time::Duration;

use prost::{Message, Oneof};

/// Largest control message, in bytes.
pub const MAX_MESSAGE: usize = 1024 * 1024;

/// Largest first flight of a TLS handshake that is passed on, in bytes: about 1,500 and 2,500 are usual.
pub const MAX_FLIGHT: usize = 8 * 1024;

/// From a device to the mediator.
#[derive(Clone, PartialEq, Message)]
pub struct ToMediator {
    /// The message.
    #[prost(oneof = "Up", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13")]
    pub message: Option<Up>,
}

/// Messages from a device.
#[derive(Clone, PartialEq, Oneof)]
pub enum Up {
    /// First message on every channel.
    #[prost(message, tag = "1")]
    Hello(Hello),
    /// A technician asks which agents it may reach.
    #[prost(message, tag = "2")]
    List(List),
    /// A technician asks for a session.
    #[prost(message, tag = "3")]
    Open(Open),
    /// An agent says whether it takes the session offered.
    #[prost(message, tag = "4")]
    Answer(Answer),
    /// Candidates for the other end of a session.
    #[prost(message, tag = "5")]
    Candidates(Candidates),
    /// A session has ended at this end.
    #[prost(message, tag = "6")]
    Closed(Closed),
    /// This end's ticket for a relay was spent, or is void: a new pair is wanted.
    #[prost(message, tag = "7")]
    Renew(Renew),
    /// A relay says where it is. Sent after `Hello`.
    #[prost(message, tag = "8")]
    RelayUp(RelayUp),
    /// An agent says on which tier a session runs, for the audit.
    #[prost(message, tag = "9")]
    Tier(Tier),
    /// Answer to `Probe`.
    #[prost(message, tag = "10")]
    Probed(Probed),
    /// A technician asks for a port of a redirector.
    #[prost(message, tag = "11")]
    Redirect(Redirect),
    /// Answer to `Serve`.
    #[prost(message, tag = "12")]
    Served(Served),
    /// A technician asks what an agent reaches from where it is.
    #[prost(message, tag = "13")]
    Examine(Examine),
}

/// From the mediator to a device.
#[derive(Clone, PartialEq, Message)]
pub struct ToDevice {
    /// The message.
    #[prost(oneof = "Down", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15")]
    pub message: Option<Down>,
}

/// Messages from the mediator.
#[derive(Clone, PartialEq, Oneof)]
pub enum Down {
    /// First message on every channel.
    #[prost(message, tag = "1")]
    Welcome(Welcome),
    /// Answer to `List`.
    #[prost(message, tag = "2")]
    Agents(Agents),
    /// Answer to `Open`: granted.
    #[prost(message, tag = "3")]
    Granted(Grant),
    /// To an agent: a technician was granted a session with it.
    #[prost(message, tag = "4")]
    Offer(Grant),
    /// Answer to `Open` or `List`: refused.
    #[prost(message, tag = "5")]
    Refused(Refused),
    /// Candidates of the other end of a session.
    #[prost(message, tag = "6")]
    Candidates(Candidates),
    /// The session is over (ended by the other end, revoked, or refused by the agent).
    #[prost(message, tag = "7")]
    Closed(Closed),
    /// Fresh tickets for a session; they replace those held for the same relays.
    #[prost(message, tag = "8")]
    Tickets(Tickets),
    /// What this device is has changed: to be verified, kept, and used from now on.
    #[prost(message, tag = "9")]
    Update(Update),
    /// The newest list of revoked certificates.
    #[prost(message, tag = "10")]
    Revocations(Revocations),
    /// To an agent, or to a device that visits: can these servers be reached from there?
    #[prost(message, tag = "11")]
    Probe(Probe),
    /// Answer to `Redirect`: granted, and the port is open.
    #[prost(message, tag = "12")]
    Redirected(Redirected),
    /// To a redirector: to open a port for a session of which it is an end.
    #[prost(message, tag = "13")]
    Serve(Serve),
    /// To a technician: the agent has taken the session that was granted.
    #[prost(message, tag = "14")]
    Answered(Answered),
    /// Answer to `Examine`.
    #[prost(message, tag = "15")]
    Examined(Examined),
}

/// Version and software of a device.
#[derive(Clone, PartialEq, Message)]
pub struct Hello {
    /// [`crate::PROTOCOL_VERSION`].
    #[prost(uint32, tag = "1")]
    pub protocol_version: u32,
    /// For people, for example `adit 0.1.0`.
    #[prost(string, tag = "2")]
    pub software: String,
    /// Sessions that live at this end, so that a restarted mediator knows them and can renew tickets.
    #[prost(message, repeated, tag = "3")]
    pub sessions: Vec<LiveSession>,
    /// Random number of this process: two that stay online with one identity are a cloned machine.
    #[prost(uint64, tag = "4")]
    pub instance: u64,
    /// Number of the newest list of revoked certificates that this device has; 0: none.
    #[prost(uint64, tag = "5")]
    pub revocations: u64,
    /// Only for the connection test: after the welcome there is one [`Probe`], and the channel ends. The device itself may
    /// be online on another one.
    #[prost(bool, tag = "6")]
    pub visits: bool,
}

/// A session that outlived the mediator or the channel.
#[derive(Clone, PartialEq, Message)]
pub struct LiveSession {
    /// Session id.
    #[prost(bytes = "vec", tag = "1")]
    pub session: Vec<u8>,
    /// Device id of the other end.
    #[prost(bytes = "vec", tag = "2")]
    pub peer: Vec<u8>,
}

/// What the mediator says first.
#[derive(Clone, PartialEq, Message)]
pub struct Welcome {
    /// [`crate::PROTOCOL_VERSION`] of the mediator.
    #[prost(uint32, tag = "1")]
    pub protocol_version: u32,
    /// Version of the mediator, for people.
    #[prost(string, tag = "2")]
    pub software: String,
    /// Name of this device.
    #[prost(string, tag = "3")]
    pub name: String,
    /// STUN and handshake servers, `HOST:PORT` (UDP) each.
    #[prost(string, repeated, tag = "4")]
    pub stun: Vec<String>,
    /// Ports for the direct path, `FIRST-LAST`.
    #[prost(string, tag = "5")]
    pub p2p_ports: String,
    /// Relays only: the key that signs tickets.
    #[prost(bytes = "vec", tag = "6")]
    pub ticket_key: Vec<u8>,
    /// Where the control channel is reached from now on: `HOST:PORT` each. Empty: as before.
    #[prost(string, repeated, tag = "7")]
    pub servers: Vec<String>,
    /// How many of `stun`, from the first on, are the mediator's own: those take handshakes. 0: the first one.
    #[prost(uint32, tag = "8")]
    pub mediator_stun: u32,
    /// Devices are not to try many sockets on the way to a direct path.
    #[prost(bool, tag = "9")]
    pub no_many_socket_probing: bool,
    /// Devices are not to ask routers for ports.
    #[prost(bool, tag = "10")]
    pub no_port_mapping: bool,
}

/// See [`Up::List`].
#[derive(Clone, PartialEq, Message)]
pub struct List {
    /// Comes back in the answer.
    #[prost(uint64, tag = "1")]
    pub request: u64,
}

/// See [`Down::Agents`].
#[derive(Clone, PartialEq, Message)]
pub struct Agents {
    /// From the request.
    #[prost(uint64, tag = "1")]
    pub request: u64,
    /// Sorted by name.
    #[prost(message, repeated, tag = "2")]
    pub agents: Vec<AgentInfo>,
}

/// One agent that the asking technician may reach.
#[derive(Clone, PartialEq, Message)]
pub struct AgentInfo {
    /// Device id.
    #[prost(bytes = "vec", tag = "1")]
    pub device: Vec<u8>,
    /// Its name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// `key=value` each.
    #[prost(string, repeated, tag = "3")]
    pub tags: Vec<String>,
    /// Whether it has a control channel now.
    #[prost(bool, tag = "4")]
    pub online: bool,
    /// When it was last seen; 0: never.
    #[prost(uint64, tag = "5")]
    pub last_seen: u64,
    /// Version of its software, as it said itself.
    #[prost(string, tag = "6")]
    pub software: String,
}

/// See [`Up::Open`].
#[derive(Clone, PartialEq, Message)]
pub struct Open {
    /// Comes back in the answer.
    #[prost(uint64, tag = "1")]
    pub request: u64,
    /// Name or device id of the agent.
    #[prost(string, tag = "2")]
    pub agent: String,
    /// What the technician wants: `HOST:PORT[/udp]` each, or `any` ([`crate::Wanted`]). The agent refuses everything
    /// else, and its allow list decides, on every stream.
    #[prost(string, repeated, tag = "3")]
    pub targets: Vec<String>,
    /// Tiers that the technician wants: `auto` (or empty), `direct` or `relay`. (`redirector`: see [`Redirect`].)
    #[prost(string, tag = "4")]
    pub via: String,
    /// First flight of the TLS handshake on the first leg to the first relay, at most [`MAX_FLIGHT`] bytes: the agent gets
    /// it with the offer. Empty: none.
    #[prost(bytes = "vec", tag = "5")]
    pub flight: Vec<u8>,
}

/// What one end needs for a session. Both ends get theirs at once.
#[derive(Clone, PartialEq, Message)]
pub struct Grant {
    /// From the request; 0 in an offer.
    #[prost(uint64, tag = "1")]
    pub request: u64,
    /// Session id.
    #[prost(bytes = "vec", tag = "2")]
    pub session: Vec<u8>,
    /// Device id of the other end.
    #[prost(bytes = "vec", tag = "3")]
    pub peer: Vec<u8>,
    /// Name of the other end.
    #[prost(string, tag = "4")]
    pub peer_name: String,
    /// Ed25519 public key of the other end, as the mediator knows it. The peer's certificate decides.
    #[prost(bytes = "vec", tag = "5")]
    pub peer_key: Vec<u8>,
    /// ICE credentials of this end and of the other (RFC 8445 section 5.3).
    #[prost(message, optional, tag = "6")]
    pub local_ice: Option<IceCredentials>,
    /// See `local_ice`.
    #[prost(message, optional, tag = "7")]
    pub remote_ice: Option<IceCredentials>,
    /// A ticket for each granted relay.
    #[prost(message, repeated, tag = "8")]
    pub relays: Vec<RelayTicket>,
    /// When the session must end; 0: no end.
    #[prost(uint64, tag = "9")]
    pub expires: u64,
    /// In an offer: what the technician says it wants.
    #[prost(string, repeated, tag = "10")]
    pub targets: Vec<String>,
    /// From the request; `redirector`: the other end is one, and the server can read what passes.
    #[prost(string, tag = "11")]
    pub via: String,
    /// In an offer: [`Open::flight`].
    #[prost(bytes = "vec", tag = "12")]
    pub flight: Vec<u8>,
    /// Not in an offer: the flight of the request was passed on, and there will be an [`Answered`].
    #[prost(bool, tag = "13")]
    pub flight_passed: bool,
    /// IP address from which the other end's control channel comes; empty: not known.
    #[prost(string, tag = "14")]
    pub peer_comes_from: String,
}

/// Username fragment and password of one ICE agent.
#[derive(Clone, PartialEq, Message)]
pub struct IceCredentials {
    /// 8 characters.
    #[prost(string, tag = "1")]
    pub ufrag: String,
    /// 24 characters.
    #[prost(string, tag = "2")]
    pub password: String,
}

/// A ticket and where to show it.
#[derive(Clone, PartialEq, Message)]
pub struct RelayTicket {
    /// Device id of the relay.
    #[prost(bytes = "vec", tag = "1")]
    pub relay: Vec<u8>,
    /// `HOST:PORT` (TCP) each, tried in turn.
    #[prost(string, repeated, tag = "2")]
    pub addresses: Vec<String>,
    /// Signed text of the ticket ([`crate::ticket`]).
    #[prost(string, tag = "3")]
    pub ticket: String,
    /// `HOST:PORT` (TCP) each, where the same relay is reached by WebSocket over TLS ([`crate::RELAY_PATH`]). Empty:
    /// nowhere.
    #[prost(string, repeated, tag = "4")]
    pub https: Vec<String>,
}

/// See [`Up::Answer`].
#[derive(Clone, PartialEq, Message)]
pub struct Answer {
    /// Session id.
    #[prost(bytes = "vec", tag = "1")]
    pub session: Vec<u8>,
    /// Whether the agent takes it.
    #[prost(bool, tag = "2")]
    pub accepted: bool,
    /// Why not, for people.
    #[prost(string, tag = "3")]
    pub reason: String,
    /// The answer to the flight in the offer, at most [`MAX_FLIGHT`] bytes. Empty: there is none, and the handshake is made
    /// on the leg.
    #[prost(bytes = "vec", tag = "4")]
    pub flight: Vec<u8>,
}

/// See [`Down::Answered`].
#[derive(Clone, PartialEq, Message)]
pub struct Answered {
    /// From the request.
    #[prost(uint64, tag = "1")]
    pub request: u64,
    /// [`Answer::flight`].
    #[prost(bytes = "vec", tag = "2")]
    pub flight: Vec<u8>,
}

/// Candidates of one end, passed to the other unchanged.
#[derive(Clone, PartialEq, Message)]
pub struct Candidates {
    /// Session id.
    #[prost(bytes = "vec", tag = "1")]
    pub session: Vec<u8>,
    /// Encoded by the path engine; opaque to the mediator. Empty when only `seen` is told.
    #[prost(bytes = "vec", tag = "2")]
    pub candidates: Vec<u8>,
    /// Added by the mediator: the address (`IP:PORT`) from which the handshake on 8002/udp came.
    #[prost(string, tag = "3")]
    pub seen: String,
}

/// See [`Up::Closed`] and [`Down::Closed`].
#[derive(Clone, PartialEq, Message)]
pub struct Closed {
    /// Session id.
    #[prost(bytes = "vec", tag = "1")]
    pub session: Vec<u8>,
    /// For people.
    #[prost(string, tag = "2")]
    pub reason: String,
    /// Payload bytes sent and received by this end.
    #[prost(uint64, tag = "3")]
    pub bytes_sent: u64,
    /// See `bytes_sent`.
    #[prost(uint64, tag = "4")]
    pub bytes_received: u64,
}

/// See [`Up::Renew`].
#[derive(Clone, PartialEq, Message)]
pub struct Renew {
    /// Session id.
    #[prost(bytes = "vec", tag = "1")]
    pub session: Vec<u8>,
}

/// See [`Down::Tickets`].
#[derive(Clone, PartialEq, Message)]
pub struct Tickets {
    /// Session id.
    #[prost(bytes = "vec", tag = "1")]
    pub session: Vec<u8>,
    /// One for each granted relay.
    #[prost(message, repeated, tag = "2")]
    pub relays: Vec<RelayTicket>,
}

/// See [`Up::RelayUp`].
#[derive(Clone, PartialEq, Message)]
pub struct RelayUp {
    /// Chosen at random when the relay process starts.
    #[prost(uint64, tag = "1")]
    pub epoch: u64,
    /// `HOST:PORT` (TCP) each, as clients reach it.
    #[prost(string, repeated, tag = "2")]
    pub addresses: Vec<String>,
    /// `HOST:PORT` (UDP) of its STUN server; empty: none.
    #[prost(string, tag = "3")]
    pub stun: String,
    /// As [`RelayTicket::https`].
    #[prost(string, repeated, tag = "4")]
    pub https: Vec<String>,
    /// It has a redirector.
    #[prost(bool, tag = "5")]
    pub redirector: bool,
}

/// See [`Up::Redirect`].
#[derive(Clone, PartialEq, Message)]
pub struct Redirect {
    /// Comes back in the answer.
    #[prost(uint64, tag = "1")]
    pub request: u64,
    /// Name or device id of the agent.
    #[prost(string, tag = "2")]
    pub agent: String,
    /// `HOST:PORT`, as seen from the agent.
    #[prost(string, tag = "3")]
    pub target: String,
    /// IP address from which the port may be used. Empty: the one that the technician's channel comes from, unless another is
    /// shown ([`Self::proves`]).
    #[prost(string, tag = "4")]
    pub source: String,
    /// For how long, in seconds.
    #[prost(uint64, tag = "5")]
    pub seconds: u64,
    /// Pages for a browser instead of a port: the answer has a link.
    #[prost(message, optional, tag = "6")]
    pub web: Option<Web>,
    /// The technician will show the redirector's port itself from where it sees him: see [`Redirected::proof`].
    #[prost(bool, tag = "7")]
    pub proves: bool,
}

/// What a redirector shows browsers of a target that speaks HTTP/1.1.
#[derive(Clone, PartialEq, Message)]
pub struct Web {
    /// The target speaks TLS.
    #[prost(bool, tag = "1")]
    pub tls: bool,
    /// SHA-256 of the target's certificate (DER, 32 bytes), as it is known. Empty: the first one is taken.
    #[prost(bytes = "vec", tag = "2")]
    pub certificate: Vec<u8>,
    /// Path and query of the first page.
    #[prost(string, tag = "3")]
    pub path: String,
    /// From the address asked for only. Else a browser may also come from one of the other IP version: from the one
    /// that shows the link first. Set by the mediator.
    #[prost(bool, tag = "4")]
    pub exact: bool,
}

/// See [`Down::Redirected`].
#[derive(Clone, PartialEq, Message)]
pub struct Redirected {
    /// From the request.
    #[prost(uint64, tag = "1")]
    pub request: u64,
    /// Session id.
    #[prost(bytes = "vec", tag = "2")]
    pub session: Vec<u8>,
    /// `HOST:PORT` (TCP) of the port that is open now.
    #[prost(string, tag = "3")]
    pub address: String,
    /// The IP address from which it may be used; where there is a `proof`, until it is shown.
    #[prost(string, tag = "4")]
    pub source: String,
    /// When it closes, in seconds since 1970-01-01 UTC.
    #[prost(uint64, tag = "5")]
    pub expires: u64,
    /// `https://…`, once: lets one browser in. Empty: the port is for any program.
    #[prost(string, tag = "6")]
    pub link: String,
    /// SHA-256 of the target's certificate (DER, 32 bytes), when it speaks TLS.
    #[prost(bytes = "vec", tag = "7")]
    pub certificate: Vec<u8>,
    /// Two secrets of [`PROOF`] bytes, for connections by IPv4 and by IPv6. One that begins with its secret shows the port the
    /// source that it is for, in place of the one that the mediator sees: one of each IP version, within [`PROVING`]. The answer is
    /// that source's address as text, and the end.
    #[prost(bytes = "vec", tag = "8")]
    pub proof: Vec<u8>,
}

/// Length of one secret of [`Redirected::proof`], in bytes.
pub const PROOF: usize = 16;

/// How long a port takes [`Redirected::proof`], from when it is open.
pub const PROVING: Duration = Duration::from_secs(6);

/// See [`Down::Serve`].
#[derive(Clone, PartialEq, Message)]
pub struct Serve {
    /// Comes back in the answer.
    #[prost(uint64, tag = "1")]
    pub request: u64,
    /// As a technician gets it: the redirector is that end of the session.
    #[prost(message, optional, tag = "2")]
    pub grant: Option<Grant>,
    /// `HOST:PORT`, as seen from the agent.
    #[prost(string, tag = "3")]
    pub target: String,
    /// The IP address from which the port may be used.
    #[prost(string, tag = "4")]
    pub source: String,
    /// For how long, in seconds.
    #[prost(uint64, tag = "5")]
    pub seconds: u64,
    /// See [`Redirect::web`].
    #[prost(message, optional, tag = "6")]
    pub web: Option<Web>,
    /// See [`Redirect::proves`].
    #[prost(bool, tag = "7")]
    pub proves: bool,
}

/// See [`Up::Served`].
#[derive(Clone, PartialEq, Message)]
pub struct Served {
    /// From the request.
    #[prost(uint64, tag = "1")]
    pub request: u64,
    /// The port; 0: there is none.
    #[prost(uint32, tag = "2")]
    pub port: u32,
    /// Why there is none, for people.
    #[prost(string, tag = "3")]
    pub error: String,
    /// Nobody said no: agent or target could not be reached.
    #[prost(bool, tag = "4")]
    pub unreachable: bool,
    /// Where a browser finds it, when that is a host name of its own on `port`: the name.
    #[prost(string, tag = "5")]
    pub host: String,
    /// Path of the link that lets a browser in.
    #[prost(string, tag = "6")]
    pub path: String,
    /// See [`Redirected::certificate`].
    #[prost(bytes = "vec", tag = "7")]
    pub certificate: Vec<u8>,
    /// See [`Redirected::proof`].
    #[prost(bytes = "vec", tag = "8")]
    pub proof: Vec<u8>,
}

/// See [`Up::Tier`].
#[derive(Clone, PartialEq, Message)]
pub struct Tier {
    /// Session id.
    #[prost(bytes = "vec", tag = "1")]
    pub session: Vec<u8>,
    /// `direct`, `relay` or `redirector`.
    #[prost(string, tag = "2")]
    pub tier: String,
    /// Name of the carrier.
    #[prost(string, tag = "3")]
    pub carrier: String,
    /// Why, for people.
    #[prost(string, tag = "4")]
    pub reason: String,
}

/// See [`Down::Probe`]. Addresses are `HOST:PORT`; an agent tries at most 16 of each kind.
#[derive(Clone, PartialEq, Message)]
pub struct Probe {
    /// Comes back in the answer.
    #[prost(uint64, tag = "1")]
    pub request: u64,
    /// Mediators (TCP): a TLS handshake with the device's certificate.
    #[prost(string, repeated, tag = "2")]
    pub https: Vec<String>,
    /// Relays (TCP): a connection without a ticket, which they must refuse.
    #[prost(string, repeated, tag = "3")]
    pub relay: Vec<String>,
    /// STUN servers (UDP): a Binding request.
    #[prost(string, repeated, tag = "4")]
    pub stun: Vec<String>,
    /// More of them (UDP), which nobody must reach: two show how a NAT maps.
    #[prost(string, repeated, tag = "5")]
    pub vantage: Vec<String>,
    /// Whether the router in front is asked to map a port, too.
    #[prost(bool, tag = "6")]
    pub port_mapping: bool,
}

/// See [`Up::Examine`].
#[derive(Clone, PartialEq, Message)]
pub struct Examine {
    /// Comes back in the answer.
    #[prost(uint64, tag = "1")]
    pub request: u64,
    /// Name or device id of the agent.
    #[prost(string, tag = "2")]
    pub agent: String,
}

/// See [`Down::Examined`].
#[derive(Clone, PartialEq, Message)]
pub struct Examined {
    /// From the request.
    #[prost(uint64, tag = "1")]
    pub request: u64,
    /// What the agent found.
    #[prost(message, repeated, tag = "2")]
    pub results: Vec<Reached>,
}

/// See [`Up::Probed`].
#[derive(Clone, PartialEq, Message)]
pub struct Probed {
    /// From the request.
    #[prost(uint64, tag = "1")]
    pub request: u64,
    /// One for each address.
    #[prost(message, repeated, tag = "2")]
    pub results: Vec<Reached>,
}

/// Whether one address was reached.
#[derive(Clone, PartialEq, Message)]
pub struct Reached {
    /// `https`, `relay` or `stun`; `nat` (how it maps stands in `detail`: `none`, `independent`, `sequential`, `random`,
    /// `unknown` or `blocked`) or `ipv6`.
    #[prost(string, tag = "1")]
    pub what: String,
    /// From the request; for `nat` and `ipv6` where servers see this device.
    #[prost(string, tag = "2")]
    pub address: String,
    /// It was reached, and is what it should be.
    #[prost(bool, tag = "3")]
    pub ok: bool,
    /// How long that took.
    #[prost(uint64, tag = "4")]
    pub micros: u64,
    /// What was found out, or why not, for people.
    #[prost(string, tag = "5")]
    pub detail: String,
}

/// See [`Down::Update`].
#[derive(Clone, PartialEq, Message)]
pub struct Update {
    /// A new certificate (DER) for the same device, role and key. Empty: as before.
    #[prost(bytes = "vec", tag = "1")]
    pub certificate: Vec<u8>,
    /// As in [`Welcome::servers`].
    #[prost(string, repeated, tag = "2")]
    pub servers: Vec<String>,
}

/// See [`Down::Revocations`].
#[derive(Clone, PartialEq, Message)]
pub struct Revocations {
    /// X.509 certificate revocation list (DER, RFC 5280 section 5), signed by the organisation's root. Its
    /// number grows.
    #[prost(bytes = "vec", tag = "1")]
    pub list: Vec<u8>,
}

/// Why a request was not granted.
#[derive(Clone, PartialEq, Message)]
pub struct Refused {
    /// From the request.
    #[prost(uint64, tag = "1")]
    pub request: u64,
    /// What kind of refusal, for exit codes.
    #[prost(enumeration = "RefusedCode", tag = "2")]
    pub code: i32,
    /// One line with the remedy, for people.
    #[prost(string, tag = "3")]
    pub message: String,
}

/// Kinds of refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum RefusedCode {
    /// Not otherwise named.
    Unspecified = 0,
    /// No agent of that name among those that this technician may reach.
    UnknownAgent = 1,
    /// The agent has no control channel now.
    AgentOffline = 2,
    /// The agent said no.
    AgentRefused = 3,
    /// This device may not do that.
    NotPermitted = 4,
    /// No relay is there.
    NoRelay = 5,
    /// The mediator cannot write its audit record or database.
    Unavailable = 6,
    /// Agent or target cannot be reached.
    Unreachable = 7,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_locked() {
        let message = ToMediator {
            message: Some(Up::Open(Open {
                request: 7,
                agent: "desk".into(),
                targets: vec!["[::1]:22".into()],
                via: String::new(),
                flight: vec![22, 3],
            })),
        };
        // 1a len: Open · 08 07: request 7 · 12 04 "desk" · 1a 08 "[::1]:22" · 2a 02: flight
        assert_eq!(message.encode_to_vec(), b"\x1a\x16\x08\x07\x12\x04desk\x1a\x08[::1]:22\x2a\x02\x16\x03");
        // 72 len: Answered · 08 07: request 7 · 12 01: flight
        let message = ToDevice { message: Some(Down::Answered(Answered { request: 7, flight: vec![22] })) };
        assert_eq!(message.encode_to_vec(), b"\x72\x05\x08\x07\x12\x01\x16");
    }

    #[test]
    fn a_newer_peers_message_is_no_error() {
        // field 500, length-delimited, of a later version
        let bytes = [0xa2, 0x1f, 0x01, 0x00];
        assert_eq!(ToDevice::decode(&bytes[..]).map(|m| m.message), Ok(None));
    }
}
