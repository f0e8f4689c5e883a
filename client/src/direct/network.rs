//! Notices that the network of this machine has changed: interfaces, addresses, the interface of the default route. The crate
//! `netwatch` hears it from the system.

use std::time::{Duration, Instant, SystemTime};

use n0_watcher::Watcher;
use netwatch::netmon::Monitor;
use tokio::sync::watch;
use tokio::time::sleep;

/// What a session opens with comes first: the monitor begins by reading all there is.
const LATER: Duration = Duration::from_secs(1);
/// How often it is seen whether the machine was asleep, and how far the clocks are apart then: one of them stands still meanwhile.
const LOOK: Duration = Duration::from_secs(2);
const ASLEEP: Duration = Duration::from_secs(3);

/// Something changes each time, some 250 ms later. On a thread of its own, which ends when nobody listens any more: on
/// Windows the monitor asks each gateway for its hardware address, and waits for the answer.
///
/// The number counts how often the way to others may have become another one, whatever the addresses are: the default route
/// leads through another interface, or the machine was asleep.
pub(super) fn notice() -> watch::Receiver<u64> {
    let (sender, changes) = watch::channel(0);
    let started = std::thread::Builder::new().name("network".into()).spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        runtime.block_on(async {
            tokio::select! {
                () = async { tokio::join!(tell(&sender), tell_of_sleep(&sender)); } => {}
                () = sender.closed() => {}
            }
        });
    });
    if let Err(error) = started {
        tracing::debug!(%error, "changes of the network are noticed by looking from time to time");
    }
    changes
}

async fn tell(changes: &watch::Sender<u64>) {
    sleep(LATER).await;
    let monitor = match Monitor::new().await {
        Ok(monitor) => monitor,
        Err(error) => {
            tracing::debug!(%error, "changes of the network are noticed by looking from time to time");
            return;
        }
    };
    let mut state = monitor.interface_state();
    let mut route = state.get().default_route_interface;
    while let Ok(state) = state.updated().await {
        let before = std::mem::replace(&mut route, state.default_route_interface);
        tracing::debug!(default_route = ?route, "the network has changed");
        changes.send_modify(|moves| *moves += u64::from(route.is_some() && route != before));
    }
}

/// The machine may have woken up somewhere else.
async fn tell_of_sleep(changes: &watch::Sender<u64>) {
    loop {
        let (awake, clock) = (Instant::now(), SystemTime::now());
        sleep(LOOK).await;
        if was_asleep(awake.elapsed(), clock.elapsed().unwrap_or_default()) {
            tracing::debug!("this machine was asleep");
            changes.send_modify(|moves| *moves += 1);
        }
    }
}

/// Two clocks, of which the first stands still while the machine is asleep, or the process is stopped for longer than it asked for.
fn was_asleep(awake: Duration, clock: Duration) -> bool {
    clock.max(awake) >= LOOK + ASLEEP
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_stood_still_tells_of_sleep() {
        let seconds = Duration::from_secs;
        assert!(!was_asleep(LOOK, LOOK));
        assert!(!was_asleep(LOOK + seconds(1), LOOK + seconds(1)), "a busy machine");
        assert!(!was_asleep(LOOK, Duration::ZERO), "the clock was set back");
        assert!(was_asleep(LOOK, seconds(3600)), "asleep");
        assert!(was_asleep(seconds(600), seconds(600)), "stopped");
    }
}
