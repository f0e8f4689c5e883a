//! A machine with systemd as its process 1, for tests of services and packages: see `machine.sh`.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use tempfile::TempDir;

use crate::process::Finished;

/// From the start of systemd until the system is up.
const BOOT: Duration = Duration::from_secs(30);
/// How long a command may take; seconds, for timeout(1).
const COMMAND: &str = "90";

/// A machine that runs. It ends when dropped, and nothing of it stays.
pub struct Machine {
    outside: Child,
    /// Its systemd, as this system numbers it.
    init: String,
    _dir: TempDir,
}

impl Machine {
    /// Boots one. Needs root and a Debian with systemd.
    pub fn boot() -> anyhow::Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "a machine with a systemd of its own needs root: run this test with sudo"
        );
        let dir = tempfile::Builder::new().prefix("adit-machine-").tempdir()?;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/machine.sh");
        let mut outside = Command::new("unshare")
            .args(["--mount", "--uts", "--ipc", "--net", "bash"])
            .arg(script)
            .arg(dir.path())
            // Held as long as the machine is wanted.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut init = String::new();
        BufReader::new(outside.stdout.take().context("piped")?).read_line(&mut init)?;
        let machine = Self { outside, init: init.trim().to_owned(), _dir: dir };
        ensure!(!machine.init.is_empty(), "no machine: its script said why");
        let start = Instant::now();
        // `running`, or `degraded` when some unit of the system below does not like it here.
        while !["running", "degraded"].contains(&machine.state().as_str()) {
            ensure!(start.elapsed() < BOOT, "systemd is not up after {BOOT:?}: {}", machine.state());
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(machine)
    }

    /// Process id of its systemd, as this system numbers it.
    pub fn init(&self) -> &str {
        &self.init
    }

    /// A command to run in the machine, as its root.
    pub fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=1", COMMAND, "nsenter", "--target", &self.init]);
        command.args(["--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup", "--root", "--"]);
        command.args(["env", "--chdir=/", program]).args(arguments).env_clear();
        command.env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", "/root");
        command.env("LC_ALL", "C.UTF-8").env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
        command
    }

    /// Runs a line of shell to its end.
    pub fn sh(&self, line: &str) -> anyhow::Result<Finished> {
        let Output { status, stdout, stderr } = self.command("sh", &["-c", line]).output()?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(Finished { code: status.code().unwrap_or(-1), stdout: text(stdout), stderr: text(stderr) })
    }

    /// Runs a line of shell that must succeed; its standard output.
    pub fn ok(&self, line: &str) -> anyhow::Result<String> {
        self.sh(line)?.ok().with_context(|| line.to_owned())
    }

    /// Waits until a line of shell succeeds.
    pub fn wait(&self, line: &str, deadline: Duration) -> anyhow::Result<String> {
        let start = Instant::now();
        loop {
            let said = self.sh(line)?;
            if said.code == 0 {
                return Ok(said.stdout);
            }
            if start.elapsed() > deadline {
                bail!("not within {deadline:?}: {line}: {said:?}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Where a path of the machine is for this system.
    pub fn path(&self, inside: &str) -> PathBuf {
        Path::new("/proc").join(&self.init).join("root").join(inside.trim_start_matches('/'))
    }

    fn state(&self) -> String {
        self.sh("systemctl is-system-running").map(|said| said.stdout.trim().to_owned()).unwrap_or_default()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Ok(pid) = self.init.parse()
            && let Some(pid) = rustix::process::Pid::from_raw(pid)
        {
            // Everything in the machine goes with its process 1; then the script puts away the control group.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        let _ = self.outside.wait();
    }
}

/// A program in the machine that is talked to by lines.
pub struct Talk {
    child: Child,
    stdin: std::process::ChildStdin,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Talk {
    /// Starts it.
    pub fn start(mut command: Command) -> anyhow::Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("piped")?;
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout.take(1 << 20)).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { stdin: child.stdin.take().context("piped")?, child, lines })
    }

    /// Says a line.
    pub fn say(&mut self, line: &str) -> anyhow::Result<()> {
        use std::io::Write;
        Ok(writeln!(self.stdin, "{line}")?)
    }

    /// The next line that it says.
    pub fn hear(&self, deadline: Duration) -> anyhow::Result<String> {
        self.lines.recv_timeout(deadline).with_context(|| format!("no line within {deadline:?}"))
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
