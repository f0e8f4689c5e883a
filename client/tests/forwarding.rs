//! Local ports through a real tunnel to real sockets, in one process.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use adit_client::allow::{AllowList, Entry};
use adit_client::copy::{CopyError, copy_halves};
use adit_client::forward::{ForwardSpec, Listener};
use adit_client::target::{serve_flow, serve_stream};
use adit_client::tunnel::{Notice, StreamError, Tunnel, byte_carrier};
use adit_protocol::frame::ResetCode;
use adit_protocol::{SessionId, Target};
use adit_tunnel::session::{CarrierKind, End};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// More than any step takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_of_file_ends_one_direction_only() {
    let session = Session::up().await;
    let (target, local) = session.forward().await;
    let server = tokio::spawn(async move {
        // The first client ends first, the second one last.
        let (mut first, _) = target.accept().await.expect("accepts");
        let mut question = Vec::new();
        first.read_to_end(&mut question).await.expect("reads");
        assert_eq!(question, b"question");
        first.write_all(b"answer").await.expect("writes");
        drop(first);
        let (mut second, _) = target.accept().await.expect("accepts");
        second.write_all(b"greeting").await.expect("writes");
        second.shutdown().await.expect("ends");
        let mut rest = Vec::new();
        second.read_to_end(&mut rest).await.expect("reads");
        rest
    });
    let both = async {
        let mut first = TcpStream::connect(local).await.expect("connects");
        first.write_all(b"question").await.expect("writes");
        first.shutdown().await.expect("ends");
        let mut answer = Vec::new();
        first.read_to_end(&mut answer).await.expect("reads");
        assert_eq!(answer, b"answer");

        let mut second = TcpStream::connect(local).await.expect("connects");
        let mut greeting = Vec::new();
        second.read_to_end(&mut greeting).await.expect("reads");
        assert_eq!(greeting, b"greeting");
        second.write_all(b"late words").await.expect("writes");
        drop(second);
        assert_eq!(server.await.expect("no panic"), b"late words");
    };
    timeout(PATIENCE, both).await.expect("in time");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_mebibytes_come_back_as_they_went() {
    const SIZE: usize = 64 << 20;
    let session = Session::up().await;
    let (target, local) = session.forward().await;
    echo(target);
    let (mut reader, mut writer) = TcpStream::connect(local).await.expect("connects").into_split();
    let writing = tokio::spawn(async move {
        // Sizes that fit no buffer.
        for start in (0..SIZE).step_by(70_001) {
            let piece: Vec<u8> = (start..SIZE.min(start + 70_001)).map(pattern).collect();
            writer.write_all(&piece).await.expect("writes");
        }
        writer.shutdown().await.expect("ends");
    });
    let reading = async {
        let (mut buffer, mut received) = (vec![0; 100_000], 0);
        loop {
            let length = reader.read(&mut buffer).await.expect("reads");
            if length == 0 {
                return received;
            }
            let wrong = (received..).zip(&buffer[..length]).find(|(n, byte)| pattern(*n) != **byte);
            assert_eq!(wrong, None, "first wrong byte");
            received += length;
        }
    };
    assert_eq!(timeout(PATIENCE, reading).await.expect("in time"), SIZE);
    writing.await.expect("no panic");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_passes_both_ways() {
    let session = Session::up().await;
    let (target, local) = session.forward().await;
    // The target resets; the local client waits for bytes and sends none.
    let mut client = TcpStream::connect(local).await.expect("connects");
    let (mut served, _) = accept(&target).await;
    served.write_all(b"!").await.expect("writes");
    assert_eq!(client.read_u8().await.expect("reads"), b'!');
    reset(served);
    assert_eq!(ended(&mut client).await, Err(io::ErrorKind::ConnectionReset));

    // The local client resets; the target waits.
    let mut client = TcpStream::connect(local).await.expect("connects");
    client.write_all(b"?").await.expect("writes");
    let (mut served, _) = accept(&target).await;
    assert_eq!(served.read_u8().await.expect("reads"), b'?');
    reset(client);
    assert_eq!(ended(&mut served).await, Err(io::ErrorKind::ConnectionReset));

    // The target has ended its direction before it resets: nothing is left to read locally.
    let mut client = TcpStream::connect(local).await.expect("connects");
    let (mut served, _) = accept(&target).await;
    served.shutdown().await.expect("ends");
    assert_eq!(ended(&mut client).await, Ok(()));
    reset(served);
    let broken = async {
        while client.write_all(b"anyone?").await.is_ok() {
            client.writable().await.expect("a socket");
        }
    };
    timeout(PATIENCE, broken).await.expect("the client notices");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_reached_says_why() {
    let session = Session::up().await;
    let closed = closed_port().await;
    for (target, code) in [
        (format!("127.0.0.1:{closed}"), ResetCode::Refused),
        ("127.0.0.2:1".to_owned(), ResetCode::NotAllowed),
        ("nowhere.invalid:80".to_owned(), ResetCode::NotFound),
    ] {
        let target: Target = target.parse().expect("a target");
        let mut stream = session.tunnel.open(&target).await.expect("opens");
        // Nothing comes from the local side, and nothing ends there.
        let (near, _far) = tokio::io::duplex(64);
        let (reader, writer) = tokio::io::split(near);
        let error = timeout(PATIENCE, copy_halves(reader, writer, &mut stream)).await.expect("in time");
        let Err(CopyError::Stream(error)) = error else { panic!("{target}: {error:?}") };
        assert_eq!(error, StreamError::Reset(code), "{target}");
    }
    // And what a local client sees of it.
    let local = session.listen(&format!("0:127.0.0.1:{closed}")).await;
    let seen = match TcpStream::connect(local).await {
        Ok(mut client) => ended(&mut client).await,
        // It was quicker than we looked.
        Err(error) => Err(error.kind()),
    };
    assert_eq!(seen, Err(io::ErrorKind::ConnectionReset));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_never_reads_stops_nobody_else() {
    let session = Session::up().await;
    let (target, local) = session.forward().await;
    let flood = tokio::spawn(async move {
        let (mut served, _) = target.accept().await.expect("accepts");
        let piece = vec![7; 64 * 1024];
        let mut sent = 0;
        while served.write_all(&piece).await.is_ok() {
            sent += piece.len();
        }
        sent
    });
    let deaf = TcpStream::connect(local).await.expect("connects");
    deaf.readable().await.expect("the flood is there");

    let (target, local) = session.forward().await;
    echo(target);
    let (mut reader, mut writer) = TcpStream::connect(local).await.expect("connects").into_split();
    let writing = tokio::spawn(async move {
        let piece = vec![9; 1 << 20];
        for _ in 0..8 {
            writer.write_all(&piece).await.expect("writes");
        }
        writer.shutdown().await.expect("ends");
    });
    let mut all = Vec::new();
    timeout(PATIENCE, reader.read_to_end(&mut all)).await.expect("in time").expect("reads");
    assert_eq!(all.len(), 8 << 20);
    writing.await.expect("no panic");
    // The end of the deaf one frees the target.
    drop(deaf);
    let sent = timeout(PATIENCE, flood).await.expect("in time").expect("no panic");
    assert!(sent < 64 << 20, "{sent} bytes went to someone who never reads");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_connections_than_streams_all_finish() {
    let session = Session::up().await;
    let (target, local) = session.forward().await;
    echo(target);
    let mut clients = JoinSet::new();
    for number in 0..300u32 {
        clients.spawn(async move {
            let mut client = TcpStream::connect(local).await.expect("connects");
            let words = number.to_string().repeat(1000);
            client.write_all(words.as_bytes()).await.expect("writes");
            client.shutdown().await.expect("ends");
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.expect("reads");
            assert_eq!(answer, words);
        });
    }
    let finished = timeout(PATIENCE, clients.join_all()).await.expect("in time");
    assert_eq!(finished.len(), 300);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn datagrams_come_back_to_who_sent_them() {
    let session = Session::up().await;
    let target = UdpSocket::bind("127.0.0.1:0").await.expect("binds");
    let port = target.local_addr().expect("bound").port();
    tokio::spawn(async move {
        let mut buffer = vec![0; 65_536];
        while let Ok((length, source)) = target.recv_from(&mut buffer).await {
            buffer[..length].reverse();
            let _ = target.send_to(&buffer[..length], source).await;
        }
    });
    let local = session.listen(&format!("0:127.0.0.1:{port}/udp")).await;
    // More sources than there may be flows: the quietest make room.
    for number in 0..100u32 {
        let client = UdpSocket::bind("127.0.0.1:0").await.expect("binds");
        client.connect(local).await.expect("connects");
        let words = format!("{number} {}", "x".repeat(number as usize * 10));
        client.send(words.as_bytes()).await.expect("sends");
        let mut buffer = vec![0; 65_536];
        let received = timeout(PATIENCE, client.recv(&mut buffer)).await;
        let length = received.unwrap_or_else(|_| panic!("no answer to datagram {number}")).expect("receives");
        assert_eq!(buffer[..length].iter().rev().copied().collect::<Vec<u8>>(), words.as_bytes());
    }
    // An empty datagram is one, too.
    let client = UdpSocket::bind("127.0.0.1:0").await.expect("binds");
    client.connect(local).await.expect("connects");
    client.send(b"").await.expect("sends");
    let length = timeout(PATIENCE, client.recv(&mut [0; 8])).await.expect("in time").expect("receives");
    assert_eq!(length, 0);
}

#[tokio::test]
async fn a_chosen_port_is_said_and_a_taken_one_is_an_error() {
    use adit_client::exit::{Exit, Failure};
    let spec: ForwardSpec = "0:127.0.0.1:3389".parse().expect("a forward");
    let first = Listener::bind(&spec, "some-agent").await.expect("binds");
    let port = first.local().port();
    assert!(first.local().ip().is_loopback() && port > 0);
    // The preferred one is taken now.
    let second = Listener::bind(&spec, "some-agent").await.expect("binds");
    assert_ne!(second.local().port(), port);
    drop(first);
    let again = Listener::bind(&spec, "some-agent").await.expect("binds");
    assert_eq!(again.local().port(), port, "the same again");

    let taken: ForwardSpec = format!("{port}:127.0.0.1:3389").parse().expect("a forward");
    let error = Listener::bind(&taken, "some-agent").await.expect_err("it is taken");
    assert_eq!(error.exit(), Exit::Usage);
    assert!(error.remedy().expect("has one").contains(&port.to_string()));
}

/// A tunnel with an agent at its other end that serves everything on 127.0.0.1.
struct Session {
    tunnel: Tunnel,
    serving: std::sync::Mutex<JoinSet<()>>,
}

impl Session {
    async fn up() -> Self {
        let allow = ["127.0.0.1:1-65535", "127.0.0.1:1-65535/udp", "nowhere.invalid:80"];
        let allow: AllowList = allow.iter().map(|entry| entry.parse::<Entry>().expect(entry)).collect();
        let allow = Arc::new(allow);
        let id = SessionId([3; 16]);
        let (tunnel, mut notices) = Tunnel::new(End::Technician, id);
        let (agent, mut incoming) = Tunnel::new(End::Agent, id);
        let (one, other) = tcp_pair().await;
        let mut serving = JoinSet::new();
        let near = byte_carrier::run(tunnel.clone(), CarrierKind::Relay, one, None, None);
        let far = byte_carrier::run(agent, CarrierKind::Relay, other, None, None);
        serving.spawn(async move { drop(tokio::join!(near, far)) });
        serving.spawn(async move { while notices.recv().await.is_some() {} });
        serving.spawn(async move {
            let mut targets = JoinSet::new();
            while let Some(notice) = incoming.recv().await {
                match notice {
                    Notice::Incoming(stream, target) => {
                        targets.spawn(serve_stream(stream, target, allow.clone()));
                    }
                    Notice::IncomingFlow(flow, target) => {
                        targets.spawn(serve_flow(flow, target, allow.clone()));
                    }
                    _ => {}
                }
            }
        });
        Self { tunnel, serving: serving.into() }
    }

    /// A local port for `spec`.
    async fn listen(&self, spec: &str) -> SocketAddr {
        let listener = Listener::bind(&spec.parse().expect(spec), "agent").await.expect("binds");
        let local = listener.local();
        self.serving.lock().expect("no panic").spawn(listener.serve(self.tunnel.clone()));
        local
    }

    /// A new target, and a local port that leads to it.
    async fn forward(&self) -> (TcpListener, SocketAddr) {
        let target = TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let port = target.local_addr().expect("bound").port();
        let local = self.listen(&format!("0:127.0.0.1:{port}")).await;
        (target, local)
    }
}

async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    timeout(PATIENCE, listener.accept()).await.expect("in time").expect("accepts")
}

/// How a connection ends on which nothing more comes.
async fn ended(connection: &mut TcpStream) -> Result<(), io::ErrorKind> {
    let mut rest = Vec::new();
    let end = timeout(PATIENCE, connection.read_to_end(&mut rest)).await.expect("in time");
    assert!(rest.is_empty(), "{rest:?}");
    end.map(drop).map_err(|error| error.kind())
}

fn reset(connection: TcpStream) {
    SockRef::from(&connection).set_linger(Some(Duration::ZERO)).expect("a socket");
}

fn echo(listener: TcpListener) {
    tokio::spawn(async move {
        while let Ok((served, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = served.into_split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
            });
        }
    });
}

fn pattern(position: usize) -> u8 {
    (position.wrapping_mul(0x9e37_79b9) >> 13) as u8
}

async fn closed_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    listener.local_addr().expect("bound").port()
}

async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let address = listener.local_addr().expect("bound");
    let (one, other) = tokio::join!(TcpStream::connect(address), listener.accept());
    (one.expect("connects"), other.expect("accepts").0)
}
