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

use std::net::SocketAddr;
use std::sync::Arc;

use adit_client::identity::Peer;
use adit_client::known;
use adit_client::place::Place;
use adit_protocol::api::ApiToken;
use adit_protocol::control::{Closed, Redirect, RefusedCode};
use adit_protocol::{Role, SessionId};
use adit_relay::web;
use bytes::Bytes;
use http::header::{AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::broker::{Broker, Denied};
use crate::organisation::unix_now;
use crate::presence::{Arrival, Channel};

/// The longest request body, in bytes.
const MAX_BODY: usize = 16 * 1024;
/// How long a port is open when nothing is said, in seconds.
const TIME: u64 = 600;

/// See the module.
pub struct Api {
    broker: Arc<Broker>,
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

/// An answer with its status.
type Said = (StatusCode, Option<Value>);

impl Api {
    /// Of this broker.
    pub fn new(broker: Arc<Broker>) -> Self {
        Self { broker }
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
                let reason = "closed by the technician".to_owned();
                let closed = Closed { session: id.0.to_vec(), reason, bytes_sent: 0, bytes_received: 0 };
                self.broker.closed(&channel.device, closed).await;
                Some((StatusCode::NO_CONTENT, None))
            }
            _ => None,
        }
    }

    fn agents(&self, channel: &Channel) -> Said {
        let agents = match self.broker.list(&channel.device) {
            Ok(agents) => agents,
            Err(denied) => return refused(&denied),
        };
        let told = agents.iter().map(|agent| {
            json!({
                "id": adit_protocol::DeviceId::try_from(&agent.device[..]).ok().map(|id| id.to_string()),
                "name": agent.name,
                "tags": agent.tags,
                "online": agent.online,
                "last_seen": agent.last_seen,
                "software": agent.software,
            })
        });
        (StatusCode::OK, Some(told.collect()))
    }

    async fn redirect(&self, request: Request<Incoming>, channel: &Channel) -> Said {
        let Ok(body) = Limited::new(request.into_body(), MAX_BODY).collect().await else {
            return failed(StatusCode::BAD_REQUEST, "the body is too long, or broke off");
        };
        let wish: Wish = match serde_json::from_slice(&body.to_bytes()) {
            Ok(wish) => wish,
            Err(error) => return failed(StatusCode::BAD_REQUEST, &error.to_string()),
        };
        let place: Place = match wish.target.parse() {
            Ok(place) => place,
            Err(why) => return failed(StatusCode::BAD_REQUEST, &why),
        };
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
        };
        match self.broker.redirected(channel, &redirect).await {
            Ok(opened) => {
                let shown = (!opened.certificate.is_empty()).then(|| known::fingerprint(&opened.certificate));
                let told = json!({
                    "session": SessionId::try_from(&opened.session[..]).ok().map(|id| id.to_string()),
                    "address": opened.address,
                    "link": (!opened.link.is_empty()).then_some(opened.link),
                    "certificate": shown,
                    "source": opened.source,
                    "expires": opened.expires,
                });
                (StatusCode::OK, Some(told))
            }
            Err(denied) => refused(&denied),
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
            let (status, said) = self.answer(request, &channel).await?;
            let body = said.map_or_else(Bytes::new, |said| Bytes::from(format!("{said}\n")));
            let mut answer = Response::new(Full::new(body));
            *answer.status_mut() = status;
            answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
            Some(answer)
        })
    }
}

fn failed(status: StatusCode, why: &str) -> Said {
    (status, Some(json!({ "error": why })))
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
