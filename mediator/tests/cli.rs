//! The binary: exit codes, what goes to which stream, and a clean end.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use adit_protocol::token::EnrolmentToken;

fn mediator(arguments: &[&str], data: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_adit-mediator"));
    command.args(arguments).arg("--data").arg(data).env_remove("ADIT_DATA").env_remove("ADIT_LOG");
    command
}

fn output(arguments: &[&str], data: &Path) -> (i32, String, String) {
    let Output { status, stdout, stderr } = mediator(arguments, data).output().expect("runs");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (status.code().expect("an exit code"), text(stdout), text(stderr))
}

/// Stops the server when the test ends early.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn init_token_run_and_stop() {
    let parent = tempfile::tempdir().expect("tempdir");
    let data = parent.path().join("d");
    let (code, _, stderr) = output(&["token", "--role", "agent"], &data);
    assert_eq!(code, 2);
    assert!(stderr.contains("adit-mediator init"), "{stderr}");

    assert_eq!(output(&["init", "--host", "127.0.0.1,adit.example.org"], &data).0, 0);
    assert_eq!(output(&["init", "--host", "127.0.0.1"], &data).0, 2);

    let (code, stdout, stderr) = output(&["token", "--role", "technician"], &data);
    let token: EnrolmentToken = stdout.trim_end_matches('\n').parse().expect("the token and nothing else");
    assert_eq!(
        (code, token.servers),
        (0, vec!["127.0.0.1:443".to_owned(), "adit.example.org:443".to_owned()])
    );
    assert!(stderr.contains("reaches no agent"), "{stderr}");
    assert_eq!(output(&["token", "--role", "agent", "--ttl", "soon"], &data).0, 2);
    assert_eq!(output(&["token", "--role", "mediator"], &data).0, 2);

    let taken = TcpListener::bind("127.0.0.1:0").expect("binds");
    let config = |https: &str| {
        let text = format!(
            "hosts = ['127.0.0.1']\n[listen]\nhttps = '{https}'\nudp = '127.0.0.1:0'\n\
             relay = '127.0.0.1:0'\ndiagnostics = '127.0.0.1:0'\n"
        );
        std::fs::write(data.join("config.toml"), text).expect("writes");
    };
    config(&taken.local_addr().expect("bound").to_string());
    let (code, _, stderr) = output(&["run"], &data);
    assert_eq!(code, 2);
    assert!(stderr.contains("[listen] https in ") && stderr.contains("config.toml"), "{stderr}");
    // 443 is 443: no other port, and who has it is named.
    #[cfg(target_os = "linux")]
    assert!(stderr.contains(&format!("process {} of user", std::process::id())), "{stderr}");

    config("127.0.0.1:0");
    let child = mediator(&["run", "--relay", "off"], &data).stderr(Stdio::piped()).spawn().expect("starts");
    let mut running = Running(child);
    let mut log = BufReader::new(running.0.stderr.take().expect("piped")).lines();
    assert!(log.any(|line| line.expect("text").contains("ready")), "it ended before it was ready");
    assert_eq!(output(&["token", "--role", "agent"], &data).0, 0);
    let pid = rustix::process::Pid::from_child(&running.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it runs");
    assert_eq!(running.0.wait().expect("ends").code(), Some(0));
}

#[test]
fn a_damaged_directory_names_the_file() {
    let data = tempfile::tempdir().expect("tempdir");
    assert_eq!(output(&["init", "--host", "127.0.0.1"], data.path()).0, 0);
    for file in ["config.toml", "server.pem", "server-key.pem", "ticket-key.pem", "relay-id"] {
        let whole = std::fs::read(data.path().join(file)).expect("reads");
        std::fs::write(data.path().join(file), "nonsense").expect("writes");
        let (code, _, stderr) = output(&["run"], data.path());
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.contains(file), "{stderr}");
        std::fs::write(data.path().join(file), whole).expect("writes");
    }
}
