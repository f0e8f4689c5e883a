//! The agent as a service of the system.

#[cfg(windows)]
pub mod windows;
