//! Which leg waits for which, and which tickets are spent. Pure: time is an argument.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;

use adit_protocol::SessionId;
use adit_protocol::ticket::{LEEWAY_SECONDS, Ticket};

/// One pairing: session and serial of its two tickets.
pub(crate) type Key = (SessionId, u64);

/// The legs that wait and the tickets that are spent, both bounded. `L` is a leg's connection.
#[derive(Debug)]
pub(crate) struct Table<L> {
    entries: HashMap<Key, Entry<L>>,
    next: u64,
    waiting: usize,
    max_waiting: usize,
    max_spent: usize,
    /// Nothing spent can be forgotten before this time (seconds since 1970-01-01 UTC).
    sweep_at: u64,
}

#[derive(Debug)]
enum Entry<L> {
    Waiting {
        number: u64,
        ticket: Ticket,
        leg: L,
    },
    /// Remembered until this time: after it the ticket has expired.
    Spent {
        until: u64,
    },
}

/// What became of a leg that was offered.
#[derive(Debug)]
pub(crate) enum Offered<L> {
    /// It waits; the number is for [`Table::withdraw`]. An older leg lost its place to it.
    Waits { number: u64, replaced: Option<L> },
    /// The other leg was there, with this ticket. Both tickets are spent now.
    Paired { ours: L, other: L, ticket: Ticket },
    /// Not taken.
    Refused { ours: L, why: Refused },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    Spent,
    Mismatch,
    Full,
}

impl<L> Table<L> {
    pub(crate) fn new(max_waiting: usize, max_spent: usize) -> Self {
        Self { entries: HashMap::new(), next: 0, waiting: 0, max_waiting, max_spent, sweep_at: 0 }
    }

    /// Offers a leg with a verified ticket at `now` (seconds since 1970-01-01 UTC). `alive` says
    /// whether the leg that waits is still connected.
    pub(crate) fn offer(
        &mut self,
        ticket: &Ticket,
        ours: L,
        now: u64,
        alive: impl FnOnce(&L) -> bool,
    ) -> Offered<L> {
        self.sweep(now);
        let spent = self.entries.len() - self.waiting;
        match self.entries.entry((ticket.session, ticket.serial)) {
            Slot::Vacant(_) if self.waiting >= self.max_waiting || spent >= self.max_spent => {
                Offered::Refused { ours, why: Refused::Full }
            }
            Slot::Vacant(slot) => {
                self.waiting += 1;
                self.next += 1;
                slot.insert(Entry::Waiting { number: self.next, ticket: ticket.clone(), leg: ours });
                Offered::Waits { number: self.next, replaced: None }
            }
            Slot::Occupied(mut slot) => match slot.get() {
                Entry::Spent { .. } => Offered::Refused { ours, why: Refused::Spent },
                Entry::Waiting { ticket: other, .. } if !belong_together(ticket, other) => {
                    Offered::Refused { ours, why: Refused::Mismatch }
                }
                Entry::Waiting { ticket: other, leg, .. } if other.leg == ticket.leg || !alive(leg) => {
                    self.next += 1;
                    let newer = Entry::Waiting { number: self.next, ticket: ticket.clone(), leg: ours };
                    let replaced = slot.insert(newer).into_leg().map(|(_, leg)| leg);
                    Offered::Waits { number: self.next, replaced }
                }
                Entry::Waiting { ticket: other, .. } => {
                    let until = ticket.expires.max(other.expires).saturating_add(LEEWAY_SECONDS);
                    self.waiting -= 1;
                    self.sweep_at = self.sweep_at.min(until);
                    match slot.insert(Entry::Spent { until }).into_leg() {
                        Some((ticket, other)) => Offered::Paired { ours, other, ticket },
                        None => Offered::Refused { ours, why: Refused::Spent },
                    }
                }
            },
        }
    }

    /// Takes the leg back that was given `number`, unless it was replaced or has paired meanwhile.
    pub(crate) fn withdraw(&mut self, key: Key, number: u64) -> Option<L> {
        let Slot::Occupied(slot) = self.entries.entry(key) else { return None };
        let Entry::Waiting { number: waits, .. } = slot.get() else { return None };
        if *waits != number {
            return None;
        }
        self.waiting -= 1;
        slot.remove().into_leg().map(|(_, leg)| leg)
    }

    /// Legs that wait now.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    fn sweep(&mut self, now: u64) {
        if now <= self.sweep_at {
            return;
        }
        let mut next = u64::MAX;
        self.entries.retain(|_, entry| match entry {
            Entry::Waiting { .. } => true,
            Entry::Spent { until } if *until < now => false,
            Entry::Spent { until } => {
                next = next.min(*until);
                true
            }
        });
        self.sweep_at = next;
    }
}

impl<L> Entry<L> {
    fn into_leg(self) -> Option<(Ticket, L)> {
        match self {
            Entry::Waiting { ticket, leg, .. } => Some((ticket, leg)),
            Entry::Spent { .. } => None,
        }
    }
}

/// The same leg again with the same keys, or the two legs of one pair.
fn belong_together(ours: &Ticket, other: &Ticket) -> bool {
    if ours.leg == other.leg {
        ours.holder == other.holder && ours.peer == other.peer
    } else {
        ours.holder == other.peer && ours.peer == other.holder
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use adit_protocol::{DeviceId, Role};

    const EXPIRES: u64 = 1000;

    fn ticket(leg: Role, serial: u64) -> Ticket {
        let (holder, peer) = if leg == Role::Agent { ([1; 32], [2; 32]) } else { ([2; 32], [1; 32]) };
        let session = SessionId([7; 16]);
        let relay = DeviceId([8; 16]);
        Ticket {
            session,
            serial,
            relay,
            epoch: 1,
            leg,
            holder,
            peer,
            expires: EXPIRES,
            max_bytes: 0,
            max_seconds: 0,
        }
    }

    fn offer(table: &mut Table<u32>, ticket: &Ticket, leg: u32, now: u64) -> Offered<u32> {
        table.offer(ticket, leg, now, |_| true)
    }

    #[test]
    fn two_legs_pair_once() {
        let mut table = Table::new(10, 10);
        let (agent, technician) = (ticket(Role::Agent, 1), ticket(Role::Technician, 1));
        assert!(matches!(offer(&mut table, &agent, 1, 0), Offered::Waits { replaced: None, .. }));
        assert_eq!(table.waiting(), 1);
        let paired = offer(&mut table, &technician, 2, 0);
        assert!(matches!(paired, Offered::Paired { ours: 2, other: 1, ticket } if ticket == agent));
        assert_eq!(table.waiting(), 0);
        for again in [&agent, &technician] {
            let refused = offer(&mut table, again, 3, EXPIRES);
            assert!(matches!(refused, Offered::Refused { ours: 3, why: Refused::Spent }));
        }
    }

    #[test]
    fn a_newer_leg_replaces_an_older_one() {
        let mut table = Table::new(10, 10);
        let agent = ticket(Role::Agent, 1);
        let Offered::Waits { number: first, .. } = offer(&mut table, &agent, 1, 0) else { panic!("waits") };
        let Offered::Waits { number: second, replaced: Some(1) } = offer(&mut table, &agent, 2, 0) else {
            panic!("replaces")
        };
        let key = (agent.session, agent.serial);
        assert_eq!(table.withdraw(key, first), None);
        assert_eq!(table.withdraw(key, second), Some(2));
        assert_eq!(table.withdraw(key, second), None);
        assert_eq!(table.waiting(), 0);
    }

    #[test]
    fn a_leg_that_hung_up_is_not_paired() {
        let mut table = Table::new(10, 10);
        offer(&mut table, &ticket(Role::Agent, 1), 1, 0);
        let other = table.offer(&ticket(Role::Technician, 1), 2, 0, |_| false);
        assert!(matches!(other, Offered::Waits { replaced: Some(1), .. }));
        assert_eq!(table.waiting(), 1);
        assert!(matches!(offer(&mut table, &ticket(Role::Agent, 1), 3, 0), Offered::Paired { .. }));
    }

    #[test]
    fn keys_must_be_crossed() {
        let mut table = Table::new(10, 10);
        offer(&mut table, &ticket(Role::Agent, 1), 1, 0);
        let other_holder = Ticket { holder: [9; 32], ..ticket(Role::Technician, 1) };
        let other_peer = Ticket { peer: [9; 32], ..ticket(Role::Technician, 1) };
        let thief = Ticket { holder: [9; 32], ..ticket(Role::Agent, 1) };
        for wrong in [other_holder, other_peer, thief] {
            let refused = offer(&mut table, &wrong, 2, 0);
            assert!(matches!(refused, Offered::Refused { why: Refused::Mismatch, .. }));
        }
        assert!(matches!(offer(&mut table, &ticket(Role::Technician, 1), 2, 0), Offered::Paired { .. }));
    }

    #[test]
    fn both_halves_are_bounded_and_spent_ones_are_forgotten_after_their_expiry() {
        let mut table = Table::new(2, 3);
        for serial in 0..2 {
            assert!(matches!(offer(&mut table, &ticket(Role::Agent, serial), 1, 0), Offered::Waits { .. }));
        }
        let full = offer(&mut table, &ticket(Role::Agent, 2), 1, 0);
        assert!(matches!(full, Offered::Refused { why: Refused::Full, .. }));
        for serial in 0..3 {
            offer(&mut table, &ticket(Role::Agent, serial), 1, 0);
            let paired = offer(&mut table, &ticket(Role::Technician, serial), 1, 0);
            assert!(matches!(paired, Offered::Paired { .. }), "{serial}");
        }
        let full = offer(&mut table, &ticket(Role::Agent, 3), 1, EXPIRES + LEEWAY_SECONDS);
        assert!(matches!(full, Offered::Refused { why: Refused::Full, .. }));
        let later = EXPIRES + LEEWAY_SECONDS + 1;
        assert!(matches!(offer(&mut table, &ticket(Role::Agent, 3), 1, later), Offered::Waits { .. }));
        assert_eq!(table.entries.len(), 1);
    }
}
