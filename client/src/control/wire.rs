//! The pump of a control channel: Protocol Buffers in binary WebSocket messages, both directions,
//! bounded queues, pings. Device and mediator use the same one.

use std::time::Duration;

use adit_protocol::control::MAX_MESSAGE;
use futures_util::{SinkExt, StreamExt};
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Bytes, Error as WsError};

/// Messages that may wait in each direction. A reader that lets them wait for longer than
/// [`Heartbeat`] allows loses the channel.
const QUEUE: usize = 64;

/// When a channel counts as dead.
#[derive(Debug, Clone, Copy)]
pub struct Heartbeat {
    /// After this time without a sign of life, one is asked for.
    pub every: Duration,
    /// How long the answer, and any write, may take.
    pub deadline: Duration,
}

impl Heartbeat {
    /// A device's: it asks, so that NATs and firewalls keep the connection, and with its answer's acknowledgement that is less
    /// than five packets a minute. A dead channel is noticed within 35 s.
    pub const DEVICE: Self = Self { every: Duration::from_secs(25), deadline: Duration::from_secs(10) };
    /// The mediator's: it has no reason to ask while devices do. A dead channel is noticed within 40 s.
    pub const MEDIATOR: Self = Self { every: Duration::from_secs(30), deadline: Duration::from_secs(10) };
}

/// Sends messages; the channel closes when all of them are dropped.
pub type Outgoing<Out> = mpsc::Sender<Out>;
/// Receives messages, and why the channel ended, once, last. Dropping it closes the channel.
pub type Incoming<In> = mpsc::Receiver<Result<In, Ended>>;

/// Starts the pump on an open WebSocket.
pub fn pump<S, Out, In>(socket: WebSocketStream<S>, heartbeat: Heartbeat) -> (Outgoing<Out>, Incoming<In>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    Out: Message + 'static,
    In: Message + Default + 'static,
{
    let (out_sender, out_receiver) = mpsc::channel(QUEUE);
    let (in_sender, in_receiver) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let mut socket = socket;
        let ended = run(&mut socket, out_receiver, &in_sender, heartbeat).await;
        let _ = timeout(heartbeat.deadline, socket.close(None)).await;
        // When the queue is full nobody reads; its end says enough then.
        let _ = in_sender.try_send(Err(ended));
    });
    (out_sender, in_receiver)
}

/// Limits of the WebSocket under a control channel.
pub fn websocket_config() -> WebSocketConfig {
    WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE))
        .write_buffer_size(0)
        .max_write_buffer_size(2 * MAX_MESSAGE)
        .read_buffer_size(8 * 1024)
}

async fn run<S, Out, In>(
    socket: &mut WebSocketStream<S>,
    mut outgoing: mpsc::Receiver<Out>,
    incoming: &mpsc::Sender<Result<In, Ended>>,
    heartbeat: Heartbeat,
) -> Ended
where
    S: AsyncRead + AsyncWrite + Unpin,
    Out: Message,
    In: Message + Default,
{
    let mut pings = interval(heartbeat.every);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    pings.reset();
    let mut deadline: Option<Instant> = None;
    let mut room = None;
    loop {
        let silent = async {
            match deadline {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            message = outgoing.recv() => {
                let Some(message) = message else { return Ended::Closed };
                if let Err(ended) = send(socket, binary(&message), heartbeat.deadline).await {
                    return ended;
                }
            }
            permit = incoming.reserve(), if room.is_none() => match permit {
                Ok(permit) => room = Some(permit),
                Err(_) => return last_words(socket, outgoing, heartbeat.deadline).await,
            },
            frame = socket.next(), if room.is_some() => {
                deadline = None;
                pings.reset();
                let data = match frame {
                    Some(Ok(tungstenite::Message::Binary(data))) => data,
                    Some(Ok(tungstenite::Message::Close(_))) | None => return Ended::ByPeer,
                    // Pings are answered by tungstenite; text is not ours.
                    Some(Ok(_)) => continue,
                    Some(Err(error)) => return error.into(),
                };
                match In::decode(data) {
                    Ok(message) => if let Some(permit) = room.take() { permit.send(Ok(message)) },
                    Err(_) => return Ended::Malformed,
                }
            }
            _ = pings.tick() => {
                let frame = tungstenite::Message::Ping(Bytes::new());
                if let Err(ended) = send(socket, frame, heartbeat.deadline).await {
                    return ended;
                }
                deadline.get_or_insert_with(|| Instant::now() + heartbeat.deadline);
            }
            () = silent => return Ended::Silent,
            () = incoming.closed() => return last_words(socket, outgoing, heartbeat.deadline).await,
        }
    }
}

/// Nobody listens any more; what was said before that still goes out.
async fn last_words<S, Out>(
    socket: &mut WebSocketStream<S>,
    mut outgoing: mpsc::Receiver<Out>,
    deadline: Duration,
) -> Ended
where
    S: AsyncRead + AsyncWrite + Unpin,
    Out: Message,
{
    while let Ok(message) = outgoing.try_recv() {
        if let Err(ended) = send(socket, binary(&message), deadline).await {
            return ended;
        }
    }
    Ended::Closed
}

fn binary(message: &impl Message) -> tungstenite::Message {
    tungstenite::Message::Binary(Bytes::from(message.encode_to_vec()))
}

async fn send<S>(
    socket: &mut WebSocketStream<S>,
    frame: tungstenite::Message,
    deadline: Duration,
) -> Result<(), Ended>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    timeout(deadline, socket.send(frame)).await.map_err(|_| Ended::Silent)?.map_err(Ended::from)
}

/// Why a channel ended.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// This end closed it.
    #[error("closed")]
    Closed,
    /// The other end closed it.
    #[error("the other end closed the channel")]
    ByPeer,
    /// No sign of life in time.
    #[error("no sign of life from the other end")]
    Silent,
    /// The other end sent something that is no message.
    #[error("the other end sent something malformed")]
    Malformed,
    /// The connection broke.
    #[error("{0}")]
    Broken(std::io::Error),
}

impl From<WsError> for Ended {
    fn from(error: WsError) -> Self {
        match error {
            WsError::Io(error) => Self::Broken(error),
            WsError::ConnectionClosed | WsError::AlreadyClosed => Self::ByPeer,
            WsError::Protocol(tungstenite::error::ProtocolError::ResetWithoutClosingHandshake) => {
                Self::ByPeer
            }
            _ => Self::Malformed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use adit_protocol::control::{Down, List, ToDevice, ToMediator, Up, Welcome};
    use tokio::io::DuplexStream;
    use tokio_tungstenite::tungstenite::protocol::Role;

    // Of virtual time: these tests say nothing about the machine that runs them.
    const QUICK: Heartbeat =
        Heartbeat { every: Duration::from_millis(40), deadline: Duration::from_millis(80) };

    async fn sockets() -> (WebSocketStream<DuplexStream>, WebSocketStream<DuplexStream>) {
        let (one, other) = tokio::io::duplex(64 * 1024);
        let config = Some(websocket_config());
        (
            WebSocketStream::from_raw_socket(one, Role::Client, config).await,
            WebSocketStream::from_raw_socket(other, Role::Server, config).await,
        )
    }

    #[tokio::test(start_paused = true)]
    async fn carries_messages_and_outlives_many_heartbeats() {
        let (client, server) = sockets().await;
        let (up, mut down) = pump::<_, ToMediator, ToDevice>(client, QUICK);
        let (to_device, mut from_device) = pump::<_, ToDevice, ToMediator>(server, QUICK);
        for request in 0..20 {
            up.send(ToMediator { message: Some(Up::List(List { request })) }).await.expect("sends");
            let got = from_device.recv().await.expect("a message").expect("no end");
            assert_eq!(got.message, Some(Up::List(List { request })));
            let welcome = ToDevice { message: Some(Down::Welcome(Welcome::default())) };
            to_device.send(welcome.clone()).await.expect("sends");
            assert_eq!(down.recv().await.expect("a message").expect("no end"), welcome);
            // Longer than a heartbeat: pings and their answers pass in between.
            assert!(timeout(QUICK.every * 5 / 4, down.recv()).await.is_err());
        }
        drop(up);
        assert!(matches!(from_device.recv().await, Some(Err(Ended::ByPeer))));
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_words_of_a_dropped_channel_arrive() {
        for _ in 0..50 {
            let (client, server) = sockets().await;
            let (up, down) = pump::<_, ToMediator, ToDevice>(client, QUICK);
            let (_to_device, mut from_device) = pump::<_, ToDevice, ToMediator>(server, QUICK);
            up.send(ToMediator { message: Some(Up::List(List { request: 1 })) }).await.expect("sends");
            drop((up, down));
            assert!(matches!(from_device.recv().await, Some(Ok(_))));
            assert!(matches!(from_device.recv().await, Some(Err(Ended::ByPeer))));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_peer_is_noticed() {
        let (client, _server_that_never_reads) = sockets().await;
        let (_up, mut down) = pump::<_, ToMediator, ToDevice>(client, QUICK);
        let ended = timeout(Duration::from_secs(5), down.recv()).await.expect("in time");
        assert!(matches!(ended, Some(Err(Ended::Silent))));
    }

    #[tokio::test(start_paused = true)]
    async fn nonsense_and_oversize_end_the_channel() {
        for bytes in [vec![0xff; 8], vec![0; MAX_MESSAGE + 1]] {
            let (client, mut server) = sockets().await;
            let (_up, mut down) = pump::<_, ToMediator, ToDevice>(client, QUICK);
            let _ = server.send(tungstenite::Message::Binary(Bytes::from(bytes))).await;
            assert!(matches!(down.recv().await, Some(Err(Ended::Malformed | Ended::ByPeer))));
        }
    }
}
