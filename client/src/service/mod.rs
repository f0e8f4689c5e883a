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

/// Tells the service manager that started this process, if one did, that the program is ready.
pub fn ready() {
    #[cfg(target_os = "linux")]
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::warn!(%error, "the service manager could not be told that this program is ready");
    }
}
