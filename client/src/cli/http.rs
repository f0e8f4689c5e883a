//! `adit http`.

use std::net::Ipv4Addr;

use adit_protocol::{Protocol, Target};
use clap::Args;

use super::forward::serve;
use super::launch::Launch;
use super::technician::SessionArgs;
use super::{CliError, Failed};
use crate::forward::{ForwardSpec, Listener};

/// Ports on which a web server is expected to speak TLS.
const TLS_PORTS: [u16; 3] = [443, 8443, 10_443];

/// Open a web page of, or beside, an agent in this system's browser.
///
/// It forwards a local port, the same one each time where it is free, until Ctrl-C. For pages that want to be called by
/// their own name, use `adit forward AGENT -D 1080` as the browser's SOCKS5 proxy.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  adit http office-pc\n  adit http office-pc 8080\n  adit http office-pc 192.168.1.1:443"
)]
pub(super) struct Http {
    #[command(flatten)]
    session: SessionArgs,
    /// The web server, as seen from the agent; a port alone is one of the agent itself.
    #[arg(value_name = "[HOST:]PORT", default_value = "80", value_parser = target)]
    target: Target,
    /// Open https:// [default: for the ports 443, 8443 and 10443]
    #[arg(long)]
    tls: bool,
    /// Start no browser, only say the address.
    #[arg(long)]
    print: bool,
    /// Events as JSON, one object a line.
    #[arg(long)]
    json: bool,
}

impl Http {
    pub(super) async fn run(self) -> Result<(), Failed> {
        if self.target.protocol == Protocol::Udp {
            return Err(CliError::TcpOnly(self.target).into());
        }
        self.session.check()?;
        let scheme = if self.tls || TLS_PORTS.contains(&self.target.port) { "https" } else { "http" };
        let spec = ForwardSpec { bind: Ipv4Addr::LOCALHOST.into(), port: 0, target: self.target };
        let listener = Listener::bind(&spec, &self.session.agent).await?;
        let address = format!("{scheme}://{}/", listener.local());
        let launch = if self.print { Launch::Nothing } else { Launch::Browser(address) };
        serve(&self.session, "http", vec![listener], self.json, launch).await
    }
}

fn target(text: &str) -> Result<Target, String> {
    let whole = match text.parse::<u16>() {
        Ok(port) => format!("127.0.0.1:{port}"),
        Err(_) => text.to_owned(),
    };
    whole.parse().map_err(|_| "expected PORT or HOST:PORT, IPv6 in brackets".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_alone_is_the_agents_own() {
        let shown = |text| target(text).map(|target| target.to_string());
        assert_eq!(shown("8080").as_deref(), Ok("127.0.0.1:8080"));
        assert_eq!(shown("[fd00::7]:80").as_deref(), Ok("[fd00::7]:80"));
        assert!(shown("0").is_err() && shown("web").is_err() && shown("70000").is_err());
    }
}
