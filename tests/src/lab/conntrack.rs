//! Forgetting every connection that a router tracks, as it does when it reboots.

use std::io;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, netlink, recv, send, socket};

/// Flushes the connection table of the calling thread's network namespace (what `conntrack -F` does:
/// `IPCTNL_MSG_CT_DELETE` without a tuple, `linux/netfilter/nfnetlink_conntrack.h`).
pub(super) fn flush() -> io::Result<()> {
    const NFNL_SUBSYS_CTNETLINK: u16 = 1;
    const IPCTNL_MSG_CT_DELETE: u16 = 2;
    const NLM_F_REQUEST: u16 = 1;
    const NLM_F_ACK: u16 = 4;
    const NLMSG_ERROR: u16 = 2;

    // struct nlmsghdr (16 bytes), then struct nfgenmsg (4 bytes): any family, version 0.
    let mut message = Vec::with_capacity(20);
    message.extend_from_slice(&20u32.to_ne_bytes());
    message.extend_from_slice(&(NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE).to_ne_bytes());
    message.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    message.extend_from_slice(&[0; 12]);

    let netlink = socket(AddressFamily::NETLINK, SocketType::RAW, Some(netlink::NETFILTER))?;
    set_socket_timeout(&netlink, Timeout::Recv, Some(Duration::from_secs(5)))?;
    send(&netlink, &message, SendFlags::empty())?;
    let mut answer = [0; 256];
    let (length, _) = recv(&netlink, &mut answer[..], RecvFlags::empty())?;
    // The acknowledgement is an error message with the code 0, else a negative errno.
    let kind = answer[4..6].try_into().map(u16::from_ne_bytes);
    let code = answer[16..20].try_into().map(i32::from_ne_bytes);
    match (kind, code) {
        (Ok(NLMSG_ERROR), Ok(0)) if length >= 20 => Ok(()),
        (Ok(NLMSG_ERROR), Ok(code)) if length >= 20 => Err(io::Error::from_raw_os_error(-code)),
        _ => Err(io::Error::other("the kernel did not acknowledge the flush")),
    }
}
