//! Which carrier a session sends on. Policy only: the mechanism is in the session.

use super::CarrierKind;

/// What the policy knows of a carrier.
#[derive(Debug, Clone, Copy)]
pub(super) struct Choice<Id> {
    pub(super) id: Id,
    pub(super) kind: CarrierKind,
    /// Nothing was heard for too long.
    pub(super) silent: bool,
}

/// The carrier to send on: one that is heard before one that is silent, direct before relayed, and
/// the newest among equals, because it was dialled for a reason. Identifiers ascend with age.
///
/// A direct path that comes and goes does not make the session flap: it is the path engine that
/// decides, with growing patience, when a direct carrier is dialled again.
pub(super) fn choose<Id: Copy + Ord>(carriers: impl Iterator<Item = Choice<Id>>) -> Option<Id> {
    carriers.max_by_key(|c| (!c.silent, rank(c.kind), c.id)).map(|c| c.id)
}

/// Direct TCP is cheaper than QUIC where both work (no user-space packets); a plain relay leg is
/// cheaper than one inside WebSocket frames.
fn rank(kind: CarrierKind) -> u8 {
    match kind {
        CarrierKind::Tcp => 3,
        CarrierKind::Quic => 2,
        CarrierKind::Relay => 1,
        CarrierKind::RelayHttps => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(carriers: &[(u32, CarrierKind, bool)]) -> Option<u32> {
        choose(carriers.iter().map(|&(id, kind, silent)| Choice { id, kind, silent }))
    }

    #[test]
    fn prefers_heard_then_direct_then_new() {
        use CarrierKind::*;
        assert_eq!(chosen(&[]), None);
        assert_eq!(chosen(&[(0, Relay, false), (1, Quic, false)]), Some(1));
        assert_eq!(chosen(&[(0, Relay, false), (1, Quic, true)]), Some(0));
        assert_eq!(chosen(&[(0, Relay, true), (1, Quic, true)]), Some(1));
        assert_eq!(chosen(&[(0, Quic, false), (1, Quic, false)]), Some(1));
        assert_eq!(chosen(&[(0, Relay, false), (1, RelayHttps, false)]), Some(0));
    }
}
