//! What changes in the headers on their way between a browser, which knows the redirector's origin, and a target, which
//! knows its own. Pure.
//!
//! The target is asked as if the browser were beside it: `Host`, `Origin` and `Referer` are its own, and `X-Forwarded-*`
//! say what the browser sees. On the way back, what names the target's origin names ours, and what would reach
//! beyond the session's origin is left out.

use std::net::IpAddr;
use std::time::Duration;

use http::Method;
use http::header::{
    self, CONNECTION, CONTENT_LOCATION, COOKIE, HOST, HeaderMap, HeaderName, HeaderValue, LOCATION, ORIGIN,
    REFERER, REFRESH, SET_COOKIE, UPGRADE,
};

/// Names of the redirector's own cookies begin like this. With `__Host-` a browser takes them from this very host only,
/// and for no other (RFC 6265bis section 4.1.3).
const OWN_COOKIE: &str = "__Host-adit";

/// For one connection only (RFC 9110 section 7.6.1). `Transfer-Encoding` is the HTTP library's.
const HOP_BY_HOP: [&str; 7] = [
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "upgrade",
];

/// What a target says about more than its own pages: the host's other ports, its other protocols, its siblings.
const BEYOND: [&str; 6] = [
    "strict-transport-security",
    "alt-svc",
    "clear-site-data",
    "public-key-pins",
    "public-key-pins-report-only",
    "expect-ct",
];

/// A date this near to the epoch means: now. (Programs write 0, or 1 January 1970 in some time zone.)
const YEAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// The two names of what a session leads to.
#[derive(Debug, Clone)]
pub struct Names {
    /// `https` or `http`: what the target speaks.
    pub scheme: &'static str,
    /// `HOST[:PORT]` of the target, as a browser beside it writes it.
    pub authority: HeaderValue,
    /// Name of the cookie that lets a browser in.
    pub cookie: String,
    /// Where sessions share a host, and so a browser's cookies: what the names of this session's begin with. A page of
    /// another session can then neither read them nor make up its own.
    pub prefix: Option<String>,
}

/// Where a target sends a browser that must ask for a link of its own.
#[derive(Debug, PartialEq, Eq)]
pub struct Elsewhere(pub String);

impl Names {
    /// Of `host:port`. `shared`: the port of a host that other sessions are on, too, and what tells its cookies apart.
    ///
    /// # Panics
    /// Never: a target's host is made of characters that a header may have.
    pub fn new(tls: bool, host: &str, port: u16, shared: Option<(u16, &str)>) -> Self {
        let (scheme, usual) = if tls { ("https", 443) } else { ("http", 80) };
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        let authority = if port == usual { host } else { format!("{host}:{port}") };
        Self {
            scheme,
            authority: HeaderValue::from_str(&authority).expect("a host's characters"),
            cookie: shared.map_or(OWN_COOKIE.to_owned(), |(port, _)| format!("{OWN_COOKIE}-{port}")),
            prefix: shared.map(|(_, label)| format!("adit-{label}-")),
        }
    }

    /// The `Set-Cookie` that lets a browser in with `secret`.
    pub fn own_cookie(&self, secret: &str) -> String {
        format!("{}={secret}; Path=/; Secure; HttpOnly; SameSite=Lax", self.cookie)
    }

    /// Whether this request is for a script that would outlive the session: on a shared host the next one may get its port.
    pub fn outlives(&self, headers: &HeaderMap) -> bool {
        let worker = headers.get("sec-fetch-dest").is_some_and(|dest| dest == "serviceworker");
        self.prefix.is_some() && (worker || headers.contains_key("service-worker"))
    }

    /// The secrets that a request shows.
    pub fn shown<'a>(&'a self, headers: &'a HeaderMap) -> impl Iterator<Item = &'a str> {
        cookies(headers).filter_map(|(name, value, _)| (name == self.cookie).then_some(value))
    }

    /// Makes a browser's request the target's. `public`: the redirector's `HOST[:PORT]`.
    pub fn request(&self, headers: &mut HeaderMap, public: &HeaderValue, from: IpAddr, switching: bool) {
        drop_hop_by_hop(headers);
        let made_up: Vec<HeaderName> =
            headers.keys().filter(|name| speaks_of_proxies(name.as_str())).cloned().collect();
        for name in made_up {
            headers.remove(name);
        }
        headers.remove(header::EXPECT);
        headers.remove("http2-settings");
        let ours = [b"https://", public.as_bytes()].concat();
        if headers.get(ORIGIN).is_some_and(|origin| origin.as_bytes().eq_ignore_ascii_case(&ours)) {
            set(headers, ORIGIN, &[self.scheme.as_bytes(), b"://", self.authority.as_bytes()].concat());
        }
        if let Some(path) = headers.get(REFERER).and_then(|referer| behind(referer.as_bytes(), &ours)) {
            let referer = [self.scheme.as_bytes(), b"://", self.authority.as_bytes(), path].concat();
            set(headers, REFERER, &referer);
        }
        if headers.contains_key(COOKIE) {
            let theirs: Vec<String> = cookies(headers)
                .filter(|(name, ..)| !is_own(name))
                .filter_map(|(_, _, pair)| match &self.prefix {
                    Some(prefix) => pair.strip_prefix(prefix.as_str()),
                    None => Some(pair),
                })
                .map(str::to_owned)
                .collect();
            headers.remove(COOKIE);
            if !theirs.is_empty() {
                set(headers, COOKIE, theirs.join("; ").as_bytes());
            }
        }
        headers.insert(HOST, self.authority.clone());
        headers.insert("x-forwarded-host", public.clone());
        headers.insert("x-forwarded-proto", HeaderValue::from_static("https"));
        set(headers, HeaderName::from_static("x-forwarded-for"), from.to_string().as_bytes());
        if switching {
            headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
            headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        }
    }

    /// Makes a target's response the redirector's.
    ///
    /// # Errors
    /// [`Elsewhere`]: it sends the browser to another origin of the same machine.
    pub fn response(
        &self,
        headers: &mut HeaderMap,
        public: &HeaderValue,
        switching: bool,
    ) -> Result<(), Elsewhere> {
        drop_hop_by_hop(headers);
        // Of both the encoding counts (RFC 9112 section 6.3).
        if headers.remove(header::TRANSFER_ENCODING).is_some() {
            headers.remove(header::CONTENT_LENGTH);
        }
        for name in BEYOND {
            headers.remove(name);
        }
        for name in [LOCATION, CONTENT_LOCATION, REFRESH] {
            let Some(value) = headers.get(&name).and_then(|value| std::str::from_utf8(value.as_bytes()).ok())
            else {
                continue;
            };
            // `Refresh` has a time before it, as browsers read it (HTML, "shared declarative refresh steps").
            let at = if name == REFRESH {
                value.to_ascii_lowercase().find("url=").map(|at| at + 4)
            } else {
                Some(0)
            };
            let Some((before, place)) = at.map(|at| value.split_at(at)) else { continue };
            let quotes = |c: char| c.is_whitespace() || c == '\'' || c == '"';
            match self.place(place.trim_matches(quotes), public) {
                Place::Same => {}
                Place::Ours(place) => {
                    let value = format!("{before}{place}");
                    set(headers, name, value.as_bytes());
                }
                Place::Elsewhere(place) if name == LOCATION => return Err(Elsewhere(place)),
                Place::Elsewhere(_) if name == REFRESH => {}
                Place::Elsewhere(_) => drop(headers.remove(name)),
            }
        }
        if headers.contains_key(SET_COOKIE) {
            let cookies: Vec<HeaderValue> =
                headers.get_all(SET_COOKIE).iter().filter_map(|cookie| self.cookie_of(cookie)).collect();
            headers.remove(SET_COOKIE);
            for cookie in cookies {
                headers.append(SET_COOKIE, cookie);
            }
        }
        // Its page and that of another session are of one site: neither may become the other's origin.
        headers.entry("origin-agent-cluster").or_insert(HeaderValue::from_static("?1"));
        if switching {
            headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
            headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        }
        Ok(())
    }

    /// What a place that the target names is here.
    fn place(&self, place: &str, public: &HeaderValue) -> Place {
        let Some((scheme, authority, rest)) = split(place) else { return Place::Same };
        // Without a scheme it has the page's.
        let scheme = if scheme.is_empty() { self.scheme.to_owned() } else { scheme.to_ascii_lowercase() };
        let host_and_port = |text: &str, scheme: &str| {
            let text = text.rsplit('@').next().unwrap_or_default().to_ascii_lowercase();
            let colon = text.rfind(':').filter(|at| !text[*at..].contains(']'));
            let (host, port) = text.split_at(colon.unwrap_or(text.len()));
            let usual = if scheme == "https" { 443 } else { 80 };
            (host.to_owned(), port.trim_start_matches(':').parse::<u16>().unwrap_or(usual))
        };
        let rest = if rest.starts_with(['?', '#']) || rest.is_empty() {
            format!("/{rest}")
        } else {
            rest.to_owned()
        };
        let public = public.to_str().unwrap_or_default();
        let ours = || Place::Ours(format!("https://{public}{rest}"));
        let (host, port) = host_and_port(authority, &scheme);
        // What obeys X-Forwarded-Host means us, with X-Forwarded-Proto or without.
        if host == host_and_port(public, "https").0 {
            return ours();
        }
        let own = host_and_port(self.authority.to_str().unwrap_or_default(), self.scheme);
        match (host == own.0, scheme == self.scheme && port == own.1) {
            (false, _) => Place::Same,
            (true, true) => ours(),
            (true, false) => Place::Elsewhere(format!("{scheme}://{authority}/")),
        }
    }

    /// A target's cookie as a browser may have it: for this host only.
    fn cookie_of(&self, cookie: &HeaderValue) -> Option<HeaderValue> {
        let text = std::str::from_utf8(cookie.as_bytes()).ok()?;
        let mut parts = text.split(';');
        let pair = parts.next()?.trim();
        // One without a name could be read back as one of ours.
        let (name, _) = pair.split_once('=').filter(|(name, _)| !name.trim().is_empty())?;
        if is_own(name.trim()) {
            return None;
        }
        let mut text = format!("{}{pair}", self.prefix.as_deref().unwrap_or_default());
        let attributes: Vec<(String, &str)> = parts
            .map(|attribute| {
                (attribute.split('=').next().unwrap_or_default().trim().to_ascii_lowercase(), attribute)
            })
            .collect();
        // On a shared host they would pile up: every session has names of its own. So they last as long as the browser
        // is open, unless they are to go at once.
        let goes = attributes.iter().any(|(name, attribute)| {
            let value = attribute.split_once('=').map_or("", |(_, value)| value.trim());
            match name.as_str() {
                "max-age" => value.parse::<i64>().is_ok_and(|seconds| seconds <= 0),
                "expires" => httpdate::parse_http_date(value)
                    .is_ok_and(|date| date <= std::time::SystemTime::UNIX_EPOCH + YEAR),
                _ => false,
            }
        });
        let lasts = self.prefix.is_none() || goes;
        for (name, attribute) in &attributes {
            match name.as_str() {
                "domain" | "secure" => {}
                "max-age" | "expires" if !lasts => {}
                "httponly" if self.prefix.is_some() => {}
                _ => {
                    text.push(';');
                    text.push_str(attribute);
                }
            }
        }
        // Nobody else's port of this host gets them.
        text.push_str("; Secure");
        if self.prefix.is_some() {
            text.push_str("; HttpOnly");
        }
        HeaderValue::from_bytes(text.as_bytes()).ok()
    }
}

enum Place {
    /// As it is.
    Same,
    /// This path.
    Ours(String),
    /// Another scheme or port of the target's host.
    Elsewhere(String),
}

/// Whether a request with our cookie comes from a page of this very origin, or from a person: sessions are of one site,
/// so that a browser sends the cookie also when the page of another one asks (Fetch Metadata; RFC 6455 section 10.2).
pub fn is_from_here(method: &Method, headers: &HeaderMap, public: &HeaderValue, switching: bool) -> bool {
    let ours = [b"https://", public.as_bytes()].concat();
    let origin = headers.get(ORIGIN).map(|origin| origin.as_bytes().eq_ignore_ascii_case(&ours));
    let says = |name: &str| headers.get(name).map(HeaderValue::as_bytes);
    match (switching, says("sec-fetch-site")) {
        (true, _) => origin == Some(true),
        (_, Some(b"same-origin" | b"none")) => true,
        // A link somewhere else, or a bookmark's redirect.
        (_, Some(_)) => {
            [Method::GET, Method::HEAD].contains(method)
                && says("sec-fetch-mode") == Some(b"navigate")
                && says("sec-fetch-dest") == Some(b"document")
        }
        (_, None) => origin != Some(false),
    }
}

/// Whether this names a proxy's statements, as CGI reads names (RFC 3875 section 4.1.18): with `_` for `-`.
fn speaks_of_proxies(name: &str) -> bool {
    let name = name.replace('_', "-");
    name.starts_with("x-forwarded")
        || ["forwarded", "x-real-ip", "x-original-url", "x-rewrite-url"].contains(&&*name)
}

fn drop_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .filter(|name| ![header::TRANSFER_ENCODING, header::CONTENT_LENGTH].contains(name))
        .collect();
    headers.remove(CONNECTION);
    for name in named {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}

/// Name, value and the whole of each cookie in a request (RFC 6265 section 4.2.1).
fn cookies(headers: &HeaderMap) -> impl Iterator<Item = (&str, &str, &str)> {
    headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| std::str::from_utf8(value.as_bytes()).ok())
        .flat_map(|value| value.split(';'))
        .map(str::trim)
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            pair.split_once('=').map_or(("", pair, pair), |(name, value)| (name.trim_end(), value, pair))
        })
}

/// Browsers look at the prefix of a name whatever its case.
fn is_own(name: &str) -> bool {
    name.get(..OWN_COOKIE.len()).is_some_and(|start| start.eq_ignore_ascii_case(OWN_COOKIE))
}

/// What follows `origin` in a URL of it.
fn behind<'a>(url: &'a [u8], origin: &[u8]) -> Option<&'a [u8]> {
    let (start, rest) = url.split_at_checked(origin.len())?;
    (start.eq_ignore_ascii_case(origin) && matches!(rest.first(), None | Some(b'/' | b'?'))).then_some(rest)
}

/// Scheme (or nothing), authority and the rest of a URL with an authority, as browsers read it: `\\` is `/` to them. `None`: it has
/// none, or another scheme than HTTP's.
fn split(place: &str) -> Option<(&str, &str, &str)> {
    let slash = |c: char| c == '/' || c == '\\';
    let (scheme, behind) = match place.find(':') {
        Some(at) if ["http", "https"].iter().any(|known| place[..at].eq_ignore_ascii_case(known)) => {
            (&place[..at], &place[at + 1..])
        }
        _ => ("", place),
    };
    let authority = behind.strip_prefix(slash)?.strip_prefix(slash)?.trim_start_matches(slash);
    let (authority, rest) =
        authority.split_at(authority.find(['/', '\\', '?', '#']).unwrap_or(authority.len()));
    Some((scheme, authority, rest))
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: &[u8]) {
    match HeaderValue::from_bytes(value) {
        Ok(value) => drop(headers.insert(name, value)),
        // Made of parts of valid ones: it does not happen.
        Err(_) => drop(headers.remove(name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUBLIC: HeaderValue = HeaderValue::from_static("label.r.example.org");

    fn map(list: &[(&str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&str, &str)| -> (HeaderName, HeaderValue) {
            (name.parse().expect("a name"), value.parse().expect("a value"))
        };
        let mut headers = HeaderMap::new();
        for (name, value) in list.iter().map(pair) {
            headers.append(name, value);
        }
        headers
    }

    fn shown(headers: &HeaderMap) -> Vec<String> {
        let mut all: Vec<String> = headers
            .iter()
            .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap_or("?")))
            .collect();
        all.sort();
        all
    }

    fn asked(names: &Names, list: &[(&str, &str)]) -> Vec<String> {
        let mut headers = map(list);
        names.request(&mut headers, &PUBLIC, IpAddr::from([192, 0, 2, 7]), false);
        let always = ["host", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"];
        shown(&headers)
            .into_iter()
            .filter(|line| !always.iter().any(|name| line.starts_with(&format!("{name}: "))))
            .collect()
    }

    fn answered(names: &Names, list: &[(&str, &str)]) -> Vec<String> {
        let mut headers = map(list);
        names.response(&mut headers, &PUBLIC, false).expect("from here");
        shown(&headers).into_iter().filter(|line| !line.starts_with("origin-agent-cluster")).collect()
    }

    #[test]
    fn the_target_is_asked_by_its_own_name_and_told_ours() {
        let names = Names::new(false, "10.0.0.1", 8080, None);
        let mut headers = map(&[
            ("host", "label.r.example.org"),
            ("x-forwarded-for", "1.2.3.4"),
            ("x_forwarded_host", "x"),
        ]);
        names.request(&mut headers, &PUBLIC, IpAddr::from([192, 0, 2, 7]), false);
        assert_eq!(
            shown(&headers),
            [
                "host: 10.0.0.1:8080",
                "x-forwarded-for: 192.0.2.7",
                "x-forwarded-host: label.r.example.org",
                "x-forwarded-proto: https"
            ]
        );
        for (tls, host, port, authority) in [
            (true, "nas", 443, "nas"),
            (true, "nas", 80, "nas:80"),
            (false, "::1", 80, "[::1]"),
            (false, "a", 81, "a:81"),
        ] {
            assert_eq!(Names::new(tls, host, port, None).authority, authority);
        }
    }

    #[test]
    fn pages_of_ours_are_the_targets_to_it() {
        let names = Names::new(true, "nas", 5001, None);
        for (name, before, after) in [
            ("origin", "https://label.r.example.org", "https://nas:5001"),
            ("origin", "https://other.example.org", "https://other.example.org"),
            ("origin", "null", "null"),
            ("referer", "https://label.r.example.org/a?b", "https://nas:5001/a?b"),
            ("referer", "https://label.r.example.org.evil/", "https://label.r.example.org.evil/"),
        ] {
            assert_eq!(asked(&names, &[(name, before)]), [format!("{name}: {after}")]);
        }
    }

    #[test]
    fn what_is_for_one_hop_goes_no_further() {
        let names = Names::new(false, "a", 80, None);
        let list = [
            ("connection", "close, X-Secret, x-forwarded-for"),
            ("x-secret", "1"),
            ("te", "trailers"),
            ("keep-alive", "5"),
            ("upgrade", "h2c"),
            ("http2-settings", "x"),
            ("expect", "100-continue"),
            ("forwarded", "for=1.2.3.4"),
            ("x-original-url", "/admin"),
            ("accept", "*/*"),
        ];
        assert_eq!(asked(&names, &list), ["accept: */*"]);
        let mut headers = map(&list);
        names.request(&mut headers, &PUBLIC, IpAddr::from([192, 0, 2, 7]), true);
        assert_eq!(
            (&headers["connection"], &headers["upgrade"]),
            (&"Upgrade".parse().expect(""), &"websocket".parse().expect(""))
        );
        assert_eq!(headers["x-forwarded-for"], "192.0.2.7", "nobody takes it away");
    }

    #[test]
    fn our_cookie_is_ours_alone() {
        let names = Names::new(false, "a", 80, None);
        let headers =
            map(&[("cookie", "a=1; __Host-adit=secret;b"), ("cookie", "__host-ADIT-9=x; c=2=3; __Host-x=1")]);
        assert_eq!(names.shown(&headers).collect::<Vec<_>>(), ["secret"]);
        let list =
            [("cookie", "a=1; __Host-adit=secret;b"), ("cookie", "__host-ADIT-9=x; c=2=3; __Host-x=1")];
        assert_eq!(asked(&names, &list), ["cookie: a=1; b; c=2=3; __Host-x=1"]);
        assert_eq!(asked(&names, &[("cookie", "__Host-adit=secret")]), [""; 0]);
        for (before, after) in [
            ("a=1; Domain=example.org; Path=/x", Some("a=1; Path=/x; Secure")),
            ("a=1;domain=.org;HttpOnly", Some("a=1;HttpOnly; Secure")),
            ("a=1; Secure; SameSite=None; Max-Age=9", Some("a=1; SameSite=None; Max-Age=9; Secure")),
            ("__Host-adit=evil; Path=/; Secure", None),
            ("__HOST-Adit-7=evil", None),
            ("=__Host-adit=evil", None),
            ("nameless", None),
        ] {
            let got = answered(&names, &[("set-cookie", before)]);
            assert_eq!(
                got.first().map(String::as_str),
                after.map(|after| format!("set-cookie: {after}")).as_deref()
            );
        }
        assert_eq!(names.own_cookie("x"), "__Host-adit=x; Path=/; Secure; HttpOnly; SameSite=Lax");
    }

    #[test]
    fn on_a_shared_host_each_session_has_cookies_of_its_own() {
        let names = Names::new(false, "a", 80, Some((50_000, "abc")));
        assert_eq!(names.cookie, "__Host-adit-50000");
        for (before, after) in [
            ("s=1; Path=/", "s=1; Path=/"),
            ("s=1; Max-Age=900; Expires=Wed, 25 Nov 2099 00:00:00 GMT", "s=1"),
            ("s=; Max-Age=0", "s=; Max-Age=0"),
            ("s=; Expires=Thu, 01 Jan 1970 00:00:01 GMT", "s=; Expires=Thu, 01 Jan 1970 00:00:01 GMT"),
        ] {
            let after = format!("set-cookie: adit-abc-{after}; Secure; HttpOnly");
            assert_eq!(answered(&names, &[("set-cookie", before)]), [after]);
        }
        assert!(names.outlives(&map(&[("service-worker", "script")])));
        let list = [("cookie", "adit-abc-s=1; adit-xyz-s=2; s=3; __Host-adit-50000=x; __Host-adit-50001=y")];
        assert_eq!(asked(&names, &list), ["cookie: s=1"]);
    }

    #[test]
    fn places_of_the_target_are_ours() {
        let names = Names::new(false, "10.0.0.1", 8080, None);
        let here = "https://label.r.example.org";
        for (before, after) in [
            ("/login", "/login".to_owned()),
            ("login?x", "login?x".to_owned()),
            ("?x=http://10.0.0.1:8080/", "?x=http://10.0.0.1:8080/".to_owned()),
            (
                "http://10.0.0.1:8080/a?b=http://10.0.0.1:8080/#c",
                format!("{here}/a?b=http://10.0.0.1:8080/#c"),
            ),
            ("HTTP://10.0.0.1:8080", format!("{here}/")),
            ("http://10.0.0.1:8080?x", format!("{here}/?x")),
            ("//10.0.0.1:8080/a", format!("{here}/a")),
            ("http://10.0.0.1:8080//evil.example/x", format!("{here}//evil.example/x")),
            ("http:\\\\10.0.0.1:8080\\x", format!("{here}\\x")),
            ("http://10.0.0.1:8080/a b", format!("{here}/a b")),
            ("https://label.r.example.org/a", format!("{here}/a")),
            ("http://label.r.example.org/a", format!("{here}/a")),
            ("https://id.example.org/authorize?x", "https://id.example.org/authorize?x".to_owned()),
            ("http://10.0.0.1:8080@id.example.org/", "http://10.0.0.1:8080@id.example.org/".to_owned()),
            ("mailto:a@b", "mailto:a@b".to_owned()),
        ] {
            assert_eq!(answered(&names, &[("location", before)]), [format!("location: {after}")]);
        }
        for (elsewhere, shown) in [
            ("https://10.0.0.1:8080/", "https://10.0.0.1:8080/"),
            ("https://10.0.0.1/x", "https://10.0.0.1/"),
            ("http://10.0.0.1/", "http://10.0.0.1/"),
            ("http://10.0.0.1:81/#;evil", "http://10.0.0.1:81/"),
        ] {
            let refused = names.response(&mut map(&[("location", elsewhere)]), &PUBLIC, false);
            assert_eq!(refused, Err(Elsewhere(shown.to_owned())));
        }
        let refresh = [("refresh", "0; URL='http://10.0.0.1:8080/a'")];
        assert_eq!(answered(&names, &refresh), [format!("refresh: 0; URL={here}/a")]);
        assert_eq!(answered(&names, &[("refresh", "5")]), ["refresh: 5"]);
        let named = Names::new(true, "nas", 443, None);
        for (before, after) in [("https://NAS/a", "/a"), ("https://nas:443/a", "/a")] {
            assert_eq!(answered(&named, &[("location", before)]), [format!("location: {here}{after}")]);
        }
        let ipv6 = Names::new(false, "fd00::1", 8080, None);
        assert_eq!(
            answered(&ipv6, &[("location", "http://[FD00::1]:8080/a")]),
            [format!("location: {here}/a")]
        );
    }

    #[test]
    fn what_reaches_beyond_the_session_is_left_out() {
        let names = Names::new(true, "a", 443, None);
        let list = [
            ("strict-transport-security", "max-age=9; includeSubDomains"),
            ("alt-svc", "h3=\":443\""),
            ("clear-site-data", "\"cookies\""),
            ("connection", "keep-alive"),
            ("transfer-encoding", "chunked"),
            ("content-type", "text/html"),
        ];
        assert_eq!(answered(&names, &list), ["content-type: text/html"]);
    }

    #[test]
    fn pages_of_other_origins_get_no_answer() {
        let ours = ("origin", "https://label.r.example.org");
        let theirs = ("origin", "https://other.r.example.org");
        let from =
            |method, list: &[(&str, &str)], switching| is_from_here(&method, &map(list), &PUBLIC, switching);
        let site = |site| ("sec-fetch-site", site);
        let navigate = [("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")];
        assert!(from(Method::POST, &[ours, site("same-origin")], false));
        assert!(
            from(Method::POST, &[("origin", "null"), site("same-origin")], false),
            "Referrer-Policy: no-referrer"
        );
        assert!(from(Method::GET, &[site("none"), navigate[0], navigate[1]], false));
        assert!(from(Method::GET, &[site("cross-site"), navigate[0], navigate[1]], false));
        assert!(!from(Method::POST, &[site("cross-site"), navigate[0], navigate[1]], false));
        assert!(!from(
            Method::GET,
            &[site("same-site"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "iframe")],
            false
        ));
        assert!(!from(Method::GET, &[site("same-site"), ("sec-fetch-mode", "no-cors")], false));
        assert!(!from(Method::GET, &[site("cross-site"), ("sec-fetch-mode", "cors"), theirs], false));
        // Programs and old browsers.
        assert!(from(Method::POST, &[], false) && from(Method::POST, &[ours], false));
        assert!(!from(Method::POST, &[theirs], false) && !from(Method::POST, &[("origin", "null")], false));
        // WebSockets.
        assert!(from(Method::GET, &[ours], true) && from(Method::GET, &[ours, site("same-origin")], true));
        assert!(!from(Method::GET, &[theirs], true) && !from(Method::GET, &[], true));
        assert!(!from(Method::GET, &[theirs, site("same-origin")], true));
    }
}
