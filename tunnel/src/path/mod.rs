//! The path engine: a sans-IO ICE agent that looks for a direct UDP path between the two ends of a
//! session (RFC 8445, candidates trickled as in RFC 8838).
//!
//! | module | what it does |
//! | --- | --- |
//! | `agent` | [`PathAgent`]: inputs, timers, outputs |
//! | `schedule` | policy: when the next round starts |
//! | `gather` | asks STUN servers for the server-reflexive addresses, and predicts a NAT's next ones |
//! | `exchange` | keeps sending our candidates until the peer has them |
//! | `checklist` | candidate pairs and what each sends next |
//! | `probing` | many-socket probing, for a NAT with random ports |
//! | `check` | connectivity checks on the wire |
//! | [`stun`] | STUN that needs no state: demultiplexing, the server's answer |
//! | `message` | the candidate message on the wire |
//! | `candidate` | [`Candidate`], its kind and priority |
//! | `local` | [`LocalSocket`] and [`Path`] |
//! | `budget`, `random` | the bound on what is sent; deterministic randomness |
//!
//! # How a path is found
//! Time goes in **rounds**. The controlling side (the technician) starts one and says its number in its
//! candidate message; the controlled side (the agent) joins, and asks for one when it has lost its path.
//! In a round both sides gather, exchange candidates and check all pairs at once; an unexpected check is
//! answered and checked back (peer-reflexive candidates). When checks have been answered, the
//! controlling side nominates one pair with a check of [`FULL_SIZE`] bytes, the controlled side sends
//! one of that size back, and a path that carried both is [`Event::Confirmed`]. So an address is
//! confirmed only when datagrams of QUIC's smallest size have passed in both directions.
//!
//! The round after an ordinary one that failed is a **careful** one: with a socket of its own at each end, which no router knows
//! of yet, and openers first (`checklist`). It finds a way past routers that answer what comes too early, and past whatever an
//! earlier round has left behind in a NAT. Where one end's NAT takes random ports and the other's does not, the ends **probe**
//! (`probing`).

mod agent;
mod budget;
mod candidate;
mod check;
mod checklist;
mod exchange;
mod gather;
pub mod handshake;
mod local;
mod message;
mod probing;
mod random;
mod schedule;
pub mod stun;

pub use agent::{Config, Confirmed, Event, PathAgent, Transmit};
pub use candidate::{Candidate, CandidateKind, is_private};
pub use check::{Credentials, FULL_SIZE, IceRole, InvalidCredentials};
pub use checklist::{CandidatePair, CheckState};
pub use gather::Mapping;
pub use local::{LocalSocket, Path};
pub use message::{InvalidMessage, MAX_CANDIDATES, MAX_MESSAGE};
pub use probing::PROBES;
