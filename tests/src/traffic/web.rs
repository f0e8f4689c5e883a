//! A web server that tells what it was asked, for tests of what stands between it and a browser.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest::{Context, SHA256};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, LOCATION, SET_COOKIE, UPGRADE};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::hex;
use crate::lab::Host;

/// | path | what comes |
/// | --- | --- |
/// | `/upload` | length and SHA-256 of the request's body |
/// | `/events` | five events (`text/event-stream`), 100 ms apart |
/// | `/go/…` | a redirect to what stands behind |
/// | `/cookies` | cookies, good ones and bad |
/// | `/ws` | a WebSocket that sends back what it gets |
/// | `/slow` | a byte, and no more for a minute |
/// | `/silent` | nothing |
/// | others | the request's head |
pub struct WebServer {
    /// The port on the host's loopback.
    pub port: u16,
    /// SHA-256 of its certificate, `AB:CD:…`.
    pub certificate: Option<String>,
    heads: Arc<Mutex<Vec<String>>>,
    serving: JoinHandle<anyhow::Result<()>>,
}

type Answer = Response<BoxBody<Bytes, Infallible>>;

impl WebServer {
    /// Starts one on `host`.
    pub async fn start(host: &Host) -> anyhow::Result<Self> {
        Self::on(host, 0, false).await
    }

    /// One with a self-signed certificate of its own, on `port` (0: any).
    pub async fn start_tls(host: &Host, port: u16) -> anyhow::Result<Self> {
        Self::on(host, port, true).await
    }

    async fn on(host: &Host, port: u16, tls: bool) -> anyhow::Result<Self> {
        let heads: Arc<Mutex<Vec<String>>> = Arc::default();
        let (mut acceptor, mut certificate) = (None, None);
        if tls {
            let key = KeyPair::generate()?;
            let own = CertificateParams::new(vec!["router.example".to_owned()])?.self_signed(&key)?;
            let digest = aws_lc_rs::digest::digest(&SHA256, own.der());
            let hex = hex(&digest).to_uppercase();
            let pairs: Vec<&str> =
                hex.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap_or("")).collect();
            certificate = Some(pairs.join(":"));
            let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
            let config = rustls::ServerConfig::builder_with_provider(Arc::new(
                rustls::crypto::aws_lc_rs::default_provider(),
            ))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![own.der().clone()], key)?;
            acceptor = Some(TlsAcceptor::from(Arc::new(config)));
        }
        let (sender, listening) = tokio::sync::oneshot::channel();
        let seen = heads.clone();
        let serving = host.task(async move {
            let listener = TcpListener::bind(("127.0.0.1", port)).await?;
            let _ = sender.send(listener.local_addr()?.port());
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await?;
                let (seen, acceptor) = (seen.clone(), acceptor.clone());
                connections.spawn(async move {
                    let service = service_fn(move |request| answer(request, seen.clone()));
                    let server = hyper::server::conn::http1::Builder::new();
                    match acceptor {
                        Some(acceptor) => {
                            let stream = acceptor.accept(stream).await?;
                            server.serve_connection(TokioIo::new(stream), service).with_upgrades().await?;
                        }
                        None => {
                            server.serve_connection(TokioIo::new(stream), service).with_upgrades().await?
                        }
                    }
                    anyhow::Ok(())
                });
            }
        })?;
        Ok(Self { port: listening.await?, certificate, heads, serving })
    }

    /// The heads of all requests so far.
    pub fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Closes it, with all connections.
    pub async fn stop(self) {
        self.serving.abort();
        let _ = self.serving.await;
    }
}

async fn answer(mut request: Request<Incoming>, seen: Arc<Mutex<Vec<String>>>) -> Result<Answer, Infallible> {
    let mut head = format!("{} {}\n", request.method(), request.uri());
    for (name, value) in request.headers() {
        head.push_str(&format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes())));
    }
    seen.lock().unwrap_or_else(PoisonError::into_inner).push(head.clone());
    let mut answer = Response::new(full(String::new()));
    let path = request.uri().path().to_owned();
    match path.as_str() {
        "/upload" => {
            let (mut context, mut length) = (Context::new(&SHA256), 0);
            while let Some(Ok(frame)) = request.body_mut().frame().await {
                if let Some(bytes) = frame.data_ref() {
                    context.update(bytes);
                    length += bytes.len();
                }
            }
            *answer.body_mut() = full(format!("{length} {}", hex(&context.finish())));
        }
        "/events" => {
            let events = futures_util::stream::unfold(0, |number| async move {
                tokio::time::sleep(Duration::from_millis(100)).await;
                let event = Bytes::from(format!("data: {number}\n\n"));
                (number < 5).then(|| (Ok(Frame::data(event)), number + 1))
            });
            *answer.body_mut() = BodyExt::boxed(StreamBody::new(events));
            answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        }
        "/slow" => {
            let bytes = futures_util::stream::unfold(0, |number| async move {
                tokio::time::sleep(Duration::from_secs(number * 60)).await;
                Some((Ok(Frame::data(Bytes::from_static(b"x"))), number + 1))
            });
            *answer.body_mut() = BodyExt::boxed(StreamBody::new(bytes));
        }
        "/silent" => std::future::pending::<()>().await,
        "/cookies" => {
            for cookie in
                ["a=1; Path=/; Domain=example.org", "__Host-adit=evil; Path=/; Secure", "b=2; HttpOnly"]
            {
                answer.headers_mut().append(SET_COOKIE, HeaderValue::from_static(cookie));
            }
        }
        "/ws" => {
            let key = request.headers().get("sec-websocket-key").map(|key| derive_accept_key(key.as_bytes()));
            let upgrading = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let stream = TokioIo::new(upgrading.await?);
                let mut socket = WebSocketStream::from_raw_socket(stream, Role::Server, None).await;
                while let Some(Ok(message)) = socket.next().await {
                    if message.is_text() || message.is_binary() {
                        socket.send(message).await?;
                    }
                }
                anyhow::Ok(())
            });
            *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            let headers = answer.headers_mut();
            headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
            headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
            if let Some(Ok(accept)) = key.map(HeaderValue::try_from) {
                headers.insert("sec-websocket-accept", accept);
            }
        }
        _ => match request.uri().path_and_query().and_then(|path| path.as_str().strip_prefix("/go/")) {
            Some(place) => {
                *answer.status_mut() = StatusCode::FOUND;
                if let Ok(place) = HeaderValue::try_from(place) {
                    answer.headers_mut().insert(LOCATION, place);
                }
            }
            None => *answer.body_mut() = full(head),
        },
    }
    Ok(answer)
}

fn full(text: String) -> BoxBody<Bytes, Infallible> {
    Full::new(Bytes::from(text)).boxed()
}
