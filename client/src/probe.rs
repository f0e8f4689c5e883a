//! Tries whether servers can be reached from here: the connection test behind `doctor`.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_protocol::control::{Probe, Probed, Reached};
use adit_tunnel::path::stun;
use stun_rs::MessageDecoderBuilder;
use stun_rs::attributes::stun::XorMappedAddress;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::dial::{self, DialError};
use crate::identity::Identity;
use crate::tls;

/// Addresses of one kind that one request may name.
const MAX_ADDRESSES: usize = 16;
/// Requests over UDP until one is answered; a datagram may be lost.
const TRIES: usize = 3;
/// How long each of them is waited for.
const TRY: Duration = Duration::from_secs(1);
/// How long a relay may take to send a stranger away: 5 s (THREATS row 1), and the way there and back.
const SENT_AWAY: Duration = Duration::from_secs(7);

/// Tries everything that the mediator asks about, at once. TLS is tried with this device's own identity, the
/// relay with nothing, so that it must send us away.
pub async fn run(identity: Arc<Identity>, probe: Probe) -> Probed {
    let Probe { request, https, relay, stun } = probe;
    let mut tries = JoinSet::new();
    for address in https.into_iter().take(MAX_ADDRESSES) {
        let identity = identity.clone();
        tries.spawn(async move { reached("https", address.clone(), control(&address, &identity).await) });
    }
    for address in relay.into_iter().take(MAX_ADDRESSES) {
        tries.spawn(async move { reached("relay", address.clone(), stranger(&address).await) });
    }
    for address in stun.into_iter().take(MAX_ADDRESSES) {
        tries.spawn(async move { reached("stun", address.clone(), binding(&address).await) });
    }
    let mut results = tries.join_all().await;
    results.sort_by(|a, b| (&a.what, &a.address).cmp(&(&b.what, &b.address)));
    Probed { request, results }
}

/// What was found out, or why not.
type Found = Result<(Duration, String), String>;

fn reached(what: &str, address: String, found: Found) -> Reached {
    let (what, ok) = (what.to_owned(), found.is_ok());
    match found {
        Ok((time, detail)) => Reached { what, address, ok, micros: time.as_micros() as u64, detail },
        Err(detail) => Reached { what, address, ok, micros: 0, detail },
    }
}

/// A TLS handshake in which both ends accept each other.
async fn control(address: &str, identity: &Identity) -> Found {
    let config = tls::control_client(identity).map_err(|error| error.to_string())?;
    let start = Instant::now();
    match dial::tls(address, Arc::new(config), &identity.proxies).await {
        Ok(stream) => {
            Ok((start.elapsed(), stream.get_ref().0.peer_addr().map_or(String::new(), |at| at.to_string())))
        }
        Err(error) => Err(error.to_string()),
    }
}

/// A relay must take the connection, and forward nothing without a ticket: it sends one byte that says so, or
/// none, and closes.
async fn stranger(address: &str) -> Found {
    let start = Instant::now();
    let mut stream = dial::tcp(address).await.map_err(|error: DialError| error.to_string())?;
    let time = start.elapsed();
    let mut answer = [0; 64];
    let sent_away = async {
        // A preamble with nothing in it.
        stream.write_all(&[0, 0]).await?;
        let mut count = 0;
        loop {
            match stream.read(&mut answer[count..]).await? {
                0 => return io::Result::Ok(count),
                more => count += more,
            }
        }
    };
    match timeout(SENT_AWAY, sent_away).await {
        Ok(Ok(count)) if count <= 1 => Ok((time, "sends strangers away".to_owned())),
        Ok(Ok(count)) => Err(format!("it sent {count} bytes to a stranger: that is no relay of adit")),
        // Closed with what we sent unread.
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
            Ok((time, "sends strangers away".to_owned()))
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("it keeps a stranger's connection: that is no relay of adit".to_owned()),
    }
}

/// A STUN Binding request (RFC 8489) and its answer; finds out the address that the server sees.
async fn binding(address: &str) -> Found {
    let resolved = timeout(TRY * 5, tokio::net::lookup_host(address)).await;
    let resolved = resolved.map_err(|_| "its name does not resolve in time".to_owned())?;
    let mut last = "its name has no address".to_owned();
    for server in resolved.map_err(|error| error.to_string())? {
        match ask(server).await {
            Ok(found) => return Ok(found),
            Err(error) => last = error.to_string(),
        }
    }
    Err(last)
}

async fn ask(server: SocketAddr) -> io::Result<(Duration, String)> {
    let any = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
    socket.connect(server).await?;
    for _ in 0..TRIES {
        let id: [u8; 12] = rand::random();
        let request = stun::binding_request(id);
        let start = Instant::now();
        socket.send(&request).await?;
        let mut answer = [0; 576];
        let answered = async {
            loop {
                let count = socket.recv(&mut answer).await?;
                // The answer to an earlier try is not one to this.
                if answer[..count].get(8..20) == Some(&id[..]) {
                    return io::Result::Ok(count);
                }
            }
        };
        let Ok(count) = timeout(TRY, answered).await else { continue };
        let decoded = MessageDecoderBuilder::default().build().decode(&answer[..count?]);
        let mapped = decoded.ok().and_then(|(message, _)| {
            let mapped = message.get::<XorMappedAddress>()?.as_xor_mapped_address().ok()?;
            Some(mapped.socket_address().to_string())
        });
        let mapped = mapped.ok_or_else(|| io::Error::other("what answers there is no STUN server"))?;
        return Ok((start.elapsed(), format!("sees {mapped}")));
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer to {TRIES} requests")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn a_stun_server_is_told_from_silence_and_from_something_else() {
        let server = UdpSocket::bind("127.0.0.1:0").await.expect("binds");
        let address = server.local_addr().expect("bound").to_string();
        let answering = async {
            let mut buffer = [0; 576];
            let (count, from) = server.recv_from(&mut buffer).await.expect("receives");
            let answer = stun::binding_response(&buffer[..count], from).expect("a request");
            server.send_to(&answer, from).await.expect("sends");
            let (count, from) = server.recv_from(&mut buffer).await.expect("receives");
            server.send_to(&buffer[..count], from).await.expect("sends");
        };
        let asking = async {
            let (_, detail) = binding(&address).await.expect("answers");
            assert!(detail.starts_with("sees 127.0.0.1:"), "{detail}");
            let error = binding(&address).await.expect_err("only echoes");
            assert!(error.contains("no STUN server"), "{error}");
        };
        tokio::join!(answering, asking);
    }

    #[tokio::test]
    async fn whoever_talks_to_strangers_is_no_relay() {
        let closed = TcpListener::bind("127.0.0.1:0").await.expect("binds").local_addr().expect("bound");
        assert!(stranger(&closed.to_string()).await.is_err(), "nobody listens");
        for (answer, is_relay) in [(&b""[..], true), (b"\x02", true), (b"SSH-2.0-x\r\n", false)] {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
            let address = listener.local_addr().expect("bound").to_string();
            let serving = async {
                let (mut stream, _) = listener.accept().await.expect("accepts");
                let mut preamble = [0; 2];
                stream.read_exact(&mut preamble).await.expect("reads");
                stream.write_all(answer).await.expect("writes");
            };
            let (found, ()) = tokio::join!(stranger(&address), serving);
            assert_eq!(found.is_ok(), is_relay, "{found:?}");
        }
    }
}
