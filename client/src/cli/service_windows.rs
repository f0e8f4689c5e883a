//! `adit service`, on Windows.

use std::path::PathBuf;

use adit_protocol::Role;
use clap::{Args, Subcommand};
use tokio::runtime::Handle;

use super::agent::Agent;
use super::data::Data;
use super::{CliError, Failed};
use crate::events::{complain, print_line, printable};
use crate::exit::{Exit, report};
use crate::identity::store::{self, StoreError};
use crate::log;
use crate::service::windows::{self, ServiceError};

/// What the service logs when it is not told otherwise.
const LOG: &str = "info";

/// Run the agent as a service of this system: it starts with the machine, under an account of its own.
///
/// For administrators. Install first: that keeps others out of the state directory, in which then enrol.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  adit service install\n  adit enroll - --data C:\\ProgramData\\adit\\agent < token\n  \
    adit service install\n\
    `status` exits with 0 while the service runs, else 1. The service logs to service.log in its directory."
)]
pub(super) struct Service {
    #[command(subcommand)]
    action: Action,
    #[command(flatten)]
    data: Data,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Set the service up and, when this device is enrolled, start it; may be repeated.
    Install,
    /// Stop the service and remove it.
    Uninstall {
        /// Remove its state (the identity of this device), too.
        #[arg(long)]
        purge: bool,
    },
    /// Say whether the service is installed, enabled and running.
    Status {
        /// As a JSON object: service, installed, enabled, running, pid.
        #[arg(long)]
        json: bool,
    },
    /// Be the service: only the service manager can call this.
    #[command(hide = true)]
    Run,
}

impl Service {
    /// Whether this process is the service, which has no standard error.
    pub(super) fn is_service(&self) -> bool {
        matches!(self.action, Action::Run)
    }

    pub(super) fn run(self) -> Result<(), Failed> {
        let dir = self.data.named().map_or_else(windows::default_data, PathBuf::from);
        match self.action {
            Action::Install => install(&dir),
            Action::Uninstall { purge } => {
                windows::uninstall()?;
                if purge {
                    std::fs::remove_dir_all(&dir).map_err(|error| ServiceError::Directory { dir, error })?;
                }
                Ok(())
            }
            Action::Status { json } => {
                let status = windows::status()?;
                if json {
                    let line = serde_json::to_string(&status);
                    print_line(&line.map_err(|error| CliError::Runtime(error.into()))?);
                } else {
                    print_line(&status.to_string());
                }
                if status.running { Ok(()) } else { Err(ServiceError::NotRunning.into()) }
            }
            Action::Run => {
                let runtime = Handle::current();
                let agent = Agent { data: self.data, allow: vec![], json: false };
                windows::run(move |stop| {
                    if let Err(error) = log::start_in_file(LOG, &dir.join("service.log")) {
                        complain(&format!("no log: {error}"));
                    }
                    match runtime.block_on(agent.run_until(stop)) {
                        Ok(()) => Exit::Done,
                        Err(Failed(failure)) => {
                            tracing::error!("{}", printable(&report(&*failure), 2000));
                            failure.exit()
                        }
                    }
                })?;
                Ok(())
            }
        }
    }
}

fn install(dir: &std::path::Path) -> Result<(), Failed> {
    match store::load(dir) {
        Ok(identity) if identity.role != Role::Agent => {
            return Err(CliError::WrongRole { is: identity.role, wanted: Role::Agent }.into());
        }
        Ok(_) | Err(StoreError::NotEnrolled { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    if windows::install(dir)? {
        print_line(&format!("{}: installed and started", windows::NAME));
    } else {
        print_line(&format!("{}: installed", windows::NAME));
        complain(&format!(
            "next: adit enroll - --data {} (the token comes on standard input), then once more: adit service install",
            dir.display()
        ));
    }
    Ok(())
}
