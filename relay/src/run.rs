//! `adit-relay run`: sockets, control channel, and everything between start and stop.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use adit_client::control::{Control, State, hello, maintain};
use adit_client::exit::{Exit, Failure};
use adit_client::identity::Live;
use adit_client::identity::store::StoreError;
use adit_client::service;
use adit_client::tls::TlsError;
use adit_protocol::Role;
use adit_protocol::control::{Down, RelayUp, Up};
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use crate::certificates::{Certificates, HttpsError};
use crate::config::{self, ConfigError, ConfigFile, Listen, Ports};
use crate::diagnostics::{self, Readiness};
use crate::https;
use crate::listen::{self, ListenError, Setting};
use crate::redirector::Redirector;
use crate::server::{Config, Relay};
use crate::stun;
use crate::web::{Domain, Web};

/// Addresses that stand before those of the configuration file.
#[derive(Debug, Clone, Copy, Default)]
pub struct Overrides {
    /// `[listen] relay`.
    pub relay: Option<SocketAddr>,
    /// `[listen] udp`.
    pub udp: Option<SocketAddr>,
    /// `[listen] https`.
    pub https: Option<SocketAddr>,
    /// `[listen] diagnostics`.
    pub diagnostics: Option<SocketAddr>,
}

/// Everything that a relay listens on.
#[derive(Debug)]
pub struct Sockets {
    relay: TcpListener,
    udp: Option<UdpSocket>,
    https: Option<TcpListener>,
    diagnostics: Option<TcpListener>,
}

impl Sockets {
    /// Binds what `config`, the file in `dir`, and `overrides` say: all, or nothing. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`ListenError`] of the first that cannot be bound.
    pub fn bind(dir: &Path, config: &Listen, overrides: Overrides) -> Result<Self, ListenError> {
        let file = dir.join(config::FILE);
        let setting = |key| Setting { key, file: &file };
        let udp = overrides.udp.or(config.udp);
        let https = overrides.https.or(config.https);
        let diagnostics = overrides.diagnostics.or(config.diagnostics);
        Ok(Self {
            relay: listen::tcp(setting("[listen] relay"), overrides.relay.unwrap_or(config.relay))?,
            udp: udp.map(|address| listen::udp(setting("[listen] udp"), address)).transpose()?,
            https: https.map(|address| listen::tcp(setting("[listen] https"), address)).transpose()?,
            diagnostics: diagnostics
                .map(|address| listen::tcp(setting("[listen] diagnostics"), address))
                .transpose()?,
        })
    }
}

/// Runs the relay whose state is in `dir` until the process is told to stop.
///
/// # Errors
/// [`RunError`] when it cannot start.
pub async fn run(dir: &Path, overrides: Overrides) -> Result<(), RunError> {
    let live = Live::load(dir)?;
    let identity = live.get();
    if identity.role != Role::Relay {
        return Err(RunError::OtherRole(identity.role));
    }
    let config = ConfigFile::load(dir)?;
    let hosts = if config.hosts.is_empty() { identity.hosts.clone() } else { config.hosts.clone() };
    adit_client::raise_descriptor_limit();

    let mut tasks = JoinSet::new();
    let (stop, stopped) = watch::channel(false);
    let until_stopped = || {
        let mut stopped = stopped.clone();
        async move {
            // An error means that the sender is gone: that is a stop too.
            let _ = stopped.wait_for(|stopped| *stopped).await;
        }
    };

    let sockets = Sockets::bind(dir, &config.listen, overrides)?;
    let relay_port = sockets.relay.local_addr()?.port();
    let mut stun_address = String::new();
    if let Some(socket) = sockets.udp {
        let port = socket.local_addr()?.port();
        stun_address = hosts.first().map(|host| host_port(host, port)).unwrap_or_default();
        tasks.spawn(stun::serve(socket, until_stopped()));
    }

    let mut https_addresses = Vec::new();
    if let Some(listener) = &sockets.https {
        let port = listener.local_addr()?.port();
        https_addresses.extend(hosts.iter().map(|host| host_port(host, port)));
    }
    let (control, messages) = maintain(live.clone(), || hello(Vec::new()), None);
    let mut web = None;
    let mut redirector = None;
    if config.redirector.is_on() {
        let names = config.redirector.names(&hosts);
        let certificates = Certificates::of(dir, &config.https, &names)?;
        let port =
            sockets.https.as_ref().map(TcpListener::local_addr).transpose()?.map(|address| address.port());
        if config.redirector.domain.is_some() && port.is_none() {
            warn!("[redirector] domain is of no use without [listen] https: each session has a port instead");
        }
        let domain = config.redirector.domain.zip(port).map(|(name, port)| Domain { name, port });
        let pages = Web::new(certificates.clone(), domain).map_err(TlsError::from)?;
        tasks.spawn(async move { certificates.watch(|| names.clone()).await });
        let ports = config.redirector.ports.map(|Ports(ports)| ports);
        let at = sockets.relay.local_addr()?;
        redirector = Some(Redirector::new(live.clone(), control.clone(), ports, pages.clone(), at));
        web = Some(pages);
    }
    let relay = Relay::new(Config { limits: config.limits, ..Config::new(identity.device_id) });
    let readiness = Readiness::new();
    if let Some(listener) = sockets.diagnostics {
        info!(address = %listener.local_addr()?, "diagnostics");
        let mut registry = Registry::default();
        relay.register(&mut registry);
        if let Some(redirector) = &redirector {
            redirector.register(&mut registry);
        }
        let serving = diagnostics::serve(listener, Arc::new(registry), readiness.clone(), until_stopped());
        tasks.spawn(async {
            if let Err(error) = serving.await {
                warn!(%error, "diagnostics ended");
            }
        });
    }
    info!(name = identity.name, port = relay_port, "relay is up");
    tasks.spawn(relay.clone().serve(sockets.relay, until_stopped()));
    if let Some(listener) = sockets.https {
        tasks.spawn(https::serve(listener, relay.clone(), live.clone(), web, until_stopped()));
    }
    let announcement = RelayUp {
        epoch: relay.epoch(),
        addresses: hosts.iter().map(|host| host_port(host, relay_port)).collect(),
        stun: stun_address,
        https: https_addresses,
        redirector: redirector.is_some(),
    };
    let registering = Registering { live, relay, redirector, announcement, readiness };
    tasks.spawn(registering.run(control, messages));
    // Not only when the mediator has taken it: pairs of a relay that starts again go on without one.
    service::ready();

    told_to_stop().await?;
    info!("stopping");
    stop.send_replace(true);
    tasks.shutdown().await;
    Ok(())
}

/// What the relay's control channel is for.
struct Registering {
    live: Arc<Live>,
    relay: Arc<Relay>,
    redirector: Option<Arc<Redirector>>,
    announcement: RelayUp,
    readiness: Readiness,
}

impl Registering {
    /// Stays registered with the mediator for ever. While there is none, pairs go on.
    async fn run(self, control: Control, mut messages: mpsc::Receiver<Down>) {
        let Self { live, relay, redirector, announcement, readiness } = self;
        let identity = live.get();
        if let Some(key) = identity.ticket_key {
            relay.set_ticket_key(key);
        }
        relay.set_revoked(identity.revoked.newest());
        let mut state = control.state();
        loop {
            let registered = match &*state.borrow_and_update() {
                State::Connected(welcome) => {
                    match <[u8; 32]>::try_from(welcome.ticket_key.as_slice()) {
                        Ok(key) => relay.set_ticket_key(key),
                        Err(_) => {
                            warn!("the mediator's welcome has no ticket key; the one of the enrolment stays")
                        }
                    }
                    true
                }
                State::Disconnected { reason, exit: Exit::Refused, .. } => {
                    error!(
                        reason,
                        "the mediator does not accept this relay; enrol it again with a new token"
                    );
                    false
                }
                State::Connecting | State::Disconnected { .. } => false,
            };
            let registered = registered && announce(&control, &announcement).await;
            if registered && !readiness.is_ready() {
                info!("registered with the mediator");
            }
            readiness.set(registered);
            loop {
                tokio::select! {
                    changed = state.changed() => match changed {
                        Ok(()) => break,
                        Err(_) => return,
                    },
                    message = messages.recv() => match message {
                        Some(Down::Revocations(_)) => {
                            let newest = live.get().revoked.newest();
                            redirector.iter().for_each(|redirector| redirector.on_revoked(&newest));
                            relay.set_revoked(newest);
                        }
                        Some(down) => redirector.iter().for_each(|redirector| redirector.on(down.clone())),
                        None => return,
                    },
                }
            }
        }
    }
}

async fn announce(control: &Control, announcement: &RelayUp) -> bool {
    control.send(Up::RelayUp(announcement.clone())).await.is_ok()
}

/// `HOST:PORT` as a client writes it; IPv6 in brackets.
pub fn host_port(host: &str, port: u16) -> String {
    match host.parse() {
        Ok(ip) => SocketAddr::new(ip, port).to_string(),
        Err(_) => format!("{host}:{port}"),
    }
}

/// Ctrl-C, or what a service manager sends.
async fn told_to_stop() -> io::Result<()> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            _ = terminate.recv() => Ok(()),
            interrupted = tokio::signal::ctrl_c() => interrupted,
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}

/// Why a relay does not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The state directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The configuration file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A port.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The certificate for browsers.
    #[error(transparent)]
    Https(#[from] HttpsError),
    /// What is shown to browsers.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The state directory is another program's.
    #[error("the state directory belongs to a device enrolled as {0}, not as relay")]
    OtherRole(Role),
    /// The system failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Failure for RunError {
    fn exit(&self) -> Exit {
        match self {
            Self::Store(error) => error.exit(),
            Self::Config(error) => error.exit(),
            Self::Listen(error) => error.exit(),
            Self::OtherRole(_) | Self::Https(_) => Exit::Usage,
            Self::Io(_) | Self::Tls(_) => Exit::Failed,
        }
    }

    fn remedy(&self) -> Option<String> {
        match self {
            Self::Store(StoreError::NotEnrolled { dir }) => Some(format!(
                "enrol it with a token from `adit-mediator token --role relay`: \
                 adit-relay enroll TOKEN --data {} --host NAME_OR_IP",
                dir.display()
            )),
            Self::Store(error) => error.remedy(),
            Self::Config(error) => error.remedy(),
            Self::Listen(error) => error.remedy(),
            Self::OtherRole(_) => Some("name the relay's own directory with --data".into()),
            Self::Https(_) => Some("correct [https] cert and key in config.toml, or take them out".into()),
            Self::Io(_) | Self::Tls(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv6_stands_in_brackets() {
        assert_eq!(host_port("2001:db8::1", 8002), "[2001:db8::1]:8002");
        assert_eq!(host_port("192.0.2.1", 8002), "192.0.2.1:8002");
        assert_eq!(host_port("relay.example.org", 8002), "relay.example.org:8002");
    }
}
