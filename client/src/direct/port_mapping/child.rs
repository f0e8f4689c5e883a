//! The process that asks routers: `adit port-mapper udp:40000 tcp:40001`. The crate `portmapper` speaks the protocols.
//!
//! It says on standard output what becomes of each port, one line each time. A line on its standard input has it ask anew,
//! because the network has changed; the end of the input has it give back what it has, and end.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::num::NonZeroU16;
use std::time::Duration;

use netwatch::interfaces::HomeRouter;
use portmapper::{Client, Config, Protocol};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::{AGAIN, Port, Said, Transport, is_of_use};
use crate::events::print_line;
use crate::os;

/// How long a router may take to say that it is there; half a second for what needs no search.
const PROBE: Duration = Duration::from_secs(2);
/// How long a router may take to forget: nobody waits for this process.
const FORGET: Duration = Duration::from_secs(3);
/// Pauses after the first failures: requests are datagrams, and are sent once.
const SOON: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(4)];
/// A router that changes its mind more often than this is left alone for a while.
const MAX_CHANGES: usize = 5;
/// Giving back takes no longer, even if a router is being asked just then.
const END: Duration = Duration::from_secs(10);
/// Much more than all this takes; an answer without an end finds one here.
const MAX_MEMORY: u64 = 1 << 30;

/// Runs until the standard input ends.
pub(crate) async fn run(ports: Vec<Port>) {
    // It outlives the wish that its parent ends, for as long as giving back takes.
    let _signals = os::Signals::new();
    os::limit_memory(MAX_MEMORY);
    let (again, over) = (watch::Sender::new(()), watch::Sender::new(false));
    let mut keepers = JoinSet::new();
    for port in ports {
        keepers.spawn(keep(port, again.subscribe(), over.subscribe()));
    }
    let mut input = BufReader::new(tokio::io::stdin()).lines();
    while let Ok(Some(_)) = input.next_line().await {
        again.send_replace(());
    }
    over.send_replace(true);
    let _ = timeout(END, keepers.join_all()).await;
}

/// Keeps one port mapped.
async fn keep(port: Port, mut again: watch::Receiver<()>, mut over: watch::Receiver<bool>) {
    let (mut failures, mut changes) = (0, 0);
    loop {
        // Never cut short: what a router was asked for is to be given back.
        let mapping = Mapping::obtain(port).await;
        say(port, mapping.as_ref());
        if let Some(mut mapping) = mapping {
            failures = 0;
            let ends = loop {
                tokio::select! {
                    changed = mapping.external.changed() => {
                        changes += 1;
                        // While it is renewed there may be none for a moment.
                        if changed.is_err() || changes > MAX_CHANGES || !mapping.is_there().await {
                            break false;
                        }
                        say(port, Some(&mapping));
                    }
                    Ok(()) = again.changed() => break false,
                    () = is_over(&mut over) => break true,
                }
            };
            mapping.give_back().await;
            if ends {
                return;
            }
            say(port, None);
            if changes <= MAX_CHANGES {
                continue;
            }
        }
        let rest = SOON.get(failures).copied().filter(|_| changes <= MAX_CHANGES).unwrap_or(AGAIN);
        failures += 1;
        tokio::select! {
            () = sleep(rest) => {}
            Ok(()) = again.changed() => failures = 0,
            () = is_over(&mut over) => return,
        }
        if rest == AGAIN {
            changes = 0;
        }
    }
}

/// The input has ended.
async fn is_over(over: &mut watch::Receiver<bool>) {
    let _ = over.wait_for(|over| *over).await;
}

fn say(port: Port, mapping: Option<&Mapping>) {
    let mapped = mapping.and_then(|mapping| Some((mapping.external()?, mapping.way.name().to_owned())));
    print_line(&Said { transport: port.transport, mapped }.to_string());
}

/// How routers are asked, the best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Pcp,
    NatPmp,
    Upnp,
}

impl Way {
    const ALL: [Self; 3] = [Self::Pcp, Self::NatPmp, Self::Upnp];

    /// As people know it.
    fn name(self) -> &'static str {
        match self {
            Self::Pcp => "PCP",
            Self::NatPmp => "NAT-PMP",
            Self::Upnp => "UPnP",
        }
    }

    /// How long `portmapper` waits for a mapping; it does not tell of refusals.
    fn patience(self) -> Duration {
        match self {
            Self::Pcp => Duration::from_millis(600),
            Self::NatPmp => Duration::from_millis(1100),
            Self::Upnp => Duration::from_secs(3),
        }
    }

    fn client(self, transport: Transport) -> Client {
        Client::new(Config {
            enable_upnp: self == Self::Upnp,
            enable_pcp: self == Self::Pcp,
            enable_nat_pmp: self == Self::NatPmp,
            protocol: match transport {
                Transport::Udp => Protocol::Udp,
                Transport::Tcp => Protocol::Tcp,
            },
        })
    }
}

/// A port that a router keeps for one of ours. It is renewed as long as this lives.
struct Mapping {
    way: Way,
    port: Port,
    router: Option<IpAddr>,
    client: Client,
    external: watch::Receiver<Option<SocketAddrV4>>,
}

impl Mapping {
    /// Asks the router of the default route in all ways at once, and takes the best that works. `None`: there is none.
    async fn obtain(port: Port) -> Option<Self> {
        let router = HomeRouter::new().map(|router| router.gateway);
        let asked = Way::ALL.map(|way| {
            let client = way.client(port.transport);
            (way, client.probe(), client)
        });
        let deadline = Instant::now() + PROBE;
        for (way, probe, client) in asked {
            let Ok(Ok(Ok(found))) = timeout_at(deadline, probe).await else { continue };
            if !(found.pcp || found.nat_pmp || found.upnp) {
                continue;
            }
            let external = client.watch_external_address();
            client.update_local_port(port.number);
            let mut mapping = Self { way, port, router, client, external };
            if mapping.is_there().await {
                return Some(mapping);
            }
            mapping.give_back().await;
        }
        None
    }

    /// Whether it has an address, or gets one.
    async fn is_there(&mut self) -> bool {
        let is_there = |at: &Option<SocketAddrV4>| at.is_some_and(|at| is_of_use(at.into()));
        timeout(self.way.patience(), self.external.wait_for(is_there)).await.is_ok_and(|there| there.is_ok())
    }

    /// Where others reach the port.
    fn external(&self) -> Option<SocketAddr> {
        self.external.borrow().map(SocketAddr::V4)
    }

    /// Tells the router to forget it, and waits for a moment until that is said.
    async fn give_back(self) {
        if let (Way::NatPmp, Transport::Tcp, Some(router)) = (self.way, self.port.transport, self.router) {
            // `portmapper` 0.20 gives every port back as one of UDP.
            drop(self.client);
            let _ = give_back_by_nat_pmp(router, self.port.number).await;
            return;
        }
        self.client.deactivate();
        // It answers in turn.
        let _ = timeout(FORGET, self.client.probe()).await;
    }
}

/// Says that a TCP port is no longer wanted (RFC 6886 section 3.4); an answer is not waited for.
async fn give_back_by_nat_pmp(router: IpAddr, port: NonZeroU16) -> io::Result<()> {
    const SERVER: u16 = 5351;
    const MAP_TCP: u8 = 2;
    let [high, low] = port.get().to_be_bytes();
    let request = [0, MAP_TCP, 0, 0, high, low, 0, 0, 0, 0, 0, 0];
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    socket.send_to(&request, (router, SERVER)).await.map(drop)
}
