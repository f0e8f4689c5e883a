//! A local proxy to every target that the agent allows: SOCKS5 (RFC 1928) and HTTP CONNECT (RFC 9110 section 9.3.6) on
//! one port, told apart by their first byte. Names are resolved by the agent. No UDP, no BIND, no password: like every
//! forwarded port it is for this machine's own programs.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use adit_protocol::frame::ResetCode;
use adit_protocol::{InvalidTarget, Protocol, Target};
use fast_socks5::server::{Socks5ServerProtocol, states::CommandRead};
use fast_socks5::util::target_addr::TargetAddr;
use fast_socks5::{ReplyError, Socks5Command};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;

use super::complaint::Complaints;
use super::tcp;
use crate::http_head::read_head;
use crate::tunnel::{StreamError, Tunnel};

/// How long a program may take to say where it wants to.
const GREETING: Duration = Duration::from_secs(10);
/// How long a target may take: while there is no way to the agent, programs hear that and try again.
const OPENED: Duration = Duration::from_secs(30);
/// Connections at once: twice the streams of a session, for those that have not said what they want.
const CONNECTIONS: usize = 512;
/// First byte of SOCKS5 (RFC 1928 section 3), and of SOCKS4.
const SOCKS5: u8 = 5;
const SOCKS4: u8 = 4;
/// More header fields than any program sends.
const MAX_FIELDS: usize = 64;

/// Accepts connections until it is dropped; those above [`CONNECTIONS`] wait in the system's queue.
pub(super) async fn serve(listener: TcpListener, tunnel: Tunnel) {
    let complaints = Arc::new(Complaints::default());
    let mut connections = JoinSet::new();
    loop {
        let tcp = tcp::accept(&listener, &mut connections).await;
        connections.spawn(pass(tcp, tunnel.clone(), complaints.clone()));
        if connections.len() >= CONNECTIONS {
            connections.join_next().await;
        }
    }
}

async fn pass(tcp: TcpStream, tunnel: Tunnel, complaints: Arc<Complaints>) {
    let asked = match timeout(GREETING, Asked::read(tcp)).await {
        Ok(Ok(Some(asked))) => asked,
        Ok(Ok(None)) | Err(_) => return,
        Ok(Err(error)) => return debug!(%error, "a program asked for nothing that a proxy knows"),
    };
    let target = asked.target.clone();
    let opened = async {
        let stream = tunnel.open(&target).await.map_err(|_| StreamError::Closed)?;
        stream.opened().await.map(|()| stream)
    };
    let unanswered = StreamError::Reset(ResetCode::Unreachable);
    match timeout(OPENED, opened).await.unwrap_or(Err(unanswered)) {
        Ok(stream) => {
            if let Ok(tcp) = asked.accept().await {
                tcp::pass(tcp, stream, target, complaints).await;
            }
        }
        Err(error) => {
            complaints.say(&target, error);
            let _ = asked.refuse(error).await;
        }
    }
}

/// A program that waits for its connection.
struct Asked {
    target: Target,
    by: By,
}

enum By {
    Socks(Socks5ServerProtocol<TcpStream, CommandRead>),
    Http(TcpStream),
}

impl Asked {
    /// `None`: it wants something else, and has been told so.
    async fn read(tcp: TcpStream) -> io::Result<Option<Self>> {
        let mut first = [0];
        match tcp.peek(&mut first).await? {
            0 => Ok(None),
            _ if first == [SOCKS5] => Self::socks(tcp).await,
            _ if first == [SOCKS4] => Err(io::Error::new(io::ErrorKind::InvalidData, "SOCKS4: use SOCKS5")),
            _ => Self::http(tcp).await,
        }
    }

    async fn socks(tcp: TcpStream) -> io::Result<Option<Self>> {
        let protocol = Socks5ServerProtocol::accept_no_auth(tcp).await.map_err(io::Error::other)?;
        let (protocol, command, address) = protocol.read_command().await.map_err(io::Error::other)?;
        let target = match &address {
            TargetAddr::Ip(address) => Target::new(&address.ip().to_string(), address.port(), Protocol::Tcp),
            TargetAddr::Domain(name, port) => named(name, *port),
        };
        let refusal = match (command, target) {
            (Socks5Command::TCPConnect, Ok(target)) => {
                return Ok(Some(Self { target, by: By::Socks(protocol) }));
            }
            (Socks5Command::TCPConnect, Err(_)) => ReplyError::AddressTypeNotSupported,
            _ => ReplyError::CommandNotSupported,
        };
        protocol.reply_error(&refusal).await.map_err(io::Error::other)?;
        Ok(None)
    }

    async fn http(mut tcp: TcpStream) -> io::Result<Option<Self>> {
        let head = read_head(&mut tcp).await?;
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let mut request = httparse::Request::new(&mut fields);
        let whole = request.parse(&head).is_ok_and(|status| status.is_complete());
        let target = request.path.and_then(|path| path.rsplit_once(':')).map(|(host, port)| {
            let host = host.trim_start_matches('[').trim_end_matches(']');
            named(host, port.parse().map_err(|_| InvalidTarget)?)
        });
        let (status, text) = match (request.method, target) {
            _ if !whole => ("400 Bad Request", "That is no HTTP request."),
            (Some("CONNECT"), Some(Ok(target))) => return Ok(Some(Self { target, by: By::Http(tcp) })),
            (Some("CONNECT"), _) => ("400 Bad Request", "CONNECT wants HOST:PORT."),
            _ => (
                "501 Not Implemented",
                "This proxy takes CONNECT only; for http:// use it as SOCKS5 (socks5h://).",
            ),
        };
        answer(&mut tcp, status, text).await?;
        Ok(None)
    }

    /// The target is connected.
    async fn accept(self) -> io::Result<TcpStream> {
        match self.by {
            By::Socks(protocol) => {
                let nowhere = (std::net::Ipv4Addr::UNSPECIFIED, 0).into();
                protocol.reply_success(nowhere).await.map_err(io::Error::other)
            }
            By::Http(mut tcp) => {
                tcp.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await?;
                Ok(tcp)
            }
        }
    }

    /// It is not, and why.
    async fn refuse(self, error: StreamError) -> io::Result<()> {
        let code = match error {
            StreamError::Reset(code) => code,
            _ => ResetCode::SessionEnded,
        };
        match self.by {
            By::Socks(protocol) => {
                let reply = match code {
                    ResetCode::NotAllowed => ReplyError::ConnectionNotAllowed,
                    ResetCode::Refused => ReplyError::ConnectionRefused,
                    ResetCode::Unreachable | ResetCode::NotFound => ReplyError::HostUnreachable,
                    _ => ReplyError::GeneralFailure,
                };
                protocol.reply_error(&reply).await.map_err(io::Error::other)
            }
            By::Http(mut tcp) => {
                let status = if code == ResetCode::NotAllowed { "403 Forbidden" } else { "502 Bad Gateway" };
                answer(&mut tcp, status, &format!("{}: {error}.", self.target)).await
            }
        }
    }
}

/// A target whose name may end with the root's dot.
fn named(host: &str, port: u16) -> Result<Target, InvalidTarget> {
    Target::new(host.strip_suffix('.').unwrap_or(host), port, Protocol::Tcp)
}

async fn answer(tcp: &mut TcpStream, status: &str, text: &str) -> io::Result<()> {
    let length = text.len() + 1;
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{text}\n"
    );
    tcp.write_all(answer.as_bytes()).await?;
    tcp.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    /// What becomes of a program that says this; and what it hears when it is let through, or not.
    async fn said(bytes: &[u8], refused: Option<ResetCode>) -> (Option<String>, Vec<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let address = listener.local_addr().expect("bound");
        let program = async {
            let mut tcp = TcpStream::connect(address).await.expect("connects");
            tcp.write_all(bytes).await.expect("writes");
            let mut heard = Vec::new();
            // What is not read of it makes the end a reset.
            let _ = tcp.read_to_end(&mut heard).await;
            heard
        };
        let proxy = async {
            let (tcp, _) = listener.accept().await.expect("accepts");
            let asked = Asked::read(tcp).await.ok()??;
            let target = asked.target.to_string();
            match refused {
                Some(code) => asked.refuse(StreamError::Reset(code)).await.expect("answers"),
                None => drop(asked.accept().await.expect("answers")),
            }
            Some(target)
        };
        tokio::join!(proxy, program)
    }

    #[tokio::test]
    async fn socks5_and_connect_are_told_apart() {
        // version, 1 method, none · version, CONNECT, 0, a name of 3 characters, port 80
        let (target, heard) = said(b"\x05\x01\x00\x05\x01\x00\x03\x03web\x00\x50", None).await;
        assert_eq!(target.as_deref(), Some("web:80"));
        assert_eq!(heard, b"\x05\x00\x05\x00\x00\x01\0\0\0\0\0\0");
        let (target, _) = said(b"\x05\x01\x00\x05\x01\x00\x01\x0a\x00\x00\x07\x00\x16", None).await;
        assert_eq!(target.as_deref(), Some("10.0.0.7:22"));
        let mut v6 = b"\x05\x01\x00\x05\x01\x00\x04".to_vec();
        v6.extend([0; 15].into_iter().chain([1, 0, 80]));
        assert_eq!(said(&v6, None).await.0.as_deref(), Some("[::1]:80"));
        let (target, heard) = said(b"CONNECT Intranet.:443 HTTP/1.1\r\nHost: x\r\n\r\n", None).await;
        assert_eq!(target.as_deref(), Some("intranet:443"));
        assert!(heard.starts_with(b"HTTP/1.1 200 "));
        assert_eq!(
            said(b"CONNECT [fd00::7]:443 HTTP/1.1\r\n\r\n", None).await.0.as_deref(),
            Some("[fd00::7]:443")
        );
    }

    #[tokio::test]
    async fn refusals_are_said_in_the_programs_words() {
        let socks = b"\x05\x01\x00\x05\x01\x00\x03\x03web\x00\x50";
        for (code, reply) in [
            (ResetCode::NotAllowed, 2),
            (ResetCode::NotFound, 4),
            (ResetCode::Refused, 5),
            (ResetCode::Overloaded, 1),
        ] {
            assert_eq!(said(socks, Some(code)).await.1[3], reply);
        }
        let (_, heard) = said(b"CONNECT web:80 HTTP/1.1\r\n\r\n", Some(ResetCode::NotAllowed)).await;
        let heard = String::from_utf8(heard).expect("text");
        assert!(
            heard.starts_with("HTTP/1.1 403 ") && heard.contains("web:80: the agent's allow list"),
            "{heard}"
        );
    }

    #[tokio::test]
    async fn what_is_no_wish_of_a_proxys_is_refused() {
        for (bytes, wanted) in [
            // BIND, UDP ASSOCIATE
            (&b"\x05\x01\x00\x05\x02\x00\x03\x03web\x00\x50"[..], &b"\x05\x00\x05\x07"[..]),
            (b"\x05\x01\x00\x05\x03\x00\x03\x03web\x00\x50", b"\x05\x00\x05\x07"),
            // a name with a space in it
            (b"\x05\x01\x00\x05\x01\x00\x03\x03w b\x00\x50", b"\x05\x00\x05\x08"),
            // a password only
            (b"\x05\x01\x02", b"\x05\xff"),
            (b"\x04\x01\x00\x50\x0a\x00\x00\x07\x00", b""),
            (b"GET http://web/ HTTP/1.1\r\nHost: web\r\n\r\n", b"HTTP/1.1 501 "),
            (b"CONNECT web HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 "),
            (b"CONNECT web:0 HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 "),
            (b"nonsense\r\n\r\n", b"HTTP/1.1 400 "),
        ] {
            let (target, heard) = said(bytes, None).await;
            assert_eq!(target, None, "{bytes:?}");
            assert!(heard.starts_with(wanted), "{bytes:?}: {heard:?}");
        }
    }
}
