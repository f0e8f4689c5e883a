//! `adit-mediator`: parses the command line, runs it, maps the outcome to an exit code.

use std::io::{IsTerminal, stderr};
use std::process::ExitCode;

use adit_client::exit::{Exit, report};
use adit_mediator::cli::{Cli, run};
use clap::Parser;
use tracing_subscriber::EnvFilter;

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("ADIT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        .init();
    match run(Cli::parse()).await {
        Ok(()) => Exit::Done.into(),
        Err(failure) => {
            eprintln!("{}", report(failure.as_ref()));
            failure.exit().into()
        }
    }
}
