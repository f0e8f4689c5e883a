//! The `adit` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    adit_client::cli::main(std::env::args_os())
}
