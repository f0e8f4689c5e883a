//! The relay, on loopback. One program for all files: each one more would be linked with everything once more.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

mod admission;
mod common;
mod forwarding;
mod https;
#[cfg(unix)]
mod program;
#[cfg(target_os = "linux")]
mod quota;
#[cfg(target_os = "linux")]
mod threats;
