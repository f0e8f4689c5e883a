//! The relay of adit: takes two connections that show tickets of one pairing, and moves bytes between
//! them without looking at them.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`server`] | a connection's life: preamble, ticket, other leg, forwarding |
//! | [`door`] | who may come in at all, and the log's one line about who may not; for the mediator too |
//! | [`penalty`] | which sources are closed at once, and for how long |
//! | `gate` | the bounded number of connections without a ticket so far |
//! | `pairing` | which leg waits for which; which tickets are spent |
//! | `forward` | the two directions of a pair |
//! | `copied` | the same where a leg came by WebSocket |
//! | [`https`] | the port on which legs come by WebSocket |
//! | [`upgrade`] | the request with which a WebSocket begins |
//! | `pool`, `pipe` | pipes and buffers, lent while bytes are on the way |
//! | [`redirector`] | ports and pages that lead to agents, for technicians with nothing installed |
//! | [`web`] | how browsers get those pages |
//! | `sources` | from where either may be used |
//! | [`certificates`] | what a server shows browsers |
//! | [`metrics`], [`diagnostics`] | what is counted, and the HTTP server that shows it |
//! | [`listen`], `holder`, [`stun`] | a server's sockets; who has a port that is taken; its STUN server |
//! | [`config`], [`cli`], [`run`], `install` | the program around it: file, command line, control channel, service |

pub mod certificates;
pub mod cli;
pub mod config;
mod copied;
pub mod diagnostics;
pub mod door;
mod forward;
mod gate;
#[cfg(target_os = "linux")]
mod holder;
#[cfg(not(target_os = "linux"))]
mod holder_none;
pub mod https;
#[cfg(target_os = "linux")]
pub mod install;
pub mod listen;
pub mod metrics;
mod pairing;
pub mod penalty;
#[cfg(target_os = "linux")]
mod pipe;
#[cfg(not(target_os = "linux"))]
mod pipe_none;
mod pool;
pub mod redirector;
pub mod run;
pub mod server;
mod sources;
pub mod stun;
pub mod upgrade;
pub mod web;

pub use gate::Visit;
pub use server::{Config, Limits, Relay};
