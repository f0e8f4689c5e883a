//! The mediator of adit: it knows the devices, sees who is there, authorises sessions, writes them down,
//! and tells both ends how to reach each other.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`cli`], `install` | the command line; the mediator as a service |
//! | [`organisation`], [`config`] | the directory that `init` makes |
//! | [`operator`], [`admin`] | the operator's commands, and how they tell a mediator that runs |
//! | [`doctor`] | the connection test |
//! | [`backup`] | everything in one encrypted file, and back |
//! | [`token`], [`enrolment`] | how devices get their identity |
//! | [`store`], [`directory`] | what must last, and who is enrolled and may do what |
//! | [`server`] | what listens where |
//! | [`api`] | what scripts ask over HTTPS |
//! | [`channel`], [`presence`] | control channels, and who is there |
//! | [`broker`], [`sessions`] | requests for sessions, and the sessions that live |
//! | [`relays`] | relays and tickets for them |
//! | [`audit`] | one line before each grant |
//! | [`stun`] | 8002/udp |

pub mod admin;
pub mod api;
pub mod audit;
pub mod backup;
pub mod broker;
pub mod channel;
pub mod cli;
pub mod config;
pub mod demo;
pub mod directory;
pub mod doctor;
pub mod enrolment;
pub mod error;
#[cfg(target_os = "linux")]
pub mod install;
pub mod metrics;
pub mod operator;
pub mod organisation;
pub mod presence;
pub mod relays;
pub mod server;
pub mod sessions;
pub mod store;
pub mod stun;
mod times;
pub mod token;
