//! The control channel to the mediator: TLS with ALPN `adit`, WebSocket on `/control`.
//!
//! [`ControlChannel::dial`] opens one; [`maintain`] keeps one up for ever; by [`shared`] one serves several processes.

pub mod maintain;
pub mod shared;
pub mod wire;

use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use adit_protocol::control::{Down, Hello, Probe, ToDevice, ToMediator, Up, Welcome};
use adit_protocol::{CONTROL_PATH, PROTOCOL_VERSION};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::tungstenite::{self, Error as WsError};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

pub use maintain::{Control, State, maintain};
pub use wire::{Ended, Heartbeat, Incoming, Outgoing};

use crate::dial::{self, DialError};
use crate::exit::{Exit, Failure};
use crate::identity::Identity;
use crate::identity::verify::VerifyError;
use crate::proxy::{Proxies, ProxyError};
use crate::tls::{self, TlsError};

/// What helps when something in between opens TLS.
pub const INTERCEPTED: &str = "let its TLS through unopened: at a reverse proxy in front of the server by SNI passthrough, at a proxy or \
    firewall that inspects TLS by an exception for the server's name";
/// How long WebSocket handshake and `Welcome` may take, each.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the last messages of a channel that is closed may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// What this build calls itself in [`Hello`].
pub fn software() -> String {
    concat!("adit ", env!("CARGO_PKG_VERSION")).to_owned()
}

/// A [`Hello`] of this process with the sessions that live at this end.
pub fn hello(sessions: Vec<adit_protocol::control::LiveSession>) -> Hello {
    static INSTANCE: LazyLock<u64> = LazyLock::new(rand::random);
    let instance = *INSTANCE;
    Hello { protocol_version: PROTOCOL_VERSION, software: software(), sessions, instance, ..Hello::default() }
}

/// What a mediator says to a device that visits.
#[derive(Debug)]
pub struct Visited {
    /// Which mediator it was: `HOST:PORT`.
    pub server: String,
    /// What to try.
    pub probe: Probe,
    /// How long it took to be greeted.
    pub took: Duration,
}

/// One open control channel, greeted. Closes when dropped.
#[derive(Debug)]
pub struct ControlChannel {
    /// What the mediator said first.
    pub welcome: Welcome,
    /// Which server it is: `HOST:PORT`.
    pub server: String,
    outgoing: Outgoing<ToMediator>,
    incoming: Incoming<ToDevice>,
}

impl ControlChannel {
    /// Dials the servers of `identity` in turn, says `hello` and which list of revoked certificates is known,
    /// waits for the welcome.
    ///
    /// # Errors
    /// [`ControlError`] of the last server tried; a refusal ends the round at once.
    pub async fn dial(identity: &Identity, hello: Hello) -> Result<Self, ControlError> {
        Self::dial_saying(identity, hello, Vec::new).await
    }

    /// The same, and says what `more` has when a channel is there, without waiting for the welcome: that saves a round
    /// trip. Every server that is tried hears it.
    ///
    /// # Errors
    /// See [`ControlChannel::dial`].
    pub async fn dial_saying(
        identity: &Identity,
        hello: Hello,
        mut more: impl FnMut() -> Vec<Up>,
    ) -> Result<Self, ControlError> {
        let config = Arc::new(tls::control_client(identity)?);
        let hello = Hello { revocations: identity.revoked.newest().number, ..hello };
        let mut last = ControlError::NoServer;
        for server in &identity.servers {
            let dialling =
                Self::dial_one(server, config.clone(), hello.clone(), &mut more, &identity.proxies);
            match dialling.await {
                Ok(channel) => return Ok(channel),
                Err(error) => last = error,
            }
            if last.exit() == Exit::Refused {
                break;
            }
        }
        Err(last)
    }

    /// Asks the first server that answers where this organisation's servers are, for the connection test. The device itself
    /// may be online on another channel.
    ///
    /// # Errors
    /// See [`ControlChannel::dial`].
    pub async fn visit(identity: &Identity) -> Result<Visited, ControlError> {
        let began = Instant::now();
        let mut channel = Self::dial(identity, Hello { visits: true, ..hello(vec![]) }).await?;
        let (took, server) = (began.elapsed(), channel.server.clone());
        match timeout(GREETING_TIMEOUT, channel.recv()).await {
            Ok(Ok(Down::Probe(probe))) => Ok(Visited { server, probe, took }),
            _ => Err(ControlError::TooOld { server }),
        }
    }

    /// Sends a message; waits while the queue is full.
    ///
    /// # Errors
    /// [`Ended::Closed`] when the channel is no more; [`ControlChannel::recv`] says why.
    pub async fn send(&self, message: Up) -> Result<(), Ended> {
        self.outgoing.send(ToMediator { message: Some(message) }).await.map_err(|_| Ended::Closed)
    }

    /// The next message. Cancel safe.
    ///
    /// # Errors
    /// [`Ended`] says why there will be no more.
    pub async fn recv(&mut self) -> Result<Down, Ended> {
        loop {
            match self.incoming.recv().await {
                Some(Ok(ToDevice { message: Some(message) })) => return Ok(message),
                // A message of a later version.
                Some(Ok(ToDevice { message: None })) => {}
                Some(Err(ended)) => return Err(ended),
                None => return Err(Ended::Closed),
            }
        }
    }

    /// Closes the channel; what was sent before is on its way when this returns.
    pub async fn close(self) {
        let Self { outgoing, mut incoming, .. } = self;
        drop(outgoing);
        let ended = async { while let Some(Ok(_)) = incoming.recv().await {} };
        let _ = timeout(CLOSE_TIMEOUT, ended).await;
    }

    async fn dial_one(
        server: &str,
        config: Arc<rustls::ClientConfig>,
        hello: Hello,
        more: &mut impl FnMut() -> Vec<Up>,
        proxies: &Proxies,
    ) -> Result<Self, ControlError> {
        let dialled = dial::tls(server, config, proxies).await;
        let stream = dialled.map_err(|error| ControlError::from_dial(server, error))?;
        let timed_out = || ControlError::TimedOut { server: server.to_owned() };
        let socket = timeout(GREETING_TIMEOUT, upgrade(server, stream)).await.map_err(|_| timed_out())??;
        let (outgoing, incoming) = wire::pump(socket, Heartbeat::DEVICE);
        let mut channel = Self { welcome: Welcome::default(), server: server.to_owned(), outgoing, incoming };
        let broken = |ended: Ended| match ended {
            Ended::Broken(error) => ControlError::from_stream(server, error),
            other => ControlError::Unreachable { server: server.to_owned(), why: other.to_string() },
        };
        channel.send(Up::Hello(hello)).await.map_err(broken)?;
        for message in more() {
            channel.send(message).await.map_err(broken)?;
        }
        match timeout(GREETING_TIMEOUT, channel.recv()).await.map_err(|_| timed_out())?.map_err(broken)? {
            Down::Welcome(welcome) => channel.welcome = welcome,
            Down::Refused(refused) => return Err(ControlError::TurnedAway(refused.message)),
            _ => return Err(ControlError::NoWelcome { server: server.to_owned() }),
        }
        Ok(channel)
    }
}

async fn upgrade(
    server: &str,
    stream: TlsStream<TcpStream>,
) -> Result<WebSocketStream<TlsStream<TcpStream>>, ControlError> {
    let request = format!("wss://{server}{CONTROL_PATH}");
    match client_async_with_config(request, stream, Some(wire::websocket_config())).await {
        Ok((socket, _)) => Ok(socket),
        Err(WsError::Io(error)) => Err(ControlError::from_stream(server, error)),
        Err(WsError::Protocol(tungstenite::error::ProtocolError::HandshakeIncomplete)) => {
            Err(ControlError::Unreachable {
                server: server.to_owned(),
                why: "the connection was closed".into(),
            })
        }
        Err(_) => Err(ControlError::NoWelcome { server: server.to_owned() }),
    }
}

/// Why there is no control channel.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody answers there.
    #[error("the mediator at {server} cannot be reached: {why}")]
    Unreachable {
        /// `HOST:PORT`.
        server: String,
        /// What the system said.
        why: String,
    },
    /// No way through the proxy.
    #[error("the mediator at {server} cannot be reached: the proxy at {proxy} {error}")]
    Proxy {
        /// `HOST:PORT`.
        server: String,
        /// `HOST:PORT`.
        proxy: String,
        /// Why.
        error: ProxyError,
    },
    /// No answer in time.
    #[error("the mediator at {server} did not answer in time")]
    TimedOut {
        /// `HOST:PORT`.
        server: String,
    },
    /// One of the two ends does not accept the other's certificate. That it was the mediator who said so is not
    /// proven.
    #[error("the mediator and this device do not accept each other: {0}")]
    Refused(String),
    /// The mediator, which has shown its certificate, does not accept this device.
    #[error("the mediator does not accept this device: {0}")]
    TurnedAway(String),
    /// Something answers there, but not as a mediator does.
    #[error("what answers at {server} is no mediator of adit")]
    NoWelcome {
        /// `HOST:PORT`.
        server: String,
    },
    /// Something in between answers in the mediator's place.
    #[error("{server}: {why}")]
    Intercepted {
        /// `HOST:PORT`.
        server: String,
        /// What gave it away.
        why: String,
    },
    /// It does not know what was asked.
    #[error("the mediator at {server} is of an older version")]
    TooOld {
        /// `HOST:PORT`.
        server: String,
    },
    /// The identity names no server.
    #[error("this device's identity names no server")]
    NoServer,
    /// TLS could not be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl ControlError {
    fn from_dial(server: &str, error: DialError) -> Self {
        match error {
            DialError::TimedOut => Self::TimedOut { server: server.to_owned() },
            DialError::Unreachable(error) => {
                Self::Unreachable { server: server.to_owned(), why: error.to_string() }
            }
            DialError::Proxy { proxy, error } => Self::Proxy { server: server.to_owned(), proxy, error },
            DialError::Foreign(why) => Self::Intercepted { server: server.to_owned(), why },
            DialError::Verify(error @ VerifyError::Intercepted { .. }) => {
                Self::Intercepted { server: server.to_owned(), why: error.to_string() }
            }
            other => Self::Refused(other.to_string()),
        }
    }

    /// From a connection whose handshake is done: what ends it came encrypted, from the mediator.
    fn from_stream(server: &str, error: std::io::Error) -> Self {
        match DialError::from_tls(error) {
            DialError::NotAccepted(alert) => Self::TurnedAway(alert.to_string()),
            other => Self::from_dial(server, other),
        }
    }
}

impl Failure for ControlError {
    fn exit(&self) -> Exit {
        match self {
            Self::Unreachable { .. }
            | Self::Proxy { .. }
            | Self::NoWelcome { .. }
            | Self::Intercepted { .. } => Exit::Unreachable,
            Self::TimedOut { .. } => Exit::TimedOut,
            Self::Refused(_) | Self::TurnedAway(_) => Exit::Refused,
            Self::NoServer => Exit::Usage,
            Self::TooOld { .. } | Self::Tls(_) => Exit::Failed,
        }
    }

    fn remedy(&self) -> Option<String> {
        Some(match self {
            Self::Unreachable { .. } | Self::TimedOut { .. } => {
                "check that the mediator runs and that no firewall blocks the way".into()
            }
            Self::Proxy { error, .. } => error.remedy().into(),
            Self::NoWelcome { .. } => "check name and port; is a proxy in between?".into(),
            Self::Intercepted { .. } => INTERCEPTED.into(),
            Self::Refused(_) | Self::TurnedAway(_) => {
                "check this machine's clock; else enrol this device again".into()
            }
            Self::NoServer => "enrol this device again: adit enroll TOKEN --replace".into(),
            Self::TooOld { .. } => "the operator updates it".into(),
            Self::Tls(_) => return None,
        })
    }
}
