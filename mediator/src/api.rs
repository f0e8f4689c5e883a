//! The API on the HTTPS port, for scripts: JSON over HTTP/1.1, with a technician's bearer token (`adit api-token`).
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /api/v1/agents` | `[{"id", "name", "tags", "online", "last_seen", "software"}]` |
//! | `POST /api/v1/redirect` `{"agent", "target", "source", "ttl", "certificate"}` | `{"session", "address", "link", "certificate", "source", "expires"}` |
//! | `DELETE /api/v1/sessions/SESSION` | nothing (204) |
//!
//! `target` is what `adit redirect` takes, `ttl` is in seconds (default 600), `source` (default: where the request comes
//! from) and `certificate` (SHA-256) may be left out. Errors are `{"error": "…"}` with 400, 403, 404 (no such agent), 502 (agent or target
//! cannot be reached) or 503. Without a valid token nothing is here: the same 404 as for everybody.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use adit_client::identity::Peer;
use adit_client::identity::verify::GRACE;
use adit_client::known;
use adit_client::place::Place;
use adit_protocol::api::ApiToken;
use adit_protocol::control::{Closed, Redirect, RefusedCode};
use adit_protocol::{DeviceId, Protocol, Role, SessionId};
use adit_relay::web;
use bytes::Bytes;
use http::header::{AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::broker::{Broker, Denied};
use crate::organisation::unix_now;
use crate::presence::{Arrival, Channel};

/// The longest request body, in bytes.
const MAX_BODY: usize = 16 * 1024;
/// How long a port is open when nothing is said, in seconds.
const TIME: u64 = 600;

/// How long a request's body may take.
const BODY: Duration = Duration::from_secs(10);
/// Refusals of one device in an hour; each is a line of the audit log.
const MAX_REFUSALS: u64 = 100;
const HOUR: Duration = Duration::from_secs(60 * 60);

/// See the module.
#[derive(Clone)]
pub struct Api {
    broker: Arc<Broker>,
    /// Since when devices were refused, and how often.
    refusals: Arc<Mutex<HashMap<DeviceId, (Instant, u64)>>>,
}

/// A wish for a door of the redirector.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wish {
    agent: String,
    target: String,
    #[serde(default)]
    source: String,
    ttl: Option<u64>,
    certificate: Option<String>,
}

/// An answer.
struct Said {
    status: StatusCode,
    body: Option<Value>,
    /// The session that it tells of.
    session: Option<SessionId>,
}

impl Said {
    fn new(status: StatusCode, body: Option<Value>) -> Self {
        Self { status, body, session: None }
    }
}

impl Api {
    /// Of this broker.
    pub fn new(broker: Arc<Broker>) -> Self {
        Self { broker, refusals: Arc::default() }
    }

    /// The technician whose token this is, as if on a channel from there.
    fn technician(&self, authorization: Option<&HeaderValue>, from: SocketAddr) -> Option<Channel> {
        let (scheme, token) = authorization?.to_str().ok()?.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let mut found = None;
        let key_of = |id| {
            let device = self
                .broker
                .directory
                .get(id)
                .filter(|device| device.role == Role::Technician && device.revoked == 0);
            found = device;
            found.as_ref().and_then(|device| device.public_key[..].try_into().ok())
        };
        ApiToken::verify(token, key_of, unix_now()).ok()?;
        let device = found?;
        let certificate = Peer::from_certificate(&device.certificate).ok()?;
        // As on control channels.
        if certificate.not_after + GRACE.as_secs() < unix_now() {
            return None;
        }
        // What is sent there, nobody reads: there is no channel.
        let (outgoing, _) = mpsc::channel(1);
        Some(self.broker.presence.channel(Arrival { device, certificate, from, instance: 0 }, outgoing))
    }

    async fn answer(&self, request: Request<Incoming>, channel: &Channel) -> Option<Said> {
        let path = request.uri().path().to_owned();
        match (request.method(), path.as_str()) {
            (&Method::GET, "/api/v1/agents") => Some(self.agents(channel)),
            (&Method::POST, "/api/v1/redirect") => Some(self.redirect(request, channel).await),
            (&Method::DELETE, path) => {
                let id: SessionId = path.strip_prefix("/api/v1/sessions/")?.parse().ok()?;
                self.end(id, channel, "closed by the technician").await;
                Some(Said::new(StatusCode::NO_CONTENT, None))
            }
            _ => None,
        }
    }

    async fn end(&self, id: SessionId, channel: &Channel, reason: &str) {
        let session = id.0.to_vec();
        let closed = Closed { session, reason: reason.to_owned(), bytes_sent: 0, bytes_received: 0 };
        self.broker.closed(&channel.device, closed).await;
    }

    /// Whether this device was refused too often; `refused`: once more.
    fn is_refused_often(&self, device: DeviceId, refused: bool) -> bool {
        let mut all = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, (since, _)| since.elapsed() < HOUR);
        if refused {
            all.entry(device).or_insert((Instant::now(), 0)).1 += 1;
        }
        all.get(&device).is_some_and(|(_, count)| *count >= MAX_REFUSALS)
    }

    fn agents(&self, channel: &Channel) -> Said {
        let agents = match self.broker.list(&channel.device) {
            Ok(agents) => agents,
            Err(denied) => return refused(&denied),
        };
        let told = agents.iter().map(|agent| {
            json!({
                "id": DeviceId::try_from(&agent.device[..]).ok().map(|id| id.to_string()),
                "name": agent.name,
                "tags": agent.tags,
                "online": agent.online,
                "last_seen": agent.last_seen,
                "software": agent.software,
            })
        });
        Said::new(StatusCode::OK, Some(told.collect()))
    }

    async fn redirect(&self, request: Request<Incoming>, channel: &Channel) -> Said {
        if self.is_refused_often(channel.device.id, false) {
            return failed(StatusCode::SERVICE_UNAVAILABLE, "refused too often: try again in an hour");
        }
        let body = timeout(BODY, Limited::new(request.into_body(), MAX_BODY).collect());
        let Ok(Ok(body)) = body.await else {
            return failed(StatusCode::BAD_REQUEST, "the body is too long, late, or broke off");
        };
        let wish: Wish = match serde_json::from_slice(&body.to_bytes()) {
            Ok(wish) => wish,
            Err(error) => return failed(StatusCode::BAD_REQUEST, &error.to_string()),
        };
        let place: Place = match wish.target.parse() {
            Ok(place) => place,
            Err(why) => return failed(StatusCode::BAD_REQUEST, &why),
        };
        if place.target.protocol == Protocol::Udp {
            return failed(StatusCode::BAD_REQUEST, "the redirector takes TCP targets only");
        }
        if wish.certificate.is_some() && !place.page.as_ref().is_some_and(|page| page.tls) {
            return failed(StatusCode::BAD_REQUEST, "a certificate goes with an https target");
        }
        if !wish.source.is_empty() && wish.source.parse::<IpAddr>().is_err() {
            return failed(StatusCode::BAD_REQUEST, "the source is no IP address");
        }
        let certificate = wish.certificate.as_deref().map(|text| known::parse(text).ok_or(()));
        let Ok(certificate) = certificate.transpose() else {
            return failed(StatusCode::BAD_REQUEST, "the certificate is no SHA-256");
        };
        let redirect = Redirect {
            request: 0,
            agent: wish.agent,
            target: place.target.to_string(),
            source: wish.source,
            seconds: wish.ttl.unwrap_or(TIME),
            web: place.page.map(|page| page.wanted(certificate)),
            proves: false,
        };
        match self.broker.redirected(channel, &redirect).await {
            Ok(opened) => {
                let shown = (!opened.certificate.is_empty()).then(|| known::fingerprint(&opened.certificate));
                let session = SessionId::try_from(&opened.session[..]).ok();
                let told = json!({
                    "session": session.map(|id| id.to_string()),
                    "address": opened.address,
                    "link": (!opened.link.is_empty()).then_some(opened.link),
                    "certificate": shown,
                    "source": opened.source,
                    "expires": opened.expires,
                });
                Said { session, ..Said::new(StatusCode::OK, Some(told)) }
            }
            Err(denied) => {
                self.is_refused_often(channel.device.id, true);
                refused(&denied)
            }
        }
    }
}

impl web::Api for Api {
    fn answer<'a>(
        &'a self,
        request: Request<Incoming>,
        from: SocketAddr,
        admitted: &'a (dyn Fn() + Send + Sync),
    ) -> web::ApiAnswer<'a> {
        Box::pin(async move {
            let channel = self.technician(request.headers().get(AUTHORIZATION), from)?;
            admitted();
            // What has begun is brought to its end, also when nobody waits for the answer any more.
            let (sender, answered) = oneshot::channel();
            let api = self.clone();
            tokio::spawn(async move {
                let said = api.answer(request, &channel).await;
                if let Err(Some(Said { session: Some(id), .. })) = sender.send(said) {
                    api.end(id, &channel, "nobody waits for it").await;
                }
            });
            let Said { status, body, .. } = answered.await.ok()??;
            let body = body.map_or_else(Bytes::new, |body| Bytes::from(format!("{body}\n")));
            let mut answer = Response::new(Full::new(body));
            *answer.status_mut() = status;
            answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
            Some(answer)
        })
    }
}

fn failed(status: StatusCode, why: &str) -> Said {
    Said::new(status, Some(json!({ "error": why })))
}

fn refused(denied: &Denied) -> Said {
    let status = match denied.code {
        RefusedCode::UnknownAgent => StatusCode::NOT_FOUND,
        RefusedCode::AgentRefused | RefusedCode::NotPermitted => StatusCode::FORBIDDEN,
        RefusedCode::AgentOffline | RefusedCode::NoRelay | RefusedCode::Unreachable => {
            StatusCode::BAD_GATEWAY
        }
        RefusedCode::Unspecified | RefusedCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
    };
    failed(status, &denied.message)
}
