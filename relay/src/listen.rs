//! Binds a server's sockets; what cannot be bound is an error with its remedy, never another port.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use adit_client::exit::{Exit, Failure};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

/// Connections that may wait to be accepted: a burst of reconnecting clients.
const BACKLOG: i32 = 1024;
/// How long a listener rests when the system has no descriptor or memory for a connection.
const REST: Duration = Duration::from_millis(100);

/// Listens on TCP `address`. `[::]` takes IPv4 too, and IPv4 only where the system has no IPv6.
/// `setting` names it in errors, for example `[listen] relay`. Needs a tokio runtime.
///
/// # Errors
/// [`ListenError`].
pub fn tcp(setting: &'static str, address: SocketAddr) -> Result<TcpListener, ListenError> {
    bind(Type::STREAM, address)
        .and_then(|socket| {
            socket.listen(BACKLOG)?;
            TcpListener::from_std(socket.into())
        })
        .map_err(|error| ListenError { setting, protocol: "TCP", address, error })
}

/// The same for UDP.
///
/// # Errors
/// [`ListenError`].
pub fn udp(setting: &'static str, address: SocketAddr) -> Result<UdpSocket, ListenError> {
    bind(Type::DGRAM, address)
        .and_then(|socket| UdpSocket::from_std(socket.into()))
        .map_err(|error| ListenError { setting, protocol: "UDP", address, error })
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

/// Takes as many descriptors as the system grants: the usual soft limit of 1,024 is a few hundred pairs.
pub fn raise_descriptor_limit() {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
            tracing::warn!(%error, "the limit on open descriptors stays as it is");
        }
    }
}

/// A socket that could not be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} ({protocol}): {error}")]
pub struct ListenError {
    setting: &'static str,
    protocol: &'static str,
    address: SocketAddr,
    error: io::Error,
}

impl Failure for ListenError {
    fn exit(&self) -> Exit {
        Exit::Usage
    }

    fn remedy(&self) -> Option<String> {
        let setting = self.setting;
        Some(match self.error.kind() {
            ErrorKind::AddrInUse => format!(
                "another program has that port (`ss -lnp` shows which): stop it, or set {setting} in config.toml"
            ),
            ErrorKind::PermissionDenied => format!(
                "ports below 1024 need CAP_NET_BIND_SERVICE: grant it, or set {setting} in config.toml to a higher one"
            ),
            ErrorKind::AddrNotAvailable => {
                format!("this machine has no such address: set {setting} in config.toml to one that it has")
            }
            _ => format!("set {setting} in config.toml to another address"),
        })
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

    #[tokio::test]
    async fn all_addresses_means_both_families() {
        let listener = tcp("[listen] relay", "[::]:0".parse().expect("address")).expect("binds");
        let port = listener.local_addr().expect("bound").port();
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.expect("IPv4 gets in");
    }

    #[tokio::test]
    async fn a_taken_port_is_named_with_its_remedy() {
        let first = tcp("[listen] relay", "127.0.0.1:0".parse().expect("address")).expect("binds");
        let address = first.local_addr().expect("bound");
        let error = tcp("[listen] relay", address).expect_err("taken");
        assert_eq!(error.exit(), Exit::Usage);
        assert!(error.to_string().contains(&address.to_string()));
        assert!(error.remedy().expect("has one").contains("[listen] relay"));
        let error = udp("[listen] udp", "192.0.2.1:0".parse().expect("address")).expect_err("not ours");
        assert!(error.remedy().expect("has one").contains("no such address"));
    }
}
