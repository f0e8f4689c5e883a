//! One site: a device behind its router, and that behind its provider's line. Events happen here.

use std::net::Ipv4Addr;
use std::sync::Arc;

use anyhow::Context;
use patchbay::Ipv4Net;
use rand::RngExt;

use super::link::{NOTHING_ELSE, RunningLink};
use super::namespace::Namespace;
use super::port_mapper::{self, PortMapper};
use super::{Host, Link, LinkStats, NatKind, Neighbours, Rate, conntrack, segments};

/// Bytes that passed a site's router, both ways, counted from IP headers on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// TCP to and from a server's ports 443 and 8002: relayed, and what little the control channel takes.
    pub relayed: u64,
    /// All other TCP and UDP but DNS and STUN servers': the direct path.
    pub direct: u64,
}

/// Counts [`Traffic`], behind the rules of events and before NAT.
const COUNTERS: &str = "
    table inet adit_count {
        counter relayed { }
        counter direct { }
        chain postrouting {
            type filter hook postrouting priority 50;
            tcp dport { 443, 8002 } counter name relayed accept
            tcp sport { 443, 8002 } counter name relayed accept
            udp dport { 53, 8002 } accept
            udp sport { 53, 8002 } accept
            meta l4proto { tcp, udp } counter name direct
        }
    }";

/// The router's interface towards its provider.
const WAN: &str = "wan";
/// The provider's towards the internet.
const PROVIDER_WAN: &str = "ix";

/// A site. All events take effect before the call returns, and last until they are undone.
pub struct Site {
    /// The device behind the router.
    pub host: Host,
    /// Its NAT.
    pub nat: NatKind,
    router: patchbay::Router,
    provider: patchbay::Router,
    boot: u16,
    line: Option<RunningLink>,
    _port_mapper: Option<PortMapper>,
}

impl Site {
    /// Builds `name`, its router and its provider's router. `lan` is the network behind a NAT.
    pub(super) async fn up(lab: &patchbay::Lab, name: &str, nat: NatKind, lan: &str) -> anyhow::Result<Self> {
        let mut provider = lab.add_router(&format!("{name}-isp")).ip_support(nat.ip_support()).nat(None);
        if nat.carrier().is_some() {
            // RFC 6598
            provider = provider.downstream_cidr("100.64.10.0/24".parse()?);
        }
        if nat.maps_ports() {
            // miniupnpd does nothing behind an address that is reserved, as those are that patchbay takes (RFC 6890).
            provider = provider.downstream_cidr(lan.replace("192.168.", "11.0.").parse()?);
        }
        let provider = provider.build().await?;
        let mut router = lab
            .add_router(&format!("{name}-router"))
            .upstream(provider.id())
            .ip_support(nat.ip_support())
            .nat(None);
        if !nat.is_public() {
            router = router.downstream_cidr(lan.parse()?);
        }
        let router = router.build().await?;
        let device = lab.add_device(name).iface("eth0", router.id()).build().await?;
        let (host, line, _port_mapper) = (Host::new(device)?, None, None);
        let mut site = Self { host, nat, router, provider, boot: 0, line, _port_mapper };
        if nat == NatKind::Ipv6Only {
            site.host.lose_ipv4()?;
        }
        // patchbay routes public networks one level deep.
        let inside = match () {
            () if nat.is_public() => site.router.downstream_cidr(),
            () if nat.maps_ports() => site.provider.downstream_cidr(),
            () => None,
        };
        if let Some(inside) = inside {
            let via = site.provider.uplink_ip().context("no address")?;
            lab.ix().command(&format!("ip route replace {inside} via {via}"))?;
        }
        site.boot()?;
        site.router.nft(COUNTERS)?;
        if let Some(protocol) = nat.port_mapper() {
            let inside = site.router.downstream_gw().context("the router has no address inside")?;
            site._port_mapper = Some(PortMapper::start(&site.router, WAN, inside, protocol).await?);
        }
        match nat {
            NatKind::UdpBlocked => site.block_udp()?,
            NatKind::HttpsOnly => site.only_https()?,
            _ => {}
        }
        Ok(site)
    }

    /// Another device on the same network. What happens to either site happens to both.
    pub(super) async fn neighbour(
        &self,
        lab: &patchbay::Lab,
        name: &str,
        neighbours: Neighbours,
    ) -> anyhow::Result<Self> {
        let device = lab.add_device(name).iface("eth0", self.router.id()).build().await?;
        if neighbours != Neighbours::Reachable {
            let outside = self.router.uplink_ip().context("the router has no address")?;
            segments::isolate(&self.router, WAN, outside, neighbours == Neighbours::Hairpin)?;
        }
        let (router, provider) = (self.router.clone(), self.provider.clone());
        let (nat, boot, line) = (self.nat, self.boot, None);
        Ok(Self { host: Host::new(device)?, nat, router, provider, boot, line, _port_mapper: None })
    }

    /// The IPv4 address that others see.
    pub fn public_address(&self) -> anyhow::Result<Ipv4Addr> {
        if self.nat.is_public() {
            return Ok(self.host.address);
        }
        let router = if self.nat.carrier().is_some() { &self.provider } else { &self.router };
        router.uplink_ip().context("the router has no address")
    }

    /// From now on the router forwards this port, UDP and TCP, to the device: somebody has set it up.
    pub fn forward_port(&self, port: u16) -> anyhow::Result<()> {
        let device = self.host.address;
        self.router.nft(&format!(
            "table ip adit_forwarded {{
                 chain prerouting {{
                     type nat hook prerouting priority dstnat - 2;
                     iifname {WAN} meta l4proto {{ tcp, udp }} th dport {port} dnat ip to {device}
                 }}
             }}"
        ))
    }

    /// How many ports the router keeps because it was asked to ([`NatKind::maps_ports`]).
    pub fn mapped_ports(&self) -> anyhow::Result<usize> {
        port_mapper::entered(&self.router)
    }

    /// What has passed the router so far.
    pub fn traffic(&self) -> anyhow::Result<Traffic> {
        let counter = |name: &str| {
            let listed = self.router.command(&format!("nft list counter inet adit_count {name}"))?;
            let mut words = listed.split_whitespace().skip_while(|word| *word != "bytes");
            let bytes = words.nth(1).context("nft shows no bytes")?;
            anyhow::Ok(bytes.parse()?)
        };
        Ok(Traffic { relayed: counter("relayed")?, direct: counter("direct")? })
    }

    /// From now on no UDP but DNS passes the router, in either direction, whatever was open before.
    pub fn block_udp(&self) -> anyhow::Result<()> {
        self.forbid("adit_udp", "meta l4proto udp udp dport != 53 udp sport != 53 drop")
    }

    /// Ends [`Site::block_udp`], and what is special about [`NatKind::UdpBlocked`].
    pub fn unblock_udp(&self) -> anyhow::Result<()> {
        self.permit("adit_udp")
    }

    /// From now on nothing passes the router but DNS and TCP to and from port 443; nobody is told.
    pub fn only_https(&self) -> anyhow::Result<()> {
        self.forbid(
            "adit_https",
            "tcp dport 443 accept; tcp sport 443 accept; udp dport 53 accept; udp sport 53 accept; drop",
        )
    }

    /// Ends [`Site::only_https`], and what is special about [`NatKind::HttpsOnly`].
    pub fn not_only_https(&self) -> anyhow::Result<()> {
        self.permit("adit_https")
    }

    /// From now on no TCP passes to these ports of this host.
    pub fn forbid_tcp(&self, host: Ipv4Addr, ports: &[impl ToString]) -> anyhow::Result<()> {
        let ports: Vec<String> = ports.iter().map(ToString::to_string).collect();
        self.forbid("adit_ports", &format!("ip daddr {host} tcp dport {{ {} }} drop", ports.join(", ")))
    }

    /// From now on connections to TCP port 8002 come about, and no data passes on them; nor does UDP. Some firewalls
    /// look at what is said before they decide.
    pub fn swallow_relay(&self) -> anyhow::Result<()> {
        self.block_udp()?;
        self.forbid("adit_swallow", "tcp dport 8002 meta length > 80 drop")
    }

    /// From now on nothing passes the router but TCP to and from this port of this host: a proxy's.
    pub fn only_to(&self, host: Ipv4Addr, port: u16) -> anyhow::Result<()> {
        self.forbid(
            "adit_proxy",
            &format!(
                "ip daddr {host} tcp dport {port} accept; ip saddr {host} tcp sport {port} accept; drop"
            ),
        )
    }

    /// From now on nothing passes the router, and nobody is told.
    pub fn cut(&self) -> anyhow::Result<()> {
        self.forbid("adit_cut", "drop")
    }

    /// Ends [`Site::cut`].
    pub fn mend(&self) -> anyhow::Result<()> {
        self.permit("adit_cut")
    }

    /// From now on the router drops so many percent of the packets, in each direction; 0 ends it.
    pub fn set_loss(&self, percent: u32) -> anyhow::Result<()> {
        match percent {
            0 => self.permit("adit_loss"),
            _ => self.forbid("adit_loss", &format!("numgen random mod 100 < {percent} drop")),
        }
    }

    /// From now on the router drops so many percent of the direct path's packets, in each direction; 0 ends it.
    pub fn set_direct_loss(&self, percent: u32) -> anyhow::Result<()> {
        match percent {
            0 => self.permit("adit_direct_loss"),
            _ => self.forbid(
                "adit_direct_loss",
                &format!(
                    "meta l4proto udp udp dport != {{ 53, 8002 }} udp sport != {{ 53, 8002 }} \
                     numgen random mod 100 < {percent} drop"
                ),
            ),
        }
    }

    /// The router restarts in no time: it forgets all connections, and maps to other ports from now
    /// on. Nobody is told; what arrives on old mappings is dropped.
    pub fn reboot_nat(&mut self) -> anyhow::Result<()> {
        self.boot()?;
        for router in [&self.router, &self.provider] {
            router.run_sync(|| conntrack::flush().context("cannot flush the router's connections"))?;
        }
        Ok(())
    }

    /// See [`super::Lab::set_agent_link`].
    pub(super) fn set_link(&mut self, link: Link) -> anyhow::Result<Option<Arc<LinkStats>>> {
        self.line = None;
        self.set_rate(link.rate.filter(|_| link.is_only_rate()))?;
        if link.is_only_rate() {
            self.provider.nft("add table ip adit_line\n delete table ip adit_line")?;
            return Ok(None);
        }
        let mut inside: Vec<Ipv4Net> = self.provider.downstream_cidr().into_iter().collect();
        if self.nat.is_public() {
            inside.extend(self.router.downstream_cidr());
        }
        let line = RunningLink::start(&self.provider, inside, link)?;
        self.provider.nft(NOTHING_ELSE)?;
        let stats = line.stats();
        self.line = Some(line);
        Ok(Some(stats))
    }

    fn set_rate(&self, rate: Option<Rate>) -> anyhow::Result<()> {
        let bridges = self.provider.command("ip -o link show type bridge")?;
        let lan = bridges.split([':', '@']).nth(1).context("the provider has no bridge")?.trim().to_owned();
        for (router, interface) in [(&self.router, WAN), (&self.provider, lan.as_str())] {
            let limited = router.command(&format!("tc qdisc show dev {interface} root"))?.contains("tbf");
            match rate {
                // Enough burst for a timer tick, 50 ms of queue: what a home router has.
                Some(Rate(bits)) => router.command(&format!(
                    "tc qdisc replace dev {interface} root tbf rate {bits}bit burst 64kb latency 50ms"
                ))?,
                None if limited => router.command(&format!("tc qdisc del dev {interface} root"))?,
                None => continue,
            };
        }
        Ok(())
    }

    fn boot(&mut self) -> anyhow::Result<()> {
        let other: u16 = rand::rng().random_range(1..0x400);
        // Never the same as before: that is what the mask must not be either.
        self.boot = if other == self.boot { other ^ 0x200 } else { other };
        let address = self.router.uplink_ip().context("the router has no address")?;
        let device = self.host.address;
        self.router.nft(&self.nat.rules(WAN, address, device, self.boot))?;
        if let Some(carrier) = self.nat.carrier() {
            let outside = self.provider.uplink_ip().context("the provider has no address")?;
            self.provider.nft(&carrier.rules(PROVIDER_WAN, outside, address, self.boot ^ 0x155))?;
        }
        Ok(())
    }

    /// Applies `rule` to all that leaves the router on either side. Not in `forward`: with the line
    /// in user space nothing passes there.
    fn forbid(&self, table: &str, rule: &str) -> anyhow::Result<()> {
        self.router.nft(&format!(
            "add table inet {table}
             delete table inet {table}
             table inet {table} {{
                 chain postrouting {{ type filter hook postrouting priority filter; {rule}; }}
             }}"
        ))
    }

    fn permit(&self, table: &str) -> anyhow::Result<()> {
        self.router.nft(&format!("add table inet {table}\n delete table inet {table}"))
    }
}
