//! Real programs in the lab: their output, their end, and `kill -9`.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use crate::within;

/// A running program. Dropping it kills it.
pub struct Process {
    /// Host and program, for messages.
    pub name: String,
    child: Child,
    /// Its standard input, if it was not taken.
    pub stdin: Option<tokio::process::ChildStdin>,
    stdout: Arc<Output>,
    stderr: Arc<Output>,
}

/// How a program ended and what it printed.
#[derive(Debug)]
pub struct Finished {
    /// Its exit code; -1 if a signal ended it.
    pub code: i32,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
}

impl Finished {
    /// The standard output of a program that succeeded.
    pub fn ok(self) -> anyhow::Result<String> {
        match self.code {
            0 => Ok(self.stdout),
            code => bail!("exit code {code}: {}{}", self.stdout, self.stderr.trim()),
        }
    }
}

impl Process {
    /// Starts a program on this very machine, in no lab. To be called within a tokio runtime.
    pub fn here(command: std::process::Command) -> anyhow::Result<Self> {
        Self::spawn("here", command, |mut command| Ok(command.spawn()?))
    }

    pub(crate) fn spawn(
        host: &str,
        command: std::process::Command,
        start: impl FnOnce(Command) -> anyhow::Result<Child>,
    ) -> anyhow::Result<Self> {
        let program =
            command.get_program().to_string_lossy().rsplit('/').next().unwrap_or_default().to_owned();
        let first =
            command.get_args().next().map(|arg| arg.to_string_lossy().into_owned()).unwrap_or_default();
        let name = format!("{host}: {program} {first}");
        // Some programs run another, which is among their arguments.
        let ours = std::iter::once(command.get_program())
            .chain(command.get_args())
            .filter_map(|word| Path::new(word).file_stem()?.to_str())
            .any(|name| ["adit", "adit-mediator", "adit-relay"].contains(&name));
        let mut command = Command::from(command);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = start(command).with_context(|| format!("cannot start {name}"))?;
        let stdout = Output::collect(format!("{name}, stdout"), child.stdout.take(), false);
        let stderr = Output::collect(format!("{name}, stderr"), child.stderr.take(), ours);
        Ok(Self { name, stdin: child.stdin.take(), child, stdout, stderr })
    }

    /// Waits until `wanted` makes something of the lines of the standard output so far. Fails at the
    /// deadline or when the program ends first.
    pub async fn output<T>(
        &self,
        deadline: Duration,
        what: &str,
        wanted: impl FnMut(&[String]) -> Option<T>,
    ) -> anyhow::Result<T> {
        within(deadline, &format!("{what} ({})", self.name), self.stdout.wait(what, wanted)).await
    }

    /// As [`Process::output`], of the standard error.
    pub async fn error_output<T>(
        &self,
        deadline: Duration,
        what: &str,
        wanted: impl FnMut(&[String]) -> Option<T>,
    ) -> anyhow::Result<T> {
        within(deadline, &format!("{what} ({})", self.name), self.stderr.wait(what, wanted)).await
    }

    /// Waits until `wanted` makes something of a JSON event with the name `event`, of those that came
    /// after the first `skip`.
    pub async fn event<T>(
        &self,
        deadline: Duration,
        event: &str,
        skip: usize,
        mut wanted: impl FnMut(&Value) -> Option<T>,
    ) -> anyhow::Result<T> {
        self.output(deadline, &format!("an event {event:?}"), |lines| {
            named(lines, event).skip(skip).find_map(|value| wanted(&value))
        })
        .await
    }

    /// All events so far with the name `event`, oldest first.
    pub fn events(&self, event: &str) -> Vec<Value> {
        named(&self.stdout.lines().text, event).collect()
    }

    /// All lines of the standard error so far.
    pub fn error_lines(&self) -> Vec<String> {
        self.stderr.lines().text.clone()
    }

    /// Writes `bytes` to the standard input and closes it.
    pub async fn feed(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let mut stdin = self.stdin.take().context("the standard input is closed")?;
        stdin.write_all(bytes).await?;
        Ok(stdin.shutdown().await?)
    }

    /// The process id, while it runs.
    pub fn id(&self) -> anyhow::Result<u32> {
        self.child.id().with_context(|| format!("{} has ended", self.name))
    }

    /// Sends SIGKILL and waits until the program is gone.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().await.with_context(|| format!("cannot kill {}", self.name))
    }

    /// Sends SIGINT, as Ctrl-C does.
    pub fn interrupt(&self) -> anyhow::Result<()> {
        self.signal(rustix::process::Signal::INT)
    }

    /// Stops it, as a lid that is closed does.
    pub fn pause(&self) -> anyhow::Result<()> {
        self.signal(rustix::process::Signal::STOP)
    }

    /// Ends [`Process::pause`].
    pub fn go_on(&self) -> anyhow::Result<()> {
        self.signal(rustix::process::Signal::CONT)
    }

    fn signal(&self, signal: rustix::process::Signal) -> anyhow::Result<()> {
        let id = rustix::process::Pid::from_raw(self.id()?.try_into()?).context("no process id")?;
        Ok(rustix::process::kill_process(id, signal)?)
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until the program has ended by itself.
    pub async fn finish(mut self, deadline: Duration) -> anyhow::Result<Finished> {
        self.stdin = None;
        let child = &mut self.child;
        let what = format!("the end of {}", self.name);
        let status: ExitStatus = within(deadline, &what, async { Ok(child.wait().await?) }).await?;
        for output in [&self.stdout, &self.stderr] {
            let mut news = output.news.subscribe();
            // A grandchild may hold the pipe: its output is not waited for longer than this.
            let _ = tokio::time::timeout(Duration::from_secs(1), async {
                while !output.lines().ended && news.changed().await.is_ok() {}
            })
            .await;
        }
        let text = |output: &Output| output.lines().text.join("\n");
        Ok(Finished {
            // A signal ends it with minus its number.
            code: status.code().or_else(|| status.signal().map(|signal| -signal)).unwrap_or(i32::MIN),
            stdout: text(&self.stdout),
            stderr: text(&self.stderr),
        })
    }
}

/// The JSON events among `lines` with the name `event`.
pub(crate) fn named<'a>(lines: &'a [String], event: &'a str) -> impl Iterator<Item = Value> + 'a {
    let values = lines.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    values.filter(move |value| value["event"] == event)
}

/// Everything that programs of this test printed, for [`print_outputs`] and [`fail_on_logged_errors`].
static OUTPUTS: Mutex<Vec<Arc<Output>>> = Mutex::new(Vec::new());

/// Prints the end of what each program printed, for the report of a failed test. Of programs that
/// were started again and again, only the last.
pub fn print_outputs() {
    const END: usize = 80;
    let outputs = outputs();
    for (at, output) in outputs.iter().enumerate() {
        let lines = output.lines();
        if lines.text.is_empty() || outputs[at + 1..].iter().any(|later| later.name == output.name) {
            continue;
        }
        eprintln!("--- {} ({} lines)", output.name, lines.text.len());
        for line in lines.text.iter().skip(lines.text.len().saturating_sub(END)) {
            // Pictures have long lines.
            eprintln!("    {}", &line[..line.floor_char_boundary(2000)]);
        }
    }
}

/// What the programs of this test printed so far, one text for each output of each.
pub fn all_outputs() -> Vec<String> {
    outputs().iter().map(|output| output.lines().text.join("\n")).collect()
}

/// Fails if one of adit's programs logged an ERROR.
pub fn fail_on_logged_errors() -> anyhow::Result<()> {
    for output in outputs().iter().filter(|output| output.ours) {
        if let Some(line) = output.lines().text.iter().find(|line| is_error(line)) {
            bail!("{} logged an ERROR: {line}", output.name);
        }
    }
    Ok(())
}

/// Whether a log line, of tracing's text or JSON format, has the level ERROR.
fn is_error(line: &str) -> bool {
    match serde_json::from_str::<Value>(line) {
        Ok(value) => value["level"] == "ERROR",
        // `2026-01-02T03:04:05.678Z ERROR target: message`, with or without the time.
        Err(_) => line.split_whitespace().take(2).any(|word| word == "ERROR"),
    }
}

fn outputs() -> MutexGuard<'static, Vec<Arc<Output>>> {
    OUTPUTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a program prints on one of its two outputs.
struct Output {
    name: String,
    /// Whether it is the log of one of adit's programs.
    ours: bool,
    lines: Mutex<Lines>,
    /// Changes with every line and at the end.
    news: watch::Sender<()>,
}

#[derive(Default)]
struct Lines {
    text: Vec<String>,
    ended: bool,
}

impl Output {
    /// More than any test prints; what comes after is dropped.
    const MOST_LINES: usize = 100_000;

    fn collect(name: String, pipe: Option<impl AsyncRead + Unpin + Send + 'static>, ours: bool) -> Arc<Self> {
        let output = Arc::new(Self { name, ours, lines: Mutex::default(), news: watch::Sender::new(()) });
        outputs().push(output.clone());
        let collecting = output.clone();
        tokio::spawn(async move {
            if let Some(pipe) = pipe {
                let mut lines = BufReader::new(pipe).split(b'\n');
                while let Ok(Some(line)) = lines.next_segment().await {
                    let mut all = collecting.lines();
                    if all.text.len() < Self::MOST_LINES {
                        all.text.push(String::from_utf8_lossy(&line).into_owned());
                    }
                    drop(all);
                    collecting.news.send_replace(());
                }
            }
            collecting.lines().ended = true;
            collecting.news.send_replace(());
        });
        output
    }

    async fn wait<T>(&self, what: &str, mut wanted: impl FnMut(&[String]) -> Option<T>) -> anyhow::Result<T> {
        let mut news = self.news.subscribe();
        loop {
            {
                let lines = self.lines();
                if let Some(found) = wanted(&lines.text) {
                    return Ok(found);
                }
                if lines.ended {
                    bail!("{} ended without: {what}", self.name);
                }
            }
            news.changed().await?;
        }
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::is_error;

    #[test]
    fn errors_are_told_from_words() {
        assert!(is_error("2026-01-02T03:04:05.678901Z ERROR adit: it broke"));
        assert!(is_error(r#"{"timestamp":"…","level":"ERROR","fields":{}}"#));
        assert!(!is_error("2026-01-02T03:04:05.678901Z  INFO adit: no ERROR here"));
        assert!(!is_error(r#"{"level":"INFO","fields":{"message":"ERROR"}}"#));
    }
}
