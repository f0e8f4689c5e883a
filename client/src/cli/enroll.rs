//! `adit enroll`.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use adit_protocol::Role;
use adit_protocol::token::EnrolmentToken;
use clap::Args;
use serde_json::json;

use super::data::{Data, default_dir};
use super::{CliError, Failed};
use crate::enrol::{EnrolError, Enrolment, enrol};
use crate::events::{complain, print_line};
use crate::identity::store::{self, StoreError};
use crate::identity::{Identity, certificate};
use crate::os;

/// Longer than any token.
const MAX_TOKEN: u64 = 16 * 1024;
/// Where an identity waits whose role is not known yet.
const ENROLLING: &str = "enrolling";

/// Make this machine an agent or a technician's device, with a one-time token from the operator.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  adit enroll adit1.AbC... --name office-pc --tag site=berlin\n  \
    adit-mediator token --role agent | ssh office-pc adit enroll -")]
pub(super) struct Enroll {
    /// The token; `-` reads it from standard input, where other users of this machine cannot see it.
    #[arg(value_name = "TOKEN|-", required_unless_present = "token_file", conflicts_with = "token_file")]
    token: Option<String>,
    /// Reads the token from a file.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    #[command(flatten)]
    data: Data,
    /// Name of this device [default: the name of this machine].
    #[arg(long)]
    name: Option<String>,
    /// A tag for this device, can be given several times; those of the token win.
    #[arg(long = "tag", value_name = "KEY=VALUE")]
    tags: Vec<String>,
    /// Give up the identity that is there.
    #[arg(long)]
    replace: bool,
    /// Say the result as a JSON object: role, name, id, data.
    #[arg(long)]
    json: bool,
}

impl Enroll {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let token: EnrolmentToken = self.token()?.parse().map_err(EnrolError::from)?;
        let pending = default_dir(ENROLLING);
        let dir = self.data.named().map_or(pending, |dir| Ok(dir.to_owned()))?;
        let wanted = Enrolment {
            dir: dir.clone(),
            name: self.name.clone().unwrap_or_else(machine_name),
            tags: self.tags.clone(),
            hosts: Vec::new(),
            // Without a named directory the one for the role is asked about when the role is known.
            replace: self.replace,
        };
        let identity = enrol(&token, &wanted).await?;
        let dir = if self.data.named().is_some() { dir } else { self.settle(&dir, &identity)? };
        self.tell(&identity, &dir);
        Ok(())
    }

    fn token(&self) -> Result<String, CliError> {
        let (from, read) = match (&self.token_file, self.token.as_deref()) {
            (Some(file), _) => (file.display().to_string(), fs::File::open(file).and_then(read_text)),
            (None, Some("-") | None) => ("standard input".to_owned(), read_text(io::stdin())),
            (None, Some(token)) => return Ok(token.to_owned()),
        };
        read.map_err(|error| CliError::TokenFile { from, error })
    }

    /// The token said the role: the identity moves to the role's own directory.
    fn settle(&self, pending: &Path, identity: &Identity) -> Result<PathBuf, Failed> {
        let dir = self.data.for_role(identity.role)?;
        match store::load(&dir) {
            Err(StoreError::NotEnrolled { .. }) => {}
            _ if self.replace => {}
            Err(error) => return Err(error.into()),
            Ok(_) => {
                complain(&format!("the new identity is kept in {}", pending.display()));
                return Err(EnrolError::AlreadyEnrolled(dir).into());
            }
        }
        store::save(&dir, identity)?;
        if let Err(error) = fs::remove_dir_all(pending) {
            tracing::warn!(%error, dir = %pending.display(), "cannot be removed");
        }
        Ok(dir)
    }

    fn tell(&self, identity: &Identity, dir: &Path) {
        if self.json {
            let said = json!({
                "event": "enrolled",
                "role": identity.role.as_str(),
                "name": identity.name,
                "id": identity.device_id.to_string(),
                "data": dir.display().to_string(),
            });
            print_line(&said.to_string());
            return;
        }
        print_line(&format!("enrolled as {} {} in {}", identity.role, identity.name, dir.display()));
        let data =
            if self.data.named().is_some() { format!(" --data {}", dir.display()) } else { String::new() };
        match identity.role {
            Role::Agent => complain(&format!("next: adit agent{data}")),
            Role::Technician => complain(&format!("next: adit ls{data}")),
            Role::Relay => complain(&format!("this token was for a relay; next: adit-relay run{data}")),
            Role::Mediator => {}
        }
    }
}

fn read_text(from: impl Read) -> io::Result<String> {
    let mut text = String::new();
    from.take(MAX_TOKEN).read_to_string(&mut text)?;
    Ok(text)
}

/// The name of this machine as far as a device may have it.
fn machine_name() -> String {
    let name = os::machine_name();
    let fitting = |c: char| if certificate::is_name(c.encode_utf8(&mut [0; 4])) { c } else { '-' };
    let name: String = name.chars().take(63).map(fitting).collect();
    if certificate::is_name(&name) { name } else { "unnamed".to_owned() }
}
