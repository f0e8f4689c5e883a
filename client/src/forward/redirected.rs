//! TCP to a port of the redirector: no tunnel, a connection there for each one here.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64, AtomicUsize};

use tokio::io::{AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::io::InspectReader;

use super::tcp::accept;
use crate::copy::abort;
use crate::dial;
use crate::events::complain;

/// What has gone through a port of the redirector.
#[derive(Debug, Default)]
pub struct Traffic {
    open: AtomicUsize,
    sent: AtomicU64,
    received: AtomicU64,
}

impl Traffic {
    /// Connections that are open, bytes sent, bytes received.
    pub fn counted(&self) -> (usize, u64, u64) {
        (self.open.load(Relaxed), self.sent.load(Relaxed), self.received.load(Relaxed))
    }
}

/// Accepts connections until it is dropped.
pub(super) async fn serve(listener: TcpListener, server: String, traffic: Arc<Traffic>) {
    let mut connections = JoinSet::new();
    loop {
        let tcp = accept(&listener, &mut connections).await;
        connections.spawn(pass(tcp, server.clone(), traffic.clone()));
    }
}

async fn pass(mut tcp: TcpStream, server: String, traffic: Arc<Traffic>) {
    match dial::tcp(&server).await {
        Ok(mut remote) => {
            let _open = Open::new(&traffic);
            // What broke is broken at both ends: a reset, and not an end of file.
            if both(&mut tcp, &mut remote, &traffic).await.is_err() {
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

/// A connection, while it is open.
struct Open<'a>(&'a Traffic);

impl<'a> Open<'a> {
    fn new(traffic: &'a Traffic) -> Self {
        traffic.open.fetch_add(1, Relaxed);
        Self(traffic)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
    }
}

async fn both(tcp: &mut TcpStream, remote: &mut TcpStream, traffic: &Traffic) -> io::Result<()> {
    let (ours, mut to_us) = tcp.split();
    let (theirs, mut to_them) = remote.split();
    let sending = async {
        let counted = |bytes: &[u8]| {
            traffic.sent.fetch_add(bytes.len() as u64, Relaxed);
        };
        copy(&mut InspectReader::new(ours, counted), &mut to_them).await?;
        to_them.shutdown().await
    };
    let receiving = async {
        let counted = |bytes: &[u8]| {
            traffic.received.fetch_add(bytes.len() as u64, Relaxed);
        };
        copy(&mut InspectReader::new(theirs, counted), &mut to_us).await?;
        to_us.shutdown().await
    };
    tokio::try_join!(sending, receiving).map(drop)
}
