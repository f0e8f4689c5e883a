//! `adit-mediator`: parses the command line, runs it, maps the outcome to an exit code.

use std::process::ExitCode;

use adit_client::exit::{Exit, Failure, report};
use adit_mediator::cli::{Cli, Command, run};
use clap::Parser;

/// glibc's keeps what a flood has taken.
#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
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
