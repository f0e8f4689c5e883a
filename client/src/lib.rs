//! Carriers, sockets and drivers of adit.

pub mod agent;
pub mod allow;
pub mod cli;
pub mod config;
pub mod control;
pub mod copy;
pub mod dial;
pub mod direct;
pub mod doctor;
pub mod early;
pub mod enrol;
pub mod events;
pub mod exit;
pub mod forward;
mod http_head;
pub mod hub;
pub mod identity;
pub mod known;
pub mod leg;
pub mod log;
mod os;
pub mod place;
pub mod probe;
pub mod proxy;
pub mod service;
pub mod session;
pub mod status;
pub mod stdio;
pub mod target;
pub mod technician;
pub mod tls;
pub mod tunnel;
pub mod via;
pub mod websocket;

pub use os::raise_descriptor_limit;
