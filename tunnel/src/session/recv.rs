//! The receiving half of a stream: puts bytes in order, whichever carrier brought them, and decides
//! about the peer's credit.

use std::collections::{BTreeMap, VecDeque};

use bytes::{Bytes, BytesMut};

use super::send::SMALL;

/// Window of a new stream in each direction: known to both ends, so that bytes can follow an `Open`
/// at once. Also what every stream keeps at least.
pub const INITIAL_WINDOW: u64 = 64 * 1024;

/// Pieces ahead of a gap that a stream keeps at least. Gaps come from ranges that are on different carriers:
/// a correct peer makes a few with each move.
const PIECES: u64 = 256;

#[derive(Debug)]
pub(super) struct RecvHalf {
    /// In order, not read by the application yet.
    ready: VecDeque<Bytes>,
    /// Small pieces behind `ready`.
    tail: BytesMut,
    /// Arrived ahead of a gap, by offset; disjoint.
    ahead: BTreeMap<u64, Bytes>,
    /// Read by the application.
    read: u64,
    /// Everything before this has arrived.
    received: u64,
    /// Offset of the end, once known.
    fin: Option<u64>,
    /// What the peer was told last.
    told_acked: u64,
    told_credit: u64,
    /// Granted beyond what was read.
    pub(super) window: u64,
    /// The sender ran out of credit since the window last grew.
    held: bool,
}

/// Data that no correct peer sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Misbehaved {
    BeyondCredit,
    BeyondEnd,
    /// Single bytes with gaps between them: each costs a hundred to keep.
    Scattered,
}

impl RecvHalf {
    pub(super) fn new() -> Self {
        Self {
            ready: VecDeque::new(),
            tail: BytesMut::new(),
            ahead: BTreeMap::new(),
            read: 0,
            received: 0,
            fin: None,
            told_acked: 0,
            told_credit: INITIAL_WINDOW,
            window: INITIAL_WINDOW,
            held: false,
        }
    }

    /// Takes what arrived. Returns whether there is more to read than before.
    pub(super) fn receive(
        &mut self,
        offset: u64,
        bytes: Bytes,
        fin: bool,
        held: bool,
    ) -> Result<bool, Misbehaved> {
        let end = offset + bytes.len() as u64;
        if end > self.told_credit {
            return Err(Misbehaved::BeyondCredit);
        }
        if self.fin.is_some_and(|fin_at| end > fin_at || (fin && end != fin_at))
            || (fin
                && (end < self.received
                    || self.ahead.last_key_value().is_some_and(|(o, b)| o + b.len() as u64 > end)))
        {
            return Err(Misbehaved::BeyondEnd);
        }
        let before = self.is_at_end();
        if fin {
            self.fin = Some(end);
        }
        self.held |= held;
        let was = self.received;
        if offset > self.received {
            self.insert_ahead(offset, bytes);
            // Neighbours are gathered, so without gaps there are at most two for each `SMALL` bytes.
            if self.ahead.len() as u64 > PIECES + 2 * self.window / SMALL as u64 {
                return Err(Misbehaved::Scattered);
            }
        } else if end > self.received {
            self.append(bytes.slice((self.received - offset) as usize..));
            self.join();
        }
        Ok(self.received > was || self.is_at_end() != before)
    }

    /// The next bytes in order, at most `max`.
    pub(super) fn read(&mut self, max: usize) -> Option<Bytes> {
        if self.ready.is_empty() && !self.tail.is_empty() {
            self.ready.push_back(self.tail.split().freeze());
        }
        let front = self.ready.front_mut()?;
        let bytes = front.split_to(front.len().min(max));
        if front.is_empty() {
            self.ready.pop_front();
        }
        self.read += bytes.len() as u64;
        Some(bytes)
    }

    /// Everything was read, up to the end.
    pub(super) fn is_at_end(&self) -> bool {
        self.fin == Some(self.read)
    }

    /// Everything has arrived, up to the end.
    pub(super) fn is_complete(&self) -> bool {
        self.fin == Some(self.received)
    }

    /// Bytes held in memory.
    pub(super) fn buffered(&self) -> u64 {
        self.received - self.read + self.ahead.values().map(|b| b.len() as u64).sum::<u64>()
    }

    /// Everything before this has arrived. The end counts as one, and as arrived when it was read up to:
    /// so the other end's stream lives as long as this one, and its limit on streams is this end's, too.
    pub(super) fn acked(&self) -> u64 {
        self.received + u64::from(self.is_at_end())
    }

    /// What the sender may send up to now.
    pub(super) fn credit(&self) -> u64 {
        self.told_credit.max(self.read + self.window)
    }

    /// The peer has been told [`RecvHalf::acked`] and [`RecvHalf::credit`].
    pub(super) fn told(&mut self) {
        self.told_acked = self.acked();
        self.told_credit = self.credit();
    }

    pub(super) fn has_news(&self) -> bool {
        self.told_acked != self.acked() || (self.told_credit != self.credit() && !self.is_complete())
    }

    /// A quarter window of news: the peer must not wait for a timer.
    pub(super) fn is_urgent(&self) -> bool {
        let quarter = self.window / 4;
        self.acked() - self.told_acked >= quarter
            || (self.credit() - self.told_credit >= quarter && !self.is_complete())
    }

    /// The sender was held by credit and the reader has drained everything: a larger window helps.
    pub(super) fn wants_growth(&self) -> bool {
        self.held && self.read == self.received && self.fin.is_none()
    }

    /// Widens the window by `more` bytes.
    pub(super) fn grow(&mut self, more: u64) {
        self.window += more;
        self.held = false;
    }

    /// Narrows the window to `to` bytes, or to what the peer may still send of what it was told. Returns by how much.
    pub(super) fn shrink(&mut self, to: u64) -> u64 {
        let before = self.window;
        self.window = (self.told_credit - self.read).max(to).min(before);
        before - self.window
    }

    fn append(&mut self, bytes: Bytes) {
        self.received += bytes.len() as u64;
        if bytes.len() < SMALL {
            self.tail.extend_from_slice(&bytes);
        } else {
            if !self.tail.is_empty() {
                self.ready.push_back(self.tail.split().freeze());
            }
            self.ready.push_back(bytes);
        }
    }

    /// Files the parts of `bytes` that are not there yet.
    fn insert_ahead(&mut self, mut offset: u64, mut bytes: Bytes) {
        if let Some((start, piece)) = self.ahead.range(..=offset).next_back() {
            let overlap = (start + piece.len() as u64).saturating_sub(offset).min(bytes.len() as u64);
            bytes = bytes.slice(overlap as usize..);
            offset += overlap;
        }
        while !bytes.is_empty() {
            let next = self.ahead.range(offset..).next().map(|(start, piece)| (*start, piece.len() as u64));
            let until = next.map_or(u64::MAX, |(start, _)| start - offset).min(bytes.len() as u64);
            let piece = bytes.split_to(until as usize);
            if !piece.is_empty() {
                self.file(offset, piece);
            }
            let Some((start, length)) = next else { break };
            let skip = length.min(bytes.len() as u64);
            bytes = bytes.slice(skip as usize..);
            offset = start + skip;
        }
    }

    fn file(&mut self, offset: u64, piece: Bytes) {
        if piece.len() >= SMALL {
            self.ahead.insert(offset, piece);
            return;
        }
        // A small slice must not keep a large read buffer alive; and many small ones are gathered.
        match self.ahead.range_mut(..offset).next_back() {
            Some((start, before)) if start + before.len() as u64 == offset && before.len() < SMALL => {
                *before = [&before[..], &piece[..]].concat().into();
            }
            _ => {
                self.ahead.insert(offset, Bytes::copy_from_slice(&piece));
            }
        }
    }

    /// Moves what no gap separates any more.
    fn join(&mut self) {
        while let Some(entry) = self.ahead.first_entry() {
            let offset = *entry.key();
            if offset > self.received {
                break;
            }
            let bytes = entry.remove();
            let known = (self.received - offset).min(bytes.len() as u64);
            self.append(bytes.slice(known as usize..));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read_all(half: &mut RecvHalf) -> Vec<u8> {
        std::iter::from_fn(|| half.read(3)).flatten().collect()
    }

    proptest! {
        /// Any order, any overlap: the bytes come out once and in order.
        #[test]
        fn puts_everything_in_order(pieces in prop::collection::vec((0usize..200, 0usize..50), 1..80)) {
            let content: Vec<u8> = (0..200u8).collect();
            let mut half = RecvHalf::new();
            let (mut model, mut out) = ([false; 201], Vec::new());
            for (start, length) in pieces.into_iter().chain([(0, 200)]) {
                let end = (start + length).min(200);
                let fin = end == 200;
                half.receive(start as u64, Bytes::copy_from_slice(&content[start..end]), fin, false).expect("fits");
                model[start..end].fill(true);
                let contiguous = model.iter().position(|have| !have).unwrap_or(200);
                prop_assert_eq!(half.received, contiguous as u64);
                prop_assert_eq!(half.buffered() as usize, model.iter().filter(|have| **have).count() - out.len());
                if start % 2 == 0 {
                    out.extend(read_all(&mut half));
                }
            }
            out.extend(read_all(&mut half));
            prop_assert_eq!(out, content);
            prop_assert!(half.is_at_end() && half.is_complete());
            prop_assert_eq!(half.acked(), 201);
        }
    }

    #[test]
    fn refuses_what_no_correct_peer_sends() {
        let mut half = RecvHalf::new();
        let far = half.receive(INITIAL_WINDOW, Bytes::from_static(b"x"), false, false);
        assert_eq!(far, Err(Misbehaved::BeyondCredit));
        assert_eq!(half.receive(4, Bytes::from_static(b"x"), false, false), Ok(false));
        assert_eq!(half.receive(0, Bytes::from_static(b"abc"), true, false), Err(Misbehaved::BeyondEnd));
        assert_eq!(half.receive(0, Bytes::from_static(b"abcde"), true, false), Ok(true));
        assert_eq!(half.receive(5, Bytes::from_static(b"f"), false, false), Err(Misbehaved::BeyondEnd));
        assert_eq!(half.receive(0, Bytes::from_static(b"ab"), true, false), Err(Misbehaved::BeyondEnd));
    }

    #[test]
    fn small_pieces_are_gathered_and_scattered_ones_refused() {
        let mut half = RecvHalf::new();
        for offset in 1..INITIAL_WINDOW {
            assert_eq!(half.receive(offset, Bytes::from_static(b"x"), false, false), Ok(false));
        }
        assert!(half.ahead.len() as u64 <= 2 * INITIAL_WINDOW / SMALL as u64, "{}", half.ahead.len());
        assert_eq!(half.receive(0, Bytes::from_static(b"x"), false, false), Ok(true));
        assert_eq!(half.received, INITIAL_WINDOW);

        let mut half = RecvHalf::new();
        let scattered =
            (1..INITIAL_WINDOW / 2).map(|at| half.receive(2 * at, Bytes::from_static(b"x"), false, false));
        let taken = { scattered }.take_while(Result::is_ok).count();
        assert!((PIECES as usize..1000).contains(&taken), "{taken}");
    }

    #[test]
    fn a_window_grows_only_for_a_held_sender_and_a_drained_reader() {
        let mut half = RecvHalf::new();
        let full = Bytes::from(vec![1; INITIAL_WINDOW as usize]);
        half.receive(0, full, false, true).expect("fits");
        assert!(!half.wants_growth(), "not drained");
        assert!(half.is_urgent());
        while half.read(usize::MAX).is_some() {}
        assert!(half.wants_growth());
        half.grow(INITIAL_WINDOW);
        assert!(!half.wants_growth());
        assert_eq!(half.credit(), 3 * INITIAL_WINDOW);
    }
}
