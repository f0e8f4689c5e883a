//! Two devices of one site that do not reach each other but through their router.

use std::net::Ipv4Addr;

use anyhow::Context;

use super::namespace::Namespace;

/// From now on nothing passes between the devices on `router`'s inner network. With `hairpins` the router, whose outer
/// interface `wan` has the address `outside`, takes what they send to that address as if it came from outside (RFC 4787
/// section 6, "external source IP address and port"): a full cone that keeps ports as they are.
pub(super) fn isolate(
    router: &patchbay::Router,
    wan: &str,
    outside: Ipv4Addr,
    hairpins: bool,
) -> anyhow::Result<()> {
    let bridges = router.command("ip -o link show type bridge")?;
    let lan = bridges.split([':', '@']).nth(1).context("the router has no bridge")?.trim().to_owned();
    let ports = router.command(&format!("ip -o link show master {lan}"))?;
    for port in ports.lines().filter_map(|line| line.split([':', '@']).nth(1)) {
        router.command(&format!("ip link set dev {} type bridge_slave isolated on", port.trim()))?;
    }
    if !hairpins {
        return Ok(());
    }
    // Where a host runs containers, the bridge itself translates, and finds the other port isolated.
    let _ = router.command("sysctl -qw net.bridge.bridge-nf-call-iptables=0");
    router.nft(&format!(
        "table ip adit_hairpin {{
             map open {{ type inet_service : ipv4_addr; flags dynamic,timeout; timeout 120s; }}
             chain note {{
                 type filter hook forward priority filter;
                 oifname {wan} ip protocol udp update @open {{ udp sport : ip saddr }}
             }}
             chain prerouting {{
                 type nat hook prerouting priority dstnat - 1;
                 iifname {lan} ip daddr {outside} ip protocol udp dnat ip to udp dport map @open
             }}
             chain postrouting {{
                 type nat hook postrouting priority srcnat - 1;
                 oifname {lan} ct status dnat snat ip to {outside}
             }}
         }}"
    ))
}
