//! `--data`: where a device's state is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use adit_protocol::Role;
use clap::Args;
use directories::ProjectDirs;

use super::{CliError, Failed};
use crate::identity::Live;

/// The state directory.
#[derive(Debug, Args)]
pub(super) struct Data {
    /// State directory [default: the platform's own, one each for agent and technician].
    #[arg(long = "data", env = "ADIT_DATA", value_name = "DIR", global = true)]
    dir: Option<PathBuf>,
}

impl Data {
    /// The directory that was named.
    pub(super) fn named(&self) -> Option<&Path> {
        self.dir.as_deref().filter(|dir| !dir.as_os_str().is_empty())
    }

    /// The directory for a device of this role.
    pub(super) fn for_role(&self, role: Role) -> Result<PathBuf, CliError> {
        self.named().map_or_else(|| default_dir(role.as_str()), |dir| Ok(dir.to_owned()))
    }

    /// The directory, and the identity in it, which must be of this role.
    pub(super) fn identity(&self, role: Role) -> Result<(PathBuf, Arc<Live>), Failed> {
        let dir = self.for_role(role)?;
        let identity = Live::load(&dir)?;
        let is = identity.get().role;
        if is != role {
            return Err(CliError::WrongRole { is, wanted: role }.into());
        }
        Ok((dir, identity))
    }
}

/// The default directory with this last part.
pub(super) fn default_dir(name: &str) -> Result<PathBuf, CliError> {
    let dirs = ProjectDirs::from("", "", "adit").ok_or(CliError::NoHome)?;
    Ok(dirs.data_local_dir().join(name))
}
