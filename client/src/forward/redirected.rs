//! TCP to a port of the redirector: no tunnel, a connection there for each one here.

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::tcp::accept;
use crate::copy::abort;
use crate::dial;
use crate::events::complain;

/// Accepts connections until it is dropped.
pub(super) async fn serve(listener: TcpListener, server: String) {
    let mut connections = JoinSet::new();
    loop {
        let tcp = accept(&listener, &mut connections).await;
        connections.spawn(pass(tcp, server.clone()));
    }
}

async fn pass(mut tcp: TcpStream, server: String) {
    match dial::tcp(&server).await {
        Ok(mut remote) => {
            // What broke is broken at both ends: a reset, and not an end of file.
            if copy_bidirectional(&mut tcp, &mut remote).await.is_err() {
                abort(&tcp);
                abort(&remote);
            }
        }
        Err(error) => {
            complain(&format!("the redirector's port {server} cannot be reached: {error}"));
            abort(&tcp);
        }
    }
}
