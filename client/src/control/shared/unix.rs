//! Unix: a socket in `DIR/run`, for its owner only.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::time::sleep;

use crate::identity::store::create_private_dir;

/// Pause after an error that the next accept may meet again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// A command's connection.
pub(super) struct Arrived(UnixStream);

impl Arrived {
    /// Who may open the socket has shown enough.
    pub(super) async fn stream(self) -> Option<UnixStream> {
        Some(self.0)
    }
}

/// Takes connections of commands. The socket is removed with it.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    pub(super) async fn bind(run: &Path, name: &str) -> io::Result<Self> {
        create_private_dir(run).map_err(io::Error::other)?;
        let path = run.join(name);
        if UnixStream::connect(&path).await.is_ok() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        // Left over by a process that was killed.
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        Ok(Self { listener, path })
    }

    pub(super) async fn accept(&mut self) -> Arrived {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => return Arrived(stream),
                Err(_) => sleep(ACCEPT_PAUSE).await,
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

pub(super) async fn connect(run: &Path, name: &str) -> Option<UnixStream> {
    UnixStream::connect(run.join(name)).await.ok()
}
