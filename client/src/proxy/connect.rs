//! One CONNECT through a proxy (RFC 9110 section 9.3.6), with Basic (RFC 7617) or Digest (RFC 7616) where the proxy
//! asks for it. A password is sent only when it was asked for, so that Digest is never preceded by clear text.

use std::io;
use std::sync::PoisonError;
use std::time::Duration;

use http_auth::{PasswordClient, PasswordParams};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::Proxy;
use crate::dial;
use crate::http_head::read_head;

/// How long a proxy may take for its answer: it connects to the server meanwhile.
const ANSWER: Duration = Duration::from_secs(10);
/// More header fields than any answer has.
const MAX_FIELDS: usize = 64;
/// Without a password, with one, and once more with one when the number that goes into it was too old.
const TRIES: usize = 3;

/// A connection through `proxy` to `server` (`HOST:PORT`).
pub(crate) async fn connect(proxy: &Proxy, server: &str) -> Result<TcpStream, ProxyError> {
    let mut last = ProxyError::NeedsPassword;
    for attempt in 0..TRIES {
        let unreachable = |error: dial::DialError| ProxyError::Unreachable(error.to_string());
        let mut stream = dial::tcp(&proxy.address).await.map_err(unreachable)?;
        let answered = proxy.authorization(server);
        let head = timeout(ANSWER, ask(&mut stream, server, answered.as_deref())).await;
        let head = head.map_err(|_| ProxyError::Silent)?.map_err(ProxyError::Lost)?;
        let Answer { code, phrase, challenges } = Answer::read(&head)?;
        match code {
            200..300 => return Ok(stream),
            // The first answer may have been to what was asked long ago.
            407 => {
                let answered = answered.is_some();
                last = proxy.challenged(&challenges, answered, answered && attempt > 0)?;
            }
            403 | 405 => return Err(ProxyError::Forbidden { code, phrase }),
            _ => return Err(ProxyError::Failed { code, phrase }),
        }
    }
    Err(last)
}

impl Proxy {
    /// The answer to what this proxy asked for the last time.
    fn authorization(&self, server: &str) -> Option<String> {
        let login = self.login.as_ref()?;
        let mut challenge = self.challenge.lock().unwrap_or_else(PoisonError::into_inner);
        let params = PasswordParams {
            username: &login.user,
            password: &login.password,
            uri: server,
            method: "CONNECT",
            // With a body the crate would take auth-int, and not as RFC 7616 section 3.4.3 has it.
            body: None,
        };
        challenge.as_mut()?.respond(&params).ok()
    }

    /// Keeps what the proxy asks for. The error to end with when it asks again and again.
    fn challenged(
        &self,
        challenges: &[String],
        answered: bool,
        again: bool,
    ) -> Result<ProxyError, ProxyError> {
        if self.login.is_none() {
            return Err(ProxyError::NeedsPassword);
        }
        let schemes = || ProxyError::Schemes(schemes(challenges));
        // Not joined to one: an unknown scheme need not have the form of the others.
        let client =
            challenges.iter().filter_map(|text| PasswordClient::builder().challenges(text).build().ok());
        let client =
            client.max_by_key(|client| matches!(client, PasswordClient::Digest(_))).ok_or_else(schemes)?;
        let stale = challenges
            .iter()
            .any(|text| text.to_ascii_lowercase().replace(['"', ' '], "").contains("stale=true"));
        let mut challenge = self.challenge.lock().unwrap_or_else(PoisonError::into_inner);
        // Basic is the same answer every time; the number in a digest may have been too old.
        let basic = answered && matches!(*challenge, Some(PasswordClient::Basic(_)));
        let wrong = basic || again && !stale;
        // A wrong one is not sent again and again: that locks accounts.
        *challenge = (!wrong).then_some(client);
        if wrong { Err(ProxyError::WrongPassword) } else { Ok(ProxyError::WrongPassword) }
    }
}

async fn ask(stream: &mut TcpStream, server: &str, authorization: Option<&str>) -> io::Result<Vec<u8>> {
    let authorization =
        authorization.map_or(String::new(), |value| format!("Proxy-Authorization: {value}\r\n"));
    let version = env!("CARGO_PKG_VERSION");
    let request = format!(
        "CONNECT {server} HTTP/1.1\r\nHost: {server}\r\nUser-Agent: adit/{version}\r\n{authorization}\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    read_head(stream).await
}

struct Answer {
    code: u16,
    phrase: String,
    challenges: Vec<String>,
}

impl Answer {
    fn read(head: &[u8]) -> Result<Self, ProxyError> {
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let mut response = httparse::Response::new(&mut fields);
        let parsed = response.parse(head);
        let (Ok(httparse::Status::Complete(_)), Some(code)) = (parsed, response.code) else {
            return Err(ProxyError::NoProxy);
        };
        let phrase =
            response.reason.unwrap_or_default().chars().filter(|c| !c.is_control()).take(100).collect();
        let challenge = |field: &&httparse::Header<'_>| field.name.eq_ignore_ascii_case("proxy-authenticate");
        let text = |field: &httparse::Header<'_>| String::from_utf8_lossy(field.value).into_owned();
        let challenges = response.headers.iter().filter(challenge).map(text).collect();
        Ok(Self { code, phrase, challenges })
    }
}

/// The first word of each challenge.
fn schemes(challenges: &[String]) -> String {
    let name = |text: &String| {
        let word = text.split_whitespace().next().unwrap_or_default();
        word.chars().filter(char::is_ascii_graphic).take(20).collect::<String>()
    };
    challenges.iter().take(5).map(name).collect::<Vec<_>>().join(", ")
}

/// Why there is no way through the proxy.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// Nobody answers there.
    #[error("cannot be reached: {0}")]
    Unreachable(String),
    /// It hung up.
    #[error("ended the connection: {0}")]
    Lost(io::Error),
    /// It does not answer.
    #[error("did not answer within {} s", ANSWER.as_secs())]
    Silent,
    /// What answers speaks no HTTP.
    #[error("does not answer as a proxy does")]
    NoProxy,
    /// It wants a name and a password, and none is known.
    #[error("wants a name and a password")]
    NeedsPassword,
    /// It does not take the ones that we have.
    #[error("does not accept the name and password")]
    WrongPassword,
    /// It wants to know who we are in ways that we do not know.
    #[error("asks for {0}, and adit knows Basic and Digest")]
    Schemes(String),
    /// Its rules do not let us through.
    #[error("does not permit it: {code} {phrase}")]
    Forbidden {
        /// HTTP status.
        code: u16,
        /// And its text.
        phrase: String,
    },
    /// It could not connect either.
    #[error("does not get through: {code} {phrase}")]
    Failed {
        /// HTTP status.
        code: u16,
        /// And its text.
        phrase: String,
    },
}

impl ProxyError {
    /// What helps.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Unreachable(_) | Self::Silent | Self::Lost(_) | Self::NoProxy => {
                "check the proxy's address (--proxy, [network] proxy, or HTTPS_PROXY); without a proxy: --proxy none"
            }
            Self::NeedsPassword | Self::WrongPassword => {
                "give it as http://USER:PASSWORD@HOST:PORT, in [network] proxy or HTTPS_PROXY"
            }
            Self::Schemes(_) => {
                "ask the network's administrators for a way without that, or run a local proxy that knows it"
            }
            Self::Forbidden { .. } => {
                "ask the network's administrators to permit CONNECT to this server on its port"
            }
            Self::Failed { .. } => "check that the mediator runs and that the proxy's network reaches it",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Proxies;
    use super::*;
    use crate::http_head::MAX_HEAD;
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    /// A proxy that answers so, one connection after the other; what it was asked.
    async fn scripted(url_login: &str, answers: &[&str]) -> (Result<TcpStream, ProxyError>, Vec<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let address = listener.local_addr().expect("bound");
        let proxies = Proxies::named(&format!("http://{url_login}{address}"), "").expect("a proxy");
        let proxy = proxies.to("server.example:443").expect("for all").clone();
        let serving = async {
            let mut asked = Vec::new();
            for answer in answers {
                let (mut stream, _) = listener.accept().await.expect("accepts");
                let head = read_head(&mut stream).await.expect("a request");
                asked.push(String::from_utf8(head).expect("text"));
                stream.write_all(answer.as_bytes()).await.expect("writes");
            }
            asked
        };
        tokio::join!(connect(&proxy, "server.example:443"), serving)
    }

    #[tokio::test]
    async fn what_follows_the_answer_is_left_for_its_reader() {
        let (stream, asked) =
            scripted("", &["HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\nSSH-2.0"]).await;
        let mut behind = [0; 7];
        stream.expect("through").read_exact(&mut behind).await.expect("reads");
        assert_eq!(&behind, b"SSH-2.0");
        assert!(asked[0].starts_with("CONNECT server.example:443 HTTP/1.1\r\nHost: server.example:443\r\n"));
        assert!(!asked[0].contains("Authorization"), "{}", asked[0]);
    }

    #[tokio::test]
    async fn a_password_is_sent_when_it_is_asked_for_and_digest_goes_before_basic() {
        const OK: &str = "HTTP/1.1 200 OK\r\n\r\n";
        let basic = "HTTP/1.1 407 No\r\nProxy-Authenticate: Negotiate\r\nproxy-authenticate: Basic realm=\"x\"\r\n\r\n";
        let (stream, asked) = scripted("anna:secret@", &[basic, OK]).await;
        stream.expect("through");
        assert!(!asked[0].contains("Authorization"));
        assert!(asked[1].contains("Proxy-Authorization: Basic YW5uYTpzZWNyZXQ=\r\n"), "{}", asked[1]);

        let digest = "HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=\"x\"\r\nProxy-Authenticate: Digest realm=\"x\", \
                      nonce=\"abc\", qop=\"auth\", algorithm=MD5\r\n\r\n";
        let stale = digest.replace("nonce=\"abc\"", "nonce=\"def\", stale=true");
        let (stream, asked) = scripted("anna:secret@", &[digest, &stale, OK]).await;
        stream.expect("through");
        assert!(
            asked[1].contains("Proxy-Authorization: Digest ")
                && asked[1].contains("uri=\"server.example:443\"")
        );
        assert!(asked[2].contains("nonce=\"def\""), "{}", asked[2]);
        assert!(!asked.join("").contains("secret"));
    }

    #[tokio::test]
    async fn refusals_are_told_apart() {
        let asks = "HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=\"x\"\r\n\r\n";
        let ntlm = "HTTP/1.1 407 No\r\nProxy-Authenticate: NTLM\r\nProxy-Authenticate: Negotiate\r\n\r\n";
        let long = format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "y".repeat(MAX_HEAD));
        for (login, answers, wanted) in [
            ("", &[asks][..], "wants a name and a password"),
            ("a:b@", &[asks, asks], "does not accept the name"),
            ("a:b@", &[ntlm], "asks for NTLM, Negotiate"),
            ("", &["HTTP/1.1 403 Forbidden\r\n\r\n"], "403 Forbidden"),
            ("", &["HTTP/1.1 502 Bad Gateway\x07\r\n\r\n"], "does not answer as a proxy"),
            ("", &["HTTP/1.1 504 Gateway Timeout\r\n\r\n"], "504 Gateway Timeout"),
            ("", &["SSH-2.0-x\r\n\r\n"], "does not answer as a proxy"),
            ("", &[""], "ended the connection"),
            ("", &[long.as_str()], "too long for the head"),
        ] {
            let (stream, _) = scripted(login, answers).await;
            let error = stream.expect_err(wanted);
            assert!(error.to_string().contains(wanted), "{error}");
            println!("the proxy {error}\n  {}", error.remedy());
        }
    }
}
