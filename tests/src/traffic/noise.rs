//! Bytes that no two transfers share, and that both ends can make without telling each other.

use aws_lc_rs::digest::{Context, SHA256};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::io::{AsyncWrite, AsyncWriteExt};

/// An endless stream of bytes that its seed decides.
pub struct Noise {
    random: SmallRng,
}

impl Noise {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { random: SmallRng::seed_from_u64(seed) }
    }

    /// Writes the first `bytes` of the stream.
    pub async fn send(mut self, to: &mut (impl AsyncWrite + Unpin), bytes: u64) -> std::io::Result<()> {
        let (mut buffer, mut left) = (vec![0; PIECE], bytes);
        while left > 0 {
            let piece = left.min(PIECE as u64) as usize;
            self.random.fill_bytes(&mut buffer[..piece]);
            to.write_all(&buffer[..piece]).await?;
            left -= piece as u64;
        }
        Ok(())
    }
}

/// How much is made at once. A multiple of the random source's word, so that pieces join up.
const PIECE: usize = 64 * 1024;

/// SHA-256 of the first `bytes` of the stream of `seed`, as lower-case hex.
pub fn sha256(seed: u64, bytes: u64) -> String {
    let (mut hash, mut noise) = (Context::new(&SHA256), Noise::new(seed));
    let (mut buffer, mut left) = (vec![0; PIECE], bytes);
    while left > 0 {
        let piece = left.min(PIECE as u64) as usize;
        noise.random.fill_bytes(&mut buffer[..piece]);
        hash.update(&buffer[..piece]);
        left -= piece as u64;
    }
    hex(&hash.finish())
}

/// Lower-case hex.
pub fn hex(digest: &aws_lc_rs::digest::Digest) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
