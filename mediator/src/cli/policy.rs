//! `adit-mediator allow | deny | grants`: which technician reaches which agents.

use adit_client::events::print_line;
use adit_protocol::Role;
use clap::Args;
use serde_json::json;

use super::Data;
use super::devices::say;
use super::table::table;
use crate::error::Error;
use crate::operator::Operator;
use crate::organisation::unix_now;
use crate::store::{Device, Reach};
use crate::token::check_tags;

/// Arguments of `allow`.
#[derive(Debug, Args)]
pub struct Allow {
    #[command(flatten)]
    data: Data,
    /// Name or id of the technician's device.
    #[arg(value_name = "TECHNICIAN")]
    technician: String,
    /// It reaches the agents that carry all of these tags; can be given several times.
    #[arg(long = "tag", value_name = "KEY=VALUE", required_unless_present = "all_agents")]
    tags: Vec<String>,
    /// It reaches every agent, whatever its tags.
    #[arg(long, conflicts_with = "tags")]
    all_agents: bool,
    /// Also through the redirector, where the server can read what passes; the agent must permit it, too.
    #[arg(long)]
    redirector: bool,
}

/// Arguments of `deny`.
#[derive(Debug, Args)]
pub struct Deny {
    #[command(flatten)]
    data: Data,
    /// Name or id of the technician's device.
    #[arg(value_name = "TECHNICIAN")]
    technician: String,
    /// Number of the grant that it loses; `adit-mediator grants` lists them.
    #[arg(value_name = "GRANT", required_unless_present = "all")]
    grant: Option<i64>,
    /// It loses all of them.
    #[arg(long, conflicts_with = "grant")]
    all: bool,
}

/// Arguments of `grants`.
#[derive(Debug, Args)]
pub struct Grants {
    #[command(flatten)]
    data: Data,
    /// Only those of this technician's device.
    #[arg(value_name = "TECHNICIAN")]
    technician: Option<String>,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

impl Allow {
    /// Makes a grant.
    ///
    /// # Errors
    /// [`Error`].
    pub(super) async fn run(self) -> Result<(), Error> {
        check_tags(&self.tags)?;
        let operator = Operator::open(self.data.owned()?).await?;
        let technician = operator.device(&self.technician, Some(Role::Technician)).await?;
        let mut what = if self.all_agents { "all agents".to_owned() } else { self.tags.join(" ") };
        if self.redirector {
            what.push_str(", redirector too");
        }
        operator.write_down("allowed", &technician, &what).await?;
        let reach = Reach { tags: &self.tags, all: self.all_agents, redirector: self.redirector };
        let made = operator.store.allow(technician.id, &reach, unix_now()).await;
        let number = operator.database(made)?;
        let agents = operator.database(operator.store.devices().await)?;
        let (technician, reached) = count(&agents, &technician);
        println!("grant {number}: {} reaches {what}", technician.name);
        eprintln!("it reaches {reached} of the agents that are enrolled now");
        say(operator.tell().await?, "");
        Ok(())
    }
}

impl Deny {
    /// Takes grants away.
    ///
    /// # Errors
    /// [`Error`].
    pub(super) async fn run(self) -> Result<(), Error> {
        let operator = Operator::open(self.data.owned()?).await?;
        let technician = operator.device(&self.technician, Some(Role::Technician)).await?;
        let grants = &technician.grants;
        let lost: Vec<String> = grants
            .iter()
            .filter(|grant| self.grant.is_none_or(|number| number == grant.id))
            .map(ToString::to_string)
            .collect();
        if let (Some(number), true) = (self.grant, lost.is_empty()) {
            let has = grants.iter().map(ToString::to_string).collect();
            return Err(Error::NoGrant { number, technician: technician.name, has });
        }
        operator.write_down_loss("denied", &technician, &lost.join("; ")).await;
        operator.database(operator.store.deny(technician.id, self.grant).await)?;
        println!(
            "{} has lost {}",
            technician.name,
            if lost.is_empty() { "nothing".into() } else { lost.join("; ") }
        );
        say(operator.tell().await?, "");
        Ok(())
    }
}

impl Grants {
    /// Lists grants.
    ///
    /// # Errors
    /// [`Error`].
    pub(super) async fn run(self) -> Result<(), Error> {
        let operator = Operator::open(self.data.owned()?).await?;
        let devices = operator.database(operator.store.devices().await)?;
        let wanted = match &self.technician {
            Some(name) => Some(operator.device(name, Some(Role::Technician)).await?.id),
            None => None,
        };
        let technicians = devices.iter().filter(|device| {
            device.role == Role::Technician
                && device.revoked == 0
                && wanted.is_none_or(|wanted| wanted == device.id)
        });
        let agents: Vec<&Device> =
            devices.iter().filter(|device| device.role == Role::Agent && device.revoked == 0).collect();
        let mut rows = Vec::new();
        for technician in technicians {
            for grant in &technician.grants {
                let reached = agents.iter().filter(|agent| grant.covers(&agent.tags)).count();
                if self.json {
                    print_line(
                        &json!({
                            "grant": grant.id,
                            "technician": technician.name,
                            "technician_id": technician.id.to_string(),
                            "tags": grant.tags,
                            "all_agents": grant.all,
                            "redirector": grant.redirector,
                            "agents": reached,
                        })
                        .to_string(),
                    );
                }
                let mut what = if grant.all { "all agents".to_owned() } else { grant.tags.join(" ") };
                if grant.redirector {
                    what.push_str(", redirector too");
                }
                rows.push([grant.id.to_string(), technician.name.clone(), what, reached.to_string()]);
            }
            if technician.grants.is_empty() && !self.json {
                rows.push(["-".into(), technician.name.clone(), "nothing".into(), "0".into()]);
            }
        }
        if !self.json {
            table(["GRANT", "TECHNICIAN", "REACHES", "AGENTS NOW"], rows);
        }
        Ok(())
    }
}

/// The technician as it is among `devices`, and how many agents it reaches.
fn count<'a>(devices: &'a [Device], technician: &'a Device) -> (&'a Device, usize) {
    let now = devices.iter().find(|device| device.id == technician.id).unwrap_or(technician);
    let reached = devices.iter().filter(|agent| agent.revoked == 0 && now.reaches(agent).is_some());
    (now, reached.count())
}
