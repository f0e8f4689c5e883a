//! The command line of `adit-mediator`.

mod backup;
mod devices;
mod doctor;
mod hosts;
mod policy;
mod table;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use adit_client::exit::{Exit, Failure, report};
use adit_protocol::Role;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::parse_hosts;
use crate::demo::{self, Demo};
use crate::error::Error;
#[cfg(target_os = "linux")]
use crate::install::{Install, Uninstall};
use crate::operator::{Operator, become_owner};
use crate::organisation::Organisation;
use crate::server::Mediator;
use crate::token::{self, Wanted};
use adit_relay::config::Https;

/// The mediator of adit: identities, presence, brokering, STUN.
#[derive(Debug, Parser)]
#[command(
    name = "adit-mediator",
    version,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 refused, 4 unreachable, 5 timed out.\n\
                  Example: adit-mediator demo"
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a new organisation: root key, server certificate, configuration file.
    #[command(
        after_help = "Example: adit-mediator init --data /var/lib/adit-mediator --host adit.example.org"
    )]
    Init(Init),
    /// Run the mediator.
    #[command(after_help = "Example: adit-mediator run --data /var/lib/adit-mediator")]
    Run(Run),
    /// Set the mediator up as a service of this system: a user of its own, no root, started with the machine.
    #[cfg(target_os = "linux")]
    #[command(after_help = "Example: sudo adit-mediator install --host adit.example.org")]
    Install(Install),
    /// Stop the service and remove it.
    #[cfg(target_os = "linux")]
    #[command(after_help = "Example: sudo adit-mediator uninstall")]
    Uninstall(Uninstall),
    /// Make an enrolment token and print it.
    #[command(after_help = "Example: adit-mediator token --role agent --tag site=berlin")]
    Token(Token),
    /// List the enrolled devices: role, tags, whether they are online, from where, with which version.
    #[command(after_help = "Example: adit-mediator devices --role agent --tag customer=acme")]
    Devices(devices::Devices),
    /// Give a device another name.
    #[command(after_help = "Example: adit-mediator rename reception-pc front-desk")]
    Rename(devices::Rename),
    /// Change a device's tags.
    #[command(after_help = "Example: adit-mediator tag reception-pc customer=acme site=berlin --remove old")]
    Tag(devices::Tag),
    /// Revoke a device: its sessions end at once, and it cannot come back.
    #[command(after_help = "Example: adit-mediator revoke lost-laptop")]
    Revoke(devices::Revoke),
    /// Let a technician reach the agents that carry all of the tags given.
    #[command(after_help = "Example: adit-mediator allow annas-laptop --tag customer=acme --tag site=berlin")]
    Allow(policy::Allow),
    /// Take a grant away from a technician: sessions that it alone permitted end at once.
    #[command(after_help = "Example: adit-mediator deny annas-laptop 3")]
    Deny(policy::Deny),
    /// List which technician reaches which agents.
    #[command(after_help = "Example: adit-mediator grants annas-laptop")]
    Grants(policy::Grants),
    /// List or change the names and addresses by which devices reach this server.
    #[command(after_help = "Example: adit-mediator hosts add adit2.example.org")]
    Hosts(hosts::Hosts),
    /// Test this server: files, certificates, names, ports; with --from also from outside.
    #[command(after_help = "Example: adit-mediator doctor --from reception-pc")]
    Doctor(doctor::Doctor),
    /// Write everything that makes this organisation into one encrypted file, also while the mediator runs.
    #[command(after_help = "Example: adit-mediator backup /mnt/usb/adit.age")]
    Backup(backup::Backup),
    /// Bring an organisation back from a backup, on a new machine: every device comes back by itself.
    #[command(after_help = "Example: adit-mediator restore /mnt/usb/adit.age --data /var/lib/adit-mediator")]
    Restore(backup::Restore),
    /// Everything on this machine with throwaway keys: server, agent, technician and a tunnel.
    #[command(after_help = "Example: adit-mediator demo --target 127.0.0.1:22")]
    Demo(Demo),
    /// The `adit` command, which the demo runs from this same program.
    #[command(hide = true, disable_help_flag = true)]
    Adit {
        /// Arguments of `adit`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

/// Arguments of `init`.
#[derive(Debug, Args)]
pub struct Init {
    #[command(flatten)]
    data: Data,
    /// Names and addresses that clients use to reach this server.
    #[arg(long = "host", value_name = "NAME_OR_IP[,…]", required = true)]
    hosts: Vec<String>,
}

/// Arguments of `run`.
#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    data: Data,
    /// Whether to run an embedded relay.
    #[arg(long, value_name = "on|off", default_value = "on", env = "ADIT_RELAY")]
    relay: Switch,
    /// The certificate that browsers see, a chain in PEM. Goes before `[https] cert`.
    #[arg(long, value_name = "FILE", env = "ADIT_CERT", requires = "key")]
    cert: Option<PathBuf>,
    /// Its key in PEM.
    #[arg(long, value_name = "FILE", env = "ADIT_KEY", requires = "cert")]
    key: Option<PathBuf>,
}

/// Arguments of `token`.
#[derive(Debug, Args)]
pub struct Token {
    #[command(flatten)]
    data: Data,
    /// What the token enrols: agent, technician or relay.
    #[arg(long)]
    role: Role,
    /// How long it can be used: 90s, 30m, 1h, 7d.
    #[arg(long, default_value = "1h")]
    ttl: String,
    /// How many devices it enrols.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    uses: u32,
    /// Tag of the device, can be given several times. Of a technician: its first grant; it reaches the agents
    /// that carry all of them.
    #[arg(long = "tag", value_name = "KEY=VALUE")]
    tags: Vec<String>,
    /// A technician that reaches every agent.
    #[arg(long)]
    all_agents: bool,
    /// With several --uses: machines that were installed anew may take their old names (adit enroll --replace).
    /// A token for one device always may.
    #[arg(long, verbatim_doc_comment)]
    may_replace: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Data {
    /// State directory.
    #[arg(
        long = "data",
        value_name = "DIR",
        env = "ADIT_DATA",
        default_value = "/var/lib/adit-mediator",
        global = true
    )]
    pub(crate) dir: PathBuf,
}

impl Data {
    /// The directory, for a command that changes what is in it: as its owner.
    fn owned(&self) -> Result<&Path, Error> {
        become_owner(&self.dir)?;
        Ok(&self.dir)
    }
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    /// Yes.
    On,
    /// No.
    Off,
}

/// The whole program: parses the command line, does what it says, and maps the outcome to an exit code. Here, so that
/// the executable has next to nothing to compile.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::Adit { arguments } = cli.command {
        return adit_client::cli::main(std::iter::once("adit".into()).chain(arguments));
    }
    if let Err(failure) = adit_client::log::start_as_environment_says() {
        eprintln!("{}", report(&failure));
        return failure.exit().into();
    }
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: no runtime: {error}");
            return Exit::Failed.into();
        }
    };
    match runtime.block_on(run(cli)) {
        Ok(()) => Exit::Done.into(),
        Err(failure) => {
            eprintln!("{}", report(failure.as_ref()));
            failure.exit().into()
        }
    }
}

async fn run(cli: Cli) -> Result<(), Box<dyn Failure>> {
    let done = match cli.command {
        Command::Init(arguments) => init(&arguments),
        Command::Run(arguments) => serve(&arguments).await,
        #[cfg(target_os = "linux")]
        Command::Install(arguments) => return arguments.run(),
        #[cfg(target_os = "linux")]
        Command::Uninstall(arguments) => return arguments.run(),
        Command::Token(arguments) => make_token(arguments).await,
        Command::Devices(arguments) => arguments.run().await,
        Command::Rename(arguments) => arguments.run().await,
        Command::Tag(arguments) => arguments.run().await,
        Command::Revoke(arguments) => arguments.run().await,
        Command::Allow(arguments) => arguments.run().await,
        Command::Deny(arguments) => arguments.run().await,
        Command::Grants(arguments) => arguments.run().await,
        Command::Hosts(arguments) => arguments.run().await,
        Command::Doctor(arguments) => arguments.run().await,
        Command::Backup(arguments) => arguments.run().await,
        Command::Restore(arguments) => arguments.run().await,
        Command::Demo(arguments) => {
            return demo::run(arguments).await.map_err(|error| Box::new(error) as Box<dyn Failure>);
        }
        // Taken before there is a runtime.
        Command::Adit { .. } => Ok(()),
    };
    done.map_err(|error| Box::new(error) as Box<dyn Failure>)
}

fn init(arguments: &Init) -> Result<(), Error> {
    let dir = &arguments.data.dir;
    Organisation::init(dir, &parse_hosts(&arguments.hosts)?)?;
    eprintln!("made a new organisation in {}", dir.display());
    eprintln!("settings: {}", dir.join(crate::config::FILE).display());
    eprintln!(
        "next: adit-mediator run --data {0}, and adit-mediator token --data {0} --role agent",
        dir.display()
    );
    Ok(())
}

async fn serve(arguments: &Run) -> Result<(), Error> {
    let stop = stop_signal();
    let mut organisation = Organisation::load(&arguments.data.dir)?;
    if let (Some(cert), Some(key)) = (arguments.cert.clone(), arguments.key.clone()) {
        organisation.config.https = Https { cert: Some(cert), key: Some(key) };
    }
    adit_client::raise_descriptor_limit();
    let mediator = Mediator::bind(organisation, arguments.relay == Switch::On).await?;
    mediator.run(stop).await
}

async fn make_token(arguments: Token) -> Result<(), Error> {
    let Token { data, role, ttl, uses, tags, all_agents, may_replace } = arguments;
    if role == Role::Technician && tags.is_empty() && !all_agents {
        eprintln!("warning: without --tag and --all-agents this technician reaches no agent");
    }
    if role != Role::Technician && all_agents {
        eprintln!("warning: --all-agents means nothing for the role {role}");
    }
    let reaches = if all_agents { "all agents".to_owned() } else { tags.join(" ") };
    let replaces = if may_replace { ", may replace" } else { "" };
    let what = format!("{role}, {uses} uses within {ttl}{replaces}: {reaches}");
    let wanted = Wanted { role, ttl: token::parse_ttl(&ttl)?, uses, tags, all_agents, may_replace };
    let dir = data.owned()?;
    let token = token::make(dir, wanted).await?;
    // Nobody has it before its record is there.
    Operator::open(dir).await?.write_down_deed("token made", &what).await?;
    println!("{token}");
    Ok(())
}

/// Ctrl-C, and SIGTERM where there is one. Caught from the call on, not only from the first poll.
pub(crate) fn stop_signal() -> impl Future<Output = ()> {
    #[cfg(unix)]
    let terminate = {
        use tokio::signal::unix::{SignalKind, signal};
        let terminate = signal(SignalKind::terminate());
        async move {
            match terminate {
                Ok(mut terminate) => terminate.recv().await,
                Err(_) => std::future::pending().await,
            }
        }
    };
    #[cfg(not(unix))]
    let terminate = std::future::pending::<Option<()>>();
    async move {
        tokio::select! {
            _ = terminate => {}
            _ = tokio::signal::ctrl_c() => {}
        }
    }
}
