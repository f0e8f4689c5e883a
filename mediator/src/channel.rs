//! The mediator's side of one control channel, from the TLS handshake to its end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use adit_client::control::{Heartbeat, Incoming, wire};
use adit_client::identity::Peer;
use adit_protocol::control::{
    Agents, Down, Hello, Refused, RefusedCode, RelayUp, ToDevice, ToMediator, Up, Welcome,
};
use adit_protocol::{PROTOCOL_VERSION, Role};
use adit_relay::upgrade::Upgrade;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tracing::{debug, info, warn};

use crate::broker::Broker;
use crate::organisation::unix_now;
use crate::presence::{Arrival, Channel};
use crate::relays::Relay;
use crate::store::{Device, Seen};

/// How long a device may take for the WebSocket handshake and for its `Hello`, each.
const GREETING: Duration = Duration::from_secs(5);
/// Longest name of a device's software that is kept, in bytes.
const MAX_SOFTWARE: usize = 64;

/// What the second of two machines with one identity hears.
const CLONED: &str = "another machine is online with this same identity (a copied disk image?): enrol one of them again, with a new token and --replace";

/// What every device is told in its welcome.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Greeting {
    /// Names and addresses of this server.
    pub hosts: Vec<String>,
    /// Where the control channel is reached, `HOST:PORT` each.
    pub servers: Vec<String>,
    /// STUN and handshake servers, `HOST:PORT` each.
    pub stun: Vec<String>,
    /// The same server's second STUN port, `HOST:PORT` each: it takes no handshakes.
    pub vantage: Vec<String>,
    /// Ports of the direct path.
    pub p2p_ports: String,
    /// Whether devices may try many sockets on the way to it.
    pub many_socket_probing: bool,
    /// Whether devices may ask routers for ports.
    pub port_mapping: bool,
    /// Key that signs tickets.
    pub ticket_key: [u8; 32],
}

/// Serves a device until its channel ends. `peer` is what its verified certificate says, `from` where it is.
pub async fn serve<S>(upgrade: Upgrade<S>, peer: Peer, from: SocketAddr, broker: Arc<Broker>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Ok(Ok(socket)) = timeout(GREETING, upgrade.accept(wire::websocket_config())).await else { return };
    let (outgoing, mut incoming) = wire::pump::<_, ToDevice, ToMediator>(socket, Heartbeat::MEDIATOR);
    let Some(hello) = hello(&mut incoming).await else { return };
    let device = match admit(&peer, &broker) {
        Ok(device) => device,
        Err(message) => {
            info!(device = %peer.device_id, message, "channel refused");
            let _ = outgoing.send(refused(message)).await;
            return;
        }
    };
    if hello.visits {
        let _ = outgoing.send(ToDevice { message: Some(Down::Welcome(welcome(&device, &broker))) }).await;
        let _ = outgoing.send(ToDevice { message: Some(Down::Probe(broker.what_to_try(0))) }).await;
        return;
    }
    let arrival = Arrival { device: device.clone(), certificate: peer, from, instance: hello.instance };
    let channel = broker.presence.channel(arrival, outgoing.clone());
    let software: String = hello.software.chars().filter(|c| !c.is_control()).take(MAX_SOFTWARE).collect();
    let note = || {
        let seen = Seen { software: software.clone(), address: from.to_string(), at: unix_now() };
        broker.directory.note(device.id, seen);
    };
    // The welcome is the first message, and whoever has got it can be found.
    channel.send(Down::Welcome(welcome(&device, &broker)));
    if let Err(cloned) = broker.presence.join(channel.clone()) {
        broker.cloned(&channel, cloned).await;
        let _ = outgoing.send(refused(CLONED)).await;
        return;
    }
    note();
    // Revoked in the moment before it was listed.
    if broker.directory.get(device.id).is_none() {
        channel.close();
    }
    broker.refresh(&channel).await;
    broker.catch_up(&channel, hello.revocations);
    info!(device = %device.id, role = %device.role, name = device.name, software, "device is online");
    broker.hello(&channel, &hello.sessions).await;

    converse(&mut incoming, &channel, &broker).await;

    broker.gone(&channel);
    note();
    info!(device = %device.id, role = %device.role, name = device.name, "channel is closed");
}

async fn converse(incoming: &mut Incoming<ToMediator>, channel: &Channel, broker: &Arc<Broker>) {
    loop {
        let message = tokio::select! {
            message = incoming.recv() => message,
            () = channel.closed() => return,
        };
        let message = match message {
            Some(Ok(ToMediator { message })) => message,
            Some(Err(ended)) => return debug!(reason = %ended, "channel ended"),
            None => return,
        };
        let device = &channel.device;
        match message {
            Some(Up::List(list)) => {
                let answer = match broker.list(device) {
                    Ok(agents) => Down::Agents(Agents { request: list.request, agents }),
                    Err(denied) => denied.into_message(list.request),
                };
                channel.send(answer);
            }
            Some(Up::Open(open)) => broker.open(channel, open).await,
            Some(Up::Answer(answer)) => broker.answer(device, answer).await,
            Some(Up::Candidates(candidates)) => broker.candidates(device, candidates),
            Some(Up::Closed(closed)) => broker.closed(device, closed).await,
            Some(Up::Renew(renew)) => broker.renew(device, &renew.session),
            Some(Up::RelayUp(up)) => relay_up(channel, broker, up).await,
            Some(Up::Probed(probed)) => broker.probed(device.id, probed),
            Some(Up::Tier(tier)) => broker.tier(device, tier).await,
            Some(Up::Redirect(redirect)) => broker.redirect(channel, redirect),
            Some(Up::Served(served)) => broker.served(device, served),
            Some(Up::Examine(examine)) => broker.examine(channel, examine),
            // `Hello` comes once; the rest is of a later version.
            Some(Up::Hello(_)) | None => {}
        }
    }
}

async fn relay_up(channel: &Channel, broker: &Broker, up: RelayUp) {
    let mut relay = Relay {
        id: channel.device.id,
        epoch: up.epoch,
        addresses: up.addresses,
        stun: up.stun,
        https: up.https,
        redirector: up.redirector && broker.may_be_redirector(&channel.device),
        channel: Some(channel.id),
    };
    relay.keep_hosts(&channel.device.hosts);
    if channel.device.role == Role::Relay && relay.is_sane() {
        broker.relay_up(relay).await;
    } else {
        let (device, name, hosts) = (&channel.device.id, &channel.device.name, &channel.device.hosts);
        warn!(%device, name, ?hosts, "not acceptable as a relay: it has moved from the hosts that it was enrolled with; enrol it again with --replace");
    }
}

async fn hello(incoming: &mut Incoming<ToMediator>) -> Option<Hello> {
    match timeout(GREETING, incoming.recv()).await {
        Ok(Some(Ok(ToMediator { message: Some(Up::Hello(hello)) }))) => Some(hello),
        _ => None,
    }
}

/// The certificate is good; now the directory says whether the device is still one of ours.
fn admit(peer: &Peer, broker: &Broker) -> Result<Arc<Device>, &'static str> {
    let known = broker.directory.get(peer.device_id);
    known
        .filter(|device| device.public_key == peer.public_key && device.role == peer.role)
        .ok_or("this device was revoked, or is not known here: enrol it again with a new token")
}

fn refused(message: &str) -> ToDevice {
    let code = RefusedCode::NotPermitted.into();
    let refused = Refused { request: 0, code, message: message.to_owned() };
    ToDevice { message: Some(Down::Refused(refused)) }
}

fn welcome(device: &Device, broker: &Broker) -> Welcome {
    let greeting = broker.greeting();
    let mut stun = greeting.stun.clone();
    stun.extend(greeting.vantage.iter().cloned());
    stun.extend(broker.relays.stun());
    Welcome {
        protocol_version: PROTOCOL_VERSION,
        software: concat!("adit-mediator ", env!("CARGO_PKG_VERSION")).to_owned(),
        name: device.name.clone(),
        mediator_stun: greeting.stun.len() as u32,
        stun,
        p2p_ports: greeting.p2p_ports.clone(),
        no_many_socket_probing: !greeting.many_socket_probing,
        no_port_mapping: !greeting.port_mapping,
        ticket_key: if device.role == Role::Relay { greeting.ticket_key.to_vec() } else { vec![] },
        servers: greeting.servers.clone(),
    }
}
