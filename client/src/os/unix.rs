//! Unix: modes keep others out.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, lchown};
use std::path::Path;
use std::task::Poll;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit};
use tokio::net::TcpStream;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Whether a terminal here understands escape sequences.
pub(crate) const COLOURS: bool = true;

/// The wishes to end that a process may get.
pub(crate) struct Signals(Vec<Signal>);

impl Signals {
    /// From now on none of them ends the process by itself.
    pub(crate) fn new() -> Self {
        // SIGHUP is what ssh ends its ProxyCommand with.
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        Self(kinds.into_iter().filter_map(|kind| signal(kind).ok()).collect())
    }

    /// The next one.
    pub(crate) async fn next(&mut self) {
        std::future::poll_fn(|cx| {
            let any = self.0.iter_mut().any(|signal| signal.poll_recv(cx).is_ready());
            if any { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

/// Completes at SIGUSR1. From the first poll on it does not end the process by itself.
pub(crate) async fn asked_to_retire() {
    match signal(SignalKind::user_defined1()) {
        Ok(mut signal) => {
            signal.recv().await;
        }
        Err(_) => std::future::pending().await,
    }
}

/// What is typed at the terminal, Ctrl-C for one, is not for this child.
pub(crate) fn without_terminal(command: &mut tokio::process::Command) {
    command.process_group(0);
}

/// From now on this process gets no more than so many bytes, if the system lets it say so.
pub(crate) fn limit_memory(bytes: u64) {
    let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
    let _ = setrlimit(Resource::As, limit);
}

/// Makes `dir`, and what leads to it, with mode 0700.
pub(crate) fn create_private_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// A file that is made with these options is its owner's only (mode 0600), or everyone's to read (0644).
pub(crate) fn set_access(options: &mut OpenOptions, owner_only: bool) {
    options.mode(if owner_only { 0o600 } else { 0o644 });
}

/// Gives a file that root made to the owner of its directory. Does nothing for anybody else.
pub(crate) fn hand_over(path: &Path) -> io::Result<()> {
    let Some(dir) = path.parent() else { return Ok(()) };
    let owner = std::fs::metadata(dir)?;
    if owner.uid() == 0 || !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    lchown(path, Some(owner.uid()), Some(owner.gid()))
}

/// What was renamed in `dir` is there after a power cut.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// EMFILE or ENFILE, which have no kind of their own.
pub(crate) fn out_of_descriptors(error: &io::Error) -> bool {
    let is = |errno: Errno| error.raw_os_error() == Some(errno.raw_os_error());
    is(Errno::MFILE) || is(Errno::NFILE)
}

/// The name of this machine.
pub(crate) fn machine_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Takes as many descriptors as the system grants. The usual soft limit, 1,024 or on macOS 256, is a few hundred
/// connections, and many-socket probing alone takes 256.
pub fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    /// macOS says that there is no limit, and refuses more than this (OPEN_MAX).
    const OPEN_MAX: u64 = 10_240;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = if cfg!(target_os = "macos") {
        Some(maximum.map_or(OPEN_MAX, |it| it.min(OPEN_MAX)))
    } else {
        maximum
    };
    if wanted == current {
        return;
    }
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: wanted, maximum }) {
        tracing::warn!(%error, "the limit on open descriptors stays as it is");
    }
}

/// How many unsent bytes of a connection the kernel may hold (TCP_NOTSENT_LOWAT). Best effort, and on Linux
/// only.
pub(crate) fn limit_unsent(stream: &TcpStream, bytes: u32) {
    #[cfg(target_os = "linux")]
    let _ = socket2::SockRef::from(stream).set_tcp_notsent_lowat(bytes);
    #[cfg(not(target_os = "linux"))]
    let _ = (stream, bytes);
}
