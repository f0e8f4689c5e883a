//! Pages for a browser: under a host name of the session's own, or on a port.

use std::convert::Infallible;
use std::future::pending;
use std::net::SocketAddr;
use std::sync::Arc;

use adit_client::copy::abort;
use adit_client::dial::tune;
use prometheus_client::metrics::counter::Counter;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::listen;
use crate::web::site::{Parts, Site};
use crate::web::{Published, Web};

/// Connections on a port at once: more than any browser opens; and of those from networks that have shown nothing yet.
const CONNECTIONS: usize = 512;
const UNKNOWN: usize = 16;

/// The pages of one session. Dropped, nothing of them is there any more.
pub(super) enum Pages {
    Named(Published),
    OnPort { web: Arc<Web>, listener: TcpListener, site: Arc<Site>, path: String },
}

impl Pages {
    pub(super) fn on_port(web: Arc<Web>, listener: TcpListener, parts: Parts) -> Self {
        let (site, path) = web.on_port(parts);
        Self::OnPort { web, listener, site, path }
    }

    /// The host name; empty where it is the server's.
    pub(super) fn host(&self) -> &str {
        match self {
            Self::Named(published) => &published.host,
            Self::OnPort { .. } => "",
        }
    }

    /// Path of the link.
    pub(super) fn path(&self) -> &str {
        match self {
            Self::Named(published) => &published.path,
            Self::OnPort { path, .. } => path,
        }
    }

    /// Serves them for as long as this is awaited.
    pub(super) async fn serve(&mut self, turned_away: &Counter) -> Infallible {
        // Names are served with the HTTPS port.
        let Self::OnPort { web, listener, site, .. } = self else { return pending().await };
        let mut connections = JoinSet::new();
        let unknown = Arc::new(Semaphore::new(UNKNOWN));
        loop {
            tokio::select! {
                (tcp, from) = listen::accept(listener) => {
                    let from = SocketAddr::new(from.ip().to_canonical(), from.port());
                    // Of the other IP version anybody might be the one: a few at a time.
                    let place = if site.is_of(from.ip()) { Ok(None) } else { unknown.clone().try_acquire_owned().map(Some) };
                    if let Ok(place) = place
                        && site.is_for(from.ip())
                        && connections.len() < CONNECTIONS
                    {
                        tune(&tcp);
                        let (web, site) = (web.clone(), site.clone());
                        connections.spawn(async move {
                            web.serve_port(tcp, site, from).await;
                            drop(place);
                        });
                    } else {
                        turned_away.inc();
                        abort(&tcp);
                    }
                }
                Some(_) = connections.join_next() => {}
            }
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if let Self::OnPort { site, .. } = self {
            site.close();
        }
    }
}
