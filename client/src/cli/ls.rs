//! `adit ls`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use adit_protocol::control::AgentInfo;
use adit_protocol::{DeviceId, Role};
use clap::Args;
use serde_json::json;

use super::Failed;
use super::data::Data;
use crate::events::{complain, print_line, printable};
use crate::technician::Technician;

/// List the agents that this technician may reach, and whether they are online.
#[derive(Debug, Args)]
#[command(after_help = "Example: adit ls --json")]
pub(super) struct Ls {
    #[command(flatten)]
    data: Data,
    /// One JSON object a line: name, id, online, last_seen (seconds since 1970), tags, software.
    #[arg(long)]
    json: bool,
}

impl Ls {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let (_, identity) = self.data.identity(Role::Technician)?;
        let agents = Technician::connect(identity).list().await?;
        if self.json {
            agents.iter().for_each(|agent| print_line(&to_json(agent)));
        } else if agents.is_empty() {
            complain(
                "this technician reaches no agent (the operator: adit-mediator grants, adit-mediator allow)",
            );
        } else {
            print_table(&agents);
        }
        Ok(())
    }
}

fn to_json(agent: &AgentInfo) -> String {
    let id = DeviceId::try_from(agent.device.as_slice()).map(|id| id.to_string()).ok();
    json!({
        "name": printable(&agent.name, 100),
        "id": id,
        "online": agent.online,
        "last_seen": (agent.last_seen > 0).then_some(agent.last_seen),
        "tags": agent.tags.iter().map(|tag| printable(tag, 200)).collect::<Vec<_>>(),
        "software": printable(&agent.software, 100),
    })
    .to_string()
}

fn print_table(agents: &[AgentInfo]) {
    let names: Vec<String> = agents.iter().map(|agent| printable(&agent.name, 100)).collect();
    let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0).max(5);
    print_line(&format!("{:width$}  {:20}  TAGS", "AGENT", "STATE"));
    for (agent, name) in agents.iter().zip(names) {
        let state = match agent {
            AgentInfo { online: true, .. } => "online".to_owned(),
            AgentInfo { last_seen: 0, .. } => "never seen".to_owned(),
            AgentInfo { last_seen, .. } => format!("offline, {} ago", ago(*last_seen)),
        };
        let tags: Vec<String> = agent.tags.iter().map(|tag| printable(tag, 200)).collect();
        print_line(format!("{name:width$}  {state:20}  {}", tags.join(" ")).trim_end());
    }
}

/// How long ago that was, in the largest unit that fits.
pub(super) fn ago(then: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let seconds = now.saturating_sub(then);
    let units = [("d", 86_400), ("h", 3_600), ("min", 60)];
    let fitting = units.into_iter().find(|(_, length)| seconds >= *length);
    let (unit, length) = fitting.unwrap_or(("s", 1));
    format!("{} {unit}", seconds / length)
}
