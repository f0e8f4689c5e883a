//! `adit-relay`: parses, runs, exits with the documented code.

use std::process::ExitCode;

use adit_client::exit::{Exit, Failure, report};
use adit_relay::cli::Cli;
use clap::Parser;

/// glibc's keeps what a flood has taken.
#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[tokio::main]
async fn main() -> ExitCode {
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
