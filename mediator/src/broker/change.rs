//! The operator has changed who may do what: it takes effect on what runs, at once.

use std::sync::{Arc, PoisonError};

use adit_client::identity::Peer;
use adit_client::identity::certificate::DEVICE_VALIDITY;
use adit_client::identity::revocation::Revocations;
use adit_protocol::control::{Closed, Down, Refused, RefusedCode, Revocations as List, Update};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::{Broker, FORBIDDEN, REVOKED, closed, party, tell_all};
use crate::audit::Record;
use crate::channel::Greeting;
use crate::organisation::unix_now;
use crate::presence::{Channel, Cloned};
use crate::store::revoke::Extended;

/// A certificate with less of its life left than this is renewed. Seconds.
const RENEW: u64 = DEVICE_VALIDITY / 3;

/// What a change did to what runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Effect {
    /// Sessions that were ended.
    pub sessions: usize,
    /// Control channels that were closed.
    pub channels: usize,
    /// Devices that were sent a new certificate.
    pub renewed: usize,
}

impl Broker {
    /// Loads the devices and the list of revoked certificates anew, and ends what is no longer permitted.
    ///
    /// # Errors
    /// The database's.
    pub async fn reload(&self) -> Result<Effect, sqlx::Error> {
        let changes = self.directory.reload().await?;
        let mut effect = Effect::default();
        // First what cuts off: no slow database and no slow disk holds that up.
        let mut ended = vec![];
        let (forbidden, claimants) = self
            .sessions()
            .forbid(|one, other| self.may_reach(one, other), |session| self.may_go_on(session));
        for (id, claimant) in claimants {
            claimant.send(Down::Closed(closed(id, FORBIDDEN)));
        }
        for session in forbidden {
            let gone = [&session.technician, &session.agent].map(|end| self.directory.get(end.device.id));
            let reason = match gone {
                [None, _] => "the technician's device was revoked",
                [_, None] => "the agent was revoked",
                _ => FORBIDDEN,
            };
            let message: Closed = closed(session.id, reason);
            tell_all(&session, &message, None);
            ended.push((session, reason));
        }
        effect.sessions = ended.len();
        // After their sessions: so they hear of the end of those first.
        for device in &changes.gone {
            info!(device = %device.id, name = device.name, "device is revoked");
            for channel in self.presence.of(device.id) {
                let (code, message) = (RefusedCode::NotPermitted.into(), REVOKED.to_owned());
                channel.send(Down::Refused(Refused { request: 0, code, message }));
                channel.close();
                effect.channels += 1;
            }
        }
        let listed = self.load_list().await;
        for (session, reason) in &ended {
            self.write_down(session, "closed", reason, None).await;
        }
        for device in &changes.changed {
            for channel in self.presence.of(device.id) {
                effect.renewed += usize::from(self.refresh(&channel).await);
            }
        }
        listed.map(|()| effect)
    }

    /// Takes the newest list from the database and tells everybody who is there. Extends it first where that
    /// is due and the enrolment key is there.
    ///
    /// # Errors
    /// The database's.
    pub async fn load_list(&self) -> Result<(), sqlx::Error> {
        let authority = self.keyring.authority();
        if self.store.extend_list(authority.as_ref(), unix_now()).await? == Extended::Unsigned {
            warn!("devices were revoked, and the list for others cannot be signed: root-key.pem is offline");
        }
        let Some(list) = self.store.newest_list().await? else { return Ok(()) };
        let newer = match Revocations::read(&list.der, self.keyring.root()) {
            Ok(list) => self.revoked.advance(list),
            Err(error) => {
                warn!(%error, number = list.number, "in the database");
                false
            }
        };
        if !newer {
            return Ok(());
        }
        if let Some(relay) = self.embedded.get() {
            relay.set_revoked(self.revoked.newest());
        }
        // Its sessions end by `reload`, which knows who is gone.
        for channel in self.presence.all() {
            channel.send(Down::Revocations(List { list: list.der.clone() }));
        }
        Ok(())
    }

    /// Two machines are there with the identity of this one.
    pub async fn cloned(&self, channel: &Channel, cloned: Cloned) {
        let device = &channel.device;
        warn!(device = %device.id, name = device.name, one = %channel.from, other = %cloned.other,
            "two machines are online with one identity: one of them must be enrolled again");
        // Once for each hour that it goes on.
        let now = unix_now();
        let known = self.directory.get(device.id).map_or(0, |device| device.cloned);
        if now < known + 3600 {
            return;
        }
        self.directory.note_clone(device.id, now);
        if let Err(error) = self.store.note_clone(device.id, now).await {
            warn!(%error, "the database failed");
        }
        let (from, reason) = (channel.from.to_string(), format!("the other one is at {}", cloned.other));
        let record = Record {
            device: Some(party(device)),
            from: &from,
            reason: &reason,
            ..Record::new("cloned", now)
        };
        if self.audit.write(&record).await.is_err() {
            warn!("an audit record was lost");
        }
    }

    /// What devices are told when they come.
    pub fn greeting(&self) -> Arc<Greeting> {
        self.greeting.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Names and addresses by which this server is reached.
    pub fn hosts(&self) -> Vec<String> {
        self.greeting().hosts.clone()
    }

    /// Tells everybody who is there where the control channel is from now on, if that has changed.
    pub fn set_greeting(&self, greeting: Greeting) {
        let servers = greeting.servers.clone();
        let before = std::mem::replace(
            &mut *self.greeting.write().unwrap_or_else(PoisonError::into_inner),
            Arc::new(greeting),
        );
        if before.servers != servers {
            for channel in self.presence.all() {
                channel.send(Down::Update(Update { certificate: vec![], servers: servers.clone() }));
            }
        }
    }

    /// The relay in this process follows the list of revoked certificates.
    pub fn embed(&self, relay: Arc<adit_relay::Relay>) {
        relay.set_revoked(self.revoked.newest());
        let _ = self.embedded.set(relay);
    }

    /// A device that is there has this list: sends the newest when it is behind.
    pub fn catch_up(&self, channel: &Channel, number: u64) {
        let newest = self.revoked.newest();
        if newest.number > number {
            channel.send(Down::Revocations(List { list: newest.der().to_vec() }));
        } else if newest.number < number {
            warn!(device = %channel.device.id, name = channel.device.name, theirs = number, ours = newest.number,
                "a device knows of revocations that this database does not (an older backup?): revoke those devices again");
        }
    }

    /// Sends a device a new certificate when the one it has says something else than the directory, or ends
    /// soon. Says whether it did.
    pub async fn refresh(&self, channel: &Channel) -> bool {
        let Some(device) = self.directory.get(channel.device.id) else { return false };
        let has = channel.certificate();
        let fits = (&has.name, &has.tags) == (&device.name, &device.tags);
        let now = unix_now();
        if fits && has.not_after > now + RENEW {
            return false;
        }
        let Some(authority) = self.keyring.authority() else {
            warn!(device = %device.id, name = device.name, fits, "its certificate cannot be renewed: root-key.pem is offline");
            return false;
        };
        let made = authority.sign_key(&device.public_key, &device.subject(), now);
        let Some((certificate, peer)) =
            made.ok().and_then(|der| Some((der.to_vec(), Peer::from_certificate(&der).ok()?)))
        else {
            warn!(device = %device.id, "its certificate could not be made");
            return false;
        };
        // What cannot be kept is made again next time.
        if let Err(error) = self.store.set_certificate(device.id, &certificate).await {
            warn!(%error, "the database failed");
        }
        channel.set_certificate(peer);
        info!(device = %device.id, name = device.name, "certificate renewed");
        channel.send(Down::Update(Update { certificate, servers: vec![] }))
    }
}
