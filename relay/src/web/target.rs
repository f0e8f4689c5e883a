//! The target of a session that serves pages: connections to it through the tunnel, kept for the next request.

use std::error::Error as StdError;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use ::aws_lc_rs::digest::{SHA256, digest};
use adit_client::known::fingerprint;
use adit_client::tunnel::{StreamError, Tunnel, TunnelStream};
use adit_protocol::Target;
use adit_protocol::frame::ResetCode;
use bytes::Bytes;
use http::{Method, Request, Response, Uri};
use http_body_util::{Either, Empty};
use hyper::body::{Body, Incoming};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, OtherError, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// How long the target may take to accept a connection; and, for TLS, to shake hands.
const CONNECT: Duration = Duration::from_secs(10);
/// Connections that may wait for the next request. Many servers close one after 5 s.
const IDLE: usize = 64;
const IDLE_FOR: Duration = Duration::from_secs(4);

/// What is buffered of a target's answer.
const BUFFER: usize = 64 * 1024;
/// How long the agent may be away before a request that waits for an answer is told so.
const AWAY: Duration = Duration::from_secs(15);
/// How long a target may think about an answer: longer than any page that waits for news.
const SILENT: Duration = Duration::from_secs(5 * 60);

/// What is sent to a target.
pub(super) type Sent = Either<Incoming, Empty<Bytes>>;

/// A SHA-256 of a certificate (DER).
pub type Fingerprint = [u8; 32];

/// Where requests go.
pub struct WebTarget {
    way: Way,
    client: Client<Way, Sent>,
}

/// Which of the two legs behind the server failed, and how.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct Failure {
    /// Which.
    pub leg: Leg,
    /// For people.
    pub what: String,
    /// Nobody said no: it could not be reached.
    pub unreachable: bool,
}

/// The two legs behind the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leg {
    /// From the server to the agent.
    Agent,
    /// From the agent to the target.
    Target,
}

impl WebTarget {
    /// `target` at the other end of `tunnel`. With `tls`: whose certificate is `known`, or, without that, the one that it
    /// shows first.
    ///
    /// # Errors
    /// When rustls does not take the configuration.
    pub fn new(
        tunnel: Tunnel,
        target: Target,
        tls: bool,
        known: Option<Fingerprint>,
    ) -> Result<Self, rustls::Error> {
        let tls = tls.then(|| Tls::new(target.host(), known)).transpose()?;
        let way = Way(Arc::new(Ends { tunnel, target, tls }));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_FOR)
            .pool_max_idle_per_host(IDLE)
            .set_host(false)
            // Small servers in printers and the like compare names as they are usually written.
            .http1_title_case_headers(true)
            .http1_max_headers(200)
            .http1_max_buf_size(BUFFER)
            .build(way.clone());
        Ok(Self { way, client })
    }

    /// Tries it once. Returns the certificate of one that speaks TLS.
    ///
    /// # Errors
    /// [`Failure`].
    pub async fn probe(&self) -> Result<Option<Fingerprint>, Failure> {
        self.way.0.connect().await?;
        Ok(self.way.0.tls.as_ref().and_then(|tls| tls.pinned.known.get().copied()))
    }

    /// Sends a request and returns the answer's head.
    ///
    /// # Errors
    /// [`Failure`].
    pub(super) async fn send(&self, request: Request<Incoming>) -> Result<Response<Incoming>, Failure> {
        // An upload takes its time.
        let asks_only = request.body().is_end_stream();
        tokio::select! {
            answer = self.ask(request) => answer,
            failure = self.way.0.away() => Err(failure),
            () = sleep(SILENT), if asks_only => Err(self.way.0.late("did not answer", SILENT)),
        }
    }

    async fn ask(&self, request: Request<Incoming>) -> Result<Response<Incoming>, Failure> {
        let (parts, body) = request.into_parts();
        let repeats =
            [Method::GET, Method::HEAD, Method::OPTIONS].contains(&parts.method) && body.is_end_stream();
        let failed = |error: &Error| self.way.0.failure(error);
        if !repeats {
            let sent = self.client.request(Request::from_parts(parts, Either::Left(body))).await;
            return sent.inspect(has_answered).map_err(|error| failed(&error));
        }
        let ask = |parts| self.client.request(Request::from_parts(parts, Either::Right(Empty::new())));
        let answer = match ask(parts.clone()).await {
            // A kept connection was closed at the same moment: nobody knows whether the request was read, and this one may
            // be read twice (RFC 9110 section 9.2.2).
            Err(error) if was_kept(&error) => ask(parts).await,
            done => done,
        };
        answer.inspect(has_answered).map_err(|error| failed(&error))
    }
}

/// How to reach the target.
#[derive(Clone)]
struct Way(Arc<Ends>);

struct Ends {
    tunnel: Tunnel,
    target: Target,
    tls: Option<Tls>,
}

struct Tls {
    connector: TlsConnector,
    name: ServerName<'static>,
    pinned: Arc<Pinned>,
}

impl Tls {
    fn new(host: &str, known: Option<Fingerprint>) -> Result<Self, rustls::Error> {
        // As wide as it gets: what is behind there may be old, and it is known by its certificate.
        let provider = aws_lc_rs::default_provider();
        let pinned = Arc::new(Pinned::new(&provider, known));
        let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(pinned.clone())
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // A name with an underscore is none to rustls: its place is held, and not sent.
        let name = ServerName::try_from(host.to_owned()).ok();
        config.enable_sni = name.is_some();
        let name = name.unwrap_or(ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into()));
        Ok(Self { connector: TlsConnector::from(Arc::new(config)), name, pinned })
    }
}

impl Ends {
    async fn connect(&self) -> Result<ToTarget, Failure> {
        let opening = async {
            let stream = self.tunnel.open(&self.target).await?;
            stream.opened().await?;
            Ok(stream)
        };
        let stream = match timeout(CONNECT, opening).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(self.of_stream(error)),
            Err(_) if !self.is_there() => return Err(self.gone()),
            Err(_) => return Err(self.late("did not answer", CONNECT)),
        };
        let Some(tls) = &self.tls else { return Ok(ToTarget::Plain(stream)) };
        match timeout(CONNECT, tls.connector.connect(tls.name.clone(), stream)).await {
            Ok(Ok(stream)) => Ok(ToTarget::Tls(Box::new(stream))),
            Ok(Err(error)) => Err(self.of_io(&error)),
            Err(_) => Err(self.late("did not finish its TLS handshake", CONNECT)),
        }
    }

    /// Whether there is a way to the agent.
    fn is_there(&self) -> bool {
        self.tunnel.carriers().iter().any(|carrier| carrier.ready && !carrier.silent)
    }

    /// Completes when there has been none for a while.
    async fn away(&self) -> Failure {
        let mut since = Instant::now();
        loop {
            sleep(Duration::from_secs(1)).await;
            if self.is_there() {
                since = Instant::now();
            } else if since.elapsed() >= AWAY {
                return self.gone();
            }
        }
    }

    fn gone(&self) -> Failure {
        let why = self.tunnel.trouble().unwrap_or_else(|| "nothing comes from it".to_owned());
        Failure { leg: Leg::Agent, what: format!("the agent cannot be reached: {why}"), unreachable: true }
    }

    fn late(&self, what: &str, waited: Duration) -> Failure {
        let what = format!("{}: it {what} within {} s", self.target, waited.as_secs());
        Failure { leg: Leg::Target, what, unreachable: true }
    }

    fn of_stream(&self, error: StreamError) -> Failure {
        use ResetCode::{Aborted, NotAllowed, NotFound, Refused, Unreachable};
        let leg = match error {
            StreamError::Reset(Aborted | Refused | Unreachable | NotFound) => Leg::Target,
            _ => Leg::Agent,
        };
        let unreachable = error != StreamError::Reset(NotAllowed);
        Failure { leg, what: format!("{}: {error}", self.target), unreachable }
    }

    fn of_io(&self, error: &io::Error) -> Failure {
        let inner = error.get_ref();
        if let Some(error) = inner.and_then(|inner| inner.downcast_ref::<StreamError>()) {
            return self.of_stream(*error);
        }
        let mut unreachable = true;
        let what = match inner.and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(other))))
                if other.is::<Changed>() =>
            {
                unreachable = false;
                other.to_string()
            }
            Some(error) => format!("its TLS does not fit ours: {error}"),
            None => format!("it broke off: {error}"),
        };
        Failure { leg: Leg::Target, what: format!("{}: {what}", self.target), unreachable }
    }

    fn failure(&self, error: &(dyn StdError + 'static)) -> Failure {
        let mut cause = Some(error);
        let mut innermost = error;
        while let Some(error) = cause {
            if let Some(failure) = error.downcast_ref::<Failure>() {
                return failure.clone();
            }
            if let Some(error) = error.downcast_ref::<StreamError>() {
                return self.of_stream(*error);
            }
            if let Some(error) = error.downcast_ref::<io::Error>()
                && error.get_ref().is_some()
            {
                return self.of_io(error);
            }
            innermost = error;
            cause = error.source();
        }
        let what = format!("{}: it does not answer as a web server does: {innermost}", self.target);
        Failure { leg: Leg::Target, what, unreachable: true }
    }
}

/// Whether a connection has brought an answer already.
#[derive(Debug, Clone, Default)]
struct Answered(Arc<AtomicBool>);

fn has_answered(response: &Response<Incoming>) {
    if let Some(answered) = response.extensions().get::<Answered>() {
        answered.0.store(true, Relaxed);
    }
}

/// Whether a request failed because a connection that was kept had ended.
fn was_kept(error: &Error) -> bool {
    let mut extensions = http::Extensions::new();
    if let Some(connection) = error.connect_info() {
        connection.get_extras(&mut extensions);
    }
    let source = error.source().and_then(|source| source.downcast_ref::<hyper::Error>());
    source.is_some_and(|error| error.is_incomplete_message() || error.is_closed() || error.is_canceled())
        && extensions.get::<Answered>().is_some_and(|answered| answered.0.load(Relaxed))
}

impl tower_service::Service<Uri> for Way {
    type Response = TokioIo<ToTarget>;
    type Error = Failure;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Failure>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let ends = self.0.clone();
        Box::pin(async move { ends.connect().await.map(TokioIo::new) })
    }
}

/// A connection to the target.
enum ToTarget {
    Plain(TunnelStream),
    Tls(Box<TlsStream<TunnelStream>>),
}

impl Connection for ToTarget {
    fn connected(&self) -> Connected {
        Connected::new().extra(Answered::default())
    }
}

impl AsyncRead for ToTarget {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for ToTarget {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// Takes one certificate only. Who vouches for it is not asked: beside the agent that is mostly nobody.
#[derive(Debug)]
struct Pinned {
    known: OnceLock<Fingerprint>,
    algorithms: WebPkiSupportedAlgorithms,
}

/// Another certificate than the one that is known.
#[derive(Debug, thiserror::Error)]
#[error(
    "its certificate is not SHA-256 {}, which is known; if the new one is right: --certificate {}",
    fingerprint(.known),
    fingerprint(.shown)
)]
struct Changed {
    known: Fingerprint,
    shown: Fingerprint,
}

impl Pinned {
    fn new(provider: &CryptoProvider, known: Option<Fingerprint>) -> Self {
        Self {
            known: known.map(OnceLock::from).unwrap_or_default(),
            algorithms: provider.signature_verification_algorithms,
        }
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let mut shown = Fingerprint::default();
        shown.copy_from_slice(digest(&SHA256, certificate).as_ref());
        let known = *self.known.get_or_init(|| shown);
        if known != shown {
            let other = OtherError(Arc::new(Changed { known, shown }));
            return Err(rustls::Error::InvalidCertificate(CertificateError::Other(other)));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
