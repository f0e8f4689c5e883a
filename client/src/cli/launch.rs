//! Starts the program that a person wants to use through a forwarded port.

use std::ffi::OsString;
use std::io;
use std::process::{ExitStatus, Stdio};

use tokio::process::{Child, Command};

use crate::events::complain;

/// What happens when the session is open.
#[derive(Debug)]
pub(super) enum Launch {
    /// Nothing: the user has a program of his own.
    Nothing,
    /// The first of these programs that is there runs; its end is the session's.
    Program {
        /// What it is, for people.
        what: &'static str,
        /// Name and arguments each.
        candidates: Vec<(OsString, Vec<OsString>)>,
    },
    /// The system's browser opens this address.
    Browser(String),
}

impl Launch {
    /// Starts it; `None`: nothing is waited for.
    pub(super) fn start(self) -> Option<Child> {
        match self {
            Self::Nothing => None,
            Self::Program { what, candidates } => {
                let names: Vec<_> =
                    candidates.iter().map(|(name, _)| name.to_string_lossy().into_owned()).collect();
                for (name, arguments) in candidates {
                    let mut command = Command::new(&name);
                    // It may ask on the terminal; our own output is for events.
                    command.args(arguments).stdout(Stdio::from(io::stderr())).kill_on_drop(true);
                    match command.spawn() {
                        Ok(child) => return Some(child),
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        Err(error) => {
                            complain(&format!("{} does not start: {error}", name.to_string_lossy()))
                        }
                    }
                }
                complain(&format!(
                    "no {what} is here (looked for {}): install one, or use yours with the address above",
                    names.join(", ")
                ));
                None
            }
            Self::Browser(address) => {
                // Some of these programs end at once, some with the browser: it is not waited for.
                if let Err(error) = open::that_detached(&address) {
                    complain(&format!("no browser could be started ({error}): open {address}"));
                }
                None
            }
        }
    }
}

/// Completes when the program has ended, if there is one.
pub(super) async fn ended(child: &mut Option<Child>) -> io::Result<ExitStatus> {
    match child {
        Some(child) => child.wait().await,
        None => std::future::pending().await,
    }
}
