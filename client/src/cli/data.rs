//! `--data`: where a device's state is.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use adit_protocol::Role;
use clap::Args;
use directories::ProjectDirs;

use super::{CliError, Failed};
use crate::config::Config;
use crate::identity::Live;
use crate::proxy::Proxies;

/// The state directory.
#[derive(Debug, Args)]
pub(super) struct Data {
    /// State directory [default: the platform's own, one each for agent and technician].
    #[arg(long = "data", env = "ADIT_DATA", value_name = "DIR", global = true)]
    dir: Option<PathBuf>,
    /// The HTTP proxy on the way to the servers: http://[USER:PASSWORD@]HOST:PORT, or none. A password is better kept
    /// in the environment or in config.toml [default: [network] proxy in config.toml, else HTTPS_PROXY].
    #[arg(long, env = "ADIT_PROXY", value_name = "URL", global = true, hide_env_values = true)]
    proxy: Option<String>,
}

impl Data {
    /// The directory that was named.
    pub(super) fn named(&self) -> Option<&Path> {
        self.dir.as_deref().filter(|dir| !dir.as_os_str().is_empty())
    }

    /// The options with which another `adit` finds the same. The proxy goes by the environment: it may hold a password.
    pub(super) fn repeated(&self) -> Vec<OsString> {
        self.dir.iter().flat_map(|dir| ["--data".into(), dir.clone().into_os_string()]).collect()
    }

    /// `--proxy` as it was given.
    pub(super) fn proxy(&self) -> Option<&str> {
        self.proxy.as_deref()
    }

    /// The directory for a device of this role.
    pub(super) fn for_role(&self, role: Role) -> Result<PathBuf, CliError> {
        self.named().map_or_else(|| default_dir(role.as_str()), |dir| Ok(dir.to_owned()))
    }

    /// The way out of this network for a device with this configuration.
    pub(super) fn proxies(&self, config: &Config) -> Result<Proxies, Failed> {
        let written = config.network.proxy.as_ref().map(|url| url.0.as_str());
        Ok(Proxies::choose(self.proxy.as_deref(), written)?)
    }

    /// The directory, and the identity in it, which must be of this role.
    pub(super) fn identity(&self, role: Role) -> Result<(PathBuf, Arc<Live>), Failed> {
        let dir = self.for_role(role)?;
        let config = Config::load(&dir)?;
        let identity = Live::load_behind(&dir, self.proxies(&config)?, config.p2p)?;
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
