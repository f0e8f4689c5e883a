//! The command line of `adit-relay`.

use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use adit_client::enrol::{EnrolError, Enrolment, enrol};
use adit_client::exit::{Exit, Failure, report};
use adit_client::identity::store::{self, Access, StoreError};
use adit_client::proxy::Proxies;
use adit_protocol::Role;
use adit_protocol::token::EnrolmentToken;
use clap::{Args, Parser, Subcommand};

use crate::config;
#[cfg(target_os = "linux")]
use crate::install::{Install, Uninstall};
use crate::run::{self, Overrides, RunError};

/// The relay of adit: forwards bytes between two devices that show tickets of the mediator.
#[derive(Debug, Parser)]
#[command(
    name = "adit-relay",
    version,
    after_help = "\
Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 refused, 4 unreachable, 5 timed out"
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make this machine a relay of an organisation
    #[command(after_help = "\
Example:
  adit-relay enroll adit1.EREREREREREREREREREREQ --data /var/lib/adit-relay --host relay.example.org
The token comes from `adit-mediator token --role relay`.")]
    Enroll(Enroll),
    /// Serve until told to stop (Ctrl-C, SIGTERM)
    #[command(after_help = "\
Example:
  adit-relay run --data /var/lib/adit-relay
Settings are in config.toml of that directory. ADIT_LOG sets the log level (default: info).")]
    Run(Run),
    /// Set the relay up as a service of this system: a user of its own, no root, started with the machine
    #[cfg(target_os = "linux")]
    #[command(after_help = "\
Example:
  sudo adit-relay enroll - --data /var/lib/adit-relay --host relay.example.org < token
  sudo adit-relay install
Here the state directory is /var/lib/adit-relay by default.")]
    Install(Install),
    /// Stop the service and remove it
    #[cfg(target_os = "linux")]
    #[command(after_help = "\
Example:
  sudo adit-relay uninstall")]
    Uninstall(Uninstall),
}

#[derive(Debug, Args)]
struct Enroll {
    /// The token, or `-` to read it from standard input
    token: String,
    #[command(flatten)]
    data: Data,
    /// Names and addresses under which clients reach this relay, comma separated
    #[arg(long = "host", value_name = "NAME_OR_IP", required = true, value_delimiter = ',', value_parser = host)]
    hosts: Vec<String>,
    /// Name of this relay [default: its first host]
    #[arg(long)]
    name: Option<String>,
    /// Give up the identity that is in the directory already
    #[arg(long)]
    replace: bool,
}

#[derive(Debug, Args)]
struct Run {
    #[command(flatten)]
    data: Data,
    /// Listen here instead of `[listen] relay`
    #[arg(long, value_name = "IP:PORT", env = "ADIT_LISTEN_RELAY")]
    listen_relay: Option<SocketAddr>,
    /// Listen here instead of `[listen] udp`
    #[arg(long, value_name = "IP:PORT", env = "ADIT_LISTEN_UDP")]
    listen_udp: Option<SocketAddr>,
    /// Listen here instead of `[listen] https`
    #[arg(long, value_name = "IP:PORT", env = "ADIT_LISTEN_HTTPS")]
    listen_https: Option<SocketAddr>,
    /// Listen here instead of `[listen] diagnostics`
    #[arg(long, value_name = "IP:PORT", env = "ADIT_LISTEN_DIAGNOSTICS")]
    listen_diagnostics: Option<SocketAddr>,
}

#[derive(Debug, Args)]
pub(crate) struct Data {
    /// State directory [default: the platform's own, for example ~/.local/share/adit-relay]
    #[arg(long, value_name = "DIR", env = "ADIT_DATA")]
    pub(crate) data: Option<PathBuf>,
}

/// The whole program: parses the command line, does what it says, and maps the outcome to an exit code. Here, so that
/// the executable has next to nothing to compile.
#[tokio::main]
pub async fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(failure) = adit_client::log::start_as_environment_says() {
        eprintln!("{}", report(&failure));
        return failure.exit().into();
    }
    match cli.run().await {
        Ok(()) => Exit::Done.into(),
        Err(failure) => {
            eprintln!("{}", report(&*failure));
            failure.exit().into()
        }
    }
}

impl Cli {
    /// Does what was asked.
    ///
    /// # Errors
    /// What failed, with its exit code and remedy.
    pub async fn run(self) -> Result<(), Box<dyn Failure>> {
        match self.command {
            Command::Enroll(command) => command.run().await.map_err(|error| Box::new(error) as _),
            Command::Run(command) => command.run().await,
            #[cfg(target_os = "linux")]
            Command::Install(command) => command.run(),
            #[cfg(target_os = "linux")]
            Command::Uninstall(command) => command.run(),
        }
    }
}

impl Enroll {
    async fn run(self) -> Result<(), EnrollError> {
        let text =
            if self.token == "-" { io::read_to_string(io::stdin().take(MAX_INPUT))? } else { self.token };
        let token: EnrolmentToken = text.parse().map_err(EnrolError::from)?;
        if token.role != Role::Relay {
            return Err(EnrollError::OtherRole(token.role));
        }
        let dir = self.data.dir().ok_or(EnrollError::NoHome)?;
        let wanted = Enrolment {
            dir: dir.clone(),
            name: self.name.unwrap_or_else(|| name_of(&self.hosts)),
            tags: Vec::new(),
            hosts: self.hosts.clone(),
            replace: self.replace,
            proxies: Proxies::default(),
        };
        let identity = enrol(&token, &wanted).await?;
        let file = dir.join(config::FILE);
        if file.exists() {
            println!("{} stays as it is", file.display());
        } else {
            store::write(&dir, config::FILE, config::template(&self.hosts).as_bytes(), Access::Public)?;
        }
        println!("enrolled as relay {} ({})", identity.name, identity.device_id);
        println!("next: adit-relay run --data {}", dir.display());
        Ok(())
    }
}

impl Run {
    async fn run(self) -> Result<(), Box<dyn Failure>> {
        let dir = self.data.dir().ok_or_else(|| Box::new(EnrollError::NoHome) as Box<dyn Failure>)?;
        let overrides = Overrides {
            relay: self.listen_relay,
            udp: self.listen_udp,
            https: self.listen_https,
            diagnostics: self.listen_diagnostics,
        };
        run::run(&dir, overrides).await.map_err(|error: RunError| Box::new(error) as _)
    }
}

impl Data {
    fn dir(&self) -> Option<PathBuf> {
        let default = || {
            let platform = directories::ProjectDirs::from("", "", "adit-relay")?;
            Some(platform.data_local_dir().to_owned())
        };
        self.data.clone().or_else(default)
    }
}

/// More than a token has, so that a wrong file on standard input does not fill the memory.
const MAX_INPUT: u64 = 64 * 1024;

/// A host name or an IP address, without a port.
fn host(text: &str) -> Result<String, String> {
    let name = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    let is_name = (1..=253).contains(&text.len()) && text.bytes().all(name);
    if is_name || text.parse::<std::net::IpAddr>().is_ok() {
        Ok(text.to_owned())
    } else {
        Err("expected a host name or an IP address without brackets or port".into())
    }
}

/// The first host, in the characters of a device's name.
fn name_of(hosts: &[String]) -> String {
    let name = hosts.first().map_or("relay", String::as_str).replace(':', "-");
    name.chars().take(63).collect()
}

/// Why this machine did not become a relay.
#[derive(Debug, thiserror::Error)]
enum EnrollError {
    #[error(transparent)]
    Enrol(#[from] EnrolError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("this token is for the role {0}")]
    OtherRole(Role),
    #[error("this user has no home directory to keep state in")]
    NoHome,
    #[error("the token cannot be read from standard input: {0}")]
    Input(#[from] io::Error),
}

impl Failure for EnrollError {
    fn exit(&self) -> Exit {
        match self {
            Self::Enrol(error) => error.exit(),
            Self::Store(error) => error.exit(),
            Self::OtherRole(_) | Self::NoHome | Self::Input(_) => Exit::Usage,
        }
    }

    fn remedy(&self) -> Option<String> {
        match self {
            Self::Enrol(error) => error.remedy(),
            Self::Store(error) => error.remedy(),
            Self::OtherRole(_) => {
                Some("ask for one of `adit-mediator token --role relay`; this one is not spent".into())
            }
            Self::NoHome => Some("name a directory with --data".into()),
            Self::Input(_) => {
                Some("for example: adit-relay enroll - --host relay.example.org < token-file".into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn hosts_are_names_or_addresses() {
        let parsed = Cli::try_parse_from(["adit-relay", "enroll", "-", "--host", "a.example,2001:db8::1"]);
        let Command::Enroll(enroll) = parsed.expect("parses").command else { panic!("enroll") };
        assert_eq!(enroll.hosts, ["a.example", "2001:db8::1"]);
        assert_eq!(name_of(&["2001:db8::1".into()]), "2001-db8--1");
        for bad in ["", "a b", "a.example:8002", "[::1]", "http://a"] {
            assert!(Cli::try_parse_from(["adit-relay", "enroll", "-", "--host", bad]).is_err(), "{bad}");
        }
    }
}
