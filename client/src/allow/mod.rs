//! The agent's allow list: the targets that it connects to. It has the last word.
//!
//! A name entry matches the name that was asked for, a network entry the resolved address. A target is
//! resolved once, and the very address that was checked is connected to, so that a name cannot point
//! somewhere else between check and use. Special ranges (loopback, link-local, ...: [`special`]) need an
//! entry that names them: `0.0.0.0/0` does not open 127.0.0.1.

mod entry;
pub mod special;

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use adit_protocol::Target;
use adit_protocol::frame::ResetCode;
use tokio::sync::Semaphore;
use tokio::time::timeout;

pub use entry::{Entry, InvalidEntry};

use entry::Host;

/// How long a name may take to resolve.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);
/// More addresses of one name than anyone needs.
const MAX_ADDRESSES: usize = 8;
/// Names that are looked up at once. The system's resolver blocks a thread for each, for longer than
/// [`RESOLVE_TIMEOUT`] when its servers are silent.
const MAX_LOOKUPS: usize = 32;
/// What is allowed when nothing is said: SSH, RDP and VNC on the agent itself.
const DEFAULT: [&str; 2] = ["127.0.0.1:22,3389,5900", "[::1]:22,3389,5900"];

/// Which targets an agent connects to. An empty list allows nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowList {
    entries: Vec<Entry>,
}

impl AllowList {
    /// What `target` may be connected to: its addresses that are allowed, to be tried in turn.
    /// Nothing is looked up for a target that no address could make allowed.
    ///
    /// # Errors
    /// [`Denied`].
    pub async fn resolve_and_check(&self, target: &Target) -> Result<Vec<SocketAddr>, Denied> {
        if !self.entries.iter().any(|entry| entry.may_match(target)) {
            return Err(Denied::NotAllowed);
        }
        let resolved = match target.ip() {
            Some(address) => vec![SocketAddr::new(address, target.port)],
            None => timeout(RESOLVE_TIMEOUT, lookup(target))
                .await
                .map_err(|_| Denied::NotFound)?
                .map_err(|_| Denied::NotFound)?,
        };
        if resolved.is_empty() {
            return Err(Denied::NotFound);
        }
        let mut allowed: Vec<SocketAddr> = resolved
            .into_iter()
            .map(canonical)
            .filter(|address| self.permits(target, address.ip()))
            .collect();
        allowed.truncate(MAX_ADDRESSES);
        if allowed.is_empty() { Err(Denied::NotAllowed) } else { Ok(allowed) }
    }

    /// Whether `target`, resolved to `address`, may be connected to.
    pub fn permits(&self, target: &Target, address: IpAddr) -> bool {
        let address = address.to_canonical();
        let special = special::range_of(address);
        self.entries.iter().filter(|entry| entry.may_match(target)).any(|entry| {
            match (&entry.host, special) {
                (Host::Network(network), None) => network.contains(address),
                (Host::Network(network), Some(special)) => {
                    special.covers(network) && network.contains(address)
                }
                // A name says nothing about special addresses: whoever answers for it could mean any. The
                // one name that names a special range is localhost (RFC 6761 section 6.3).
                (Host::Name(_), None) => !entry.is_localhost(),
                (Host::Name(_), Some(_)) => entry.is_localhost() && address.is_loopback(),
            }
        })
    }

    /// The entries, in the order given.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }
}

impl Default for AllowList {
    /// 127.0.0.1 and ::1 on 22, 3389 and 5900.
    fn default() -> Self {
        DEFAULT.iter().map(|text| text.parse::<Entry>().expect("the default list is well-formed")).collect()
    }
}

impl FromIterator<Entry> for AllowList {
    fn from_iter<I: IntoIterator<Item = Entry>>(entries: I) -> Self {
        Self { entries: entries.into_iter().collect() }
    }
}

impl fmt::Display for AllowList {
    /// The entries, separated by spaces; each can be parsed again.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, entry) in self.entries.iter().enumerate() {
            write!(f, "{}{entry}", if index == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}

/// Why a target is not connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// No entry has it.
    #[error("not in the allow list")]
    NotAllowed,
    /// Its name does not resolve, or not in time.
    #[error("the name cannot be resolved")]
    NotFound,
}

impl Denied {
    /// What the technician is told.
    pub fn code(self) -> ResetCode {
        match self {
            Self::NotAllowed => ResetCode::NotAllowed,
            Self::NotFound => ResetCode::NotFound,
        }
    }
}

/// Asks the system's resolver. It also reads decimal and octal spellings of IPv4 addresses, so that
/// those are checked as the addresses that they are.
async fn lookup(target: &Target) -> io::Result<Vec<SocketAddr>> {
    static LOOKUPS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(MAX_LOOKUPS)));
    let permit = LOOKUPS.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (host, port) = (target.host().to_owned(), target.port);
    tokio::task::spawn_blocking(move || {
        // Given back when the resolver returns, and not when nobody waits for it any more.
        let _permit = permit;
        (host.as_str(), port).to_socket_addrs().map(|addresses| addresses.take(64).collect())
    })
    .await
    .map_err(io::Error::other)?
}

/// IPv4 as IPv4, however it was written; a scope (IPv6 link-local) stays.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => SocketAddr::new(ip.into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> AllowList {
        text.split_whitespace().map(|entry| entry.parse::<Entry>().expect(entry)).collect()
    }

    fn permits(list: &AllowList, target: &str, address: &str) -> bool {
        list.permits(&target.parse().expect(target), address.parse().expect(address))
    }

    #[test]
    fn the_default_is_ssh_rdp_and_vnc_on_the_agent_itself() {
        let list = AllowList::default();
        assert_eq!(list.to_string(), "127.0.0.1:22,3389,5900 [::1]:22,3389,5900");
        for (target, address, expected) in [
            ("127.0.0.1:22", "127.0.0.1", true),
            ("127.0.0.1:3389", "127.0.0.1", true),
            ("[::1]:5900", "::1", true),
            ("localhost:22", "127.0.0.1", true),
            ("[::ffff:127.0.0.1]:22", "::ffff:127.0.0.1", true),
            ("127.0.0.1:23", "127.0.0.1", false),
            ("127.0.0.1:22/udp", "127.0.0.1", false),
            ("127.0.0.2:22", "127.0.0.2", false),
            ("192.0.2.1:22", "192.0.2.1", false),
            ("0.0.0.0:22", "0.0.0.0", false),
            ("[::]:22", "::", false),
        ] {
            assert_eq!(permits(&list, target, address), expected, "{target} at {address}");
        }
    }

    #[test]
    fn a_name_entry_matches_the_name_and_a_network_entry_the_address() {
        let list = list("db.internal:5432 10.0.0.0/8:80,8000-8100 [fd00::/8]:443 10.0.0.53:53/udp");
        for (target, address, expected) in [
            ("db.internal:5432", "10.1.2.3", true),
            ("DB.internal:5432", "203.0.113.7", true),
            ("other.internal:5432", "10.1.2.3", false),
            ("10.1.2.3:5432", "10.1.2.3", false),
            ("web.internal:80", "10.1.2.3", true),
            ("10.1.2.3:8050", "10.1.2.3", true),
            ("10.1.2.3:8101", "10.1.2.3", false),
            ("11.1.2.3:80", "11.1.2.3", false),
            ("[fd12::1]:443", "fd12::1", true),
            ("[fe80::1]:443", "fe80::1", false),
            ("10.0.0.53:53/udp", "10.0.0.53", true),
            ("10.0.0.53:53", "10.0.0.53", false),
        ] {
            assert_eq!(permits(&list, target, address), expected, "{target} at {address}");
        }
    }

    /// Every special address in every spelling, against lists that allow everything but do not name it.
    #[test]
    fn special_addresses_need_an_entry_that_names_them() {
        let everything = list("0.0.0.0/0:1-65535 [::/0]:1-65535 rebound.example:1-65535");
        for address in [
            "127.0.0.1",
            "127.255.255.254",
            "0.0.0.0",
            "0.1.2.3",
            "169.254.169.254",
            "169.254.0.1",
            "224.0.0.251",
            "239.255.255.250",
            "255.255.255.255",
            "192.88.99.1",
            "100.100.100.200",
            "168.63.129.16",
            "::",
            "::1",
            "::127.0.0.1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::ffff:0:127.0.0.1",
            "64:ff9b::127.0.0.1",
            "64:ff9b::10.0.0.1",
            "64:ff9b:1::1",
            "2002:7f00:1::1",
            "2002:a9fe:a9fe::",
            "2001:0:7f00:1::",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::1",
            "fd00:ec2::254",
        ] {
            let target =
                if address.contains(':') { format!("[{address}]:80") } else { format!("{address}:80") };
            assert!(!permits(&everything, &target, address), "{address}");
            // DNS rebinding: the name is allowed, but now it points there.
            assert!(!permits(&everything, "rebound.example:80", address), "rebound to {address}");
            assert!(permits(&list(&target), &target, address), "{address} is named");
        }
        for address in ["93.184.215.14", "10.0.0.1", "2606:4700::1", "fd12:3456::1", "100.64.0.1"] {
            assert!(permits(&everything, "rebound.example:80", address), "{address} is not special");
        }
    }

    #[test]
    fn a_network_inside_a_special_range_opens_that_part_and_a_larger_one_does_not() {
        for (entry, address, expected) in [
            ("127.0.0.0/8:80", "127.0.0.1", true),
            ("127.0.0.0/16:80", "127.0.0.1", true),
            ("127.0.0.0/16:80", "127.1.0.1", false),
            ("126.0.0.0/7:80", "127.0.0.1", false),
            ("169.254.0.0/16:80", "169.254.169.254", true),
            ("[fe80::/10]:80", "fe80::1", true),
            ("[fe80::/9]:80", "fe80::1", false),
            ("[::/8]:80", "::1", false),
            ("[::/96]:80", "::1", false),
            ("[64:ff9b::/96]:80", "64:ff9b::10.0.0.1", true),
            ("[::ffff:127.0.0.0/104]:80", "127.0.0.1", true),
            ("[::ffff:0.0.0.0/96]:80", "127.0.0.1", false),
            ("[::ffff:0.0.0.0/96]:80", "10.0.0.1", true),
            ("localhost:80", "127.0.0.1", true),
            ("localhost:80", "10.0.0.1", false),
            ("localhost:80", "169.254.169.254", false),
        ] {
            assert_eq!(permits(&list(entry), "localhost:80", address), expected, "{entry} and {address}");
        }
    }

    /// Decimal, octal, hexadecimal and short spellings: whatever the system's resolver makes of them,
    /// the address decides.
    #[tokio::test]
    async fn odd_spellings_are_the_address_that_they_mean() {
        let everything = list("0.0.0.0/0:1-65535 [::/0]:1-65535");
        for spelling in
            ["2130706433", "0177.0.0.1", "0x7f.1", "0x7f000001", "127.1", "127.0.1", "0", "2852039166"]
        {
            let target: Target = format!("{spelling}:80").parse().expect(spelling);
            let checked = everything.resolve_and_check(&target).await;
            assert!(checked.is_err(), "{spelling}: {checked:?}");
        }
    }

    #[tokio::test]
    async fn what_was_checked_is_what_is_connected_to() {
        let list = list("127.0.0.1:80 192.0.2.0/24:80");
        let check = async |target: &str| list.resolve_and_check(&target.parse().expect(target)).await;
        let address = |text: &str| Ok(vec![text.parse::<SocketAddr>().expect(text)]);
        assert_eq!(check("127.0.0.1:80").await, address("127.0.0.1:80"));
        assert_eq!(check("[::ffff:192.0.2.9]:80").await, address("192.0.2.9:80"));
        assert_eq!(check("localhost:80").await, address("127.0.0.1:80"));
        assert_eq!(check("127.0.0.1:81").await, Err(Denied::NotAllowed));
        // RFC 6761 section 6.4: never resolves.
        assert_eq!(check("nowhere.invalid:80").await, Err(Denied::NotFound));
    }

    #[tokio::test]
    async fn nothing_is_looked_up_for_what_cannot_be_allowed() {
        let list = list("db.internal:5432");
        for target in ["nowhere.invalid:5432", "db.internal:5433", "db.internal:5432/udp"] {
            let target: Target = target.parse().expect(target);
            assert_eq!(list.resolve_and_check(&target).await, Err(Denied::NotAllowed), "{target}");
        }
    }

    #[test]
    fn every_address_in_any_wrapping_is_judged_as_itself() {
        let list = list("0.0.0.0/0:80");
        let target: Target = "x.example:80".parse().expect("a target");
        for _ in 0..20_000 {
            let v4 = std::net::Ipv4Addr::from(rand::random::<u32>());
            let plain = list.permits(&target, v4.into());
            assert_eq!(plain, special::range_of(v4.into()).is_none(), "{v4}");
            assert_eq!(list.permits(&target, v4.to_ipv6_mapped().into()), plain, "{v4}");
        }
    }
}
