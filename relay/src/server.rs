//! A relay's life of a connection: preamble, ticket, other leg, forwarding.

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::task::{Poll, ready};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use adit_client::identity::revocation::Revocations;
use adit_client::leg::{LegStream, tcp_of};
use adit_client::websocket::WebSocketBytes;
use adit_protocol::DeviceId;
use adit_protocol::leg::{self, LegError, Status};
use adit_protocol::ticket::{Ticket, TicketError};
use prometheus_client::registry::Registry;
use serde::Deserialize;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsStream;
use tokio_util::either::Either;

use crate::copied;
use crate::door::{Crowd, Door};
use crate::forward::{Caps, End, Forward};
use crate::gate::Visit;
use crate::metrics::{Counted, Metrics, Reason};
use crate::pairing::{Key, Offered, Refused, Table};
use crate::penalty::Offence;
use crate::pool::Pool;

/// From accepting a connection to its whole, verified preamble. A silent one is closed within 5 s.
const AUTHENTICATE: Duration = Duration::from_millis(4500);
/// From a leg's preamble to the other leg's.
const WAIT: Duration = Duration::from_secs(10);
/// For a refused client to read its status byte and hang up.
const LINGER: Duration = Duration::from_secs(1);
/// Bytes that a refused client may still have sent; unread ones would turn the status into a reset.
const LINGER_BYTES: usize = 64 * 1024;
/// A silent leg is probed after this time, then every third of it, and given up after three probes.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Data that nobody acknowledges for this long ends the leg.
const UNACKNOWLEDGED: Duration = Duration::from_secs(60);

/// Who a relay is and how much it takes.
#[derive(Debug, Clone)]
pub struct Config {
    /// The relay's device id; tickets name it.
    pub id: DeviceId,
    /// Chosen at random at each start of the process; tickets name it too.
    pub epoch: u64,
    /// See [`Limits`].
    pub limits: Limits,
    /// Whether bytes may go through pipes inside the kernel (Linux). Otherwise they are copied.
    pub splice: bool,
}

impl Config {
    /// The defaults for the relay `id` and a new boot epoch.
    pub fn new(id: DeviceId) -> Self {
        Self { id, epoch: rand::random(), limits: Limits::default(), splice: true }
    }
}

/// Bounds on what a relay keeps. Beyond them it refuses.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// See [`Crowd`].
    pub unauthenticated: usize,
    /// See [`Crowd`].
    pub per_source: usize,
    /// See [`Crowd`].
    pub exempt: Vec<IpAddr>,
    /// Legs that wait for their other leg.
    pub waiting: usize,
    /// Pairs that are forwarded.
    pub pairs: usize,
    /// Spent tickets that have not expired.
    pub spent: usize,
}

impl Default for Limits {
    fn default() -> Self {
        let Crowd { unauthenticated, per_source, exempt } = Crowd::default();
        Self { unauthenticated, per_source, exempt, waiting: 4096, pairs: 16_384, spent: 131_072 }
    }
}

impl Limits {
    fn crowd(&self) -> Crowd {
        let Self { unauthenticated, per_source, exempt, .. } = self;
        Crowd { unauthenticated: *unauthenticated, per_source: *per_source, exempt: exempt.clone() }
    }
}

/// A relay: takes legs on its listeners, pairs them by ticket, forwards. Shared by all listeners.
pub struct Relay {
    config: Config,
    ticket_key: RwLock<Option<[u8; 32]>>,
    revoked: watch::Sender<Arc<Revocations>>,
    door: Door,
    table: Mutex<Table<Leg>>,
    pool: Arc<Pool>,
    metrics: Arc<Metrics>,
}

/// A leg that waits. Dropping it wakes the task that watches its time.
struct Leg {
    stream: LegStream,
    _watched: oneshot::Sender<()>,
}

/// Two legs that belong together.
struct Pair {
    legs: [LegStream; 2],
    /// Public keys of its devices.
    keys: [[u8; 32]; 2],
    caps: Caps,
    counted: Counted,
}

impl Relay {
    /// A relay that takes no ticket yet: see [`Relay::set_ticket_key`].
    pub fn new(config: Config) -> Arc<Self> {
        let metrics = Arc::new(Metrics::new());
        Arc::new(Self {
            ticket_key: RwLock::new(None),
            revoked: watch::Sender::default(),
            door: Door::new(&config.limits.crowd()),
            table: Mutex::new(Table::new(config.limits.waiting, config.limits.spent)),
            pool: Pool::new(config.splice, metrics.clone()),
            metrics,
            config,
        })
    }

    /// The key with which the mediator signs tickets (Ed25519, 32 bytes).
    pub fn set_ticket_key(&self, key: [u8; 32]) {
        *self.ticket_key.write().unwrap_or_else(PoisonError::into_inner) = Some(key);
    }

    /// Cuts every pair with a device on this list, and takes no ticket of one from now on.
    pub fn set_revoked(&self, list: Arc<Revocations>) {
        self.revoked.send_if_modified(|known| {
            let newer = list.number > known.number;
            if newer {
                *known = list;
            }
            newer
        });
    }

    /// This process's boot epoch.
    pub fn epoch(&self) -> u64 {
        self.config.epoch
    }

    /// What this relay counts.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Shows this relay's metrics in `registry`.
    pub fn register(&self, registry: &mut Registry) {
        self.metrics.register(registry);
        self.door.register(registry.sub_registry_with_prefix("adit_relay"));
    }

    /// Who comes in here, and who does not.
    pub fn door(&self) -> &Door {
        &self.door
    }

    /// Takes legs from `listener` until `shutdown`; then closes all that came from it. Dropping the
    /// future does the same.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, shutdown: impl Future<Output = ()>) {
        let mut tasks = JoinSet::new();
        tokio::pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                (stream, from, visit) = self.door.accept(&listener) => {
                    tasks.spawn(self.clone().handle(stream, from.ip(), visit));
                }
                Some(_) = tasks.join_next() => {}
            }
        }
        tasks.shutdown().await;
    }

    async fn handle(self: Arc<Self>, stream: TcpStream, from: IpAddr, visit: Visit) {
        // Boxed, so that a pair that only forwards does not carry the memory of its beginning.
        let pair = Box::pin(self.admit(stream, from, visit)).await;
        if let Some(pair) = pair {
            self.forward(pair).await;
        }
    }

    /// Takes a leg that came by WebSocket, from a device that has shown its certificate, until it ends. Until it has
    /// shown its ticket it is on a `visit`; whatever is wrong with it, it is no offence.
    pub async fn handle_web(self: Arc<Self>, stream: WebSocketBytes<TlsStream<TcpStream>>, mut visit: Visit) {
        let pair = Box::pin(async {
            if let Err(error) = prepare(stream.get_ref().get_ref().0) {
                tracing::debug!(%error, "connection lost at once");
                return None;
            }
            let (stream, ticket) = tokio::select! {
                authenticated = self.authenticate(Either::Right(Box::new(stream)), None) => authenticated?,
                () = visit.driven_out() => {
                    self.metrics.refused(Reason::Overload);
                    return None;
                }
            };
            drop(visit);
            self.pair(stream, ticket).await
        });
        if let Some(pair) = pair.await {
            self.forward(pair).await;
        }
    }

    /// Forwards until the pair ends. No `async fn`: that would have everything in memory twice, and many pairs are idle.
    fn forward(self: Arc<Self>, pair: Pair) -> impl Future<Output = ()> {
        let Pair { legs, keys, caps, counted } = pair;
        let mut revoked = Box::pin(until_revoked(self.revoked.subscribe(), keys));
        let (pool, metrics) = (self.pool.clone(), self.metrics.clone());
        let mut forward = match legs {
            [Either::Left(one), Either::Left(other)] => {
                Either::Left(Forward::new([one, other], caps, pool, metrics))
            }
            legs => Either::Right(Box::pin(copied::forward(legs, caps, metrics))),
        };
        std::future::poll_fn(move |cx| {
            // Counted as long as it is here.
            let _ = &counted;
            let end = match revoked.as_mut().poll(cx) {
                Poll::Ready(()) => End::Revoked,
                Poll::Pending => ready!(Pin::new(&mut forward).poll(cx)),
            };
            match end {
                End::Revoked => tracing::info!("pair cut: one of its devices was revoked"),
                End::Finished => tracing::debug!("pair finished"),
                End::Lost(error) => tracing::debug!(%error, "pair lost a leg"),
                End::Silent => tracing::debug!("half-open pair was silent"),
                End::ByteCap => tracing::info!("pair reached its byte limit"),
                End::TimeCap => tracing::info!("pair reached its time limit"),
            }
            Poll::Ready(())
        })
    }

    /// From a new connection to a pair; nothing when this connection does not become the second leg.
    async fn admit(&self, stream: TcpStream, from: IpAddr, mut visit: Visit) -> Option<Pair> {
        if let Err(error) = prepare(&stream) {
            tracing::debug!(%error, "connection lost at once");
            return None;
        }
        let (stream, ticket) = tokio::select! {
            authenticated = self.authenticate(Either::Left(stream), Some(from)) => authenticated?,
            () = visit.driven_out() => {
                self.metrics.refused(Reason::Overload);
                return None;
            }
        };
        drop(visit);
        self.pair(stream, ticket).await
    }

    /// Takes the preamble in time, or sends the connection away. `from`: who pays for it; nobody, where the device has
    /// shown a certificate before.
    async fn authenticate(&self, mut stream: LegStream, from: Option<IpAddr>) -> Option<(LegStream, Ticket)> {
        let offended = |offence| from.into_iter().for_each(|from| self.door.offended(from, offence));
        match timeout(AUTHENTICATE, self.read_ticket(&mut stream)).await {
            Ok(Ok(ticket)) => return Some((stream, ticket)),
            Ok(Err(reason)) => {
                offence(reason).into_iter().for_each(offended);
                self.refuse(stream, Status::Refused, reason).await;
            }
            Err(_) => {
                self.metrics.refused(Reason::Silent);
                offended(Offence::Silent);
            }
        }
        None
    }

    /// Reads exactly the preamble: what follows is the other leg's.
    async fn read_ticket(&self, stream: &mut (impl AsyncRead + Unpin)) -> Result<Ticket, Reason> {
        let mut header = [0; 2];
        stream.read_exact(&mut header).await.map_err(|_| Reason::Silent)?;
        let mut body = vec![0; leg::body_length(header)?];
        stream.read_exact(&mut body).await.map_err(|_| Reason::Silent)?;
        let key = *self.ticket_key.read().unwrap_or_else(PoisonError::into_inner);
        let ticket = leg::verify(&body, &key.ok_or(Reason::NoKey)?, unix_now())?;
        if ticket.relay != self.config.id {
            return Err(Reason::OtherRelay);
        }
        if ticket.epoch != self.config.epoch {
            return Err(Reason::OtherEpoch);
        }
        if concerns(&self.revoked.borrow(), &[ticket.holder, ticket.peer]) {
            return Err(Reason::Revoked);
        }
        Ok(ticket)
    }

    async fn pair(&self, stream: LegStream, ticket: Ticket) -> Option<Pair> {
        if self.metrics.pairs() >= self.config.limits.pairs as u64 {
            self.refuse(stream, Status::Busy, Reason::Busy).await;
            return None;
        }
        let (watched, watcher) = oneshot::channel();
        let ours = Leg { stream, _watched: watched };
        let alive = |leg: &Leg| !has_hung_up(tcp_of(&leg.stream));
        match self.with_table(|table| table.offer(&ticket, ours, unix_now(), alive)) {
            Offered::Paired { ours, other, ticket: theirs } => {
                let counted = Counted::new(&self.metrics.pairs);
                self.metrics.pairs_total.inc();
                let mut legs = [ours.stream, other.stream];
                for leg in &mut legs {
                    // The one byte always fits; a leg that is gone shows in forwarding.
                    let said = async {
                        leg.write_all(&[Status::Paired as u8]).await?;
                        leg.flush().await
                    };
                    let _ = timeout(LINGER, said).await;
                }
                let keys = [ticket.holder, ticket.peer];
                Some(Pair { legs, keys, caps: caps(&ticket, &theirs), counted })
            }
            Offered::Waits { number, replaced } => {
                let place = Place { relay: self, key: (ticket.session, ticket.serial), number };
                let farewell = async {
                    if let Some(leg) = replaced {
                        self.refuse(leg.stream, Status::Replaced, Reason::Replaced).await;
                    }
                };
                tokio::join!(farewell, place.watch(watcher));
                None
            }
            Offered::Refused { ours, why } => {
                let (status, reason) = match why {
                    Refused::Spent => (Status::Spent, Reason::Spent),
                    Refused::Mismatch => (Status::Refused, Reason::Mismatch),
                    Refused::Full => (Status::Busy, Reason::Busy),
                };
                self.refuse(ours.stream, status, reason).await;
                None
            }
        }
    }

    /// Says why, and closes so that the byte arrives.
    async fn refuse(&self, mut stream: LegStream, status: Status, reason: Reason) {
        self.metrics.refused(reason);
        tracing::debug!(?reason, "leg refused");
        let farewell = async {
            stream.write_all(&[status as u8]).await?;
            stream.shutdown().await?;
            let mut rest = [0; 512];
            let mut total = 0;
            while total < LINGER_BYTES {
                match stream.read(&mut rest).await? {
                    0 => break,
                    count => total += count,
                }
            }
            io::Result::Ok(())
        };
        let _ = timeout(LINGER, farewell).await;
    }

    fn with_table<T>(&self, change: impl FnOnce(&mut Table<Leg>) -> T) -> T {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = change(&mut table);
        self.metrics.waiting.set(table.waiting() as i64);
        outcome
    }
}

/// Resolves when one of the keys is on the list.
async fn until_revoked(mut list: watch::Receiver<Arc<Revocations>>, keys: [[u8; 32]; 2]) {
    if list.wait_for(|list| concerns(list, &keys)).await.is_err() {
        // The relay is gone, and its pairs go with its tasks.
        std::future::pending::<()>().await;
    }
}

fn concerns(list: &Revocations, keys: &[[u8; 32]; 2]) -> bool {
    keys.iter().any(|key| list.has(key))
}

/// A leg's place in the table. Dropped, it takes the leg out and closes it.
struct Place<'a> {
    relay: &'a Relay,
    key: Key,
    number: u64,
}

impl Place<'_> {
    /// Ends the wait when its time is over; `watcher` resolves when the leg has paired or was replaced.
    async fn watch(self, watcher: oneshot::Receiver<()>) {
        if timeout(WAIT, watcher).await.is_err()
            && let Some(leg) = self.relay.with_table(|table| table.withdraw(self.key, self.number))
        {
            self.relay.refuse(leg.stream, Status::NoPeer, Reason::NoPeer).await;
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.relay.with_table(|table| table.withdraw(self.key, self.number));
    }
}

impl From<LegError> for Reason {
    fn from(error: LegError) -> Self {
        match error {
            LegError::Ticket(TicketError::Expired) => Reason::Expired,
            LegError::Ticket(TicketError::Signature | TicketError::Key) => Reason::Signature,
            LegError::Malformed | LegError::Ticket(TicketError::Malformed) => Reason::Malformed,
            LegError::Possession => Reason::Possession,
        }
    }
}

/// What a leg that was not taken did wrong: nothing, if its ticket is the mediator's and it is the holder.
/// Then it is late, or at the wrong relay, or its relay was started again.
fn offence(reason: Reason) -> Option<Offence> {
    match reason {
        Reason::Malformed => Some(Offence::Garbage),
        Reason::Signature | Reason::Possession => Some(Offence::BadTicket),
        // It hung up: the time limit is not a reason here.
        Reason::Silent => Some(Offence::Left),
        _ => None,
    }
}

/// The tighter of both tickets' limits.
fn caps(one: &Ticket, other: &Ticket) -> Caps {
    let tighter = |a: u64, b: u64| [a, b].into_iter().filter(|limit| *limit > 0).min();
    Caps {
        bytes: tighter(one.max_bytes, other.max_bytes),
        time: tighter(one.max_seconds, other.max_seconds).map(Duration::from_secs),
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 3);
    #[cfg(not(target_os = "windows"))]
    let keepalive = keepalive.with_retries(3);
    socket.set_tcp_keepalive(&keepalive)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
    Ok(())
}

/// Whether the peer of a waiting leg has closed already, as far as is known without waiting.
fn has_hung_up(stream: &TcpStream) -> bool {
    let mut ready = std::pin::pin!(stream.ready(Interest::READABLE));
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match ready.as_mut().poll(&mut context) {
        std::task::Poll::Ready(Ok(ready)) => ready.is_read_closed(),
        std::task::Poll::Ready(Err(_)) => true,
        std::task::Poll::Pending => false,
    }
}

/// Seconds since 1970-01-01 UTC.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_takes_little_memory() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let stream = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("connects");
        let relay = Relay::new(Config::new(DeviceId([1; 16])));
        let from = IpAddr::from([127, 0, 0, 1]);
        let (accepted, _, visit) = relay.door.accept(&listener).await;
        drop(accepted);
        let task = relay.handle(stream, from, visit);
        assert!(size_of_val(&task) <= 768, "{}", size_of_val(&task));
    }
}
