//! `adit doctor`.

use std::path::PathBuf;
use std::sync::Arc;

use adit_protocol::Role;
use clap::Args;

use super::data::Data;
use super::{CliError, Failed};
use crate::doctor::{self, Finding, tried};
use crate::exit::Failure;
use crate::identity::{Live, store};
use crate::technician::Technician;

/// The connection test: what works from this device, what does not, and what to do about it.
///
/// It ends with 0 when there is no fault, else with 4. A device that is online meanwhile is not disturbed.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    adit doctor                      from here to the servers\n  \
    adit doctor reception-pc         also from that agent, and what to expect between the two\n  \
    adit doctor --data /var/lib/adit-agent")]
pub(super) struct Doctor {
    /// An agent that this technician may reach, by name or device id: it tries, too.
    #[arg(value_name = "AGENT")]
    agent: Option<String>,
    #[command(flatten)]
    data: Data,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

impl Doctor {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let (role, identity) = self.identity()?;
        if let Some(agent) = self.agent.as_ref().filter(|_| role != Role::Technician) {
            return Err(CliError::NotFromHere { agent: agent.clone() }.into());
        }
        let (mut findings, here) = doctor::examine(&identity.get()).await;
        if let Some(agent) = &self.agent {
            let technician = Technician::connect(identity);
            match technician.examine(agent).await {
                Ok(results) => {
                    findings.extend(tried(agent, &results));
                    findings.push(doctor::between(&here, &results, agent));
                }
                Err(error) => {
                    let remedy = error.remedy().unwrap_or_else(|| "adit ls shows who is online".to_owned());
                    findings.push(Finding::fault(format!("from {agent}: {error}"), &remedy));
                }
            }
            technician.close().await;
        }
        match doctor::print(&findings, self.json) {
            0 => Ok(()),
            faults => Err(CliError::Faults(faults).into()),
        }
    }

    /// The device in the directory that was named; else the technician, or the agent, that is enrolled for this user.
    fn identity(&self) -> Result<(Role, Arc<Live>), Failed> {
        let is_enrolled = |role: &Role| {
            let dir: Result<PathBuf, _> = self.data.for_role(*role);
            dir.is_ok_and(|dir| store::load(&dir).is_ok_and(|identity| identity.role == *role))
        };
        let role = [Role::Technician, Role::Agent].into_iter().find(is_enrolled).unwrap_or(Role::Technician);
        let (_, identity) = self.data.identity(role)?;
        Ok((role, identity))
    }
}
