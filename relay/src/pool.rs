//! What carries bytes between two sockets, lent only while bytes are on the way.
//!
//! An ordinary user's pipes share a quota (`fs.pipe-user-pages-soft`, 64 MiB by default: 64 pipes of
//! 1 MiB, or 1,024 of 64 KiB; beyond it a new pipe has 8 KiB). So an idle direction owns nothing,
//! only directions that move much get a large pipe, and where the quota is out a user-space buffer does
//! the work: slower, never an error.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

use crate::metrics::{Metrics, PipeState};
#[cfg(target_os = "linux")]
use crate::pipe::Pipe;
#[cfg(not(target_os = "linux"))]
use crate::pipe_none::Pipe;

/// Most bytes that one direction holds in this process or in a pipe.
pub(crate) const IN_TRANSIT: usize = 256 * 1024;
/// Size of the buffers of the copying fallback.
const BUFFER: usize = 64 * 1024;
/// A pipe with less room than this moves less than copying would.
const SMALL: usize = 64 * 1024;
/// Off a real network a slot holds one packet's 1,448 bytes: 128 slots are 180 KiB.
const LARGE: usize = 512 * 1024;
/// Half of the default quota at most goes into large pipes.
const MAX_LARGE: usize = 64;
/// All pipes: two descriptors each, and no more than the default quota has room for.
const MAX_PIPES: usize = 512;
/// Unused pipes and buffers kept for the next direction.
const MAX_IDLE: usize = 64;
/// How long after a refusal the kernel is asked again.
const RETRY: Duration = Duration::from_secs(1);

/// Lends pipes and buffers. One for each process, because the quota is the user's.
pub(crate) struct Pool {
    shelf: Mutex<Shelf>,
    splice: AtomicBool,
    metrics: Arc<Metrics>,
}

/// A pipe or a buffer that is lent. Empty, it goes back to the pool when dropped; with bytes in it, it
/// is thrown away.
pub(crate) struct Lease {
    vessel: Option<Vessel>,
    pool: Arc<Pool>,
}

enum Vessel {
    Small(Pipe),
    Large(Pipe),
    Buffer(Buffer),
}

struct Buffer {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

#[derive(Default)]
struct Shelf {
    small: Vec<Pipe>,
    large: Vec<Pipe>,
    buffers: Vec<Box<[u8]>>,
    small_count: usize,
    large_count: usize,
    no_small_before: Option<Instant>,
    no_large_before: Option<Instant>,
}

impl Pool {
    /// An empty pool. Without `splice` it lends buffers only.
    pub(crate) fn new(splice: bool, metrics: Arc<Metrics>) -> Arc<Self> {
        let splice = AtomicBool::new(splice && cfg!(target_os = "linux"));
        Arc::new(Self { shelf: Mutex::default(), splice, metrics })
    }

    /// The best vessel there is; `much` says that the direction has moved much lately.
    pub(crate) fn lend(self: &Arc<Self>, much: bool) -> Lease {
        let vessel = self.pipe(much).unwrap_or_else(|| Vessel::Buffer(self.buffer()));
        Lease { vessel: Some(vessel), pool: self.clone() }
    }

    /// The kernel cannot splice these sockets: only buffers from now on.
    pub(crate) fn give_up_splicing(&self, error: &io::Error) {
        if self.splice.swap(false, Ordering::Relaxed) {
            tracing::warn!(%error, "this kernel does not splice; bytes are copied instead");
        }
    }

    fn pipe(&self, much: bool) -> Option<Vessel> {
        if !self.splice.load(Ordering::Relaxed) {
            return None;
        }
        let mut shelf = self.shelf();
        let vessel = match much.then(|| shelf.take_large()).flatten() {
            Some(pipe) => Vessel::Large(pipe),
            None => Vessel::Small(shelf.take_small()?),
        };
        self.report(&shelf);
        Some(vessel)
    }

    fn buffer(&self) -> Buffer {
        let bytes = self.shelf().buffers.pop().unwrap_or_else(|| vec![0; BUFFER].into_boxed_slice());
        Buffer { bytes, start: 0, end: 0 }
    }

    fn take_back(&self, vessel: Vessel) {
        let mut shelf = self.shelf();
        match vessel {
            Vessel::Small(pipe) if pipe.filled() == 0 && shelf.small.len() < MAX_IDLE => {
                shelf.small.push(pipe)
            }
            Vessel::Large(pipe) if pipe.filled() == 0 && shelf.large.len() < MAX_IDLE => {
                shelf.large.push(pipe)
            }
            Vessel::Small(_) => shelf.small_count -= 1,
            Vessel::Large(_) => shelf.large_count -= 1,
            Vessel::Buffer(buffer) if shelf.buffers.len() < MAX_IDLE => shelf.buffers.push(buffer.bytes),
            Vessel::Buffer(_) => {}
        }
        self.report(&shelf);
    }

    fn report(&self, shelf: &Shelf) {
        let idle = shelf.small.len() + shelf.large.len();
        let lent = shelf.small_count + shelf.large_count - idle;
        self.metrics.set_pipes(PipeState::Idle, idle);
        self.metrics.set_pipes(PipeState::Lent, lent);
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shelf {
    fn take_small(&mut self) -> Option<Pipe> {
        if let Some(pipe) = self.small.pop() {
            return Some(pipe);
        }
        if self.small_count + self.large_count >= MAX_PIPES || is_ahead(self.no_small_before) {
            return None;
        }
        match Pipe::new() {
            Ok(pipe) if pipe.capacity() >= SMALL => {
                self.small_count += 1;
                Some(pipe)
            }
            _ => {
                self.no_small_before = Some(Instant::now() + RETRY);
                None
            }
        }
    }

    fn take_large(&mut self) -> Option<Pipe> {
        if let Some(pipe) = self.large.pop() {
            return Some(pipe);
        }
        if self.large_count >= MAX_LARGE || is_ahead(self.no_large_before) {
            return None;
        }
        // A small pipe grows; it is one already counted, or a new one.
        let mut pipe = self.take_small()?;
        if pipe.grow(LARGE).is_ok() {
            self.small_count -= 1;
            self.large_count += 1;
            Some(pipe)
        } else {
            self.no_large_before = Some(Instant::now() + RETRY);
            self.small.push(pipe);
            None
        }
    }
}

impl Lease {
    /// Whether bytes go through the kernel only.
    pub(crate) fn splices(&self) -> bool {
        !matches!(self.vessel, Some(Vessel::Buffer(_)))
    }

    /// Bytes inside.
    pub(crate) fn filled(&self) -> usize {
        match &self.vessel {
            Some(Vessel::Small(pipe) | Vessel::Large(pipe)) => pipe.filled(),
            Some(Vessel::Buffer(buffer)) => buffer.end - buffer.start,
            None => 0,
        }
    }

    /// Takes at most `limit` bytes from the socket; 0 is its end of file. Only while empty.
    pub(crate) fn fill(&mut self, from: &TcpStream, limit: usize) -> io::Result<usize> {
        match &mut self.vessel {
            Some(Vessel::Small(pipe) | Vessel::Large(pipe)) => pipe.fill(from, limit),
            Some(Vessel::Buffer(buffer)) => {
                let room = limit.min(buffer.bytes.len());
                let count = from.try_read(&mut buffer.bytes[..room])?;
                (buffer.start, buffer.end) = (0, count);
                Ok(count)
            }
            None => Ok(0),
        }
    }

    /// Gives the socket as much as it takes now.
    pub(crate) fn drain(&mut self, to: &TcpStream) -> io::Result<usize> {
        match &mut self.vessel {
            Some(Vessel::Small(pipe) | Vessel::Large(pipe)) => pipe.drain(to),
            Some(Vessel::Buffer(buffer)) => {
                let count = to.try_write(&buffer.bytes[buffer.start..buffer.end])?;
                buffer.start += count;
                Ok(count)
            }
            None => Ok(0),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(vessel) = self.vessel.take() {
            self.pool.take_back(vessel);
        }
    }
}

fn is_ahead(time: Option<Instant>) -> bool {
    time.is_some_and(|time| Instant::now() < time)
}
