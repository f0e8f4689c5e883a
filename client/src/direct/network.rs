//! Notices that the network of this machine has changed: interfaces, addresses, the interface of the default route. The crate
//! `netwatch` hears it from the system.

use std::time::Duration;

use n0_watcher::Watcher;
use netwatch::netmon::Monitor;
use tokio::sync::watch;
use tokio::time::sleep;

/// What a session opens with comes first: the monitor begins by reading all there is.
const LATER: Duration = Duration::from_secs(1);

/// Something changes each time, some 250 ms later. On a thread of its own, which ends when nobody listens any more: on
/// Windows the monitor asks each gateway for its hardware address, and waits for the answer.
pub(super) fn notice() -> watch::Receiver<()> {
    let (sender, changes) = watch::channel(());
    let started = std::thread::Builder::new().name("network".into()).spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        runtime.block_on(async {
            tokio::select! {
                () = tell(&sender) => {}
                () = sender.closed() => {}
            }
        });
    });
    if let Err(error) = started {
        tracing::debug!(%error, "changes of the network are noticed by looking from time to time");
    }
    changes
}

async fn tell(changes: &watch::Sender<()>) {
    sleep(LATER).await;
    let monitor = match Monitor::new().await {
        Ok(monitor) => monitor,
        Err(error) => {
            tracing::debug!(%error, "changes of the network are noticed by looking from time to time");
            return;
        }
    };
    let mut state = monitor.interface_state();
    while state.updated().await.is_ok() {
        tracing::debug!("the network has changed");
        changes.send_replace(());
    }
}
