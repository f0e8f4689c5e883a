//! Tries whether servers can be reached from here: the connection test behind `doctor`.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_protocol::control::{Probe, Probed, Reached};
use adit_tunnel::path::{self, stun};
use stun_rs::MessageDecoderBuilder;
use stun_rs::attributes::stun::XorMappedAddress;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::dial::{self, DialError};
use crate::direct::port_mapping;
use crate::identity::Identity;
use crate::tls;

/// Addresses of one kind that one request may name.
const MAX_ADDRESSES: usize = 16;
/// Requests over UDP until one is answered; a datagram may be lost.
const TRIES: usize = 3;
/// How long each of them is waited for.
const TRY: Duration = Duration::from_secs(1);
/// Follows the name of a NAT that has one port for all ports of one address.
const BY_ADDRESS: &str = " by address";
/// How long a relay may take to send a stranger away: 5 s (THREATS row 1), and the way there and back.
const SENT_AWAY: Duration = Duration::from_secs(7);

/// Tries everything that the mediator asks about, at once. TLS is tried with this device's own identity, the
/// relay with nothing, so that it must send us away.
pub async fn run(identity: Arc<Identity>, probe: Probe) -> Probed {
    let Probe { request, https, relay, stun, vantage, port_mapping: may_map } = probe;
    let mut tries = JoinSet::new();
    let servers: Vec<String> = stun.iter().chain(&vantage).take(MAX_ADDRESSES).cloned().collect();
    if !servers.is_empty() {
        let ours = servers.clone();
        tries.spawn(async move { nat(&ours).await });
        tries.spawn(async move { ipv6(&servers).await });
    }
    if may_map && identity.p2p.port_mapping {
        tries.spawn(mapped_port());
    }
    for address in https.into_iter().take(MAX_ADDRESSES) {
        let identity = identity.clone();
        tries.spawn(
            async move { Some(reached("https", address.clone(), control(&address, &identity).await)) },
        );
    }
    for address in relay.into_iter().take(MAX_ADDRESSES) {
        tries.spawn(async move { Some(reached("relay", address.clone(), stranger(&address).await)) });
    }
    for address in stun.into_iter().take(MAX_ADDRESSES) {
        tries.spawn(async move { Some(reached("stun", address.clone(), binding(&address).await)) });
    }
    let mut results: Vec<Reached> = tries.join_all().await.into_iter().flatten().collect();
    if Nat::among(&results) == Nat::None {
        // There is nothing to map.
        results.retain(|found| found.what != "port-mapping");
    }
    results.sort_by(|a, b| (&a.what, &a.address).cmp(&(&b.what, &b.address)));
    Probed { request, results }
}

/// What was found out, or why not.
type Found = Result<(Duration, String), String>;

fn reached(what: &str, address: String, found: Found) -> Reached {
    let (what, ok) = (what.to_owned(), found.is_ok());
    match found {
        Ok((time, detail)) => Reached { what, address, ok, micros: time.as_micros() as u64, detail },
        Err(detail) => Reached { what, address, ok, micros: 0, detail },
    }
}

/// A TLS handshake in which both ends accept each other.
async fn control(address: &str, identity: &Identity) -> Found {
    let config = tls::control_client(identity).map_err(|error| error.to_string())?;
    let start = Instant::now();
    match dial::tls(address, Arc::new(config), &identity.proxies).await {
        Ok(stream) => {
            Ok((start.elapsed(), stream.get_ref().0.peer_addr().map_or(String::new(), |at| at.to_string())))
        }
        Err(error) => Err(error.to_string()),
    }
}

/// A relay must take the connection, and forward nothing without a ticket: it sends one byte that says so, or
/// none, and closes. We hang up first, which costs a stranger least there.
async fn stranger(address: &str) -> Found {
    let start = Instant::now();
    let mut stream = dial::tcp(address).await.map_err(|error: DialError| error.to_string())?;
    let time = start.elapsed();
    let mut answer = [0; 64];
    let sent_away = async {
        stream.shutdown().await?;
        let mut count = 0;
        loop {
            match stream.read(&mut answer[count..]).await? {
                0 => return io::Result::Ok(count),
                more => count += more,
            }
        }
    };
    match timeout(SENT_AWAY, sent_away).await {
        Ok(Ok(count)) if count <= 1 => Ok((time, "sends strangers away".to_owned())),
        Ok(Ok(count)) => Err(format!("it sent {count} bytes to a stranger: that is no relay of adit")),
        // Closed with what we sent unread.
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
            Ok((time, "sends strangers away".to_owned()))
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("it keeps a stranger's connection: that is no relay of adit".to_owned()),
    }
}

/// How the NAT in front of a device maps, as far as STUN servers show it (RFC 5780 section 4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nat {
    /// The device has its public address itself.
    None,
    /// The same address for all destinations.
    Independent,
    /// Another port for another destination, one after the other.
    Sequential,
    /// Another port for another destination, at random.
    Random,
    /// There is one; one server alone does not show more.
    Unknown,
    /// No answer at all.
    Blocked,
}

impl Nat {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::None, Self::Independent, Self::Sequential, Self::Random, Self::Unknown, Self::Blocked];

    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Independent => "independent",
            Self::Sequential => "sequential",
            Self::Random => "random",
            Self::Unknown => "unknown",
            Self::Blocked => "blocked",
        }
    }

    /// As a result says ([`Reached::what`]).
    pub fn of(found: &Reached) -> Self {
        let name = found.detail.strip_suffix(BY_ADDRESS).unwrap_or(&found.detail);
        Self::ALL.into_iter().find(|nat| nat.name() == name).unwrap_or(Self::Unknown)
    }

    /// Whether a result of a NAT says that it has one port for all ports of one address.
    pub fn is_by_address(found: &Reached) -> bool {
        found.detail.ends_with(BY_ADDRESS)
    }

    /// What all these results say.
    pub fn among(results: &[Reached]) -> Self {
        results.iter().find(|found| found.what == "nat").map_or(Self::Unknown, Self::of)
    }
}

/// Asks all servers by IPv4 from one socket: how each of them sees it.
async fn nat(servers: &[String]) -> Option<Reached> {
    let servers = resolved(servers, SocketAddr::is_ipv4).await;
    let first = *servers.first()?;
    let (answered, seen): (Vec<_>, Vec<_>) = seen_by(&servers).await.ok()?.into_iter().unzip();
    let own = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await.ok()?;
    own.connect(first).await.ok()?;
    let own = own.local_addr().ok()?.ip();
    // A server that is reached another way sees another address: that says nothing.
    let is_one = seen.windows(2).all(|pair| pair[0].ip() == pair[1].ip());
    let nat = match path::Mapping::of(&seen) {
        _ if seen.is_empty() => Nat::Blocked,
        _ if seen.iter().all(|seen| seen.ip() == own) => Nat::None,
        _ if !is_one => Nat::Unknown,
        path::Mapping::Unknown => Nat::Unknown,
        path::Mapping::Independent => Nat::Independent,
        path::Mapping::Sequential => Nat::Sequential,
        path::Mapping::Random => Nat::Random,
    };
    let depends = matches!(nat, Nat::Sequential | Nat::Random);
    let by_address = if depends && is_by_address(&answered, &seen) { BY_ADDRESS } else { "" };
    let address = seen.first().map_or(String::new(), SocketAddr::to_string);
    Some(Reached {
        what: "nat".into(),
        address,
        ok: nat != Nat::Blocked,
        micros: 0,
        detail: format!("{}{by_address}", nat.name()),
    })
}

/// Whether servers at one address saw the same (RFC 4787 section 4.1, address-dependent mapping): there are two of them, and no
/// two that did not.
fn is_by_address(servers: &[SocketAddr], seen: &[SocketAddr]) -> bool {
    let asked: Vec<_> = servers.iter().zip(seen).collect();
    let mut same = false;
    for (at, (server, seen)) in asked.iter().enumerate() {
        for (_, others) in asked[at + 1..].iter().filter(|(other, _)| other.ip() == server.ip()) {
            if seen != others {
                return false;
            }
            same = true;
        }
    }
    same
}

/// Whether the router in front lets others in when it is asked: for a port of ours, for a moment.
async fn mapped_port() -> Option<Reached> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await.ok()?;
    let port = NonZeroU16::new(socket.local_addr().ok()?.port())?;
    let what = "port-mapping".to_owned();
    let start = Instant::now();
    let Some((address, detail)) = port_mapping::try_once(port).await else {
        let detail = "PCP, NAT-PMP and UPnP were tried".to_owned();
        return Some(Reached { what, address: String::new(), ok: false, micros: 0, detail });
    };
    let micros = start.elapsed().as_micros() as u64;
    Some(Reached { what, address: address.to_string(), ok: true, micros, detail })
}

/// Whether IPv6 leads to the servers. `None`: they have none.
async fn ipv6(servers: &[String]) -> Option<Reached> {
    let servers = resolved(servers, SocketAddr::is_ipv6).await;
    servers.first()?;
    let seen = match seen_by(&servers).await {
        Ok(seen) => seen.first().map(|(_, seen)| *seen).ok_or_else(|| "no answer".to_owned()),
        Err(error) => Err(error.to_string()),
    };
    let (ok, what) = (seen.is_ok(), "ipv6".to_owned());
    let address = seen.as_ref().map_or(String::new(), SocketAddr::to_string);
    Some(Reached { what, address, ok, micros: 0, detail: seen.err().unwrap_or_default() })
}

/// The first address of each that is of this version, each once.
async fn resolved(servers: &[String], version: fn(&SocketAddr) -> bool) -> Vec<SocketAddr> {
    let mut found = Vec::new();
    for server in servers {
        let lookup = timeout(TRY, tokio::net::lookup_host(server)).await;
        let address = lookup.ok().and_then(Result::ok).and_then(|mut all| all.find(version));
        found.extend(address.filter(|address| !found.contains(address)));
    }
    found
}

/// These servers and how they see one socket, in the order in which they were asked; those that do not answer are left out.
async fn seen_by(servers: &[SocketAddr]) -> io::Result<Vec<(SocketAddr, SocketAddr)>> {
    let is_ipv4 = servers.first().is_some_and(SocketAddr::is_ipv4);
    let any = if is_ipv4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
    let requests: Vec<[u8; 12]> = servers.iter().map(|_| rand::random()).collect();
    let mut seen = vec![None; servers.len()];
    let mut in_order = Vec::new();
    for _ in 0..TRIES {
        let asked: Vec<usize> = (0..servers.len()).filter(|at| seen[*at].is_none()).collect();
        for (at, server) in asked.iter().map(|at| (*at, &servers[*at])) {
            // An unreachable one is as good as silent.
            let _ = socket.send_to(&stun::binding_request(requests[at]), server).await;
        }
        let answers = async {
            let mut buffer = [0; 576];
            while seen.contains(&None) {
                let Ok((count, from)) = socket.recv_from(&mut buffer).await else { continue };
                let answer = &buffer[..count];
                let at = requests.iter().position(|id| answer.get(8..20) == Some(&id[..]));
                if let Some(at) = at.filter(|at| servers[*at] == from) {
                    seen[at] = mapped(answer);
                }
            }
        };
        let done = timeout(TRY, answers).await.is_ok();
        in_order.extend(asked.iter().filter_map(|at| Some((servers[*at], seen[*at]?))));
        if done {
            break;
        }
    }
    Ok(in_order)
}

/// The address in an answer of a STUN server.
fn mapped(answer: &[u8]) -> Option<SocketAddr> {
    let (message, _) = MessageDecoderBuilder::default().build().decode(answer).ok()?;
    let mapped = message.get::<XorMappedAddress>()?.as_xor_mapped_address().ok()?;
    Some(*mapped.socket_address())
}

/// A STUN Binding request (RFC 8489) and its answer; finds out the address that the server sees.
async fn binding(address: &str) -> Found {
    let resolved = timeout(TRY * 5, tokio::net::lookup_host(address)).await;
    let resolved = resolved.map_err(|_| "its name does not resolve in time".to_owned())?;
    let mut last = "its name has no address".to_owned();
    for server in resolved.map_err(|error| error.to_string())? {
        match ask(server).await {
            Ok(found) => return Ok(found),
            Err(error) => last = error.to_string(),
        }
    }
    Err(last)
}

async fn ask(server: SocketAddr) -> io::Result<(Duration, String)> {
    let any = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
    socket.connect(server).await?;
    for _ in 0..TRIES {
        let id: [u8; 12] = rand::random();
        let request = stun::binding_request(id);
        let start = Instant::now();
        socket.send(&request).await?;
        let mut answer = [0; 576];
        let answered = async {
            loop {
                let count = socket.recv(&mut answer).await?;
                // The answer to an earlier try is not one to this.
                if answer[..count].get(8..20) == Some(&id[..]) {
                    return io::Result::Ok(count);
                }
            }
        };
        let Ok(count) = timeout(TRY, answered).await else { continue };
        let mapped = mapped(&answer[..count?])
            .ok_or_else(|| io::Error::other("what answers there is no STUN server"))?;
        return Ok((start.elapsed(), format!("sees {mapped}")));
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer to {TRIES} requests")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[test]
    fn a_nat_that_has_one_port_for_each_address() {
        let at = |text: &&str| text.parse::<SocketAddr>().expect("an address");
        let servers = ["192.0.2.1:8002", "192.0.2.1:443", "192.0.2.2:8002"].map(|text| at(&text));
        for (ports, expected) in
            [([5000, 5000, 9000], true), ([5000, 6000, 9000], false), ([5000, 6000, 5000], false)]
        {
            let seen = ports.map(|port| SocketAddr::from(([198, 51, 100, 1], port)));
            assert_eq!(is_by_address(&servers, &seen), expected, "{ports:?}");
            assert!(!is_by_address(&servers[1..], &seen[1..]), "one server for each address shows nothing");
        }
    }

    #[tokio::test]
    async fn a_stun_server_is_told_from_silence_and_from_something_else() {
        let server = UdpSocket::bind("127.0.0.1:0").await.expect("binds");
        let address = server.local_addr().expect("bound").to_string();
        let answering = async {
            let mut buffer = [0; 576];
            let (count, from) = server.recv_from(&mut buffer).await.expect("receives");
            let answer = stun::binding_response(&buffer[..count], from).expect("a request");
            server.send_to(&answer, from).await.expect("sends");
            let (count, from) = server.recv_from(&mut buffer).await.expect("receives");
            server.send_to(&buffer[..count], from).await.expect("sends");
        };
        let asking = async {
            let (_, detail) = binding(&address).await.expect("answers");
            assert!(detail.starts_with("sees 127.0.0.1:"), "{detail}");
            let error = binding(&address).await.expect_err("only echoes");
            assert!(error.contains("no STUN server"), "{error}");
        };
        tokio::join!(answering, asking);
    }

    #[tokio::test]
    async fn whoever_talks_to_strangers_is_no_relay() {
        let closed = TcpListener::bind("127.0.0.1:0").await.expect("binds").local_addr().expect("bound");
        assert!(stranger(&closed.to_string()).await.is_err(), "nobody listens");
        for (answer, is_relay) in [(&b""[..], true), (b"\x02", true), (b"SSH-2.0-x\r\n", false)] {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
            let address = listener.local_addr().expect("bound").to_string();
            let serving = async {
                let (mut stream, _) = listener.accept().await.expect("accepts");
                let mut preamble = [0; 2];
                assert_eq!(stream.read(&mut preamble).await.expect("reads"), 0, "it hangs up");
                let _ = stream.write_all(answer).await;
            };
            let (found, ()) = tokio::join!(stranger(&address), serving);
            assert_eq!(found.is_ok(), is_relay, "{found:?}");
        }
    }
}
