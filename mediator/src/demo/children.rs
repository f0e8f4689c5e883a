//! The processes of the demo: this very program, started with other arguments.

use std::path::Path;
use std::process::Stdio;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{ChildStdout, Command};

use super::Anything;

/// A process that ends with its handle.
pub(super) struct Child {
    name: String,
    process: tokio::process::Child,
    lines: Lines<BufReader<ChildStdout>>,
}

/// Starts this program with `before`, the directory, and `after` as arguments.
pub(super) fn spawn<const N: usize>(
    before: [&str; N],
    dir: &Path,
    after: &[&str],
) -> Result<Child, Anything> {
    let name = before.iter().filter(|word| !word.starts_with('-')).copied().collect::<Vec<_>>().join(" ");
    let mut process = Command::new(std::env::current_exe()?)
        .args(before)
        .arg(dir)
        .args(after)
        .env("ADIT_LOG", std::env::var("ADIT_LOG").unwrap_or_else(|_| "error".to_owned()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let stdout = process.stdout.take().ok_or_else(|| Anything::from("no standard output".to_owned()))?;
    Ok(Child { name, process, lines: BufReader::new(stdout).lines() })
}

impl Child {
    /// Waits for an event of this name.
    pub(super) async fn event(&mut self, name: &str) -> Result<Value, Anything> {
        while let Some(line) = self.lines.next_line().await? {
            if let Ok(event) = serde_json::from_str::<Value>(&line)
                && event.get("event").and_then(Value::as_str) == Some(name)
            {
                return Ok(event);
            }
        }
        let status = self.process.wait().await?;
        Err(Anything::from(format!("\"{}\" ended with {status}", self.name)))
    }

    /// Writes to its standard input and closes it.
    pub(super) async fn feed(&mut self, text: &str) -> Result<(), Anything> {
        if let Some(mut stdin) = self.process.stdin.take() {
            stdin.write_all(text.as_bytes()).await?;
        }
        Ok(())
    }

    /// Waits for its end.
    pub(super) async fn wait(&mut self) -> Result<Result<(), String>, Anything> {
        let status = self.process.wait().await?;
        Ok(if status.success() { Ok(()) } else { Err(status.to_string()) })
    }

    /// Whether it still runs.
    pub(super) fn check(&mut self) -> Result<(), Anything> {
        match self.process.try_wait()? {
            Some(status) => Err(Anything::from(format!("\"{}\" ended with {status}", self.name))),
            None => Ok(()),
        }
    }
}
