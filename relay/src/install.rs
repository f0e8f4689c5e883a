//! `adit-relay install` and `uninstall`: the relay as a service of this system.

use std::path::{Path, PathBuf};

use adit_client::exit::Failure;
use adit_client::identity::store;
use adit_client::service::systemd::{self, Service, Setup};
use adit_protocol::Role;
use clap::Args;

use crate::cli::Data;
use crate::config::ConfigFile;
use crate::run::{Overrides, RunError, Sockets};

/// The relay as a service.
pub const SERVICE: Service = Service {
    name: "adit-relay",
    program: "adit-relay",
    command: &["run"],
    unit: include_str!("../../deploy/systemd/adit-relay.service"),
    users: include_str!("../../deploy/sysusers/adit-relay.conf"),
};

/// Arguments of `install`.
#[derive(Debug, Args)]
pub struct Install {
    #[command(flatten)]
    data: Data,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
}

/// Arguments of `uninstall`.
#[derive(Debug, Args)]
pub struct Uninstall {
    #[command(flatten)]
    data: Data,
    /// Remove its state (the identity of this relay) and its user, too
    #[arg(long)]
    purge: bool,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
}

impl Install {
    /// Checks identity and ports, and sets the service up.
    ///
    /// # Errors
    /// What failed; nothing was changed when rights, identity or ports are missing.
    pub fn run(&self) -> Result<(), Box<dyn Failure>> {
        let dir = dir(&self.data);
        let setup = Setup::of_this_program(&dir, Vec::new()).map_err(boxed)?;
        if self.dry_run {
            println!("{}", systemd::planned_install(&SERVICE, &setup));
            return Ok(());
        }
        systemd::check(&SERVICE, &setup).map_err(boxed)?;
        let config = enrolled(&dir).map_err(boxed)?;
        if !systemd::is_running(&SERVICE) {
            let sockets = Sockets::bind(&dir, &config.listen, Overrides::default());
            drop(sockets.map_err(boxed)?);
        }
        println!("{}", systemd::install(&SERVICE, &setup, config.listen.diagnostics).map_err(boxed)?);
        Ok(())
    }
}

impl Uninstall {
    /// Stops and removes the service.
    ///
    /// # Errors
    /// What failed.
    pub fn run(&self) -> Result<(), Box<dyn Failure>> {
        let setup = Setup::of_this_program(&dir(&self.data), Vec::new()).map_err(boxed)?;
        println!("{}", systemd::uninstall(&SERVICE, &setup, self.purge, self.dry_run).map_err(boxed)?);
        Ok(())
    }
}

fn dir(data: &Data) -> PathBuf {
    data.data.clone().unwrap_or_else(|| SERVICE.default_dir())
}

/// The settings of the relay in `dir`, which must be one.
fn enrolled(dir: &Path) -> Result<ConfigFile, RunError> {
    let identity = store::load(dir)?;
    if identity.role != Role::Relay {
        return Err(RunError::OtherRole(identity.role));
    }
    Ok(ConfigFile::load(dir)?)
}

fn boxed(error: impl Failure + 'static) -> Box<dyn Failure> {
    Box::new(error)
}
