//! A session that serves pages: who may ask, and what becomes of a request.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use http::header::{
    ACCEPT, CACHE_CONTROL, CONNECTION, HOST, HeaderMap, HeaderValue, LOCATION, REFERRER_POLICY, SET_COOKIE,
    UPGRADE,
};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Method, Request, Response, StatusCode, Uri, Version};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::guarded::Watch;
use super::headers::{Elsewhere, Names, is_from_here};
use super::page::{self, Answer};
use super::target::{Failure, Leg, WebTarget};
use crate::sources::Sources;

/// Below this all is the redirector's own; the target never sees it.
const OWN_PATH: &str = "/.adit/";
/// Connections of browsers to one session.
const CONNECTIONS: usize = 256;

/// One session's pages.
pub struct Site {
    names: Names,
    /// The target's, as the HTTP library wants it.
    origin: (Scheme, Authority),
    target: WebTarget,
    /// For people.
    agent: String,
    /// `HOST[:PORT]`, where the session has a host name of its own.
    own: Option<HeaderValue>,
    /// The path of the link.
    link: String,
    /// Whether nobody has used it yet.
    fresh: AtomicBool,
    /// What the cookie holds.
    secret: String,
    /// Where the link leads.
    first: HeaderValue,
    sources: Mutex<Sources>,
    pub(super) closed: CancellationToken,
    pub(super) connections: Arc<Semaphore>,
    /// Of all sessions, for WebSockets: they outlive the connections that they began as.
    browsers: Arc<Semaphore>,
}

/// A request that may be answered.
pub(super) enum Admitted {
    /// It has shown the link; whether for the first time.
    Entered(bool),
    /// It has shown the cookie.
    Known {
        /// `HOST[:PORT]` as the browser knows it.
        public: HeaderValue,
    },
}

/// What a site is made of.
pub struct Parts {
    /// See [`Names`].
    pub names: Names,
    /// Where requests go.
    pub target: WebTarget,
    /// The agent's name.
    pub agent: String,
    /// Path and query of the first page.
    pub path: String,
    /// The address that may ask.
    pub source: IpAddr,
    /// No other, not even one of the other IP version.
    pub exact: bool,
}

impl Site {
    /// `own`: its `HOST[:PORT]`, where it has a host name of its own. Returns the path of the link, too.
    pub(super) fn new(
        parts: Parts,
        own: Option<HeaderValue>,
        browsers: Arc<Semaphore>,
    ) -> (Arc<Self>, String) {
        let Parts { names, target, agent, path, source, exact } = parts;
        let link = format!("{OWN_PATH}{}", secret());
        let path = path.parse::<PathAndQuery>().ok().filter(|path| {
            // Two slashes would be another host; and browsers read the other kind as one.
            path.as_str().starts_with('/') && !path.as_str()[1..].starts_with(['/', '\\'])
        });
        let first = path.and_then(|path| HeaderValue::from_str(path.as_str()).ok());
        let scheme = if names.scheme == "https" { Scheme::HTTPS } else { Scheme::HTTP };
        let authority =
            Authority::try_from(names.authority.as_bytes()).expect("a host's characters, and a port");
        let site = Arc::new(Self {
            names,
            origin: (scheme, authority),
            target,
            agent,
            own,
            link: link.clone(),
            fresh: AtomicBool::new(true),
            secret: secret(),
            first: first.unwrap_or(HeaderValue::from_static("/")),
            sources: Mutex::new(Sources::new(source, exact)),
            closed: CancellationToken::new(),
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
            browsers,
        });
        (site, link)
    }

    /// Ends it: nobody's connection goes on.
    pub(crate) fn close(&self) {
        self.closed.cancel();
    }

    /// Whether somebody from there may be the one that it is for.
    pub(crate) fn is_for(&self, from: IpAddr) -> bool {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner).may(from)
    }

    /// Whether that is the network of the one that it is for.
    pub(crate) fn is_of(&self, from: IpAddr) -> bool {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner).has(from)
    }

    /// The networks of the one that it is for, as far as they are known.
    pub(super) fn networks(&self) -> Vec<IpAddr> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner).known().collect()
    }

    /// Somebody from there has shown a secret of it: nobody else of that IP version may from here on.
    fn pin(&self, from: IpAddr) {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner).pin(from);
    }

    /// Whether somebody from there may ask this. `None`: nothing is here for him.
    pub(super) fn admit(
        &self,
        request: &Request<Incoming>,
        from: IpAddr,
        switching: bool,
    ) -> Option<Admitted> {
        let headers = request.headers();
        let host = headers.get(HOST)?;
        if !self.is_for(from) || self.own.as_ref().is_some_and(|own| !is_same_host(host, own)) {
            return None;
        }
        let public = self.own.clone().unwrap_or_else(|| host.clone());
        let known = self.names.shown(headers).any(|shown| is_same(shown, &self.secret))
            && is_from_here(request.method(), headers, &public, switching);
        if request.uri().path().starts_with(OWN_PATH) {
            let first = self.enter(request, known)?;
            self.pin(from);
            return Some(Admitted::Entered(first));
        }
        if !known || self.names.outlives(headers) {
            return None;
        }
        self.pin(from);
        Some(Admitted::Known { public })
    }

    /// Answers a request of somebody who may ask.
    pub(super) async fn answer(
        &self,
        mut request: Request<Incoming>,
        admitted: Admitted,
        from: IpAddr,
        browser: &mut Option<OnUpgrade>,
        watch: &Arc<Watch>,
    ) -> Answer {
        let public = match admitted {
            Admitted::Entered(first) => return self.entered(first),
            Admitted::Known { public } => public,
        };
        let switching = browser.is_some();
        if switching && (request.method() != Method::GET || !asks_to_switch(request.headers())) {
            return page::malformed();
        }
        let asked = request.headers().get(ACCEPT).cloned();
        if self.direct(&mut request, &public, from, switching).is_none() {
            return page::malformed();
        }
        let mut response = match self.target.send(request).await {
            Ok(response) => response,
            // What the browser sent broke off, not the target.
            Err(_) if watch.has_refused() => return page::malformed(),
            Err(failure) => return self.failed(asked.as_ref(), &failure),
        };
        // A target of HTTP/1.0 ends a body with the connection: on ours it ends as bodies of HTTP/1.1 do, or it is cut.
        *response.version_mut() = Version::HTTP_11;
        let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        if switched && !switching {
            let what = format!("{}: it switches to a protocol that nobody asked for", self.target_name());
            return self.failed(asked.as_ref(), &Failure { leg: Leg::Target, what, unreachable: true });
        }
        if let Err(Elsewhere(place)) = self.names.response(response.headers_mut(), &public, switched) {
            return page::elsewhere(asked.as_ref(), &self.agent, &self.target_name(), &place);
        }
        if switched {
            let Ok(place) = self.browsers.clone().try_acquire_owned() else {
                let what = "the server has too many connections of browsers".to_owned();
                return self.failed(asked.as_ref(), &Failure { leg: Leg::Agent, what, unreachable: true });
            };
            let target = hyper::upgrade::on(&mut response);
            if let Some(browser) = browser.take() {
                tokio::spawn(pass(browser, target, watch.clone(), self.closed.clone(), place));
            }
            return response.map(|_| Either::Right(Full::default()));
        }
        response.map(Either::Left)
    }

    fn failed(&self, asked: Option<&HeaderValue>, failure: &Failure) -> Answer {
        debug!(%failure, "a page did not come through");
        page::failed(asked, &self.agent, &self.target_name(), failure)
    }

    fn target_name(&self) -> String {
        format!("{}://{}/", self.names.scheme, self.names.authority.to_str().unwrap_or_default())
    }

    /// Uses the link. It can be used once; the browser that has used it (`known`) may come back to it. Whether it is the
    /// first time.
    fn enter(&self, request: &Request<Incoming>, known: bool) -> Option<bool> {
        // A browser that loads pages before anybody wants them must not use it up.
        let ahead =
            request.headers().contains_key("sec-purpose") || request.headers().contains_key("purpose");
        let right = request.method() == Method::GET && !ahead && is_same(request.uri().path(), &self.link);
        let first = right && self.fresh.swap(false, Ordering::AcqRel);
        (first || right && known).then_some(first)
    }

    fn entered(&self, first: bool) -> Answer {
        let mut answer = Response::new(Either::Right(Full::default()));
        *answer.status_mut() = StatusCode::SEE_OTHER;
        let headers = answer.headers_mut();
        headers.insert(LOCATION, self.first.clone());
        let cookie = HeaderValue::try_from(self.names.own_cookie(&self.secret));
        headers.insert(SET_COOKIE, cookie.expect("a name and hexadecimal digits"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
        if first && self.own.is_none() {
            // Another session may have had this port before.
            headers.insert("clear-site-data", HeaderValue::from_static("\"cache\", \"storage\""));
        }
        answer
    }

    /// Makes the request the target's.
    fn direct(
        &self,
        request: &mut Request<Incoming>,
        public: &HeaderValue,
        from: IpAddr,
        switching: bool,
    ) -> Option<()> {
        let mut uri = http::uri::Parts::default();
        (uri.scheme, uri.authority) = (Some(self.origin.0.clone()), Some(self.origin.1.clone()));
        uri.path_and_query = request.uri().path_and_query().cloned();
        *request.uri_mut() = Uri::from_parts(uri).ok()?;
        self.names.request(request.headers_mut(), public, from, switching);
        Some(())
    }
}

/// Passes bytes between both ends of a WebSocket.
async fn pass(
    browser: OnUpgrade,
    target: OnUpgrade,
    watch: Arc<Watch>,
    closed: CancellationToken,
    _place: OwnedSemaphorePermit,
) {
    let passing = async {
        let (browser, target) = tokio::try_join!(browser, target).map_err(std::io::Error::other)?;
        watch.switched();
        copy_bidirectional(&mut TokioIo::new(browser), &mut TokioIo::new(target)).await
    };
    tokio::select! {
        passed = passing => if let Err(error) = passed {
            debug!(%error, "a WebSocket broke off");
        },
        () = closed.cancelled() => {}
    }
}

/// 128 bits that nobody can guess.
pub(crate) fn secret() -> String {
    format!("{:032x}", rand::random::<u128>())
}

fn is_same(shown: &str, secret: &str) -> bool {
    verify_slices_are_equal(shown.as_bytes(), secret.as_bytes()).is_ok()
}

/// A browser leaves 443 out.
fn is_same_host(host: &HeaderValue, own: &HeaderValue) -> bool {
    let host = host.as_bytes();
    host.strip_suffix(b":443").unwrap_or(host).eq_ignore_ascii_case(own.as_bytes())
}

/// Whether a request asks for a WebSocket: what [`super::strict::Framing`] takes for it.
pub(super) fn asks_for_websocket(headers: &HeaderMap) -> bool {
    headers.get_all(UPGRADE).iter().any(|to| to.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

fn asks_to_switch(headers: &HeaderMap) -> bool {
    let tokens = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    tokens.flat_map(|value| value.split(',')).any(|token| token.trim().eq_ignore_ascii_case("upgrade"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_host_of_a_target_is_an_authority() {
        for host in
            ["a-b.c", "nas_1", "...", "-", "10.0.0.1", "::1", "fe80::1", "::ffff:192.0.2.1", &"a".repeat(253)]
        {
            let target = adit_protocol::Target::new(host, 8080, adit_protocol::Protocol::Tcp).expect(host);
            let names = Names::new(false, target.host(), target.port, None);
            assert!(Authority::try_from(names.authority.as_bytes()).is_ok(), "{host}");
        }
    }
}
