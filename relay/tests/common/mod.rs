//! A relay on loopback, a mediator's key, and the two ends of a session.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use adit_protocol::leg::{self, Status};
use adit_protocol::ticket::Ticket;
use adit_protocol::{DeviceId, Role, SessionId};
use adit_relay::{Config, Limits, Relay};
use aws_lc_rs::digest::{Context, SHA256};
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub(crate) const RELAY: DeviceId = DeviceId([9; 16]);
pub(crate) const EPOCH: u64 = 77;
const MEDIATOR: u8 = 1;
const AGENT: u8 = 2;
const TECHNICIAN: u8 = 3;

pub(crate) struct Server {
    pub(crate) relay: Arc<Relay>,
    pub(crate) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

/// Without penalties for what comes from 127.0.0.1.
pub(crate) fn config() -> Config {
    let limits = Limits { exempt: vec![Ipv4Addr::LOCALHOST.into()], ..Limits::default() };
    Config { epoch: EPOCH, limits, ..Config::new(RELAY) }
}

/// One of many source addresses of this machine, none of them 127.0.0.1.
pub(crate) fn source(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x7f01_0000 + number)
}

/// A connection to `server` from `source`; `None` when it was closed at once.
pub(crate) async fn connect_from(source: Ipv4Addr, server: SocketAddr) -> Option<TcpStream> {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((source, 0).into()).unwrap();
    socket.connect(server).await.ok()
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::with(config()).await
    }

    pub(crate) async fn with(config: Config) -> Self {
        let relay = Relay::new(config);
        relay.set_ticket_key(public(MEDIATOR));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(relay.clone().serve(listener, async {
            let _ = stopped.await;
        }));
        Self { relay, address, stop: Some(stop), task }
    }

    pub(crate) async fn stop(mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        self.task.await.unwrap();
    }

    pub(crate) async fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// A connection that has sent the leg of `ticket`, and `behind` right after it in the same write.
    pub(crate) async fn leg(&self, ticket: &Ticket, behind: &[u8]) -> TcpStream {
        let mut stream = self.connect().await;
        let mut bytes = preamble(ticket);
        bytes.extend_from_slice(behind);
        stream.write_all(&bytes).await.unwrap();
        stream
    }

    /// Two legs that are paired: technician and agent.
    pub(crate) async fn pair(&self, serial: u64) -> (TcpStream, TcpStream) {
        let mut technician = self.leg(&ticket(Role::Technician, serial), b"").await;
        let mut agent = self.leg(&ticket(Role::Agent, serial), b"").await;
        assert_eq!(status(&mut technician).await, Status::Paired);
        assert_eq!(status(&mut agent).await, Status::Paired);
        (technician, agent)
    }

    /// Waits until `reached`; the relay's tasks report nothing to the outside but their metrics.
    pub(crate) async fn until(&self, reached: impl Fn(&Relay) -> bool) {
        let waiting = async {
            while !reached(&self.relay) {
                tokio::task::yield_now().await;
            }
        };
        within(waiting).await;
    }
}

pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("in time")
}

pub(crate) async fn status(stream: &mut TcpStream) -> Status {
    within(stream.read_u8()).await.expect("a status byte").try_into().unwrap()
}

/// What comes until the end; a reset is an end too.
pub(crate) async fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = within(stream.read_to_end(&mut bytes)).await;
    bytes
}

pub(crate) fn ticket(leg: Role, serial: u64) -> Ticket {
    let (holder, peer) = match leg {
        Role::Agent => (public(AGENT), public(TECHNICIAN)),
        _ => (public(TECHNICIAN), public(AGENT)),
    };
    Ticket {
        session: SessionId([5; 16]),
        serial,
        relay: RELAY,
        epoch: EPOCH,
        leg,
        holder,
        peer,
        expires: unix_now() + 60,
        max_bytes: 0,
        max_seconds: 0,
    }
}

/// The preamble that the ticket's rightful holder sends.
pub(crate) fn preamble(ticket: &Ticket) -> Vec<u8> {
    preamble_by(ticket, MEDIATOR, if ticket.leg == Role::Agent { AGENT } else { TECHNICIAN })
}

/// The same with a ticket signed by the key of seed `mediator`, and a leg by that of seed `holder`.
pub(crate) fn preamble_by(ticket: &Ticket, mediator: u8, holder: u8) -> Vec<u8> {
    leg::encode(&signed_by(ticket, mediator), ticket, |message| sign(holder, message))
}

/// The ticket's text, signed by the mediator.
pub(crate) fn signed_ticket(ticket: &Ticket) -> String {
    signed_by(ticket, MEDIATOR)
}

fn signed_by(ticket: &Ticket, mediator: u8) -> String {
    let mut secret = [mediator; 64];
    secret[32..].copy_from_slice(&public(mediator));
    ticket.sign(&secret).unwrap()
}

/// A signature by the key of `seed`.
pub(crate) fn sign(seed: u8, message: &[u8]) -> [u8; 64] {
    pair(seed).sign(message).as_ref().try_into().unwrap()
}

/// The public key that signs the tickets.
pub(crate) fn mediator_key() -> [u8; 32] {
    public(MEDIATOR)
}

pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Bytes that differ everywhere, the same for the same seed.
pub(crate) fn noise(mut seed: u64, length: usize) -> Vec<u8> {
    seed |= 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        bytes.extend_from_slice(&seed.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Sends `count` blocks made from `block`, each numbered; returns the hash of it all.
pub(crate) async fn send_blocks(
    stream: &mut (impl AsyncWrite + Unpin),
    mut block: Vec<u8>,
    count: u64,
) -> Vec<u8> {
    let mut hash = Context::new(&SHA256);
    for number in 0..count {
        block[..8].copy_from_slice(&number.to_be_bytes());
        hash.update(&block);
        stream.write_all(&block).await.unwrap();
    }
    stream.shutdown().await.unwrap();
    hash.finish().as_ref().to_vec()
}

/// Receives until the end of file; returns length and hash.
pub(crate) async fn receive(stream: &mut (impl AsyncRead + Unpin)) -> (u64, Vec<u8>) {
    let mut hash = Context::new(&SHA256);
    let mut buffer = vec![0; 256 * 1024];
    let mut total = 0;
    loop {
        let count = stream.read(&mut buffer).await.unwrap();
        if count == 0 {
            return (total, hash.finish().as_ref().to_vec());
        }
        hash.update(&buffer[..count]);
        total += count as u64;
    }
}

fn pair(seed: u8) -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap()
}

/// The public key of `seed`.
pub(crate) fn public(seed: u8) -> [u8; 32] {
    pair(seed).public_key().as_ref().try_into().unwrap()
}
