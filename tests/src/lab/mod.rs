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
mod port_mapper;
mod reflect;
mod segments;
mod shaper;
mod site;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use patchbay::IpSupport;

use crate::process::Process;
pub use link::LinkStats;
use link::RunningLink;
use namespace::Namespace;
pub use nat::NatKind;
pub use reflect::{Reflector, UdpProbe};
pub use shaper::{Link, Rate};
pub use site::{Site, Traffic};

/// Two devices behind one router.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Neighbours {
    /// On the same network.
    Reachable,
    /// On segments that are isolated from each other; the router takes what they send to its outer address.
    Hairpin,
    /// The same, and the router does not.
    Isolated,
}

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
    /// Whether the technician is on the agent's network, behind the agent's router, and how the two reach each other.
    pub one_router: Option<Neighbours>,
    /// Each site's line, once everything is up.
    pub link: Link,
}

impl Topology {
    /// An agent and a technician behind these NATs, one server, lines without delay or limit.
    pub fn new(agent: NatKind, technician: NatKind) -> Self {
        Self { agent, technician, relays: 0, stranger: false, one_router: None, link: Link::default() }
    }

    /// An agent and a technician behind the router with this NAT, which for [`Neighbours::Hairpin`] is
    /// [`NatKind::FullCone`].
    pub fn behind_one_router(nat: NatKind, neighbours: Neighbours) -> Self {
        Self { one_router: Some(neighbours), ..Self::new(nat, nat) }
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

/// A server, a relay, and any number of sites, all of which reach each other only through their routers.
pub struct Sites {
    /// Where the mediator is.
    pub server: Host,
    /// Where a relay is.
    pub relay: Host,
    /// In the order asked for.
    pub sites: Vec<Site>,
    _namespaces: patchbay::Lab,
}

impl Sites {
    /// Builds a site behind each of these NATs, with that name. See [`Lab::up`].
    pub async fn up(names: &[(String, NatKind)]) -> anyhow::Result<Self> {
        let lab = patchbay::Lab::builder().build().await.context("cannot make the namespaces")?;
        let servers = lab.add_router("servers").ip_support(IpSupport::DualStack).nat(None).build().await?;
        let add =
            async |name: &str| Host::new(lab.add_device(name).iface("eth0", servers.id()).build().await?);
        let (server, relay) = (add("server").await?, add("relay1").await?);
        let mut sites = Vec::new();
        for (n, (name, nat)) in names.iter().enumerate() {
            sites.push(Site::up(&lab, name, *nat, &format!("192.168.{}.0/24", 10 + n)).await?);
        }
        Ok(Self { server, relay, sites, _namespaces: lab })
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
    servers: patchbay::Router,
    servers_line: Option<RunningLink>,
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
        let agent = Site::up(&lab, "agent", topology.agent, "192.168.10.0/24").await?;
        let technician = match topology.one_router {
            Some(neighbours) => agent.neighbour(&lab, "technician", neighbours).await?,
            None => Site::up(&lab, "technician", topology.technician, "192.168.20.0/24").await?,
        };
        let mut up = Self {
            agent,
            technician,
            server,
            relays,
            stranger,
            servers,
            servers_line: None,
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

    /// Puts `link` between the network of the servers and the internet: one that is more than a rate.
    pub fn set_servers_link(&mut self, link: Link) -> anyhow::Result<()> {
        self.packets_as_on_a_wire(link)?;
        self.servers_line = None;
        let inside = self.servers.downstream_cidr().into_iter().collect();
        let line = RunningLink::start(&self.servers, inside, link)?;
        self.servers.nft(link::NOTHING_ELSE)?;
        self.servers_line = Some(line);
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

    /// Takes another IPv4 address of the same network, and nobody is told.
    pub fn change_address(&mut self) -> anyhow::Result<()> {
        let [a, b, c, last] = self.address.octets();
        let new = Ipv4Addr::new(a, b, c, last ^ 0x40);
        let old = self.address;
        let route = self.device.command("ip -4 route show default")?.trim().to_owned();
        self.device.command(&format!("ip addr del {old}/24 dev eth0"))?;
        self.device.command(&format!("ip addr add {new}/24 dev eth0"))?;
        self.device.command(&format!("ip route replace {route}"))?;
        self.address = new;
        Ok(())
    }

    /// Takes the interface down, or up again with the routes that it had.
    pub fn set_interface(&self, up: bool) -> anyhow::Result<()> {
        if up {
            self.device.command("ip link set eth0 up")?;
            let [a, b, c, _] = self.address.octets();
            self.device.command(&format!("ip route replace default via {}", Ipv4Addr::new(a, b, c, 1)))?;
        } else {
            self.device.command("ip link set eth0 down")?;
        }
        Ok(())
    }

    /// Has no IPv6 any more.
    pub fn lose_ipv6(&mut self) -> anyhow::Result<()> {
        self.device.command("ip -6 addr flush dev eth0")?;
        self.address6 = None;
        Ok(())
    }

    /// From now on counts all that is sent. See [`Host::packets_sent`].
    pub fn count_packets(&self) -> anyhow::Result<()> {
        self.device.nft(
            "table inet adit_packets {
                 counter sent { }
                 chain output {
                     type filter hook output priority filter;
                     oifname eth0 meta l4proto { tcp, udp } counter name sent
                 }
             }",
        )
    }

    /// How many packets [`Host::count_packets`] has counted.
    pub fn packets_sent(&self) -> anyhow::Result<u64> {
        let listed = self.device.command("nft list counter inet adit_packets sent")?;
        let mut words = listed.split_whitespace().skip_while(|word| *word != "packets");
        Ok(words.nth(1).context("nft shows no packets")?.parse()?)
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
