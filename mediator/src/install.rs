//! `adit-mediator install` and `uninstall`: the mediator as a service of this system.

use adit_client::exit::Failure;
use adit_client::service::systemd::{self, Service, Setup};
use clap::Args;

use crate::cli::{Data, Switch};
use crate::config::{Listen, parse_hosts};
use crate::error::Error;
use crate::organisation::Organisation;
use crate::server::Sockets;

/// The mediator as a service.
pub const SERVICE: Service = Service {
    name: "adit-mediator",
    program: "adit-mediator",
    command: &["run"],
    unit: include_str!("../../deploy/systemd/adit-mediator.service"),
    users: include_str!("../../deploy/sysusers/adit-mediator.conf"),
};

/// Arguments of `install`.
#[derive(Debug, Args)]
pub struct Install {
    #[command(flatten)]
    data: Data,
    /// Names and addresses that clients use to reach this server; for a directory without an organisation.
    #[arg(long = "host", value_name = "NAME_OR_IP[,…]")]
    hosts: Vec<String>,
    /// Whether to run an embedded relay.
    #[arg(long, value_name = "on|off", default_value = "on")]
    relay: Switch,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Arguments of `uninstall`.
#[derive(Debug, Args)]
pub struct Uninstall {
    #[command(flatten)]
    data: Data,
    /// Remove its state, with all keys of the organisation, and its user, too.
    #[arg(long)]
    purge: bool,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

impl Install {
    /// Makes an organisation where there is none, checks the ports, and sets the service up.
    ///
    /// # Errors
    /// What failed; nothing was changed when rights or ports are missing.
    pub fn run(&self) -> Result<(), Box<dyn Failure>> {
        let dir = &self.data.dir;
        let without_relay = (self.relay == Switch::Off).then(|| ["--relay", "off"].map(str::to_owned));
        let setup =
            Setup::of_this_program(dir, without_relay.into_iter().flatten().collect()).map_err(boxed)?;
        if self.dry_run {
            if !Organisation::is_in(dir) {
                println!("adit-mediator init --data {} --host {}", dir.display(), self.hosts.join(","));
            }
            println!("{}", systemd::planned_install(&SERVICE, &setup));
            return Ok(());
        }
        systemd::check(&SERVICE, &setup).map_err(boxed)?;
        let new = !Organisation::is_in(dir);
        if new && self.hosts.is_empty() {
            return Err(boxed(Error::Nameless(dir.clone())));
        }
        let hosts = parse_hosts(&self.hosts);
        let listen =
            if new { Listen::default() } else { Organisation::load(dir).map_err(boxed)?.config.listen };
        if !systemd::is_running(&SERVICE) {
            drop(Sockets::bind(dir, &listen, self.relay == Switch::On).map_err(boxed)?);
        }
        if new {
            Organisation::init(dir, &hosts.map_err(boxed)?).map_err(boxed)?;
            println!("made a new organisation in {}", dir.display());
        }
        println!("{}", systemd::install(&SERVICE, &setup, Some(listen.diagnostics)).map_err(boxed)?);
        println!("next: sudo adit-mediator token --data {} --role agent --tag customer=acme", dir.display());
        Ok(())
    }
}

impl Uninstall {
    /// Stops and removes the service.
    ///
    /// # Errors
    /// What failed.
    pub fn run(&self) -> Result<(), Box<dyn Failure>> {
        let setup = Setup::of_this_program(&self.data.dir, Vec::new()).map_err(boxed)?;
        println!("{}", systemd::uninstall(&SERVICE, &setup, self.purge, self.dry_run).map_err(boxed)?);
        Ok(())
    }
}

fn boxed(error: impl Failure + 'static) -> Box<dyn Failure> {
    Box::new(error)
}
