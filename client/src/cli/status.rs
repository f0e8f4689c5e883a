//! `adit status`.

use std::path::PathBuf;

use adit_protocol::Role;
use clap::Args;

use super::data::Data;
use super::ls::ago;
use super::{CliError, Failed};
use crate::events::{complain, print_line, printable};
use crate::status::{self, CarrierStatus, Document};

/// Show what this device is doing: sessions, carriers, tiers, bytes, round trips.
#[derive(Debug, Args)]
#[command(after_help = "Example: adit status --json")]
pub(super) struct Status {
    #[command(flatten)]
    data: Data,
    /// One JSON object a line, for each running process.
    #[arg(long)]
    json: bool,
}

impl Status {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let mut documents = Vec::new();
        let dirs = self.dirs()?;
        for dir in &dirs {
            documents.extend(status::ask(dir).await?);
        }
        if documents.is_empty() && !self.json {
            let dirs: Vec<String> = dirs.iter().map(|dir| dir.display().to_string()).collect();
            complain(&format!("nothing is running on {}", dirs.join(" or ")));
        }
        for document in &documents {
            if self.json {
                print_line(&serde_json::to_string(document).unwrap_or_default());
            } else {
                print_document(document);
            }
        }
        Ok(())
    }

    fn dirs(&self) -> Result<Vec<PathBuf>, CliError> {
        match self.data.named() {
            Some(dir) => Ok(vec![dir.to_owned()]),
            None => {
                [Role::Agent, Role::Technician].into_iter().map(|role| self.data.for_role(role)).collect()
            }
        }
    }
}

fn print_document(document: &Document) {
    let Document { pid, command, device, since, sessions } = document;
    let count = match sessions.len() {
        1 => "1 session".to_owned(),
        count => format!("{count} sessions"),
    };
    print_line(&format!(
        "adit {command} ({}, process {pid}), for {}, {count}",
        printable(device, 100),
        ago(*since)
    ));
    for session in sessions {
        print_line(&format!(
            "  {}: {}, for {}, {} streams, sent {}, received {}",
            printable(&session.peer, 100),
            session.tier.as_deref().unwrap_or("no way to the other end now"),
            ago(session.since),
            session.streams,
            bytes(session.sent),
            bytes(session.received),
        ));
        session.carriers.iter().for_each(print_carrier);
    }
}

fn print_carrier(carrier: &CarrierStatus) {
    let CarrierStatus { carrier: kind, active, local, remote, rtt_ms, sent, received, .. } = carrier;
    let unknown = "?".to_owned();
    print_line(&format!(
        "    {} {kind:11} {} - {}, {}, sent {}, received {}",
        if *active { "*" } else { " " },
        local.as_ref().unwrap_or(&unknown),
        remote.as_ref().unwrap_or(&unknown),
        rtt_ms.map_or("round trip not known".to_owned(), |rtt| format!("{rtt} ms")),
        bytes(*sent),
        bytes(*received),
    ));
}

/// With a binary unit.
fn bytes(count: u64) -> String {
    let units = [("GiB", 1u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.into_iter().find(|(_, size)| count >= *size) {
        Some((unit, size)) => format!("{:.1} {unit}", count as f64 / size as f64),
        None => format!("{count} B"),
    }
}
