//! `adit ssh`.

use std::ffi::OsString;
use std::path::Path;
use std::process::{ExitCode, Stdio};

use adit_protocol::{Protocol, Target};
use clap::Args;
use tokio::process::Command;

use super::technician::SessionArgs;
use super::{CliError, Failed};

/// Log in on, or beside, an agent with this system's ssh.
///
/// Everything behind the agent's name goes to ssh as it is: its options and the command. Host keys are kept under the
/// agent's name. The exit code is ssh's.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  adit ssh anna@office-pc\n  adit ssh office-pc uptime\n  \
    adit ssh --target 192.168.1.7:22 root@office-pc -L 8080:localhost:80")]
pub(super) struct Ssh {
    /// The SSH server, as seen from the agent.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:22")]
    target: Target,
    #[command(flatten)]
    session: SessionArgs,
    /// For ssh.
    #[arg(value_name = "ARGUMENT", trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

impl Ssh {
    pub(super) async fn run(self) -> Result<ExitCode, Failed> {
        if self.target.protocol == Protocol::Udp {
            return Err(CliError::TcpOnly(self.target).into());
        }
        let destination = self.session.agent.clone();
        // ssh would take it for an option.
        if destination.starts_with('-') {
            return Err(CliError::Unquotable.into());
        }
        let agent = destination.rsplit_once('@').map_or(destination.as_str(), |(_, agent)| agent);
        let me = std::env::current_exe().map_err(CliError::Runtime)?;
        let command = self.session.stdio_command(&me, agent, &self.target)?;
        let mut ssh = Command::new("ssh");
        ssh.arg("-o")
            .arg(format!("ProxyCommand={command}"))
            .arg("-o")
            .arg(format!("HostKeyAlias={}", alias(agent, &self.target)));
        ssh.arg(&destination).args(&self.arguments).stdin(Stdio::inherit());
        if let Some(proxy) = self.session.data.proxy() {
            ssh.env("ADIT_PROXY", proxy);
        }
        // Ctrl-C is for what runs over there: ssh passes it on.
        let ignoring = tokio::spawn(async { while tokio::signal::ctrl_c().await.is_ok() {} });
        let mut child = ssh.spawn().map_err(|error| CliError::Program { name: "ssh", error })?;
        let status = child.wait().await.map_err(CliError::Runtime)?;
        ignoring.abort();
        Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(255)))
    }
}

/// Under which name ssh keeps the host's key.
fn alias(agent: &str, target: &Target) -> String {
    match target.ip() {
        Some(ip) if ip.is_loopback() && target.port == 22 => agent.to_owned(),
        _ => format!("{agent}/{target}"),
    }
}

impl SessionArgs {
    /// The command line of `adit stdio`, for ssh, which has the user's shell run it after it has replaced each `%`.
    fn stdio_command(&self, me: &Path, agent: &str, target: &Target) -> Result<String, CliError> {
        let mut words =
            vec![me.as_os_str().to_owned(), "stdio".into(), agent.into(), target.to_string().into()];
        words.extend(self.repeated());
        let quoted = words.iter().map(|word| word.to_str().and_then(quote));
        let quoted: Option<Vec<String>> = quoted.collect();
        quoted.map(|words| words.join(" ")).ok_or(CliError::Unquotable)
    }
}

/// One word for a shell, and for ssh. `None`: it cannot be said.
fn quote(word: &str) -> Option<String> {
    if word.chars().any(char::is_control) {
        return None;
    }
    if cfg!(windows) {
        quote_windows(word)
    } else {
        Some(format!("'{}'", word.replace('%', "%%").replace('\'', r"'\''")))
    }
}

/// There `%` may be a variable's, and a backslash before the closing quote would be its escape.
fn quote_windows(word: &str) -> Option<String> {
    let trailing = word.len() - word.trim_end_matches('\\').len();
    (!word.contains(['"', '%'])).then(|| format!("\"{word}{}\"", "\\".repeat(trailing)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_quotes_are_closed() {
        assert_eq!(quote_windows(r"D:\my adit\").as_deref(), Some(r#""D:\my adit\\""#));
        assert_eq!(quote_windows(r"D:\%x%"), None);
    }

    #[cfg(unix)]
    #[test]
    fn words_stay_words_in_a_shell() {
        for word in ["plain", "with space", "it's", "$HOME `id` \\", "50%"] {
            let command = format!("printf %s {}", quote(word).expect("can be said").replace("%%", "%"));
            let output = std::process::Command::new("sh").args(["-c", &command]).output().expect("runs");
            assert_eq!(String::from_utf8_lossy(&output.stdout), word);
        }
        assert_eq!(quote("a\nb"), None);
    }
}
