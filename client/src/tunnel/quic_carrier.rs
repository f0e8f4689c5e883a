//! A carrier over QUIC: control frames on a stream of their own, each tunnel stream on a QUIC stream
//! of its own, so that one lost packet holds up one stream only; flows on QUIC datagrams.
//!
//! All QUIC streams are unidirectional. The first one in each direction is the control lane.

use std::collections::HashMap;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::task::Poll;

use adit_tunnel::session::{CarrierId, CarrierKind, Lane, PeerMisbehaved, StreamId, Transmit};
use bytes::Bytes;
use quinn::{Connection, ConnectionError, RecvStream, SendStream, VarInt};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::Tunnel;
use crate::allow::canonical;
use crate::direct::loss;

/// Chunks taken from a QUIC stream at once.
const CHUNKS: usize = 32;
/// Control frames overtake data.
const CONTROL_PRIORITY: i32 = 1;

/// Runs a carrier until its connection ends or the session gives it up. Returns why it ended: what `closed` says, if whoever
/// closed the connection has written it down there.
pub async fn run(
    tunnel: Tunnel,
    connection: Connection,
    local: Option<SocketAddr>,
    closed: &OnceLock<String>,
) -> String {
    let id = tunnel.attach(CarrierKind::Quic, local, Some(canonical(connection.remote_address())));
    let carrier = Carrier { tunnel: tunnel.clone(), id, connection: connection.clone() };
    let guard = Detach { tunnel: &tunnel, id, connection: &connection };
    let reason = match carrier.run().await {
        Ok(reason) => reason,
        Err(error) => closed.get().cloned().unwrap_or_else(|| error.for_people()),
    };
    std::mem::forget(guard);
    connection.close(VarInt::from_u32(0), b"");
    tunnel.detach(id, &reason);
    reason
}

/// A task that is aborted detaches its carrier, too.
struct Detach<'a> {
    tunnel: &'a Tunnel,
    id: CarrierId,
    connection: &'a Connection,
}

impl Drop for Detach<'_> {
    fn drop(&mut self) {
        self.connection.close(VarInt::from_u32(0), b"");
        self.tunnel.detach(self.id, "closed");
    }
}

#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("{0}")]
    Connection(#[from] ConnectionError),
    #[error("{0}")]
    Write(#[from] quinn::WriteError),
    #[error("{0}")]
    Read(#[from] quinn::ReadError),
    #[error("{0}")]
    Peer(#[from] PeerMisbehaved),
    #[error("closed by the other side")]
    ControlEnded,
}

impl Broken {
    fn for_people(&self) -> String {
        let lost = match self {
            Self::Connection(ConnectionError::ApplicationClosed(close)) => {
                loss::lost_percent(close.error_code)
            }
            _ => None,
        };
        lost.map_or_else(|| self.to_string(), loss::reason)
    }
}

#[derive(Clone)]
struct Carrier {
    tunnel: Tunnel,
    id: CarrierId,
    connection: Connection,
}

impl Carrier {
    async fn run(&self) -> Result<String, Broken> {
        let limit = self.connection.max_datagram_size().unwrap_or(0);
        self.tunnel.with(|state, _| state.session.set_datagram_limit(self.id, limit));
        let ready = Arc::new(Notify::new());
        tokio::select! {
            sent = self.send() => sent,
            received = self.receive(ready) => received,
            error = self.connection.closed() => Err(error.into()),
        }
    }

    /// Puts out what the engine has, lane by lane.
    async fn send(&self) -> Result<String, Broken> {
        let mut control = self.connection.open_uni().await?;
        control.set_priority(CONTROL_PRIORITY).unwrap_or_default();
        let mut lanes: HashMap<StreamId, Arc<Notify>> = HashMap::new();
        let mut tasks: JoinSet<(StreamId, Result<(), Broken>)> = JoinSet::new();
        loop {
            let mut idle = true;
            while let Some(transmit) = self.poll_transmit(Lane::Control) {
                write(&mut control, transmit).await?;
                idle = false;
            }
            while let Some(stream) = self.tunnel.with(|state, _| state.session.poll_lane(self.id)) {
                let lane = lanes.entry(stream).or_insert_with(|| {
                    let (carrier, lane) = (self.clone(), Arc::new(Notify::new()));
                    let waiting = lane.clone();
                    tasks.spawn(async move { (stream, carrier.send_lane(stream, waiting).await) });
                    lane
                });
                lane.notify_one();
                idle = false;
            }
            while let Some(datagram) = self.tunnel.with(|state, _| state.session.poll_datagram(self.id)) {
                // Too large since the path's MTU shrank, or the transport is full: datagrams may be lost.
                let _ = self.connection.send_datagram(datagram);
                idle = false;
            }
            while let Some(done) = tasks.try_join_next() {
                self.lane_ended(done, &mut lanes)?;
            }
            if let Some(reason) = self.given_up() {
                control.finish().unwrap_or_default();
                if reason.is_none() {
                    // The goodbye should arrive before the connection is closed.
                    let _ =
                        tokio::time::timeout(std::time::Duration::from_millis(300), control.stopped()).await;
                }
                return Ok(reason.unwrap_or_else(|| "the session is over".to_owned()));
            }
            if idle {
                self.rest(&mut tasks, &mut lanes).await?;
            }
        }
    }

    /// Sends one stream's bytes until the stream has nothing more for this carrier.
    async fn send_lane(&self, stream: StreamId, more: Arc<Notify>) -> Result<(), Broken> {
        let mut lane = self.connection.open_uni().await?;
        loop {
            while let Some(transmit) = self.poll_transmit(Lane::Data(stream.0)) {
                write(&mut lane, transmit).await?;
            }
            if self.tunnel.lock().session.lane_is_done(stream) {
                lane.finish().unwrap_or_default();
                return Ok(());
            }
            // A stream that is reset has nothing to send, so nobody wakes its lane.
            let _ = tokio::time::timeout(std::time::Duration::from_secs(1), more.notified()).await;
        }
    }

    fn poll_transmit(&self, lane: Lane) -> Option<Transmit> {
        self.tunnel.with(|state, now| state.session.poll_transmit(now, self.id, lane))
    }

    /// `Some(None)`: the session is over and everything was said. `Some(Some(reason))`: given up.
    fn given_up(&self) -> Option<Option<String>> {
        let state = self.tunnel.lock();
        let carrier = state.carriers.get(&self.id)?;
        match &carrier.given_up {
            Some(reason) => Some(Some(reason.clone())),
            None => state.session.has_parted(self.id).then_some(None),
        }
    }

    /// Waits until the engine has something for this carrier, or a lane has ended.
    async fn rest(
        &self,
        tasks: &mut JoinSet<(StreamId, Result<(), Broken>)>,
        lanes: &mut HashMap<StreamId, Arc<Notify>>,
    ) -> Result<(), Broken> {
        let woken = poll_fn(|cx| {
            let mut state = self.tunnel.lock();
            let Some(carrier) = state.carriers.get_mut(&self.id) else { return Poll::Ready(()) };
            if std::mem::take(&mut carrier.again) || carrier.given_up.is_some() {
                return Poll::Ready(());
            }
            carrier.task = Some(cx.waker().clone());
            Poll::Pending
        });
        tokio::select! {
            () = woken => {}
            Some(done) = tasks.join_next() => self.lane_ended(done, lanes)?,
        }
        Ok(())
    }

    fn lane_ended(
        &self,
        done: Result<(StreamId, Result<(), Broken>), tokio::task::JoinError>,
        lanes: &mut HashMap<StreamId, Arc<Notify>>,
    ) -> Result<(), Broken> {
        let Ok((stream, result)) = done else { return Ok(()) };
        result?;
        lanes.remove(&stream);
        self.tunnel.with(|state, _| state.session.lane_closed(stream));
        Ok(())
    }

    /// Takes in what arrives on every lane.
    async fn receive(&self, ready: Arc<Notify>) -> Result<String, Broken> {
        let control = self.connection.accept_uni().await?;
        let mut tasks: JoinSet<Result<(), Broken>> = JoinSet::new();
        let carrier = self.clone();
        let is_ready = ready.clone();
        tasks.spawn(async move { carrier.receive_lane(Lane::Control, control, Some(is_ready)).await });
        // Nothing may overtake the hello on the control lane.
        tokio::select! {
            () = ready.notified() => {}
            Some(Ok(ended)) = tasks.join_next() => {
                ended?;
                return Err(Broken::ControlEnded);
            }
        }
        let mut number = 0;
        loop {
            tokio::select! {
                lane = self.connection.accept_uni() => {
                    let (carrier, lane) = (self.clone(), lane?);
                    let name = Lane::Data(number);
                    number += 1;
                    tasks.spawn(async move { carrier.receive_lane(name, lane, None).await });
                }
                datagram = self.connection.read_datagram() => {
                    let datagram = datagram?;
                    self.tunnel.with(|state, now| state.session.receive_datagram(now, self.id, datagram))?;
                }
                Some(Ok(ended)) = tasks.join_next() => ended?,
            }
        }
    }

    async fn receive_lane(
        &self,
        name: Lane,
        mut lane: RecvStream,
        hello: Option<Arc<Notify>>,
    ) -> Result<(), Broken> {
        let mut hello = hello;
        // A QUIC frame each, about a packet's worth: several of them make one visit to the engine.
        let mut chunks = [const { Bytes::new() }; CHUNKS];
        while let Some(count) = lane.read_chunks(&mut chunks).await? {
            let is_ready = self.tunnel.with(|state, now| {
                for chunk in &mut chunks[..count] {
                    state.session.receive(now, self.id, name, std::mem::take(chunk))?;
                }
                Ok::<_, PeerMisbehaved>(state.session.is_ready(self.id))
            })?;
            if is_ready && let Some(hello) = hello.take() {
                hello.notify_one();
            }
        }
        if name == Lane::Control {
            return Err(Broken::ControlEnded);
        }
        self.tunnel.with(|state, _| state.session.lane_ended(self.id, name));
        Ok(())
    }
}

async fn write(stream: &mut SendStream, transmit: Transmit) -> Result<(), quinn::WriteError> {
    let mut pieces = [transmit.head, transmit.payload];
    let mut rest: &mut [Bytes] = &mut pieces;
    if rest[1].is_empty() {
        rest = &mut rest[..1];
    }
    stream.write_all_chunks(rest).await
}
