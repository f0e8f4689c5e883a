//! Many-socket probing by turns: one session of this process at a time, and not again and again with the same peer, who could
//! open one session after the other.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use adit_protocol::DeviceId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Between two tries with one peer, of whatever sessions.
const APART: Duration = Duration::from_secs(15);

/// All turns of a process.
pub(super) struct Turns {
    free: Arc<Semaphore>,
    /// When the last try with each peer began, as long as it matters.
    tried: Mutex<HashMap<DeviceId, Instant>>,
}

impl Default for Turns {
    fn default() -> Self {
        Self { free: Arc::new(Semaphore::new(1)), tried: Mutex::default() }
    }
}

impl Turns {
    /// A turn for a session with `peer`, until it is dropped; `None`: not now.
    pub(super) fn take(&self, peer: DeviceId, now: Instant) -> Option<OwnedSemaphorePermit> {
        let mut tried = self.tried.lock().unwrap_or_else(PoisonError::into_inner);
        tried.retain(|_, at| now.saturating_duration_since(*at) < APART);
        if tried.contains_key(&peer) {
            return None;
        }
        let turn = self.free.clone().try_acquire_owned().ok()?;
        tried.insert(peer, now);
        Some(turn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_and_not_the_same_again() {
        let (turns, start) = (Turns::default(), Instant::now());
        let [one, other] = [1, 2].map(|n| DeviceId([n; 16]));
        let turn = turns.take(one, start);
        assert!(turn.is_some() && turns.take(other, start).is_none());
        drop(turn);
        assert!(turns.take(one, start + APART / 2).is_none());
        assert!(turns.take(other, start + APART / 2).is_some());
        assert!(turns.take(one, start + APART).is_some());
    }
}
