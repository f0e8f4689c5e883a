//! `adit redirect`.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use adit_protocol::control::Redirected;
use adit_protocol::{Protocol, Role, Target};
use clap::Args;
use serde_json::json;

use super::data::Data;
use super::{CliError, Failed};
use crate::events::{complain, print_line, printable};
use crate::technician::Technician;

/// Open a port on the server that leads to a target beside an agent: for programs on machines without adit.
///
/// The server is an end of the session and can read what passes, so policy and agent must both permit it. The port
/// takes connections from one address only, one at a time, until its time is over.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  adit redirect office-pc rdp --rdp office-pc.rdp\n  \
    adit redirect office-pc 192.168.1.7:22 --source 203.0.113.7 --ttl 1h")]
pub(super) struct Redirect {
    /// Name or device id of the agent; `adit ls` lists them.
    #[arg(value_name = "AGENT")]
    agent: String,
    /// The target, as seen from the agent: rdp and ssh are those services of the agent itself.
    #[arg(value_name = "rdp|ssh|HOST:PORT", value_parser = target)]
    target: Target,
    /// The address from which the port may be used [default: the one from which the server sees this device]
    #[arg(long, value_name = "IP")]
    source: Option<IpAddr>,
    /// For how long: 30s, 10m, 2h.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = time)]
    ttl: Duration,
    /// Also write a file that RDP clients open.
    #[arg(long, value_name = "FILE")]
    rdp: Option<PathBuf>,
    #[command(flatten)]
    data: Data,
    /// As a JSON object: event, address, host, port, target, source, expires (seconds since 1970), session, tier.
    #[arg(long)]
    json: bool,
}

impl Redirect {
    pub(super) async fn run(self) -> Result<(), Failed> {
        if self.target.protocol == Protocol::Udp {
            return Err(CliError::TcpOnly(self.target).into());
        }
        let (_, identity) = self.data.identity(Role::Technician)?;
        let technician = Technician::connect(identity).await?;
        let port = technician.redirect(&self.agent, &self.target, self.source, self.ttl).await?;
        let opened = port.redirected;
        if let Some(file) = &self.rdp {
            let text = format!(
                "full address:s:{}\r\nprompt for credentials:i:1\r\nadministrative session:i:0\r\n",
                printable(&opened.address, 300)
            );
            fs::write(file, text).map_err(|error| CliError::Write { file: file.clone(), error })?;
        }
        self.tell(&opened);
        Ok(())
    }

    fn tell(&self, opened: &Redirected) {
        let (address, source) = (printable(&opened.address, 300), printable(&opened.source, 100));
        if self.json {
            let (host, port) = address.rsplit_once(':').unwrap_or((&address, ""));
            let said = json!({
                "event": "redirect",
                "address": address,
                "host": host.trim_matches(['[', ']']),
                "port": port.parse::<u16>().ok(),
                "target": self.target.to_string(),
                "source": source,
                "expires": opened.expires,
                "session": adit_protocol::SessionId::try_from(&opened.session[..]).ok().map(|id| id.to_string()),
                "tier": "redirector",
            });
            return print_line(&said.to_string());
        }
        print_line(&address);
        complain(&format!(
            "it leads to {} at {} for {} s, for one connection at a time from {source}\n\
             tier redirector: the server is an end of it and can read what passes",
            self.target,
            self.agent,
            self.ttl.as_secs(),
        ));
        if let Some(file) = &self.rdp {
            complain(&format!("wrote {}", file.display()));
        }
    }
}

fn target(text: &str) -> Result<Target, String> {
    let whole = match text {
        "rdp" => "127.0.0.1:3389",
        "ssh" => "127.0.0.1:22",
        other => other,
    };
    whole.parse().map_err(|_| "expected rdp, ssh or HOST:PORT, IPv6 in brackets".to_owned())
}

fn time(text: &str) -> Result<Duration, String> {
    let wrong = || "expected a time such as 30s, 10m or 2h".to_owned();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let count: u64 = digits.parse().map_err(|_| wrong())?;
    let unit = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(wrong()),
    };
    let seconds = count.checked_mul(unit).filter(|seconds| *seconds > 0).ok_or_else(wrong)?;
    Ok(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_and_times_are_read() {
        let shown = |text| target(text).map(|target| target.to_string());
        assert_eq!(shown("rdp").as_deref(), Ok("127.0.0.1:3389"));
        assert_eq!(shown("printer:80").as_deref(), Ok("printer:80"));
        assert!(shown("vnc").is_err());
        for (text, seconds) in [("30s", 30), ("10m", 600), ("2h", 7200), ("45", 45)] {
            assert_eq!(time(text), Ok(Duration::from_secs(seconds)));
        }
        assert!(["", "0", "m", "1d", "-1s", "99999999999999999999h"].iter().all(|text| time(text).is_err()));
    }
}
