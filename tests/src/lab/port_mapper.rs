//! A router that maps ports on request: miniupnpd, on the router of a site.

use std::net::Ipv4Addr;
use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use tempfile::TempDir;

use super::namespace::Namespace;
use crate::poll;
use crate::process::Process;

/// What the router understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protocol {
    Pcp,
    NatPmp,
    Upnp,
}

/// Where it enters the ports, and where the router looks for them: before its own rules.
const CHAINS: &str = "
    table inet adit_upnp {
        chain prerouting { type nat hook prerouting priority dstnat - 5; jump asked_in; }
        chain asked_in { }
        chain asked_forward { }
        chain asked_out { }
    }";

/// How many ports it keeps.
pub(super) fn entered(router: &patchbay::Router) -> anyhow::Result<usize> {
    Ok(router.command("nft list chain inet adit_upnp asked_in")?.matches("dnat").count())
}

/// Runs until it is dropped.
pub(super) struct PortMapper {
    _process: Process,
    _dir: TempDir,
}

impl PortMapper {
    /// On `router`, whose outer interface is `wan` and whose inner address is `inside`.
    pub(super) async fn start(
        router: &patchbay::Router,
        wan: &str,
        inside: Ipv4Addr,
        protocol: Protocol,
    ) -> anyhow::Result<Self> {
        // Both are asked for at one port: the other one's version is dropped (RFC 6886, RFC 6887: the first byte).
        let dropped = match protocol {
            Protocol::Pcp => "udp dport 5351 @th,64,8 0 drop;",
            Protocol::NatPmp => "udp dport 5351 @th,64,8 2 drop;",
            Protocol::Upnp => "",
        };
        router.nft(&format!(
            "{CHAINS}
             table inet adit_one_protocol {{
                 chain input {{ type filter hook input priority filter - 1; {dropped} }}
             }}"
        ))?;
        let dir = tempfile::Builder::new().prefix("adit-miniupnpd-").tempdir()?;
        let yes = |is: bool| if is { "yes" } else { "no" };
        let (upnp, others) = (yes(protocol == Protocol::Upnp), yes(protocol != Protocol::Upnp));
        let file = dir.path().join("miniupnpd.conf");
        let settings = format!(
            "ext_ifname={wan}
             listening_ip={inside}/24
             enable_upnp={upnp}
             enable_natpmp={others}
             secure_mode=yes
             uuid=9d4a1f0e-5d0c-4f6e-9f3e-1f5b0c1f2a3b
             upnp_table_name=adit_upnp
             upnp_nat_table_name=adit_upnp
             upnp_forward_chain=asked_forward
             upnp_nat_chain=asked_in
             upnp_nat_postrouting_chain=asked_out
             allow 1024-65535 0.0.0.0/0 1024-65535\n"
        );
        std::fs::write(
            &file,
            settings.lines().map(|line| line.trim().to_owned() + "\n").collect::<String>(),
        )?;
        let mut command = Command::new("/usr/sbin/miniupnpd");
        command.arg("-d").arg("-f").arg(&file).arg("-P").arg(dir.path().join("pid"));
        let process = Process::spawn(router.name(), command, |command| router.spawn_command(command))
            .context("tests/all installs what the lab needs")?;
        let port = if protocol == Protocol::Upnp { ":1900 " } else { ":5351 " };
        poll(Duration::from_secs(20), "the router to take requests for ports", async || {
            router.command("ss -Hlun").ok()?.contains(port).then_some(())
        })
        .await
        .with_context(|| process.error_lines().join("\n"))?;
        Ok(Self { _process: process, _dir: dir })
    }
}
