//! Logs of all programs: on standard error, coloured on terminals, and without secrets at any level.

use std::io::{IsTerminal, stderr};
#[cfg(windows)]
use std::{io, path::Path, sync::Mutex};

use tracing::Level;
use tracing_subscriber::filter::{EnvFilter, FilterExt, LevelFilter, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::exit::{Exit, Failure};
use crate::os;
#[cfg(windows)]
use crate::service::log_file::LogFile;

/// Libraries that log what they carry below INFO: messages of the control channel hold tickets and session
/// passwords. No filter of the user's brings that back.
const CARRIERS: [&str; 4] = ["tungstenite", "tokio_tungstenite", "sqlx", "hyper"];

/// A library that warns, at each change of the network, of what we do without. A filter that names it hears it.
const CHATTERER: &str = "netwatch";

/// Where servers find their filter.
const VARIABLE: &str = "ADIT_LOG";

/// Starts logging what `filter` says, for example `info` or `warn,adit_client=trace`. A program that embeds this
/// one may log already: then nothing changes.
///
/// # Errors
/// [`InvalidFilter`].
pub fn start(filter: &str) -> Result<(), InvalidFilter> {
    init(filter, os::COLOURS && stderr().is_terminal(), stderr)
}

/// As [`start`], with what the environment variable `ADIT_LOG` says, or `info`: for servers.
///
/// # Errors
/// [`InvalidVariable`].
pub fn start_as_environment_says() -> Result<(), InvalidVariable> {
    let filter = std::env::var(VARIABLE).ok().filter(|filter| !filter.is_empty());
    start(filter.as_deref().unwrap_or("info")).map_err(|_| InvalidVariable(filter.unwrap_or_default()))
}

/// As [`start`], for a service that has no standard error: to the file at `path`, within a bound.
///
/// # Errors
/// What the system said about the file.
#[cfg(windows)]
pub(crate) fn start_in_file(filter: &str, path: &Path) -> io::Result<()> {
    init(filter, false, Mutex::new(LogFile::open(path)?)).map_err(io::Error::other)
}

/// Lines of what `filter` says on `writer`, once for this process.
fn init(
    filter: &str,
    colours: bool,
    writer: impl for<'a> MakeWriter<'a> + Send + Sync + 'static,
) -> Result<(), InvalidFilter> {
    let wanted = EnvFilter::builder().parse(filter).map_err(|_| InvalidFilter)?;
    let wants_chatter = filter.contains(CHATTERER);
    let harmless = filter_fn(move |metadata| {
        let carries = CARRIERS.iter().any(|carrier| metadata.target().starts_with(carrier));
        let chatters = metadata.target().starts_with(CHATTERER) && !wants_chatter;
        *metadata.level() <= if chatters { Level::ERROR } else { Level::INFO } || !(carries || chatters)
    });
    // Without a hint of its own it would take away that of `wanted`, and every library would make its TRACE lines.
    let harmless = harmless.with_max_level_hint(LevelFilter::TRACE);
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(colours);
    let _ = tracing_subscriber::registry().with(lines.with_filter(wanted.and(harmless))).try_init();
    Ok(())
}

/// The environment variable is no log filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{VARIABLE}={0}: not a log filter")]
pub struct InvalidVariable(String);

impl Failure for InvalidVariable {
    fn exit(&self) -> Exit {
        Exit::Usage
    }

    fn remedy(&self) -> Option<String> {
        Some(format!("for example {VARIABLE}=debug, or {VARIABLE}=warn,adit_relay=trace"))
    }
}

/// The text is no log filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a log filter")]
pub struct InvalidFilter;
