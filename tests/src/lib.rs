//! What adit's end-to-end tests stand on.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`harness`] | what runs the tests: each runs in a process of its own, inside a user namespace |
//! | [`lab`] | two sites behind NATs and a public server network, out of network namespaces; events on their routers |
//! | [`process`] | real programs inside a namespace: output, exit codes, `kill -9`, "a test that logs an ERROR fails" |
//! | [`world`] | a lab with the real binaries in it: server, relays, an enrolled agent and technician |
//! | [`traffic`] | what runs through a tunnel while something happens to it: transfers, ticks, a small HTTP server |
//! | [`proxy`] | real HTTP proxies: squid and tinyproxy |
//! | [`machine`] | a machine with a systemd of its own, for services and packages |
//! | [`matrix`] | every kind of network against every other |
//! | [`internet`] | connects machines: public addresses, names, customers' networks behind NAT |
//! | [`browser`] | Chromium, driven as a person would |
//! | [`desktop`] | a screen with a marker drawn for this run, and how to find it in a picture |
//!
//! By hand: `cargo run -p adit-tests --bin lab -- up --agent cone --technician symmetric`.

pub mod browser;
pub mod desktop;
pub mod harness;
pub mod internet;
pub mod lab;
pub mod machine;
pub mod matrix;
pub mod process;
pub mod proxy;
pub mod traffic;
pub mod world;

use std::future::Future;
use std::time::Duration;

/// By how much a figure of speed may miss its mark. Twice in an ordinary run, which is on whatever machine there is,
/// beside others: that notices what has become much slower. Not at all with `ADIT_TEST_LONG=1`.
pub fn slack() -> f64 {
    if std::env::var_os("ADIT_TEST_LONG").is_some() { 1.0 } else { 2.0 }
}

/// Runs `future`, or fails after `deadline` naming what was waited for.
pub async fn within<T>(
    deadline: Duration,
    what: &str,
    future: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    match tokio::time::timeout(deadline, future).await {
        Ok(result) => result,
        Err(_) => anyhow::bail!("waited {deadline:?} for: {what}"),
    }
}

/// Asks `question` every 20 ms until it answers, or fails after `deadline` naming what was waited for.
/// For states that nobody announces; where there is an event, wait for the event.
pub async fn poll<T, F: Future<Output = Option<T>>>(
    deadline: Duration,
    what: &str,
    mut question: impl FnMut() -> F,
) -> anyhow::Result<T> {
    within(deadline, what, async {
        let mut pace = tokio::time::interval(Duration::from_millis(20));
        loop {
            pace.tick().await;
            if let Some(answer) = question().await {
                return Ok(answer);
            }
        }
    })
    .await
}
