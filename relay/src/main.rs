//! `adit-relay`: see [`adit_relay::cli::main`].

use std::process::ExitCode;

/// glibc's keeps what a flood has taken.
#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    adit_relay::cli::main()
}
