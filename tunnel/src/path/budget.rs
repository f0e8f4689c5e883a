//! How many requests one agent may send: candidates come from the peer, and a hostile one must not be
//! able to aim us at others (RFC 8445 section 19.5.1).

use std::time::{Duration, Instant};

/// Requests that may be sent in one go: those of the first two tries of a session, each an ordinary round and a careful one, with
/// predicted ports in all of them (some 160 a try, the most that an honest peer needs).
const BURST: u32 = 400;
/// After that, one in this time: what such tries take that are 9 s apart. In a careful round nothing may be late: an opener that
/// waits lets the peer's check come too early.
const INTERVAL: Duration = Duration::from_millis(50);

/// A token bucket, kept as the time at which it would be full again.
pub(super) struct Budget {
    created: Instant,
    full_at: Instant,
}

impl Budget {
    pub(super) fn new(now: Instant) -> Self {
        Self { created: now, full_at: now }
    }

    /// The earliest time at which one more request may be sent.
    pub(super) fn ready_at(&self) -> Instant {
        self.full_at.checked_sub(INTERVAL * (BURST - 1)).map_or(self.created, |at| at.max(self.created))
    }

    /// Takes one request out, or nothing when there is none to take.
    pub(super) fn spend(&mut self, now: Instant) -> bool {
        let ready = self.ready_at() <= now;
        if ready {
            self.full_at = self.full_at.max(now) + INTERVAL;
        }
        ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_and_then_the_rate() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        assert_eq!((0..1000).filter(|_| budget.spend(start)).count(), 400);
        let mut now = start;
        for _ in 0..20 {
            now = budget.ready_at();
            assert!(budget.spend(now) && !budget.spend(now));
        }
        assert_eq!(now - start, Duration::from_secs(1));
    }
}
