//! No ticket, no byte: who is not paired, and that nothing is forwarded then.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::ErrorKind;
use std::time::Duration;

use adit_protocol::leg::Status;
use adit_protocol::ticket::{LEEWAY_SECONDS, Ticket};
use adit_protocol::{DeviceId, Role, SessionId};
use adit_relay::metrics::Reason;
use adit_relay::{Config, Limits, Relay};
use common::{Server, config, noise, preamble, preamble_by, rest, status, ticket, unix_now, within};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

/// Sends `bytes` and the end of file; returns all that comes back.
async fn answer(server: &Server, bytes: &[u8]) -> Vec<u8> {
    let mut stream = server.connect().await;
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

#[tokio::test]
async fn every_field_of_a_ticket_counts() {
    let server = Server::start().await;
    let mut victim = server.leg(&ticket(Role::Agent, 1), b"secret").await;
    server.until(|relay| relay.metrics().legs_waiting() == 1).await;
    let good = ticket(Role::Technician, 1);
    let refused = [
        (Ticket { relay: DeviceId([1; 16]), ..good.clone() }, Reason::OtherRelay),
        (Ticket { epoch: common::EPOCH - 1, ..good.clone() }, Reason::OtherEpoch),
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_bad_preambles_forward_nothing() {
    const TRIES: u64 = 10_000;
    let server = std::sync::Arc::new(Server::start().await);
    let mut victim = server.leg(&ticket(Role::Agent, 1), b"secret").await;
    server.until(|relay| relay.metrics().legs_waiting() == 1).await;
    let good = preamble(&ticket(Role::Technician, 1));
    let mut tasks = JoinSet::new();
    for worker in 0..50 {
        let (server, good) = (server.clone(), good.clone());
        tasks.spawn(async move {
            for number in (worker..TRIES).step_by(50) {
                let random = noise(number * 2 + 1, 800);
                let pick = u64::from_le_bytes(random[..8].try_into().unwrap()) as usize;
                let bytes = match number % 4 {
                    0 => random,
                    1 => good[..pick % good.len()].to_vec(),
                    2 => [&[0, 200], &random[..]].concat(),
                    _ => {
                        let mut flipped = good.clone();
                        flipped[pick % good.len()] ^= 1 << (pick >> 32 & 7);
                        flipped
                    }
                };
                let answer = answer(&server, &bytes).await;
                assert!(answer.is_empty() || answer == [Status::Refused as u8], "{answer:?}");
            }
        });
    }
    while let Some(done) = within(tasks.join_next()).await {
        done.unwrap();
    }
    nothing_was_forwarded(&server.relay);
    assert_eq!(server.relay.metrics().unauthenticated(), 0);
    // The genuine leg, unharmed (its ten seconds may be over on a slow machine: then a new one).
    if server.relay.metrics().legs_waiting() == 0 {
        victim = server.leg(&ticket(Role::Agent, 1), b"secret").await;
    }
    let mut technician = server.leg(&ticket(Role::Technician, 1), b"").await;
    assert_eq!(status(&mut technician).await, Status::Paired);
    assert_eq!(status(&mut victim).await, Status::Paired);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_replays_at_once_make_one_pair() {
    let server = std::sync::Arc::new(Server::start().await);
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
    assert_eq!(paired.len(), 2);
    assert_eq!(server.relay.metrics().pairs_total(), 1);
    for leg in [Role::Agent, Role::Technician] {
        assert_eq!(answer(&server, &preamble(&ticket(leg, 1))).await, [Status::Spent as u8]);
    }
    drop(paired);
    server.until(|relay| relay.metrics().pairs() == 0).await;
    assert_eq!(answer(&server, &preamble(&ticket(Role::Agent, 1))).await, [Status::Spent as u8]);
}

#[tokio::test]
async fn a_restarted_relay_takes_no_older_ticket() {
    let server = Server::with(Config { epoch: common::EPOCH + 1, ..config() }).await;
    for leg in [Role::Agent, Role::Technician] {
        assert_eq!(answer(&server, &preamble(&ticket(leg, 1))).await, [Status::Refused as u8]);
    }
    assert_eq!(server.relay.metrics().refusals(Reason::OtherEpoch), 2);
    nothing_was_forwarded(&server.relay);
}

#[tokio::test]
async fn a_newer_leg_takes_the_place_of_an_older_one() {
    let server = Server::start().await;
    let mut older = server.leg(&ticket(Role::Agent, 1), b"old").await;
    server.until(|relay| relay.metrics().legs_waiting() == 1).await;
    let mut newer = server.leg(&ticket(Role::Agent, 1), b"new").await;
    assert_eq!(status(&mut older).await, Status::Replaced);
    assert_eq!(rest(&mut older).await, b"");
    let mut technician = server.leg(&ticket(Role::Technician, 1), b"").await;
    assert_eq!(status(&mut technician).await, Status::Paired);
    assert_eq!(status(&mut newer).await, Status::Paired);
    newer.shutdown().await.unwrap();
    assert_eq!(rest(&mut technician).await, b"new");
}

#[tokio::test]
async fn a_leg_that_hung_up_is_not_paired() {
    let server = Server::start().await;
    drop(server.leg(&ticket(Role::Agent, 1), b"").await);
    server.until(|relay| relay.metrics().legs_waiting() == 1).await;
    let mut technician = server.leg(&ticket(Role::Technician, 1), b"").await;
    server.until(|relay| relay.metrics().refusals(Reason::Replaced) == 1).await;
    let mut agent = server.leg(&ticket(Role::Agent, 1), b"").await;
    assert_eq!(status(&mut technician).await, Status::Paired);
    assert_eq!(status(&mut agent).await, Status::Paired);
}

#[tokio::test(start_paused = true)]
async fn a_leg_waits_ten_seconds() {
    let server = Server::start().await;
    let mut agent = server.leg(&ticket(Role::Agent, 1), b"early").await;
    let start = tokio::time::Instant::now();
    assert_eq!(status(&mut agent).await, Status::NoPeer);
    assert_eq!(rest(&mut agent).await, b"");
    assert!((9..=15).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    assert_eq!(server.relay.metrics().legs_waiting(), 0);
    // Not spent: a later leg waits again.
    let mut again = server.leg(&ticket(Role::Agent, 1), b"").await;
    assert_eq!(status(&mut again).await, Status::NoPeer);
}

#[tokio::test(start_paused = true)]
async fn who_says_nothing_is_closed_within_five_seconds() {
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
    nothing_was_forwarded(&server.relay);
}

#[tokio::test]
async fn a_flood_of_silent_connections_is_bounded_and_does_not_shut_out_the_ticket() {
    const LIMIT: u64 = 100;
    let limits = Limits { unauthenticated: LIMIT as usize, ..Limits::default() };
    let server = Server::with(Config { limits, ..config() }).await;
    let metrics = server.relay.metrics();
    let mut silent = Vec::new();
    for number in 1..=500 {
        silent.push(server.connect().await);
        server.until(|_| metrics.unauthenticated() + metrics.refusals(Reason::Overload) == number).await;
        assert!(metrics.unauthenticated() <= LIMIT);
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
    assert!(paired >= 15, "{paired}");
    drop(silent);
    server.until(|_| metrics.unauthenticated() == 0).await;
}

#[tokio::test]
async fn full_tables_say_busy() {
    let limits = Limits { waiting: 1, pairs: 1, ..Limits::default() };
    let server = Server::with(Config { limits, ..config() }).await;
    let first = server.leg(&ticket(Role::Agent, 1), b"").await;
    server.until(|relay| relay.metrics().legs_waiting() == 1).await;
    assert_eq!(answer(&server, &preamble(&ticket(Role::Agent, 2))).await, [Status::Busy as u8]);
    let second = server.leg(&ticket(Role::Technician, 1), b"").await;
    server.until(|relay| relay.metrics().pairs() == 1).await;
    assert_eq!(answer(&server, &preamble(&ticket(Role::Agent, 2))).await, [Status::Busy as u8]);
    drop((first, second));
}

#[tokio::test]
async fn without_the_mediators_key_nobody_is_let_in() {
    let relay = Relay::new(config());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(relay.clone().serve(listener, std::future::pending()));
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(&preamble(&ticket(Role::Agent, 1))).await.unwrap();
    assert_eq!(status(&mut stream).await, Status::Refused);
    assert_eq!(relay.metrics().refusals(Reason::NoKey), 1);
    task.abort();
}
