//! The sans-IO cores of adit.
//!
//! Pure: no sockets, no clock, no random source of its own. `now` and randomness are arguments,
//! effects are return values.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`session`] | streams and flows that outlive the carriers under them |
//! | [`path`] | finds, confirms and keeps a direct path between two devices |

pub mod path;
pub mod session;
