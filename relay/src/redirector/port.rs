//! A TCP port that leads to a target: for any program, from one source, one connection at a time.
//!
//! The source is an address, or the one from which the technician's own program shows a secret at the port itself: the mediator
//! may see another one, when it is elsewhere or reached through a proxy.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::time::Duration;

use adit_client::copy::{abort, copy};
use adit_client::dial::tune;
use adit_client::tunnel::Tunnel;
use adit_protocol::Target;
use adit_protocol::control::{PROOF, PROVING};
use aws_lc_rs::constant_time::verify_slices_are_equal;
use prometheus_client::metrics::counter::Counter;
use socket2::{SockRef, Socket};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::info;

use crate::listen;
use crate::sources::{Sources, version};

/// How long a second connection from the right source waits for the first one's end.
const PATIENCE: Duration = Duration::from_secs(5);
/// Who may be about to show a proof at once, and how long he may take.
const READING: usize = 16;
const READ: Duration = Duration::from_secs(1);
/// Data that a client does not acknowledge for this long ends its connection.
#[cfg(target_os = "linux")]
const UNACKNOWLEDGED: Duration = Duration::from_secs(30);

/// The port. Dropped, it is closed, and what is cut ends with a reset, not as if it were whole.
pub(super) struct Port {
    listener: TcpListener,
    target: Target,
    sources: Sources,
    proving: Option<Proving>,
    client: Option<Client>,
    /// Who comes while another is here waits for a moment: programs close a connection and open the next at once.
    next: Option<(TcpStream, Instant)>,
}

impl Port {
    /// `source` may use it, or in its place who shows the proof.
    pub(super) fn new(listener: TcpListener, target: Target, source: IpAddr, proof: Option<Proofs>) -> Self {
        let sources = Sources::new(source, true);
        Self { listener, target, sources, proving: proof.map(Proving::new), client: None, next: None }
    }

    /// Serves it for as long as this is awaited.
    pub(super) async fn serve(&mut self, tunnel: &Tunnel, turned_away: &Counter) -> Infallible {
        loop {
            if self.client.is_none()
                && let Some((tcp, _)) = self.next.take()
            {
                self.client = Some(Client::new(tcp, tunnel.clone(), self.target.clone()));
            }
            let waits = self.next.as_ref().map(|(_, until)| *until);
            let (client, next, proving) = (&mut self.client, &mut self.next, &mut self.proving);
            let proves = proving.is_some();
            tokio::select! {
                // Whoever floods the port does not hold up the one connection.
                biased;
                () = async { client.as_mut().expect("checked").run.as_mut().await }, if client.is_some() => *client = None,
                () = async { sleep_until(waits.expect("checked")).await }, if waits.is_some() => {
                    if let Some((tcp, _)) = next.take() {
                        turned_away.inc();
                        abort(&tcp);
                    }
                }
                shown = async { proving.as_mut().expect("checked").shown(turned_away).await }, if proves => match shown {
                    Some((tcp, from, first)) => {
                        info!(%from, port = self.listener.local_addr().map_or(0, |at| at.port()), "a port's source was shown");
                        if first {
                            // What the mediator sees counts no more, not even of the other IP version.
                            self.sources = Sources::new(from, true);
                        } else {
                            self.sources.pin(from);
                        }
                        tell(tcp, from);
                    }
                    None => *proving = None,
                },
                (tcp, from) = listen::accept(&self.listener) => {
                    let from = from.ip().to_canonical();
                    let awaited = proving.as_mut().filter(|proving| proving.awaits(from));
                    if let Some(proving) = awaited {
                        proving.read(tcp, from, turned_away);
                    } else if self.sources.has(from) {
                        prepare(&tcp);
                        if let Some((older, _)) = next.replace((tcp, Instant::now() + PATIENCE)) {
                            turned_away.inc();
                            abort(&older);
                        }
                    } else {
                        turned_away.inc();
                        // A reset leaves nothing behind here.
                        abort(&tcp);
                    }
                }
            }
        }
    }
}

/// The time in which the technician's program shows from where it comes.
struct Proving {
    proofs: Proofs,
    until: Instant,
    /// By IP version: somebody has.
    done: [bool; 2],
    /// Those who may be about to, and whether they have.
    reading: JoinSet<(TcpStream, IpAddr, bool)>,
    /// The same, the oldest first.
    readers: VecDeque<AbortHandle>,
}

/// What shows a source, by IP version: whoever reads one along cannot use it by the other.
pub(super) type Proofs = [[u8; PROOF]; 2];

impl Proving {
    fn new(proofs: Proofs) -> Self {
        let (reading, readers) = (JoinSet::new(), VecDeque::new());
        Self { proofs, until: Instant::now() + PROVING, done: [false; 2], reading, readers }
    }

    fn awaits(&self, from: IpAddr) -> bool {
        !self.done[version(from)]
    }

    /// Where too many say nothing the oldest of them goes: the right one says it at once.
    fn read(&mut self, mut tcp: TcpStream, from: IpAddr, turned_away: &Counter) {
        self.readers.retain(|reader| !reader.is_finished());
        if self.readers.len() >= READING
            && let Some(oldest) = self.readers.pop_front()
        {
            turned_away.inc();
            oldest.abort();
        }
        let proof = self.proofs[version(from)];
        self.readers.push_back(self.reading.spawn(async move {
            let mut shown = [0; PROOF];
            let read = timeout(READ, tcp.read_exact(&mut shown)).await;
            let is_right = matches!(read, Ok(Ok(_))) && verify_slices_are_equal(&shown, &proof).is_ok();
            (tcp, from, is_right)
        }));
    }

    /// The next one who has shown it, and whether he is the first. `None`: nobody can any more.
    async fn shown(&mut self, turned_away: &Counter) -> Option<(TcpStream, IpAddr, bool)> {
        while self.done != [true; 2] {
            tokio::select! {
                () = sleep_until(self.until) => return None,
                Some(read) = self.reading.join_next() => match read {
                    Ok((tcp, from, true)) if self.awaits(from) => {
                        let first = self.done == [false; 2];
                        self.done[version(from)] = true;
                        return Some((tcp, from, first));
                    }
                    Ok((tcp, ..)) => {
                        turned_away.inc();
                        abort(&tcp);
                    }
                    Err(_) => {}
                },
            }
        }
        None
    }
}

/// Where he comes from. So few bytes fit in any new connection's buffer.
fn tell(tcp: TcpStream, from: IpAddr) {
    let _ = tcp.try_write(from.to_string().as_bytes());
}

/// The one connection.
struct Client {
    run: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// A second handle on its socket.
    socket: Option<Socket>,
}

impl Client {
    fn new(tcp: TcpStream, tunnel: Tunnel, target: Target) -> Self {
        let socket = SockRef::from(&tcp).try_clone().ok();
        Self { run: Box::pin(pass(tcp, tunnel, target)), socket }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        if let Some(socket) = self.client.as_ref().and_then(|client| client.socket.as_ref()) {
            let _ = socket.set_linger(Some(Duration::ZERO));
        }
    }
}

/// Low latency; and a client whose way has died gives its place free soon.
fn prepare(tcp: &TcpStream) {
    tune(tcp);
    #[cfg(target_os = "linux")]
    let _ = SockRef::from(tcp).set_tcp_user_timeout(Some(UNACKNOWLEDGED));
}

async fn pass(tcp: TcpStream, tunnel: Tunnel, target: Target) {
    let Ok(stream) = tunnel.open(&target).await else { return abort(&tcp) };
    if let Err(error) = copy(tcp, stream).await {
        tracing::debug!(%error, "a redirected connection broke");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    const PROOFS: Proofs = [[7; PROOF], [8; PROOF]];
    const SHORT: Duration = Duration::from_millis(100);

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    /// Both ends of a connection on which this was said.
    async fn saying(bytes: &[u8]) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let mut near = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("connected");
        near.write_all(bytes).await.expect("room");
        (near, listener.accept().await.expect("a connection").0)
    }

    #[tokio::test]
    async fn the_first_who_shows_the_secret_of_his_version_is_the_source() {
        let (mut proving, counter) = (Proving::new(PROOFS), Counter::default());
        let (right, right6) = (ip("192.0.2.1"), ip("2001:db8::1"));
        let mut kept = Vec::new();
        for (stranger, from) in [
            (&[9; PROOF][..], "192.0.2.66"),
            (b"GET / HTTP/1.1\r\n\r\n", "192.0.2.66"),
            // Read along by the other version.
            (&PROOFS[0], "2001:db8::66"),
            (&PROOFS[1], "192.0.2.66"),
            (&PROOFS[0][1..], "192.0.2.66"),
        ] {
            let (near, far) = saying(stranger).await;
            proving.read(far, ip(from), &counter);
            kept.push(near);
        }
        assert!(timeout(SHORT, proving.shown(&counter)).await.is_err(), "a stranger");
        assert_eq!(counter.get(), 4, "the last has not said all");
        for (from, proof, first) in [(right, &PROOFS[0], true), (right6, &PROOFS[1], false)] {
            for _ in 0..2 {
                let (near, far) = saying(proof).await;
                proving.read(far, from, &counter);
                kept.push(near);
            }
            let (_, shown, is_first) = proving.shown(&counter).await.expect("shown");
            assert_eq!((shown, is_first), (from, first));
            assert!(!proving.awaits(from));
        }
        assert!(proving.shown(&counter).await.is_none(), "once by each version");
        drop(kept);
    }

    #[tokio::test]
    async fn those_who_wait_give_way_and_time_ends_it() {
        let (mut proving, counter) = (Proving::new(PROOFS), Counter::default());
        let (right, wrong) = (ip("192.0.2.1"), ip("192.0.2.66"));
        let mut kept = Vec::new();
        for _ in 0..READING + 3 {
            let (near, far) = saying(b"").await;
            proving.read(far, wrong, &counter);
            kept.push(near);
        }
        assert_eq!((counter.get(), proving.readers.len()), (3, READING));
        let (_near, far) = saying(&PROOFS[0]).await;
        proving.read(far, right, &counter);
        assert_eq!(proving.shown(&counter).await.expect("shown").1, right);
        proving.until = Instant::now();
        assert!(proving.shown(&counter).await.is_none(), "its time is over");
    }
}
