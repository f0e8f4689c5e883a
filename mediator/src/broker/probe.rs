//! The connection test from outside: an agent tries whether this organisation's servers can be reached.

use std::time::Duration;

use adit_protocol::DeviceId;
use adit_protocol::control::{Down, Probe, Probed, Reached};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::Broker;

/// Longer than the slowest try of an agent takes: a name that does not resolve, then a connection.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where this organisation is reached, `HOST:PORT` each.
#[derive(Debug, Clone, Default)]
pub struct Addresses {
    /// Mediators (TCP).
    pub https: Vec<String>,
    /// Relays (TCP).
    pub relay: Vec<String>,
    /// STUN servers (UDP).
    pub stun: Vec<String>,
}

impl Broker {
    /// Where this organisation is reached now.
    pub fn addresses(&self) -> Addresses {
        let greeting = self.greeting();
        let mut stun = greeting.stun.clone();
        stun.extend(self.relays.stun());
        Addresses { https: greeting.servers.clone(), relay: self.relays.addresses(), stun }
    }

    /// Lets an agent try all of them.
    ///
    /// # Errors
    /// Why there is no answer.
    pub async fn probe(&self, agent: DeviceId) -> Result<Vec<Reached>, &'static str> {
        let channel = self.presence.newest(agent).ok_or("the agent is offline")?;
        let (sender, receiver) = oneshot::channel();
        let request = rand::random();
        self.probes().insert(request, (agent, sender));
        let Addresses { https, relay, stun } = self.addresses();
        channel.send(Down::Probe(Probe { request, https, relay, stun }));
        let answer = timeout(PATIENCE, receiver).await;
        self.probes().remove(&request);
        answer.ok().and_then(Result::ok).ok_or("the agent does not answer: is it of an older version?")
    }

    /// An agent has tried.
    pub fn probed(&self, device: DeviceId, probed: Probed) {
        let mut probes = self.probes();
        if probes.get(&probed.request).is_some_and(|(asked, _)| *asked == device)
            && let Some((_, waiting)) = probes.remove(&probed.request)
        {
            let _ = waiting.send(probed.results);
        }
    }
}
