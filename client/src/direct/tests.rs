//! Two endpoints in one process, over loopback.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use adit_protocol::control::IceCredentials;
use adit_protocol::{DeviceId, Role, SessionId};
use adit_tunnel::path::{IceRole, stun};
use quinn::{Connection, ConnectionError, VarInt};
use rustls::pki_types::CertificateDer;
use stun_rs::MessageDecoder;
use stun_rs::attributes::stun::UserName;

use super::*;
use crate::identity::certificate::{Authority, Subject};
use crate::identity::{DeviceKey, Live, Peer};

const AGENT: DeviceId = DeviceId([0xa; 16]);
const TECHNICIAN: DeviceId = DeviceId([0x7; 16]);
const SESSION: SessionId = SessionId([0x5; 16]);
/// Nothing here takes half as long, unless it never ends.
const LONG: Duration = Duration::from_secs(30);

/// Both ends of one session, each on an endpoint of its own.
struct Pair {
    agent: End,
    technician: End,
}

struct End {
    endpoint: Arc<DirectEndpoint>,
    session: DirectSession,
}

/// What one end says next that matters here.
#[derive(Debug)]
enum Said {
    Connected(Connection),
    Failed(String),
}

fn authority() -> Authority {
    Authority::new(&DeviceKey::generate().expect("key"), now()).expect("root")
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

fn identity(authority: &Authority, device_id: DeviceId, role: Role) -> Arc<Live> {
    let key = DeviceKey::generate().expect("key");
    let subject = Subject { device_id, role, name: "x".into(), tags: vec![] };
    let certificate = authority.sign_server(&key, &subject, &[], now()).expect("signs");
    Live::new(Identity {
        device_id,
        role,
        name: subject.name,
        tags: vec![],
        servers: vec![],
        hosts: vec![],
        ticket_key: None,
        certificate,
        root: authority.certificate().clone(),
        key: Arc::new(key),
        revoked: Arc::default(),
        proxies: Default::default(),
        p2p: Default::default(),
    })
}

fn on_loopback(ports: std::ops::RangeInclusive<u16>) -> BindConfig {
    BindConfig { peers: ports.clone(), ports, loopback: true, public: vec![] }
}

fn endpoint(authority: &Authority, device_id: DeviceId, role: Role) -> Arc<DirectEndpoint> {
    DirectEndpoint::bind(identity(authority, device_id, role), on_loopback(20_000..=29_999))
        .expect("a free port")
}

fn config(role: IceRole) -> SessionConfig {
    let ice = |name: &str| IceCredentials { ufrag: format!("{name:0<8}"), password: format!("{name:0<24}") };
    let (peer, local, remote) = match role {
        IceRole::Controlling => (AGENT, ice("tech"), ice("agent")),
        IceRole::Controlled => (TECHNICIAN, ice("agent"), ice("tech")),
    };
    SessionConfig {
        session: SESSION,
        role,
        peer,
        local,
        remote,
        stun_servers: StunServers::default(),
        peer_comes_from: None,
        many_socket_probing: true,
        port_mapping: false,
    }
}

impl Pair {
    fn new(adjust: impl FnOnce(&mut SessionConfig, &mut SessionConfig)) -> Self {
        let authority = authority();
        let (mut agents, mut technicians) = (config(IceRole::Controlled), config(IceRole::Controlling));
        adjust(&mut agents, &mut technicians);
        let end = |device_id, role, config| {
            let endpoint = endpoint(&authority, device_id, role);
            let session = endpoint.session(config).expect("a session");
            End { endpoint, session }
        };
        Self {
            agent: end(AGENT, Role::Agent, agents),
            technician: end(TECHNICIAN, Role::Technician, technicians),
        }
    }

    /// Passes messages until either end has something to say. `true`: it is the agent.
    async fn next(&mut self) -> (bool, Said) {
        let (agent, technician) = (&mut self.agent.session, &mut self.technician.session);
        let next = async {
            loop {
                let (is_agent, event, other) = tokio::select! {
                    event = agent.events.recv() => (true, event, &technician.handle),
                    event = technician.events.recv() => (false, event, &agent.handle),
                };
                match event.expect("the session lives") {
                    DirectEvent::Message(message) => other.handle_message(message),
                    DirectEvent::Connected { connection, .. } => {
                        return (is_agent, Said::Connected(connection));
                    }
                    DirectEvent::Failed { reason, .. } => return (is_agent, Said::Failed(reason)),
                    DirectEvent::Stream { .. } => panic!("there is no direct TCP on loopback"),
                }
            }
        };
        tokio::time::timeout(LONG, next).await.expect("in time")
    }

    /// Both ends of the next connection: the agent's, the technician's.
    async fn connect(&mut self) -> (Connection, Connection) {
        let (mut agents, mut technicians) = (None, None);
        loop {
            match self.next().await {
                (true, Said::Connected(connection)) => agents = Some(connection),
                (false, Said::Connected(connection)) => technicians = Some(connection),
                (_, Said::Failed(reason)) => panic!("{reason}"),
            }
            if let (Some(agents), Some(technicians)) = (&agents, &technicians) {
                return (agents.clone(), technicians.clone());
            }
        }
    }
}

fn peer_of(connection: &Connection) -> DeviceId {
    let identity = connection.peer_identity().expect("a certificate");
    let chain = identity.downcast::<Vec<CertificateDer<'static>>>().expect("rustls");
    Peer::from_certificate(&chain[0]).expect("a device").device_id
}

async fn carry(from: &Connection, to: &Connection, bytes: &[u8]) {
    let send = async {
        let mut stream = from.open_uni().await.expect("a stream");
        stream.write_all(bytes).await.expect("written");
        stream.finish().expect("open");
    };
    let receive = async {
        let mut stream = to.accept_uni().await.expect("a stream");
        stream.read_to_end(bytes.len()).await.expect("read")
    };
    let ((), received) = tokio::join!(send, receive);
    assert!(received == bytes, "{} bytes arrived changed", bytes.len());
}

async fn closed(connection: &Connection) -> ConnectionError {
    tokio::time::timeout(LONG, connection.closed()).await.expect("in time")
}

#[tokio::test]
async fn both_ends_connect_and_know_each_other() {
    let mut pair = Pair::new(|_, _| {});
    let (agents, technicians) = pair.connect().await;
    assert_eq!((peer_of(&agents), peer_of(&technicians)), (TECHNICIAN, AGENT));
    assert_eq!(agents.remote_address().port(), pair.technician.endpoint.local_port());
    assert_eq!(technicians.remote_address().port(), pair.agent.endpoint.local_port());
    let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i * 7 / 5) as u8).collect();
    tokio::join!(carry(&agents, &technicians, &bytes), carry(&technicians, &agents, &bytes));
    assert!(agents.stats().path.current_mtu > 1200, "MTU discovery is on");
}

#[tokio::test]
async fn a_closed_or_silent_connection_is_followed_by_another() {
    let mut pair = Pair::new(|_, _| {});
    let (_, first) = pair.connect().await;
    first.close(VarInt::from_u32(0), b"");
    let (agents, second) = pair.connect().await;
    carry(&second, &agents, b"still here").await;
    pair.technician.session.handle.silent("silent");
    let (agents, third) = pair.connect().await;
    carry(&third, &agents, b"and here").await;
    assert!(second.close_reason().is_none(), "a silent connection is kept: it may come back");
}

#[tokio::test]
async fn the_agent_notices_too_and_asks_for_another() {
    let mut pair = Pair::new(|_, _| {});
    let (agents, _) = pair.connect().await;
    pair.agent.session.handle.silent("silent");
    let (again, _) = pair.connect().await;
    assert_ne!(again.stable_id(), agents.stable_id());
}

#[tokio::test]
async fn two_sessions_share_the_endpoints() {
    let mut first = Pair::new(|_, _| {});
    let (agents, _) = first.connect().await;
    let (mut agent, mut technician) = (config(IceRole::Controlled), config(IceRole::Controlling));
    for config in [&mut agent, &mut technician] {
        config.session = SessionId([6; 16]);
        config.local.ufrag.insert(0, '2');
        config.remote.ufrag.insert(0, '2');
    }
    let agent = End { session: first.agent.endpoint.session(agent).expect("a session"), ..first.agent };
    let technician = End {
        session: first.technician.endpoint.session(technician).expect("a session"),
        ..first.technician
    };
    let mut second = Pair { agent, technician };
    let (other_agents, _) = second.connect().await;
    assert_eq!(agents.remote_address().port(), other_agents.remote_address().port());
    assert!(agents.close_reason().is_none(), "what was handed out stays when its session is dropped");
}

async fn is_refused_by_the_agent(mut pair: Pair) {
    let (is_agent, said) = pair.next().await;
    let Said::Connected(connection) = said else { panic!("{said:?}") };
    assert!(!is_agent, "TLS is content, and the session is not");
    let ConnectionError::ApplicationClosed(close) = closed(&connection).await else { panic!("refused") };
    assert_eq!(close.error_code, VarInt::from_u32(1));
    while let Ok(event) = pair.agent.session.events.try_recv() {
        assert!(matches!(event, DirectEvent::Message(_)), "{event:?}");
    }
}

#[tokio::test]
async fn the_agent_refuses_another_technician() {
    is_refused_by_the_agent(Pair::new(|agents, _| agents.peer = DeviceId([9; 16]))).await;
}

#[tokio::test]
async fn the_agent_refuses_another_session() {
    is_refused_by_the_agent(Pair::new(|_, technicians| technicians.session = SessionId([9; 16]))).await;
}

#[tokio::test]
async fn the_technician_refuses_another_agent() {
    let mut pair = Pair::new(|_, technicians| technicians.peer = DeviceId([9; 16]));
    let (is_agent, said) = pair.next().await;
    assert!(
        !is_agent && matches!(&said, Said::Failed(reason) if reason.contains("cryptographic")),
        "{said:?}"
    );
}

#[tokio::test]
async fn a_grant_without_credentials_gets_no_path() {
    let endpoint = endpoint(&authority(), AGENT, Role::Agent);
    let mut config = config(IceRole::Controlled);
    config.remote = IceCredentials::default();
    let error = endpoint.session(config).err().expect("refused");
    assert!(matches!(error, SessionError::Credentials(_)), "{error}");
}

/// Rows 6 and 8 of SECURITY.md: 10,000 Initials and junk from addresses that no check has confirmed get not
/// one byte, and the genuine technician connects meanwhile.
#[tokio::test]
async fn row_06_strangers_get_no_answer() {
    const INITIALS: usize = 10_000;
    let mut pair = Pair::new(|_, _| {});
    let agent = SocketAddr::from((Ipv4Addr::LOCALHOST, pair.agent.endpoint.local_port()));
    let stranger = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
    stranger.set_read_timeout(Some(LONG)).expect("set");

    // The right technician's own first flight, but from an address that no check has confirmed.
    let quic = &pair.technician.endpoint.quic;
    let client =
        quic::client_config(&pair.technician.endpoint.identity.get(), AGENT).expect("a configuration");
    let to = stranger.local_addr().expect("an address");
    let dialling = quic.connect_with(client, to, &quic::server_name(SESSION)).expect("dials");
    let (mut initial, receive) = ([0; 1500], stranger.try_clone().expect("cloned"));
    let received =
        tokio::task::spawn_blocking(move || receive.recv(&mut initial).map(|n| initial[..n].to_vec()));
    let initial = received.await.expect("no panic").expect("a datagram");
    assert_eq!(initial.len(), 1200);
    drop(dialling);
    // Not to be mistaken for answers.
    let stranger = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");

    let mut unknown_version = initial.clone();
    unknown_version[1..5].copy_from_slice(&[0xba; 4]);
    let mut garbage: Vec<Vec<u8>> = (0..=255u8).step_by(16).map(|first| vec![first; 1200]).collect();
    garbage.extend([initial.clone(), unknown_version, stun::binding_request([1; 12]).to_vec()]);
    for datagram in garbage {
        stranger.send_to(&datagram, agent).expect("sent");
    }
    let (flood, sender) = (initial.clone(), stranger.try_clone().expect("cloned"));
    let flood = tokio::task::spawn_blocking(move || {
        (0..INITIALS).filter(|_| sender.send_to(&flood, agent).is_ok()).count()
    });
    let start = Instant::now();
    // All that went through the same socket, and was accepted, after it.
    let (agents, technicians) = pair.connect().await;
    let connected = start.elapsed();
    let sent = flood.await.expect("no panic");
    carry(&technicians, &agents, b"later").await;
    println!("row 6: {sent} Initials from a stranger; connected under them in {connected:?}");
    assert_eq!(sent, INITIALS);
    assert!(connected <= Duration::from_secs(2));
    stranger.set_nonblocking(true).expect("set");
    let answer = stranger.recv(&mut [0; 1500]);
    assert_eq!(answer.map_err(|error| error.kind()), Err(std::io::ErrorKind::WouldBlock));
}

#[tokio::test]
async fn the_mediator_is_shown_where_the_session_is() {
    let mediator = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a socket");
    let address = mediator.local_addr().expect("an address").to_string();
    let pair = Pair::new(|agents, _| agents.stun_servers.mediator = vec![address]);
    let mut buffer = [0; 1500];
    let (length, source) = tokio::time::timeout(LONG, mediator.recv_from(&mut buffer))
        .await
        .expect("in time")
        .expect("received");
    assert_eq!(source.port(), pair.agent.endpoint.local_port());
    let (message, _) = MessageDecoder::default().decode(&buffer[..length]).expect("STUN");
    let username = message.get::<UserName>().and_then(|name| name.as_user_name().ok()).expect("a name");
    assert_eq!(username.as_str(), format!("{SESSION}:agent"));
    assert!(stun::binding_response(&buffer[..length], source).is_some(), "the mediator answers it");
}

#[tokio::test]
async fn a_full_range_is_an_error_that_names_the_setting() {
    let taken = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
    let port = taken.local_addr().expect("an address").port();
    let identity = identity(&authority(), AGENT, Role::Agent);
    let error = DirectEndpoint::bind(identity.clone(), on_loopback(port..=port)).err().expect("refused");
    assert!(matches!(error, BindError::NoFreePort { first, last } if first == port && last == port));
    assert!(error.to_string().contains("[p2p] ports"), "{error}");
    // A busy port is skipped.
    let endpoint =
        DirectEndpoint::bind(identity, on_loopback(port..=port.saturating_add(50))).expect("a free port");
    assert!((port.saturating_add(1)..=port.saturating_add(50)).contains(&endpoint.local_port()));
}

#[tokio::test]
async fn nothing_is_left_behind() {
    let mut pair = Pair::new(|_, _| {});
    let connections = pair.connect().await;
    let sockets = [&pair.agent.endpoint, &pair.technician.endpoint].map(|end| Arc::downgrade(&end.socket));
    let demux = pair.agent.endpoint.demux.clone();
    drop((pair, connections));
    let gone = async {
        while sockets.iter().any(|socket| socket.upgrade().is_some()) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LONG, gone).await.expect("in time");
    assert!(demux.is_empty());
}

#[test]
fn the_mediator_says_which_stun_servers_are_its_own() {
    let stun: Vec<String> = ["a:1", "b:2", "c:3"].map(str::to_owned).into();
    // 0 is an older mediator's: its first one.
    for (mediator_stun, own) in [(0, 1), (1, 1), (2, 2), (9, 3)] {
        let servers = StunServers::of(&Welcome { stun: stun.clone(), mediator_stun, ..Welcome::default() });
        assert_eq!([servers.mediator.len(), servers.others.len()], [own, 3 - own], "{mediator_stun}");
    }
    assert!(StunServers::of(&Welcome::default()).mediator.is_empty());
}
