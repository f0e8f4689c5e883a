//! Looking at a NAT from both sides: reflectors in the server network, a probe behind the NAT.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use super::Host;

/// How long a probe waits for an answer that it counts on or that must not come. Far longer than a
/// round trip through the lab.
const PATIENCE: Duration = Duration::from_millis(300);

/// A public UDP socket that tells each sender where it came from, and can send by itself.
pub struct Reflector {
    /// Where it listens.
    pub address: SocketAddr,
    socket: Arc<UdpSocket>,
}

impl Reflector {
    /// Opens one on `host`. It ends with the lab.
    pub fn start(host: &Host) -> anyhow::Result<Self> {
        let address = host.address;
        let socket = Arc::new(host.run(move || Ok(UdpSocket::bind((address, 0))?))?);
        let reflecting = socket.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((length, from)) = reflecting.recv_from(&mut buffer) {
                // A question is "?" and a number; the answer repeats the number.
                let Some(number) = buffer[..length].strip_prefix(b"?") else { continue };
                let answer = [number, from.to_string().as_bytes()].concat();
                if reflecting.send_to(&answer, from).is_err() {
                    return;
                }
            }
        });
        Ok(Self { address: socket.local_addr()?, socket })
    }

    /// Sends a packet to `to` from this reflector's socket.
    pub fn send(&self, to: SocketAddr) -> io::Result<()> {
        self.socket.send_to(b"unasked", to).map(|_| ())
    }
}

/// A UDP socket on a host of the lab.
pub struct UdpProbe {
    socket: UdpSocket,
}

impl UdpProbe {
    /// Opens one on `host`, on a port that the system chooses.
    pub fn open(host: &Host) -> anyhow::Result<Self> {
        let socket = host.run(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { socket })
    }

    /// This socket's own address.
    pub fn port(&self) -> io::Result<u16> {
        Ok(self.socket.local_addr()?.port())
    }

    /// The address that `reflector` sees, or nothing if no answer comes.
    pub fn mapping(&self, reflector: &Reflector) -> io::Result<Option<SocketAddr>> {
        self.ask(reflector, 0)?;
        let mut buffer = [0; 2048];
        while let Some((length, from)) = self.receive_into(&mut buffer)? {
            if from == reflector.address && length > 4 {
                return Ok(std::str::from_utf8(&buffer[4..length]).ok().and_then(|text| text.parse().ok()));
            }
        }
        Ok(None)
    }

    /// Sends `reflector` a question with this number.
    pub fn ask(&self, reflector: &Reflector, number: u32) -> io::Result<()> {
        let question = [&b"?"[..], &number.to_be_bytes()].concat();
        self.socket.send_to(&question, reflector.address).map(|_| ())
    }

    /// The number of the next answer, or nothing if none comes.
    pub fn answer(&self) -> io::Result<Option<u32>> {
        let mut buffer = [0; 2048];
        while let Some((length, _)) = self.receive_into(&mut buffer)? {
            if let Some(number) = buffer[..length].first_chunk() {
                return Ok(Some(u32::from_be_bytes(*number)));
            }
        }
        Ok(None)
    }

    /// Who the next packet comes from, or nothing if none comes.
    pub fn receive(&self) -> io::Result<Option<SocketAddr>> {
        Ok(self.receive_into(&mut [0; 2048])?.map(|(_, from)| from))
    }

    fn receive_into(&self, buffer: &mut [u8]) -> io::Result<Option<(usize, SocketAddr)>> {
        match self.socket.recv_from(buffer) {
            Ok(received) => Ok(Some(received)),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}
