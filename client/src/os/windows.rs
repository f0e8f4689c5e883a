//! Windows: access lists that files inherit from their directory keep others out.
//!
//! Below a user's profile (LocalAppData is the default for `adit enroll` and all that follows) only that
//! user, SYSTEM and the administrators have access, by inheritance. Elsewhere (ProgramData, for the
//! service) everybody may read by default, so a new directory is restricted there, with `icacls`, which is
//! part of Windows: the standard library cannot.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::task::{Context, Poll};

use tokio::net::TcpStream;
use tokio::signal::windows::{
    CtrlBreak, CtrlC, CtrlClose, CtrlShutdown, ctrl_break, ctrl_c, ctrl_close, ctrl_shutdown,
};

/// Whether a terminal here understands escape sequences: the classic console does not until it is told.
pub(crate) const COLOURS: bool = false;

/// SYSTEM, the administrators, and whoever owns the file (well-known SIDs: names are translated), with
/// everything, on all that is made inside.
const OWNERS: [&str; 3] = ["*S-1-5-18:(OI)(CI)F", "*S-1-5-32-544:(OI)(CI)F", "*S-1-3-4:(OI)(CI)F"];
/// WSAEMFILE.
const NO_MORE_SOCKETS: i32 = 10_024;
/// ERROR_TOO_MANY_OPEN_FILES.
const NO_MORE_FILES: i32 = 4;

/// This child has no console: neither a window, nor Ctrl-C.
pub(crate) fn without_terminal(command: &mut tokio::process::Command) {
    const CREATE_NO_WINDOW: u32 = 0x0800_0000;
    command.creation_flags(CREATE_NO_WINDOW);
}

/// Not on Windows.
pub(crate) fn limit_memory(_bytes: u64) {}

/// The wishes to end that a process may get. Closing the window and shutting down leave a few seconds.
/// Logging off is none: it would end services, too.
pub(crate) struct Signals {
    ctrl_c: Option<CtrlC>,
    ctrl_break: Option<CtrlBreak>,
    close: Option<CtrlClose>,
    shutdown: Option<CtrlShutdown>,
}

impl Signals {
    /// From now on none of them ends the process by itself.
    pub(crate) fn new() -> Self {
        Self {
            ctrl_c: ctrl_c().ok(),
            ctrl_break: ctrl_break().ok(),
            close: ctrl_close().ok(),
            shutdown: ctrl_shutdown().ok(),
        }
    }

    /// The next one.
    pub(crate) async fn next(&mut self) {
        std::future::poll_fn(|cx| self.poll(cx)).await;
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Self { ctrl_c, ctrl_break, close, shutdown } = self;
        // All of them, so that each wakes the task.
        let came = [
            ctrl_c.as_mut().is_some_and(|signal| signal.poll_recv(cx).is_ready()),
            ctrl_break.as_mut().is_some_and(|signal| signal.poll_recv(cx).is_ready()),
            close.as_mut().is_some_and(|signal| signal.poll_recv(cx).is_ready()),
            shutdown.as_mut().is_some_and(|signal| signal.poll_recv(cx).is_ready()),
        ];
        if came.contains(&true) { Poll::Ready(()) } else { Poll::Pending }
    }
}

/// Never completes: there is no such signal.
pub(crate) async fn asked_to_retire() {
    std::future::pending().await
}

/// Makes `dir`, and what leads to it, for its owner and the administrators.
pub(crate) fn create_private_dir(dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    if in_profile(dir) { Ok(()) } else { restrict(dir) }
}

/// Whether `path` is below this user's profile.
pub(crate) fn in_profile(path: &Path) -> bool {
    let profile = std::env::var_os("USERPROFILE").filter(|profile| !profile.is_empty()).map(PathBuf::from);
    let real = |path: &Path| path.canonicalize();
    match (profile.as_deref().map(real), real(path)) {
        (Some(Ok(profile)), Ok(path)) => path.starts_with(profile),
        _ => false,
    }
}

/// Lets nobody into `dir` and what is in it but its owner and the administrators, whatever it inherited.
fn restrict(dir: &Path) -> io::Result<()> {
    icacls(dir, &["/inheritance:r", "/grant:r"], &OWNERS)
}

/// Makes `dir` and all that is in it the administrators', and lets in nobody else but `others` (as
/// `icacls /grant` wants them). For administrators.
pub(crate) fn take_over(dir: &Path, others: &[&str]) -> io::Result<()> {
    icacls(dir, &["/setowner", "*S-1-5-32-544"], &[])?;
    icacls(dir, &["/inheritance:r", "/grant:r"], &[&OWNERS, others].concat())
}

fn icacls(dir: &Path, what: &[&str], whom: &[&str]) -> io::Result<()> {
    // Not by name alone: the directory that one happens to be in may have another program of that name.
    let system = std::env::var_os("SystemRoot").map_or_else(|| PathBuf::from(r"C:\Windows"), PathBuf::from);
    let mut command = Command::new(system.join("System32").join("icacls.exe"));
    command.arg(dir).args(what).args(whom).args(["/T", "/Q"]).stdin(Stdio::null());
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("icacls cannot restrict who may read it: {}", said.trim())))
}

/// A file inherits from its directory who may read it.
pub(crate) fn set_access(_: &mut OpenOptions, _owner_only: bool) {}

/// A file inherits from its directory who may read it, whoever made it.
pub(crate) fn hand_over(_: &Path) -> io::Result<()> {
    Ok(())
}

/// Directories cannot be synchronised here; NTFS keeps a journal of renames.
pub(crate) fn sync_dir(_: &Path) -> io::Result<()> {
    Ok(())
}

/// No more files or sockets for this process.
pub(crate) fn out_of_descriptors(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(NO_MORE_SOCKETS | NO_MORE_FILES))
}

/// The name of this machine.
pub(crate) fn machine_name() -> String {
    std::env::var("COMPUTERNAME").unwrap_or_default()
}

/// Windows has no such limit.
pub fn raise_descriptor_limit() {}

/// Windows has no bound for the unsent bytes of a connection that it holds.
pub(crate) fn limit_unsent(_: &TcpStream, _bytes: u32) {}
