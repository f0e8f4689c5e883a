//! The connection test from outside: an agent tries whether this organisation's servers can be reached.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use adit_protocol::DeviceId;
use adit_protocol::control::{Down, Examine, Examined, Probe, Probed, Reached, RefusedCode};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::{Broker, Denied, offline, unknown_agent};
use crate::presence::Channel;

/// Longer than the slowest try of an agent takes: a name that does not resolve, then a connection.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long an agent's answer is good for whoever asks next: each test is a stranger to every relay.
const FRESH: Duration = Duration::from_secs(15);

/// An agent's last answer, and when that was; locked while it tries.
pub(super) type Test = tokio::sync::Mutex<Option<(Instant, Vec<Reached>)>>;

fn fresh(last: &Option<(Instant, Vec<Reached>)>) -> bool {
    last.as_ref().is_some_and(|(at, _)| at.elapsed() < FRESH)
}

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

    /// What a device is to try from where it is.
    pub fn what_to_try(&self, request: u64) -> Probe {
        let Addresses { https, relay, stun } = self.addresses();
        let greeting = self.greeting();
        let (vantage, port_mapping) = (greeting.vantage.clone(), greeting.port_mapping);
        Probe { request, https, relay, stun, vantage, port_mapping }
    }

    /// Lets an agent try all of them for a technician that may reach it; the answer comes later.
    pub fn examine(self: &Arc<Self>, channel: &Channel, examine: Examine) {
        let (broker, channel) = (self.clone(), channel.clone());
        tokio::spawn(async move {
            let request = examine.request;
            channel.send(match broker.examined(&channel, &examine.agent).await {
                Ok(results) => Down::Examined(Examined { request, results }),
                Err(denied) => denied.into_message(request),
            });
        });
    }

    async fn examined(&self, channel: &Channel, agent: &str) -> Result<Vec<Reached>, Denied> {
        let technician = self.technician(&channel.device)?;
        let known = self.directory.agent(agent).filter(|agent| technician.reaches(agent).is_some());
        let known = known.ok_or_else(|| unknown_agent(agent, &self.directory.reachable(&technician)))?;
        if !self.presence.is_online(known.id) {
            return Err(offline(&known));
        }
        let results = self.probe(known.id).await;
        results.map_err(|why| Denied::new(RefusedCode::Unreachable, format!("{}: {why}", known.name)))
    }

    /// What an agent reaches of all of them. It tries one after the other, and not more often than [`FRESH`]: who asks
    /// meanwhile gets the same answer.
    ///
    /// # Errors
    /// Why there is no answer.
    pub async fn probe(&self, agent: DeviceId) -> Result<Vec<Reached>, &'static str> {
        let test = {
            let mut tests = self.tests.lock().unwrap_or_else(PoisonError::into_inner);
            let is_of_use =
                |test: &Arc<Test>| Arc::strong_count(test) > 1 || test.try_lock().is_ok_and(|it| fresh(&it));
            tests.retain(|_, test| is_of_use(test));
            tests.entry(agent).or_default().clone()
        };
        let mut last =
            timeout(PATIENCE, test.lock()).await.map_err(|_| "its connection test takes too long")?;
        if !fresh(&last) {
            *last = Some((Instant::now(), self.ask_agent(agent).await?));
        }
        Ok(last.as_ref().map(|(_, results)| results.clone()).unwrap_or_default())
    }

    async fn ask_agent(&self, agent: DeviceId) -> Result<Vec<Reached>, &'static str> {
        let channel = self.presence.newest(agent).ok_or("the agent is offline")?;
        let (sender, receiver) = oneshot::channel();
        let request = rand::random();
        self.probes().insert(request, (agent, sender));
        channel.send(Down::Probe(self.what_to_try(request)));
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
