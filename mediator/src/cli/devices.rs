//! `adit-mediator devices | rename | tag | revoke`.

use std::collections::HashMap;

use adit_client::events::print_line;
use adit_client::identity::Peer;
use adit_client::identity::certificate::{is_name, tag_key};
use adit_protocol::{DeviceId, Role};
use clap::Args;
use serde_json::json;

use super::Data;
use super::table::table;
use crate::admin::{self, Answer, Present, Request};
use crate::broker::Effect;
use crate::error::Error;
use crate::operator::Operator;
use crate::organisation::unix_now;
use crate::store::Device;
use crate::store::revoke::Extended;
use crate::times::{ago, until};
use crate::token::check_tags;

/// Arguments of `devices`.
#[derive(Debug, Args)]
pub struct Devices {
    #[command(flatten)]
    data: Data,
    /// Only devices of this role: agent, technician or relay.
    #[arg(long)]
    role: Option<Role>,
    /// Only devices that carry all of these tags.
    #[arg(long = "tag", value_name = "KEY=VALUE")]
    tags: Vec<String>,
    /// Revoked ones, too.
    #[arg(long)]
    all: bool,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

/// Which device.
#[derive(Debug, Args)]
pub(super) struct Which {
    #[command(flatten)]
    data: Data,
    /// Name or id of the device.
    #[arg(value_name = "DEVICE")]
    device: String,
    /// Its role, where devices of several roles have that name.
    #[arg(long)]
    role: Option<Role>,
}

/// Arguments of `rename`.
#[derive(Debug, Args)]
pub struct Rename {
    #[command(flatten)]
    which: Which,
    /// Its new name: 1 to 63 of A-Z a-z 0-9 . _ -
    #[arg(value_name = "NAME")]
    name: String,
}

/// Arguments of `tag`.
#[derive(Debug, Args)]
pub struct Tag {
    #[command(flatten)]
    which: Which,
    /// Tags that it gets. A key that it has already gets the new value.
    #[arg(value_name = "KEY=VALUE", required_unless_present = "remove")]
    tags: Vec<String>,
    /// Keys of tags that it loses; can be given several times.
    #[arg(long, value_name = "KEY")]
    remove: Vec<String>,
}

/// Arguments of `revoke`.
#[derive(Debug, Args)]
pub struct Revoke {
    #[command(flatten)]
    which: Which,
}

impl Devices {
    /// Lists devices.
    ///
    /// # Errors
    /// [`Error`].
    pub(super) async fn run(self) -> Result<(), Error> {
        let operator = Operator::open(self.data.owned()?).await?;
        let online = match admin::ask(&operator.dir, &Request::Presence).await? {
            Some(Answer::Presence { channels }) => Some(channels),
            _ => None,
        };
        if online.is_none() && !self.json {
            eprintln!("the mediator does not run: nobody is online");
        }
        let mut present: HashMap<DeviceId, Present> = HashMap::new();
        for channel in online.into_iter().flatten() {
            present.insert(channel.device, channel);
        }
        let mut devices = operator.database(operator.store.devices().await)?;
        devices.retain(|device| {
            (self.all || device.revoked == 0)
                && self.role.is_none_or(|role| role == device.role)
                && self.tags.iter().all(|tag| device.tags.contains(tag))
        });
        if self.json {
            for device in &devices {
                print_line(&to_json(device, present.get(&device.id)).to_string());
            }
            return Ok(());
        }
        let now = unix_now();
        let rows = devices.iter().map(|device| {
            let here = present.get(&device.id);
            let state = match here {
                _ if device.revoked > 0 => format!("revoked {} ago", ago(now, device.revoked)),
                Some(here) => format!("online for {}", ago(now, here.since)),
                None if device.seen.at == 0 => "never seen".to_owned(),
                None => format!("seen {} ago", ago(now, device.seen.at)),
            };
            let state = if device.cloned + RECENT > now { format!("{state}, CLONED") } else { state };
            let address = here.map_or(&device.seen.address, |here| &here.address);
            let or_none = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
            [
                device.name.clone(),
                device.role.to_string(),
                state,
                or_none(address),
                or_none(here.map_or(&device.seen.software, |here| &here.software)),
                expires(device).map_or("-".to_owned(), |at| until(now, at)),
                or_none(&device.tags.join(" ")),
            ]
        });
        table(["NAME", "ROLE", "STATE", "ADDRESS", "SOFTWARE", "CERTIFICATE", "TAGS"], rows);
        Ok(())
    }
}

/// For so long the list shows that two machines were seen with one identity. Seconds.
const RECENT: u64 = 7 * 24 * 3600;

fn to_json(device: &Device, here: Option<&Present>) -> serde_json::Value {
    let time = |at: u64| (at > 0).then_some(at);
    json!({
        "id": device.id.to_string(),
        "name": device.name,
        "role": device.role.as_str(),
        "tags": device.tags,
        "online": here.is_some(),
        "online_since": here.map(|here| here.since),
        "address": here.map_or(&device.seen.address, |here| &here.address),
        "version": here.map_or(&device.seen.software, |here| &here.software),
        "last_seen": if here.is_some() { Some(unix_now()) } else { time(device.seen.at) },
        "enrolled": device.enrolled,
        "expires": expires(device),
        "revoked": time(device.revoked),
        "cloned": time(device.cloned),
    })
}

fn expires(device: &Device) -> Option<u64> {
    Peer::from_certificate(&device.certificate).ok().map(|peer| peer.not_after)
}

impl Which {
    async fn find(&self) -> Result<(Operator, Device), Error> {
        let operator = Operator::open(self.data.owned()?).await?;
        let device = operator.device(&self.device, self.role).await?;
        Ok((operator, device))
    }
}

impl Rename {
    /// Renames a device.
    ///
    /// # Errors
    /// [`Error`].
    pub(super) async fn run(self) -> Result<(), Error> {
        if !is_name(&self.name) {
            return Err(Error::Name(self.name));
        }
        let (operator, device) = self.which.find().await?;
        if device.name == self.name {
            println!("{} has that name", device.name);
            return Ok(());
        }
        // The other end of every tunnel compares the certificate's name with the one asked for.
        if operator.authority().is_none() {
            return Err(Error::KeyOffline("a new name takes a new certificate"));
        }
        let taken = operator.device(&self.name, Some(device.role)).await;
        if let Ok(other) = taken {
            return Err(Error::NameTaken { name: self.name, id: other.id.to_string() });
        }
        operator.write_down("renamed", &device, &format!("to {}", self.name)).await?;
        operator.database(operator.store.rename(device.id, &self.name).await)?;
        println!("{} is {} now", device.name, self.name);
        say(operator.tell().await?, "it takes the name when it comes");
        Ok(())
    }
}

impl Tag {
    /// Changes a device's tags.
    ///
    /// # Errors
    /// [`Error`].
    pub(super) async fn run(self) -> Result<(), Error> {
        check_tags(&self.tags)?;
        let (operator, device) = self.which.find().await?;
        let replaced: Vec<&str> =
            self.tags.iter().map(|tag| tag_key(tag)).chain(self.remove.iter().map(String::as_str)).collect();
        let kept = device.tags.iter().filter(|tag| !replaced.contains(&tag_key(tag)));
        let mut tags: Vec<String> = kept.chain(&self.tags).cloned().collect();
        tags.sort_unstable();
        tags.dedup();
        check_tags(&tags)?;
        operator.write_down("tagged", &device, &tags.join(" ")).await?;
        operator.database(operator.store.set_tags(device.id, &tags).await)?;
        let shown = if tags.is_empty() { "no tags".to_owned() } else { tags.join(" ") };
        println!("{} carries {shown}", device.name);
        say(operator.tell().await?, "");
        Ok(())
    }
}

impl Revoke {
    /// Revokes a device.
    ///
    /// # Errors
    /// [`Error`].
    pub(super) async fn run(self) -> Result<(), Error> {
        let (operator, device) = self.which.find().await?;
        operator.write_down_loss("revoked", &device, "").await;
        operator.database(operator.store.revoke(device.id, unix_now()).await)?;
        println!("{} {} ({}) is revoked and cannot come back", device.role, device.name, device.id);
        // A mediator that runs cuts the device off first, and makes the list, too.
        let told = operator.tell().await;
        let authority = operator.authority();
        let list = operator.store.extend_list(authority.as_ref(), unix_now()).await;
        say(told?, "");
        if operator.database(list)? == Extended::Unsigned {
            eprintln!(
                "warning: the enrolment key is offline: this mediator refuses the device, but others do not know it yet\n  \
                 put root-key.pem back: the list follows with the next change, or when the mediator is restarted"
            );
        }
        Ok(())
    }
}

/// What the change did to what runs.
pub(super) fn say(effect: Option<Effect>, otherwise: &str) {
    let Some(Effect { sessions, channels, renewed }) = effect else {
        return eprintln!("the mediator does not run: it counts from its start on");
    };
    let count =
        |n: usize, one: &str, many: &str| (n > 0).then(|| format!("{n} {}", if n == 1 { one } else { many }));
    let parts: Vec<String> = [
        count(sessions, "session ended", "sessions ended"),
        count(channels, "control channel closed", "control channels closed"),
        count(renewed, "certificate renewed", "certificates renewed"),
    ]
    .into_iter()
    .flatten()
    .collect();
    match parts.as_slice() {
        [] if otherwise.is_empty() => {}
        [] => eprintln!("{otherwise}"),
        parts => eprintln!("{}", parts.join(", ")),
    }
}
