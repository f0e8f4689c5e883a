//! Running programs: what they say, what they cost, and that they end.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How long a program may take to say what is waited for.
const PATIENCE: Duration = Duration::from_secs(20);
/// Units of the CPU times in `/proc/PID/stat`: USER_HZ, 100 on every Linux (proc(5)).
const TICKS_A_SECOND: f64 = 100.0;

/// A running program; dropping it kills it.
pub(crate) struct Program {
    name: String,
    child: Child,
    lines: Receiver<String>,
    log: PathBuf,
}

impl Program {
    /// Starts `program` with `arguments`. Its standard error goes to a file in `dir`.
    pub(crate) fn start(dir: &Path, program: &Path, arguments: &[&str]) -> Result<Self> {
        let name =
            format!("{} {}", program.file_name().unwrap_or_default().to_string_lossy(), arguments.join(" "));
        let log =
            dir.join(format!("{}.log", name.replace(['/', ' '], "_").chars().take(60).collect::<String>()));
        let mut child = command(program)
            .args(arguments)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let (sender, lines) = channel();
        if let Some(stdout) = child.stdout.take() {
            thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    // Read on when nobody listens any more: a full pipe would stop the program.
                    let _ = sender.send(line);
                }
            });
        }
        Ok(Self { name, child, lines, log })
    }

    /// Waits for a line of the standard output that `wanted` makes something of.
    pub(crate) fn says<T>(&self, what: &str, mut wanted: impl FnMut(&str) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    if let Some(found) = wanted(&line) {
                        return Ok(found);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("waited {PATIENCE:?} for {what}\n{}", self.complaint())
                }
                Err(RecvTimeoutError::Disconnected) => bail!("ended without {what}\n{}", self.complaint()),
            }
        }
    }

    /// CPU time so far, user and system. Seconds.
    pub(crate) fn cpu(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // Behind the name, which may have spaces: the state is the third field, utime the fourteenth.
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        let times = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
        let ticks = times.sum::<Result<u64, _>>().context("not a line of /proc/PID/stat")?;
        ensure!(!fields.trim_start().starts_with('Z'), "ended\n{}", self.complaint());
        Ok(ticks as f64 / TICKS_A_SECOND)
    }

    /// The end of its log.
    pub(crate) fn complaint(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        format!("{}:\n{}", self.name, lines[lines.len().saturating_sub(20)..].join("\n"))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Both fail only when it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `program` to its successful end; its standard output.
pub(crate) fn run(program: &Path, arguments: &[&str]) -> Result<String> {
    let output = command(program).args(arguments).stdin(Stdio::null()).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{} {}: {error}", program.display(), arguments.join(" "));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// The caller's own settings of adit must not leak in.
fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("ADIT_")) {
        command.env_remove(name);
    }
    command
}
