//! The shell around the session engine: tasks, sockets and wakers for one end of a tunnel.
//!
//! A [`Tunnel`] is cheap to clone. Carriers are handed in as authenticated connections
//! ([`byte_carrier`], [`quic_carrier`]) and run until they end; [`TunnelStream`]s and [`Flow`]s live
//! on whichever carrier there is. All of them share one engine behind one lock, which is held for the
//! engine's own work only: no I/O and no waiting happens under it.

pub mod byte_carrier;
mod flow;
pub mod quic_carrier;
mod stream;

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Waker;
use std::time::{Duration, Instant};

use adit_protocol::frame::ResetCode;
use adit_protocol::{Protocol, SessionId, Target};
use adit_tunnel::session::{
    CarrierId, CarrierKind, Config, End, Event, OpenError, Reason, Session, StreamId,
};
use bytes::Bytes;
use tokio::sync::{Notify, mpsc};

pub use flow::Flow;
pub use stream::{StreamError, TunnelStream};

/// Notices that the owner of a tunnel may leave unread before the session is ended: many more than
/// any correct peer causes.
const NOTICES: usize = 4096;
/// Datagrams that wait for a flow's reader. Bytes; the oldest make room.
const FLOW_QUEUE: usize = 64 * 1024;

/// What a datagram costs beside its payload, which may be empty. Bytes.
const DATAGRAM_COST: usize = 64;

/// What the owner of a tunnel hears.
#[derive(Debug)]
pub enum Notice {
    /// Agent: the technician asks for a target.
    Incoming(TunnelStream, Target),
    /// Agent: the technician asks for a UDP target.
    IncomingFlow(Flow, Target),
    /// The other end is there on this carrier.
    Ready(CarrierId),
    /// The tunnel sends on this carrier from now on.
    Active(CarrierId, Reason),
    /// Nothing is heard on the only carrier.
    Silent,
    /// A carrier is gone.
    CarrierLost {
        /// Which.
        kind: CarrierKind,
        /// Why, for people.
        reason: String,
    },
    /// For the path engine.
    Message(Bytes),
    /// The session is over.
    Closed(String),
}

/// One end of a tunnel.
#[derive(Debug, Clone)]
pub struct Tunnel(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    timer: Arc<Notify>,
    /// A stream has ended: there may be room to open another.
    room: Notify,
    notices: mpsc::Sender<Notice>,
    timer_task: std::sync::OnceLock<tokio::task::AbortHandle>,
}

#[derive(Debug)]
struct State {
    session: Session,
    streams: HashMap<StreamId, StreamState>,
    carriers: HashMap<CarrierId, CarrierState>,
    /// What the timer task sleeps until.
    armed: Option<Instant>,
    sent: u64,
    received: u64,
    /// Why there is no way so far, for people.
    trouble: Option<String>,
    /// Why the session is over.
    ended: Option<String>,
}

/// What others are told once the lock is free.
#[derive(Default)]
struct News {
    wakers: Vec<Waker>,
    notices: Vec<Notice>,
}

#[derive(Debug, Default)]
struct StreamState {
    reader: Option<Waker>,
    writer: Option<Waker>,
    opened: bool,
    end: Option<Ending>,
    datagrams: VecDeque<Bytes>,
    datagram_bytes: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    Finished,
    Reset(ResetCode),
}

#[derive(Debug)]
struct CarrierState {
    kind: CarrierKind,
    local: Option<SocketAddr>,
    remote: Option<SocketAddr>,
    /// The task that runs the carrier, while it rests.
    task: Option<Waker>,
    /// There is something to do for it since it last looked.
    again: bool,
    /// The engine or the owner gave it up.
    given_up: Option<String>,
}

/// What `status` and events say of a carrier.
#[derive(Debug, Clone)]
pub struct CarrierInfo {
    /// Which transport.
    pub kind: CarrierKind,
    /// This end's address.
    pub local: Option<SocketAddr>,
    /// The address at the other end of the transport: the peer's, or a relay's.
    pub remote: Option<SocketAddr>,
    /// Smoothed round trip.
    pub rtt: Option<Duration>,
    /// Bytes sent and received on it.
    pub bytes: (u64, u64),
    /// The tunnel sends on it.
    pub active: bool,
    /// The other end is there.
    pub ready: bool,
    /// Nothing was heard for too long.
    pub silent: bool,
}

impl Tunnel {
    /// One end of session `id`, without a carrier. Ends with its last clone, or with [`Tunnel::close`].
    pub fn new(end: End, id: SessionId) -> (Self, mpsc::Receiver<Notice>) {
        let (notices, receiver) = mpsc::channel(NOTICES);
        let state = State {
            session: Session::new(end, id, rand::random(), Config::default()),
            streams: HashMap::new(),
            carriers: HashMap::new(),
            armed: None,
            sent: 0,
            received: 0,
            trouble: None,
            ended: None,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            timer: Arc::new(Notify::new()),
            room: Notify::new(),
            notices,
            timer_task: std::sync::OnceLock::new(),
        });
        let timer = tokio::spawn(run_timer(Arc::downgrade(&shared), shared.timer.clone()));
        shared.timer_task.get_or_init(|| timer.abort_handle());
        (Self(shared), receiver)
    }

    /// Technician: opens a stream. Waits while as many as may be are open. Bytes can be written before
    /// the agent has answered; see [`TunnelStream::opened`].
    ///
    /// # Errors
    /// [`StreamError::Closed`] when the session is over.
    pub async fn open(&self, target: &Target) -> Result<TunnelStream, StreamError> {
        debug_assert_eq!(target.protocol, Protocol::Tcp);
        self.open_id(target).await.map(|id| TunnelStream::new(self.clone(), id))
    }

    /// Technician: opens a flow.
    ///
    /// # Errors
    /// As [`Tunnel::open`].
    pub async fn open_flow(&self, target: &Target) -> Result<Flow, StreamError> {
        debug_assert_eq!(target.protocol, Protocol::Udp);
        self.open_id(target).await.map(|id| Flow::new(self.clone(), id))
    }

    async fn open_id(&self, target: &Target) -> Result<StreamId, StreamError> {
        loop {
            let room = self.0.room.notified();
            let opened = self.with(|state, _| {
                let id = state.session.open(target.clone())?;
                state.streams.insert(id, StreamState::default());
                Ok(id)
            });
            match opened {
                Ok(id) => return Ok(id),
                Err(OpenError::Closed) => return Err(StreamError::Closed),
                Err(OpenError::Full) => room.await,
            }
        }
    }

    /// Sends a message to the other end's path engine.
    pub fn send_message(&self, message: Vec<u8>) {
        self.with(|state, _| state.session.send_message(message.into()));
    }

    /// Ends the session; the other end is told if a carrier is there.
    pub fn close(&self, reason: &str) {
        self.with(|state, _| state.session.close(reason));
    }

    /// Notes why some way to the other end is none.
    pub(crate) fn note_trouble(&self, why: String) {
        self.lock().trouble = Some(why);
    }

    /// Why there is no way to the other end, as far as that is known.
    pub fn trouble(&self) -> Option<String> {
        self.lock().trouble.clone()
    }

    /// Whether the session is over.
    pub fn is_closed(&self) -> bool {
        self.lock().session.is_closed()
    }

    /// Why the session is over; known as soon as it is, before any notice of it.
    pub(crate) fn ended(&self) -> Option<String> {
        self.lock().ended.clone()
    }

    /// Every carrier, oldest first.
    pub fn carriers(&self) -> Vec<CarrierInfo> {
        let state = self.lock();
        state.session.carriers().filter_map(|id| state.carrier_info(id)).collect()
    }

    /// One carrier.
    pub fn carrier(&self, id: CarrierId) -> Option<CarrierInfo> {
        self.lock().carrier_info(id)
    }

    /// Payload bytes of streams and flows, sent and received.
    pub fn bytes(&self) -> (u64, u64) {
        let state = self.lock();
        (state.sent, state.received)
    }

    /// Streams and flows that are open.
    pub fn stream_count(&self) -> usize {
        self.lock().session.stream_count()
    }

    /// Runs `work` on the engine, then lets everybody know who has something to do.
    fn with<T>(&self, work: impl FnOnce(&mut State, Instant) -> T) -> T {
        let now = Instant::now();
        let mut state = self.lock();
        let result = work(&mut state, now);
        let mut news = News::default();
        self.settle(&mut state, &mut news);
        drop(state);
        for notice in news.notices {
            // A full queue means an owner that is gone, or a peer that floods it. A stream that is dropped
            // here is reset; what else is lost is said again.
            let _ = self.0.notices.try_send(notice);
        }
        news.wakers.into_iter().for_each(Waker::wake);
        result
    }

    fn settle(&self, state: &mut State, news: &mut News) {
        while let Some(event) = state.session.poll_event() {
            self.on_event(state, event, news);
        }
        for id in state.session.take_wakes() {
            if let Some(carrier) = state.carriers.get_mut(&id) {
                carrier.wake(&mut news.wakers);
            }
        }
        let due = state.session.poll_timeout();
        if due.is_some_and(|due| state.armed.is_none_or(|armed| due < armed)) {
            state.armed = due;
            self.0.timer.notify_one();
        }
    }

    fn on_event(&self, state: &mut State, event: Event, news: &mut News) {
        let News { wakers, notices } = news;
        let mut wake = |stream: StreamId, change: &dyn Fn(&mut StreamState), read: bool, write: bool| {
            if let Some(stream) = state.streams.get_mut(&stream) {
                change(stream);
                wakers.extend(stream.reader.take_if(|_| read));
                wakers.extend(stream.writer.take_if(|_| write));
            }
        };
        match event {
            Event::Readable(id) => wake(id, &|_| {}, true, false),
            Event::Writable(id) => wake(id, &|_| {}, false, true),
            Event::Opened(id) => wake(id, &|stream| stream.opened = true, true, true),
            Event::Finished(id) => {
                wake(id, &|stream| stream.end = Some(Ending::Finished), true, true);
                self.0.room.notify_waiters();
            }
            Event::Reset { stream, code } => {
                wake(stream, &|stream| stream.end = Some(Ending::Reset(code)), true, true);
                self.0.room.notify_waiters();
            }
            Event::Datagram { flow, payload } => {
                state.received += payload.len() as u64;
                if let Some(flow) = state.streams.get_mut(&flow) {
                    flow.datagram_bytes += payload.len() + DATAGRAM_COST;
                    flow.datagrams.push_back(payload);
                    while flow.datagram_bytes > FLOW_QUEUE
                        && let Some(oldest) = flow.datagrams.pop_front()
                    {
                        flow.datagram_bytes -= oldest.len() + DATAGRAM_COST;
                    }
                    wakers.extend(flow.reader.take());
                }
            }
            Event::Incoming { stream, target } => {
                state.streams.insert(stream, StreamState { opened: true, ..StreamState::default() });
                notices.push(match target.protocol {
                    Protocol::Tcp => Notice::Incoming(TunnelStream::new(self.clone(), stream), target),
                    Protocol::Udp => Notice::IncomingFlow(Flow::new(self.clone(), stream), target),
                });
            }
            Event::Ready(id) => notices.push(Notice::Ready(id)),
            Event::Active { carrier, reason } => notices.push(Notice::Active(carrier, reason)),
            Event::Silent(_) => notices.push(Notice::Silent),
            Event::Lost { carrier, silent_for } => {
                if let Some(carrier) = state.carriers.get_mut(&carrier) {
                    carrier.given_up = Some(format!("silent for {} ms", silent_for.as_millis()));
                    carrier.wake(wakers);
                }
            }
            Event::Message(message) => notices.push(Notice::Message(message)),
            Event::Closed { reason } => {
                state.ended = Some(reason.clone());
                notices.push(Notice::Closed(reason));
                self.0.room.notify_waiters();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attach(&self, kind: CarrierKind, local: Option<SocketAddr>, remote: Option<SocketAddr>) -> CarrierId {
        self.with(|state, now| {
            let id = state.session.attach(now, kind);
            let carrier = CarrierState { kind, local, remote, task: None, again: false, given_up: None };
            state.carriers.insert(id, carrier);
            id
        })
    }

    fn detach(&self, id: CarrierId, reason: &str) {
        let known = self.lock().carriers.get(&id).map(|carrier| (carrier.kind, carrier.given_up.clone()));
        // Before what comes of it: the next carrier.
        if let Some((kind, given_up)) = known {
            let reason = given_up.unwrap_or_else(|| reason.to_owned());
            let _ = self.0.notices.try_send(Notice::CarrierLost { kind, reason });
        }
        self.with(|state, now| {
            state.session.detach(now, id);
            state.carriers.remove(&id);
        });
    }
}

impl CarrierState {
    fn wake(&mut self, wakers: &mut Vec<Waker>) {
        self.again = true;
        wakers.extend(self.task.take());
    }
}

impl State {
    fn carrier_info(&self, id: CarrierId) -> Option<CarrierInfo> {
        let carrier = self.carriers.get(&id)?;
        let stats = self.session.carrier_stats(id)?;
        Some(CarrierInfo {
            kind: carrier.kind,
            local: carrier.local,
            remote: carrier.remote,
            rtt: stats.rtt,
            bytes: (stats.sent, stats.received),
            active: self.session.active() == Some(id),
            ready: self.session.is_ready(id),
            silent: stats.silent,
        })
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(timer) = self.timer_task.get() {
            timer.abort();
        }
    }
}

/// Sleeps until the engine's next timeout, again and again, while the tunnel exists.
async fn run_timer(shared: Weak<Shared>, rearmed: Arc<Notify>) {
    loop {
        let Some(armed) = shared.upgrade().map(|shared| Tunnel(shared).lock().armed) else { return };
        let sleep = async {
            match armed {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = sleep => {}
            () = rearmed.notified() => continue,
        }
        let Some(tunnel) = shared.upgrade().map(Tunnel) else { return };
        tunnel.with(|state, now| {
            state.armed = None;
            state.session.handle_timeout(now);
        });
    }
}
