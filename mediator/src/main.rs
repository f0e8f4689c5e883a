//! `adit-mediator`: parses the command line, runs it, maps the outcome to an exit code.

use std::io::{IsTerminal, stderr};
use std::process::ExitCode;

use adit_client::exit::{Exit, report};
use adit_mediator::cli::{Cli, Command, run};
use clap::Parser;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::Adit { arguments } = cli.command {
        return adit_client::cli::main(std::iter::once("adit".into()).chain(arguments));
    }
    let filter = EnvFilter::try_from_env("ADIT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr).with_ansi(colours).init();
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
