//! Randomness from a seed: nobody without the seed can guess the next value.

use aws_lc_rs::hmac::{self, HMAC_SHA256, Key};

/// HMAC-SHA-256 of a counter, under the seed.
pub(super) struct Random {
    key: Key,
    counter: u64,
}

impl Random {
    pub(super) fn new(seed: &[u8; 32]) -> Self {
        Self { key: Key::new(HMAC_SHA256, seed), counter: 0 }
    }

    /// The next `N` bytes, at most 32.
    pub(super) fn bytes<const N: usize>(&mut self) -> [u8; N] {
        const { assert!(N <= 32) };
        self.counter += 1;
        let tag = hmac::sign(&self.key, &self.counter.to_be_bytes());
        std::array::from_fn(|index| tag.as_ref()[index])
    }

    pub(super) fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depends_on_the_seed_and_never_repeats() {
        let mut one = Random::new(&[1; 32]);
        let mut same = Random::new(&[1; 32]);
        let mut other = Random::new(&[2; 32]);
        let first: [u8; 12] = one.bytes();
        assert_eq!(first, same.bytes::<12>());
        assert_ne!(first, other.bytes::<12>());
        assert_ne!(first, one.bytes::<12>());
    }
}
