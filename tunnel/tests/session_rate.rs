//! One bulk stream over a simulated line, in virtual time: the line must be full, and what stands in
//! the way of a keystroke must stay small.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use adit_protocol::SessionId;
use adit_tunnel::session::*;
use bytes::Bytes;

/// One direction of a line with a first-in, first-out buffer of any size.
struct Line {
    bytes_per_second: f64,
    delay: Duration,
    free_at: Instant,
    on_the_way: VecDeque<(Instant, Bytes)>,
    longest_queue: Duration,
}

impl Line {
    fn send(&mut self, now: Instant, bytes: Bytes) {
        let start = self.free_at.max(now);
        self.longest_queue = self.longest_queue.max(start - now);
        self.free_at = start + Duration::from_secs_f64(bytes.len() as f64 / self.bytes_per_second);
        self.on_the_way.push_back((self.free_at + self.delay, bytes));
    }
}

/// Megabits a second of each stream in the last half of `seconds`, and the longest queue in front of the line. They begin
/// one after the other in the first quarter.
fn bulk(megabits: f64, one_way: Duration, seconds: f64, streams: u32) -> (Vec<f64>, Duration) {
    let start = Instant::now();
    let (mut now, end) = (start, start + Duration::from_secs_f64(seconds));
    let id = SessionId([1; 16]);
    let mut ends = [
        Session::new(End::Technician, id, 1, Config::default()),
        Session::new(End::Agent, id, 2, Config::default()),
    ];
    let ids = [0, 1].map(|end: usize| ends[end].attach(now, CarrierKind::Relay));
    let line = || Line {
        bytes_per_second: megabits * 1e6 / 8.0,
        delay: one_way,
        free_at: start,
        on_the_way: VecDeque::new(),
        longest_queue: Duration::ZERO,
    };
    // By the end that they lead to.
    let mut lines = [line(), line()];
    let mut open: Vec<StreamId> = Vec::new();
    let (mut halfway, mut received) = (None, vec![0u64; streams as usize]);
    while now < end {
        let due = start + Duration::from_secs_f64(seconds / 4.0) * open.len() as u32 / streams;
        if open.len() < streams as usize && now >= due {
            open.push(ends[0].open("127.0.0.1:1".parse().expect("a target")).expect("opens"));
        }
        for this in 0..2 {
            while let Some(event) = ends[this].poll_event() {
                match event {
                    Event::Incoming { stream, .. } => ends[this].accept(stream).expect("it is there"),
                    Event::Lost { .. } | Event::Closed { .. } => panic!("{event:?}"),
                    _ => {}
                }
            }
            for (number, stream) in open.iter().enumerate() {
                if this == 0 {
                    let room = ends[0].writable(*stream).expect("it lives");
                    if room > 0 {
                        ends[0].write(*stream, Bytes::from(vec![0; room.min(256 * 1024)])).expect("it lives");
                    }
                } else {
                    while let Ok(Some(bytes)) = ends[1].read(now, *stream, usize::MAX) {
                        received[number] += bytes.len() as u64;
                    }
                }
            }
            ends[this].take_wakes();
            // The kernel takes a little; what is longer waits in the engine, where it can be overtaken.
            while let Some(transmit) = ends[this].poll_transmit(now, ids[this], Lane::Control) {
                for bytes in [transmit.head, transmit.payload] {
                    lines[1 - this].send(now, bytes);
                }
            }
        }
        if halfway.is_none() && now >= start + Duration::from_secs_f64(seconds / 2.0) {
            halfway = Some((now, received.clone()));
        }
        let arrivals = lines.iter().filter_map(|line| line.on_the_way.front().map(|(at, _)| *at));
        let timers = ends.iter().filter_map(Session::poll_timeout);
        now = arrivals.chain(timers).min().expect("something always happens").max(now);
        for this in 0..2 {
            while lines[this].on_the_way.front().is_some_and(|(at, _)| *at <= now) {
                let (_, bytes) = lines[this].on_the_way.pop_front().expect("just seen");
                ends[this].receive(now, ids[this], Lane::Control, bytes).expect("both behave");
            }
            if ends[this].poll_timeout().is_some_and(|at| at <= now) {
                ends[this].handle_timeout(now);
            }
        }
    }
    let (since, before) = halfway.expect("long enough");
    let rate = |bytes: u64| bytes as f64 * 8.0 / 1e6 / (now - since).as_secs_f64();
    let rates = received.iter().zip(before).map(|(after, before)| rate(after - before)).collect();
    (rates, lines[1].longest_queue)
}

#[test]
fn lines_are_full_and_queues_are_short() {
    let ms = Duration::from_millis;
    let micros = Duration::from_micros;
    // Megabits a second, one-way delay, seconds; longest wait of a keystroke.
    let lines = [
        (20.0, ms(10), 4.0, ms(80)),
        (100.0, ms(20), 4.0, ms(80)),
        (100.0, micros(100), 2.0, ms(30)),
        (1_000.0, ms(5), 1.0, ms(30)),
        (5_000.0, micros(50), 0.4, ms(30)),
    ];
    for (megabits, one_way, seconds, most) in lines {
        let (rates, queue) = bulk(megabits, one_way, seconds, 1);
        let rate = rates[0];
        println!("{megabits} Mbit/s, {one_way:?} one way: {rate:.0} Mbit/s, longest queue {queue:?}");
        assert!(rate > 0.9 * megabits, "only {rate:.0} of {megabits} Mbit/s");
        assert!(queue < most, "{queue:?} in front of a line of {megabits} Mbit/s");
    }
}

/// Who comes first may have the whole budget, and gives it back.
#[test]
fn streams_share_a_line() {
    for (megabits, one_way) in [(100.0, Duration::from_millis(20)), (2_000.0, Duration::from_millis(20))] {
        let (mut rates, _) = bulk(megabits, one_way, 4.0, 64);
        rates.sort_by(f64::total_cmp);
        let (slowest, fastest, sum) = (rates[0], rates[63], rates.iter().sum::<f64>());
        println!("{megabits} Mbit/s, 64 streams: {slowest:.2} to {fastest:.2}, {sum:.0} in all");
        assert!(sum > 0.9 * megabits, "{sum:.0} of {megabits} Mbit/s");
        assert!(slowest > 0.7 * fastest, "{slowest:.2} beside {fastest:.2} Mbit/s");
    }
}
