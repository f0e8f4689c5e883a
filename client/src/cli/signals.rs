//! Ctrl-C and its relatives: the first one asks, the second one ends at once.

use std::time::{Duration, Instant};

use crate::exit::Exit;
use crate::os::Signals;

/// Within this time, another signal is the same wish: `timeout` and other wrappers pass on what the whole
/// group of processes got anyway.
const ECHO: Duration = Duration::from_millis(300);

/// Completes when the user or the system wants this process to end. From then on, the next such wish
/// ends it at once.
pub(super) async fn stop() {
    let mut signals = Signals::new();
    signals.next().await;
    let first = Instant::now();
    tokio::spawn(async move {
        while first.elapsed() < ECHO {
            signals.next().await;
        }
        std::process::exit(Exit::Failed as i32);
    });
}
