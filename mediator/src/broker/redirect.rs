//! Sessions through a redirector: the server is the technician's end, openly. Granted by a rule of its own, permitted by
//! the agent, and written down as such.

use std::net::IpAddr;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use adit_protocol::control::{
    Closed, Down, Grant, IceCredentials, Redirect, Redirected, RefusedCode, Serve, Served, Up,
};
use adit_protocol::{Protocol, Role, SessionId, Target};
use adit_relay::run::host_port;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::info;

use super::{
    Broker, Denied, UNRECORDED, closed, offline, party, random_text, record, shorten, tell, unknown_agent,
};
use crate::audit::Record;
use crate::organisation::unix_now;
use crate::presence::Channel;
use crate::relays::Relay;
use crate::sessions::{End, Redirecting, Session};
use crate::store::Device;

/// How long a redirector may take: it waits for the agent and for the target.
const SERVED: Duration = Duration::from_secs(20);
/// The longest time that a port is granted for, in seconds.
const LONGEST: u64 = 12 * 60 * 60;

impl Broker {
    /// Grants a port, or says why not; the answer comes later.
    pub fn redirect(self: &Arc<Self>, channel: &Channel, redirect: Redirect) {
        let (broker, channel) = (self.clone(), channel.clone());
        tokio::spawn(async move {
            let answer = match broker.try_redirect(&channel, &redirect).await {
                Ok(redirected) => Down::Redirected(redirected),
                Err(denied) => {
                    broker.note_refusal(&channel, &redirect, &denied).await;
                    denied.into_message(redirect.request)
                }
            };
            channel.send(answer);
        });
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
        let (from, targets) = (channel.from.to_string(), [redirect.target.clone()]);
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

    async fn try_redirect(&self, channel: &Channel, wanted: &Redirect) -> Result<Redirected, Denied> {
        let forbidden = |message: &str| Denied::new(RefusedCode::NotPermitted, message.to_owned());
        let target = wanted.target.parse::<Target>().ok().filter(|target| target.protocol == Protocol::Tcp);
        let target = target.ok_or_else(|| forbidden("the target is not HOST:PORT"))?;
        let source: IpAddr = match wanted.source.as_str() {
            "" => channel.from.ip().to_canonical(),
            text => text.parse().map_err(|_| forbidden("the source is no IP address"))?,
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
            seen: None,
        };
        let id = SessionId(rand::random());
        let mut session = Session::new(id, end(channel), end(&agent_channel), Instant::now());
        session.redirector = Some(Redirecting { end: end(&server), relay: relay.id });
        if !self.sessions().insert(session.clone()) {
            return Err(Denied::new(RefusedCode::Unavailable, "too many sessions: close some first".into()));
        }
        let (from, agent_from, targets) =
            (channel.from.to_string(), agent_channel.from.to_string(), [target.to_string()]);
        let reason = format!("a port of {}, from {source}, for {seconds} s", server.device.name);
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
            return Err(Denied::new(RefusedCode::Unavailable, UNRECORDED.into()));
        }
        // The grant may have been taken away meanwhile.
        if !self.may_redirect(technician.id, agent.id) {
            self.end_redirected(id, channel, "the grant was taken away").await;
            return Err(forbidden("the grant was taken away"));
        }
        let served = self.order(&session, &relay, &server, &agent_channel, &target, source, seconds, expires);
        match served.await {
            Ok(port) => {
                let host = relay.addresses.first().and_then(|address| address.rsplit_once(':'));
                let host = host.map_or("", |(host, _)| host).trim_matches(['[', ']']);
                info!(session = %id, technician = %technician.id, agent = %agent.id, "redirected port granted");
                let (session, address) = (id.0.to_vec(), host_port(host, port));
                let request = wanted.request;
                Ok(Redirected { request, session, address, source: source.to_string(), expires })
            }
            Err(why) => {
                self.end_redirected(id, channel, &why).await;
                Err(Denied::new(RefusedCode::AgentRefused, why))
            }
        }
    }

    /// Tells both ends of the tunnel, and waits for the port.
    #[expect(clippy::too_many_arguments, reason = "the parts of one order")]
    async fn order(
        &self,
        session: &Session,
        relay: &Relay,
        server: &Channel,
        agent: &Channel,
        target: &Target,
        source: IpAddr,
        seconds: u64,
        expires: u64,
    ) -> Result<u16, String> {
        let relays = std::slice::from_ref(relay);
        let pairing = self.pairing(session);
        let ice = || Some(IceCredentials { ufrag: random_text(8), password: random_text(24) });
        let grant = |role: Role, peer: &Device, peer_name: String| Grant {
            request: 0,
            session: session.id.0.to_vec(),
            peer: peer.id.0.to_vec(),
            peer_name,
            peer_key: peer.public_key.to_vec(),
            local_ice: ice(),
            remote_ice: ice(),
            relays: pairing.tickets(role, relays, &self.ticket_key),
            expires,
            targets: if role == Role::Agent { vec![target.to_string()] } else { vec![] },
            via: "redirector".to_owned(),
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
        let (target, source) = (target.to_string(), source.to_string());
        let serve = Serve { request, grant: Some(to_server), target, source, seconds };
        let sent = agent.send(Down::Offer(to_agent)) && server.send(Down::Serve(serve));
        let answer = if sent { timeout(SERVED, receiver).await.ok().and_then(Result::ok) } else { None };
        orders().remove(&request);
        match answer {
            Some(Served { port, .. }) if port != 0 => {
                u16::try_from(port).map_err(|_| "the redirector's answer makes no sense".to_owned())
            }
            Some(Served { error, .. }) => Err(shorten(&error).to_owned()),
            None => Err("the redirector did not answer".to_owned()),
        }
    }

    /// A session that came to nothing.
    async fn end_redirected(&self, id: SessionId, channel: &Channel, why: &str) {
        let removed = self.sessions().remove(id, &channel.device);
        let Some(session) = removed else { return };
        let message: Closed = closed(id, why);
        tell(session.peer(), Down::Closed(message.clone()));
        tell(&session.agent, Down::Closed(message));
        self.write_down(&session, "closed", why, None).await;
    }

    fn channel_of(&self, relay: &Relay) -> Option<Channel> {
        match relay.channel {
            None => self.redirector.get().cloned(),
            Some(_) => self.presence.newest(relay.id),
        }
    }
}
