//! Logs of all programs: on standard error, coloured on terminals, and without secrets at any level.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::EnvFilter;

use crate::os;

/// Libraries that log what they carry: messages of the control channel hold tickets and session passwords. No
/// filter of the user's brings that back.
const CARRIERS: [&str; 4] = ["tungstenite=info", "tokio_tungstenite=info", "sqlx=info", "hyper=info"];

/// Starts logging what `filter` says, for example `info` or `warn,adit_client=trace`. A program that embeds this
/// one may log already: then nothing changes.
///
/// # Errors
/// [`InvalidFilter`].
pub fn start(filter: &str) -> Result<(), InvalidFilter> {
    let mut parsed = EnvFilter::builder().parse(filter).map_err(|_| InvalidFilter)?;
    for carrier in CARRIERS {
        parsed = parsed.add_directive(carrier.parse().map_err(|_| InvalidFilter)?);
    }
    let log = tracing_subscriber::fmt().with_env_filter(parsed).with_writer(stderr);
    let _ = log.with_ansi(os::COLOURS && stderr().is_terminal()).try_init();
    Ok(())
}

/// The text is no log filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a log filter")]
pub struct InvalidFilter;
