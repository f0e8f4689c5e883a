//! The relay's HTTPS port: legs by WebSocket, beside plain ones, and whoever else comes.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::common::{EPOCH, RELAY, mediator_key, noise, signed_ticket, unix_now, within};
use adit_client::identity::certificate::{Authority, Subject};
use adit_client::identity::{DeviceKey, Identity, Live};
use adit_client::leg::{self, Leg};
use adit_client::tls;
use adit_protocol::control::RelayTicket;
use adit_protocol::ticket::Ticket;
use adit_protocol::{DeviceId, Role};
use adit_relay::penalty::Offence;
use adit_relay::{Config, Limits, Relay, https};
use adit_tunnel::session::CarrierKind;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

/// A relay on both ports, an agent and a technician.
struct Scene {
    relay: Arc<Relay>,
    plain: SocketAddr,
    web: SocketAddr,
    agent: Identity,
    technician: Identity,
}

impl Scene {
    async fn start() -> Self {
        let authority = Authority::new(&DeviceKey::generate().unwrap(), unix_now()).unwrap();
        let [relay, agent, technician] =
            [Role::Relay, Role::Agent, Role::Technician].map(|role| identity(&authority, role));
        // With penalties: that is what some of this is about.
        let config = Config { epoch: EPOCH, limits: Limits::default(), ..Config::new(RELAY) };
        let server = Relay::new(config);
        server.set_ticket_key(mediator_key());
        let [plain, web] = [listen().await, listen().await];
        let addresses = [&plain, &web].map(|listener| listener.local_addr().unwrap());
        tokio::spawn(server.clone().serve(plain, std::future::pending()));
        tokio::spawn(https::serve(web, server.clone(), Live::new(relay), None, std::future::pending()));
        Self { relay: server, plain: addresses[0], web: addresses[1], agent, technician }
    }

    fn ticket(&self, role: Role, serial: u64) -> RelayTicket {
        let (own, other) = match role {
            Role::Agent => (&self.agent, &self.technician),
            _ => (&self.technician, &self.agent),
        };
        let (holder, peer) = (own.public_key(), other.public_key());
        let ticket = Ticket { holder, peer, ..crate::common::ticket(role, serial) };
        RelayTicket {
            relay: RELAY.0.to_vec(),
            addresses: vec![self.plain.to_string()],
            ticket: signed_ticket(&ticket),
            https: vec![self.web.to_string()],
        }
    }

    async fn leg(&self, role: Role, serial: u64, way: CarrierKind) -> Leg {
        let identity = if role == Role::Agent { &self.agent } else { &self.technician };
        within(leg::dial_by(identity, &self.ticket(role, serial), way)).await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn legs_of_both_kinds_pair_and_every_byte_arrives() {
    use CarrierKind::{Relay, RelayHttps};
    let scene = Scene::start().await;
    for (serial, (one, other)) in
        [(RelayHttps, RelayHttps), (RelayHttps, Relay), (Relay, RelayHttps)].into_iter().enumerate()
    {
        let agent = scene.leg(Role::Agent, serial as u64, one).await;
        let technician = scene.leg(Role::Technician, serial as u64, other).await;
        assert_eq!((agent.kind(), technician.kind()), (one, other));
        let (there, back) = (noise(7, 3 << 20), noise(8, 3 << 20));
        let (got_there, got_back) =
            tokio::join!(exchange(technician, &there, back.len()), exchange(agent, &back, there.len()));
        assert!(got_back == there && got_there == back, "{one:?} and {other:?}");
    }
    assert_eq!(scene.relay.door().penalties(), 0, "a genuine leg earned a penalty");
    // Two with WebSockets are copied, and nothing of it was spliced.
    assert_eq!(scene.relay.metrics().spliced_bytes(), 0);
}

#[tokio::test]
async fn who_has_shown_a_certificate_pays_for_nothing() {
    let scene = Scene::start().await;
    let connect = async || {
        let config = Arc::new(tls::relay_client(&scene.technician).unwrap());
        let tcp = TcpStream::connect(scene.web).await.unwrap();
        let name = ServerName::try_from("adit.invalid").unwrap();
        TlsConnector::from(config).connect(name, tcp).await.unwrap()
    };
    // It hangs up, says nonsense, asks for what is not there; and the ticket of another.
    drop(connect().await);
    let mut nonsense = connect().await;
    nonsense.write_all(b"nonsense\r\n\r\n").await.unwrap();
    assert_eq!(rest(&mut nonsense).await, b"");
    let mut lost = connect().await;
    lost.write_all(b"GET /control HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    assert!(rest(&mut lost).await.starts_with(b"HTTP/1.1 404 "));
    let stolen = scene.ticket(Role::Agent, 1);
    let mut leg = leg::dial_by(&scene.technician, &stolen, CarrierKind::RelayHttps).await.unwrap();
    let error = within(leg.read(&mut [0; 1])).await.unwrap_err();
    assert!(error.to_string().contains("the relay refused"), "{error}");
    for offence in [Offence::Garbage, Offence::Silent, Offence::Left, Offence::BadTicket] {
        assert_eq!(scene.relay.door().offences(offence), 0, "{offence:?}");
    }
}

#[tokio::test]
async fn browsers_and_checks_are_told_from_attackers() {
    let scene = Scene::start().await;
    let until = async |offence, count| {
        let reached = async {
            while scene.relay.door().offences(offence) < count {
                tokio::task::yield_now().await;
            }
        };
        within(reached).await;
    };
    // A browser's ALPN, and none at all.
    for (count, alpn) in [(1, vec![b"http/1.1".to_vec(), b"h2".to_vec()]), (2, vec![])] {
        let mut config = tls::relay_client(&scene.technician).unwrap();
        config.alpn_protocols = alpn;
        let tcp = TcpStream::connect(scene.web).await.unwrap();
        let name = ServerName::try_from("adit.invalid").unwrap();
        assert!(TlsConnector::from(Arc::new(config)).connect(name, tcp).await.is_err());
        until(Offence::Left, count).await;
    }
    let mut garbage = TcpStream::connect(scene.web).await.unwrap();
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    until(Offence::Garbage, 1).await;
    assert_eq!(scene.relay.door().offences(Offence::BadCertificate), 0);
    // A certificate of another organisation.
    let stranger = Authority::new(&DeviceKey::generate().unwrap(), unix_now()).unwrap();
    let stranger = Identity { root: scene.technician.root.clone(), ..identity(&stranger, Role::Technician) };
    let failed = leg::dial_by(&stranger, &scene.ticket(Role::Technician, 1), CarrierKind::RelayHttps).await;
    println!("{:?}", failed.err());
    until(Offence::BadCertificate, 1).await;
}

/// Sends `bytes` and reads so many.
async fn exchange(stream: impl AsyncRead + AsyncWrite, bytes: &[u8], count: usize) -> Vec<u8> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut got = vec![0; count];
    let sending = async {
        writer.write_all(bytes).await.unwrap();
        writer.flush().await.unwrap();
    };
    let ((), read) = tokio::join!(sending, within(reader.read_exact(&mut got)));
    read.unwrap();
    got
}

async fn rest(stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = within(stream.read_to_end(&mut bytes)).await;
    bytes
}

async fn listen() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

fn identity(authority: &Authority, role: Role) -> Identity {
    let key = DeviceKey::generate().unwrap();
    let subject =
        Subject { device_id: DeviceId([role as u8; 16]), role, name: role.as_str().to_owned(), tags: vec![] };
    let certificate = authority.sign_key(&key.public_key(), &subject, unix_now()).unwrap();
    Identity {
        device_id: subject.device_id,
        role,
        name: subject.name,
        tags: vec![],
        servers: vec![],
        hosts: vec![],
        ticket_key: None,
        certificate,
        root: authority.certificate().clone(),
        key: Arc::new(key),
        revoked: Default::default(),
        proxies: Default::default(),
        p2p: Default::default(),
    }
}
