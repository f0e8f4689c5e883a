//! `adit-relay`: parses, runs, exits with the documented code.

use std::io::IsTerminal;
use std::process::ExitCode;

use adit_client::exit::{Exit, report};
use adit_relay::cli::Cli;
use clap::Parser;
use tracing_subscriber::EnvFilter;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_env("ADIT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    match cli.run().await {
        Ok(()) => Exit::Done.into(),
        Err(failure) => {
            eprintln!("{}", report(&*failure));
            failure.exit().into()
        }
    }
}
