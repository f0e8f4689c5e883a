//! Ctrl-C and its relatives: the first one asks, the second one ends at once.

use std::time::{Duration, Instant};

use crate::exit::Exit;

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

#[cfg(unix)]
struct Signals(Vec<tokio::signal::unix::Signal>);

#[cfg(unix)]
impl Signals {
    fn new() -> Self {
        use tokio::signal::unix::{SignalKind, signal};
        // SIGHUP is what ssh ends its ProxyCommand with.
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        Self(kinds.into_iter().filter_map(|kind| signal(kind).ok()).collect())
    }

    async fn next(&mut self) {
        std::future::poll_fn(|cx| {
            let any = self.0.iter_mut().any(|signal| signal.poll_recv(cx).is_ready());
            if any { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> Self {
        Self
    }

    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
