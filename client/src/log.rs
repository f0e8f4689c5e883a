//! Logs of all programs: on standard error, coloured on terminals, and without secrets at any level.

use std::io::{IsTerminal, stderr};
#[cfg(windows)]
use std::{io, path::Path, sync::Mutex};

use tracing_subscriber::EnvFilter;

use crate::os;
#[cfg(windows)]
use crate::service::log_file::LogFile;

/// Libraries that log what they carry: messages of the control channel hold tickets and session passwords. No
/// filter of the user's brings that back.
const CARRIERS: [&str; 4] = ["tungstenite=info", "tokio_tungstenite=info", "sqlx=info", "hyper=info"];

/// Starts logging what `filter` says, for example `info` or `warn,adit_client=trace`. A program that embeds this
/// one may log already: then nothing changes.
///
/// # Errors
/// [`InvalidFilter`].
pub fn start(filter: &str) -> Result<(), InvalidFilter> {
    let log = tracing_subscriber::fmt().with_env_filter(parse(filter)?).with_writer(stderr);
    let _ = log.with_ansi(os::COLOURS && stderr().is_terminal()).try_init();
    Ok(())
}

/// As [`start`], for a service that has no standard error: to the file at `path`, within a bound.
///
/// # Errors
/// What the system said about the file.
#[cfg(windows)]
pub(crate) fn start_in_file(filter: &str, path: &Path) -> io::Result<()> {
    let filter = parse(filter).map_err(io::Error::other)?;
    let file = Mutex::new(LogFile::open(path)?);
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(file).with_ansi(false).try_init();
    Ok(())
}

fn parse(filter: &str) -> Result<EnvFilter, InvalidFilter> {
    let mut parsed = EnvFilter::builder().parse(filter).map_err(|_| InvalidFilter)?;
    for carrier in CARRIERS {
        parsed = parsed.add_directive(carrier.parse().map_err(|_| InvalidFilter)?);
    }
    Ok(parsed)
}

/// The text is no log filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a log filter")]
pub struct InvalidFilter;
