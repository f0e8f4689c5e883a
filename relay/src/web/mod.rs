//! The redirector's pages: a browser with nothing installed reaches a web server beside an agent.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`strict`], `guarded` | what of a browser's bytes an HTTP server gets to read |
//! | [`site`] | one session: who may ask, and what becomes of a request |
//! | [`headers`] | what changes in the headers on their way |
//! | [`target`] | connections to the web server, through the tunnel |
//! | `page` | the pages of ours |
//!
//! Each session is an origin of its own: a host name with a label that nobody can guess, or a port where the operator has
//! no wildcard name. Without a session's cookie nothing is here, for everybody and in the same words.

mod guarded;
pub mod headers;
mod page;
pub mod site;
pub mod strict;
pub mod target;

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::CONNECTION;
use http::{HeaderValue, Request, Response};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::{Notify, Semaphore};
use tokio::time::{Instant, timeout};
use tokio_rustls::StartHandshake;

use crate::certificates::Certificates;
use crate::penalty::network;
use crate::{Visit, listen};
use guarded::{Guarded, Watch};
use site::{Parts, Site, asks_for_websocket};

/// The protocol that is spoken with browsers (RFC 7301 section 6).
pub const ALPN_HTTP: &[u8] = b"http/1.1";
/// From a connection's ClientHello to a request that shows a link or a cookie.
const SHOWN: Duration = Duration::from_secs(5);
/// How long a browser may be silent between requests, and take for a head.
const SILENT: Duration = Duration::from_secs(75);
/// Networks of ended sessions that are remembered, and for how long.
const LATELY: usize = 4096;
const LATELY_FOR: Duration = Duration::from_secs(60 * 60);
/// Connections of programs that use the API.
const SCRIPTS: usize = 256;
/// What an HTTP server buffers of a connection: more than the longest head.
const BUFFER: usize = 64 * 1024;

/// What a server shows browsers on its HTTPS port.
pub struct Web {
    tls: Arc<ServerConfig>,
    domain: Option<Domain>,
    sites: Mutex<HashMap<String, Arc<Site>>>,
    /// Networks of sessions that have ended, and until when a page that is still open there is no offence.
    lately: Mutex<HashMap<IpAddr, Instant>>,
    api: OnceLock<Arc<dyn Api>>,
    /// Connections of browsers to all sessions: other doors need descriptors, too.
    browsers: Arc<Semaphore>,
    /// Connections to the API.
    scripts: Arc<Semaphore>,
}

/// What programs may ask for on the HTTPS port, beside a session's own name.
pub trait Api: Send + Sync {
    /// Answers a request; calls `admitted` as soon as it has shown who it is. `None`: it has not, or asks for nothing that
    /// is here. It may not tell which.
    fn answer<'a>(
        &'a self,
        request: Request<Incoming>,
        from: SocketAddr,
        admitted: &'a (dyn Fn() + Send + Sync),
    ) -> ApiAnswer<'a>;
}

/// See [`Api::answer`].
pub type ApiAnswer<'a> = Pin<Box<dyn Future<Output = Option<Response<Full<Bytes>>>> + Send + 'a>>;

/// A domain whose names all lead here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain {
    /// Its name; each session has one below it.
    pub name: String,
    /// Where it is served.
    pub port: u16,
}

impl Web {
    /// Shows these certificates. Without a domain each session has a port.
    ///
    /// # Errors
    /// When rustls does not take the configuration.
    pub fn new(certificates: Arc<Certificates>, domain: Option<Domain>) -> Result<Arc<Self>, rustls::Error> {
        let mut tls = ServerConfig::builder_with_provider(adit_client::tls::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_cert_resolver(certificates);
        tls.alpn_protocols = vec![ALPN_HTTP.to_vec()];
        let domain = domain.map(|domain| Domain { name: domain.name.to_ascii_lowercase(), ..domain });
        Ok(Arc::new(Self {
            tls: Arc::new(tls),
            domain,
            sites: Mutex::default(),
            lately: Mutex::default(),
            browsers: Arc::new(Semaphore::new(listen::descriptors() / 4)),
            api: OnceLock::new(),
            scripts: Arc::new(Semaphore::new(SCRIPTS)),
        }))
    }

    /// Serves this API, too: once.
    pub fn set_api(&self, api: Arc<dyn Api>) {
        let _ = self.api.set(api);
    }

    /// The domain, where there is one.
    pub fn domain(&self) -> Option<&Domain> {
        self.domain.as_ref()
    }

    /// A site with a host name of its own, until what is returned is dropped.
    pub(crate) fn publish(self: &Arc<Self>, domain: &Domain, parts: Parts) -> Published {
        let label = site::secret();
        let host = format!("{label}.{}", domain.name);
        let own = if domain.port == 443 { host.clone() } else { format!("{host}:{}", domain.port) };
        let (site, path) = Site::new(parts, HeaderValue::try_from(own).ok(), self.browsers.clone());
        self.sites().insert(label.clone(), site);
        Published { web: self.clone(), label, host, path }
    }

    /// The site that a ClientHello names.
    fn named(&self, name: Option<&str>) -> Option<Arc<Site>> {
        let (label, domain) = name?.split_once('.')?;
        let ours = self.domain.as_ref().is_some_and(|ours| ours.name.eq_ignore_ascii_case(domain));
        ours.then(|| self.sites().get(&label.to_ascii_lowercase()).cloned())?
    }

    /// Serves a connection on the HTTPS port to its end. False: it has never shown anything that is valid.
    pub async fn serve(&self, hello: StartHandshake<TcpStream>, from: SocketAddr, visit: Visit) -> bool {
        let site = self.named(hello.client_hello().server_name());
        let api = self.api.get().filter(|_| site.is_none()).cloned();
        self.serve_site(hello, site, api, from, Some(visit)).await || self.is_known(from.ip())
    }

    /// A browser opens more connections than it uses, and closes them.
    fn is_known(&self, from: IpAddr) -> bool {
        let lately = |until: &Instant| *until > Instant::now();
        self.sites().values().any(|site| site.is_of(from))
            || self.lately().get(&network(from)).is_some_and(lately)
    }

    /// What is open in a browser there asks on for a while.
    fn ended(&self, site: &Site) {
        let now = Instant::now();
        let mut lately = self.lately();
        lately.retain(|_, until| *until > now);
        if lately.len() < LATELY {
            lately.extend(site.networks().into_iter().map(|network| (network, now + LATELY_FOR)));
        }
    }

    fn lately(&self) -> MutexGuard<'_, HashMap<IpAddr, Instant>> {
        self.lately.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A site with a port of its own, and the path of its link.
    pub(crate) fn on_port(&self, parts: Parts) -> (Arc<Site>, String) {
        Site::new(parts, None, self.browsers.clone())
    }

    /// Serves one on a port that is a site's own.
    pub(crate) async fn serve_port(&self, stream: TcpStream, site: Arc<Site>, from: SocketAddr) {
        let hello = tokio_rustls::LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream);
        if let Ok(Ok(hello)) = timeout(SHOWN, hello).await {
            self.serve_site(hello, Some(site), None, from, None).await;
        }
    }

    async fn serve_site(
        &self,
        hello: StartHandshake<TcpStream>,
        site: Option<Arc<Site>>,
        api: Option<Arc<dyn Api>>,
        from: SocketAddr,
        mut visit: Option<Visit>,
    ) -> bool {
        let guest = Guest {
            site,
            api,
            from,
            shown: AtomicBool::new(false),
            told: Notify::new(),
            watch: Arc::default(),
        };
        let driven_out = async {
            match &mut visit {
                Some(visit) => visit.driven_out().await,
                None => std::future::pending().await,
            }
        };
        let showing = async {
            let stream = hello.into_stream(self.tls.clone()).await.ok()?;
            let io = TokioIo::new(Guarded::new(stream, guest.watch.clone()));
            let mut server = http1::Builder::new();
            server.auto_date_header(false).max_buf_size(BUFFER).max_headers(strict::MAX_FIELDS + 1);
            server.timer(TokioTimer::new()).header_read_timeout(SILENT);
            let serve = |request| {
                let guest = &guest;
                async move { Ok::<_, Infallible>(guest.answer(request).await) }
            };
            let mut connection = Box::pin(server.serve_connection(io, service_fn(serve)).with_upgrades());
            tokio::select! {
                _ = &mut connection => None,
                () = guest.told.notified() => Some(connection),
            }
        };
        let connection = tokio::select! {
            shown = timeout(SHOWN, showing) => shown.ok().flatten(),
            () = driven_out => None,
        };
        // It is no longer one of the crowd at the door.
        drop(visit);
        if let Some(connection) = connection {
            // More than any browser opens, and any script needs.
            let places = guest.site.as_ref().map_or(&self.scripts, |site| &site.connections);
            let Ok(_place) = places.clone().try_acquire_owned() else { return true };
            let Ok(_descriptor) = self.browsers.clone().try_acquire_owned() else { return true };
            let over = async {
                match &guest.site {
                    Some(site) => site.closed.cancelled().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = connection => {}
                () = over => {}
            }
        }
        guest.shown.load(Ordering::Relaxed)
    }

    fn sites(&self) -> MutexGuard<'_, HashMap<String, Arc<Site>>> {
        self.sites.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A site with a host name. Dropped, nothing is there any more.
pub(crate) struct Published {
    web: Arc<Web>,
    label: String,
    /// Its host name.
    pub(crate) host: String,
    /// Path of the link.
    pub(crate) path: String,
}

impl Drop for Published {
    fn drop(&mut self) {
        if let Some(site) = self.web.sites().remove(&self.label) {
            self.web.ended(&site);
            site.close();
        }
    }
}

/// Somebody's connection.
struct Guest {
    site: Option<Arc<Site>>,
    api: Option<Arc<dyn Api>>,
    from: SocketAddr,
    /// It has shown a link or a cookie.
    shown: AtomicBool,
    told: Notify,
    watch: Arc<Watch>,
}

impl Guest {
    /// It has shown that it may be here.
    fn admit(&self) {
        self.shown.store(true, Ordering::Relaxed);
        self.told.notify_one();
    }

    async fn answer(&self, mut request: Request<Incoming>) -> page::Answer {
        let from = self.from.ip();
        let switching = asks_for_websocket(request.headers());
        let mut switch = switching.then(|| hyper::upgrade::on(&mut request));
        let mut answer = match (&self.site, &self.api) {
            (Some(site), _) => match site.admit(&request, from, switching) {
                Some(admitted) => {
                    self.admit();
                    site.answer(request, admitted, from, &mut switch, &self.watch).await
                }
                None => page::nothing(),
            },
            (None, Some(api)) => {
                let answer = api.answer(request, self.from, &|| self.admit()).await;
                answer.map_or_else(page::nothing, |answer| answer.map(Either::Right))
            }
            (None, None) => page::nothing(),
        };
        if let Some(switch) = switch {
            // It goes no further. What stands behind the wish was not looked at.
            answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            tokio::spawn(async move {
                if let Ok(connection) = switch.await {
                    let _ = TokioIo::new(connection).shutdown().await;
                }
            });
        }
        answer
    }
}
