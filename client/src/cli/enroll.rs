//! `adit enroll`.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use adit_protocol::Role;
use adit_protocol::token::EnrolmentToken;
use clap::Args;
use serde_json::json;

use super::data::Data;
use super::{CliError, Failed};
use crate::config;
use crate::enrol::{EnrolError, Enrolment, enrol};
use crate::events::{complain, print_line};
use crate::identity::store::{self, Access};
use crate::identity::{Identity, certificate};
use crate::os;

/// Longer than any token.
const MAX_TOKEN: u64 = 16 * 1024;

/// Make this machine an agent or a technician's device, with a one-time token from the operator.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  adit enroll - --name office-pc --tag site=berlin < token\n  \
    adit enroll --token-file token --json\n  adit-mediator token --role agent | ssh office-pc adit enroll -")]
pub(super) struct Enroll {
    /// The token; `-` reads it from standard input. On a command line other users of this machine can see it.
    #[arg(value_name = "TOKEN|-", required_unless_present = "token_file")]
    token: Option<String>,
    /// Reads the token from a file.
    #[arg(long, value_name = "FILE", env = "ADIT_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    #[command(flatten)]
    data: Data,
    /// Name of this device [default: the name of this machine].
    #[arg(long)]
    name: Option<String>,
    /// A tag for this device, can be given several times; those of the token win.
    #[arg(long = "tag", value_name = "KEY=VALUE")]
    tags: Vec<String>,
    /// This machine was installed anew: give up the identity that is there, and take the name of the device that
    /// has it now, which is revoked. Takes a token for one device (or one that may replace) whose tags that device
    /// carries.
    #[arg(long)]
    replace: bool,
    /// Say the result as a JSON object: role, name, id, data.
    #[arg(long)]
    json: bool,
}

impl Enroll {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let token: EnrolmentToken = self.token()?.parse().map_err(EnrolError::from)?;
        if !matches!(token.role, Role::Agent | Role::Technician) {
            return Err(CliError::TokenRole(token.role).into());
        }
        let dir = self.data.for_role(token.role)?;
        let wanted = Enrolment {
            dir: dir.clone(),
            name: self.name.clone().unwrap_or_else(machine_name),
            tags: self.tags.clone(),
            hosts: Vec::new(),
            replace: self.replace,
            proxies: self.data.proxies(&config::Config::load(&dir)?)?,
        };
        let identity = enrol(&token, &wanted).await?;
        if identity.role == Role::Agent && !dir.join(config::FILE).exists() {
            // What runs as a service has another environment than this.
            let proxy = wanted.proxies.url();
            let access =
                if proxy.is_some_and(|url| url.contains('@')) { Access::Secret } else { Access::Public };
            store::write(&dir, config::FILE, config::template(proxy).as_bytes(), access)?;
        }
        self.tell(&identity, &dir);
        Ok(())
    }

    fn token(&self) -> Result<String, CliError> {
        // What stands on the command line goes before what the environment says.
        let (from, read) = match (self.token.as_deref(), &self.token_file) {
            (Some("-"), _) | (None, None) => ("standard input".to_owned(), read_text(io::stdin())),
            (Some(token), _) => return Ok(token.to_owned()),
            (None, Some(file)) => (file.display().to_string(), fs::File::open(file).and_then(read_text)),
        };
        read.map_err(|error| CliError::TokenFile { from, error })
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
            Role::Relay | Role::Mediator => {}
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
