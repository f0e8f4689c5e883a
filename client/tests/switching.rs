//! One stream over real sockets, switched from carrier to carrier a hundred times while data flows.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use adit_client::tunnel::{Notice, Tunnel, TunnelStream, byte_carrier, quic_carrier};
use adit_protocol::SessionId;
use adit_tunnel::session::{CarrierKind, End};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Endpoint, ServerConfig};
use rustls::pki_types::PrivatePkcs8KeyDer;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::timeout;

const SWITCHES: usize = 100;
/// Bytes that come back between two switches, at least.
const EACH: u64 = 30_000;
/// More than any step takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

async fn carry(tunnel: Tunnel, connection: quinn::Connection) -> String {
    quic_carrier::run(tunnel, connection, None, &std::sync::OnceLock::new()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_survives_a_hundred_switches() {
    let id = SessionId([9; 16]);
    let (technician, mut notices) = Tunnel::new(End::Technician, id);
    let (agent, incoming) = Tunnel::new(End::Agent, id);
    let quic = Quic::new();
    let mut carrier = attach(&technician, &agent, &quic, 0).await;

    let stream = technician.open(&"127.0.0.1:9".parse().expect("a target")).await.expect("opens");
    let echo = tokio::spawn(echo(incoming));
    timeout(PATIENCE, stream.opened()).await.expect("in time").expect("accepted");

    // Ends when every switch is done, so that data flows through all of them.
    let (stop, mut stopped) = tokio::sync::watch::channel(false);
    let (progress, mut progressed) = tokio::sync::watch::channel(0);
    let traffic = tokio::spawn(async move {
        let (mut sent, mut received) = (0u64, 0u64);
        loop {
            let done = *stopped.borrow_and_update();
            if done {
                stream.finish();
            }
            tokio::select! {
                room = stream.writable(), if !done => {
                    let room = room.expect("the stream lives").min(30_000) as u64;
                    stream.write_bytes((sent..sent + room).map(pattern).collect::<Vec<u8>>().into()).expect("lives");
                    sent += room;
                }
                _ = stopped.changed(), if !done => {}
                chunk = stream.read_chunk(50_000) => {
                    let chunk = chunk.expect("the stream lives");
                    if chunk.is_empty() {
                        return (sent, received);
                    }
                    let wrong = (received..).zip(&chunk).find(|(n, byte)| pattern(*n) != **byte);
                    assert_eq!(wrong, None, "first wrong byte");
                    received += chunk.len() as u64;
                    progress.send_replace(received);
                }
            }
        }
    });

    for switch in 1..=SWITCHES {
        let next = attach(&technician, &agent, &quic, switch).await;
        if switch % 3 == 0 {
            // Two are there: the older one dies.
            active(&mut notices).await;
        }
        // Every carrier has carried something when it dies.
        let before = *progressed.borrow();
        let moved = progressed.wait_for(|received| *received >= before + EACH);
        timeout(PATIENCE, moved).await.expect("bytes flow").expect("the traffic lives");
        carrier.kill();
        carrier = next;
    }
    stop.send(true).expect("the traffic still flows");
    let (sent, received) = timeout(PATIENCE, traffic).await.expect("comes to an end").expect("no panic");
    assert_eq!(sent, received);
    assert!(sent >= SWITCHES as u64 * EACH, "only {sent} bytes flowed");
    timeout(PATIENCE, echo).await.expect("comes to an end").expect("no panic");
    println!("{SWITCHES} switches, {sent} bytes each way, every one where it belongs");
}

/// Both ends of one carrier.
struct Carrier(Vec<AbortHandle>);

impl Carrier {
    fn kill(self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

async fn attach(technician: &Tunnel, agent: &Tunnel, quic: &Quic, number: usize) -> Carrier {
    let spawn = |task: JoinHandle<String>| task.abort_handle();
    let (one, other) = if number.is_multiple_of(2) {
        let (one, other) = tcp_pair().await;
        (
            spawn(tokio::spawn(byte_carrier::run(technician.clone(), CarrierKind::Relay, one, None, None))),
            spawn(tokio::spawn(byte_carrier::run(agent.clone(), CarrierKind::Relay, other, None, None))),
        )
    } else {
        let (one, other) = quic.pair().await;
        (
            spawn(tokio::spawn(carry(technician.clone(), one))),
            spawn(tokio::spawn(carry(agent.clone(), other))),
        )
    };
    Carrier(vec![one, other])
}

async fn active(notices: &mut mpsc::Receiver<Notice>) {
    let moved = async {
        while let Some(notice) = notices.recv().await {
            if matches!(notice, Notice::Active(..)) {
                return;
            }
        }
    };
    timeout(PATIENCE, moved).await.expect("a carrier becomes active");
}

async fn echo(mut incoming: mpsc::Receiver<Notice>) {
    while let Some(notice) = incoming.recv().await {
        if let Notice::Incoming(stream, _) = notice {
            return echo_stream(stream).await;
        }
    }
}

async fn echo_stream(stream: TunnelStream) {
    stream.accept();
    loop {
        let room = stream.writable().await.expect("the stream lives");
        let chunk = stream.read_chunk(room).await.expect("the stream lives");
        if chunk.is_empty() {
            return stream.finish();
        }
        stream.write_bytes(chunk).expect("the stream lives");
    }
}

fn pattern(offset: u64) -> u8 {
    (offset * 7 + (offset >> 8) * 13 + (offset >> 16)) as u8
}

async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let address = listener.local_addr().expect("is bound");
    let (one, other) = tokio::join!(TcpStream::connect(address), listener.accept());
    (one.expect("connects"), other.expect("accepts").0)
}

struct Quic {
    server: Endpoint,
    client: Endpoint,
    address: SocketAddr,
}

impl Quic {
    fn new() -> Self {
        let any = "127.0.0.1:0".parse().expect("an address");
        let key = rcgen::generate_simple_self_signed(["adit.invalid".to_owned()]).expect("a certificate");
        let private = PrivatePkcs8KeyDer::from(key.signing_key.serialize_der());
        let provider = adit_client::tls::provider();
        let tls13 = [&rustls::version::TLS13];
        let server = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&tls13)
            .expect("TLS 1.3")
            .with_no_client_auth()
            .with_single_cert(vec![key.cert.der().clone()], private.into())
            .expect("a key that fits");
        let mut roots = rustls::RootCertStore::empty();
        roots.add(key.cert.der().clone()).expect("a certificate");
        let client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&tls13)
            .expect("TLS 1.3")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let crypto = QuicServerConfig::try_from(server).expect("fits QUIC");
        let mut config = ServerConfig::with_crypto(Arc::new(crypto));
        let mut transport = quinn::TransportConfig::default();
        transport.max_concurrent_uni_streams(1024u32.into());
        config.transport_config(Arc::new(transport));
        let server = Endpoint::server(config, any).expect("binds");
        let mut endpoint = Endpoint::client(any).expect("binds");
        let crypto = QuicClientConfig::try_from(client).expect("fits QUIC");
        endpoint.set_default_client_config(ClientConfig::new(Arc::new(crypto)));
        let address = server.local_addr().expect("is bound");
        Self { server, client: endpoint, address }
    }

    async fn pair(&self) -> (quinn::Connection, quinn::Connection) {
        let connecting = self.client.connect(self.address, "adit.invalid").expect("a good name");
        let accepting = async { self.server.accept().await.expect("open").await };
        let (one, other) = tokio::join!(connecting, accepting);
        (one.expect("connects"), other.expect("accepts"))
    }
}
