//! Who is there: one map of all devices that hold a control channel.
//!
//! An agent or relay has one channel: a new one takes the old one's place. A technician has one for each
//! command that runs.
//!
//! A machine that was cloned with its state directory shows by two processes that take each other's place:
//! the one that comes back while the other is there is turned away.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use adit_client::identity::Peer;
use adit_protocol::control::{Down, ToDevice};
use adit_protocol::{DeviceId, Role};
use dashmap::DashMap;
use tokio::sync::{Notify, mpsc};

use crate::organisation::unix_now;
use crate::store::Device;

/// Channels that one technician may have at once.
const MAX_CHANNELS: usize = 64;
/// Refusals of one channel that the audit log gets.
const MAX_REFUSALS: u64 = 100;
/// Displaced processes that are remembered of one device.
const MAX_DISPLACED: usize = 4;

/// Names one control channel for as long as the mediator runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChannelId(u64);

/// One control channel. Clones are handles on the same one.
#[derive(Debug, Clone)]
pub struct Channel {
    /// Its id.
    pub id: ChannelId,
    /// Who is at the other end, as enrolled when it came. What it may do now is in the directory.
    pub device: Arc<Device>,
    /// Where it came from.
    pub from: SocketAddr,
    /// Since when it is there, in seconds since 1970-01-01 UTC.
    pub since: u64,
    /// Random number of the process at the other end; 0: one of an older version.
    pub instance: u64,
    /// The newest certificate that the device has or was sent.
    certificate: Arc<Mutex<Peer>>,
    outgoing: mpsc::Sender<ToDevice>,
    closing: Arc<Notify>,
    refusals: Arc<AtomicU64>,
}

impl Channel {
    /// Queues a message. A channel whose queue is full is closed: its device comes back and asks again.
    pub fn send(&self, message: Down) -> bool {
        let sent = self.outgoing.try_send(ToDevice { message: Some(message) }).is_ok();
        if !sent {
            self.close();
        }
        sent
    }

    /// Queues news that one device has for another, or drops it: what matters is said again. It takes half of
    /// the queue at most: the receiver must not lose its channel, or what we have to say, because the sender
    /// floods it.
    pub fn pass_on(&self, message: Down) {
        if self.outgoing.capacity() * 2 > self.outgoing.max_capacity() {
            let _ = self.outgoing.try_send(ToDevice { message: Some(message) });
        }
    }

    /// The newest certificate that the device has or was sent.
    pub fn certificate(&self) -> Peer {
        self.certificate.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The device was sent this one.
    pub fn set_certificate(&self, certificate: Peer) {
        *self.certificate.lock().unwrap_or_else(PoisonError::into_inner) = certificate;
    }

    /// Whether one more refusal is written down: a technician that asks on and on fills no disk.
    pub fn may_note_refusal(&self) -> bool {
        self.refusals.fetch_add(1, Ordering::Relaxed) < MAX_REFUSALS
    }

    /// Asks the task that serves this channel to end.
    pub fn close(&self) {
        self.closing.notify_one();
    }

    /// Waits until [`Channel::close`] was called.
    pub async fn closed(&self) {
        self.closing.notified().await;
    }
}

/// Who comes.
#[derive(Debug)]
pub struct Arrival {
    /// As enrolled.
    pub device: Arc<Device>,
    /// As its certificate says.
    pub certificate: Peer,
    /// Where it comes from.
    pub from: SocketAddr,
    /// Random number of its process.
    pub instance: u64,
}

/// All channels.
#[derive(Debug, Default)]
pub struct Presence {
    devices: DashMap<DeviceId, Present>,
    next: AtomicU64,
}

#[derive(Debug, Default)]
struct Present {
    channels: Vec<Channel>,
    /// Processes whose place was taken while they were there.
    displaced: Vec<u64>,
}

/// Two processes have the same identity, and both are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cloned {
    /// Where the other one is.
    pub other: SocketAddr,
}

impl Presence {
    /// A channel that is not listed yet.
    pub fn channel(&self, arrival: Arrival, outgoing: mpsc::Sender<ToDevice>) -> Channel {
        let id = ChannelId(self.next.fetch_add(1, Ordering::Relaxed));
        let Arrival { device, certificate, from, instance } = arrival;
        let since = unix_now();
        let certificate = Arc::new(Mutex::new(certificate));
        Channel {
            id,
            device,
            from,
            since,
            instance,
            certificate,
            outgoing,
            closing: Arc::default(),
            refusals: Arc::default(),
        }
    }

    /// Lists a channel; those that must give way to it are closed.
    ///
    /// # Errors
    /// [`Cloned`]: its process had to give way before, and the one that took its place is there. Nothing
    /// changes then.
    pub fn join(&self, channel: Channel) -> Result<(), Cloned> {
        let most = if channel.device.role == Role::Technician { MAX_CHANNELS } else { 1 };
        let mut present = self.devices.entry(channel.device.id).or_default();
        let other = present.channels.last().filter(|other| most == 1 && other.instance != channel.instance);
        if let Some(other) = other {
            if present.displaced.contains(&channel.instance) && channel.instance != 0 {
                return Err(Cloned { other: other.from });
            }
            let displaced = other.instance;
            present.displaced.push(displaced);
            // A service that is restarted again and again leaves no more than these.
            if present.displaced.len() > MAX_DISPLACED {
                present.displaced.remove(0);
            }
        }
        present.channels.push(channel);
        while present.channels.len() > most {
            present.channels.remove(0).close();
        }
        Ok(())
    }

    /// Takes a channel off the list.
    pub fn leave(&self, channel: &Channel) {
        if let Some(mut present) = self.devices.get_mut(&channel.device.id) {
            present.channels.retain(|other| other.id != channel.id);
        }
        self.devices.remove_if(&channel.device.id, |_, present| present.channels.is_empty());
    }

    /// The newest channel of a device.
    pub fn newest(&self, device: DeviceId) -> Option<Channel> {
        self.devices.get(&device)?.channels.last().cloned()
    }

    /// All channels of a device, oldest first.
    pub fn of(&self, device: DeviceId) -> Vec<Channel> {
        self.devices.get(&device).map(|present| present.channels.clone()).unwrap_or_default()
    }

    /// All channels of all devices.
    pub fn all(&self) -> Vec<Channel> {
        self.devices.iter().flat_map(|present| present.channels.clone()).collect()
    }

    /// Whether a device is there.
    pub fn is_online(&self, device: DeviceId) -> bool {
        self.devices.contains_key(&device)
    }

    /// How many devices are there.
    pub fn len(&self) -> usize {
        self.devices.len()
    }

    /// Whether nobody is there.
    pub fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }
}

/// The arrival of a device of this role, for tests.
#[cfg(test)]
pub(crate) fn arrival(role: Role, id: u8, instance: u64) -> Arrival {
    let device = crate::store::device::sample(role, id);
    let certificate = Peer {
        device_id: device.id,
        role,
        name: device.name.clone(),
        tags: vec![],
        public_key: device.public_key,
        not_after: 0,
    };
    Arrival { device: Arc::new(device), certificate, from: SocketAddr::from(([192, 0, 2, id], 9)), instance }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_agents_new_channel_takes_the_place_of_the_old_one() {
        let presence = Presence::default();
        let (outgoing, _keep) = mpsc::channel(1);
        let old = presence.channel(arrival(Role::Agent, 1, 7), outgoing.clone());
        let new = presence.channel(arrival(Role::Agent, 1, 7), outgoing);
        presence.join(old.clone()).expect("joins");
        presence.join(new.clone()).expect("joins");
        old.closed().await;
        presence.leave(&old);
        assert_eq!(presence.newest(DeviceId([1; 16])).map(|channel| channel.id), Some(new.id));
        presence.leave(&new);
        assert!(presence.is_empty());
    }

    #[tokio::test]
    async fn a_restarted_process_gets_in_and_a_clone_that_comes_back_does_not() {
        let presence = Presence::default();
        let (outgoing, _keep) = mpsc::channel(1);
        let come = |instance| presence.channel(arrival(Role::Agent, 1, instance), outgoing.clone());
        presence.join(come(1)).expect("joins");
        let second = come(2);
        presence.join(second.clone()).expect("a restarted process");
        let cloned = presence.join(come(1)).expect_err("both are there");
        assert_eq!(cloned.other, second.from);
        assert_eq!(presence.newest(DeviceId([1; 16])).map(|channel| channel.id), Some(second.id));
        presence.leave(&second);
        presence.join(come(1)).expect("the other one is gone");
        // Who does not say which process it is cannot be told apart.
        presence.join(come(0)).expect("joins");
        presence.join(come(0)).expect("joins");
    }

    #[tokio::test]
    async fn a_technician_may_have_several_and_a_full_one_is_closed() {
        let presence = Presence::default();
        let (outgoing, _keep) = mpsc::channel(1);
        let one = presence.channel(arrival(Role::Technician, 1, 1), outgoing.clone());
        presence.join(one.clone()).expect("joins");
        presence.join(presence.channel(arrival(Role::Technician, 1, 2), outgoing)).expect("joins");
        assert!(one.send(Down::Closed(Default::default())));
        assert!(!one.send(Down::Closed(Default::default())));
        one.closed().await;
        presence.leave(&one);
        assert!(presence.is_online(DeviceId([1; 16])));
    }
}
