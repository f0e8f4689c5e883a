//! Binds a server's sockets; what cannot be bound is an error with its remedy, never another port.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use adit_client::exit::{Exit, Failure};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

#[cfg(target_os = "linux")]
use crate::holder::{self, Holder};
#[cfg(not(target_os = "linux"))]
use crate::holder_none::{self as holder, Holder};

/// Connections that may wait to be accepted: a burst of reconnecting clients.
const BACKLOG: i32 = 1024;
/// How long a listener rests when the system has no descriptor or memory for a connection.
const REST: Duration = Duration::from_millis(100);

/// Where an address was configured: what an error tells people to change.
#[derive(Debug, Clone, Copy)]
pub struct Setting<'a> {
    /// Section and key, for example `[listen] relay`.
    pub key: &'a str,
    /// The configuration file.
    pub file: &'a Path,
}

/// Listens on TCP `address`. `[::]` takes IPv4 too, and IPv4 only where the system has no IPv6. Needs a
/// tokio runtime.
///
/// # Errors
/// [`ListenError`].
pub fn tcp(setting: Setting<'_>, address: SocketAddr) -> Result<TcpListener, ListenError> {
    try_tcp(address).map_err(|error| ListenError::new(setting, Type::STREAM, address, error))
}

/// Listens on this TCP address if it is free; for somebody who has others to try.
///
/// # Errors
/// The system's.
pub fn try_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    bind(Type::STREAM, address).and_then(|socket| {
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    })
}

/// The same for UDP.
///
/// # Errors
/// [`ListenError`].
pub fn udp(setting: Setting<'_>, address: SocketAddr) -> Result<UdpSocket, ListenError> {
    bind(Type::DGRAM, address)
        .and_then(|socket| UdpSocket::from_std(socket.into()))
        .map_err(|error| ListenError::new(setting, Type::DGRAM, address, error))
}

/// The next connection. When the system has no descriptor or memory for one, it rests for a while and tries
/// again: the connection stays where it is, and the loop does not spin. Cancel safe.
pub async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                tracing::debug!(%error, "accept failed");
                if !is_about_one_connection(&error) {
                    tokio::time::sleep(REST).await;
                }
            }
        }
    }
}

/// How many descriptors this process may open.
pub fn descriptors() -> usize {
    #[cfg(target_os = "linux")]
    if let Some(current) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current {
        return usize::try_from(current).unwrap_or(usize::MAX);
    }
    usize::MAX
}

/// A socket that could not be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} ({protocol}): {}", why(.holder.as_ref(), .error))]
pub struct ListenError {
    /// `[listen] relay in /var/lib/adit-relay/config.toml`.
    setting: String,
    protocol: &'static str,
    address: SocketAddr,
    /// Who has the port, if somebody has it and could be found.
    holder: Option<Holder>,
    error: io::Error,
}

impl ListenError {
    fn new(setting: Setting<'_>, kind: Type, address: SocketAddr, error: io::Error) -> Self {
        let taken = error.kind() == ErrorKind::AddrInUse;
        Self {
            setting: format!("{} in {}", setting.key, setting.file.display()),
            protocol: if kind == Type::STREAM { "TCP" } else { "UDP" },
            address,
            holder: if taken { holder::of(kind, address) } else { None },
            error,
        }
    }
}

impl Failure for ListenError {
    fn exit(&self) -> Exit {
        Exit::Usage
    }

    fn remedy(&self) -> Option<String> {
        let setting = &self.setting;
        Some(match self.error.kind() {
            ErrorKind::AddrInUse => {
                let hidden = self.holder.as_ref().is_none_or(Holder::is_hidden);
                let which = if hidden { " (`sudo ss -lnp` shows which)" } else { "" };
                format!("stop that program{which}, or set {setting} to another port")
            }
            ErrorKind::PermissionDenied => format!(
                "ports below 1024 need CAP_NET_BIND_SERVICE, which the service has that the command \
                 `install` sets up; or set {setting} to a higher port"
            ),
            ErrorKind::AddrNotAvailable => {
                format!("this machine has no such address: set {setting} to one that it has")
            }
            _ => format!("set {setting} to another address"),
        })
    }
}

fn why(holder: Option<&Holder>, error: &io::Error) -> String {
    match holder {
        Some(holder) => format!("{holder} has that port"),
        None => error.to_string(),
    }
}

fn bind(kind: Type, address: SocketAddr) -> io::Result<Socket> {
    let all = address.ip().is_unspecified() && address.is_ipv6();
    match bind_one(kind, address) {
        Err(error) if all && has_no_ipv6(&error) => {
            bind_one(kind, SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port())))
        }
        bound => bound,
    }
}

fn bind_one(kind: Type, address: SocketAddr) -> io::Result<Socket> {
    let protocol = if kind == Type::STREAM { Protocol::TCP } else { Protocol::UDP };
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    // A restarted server may bind while old connections linger. On Windows the option means another thing.
    #[cfg(unix)]
    if kind == Type::STREAM {
        socket.set_reuse_address(true)?;
    }
    socket.bind(&address.into())?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn is_about_one_connection(error: &io::Error) -> bool {
    use ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

/// No such address family, or its sockets exist but no address does.
fn has_no_ipv6(error: &io::Error) -> bool {
    error.kind() == ErrorKind::AddrNotAvailable || socket2_says_no_family(error)
}

fn socket2_says_no_family(error: &io::Error) -> bool {
    #[cfg(target_os = "linux")]
    let no_family = rustix::io::Errno::AFNOSUPPORT.raw_os_error();
    #[cfg(not(target_os = "linux"))]
    let no_family = if cfg!(windows) { 10047 } else { 47 };
    error.raw_os_error() == Some(no_family)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpStream;

    fn relay() -> Setting<'static> {
        Setting { key: "[listen] relay", file: Path::new("/d/config.toml") }
    }

    #[tokio::test]
    async fn all_addresses_means_both_families() {
        let listener = tcp(relay(), "[::]:0".parse().expect("address")).expect("binds");
        let port = listener.local_addr().expect("bound").port();
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.expect("IPv4 gets in");
    }

    #[tokio::test]
    async fn a_taken_port_is_named_with_its_remedy() {
        let first = tcp(relay(), "127.0.0.1:0".parse().expect("address")).expect("binds");
        let address = first.local_addr().expect("bound");
        let error = tcp(relay(), address).expect_err("taken");
        assert_eq!(error.exit(), Exit::Usage);
        assert!(error.to_string().contains(&address.to_string()));
        let remedy = error.remedy().expect("has one");
        println!("{error}\n  {remedy}");
        assert!(remedy.contains("[listen] relay in /d/config.toml"), "{remedy}");
        let error = udp(relay(), "192.0.2.1:0".parse().expect("address")).expect_err("not ours");
        assert!(error.remedy().expect("has one").contains("no such address"));
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn who_has_the_port_is_named() {
        let me = format!("process {} of user", std::process::id());
        let first = udp(relay(), "127.0.0.1:0".parse().expect("address")).expect("binds");
        let port = first.local_addr().expect("bound").port();
        let error = udp(relay(), SocketAddr::from(([0, 0, 0, 0], port))).expect_err("taken");
        println!("{error}");
        assert!(error.to_string().contains(&me), "{error}");
        assert!(!error.remedy().expect("has one").contains("ss -lnp"));
    }
}
