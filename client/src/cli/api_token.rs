//! `adit api-token`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use adit_protocol::Role;
use adit_protocol::api::{ApiToken, MAX_API_SECONDS};
use clap::Args;

use super::data::Data;
use super::redirect::time;
use super::{CliError, Failed};
use crate::events::{complain, print_line};

/// Make a bearer token with which scripts use the mediator's API in this technician's name.
///
/// It is good until its time is over, or this device is revoked. Keep it as secret as a password.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  curl --cacert web-root.pem -H \"Authorization: Bearer $(adit api-token --ttl 1h)\" \\\n    \
    https://adit.example.org/api/v1/redirect -d '{\"agent\": \"office-pc\", \"target\": \"rdp\"}'"
)]
pub(super) struct MakeToken {
    /// For how long: 10m, 24h; 90 days (2160h) at most.
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = time)]
    ttl: Duration,
    #[command(flatten)]
    data: Data,
}

impl MakeToken {
    pub(super) fn run(self) -> Result<(), Failed> {
        if self.ttl.as_secs() > MAX_API_SECONDS {
            return Err(CliError::TooLong.into());
        }
        let (_, live) = self.data.identity(Role::Technician)?;
        let identity = live.get();
        let issued = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        let token = ApiToken { device: identity.device_id, issued, expires: issued + self.ttl.as_secs() };
        let key = identity.key.to_seed_and_public().map_err(|_| CliError::NoKey)?;
        let text = token.sign(&key).map_err(|_| CliError::NoKey)?;
        print_line(&text);
        complain(&format!("good for {} s, and void when this device is revoked", self.ttl.as_secs()));
        Ok(())
    }
}
