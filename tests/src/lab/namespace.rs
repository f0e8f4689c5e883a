//! Running small commands inside a namespace.

use std::io::Write;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail};

/// Anything of patchbay that commands can be run in.
pub(super) trait Namespace {
    fn start(&self, command: Command) -> anyhow::Result<Child>;

    /// Runs `line` (words, no quoting), for commands that take some milliseconds; its output.
    fn command(&self, line: &str) -> anyhow::Result<String> {
        self.feed(line, "")
    }

    /// Applies an nftables script, as one transaction.
    fn nft(&self, script: &str) -> anyhow::Result<()> {
        self.feed("nft -f -", script).map(|_| ())
    }

    /// As [`Namespace::command`], with `input` on its standard input.
    fn feed(&self, line: &str, input: &str) -> anyhow::Result<String> {
        let mut words = line.split_whitespace();
        let mut command = Command::new(words.next().context("an empty command")?);
        // An ordinary user's PATH often lacks where nft, tc and ip are.
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
        command.args(words).env("PATH", path);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self
            .start(command)
            .with_context(|| format!("cannot start `{line}`; tests/all installs what the lab needs"))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("`{line}` failed: {}\n{input}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Namespace for patchbay::Router {
    fn start(&self, command: Command) -> anyhow::Result<Child> {
        self.spawn_command_sync(command)
    }
}

impl Namespace for patchbay::Device {
    fn start(&self, command: Command) -> anyhow::Result<Child> {
        self.spawn_command_sync(command)
    }
}

impl Namespace for patchbay::Ix {
    fn start(&self, command: Command) -> anyhow::Result<Child> {
        self.spawn_command_sync(command)
    }
}
