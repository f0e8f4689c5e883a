//! What a technician asks the redirector for: a service, a target, or a URL, as people write them.

use std::str::FromStr;

use adit_protocol::Target;
use adit_protocol::control::Web;

/// What is to be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// As seen from the agent.
    pub target: Target,
    /// A web server is there.
    pub page: Option<Page>,
}

/// The first page of a web server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// It speaks TLS.
    pub tls: bool,
    /// Path and query.
    pub path: String,
}

impl Page {
    /// As the mediator is asked for it. `certificate`: SHA-256 of the one that is known.
    pub fn wanted(&self, certificate: Option<[u8; 32]>) -> Web {
        let certificate = certificate.map(Vec::from).unwrap_or_default();
        Web { tls: self.tls, certificate, path: self.path.clone(), exact: false }
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let whole = match text {
            "rdp" => "127.0.0.1:3389",
            "ssh" => "127.0.0.1:22",
            "http" => "http://127.0.0.1/",
            "https" => "https://127.0.0.1/",
            other => other,
        };
        let wrong = || "expected rdp, ssh, http, https, HOST:PORT or a URL, IPv6 in brackets".to_owned();
        let (tls, rest) = match (whole.strip_prefix("http://"), whole.strip_prefix("https://")) {
            (Some(rest), _) => (false, rest),
            (_, Some(rest)) => (true, rest),
            _ => return Ok(Self { target: whole.parse().map_err(|_| wrong())?, page: None }),
        };
        let rest = rest.split('#').next().unwrap_or_default();
        let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let port = if tls { 443 } else { 80 };
        let has_port = !authority.ends_with(']') && authority.contains(':');
        let address = if has_port { authority.to_owned() } else { format!("{authority}:{port}") };
        let target: Target = address.parse().map_err(|_| wrong())?;
        if !path.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("in the URL's path, write other characters as %XX".to_owned());
        }
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        Ok(Self { target, page: Some(Page { tls, path }) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_web_servers() {
        for (text, target, tls, path) in [
            ("http", "127.0.0.1:80", false, "/"),
            ("https", "127.0.0.1:443", true, "/"),
            ("http://nas", "nas:80", false, "/"),
            ("https://nas:5001/a/b?c=d#e", "nas:5001", true, "/a/b?c=d"),
            ("http://[fd00::1]/x", "[fd00::1]:80", false, "/x"),
            ("https://[fd00::1]:8443?x", "[fd00::1]:8443", true, "/?x"),
        ] {
            let place: Place = text.parse().expect(text);
            assert_eq!(
                (place.target.to_string().as_str(), place.page),
                (target, Some(Page { tls, path: path.into() }))
            );
        }
        for text in [
            "http://",
            "https:///x",
            "http://a b/",
            "http://u@h/",
            "http://h:0/",
            "http://h/\u{e9}",
            "ftp://h/",
        ] {
            assert!(text.parse::<Place>().is_err(), "{text}");
        }
    }
}
