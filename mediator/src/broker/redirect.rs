//! Sessions through a redirector: the server is the technician's end, openly. Granted by a rule of its own, permitted by
//! the agent, and written down as such.

use std::net::IpAddr;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use adit_protocol::control::{
    Closed, Down, Grant, Redirect, Redirected, RefusedCode, Serve, Served, Up, Web,
};
use adit_protocol::{DEFAULT_HTTPS_PORT, DeviceId, Protocol, Role, SessionId, Target};
use adit_relay::run::host_port;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::info;

use super::{Broker, Denied, UNRECORDED, closed, offline, party, record, shorten, tell_all, unknown_agent};
use crate::audit::Record;
use crate::organisation::unix_now;
use crate::presence::Channel;
use crate::relays::Relay;
use crate::sessions::{End, Redirecting, Session};
use crate::store::Device;

/// How long a redirector may take: it waits for the agent and for the target.
const SERVED: Duration = Duration::from_secs(20);
/// Ports of one technician: that are open, and that are being opened.
const MAX_PORTS: usize = 16;
const MAX_ORDERS: usize = 4;
/// The longest time that a port is granted for, in seconds.
const LONGEST: u64 = 12 * 60 * 60;

/// Why there is no port.
enum Failed {
    /// It was not granted.
    Refused(Denied),
    /// It was, and nothing came of it.
    Ended(Denied),
}

impl From<Denied> for Failed {
    fn from(denied: Denied) -> Self {
        Self::Refused(denied)
    }
}

/// One port that is being opened.
struct Opening<'a>(&'a Broker, DeviceId);

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        let mut opening = self.0.redirecting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = opening.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                opening.remove(&self.1);
            }
        }
    }
}

impl Broker {
    /// Grants a door, or says why not; the answer comes later.
    pub fn redirect(self: &Arc<Self>, channel: &Channel, redirect: Redirect) {
        let (broker, channel) = (self.clone(), channel.clone());
        tokio::spawn(async move {
            let answer = match broker.redirected(&channel, &redirect).await {
                Ok(redirected) => {
                    let session = redirected.session.clone();
                    if channel.send(Down::Redirected(redirected)) {
                        return;
                    }
                    // It hung up between its wish and the answer: nobody would ever use the door.
                    let reason = "nobody waits for it".to_owned();
                    let closed = Closed { session, reason, bytes_sent: 0, bytes_received: 0 };
                    return broker.closed(&channel.device, closed).await;
                }
                Err(denied) => denied.into_message(redirect.request),
            };
            channel.send(answer);
        });
    }

    /// Grants a door and waits until it is open; a refusal is written down.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn redirected(&self, channel: &Channel, redirect: &Redirect) -> Result<Redirected, Denied> {
        match self.try_redirect(channel, redirect).await {
            Ok(redirected) => Ok(redirected),
            Err(Failed::Refused(denied)) => {
                self.note_refusal(channel, redirect, &denied).await;
                Err(denied)
            }
            // Its end is written down.
            Err(Failed::Ended(denied)) => Err(denied),
        }
    }

    /// A redirector has opened a port, or could not.
    pub fn served(&self, device: &Device, served: Served) {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if orders.get(&served.request).is_some_and(|(asked, _)| *asked == device.id)
            && let Some((_, waiting)) = orders.remove(&served.request)
        {
            let _ = waiting.send(served);
        }
    }

    /// The redirector in this process has this channel; what it says is served until it is gone.
    pub async fn embed_redirector(self: Arc<Self>, channel: Channel, mut said: mpsc::Receiver<Up>) {
        let device = channel.device.clone();
        let _ = self.redirector.set(channel);
        while let Some(up) = said.recv().await {
            match up {
                Up::Served(served) => self.served(&device, served),
                Up::Closed(closed) => self.closed(&device, closed).await,
                Up::Renew(renew) => self.renew(&device, &renew.session),
                _ => {}
            }
        }
    }

    async fn note_refusal(&self, channel: &Channel, redirect: &Redirect, denied: &Denied) {
        info!(technician = %channel.device.id, code = ?denied.code, "redirected port refused");
        let (from, targets) = (channel.from.to_string(), [shorten(&redirect.target).to_owned()]);
        let record = Record {
            technician: Some(party(&channel.device)),
            wanted: shorten(&redirect.agent),
            targets: &targets,
            via: "redirector",
            from: &from,
            reason: &denied.message,
            ..Record::new("refused", unix_now())
        };
        if channel.may_note_refusal() && self.audit.write(&record).await.is_err() {
            tracing::warn!("an audit record was lost");
        }
    }

    /// `None`: this technician opens too many at once.
    fn begin_opening(&self, technician: DeviceId) -> Option<Opening<'_>> {
        let mut opening = self.redirecting.lock().unwrap_or_else(PoisonError::into_inner);
        let count = opening.entry(technician).or_default();
        if *count >= MAX_ORDERS {
            return None;
        }
        *count += 1;
        Some(Opening(self, technician))
    }

    /// Relays elsewhere that may be redirectors, by name.
    pub fn set_redirectors(&self, names: Vec<String>) {
        *self.redirectors.write().unwrap_or_else(PoisonError::into_inner) = names;
    }

    /// Whether this relay may be a redirector: to see ciphertext only needs less trust.
    pub fn may_be_redirector(&self, relay: &Device) -> bool {
        self.redirectors.read().unwrap_or_else(PoisonError::into_inner).contains(&relay.name)
    }

    async fn try_redirect(&self, channel: &Channel, wanted: &Redirect) -> Result<Redirected, Failed> {
        let too_many = |what: &str| Denied::new(RefusedCode::Unavailable, what.to_owned());
        let _opening = self
            .begin_opening(channel.device.id)
            .ok_or_else(|| too_many("too many ports are being opened: try again in a moment"))?;
        if self.sessions().redirected_for(channel.device.id) >= MAX_PORTS {
            return Err(too_many("this technician has 16 ports of the redirector: end some first").into());
        }
        let forbidden = |message: &str| Denied::new(RefusedCode::NotPermitted, message.to_owned());
        let target = wanted.target.parse::<Target>().ok().filter(|target| target.protocol == Protocol::Tcp);
        let target = target.ok_or_else(|| forbidden("the target is not HOST:PORT"))?;
        let source: IpAddr = match wanted.source.as_str() {
            "" => channel.from.ip().to_canonical(),
            text => {
                text.parse::<IpAddr>().map_err(|_| forbidden("the source is no IP address"))?.to_canonical()
            }
        };
        let technician = self.technician(&channel.device)?;
        let agent = self.directory.agent(&wanted.agent).filter(|agent| technician.reaches(agent).is_some());
        let agent =
            agent.ok_or_else(|| unknown_agent(&wanted.agent, &self.directory.reachable(&technician)))?;
        let rule = technician.redirects(&agent).ok_or_else(|| {
            forbidden(&format!(
                "no grant lets this technician use the redirector for {} (the operator: adit-mediator allow {} --redirector \
                 with a tag of it)",
                agent.name, technician.name
            ))
        })?;
        let agent_channel = self.presence.newest(agent.id).ok_or_else(|| offline(&agent))?;
        let no_redirector = || {
            let message =
                "no redirector is there: the operator gives [redirector] ports to the mediator or a relay";
            Denied::new(RefusedCode::NoRelay, message.into())
        };
        let relay = self.relays.redirector().ok_or_else(no_redirector)?;
        let server = self.channel_of(&relay).ok_or_else(no_redirector)?;

        let seconds = wanted.seconds.clamp(1, LONGEST);
        let expires = unix_now() + seconds;
        let end = |channel: &Channel| End {
            device: channel.device.clone(),
            channel: Some(channel.clone()),
            ice: None,
            seen: [None; 2],
        };
        let id = SessionId(rand::random());
        let mut session = Session::new(id, end(channel), end(&agent_channel), Instant::now());
        session.redirector = Some(Redirecting { end: end(&server), relay: relay.id, epoch: relay.epoch });
        if !self.sessions().insert(session.clone()) {
            return Err(too_many("too many sessions: close some first").into());
        }
        let (from, agent_from, targets) =
            (channel.from.to_string(), agent_channel.from.to_string(), [target.to_string()]);
        let door = if wanted.web.is_some() { "pages" } else { "a port" };
        let proves = wanted.proves && wanted.source.is_empty() && wanted.web.is_none();
        let from_where = if proves { "where its secret is shown from, else " } else { "" };
        let reason = format!("{door} of {}, from {from_where}{source}, for {seconds} s", server.device.name);
        let rule = rule.to_string();
        let granted = Record {
            targets: &targets,
            via: "redirector",
            tier: "redirector",
            rule: &rule,
            from: &from,
            agent_from: &agent_from,
            reason: &reason,
            ..record("grant", &session)
        };
        if self.audit.write(&granted).await.is_err() {
            self.sessions().remove(id, &channel.device);
            return Err(Denied::new(RefusedCode::Unavailable, UNRECORDED.into()).into());
        }
        // The grant may have been taken away meanwhile.
        if !self.may_redirect(technician.id, agent.id) {
            self.end_redirected(id, channel, "the grant was taken away").await;
            return Err(Failed::Ended(forbidden("the grant was taken away")));
        }
        let order = Serve {
            target: target.to_string(),
            source: source.to_string(),
            seconds,
            web: wanted.web.clone().map(|web| Web { exact: !wanted.source.is_empty(), ..web }),
            proves,
            ..Serve::default()
        };
        let denied = match self.order(&session, &relay, &server, &agent_channel, order).await {
            // It may have ended meanwhile: nobody would hear of that.
            Ok((port, served))
                if self.sessions().get(id).is_some() && served.path.is_empty() == wanted.web.is_none() =>
            {
                info!(session = %id, technician = %technician.id, agent = %agent.id, "redirected session granted");
                let host = if served.host.is_empty() { host_for(&relay, source) } else { served.host };
                let address = host_port(&host, port);
                let origin =
                    if port == DEFAULT_HTTPS_PORT { address.trim_end_matches(":443") } else { &address };
                let link = if served.path.is_empty() {
                    String::new()
                } else {
                    format!("https://{origin}{}", served.path)
                };
                return Ok(Redirected {
                    request: wanted.request,
                    session: id.0.to_vec(),
                    address,
                    source: source.to_string(),
                    expires,
                    link,
                    certificate: served.certificate,
                    proof: served.proof,
                });
            }
            // One that knows no pages has opened a port.
            Ok((_, served)) if wanted.web.is_some() && served.path.is_empty() => Denied::new(
                RefusedCode::Unspecified,
                format!("the redirector {} is of an older version: it shows no pages", server.device.name),
            ),
            Ok(_) => Denied::new(RefusedCode::AgentRefused, "the session has ended".into()),
            Err(denied) => denied,
        };
        self.end_redirected(id, channel, &denied.message).await;
        Err(Failed::Ended(denied))
    }

    /// Tells both ends of the tunnel, and waits until the door is open, at which port it is.
    async fn order(
        &self,
        session: &Session,
        relay: &Relay,
        server: &Channel,
        agent: &Channel,
        order: Serve,
    ) -> Result<(u16, Served), Denied> {
        let relays = std::slice::from_ref(relay);
        let pairing = self.pairing(session);
        let grant = |role: Role, peer: &Device, peer_name: String| Grant {
            request: 0,
            session: session.id.0.to_vec(),
            peer: peer.id.0.to_vec(),
            peer_name,
            peer_key: peer.public_key.to_vec(),
            // There is no direct path.
            local_ice: None,
            remote_ice: None,
            relays: pairing.tickets(role, relays, &self.ticket_key),
            // Its time is counted where the port is: no clock of another machine cuts it short.
            expires: 0,
            targets: if role == Role::Agent { vec![order.target.clone()] } else { vec![] },
            via: "redirector".to_owned(),
            flight: vec![],
            flight_passed: false,
            peer_comes_from: String::new(),
        };
        let through =
            format!("{} through the redirector {}", session.technician.device.name, server.device.name);
        let to_agent = grant(Role::Agent, &server.device, through);
        let to_server = grant(Role::Technician, &session.agent.device, session.agent.device.name.clone());
        self.sessions().ticketed(session.id, super::epochs(relays), Instant::now());
        let (sender, receiver) = oneshot::channel();
        let request = rand::random();
        let orders = || self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        orders().insert(request, (server.device.id, sender));
        let serve = Serve { request, grant: Some(to_server), ..order };
        let sent = agent.send(Down::Offer(to_agent)) && server.send(Down::Serve(serve));
        let answer = if sent { timeout(SERVED, receiver).await.ok().and_then(Result::ok) } else { None };
        orders().remove(&request);
        let failed = |code, why: &str| Denied::new(code, why.to_owned());
        match answer {
            Some(served) if served.port != 0 => match u16::try_from(served.port) {
                Ok(port) => Ok((port, served)),
                Err(_) => Err(failed(RefusedCode::Unspecified, "the redirector's answer makes no sense")),
            },
            Some(Served { error, unreachable, .. }) => {
                let code = if unreachable { RefusedCode::Unreachable } else { RefusedCode::AgentRefused };
                Err(failed(code, shorten(&error)))
            }
            None => Err(failed(RefusedCode::Unreachable, "the redirector did not answer")),
        }
    }

    /// A session that came to nothing.
    async fn end_redirected(&self, id: SessionId, channel: &Channel, why: &str) {
        let removed = self.sessions().remove(id, &channel.device);
        let Some(session) = removed else { return };
        tell_all(&session, &closed(id, why), Some(channel.device.id));
        self.write_down(&session, "closed", why, None).await;
    }

    fn channel_of(&self, relay: &Relay) -> Option<Channel> {
        match relay.channel {
            None => self.redirector.get().cloned(),
            Some(_) => self.presence.newest(relay.id),
        }
    }
}

/// The host of a relay for who comes from `source`: a name, or an address of the same family, where there is one.
fn host_for(relay: &Relay, source: IpAddr) -> String {
    let host = |address: &String| {
        let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
        host.trim_matches(['[', ']']).to_owned()
    };
    let misfits = |host: &String| host.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv4() != source.is_ipv4());
    let mut hosts: Vec<String> = relay.addresses.iter().map(host).collect();
    hosts.sort_by_key(misfits);
    hosts.into_iter().next().unwrap_or_default()
}
