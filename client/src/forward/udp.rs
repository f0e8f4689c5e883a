//! UDP: one flow for each local source address.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use adit_protocol::Target;
use adit_protocol::frame::{MAX_DATAGRAM, ResetCode};
use bytes::Bytes;
use futures_util::FutureExt;
use tokio::net::UdpSocket;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::debug;

use super::complaint::Complaints;
use crate::target::idle_timeout;
use crate::tunnel::{Flow, StreamError, Tunnel};

/// Flows at once for one local port; the one that was quiet for longest makes room. A client such as
/// `dig` takes a new source port for every question.
const MAX_FLOWS: usize = 64;
/// Pause after an error that the next datagram may meet again.
const ERROR_PAUSE: Duration = Duration::from_millis(20);

/// Passes datagrams until the session is over.
pub(super) async fn serve(socket: UdpSocket, target: Target, tunnel: Tunnel) {
    let socket = Arc::new(socket);
    let complaints = Complaints::default();
    let mut flows: HashMap<SocketAddr, Entry> = HashMap::new();
    let mut answers: JoinSet<Ended> = JoinSet::new();
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        let (length, source) = tokio::select! {
            received = socket.recv_from(&mut buffer) => match received {
                Ok(received) => received,
                Err(error) => {
                    // Windows tells here that an answer found nobody.
                    debug!(%error, "cannot receive a datagram");
                    sleep(ERROR_PAUSE).await;
                    continue;
                }
            },
            Some(ended) = answers.join_next() => {
                if let Ok(Ended { source, live, error }) = ended {
                    flows.retain(|at, entry| *at != source || !Arc::ptr_eq(&entry.live, &live));
                    if let Some(error) = error {
                        complaints.say(&target, error);
                    }
                }
                if tunnel.is_closed() {
                    return;
                }
                continue;
            }
        };
        // Copied, so that a small datagram in a queue does not hold a large buffer.
        let datagram = Bytes::copy_from_slice(&buffer[..length]);
        if !flows.contains_key(&source) {
            if flows.len() >= MAX_FLOWS {
                evict(&mut flows);
            }
            let flow = match tunnel.open_flow(&target).now_or_never() {
                Some(Ok(flow)) => flow,
                Some(Err(_)) => return,
                // As many streams as may be are open: a datagram may be lost.
                None => continue,
            };
            let live = Arc::new(Live { flow, last: Mutex::new(Instant::now()) });
            let idle = idle_timeout(target.port);
            let task = answers.spawn(answer(live.clone(), socket.clone(), source, idle));
            flows.insert(source, Entry { live, task });
        }
        if let Some(entry) = flows.get(&source) {
            entry.live.touch();
            // The task that takes the answers notices its end.
            let _ = entry.live.flow.send(datagram);
        }
    }
}

struct Entry {
    live: Arc<Live>,
    task: AbortHandle,
}

struct Live {
    flow: Flow,
    last: Mutex<Instant>,
}

struct Ended {
    source: SocketAddr,
    live: Arc<Live>,
    error: Option<StreamError>,
}

impl Live {
    fn touch(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn last(&self) -> Instant {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Passes what the target sends to `source`, until nothing goes either way for `idle`.
async fn answer(live: Arc<Live>, socket: Arc<UdpSocket>, source: SocketAddr, idle: Duration) -> Ended {
    let error = loop {
        tokio::select! {
            datagram = live.flow.recv() => match datagram {
                Ok(datagram) => {
                    live.touch();
                    // A source that is gone, or a full buffer: UDP may lose it.
                    let _ = socket.send_to(&datagram, source).await;
                }
                // The agent's end was idle, or the session is over: no news for anyone.
                Err(StreamError::Closed | StreamError::Reset(ResetCode::Aborted | ResetCode::SessionEnded)) => {
                    break None;
                }
                Err(error) => break Some(error),
            },
            () = sleep_until(live.last() + idle) => {
                if live.last().elapsed() >= idle {
                    break None;
                }
            }
        }
    };
    Ended { source, live, error }
}

/// Ends the flow that was quiet for longest.
fn evict(flows: &mut HashMap<SocketAddr, Entry>) {
    let quietest = flows.iter().min_by_key(|(_, entry)| entry.live.last()).map(|(source, _)| *source);
    if let Some(entry) = quietest.and_then(|source| flows.remove(&source)) {
        entry.task.abort();
    }
}
