//! The addresses of this machine at which a peer may reach it.

use std::net::{IpAddr, Ipv4Addr};

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

/// IPv4 addresses of the interfaces, with 127.0.0.1 only if `loopback`. Those of guests' and link-local
/// ones are left out unless there is nothing else. Takes well below a millisecond on Linux.
pub(super) fn addresses(loopback: bool) -> Vec<Ipv4Addr> {
    let interfaces = get_if_addrs().unwrap_or_else(|error| {
        tracing::debug!(%error, "the interfaces cannot be listed");
        Vec::new()
    });
    let up = interfaces.iter().filter(|interface| interface.oper_status != IfOperStatus::Down);
    let named = up.filter_map(|interface| match interface.ip() {
        IpAddr::V4(ip) => Some((interface.name.as_str(), ip)),
        IpAddr::V6(_) => None,
    });
    choose(named, loopback)
}

fn choose<'a>(interfaces: impl Iterator<Item = (&'a str, Ipv4Addr)>, loopback: bool) -> Vec<Ipv4Addr> {
    let (own, others): (Vec<_>, Vec<_>) = interfaces
        .filter(|(_, ip)| !ip.is_loopback() && !ip.is_unspecified())
        .partition(|(name, ip)| !is_guests(name) && !ip.is_link_local());
    let chosen = if own.is_empty() { others } else { own };
    let chosen = chosen.into_iter().map(|(_, ip)| ip);
    chosen.chain(loopback.then_some(Ipv4Addr::LOCALHOST)).collect()
}

fn is_guests(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    GUESTS.iter().any(|guest| name.starts_with(guest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(interfaces: &[(&str, [u8; 4])], loopback: bool) -> Vec<[u8; 4]> {
        let interfaces = interfaces.iter().map(|(name, ip)| (*name, Ipv4Addr::from(*ip)));
        choose(interfaces, loopback).iter().map(Ipv4Addr::octets).collect()
    }

    #[test]
    fn junk_is_left_out_unless_there_is_nothing_else() {
        let lo = ("lo", [127, 0, 0, 1]);
        let docker = ("docker0", [172, 17, 0, 1]);
        let hyper_v = ("vEthernet (Default Switch)", [172, 28, 0, 1]);
        let link_local = ("eth1", [169, 254, 3, 4]);
        let lan = ("eth0", [192, 168, 1, 2]);
        let vpn = ("tun0", [10, 8, 0, 2]);
        let all = [lo, docker, hyper_v, link_local, lan, vpn];
        assert_eq!(chosen(&all, false), [lan.1, vpn.1]);
        assert_eq!(chosen(&all, true), [lan.1, vpn.1, lo.1]);
        assert_eq!(chosen(&[lo, docker, link_local], false), [docker.1, link_local.1]);
        assert_eq!(chosen(&[lo], false), Vec::<[u8; 4]>::new());
    }

    #[test]
    fn loopback_is_offered_only_where_asked_for() {
        assert!(addresses(true).contains(&Ipv4Addr::LOCALHOST));
        assert!(!addresses(false).contains(&Ipv4Addr::LOCALHOST));
    }
}
