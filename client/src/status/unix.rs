//! Unix: a socket `DIR/run/PID.sock`, for its owner only. Who connects gets the document and the end of
//! file. A socket that nobody serves is removed by the next one who asks.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{sleep, timeout};

use super::{ACCEPT_PAUSE, Document, MAX_DOCUMENT, PATIENCE, Server};
use crate::identity::store::create_private_dir;

/// Of the socket's name.
pub(super) const EXTENSION: &str = "sock";

/// Serves the document on a socket in `run`.
pub(super) fn serve(run: &Path, document: impl Fn() -> Document + Send + 'static) -> io::Result<Server> {
    create_private_dir(run).map_err(io::Error::other)?;
    let path = run.join(format!("{}.{EXTENSION}", std::process::id()));
    // Left over by a process that had this number before.
    if let Err(error) = fs::remove_file(&path)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    let task = tokio::spawn(async move {
        loop {
            // One after the other: each has its deadline.
            match listener.accept().await {
                Ok((mut asker, _)) => {
                    let text = serde_json::to_vec(&document()).unwrap_or_default();
                    let _ = timeout(PATIENCE, asker.write_all(&text)).await;
                }
                Err(_) => sleep(ACCEPT_PAUSE).await,
            }
        }
    });
    Ok(Server { path, task: task.abort_handle() })
}

/// The document that is served at `path`.
pub(super) async fn ask(path: &Path) -> Option<Vec<u8>> {
    let socket = match UnixStream::connect(path).await {
        Ok(socket) => socket,
        Err(error) => {
            if error.kind() == io::ErrorKind::ConnectionRefused {
                let _ = fs::remove_file(path);
            }
            return None;
        }
    };
    let mut text = Vec::new();
    socket.take(MAX_DOCUMENT).read_to_end(&mut text).await.ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{self, Process, RUN, SessionInfo, SessionStatus};
    use crate::tunnel::Tunnel;
    use adit_protocol::SessionId;
    use adit_tunnel::session::End;
    use std::time::{Duration, UNIX_EPOCH};

    #[tokio::test]
    async fn a_process_tells_what_it_is_doing() {
        let dir = tempfile::tempdir().expect("tempdir");
        assert_eq!(status::ask(dir.path()).await.expect("asks"), []);
        let (tunnel, _notices) = Tunnel::new(End::Technician, SessionId([7; 16]));
        let info = SessionInfo {
            session: SessionId([7; 16]),
            peer: "office-pc".to_owned(),
            since: UNIX_EPOCH + Duration::from_secs(1_800_000_000),
            tunnel,
            via: crate::via::Via::Auto,
        };
        let process = Process { command: "forward", device: "anna".to_owned() };
        let server =
            status::serve(dir.path(), process, move || vec![SessionStatus::from(&info)]).expect("serves");
        let mode = fs::metadata(&server.path).expect("is there").permissions().mode() & 0o777;
        assert_eq!(mode, 0o600);

        let documents = status::ask(dir.path()).await.expect("asks");
        let [document] = documents.as_slice() else { panic!("{documents:?}") };
        assert_eq!((document.pid, document.command.as_str()), (std::process::id(), "forward"));
        let [session] = document.sessions.as_slice() else { panic!("{document:?}") };
        assert_eq!((session.peer.as_str(), session.since), ("office-pc", 1_800_000_000));
        assert_eq!((&session.tier, session.carriers.len()), (&None, 0));

        drop(server);
        assert_eq!(status::ask(dir.path()).await.expect("asks"), []);
    }

    #[tokio::test]
    async fn a_socket_that_nobody_serves_is_removed() {
        let dir = tempfile::tempdir().expect("tempdir");
        let run = dir.path().join(RUN);
        create_private_dir(&run).expect("makes it");
        let path = run.join("1.sock");
        drop(UnixListener::bind(&path).expect("binds"));
        assert!(path.exists());
        assert_eq!(status::ask(dir.path()).await.expect("asks"), []);
        assert!(!path.exists());
    }
}
