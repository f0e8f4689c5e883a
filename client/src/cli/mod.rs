//! The command line of `adit`: parses, runs, and maps errors to exit codes.

mod agent;
mod api_token;
mod data;
mod doctor;
mod enroll;
mod forward;
mod http;
mod launch;
mod ls;
mod port_mapper;
mod rdp;
mod redirect;
mod redirected;
#[cfg_attr(windows, path = "service_windows.rs")]
mod service;
mod signals;
mod ssh;
mod status;
mod stdio;
mod technician;
mod up;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::direct::port_mapping::COMMAND;
use crate::events::{complain, printable};
use crate::exit::{Exit, Failure, report};
use crate::os;

/// Reach RDP, SSH, HTTP and other services on machines behind NAT and firewalls.
#[derive(Debug, Parser)]
#[command(
    name = "adit",
    version,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 refused (identity, policy, ticket), \
                  4 unreachable (server, agent or target), 5 timed out.\n\
                  Ctrl-C and SIGTERM (on Windows Ctrl-Break) end streams and sessions cleanly and are no failure \
                  (0); a second one ends at once (1)."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// What to log on standard error: error, warn, info, debug, trace, or a filter such as adit_client=debug.
    #[arg(long, global = true, env = "ADIT_LOG", value_name = "FILTER")]
    log: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    Enroll(enroll::Enroll),
    Agent(agent::Agent),
    Ls(ls::Ls),
    Forward(forward::Forward),
    Rdp(rdp::Rdp),
    Ssh(ssh::Ssh),
    Http(http::Http),
    Redirect(redirect::Redirect),
    ApiToken(api_token::MakeToken),
    Stdio(stdio::Stdio),
    Up(up::UpCommand),
    Status(status::Status),
    Doctor(doctor::Doctor),
    Service(service::Service),
    #[command(name = COMMAND, hide = true)]
    PortMapper(port_mapper::PortMapper),
}

/// Runs `adit` with these arguments; the first is the name of the program.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage.into() } else { Exit::Done.into() };
        }
    };
    match run(cli) {
        Ok(code) => code,
        Err(Failed(failure)) => {
            // What failed may quote what others sent.
            for line in report(&*failure).lines() {
                complain(&printable(line, 2000));
            }
            failure.exit().into()
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode, Failed> {
    start_log(cli.log.as_deref(), &cli.command)?;
    os::raise_descriptor_limit();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(CliError::Runtime)?;
    let done = runtime.block_on(async {
        match cli.command {
            Command::Enroll(command) => command.run().await?,
            Command::Agent(command) => command.run().await?,
            Command::Ls(command) => command.run().await?,
            Command::Forward(command) => command.run().await?,
            Command::Rdp(command) => command.run().await?,
            Command::Ssh(command) => return command.run().await,
            Command::Http(command) => command.run().await?,
            Command::Redirect(command) => command.run().await?,
            Command::ApiToken(command) => command.run()?,
            Command::Stdio(command) => command.run().await?,
            Command::Up(command) => command.run().await?,
            Command::Status(command) => command.run().await?,
            Command::Doctor(command) => command.run().await?,
            Command::Service(command) => command.run()?,
            Command::PortMapper(command) => command.run().await,
        }
        Ok(Exit::Done.into())
    });
    // A thread that waits for a terminal, or for the resolver, holds up nobody.
    runtime.shutdown_background();
    done
}

fn start_log(filter: Option<&str>, command: &Command) -> Result<(), CliError> {
    #[cfg(windows)]
    if matches!(command, Command::Service(service) if service.is_service()) {
        // It has a log of its own.
        return Ok(());
    }
    // What ends a command is said once, as its error.
    let default = if matches!(command, Command::Agent(_)) { "info" } else { "error" };
    let filter = filter.filter(|filter| !filter.is_empty()).unwrap_or(default);
    crate::log::start(filter).map_err(|_| CliError::Log(filter.to_owned()))
}

/// Any error that ends the program.
struct Failed(Box<dyn Failure>);

impl<E: Failure + 'static> From<E> for Failed {
    fn from(error: E) -> Self {
        Self(Box::new(error))
    }
}

/// Errors of the command line itself.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error("the runtime could not be started: {0}")]
    Runtime(std::io::Error),
    #[error("{0:?} is no log filter")]
    Log(String),
    #[error("this system names no home directory for this user")]
    NoHome,
    #[error("this device is enrolled as {is}, and this command is for the role {wanted}")]
    WrongRole { is: adit_protocol::Role, wanted: adit_protocol::Role },
    #[error("this token is for the role {0}")]
    TokenRole(adit_protocol::Role),
    #[error("the token cannot be read from {from}: {error}")]
    TokenFile { from: String, error: std::io::Error },
    #[error("{agent} did not open the session within {seconds} s{detail}")]
    NotOpened { agent: String, seconds: u64, detail: String },
    #[error("{before}; nor is there the redirector: {redirector}")]
    NoTier { before: String, exit: Exit, redirector: String },
    #[error("the session has ended: {0}")]
    Ended(String),
    #[cfg(target_os = "linux")]
    #[error("{} holds no agent", dir.display())]
    NoAgent { dir: std::path::PathBuf, own: Option<std::path::PathBuf> },
    #[cfg(not(any(target_os = "linux", windows)))]
    #[error("this version cannot set up a service on this system")]
    NoService,
    #[error("{name} does not start: {error}")]
    Program { name: &'static str, error: std::io::Error },
    #[error("{}: {error}", file.display())]
    Write { file: std::path::PathBuf, error: std::io::Error },
    #[error("{0} of the things looked at do not work")]
    Faults(usize),
    #[error("only a technician asks for the test from {agent}, and this device is an agent")]
    NotFromHere { agent: String },
    #[error("the connection cannot be shared in {}: {error}", dir.display())]
    Share { dir: std::path::PathBuf, error: std::io::Error },
    #[error("a path or name with such characters cannot be passed to ssh")]
    Unquotable,
    #[error("this command needs a tunnel, and with --via redirector there is none")]
    NoRedirector,
    #[error("{0}: the redirector takes single TCP targets only")]
    NotRedirected(String),
    #[error("this command takes a TCP target, and {0} is UDP")]
    TcpOnly(adit_protocol::Target),
    #[error("the server does not show pages as it was asked to")]
    NoLink,
    #[error("a token is good for 90 days at most")]
    TooLong,
    #[error("this device's key cannot sign")]
    NoKey,
    #[error("{option} does not fit this target")]
    Unfit { option: &'static str },
}

impl Failure for CliError {
    fn exit(&self) -> Exit {
        match self {
            Self::NoKey
            | Self::NoLink
            | Self::Runtime(_)
            | Self::Ended(_)
            | Self::Program { .. }
            | Self::Write { .. } => Exit::Failed,
            Self::NotOpened { .. } => Exit::TimedOut,
            Self::Faults(_) => Exit::Unreachable,
            Self::NoTier { exit, .. } => *exit,
            Self::Log(_)
            | Self::NoHome
            | Self::WrongRole { .. }
            | Self::TokenRole(_)
            | Self::TokenFile { .. }
            | Self::NoRedirector
            | Self::NotRedirected(_)
            | Self::Unquotable
            | Self::Unfit { .. }
            | Self::TooLong
            | Self::Share { .. }
            | Self::NotFromHere { .. }
            | Self::TcpOnly(_) => Exit::Usage,
            #[cfg(target_os = "linux")]
            Self::NoAgent { .. } => Exit::Usage,
            #[cfg(not(any(target_os = "linux", windows)))]
            Self::NoService => Exit::Usage,
        }
    }

    fn remedy(&self) -> Option<String> {
        Some(match self {
            Self::Runtime(_) | Self::Write { .. } => return None,
            Self::Faults(_) => "each is named above, with what to do".to_owned(),
            Self::NotFromHere { .. } => "leave the name away, or run it at a technician's".to_owned(),
            Self::Share { error, .. } if error.kind() == std::io::ErrorKind::AddrInUse => {
                "another adit up does that already: `adit status` shows it".to_owned()
            }
            Self::Share { .. } => "check that this user may write there".to_owned(),
            Self::NoLink => "it may be of an older version: update mediator and relay".to_owned(),
            Self::TooLong => "give a shorter --ttl, and make a new one in time".to_owned(),
            Self::NoKey => "enrol this device again".to_owned(),
            Self::Log(_) => "for example --log debug, or --log warn,adit_client=trace".to_owned(),
            Self::NoHome => "name the state directory with --data".to_owned(),
            Self::WrongRole { wanted, .. } => {
                format!("name another directory with --data, or enrol with a token for the role {wanted}")
            }
            Self::TokenRole(_) => "on a relay: adit-relay enroll; the token is not spent".to_owned(),
            Self::TokenFile { .. } => "check the path, or give the token itself".to_owned(),
            Self::NotOpened { .. } | Self::NoTier { .. } => {
                "check with `adit ls` that the agent is online; some firewall may block the ways to it"
                    .to_owned()
            }
            Self::Ended(_) => "run the command again for a new session".to_owned(),
            #[cfg(target_os = "linux")]
            Self::NoAgent { dir, own: Some(own) } => {
                format!("an agent of this user is in {0}; move it: mv {0} {1}", own.display(), dir.display())
            }
            #[cfg(target_os = "linux")]
            Self::NoAgent { dir, own: None } => {
                format!("enrol it first: sudo adit enroll - --data {} < token", dir.display())
            }
            #[cfg(not(any(target_os = "linux", windows)))]
            Self::NoService => "run `adit agent` by other means".to_owned(),
            Self::Program { name, .. } => format!("install {name}, or see that it is in PATH"),
            Self::Unquotable => "rename it, or use adit stdio as ssh's ProxyCommand".to_owned(),
            Self::NoRedirector => {
                "use --via auto, direct or relay; or adit forward --via redirector".to_owned()
            }
            Self::NotRedirected(_) => {
                "name TCP targets with -L, or use --via auto, direct or relay".to_owned()
            }
            Self::TcpOnly(_) => "use adit forward for UDP".to_owned(),
            Self::Unfit { .. } => {
                "--open goes with http, https or a URL; --certificate with https; --rdp with rdp or HOST:PORT"
                    .to_owned()
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent_and_every_command_has_an_example() {
        let mut command = Cli::command();
        command.build();
        command.clone().debug_assert();
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help" && !sub.is_hide_set()) {
            let help = sub.clone().render_long_help().to_string();
            assert!(help.contains("Example"), "{}: {help}", sub.get_name());
            assert!(help.contains("--data"), "{}: {help}", sub.get_name());
        }
    }

    #[test]
    fn what_scripts_write_is_understood() {
        for line in [
            "adit enroll adit1.AAAA --data D --name n --tag k=v --tag a=b",
            "adit enroll - --data D",
            "adit enroll --token-file F --data D",
            "adit agent --data D --allow 127.0.0.0/8:1-65535 --allow db:53/udp --json",
            "adit ls --data D --json",
            "adit forward pc -L 127.0.0.1:0:127.0.0.1:3389 -L 5353:10.0.0.53:53/udp --data D --via relay --json",
            "adit stdio pc 127.0.0.1:22 --data D --via direct",
            "adit forward pc -D 1080 -D [::1]:0 --data D --proxy http://a:b@p:3128",
            "adit rdp pc --data D --via direct -- /u:anna",
            "adit rdp pc 10.0.0.7:3389 --print",
            "adit ssh --data D anna@pc -L 1:localhost:2 uptime",
            "adit http pc 8080 --data D",
            "adit redirect pc rdp --source 192.0.2.7 --ttl 1h --rdp F --data D --json",
            "adit status --data D --json",
            "adit service status --data D",
            "adit service install --dry-run",
            "adit service --data D uninstall --purge",
            "adit service status --json",
        ] {
            Cli::try_parse_from(line.split(' ')).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }

    #[test]
    fn what_is_wrong_is_a_usage_error() {
        for line in [
            "adit forward pc",
            "adit forward pc -L 80 --data D",
            "adit forward pc -L 80:h:80 --via sideways",
            "adit stdio pc",
            "adit stdio pc nowhere",
            "adit agent --allow 10.0.0.5/8:80",
            "adit enroll",
            "adit nothing",
        ] {
            let error = Cli::try_parse_from(line.split(' ')).expect_err(line);
            assert!(error.use_stderr() && error.exit_code() == 2, "{line}: {error}");
        }
    }
}
