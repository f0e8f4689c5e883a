//! Which program has a port: for the error of a server that wanted it (proc(5): /proc/PID/net/tcp and
//! relatives name a socket's inode and user, /proc/PID/fd the process that has it open).

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use procfs::ProcResult;
use procfs::net::TcpState;
use procfs::process::{FDTarget, Process, all_processes};
use socket2::Type;

/// A program that has a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holder {
    /// Its name and process id. `None` where this user may not look into the other's processes.
    process: Option<(String, i32)>,
    user: u32,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = user_name(self.user).unwrap_or_else(|| self.user.to_string());
        match &self.process {
            Some((name, pid)) => write!(f, "{name} (process {pid} of user {user})"),
            None => write!(f, "a program of another user, {user}"),
        }
    }
}

impl Holder {
    /// Whether only root can find out more.
    pub(crate) fn is_hidden(&self) -> bool {
        self.process.is_none()
    }
}

/// What keeps a socket of this kind from `wanted`, as far as this user can see.
pub(crate) fn of(kind: Type, wanted: SocketAddr) -> Option<Holder> {
    let sockets = sockets(kind).ok()?;
    let Entry { user, inode, .. } = sockets.into_iter().find(|entry| collide(entry.local, wanted))?;
    Some(Holder { process: process_with(inode), user })
}

struct Entry {
    local: SocketAddr,
    user: u32,
    inode: u64,
}

/// All sockets of this network namespace; for TCP the listening ones first, since theirs is the blame.
fn sockets(kind: Type) -> ProcResult<Vec<Entry>> {
    // Through this process's own directory: it stays visible in a sandbox that hides the rest of /proc.
    let me = Process::myself()?;
    if kind == Type::DGRAM {
        let all = me.udp()?.into_iter().chain(me.udp6().unwrap_or_default());
        return Ok(all
            .map(|entry| Entry { local: entry.local_address, user: entry.uid, inode: entry.inode })
            .collect());
    }
    let mut all: Vec<_> = me.tcp()?.into_iter().chain(me.tcp6().unwrap_or_default()).collect();
    all.sort_by_key(|entry| entry.state != TcpState::Listen);
    Ok(all
        .into_iter()
        .map(|entry| Entry { local: entry.local_address, user: entry.uid, inode: entry.inode })
        .collect())
}

/// Whether a socket at `there` is in the way of one at `wanted`.
fn collide(there: SocketAddr, wanted: SocketAddr) -> bool {
    let all = |ip: IpAddr| ip.is_unspecified();
    let same = there.ip().to_canonical() == wanted.ip().to_canonical();
    there.port() == wanted.port() && (same || all(there.ip()) || all(wanted.ip()))
}

fn process_with(inode: u64) -> Option<(String, i32)> {
    // Processes come and go, and those of others cannot be looked into: what fails is skipped.
    let has = |process: &Process| {
        let mut open = process.fd().ok()?.flatten();
        open.any(|fd| matches!(fd.target, FDTarget::Socket(socket) if socket == inode)).then_some(())
    };
    let process = all_processes().ok()?.flatten().find(|process| has(process).is_some())?;
    let name = process.stat().map_or_else(|_| "a program".to_owned(), |stat| stat.comm);
    Some((name, process.pid()))
}

/// From /etc/passwd: other sources of users are slow, or of no use to a program that fails.
fn user_name(uid: u32) -> Option<String> {
    let passwd = std::fs::read_to_string("/etc/passwd").ok()?;
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid.to_string()).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    #[test]
    fn this_very_process_is_found() {
        let tcp = TcpListener::bind("127.0.0.1:0").expect("binds");
        let udp = UdpSocket::bind("[::1]:0").expect("binds");
        let (tcp, udp) = (tcp.local_addr().expect("bound"), udp.local_addr().expect("bound"));
        let me = std::process::id() as i32;
        for (kind, address) in [
            (Type::STREAM, tcp),
            (Type::STREAM, SocketAddr::from(([0; 16], tcp.port()))),
            (Type::STREAM, SocketAddr::from(([0; 4], tcp.port()))),
            (Type::DGRAM, udp),
        ] {
            let holder = of(kind, address).unwrap_or_else(|| panic!("nobody has {address}"));
            println!("{address}: {holder}");
            assert_eq!(holder.process.as_ref().map(|(_, pid)| *pid), Some(me), "{address}: {holder}");
            assert!(holder.to_string().contains(&me.to_string()) && !holder.is_hidden());
        }
        assert_eq!(of(Type::STREAM, SocketAddr::from(([127, 0, 0, 9], tcp.port()))), None);
    }

    #[test]
    fn another_users_program_is_called_that() {
        let holder = Holder { process: None, user: 0 };
        assert_eq!(holder.to_string(), "a program of another user, root");
        assert!(holder.is_hidden());
        let unknown = Holder { process: Some(("nginx".into(), 7)), user: 4_000_000 };
        assert_eq!(unknown.to_string(), "nginx (process 7 of user 4000000)");
    }
}
