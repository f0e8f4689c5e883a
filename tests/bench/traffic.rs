//! What runs through a path: one stream as fast as it goes, and small messages to and fro. Both ends of it
//! are in this process, on threads with plain sockets.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

/// Bytes of one write or read of the generator and the sink.
const BLOCK: usize = 128 * 1024;
/// Bytes of one message.
const MESSAGE: usize = 64;
/// A path that is silent for so long is broken.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long what is under way may take to drain: windows are large, and a busy machine's QUIC is slow.
const DRAIN: Duration = Duration::from_secs(60);

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the agent to the technician.
    Down,
    /// From the technician to the agent.
    Up,
}

/// The service behind every path. The first byte of a connection says what it is for.
pub(crate) struct Service {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Bytes that have come through the path, whichever end took them.
    arrived: AtomicU64,
    connections: Mutex<usize>,
    changed: Condvar,
}

const SOURCE: u8 = b'<';
const SINK: u8 = b'>';
const ECHO: u8 = b'=';

impl Service {
    pub(crate) fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared::default());
        let serving = shared.clone();
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let shared = serving.clone();
                *shared.connections() += 1;
                thread::spawn(move || {
                    // Clients leave in the middle.
                    let _ = shared.serve(connection);
                    *shared.connections() -= 1;
                    shared.changed.notify_all();
                });
            }
        });
        Ok(Self { address, shared })
    }

    /// Sends as fast as the path takes it: for `warm_up`, then for `window`. Calls `at_edge` at the start
    /// and at the end of the window. Returns bytes and seconds of the window.
    pub(crate) fn stream(
        &self,
        path: SocketAddr,
        direction: Direction,
        [warm_up, window]: [Duration; 2],
        mut at_edge: impl FnMut() -> Result<()>,
    ) -> Result<(u64, f64)> {
        let mut connection = TcpStream::connect(path)?;
        connection.set_read_timeout(Some(PATIENCE))?;
        connection.set_write_timeout(Some(PATIENCE))?;
        connection.write_all(&[if direction == Direction::Down { SOURCE } else { SINK }])?;
        let (shared, working) = (self.shared.clone(), connection.try_clone()?);
        let worker = thread::spawn(move || match direction {
            Direction::Down => shared.drain(working),
            Direction::Up => fill(working),
        });
        thread::sleep(warm_up);
        at_edge()?;
        let (start, before) = (Instant::now(), self.shared.arrived.load(Relaxed));
        thread::sleep(window);
        let (elapsed, bytes) = (start.elapsed(), self.shared.arrived.load(Relaxed) - before);
        at_edge()?;
        let broken = worker.is_finished();
        // Already gone if the path broke.
        let _ = connection.shutdown(Shutdown::Both);
        drop(connection);
        let ended = worker.join().map_err(|_| anyhow!("the traffic's thread panicked"))?;
        ensure!(
            !broken && bytes > 0,
            "{direction:?}: {bytes} bytes arrived; the stream ended with {ended:?}"
        );
        self.wait_until_idle()?;
        Ok((bytes, elapsed.as_secs_f64()))
    }

    /// The round trips of `count` messages, one after the other, in ascending order.
    pub(crate) fn ping_pong(&self, path: SocketAddr, count: usize) -> Result<Vec<Duration>> {
        let mut connection = TcpStream::connect(path)?;
        connection.set_nodelay(true)?;
        connection.set_read_timeout(Some(PATIENCE))?;
        connection.write_all(&[ECHO])?;
        let (message, mut answer) = ([7; MESSAGE], [0; MESSAGE]);
        let mut trips = Vec::with_capacity(count);
        let warm_up = count / 10;
        for trip in 0..warm_up + count {
            let start = Instant::now();
            connection.write_all(&message)?;
            connection.read_exact(&mut answer).context("no answer")?;
            if trip >= warm_up {
                trips.push(start.elapsed());
            }
        }
        drop(connection);
        self.wait_until_idle()?;
        trips.sort_unstable();
        Ok(trips)
    }

    /// What is still on its way of one measurement must not disturb the next.
    fn wait_until_idle(&self) -> Result<()> {
        let changed = &self.shared.changed;
        let (connections, _) = changed
            .wait_timeout_while(self.shared.connections(), DRAIN, |connections| *connections > 0)
            .unwrap_or_else(PoisonError::into_inner);
        ensure!(*connections == 0, "a connection that was closed at one end stays open at the other");
        Ok(())
    }
}

impl Shared {
    fn serve(&self, mut connection: TcpStream) -> io::Result<()> {
        connection.set_nodelay(true)?;
        let mut kind = [0];
        connection.read_exact(&mut kind)?;
        match kind[0] {
            SOURCE => fill(connection),
            SINK => self.drain(connection),
            ECHO => {
                let mut message = [0; MESSAGE];
                loop {
                    connection.read_exact(&mut message)?;
                    connection.write_all(&message)?;
                }
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn drain(&self, mut connection: TcpStream) -> io::Result<()> {
        let mut block = vec![0; BLOCK];
        loop {
            match connection.read(&mut block)? {
                0 => return Ok(()),
                read => self.arrived.fetch_add(read as u64, Relaxed),
            };
        }
    }

    fn connections(&self) -> MutexGuard<'_, usize> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn fill(mut connection: TcpStream) -> io::Result<()> {
    let block = vec![0xa5; BLOCK];
    loop {
        connection.write_all(&block)?;
    }
}
