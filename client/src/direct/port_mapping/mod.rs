//! Has the router in front let others in, by PCP (RFC 6887), NAT-PMP (RFC 6886) or UPnP IGD.
//!
//! A router is asked while a session has no direct path after [`PATIENCE`], and told to forget it when the last such session
//! has ended.
//!
//! Whoever answers on the local network is the router, as far as UPnP is concerned, and its answers go through libraries that
//! have no bounds for them. So a process of its own asks (`child`): this program once more, which gets port numbers, gives
//! addresses, and knows no secrets. When its standard input ends it gives the ports back, so it also does when this
//! process is killed; and nobody waits for it.

pub(crate) mod child;

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::process::Stdio;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines, Take};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

use crate::os;

/// The command of ours that is the child, followed by its ports.
pub(crate) const COMMAND: &str = "port-mapper";
/// A session without a direct path waits so long before it has a router asked: the usual one is there by then.
pub(super) const PATIENCE: Duration = Duration::from_millis(500);
/// A child that has ended by itself is started again after this time.
const AGAIN: Duration = Duration::from_secs(600);
/// The next child waits for the end of the one before, which gives back what the next one asks for; so long at most.
const PARTING: Duration = Duration::from_secs(5);
/// More than a child has to say in a month.
const MAX_OUTPUT: u64 = 1 << 20;
/// How long one try may take: all ways, one after the other.
const TRY: Duration = Duration::from_secs(9);

/// What a port is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

/// A port of ours: `udp:40000`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Port {
    pub(crate) transport: Transport,
    pub(crate) number: NonZeroU16,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        })
    }
}

impl FromStr for Transport {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Udp, Self::Tcp];
        all.into_iter()
            .find(|known| known.to_string() == text)
            .ok_or_else(|| format!("{text:?} is neither udp nor tcp"))
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.transport, self.number)
    }
}

impl FromStr for Port {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (transport, number) = text.split_once(':').ok_or("a port is udp:NUMBER or tcp:NUMBER")?;
        let number = number.parse().map_err(|_| format!("{number:?} is no port"))?;
        Ok(Self { transport: transport.parse()?, number })
    }
}

/// What the child says about a port, one line each: `udp 203.0.113.9:40000 UPnP`, or `udp none`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Said {
    transport: Transport,
    /// Where others reach it, and how the router was asked.
    pub(crate) mapped: Option<(SocketAddr, String)>,
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.mapped {
            Some((address, way)) => write!(f, "{} {address} {way}", self.transport),
            None => write!(f, "{} none", self.transport),
        }
    }
}

impl FromStr for Said {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let mut words = line.split_whitespace();
        let transport = words.next().ok_or("an empty line")?.parse()?;
        let mapped = match (words.next(), words.next()) {
            (Some(address), Some(way)) => {
                let address: SocketAddr =
                    address.parse().map_err(|_| format!("{address:?} is no address"))?;
                is_of_use(address).then(|| (address, way.to_owned()))
            }
            _ => None,
        };
        Ok(Self { transport, mapped })
    }
}

/// Whether others may have reached something there: a router that has no address itself says 0.0.0.0.
fn is_of_use(address: SocketAddr) -> bool {
    let IpAddr::V4(ip) = address.ip() else { return false };
    let is_of_nobody = ip.is_unspecified()
        || ip.is_loopback()
        || ip.is_link_local()
        || ip.is_multicast()
        || ip.is_broadcast();
    address.port() != 0 && !is_of_nobody
}

/// Where others reach the ports of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Told {
    pub(super) udp: Option<SocketAddr>,
    pub(super) tcp: Option<SocketAddr>,
}

/// Has routers asked for the ports of a process while somebody holds what [`Self::start`] returns.
#[derive(Default)]
pub(super) struct PortMapper {
    started: Mutex<Weak<Mapped>>,
    /// Whoever gives back has it until that is done.
    turn: Arc<tokio::sync::Mutex<()>>,
}

/// What the router says.
pub(super) struct Mapped {
    told: watch::Receiver<Told>,
    again: Arc<Notify>,
}

impl PortMapper {
    /// From now on the router is asked for these ports. Must be called within a tokio runtime.
    pub(super) fn start(&self, ports: &[Port]) -> Arc<Mapped> {
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        started.upgrade().unwrap_or_else(|| {
            let (sender, told) = watch::channel(Told::default());
            let again = Arc::new(Notify::new());
            let mapped = Arc::new(Mapped { told, again: again.clone() });
            *started = Arc::downgrade(&mapped);
            // It ends by itself when nobody wants to know any more.
            tokio::spawn(keep(ports.to_vec(), sender, again, self.turn.clone()));
            mapped
        })
    }
}

impl Mapped {
    /// What it says now, and what it will say.
    pub(super) fn told(&self) -> watch::Receiver<Told> {
        self.told.clone()
    }

    /// This machine has another IPv4 address: perhaps another router is in front.
    pub(super) fn network_changed(&self) {
        self.again.notify_one();
    }
}

/// Has the router map a UDP port for a moment: where others would reach it, and how it was asked.
pub(crate) async fn try_once(number: NonZeroU16) -> Option<(SocketAddr, String)> {
    let mut asking = Asking::start(&[Port { transport: Transport::Udp, number }]).ok()?;
    let said = timeout(TRY, asking.next()).await.ok().flatten();
    asking.part().await;
    said?.mapped
}

async fn keep(
    ports: Vec<Port>,
    told: watch::Sender<Told>,
    again: Arc<Notify>,
    turn: Arc<tokio::sync::Mutex<()>>,
) {
    let _turn = turn.lock().await;
    loop {
        match Asking::start(&ports) {
            Ok(asking) => {
                if asking.follow(&told, &again).await {
                    return;
                }
                tracing::debug!("the process that asks routers for ports has ended");
            }
            Err(error) => tracing::debug!(%error, "no process to ask routers for ports"),
        }
        told.send_replace(Told::default());
        tokio::select! {
            () = sleep(AGAIN) => {}
            () = told.closed() => return,
        }
    }
}

/// A running child.
struct Asking {
    process: Child,
    input: ChildStdin,
    output: Lines<BufReader<Take<ChildStdout>>>,
}

impl Asking {
    fn start(ports: &[Port]) -> io::Result<Self> {
        // There even after an upgrade has put another program in its place.
        let program = if cfg!(target_os = "linux") {
            PathBuf::from("/proc/self/exe")
        } else {
            std::env::current_exe()?
        };
        let mut command = Command::new(program);
        command.arg(COMMAND).args(ports.iter().map(Port::to_string));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        os::without_terminal(&mut command);
        let mut process = command.spawn()?;
        let (input, output) = (process.stdin.take(), process.stdout.take());
        let (Some(input), Some(output)) = (input, output) else {
            return Err(io::Error::other("a child without pipes"));
        };
        Ok(Self { process, input, output: BufReader::new(output.take(MAX_OUTPUT)).lines() })
    }

    /// What it says next; `None` when it has ended.
    async fn next(&mut self) -> Option<Said> {
        self.output.next_line().await.ok().flatten()?.parse().ok()
    }

    /// Passes on what it says. `true`: nobody wants to know any more, and the ports were given back.
    async fn follow(mut self, told: &watch::Sender<Told>, again: &Notify) -> bool {
        loop {
            tokio::select! {
                said = self.next() => {
                    let Some(Said { transport, mapped }) = said else { return false };
                    tracing::debug!(%transport, address = ?mapped, "what the router does");
                    let at = mapped.map(|(address, _)| address);
                    told.send_if_modified(|told| {
                        let slot = match transport {
                            Transport::Udp => &mut told.udp,
                            Transport::Tcp => &mut told.tcp,
                        };
                        std::mem::replace(slot, at) != at
                    });
                }
                () = again.notified() => {
                    if self.input.write_all(b"\n").await.is_err() {
                        return false;
                    }
                }
                () = told.closed() => {
                    self.part().await;
                    return true;
                }
            }
        }
    }

    /// Has it give back what it has, and waits for its end, for a while.
    async fn part(self) {
        let Self { mut process, input, output } = self;
        drop((input, output));
        let _ = timeout(PARTING, process.wait()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_understood() {
        for text in ["udp:40000", "tcp:1"] {
            assert_eq!(text.parse::<Port>().expect("a port").to_string(), text);
        }
        for text in ["udp:0", "udp:70000", "sctp:1", "40000", ""] {
            text.parse::<Port>().expect_err(text);
        }
        for line in ["udp 203.0.113.9:40000 UPnP", "tcp none"] {
            assert_eq!(line.parse::<Said>().expect("a line").to_string(), line);
        }
        for line in ["", "sctp none", "udp 1.2.3 UPnP"] {
            line.parse::<Said>().expect_err(line);
        }
        for line in
            ["udp 0.0.0.0:40000 PCP", "udp 127.0.0.1:40000 PCP", "udp 203.0.113.9:0 PCP", "udp [::1]:1 PCP"]
        {
            assert_eq!(line.parse::<Said>().expect("a line").mapped, None, "{line}");
        }
    }
}
