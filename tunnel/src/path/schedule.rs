//! Policy of the controlling side: when the next round starts, and of which kind it is. Mechanism is elsewhere.

use std::time::{Duration, Instant};

/// How long to wait after one try that failed, two, and so on. A try is an ordinary round and a careful one right after it, each of
/// which lasts 0.6 to 5 s. The first few come soon, for what chance spoiled: a router that still knew a port of ours by an old
/// mapping, for example. Someone on the relay whose firewall opens moves up within some 15 s in the first minutes; later a
/// minute is the price of leaving a hopeless network alone.
const PATIENCE: [Duration; 14] = [
    Duration::ZERO,
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(8),
    Duration::from_secs(8),
    Duration::from_secs(8),
    Duration::from_secs(8),
    Duration::from_secs(8),
    Duration::from_secs(8),
    Duration::from_secs(8),
    Duration::from_secs(8),
    Duration::from_secs(15),
    Duration::from_secs(25),
    Duration::from_secs(45),
];
/// How long a path is left alone that was left for a better way, once, twice, and so on. It came up each time: it is not for
/// want of a path that this takes longer.
const POOR_PATIENCE: [Duration; 5] = [
    Duration::from_secs(15),
    Duration::from_secs(60),
    Duration::from_secs(300),
    Duration::from_secs(900),
    Duration::from_secs(3600),
];
/// A path that comes and goes may fall so often; after each further fall it is left alone for so long. The relay is calmer.
const FALLS: usize = 3;
const FALLS_PATIENCE: [Duration; 3] =
    [Duration::from_secs(15), Duration::from_secs(30), Duration::from_secs(60)];
/// A path that lasted this long is none that comes and goes.
const STEADY_PATH: Duration = Duration::from_secs(600);
/// While a path is in use, a network that changes all the time is looked at no more often.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// How soon after a path came into use that may be a long way round another one is looked for.
const LOOK_LATER: Duration = Duration::from_secs(3);
/// A wait is longer by up to this part of itself, so that many sessions do not fall into step.
const JITTER_PARTS: u32 = 8;
/// A path that lasted this long was a good one: its loss says nothing about the next.
pub(super) const GOOD_PATH: Duration = Duration::from_secs(30);
/// A confirmed path that carries nothing after this time is a failure: QUIC did not get through.
const UNUSED: Duration = Duration::from_secs(15);

/// When rounds start.
pub(super) struct Schedule {
    state: State,
    /// How many tries have failed since one was good, or the network changed.
    failures: usize,
    /// The ordinary round of this try has failed.
    careful: bool,
    /// How often a path was left for a better way.
    left: usize,
    /// How often a path was lost after it was in use, since one was steady.
    falls: usize,
    /// When a new network was, or is to be, looked at last while a path was in use.
    looked: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting {
        until: Instant,
    },
    Running,
    Confirmed {
        at: Instant,
    },
    /// `look`: the network has changed, there may be a better one.
    InUse {
        since: Instant,
        look: Option<Instant>,
    },
}

/// What the time has brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    Round,
    /// The confirmed path has not come into use.
    Unused,
}

impl Schedule {
    /// The first round starts at once.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            state: State::Waiting { until: now },
            failures: 0,
            careful: false,
            left: 0,
            falls: 0,
            looked: None,
        }
    }

    /// When [`Self::poll`] has something to say.
    pub(super) fn due(&self) -> Option<Instant> {
        match self.state {
            State::Waiting { until } => Some(until),
            State::Confirmed { at } => Some(at + UNUSED),
            State::InUse { look, .. } => look,
            State::Running => None,
        }
    }

    pub(super) fn poll(&self, now: Instant) -> Option<Due> {
        self.due().filter(|due| *due <= now)?;
        Some(if matches!(self.state, State::Confirmed { .. }) { Due::Unused } else { Due::Round })
    }

    pub(super) fn started(&mut self) {
        match &mut self.state {
            State::InUse { look, .. } => *look = None,
            state => *state = State::Running,
        }
    }

    /// Means nothing while a path is in use: that is kept until the other one carries.
    pub(super) fn confirmed(&mut self, now: Instant) {
        if !matches!(self.state, State::InUse { .. }) {
            self.state = State::Confirmed { at: now };
        }
    }

    pub(super) fn in_use(&mut self, now: Instant) {
        // What has changed since the round began is still to be looked at.
        let look = if let State::InUse { look, .. } = self.state { look } else { None };
        self.state = State::InUse { since: now, look };
    }

    /// There may be a better path than the one in use.
    pub(super) fn look_later(&mut self, now: Instant) {
        if let State::InUse { look, .. } = &mut self.state {
            look.get_or_insert(now + LOOK_LATER);
        }
    }

    /// A path is in use.
    pub(super) fn is_in_use(&self) -> bool {
        matches!(self.state, State::InUse { .. })
    }

    /// The next round should be a careful one: it may find what the ordinary one could not. Not while a path is in use: it could
    /// not be compared on another socket.
    pub(super) fn is_careful(&self) -> bool {
        self.careful && !self.is_in_use()
    }

    /// A round found nothing, or what it found was no use. Means nothing while a path is in use.
    pub(super) fn failed(&mut self, now: Instant, jitter: u64) {
        match self.state {
            State::InUse { .. } => {}
            State::Running if !self.careful => {
                self.careful = true;
                self.state = State::Waiting { until: now };
            }
            _ => self.fail(now, jitter),
        }
    }

    /// The path is gone. A path that comes and goes is left alone for longer and longer. Means nothing
    /// while no path is known.
    pub(super) fn lost(&mut self, now: Instant, jitter: u64) {
        match self.state {
            State::InUse { since, .. } => {
                let lasted = now.saturating_duration_since(since);
                self.falls = if lasted >= STEADY_PATH { 1 } else { self.falls + 1 };
                if lasted >= GOOD_PATH {
                    self.begin_anew();
                    self.state = State::Waiting { until: now };
                } else {
                    self.fail(now, jitter);
                }
                if let (Some(more), State::Waiting { until }) =
                    (self.falls.checked_sub(FALLS + 1), &mut self.state)
                {
                    let patience = FALLS_PATIENCE[more.min(FALLS_PATIENCE.len() - 1)];
                    *until = later(now, patience, jitter).max(*until);
                }
            }
            State::Confirmed { .. } => self.fail(now, jitter),
            State::Waiting { .. } | State::Running => {}
        }
    }

    /// The path worked, and another way is better.
    pub(super) fn poor(&mut self, now: Instant, jitter: u64) {
        self.begin_anew();
        let patience = POOR_PATIENCE[self.left.min(POOR_PATIENCE.len() - 1)];
        self.left += 1;
        self.state = State::Waiting { until: later(now, patience, jitter) };
    }

    /// The peer was away: rounds without it say nothing.
    pub(super) fn peer_is_back(&mut self, now: Instant) {
        let has_failed = self.failures > 0 || self.careful;
        self.begin_anew();
        if let State::Waiting { until } = &mut self.state
            && has_failed
        {
            *until = now.min(*until);
        }
    }

    /// An end is on another network now: failures of the past mean nothing.
    pub(super) fn network_changed(&mut self, now: Instant) {
        (self.left, self.falls) = (0, 0);
        self.look_anew(now);
    }

    /// The peer says that its way to others is another one now, at the same addresses. Such a way may come and go as a path
    /// does: that is no reason to try sooner what was left or fell too often.
    pub(super) fn peer_moved(&mut self, now: Instant) {
        self.look_anew(now);
    }

    fn look_anew(&mut self, now: Instant) {
        self.begin_anew();
        let is_calm = self.left == 0 && self.falls <= FALLS;
        match &mut self.state {
            State::Waiting { until } if is_calm => *until = now.min(*until),
            State::InUse { look, .. } => {
                let soon = self.looked.map_or(now, |looked| now.max(looked + LOOK_AGAIN));
                self.looked = Some(*look.get_or_insert(soon));
            }
            State::Waiting { .. } | State::Running | State::Confirmed { .. } => {}
        }
    }

    /// What failed so far says nothing any more.
    fn begin_anew(&mut self) {
        (self.failures, self.careful) = (0, false);
    }

    fn fail(&mut self, now: Instant, jitter: u64) {
        self.failures += 1;
        self.careful = false;
        let patience = PATIENCE[self.failures.min(PATIENCE.len() - 1)];
        self.state = State::Waiting { until: later(now, patience, jitter) };
    }
}

fn later(now: Instant, patience: Duration, jitter: u64) -> Instant {
    now + patience + patience / JITTER_PARTS * (jitter % 1024) as u32 / 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUND: Duration = Duration::from_secs(5);

    /// The round finds a path, which comes into use.
    fn comes_up(schedule: &mut Schedule, now: Instant) {
        schedule.started();
        schedule.confirmed(now);
        schedule.in_use(now);
    }

    #[test]
    fn from_one_start_of_a_failing_round_to_the_next() {
        for jitter in [0, 500, 1023] {
            let start = Instant::now();
            let mut schedule = Schedule::new(start);
            let mut last = start;
            while last < start + Duration::from_secs(600) {
                let due = schedule.due().expect("it goes on for ever");
                let most = if due < start + Duration::from_secs(90) { 15 } else { 60 };
                assert!(due - last <= Duration::from_secs(most), "{:?} at {:?}", due - last, due - start);
                assert_eq!(schedule.poll(due), Some(Due::Round));
                schedule.started();
                assert_eq!(schedule.due(), None);
                schedule.failed(due + ROUND, jitter);
                last = due;
            }
        }
    }

    #[test]
    fn a_try_is_an_ordinary_round_and_a_careful_one() {
        let mut now = Instant::now();
        let mut schedule = Schedule::new(now);
        let mut rounds = Vec::new();
        for _ in 0..6 {
            let due = schedule.due().expect("another round");
            rounds.push(((due - now).as_secs(), schedule.is_careful()));
            schedule.started();
            schedule.failed(due, 0);
            now = due;
        }
        assert_eq!(rounds, [(0, false), (0, true), (1, false), (0, true), (3, false), (0, true)]);
        schedule.started();
        schedule.failed(now, 0);
        assert!(schedule.is_careful());
        schedule.network_changed(now);
        assert_eq!(schedule.due(), Some(now));
        assert!(!schedule.is_careful(), "the network is another one");
    }

    #[test]
    fn the_loss_of_a_good_path_is_answered_at_once() {
        let start = Instant::now();
        let mut schedule = Schedule::new(start);
        schedule.failed(start, 0);
        schedule.failed(start, 0);
        comes_up(&mut schedule, start);
        let end = start + GOOD_PATH;
        schedule.lost(end, 9);
        assert_eq!(schedule.poll(end), Some(Due::Round));
    }

    #[test]
    fn a_path_that_comes_and_goes_is_left_alone_for_longer_and_longer() {
        let mut now = Instant::now();
        let mut schedule = Schedule::new(now);
        let mut waits = Vec::new();
        for _ in 0..12 {
            comes_up(&mut schedule, now);
            now += Duration::from_secs(3);
            schedule.lost(now, 0);
            let due = schedule.due().expect("another round");
            waits.push((due - now).as_secs());
            now = due;
        }
        assert_eq!(waits, [1, 3, 8, 15, 30, 60, 60, 60, 60, 60, 60, 60]);
    }

    #[test]
    fn after_three_falls_it_is_left_alone_however_long_it_lasted() {
        let mut now = Instant::now();
        let mut schedule = Schedule::new(now);
        let mut fall = |lasts: Duration| {
            comes_up(&mut schedule, now);
            now += lasts;
            schedule.lost(now, 0);
            let due = schedule.due().expect("another round");
            let wait = (due - now).as_secs();
            now = due;
            wait
        };
        let waits: Vec<_> = (0..7).map(|_| fall(GOOD_PATH + ROUND)).collect();
        assert_eq!(waits, [0, 0, 0, 15, 30, 60, 60]);
        let waits: Vec<_> = [STEADY_PATH, GOOD_PATH, GOOD_PATH, GOOD_PATH].map(fall).into();
        assert_eq!(waits, [0, 0, 0, 15]);
    }

    #[test]
    fn a_confirmed_path_that_nobody_uses_is_a_failure() {
        let start = Instant::now();
        let mut schedule = Schedule::new(start);
        schedule.started();
        schedule.confirmed(start);
        assert_eq!(schedule.poll(start + UNUSED), Some(Due::Unused));
        schedule.failed(start + UNUSED, 0);
        assert_eq!(schedule.due(), Some(start + UNUSED + PATIENCE[1]));
    }

    #[test]
    fn a_path_that_was_left_is_tried_later_and_later() {
        let mut now = Instant::now();
        let mut schedule = Schedule::new(now);
        let mut waits = Vec::new();
        for _ in 0..6 {
            comes_up(&mut schedule, now);
            // Although it lasted.
            now += GOOD_PATH * 2;
            schedule.poor(now, 0);
            let due = schedule.due().expect("another round");
            waits.push((due - now).as_secs());
            now = due;
        }
        assert_eq!(waits, [15, 60, 300, 900, 3600, 3600]);
    }

    #[test]
    fn a_peer_that_moves_all_the_time_gets_no_more_tries() {
        let mut now = Instant::now();
        let mut schedule = Schedule::new(now);
        let mut waits = Vec::new();
        for _ in 0..6 {
            comes_up(&mut schedule, now);
            now += GOOD_PATH;
            schedule.lost(now, 0);
            schedule.peer_moved(now);
            let due = schedule.due().expect("another round");
            waits.push((due - now).as_secs());
            now = due;
        }
        assert_eq!(waits, [0, 0, 0, 15, 30, 60]);
    }

    #[test]
    fn another_network_another_try() {
        let start = Instant::now();
        let mut schedule = Schedule::new(start);
        (0..20).for_each(|_| schedule.failed(start, 0));
        assert_eq!(schedule.due(), Some(start + PATIENCE[PATIENCE.len() - 1]));
        schedule.network_changed(start);
        assert_eq!(schedule.due(), Some(start));
    }

    #[test]
    fn what_is_looked_for_while_a_path_is_in_use_is_compared_with_it() {
        let start = Instant::now();
        let mut schedule = Schedule::new(start);
        schedule.started();
        schedule.failed(start, 0);
        assert!(schedule.is_careful());
        comes_up(&mut schedule, start);
        schedule.look_later(start);
        assert_eq!(schedule.poll(start + LOOK_LATER), Some(Due::Round));
        assert!(!schedule.is_careful(), "another socket");
    }

    #[test]
    fn another_network_is_looked_at_while_the_path_is_kept() {
        let start = Instant::now();
        let mut schedule = Schedule::new(start);
        schedule.in_use(start);
        assert_eq!(schedule.due(), None);
        schedule.network_changed(start);
        assert_eq!(schedule.poll(start), Some(Due::Round));
        schedule.started();
        assert_eq!(schedule.due(), None);
        // It comes and goes.
        schedule.network_changed(start);
        schedule.network_changed(start + ROUND);
        assert_eq!(schedule.due(), Some(start + LOOK_AGAIN));
        schedule.started();
        schedule.confirmed(start + LOOK_AGAIN);
        schedule.failed(start + LOOK_AGAIN, 0);
        assert_eq!(schedule.due(), None);
        schedule.lost(start + GOOD_PATH, 0);
        assert_eq!(schedule.poll(start + GOOD_PATH), Some(Due::Round));
    }
}
