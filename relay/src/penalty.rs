//! Which sources behave like attackers, and for how long their connections are closed at once. Pure:
//! time is an argument.
//!
//! After OpenSSH's PerSourcePenalties (sshd_config(5)), with its numbers where it has them: every offence
//! adds its penalty to what the source still owes; at [`Rules::least`] it begins to bite, and it bites until
//! all is served. So a mistyped token or a health check costs nothing, and a scanner is out after a few tries.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

/// What a connection did that a device with a valid certificate, token or ticket never does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Offence {
    /// Showed an enrolment token that does not exist.
    WrongToken,
    /// Showed a client certificate that is not (or no longer) of this organisation, or none.
    BadCertificate,
    /// Showed a ticket that the mediator did not sign, or without its holder's signature.
    BadTicket,
    /// Spoke something else.
    Garbage,
    /// Showed nothing in time.
    Silent,
    /// Hung up before it had shown anything: port scans, health checks, and networks that fail.
    Left,
}

/// What a table of penalties goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// From here on a penalty bites.
    pub least: Duration,
    /// No source owes more.
    pub most: Duration,
    /// Sources that are remembered.
    pub sources: usize,
    /// A source that is being penalised gets in once in this time all the same.
    pub spare: Duration,
}

/// The sources that owe something.
///
/// A penalised source still gets in once in [`Rules::spare`]. Behind one address there may be a whole
/// office or a provider's NAT, and one scanner there must not lock out the genuine devices, which try again
/// until they are in; to the scanner, one try a second on 128-bit secrets is worth nothing.
///
/// The table is bounded. When it is full, the source whose penalty ends soonest is let off (OpenSSH's
/// `overflow:permissive`): an attacker with that many sources gains a few seconds for the least of them. Taking
/// no new ones would let him fill the table and then attack from elsewhere, and refusing everybody would do
/// his work for him.
#[derive(Debug)]
pub struct Penalties {
    rules: Rules,
    sources: HashMap<IpAddr, Penalty>,
    ends: BTreeSet<(Instant, IpAddr)>,
}

#[derive(Debug)]
struct Penalty {
    ends: Instant,
    bites: bool,
    spare_at: Instant,
}

impl Offence {
    /// What one costs.
    pub fn penalty(self) -> Duration {
        Duration::from_secs(match self {
            // OpenSSH's `authfail`.
            Self::WrongToken | Self::BadCertificate | Self::BadTicket => 5,
            // Nobody mistypes a protocol: as bad as a wrong secret.
            Self::Garbage => 5,
            // `grace-exceeded`.
            Self::Silent => 10,
            // `noauth`. A health check every two seconds never gets anywhere near the least that bites.
            Self::Left => 1,
        })
    }

    /// What somebody did whose TLS connection ended before it had shown anything valid.
    pub fn of_handshake(error: &io::Error) -> Self {
        use rustls::Error::{AlertReceived, InvalidCertificate, NoCertificatesPresented};
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match tls {
            Some(InvalidCertificate(_) | NoCertificatesPresented) => Self::BadCertificate,
            // It does not trust us: a device of another organisation, or a browser.
            Some(AlertReceived(_)) => Self::Left,
            Some(_) => Self::Garbage,
            None if error.kind() == io::ErrorKind::InvalidData => Self::Garbage,
            None => Self::Left,
        }
    }
}

impl Default for Rules {
    /// OpenSSH's.
    fn default() -> Self {
        Self {
            least: Duration::from_secs(15),
            most: Duration::from_secs(600),
            sources: 65_536,
            spare: Duration::from_secs(1),
        }
    }
}

impl Penalties {
    /// Nobody owes anything.
    pub fn new(rules: Rules) -> Self {
        Self { rules, sources: HashMap::new(), ends: BTreeSet::new() }
    }

    /// Whether a new connection of `source` may come in. Uses up the spare one of a penalised source.
    pub fn admits(&mut self, source: IpAddr, now: Instant) -> bool {
        self.forget(now);
        match self.sources.get_mut(&network(source)) {
            Some(penalty) if penalty.bites => {
                let spare = penalty.spare_at <= now;
                if spare {
                    penalty.spare_at = now + self.rules.spare;
                }
                spare
            }
            _ => true,
        }
    }

    /// Adds the penalty for `offence`. Says whether it bites from now on and did not before.
    pub fn add(&mut self, source: IpAddr, offence: Offence, now: Instant) -> bool {
        self.forget(now);
        let source = network(source);
        let known = self.sources.remove(&source);
        match &known {
            Some(penalty) => {
                self.ends.remove(&(penalty.ends, source));
            }
            None if self.sources.len() >= self.rules.sources => {
                if let Some((_, soonest)) = self.ends.pop_first() {
                    self.sources.remove(&soonest);
                }
            }
            None => {}
        }
        let bit = known.as_ref().is_some_and(|penalty| penalty.bites);
        let owed = known.as_ref().map_or(now, |penalty| penalty.ends) + offence.penalty();
        let ends = owed.min(now + self.rules.most);
        let bites = bit || ends >= now + self.rules.least;
        // The first spare connection comes a while after the penalty has begun to bite.
        let spare_at = known.filter(|_| bit).map_or(now + self.rules.spare, |penalty| penalty.spare_at);
        self.ends.insert((ends, source));
        self.sources.insert(source, Penalty { ends, bites, spare_at });
        bites && !bit
    }

    /// Sources that owe something, the little ones too.
    pub fn len(&self) -> usize {
        self.sources.len()
    }

    /// Whether nobody owes anything.
    pub fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }

    fn forget(&mut self, now: Instant) {
        while let Some((ends, source)) = self.ends.first().copied()
            && ends <= now
        {
            self.ends.pop_first();
            self.sources.remove(&source);
        }
    }
}

/// What counts as one source: an IPv4 address, or the /64 that one customer of a provider holds.
pub fn network(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v4(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    #[test]
    fn a_few_mistakes_cost_nothing_and_a_scan_is_out() {
        let mut table = Penalties::new(Rules::default());
        let start = Instant::now();
        assert!(!table.add(v4(1), Offence::WrongToken, start));
        assert!(!table.add(v4(1), Offence::WrongToken, start));
        assert!(table.admits(v4(1), start) && table.admits(v4(1), start));
        assert!(table.add(v4(1), Offence::WrongToken, start));
        assert!(!table.add(v4(1), Offence::WrongToken, start), "it bit before");
        assert!(!table.admits(v4(1), start) && table.admits(v4(2), start));
        let second = Duration::from_secs(1);
        assert!(table.admits(v4(1), start + second), "the spare one");
        assert!(!table.admits(v4(1), start + second));
        assert!(table.admits(v4(1), start + 20 * second) && table.is_empty(), "served");
        // A health check every two seconds for an hour.
        for check in 0..1800 {
            assert!(!table.add(v4(3), Offence::Left, start + check * 2 * second));
        }
        for _ in 0..1000 {
            table.add(v4(4), Offence::Silent, start + 7200 * second);
        }
        assert!(!table.admits(v4(4), start + 7200 * second));
        assert!(table.admits(v4(4), start + 7800 * second), "never more than the most");
    }

    #[test]
    fn ipv6_counts_by_its_64_and_mapped_ipv4_as_ipv4() {
        let parse = |text: &str| text.parse::<IpAddr>().expect("an address");
        assert_eq!(network(parse("2001:db8:1:2:3:4:5:6")), parse("2001:db8:1:2::"));
        assert_ne!(network(parse("2001:db8:1:2::1")), network(parse("2001:db8:1:3::1")));
        assert_eq!(network(parse("::ffff:192.0.2.1")), v4(1));
    }

    #[test]
    fn a_hundred_thousand_sources_take_a_bounded_table() {
        let mut table = Penalties::new(Rules::default());
        let now = Instant::now();
        for source in 0..100_000_u32 {
            table.add(IpAddr::from((0x0a00_0000 + source).to_be_bytes()), Offence::Garbage, now);
        }
        assert_eq!((table.len(), table.ends.len()), (65_536, 65_536));
    }

    /// The same by linear search through a list.
    #[derive(Default)]
    struct Model(Vec<(IpAddr, Instant, bool, Instant)>);

    impl Model {
        fn admits(&mut self, source: IpAddr, now: Instant, rules: Rules) -> bool {
            self.0.retain(|entry| entry.1 > now);
            match self.0.iter_mut().find(|entry| entry.0 == source && entry.2) {
                Some(entry) if entry.3 > now => false,
                Some(entry) => {
                    entry.3 = now + rules.spare;
                    true
                }
                None => true,
            }
        }

        fn add(&mut self, source: IpAddr, offence: Offence, now: Instant, rules: Rules) -> bool {
            self.0.retain(|entry| entry.1 > now);
            let at = self.0.iter().position(|entry| entry.0 == source).unwrap_or_else(|| {
                if self.0.len() >= rules.sources {
                    let soonest = (0..self.0.len()).min_by_key(|at| (self.0[*at].1, self.0[*at].0));
                    self.0.remove(soonest.expect("not empty"));
                }
                self.0.push((source, now, false, now));
                self.0.len() - 1
            });
            let entry = &mut self.0[at];
            entry.1 = (entry.1 + offence.penalty()).min(now + rules.most);
            let begins = !entry.2 && entry.1 >= now + rules.least;
            if begins {
                entry.2 = true;
                entry.3 = now + rules.spare;
            }
            begins
        }
    }

    proptest! {
        #[test]
        fn the_table_does_what_the_model_does(
            steps in proptest::collection::vec((0..8_u8, 0..8_u8, 0..3000_u64), 0..300)
        ) {
            let rules = Rules { most: Duration::from_secs(40), sources: 5, ..Rules::default() };
            let offences = [
                Offence::WrongToken, Offence::BadCertificate, Offence::BadTicket,
                Offence::Garbage, Offence::Silent, Offence::Left,
            ];
            let (mut table, mut model) = (Penalties::new(rules), Model::default());
            let mut now = Instant::now();
            for (source, act, wait) in steps {
                now += Duration::from_millis(wait * u64::from(act) / 4);
                match offences.get(usize::from(act)) {
                    Some(offence) => prop_assert_eq!(
                        table.add(v4(source), *offence, now),
                        model.add(v4(source), *offence, now, rules)
                    ),
                    None => prop_assert_eq!(
                        table.admits(v4(source), now),
                        model.admits(v4(source), now, rules)
                    ),
                }
                prop_assert!(table.len() <= rules.sources && table.len() == table.ends.len());
                prop_assert_eq!(table.len(), model.0.len());
            }
        }
    }
}
