//! A mediator that runs: what listens where, and the tasks behind it.

use std::future::Future;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use adit_client::control::Control;
use adit_client::dial::tune;
use adit_client::enrol::read_message;
use adit_client::identity::{Identity, Live, Peer};
use adit_client::service;
use adit_client::tls;
use adit_protocol::control::{ToDevice, Up};
use adit_protocol::enrol::Request;
use adit_protocol::{ALPN_CONTROL, ALPN_ENROL, CONTROL_PATH, DeviceId, RELAY_PATH};
use adit_relay::certificates::Certificates;
use adit_relay::config::Ports;
use adit_relay::diagnostics::{self, Readiness};
use adit_relay::door::{Crowd, Door};
use adit_relay::listen::{self, ListenError, Setting};
use adit_relay::penalty::Offence;
use adit_relay::redirector::Redirector;
use adit_relay::upgrade::Upgrade;
use adit_relay::web::{ALPN_HTTP, Domain, Web};
use adit_relay::{Visit, https};
use prometheus_client::registry::Registry;
use rustls::ServerConfig;
use rustls::server::Acceptor;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::{LazyConfigAcceptor, StartHandshake, TlsStream};
use tracing::{debug, error, info};

use crate::admin;
use crate::api::Api;
use crate::audit::Audit;
use crate::broker::Broker;
use crate::channel::{self, Greeting};
use crate::config::{self, Config, Listen};
use crate::enrolment::{Enroller, Verdict};
use crate::error::Error;
use crate::metrics;
use crate::organisation::{AUDIT, DATABASE, Organisation};
use crate::presence::{Arrival, Channel};
use crate::relays::Relay;
use crate::store::{Device, Seen, Store};
use crate::stun;

/// From accepting a connection to its certificate or its whole request to enrol; and, for the mediator's own
/// part, from that to the answer.
const AUTHENTICATE: Duration = Duration::from_secs(5);
/// Orders that the redirector in this process may have waiting.
const ORDERS: usize = 4096;
/// Control channels at once.
const MAX_CHANNELS: usize = 20_000;

/// Everything that a mediator listens on.
#[derive(Debug)]
pub struct Sockets {
    https: TcpListener,
    udp: UdpSocket,
    vantage: Option<UdpSocket>,
    diagnostics: TcpListener,
    relay: Option<TcpListener>,
}

impl Sockets {
    /// Binds what `config`, of the file in `dir`, says: all, or nothing. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`ListenError`] of the first that cannot be bound.
    pub fn bind(dir: &Path, config: &Listen, with_relay: bool) -> Result<Self, ListenError> {
        let file = dir.join(config::FILE);
        let setting = |key| Setting { key, file: &file };
        let tcp = |key, address| listen::tcp(setting(key), address);
        // STUN from a second port, so that devices learn how their NAT maps where all runs on one machine. The port of
        // HTTPS, because it is known and open; without it, less is known.
        let vantage = match config.https.port() {
            0 => None,
            _ => listen::udp(setting("[listen] https"), config.https)
                .inspect_err(|error| info!(%error, "no second STUN port: difficult NATs are not recognised"))
                .ok(),
        };
        Ok(Self {
            https: tcp("[listen] https", config.https)?,
            udp: listen::udp(setting("[listen] udp"), config.udp)?,
            vantage,
            diagnostics: tcp("[listen] diagnostics", config.diagnostics)?,
            relay: with_relay.then(|| tcp("[listen] relay", config.relay)).transpose()?,
        })
    }
}

/// A mediator whose sockets are bound.
pub struct Mediator {
    broker: Arc<Broker>,
    doors: Arc<Doors>,
    https: TcpListener,
    udp: UdpSocket,
    vantage: Option<UdpSocket>,
    diagnostics: TcpListener,
    registry: Registry,
    relay: Option<(Arc<adit_relay::Relay>, TcpListener)>,
    redirector: Option<Embedded>,
    admin: admin::Server,
    certificates: Arc<Certificates>,
    settings: Settings,
}

/// Settings that take effect while the server runs.
struct Settings {
    /// As it was started: ports do not change.
    started: Config,
    dir: PathBuf,
    ticket_key: [u8; 32],
    relay: Option<DeviceId>,
    /// Whether there is a second STUN port.
    has_vantage: bool,
    certificates: Arc<Certificates>,
}

/// What is behind port 443, by ALPN.
struct Doors {
    control: Arc<ServerConfig>,
    browsers: Arc<Web>,
    enrol: Arc<ServerConfig>,
    broker: Arc<Broker>,
    /// The relay in this process.
    relay: Option<Arc<adit_relay::Relay>>,
    enroller: Enroller,
    door: Door,
    channels: Arc<Semaphore>,
}

impl Mediator {
    /// Opens database and audit log and binds everything, with an embedded relay or without.
    ///
    /// # Errors
    /// [`Error`]; of a port that is taken with the setting to change.
    pub async fn bind(organisation: Organisation, with_relay: bool) -> Result<Self, Error> {
        let Organisation { dir, config, identity, ticket_key, relay_id } = &organisation;
        let admin = admin::Server::bind(dir).await.map_err(|error| match error.kind() {
            std::io::ErrorKind::AddrInUse => Error::Runs(dir.clone()),
            _ => Error::Io(error),
        })?;
        let sockets = Sockets::bind(dir, &config.listen, with_relay)?;
        let seed = ticket_key.to_seed_and_public();
        let seed = seed.map_err(|error| Error::Key { path: dir.join("ticket-key.pem"), error })?;
        let database = |error| Error::Database { path: dir.join(DATABASE), error };
        let store = Store::open(&dir.join(DATABASE)).await?;
        let audit = Audit::open(&dir.join(AUDIT))?;
        let broker = Broker::new(store, audit, organisation.keyring(), seed).await.map_err(database)?;
        broker.set_greeting(greeting(config, ticket_key.public_key(), sockets.vantage.is_some()));
        broker.set_redirectors(config.redirector.relays.clone());
        broker.load_list().await.map_err(database)?;
        let mut registry = Registry::default();
        metrics::register(&mut registry, broker.clone());
        let relay = if let Some(listener) = sockets.relay {
            let Crowd { unauthenticated, per_source, exempt } = config.limits.clone();
            let limits =
                adit_relay::Limits { unauthenticated, per_source, exempt, ..adit_relay::Limits::default() };
            let relay =
                adit_relay::Relay::new(adit_relay::Config { limits, ..adit_relay::Config::new(*relay_id) });
            relay.set_ticket_key(ticket_key.public_key());
            relay.register(&mut registry);
            broker.embed(relay.clone());
            let (addresses, https) =
                (config.reached_at(config.listen.relay), config.reached_at(config.listen.https));
            let (epoch, stun) = (relay.epoch(), String::new());
            let redirector = config.redirector.own().is_on();
            broker
                .relay_up(Relay { id: *relay_id, epoch, addresses, stun, https, redirector, channel: None })
                .await;
            Some((relay, listener))
        } else {
            None
        };
        let certificates =
            Certificates::of(dir, &config.https, &config.redirector.own().names(&config.hosts))?;
        let port = sockets.https.local_addr()?.port();
        let domain = config.redirector.domain.clone().map(|name| Domain { name, port });
        let browsers = Web::new(certificates.clone(), domain).map_err(tls::TlsError::from)?;
        browsers.set_api(Arc::new(Api::new(broker.clone())));
        let redirector = match &relay {
            Some((_, listener)) if config.redirector.own().is_on() => {
                let ports = config.redirector.ports.clone().map(|Ports(ports)| ports);
                let at = listener.local_addr()?;
                Some(Embedded::new(&broker, identity, ports, browsers.clone(), at, &mut registry)?)
            }
            _ => None,
        };
        let doors = Arc::new(Doors {
            control: Arc::new(tls::control_server(identity)?),
            browsers,
            enrol: Arc::new(tls::enrol_server(identity)?),
            broker: broker.clone(),
            relay: relay.as_ref().map(|(relay, _)| relay.clone()),
            enroller: Enroller { broker: broker.clone() },
            door: Door::new(&config.limits),
            channels: Arc::new(Semaphore::new(MAX_CHANNELS)),
        });
        doors.door.register(registry.sub_registry_with_prefix("adit_mediator"));
        info!(
            https = %config.listen.https,
            udp = %config.listen.udp,
            relay = relay.as_ref().map(|_| config.listen.relay.to_string()),
            diagnostics = %config.listen.diagnostics,
            "ready"
        );
        let settings = Settings {
            started: config.clone(),
            dir: dir.clone(),
            ticket_key: ticket_key.public_key(),
            relay: relay.as_ref().map(|_| *relay_id),
            has_vantage: sockets.vantage.is_some(),
            certificates: certificates.clone(),
        };
        let Sockets { https, udp, vantage, diagnostics, .. } = sockets;
        Ok(Self {
            broker,
            doors,
            https,
            udp,
            vantage,
            diagnostics,
            registry,
            relay,
            redirector,
            admin,
            certificates,
            settings,
        })
    }

    /// The broker, for what else runs in this process.
    pub fn broker(&self) -> &Arc<Broker> {
        &self.broker
    }

    /// Serves until `shutdown`, then closes everything.
    ///
    /// # Errors
    /// When a listener breaks.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
        let (stop, stopped) = watch::channel(());
        let stopped = move || {
            let mut stopped = stopped.clone();
            async move {
                let _ = stopped.changed().await;
            }
        };
        let ready = Readiness::new();
        ready.set(true);
        let mut tasks: JoinSet<std::io::Result<()>> = JoinSet::new();
        let registry = Arc::new(self.registry);
        tasks.spawn(diagnostics::serve(self.diagnostics, registry, ready.clone(), stopped()));
        tasks.spawn(stun::serve(self.udp, self.broker.clone()));
        if let Some(vantage) = self.vantage {
            let stopped = stopped();
            tasks.spawn(async move {
                adit_relay::stun::serve(vantage, stopped).await;
                Ok(())
            });
        }
        if let Some((relay, listener)) = self.relay {
            let stopped = stopped();
            tasks.spawn(async move {
                relay.serve(listener, stopped).await;
                Ok(())
            });
        }
        if let Some(redirector) = self.redirector {
            tasks.spawn(redirector.run(self.broker.clone()));
        }
        let broker = self.broker.clone();
        tasks.spawn(async move {
            broker.look_after().await;
            Ok(())
        });
        let (admin, broker) = (self.admin, self.broker.clone());
        let settings = self.settings;
        let names = settings.started.redirector.own();
        let applied = broker.clone();
        tasks.spawn(async move {
            admin.serve(broker, || settings.apply(&applied)).await;
            Ok(())
        });
        let (certificates, broker) = (self.certificates, self.broker.clone());
        tasks.spawn(async move {
            certificates.watch(|| names.names(&broker.hosts())).await;
            Ok(())
        });
        tasks.spawn(accept_all(self.https, self.doors));
        service::ready();

        let outcome = tokio::select! {
            () = shutdown => Ok(()),
            Some(ended) = tasks.join_next() => match ended {
                Ok(Ok(())) => Err(Error::Io(std::io::Error::other("a part of the server ended"))),
                Ok(Err(error)) => Err(Error::Io(error)),
                Err(error) => Err(Error::Io(std::io::Error::other(error))),
            },
        };
        if let Err(error) = &outcome {
            error!(%error, "stopping");
        }
        ready.set(false);
        drop(stop);
        tasks.shutdown().await;
        self.broker.flush().await;
        self.broker.store.close().await;
        outcome
    }
}

/// The redirector in this process: it talks with the broker as one elsewhere would.
struct Embedded {
    redirector: Arc<Redirector>,
    channel: Channel,
    orders: mpsc::Receiver<ToDevice>,
    said: mpsc::Receiver<Up>,
}

impl Embedded {
    fn new(
        broker: &Broker,
        identity: &Identity,
        ports: Option<RangeInclusive<u16>>,
        web: Arc<Web>,
        relay: SocketAddr,
        registry: &mut Registry,
    ) -> Result<Self, Error> {
        let certificate = Peer::from_certificate(&identity.certificate)
            .map_err(|error| Error::Io(std::io::Error::other(error)))?;
        let device = Device {
            id: identity.device_id,
            role: identity.role,
            name: identity.name.clone(),
            tags: vec![],
            hosts: vec![],
            public_key: identity.public_key(),
            certificate: identity.certificate.to_vec(),
            enrolled: 0,
            revoked: 0,
            seen: Seen::default(),
            cloned: 0,
            grants: vec![],
        };
        let from = SocketAddr::from(([127, 0, 0, 1], 0));
        let arrival = Arrival { device: Arc::new(device), certificate, from, instance: 0 };
        let (outgoing, orders) = mpsc::channel(ORDERS);
        let channel = broker.presence.channel(arrival, outgoing);
        let (control, said) = Control::linked();
        let redirector = Redirector::new(Live::new(identity.clone()), control, ports, web, relay);
        redirector.register(registry);
        Ok(Self { redirector, channel, orders, said })
    }

    async fn run(self, broker: Arc<Broker>) -> std::io::Result<()> {
        let Self { redirector, channel, mut orders, said } = self;
        let ordering = async {
            while let Some(order) = orders.recv().await {
                order.message.into_iter().for_each(|down| redirector.on(down));
            }
        };
        tokio::join!(ordering, broker.embed_redirector(channel, said));
        Ok(())
    }
}

impl Settings {
    /// Reads the configuration again. Hosts count at once; everything else at the next start.
    fn apply(&self, broker: &Broker) -> Result<(), Error> {
        let hosts = Config::load(&self.dir)?.hosts;
        let config = Config { hosts, ..self.started.clone() };
        self.certificates.refresh(&config.redirector.own().names(&config.hosts));
        if let Some(relay) = self.relay {
            let https = config.reached_at(config.listen.https);
            broker.relay_moved(relay, config.reached_at(config.listen.relay), https);
        }
        broker.set_greeting(greeting(&config, self.ticket_key, self.has_vantage));
        Ok(())
    }
}

async fn accept_all(listener: TcpListener, doors: Arc<Doors>) -> std::io::Result<()> {
    // Dropped with this future: every connection ends with the listener.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            (stream, from, visit) = doors.door.accept(&listener) => {
                tune(&stream);
                connections.spawn(doors.clone().enter(stream, from, visit));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// What a connection showed in time.
enum Shown {
    /// A certificate of our organisation.
    Device(Box<TlsStream<TcpStream>>, Peer),
    /// The wish to enrol, with a token.
    Request(Box<TlsStream<TcpStream>>, Request),
    /// A browser's ClientHello.
    Browser(Box<StartHandshake<TcpStream>>),
    /// That it wants nothing that is here.
    Nothing,
}

impl Doors {
    async fn enter(self: Arc<Self>, stream: TcpStream, from: SocketAddr, mut visit: Visit) {
        let shown = tokio::select! {
            shown = timeout(AUTHENTICATE, self.authenticate(stream)) => shown,
            () = visit.driven_out() => return debug!("connection closed: too many have not shown who they are"),
        };
        match shown {
            Ok(Ok(Shown::Device(stream, peer))) => {
                // It has shown who it is: from here on nothing is an offence.
                let request = tokio::select! {
                    request = timeout(AUTHENTICATE, Upgrade::read(*stream)) => request,
                    () = visit.driven_out() => return,
                };
                let Ok(Ok(upgrade)) = request else { return debug!("a device wanted nothing") };
                match (upgrade.path(), &self.relay) {
                    (CONTROL_PATH, _) => {
                        drop(visit);
                        if let Ok(_place) = self.channels.clone().try_acquire_owned() {
                            channel::serve(upgrade, peer, from, self.broker.clone()).await;
                        }
                    }
                    (RELAY_PATH, Some(relay)) => https::serve_upgrade(relay.clone(), upgrade, visit).await,
                    _ => drop(timeout(AUTHENTICATE, upgrade.refuse()).await),
                }
            }
            Ok(Ok(Shown::Request(mut stream, request))) => {
                // It has done its part: what is slow now is this server or the way back, and no offence.
                match timeout(AUTHENTICATE, self.enroller.serve(&mut stream, &request, from)).await {
                    Ok(Ok(Verdict::WrongToken)) => self.door.offended(from.ip(), Offence::WrongToken),
                    Ok(Ok(Verdict::Enrolled | Verdict::Refused)) => {}
                    Ok(Err(error)) => debug!(%error, "enrolment lost"),
                    Err(_) => debug!("enrolment too slow"),
                }
            }
            Ok(Ok(Shown::Browser(hello))) => {
                if !self.browsers.serve(*hello, from, visit).await {
                    self.door.offended(from.ip(), Offence::Left);
                }
            }
            Ok(Ok(Shown::Nothing)) => self.door.offended(from.ip(), Offence::Left),
            Ok(Err(error)) => {
                debug!(%error, "connection refused");
                self.door.offended(from.ip(), Offence::of_handshake(&error));
            }
            Err(_) => self.door.offended(from.ip(), Offence::Silent),
        }
    }

    async fn authenticate(&self, stream: TcpStream) -> std::io::Result<Shown> {
        let hello = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
        let offers = |wanted: &[u8]| {
            hello.client_hello().alpn().is_some_and(|mut offered| offered.any(|alpn| alpn == wanted))
        };
        if offers(ALPN_CONTROL) {
            let stream = match hello.into_stream(self.control.clone()).into_fallible().await {
                Ok(stream) => stream,
                Err((error, stream)) => {
                    https::linger(stream).await;
                    return Err(error);
                }
            };
            let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
            let Some(peer) = certificate.and_then(|der| Peer::from_certificate(der).ok()) else {
                return Ok(Shown::Nothing);
            };
            return Ok(Shown::Device(Box::new(TlsStream::from(stream)), peer));
        }
        if offers(ALPN_ENROL) {
            let mut stream = TlsStream::from(hello.into_stream(self.enrol.clone()).await?);
            let request = read_message(&mut stream).await?;
            return Ok(Shown::Request(Box::new(stream), request));
        }
        if offers(ALPN_HTTP) || hello.client_hello().alpn().is_none() {
            return Ok(Shown::Browser(Box::new(hello)));
        }
        Ok(Shown::Nothing)
    }
}

fn greeting(config: &Config, ticket_key: [u8; 32], has_vantage: bool) -> Greeting {
    Greeting {
        hosts: config.hosts.clone(),
        servers: config.reached_at(config.listen.https),
        stun: config.reached_at(config.listen.udp),
        vantage: if has_vantage { config.reached_at(config.listen.https) } else { vec![] },
        p2p_ports: config.p2p.ports.clone(),
        many_socket_probing: config.p2p.many_socket_probing,
        port_mapping: config.p2p.port_mapping,
        ticket_key,
    }
}
