//! Carriers, sockets and drivers of adit.

pub mod control;
pub mod dial;
pub mod enrol;
pub mod exit;
pub mod identity;
pub mod tls;
pub mod tunnel;
