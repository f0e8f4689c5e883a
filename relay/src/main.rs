//! `adit-relay`: parses, runs, exits with the documented code.

use std::process::ExitCode;

use adit_client::exit::{Exit, report};
use adit_relay::cli::Cli;
use clap::Parser;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = std::env::var("ADIT_LOG").unwrap_or_default();
    let filter = if filter.is_empty() { "info" } else { &filter };
    if let Err(error) = adit_client::log::start(filter) {
        eprintln!(
            "error: ADIT_LOG={filter}: {error}
  for example ADIT_LOG=debug, or warn,adit_relay=trace"
        );
        return Exit::Usage.into();
    }
    match cli.run().await {
        Ok(()) => Exit::Done.into(),
        Err(failure) => {
            eprintln!("{}", report(&*failure));
            failure.exit().into()
        }
    }
}
