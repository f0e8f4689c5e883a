//! `adit redirect`.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use adit_protocol::control::Redirected;
use adit_protocol::{DeviceId, Protocol, Role};
use clap::Args;
use serde_json::json;

use super::data::Data;
use super::launch::Launch;
use super::{CliError, Failed};
use crate::events::{complain, print_line, printable};
use crate::known::{self, Known, fingerprint};
use crate::place::Place;
use crate::technician::Technician;

/// What is said when this machine does not reach the port that was opened for it.
pub(super) const UNREACHED: &str =
    "this machine does not reach the server's port: TCP to such ports may be blocked here";

/// Open a port or pages on the server that lead to a target beside an agent: for machines without adit.
///
/// The server is an end of the session and can read what passes, so policy and agent must both permit it. A port takes
/// connections from one address only, one at a time, until its time is over. Of a web server it makes a link instead: it
/// can be used once, and the browser that used it may stay.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  adit redirect office-pc rdp --rdp office-pc.rdp\n  \
    adit redirect office-pc 192.168.1.7:22 --source 203.0.113.7 --ttl 1h\n  \
    adit redirect office-pc https://192.168.1.1/ --open")]
pub(super) struct Redirect {
    /// Name or device id of the agent; `adit ls` lists them.
    #[arg(value_name = "AGENT")]
    agent: String,
    /// The target, as seen from the agent: rdp, ssh, http and https are those services of the agent itself; a URL is a web
    /// server's.
    #[arg(value_name = "rdp|ssh|http|https|HOST:PORT|URL")]
    target: Place,
    /// The address from which it may be used [default: the one from which the port sees this machine]
    #[arg(long, value_name = "IP")]
    source: Option<IpAddr>,
    /// For how long: 30s, 10m, 2h.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = time)]
    ttl: Duration,
    /// Also write a file that RDP clients open.
    #[arg(long, value_name = "FILE")]
    rdp: Option<PathBuf>,
    /// Open the link in this system's browser.
    #[arg(long)]
    open: bool,
    /// The certificate that an https target may show, in place of the one that it showed the first time.
    #[arg(long, value_name = "SHA256", value_parser = certificate)]
    certificate: Option<[u8; 32]>,
    #[command(flatten)]
    data: Data,
    /// As a JSON object: event, address, host, port, link, certificate, target, source (or two, "IPV4, IPV6"), expires (seconds
    /// since 1970), session, tier.
    #[arg(long)]
    json: bool,
}

impl Redirect {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let Place { target, page } = &self.target;
        if target.protocol == Protocol::Udp {
            return Err(CliError::TcpOnly(target.clone()).into());
        }
        let tls = page.as_ref().is_some_and(|page| page.tls);
        for (given, fits, option) in [
            (self.open, page.is_some(), "--open"),
            (self.rdp.is_some(), page.is_none(), "--rdp"),
            (self.certificate.is_some(), tls, "--certificate"),
        ] {
            if given && !fits {
                return Err(CliError::Unfit { option }.into());
            }
        }
        let (dir, identity) = self.data.identity(Role::Technician)?;
        let known = Known::open(&dir);
        let wrong = |error| CliError::Write { file: known.path().to_owned(), error };
        let technician = Technician::connect(identity);
        // Known by its id: names are given to other machines.
        let mut agent = self.agent.clone();
        if tls {
            let agents = technician.list().await?;
            let named = agents.iter().find(|listed| listed.name == self.agent);
            agent = named
                .and_then(|agent| DeviceId::try_from(&agent.device[..]).ok())
                .map_or(agent, |id| id.to_string());
        }
        let before = if tls { known.of(&agent, &target.to_string()).map_err(wrong)? } else { None };
        let expected = self.certificate.or(before);
        let web = page.as_ref().map(|page| page.wanted(expected));
        let mut port = technician.redirect(&self.agent, target, self.source, self.ttl, web).await?;
        port.look().await;
        let (opened, is_reached) = (port.redirected, port.is_reached);
        let shown = <[u8; 32]>::try_from(&opened.certificate[..]).ok();
        if page.is_some() && opened.link.is_empty()
            || tls && (shown.is_none() || expected.is_some() && expected != shown)
        {
            technician.end_redirected(&opened).await;
            technician.close().await;
            return Err(CliError::NoLink.into());
        }
        if let Some(file) = &self.rdp {
            let text = format!(
                "full address:s:{}\r\nprompt for credentials:i:1\r\nadministrative session:i:0\r\n",
                printable(&opened.address, 300)
            );
            fs::write(file, text).map_err(|error| CliError::Write { file: file.clone(), error })?;
        }
        self.tell(&opened);
        if !is_reached {
            complain(&format!("{UNREACHED}; for another machine give its address (--source)"));
        }
        if let Some(shown) = shown.filter(|_| before != shown) {
            known.note(&agent, &target.to_string(), &shown).map_err(wrong)?;
            let is = if expected.is_some() { "is known from now on" } else { "was seen for the first time" };
            complain(&format!(
                "the certificate of {target} {is}: SHA-256 {}\ncompare it with the one that the web server's owner sees",
                fingerprint(&shown)
            ));
        }
        if self.open {
            Launch::Browser(printable(&opened.link, 500)).start();
        }
        Ok(())
    }

    fn tell(&self, opened: &Redirected) {
        let (address, source) = (printable(&opened.address, 300), printable(&opened.source, 100));
        let (link, target) = (printable(&opened.link, 500), &self.target.target);
        let pages = self.target.page.is_some();
        if self.json {
            let (host, port) = address.rsplit_once(':').unwrap_or((&address, ""));
            let said = json!({
                "event": "redirect",
                "address": address,
                "host": host.trim_matches(['[', ']']),
                "port": port.parse::<u16>().ok(),
                "link": pages.then_some(&link),
                "certificate": (!opened.certificate.is_empty()).then(|| fingerprint(&opened.certificate)),
                "target": target.to_string(),
                "source": source,
                "expires": opened.expires,
                "session": adit_protocol::SessionId::try_from(&opened.session[..]).ok().map(|id| id.to_string()),
                "tier": "redirector",
            });
            return print_line(&said.to_string());
        }
        print_line(if pages { &link } else { &address });
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        // No longer than the mediator grants.
        let (agent, seconds) = (&self.agent, opened.expires.saturating_sub(now).min(self.ttl.as_secs()));
        let how = if pages { "for the first browser that opens it" } else { "for one connection at a time" };
        complain(&format!(
            "it leads to {target} at {agent} for {seconds} s, {how}, from {source}\n\
             tier redirector: the server is an end of it and can read what passes",
        ));
        // A name of the session's own begins with a label of 32 digits.
        if pages && address.find('.') != Some(32) {
            complain(
                "it is on a port of the server: cookies that scripts read or set do not work there (they do where the \
                 operator gives the redirector a domain: [redirector] domain)",
            );
        }
        if let Some(file) = &self.rdp {
            complain(&format!("wrote {}", file.display()));
        }
    }
}

fn certificate(text: &str) -> Result<[u8; 32], String> {
    known::parse(text).ok_or_else(|| "expected a SHA-256: 32 bytes in hexadecimal digits".to_owned())
}

pub(super) fn time(text: &str) -> Result<Duration, String> {
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
        let shown = |text: &str| text.parse::<Place>().map(|place| place.target.to_string());
        assert_eq!(shown("rdp").as_deref(), Ok("127.0.0.1:3389"));
        assert_eq!(shown("printer:80").as_deref(), Ok("printer:80"));
        assert!(shown("vnc").is_err());
        for (text, seconds) in [("30s", 30), ("10m", 600), ("2h", 7200), ("45", 45)] {
            assert_eq!(time(text), Ok(Duration::from_secs(seconds)));
        }
        assert!(["", "0", "m", "1d", "-1s", "99999999999999999999h"].iter().all(|text| time(text).is_err()));
    }
}
