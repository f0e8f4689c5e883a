//! Builds the programs that are measured, and runs the benchmark as an ordinary user: root has no pipe quota.

use std::env;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use adit_tests::world::binary;
use anyhow::{Context, Result, bail, ensure};

use crate::routes::Binaries;

/// User and group `nobody`, resp. `nogroup`.
const NOBODY: u32 = 65534;
const BIN_DIR: &str = "ADIT_BIN_DIR";

/// The programs: those in `ADIT_BIN_DIR`, else those beside this executable, which `cargo run` builds here.
pub(crate) fn binaries() -> Result<Binaries> {
    if cfg!(debug_assertions) {
        bail!("figures of a debug build mean nothing; next: cargo run --release -p adit-tests --bin bench");
    }
    if env::var_os(BIN_DIR).is_none()
        && let Some(cargo) = env::var_os("CARGO")
    {
        let packages = ["adit-tests", "adit-client", "adit-mediator", "adit-relay"];
        let mut build = Command::new(cargo);
        build.args(["build", "--release", "--bins"]).args(packages.map(|name| format!("--package={name}")));
        ensure!(build.status()?.success(), "the programs cannot be built");
    }
    Ok(Binaries {
        pipe: binary("pipe")?,
        adit: binary("adit")?,
        mediator: binary("adit-mediator")?,
        relay: binary("adit-relay")?,
    })
}

/// As root, runs this program again as nobody, and returns how that ended; everything is copied to where
/// nobody can read it.
pub(crate) fn leave_root(binaries: &Binaries) -> Result<Option<ExitCode>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let dir = tempfile::Builder::new().prefix("adit-bench-root-").tempdir()?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
    let (bin, tmp) = (dir.path().join("bin"), dir.path().join("tmp"));
    fs::create_dir(&bin)?;
    fs::create_dir(&tmp)?;
    chown(&tmp, Some(NOBODY), Some(NOBODY))?;
    let me = copy(&env::current_exe()?, &bin)?;
    for program in [&binaries.pipe, &binaries.adit, &binaries.mediator, &binaries.relay] {
        copy(program, &bin)?;
    }
    let status = Command::new("setpriv")
        .args([&format!("--reuid={NOBODY}"), &format!("--regid={NOBODY}"), "--clear-groups"])
        .arg(me)
        .args(env::args_os().skip(1))
        .current_dir(&tmp)
        .env(BIN_DIR, &bin)
        .env("TMPDIR", &tmp)
        .status()
        .context(
            "setpriv (of util-linux) cannot be started; next: install it, or run this as another user",
        )?;
    Ok(Some(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }))
}

fn copy(program: &Path, bin: &Path) -> Result<PathBuf> {
    let copy = bin.join(program.file_name().context("a program has a name")?);
    fs::copy(program, &copy).with_context(|| format!("cannot copy {}", program.display()))?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    Ok(copy)
}
