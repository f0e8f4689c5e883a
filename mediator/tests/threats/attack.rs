//! Attackers, on a thread of their own that gives way to everything else: in the field they have their own
//! processors.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use adit_client::enrol::{read_message, write_message};
use adit_client::identity::{DeviceKey, certificate};
use adit_client::tls;
use adit_protocol::PROTOCOL_VERSION;
use adit_protocol::enrol::{Outcome, Request, Response};
use adit_protocol::token::EnrolmentToken;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

/// What an attack has done so far.
#[derive(Default)]
pub(crate) struct Done {
    /// Connections or datagrams.
    pub(crate) tries: AtomicU64,
    /// Those that were answered: refused, with an answer of the server's.
    pub(crate) answered: AtomicU64,
    /// Those that succeeded.
    pub(crate) hits: AtomicU64,
    stop: AtomicBool,
}

impl Done {
    pub(crate) fn tries(&self) -> u64 {
        self.tries.load(Ordering::Relaxed)
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }
}

/// An attack under way. Dropped, it ends.
pub(crate) struct Attack {
    pub(crate) done: Arc<Done>,
    thread: Option<JoinHandle<()>>,
}

impl Attack {
    pub(crate) fn start<F: Future<Output = ()>>(
        attack: impl FnOnce(Arc<Done>) -> F + Send + 'static,
    ) -> Self {
        let done = Arc::new(Done::default());
        let theirs = done.clone();
        let thread = std::thread::spawn(move || {
            // Of this thread alone, on Linux.
            let _ = rustix::process::setpriority_process(None, 19);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(attack(theirs));
        });
        Self { done, thread: Some(thread) }
    }

    /// Ends it; gives what it did.
    pub(crate) fn end(mut self) -> Arc<Done> {
        self.done.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().expect("the attacker did not panic");
        self.done.clone()
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        self.done.stop.store(true, Ordering::Relaxed);
    }
}

/// `count` source addresses, none of them used by others: `block` tells attacks apart.
pub(crate) fn sources(block: u8, count: u32) -> Vec<Ipv4Addr> {
    (1..=count).map(|number| Ipv4Addr::from_bits(0x7f00_0000 | u32::from(block) << 16 | number)).collect()
}

async fn connect(source: Ipv4Addr, server: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((source, 0).into())?;
    socket.connect(server).await
}

/// Opens connections that say `says` and nothing more, and keeps the last `kept` of them.
pub(crate) async fn silent(
    servers: Vec<SocketAddr>,
    sources: Vec<Ipv4Addr>,
    a_second: u32,
    kept: usize,
    says: &'static [u8],
    done: Arc<Done>,
) {
    let mut pace = tokio::time::interval(Duration::from_secs(1) / a_second);
    let mut open = std::collections::VecDeque::new();
    for number in 0.. {
        pace.tick().await;
        if !done.goes_on() {
            return;
        }
        let (source, server) = (sources[number % sources.len()], servers[number % servers.len()]);
        if let Ok(mut stream) = connect(source, server).await {
            let _ = stream.write_all(says).await;
            // When it ends: a reset, which leaves no port behind.
            let _ = stream.set_zero_linger();
            open.push_back(stream);
        }
        done.tries.fetch_add(1, Ordering::Relaxed);
        if open.len() > kept {
            open.pop_front();
        }
    }
}

/// Shows tokens that do not exist.
pub(crate) async fn guess(
    server: SocketAddr,
    sources: Vec<Ipv4Addr>,
    a_second: u32,
    like: EnrolmentToken,
    done: Arc<Done>,
) {
    const AT_ONCE: usize = 32;
    let connector = TlsConnector::from(Arc::new(tls::enrol_client(like.fingerprint).unwrap()));
    let csr = certificate::request(&DeviceKey::generate().unwrap()).unwrap();
    let mut pace = tokio::time::interval(Duration::from_secs(1) / a_second);
    let mut guesses = JoinSet::new();
    for number in 0.. {
        pace.tick().await;
        if !done.goes_on() {
            return;
        }
        let request = Request {
            protocol_version: PROTOCOL_VERSION,
            secret: rand::random::<[u8; 16]>().to_vec(),
            csr: csr.clone(),
            name: "guess".into(),
            ..Request::default()
        };
        let (source, connector, done) = (sources[number % sources.len()], connector.clone(), done.clone());
        guesses.spawn(async move {
            done.tries.fetch_add(1, Ordering::Relaxed);
            let answer = async {
                let stream = connect(source, server).await?;
                let mut stream = connector.connect(tls::tunnel_server_name(), stream).await?;
                write_message(&mut stream, &request).await?;
                read_message::<_, Response>(&mut stream).await
            };
            match answer.await {
                Ok(Response { outcome: Some(Outcome::Granted(_)) }) => &done.hits,
                Ok(_) => &done.answered,
                Err(_) => return,
            }
            .fetch_add(1, Ordering::Relaxed);
        });
        while guesses.try_join_next().is_some() {}
        if guesses.len() >= AT_ONCE {
            guesses.join_next().await;
        }
    }
}

/// Sends datagrams that mean nothing, or that begin like STUN and go on wrong.
pub(crate) async fn junk(
    servers: Vec<SocketAddr>,
    sources: Vec<Ipv4Addr>,
    a_second: u32,
    most: u64,
    done: Arc<Done>,
) {
    const BATCH: u32 = 20;
    let mut sockets = Vec::new();
    for source in sources {
        sockets.push(UdpSocket::bind((source, 0)).await.unwrap());
    }
    let mut pace = tokio::time::interval(Duration::from_secs(1) * BATCH / a_second);
    let mut number = 0_usize;
    while done.goes_on() && done.tries() < most {
        pace.tick().await;
        for _ in 0..BATCH {
            number += 1;
            let mut bytes: Vec<u8> = std::iter::repeat_with(rand::random).take(number * 7 % 1400).collect();
            match (number % 3, bytes.first_mut()) {
                (0, Some(first)) => *first &= 0x3f,
                (1, Some(first)) => *first |= 0xc0,
                _ => {}
            }
            let socket = &sockets[number % sockets.len()];
            let _ = socket.send_to(&bytes, servers[number % servers.len()]).await;
            done.tries.fetch_add(1, Ordering::Relaxed);
        }
        for socket in &sockets {
            if socket.try_recv_from(&mut [0; 2048]).is_ok() {
                done.answered.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// What a server says to `bytes` before it closes; `None` when it closed at once.
pub(crate) async fn say(source: Ipv4Addr, server: SocketAddr, bytes: &[u8]) -> Option<Vec<u8>> {
    let mut stream = connect(source, server).await.ok()?;
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let _ = stream.set_zero_linger();
    Some(answer)
}
