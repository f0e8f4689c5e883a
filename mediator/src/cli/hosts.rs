//! `adit-mediator hosts`: the names and addresses by which this server is reached.

use adit_client::events::print_line;
use clap::{Args, Subcommand};
use serde_json::json;

use super::Data;
use super::devices::say;
use crate::config::{self, Config, parse_hosts};
use crate::error::Error;
use crate::operator::Operator;

/// Arguments of `hosts`.
#[derive(Debug, Args)]
pub struct Hosts {
    #[command(flatten)]
    data: Data,
    /// One JSON object a line.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    change: Option<Change>,
}

/// What to change.
#[derive(Debug, Subcommand)]
enum Change {
    /// Add names or addresses: devices learn them over the old ones, and try all in turn.
    #[command(after_help = "Example: adit-mediator hosts add adit2.example.org")]
    Add {
        /// Names and addresses.
        #[arg(value_name = "NAME_OR_IP", required = true)]
        hosts: Vec<String>,
    },
    /// Remove names or addresses. Devices that are not online now must know another one already.
    #[command(after_help = "Example: adit-mediator hosts remove 198.51.100.7")]
    Remove {
        /// Names and addresses.
        #[arg(value_name = "NAME_OR_IP", required = true)]
        hosts: Vec<String>,
    },
}

impl Hosts {
    /// Lists or changes them.
    ///
    /// # Errors
    /// [`Error`].
    pub(super) async fn run(self) -> Result<(), Error> {
        let dir = self.data.owned()?;
        let mut hosts = Config::load(dir)?.hosts;
        let before = hosts.clone();
        match &self.change {
            None => {}
            Some(Change::Add { hosts: new }) => {
                for host in parse_hosts(new)? {
                    if !hosts.contains(&host) {
                        hosts.push(host);
                    }
                }
            }
            Some(Change::Remove { hosts: old }) => {
                if let Some(unknown) = old.iter().find(|host| !hosts.contains(host)) {
                    return Err(Error::NoHost { host: unknown.clone(), hosts });
                }
                hosts.retain(|host| !old.contains(host));
            }
        }
        if hosts != before {
            parse_hosts(&hosts)?;
            let operator = Operator::open(dir).await?;
            operator.write_down_deed("hosts changed", &format!("to {}", hosts.join(", "))).await?;
            config::set_hosts(dir, &hosts)?;
            say(operator.tell().await?, "devices that are online have been told");
        }
        for host in &hosts {
            print_line(&if self.json { json!({"host": host}).to_string() } else { host.clone() });
        }
        Ok(())
    }
}
