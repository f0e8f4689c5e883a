//! Sorts what arrives on a socket (RFC 9443): STUN to the sessions, QUIC to quinn.
//!
//! QUIC's handshake comes only from addresses that a session has confirmed; from elsewhere it gets no
//! answer at all. Short headers pass from everywhere, since a NAT may map a connection anew: quinn drops,
//! without an answer, those whose connection id it did not make.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Instant;

use adit_protocol::{DeviceId, SessionId};
use adit_tunnel::path::{LocalSocket, Path, PathAgent, stun};
use quinn::Connection;
use quinn::udp::RecvMeta;
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};

use crate::allow::canonical;

/// The sessions of one socket, by their local username fragment.
pub(super) struct Demux {
    socket: LocalSocket,
    sessions: RwLock<HashMap<String, Arc<Entry>>>,
}

/// One session, as the socket and the accepting side see it.
pub(super) struct Entry {
    /// Session id.
    pub(super) session: SessionId,
    /// Device id of the other end.
    pub(super) peer: DeviceId,
    /// Username fragment of this end.
    pub(super) ufrag: String,
    /// The path engine. Whoever changes it wakes its task.
    pub(super) agent: Mutex<PathAgent>,
    /// Wakes the path task.
    pub(super) wake: Notify,
    /// Takes authenticated connections of the peer, with their path.
    pub(super) accepted: mpsc::Sender<(Connection, Path)>,
    /// Takes TCP connections that have shown the session's check.
    pub(super) knocked: mpsc::Sender<TcpStream>,
}

impl Entry {
    /// The path engine. Never held across an `.await`.
    pub(super) fn agent(&self) -> MutexGuard<'_, PathAgent> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A datagram came in there. Whether it is of this session.
    pub(super) fn receive(&self, socket: LocalSocket, source: SocketAddr, datagram: &[u8]) -> bool {
        let mut agent = self.agent();
        // Under the lock, so that time never runs backwards for the agent.
        let ours = agent.handle_datagram(Instant::now(), socket, source, datagram);
        drop(agent);
        if ours {
            self.wake.notify_one();
        }
        ours
    }
}

impl Default for Demux {
    fn default() -> Self {
        Self::of(LocalSocket::DEVICE)
    }
}

impl Demux {
    /// That of this socket.
    pub(super) fn of(socket: LocalSocket) -> Self {
        Self { socket, sessions: RwLock::default() }
    }

    /// From its socket to there.
    pub(super) fn path(&self, remote: SocketAddr) -> Path {
        Path { socket: self.socket, remote }
    }

    /// From now on `entry` gets its datagrams and connections, until the guard is dropped.
    pub(super) fn register(self: &Arc<Self>, entry: Arc<Entry>) -> Registration {
        let mut sessions = self.sessions.write().unwrap_or_else(PoisonError::into_inner);
        sessions.insert(entry.ufrag.clone(), entry.clone());
        Registration { demux: self.clone(), entry }
    }

    /// The session with this id, if `remote` is an address that it has confirmed.
    pub(super) fn confirmed_session(&self, session: SessionId, remote: SocketAddr) -> Option<Arc<Entry>> {
        let entry = self.find(|entry| entry.session == session)?;
        let confirmed = entry.agent().is_confirmed(self.path(remote));
        confirmed.then_some(entry)
    }

    /// The session with this local username fragment.
    pub(super) fn session(&self, ufrag: &str) -> Option<Arc<Entry>> {
        self.read(|sessions| sessions.get(ufrag).cloned())
    }

    /// Whether QUIC handshakes may come from `remote`.
    pub(super) fn is_confirmed(&self, remote: SocketAddr) -> bool {
        self.find(|entry| entry.agent().is_confirmed(self.path(remote))).is_some()
    }

    /// Leaves in `buffer` what is quinn's, and handles the rest. A buffer holds one datagram, or several
    /// of `stride` bytes each (the last may be shorter) from one source.
    pub(super) fn sort(&self, buffer: &mut [u8], meta: &mut RecvMeta) {
        let (mut at, mut kept) = (0, 0);
        let source = canonical(meta.addr);
        while at < meta.len {
            let length = meta.stride.clamp(1, meta.len - at);
            let datagram = at..at + length;
            at += length;
            if self.is_for_quinn(source, &buffer[datagram.clone()]) {
                if kept != datagram.start {
                    buffer.copy_within(datagram, kept);
                }
                kept += length;
            }
        }
        meta.len = kept;
    }

    /// Whether no session is there.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.read(HashMap::is_empty)
    }

    fn is_for_quinn(&self, source: SocketAddr, datagram: &[u8]) -> bool {
        // Both ends keep QUIC's fixed bit set: the two highest bits tell all.
        match datagram.first().map(|first| first >> 6) {
            Some(0b01) => true,
            Some(0b11) => self.is_confirmed(source),
            Some(0b00) => {
                if stun::is_stun(datagram) {
                    self.receive(source, datagram);
                }
                false
            }
            _ => false,
        }
    }

    fn receive(&self, source: SocketAddr, datagram: &[u8]) {
        match stun::local_ufrag(datagram) {
            Some(ufrag) => {
                if let Some(entry) = self.session(ufrag) {
                    entry.receive(self.socket, source, datagram);
                }
            }
            None => {
                self.find(|entry| entry.receive(self.socket, source, datagram));
            }
        }
    }

    fn find(&self, wanted: impl Fn(&Entry) -> bool) -> Option<Arc<Entry>> {
        // The engines' locks are not taken under this one.
        let entries: Vec<Arc<Entry>> = self.read(|sessions| sessions.values().cloned().collect());
        entries.into_iter().find(|entry| wanted(entry))
    }

    fn read<T>(&self, read: impl FnOnce(&HashMap<String, Arc<Entry>>) -> T) -> T {
        read(&self.sessions.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What is left for quinn of a batch of datagrams of `stride` bytes each, while no session is there: for the
/// fuzzer, which reaches nothing else in here.
#[doc(hidden)]
pub fn sort_without_sessions(buffer: &mut [u8], stride: usize, source: SocketAddr) -> usize {
    let mut meta = RecvMeta { addr: source, len: buffer.len(), stride, ecn: None, dst_ip: None };
    Demux::default().sort(buffer, &mut meta);
    meta.len
}

/// Takes the session out again.
pub(super) struct Registration {
    demux: Arc<Demux>,
    entry: Arc<Entry>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut sessions = self.demux.sessions.write().unwrap_or_else(PoisonError::into_inner);
        if sessions.get(&self.entry.ufrag).is_some_and(|entry| Arc::ptr_eq(entry, &self.entry)) {
            sessions.remove(&self.entry.ufrag);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What quinn gets of datagrams with these first bytes, when nobody is confirmed.
    fn kept(first: &[u8], last_length: usize) -> Vec<u8> {
        const STRIDE: usize = 40;
        let mut buffer: Vec<u8> = first.iter().flat_map(|first| [*first; STRIDE]).collect();
        let len = buffer.len() - STRIDE + last_length;
        let addr = "192.0.2.1:40000".parse().expect("an address");
        let mut meta = RecvMeta { addr, len, stride: STRIDE, ecn: None, dst_ip: None };
        Demux::default().sort(&mut buffer, &mut meta);
        assert_eq!(meta.stride, STRIDE);
        buffer[..meta.len].to_vec()
    }

    #[test]
    fn what_is_not_quinns_is_taken_out_of_a_batch() {
        let whole = |first: u8| [first; 40].to_vec();
        assert_eq!(
            kept(&[0x40, 0x00, 0x41, 0xc0, 0x80, 0x42], 7),
            [whole(0x40), whole(0x41), vec![0x42; 7]].concat()
        );
        assert_eq!(kept(&[0x01, 0x40], 40), whole(0x40));
        assert_eq!(kept(&[0x40, 0xff], 1), whole(0x40));
        assert_eq!(kept(&[0x40, 0x40], 40), [0x40; 80]);
        assert!(kept(&[0x00, 0x3f, 0x80, 0xbf, 0xc0], 40).is_empty());
    }
}
