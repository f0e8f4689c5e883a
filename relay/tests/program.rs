//! The program `adit-relay` itself: enrolment, registration with a mediator, legs, stopping, bad input.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Output, Stdio};
use std::sync::Arc;

use crate::common::{preamble, rest, status, ticket, unix_now, within};
use adit_client::control::wire::{self, Heartbeat, pump};
use adit_client::enrol::{read_message, write_message};
use adit_client::identity::certificate::{Authority, Subject, fingerprint};
use adit_client::identity::{DeviceKey, Identity};
use adit_client::tls;
use adit_protocol::control::{Down, RelayUp, ToDevice, ToMediator, Up, Welcome};
use adit_protocol::enrol::{Granted, Outcome, Request, Response};
use adit_protocol::leg::Status;
use adit_protocol::ticket::Ticket;
use adit_protocol::token::EnrolmentToken;
use adit_protocol::{DeviceId, PROTOCOL_VERSION, Role};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

const ID: DeviceId = DeviceId([4; 16]);

/// As much of a mediator as a relay talks to.
struct Mediator {
    listener: TcpListener,
    authority: Authority,
    identity: Identity,
}

struct Channel {
    to_relay: mpsc::Sender<ToDevice>,
    from_relay: mpsc::Receiver<Result<ToMediator, wire::Ended>>,
}

impl Mediator {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let authority = Authority::new(&DeviceKey::generate().unwrap(), unix_now()).unwrap();
        let key = DeviceKey::generate().unwrap();
        let subject =
            Subject { device_id: DeviceId([1; 16]), role: Role::Mediator, name: "m".into(), tags: vec![] };
        let hosts = ["127.0.0.1".to_owned()];
        let certificate = authority.sign_server(&key, &subject, &hosts, unix_now()).unwrap();
        let identity = Identity {
            device_id: subject.device_id,
            role: subject.role,
            name: subject.name,
            tags: vec![],
            servers: vec![],
            hosts: vec![],
            ticket_key: None,
            certificate,
            root: authority.certificate().clone(),
            key: std::sync::Arc::new(key),
            revoked: Default::default(),
            proxies: Default::default(),
            p2p: Default::default(),
        };
        Self { listener, authority, identity }
    }

    fn server(&self) -> String {
        self.listener.local_addr().unwrap().to_string()
    }

    fn token(&self) -> String {
        let fingerprint = fingerprint(self.authority.certificate()).unwrap();
        EnrolmentToken { role: Role::Relay, fingerprint, secret: [6; 16], servers: vec![self.server()] }
            .to_string()
    }

    async fn enrol(&self) -> Request {
        let acceptor = TlsAcceptor::from(Arc::new(tls::enrol_server(&self.identity).unwrap()));
        let mut stream = acceptor.accept(self.listener.accept().await.unwrap().0).await.unwrap();
        let request: Request = read_message(&mut stream).await.unwrap();
        let subject = Subject { device_id: ID, role: Role::Relay, name: request.name.clone(), tags: vec![] };
        let granted = Granted {
            device_id: ID.0.to_vec(),
            certificate: self.authority.sign_request(&request.csr, &subject, unix_now()).unwrap().to_vec(),
            root: self.authority.certificate().to_vec(),
            role: "relay".into(),
            name: request.name.clone(),
            servers: vec![self.server()],
            tags: vec![],
            ticket_key: vec![0; 32],
        };
        write_message(&mut stream, &Response { outcome: Some(Outcome::Granted(granted)) }).await.unwrap();
        request
    }

    /// The relay's control channel, greeted, and what it says of itself.
    async fn control(&self) -> (Channel, RelayUp) {
        let acceptor = TlsAcceptor::from(Arc::new(tls::control_server(&self.identity).unwrap()));
        let stream = acceptor.accept(self.listener.accept().await.unwrap().0).await.unwrap();
        let socket = tokio_tungstenite::accept_async(stream).await.unwrap();
        let (to_relay, from_relay) = pump(socket, Heartbeat::MEDIATOR);
        let mut channel = Channel { to_relay, from_relay };
        assert!(matches!(channel.receive().await, Up::Hello(_)));
        let welcome = Welcome {
            protocol_version: PROTOCOL_VERSION,
            ticket_key: crate::common::mediator_key().to_vec(),
            ..Welcome::default()
        };
        channel.to_relay.send(ToDevice { message: Some(Down::Welcome(welcome)) }).await.unwrap();
        let Up::RelayUp(up) = channel.receive().await else { panic!("RelayUp") };
        (channel, up)
    }
}

impl Channel {
    async fn receive(&mut self) -> Up {
        within(self.from_relay.recv()).await.unwrap().unwrap().message.unwrap()
    }
}

fn program(arguments: &[&str], dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_adit-relay"));
    command.args(arguments).arg("--data").arg(dir).env_remove("ADIT_LOG").kill_on_drop(true);
    command
}

const LOCAL: &str = "127.0.0.1:0";
const RUN: [&str; 9] = [
    "run",
    "--listen-relay",
    LOCAL,
    "--listen-udp",
    LOCAL,
    "--listen-https",
    LOCAL,
    "--listen-diagnostics",
    LOCAL,
];

async fn http(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    String::from_utf8(rest(&mut stream).await).unwrap()
}

/// Reads the log until the line that contains `mark`; returns it.
async fn line(log: &mut (impl AsyncBufReadExt + Unpin), mark: &str) -> String {
    loop {
        let mut line = String::new();
        assert_ne!(within(log.read_line(&mut line)).await.unwrap(), 0, "no {mark:?} in the log");
        if line.contains(mark) {
            return line;
        }
    }
}

async fn enrolled(mediator: &Mediator, dir: &Path) {
    let mut child = program(&["enroll", "-", "--host", "127.0.0.1,relay.example.org"], dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(mediator.token().as_bytes()).await.unwrap();
    let (request, output) = within(async { tokio::join!(mediator.enrol(), child.wait_with_output()) }).await;
    assert_eq!(request.hosts, ["127.0.0.1", "relay.example.org"]);
    assert_eq!(request.secret, [6; 16]);
    let output = output.unwrap();
    assert!(output.status.success());
    assert!(String::from_utf8(output.stdout).unwrap().contains("enrolled as relay 127.0.0.1"));
}

async fn pair(address: &str, epoch: u64, serial: u64) -> (TcpStream, TcpStream) {
    let mut legs = Vec::new();
    for leg in [Role::Technician, Role::Agent] {
        let ticket = Ticket { relay: ID, epoch, ..ticket(leg, serial) };
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(&preamble(&ticket)).await.unwrap();
        legs.push(stream);
    }
    let (mut agent, mut technician) = (legs.pop().unwrap(), legs.pop().unwrap());
    assert_eq!(status(&mut technician).await, Status::Paired);
    assert_eq!(status(&mut agent).await, Status::Paired);
    (technician, agent)
}

async fn ping(from: &mut TcpStream, to: &mut TcpStream) {
    from.write_all(b"ping").await.unwrap();
    let mut four = [0; 4];
    within(to.read_exact(&mut four)).await.unwrap();
    assert_eq!(&four, b"ping");
}

#[tokio::test]
async fn enrols_registers_serves_outlives_its_mediator_and_stops() {
    let mediator = Mediator::start().await;
    let dir = tempfile::tempdir().unwrap();
    enrolled(&mediator, dir.path()).await;

    let mut child: Child = program(&RUN, dir.path()).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let diagnostics = line(&mut log, "diagnostics").await;
    let diagnostics = diagnostics.trim().rsplit_once("address=").unwrap().1.to_owned();
    assert!(http(&diagnostics, "/healthz").await.starts_with("HTTP/1.1 200"));
    assert!(http(&diagnostics, "/readyz").await.starts_with("HTTP/1.1 503"));

    let (channel, up) = within(mediator.control()).await;
    let relay = up.addresses[0].clone();
    let port = relay.parse::<SocketAddr>().unwrap().port();
    assert_eq!(up.addresses, [format!("127.0.0.1:{port}"), format!("relay.example.org:{port}")]);
    line(&mut log, "registered").await;
    assert!(http(&diagnostics, "/readyz").await.starts_with("HTTP/1.1 200"));

    let stun = UdpSocket::bind(LOCAL).await.unwrap();
    stun.send_to(&adit_tunnel::path::stun::binding_request([3; 12]), &up.stun).await.unwrap();
    let mut answer = [0; 100];
    assert!(within(stun.recv_from(&mut answer)).await.is_ok());

    let (mut technician, mut agent) = pair(&relay, up.epoch, 1).await;
    ping(&mut technician, &mut agent).await;

    // The mediator goes: pairs stay, and the relay registers again with the same epoch.
    drop(channel);
    ping(&mut agent, &mut technician).await;
    let (_channel, again) = within(mediator.control()).await;
    assert_eq!(again, up);
    ping(&mut technician, &mut agent).await;
    drop(pair(&relay, up.epoch, 2).await);
    let mut replay = TcpStream::connect(&relay).await.unwrap();
    let spent = Ticket { relay: ID, epoch: up.epoch, ..ticket(Role::Agent, 2) };
    replay.write_all(&preamble(&spent)).await.unwrap();
    assert_eq!(status(&mut replay).await, Status::Spent);

    let mut metrics = http(&diagnostics, "/metrics").await;
    while !metrics.contains("adit_relay_pairs 1") {
        metrics = within(http(&diagnostics, "/metrics")).await;
    }
    for expected in [
        "adit_relay_paired_total 2",
        "adit_relay_forwarded_bytes_total{method=\"splice\"} 12",
        "adit_relay_refusals_total{reason=\"spent\"} 1",
        "adit_relay_pipes{state=\"lent\"} 0",
    ] {
        assert!(metrics.contains(expected), "{expected} in {metrics}");
    }
    kill_process(Pid::from_raw(child.id().unwrap() as i32).unwrap(), Signal::TERM).unwrap();
    assert_eq!(within(child.wait()).await.unwrap().code(), Some(0));
    assert_eq!(rest(&mut technician).await, b"");
}

#[tokio::test]
async fn bad_input_gets_its_exit_code_and_a_remedy() {
    async fn fails(command: &mut Command, code: i32, says: &[&str]) {
        let Output { status, stdout, stderr } = within(command.output()).await.unwrap();
        let text = String::from_utf8(stderr).unwrap();
        assert_eq!(status.code(), Some(code), "{text}");
        assert!(says.iter().all(|part| text.contains(part)), "{text}");
        assert!(stdout.is_empty());
    }
    let parent = tempfile::tempdir().unwrap();
    let empty = parent.path().join("empty");
    fails(&mut program(&["run"], &empty), 2, &["not enrolled", "adit-relay enroll TOKEN"]).await;
    fails(
        &mut program(&["enroll", "adit1.x", "--host", "a"], &empty),
        2,
        &["malformed token", "copy the whole"],
    )
    .await;
    fails(&mut program(&["enroll", "adit1.x"], &empty), 2, &["--host"]).await;
    let nobody = TcpListener::bind(LOCAL).await.unwrap().local_addr().unwrap().to_string();
    let token = EnrolmentToken {
        role: Role::Relay,
        fingerprint: [1; 32],
        secret: [2; 16],
        servers: vec![nobody.clone()],
    };
    let enroll = ["enroll", &token.to_string(), "--host", "a"];
    fails(&mut program(&enroll, &empty), 4, &[&nobody, "check that the mediator runs"]).await;

    let mediator = Mediator::start().await;
    let dir = parent.path().join("relay");
    enrolled(&mediator, &dir).await;
    let taken = TcpListener::bind(LOCAL).await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let run = ["run", "--listen-relay", &address];
    fails(&mut program(&run, &dir), 2, &[&address, "[listen] relay", "config.toml"]).await;
    std::fs::write(dir.join("config.toml"), "[listen]\nrely = \"[::]:8002\"\n").unwrap();
    fails(&mut program(&["run"], &dir), 2, &["rely", "config.toml"]).await;
}
