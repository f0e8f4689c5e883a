//! No pipes to be had: the relay copies, and splices again when there are some.
//!
//! Quota and descriptors belong to the process and its user, so the work is done in a process of its
//! own: this test starts itself again, as an ordinary user where it can.

use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use crate::common::{Server, noise, receive, send_blocks, within};
use rustix::io::dup;
use rustix::pipe::{fcntl_getpipe_size, fcntl_setpipe_size, pipe};
use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};

const CHILD: &str = "ADIT_TEST_IN_CHILD";

/// Starts the test `name` of this program in a child, as the user `uid`.
fn in_child(name: &str, uid: Option<u32>) {
    // A child that is started while another test copies has the copy open for writing until it is started
    // itself; and what is open for writing cannot be started (ETXTBSY).
    static STARTING: Mutex<()> = Mutex::new(());
    let starting = STARTING.lock().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("test");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = Command::new(program);
    command.args([&format!("quota::{name}"), "--exact", "--nocapture"]).env(CHILD, "1").current_dir("/");
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(starting);
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// 4 MB through a new pair; returns the bytes that were spliced.
async fn transfer(server: &Server, serial: u64) -> u64 {
    let before = server.relay.metrics().spliced_bytes();
    let (mut technician, mut agent) = server.pair(serial).await;
    let sent = tokio::spawn(async move { send_blocks(&mut agent, noise(serial, 100_000), 40).await });
    let (length, hash) = within(receive(&mut technician)).await;
    assert_eq!((length, hash), (4_000_000, sent.await.unwrap()));
    server.relay.metrics().spliced_bytes() - before
}

/// Without pipes everything is copied; with pipes again everything is spliced, after the pool's pause.
///
/// The pipes go before there is a relay: `accept` takes a descriptor even to find that nobody has come, and
/// what counts free descriptors meanwhile counts one too few.
async fn fall_back_and_recover(take_pipes_away: impl FnOnce() -> Vec<OwnedFd>) {
    let hogs = take_pipes_away();
    let server = Server::start().await;
    assert_eq!(transfer(&server, 1).await, 0);
    assert_eq!(server.relay.metrics().pipes_lent() + server.relay.metrics().pipes_idle(), 0);
    drop(hogs);
    let recovered = async {
        let mut serial = 2;
        while transfer(&server, serial).await < 4_000_000 {
            serial += 1;
        }
    };
    within(recovered).await;
}

#[test]
fn an_exhausted_pipe_quota_means_copying() {
    if !is_child() {
        // Root has no quota. An ordinary user's is shared with the tests beside this one.
        if geteuid().is_root() {
            in_child("an_exhausted_pipe_quota_means_copying", Some(40_000 + std::process::id() % 20_000));
        }
        return;
    }
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(
        async {
            fall_back_and_recover(|| {
                let mut hogs = Vec::new();
                loop {
                    let hog = pipe().unwrap();
                    let _ = fcntl_setpipe_size(&hog.0, 1024 * 1024);
                    if fcntl_getpipe_size(&hog.0).unwrap() < 64 * 1024 {
                        return hogs;
                    }
                    hogs.extend([hog.0, hog.1]);
                }
            })
            .await;
        },
    );
}

#[test]
fn no_descriptors_for_pipes_means_copying() {
    if !is_child() {
        in_child("no_descriptors_for_pipes_means_copying", None);
        return;
    }
    let old = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(64), ..old }).unwrap();
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(
        async {
            fall_back_and_recover(|| {
                let (one, other) = pipe().unwrap();
                let mut hogs = vec![other];
                while let Ok(hog) = dup(&one) {
                    hogs.push(hog);
                }
                hogs.push(one);
                // The listener and the four sockets of the pair are needed all the same.
                setrlimit(Resource::Nofile, Rlimit { current: Some(64 + 1 + 4), ..old }).unwrap();
                hogs
            })
            .await;
        },
    );
}
