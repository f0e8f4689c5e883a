//! Keeps the peer informed. Candidate messages are lost, duplicated and reordered by whatever carries
//! them; each one tells everything, the newest counts, and it is sent again until it is acknowledged.

use std::time::{Duration, Instant};

use super::message::{CandidateMessage, State};

/// Two messages are at least this far apart; what changes meanwhile goes out together.
const SPACING: Duration = Duration::from_millis(10);
/// An unacknowledged message is repeated after this time, then after twice the time, and so on.
const FIRST_RESEND: Duration = Duration::from_secs(1);
/// And never less often than this.
const MAX_RESEND: Duration = Duration::from_secs(60);

/// Both directions of the exchange of candidates.
pub(super) struct Exchange {
    ours: State,
    sequence: u64,
    acknowledged: u64,
    theirs: State,
    their_sequence: u64,
    due: Option<Instant>,
    /// The peer waits for it: a change, or an acknowledgement.
    owed: bool,
    last_sent: Option<Instant>,
    resend: Duration,
}

impl Exchange {
    pub(super) fn new() -> Self {
        Self {
            ours: State::default(),
            sequence: 0,
            acknowledged: 0,
            theirs: State::default(),
            their_sequence: 0,
            due: None,
            owed: false,
            last_sent: None,
            resend: FIRST_RESEND,
        }
    }

    /// What the peer told last.
    pub(super) fn theirs(&self) -> &State {
        &self.theirs
    }

    /// Whether the peer has all that we told.
    pub(super) fn is_settled(&self) -> bool {
        self.sequence > 0 && self.acknowledged == self.sequence
    }

    /// What we have to tell. Sent at once if it is new.
    pub(super) fn tell(&mut self, now: Instant, state: State) {
        if self.ours != state {
            self.ours = state;
            self.sequence += 1;
            self.resend = FIRST_RESEND;
            self.send_soon(now);
        }
    }

    /// Takes the peer's message. Returns what it told before if this one is news.
    pub(super) fn receive(&mut self, now: Instant, message: CandidateMessage) -> Option<State> {
        self.acknowledged = self.acknowledged.max(message.acknowledged.min(self.sequence));
        if message.want_acknowledgement {
            self.send_soon(now);
        } else if self.acknowledged == self.sequence && !self.owed {
            self.due = None;
        }
        if message.sequence <= self.their_sequence {
            return None;
        }
        self.their_sequence = message.sequence;
        Some(std::mem::replace(&mut self.theirs, message.state))
    }

    /// When [`Self::send`] has something to send.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// The message to send now, if one is due.
    pub(super) fn send(&mut self, now: Instant) -> Option<Vec<u8>> {
        self.due.filter(|due| *due <= now)?;
        let unacknowledged = self.acknowledged < self.sequence;
        self.last_sent = Some(now);
        self.owed = false;
        self.due = unacknowledged.then(|| now + self.resend);
        self.resend = (self.resend * 2).min(MAX_RESEND);
        let message = CandidateMessage {
            sequence: self.sequence,
            acknowledged: self.their_sequence,
            want_acknowledgement: unacknowledged,
            state: self.ours.clone(),
        };
        Some(message.encode())
    }

    fn send_soon(&mut self, now: Instant) {
        let earliest = self.last_sent.map_or(now, |last| now.max(last + SPACING));
        self.owed = true;
        self.due = Some(self.due.map_or(earliest, |due| due.min(earliest)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(round: u64) -> State {
        State { round, ..State::default() }
    }

    fn decode(bytes: Vec<u8>) -> CandidateMessage {
        CandidateMessage::decode(&bytes).expect("a message of ours")
    }

    #[test]
    fn falls_silent_when_both_have_heard() {
        let mut now = Instant::now();
        let (mut one, mut two) = (Exchange::new(), Exchange::new());
        one.tell(now, round(1));
        two.tell(now, round(7));
        let mut sent = 0;
        for _ in 0..10 {
            now += SPACING;
            if let Some(bytes) = one.send(now) {
                sent += 1;
                two.receive(now, decode(bytes));
            }
            if let Some(bytes) = two.send(now) {
                sent += 1;
                one.receive(now, decode(bytes));
            }
        }
        assert_eq!((one.theirs().round, two.theirs().round), (7, 1));
        assert_eq!((one.due(), two.due()), (None, None));
        assert!(sent <= 4, "{sent} messages");
    }

    #[test]
    fn repeats_what_was_lost_less_and_less_often() {
        let start = Instant::now();
        let mut one = Exchange::new();
        one.tell(start, round(1));
        let mut times = Vec::new();
        while let Some(due) = one.due().filter(|due| *due - start < Duration::from_secs(300)) {
            assert!(decode(one.send(due).expect("it is due")).want_acknowledgement);
            times.push((due - start).as_secs());
        }
        assert_eq!(times, [0, 1, 3, 7, 15, 31, 63, 123, 183, 243]);
    }

    #[test]
    fn an_old_message_changes_nothing() {
        let now = Instant::now();
        let (mut one, mut two) = (Exchange::new(), Exchange::new());
        one.tell(now, round(1));
        let old = decode(one.send(now).expect("a message"));
        one.tell(now, round(2));
        let new = decode(one.send(now + SPACING).expect("a message"));
        assert_eq!(two.receive(now, new), Some(State::default()));
        assert_eq!(two.receive(now, old), None);
        assert_eq!(two.theirs().round, 2);
    }

    #[test]
    fn a_peer_that_keeps_asking_gets_few_answers() {
        let start = Instant::now();
        let mut one = Exchange::new();
        let asking = CandidateMessage { want_acknowledgement: true, ..CandidateMessage::default() };
        let answers = (0..1000)
            .filter(|millis| {
                let now = start + Duration::from_millis(*millis);
                one.receive(now, asking.clone());
                one.send(now).is_some()
            })
            .count();
        assert_eq!(answers, 100);
    }
}
