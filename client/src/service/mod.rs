//! An adit program as a service of the system: set up, started, asked about, removed.
//!
//! One implementation for `adit-mediator install`, `adit-relay install` and `adit service` (`systemd`), and one
//! for the agent on Windows.

#[cfg(any(windows, test))]
pub(crate) mod log_file;
#[cfg(target_os = "linux")]
mod plan;
#[cfg(target_os = "linux")]
pub mod systemd;
#[cfg(windows)]
pub mod windows;

use std::fmt;

use serde::Serialize;

/// How a service is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Its name, as the system's service manager knows it.
    pub service: &'static str,
    /// It is set up.
    pub installed: bool,
    /// It is started with the system.
    pub enabled: bool,
    /// It runs; under systemd: and is ready.
    pub running: bool,
    /// Its process.
    pub pid: Option<u32>,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let not = |is| if is { "" } else { "not " };
        let Self { service, installed, enabled, running, pid } = *self;
        let (installed, enabled, running) = (not(installed), not(enabled), not(running));
        write!(f, "{service}: {installed}installed, {enabled}enabled, {running}running")?;
        pid.map_or(Ok(()), |pid| write!(f, " (process {pid})"))
    }
}

/// Tells the service manager that started this process, if one did, that the program is ready.
pub fn ready() {
    #[cfg(target_os = "linux")]
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::warn!(%error, "the service manager could not be told that this program is ready");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_said_in_words() {
        let status =
            Status { service: "adit-agent", installed: true, enabled: false, running: true, pid: Some(7) };
        assert_eq!(status.to_string(), "adit-agent: installed, not enabled, running (process 7)");
    }
}
