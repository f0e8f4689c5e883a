//! `adit service`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Failed;
use super::data::Data;

/// Run the agent as a service of this system: it starts with the machine, under a user of its own.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  sudo adit enroll - --data /var/lib/adit-agent < token\n  sudo adit service install\n\
    `status` needs no rights; its exit code is 0 while the service runs, else 1."
)]
pub(super) struct Service {
    #[command(subcommand)]
    action: Action,
    #[command(flatten)]
    data: Data,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Set the service up and start it; may be repeated.
    Install {
        /// Say what would be done, and do nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Stop the service and remove it.
    Uninstall {
        /// Remove its state (the identity of this device) and its user, too.
        #[arg(long)]
        purge: bool,
        /// Say what would be done, and do nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Say whether the service is installed, enabled and running.
    Status {
        /// As a JSON object: service, installed, enabled, running, pid.
        #[arg(long)]
        json: bool,
    },
}

#[cfg(target_os = "linux")]
impl Service {
    pub(super) fn run(self) -> Result<(), Failed> {
        use super::CliError;
        use crate::events::print_line;
        use crate::service::systemd::{self, ServiceError, Setup};

        let dir = self.dir();
        let setup = Setup::of_this_program(&dir, Vec::new())?;
        match self.action {
            Action::Install { dry_run: true } => print_line(&systemd::planned_install(&AGENT, &setup)),
            Action::Install { dry_run: false } => {
                systemd::check(&AGENT, &setup)?;
                is_enrolled(&dir)?;
                print_line(&systemd::install(&AGENT, &setup, None)?);
            }
            Action::Uninstall { purge, dry_run } => {
                print_line(&systemd::uninstall(&AGENT, &setup, purge, dry_run)?);
            }
            Action::Status { json } => {
                let status = systemd::status(&AGENT, &setup)?;
                if json {
                    print_line(
                        &serde_json::to_string(&status).map_err(|error| CliError::Runtime(error.into()))?,
                    );
                } else {
                    print_line(&status.to_string());
                }
                if !status.running {
                    return Err(ServiceError::NotRunning(status.service).into());
                }
            }
        }
        Ok(())
    }

    fn dir(&self) -> PathBuf {
        self.data.named().map_or_else(|| AGENT.default_dir(), PathBuf::from)
    }
}

/// The agent as a service.
#[cfg(target_os = "linux")]
const AGENT: crate::service::systemd::Service = crate::service::systemd::Service {
    name: "adit-agent",
    program: "adit",
    command: &["agent"],
    unit: include_str!("../../../deploy/systemd/adit-agent.service"),
    users: include_str!("../../../deploy/sysusers/adit-agent.conf"),
};

/// An agent's identity must be in `dir` before it can be a service.
#[cfg(target_os = "linux")]
fn is_enrolled(dir: &std::path::Path) -> Result<(), Failed> {
    use super::CliError;
    use super::data::default_dir;
    use crate::identity::store::{self, StoreError};
    use adit_protocol::Role;

    match store::load(dir) {
        Ok(identity) if identity.role == Role::Agent => Ok(()),
        Ok(identity) => Err(CliError::WrongRole { is: identity.role, wanted: Role::Agent }.into()),
        Err(StoreError::NotEnrolled { .. }) => {
            let own = default_dir(Role::Agent.as_str()).ok().filter(|own| store::load(own).is_ok());
            Err(CliError::NoAgent { dir: dir.to_owned(), own }.into())
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(not(target_os = "linux"))]
impl Service {
    pub(super) fn run(self) -> Result<(), Failed> {
        Err(super::CliError::NoService.into())
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::Parser;

    #[test]
    fn the_unit_starts_what_this_program_understands() {
        let line = AGENT.unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).expect("a command");
        assert!(line.starts_with("/usr/bin/adit agent "), "{line}");
        assert!(line.ends_with("--data /var/lib/adit-agent"), "{line}");
        Cli::try_parse_from(line.split(' ')).unwrap_or_else(|error| panic!("{line}: {error}"));
    }
}
