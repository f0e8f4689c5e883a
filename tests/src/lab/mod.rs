//! The lab: a technician's site, an agent's site, and a server network with public addresses, each
//! device and router in a network namespace of its own.
//!
//! ```text
//! agent ─ router (NAT) ─ provider (line) ┐
//!                                        ├─ internet ─ router ─ server, relay1, relay2, ...
//! technician ─ router (NAT) ─ provider ──┘
//! ```
//!
//! Namespaces, wires and addresses are patchbay's; NAT rules, events and the line in user space are
//! the lab's own ([`NatKind`], [`Site`], [`Link`]). Needs `nft`, `tc`, `ip`, and for a [`Link`] that
//! is more than a rate, `ethtool`. Everything is IPv4, and the servers have IPv6, too, where a site has.
//! A [`Link`] that is more than a rate is for IPv4 only.

mod conntrack;
mod link;
mod namespace;
mod nat;
mod reflect;
mod shaper;
mod site;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use patchbay::IpSupport;

use crate::process::Process;
pub use link::LinkStats;
use namespace::Namespace;
pub use nat::NatKind;
pub use reflect::{Reflector, UdpProbe};
pub use shaper::{Link, Rate};
pub use site::{Site, Traffic};

/// What to build.
#[derive(Debug, Clone)]
pub struct Topology {
    /// The NAT of the agent's site.
    pub agent: NatKind,
    /// The NAT of the technician's site.
    pub technician: NatKind,
    /// Hosts in the server network beside `server`, for relays.
    pub relays: usize,
    /// Whether there is a host with a public address that is none of ours.
    pub stranger: bool,
    /// Each site's line, once everything is up.
    pub link: Link,
}

impl Topology {
    /// An agent and a technician behind these NATs, one server, lines without delay or limit.
    pub fn new(agent: NatKind, technician: NatKind) -> Self {
        Self { agent, technician, relays: 0, stranger: false, link: Link::default() }
    }

    /// With so many hosts for relays beside the server.
    pub fn relays(mut self, relays: usize) -> Self {
        self.relays = relays;
        self
    }

    /// With a host in the server network that is none of ours.
    pub fn stranger(mut self) -> Self {
        self.stranger = true;
        self
    }

    /// With lines of that kind at both sites.
    pub fn link(mut self, link: Link) -> Self {
        self.link = link;
        self
    }

    /// With lines of that rate at both sites.
    pub fn rate(mut self, rate: Rate) -> Self {
        self.link.rate = Some(rate);
        self
    }
}

/// A running lab. Its namespaces vanish with it.
pub struct Lab {
    /// Where the agent is.
    pub agent: Site,
    /// Where the technician is.
    pub technician: Site,
    /// Where the mediator is, by default with its embedded relay.
    pub server: Host,
    /// Hosts for more relays.
    pub relays: Vec<Host>,
    /// See [`Topology::stranger`].
    pub stranger: Option<Host>,
    _namespaces: patchbay::Lab,
}

impl Lab {
    /// Builds `topology`. The process must have entered a user namespace ([`crate::harness::enter`]).
    pub async fn up(topology: &Topology) -> anyhow::Result<Self> {
        let lab = patchbay::Lab::builder().build().await.context("cannot make the namespaces")?;
        let has_v6 = [topology.agent, topology.technician].iter().any(|kind| kind.has_ipv6());
        let support = if has_v6 { IpSupport::DualStack } else { IpSupport::V4Only };
        let servers = lab.add_router("servers").ip_support(support).nat(None).build().await?;
        let add =
            async |name: &str| Host::new(lab.add_device(name).iface("eth0", servers.id()).build().await?);
        let server = add("server").await?;
        let mut relays = Vec::new();
        for n in 1..=topology.relays {
            relays.push(add(&format!("relay{n}")).await?);
        }
        let stranger = if topology.stranger { Some(add("stranger").await?) } else { None };
        let mut up = Self {
            agent: Site::up(&lab, "agent", topology.agent, "192.168.10.0/24").await?,
            technician: Site::up(&lab, "technician", topology.technician, "192.168.20.0/24").await?,
            server,
            relays,
            stranger,
            _namespaces: lab,
        };
        up.set_links(topology.link)?;
        Ok(up)
    }

    /// Puts `link` between the agent's router and the internet, in place of what was there. A rate
    /// alone is kept by the kernel (`tbf`), everything else by a program in user space, whose
    /// account is returned.
    pub fn set_agent_link(&mut self, link: Link) -> anyhow::Result<Option<Arc<LinkStats>>> {
        self.packets_as_on_a_wire(link)?;
        self.agent.set_link(link)
    }

    /// As [`Lab::set_agent_link`], at the technician's site.
    pub fn set_technician_link(&mut self, link: Link) -> anyhow::Result<Option<Arc<LinkStats>>> {
        self.packets_as_on_a_wire(link)?;
        self.technician.set_link(link)
    }

    /// Gives both sites lines of that kind, which do not lose the same packets.
    pub fn set_links(&mut self, link: Link) -> anyhow::Result<()> {
        self.set_agent_link(link)?;
        self.set_technician_link(Link { seed: link.seed ^ 0x5eed, ..link })?;
        Ok(())
    }

    /// Between namespaces the kernel passes on packets of up to 64 KiB without checksums. A line in
    /// user space needs packets as they are on a wire.
    fn packets_as_on_a_wire(&self, link: Link) -> anyhow::Result<()> {
        if link.is_only_rate() {
            return Ok(());
        }
        let hosts = [&self.agent.host, &self.technician.host, &self.server];
        hosts
            .into_iter()
            .chain(&self.relays)
            .try_for_each(|host| host.device.command("ethtool -K eth0 tx off tso off gso off").map(drop))
    }
}

/// A device of the lab: programs run on it.
#[derive(Clone)]
pub struct Host {
    /// Its name: `agent`, `technician`, `server`, `relay1`, ...
    pub name: String,
    /// Its own address, behind its NAT if there is one; 0.0.0.0 where it has none.
    pub address: Ipv4Addr,
    /// Its IPv6 address.
    pub address6: Option<Ipv6Addr>,
    device: patchbay::Device,
    environment: Arc<Mutex<Vec<(&'static str, String)>>>,
}

impl Host {
    fn new(device: patchbay::Device) -> anyhow::Result<Self> {
        let (address, address6) = (device.ip().context("a device without an address")?, device.ip6());
        Ok(Self { name: device.name().to_owned(), address, address6, device, environment: Arc::default() })
    }

    fn lose_ipv4(&mut self) -> anyhow::Result<()> {
        self.device.command("ip -4 addr flush dev eth0")?;
        self.address = Ipv4Addr::UNSPECIFIED;
        Ok(())
    }

    /// Programs that start here from now on find this in their environment.
    pub fn set_env(&self, name: &'static str, value: &str) {
        let mut environment = self.environment.lock().unwrap_or_else(PoisonError::into_inner);
        environment.push((name, value.to_owned()));
    }

    /// From now on this host ignores whoever connects to these TCP ports; no ports: it answers again.
    /// Connections that are there go on.
    pub fn refuse(&self, ports: &[u16]) -> anyhow::Result<()> {
        let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
        let rule = match ports.is_empty() {
            true => String::new(),
            false => format!("tcp dport {{ {} }} tcp flags & (syn | ack) == syn drop;", ports.join(", ")),
        };
        self.device.nft(&format!(
            "add table inet adit_refuse
             delete table inet adit_refuse
             table inet adit_refuse {{
                 chain input {{ type filter hook input priority filter; {rule} }}
             }}"
        ))
    }

    /// From now on counts what programs here send: TCP connections to anybody but `server`, and datagrams to this UDP
    /// port. See [`Host::sent`].
    pub fn count_sent(&self, server: Ipv4Addr, udp: u16) -> anyhow::Result<()> {
        self.device.nft(&format!(
            "table inet adit_canary {{
                 counter sent {{ }}
                 chain output {{
                     type filter hook output priority filter;
                     ip daddr {server} accept
                     tcp flags & (syn | ack) == syn counter name sent
                     udp dport {udp} counter name sent
                 }}
             }}"
        ))
    }

    /// How many packets [`Host::count_sent`] has counted.
    pub fn sent(&self) -> anyhow::Result<u64> {
        let listed = self.device.command("nft list counter inet adit_canary sent")?;
        let mut words = listed.split_whitespace().skip_while(|word| *word != "packets");
        Ok(words.nth(1).context("nft shows no packets")?.parse()?)
    }

    /// Starts a program here. It is killed when the [`Process`] is dropped.
    pub fn spawn(&self, mut command: Command) -> anyhow::Result<Process> {
        let environment = self.environment.lock().unwrap_or_else(PoisonError::into_inner).clone();
        command.envs(environment);
        Process::spawn(&self.name, command, |command| self.device.spawn_command(command))
    }

    /// Starts a program here with this process's own standard input and output, for shells.
    pub fn spawn_attached(&self, command: Command) -> anyhow::Result<std::process::Child> {
        self.device.spawn_command_sync(command)
    }

    /// Runs a task on this host: sockets that it opens are this host's. It runs on the host's own
    /// thread, and must not block.
    pub fn task<T, F>(&self, task: F) -> anyhow::Result<tokio::task::JoinHandle<T>>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        self.device.spawn(move |_| task)
    }

    /// Runs `act`, something short such as opening a socket, on this host.
    pub fn run<T: Send + 'static>(
        &self,
        act: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        self.device.run_sync(act)
    }
}
