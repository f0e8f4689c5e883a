//! A full disk: what runs goes on, nothing new is granted without its record, and room is enough to recover.
//!
//! The test runs once more inside a mount namespace of its own, where the temporary directory is a small disk.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::{Server, dial, open, recv};
use adit_protocol::Role;
use adit_protocol::control::{Candidates, Down, Open, RefusedCode, Renew, Up};

/// Tells the test that it is on its small disk, and where that is.
const DISK: &str = "ADIT_TEST_DISK";

/// Fault row "disk full".
#[test]
fn fault_disk_full() {
    if let Some(disk) = std::env::var_os(DISK) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        return runtime.expect("a runtime").block_on(on_a_small_disk(disk.into()));
    }
    let disk = tempfile::tempdir().expect("tempdir");
    let mount =
        "mount -t tmpfs -o size=16m tmpfs \"$1\" && exec \"$0\" --exact disk::fault_disk_full --nocapture";
    let me = std::env::current_exe().expect("a path");
    let run = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", mount])
        .arg(me)
        .arg(disk.path())
        .env(DISK, disk.path())
        .env("TMPDIR", disk.path())
        .output()
        .expect("unshare (Debian: util-linux) starts");
    let said = [run.stdout, run.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    println!("{said}");
    assert!(run.status.success() && said.contains("1 passed"), "on the small disk: {}", run.status);
}

async fn on_a_small_disk(disk: PathBuf) {
    let server = Server::start().await;
    assert!(server.dir.path().starts_with(&disk));
    let agent = server.device(Role::Agent, "desk", &["site=a"]).await;
    let technician = server.device(Role::Technician, "laptop", &["site=a"]).await;
    let (mut anna, mut desk) = (dial(&technician).await, dial(&agent).await);
    let (running, _) = open(&mut anna, &mut desk, "desk").await;
    let grants = || server.audit().iter().filter(|line| line["event"] == "grant").count();
    assert_eq!(grants(), 1);

    let filler = disk.join("filler");
    assert!(std::fs::write(&filler, vec![0; 64 << 20]).is_err(), "the disk is larger than it should be");
    let request = || Up::Open(Open { request: 3, agent: "desk".into(), ..Open::default() });
    // What is left of the log's last block takes a few records more: each is granted with its own.
    let mut granted = 1;
    let (refused, took) = loop {
        let start = Instant::now();
        anna.send(request()).await.expect("sends");
        match recv(&mut anna).await {
            Down::Granted(_) => granted += 1,
            Down::Refused(refused) => break (refused, start.elapsed()),
            other => panic!("{other:?}"),
        }
        assert!(granted < 100, "the disk does not get full");
    };
    assert_eq!(refused.code(), RefusedCode::Unavailable);
    assert!(refused.message.contains("audit record"), "{}", refused.message);
    assert!(took < Duration::from_secs(2), "refused only after {took:?}");
    assert_eq!(grants(), granted, "one record for each grant, and every line is whole");

    // The running session goes on: candidates are passed on, tickets are renewed.
    let candidates =
        Candidates { session: running.session.clone(), candidates: vec![1], seen: String::new() };
    anna.send(Up::Candidates(candidates)).await.expect("sends");
    while !matches!(recv(&mut desk).await, Down::Candidates(_)) {}
    anna.send(Up::Renew(Renew { session: running.session })).await.expect("sends");
    for channel in [&mut anna, &mut desk] {
        assert!(matches!(recv(channel).await, Down::Tickets(_)));
    }

    std::fs::remove_file(&filler).expect("makes room");
    let start = Instant::now();
    anna.send(request()).await.expect("sends");
    assert!(matches!(recv(&mut anna).await, Down::Granted(_)), "not granted although there is room");
    assert_eq!(grants(), granted + 1);
    println!("refused after {took:?}; granted again {:?} after there was room", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(5));
}
