//! The checklist of one round (RFC 8445 section 6.1.2): its pairs, and what each sends next.
//!
//! Every pair gets small checks at once, paced by [`PACING`], repeated with growing pauses: a
//! port-restricted NAT lets the peer's checks in only after ours have gone out. A pair whose small check
//! was answered and that is nominated sends checks of full size, until one is answered.
//!
//! A careful round begins with openers: checks that live just long enough to open our own NAT. Some routers answer what they did
//! not ask for, and remember it: a check that is there before theirs was sent would move the mapping that the peer knows of. So
//! the others go out when the peer has sent its own openers ([`Checklist::release`]).

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::candidate::{Candidate, CandidateKind, is_private};
use super::local::{LocalSocket, Path};
use super::stun::TransactionId;

/// Most pairs of a round: the peer's candidates, what the mediator saw, and peer-reflexive ones.
const MAX_PAIRS: usize = 64;
/// Ta at the least that RFC 8445 section 14.2 allows. Rounds have few pairs, and what a hostile peer can
/// make of it is bounded by [`Budget`](super::budget::Budget).
const PACING: Duration = Duration::from_millis(5);
/// Pauses before a small check is repeated; the last one is for all that follow. RFC 8445 section 14.3
/// starts at 500 ms. Here the first checks are often lost by design, to a NAT that waits for our peer's.
const SMALL_PAUSES: [Duration; 5] =
    [Duration::from_millis(150), Duration::from_millis(250), MILLIS_400, MILLIS_600, MILLIS_800];
/// The same for checks of full size, but at least two round trips.
const FULL_PAUSES: [Duration; 3] = [Duration::from_millis(100), Duration::from_millis(200), MILLIS_400];
const MILLIS_400: Duration = Duration::from_millis(400);
const MILLIS_600: Duration = Duration::from_millis(600);
const MILLIS_800: Duration = Duration::from_millis(800);
/// Checks to an address that is only expected: enough to open our own NAT for it.
const PREDICTED_CHECKS: usize = 3;
/// Checks of a pair that may still be answered; older ones are forgotten.
const MAX_OUTSTANDING: usize = 12;
/// How long the controlling side waits, after the first success, for a pair that it likes better. That
/// one was checked before, and a better path is a shorter one: its answer can hardly be later.
const SETTLE: Duration = Duration::from_millis(20);
/// No answer from the same network takes so long.
pub(super) const LATE: Duration = Duration::from_millis(50);
/// Round trips that differ by no more, or by no more than a quarter, are alike.
const SHORTER: Duration = Duration::from_millis(5);
/// A nominated pair that is not confirmed after this time, or five round trips, has failed; the next
/// best is nominated.
const NOMINATION: Duration = Duration::from_secs(2);

/// RFC 8445 section 6.1.2.6. There is no `Frozen`: all pairs have the one foundation and component.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CheckState {
    /// No check was sent yet.
    Waiting,
    /// Checks are on their way.
    InProgress,
    /// A check was answered.
    Succeeded,
    /// A check was refused, or the path does not carry full size.
    Failed,
}

/// One of our sockets and one remote candidate.
#[derive(Debug, Clone)]
pub struct CandidatePair {
    /// Our socket.
    pub socket: LocalSocket,
    /// The remote candidate.
    pub remote: Candidate,
    /// How far its checks got.
    pub state: CheckState,
    /// Our address as the peer saw it, once a check was answered.
    pub mapped: Option<SocketAddr>,
    /// Shortest round trip of a check.
    pub rtt: Option<Duration>,
    /// Since when this is the pair to use, as far as the controlling side is concerned.
    pub nominated: Option<Instant>,
    /// A check of the peer came in.
    heard: bool,
    /// A check of full size came in, and one of ours was answered.
    full_in: bool,
    full_out: bool,
    /// When the next check goes out, if any; an urgent one is not paced.
    due: Option<Instant>,
    urgent: bool,
    /// Checks sent since `due` was set by an event.
    attempts: usize,
    last_sent: Option<Instant>,
    outstanding: VecDeque<Sent>,
}

#[derive(Debug, Clone, Copy)]
struct Sent {
    id: TransactionId,
    at: Instant,
    full_size: bool,
}

impl CandidatePair {
    /// Datagrams of full size have passed in both directions, on the pair to use.
    pub(super) fn is_confirmed(&self) -> bool {
        self.is_valid() && self.full_in && self.full_out
    }

    /// Checked in both directions and nominated; full size is not yet proved.
    pub fn is_valid(&self) -> bool {
        self.state == CheckState::Succeeded && self.nominated.is_some()
    }

    /// It works and is in use, and there is no reason to leave it for that one: a better kind without a longer round trip, or
    /// a much shorter one. What a change takes is more than what a choice takes, so that chance does not make it go to and fro.
    pub(super) fn is_kept_rather_than(&self, other: &Self) -> bool {
        let is_better = other.remote.kind.priority() > self.remote.kind.priority() && other.rtt <= self.rtt;
        let is_much_shorter =
            self.rtt.zip(other.rtt).is_some_and(|(own, others)| others + others / 2 + SHORTER * 2 < own);
        self.state == CheckState::Succeeded && !is_better && !is_much_shorter
    }

    /// By the round trips that were measured. What is between may be chance.
    fn is_clearly_shorter_than(&self, other: &Self) -> bool {
        self.rtt.zip(other.rtt).is_some_and(|(own, others)| own + own / 4 + SHORTER < others)
    }

    /// Where its checks go.
    pub fn path(&self) -> Path {
        Path { socket: self.socket, remote: self.remote.address }
    }

    /// Something of the peer has come in on it.
    pub(super) fn is_alive(&self) -> bool {
        self.heard || self.state == CheckState::Succeeded
    }

    fn new(now: Instant, socket: LocalSocket, remote: Candidate) -> Self {
        Self {
            socket,
            remote,
            state: CheckState::Waiting,
            mapped: None,
            rtt: None,
            nominated: None,
            heard: false,
            full_in: false,
            full_out: false,
            due: Some(now),
            urgent: false,
            attempts: 0,
            last_sent: None,
            outstanding: VecDeque::new(),
        }
    }

    fn check_now(&mut self, now: Instant) {
        self.due = Some(now);
        self.urgent = true;
        self.attempts = 0;
    }

    fn nomination_ends(&self) -> Option<Instant> {
        self.nominated.map(|at| at + NOMINATION.max(self.rtt.unwrap_or_default() * 5))
    }

    fn pause(&self) -> Duration {
        let pauses = if self.is_valid() { &FULL_PAUSES[..] } else { &SMALL_PAUSES[..] };
        let pause = pauses[self.attempts.min(pauses.len() - 1)];
        if self.is_valid() { pause.max(self.rtt.unwrap_or_default() * 2) } else { pause }
    }
}

/// All pairs of a round.
#[derive(Debug, Default)]
pub(super) struct Checklist {
    pairs: Vec<CandidatePair>,
    last_paced: Option<Instant>,
    /// When the first check was answered.
    first_success: Option<Instant>,
    /// In a careful round nothing is paced: what opens our NAT goes out before the message that lets the peer's checks come.
    unpaced: bool,
    /// Only openers are sent yet, but to pairs on which the peer was heard.
    opening: bool,
}

/// A check to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Check {
    pub(super) path: Path,
    pub(super) full_size: bool,
    /// It should not get further than our own NAT.
    pub(super) opener: bool,
}

impl Checklist {
    /// That of a careful round.
    pub(super) fn careful() -> Self {
        Self { unpaced: true, opening: true, ..Self::default() }
    }

    /// The peer has sent its openers: from now on checks are meant to arrive.
    pub(super) fn release(&mut self, now: Instant) {
        if std::mem::take(&mut self.opening) {
            for pair in self.pairs.iter_mut().filter(|pair| pair.due.is_some()) {
                pair.due = Some(now);
                pair.attempts = 0;
            }
        }
    }

    pub(super) fn pairs(&self) -> &[CandidatePair] {
        &self.pairs
    }

    pub(super) fn get(&self, path: Path) -> Option<&CandidatePair> {
        self.pairs.iter().find(|pair| pair.path() == path)
    }

    /// Adds a pair, unless there is one to that address or no room. The best that is known of an address counts: what the
    /// peer says of its own host's tells more than what a server or a check shows.
    pub(super) fn add(&mut self, now: Instant, socket: LocalSocket, remote: Candidate) {
        if let Some(pair) = self.get_mut(Path { socket, remote: remote.address }) {
            use CandidateKind::{Host, PeerReflexive, Predicted};
            // A reflexive one stays what it was first, except that a server's is more than a check's.
            let is_more = match pair.remote.kind {
                Predicted => true,
                PeerReflexive => remote.kind != Predicted,
                _ => remote.kind == Host,
            };
            if is_more {
                // It is no guess any more.
                if pair.remote.kind == Predicted && pair.state == CheckState::InProgress {
                    pair.due.get_or_insert(now);
                }
                pair.remote.kind = remote.kind;
            }
        } else if self.pairs.len() < MAX_PAIRS {
            self.pairs.push(CandidatePair::new(now, socket, remote));
        }
    }

    /// An authentic check of the peer came in on `path` (RFC 8445 section 7.3.1.4).
    pub(super) fn heard(&mut self, now: Instant, path: Path, full_size: bool, nominated: bool) {
        self.add(now, path.socket, Candidate { kind: CandidateKind::PeerReflexive, address: path.remote });
        let Some(pair) = self.get_mut(path) else { return };
        let first = !std::mem::replace(&mut pair.heard, true);
        pair.full_in |= full_size;
        let newly_nominated = nominated && pair.nominated.is_none();
        if newly_nominated {
            pair.nominated = Some(now);
        }
        match pair.state {
            CheckState::Succeeded if newly_nominated => pair.check_now(now),
            CheckState::Succeeded => {}
            // A triggered check: the peer's NAT is open for us now.
            CheckState::Waiting | CheckState::InProgress if first => pair.check_now(now),
            // The one that we sent just before may still be answered.
            CheckState::Waiting | CheckState::InProgress => {
                let soon = pair.last_sent.map_or(now, |last| last + SMALL_PAUSES[0]);
                pair.due = Some(pair.due.map_or(soon, |due| due.min(soon)));
            }
            CheckState::Failed => {}
        }
    }

    /// A check of ours on `path` was answered.
    pub(super) fn answered(&mut self, now: Instant, path: Path, id: TransactionId, mapped: SocketAddr) {
        let Some(pair) = self.get_mut(path) else { return };
        let Some(at) = pair.outstanding.iter().position(|sent| sent.id == id) else { return };
        let Some(sent) = pair.outstanding.remove(at) else { return };
        let rtt = now.saturating_duration_since(sent.at);
        pair.rtt = Some(pair.rtt.map_or(rtt, |least| least.min(rtt)));
        pair.mapped = Some(mapped);
        pair.full_out |= sent.full_size;
        match pair.state {
            CheckState::Waiting | CheckState::InProgress => {
                pair.state = CheckState::Succeeded;
                pair.due = None;
                if pair.nominated.is_some() {
                    pair.check_now(now);
                }
                self.first_success.get_or_insert(now);
            }
            // A nomination is repeated until the peer's check of full size is here too: the answer may have
            // come from a peer that was not yet in the round, and forgot.
            CheckState::Succeeded if pair.is_confirmed() => pair.due = None,
            CheckState::Succeeded | CheckState::Failed => {}
        }
    }

    /// A check of ours on `path` was refused.
    pub(super) fn refused(&mut self, path: Path) {
        if let Some(pair) = self.get_mut(path) {
            pair.state = CheckState::Failed;
            pair.due = None;
        }
    }

    /// Whether this transaction on `path` is one of ours.
    pub(super) fn asked(&self, path: Path, id: TransactionId) -> bool {
        self.get(path).is_some_and(|pair| pair.outstanding.iter().any(|sent| sent.id == id))
    }

    /// No more checks, except for what the peer nominates.
    pub(super) fn stop(&mut self) {
        self.pairs.iter_mut().for_each(|pair| pair.due = None);
    }

    /// When [`Self::send`] has something to send.
    pub(super) fn due(&self) -> Option<Instant> {
        self.pairs.iter().filter_map(|pair| self.pair_due(pair)).min()
    }

    /// The check to send now, under this transaction: urgent ones first, then by priority.
    pub(super) fn send(&mut self, now: Instant, id: TransactionId) -> Option<Check> {
        let is_due = |pair: &&CandidatePair| self.pair_due(pair).is_some_and(|due| due <= now);
        let first = |pair: &&CandidatePair| (pair.urgent, pair.remote.kind.priority());
        // Among equals the first, which is the likeliest.
        let path = self.pairs.iter().rev().filter(is_due).max_by_key(first)?.path();
        let opening = self.opening;
        let pair = self.get_mut(path)?;
        let full_size = pair.is_valid();
        let opener = opening && !pair.is_alive();
        if pair.state == CheckState::Waiting {
            pair.state = CheckState::InProgress;
        }
        let is_guess = pair.remote.kind == CandidateKind::Predicted && !opener;
        let is_last = is_guess && pair.attempts + 1 >= PREDICTED_CHECKS;
        pair.due = Some(now + pair.pause()).filter(|_| !is_last);
        pair.attempts += 1;
        pair.last_sent = Some(now);
        if pair.outstanding.len() == MAX_OUTSTANDING {
            pair.outstanding.pop_front();
        }
        pair.outstanding.push_back(Sent { id, at: now, full_size });
        if !std::mem::take(&mut pair.urgent) {
            self.last_paced = Some(now);
        }
        Some(Check { path, full_size, opener })
    }

    /// When [`Self::nominate`] may have something to do (controlling side only).
    pub(super) fn nomination_due(&self) -> Option<Instant> {
        match self.nominee() {
            Some(pair) => pair.nomination_ends(),
            None => self.best().and(self.first_success).map(|at| at + SETTLE),
        }
    }

    /// Chooses the pair to use, when the time has come, and says so; drops one that did not live up to it
    /// (controlling side only).
    pub(super) fn nominate(&mut self, now: Instant) -> Option<Path> {
        let overdue = self.nominee().filter(|pair| pair.nomination_ends().is_some_and(|end| end <= now));
        if let Some(path) = overdue.map(CandidatePair::path) {
            tracing::debug!(%path, "nominated pair does not carry full size both ways");
            self.refused(path);
        }
        if self.nominee().is_some() {
            return None;
        }
        let best = self.best()?;
        let path = best.path();
        // One that was asked before this one, and has not answered for longer, is no shorter way; nor is one that is said to be
        // near and is not.
        let is_late = |pair: &CandidatePair| {
            let near = is_private(pair.remote.address.ip());
            let slow = if near { Some(LATE) } else { best.rtt.map(|rtt| rtt.max(LATE)) };
            pair.last_sent.zip(slow).is_some_and(|(sent, slow)| now.saturating_duration_since(sent) > slow)
        };
        let rival = self.pairs.iter().any(|pair| {
            matches!(pair.state, CheckState::Waiting | CheckState::InProgress)
                && pair.remote.kind.priority() > best.remote.kind.priority()
                && !is_late(pair)
        });
        let settled = self.first_success.is_some_and(|at| at + SETTLE <= now);
        let pair = self.get_mut(path).filter(|_| settled || !rival)?;
        pair.nominated = Some(now);
        pair.check_now(now);
        Some(path)
    }

    fn nominee(&self) -> Option<&CandidatePair> {
        self.pairs.iter().find(|pair| pair.is_valid())
    }

    /// The best pair that could be nominated: by kind among those to which none is a clearly shorter way, a local address that
    /// leads through a VPN included; then by round trip. It must have worked in both directions; a peer from which no check
    /// came may not be in the round yet.
    fn best(&self) -> Option<&CandidatePair> {
        let works = |pair: &&CandidatePair| {
            pair.state == CheckState::Succeeded && pair.heard && pair.nominated.is_none()
        };
        let shortest = self.pairs.iter().filter(works).min_by_key(|pair| pair.rtt)?;
        self.pairs
            .iter()
            .filter(works)
            .filter(|pair| !shortest.is_clearly_shorter_than(pair))
            .min_by_key(|pair| (std::cmp::Reverse(pair.remote.kind.priority()), pair.rtt))
    }

    fn pair_due(&self, pair: &CandidatePair) -> Option<Instant> {
        let paced = self.last_paced.filter(|_| !pair.urgent && !self.unpaced).map(|last| last + PACING);
        pair.due.map(|due| paced.map_or(due, |paced| due.max(paced)))
    }

    fn get_mut(&mut self, path: Path) -> Option<&mut CandidatePair> {
        self.pairs.iter_mut().find(|pair| pair.path() == path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(kind: CandidateKind, last: u8) -> Candidate {
        Candidate { kind, address: ([192, 0, 2, last], 1).into() }
    }

    /// Sends what is due until `end`. Returns milliseconds, last byte of the address, and whether full size.
    fn send(checklist: &mut Checklist, start: Instant, end: u64) -> Vec<(u64, u8, bool)> {
        let mut sent = Vec::new();
        let end = start + Duration::from_millis(end);
        while let Some(now) = checklist.due().map(|due| due.max(start)).filter(|due| *due <= end) {
            let check = checklist.send(now, [sent.len() as u8; 12]).expect("it is due");
            let SocketAddr::V4(remote) = check.path.remote else { panic!("IPv4 only") };
            sent.push(((now - start).as_millis() as u64, remote.ip().octets()[3], check.full_size));
        }
        sent
    }

    #[test]
    fn paced_by_priority_and_repeated() {
        let start = Instant::now();
        let mut checklist = Checklist::default();
        checklist.add(start, LocalSocket::DEVICE, candidate(CandidateKind::ServerReflexive, 1));
        checklist.add(start, LocalSocket::DEVICE, candidate(CandidateKind::Host, 2));
        let sent = send(&mut checklist, start, 1000);
        let expected = [(0, 2), (5, 1), (150, 2), (155, 1), (400, 2), (405, 1), (800, 2), (805, 1)];
        assert_eq!(sent, expected.map(|(at, remote)| (at, remote, false)));
        assert!(checklist.pairs().iter().all(|pair| pair.state == CheckState::InProgress));
    }

    #[test]
    fn a_careful_round_opens_everything_before_anything_arrives() {
        let start = Instant::now();
        let mut checklist = Checklist::careful();
        for last in 1..=3 {
            checklist.add(start, LocalSocket(1), candidate(CandidateKind::Predicted, last));
        }
        let mut sent = Vec::new();
        while checklist.due().is_some_and(|due| due <= start) {
            sent.push(checklist.send(start, [sent.len() as u8; 12]).expect("it is due"));
        }
        assert_eq!(sent.len(), 3, "all at once");
        assert!(sent.iter().all(|check| check.opener));
        let order: Vec<_> = sent.iter().map(|check| check.path.remote).collect();
        assert!(order.is_sorted(), "the likeliest first: {order:?}");
        let released = start + Duration::from_secs(3);
        while let Some(now) = checklist.due().filter(|due| *due < released) {
            assert!(checklist.send(now, [9; 12]).expect("it is due").opener);
        }
        checklist.release(released);
        checklist.add(released, LocalSocket(1), candidate(CandidateKind::Predicted, 4));
        let after = send(&mut checklist, released, 0);
        assert_eq!(after.len(), 4, "guesses are not used up by openers, and what comes late is not paced");
    }

    #[test]
    fn a_check_of_the_peer_is_checked_back_at_once() {
        let start = Instant::now();
        let mut checklist = Checklist::default();
        checklist.add(start, LocalSocket::DEVICE, candidate(CandidateKind::ServerReflexive, 1));
        assert_eq!(send(&mut checklist, start, 100).len(), 1);
        let heard = start + Duration::from_millis(101);
        checklist.heard(heard, Path::to(([192, 0, 2, 1], 1).into()), false, false);
        assert_eq!(send(&mut checklist, heard, 0), [(0, 1, false)]);
        // but not for every one that follows
        checklist.heard(heard, Path::to(([192, 0, 2, 1], 1).into()), false, false);
        assert_eq!(send(&mut checklist, heard, 100), []);
        // from an address that nobody told of
        checklist.heard(heard, Path::to(([192, 0, 2, 9], 1).into()), false, false);
        assert_eq!(send(&mut checklist, heard, 50), [(0, 9, false)]);
        assert_eq!(checklist.pairs()[1].remote.kind, CandidateKind::PeerReflexive);
    }

    #[test]
    fn full_size_goes_to_the_nominated_pair_and_to_the_next_when_that_fails() {
        let start = Instant::now();
        let mapped = ([198, 51, 100, 1], 1).into();
        let mut checklist = Checklist::default();
        checklist.add(start, LocalSocket::DEVICE, candidate(CandidateKind::ServerReflexive, 1));
        checklist.add(start, LocalSocket::DEVICE, candidate(CandidateKind::Host, 2));
        send(&mut checklist, start, 10);
        let answered = start + Duration::from_millis(12);
        checklist.answered(answered, Path::to(([192, 0, 2, 1], 1).into()), [1; 12], mapped);
        assert_eq!(checklist.nomination_due(), None, "no check of the peer yet");
        checklist.heard(answered, Path::to(([192, 0, 2, 1], 1).into()), false, false);
        checklist.nominate(answered);
        assert_eq!(send(&mut checklist, answered, 10), [], "the host candidate may still answer");
        assert_eq!(checklist.nomination_due(), Some(answered + SETTLE));
        let settled = answered + Duration::from_millis(1);
        checklist.answered(settled, Path::to(([192, 0, 2, 2], 1).into()), [0; 12], mapped);
        checklist.heard(settled, Path::to(([192, 0, 2, 2], 1).into()), false, false);
        checklist.nominate(settled);
        assert_eq!(send(&mut checklist, settled, 400), [(0, 2, true), (100, 2, true), (300, 2, true)]);
        let failed = checklist.nomination_due().expect("it has a deadline");
        assert_eq!(failed, settled + NOMINATION);
        checklist.nominate(failed);
        assert_eq!(checklist.pairs()[1].state, CheckState::Failed);
        assert_eq!(send(&mut checklist, failed, 0), [(0, 1, true)]);
    }

    /// One that leads through a VPN of the routers', for example.
    #[test]
    fn a_clearly_shorter_way_is_better_than_a_better_kind() {
        let start = Instant::now();
        let millis = Duration::from_millis;
        for (longer, best) in [(12, CandidateKind::Host), (19, CandidateKind::ServerReflexive)] {
            let mut checklist = Checklist::default();
            let [near, far] = [(CandidateKind::Host, 2), (CandidateKind::ServerReflexive, 1)]
                .map(|(kind, last)| candidate(kind, last));
            for candidate in [near, far] {
                checklist.add(start, LocalSocket::DEVICE, candidate);
            }
            send(&mut checklist, start, 10);
            // Sent at 0 and at 5 ms.
            for (candidate, id, at) in [(far, 1, 5 + 30), (near, 0, 30 + longer)] {
                let path = Path::to(candidate.address);
                let mapped = ([198, 51, 100, 1], 1).into();
                checklist.answered(start + millis(at), path, [id; 12], mapped);
                checklist.heard(start + millis(at), path, false, false);
            }
            let nominated = checklist.nominate(start + millis(60)).expect("a pair");
            let [nominated, other] = [true, false].map(|is_best| {
                let pair = checklist.pairs().iter().find(|pair| (pair.path() == nominated) == is_best);
                pair.expect("two pairs")
            });
            assert_eq!(nominated.remote.kind, best, "{longer} ms longer");
            assert!(nominated.is_kept_rather_than(other) && other.is_kept_rather_than(nominated));
        }
    }

    #[test]
    fn a_path_is_left_for_a_better_kind_or_a_much_shorter_way() {
        let start = Instant::now();
        let pair = |kind, rtt| {
            let mut pair = CandidatePair::new(start, LocalSocket::DEVICE, candidate(kind, 1));
            pair.state = CheckState::Succeeded;
            pair.rtt = Some(Duration::from_millis(rtt));
            pair
        };
        use CandidateKind::{Host, ServerReflexive};
        for (kept, other, stays) in [
            (pair(ServerReflexive, 30), pair(Host, 30), false),
            (pair(ServerReflexive, 30), pair(Host, 31), true),
            (pair(Host, 43), pair(ServerReflexive, 30), true),
            (pair(Host, 56), pair(ServerReflexive, 30), false),
            (pair(Host, 30), pair(Host, 29), true),
        ] {
            assert_eq!(kept.is_kept_rather_than(&other), stays, "{kept:?} {other:?}");
        }
        let silent = CandidatePair::new(start, LocalSocket::DEVICE, candidate(Host, 2));
        assert!(!silent.is_kept_rather_than(&pair(ServerReflexive, 30)));
    }

    #[test]
    fn nobody_waits_for_a_near_one_that_is_not() {
        let start = Instant::now();
        let near = Candidate { kind: CandidateKind::Host, address: ([192, 168, 1, 7], 1).into() };
        let far = candidate(CandidateKind::ServerReflexive, 1);
        // The answer of the far one; whether the near one may still answer then.
        for (rtt, waits) in [(30, true), (LATE.as_millis() as u64 + 15, false)] {
            let mut checklist = Checklist::default();
            checklist.add(start, LocalSocket::DEVICE, near);
            checklist.add(start, LocalSocket::DEVICE, far);
            send(&mut checklist, start, 10);
            let answered = start + Duration::from_millis(5 + rtt);
            let path = Path::to(far.address);
            checklist.answered(answered, path, [1; 12], ([198, 51, 100, 1], 1).into());
            checklist.heard(answered, path, false, false);
            assert_eq!(checklist.nominate(answered).is_none(), waits, "{rtt} ms");
            let settled = answered + SETTLE;
            assert_eq!(checklist.nominate(settled).is_some(), waits, "{rtt} ms");
        }
    }

    #[test]
    fn the_peers_word_on_its_host_counts_more_than_what_the_mediator_saw_before() {
        let start = Instant::now();
        let mut checklist = Checklist::default();
        for kind in [CandidateKind::ServerReflexive, CandidateKind::Host, CandidateKind::ServerReflexive] {
            checklist.add(start, LocalSocket::DEVICE, candidate(kind, 1));
        }
        assert_eq!(checklist.pairs().len(), 1);
        assert_eq!(checklist.pairs()[0].remote.kind, CandidateKind::Host);
    }

    #[test]
    fn bounded_and_without_doubles() {
        let start = Instant::now();
        let mut checklist = Checklist::default();
        for last in 0..=255 {
            checklist.add(start, LocalSocket::DEVICE, candidate(CandidateKind::PeerReflexive, last));
            checklist.add(start, LocalSocket::DEVICE, candidate(CandidateKind::Host, last));
        }
        assert_eq!(checklist.pairs().len(), MAX_PAIRS);
        assert!(checklist.pairs().iter().all(|pair| pair.remote.kind == CandidateKind::Host));
    }
}
