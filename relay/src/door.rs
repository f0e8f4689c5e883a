//! Who may come in: penalties, the bounded number of those who have not shown who they are, and the one
//! line that a log gets about refusals. The mediator uses it too.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde::Deserialize;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};

use crate::gate::{Gate, Visit};
use crate::listen;
use crate::penalty::{Offence, Penalties, Rules, network};

/// A line for each kind of refusal at most once in this time.
const LINE_EVERY: Duration = Duration::from_secs(1);

/// How many may stand at a door.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Crowd {
    /// Connections that have not shown a valid ticket, token or certificate yet. Beyond it, the
    /// older of two random ones is closed for each new one. No more than a quarter of this process's descriptors.
    pub unauthenticated: usize,
    /// The same of one source. A site with many devices has one address, and they all come back at once.
    pub per_source: usize,
    /// Sources without penalties and with no limit of their own: a proxy behind which everybody comes.
    pub exempt: Vec<IpAddr>,
}

impl Default for Crowd {
    fn default() -> Self {
        Self { unauthenticated: 1024, per_source: 128, exempt: Vec::new() }
    }
}

/// The door of a listener.
pub struct Door {
    gate: Arc<Gate>,
    exempt: Vec<IpAddr>,
    penalties: Mutex<Penalties>,
    log: Mutex<Log>,
    unauthenticated: Gauge,
    offences: Family<[(&'static str, &'static str); 1], Counter>,
    turned_away: Counter,
    remembered: Gauge,
}

impl Door {
    /// A door, with OpenSSH's rules for penalties.
    pub fn new(crowd: &Crowd) -> Self {
        let unauthenticated = Gauge::default();
        let limit = crowd.unauthenticated.min(listen::descriptors() / 4);
        let per_source = crowd.per_source.min(limit / 2);
        Self {
            gate: Gate::new(limit, per_source, unauthenticated.clone()),
            exempt: crowd.exempt.clone(),
            penalties: Mutex::new(Penalties::new(Rules::default())),
            log: Mutex::default(),
            unauthenticated,
            offences: Family::default(),
            turned_away: Counter::default(),
            remembered: Gauge::default(),
        }
    }

    /// The next connection of `listener` that may come in, and its stay among those who have not shown who
    /// they are. Of penalised sources it closes them at once. Never fails: see [`listen::accept`]. Cancel safe.
    pub async fn accept(&self, listener: &TcpListener) -> (TcpStream, SocketAddr, Visit) {
        loop {
            let (stream, from) = listen::accept(listener).await;
            let from = SocketAddr::new(from.ip().to_canonical(), from.port());
            if let Some(visit) = self.enter(from.ip()) {
                return (stream, from, visit);
            }
            // A reset leaves nothing behind here: no half-closed connection, no port in TIME-WAIT.
            let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
        }
    }

    fn enter(&self, from: IpAddr) -> Option<Visit> {
        let capped = !self.exempt.contains(&from);
        if capped && !self.with_penalties(|penalties| penalties.admits(from, Instant::now())) {
            self.turned_away.inc();
            return None;
        }
        Some(self.gate.enter(network(from), capped))
    }

    /// A connection of `from` did this. Never call it for a device that showed what is valid.
    pub fn offended(&self, from: IpAddr, offence: Offence) {
        self.offences.get_or_create(&[("kind", label(offence))]).inc();
        let now = Instant::now();
        let begins = !self.exempt.contains(&from)
            && self.with_penalties(|penalties| penalties.add(from, offence, now));
        if let Some(refusal) = Refusal::of(offence) {
            self.say(from, refusal, now);
        }
        if begins {
            self.say(from, Refusal::Penalised, now);
        }
        tracing::debug!(%from, kind = label(offence), "offence");
    }

    /// Shows this door's numbers in `registry`.
    pub fn register(&self, registry: &mut Registry) {
        let r = registry;
        r.register(
            "unauthenticated",
            "Connections that have not shown who they are",
            self.unauthenticated.clone(),
        );
        r.register("offences", "What penalties were given for", self.offences.clone());
        r.register(
            "turned_away",
            "Connections closed at once, of penalised sources",
            self.turned_away.clone(),
        );
        r.register("penalties", "Sources that owe a penalty, small ones too", self.remembered.clone());
    }

    /// Connections inside that have not shown who they are.
    pub fn unauthenticated(&self) -> u64 {
        u64::try_from(self.unauthenticated.get()).unwrap_or(0)
    }

    /// Connections of penalised sources that were closed at once, since the start.
    pub fn turned_away(&self) -> u64 {
        self.turned_away.get()
    }

    /// Sources that owe a penalty.
    pub fn penalties(&self) -> usize {
        self.with_penalties(|penalties| penalties.len())
    }

    /// Offences of this kind since the start.
    pub fn offences(&self, offence: Offence) -> u64 {
        self.offences.get_or_create(&[("kind", label(offence))]).get()
    }

    fn with_penalties<T>(&self, change: impl FnOnce(&mut Penalties) -> T) -> T {
        let mut penalties = self.penalties.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = change(&mut penalties);
        self.remembered.set(penalties.len() as i64);
        outcome
    }

    /// The line that fail2ban reads (`deploy/fail2ban`): the one place where a stranger's address is logged
    /// above DEBUG. Its form is relied on.
    fn say(&self, from: IpAddr, refusal: Refusal, now: Instant) {
        let due = self.log.lock().unwrap_or_else(PoisonError::into_inner).due(refusal, now);
        match due {
            Some(0) => tracing::warn!("refused from {from}: {}", refusal.text()),
            Some(left_out) => tracing::warn!(left_out, "refused from {from}: {}", refusal.text()),
            None => {}
        }
    }
}

/// What the log says. Silence, junk and scans get no line of their own, only the penalty that they end in.
#[derive(Debug, Clone, Copy)]
enum Refusal {
    WrongToken,
    BadCertificate,
    BadTicket,
    Penalised,
}

impl Refusal {
    fn of(offence: Offence) -> Option<Self> {
        match offence {
            Offence::WrongToken => Some(Self::WrongToken),
            Offence::BadCertificate => Some(Self::BadCertificate),
            Offence::BadTicket => Some(Self::BadTicket),
            Offence::Garbage | Offence::Silent | Offence::Left => None,
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::WrongToken => "wrong token",
            Self::BadCertificate => "bad certificate",
            Self::BadTicket => "bad ticket",
            Self::Penalised => "too many offences",
        }
    }
}

/// When each kind of line was last written, and how many were left out since.
#[derive(Debug, Default)]
struct Log([(Option<Instant>, u64); 4]);

impl Log {
    /// Whether the line is written; then with the number of those left out before it.
    fn due(&mut self, refusal: Refusal, now: Instant) -> Option<u64> {
        let (last, left_out) = self.0.get_mut(refusal as usize)?;
        if last.is_some_and(|last| now.saturating_duration_since(last) < LINE_EVERY) {
            *left_out += 1;
            return None;
        }
        *last = Some(now);
        Some(std::mem::take(left_out))
    }
}

fn label(offence: Offence) -> &'static str {
    match offence {
        Offence::WrongToken => "wrong_token",
        Offence::BadCertificate => "bad_certificate",
        Offence::BadTicket => "bad_ticket",
        Offence::Garbage => "garbage",
        Offence::Silent => "silent",
        Offence::Left => "left",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_a_second_for_each_kind_with_the_number_left_out() {
        let (mut log, start) = (Log::default(), Instant::now());
        assert_eq!(log.due(Refusal::WrongToken, start), Some(0));
        assert_eq!(log.due(Refusal::BadTicket, start), Some(0));
        for _ in 0..1000 {
            assert_eq!(log.due(Refusal::WrongToken, start + LINE_EVERY / 2), None);
        }
        assert_eq!(log.due(Refusal::WrongToken, start + LINE_EVERY), Some(1000));
        assert_eq!(log.due(Refusal::WrongToken, start + 2 * LINE_EVERY), Some(0));
    }

    #[test]
    fn the_exempt_are_never_turned_away() {
        let proxy = IpAddr::from([192, 0, 2, 1]);
        let door = Door::new(&Crowd { exempt: vec![proxy], ..Crowd::default() });
        for source in [proxy, IpAddr::from([192, 0, 2, 2])] {
            (0..10).for_each(|_| door.offended(source, Offence::WrongToken));
            assert_eq!(door.enter(source).is_some(), source == proxy);
        }
        assert_eq!((door.penalties(), door.turned_away()), (1, 1));
        assert_eq!(door.offences(Offence::WrongToken), 20);
    }
}
