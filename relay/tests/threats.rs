//! What a relay withstands: each test has the number of its row in SECURITY.md, asserts the row's mark and
//! prints what it measured. `ADIT_TEST_LONG=1` runs the full numbers.

use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::common::{
    EPOCH, Server, config, connect_from, noise, preamble, preamble_by, public, rest, source, status, ticket,
    unix_now, within,
};
use adit_protocol::leg::{self, Status};
use adit_protocol::ticket::{LEEWAY_SECONDS, Ticket};
use adit_protocol::{DeviceId, Role, SessionId};
use adit_relay::metrics::Reason;
use adit_relay::penalty::Offence;
use adit_relay::{Config, Limits, Relay};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::task::JoinSet;

/// The number of the long form, or of the short one.
fn scale(long: u32, short: u32) -> u32 {
    if std::env::var_os("ADIT_TEST_LONG").is_some() { long } else { short }
}

/// Sends `bytes` and the end of file from a source that has done nothing so far; returns all that comes back.
async fn answer(server: &Server, bytes: &[u8]) -> Vec<u8> {
    static SOURCES: AtomicU32 = AtomicU32::new(1);
    let source = source(SOURCES.fetch_add(1, Ordering::Relaxed));
    let mut stream = connect_from(source, server.address).await.expect("nobody is penalised yet");
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let answer = rest(&mut stream).await;
    // Thousands of these: no port is kept in TIME-WAIT.
    let _ = stream.set_zero_linger();
    answer
}

fn nothing_was_forwarded(relay: &Relay) {
    let metrics = relay.metrics();
    assert_eq!((metrics.pairs_total(), metrics.spliced_bytes(), metrics.copied_bytes()), (0, 0, 0));
}

/// None, garbage, truncated, bit-flipped: 0 bytes forwarded, closed within 5 s.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_01_open_relay() {
    const AT_ONCE: u32 = 50;
    let tries = scale(10_000, 2_000);
    let server = Arc::new(Server::start().await);
    let mut victim = server.leg(&ticket(Role::Agent, 1), b"secret").await;
    server.until(|relay| relay.metrics().legs_waiting() == 1).await;
    let good = preamble(&ticket(Role::Technician, 1));
    let mut tasks = JoinSet::new();
    for worker in 0..AT_ONCE {
        let (server, good) = (server.clone(), good.clone());
        tasks.spawn(async move {
            let mut slowest = Duration::ZERO;
            for number in (worker..tries).step_by(AT_ONCE as usize) {
                let random = noise(u64::from(number) * 2 + 1, 800);
                let pick = u64::from_le_bytes(random[..8].try_into().unwrap()) as usize;
                let bytes = match number % 5 {
                    0 => random,
                    1 => good[..pick % good.len()].to_vec(),
                    2 => [&[0, 200], &random[..]].concat(),
                    3 => vec![],
                    _ => {
                        let mut flipped = good.clone();
                        flipped[pick % good.len()] ^= 1 << (pick >> 32 & 7);
                        flipped
                    }
                };
                let start = Instant::now();
                let answer = answer(&server, &bytes).await;
                slowest = slowest.max(start.elapsed());
                assert!(answer.is_empty() || answer == [Status::Refused as u8], "{answer:?}");
            }
            slowest
        });
    }
    let mut slowest = Duration::ZERO;
    while let Some(done) = within(tasks.join_next()).await {
        slowest = slowest.max(done.unwrap());
    }
    nothing_was_forwarded(&server.relay);
    let metrics = server.relay.metrics();
    let looked_at: u64 = [Reason::Silent, Reason::Malformed, Reason::Signature, Reason::Possession]
        .map(|reason| metrics.refusals(reason))
        .iter()
        .sum();
    println!(
        "row 1: {tries} tickets, {looked_at} looked at and refused, 0 bytes, slowest closed in {slowest:?}"
    );
    assert_eq!(looked_at, u64::from(tries));
    assert!(slowest <= Duration::from_secs(5));
    // A refused one is here until it has seen that the other end hung up.
    server.until(|relay| relay.door().unauthenticated() == 0).await;
    // The genuine leg, unharmed (its ten seconds may be over on a slow machine: then a new one).
    if server.relay.metrics().legs_waiting() == 0 {
        victim = server.leg(&ticket(Role::Agent, 1), b"secret").await;
    }
    let mut technician = server.leg(&ticket(Role::Technician, 1), b"").await;
    assert_eq!(status(&mut technician).await, Status::Paired);
    assert_eq!(status(&mut victim).await, Status::Paired);
}

/// 64 in parallel: at most one pair. After pairing, after a restart, from another key: refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_02_ticket_replay() {
    let server = Arc::new(Server::start().await);
    let mut tasks = JoinSet::new();
    for number in 0..64 {
        let server = server.clone();
        let leg = if number % 2 == 0 { Role::Agent } else { Role::Technician };
        tasks.spawn(async move {
            let mut stream = server.leg(&ticket(leg, 1), b"").await;
            // Kept open: a pair that ended would prove less.
            (status(&mut stream).await, stream)
        });
    }
    let mut paired = Vec::new();
    while let Some(done) = within(tasks.join_next()).await {
        let (status, stream) = done.unwrap();
        match status {
            Status::Paired => paired.push(stream),
            other => assert!(matches!(other, Status::Spent | Status::Replaced), "{other:?}"),
        }
    }
    println!("row 2: 64 legs with one ticket, {} paired", paired.len());
    assert_eq!((paired.len(), server.relay.metrics().pairs_total()), (2, 1));
    for leg in [Role::Agent, Role::Technician] {
        assert_eq!(answer(&server, &preamble(&ticket(leg, 1))).await, [Status::Spent as u8]);
        let stolen = preamble_by(&ticket(leg, 2), 1, 8);
        assert_eq!(answer(&server, &stolen).await, [Status::Refused as u8]);
    }
    assert_eq!(server.relay.metrics().refusals(Reason::Possession), 2);
    drop(paired);
    server.until(|relay| relay.metrics().pairs() == 0).await;
    assert_eq!(answer(&server, &preamble(&ticket(Role::Agent, 1))).await, [Status::Spent as u8]);

    let restarted = Server::with(Config { epoch: EPOCH + 1, ..config() }).await;
    for leg in [Role::Agent, Role::Technician] {
        assert_eq!(answer(&restarted, &preamble(&ticket(leg, 1))).await, [Status::Refused as u8]);
    }
    assert_eq!(restarted.relay.metrics().refusals(Reason::OtherEpoch), 2);
    nothing_was_forwarded(&restarted.relay);
}

/// Wrong session, leg, relay; expired by 31 s: no pair.
#[tokio::test]
async fn row_03_wrong_session_leg_relay_or_time() {
    let server = Server::start().await;
    let mut victim = server.leg(&ticket(Role::Agent, 1), b"secret").await;
    server.until(|relay| relay.metrics().legs_waiting() == 1).await;
    let good = ticket(Role::Technician, 1);
    let refused = [
        (Ticket { relay: DeviceId([1; 16]), ..good.clone() }, Reason::OtherRelay),
        (Ticket { epoch: EPOCH - 1, ..good.clone() }, Reason::OtherEpoch),
        (Ticket { expires: unix_now() - LEEWAY_SECONDS - 1, ..good.clone() }, Reason::Expired),
        (Ticket { peer: [7; 32], ..good.clone() }, Reason::Mismatch),
        (Ticket { holder: [7; 32], ..good.clone() }, Reason::Possession),
        (Ticket { leg: Role::Relay, ..good.clone() }, Reason::Malformed),
    ];
    for (ticket, reason) in refused {
        assert_eq!(answer(&server, &preamble(&ticket)).await, [Status::Refused as u8], "{reason:?}");
        assert_eq!(server.relay.metrics().refusals(reason), 1, "{reason:?}");
    }
    // Signed by another mediator; shown by one who only stole the ticket.
    for (mediator, holder, reason) in [(8, 3, Reason::Signature), (1, 8, Reason::Possession)] {
        let before = server.relay.metrics().refusals(reason);
        let stolen = preamble_by(&good, mediator, holder);
        assert_eq!(answer(&server, &stolen).await, [Status::Refused as u8], "{reason:?}");
        assert_eq!(server.relay.metrics().refusals(reason), before + 1, "{reason:?}");
    }
    // Another session or another serial is another pair: it waits, and gets nothing.
    let elsewhere = [Ticket { session: SessionId([6; 16]), ..good.clone() }, ticket(Role::Technician, 2)];
    let mut elsewhere = [server.leg(&elsewhere[0], b"x").await, server.leg(&elsewhere[1], b"x").await];
    server.until(|relay| relay.metrics().legs_waiting() == 3).await;
    for leg in &mut elsewhere {
        assert!(leg.try_read(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
    }
    nothing_was_forwarded(&server.relay);
    let mut technician = server.leg(&good, b"").await;
    assert_eq!(status(&mut victim).await, Status::Paired);
    assert_eq!(status(&mut technician).await, Status::Paired);
}

/// Whatever field is changed behind the holder's signature: refused.
#[test]
fn row_03_every_field_is_signed() {
    let fields = (0..10_u8, any::<[u8; 32]>(), any::<u64>());
    let mut runner = TestRunner::new(ProptestConfig {
        cases: scale(10_000, 500),
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let outcome = runner.run(&fields, |(field, bytes, number)| {
        let good = ticket(Role::Technician, 1);
        let mut changed = good.clone();
        let sixteen = <[u8; 16]>::try_from(&bytes[..16]).unwrap();
        match field {
            0 => changed.session = SessionId(sixteen),
            1 => changed.serial = number,
            2 => changed.relay = DeviceId(sixteen),
            3 => changed.epoch = number,
            4 => changed.leg = Role::Agent,
            5 => changed.holder = bytes,
            6 => changed.peer = bytes,
            7 => changed.expires = number | 1 << 40,
            8 => changed.max_bytes = number,
            _ => changed.max_seconds = number,
        }
        prop_assume!(changed != good);
        let (text, other) = (crate::common::signed_ticket(&good), crate::common::signed_ticket(&changed));
        let ours = leg::signed_bytes(&text, &good);
        // The mediator did sign the changed one; its holder did not show it to this relay.
        let forged = leg::encode(&other, &changed, |_| crate::common::sign(3, &ours));
        prop_assert!(leg::verify(&forged[2..], &public(1), unix_now()).is_err());
        Ok(())
    });
    outcome.unwrap();
    println!("row 3: {} changed tickets, 0 taken", scale(10_000, 500));
}

/// One source that guesses tickets is out after four (the first has decayed a little by the third); the
/// neighbours notice nothing.
#[tokio::test]
async fn row_07_guessing_tickets() {
    let tries = scale(2_000, 500);
    let server = Server::start().await;
    let door = server.relay.door();
    let start = Instant::now();
    for number in 0..tries {
        let guess = preamble_by(&ticket(Role::Agent, u64::from(number)), 8, 2);
        let Some(mut stream) = connect_from(source(60_000), server.address).await else { continue };
        let _ = stream.write_all(&guess).await;
        let _ = stream.shutdown().await;
        rest(&mut stream).await;
        let _ = stream.set_zero_linger();
    }
    let (looked_at, seconds) = (door.offences(Offence::BadTicket), start.elapsed().as_secs());
    println!(
        "row 7: {tries} guesses from one source in {seconds} s, {looked_at} looked at, {} closed at once",
        door.turned_away()
    );
    assert!(looked_at >= 3 && looked_at <= 3 + seconds + 1);
    assert_eq!(looked_at + door.turned_away(), u64::from(tries));
    assert_eq!((server.relay.metrics().pairs_total(), door.penalties()), (0, 1));
    server.pair(1).await;
}

#[tokio::test(start_paused = true)]
async fn row_08_who_says_nothing_is_closed_within_five_seconds() {
    let server = Server::start().await;
    let good = preamble(&ticket(Role::Agent, 1));
    for silent_after in [0, 1, 2, 3, good.len() - 1] {
        let mut stream = server.connect().await;
        stream.write_all(&good[..silent_after]).await.unwrap();
        let start = tokio::time::Instant::now();
        assert_eq!(rest(&mut stream).await, b"");
        assert!(start.elapsed() <= Duration::from_secs(5), "{:?}", start.elapsed());
    }
    assert_eq!(server.relay.metrics().refusals(Reason::Silent), 5);
    assert_eq!(server.relay.door().offences(Offence::Silent), 5);
    nothing_was_forwarded(&server.relay);
}

#[tokio::test]
async fn row_08_a_flood_is_bounded_and_does_not_shut_out_the_ticket() {
    const LIMIT: u64 = 100;
    let limits = Limits { unauthenticated: LIMIT as usize, ..config().limits };
    let server = Server::with(Config { limits, ..config() }).await;
    let (metrics, door) = (server.relay.metrics(), server.relay.door());
    let mut silent = Vec::new();
    for number in 1..=500 {
        silent.push(server.connect().await);
        server.until(|_| door.unauthenticated() + metrics.refusals(Reason::Overload) == number).await;
        assert!(door.unauthenticated() <= LIMIT);
    }
    assert_eq!(metrics.refusals(Reason::Overload), 500 - LIMIT);
    // The flood goes on while genuine legs come, all at the first try.
    let mut paired = 0;
    for serial in 0..20 {
        let mut technician = server.leg(&ticket(Role::Technician, serial), b"").await;
        let mut agent = server.leg(&ticket(Role::Agent, serial), b"").await;
        silent.push(server.connect().await);
        let statuses = within(async { tokio::join!(technician.read_u8(), agent.read_u8()) });
        if let (Ok(one), Ok(other)) = statuses.await {
            assert_eq!([one, other], [Status::Paired as u8; 2]);
            paired += 1;
        }
    }
    println!("row 8: at most {LIMIT} of 500 silent ones inside, {paired} of 20 pairs at the first try");
    assert!(paired >= 15, "{paired}");
    drop(silent);
    server.until(|_| door.unauthenticated() == 0).await;
}

/// A source that has its share drives out its own, and others come in as if it were not there.
#[tokio::test]
async fn row_08_one_source_has_its_share_only() {
    let limits = Limits { unauthenticated: 100, per_source: 20, ..config().limits };
    let server = Server::with(Config { limits, ..config() }).await;
    let mut silent = Vec::new();
    for number in 1..=100 {
        silent.push(connect_from(source(61_000), server.address).await.unwrap());
        let out = || server.relay.metrics().refusals(Reason::Overload);
        server.until(|relay| relay.door().unauthenticated() + out() == number).await;
    }
    let inside = server.relay.door().unauthenticated();
    println!("row 8: {inside} of 100 silent ones of one source inside");
    assert_eq!(inside, 20);
    for serial in 0..20 {
        server.pair(serial).await;
    }
}

/// Sessions that send and never read: at most 512 KiB each here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_09_memory_of_sessions_that_never_read() {
    const SESSION: u64 = 512 * 1024;
    let sessions = u64::from(scale(200, 40));
    let server = Server::start().await;
    let mut legs = Vec::new();
    // The first ones warm up the process.
    for serial in 0..4 {
        legs.push(stuffed(&server, serial).await);
    }
    let before = resident();
    for serial in 4..4 + sessions {
        legs.push(stuffed(&server, serial).await);
    }
    let user_space = resident().saturating_sub(before);
    let in_pipes = bytes_in_pipes();
    println!(
        "row 9: {sessions} sessions that never read: {} KiB of memory and {} KiB in pipes each",
        user_space / 1024 / sessions,
        in_pipes / 1024 / (sessions + 4)
    );
    assert!(in_pipes > 0);
    assert!(user_space / sessions + in_pipes / (sessions + 4) <= SESSION);
    drop(legs);
    server.until(|relay| relay.metrics().pairs() == 0 && relay.metrics().pipes_lent() == 0).await;
}

/// 2,000 idle sessions within 256 MiB, both their ends included.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_256_mib_of_memory() {
    const MOST: u64 = 256 * 1024 * 1024;
    adit_client::raise_descriptor_limit();
    let sessions = u64::from(scale(2_000, 500));
    let server = Server::start().await;
    let before = resident();
    let mut pairs = Vec::new();
    for serial in 0..sessions {
        let (mut technician, mut agent) = server.pair(serial).await;
        technician.write_all(b"hello").await.unwrap();
        within(agent.read_exact(&mut [0; 5])).await.unwrap();
        pairs.push((technician, agent));
    }
    let grown = resident().saturating_sub(before);
    println!("fault: {sessions} idle sessions: {} KiB, {} bytes each", grown / 1024, grown / sessions);
    assert_eq!(server.relay.metrics().pairs(), sessions);
    assert!(grown * 2_000 / sessions <= MOST);
}

/// A pair into which both ends have written until nothing more fits.
async fn stuffed(server: &Server, serial: u64) -> [tokio::net::TcpStream; 2] {
    let (technician, agent) = server.pair(serial).await;
    let block = noise(serial, 64 * 1024);
    for leg in [&technician, &agent] {
        // No room for this long means that nobody reads at the other end of it all.
        while tokio::time::timeout(Duration::from_millis(50), leg.writable()).await.is_ok() {
            let _ = leg.try_write(&block);
        }
    }
    [technician, agent]
}

/// Bytes in all pipes of this process.
fn bytes_in_pipes() -> u64 {
    let mut pipes = std::collections::HashMap::new();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let Ok(name) = std::fs::read_link(entry.path()) else { continue };
        if name.to_string_lossy().starts_with("pipe:")
            && let Ok(pipe) = std::fs::File::open(entry.path())
        {
            pipes.insert(name, rustix::io::ioctl_fionread(&pipe).unwrap());
        }
    }
    pipes.values().sum()
}

/// Bytes of this process in memory, without what it shares.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: Vec<u64> = statm.split_whitespace().map(|field| field.parse().unwrap()).collect();
    (pages[1] - pages[2]) * 4096
}

/// Junk on the STUN port: nothing comes back, and it goes on answering.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_10_garbage_datagrams() {
    let datagrams = scale(100_000, 20_000);
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let serving = tokio::spawn(adit_relay::stun::serve(socket, std::future::pending()));
    let junk = UdpSocket::bind((source(62_000), 0)).await.unwrap();
    let start = Instant::now();
    for number in 0..datagrams {
        let mut bytes = noise(u64::from(number) * 2 + 1, (number % 1400) as usize);
        // A third of them begin like STUN.
        if let Some(first) = bytes.first_mut().filter(|_| number % 3 == 0) {
            *first &= 0x3f;
        }
        let _ = junk.send_to(&bytes, address).await;
    }
    let genuine = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let mut tries = 0;
    let mut answer = [0; 100];
    loop {
        tries += 1;
        genuine.send_to(&adit_tunnel::path::stun::binding_request([3; 12]), address).await.unwrap();
        let wait = Duration::from_millis(200);
        if tokio::time::timeout(wait, genuine.recv_from(&mut answer)).await.is_ok() {
            break;
        }
        assert!(tries < 20, "no answer after the junk");
    }
    println!("row 10: {datagrams} junk datagrams in {:?}, answered at try {tries}", start.elapsed());
    assert!(junk.try_recv_from(&mut answer).is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
    assert!(!serving.is_finished());
    serving.abort();
}
