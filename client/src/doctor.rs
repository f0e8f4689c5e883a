//! The connection test: what works from here, what does not, and what to do about it. The server's own test
//! (`adit-mediator doctor`) speaks in the same findings.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use adit_protocol::control::Reached;
use serde_json::json;

use crate::control::{ControlChannel, Visited};
use crate::events::{print_line, printable};
use crate::exit::Failure;
use crate::identity::{Identity, Peer};
use crate::probe::{self, Nat};

/// A certificate that ends within this time should have been renewed. Seconds.
const SOON: u64 = 30 * 24 * 60 * 60;

/// How serious a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// All is well.
    Fine,
    /// Worth knowing.
    Note,
    /// Something does not work.
    Fault,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How serious.
    pub level: Level,
    /// What was looked at, and what was found.
    pub text: String,
    /// What to do.
    pub remedy: Option<String>,
}

impl Finding {
    /// All is well.
    pub fn fine(text: impl Into<String>) -> Self {
        Self { level: Level::Fine, text: text.into(), remedy: None }
    }

    /// Worth knowing.
    pub fn note(text: impl Into<String>, remedy: &str) -> Self {
        Self { level: Level::Note, text: text.into(), remedy: Some(remedy.to_owned()) }
    }

    /// Something does not work.
    pub fn fault(text: impl Into<String>, remedy: &str) -> Self {
        Self { level: Level::Fault, text: text.into(), remedy: Some(remedy.to_owned()) }
    }
}

/// Writes findings to standard output, for people or as JSON objects (`level`, `text`, `remedy`), one a line. Returns how
/// many are faults.
pub fn print(findings: &[Finding], as_json: bool) -> usize {
    for Finding { level, text, remedy } in findings {
        let name = match level {
            Level::Fine => "ok",
            Level::Note => "note",
            Level::Fault => "FAULT",
        };
        if as_json {
            print_line(&json!({"level": name.to_lowercase(), "text": text, "remedy": remedy}).to_string());
            continue;
        }
        print_line(&format!("{name:5} {}", printable(text, 400)));
        if let Some(remedy) = remedy {
            print_line(&format!("      {}", printable(remedy, 400)));
        }
    }
    findings.iter().filter(|finding| finding.level == Level::Fault).count()
}

/// Looks at everything from this device: its certificate, the servers, the network. With the findings, what was reached.
pub async fn examine(identity: &Arc<Identity>) -> (Vec<Finding>, Vec<Reached>) {
    let mut findings = vec![certificate(identity)];
    if let Some(proxy) = identity.servers.iter().find_map(|server| identity.proxies.to(server)) {
        let address = &proxy.address;
        findings.push(Finding::note(
            format!("the way to the servers leads through the proxy at {address}"),
            "where this network lets TCP out directly, too: --proxy none, or [network] proxy in config.toml",
        ));
    }
    let probe = match ControlChannel::visit(identity).await {
        Ok(Visited { server, probe, took }) => {
            let millis = took.as_secs_f64() * 1000.0;
            findings
                .push(Finding::fine(format!("the mediator at {server} knows this device ({millis:.0} ms)")));
            probe
        }
        Err(error) => {
            let remedy = error.remedy().unwrap_or_default();
            findings.push(Finding::fault(error.to_string(), &remedy));
            return (findings, vec![]);
        }
    };
    let probed = probe::run(identity.clone(), probe).await;
    findings.extend(tried("here", &probed.results));
    (findings, probed.results)
}

fn certificate(identity: &Identity) -> Finding {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let Ok(peer) = Peer::from_certificate(&identity.certificate) else {
        return Finding::fault("this device's certificate cannot be read", "enrol this device again");
    };
    let what = format!("{} {}: its certificate", peer.role, peer.name);
    match peer.not_after {
        at if at <= now => {
            Finding::fault(format!("{what} has ended"), "check this machine's clock; else enrol it again")
        }
        at if at < now + SOON => Finding::note(
            format!("{what} ends in {} days", (at - now) / 86_400),
            "it is renewed by itself while the operator has the enrolment key on the mediator",
        ),
        at => Finding::fine(format!("{what} is good for {} days", (at - now) / 86_400)),
    }
}

/// What the tries from there found.
pub fn tried(from: &str, results: &[Reached]) -> Vec<Finding> {
    let of = |found: &Reached| match found.what.as_str() {
        "port-mapping" => {
            let elsewhere = seen(results).is_some() && !is_mapped(results);
            Some(port_mapping(from, found, elsewhere))
        }
        _ => reached(from, found),
    };
    results.iter().filter_map(of).collect()
}

/// What one try found. `None`: nothing to say.
fn reached(from: &str, found: &Reached) -> Option<Finding> {
    let Reached { what, address, ok, micros, detail } = found;
    let (protocol, name, remedy) = match what.as_str() {
        "https" => (
            "tcp",
            "mediator",
            "check that name and port lead there, and that firewalls let TCP through unopened",
        ),
        "relay" => (
            "tcp",
            "relay",
            "open that TCP port in the firewalls: until then sessions use 443, which is slower",
        ),
        "stun" => {
            ("udp", "STUN", "open that UDP port in the firewalls: without it hardly a session gets direct")
        }
        "nat" => return nat(from, found),
        "ipv6" => return Some(ipv6(from, found)),
        // Of a later version.
        _ => return None,
    };
    let millis = *micros as f64 / 1000.0;
    Some(match ok {
        true => {
            Finding::fine(format!("from {from}: {name} at {address}/{protocol} in {millis:.1} ms ({detail})"))
        }
        false => Finding::fault(format!("from {from}: {name} at {address}/{protocol}: {detail}"), remedy),
    })
}

fn nat(from: &str, found: &Reached) -> Option<Finding> {
    let seen_at = &found.address;
    let each = if Nat::is_by_address(found) { "address" } else { "destination" };
    Some(match Nat::of(found) {
        Nat::None => {
            let address = seen_at.rsplit_once(':').map_or(seen_at.as_str(), |(ip, _)| ip);
            Finding::fine(format!("from {from}: no NAT, {address} is this machine's own address"))
        }
        Nat::Independent => Finding::fine(format!(
            "from {from}: a NAT that maps alike for all destinations that were asked, seen at {seen_at}"
        )),
        Nat::Sequential => Finding::note(
            format!(
                "from {from}: a NAT that takes another port for each {each}, one after the other, seen at {seen_at}"
            ),
            "direct paths come about with most networks; a router with endpoint-independent mapping makes them sure",
        ),
        Nat::Random => Finding::note(
            format!("from {from}: a NAT that takes a random port for each {each}, seen at {seen_at}"),
            "direct paths take seconds, and fail where the other end has such a NAT, too: IPv6, or a router with \
             endpoint-independent mapping helps",
        ),
        Nat::Unknown => Finding::note(
            format!("from {from}: seen at {seen_at}; how the NAT maps does not show"),
            "the operator opens 443/udp, too, or adds a relay on another machine",
        ),
        // The STUN servers have said it.
        Nat::Blocked => return None,
    })
}

fn port_mapping(from: &str, found: &Reached, elsewhere: bool) -> Finding {
    let Reached { address, ok, detail, .. } = found;
    match ok {
        true if elsewhere => Finding::note(
            format!(
                "from {from}: the router maps ports on request ({detail}), but at {address}, where the servers do not see it"
            ),
            "another NAT follows: have the first router's ports forwarded by the second, or make the first one a bridge",
        ),
        true => Finding::fine(format!(
            "from {from}: the router maps ports on request ({detail}), seen at {address}"
        )),
        false => Finding::note(
            format!("from {from}: the router maps no ports on request ({detail})"),
            "where paths are direct without it, nothing; else turn on PCP, NAT-PMP or UPnP in the router",
        ),
    }
}

fn ipv6(from: &str, found: &Reached) -> Finding {
    match found.ok {
        true => Finding::fine(format!("from {from}: IPv6 works, seen at {}", found.address)),
        false => Finding::note(
            format!("from {from}: no IPv6 ({})", found.detail),
            "with IPv6 at both ends no NAT stands between them",
        ),
    }
}

/// What a session between two ends with these results will be.
pub fn between(here: &[Reached], there: &[Reached], agent: &str) -> Finding {
    use Nat::{Blocked, Independent, None, Random, Sequential, Unknown};
    let finding = |text: &str| format!("to {agent}: {text}");
    let has_ipv6 = |results: &[Reached]| results.iter().any(|found| found.what == "ipv6" && found.ok);
    if seen(here).is_some() && seen(here) == seen(there) {
        return Finding::fine(finding(
            "both are behind one address, perhaps on one network: then sessions stay there",
        ));
    }
    if has_ipv6(here) && has_ipv6(there) {
        return Finding::fine(finding("expect a direct path by IPv6"));
    }
    match (Nat::among(here), Nat::among(there)) {
        (Unknown, _) | (_, Unknown) => Finding::note(
            finding("whether sessions get direct cannot be told"),
            "open a session: it says on which tier it runs, and why",
        ),
        (Blocked, _) | (_, Blocked) => Finding::note(
            finding("sessions stay on the relay, unless one end takes TCP connections from outside"),
            "let UDP out of the network where it is blocked",
        ),
        (None | Independent, None | Independent) => Finding::fine(finding("expect a direct path at once")),
        _ if is_mapped(here) || is_mapped(there) => Finding::fine(finding(
            "expect a direct path within a second or two: a router maps ports on request",
        )),
        (Sequential, None | Independent) | (None | Independent, Sequential) => {
            Finding::fine(finding("expect a direct path within a second or two"))
        }
        (Random, None | Independent) | (None | Independent, Random) => Finding::note(
            finding("a direct path within seconds, most times; the session works on the relay meanwhile"),
            "a router with endpoint-independent mapping at both ends makes it sure",
        ),
        (Random, Random | Sequential) | (Sequential, Random) => Finding::note(
            finding(
                "sessions stay on the relay: one NAT takes random ports, and the other one another for each of them",
            ),
            "IPv6 at both ends, or a router with endpoint-independent mapping at one",
        ),
        (Sequential, Sequential) => Finding::note(
            finding(
                "a direct path within seconds, unless others keep both NATs busy; the relay carries meanwhile",
            ),
            "a router with endpoint-independent mapping at one end makes it sure",
        ),
    }
}

/// The IP address of the first try of this kind that worked.
fn address_of(what: &str, results: &[Reached]) -> Option<String> {
    let found = results.iter().find(|found| found.what == what && found.ok)?;
    Some(found.address.rsplit_once(':')?.0.to_owned())
}

/// Where the servers see this end.
fn seen(results: &[Reached]) -> Option<String> {
    address_of("nat", results)
}

/// Whether the router keeps a port that others reach: not where another NAT follows.
fn is_mapped(results: &[Reached]) -> bool {
    let mapped = address_of("port-mapping", results);
    mapped.is_some() && mapped == seen(results)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(what: &str, ok: bool, detail: &str) -> Reached {
        let address = "a.example:8002".into();
        Reached { what: what.into(), address, ok, micros: 1500, detail: detail.into() }
    }

    #[test]
    fn what_was_not_reached_comes_with_its_remedy() {
        let fine = reached("desk", &found("stun", true, "why")).expect("a finding");
        assert_eq!(
            (fine.level, fine.text.as_str()),
            (Level::Fine, "from desk: STUN at a.example:8002/udp in 1.5 ms (why)")
        );
        for what in ["https", "relay", "stun"] {
            let fault = reached("here", &found(what, false, "why")).expect("a finding");
            assert!(fault.level == Level::Fault && fault.text.ends_with("why") && fault.remedy.is_some());
        }
        assert_eq!(reached("here", &found("later", true, "")), None);
    }

    #[test]
    fn a_mapping_behind_another_nat_lets_nobody_in() {
        let at = |what: &str, ip: &str| Reached { address: format!("{ip}:40000"), ..found(what, true, "") };
        let of = |nat: &str, mapped: &str| tried("here", &[at("nat", nat), at("port-mapping", mapped)]);
        let [same, other] = ["192.0.2.1", "100.64.0.7"].map(|ip| of("192.0.2.1", ip).pop().expect("two"));
        assert_eq!((same.level, other.level), (Level::Fine, Level::Note));
        assert!(other.text.contains("do not see it") && other.remedy.is_some(), "{other:?}");
    }

    #[test]
    fn every_pair_of_networks_has_its_forecast() {
        let end = |nat: &str, ip: &str, ipv6: bool| {
            let of = |what: &str, ok, detail: &str| {
                let address = format!("{ip}:40000");
                Reached { what: what.into(), address, ok, micros: 0, detail: detail.into() }
            };
            vec![of("nat", nat != "blocked", nat), of("ipv6", ipv6, "")]
        };
        let all = ["none", "independent", "sequential", "random", "unknown", "blocked"];
        for here in all {
            for there in all {
                let (here, there) = (end(here, "192.0.2.1", false), end(there, "192.0.2.2", true));
                let (one, other) = (between(&here, &there, "desk"), between(&there, &here, "desk"));
                assert_eq!(one, other, "{here:?} {there:?}");
                assert_eq!(one.level == Level::Fine, one.remedy.is_none());
            }
        }
        let (random, same) = (end("random", "192.0.2.1", false), end("random", "192.0.2.1", false));
        assert!(between(&random, &same, "desk").text.contains("one network"));
        let [here, there] = [1, 2].map(|n| end("random", &format!("192.0.2.{n}"), true));
        assert!(between(&here, &there, "desk").text.contains("IPv6"));
    }
}
