//! One carrier as the session sees it: liveness, round trip, delivery rate, what it has to say.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use adit_protocol::frame::Decoder;

use super::{CarrierKind, Lane};

/// Silence shorter than this is never held against a carrier.
const MIN_SILENCE: Duration = Duration::from_millis(500);
/// The same while no round trip has been measured.
const FIRST_SILENCE: Duration = Duration::from_millis(1500);
/// How long the other end's hello may take: its process may have much to do at that moment.
const HELLO: Duration = Duration::from_secs(5);
/// A carrier in use with traffic is probed this often, so that a path that died one way is noticed
/// by the end that only receives, too.
const PROBE_BUSY: Duration = Duration::from_millis(500);
/// The same without traffic for [`BUSY_FOR`]: keeps NAT mappings (RFC 4787 REQ-5: 2 minutes; many
/// home routers: 30 s) and notices a dead path before the user does.
const PROBE_IDLE: Duration = Duration::from_secs(5);
/// A carrier that stands by.
const PROBE_STANDBY: Duration = Duration::from_secs(10);
const BUSY_FOR: Duration = Duration::from_secs(2);
/// How long an acknowledgement of bytes may wait for more to acknowledge.
const ACK_DELAY: Duration = Duration::from_millis(5);
/// A timer this late was not late because of the network.
const OVERSLEPT: Duration = Duration::from_secs(1);
/// Between two acknowledgements that are not late.
const ACK_SPACING: Duration = Duration::from_millis(1);
const ACK_BYTES: u64 = 32 * 1024;
/// What may be on the way before anything is known of the line, and at least.
const MIN_FLIGHT: u64 = 128 * 1024;
/// What may be on the way before the other end has said hello: a request, a banner.
const FIRST_WORDS: u64 = 16 * 1024;
/// A delivery rate is taken over at least this long, and over a round trip, so that one burst is not taken
/// for a rate.
const RATE_SAMPLE: Duration = Duration::from_millis(10);
/// How many samples the largest rate is taken over.
const RATE_SAMPLES: usize = 10;

#[derive(Debug)]
pub(super) struct Carrier {
    pub(super) kind: CarrierKind,
    pub(super) hello_sent: bool,
    pub(super) hello_received: bool,
    pub(super) goodbye_sent: bool,
    pub(super) decoders: HashMap<Lane, Decoder>,
    /// To be answered; the newest one stands for all before it.
    pub(super) pong: Option<u64>,
    /// To be sent.
    pub(super) ping: bool,
    pub(super) nominate: Option<u64>,
    pub(super) ack_due: bool,
    pub(super) silent: bool,
    /// Largest transport datagram; 0: there are none.
    pub(super) datagram_limit: usize,
    /// All bytes handed out for this carrier, and of those the ones up to the last that wants an answer.
    pub(super) sent: u64,
    eliciting: u64,
    /// What the peer says has arrived.
    pub(super) acked: u64,
    pub(super) received: u64,
    told_received: u64,
    unacked: u64,
    last_ack: Option<Instant>,
    ack_at: Option<Instant>,
    last_heard: Instant,
    outstanding: Option<Instant>,
    ping_number: u64,
    /// When the probe that is unanswered was sent.
    pinged: Option<Instant>,
    probe_at: Option<Instant>,
    busy_until: Instant,
    rtt: Option<Rtt>,
    rate: Rate,
}

#[derive(Debug, Clone, Copy)]
struct Rtt {
    smoothed: Duration,
    variance: Duration,
    min: Duration,
}

/// Bytes a second that the line has delivered.
#[derive(Debug, Default)]
struct Rate {
    samples: VecDeque<u64>,
    start: Option<(Instant, u64)>,
}

impl Carrier {
    pub(super) fn new(now: Instant, kind: CarrierKind) -> Self {
        Self {
            kind,
            hello_sent: false,
            hello_received: false,
            goodbye_sent: false,
            decoders: HashMap::new(),
            pong: None,
            ping: false,
            nominate: None,
            ack_due: false,
            silent: false,
            datagram_limit: 0,
            sent: 0,
            eliciting: 0,
            acked: 0,
            received: 0,
            told_received: 0,
            unacked: 0,
            last_ack: None,
            ack_at: None,
            last_heard: now,
            // The other end's hello.
            outstanding: Some(now),
            ping_number: 0,
            pinged: None,
            probe_at: None,
            busy_until: now,
            rtt: None,
            rate: Rate::default(),
        }
    }

    /// How many more bytes may be on the way. Two delivery rates x round trips keep a line full and a
    /// keystroke in front; QUIC's own congestion control does the same.
    pub(super) fn room(&self) -> u64 {
        if self.kind.is_multiplexed() {
            return u64::MAX;
        }
        if !self.hello_received {
            return FIRST_WORDS.saturating_sub(self.sent);
        }
        let round_trip = self.rtt.map_or(Duration::ZERO, |rtt| rtt.min);
        // Twice the time until an acknowledgement is back, so that what is measured can grow.
        let time = 2 * (round_trip + ACK_DELAY);
        let flight = (self.rate.max() as u128 * time.as_micros() / 1_000_000) as u64;
        flight.max(MIN_FLIGHT).saturating_sub(self.sent.saturating_sub(self.acked))
    }

    pub(super) fn smoothed_rtt(&self) -> Option<Duration> {
        self.rtt.map(|rtt| rtt.smoothed)
    }

    pub(super) fn on_sent(&mut self, now: Instant, bytes: usize, wants_answer: bool) {
        self.sent += bytes as u64;
        if wants_answer {
            self.eliciting = self.sent;
            self.outstanding.get_or_insert(now);
            self.busy(now);
        }
    }

    pub(super) fn on_heard(&mut self, now: Instant, bytes: usize) {
        self.received += bytes as u64;
        self.last_heard = now;
        self.silent = false;
        self.rest(now);
    }

    /// Something arrived that the peer wants acknowledged.
    pub(super) fn on_eliciting(&mut self, now: Instant, bytes: usize) {
        self.busy(now);
        self.unacked += bytes as u64;
        let spaced_at = self.last_ack.map_or(now, |at| at + ACK_SPACING);
        // A multiplexed carrier's own transport paces it: there this only tells life from silence.
        if self.unacked < ACK_BYTES || self.kind.is_multiplexed() {
            self.ack_at.get_or_insert(now + ACK_DELAY);
        } else if spaced_at <= now {
            self.ack_due = true;
        } else {
            self.ack_at = Some(self.ack_at.map_or(spaced_at, |at| at.min(spaced_at)));
        }
    }

    /// The value for an acknowledgement that is sent now.
    pub(super) fn take_ack(&mut self, now: Instant) -> Option<u64> {
        let due = self.ack_due && self.told_received != self.received;
        self.ack_due = false;
        if due {
            (self.told_received, self.unacked) = (self.received, 0);
            (self.last_ack, self.ack_at) = (Some(now), None);
        }
        due.then_some(self.received)
    }

    /// # Errors
    /// When more is acknowledged than was sent.
    pub(super) fn on_ack(&mut self, now: Instant, received: u64) -> Result<(), ()> {
        if received > self.sent {
            return Err(());
        }
        let full = self.room() < MIN_FLIGHT / 2;
        self.acked = self.acked.max(received);
        let span = self.rtt.map_or(RATE_SAMPLE, |rtt| rtt.min.max(RATE_SAMPLE));
        self.rate.on_ack(now, self.acked, span, full);
        self.rest(now);
        Ok(())
    }

    /// The number for a probe that is sent now.
    pub(super) fn take_ping(&mut self, now: Instant) -> u64 {
        self.ping = false;
        self.ping_number += 1;
        self.pinged = Some(now);
        self.outstanding.get_or_insert(now);
        self.ping_number
    }

    pub(super) fn on_pong(&mut self, now: Instant, number: u64) {
        if let Some(at) = self.pinged.filter(|_| number == self.ping_number) {
            Rtt::sample(&mut self.rtt, now - at);
            self.pinged = None;
        }
        self.rest(now);
    }

    /// Probes the carrier soon: something makes its health doubtful.
    pub(super) fn probe_now(&mut self, now: Instant) {
        if self.pinged.is_none() {
            self.probe_at = Some(now);
        }
    }

    /// The session sends on this carrier from now on. A round trip is not measured before the other end is there.
    pub(super) fn first_probe(&mut self, now: Instant) {
        if self.hello_received {
            self.schedule_probe(now, true);
            self.probe_now(now);
        }
    }

    /// When the carrier is to be probed next.
    pub(super) fn schedule_probe(&mut self, now: Instant, in_use: bool) {
        let pause = match in_use {
            true if now < self.busy_until => PROBE_BUSY,
            true => PROBE_IDLE,
            false => PROBE_STANDBY,
        };
        self.probe_at = Some(self.probe_at.map_or(now + pause, |at| at.min(now + pause)));
    }

    /// The earliest thing that time alone will bring.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let ack_at = self.ack_at.filter(|_| !self.ack_due);
        let probe_at = self.probe_at.filter(|_| !self.ping);
        [ack_at, probe_at, self.silence_deadline()].into_iter().flatten().min()
    }

    /// Timers that are due. Returns how long nothing was heard when that is too long.
    pub(super) fn on_timeout(&mut self, now: Instant, in_use: bool) -> Option<Duration> {
        if self.ack_at.is_some_and(|at| at <= now) {
            self.ack_due = true;
            self.ack_at = None;
        }
        if self.probe_at.is_some_and(|at| at <= now) {
            // One probe at a time: without an answer, silence decides.
            self.ping |= self.pinged.is_none();
            self.probe_at = None;
            self.schedule_probe(now, in_use);
        }
        let deadline = self.silence_deadline().filter(|at| *at <= now)?;
        if now > deadline + OVERSLEPT {
            // This process did not run (suspended, starved): the answer may lie unread in a socket.
            self.outstanding = Some(now);
            return None;
        }
        self.silent = true;
        Some(now - self.last_heard)
    }

    /// When nothing was heard for too long with something outstanding.
    fn silence_deadline(&self) -> Option<Instant> {
        let patience = if !self.hello_received { HELLO } else { self.patience() };
        self.outstanding.filter(|_| !self.silent).map(|since| since.max(self.last_heard) + patience)
    }

    fn patience(&self) -> Duration {
        self.rtt.map_or(FIRST_SILENCE, |rtt| (rtt.smoothed + 4 * rtt.variance).max(MIN_SILENCE))
    }

    /// How long nothing was heard.
    pub(super) fn heard_ago(&self, now: Instant) -> Duration {
        now - self.last_heard
    }

    /// Something was heard: the clock of silence starts anew, or rests when nothing is outstanding.
    fn rest(&mut self, now: Instant) {
        let waiting = self.pinged.is_some() || self.acked < self.eliciting || !self.hello_received;
        self.outstanding = waiting.then_some(now);
    }

    fn busy(&mut self, now: Instant) {
        if now >= self.busy_until {
            // Traffic after a pause: do not wait out an idle carrier's probe interval.
            self.probe_at = self.probe_at.map(|at| at.min(now + PROBE_BUSY));
        }
        self.busy_until = now + BUSY_FOR;
    }
}

impl Rtt {
    /// RFC 6298 section 2, without the granularity term.
    fn sample(rtt: &mut Option<Self>, sample: Duration) {
        *rtt = Some(match *rtt {
            None => Self { smoothed: sample, variance: sample / 2, min: sample },
            Some(old) => Self {
                smoothed: (old.smoothed * 7 + sample) / 8,
                variance: (old.variance * 3 + old.smoothed.abs_diff(sample)) / 4,
                min: old.min.min(sample),
            },
        });
    }
}

impl Rate {
    fn max(&self) -> u64 {
        self.samples.iter().copied().max().unwrap_or(0)
    }

    /// `full`: the line was kept busy, so a low sample is the line's doing and not the application's.
    fn on_ack(&mut self, now: Instant, acked: u64, span: Duration, full: bool) {
        let Some((start, before)) = self.start else {
            self.start = Some((now, acked));
            return;
        };
        let elapsed = now - start;
        if elapsed < span {
            return;
        }
        self.start = Some((now, acked));
        let sample = (u128::from(acked - before) * 1_000_000 / elapsed.as_micros().max(1)) as u64;
        if full || sample > self.max() {
            self.samples.push_back(sample);
            if self.samples.len() > RATE_SAMPLES {
                self.samples.pop_front();
            }
        }
    }
}
