//! Who is there: one map of all devices that hold a control channel.
//!
//! An agent or relay has one channel: a new one takes the old one's place. A technician has one for each
//! command that runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use adit_protocol::control::{Down, ToDevice};
use adit_protocol::{DeviceId, Role};
use dashmap::DashMap;
use tokio::sync::{Notify, mpsc};

use crate::store::Device;

/// Channels that one technician may have at once.
const MAX_CHANNELS: usize = 64;

/// Names one control channel for as long as the mediator runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChannelId(u64);

/// One control channel. Clones are handles on the same one.
#[derive(Debug, Clone)]
pub struct Channel {
    /// Its id.
    pub id: ChannelId,
    /// Who is at the other end, as enrolled.
    pub device: Arc<Device>,
    outgoing: mpsc::Sender<ToDevice>,
    closing: Arc<Notify>,
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

    /// Queues news that one device has for another, or drops it: the receiver must not lose its channel
    /// because the sender floods it, and what matters is said again.
    pub fn pass_on(&self, message: Down) {
        let _ = self.outgoing.try_send(ToDevice { message: Some(message) });
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

/// All channels.
#[derive(Debug, Default)]
pub struct Presence {
    devices: DashMap<DeviceId, Vec<Channel>>,
    next: AtomicU64,
}

impl Presence {
    /// A channel that is not listed yet.
    pub fn channel(&self, device: Arc<Device>, outgoing: mpsc::Sender<ToDevice>) -> Channel {
        let id = ChannelId(self.next.fetch_add(1, Ordering::Relaxed));
        Channel { id, device, outgoing, closing: Arc::default() }
    }

    /// Lists a channel; those that must give way to it are closed.
    pub fn join(&self, channel: Channel) {
        let most = if channel.device.role == Role::Technician { MAX_CHANNELS } else { 1 };
        let mut channels = self.devices.entry(channel.device.id).or_default();
        channels.push(channel);
        while channels.len() > most {
            channels.remove(0).close();
        }
    }

    /// Takes a channel off the list.
    pub fn leave(&self, channel: &Channel) {
        if let Some(mut channels) = self.devices.get_mut(&channel.device.id) {
            channels.retain(|other| other.id != channel.id);
        }
        self.devices.remove_if(&channel.device.id, |_, channels| channels.is_empty());
    }

    /// The newest channel of a device.
    pub fn newest(&self, device: DeviceId) -> Option<Channel> {
        self.devices.get(&device)?.last().cloned()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn device(role: Role) -> Arc<Device> {
        Arc::new(Device {
            id: DeviceId([1; 16]),
            role,
            name: "x".into(),
            tags: vec![],
            hosts: vec![],
            public_key: [0; 32],
            reach: Default::default(),
            certificate: vec![],
            software: String::new(),
            last_seen: 0,
        })
    }

    #[tokio::test]
    async fn an_agents_new_channel_takes_the_place_of_the_old_one() {
        let presence = Presence::default();
        let (outgoing, _keep) = mpsc::channel(1);
        let old = presence.channel(device(Role::Agent), outgoing.clone());
        let new = presence.channel(device(Role::Agent), outgoing);
        presence.join(old.clone());
        presence.join(new.clone());
        old.closed().await;
        presence.leave(&old);
        assert_eq!(presence.newest(DeviceId([1; 16])).map(|channel| channel.id), Some(new.id));
        presence.leave(&new);
        assert!(presence.is_empty());
    }

    #[tokio::test]
    async fn a_technician_may_have_several_and_a_full_one_is_closed() {
        let presence = Presence::default();
        let (outgoing, _keep) = mpsc::channel(1);
        let one = presence.channel(device(Role::Technician), outgoing.clone());
        presence.join(one.clone());
        presence.join(presence.channel(device(Role::Technician), outgoing));
        assert!(one.send(Down::Closed(Default::default())));
        assert!(!one.send(Down::Closed(Default::default())));
        one.closed().await;
        presence.leave(&one);
        assert!(presence.is_online(DeviceId([1; 16])));
    }
}
