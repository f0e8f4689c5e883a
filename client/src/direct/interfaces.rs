//! The addresses of this machine at which a peer may reach it.

use std::net::{IpAddr, Ipv4Addr};

use adit_tunnel::path::is_private;
use if_addrs::{IfOperStatus, get_if_addrs};

/// How names of bridges and ports of containers and virtual machines begin: their addresses are the same
/// on thousands of machines and reach nobody but the guests.
const GUESTS: [&str; 18] = [
    "docker",
    "br-",
    "veth",
    "virbr",
    "vmnet",
    "vboxnet",
    "lxcbr",
    "lxdbr",
    "incusbr",
    "podman",
    "cni",
    "flannel",
    "cali",
    "kube",
    "vethernet",
    "vmware",
    "virtualbox",
    "bridge100",
];

/// The same of VPNs: through one lies a second tunnel, and often a long way round.
const VPNS: [&str; 13] = [
    "tun",
    "tap",
    "utun",
    "wg",
    "wireguard",
    "wt0",
    "netbird",
    "tailscale",
    "zt",
    "zerotier",
    "nordlynx",
    "openvpn",
    "hamachi",
];

/// Most IPv6 addresses of one machine: a desktop has one for each of the last days, and sends from the newest, which Linux
/// names first.
const MOST_IPV6: usize = 3;

/// Addresses of the interfaces.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Addresses {
    /// Those by which this machine is reached, with 127.0.0.1 only if that was asked for.
    pub(super) own: Vec<IpAddr>,
    /// Those that are worth a try where nothing else works: of guests' interfaces, and private ones of VPNs. Where there is
    /// nothing else, they and link-local IPv4 ones are among `own` (link-local IPv6 ones mean something only together with an
    /// interface); a VPN's also where it has the only IPv4 address, without which nothing is tried by IPv4.
    pub(super) others: Vec<IpAddr>,
}

/// Takes well below a millisecond on Linux.
pub(super) fn addresses(loopback: bool) -> Addresses {
    let interfaces = get_if_addrs().unwrap_or_else(|error| {
        tracing::debug!(%error, "the interfaces cannot be listed");
        Vec::new()
    });
    let up = interfaces.iter().filter(|interface| interface.oper_status != IfOperStatus::Down);
    choose(up.map(|interface| (interface.name.as_str(), interface.ip())), loopback)
}

fn choose<'a>(interfaces: impl Iterator<Item = (&'a str, IpAddr)>, loopback: bool) -> Addresses {
    let interfaces = interfaces
        .filter(|(_, ip)| !ip.is_loopback() && !ip.is_unspecified())
        .filter(|(_, ip)| !matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local() || ip.is_multicast()));
    let (plain, guests): (Vec<_>, Vec<_>) =
        interfaces.partition(|(name, ip)| !is_of(&GUESTS, name) && !is_link_local(*ip));
    let is_vpns = |name: &str, ip: IpAddr| is_of(&VPNS, name) && is_private(ip);
    let has_ipv4 = plain.iter().any(|(name, ip)| ip.is_ipv4() && !is_vpns(name, *ip));
    let (own, vpns): (Vec<_>, Vec<_>) =
        plain.into_iter().partition(|(name, ip)| !is_vpns(name, *ip) || (ip.is_ipv4() && !has_ipv4));
    let others = vpns.into_iter().chain(guests);
    let (own, others): (Vec<_>, Vec<_>) = if own.is_empty() {
        (others.collect(), vec![])
    } else {
        (own, others.filter(|(_, ip)| !is_link_local(*ip)).collect())
    };
    let ips = |listed: Vec<(&str, IpAddr)>| -> Vec<IpAddr> {
        let (v4, v6): (Vec<_>, Vec<_>) = listed.into_iter().map(|(_, ip)| ip).partition(IpAddr::is_ipv4);
        v4.into_iter().chain(v6.into_iter().take(MOST_IPV6)).collect()
    };
    let loopback = loopback.then_some(Ipv4Addr::LOCALHOST.into());
    Addresses { own: ips(own).into_iter().chain(loopback).collect(), others: ips(others) }
}

fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V4(ip) if ip.is_link_local())
}

fn is_of(beginnings: &[&str], name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    beginnings.iter().any(|beginning| name.starts_with(beginning))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(interfaces: &[(&str, &str)], loopback: bool) -> Vec<String> {
        let interfaces = interfaces.iter().map(|(name, ip)| (*name, ip.parse().expect("an address")));
        choose(interfaces, loopback).own.iter().map(IpAddr::to_string).collect()
    }

    #[test]
    fn junk_is_left_out_unless_there_is_nothing_else() {
        let lo = ("lo", "127.0.0.1");
        let docker = ("docker0", "172.17.0.1");
        let hyper_v = ("vEthernet (Default Switch)", "172.28.0.1");
        let link_local = ("eth1", "169.254.3.4");
        let lan = ("eth0", "192.168.1.2");
        let vpn = ("tun0", "10.8.0.2");
        let all = [lo, docker, hyper_v, link_local, lan, vpn];
        assert_eq!(chosen(&all, false), [lan.1]);
        assert_eq!(chosen(&all, true), [lan.1, lo.1]);
        let others =
            choose(all.iter().map(|(name, ip)| (*name, ip.parse().expect("an address"))), false).others;
        let others: Vec<_> = others.iter().map(IpAddr::to_string).collect();
        assert_eq!(others, [vpn.1, docker.1, hyper_v.1]);
        assert_eq!(chosen(&[lo, docker, link_local], false), [docker.1, link_local.1]);
        assert_eq!(chosen(&[lo, docker, vpn], false), [vpn.1], "the only one of its version");
        let (vpn6, public6) = (("wg0", "fd01::7"), ("wg0", "2001:db8::7"));
        assert_eq!(chosen(&[lan, vpn6], false), [lan.1]);
        assert_eq!(chosen(&[vpn6, vpn], false), [vpn.1]);
        assert_eq!(chosen(&[lan, vpn6, ("eth0", "2001:db8::2")], false), [lan.1, "2001:db8::2"]);
        assert_eq!(chosen(&[lan, public6], false), [lan.1, public6.1], "it lets others in");
        assert_eq!(chosen(&[lo], false), Vec::<String>::new());
        let (lo6, local6, docker6) = (("lo", "::1"), ("eth0", "fe80::1"), ("docker0", "fd01::1"));
        let (lan6, global6) = (("eth0", "fd00::2"), ("eth0", "2001:db8::2"));
        assert_eq!(
            chosen(&[lo6, local6, lan6, docker6, lan, docker, global6], false),
            [lan.1, lan6.1, global6.1]
        );
        assert_eq!(chosen(&[lan, local6, docker6], false), [lan.1]);
        assert_eq!(chosen(&[docker, local6, docker6], false), [docker.1, docker6.1]);
        let days: Vec<String> = (1..9).map(|day| format!("2001:db8::{day}")).collect();
        let days: Vec<(&str, &str)> = days.iter().map(|day| ("eth0", day.as_str())).collect();
        assert_eq!(chosen(&days, false), ["2001:db8::1", "2001:db8::2", "2001:db8::3"]);
    }

    #[test]
    fn loopback_is_offered_only_where_asked_for() {
        let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
        assert!(addresses(true).own.contains(&loopback));
        let without = addresses(false);
        assert!(!without.own.contains(&loopback) && !without.others.contains(&loopback));
    }
}
