//! Two ends of a session in virtual time, driven at random, against a model.
//!
//! The network between them carries bytes in pieces of any size. Carriers die at any byte, one end
//! notices before the other, bytes arrive late, several carriers are attached at once, and some go
//! silent. After every step the model compares what was read, offset by offset, with what was written,
//! and the memory held with its bound. At the end of each case one good carrier must bring everything
//! that is missing.
//!
//! `PROPTEST_CASES=5000 cargo test -p adit-tunnel --test session_model` runs more of it.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use adit_protocol::SessionId;
use adit_tunnel::session::*;
use bytes::Bytes;
use proptest::prelude::*;
use proptest::test_runner::{Config as ProptestConfig, FileFailurePersistence};
use proptest_state_machine::{ReferenceStateMachine, StateMachineTest, prop_state_machine};

/// Small, so that limits are met often: eight streams, and a little room for windows to grow.
const BUDGET: u64 = 8 * INITIAL_WINDOW + 256 * 1024;
const MAX_STREAMS: usize = 8;
const STEPS: usize = 250;

prop_state_machine! {
    #![proptest_config(config())]
    /// 420 cases of 250 steps: more than 100,000 steps.
    #[test]
    fn every_byte_arrives_once_and_in_order(sequential STEPS => World);
}

fn config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(420);
    let persistence = FileFailurePersistence::WithSource("regressions");
    ProptestConfig {
        cases,
        max_shrink_iters: 20_000,
        failure_persistence: Some(Box::new(persistence)),
        ..ProptestConfig::default()
    }
}

#[derive(Debug, Clone)]
enum Step {
    Attach(CarrierKind),
    /// Bytes of one direction of one carrier arrive, cut in pieces.
    Deliver {
        carrier: usize,
        to: usize,
        pieces: Vec<usize>,
    },
    DeliverAll,
    /// The transport dies after so many more bytes in each direction; `first` notices at once.
    Kill {
        carrier: usize,
        more: [usize; 2],
        first: usize,
    },
    /// The other end notices, too.
    Notice {
        carrier: usize,
    },
    /// Nothing passes any more, and nobody is told.
    BlackHole {
        carrier: usize,
    },
    Open {
        udp: bool,
    },
    Accept {
        stream: usize,
    },
    Write {
        end: usize,
        stream: usize,
        bytes: usize,
    },
    Finish {
        end: usize,
        stream: usize,
    },
    Read {
        end: usize,
        stream: usize,
        max: usize,
    },
    Reset {
        end: usize,
        stream: usize,
    },
    Datagram {
        end: usize,
        stream: usize,
        bytes: usize,
    },
    Message {
        end: usize,
    },
    Advance {
        millis: u64,
    },
}

/// Steps name streams and carriers by an index that is taken modulo how many there are.
struct Steps;

impl ReferenceStateMachine for Steps {
    type State = ();
    type Transition = Step;

    fn init_state() -> BoxedStrategy<()> {
        Just(()).boxed()
    }

    fn transitions((): &()) -> BoxedStrategy<Step> {
        let (index, end) = (0usize..16, 0usize..2);
        let kind = prop_oneof![Just(CarrierKind::Relay), Just(CarrierKind::Quic), Just(CarrierKind::Tcp)];
        let size = prop_oneof![1usize..100, 100usize..5_000, 5_000usize..90_000];
        let piece = prop_oneof![1usize..40, 40usize..3_000, 3_000usize..100_000];
        let pieces = prop::collection::vec(piece, 1..6);
        prop_oneof![
            3 => kind.prop_map(Step::Attach),
            24 => (index.clone(), end.clone(), pieces)
                .prop_map(|(carrier, to, pieces)| Step::Deliver { carrier, to, pieces }),
            5 => Just(Step::DeliverAll),
            2 => (index.clone(), prop::array::uniform2(size.clone()), end.clone())
                .prop_map(|(carrier, more, first)| Step::Kill { carrier, more, first }),
            2 => index.clone().prop_map(|carrier| Step::Notice { carrier }),
            1 => index.clone().prop_map(|carrier| Step::BlackHole { carrier }),
            4 => prop::bool::weighted(0.2).prop_map(|udp| Step::Open { udp }),
            4 => index.clone().prop_map(|stream| Step::Accept { stream }),
            14 => (end.clone(), index.clone(), size.clone())
                .prop_map(|(end, stream, bytes)| Step::Write { end, stream, bytes }),
            3 => (end.clone(), index.clone()).prop_map(|(end, stream)| Step::Finish { end, stream }),
            14 => (end.clone(), index.clone(), size)
                .prop_map(|(end, stream, max)| Step::Read { end, stream, max }),
            1 => (end.clone(), index.clone()).prop_map(|(end, stream)| Step::Reset { end, stream }),
            1 => (end.clone(), index, 0usize..3_000)
                .prop_map(|(end, stream, bytes)| Step::Datagram { end, stream, bytes }),
            1 => end.prop_map(|end| Step::Message { end }),
            8 => prop_oneof![1u64..40, 40u64..1_000, 1_000u64..12_000]
                .prop_map(|millis| Step::Advance { millis }),
        ]
        .boxed()
    }

    fn apply((): (), _: &Step) {}
}

/// What one end wrote on one stream, and what the other has read of it.
#[derive(Debug, Default, Clone)]
struct Direction {
    written: u64,
    finished: bool,
    read: u64,
    ended: bool,
}

#[derive(Debug, Default)]
struct StreamModel {
    udp: bool,
    known_to_agent: bool,
    accepted: bool,
    /// By the end that writes.
    directions: [Direction; 2],
    /// Somebody reset it: no promise any more but order and content.
    reset: bool,
}

/// One transport between the two ends.
struct Link {
    kind: CarrierKind,
    ids: [CarrierId; 2],
    attached: [bool; 2],
    /// The end has said that others than the control lane may be handed in.
    ready: [bool; 2],
    passes: bool,
    /// On the way to each end, by lane.
    queues: [BTreeMap<Option<u64>, VecDeque<Bytes>>; 2],
}

struct World {
    now: Instant,
    ends: [Session; 2],
    links: Vec<Link>,
    streams: BTreeMap<u64, StreamModel>,
    order: Vec<u64>,
    messages: [u64; 2],
    last_message: [u64; 2],
}

impl StateMachineTest for World {
    type SystemUnderTest = Self;
    type Reference = Steps;

    fn init_test((): &()) -> Self {
        let config = Config { budget: BUDGET, max_streams: MAX_STREAMS };
        let id = SessionId([7; 16]);
        Self {
            now: Instant::now(),
            ends: [
                Session::new(End::Technician, id, 11, config.clone()),
                Session::new(End::Agent, id, 22, config),
            ],
            links: Vec::new(),
            streams: BTreeMap::new(),
            order: Vec::new(),
            messages: [0; 2],
            last_message: [0; 2],
        }
    }

    fn apply(mut world: Self, (): &(), step: Step) -> Self {
        world.step(step);
        world.settle();
        world.check();
        world
    }

    fn teardown(mut world: Self, (): ()) {
        world.recover();
    }
}

impl World {
    fn step(&mut self, step: Step) {
        match step {
            Step::Attach(kind) => self.attach(kind),
            Step::Deliver { carrier, to, pieces } => {
                if let Some(link) = self.pick_link(carrier) {
                    pieces.into_iter().for_each(|piece| self.deliver(link, to, piece));
                }
            }
            Step::DeliverAll => self.deliver_all(),
            Step::Kill { carrier, more, first } => {
                if let Some(link) = self.pick_link(carrier) {
                    (0..2).for_each(|to| self.deliver(link, to, more[to]));
                    self.links[link].passes = false;
                    self.detach(link, first);
                }
            }
            Step::Notice { carrier } => {
                let dead: Vec<_> = (0..self.links.len())
                    .filter(|l| self.links[*l].attached[0] != self.links[*l].attached[1])
                    .collect();
                if let Some(&link) = dead.get(carrier % dead.len().max(1)) {
                    // What was still on the way comes late, but it comes.
                    self.links[link].passes = true;
                    (0..2).for_each(|to| self.deliver(link, to, 2_000));
                    (0..2).for_each(|end| self.detach(link, end));
                }
            }
            Step::BlackHole { carrier } => {
                if let Some(link) = self.pick_link(carrier) {
                    self.links[link].passes = false;
                }
            }
            Step::Open { udp } => {
                let target = if udp { "127.0.0.1:53/udp" } else { "127.0.0.1:22" };
                match self.ends[0].open(target.parse().expect("a target")) {
                    Ok(id) => {
                        self.streams.insert(id.0, StreamModel { udp, ..StreamModel::default() });
                        self.order.push(id.0);
                    }
                    Err(error) => assert_eq!(error, OpenError::Full),
                }
            }
            Step::Accept { stream } => {
                if let Some(id) = self.pick_stream(stream)
                    && self.streams[&id].known_to_agent
                    && self.ends[1].accept(StreamId(id)).is_ok()
                {
                    self.model(id).accepted = true;
                }
            }
            Step::Write { end, stream, bytes } => {
                if let Some(id) = self.pick_stream(stream) {
                    self.write(end, id, bytes);
                }
            }
            Step::Finish { end, stream } => {
                if let Some(id) = self.pick_stream(stream)
                    && !self.streams[&id].udp
                    && (end == 0 || self.streams[&id].accepted)
                    && self.ends[end].finish(StreamId(id)).is_ok()
                {
                    self.model(id).directions[end].finished = true;
                }
            }
            Step::Read { end, stream, max } => {
                if let Some(id) = self.pick_stream(stream) {
                    self.read(end, id, max);
                }
            }
            Step::Reset { end, stream } => {
                if let Some(id) = self.pick_stream(stream)
                    && (end == 0 || self.streams[&id].known_to_agent)
                {
                    self.ends[end].reset(StreamId(id), adit_protocol::frame::ResetCode::Aborted);
                    self.model(id).reset = true;
                }
            }
            Step::Datagram { end, stream, bytes } => {
                if let Some(id) = self.pick_stream(stream)
                    && self.streams[&id].udp
                {
                    let _ = self.ends[end].send_datagram(StreamId(id), Bytes::from(vec![id as u8; bytes]));
                }
            }
            Step::Message { end } => {
                self.messages[end] += 1;
                let text = self.messages[end].to_be_bytes();
                self.ends[end].send_message(Bytes::copy_from_slice(&text));
            }
            Step::Advance { millis } => self.advance(Duration::from_millis(millis)),
        }
    }

    fn attach(&mut self, kind: CarrierKind) {
        if self.links.iter().filter(|l| l.attached != [false, false]).count() < 4 {
            let ids = [0, 1].map(|end| self.ends[end].attach(self.now, kind));
            if kind.is_multiplexed() {
                (0..2).for_each(|end| self.ends[end].set_datagram_limit(ids[end], 1_200));
            }
            let (attached, ready, queues) = ([true; 2], [false; 2], Default::default());
            self.links.push(Link { kind, ids, attached, ready, passes: true, queues });
        }
    }

    fn detach(&mut self, link: usize, end: usize) {
        let link = &mut self.links[link];
        if std::mem::take(&mut link.attached[end]) {
            link.queues[end].clear();
            self.ends[end].detach(self.now, link.ids[end]);
        }
    }

    /// Up to `bytes` of what is on the way to an end arrive, in one piece.
    fn deliver(&mut self, link: usize, to: usize, bytes: usize) {
        let link = &mut self.links[link];
        if !link.attached[to] || !link.passes {
            return;
        }
        // Lanes overtake each other, but nothing overtakes the hello.
        let lanes: Vec<_> =
            link.queues[to].iter().filter(|(_, q)| !q.is_empty()).map(|(lane, _)| *lane).collect();
        let lanes: Vec<_> = lanes.into_iter().filter(|lane| lane.is_none() || link.ready[to]).collect();
        if lanes.is_empty() {
            return;
        }
        let lane = lanes[bytes % lanes.len()];
        let queue = link.queues[to].get_mut(&lane).expect("listed");
        let mut piece = queue.pop_front().expect("not empty");
        if piece.len() > bytes {
            queue.push_front(piece.split_off(bytes));
        }
        let id = link.ids[to];
        let lane = lane.map_or(Lane::Control, |n| Lane::Data(n + 100));
        self.ends[to].receive(self.now, id, lane, piece).expect("both ends behave");
        self.settle();
    }

    fn deliver_all(&mut self) {
        for _ in 0..10_000 {
            let before = self.on_the_way();
            for link in 0..self.links.len() {
                (0..2).for_each(|to| self.deliver(link, to, 60_000));
            }
            if self.on_the_way() == 0 || (before == self.on_the_way() && before == 0) {
                return;
            }
        }
    }

    fn on_the_way(&self) -> usize {
        let passing = self.links.iter().filter(|l| l.passes);
        passing
            .flat_map(|l| (0..2).filter(|to| l.attached[*to]).flat_map(|to| l.queues[to].values().flatten()))
            .map(Bytes::len)
            .sum()
    }

    fn write(&mut self, end: usize, id: u64, bytes: usize) {
        let model = &self.streams[&id];
        if model.udp || model.directions[end].finished || (end == 1 && !model.accepted) {
            return;
        }
        let Ok(room) = self.ends[end].writable(StreamId(id)) else { return };
        let start = model.directions[end].written;
        let bytes: Vec<u8> = (start..start + bytes.min(room) as u64).map(|n| pattern(id, end, n)).collect();
        self.model(id).directions[end].written += bytes.len() as u64;
        self.ends[end].write(StreamId(id), Bytes::from(bytes)).expect("it was writable");
    }

    fn read(&mut self, end: usize, id: u64, max: usize) {
        let now = self.now;
        let Ok(Some(bytes)) = self.ends[end].read(now, StreamId(id), max) else { return };
        let from = 1 - end;
        let direction = &mut self.model(id).directions[from];
        if bytes.is_empty() {
            assert!(direction.finished && direction.read == direction.written, "an end before its time");
            direction.ended = true;
        }
        assert!(direction.read + bytes.len() as u64 <= direction.written, "bytes that nobody wrote");
        let start = direction.read;
        direction.read += bytes.len() as u64;
        for (n, byte) in (start..).zip(&bytes) {
            assert_eq!(*byte, pattern(id, from, n), "stream {id}, from end {from}, offset {n}");
        }
    }

    fn advance(&mut self, time: Duration) {
        let until = self.now + time;
        for _ in 0..20_000 {
            let due = self.ends.iter().filter_map(Session::poll_timeout).min();
            let Some(due) = due.filter(|due| *due <= until) else { break };
            self.now = self.now.max(due);
            for end in &mut self.ends {
                if end.poll_timeout().is_some_and(|at| at <= self.now) {
                    end.handle_timeout(self.now);
                }
            }
            self.settle();
        }
        assert!(
            self.ends.iter().filter_map(Session::poll_timeout).all(|at| at > until),
            "a timer that never rests"
        );
        self.now = until;
    }

    /// Takes every effect of both engines.
    fn settle(&mut self) {
        for end in 0..2 {
            while let Some(event) = self.ends[end].poll_event() {
                self.on_event(end, event);
            }
            for id in self.ends[end].take_wakes() {
                self.transmit(end, id);
            }
            while let Some(event) = self.ends[end].poll_event() {
                self.on_event(end, event);
            }
        }
    }

    fn transmit(&mut self, end: usize, id: CarrierId) {
        let Some(link) = self.links.iter_mut().find(|l| l.ids[end] == id) else { return };
        let mut out: Vec<(Option<u64>, Transmit)> = Vec::new();
        let session = &mut self.ends[end];
        while let Some(transmit) = session.poll_transmit(self.now, id, Lane::Control) {
            out.push((None, transmit));
        }
        if link.kind.is_multiplexed() {
            while let Some(stream) = session.poll_lane(id) {
                while let Some(transmit) = session.poll_transmit(self.now, id, Lane::Data(stream.0)) {
                    out.push((Some(stream.0), transmit));
                }
            }
            while let Some(datagram) = session.poll_datagram(id) {
                assert!(datagram.len() <= 1_200);
            }
        }
        if link.attached[1 - end] {
            for (lane, transmit) in out {
                let queue = link.queues[1 - end].entry(lane).or_default();
                queue.extend([transmit.head, transmit.payload].into_iter().filter(|b| !b.is_empty()));
            }
        }
    }

    fn on_event(&mut self, end: usize, event: Event) {
        match event {
            Event::Incoming { stream, .. } => {
                assert!(!self.streams[&stream.0].known_to_agent, "a stream is announced once");
                self.model(stream.0).known_to_agent = true;
            }
            Event::Ready(id) => {
                if let Some(link) = self.links.iter_mut().find(|l| l.ids[end] == id) {
                    link.ready[end] = true;
                }
            }
            Event::Lost { carrier, .. } => {
                let link = self.links.iter().position(|l| l.ids[end] == carrier).expect("known");
                self.links[link].attached[end] = false;
                self.links[link].queues[end].clear();
                self.links[link].passes = false;
            }
            Event::Reset { stream, .. } => {
                assert!(self.streams[&stream.0].reset, "nobody reset stream {}", stream.0);
            }
            Event::Finished(stream) => {
                let model = &self.streams[&stream.0];
                let other = &model.directions[1 - end];
                assert!(
                    model.reset || (other.finished && other.read == other.written),
                    "forgotten too early"
                );
                self.model(stream.0).directions[1 - end].ended = true;
            }
            Event::Message(bytes) => {
                let number = u64::from_be_bytes(bytes[..].try_into().expect("eight bytes"));
                assert!(number <= self.messages[1 - end]);
                self.last_message[end] = self.last_message[end].max(number);
            }
            Event::Closed { reason } => panic!("closed: {reason}"),
            _ => {}
        }
    }

    fn check(&self) {
        for end in &self.ends {
            let (retained, buffered) = end.memory();
            assert!(retained <= BUDGET, "{retained} bytes retained");
            assert!(buffered <= BUDGET, "{buffered} bytes buffered");
            assert!(end.stream_count() <= 4 * MAX_STREAMS);
        }
    }

    /// One good carrier, and everything that was promised must come true.
    fn recover(&mut self) {
        for link in 0..self.links.len() {
            (0..2).for_each(|end| self.detach(link, end));
        }
        self.settle();
        self.links.clear();
        self.attach(CarrierKind::Relay);
        let ids = self.order.clone();
        for round in 0.. {
            assert!(round < 500, "does not come to rest: {:?} {:?}", self.unfinished(), self.ends);
            self.settle();
            self.deliver_all();
            for &id in &ids {
                if self.streams[&id].known_to_agent && self.ends[1].accept(StreamId(id)).is_ok() {
                    self.model(id).accepted = true;
                }
                for end in 0..2 {
                    if !self.streams[&id].udp
                        && !self.streams[&id].directions[end].finished
                        && (end == 0 || self.streams[&id].accepted)
                        && self.ends[end].finish(StreamId(id)).is_ok()
                    {
                        self.model(id).directions[end].finished = true;
                    }
                    self.read(end, id, usize::MAX);
                }
            }
            self.advance(Duration::from_millis(30));
            self.check();
            let flows = self.streams.values().filter(|m| m.udp && !m.reset).count();
            let forgotten = self.ends.iter().all(|end| end.stream_count() <= flows);
            if self.unfinished().is_empty() && self.ends.iter().all(Session::is_drained) && forgotten {
                break;
            }
        }
        for end in 0..2 {
            assert_eq!(self.last_message[end], self.messages[1 - end], "the last message arrives");
        }
        self.ends.iter().for_each(|end| assert_eq!(end.memory(), (0, 0)));
    }

    fn unfinished(&self) -> Vec<(u64, &StreamModel)> {
        let open = |m: &StreamModel| {
            !m.udp && !m.reset && m.directions.iter().any(|d| !d.ended || d.read != d.written)
        };
        self.streams.iter().filter(|(_, m)| open(m)).map(|(id, m)| (*id, m)).collect()
    }

    fn model(&mut self, id: u64) -> &mut StreamModel {
        self.streams.get_mut(&id).expect("a stream of ours")
    }

    /// Mostly the newest ones: the oldest are long finished.
    fn pick_stream(&self, index: usize) -> Option<u64> {
        let recent = &self.order[self.order.len().saturating_sub(12)..];
        recent.get(index % recent.len().max(1)).copied()
    }

    fn pick_link(&self, index: usize) -> Option<usize> {
        let alive: Vec<_> =
            (0..self.links.len()).filter(|l| self.links[*l].attached != [false, false]).collect();
        alive.get(index % alive.len().max(1)).copied()
    }
}

fn pattern(stream: u64, end: usize, offset: u64) -> u8 {
    (stream * 31 + end as u64 * 17 + offset * 7 + (offset >> 8)) as u8
}
