//! Variable-length integers (RFC 9000 section 16): the two top bits of the first byte give the length.

use bytes::BufMut;

/// Largest value that can be encoded: 2^62 - 1.
pub const MAX: u64 = (1 << 62) - 1;

/// Appends `value` in 1, 2, 4 or 8 bytes, the fewest that hold it.
///
/// # Panics
/// When it exceeds [`MAX`].
pub fn put(buffer: &mut impl BufMut, value: u64) {
    assert!(value <= MAX);
    match value {
        0..=0x3f => buffer.put_u8(value as u8),
        0x40..=0x3fff => buffer.put_u16(0x4000 | value as u16),
        0x4000..=0x3fff_ffff => buffer.put_u32(0x8000_0000 | value as u32),
        _ => buffer.put_u64(0xc000_0000_0000_0000 | value),
    }
}

/// Takes one integer off the front of `bytes`, or `None` (and nothing taken) while it is incomplete.
pub fn take(bytes: &mut &[u8]) -> Option<u64> {
    let first = *bytes.first()?;
    let len = 1 << (first >> 6);
    let (head, tail) = bytes.split_at_checked(len)?;
    let value = head[1..].iter().fold(u64::from(first & 0x3f), |value, &byte| value << 8 | u64::from(byte));
    *bytes = tail;
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rfc_9000_appendix_a_1() {
        let samples: [(&[u8], u64); 4] = [
            (&[0xc2, 0x19, 0x7c, 0x5e, 0xff, 0x14, 0xe8, 0x8c], 151_288_809_941_952_652),
            (&[0x9d, 0x7f, 0x3e, 0x7d], 494_878_333),
            (&[0x7b, 0xbd], 15_293),
            (&[0x25], 37),
        ];
        for (bytes, value) in samples {
            assert_eq!(take(&mut &bytes[..]), Some(value));
            let mut out = Vec::new();
            put(&mut out, value);
            assert_eq!(out, bytes);
            assert_eq!(take(&mut &bytes[..bytes.len() - 1]), None);
        }
    }

    proptest! {
        #[test]
        fn reads_back_what_it_wrote(value in 0..=MAX) {
            let mut out = Vec::new();
            put(&mut out, value);
            prop_assert_eq!(take(&mut &out[..]), Some(value));
        }
    }
}
