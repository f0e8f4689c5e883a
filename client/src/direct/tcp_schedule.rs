//! Policy: when direct TCP is dialled, and when it is left for QUIC.
//!
//! On the same network TCP is the better one and is dialled at once. Farther away it stands in for QUIC: dialled when there
//! has been none for [`BEFORE`], left when there is one again. What does not last, or fails, waits longer each time; and
//! whatever the peer says, attempts are [`SPACING`] apart.

use std::time::{Duration, Instant};

/// Direct TCP to a peer that is not near waits so long for QUIC, whose streams do not hold each other up.
const BEFORE: Duration = Duration::from_secs(2);
/// Between two attempts, at least.
const SPACING: Duration = Duration::from_secs(2);
/// The agent's attempts come so much later than the technician's: one of them is enough.
const AGENT: Duration = Duration::from_secs(1);
/// After QUIC was lost: perhaps the session is over.
const LOST: Duration = Duration::from_millis(250);
/// After an attempt that came to nothing, or a connection that did not last, the next one waits so long at first, and so long
/// in the end.
const PAUSE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));
/// A connection that lasted so long was a good one.
const GOOD: Duration = Duration::from_secs(30);
/// A connection to a peer that is not near is left when QUIC has been there for so long.
const LEAVE: Duration = Duration::from_secs(2);

/// When a session dials its peer by TCP.
#[derive(Debug)]
pub(super) struct TcpSchedule {
    is_agent: bool,
    due: Option<Instant>,
    last: Option<Instant>,
    pause: Duration,
    /// When QUIC came, or since when there has been none.
    quic: Result<Instant, Instant>,
    /// QUIC was left because the path loses too much: TCP would be no better there.
    is_poor: bool,
    stream: Option<Stream>,
}

#[derive(Debug, Clone, Copy)]
struct Stream {
    since: Instant,
    is_near: bool,
}

impl TcpSchedule {
    /// Nothing is due before the peer has said where it listens.
    pub(super) fn new(now: Instant, is_agent: bool) -> Self {
        Self { is_agent, due: None, last: None, pause: PAUSE.0, quic: Err(now), is_poor: false, stream: None }
    }

    /// When to dial next; not while there is a connection.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due.filter(|_| self.stream.is_none())
    }

    /// Dials now. Whether only a peer that is near is worth it.
    pub(super) fn start(&mut self, now: Instant) -> bool {
        self.due = None;
        self.last = Some(now);
        self.is_poor || self.quic.err().is_none_or(|since| now < since + BEFORE)
    }

    /// There is nowhere to dial, or an attempt is under way.
    pub(super) fn put_off(&mut self) {
        self.due = None;
    }

    /// The peer has named other addresses, or this end has a new network.
    pub(super) fn changed(&mut self, now: Instant) {
        self.soon(now);
    }

    /// A round of the path engine has found nothing.
    pub(super) fn lacking(&mut self, now: Instant) {
        if self.due.is_none() && self.quic.is_err() {
            self.due = Some(self.last.map_or(now, |last| now.max(last + self.pause)));
        }
    }

    /// The attempt found the peer, and it is not near.
    pub(super) fn far(&mut self, now: Instant) {
        // While there is QUIC, it does.
        if let Err(since) = self.quic
            && !self.is_poor
        {
            self.soon(now.max(since + BEFORE));
        }
    }

    /// The attempt came to nothing.
    pub(super) fn failed(&mut self, now: Instant) {
        if self.quic.is_err() {
            self.later(now);
        }
    }

    /// There is a connection.
    pub(super) fn connected(&mut self, now: Instant, is_near: bool) {
        self.stream = Some(Stream { since: now, is_near });
    }

    /// It has ended, or nothing is heard on it.
    pub(super) fn ended(&mut self, now: Instant) {
        let Some(stream) = self.stream.take() else { return };
        if now >= stream.since + GOOD {
            self.pause = PAUSE.0;
            self.soon(now);
        } else {
            self.later(now);
        }
    }

    /// QUIC is there.
    pub(super) fn quic_came(&mut self, now: Instant) {
        (self.quic, self.is_poor) = (Ok(now), false);
    }

    /// It is gone; `is_poor`: given up, because the path loses too much.
    pub(super) fn quic_lost(&mut self, now: Instant, is_poor: bool) {
        (self.quic, self.is_poor) = (Err(now), is_poor);
        self.soon(now + LOST);
    }

    /// When to leave the connection for QUIC.
    pub(super) fn leave_due(&self) -> Option<Instant> {
        let stream = self.stream.filter(|stream| !stream.is_near)?;
        Some(self.quic.ok()?.max(stream.since) + LEAVE)
    }

    fn soon(&mut self, at: Instant) {
        let at = if self.is_agent { at + AGENT } else { at };
        self.due = Some(self.last.map_or(at, |last| at.max(last + SPACING)));
    }

    fn later(&mut self, now: Instant) {
        self.due = Some(now + self.pause);
        self.pause = (2 * self.pause).min(PAUSE.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn near_at_once_and_far_when_quic_does_not_come() {
        let start = Instant::now();
        let mut schedule = TcpSchedule::new(start, false);
        assert_eq!(schedule.due(), None);
        schedule.changed(start);
        schedule.put_off();
        assert_eq!(schedule.due(), None);
        schedule.changed(start);
        assert_eq!(schedule.due(), Some(start), "what was not tried does not count");
        assert!(schedule.start(start), "only near");
        schedule.far(start);
        assert_eq!(schedule.due(), Some(start + BEFORE));
        assert!(!schedule.start(start + BEFORE), "any");
        schedule.connected(start + BEFORE, false);
        assert_eq!((schedule.due(), schedule.leave_due()), (None, None));
        // QUIC comes late, and takes its place back.
        schedule.quic_came(start + seconds(9));
        assert_eq!(schedule.leave_due(), Some(start + seconds(9) + LEAVE));
        schedule.ended(start + seconds(11));
        schedule.due = None;
        schedule.quic_lost(start + seconds(60), false);
        assert!(schedule.start(schedule.due().expect("soon")), "it waits for QUIC again");
    }

    #[test]
    fn with_quic_a_far_peer_is_let_alone() {
        let start = Instant::now();
        let mut schedule = TcpSchedule::new(start, false);
        schedule.quic_came(start);
        schedule.changed(start);
        assert!(schedule.start(start));
        schedule.far(start);
        schedule.lacking(start);
        assert_eq!(schedule.due(), None);
        // A near one stays.
        schedule.connected(start, true);
        assert_eq!(schedule.leave_due(), None);
    }

    #[test]
    fn whatever_the_peer_says_attempts_are_spaced() {
        let start = Instant::now();
        let mut schedule = TcpSchedule::new(start, true);
        let mut attempts = 0;
        for millis in (0..60_000).step_by(10) {
            let now = start + Duration::from_millis(millis);
            schedule.changed(now);
            if schedule.due().is_some_and(|due| due <= now) {
                schedule.start(now);
                attempts += 1;
            }
        }
        assert!(attempts <= 31, "{attempts} in a minute");
    }

    #[test]
    fn what_does_not_last_waits_longer_each_time() {
        let start = Instant::now();
        let mut schedule = TcpSchedule::new(start, false);
        schedule.changed(start);
        let (mut now, mut pauses) = (start, vec![]);
        for _ in 0..8 {
            let due = schedule.due().expect("another one");
            pauses.push((due - now).as_secs());
            now = due;
            schedule.start(now);
            schedule.connected(now, false);
            now += seconds(1);
            schedule.ended(now);
        }
        assert_eq!(pauses, [0, 5, 10, 20, 40, 80, 160, 300]);
        now = schedule.due().expect("another one");
        schedule.start(now);
        schedule.connected(now, false);
        now += GOOD;
        schedule.ended(now);
        assert_eq!(schedule.due(), Some(now));
    }

    #[test]
    fn a_path_that_loses_too_much_is_not_taken_by_tcp() {
        let start = Instant::now();
        let mut schedule = TcpSchedule::new(start, false);
        schedule.quic_came(start);
        schedule.quic_lost(start + seconds(10), true);
        let due = schedule.due().expect("the peer may be near");
        assert!(schedule.start(due + seconds(60)));
        schedule.far(due + seconds(60));
        assert_eq!(schedule.due(), None);
    }
}
