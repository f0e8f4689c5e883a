//! HTTP proxies on the way to our servers' HTTPS port (RFC 9110 section 9.3.6, CONNECT).
//!
//! Which proxy is used is said by `--proxy`, else by `[network] proxy` in `DIR/config.toml`, else by the
//! environment (`HTTPS_PROXY` or `ALL_PROXY`, and `NO_PROXY`, as curl reads them). The word `none` means none,
//! whatever stands further down.

mod connect;

use std::fmt;
use std::sync::{Arc, Mutex};

use data_encoding::BASE64;
use http_auth::PasswordClient;
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use tokio_tungstenite::tungstenite::http::Uri;

pub use connect::ProxyError;
pub(crate) use connect::connect;

/// The port of a proxy whose URL names none, as curl has it.
const DEFAULT_PORT: u16 = 1080;
/// Instead of a URL: no proxy.
const NONE: &str = "none";

/// Which proxy leads to which server. The default is none at all.
#[derive(Clone, Default)]
pub struct Proxies(Option<Arc<Chosen>>);

struct Chosen {
    /// As it was given, with the password.
    url: String,
    matcher: Matcher,
    proxy: Arc<Proxy>,
}

/// One HTTP proxy.
pub struct Proxy {
    /// `HOST:PORT`.
    pub(crate) address: String,
    login: Option<Login>,
    /// How the proxy asked for the password the last time: Digest counts its answers.
    challenge: Mutex<Option<PasswordClient>>,
}

struct Login {
    user: String,
    password: String,
}

impl Proxies {
    /// What the flag says, else the configuration, else the environment.
    ///
    /// # Errors
    /// [`InvalidProxy`] says which of them is no proxy.
    pub fn choose(flag: Option<&str>, config: Option<&str>) -> Result<Self, InvalidProxy> {
        let no_proxy = env(&["NO_PROXY", "no_proxy"]).map(|(_, value)| value).unwrap_or_default();
        let of = |url: Option<&str>, from: &str| url.map(|url| (from.to_owned(), url.to_owned()));
        let chosen = of(flag, "--proxy")
            .or_else(|| of(config, "[network] proxy"))
            .or_else(|| env(&["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]));
        match chosen {
            Some((_, url)) if url.is_empty() || url == NONE => Ok(Self::default()),
            // For everything that goes out, and so perhaps for others.
            Some((from, url)) if from.eq_ignore_ascii_case("all_proxy") => Ok(Self::named(&url, &no_proxy)
                .unwrap_or_else(|why| {
                    tracing::warn!("not used: the proxy of {from}: {why}");
                    Self::default()
                })),
            Some((from, url)) => Self::named(&url, &no_proxy).map_err(|why| InvalidProxy { from, why }),
            None => Ok(Self::default()),
        }
    }

    /// The proxy with this URL (`http://[USER:PASSWORD@]HOST[:PORT]`), for all servers but those that `no_proxy`
    /// lists: names and their subdomains, addresses and networks, separated by commas.
    ///
    /// # Errors
    /// What is wrong with the URL, without its password.
    pub fn named(url: &str, no_proxy: &str) -> Result<Self, &'static str> {
        let matcher = Matcher::builder().https(url).no(no_proxy).build();
        // Any name that `no_proxy` does not list.
        let everywhere = Matcher::builder().https(url).build();
        let server = Uri::from_static("https://adit.invalid/");
        let Some(intercept) = everywhere.intercept(&server) else { return Err("that is no URL of a proxy") };
        let proxy = Arc::new(Proxy::of(&intercept)?);
        Ok(Self(Some(Arc::new(Chosen { url: url.to_owned(), matcher, proxy }))))
    }

    /// The proxy's URL, for a file; there may be a password in it.
    pub fn url(&self) -> Option<&str> {
        self.0.as_ref().map(|chosen| chosen.url.as_str())
    }

    /// The proxy on the way to `server` (`HOST:PORT`), if there is one.
    pub fn to(&self, server: &str) -> Option<&Arc<Proxy>> {
        let chosen = self.0.as_ref()?;
        let uri: Uri = format!("https://{server}/").parse().ok()?;
        chosen.matcher.intercept(&uri).map(|_| &chosen.proxy)
    }
}

impl Proxy {
    fn of(intercept: &Intercept) -> Result<Self, &'static str> {
        let uri = intercept.uri();
        if uri.scheme_str() != Some("http") {
            return Err("only http:// proxies are known here");
        }
        let host = uri.host().unwrap_or_default();
        let address = format!("{host}:{}", uri.port_u16().unwrap_or(DEFAULT_PORT));
        let login = intercept.basic_auth().and_then(|header| {
            let encoded = header.to_str().ok()?.strip_prefix("Basic ")?;
            let text = String::from_utf8(BASE64.decode(encoded.as_bytes()).ok()?).ok()?;
            let (user, password) = text.split_once(':')?;
            Some(Login { user: user.to_owned(), password: password.to_owned() })
        });
        Ok(Self { address, login, challenge: Mutex::default() })
    }
}

/// The first of these variables that is set, and its name.
fn env(names: &[&str]) -> Option<(String, String)> {
    let set = |name: &&str| std::env::var(name).ok().map(|value| ((*name).to_owned(), value));
    names.iter().find_map(set)
}

impl fmt::Debug for Proxies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Proxies").field(&self.0.as_ref().map(|chosen| &chosen.proxy.address)).finish()
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Proxy").field(&self.address).finish()
    }
}

/// A setting that names no proxy that can be used. Does not repeat it: there may be a password in it.
#[derive(Debug, thiserror::Error)]
#[error("the proxy of {from}: {why}")]
pub struct InvalidProxy {
    from: String,
    why: &'static str,
}

impl crate::exit::Failure for InvalidProxy {
    fn exit(&self) -> crate::exit::Exit {
        crate::exit::Exit::Usage
    }

    fn remedy(&self) -> Option<String> {
        Some(
            "give http://[USER:PASSWORD@]HOST:PORT, or none (--proxy none, ADIT_PROXY=none); % and @ in a password are %25 and %40"
                .to_owned(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_is_read_and_its_password_stays_hidden() {
        let proxies = Proxies::named("http://an%40na:pa%3Ass@proxy.example:3128", "").expect("a proxy");
        let proxy = proxies.to("adit.example.org:443").expect("for all");
        let login = proxy.login.as_ref().expect("a login");
        assert_eq!((proxy.address.as_str(), login.user.as_str()), ("proxy.example:3128", "an@na"));
        assert_eq!(login.password, "pa:ss");
        let shown = format!("{proxies:?} {proxy:?}");
        assert!(shown.contains("proxy.example") && !shown.contains("pa"), "{shown}");
        let bare = Proxies::named("proxy", "").expect("a proxy");
        let bare = bare.to("[2001:db8::1]:443").expect("for all");
        assert_eq!((bare.address.as_str(), bare.login.is_none()), ("proxy:1080", true));
    }

    #[test]
    fn some_servers_need_none() {
        let proxies = Proxies::named("http://p:1", "example.org, 192.0.2.0/24,2001:db8::1").expect("a proxy");
        for (server, wanted) in [
            ("example.org:443", false),
            ("adit.example.org:443", false),
            ("notexample.org:443", true),
            ("192.0.2.7:443", false),
            ("198.51.100.7:443", true),
            ("[2001:db8::1]:443", false),
            ("[2001:db8::2]:443", true),
        ] {
            assert_eq!(proxies.to(server).is_some(), wanted, "{server}");
        }
        assert!(Proxies::default().to("example.org:443").is_none());
    }

    #[test]
    fn what_is_no_proxy_is_said_without_its_password() {
        for (url, named) in [
            ("ftp://u:secret@p", "no URL"),
            ("https://u:secret@p:1", "http://"),
            ("socks5://p", "http://"),
            ("a b", "no URL"),
        ] {
            let error = Proxies::choose(Some(url), None).expect_err(url).to_string();
            assert!(
                error.contains(named) && error.contains("--proxy") && !error.contains("secret"),
                "{error}"
            );
        }
        let none = Proxies::choose(Some("none"), Some("http://p:1")).expect("none");
        assert!(none.to("example.org:443").is_none());
        assert!(Proxies::choose(None, Some("http://p:1")).expect("one").to("example.org:443").is_some());
    }
}
