//! The sending half of a stream: what the peer has not acknowledged, and who carries it.
//!
//! Sequence numbers count the stream's bytes from 0; the end of the stream takes the one behind the
//! last byte. Everything from the first unacknowledged number on is retained, once.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::{Bytes, BytesMut};

use super::CarrierId;
use super::ranges::RangeSet;

/// Pieces smaller than this are gathered: a small slice must not keep a large read buffer alive, and
/// a small frame costs as much work as a large one. Bytes.
pub(super) const SMALL: usize = 4 * 1024;

#[derive(Debug)]
pub(super) struct SendHalf {
    /// Retained pieces by the offset of their first byte, in order, without gaps.
    pieces: VecDeque<(u64, Bytes)>,
    /// Small pieces behind them, not handed out yet.
    tail: BytesMut,
    /// Everything before this is acknowledged.
    acked: u64,
    /// Bytes taken from the application.
    end: u64,
    /// The application wrote its last byte.
    finished: bool,
    /// The peer takes bytes before this offset.
    credit: u64,
    /// The first number that was never handed to a carrier.
    next: u64,
    /// Handed to a carrier and not acknowledged.
    in_flight: Vec<(Range<u64>, CarrierId)>,
    /// Were on a carrier that died.
    lost: RangeSet,
}

/// A range to put on a carrier.
#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) offset: u64,
    pub(super) bytes: Bytes,
    pub(super) fin: bool,
    /// The peer's credit ends behind this chunk.
    pub(super) held: bool,
}

impl SendHalf {
    pub(super) fn new(credit: u64) -> Self {
        Self {
            pieces: VecDeque::new(),
            tail: BytesMut::new(),
            acked: 0,
            end: 0,
            finished: false,
            credit,
            next: 0,
            in_flight: Vec::new(),
            lost: RangeSet::default(),
        }
    }

    /// How many bytes the peer's credit still lets the application write.
    pub(super) fn writable(&self) -> u64 {
        if self.finished { 0 } else { self.credit.saturating_sub(self.end) }
    }

    /// Bytes held in memory.
    pub(super) fn retained(&self) -> u64 {
        self.end - self.acked.min(self.end)
    }

    /// Takes bytes from the application; never more than [`SendHalf::writable`].
    pub(super) fn write(&mut self, bytes: Bytes) {
        assert!(bytes.len() as u64 <= self.writable());
        self.end += bytes.len() as u64;
        if bytes.len() < SMALL {
            self.tail.extend_from_slice(&bytes);
        } else {
            self.flush_tail(self.end - bytes.len() as u64);
            self.pieces.push_back((self.end - bytes.len() as u64, bytes));
        }
    }

    pub(super) fn finish(&mut self) {
        self.finished = true;
    }

    /// Every byte and the end have been acknowledged.
    pub(super) fn is_complete(&self) -> bool {
        self.finished && self.acked > self.end
    }

    /// The end and everything before it is on carriers, or has arrived.
    pub(super) fn is_handed_out(&self) -> bool {
        self.finished && !self.has_pending()
    }

    pub(super) fn has_pending(&self) -> bool {
        !self.lost.is_empty() || self.next < self.limit()
    }

    /// The next chunk for `carrier`, of at most `max` bytes: lost ranges first.
    pub(super) fn next_chunk(&mut self, carrier: CarrierId, max: usize) -> Option<Chunk> {
        let (start, stop) = match self.lost.first() {
            Some(lost) => (lost.start, lost.end),
            None => (self.next, self.limit()),
        };
        if start >= stop {
            return None;
        }
        let bytes = self.slice(start, (stop.min(self.end) - start.min(self.end)).min(max as u64) as usize);
        let after = start + bytes.len() as u64;
        let fin = self.finished && after == self.end && stop > self.end;
        let range = start..after + u64::from(fin);
        self.lost.remove_below(range.end);
        self.next = self.next.max(range.end);
        match self.in_flight.last_mut() {
            Some((last, owner)) if *owner == carrier && last.end == range.start => last.end = range.end,
            _ => self.in_flight.push((range, carrier)),
        }
        Some(Chunk { offset: start, bytes, fin, held: after == self.credit })
    }

    /// The peer has everything before `acked`. Returns how many numbers are newly acknowledged.
    ///
    /// # Errors
    /// When nothing like that was ever sent.
    pub(super) fn acknowledge(&mut self, acked: u64) -> Result<u64, ()> {
        if acked > self.next {
            return Err(());
        }
        let news = acked.saturating_sub(self.acked);
        if news == 0 {
            return Ok(0);
        }
        self.acked = acked;
        while self.pieces.front().is_some_and(|(start, piece)| start + piece.len() as u64 <= acked) {
            self.pieces.pop_front();
        }
        self.lost.remove_below(acked);
        self.in_flight.retain_mut(|(range, _)| {
            range.start = range.start.max(acked);
            !range.is_empty()
        });
        Ok(news)
    }

    /// The peer has everything.
    pub(super) fn acknowledge_all(&mut self) {
        let all = self.next;
        self.acknowledge(all).unwrap_or_default();
    }

    /// Credit never shrinks. Returns whether it grew.
    pub(super) fn grant(&mut self, credit: u64) -> bool {
        let grew = credit > self.credit;
        self.credit = self.credit.max(credit);
        grew
    }

    /// What `carrier` had and nobody acknowledged must be sent again.
    pub(super) fn carrier_lost(&mut self, carrier: CarrierId) {
        let lost = &mut self.lost;
        self.in_flight.retain(|(range, owner)| {
            if *owner == carrier {
                lost.insert(range.clone());
            }
            *owner != carrier
        });
    }

    /// First number that may not be handed out yet.
    fn limit(&self) -> u64 {
        self.end + u64::from(self.finished)
    }

    fn flush_tail(&mut self, end: u64) {
        if !self.tail.is_empty() {
            let piece = self.tail.split().freeze();
            self.pieces.push_back((end - piece.len() as u64, piece));
        }
    }

    /// Bytes from `start` on, at most `max`, shared with what is retained.
    fn slice(&mut self, start: u64, max: usize) -> Bytes {
        if max == 0 {
            return Bytes::new();
        }
        if start + max as u64 > self.end - self.tail.len() as u64 {
            self.flush_tail(self.end);
        }
        let index = self.pieces.partition_point(|(first, _)| *first <= start) - 1;
        let (first, piece) = &self.pieces[index];
        let from = (start - first) as usize;
        piece.slice(from..piece.len().min(from.saturating_add(max)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: CarrierId = CarrierId(0);
    const B: CarrierId = CarrierId(1);

    fn sender(text: &'static str) -> SendHalf {
        let mut half = SendHalf::new(1 << 20);
        half.write(Bytes::from_static(text.as_bytes()));
        half
    }

    fn take(half: &mut SendHalf, carrier: CarrierId, max: usize) -> Option<(u64, Vec<u8>, bool)> {
        half.next_chunk(carrier, max).map(|c| (c.offset, c.bytes.to_vec(), c.fin))
    }

    #[test]
    fn only_a_dead_carriers_ranges_are_sent_again() {
        let mut half = sender("abcdefghij");
        assert_eq!(take(&mut half, A, 4), Some((0, b"abcd".to_vec(), false)));
        assert_eq!(take(&mut half, B, 3), Some((4, b"efg".to_vec(), false)));
        half.carrier_lost(A);
        assert_eq!(half.acknowledge(2), Ok(2));
        assert_eq!(take(&mut half, B, 9), Some((2, b"cd".to_vec(), false)));
        assert_eq!(take(&mut half, B, 9), Some((7, b"hij".to_vec(), false)));
        assert_eq!(take(&mut half, B, 9), None);
        assert_eq!(half.acknowledge(11), Err(()));
    }

    #[test]
    fn the_end_has_a_number_of_its_own() {
        let mut half = sender("ab");
        assert_eq!(take(&mut half, A, 9), Some((0, b"ab".to_vec(), false)));
        half.finish();
        assert_eq!(take(&mut half, A, 9), Some((2, vec![], true)));
        assert_eq!(half.acknowledge(2), Ok(2));
        assert!(!half.is_complete());
        half.carrier_lost(A);
        assert_eq!(take(&mut half, B, 9), Some((2, vec![], true)));
        assert_eq!(half.acknowledge(3), Ok(1));
        assert!(half.is_complete() && half.retained() == 0);
    }

    #[test]
    fn credit_binds_and_is_told() {
        let mut half = SendHalf::new(3);
        assert_eq!(half.writable(), 3);
        half.write(Bytes::from_static(b"abc"));
        assert_eq!(half.writable(), 0);
        assert!(half.next_chunk(A, 9).is_some_and(|c| c.held));
        assert!(half.grant(5) && !half.grant(4));
        assert_eq!(half.writable(), 2);
    }

    #[test]
    fn small_writes_are_gathered() {
        let mut half = SendHalf::new(1 << 20);
        (0..100).for_each(|_| half.write(Bytes::from_static(b"0123456789")));
        half.write(Bytes::from(vec![7; SMALL]));
        half.write(Bytes::from_static(b"end"));
        assert_eq!(take(&mut half, A, 1 << 20).map(|c| c.1.len()), Some(1000));
        assert_eq!(take(&mut half, A, 1 << 20).map(|c| c.1.len()), Some(SMALL));
        assert_eq!(take(&mut half, A, 1 << 20).map(|c| c.1.len()), Some(3));
    }
}
