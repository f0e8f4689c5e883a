//! TCP: one stream for each accepted connection.

use std::io;
use std::time::Duration;

use std::sync::Arc;

use adit_protocol::Target;
use adit_protocol::frame::ResetCode;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tracing::warn;

use super::complaint::Complaints;
use crate::copy::{abort, copy};
use crate::dial::tune;
use crate::tunnel::{StreamError, Tunnel, TunnelStream};

/// Pause after an error that the next accept would meet again, such as too few descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Accepts connections until the session is over. While as many streams as may be are open, further
/// connections wait in the system's queue.
pub(super) async fn serve(listener: TcpListener, target: Target, tunnel: Tunnel) {
    let complaints = Arc::new(Complaints::default());
    let mut connections = JoinSet::new();
    loop {
        let tcp = accept(&listener, &mut connections).await;
        let stream = match tunnel.open(&target).await {
            Ok(stream) => stream,
            Err(_) => {
                abort(&tcp);
                return;
            }
        };
        connections.spawn(pass(tcp, stream, target.clone(), complaints.clone()));
    }
}

/// The next connection. Meanwhile the tasks of earlier ones end.
pub(super) async fn accept(listener: &TcpListener, connections: &mut JoinSet<()>) -> TcpStream {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((tcp, _)) => {
                tune(&tcp);
                return tcp;
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Copies between a local connection and its stream, and says how that failed.
pub(super) async fn pass(tcp: TcpStream, stream: TunnelStream, target: Target, complaints: Arc<Complaints>) {
    match copy(tcp, stream).await {
        // Closed by the application at the other end, or with the session: that is said elsewhere.
        Ok(())
        | Err(StreamError::Closed | StreamError::Reset(ResetCode::Aborted | ResetCode::SessionEnded)) => {}
        Err(error) => complaints.say(&target, error),
    }
}

/// The connection was gone before it was accepted; the next one is not concerned.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}
