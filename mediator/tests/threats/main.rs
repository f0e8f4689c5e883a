//! What the program `adit-mediator` withstands: each test has the number of its row in SECURITY.md, asserts
//! the row's mark and prints what it measured. `ADIT_TEST_LONG=1` runs the full numbers.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod attack;
mod program;
mod reflection;
mod weak_tls;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use adit_client::identity::Identity;
use adit_protocol::token::EnrolmentToken;
use attack::{Attack, guess, junk, say, silent, sources};
use program::{Program, Times, logins};
use regex::Regex;
use tokio::task::JoinSet;

/// Times are measured here: one test at a time, also where one process runs them all.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The number of the long form, or of the short one.
fn scale<T>(long: T, short: T) -> T {
    if std::env::var_os("ADIT_TEST_LONG").is_some() { long } else { short }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// A login over a real line takes tens of milliseconds. On loopback it takes one, and twice that is one turn
/// of another process: below this, twice as long says nothing.
const SHORT: Duration = Duration::from_millis(10);

/// A device that logs in, and others that enrol.
struct Genuine {
    identity: Identity,
    token: EnrolmentToken,
    enrolled: u32,
}

/// How long logins and enrolments took, in quiet times and under an attack.
#[derive(Default)]
struct Measured {
    quiet: Times,
    under: Times,
    enrolments: Times,
    /// Of each attack.
    tries: Vec<u64>,
}

impl Genuine {
    fn new(program: &Program) -> Self {
        let token = block_on(program.token(100_000));
        let identity = block_on(program.enrol(&token, "genuine"));
        block_on(logins(&identity, 50));
        Self { identity, token, enrolled: 0 }
    }

    /// In rounds: quiet ones, and others while `attack` goes on.
    fn measure(
        &mut self,
        program: &Program,
        rounds: usize,
        mut attack: impl FnMut() -> Vec<Attack>,
    ) -> Measured {
        let mut measured = Measured::default();
        for _ in 0..rounds {
            measured.quiet.0.extend(self.logins(program, &mut Times::default()).0);
            let attacks = attack();
            // It has begun.
            program.until("the attacks to begin", || attacks.iter().all(|attack| attack.done.tries() >= 10));
            measured.under.0.extend(self.logins(program, &mut measured.enrolments).0);
            measured.tries.extend(attacks.into_iter().map(|attack| attack.end().tries()));
        }
        measured
    }

    /// Two seconds of logins, with an enrolment now and then.
    fn logins(&mut self, program: &Program, enrolments: &mut Times) -> Times {
        let (mut times, start) = (Times::default(), Instant::now());
        while start.elapsed() < Duration::from_secs(2) {
            times.0.extend(block_on(logins(&self.identity, 20)).0);
            self.enrolled += 1;
            let enrolling = Instant::now();
            block_on(program.enrol(&self.token, &format!("device-{}", self.enrolled)));
            enrolments.0.push(enrolling.elapsed());
            std::thread::sleep(Duration::from_millis(50));
        }
        times
    }
}

impl Measured {
    fn holds(&self) {
        println!(
            "  logins, quiet:        {}\n  logins, under attack: {}\n  enrolments:           {}",
            self.quiet, self.under, self.enrolments
        );
        assert!(self.under.max().max(self.enrolments.max()) <= Duration::from_secs(2));
        assert!(self.under.percentile(99) <= 2 * self.quiet.percentile(99).max(SHORT));
    }
}

/// At most one line a second of each kind, beside those about genuine devices; how many there are.
fn at_most_a_line_a_second(program: &Program, elapsed: Duration) -> usize {
    let mut kinds: HashMap<String, u64> = HashMap::new();
    for line in program.log() {
        if ["device is online", "channel is closed", " enrolled "]
            .iter()
            .any(|genuine| line.contains(genuine))
        {
            continue;
        }
        // Without the time, the address and the count.
        let (_, message) = line.split_once(char::is_whitespace).unwrap();
        let kind =
            message.split_once("refused from ").map_or(message, |(_, rest)| rest.split_once(": ").unwrap().1);
        *kinds.entry(kind.split(" left_out").next().unwrap().to_owned()).or_default() += 1;
    }
    for (kind, lines) in &kinds {
        assert!(*lines <= elapsed.as_secs() + 2, "{lines} lines in {elapsed:?}: {kind}");
    }
    usize::try_from(kinds.values().sum::<u64>()).unwrap()
}

/// 10,000 guesses a minute, from one source and from 1,000: no hit, genuine logins as fast as ever.
#[test]
fn row_07_guessing_tokens() {
    let _alone = alone();
    let program = Program::start(None);
    let start = Instant::now();
    let mut genuine = Genuine::new(&program);
    for (block, count) in [(1, 1), (2, 1000)] {
        let (server, like) = (program.https, genuine.token.clone());
        let hits = Arc::new(AtomicU64::new(0));
        let measured = genuine.measure(&program, scale(30, 2), || {
            let (like, sources, hits) = (like.clone(), sources(block, count), hits.clone());
            vec![Attack::start(move |done| async move {
                guess(server, sources, 10_000 / 60, like, done.clone()).await;
                hits.fetch_add(done.hits.load(Ordering::Relaxed), Ordering::Relaxed);
            })]
        });
        println!(
            "row 7: {} guesses from {count} sources, {} hits; so far {} looked at, {} turned away",
            measured.tries.iter().sum::<u64>(),
            hits.load(Ordering::Relaxed),
            program.metric("adit_mediator_offences_total{kind=\"wrong_token\"}"),
            program.metric("adit_mediator_turned_away_total")
        );
        assert_eq!(hits.load(Ordering::Relaxed), 0);
        measured.holds();
    }
    let penalties = program.metric("adit_mediator_penalties");
    println!(
        "row 7: {penalties} sources in the table, {} log lines in {:?}",
        at_most_a_line_a_second(&program, start.elapsed()),
        start.elapsed()
    );
    assert!((1..=65_536).contains(&penalties));
}

/// 5,000 silent connections and 10,000 junk datagrams, from one source and from 200: genuine logins as fast
/// as ever, memory back to within 5 %, no line for each.
#[test]
fn row_08_silent_connections() {
    let _alone = alone();
    adit_client::raise_descriptor_limit();
    let program = Program::start(None);
    let started = program.resident() / 1024;
    let start = Instant::now();
    let mut genuine = Genuine::new(&program);
    let flood = |block: u8, count: u32| {
        let (tcp, udp) = (vec![program.https, program.relay], vec![program.udp]);
        let (one, other) = (sources(block, count), sources(block + 1, count));
        vec![
            Attack::start(move |done| silent(tcp, one, scale(500, 1250), 5000, b"", done)),
            Attack::start(move |done| junk(udp, other, scale(2000, 5000), u64::MAX, done)),
        ]
    };
    // Again and again the same: the first time fills what an allocator keeps.
    let mut resident = Vec::new();
    for round in 0..3_u8 {
        for (block, count) in [(10, 1), (20, 200)] {
            let measured = genuine.measure(&program, scale(5, 1), || flood(block + 40 * round, count));
            let (connections, datagrams) =
                (measured.tries.iter().step_by(2), measured.tries.iter().skip(1).step_by(2));
            println!(
                "row 8: {} silent connections and {} junk datagrams from {count} sources",
                connections.sum::<u64>(),
                datagrams.sum::<u64>()
            );
            measured.holds();
        }
        program.until_quiet();
        // The allocator gives back what was not used for a second.
        std::thread::sleep(Duration::from_secs(3));
        resident.push(program.resident() / 1024);
    }
    println!(
        "row 8: {started} KiB at the start, {resident:?} KiB after each, peak {} KiB; {} turned away; {} log lines in {:?}",
        program.resident_peak() / 1024,
        program.metric("adit_mediator_turned_away_total") + program.metric("adit_relay_turned_away_total"),
        at_most_a_line_a_second(&program, start.elapsed()),
        start.elapsed()
    );
    assert!(resident[2] * 100 <= resident[1] * 105);
    assert!(program.resident_peak() <= 256 * 1024 * 1024);
}

/// Half a request, byte by byte: closed within 5 s, and the source pays for it.
#[test]
fn row_08_slowloris() {
    let _alone = alone();
    let program = Program::start(None);
    let start = Instant::now();
    let half_a_hello = [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &[7; 100]].concat();
    let half_a_preamble = [&[0, 200][..], &[7; 100]].concat();
    let tries = [
        (program.https, vec![]),
        (program.https, half_a_hello),
        (program.relay, vec![]),
        (program.relay, half_a_preamble),
    ];
    let closed = block_on(async {
        let mut saying = JoinSet::new();
        for (source, (server, bytes)) in sources(90, 4).into_iter().zip(tries) {
            saying.spawn(async move {
                let start = Instant::now();
                assert_eq!(say(source, server, &bytes).await, Some(vec![]));
                start.elapsed()
            });
        }
        saying.join_all().await.into_iter().max().unwrap()
    });
    println!("row 8: half a handshake is closed after {closed:.2?}");
    assert!(closed <= Duration::from_millis(5500), "{closed:?}");
    for metric in ["adit_mediator_offences_total", "adit_relay_offences_total"] {
        assert_eq!(program.metric(&format!("{metric}{{kind=\"silent\"}}")), 2);
    }
    at_most_a_line_a_second(&program, start.elapsed());
}

/// Junk datagrams and junk connections on every port: no panic, at most a log line a second.
#[test]
fn row_10_garbage() {
    let _alone = alone();
    let mut program = Program::start(None);
    let start = Instant::now();
    let identity = block_on(async { program.enrol(&program.token(1).await, "genuine").await });
    let most = scale(100_000, 10_000);
    let (tcp, udp) = (vec![program.https, program.relay], vec![program.udp]);
    let http = b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n";
    let garbage = Attack::start(move |done| silent(tcp, sources(100, 200), 300, 100, http, done));
    let datagrams = Attack::start(move |done| junk(udp, sources(101, 50), 8000, most, done));
    while datagrams.done.tries() < most {
        block_on(logins(&identity, 5));
    }
    let (garbage, datagrams) = (garbage.end(), datagrams.end());
    let offences = program.metric("adit_mediator_offences_total{kind=\"garbage\"}")
        + program.metric("adit_relay_offences_total{kind=\"garbage\"}");
    let lines = at_most_a_line_a_second(&program, start.elapsed());
    println!(
        "row 10: {} junk datagrams, {} answered; {} junk connections, {offences} looked at; {lines} log lines in {:?}",
        datagrams.tries(),
        datagrams.answered.load(Ordering::Relaxed),
        garbage.tries(),
        start.elapsed()
    );
    assert!(offences > 0);
    assert_eq!(datagrams.answered.load(Ordering::Relaxed), 0);
    assert!(program.is_running());
}

/// Out of descriptors: the accept loops rest, and go on when there are some again.
#[test]
fn fault_256_descriptors() {
    let _alone = alone();
    let program = Program::start(Some(256));
    let identity = block_on(async { program.enrol(&program.token(1).await, "genuine").await });
    // Silent ones may fill a quarter at most: devices come in all the same.
    let (tcp, sources) = (vec![program.https], sources(110, 200));
    let flood = Attack::start(move |done| silent(tcp, sources, 500, 1000, b"", done));
    program.until("the flood", || flood.done.tries() >= 1000);
    let under = block_on(logins(&identity, 20));
    flood.end();
    println!("fault: 256 descriptors, 1,000 silent connections: {under}");
    assert!(under.max() <= Duration::from_secs(2));

    // The one port without a limit of its own, which is private: now there is no descriptor left.
    let hogs: Vec<_> =
        (0..300).map_while(|_| std::net::TcpStream::connect(program.diagnostics).ok()).collect();
    let waiting = std::net::TcpStream::connect(program.https).unwrap();
    program.until("the last descriptor to be taken", || program.descriptors() >= 256);
    let (before, start) = (program.cpu(), Instant::now());
    std::thread::sleep(Duration::from_secs(2));
    let (cpu, wall) = (program.cpu() - before, start.elapsed());
    drop(hogs);
    drop(waiting);
    let start = Instant::now();
    let after = block_on(logins(&identity, 5));
    println!(
        "fault: no descriptors left: {cpu:?} of processor time in {wall:.1?}; first login {:.1?} after there are some",
        after.0[0]
    );
    assert!(cpu <= wall / 10, "{cpu:?} in {wall:?}");
    assert!(start.elapsed() <= Duration::from_secs(5));
}

/// The filter that comes with adit finds the line that adit writes, and nothing else.
#[test]
fn fail2ban_reads_the_refusals() {
    let _alone = alone();
    let program = Program::start(None);
    let token = block_on(program.token(1));
    let (server, source) = (program.https, sources(120, 1));
    let guesses = Attack::start(move |done| guess(server, source, 20, token, done));
    let refused = |text: &str| program.log().iter().any(|line| line.contains(text));
    program.until("a penalty", || refused("too many offences"));
    guesses.end();

    let filter = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/fail2ban/filter.d/adit.conf");
    let filter = std::fs::read_to_string(filter).unwrap();
    let rule = filter.lines().find_map(|line| line.strip_prefix("failregex = ")).unwrap();
    let rule = Regex::new(&rule.replace("<HOST>", r"(?P<host>[0-9a-f.:]+)")).unwrap();
    let hosts = |line: &str| rule.captures(line).map(|found| found["host"].to_owned());
    let found: Vec<String> = program.log().iter().filter_map(|line| hosts(line)).collect();
    println!("fail2ban: {} of {} lines, all of {:?}", found.len(), program.log().len(), found.first());
    assert!(found.len() >= 2 && found.iter().all(|host| host == "127.120.0.1"), "{:?}", program.log());
    let journal = "Jan 02 03:04:05 server adit-relay[7]:  WARN adit_relay::door: refused from 2001:db8::1: bad ticket left_out=3";
    assert_eq!(hosts(journal).as_deref(), Some("2001:db8::1"));
    // What others may have written into a line does not count.
    for line in [
        r#" INFO adit_mediator::enrolment: enrolment refused message="WARN adit_relay::door: refused from 192.0.2.1: wrong token""#,
        " WARN adit_relay::door: refused from 192.0.2.1: wrong token and more",
        " INFO ready",
    ] {
        assert_eq!(hosts(line), None, "{line}");
    }
}
