//! Bytes through a paired relay, with real sockets on loopback.

use std::time::Duration;

use crate::common::{Server, config, noise, receive, rest, send_blocks, status, ticket, within};
use adit_protocol::Role;
use adit_protocol::leg::Status;
use adit_protocol::ticket::Ticket;
use adit_relay::Config;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const BLOCK: usize = 100_000;

/// `count` blocks from `from` to `to`, hash compared.
async fn transfer(mut from: TcpStream, mut to: TcpStream, count: u64) {
    let sent = tokio::spawn(async move { send_blocks(&mut from, noise(count, BLOCK), count).await });
    let (length, hash) = within(receive(&mut to)).await;
    assert_eq!(length, count * BLOCK as u64);
    assert_eq!(hash, sent.await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_megabytes_arrive_and_go_through_the_kernel() {
    let server = Server::start().await;
    let (technician, agent) = server.pair(1).await;
    transfer(agent, technician, 2000).await;
    let metrics = server.relay.metrics();
    let (spliced, copied) = (metrics.spliced_bytes(), metrics.copied_bytes());
    assert_eq!(spliced + copied, 2000 * BLOCK as u64);
    if cfg!(target_os = "linux") {
        assert!(copied * 100 < spliced, "spliced {spliced}, copied {copied}");
    }
    server.until(|relay| relay.metrics().pairs() == 0 && relay.metrics().pipes_lent() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_splice_the_same_bytes_are_copied() {
    let server = Server::with(Config { splice: false, ..config() }).await;
    let (technician, agent) = server.pair(1).await;
    transfer(technician, agent, 300).await;
    assert_eq!(server.relay.metrics().spliced_bytes(), 0);
    assert_eq!(server.relay.metrics().copied_bytes(), 300 * BLOCK as u64);
    assert_eq!(server.relay.metrics().pipes_lent() + server.relay.metrics().pipes_idle(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_directions_at_once_and_many_pairs() {
    let server = Server::start().await;
    let mut transfers = Vec::new();
    for serial in 0..8 {
        let (technician, agent) = server.pair(serial).await;
        transfers.push(tokio::spawn(async move {
            let (mut from_technician, mut to_technician) = technician.into_split();
            let (mut from_agent, mut to_agent) = agent.into_split();
            let up =
                tokio::spawn(async move { send_blocks(&mut to_technician, noise(serial, BLOCK), 40).await });
            let down =
                tokio::spawn(async move { send_blocks(&mut to_agent, noise(!serial, BLOCK), 50).await });
            let at_technician = tokio::spawn(async move { receive(&mut from_technician).await.1 });
            assert_eq!(receive(&mut from_agent).await.1, up.await.unwrap());
            assert_eq!(at_technician.await.unwrap(), down.await.unwrap());
        }));
    }
    for transfer in transfers {
        within(transfer).await.unwrap();
    }
    server.until(|relay| relay.metrics().pairs() == 0).await;
    assert_eq!(server.relay.metrics().pairs_total(), 8);
}

#[tokio::test]
async fn what_stands_right_behind_the_preamble_belongs_to_the_peer() {
    let server = Server::start().await;
    for (serial, first) in [(1, Role::Agent), (2, Role::Technician)] {
        let second = if first == Role::Agent { Role::Technician } else { Role::Agent };
        let (early, late) = (noise(3, 70_000), noise(4, 5));
        let mut one = server.leg(&ticket(first, serial), &early).await;
        let mut other = server.leg(&ticket(second, serial), &late).await;
        for (leg, expected) in [(&mut one, &late), (&mut other, &early)] {
            assert_eq!(status(leg).await, Status::Paired);
            let mut got = vec![0; expected.len()];
            within(leg.read_exact(&mut got)).await.unwrap();
            assert_eq!(&got, expected);
        }
    }
}

#[tokio::test]
async fn a_preamble_may_come_byte_by_byte() {
    let server = Server::start().await;
    let mut slow = server.connect().await;
    for byte in crate::common::preamble(&ticket(Role::Agent, 1)) {
        slow.write_all(&[byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    let mut quick = server.leg(&ticket(Role::Technician, 1), b"hello").await;
    assert_eq!(status(&mut quick).await, Status::Paired);
    assert_eq!(status(&mut slow).await, Status::Paired);
    quick.shutdown().await.unwrap();
    assert_eq!(rest(&mut slow).await, b"hello");
}

#[tokio::test]
async fn an_end_of_file_leaves_the_other_direction_open() {
    let server = Server::start().await;
    let (mut technician, mut agent) = server.pair(1).await;
    technician.write_all(b"request").await.unwrap();
    technician.shutdown().await.unwrap();
    assert_eq!(rest(&mut agent).await, b"request");
    // The agent has seen the end; only now it answers.
    agent.write_all(b"a long answer").await.unwrap();
    let mut first = [0; 6];
    within(technician.read_exact(&mut first)).await.unwrap();
    agent.write_all(b", and more").await.unwrap();
    agent.shutdown().await.unwrap();
    assert_eq!(rest(&mut technician).await, b" answer, and more");
    assert_eq!(&first, b"a long");
    server.until(|relay| relay.metrics().pairs() == 0).await;
}

#[tokio::test]
async fn a_lost_leg_closes_the_other_one() {
    let server = Server::start().await;
    let (technician, mut agent) = server.pair(1).await;
    technician.set_zero_linger().unwrap();
    drop(technician);
    assert_eq!(rest(&mut agent).await, b"");
    server.until(|relay| relay.metrics().pairs() == 0).await;
}

#[tokio::test]
async fn a_reader_that_never_reads_holds_one_pipe_and_loses_nothing() {
    let server = Server::start().await;
    let (mut technician, mut agent) = server.pair(1).await;
    let block = noise(9, 64 * 1024);
    let mut sent = 0;
    // Full when the relay has stopped taking: everything on the way is in kernel buffers by then.
    let stuck = Duration::from_millis(300);
    while let Ok(count) = tokio::time::timeout(stuck, agent.write(&block[sent % block.len()..])).await {
        sent += count.unwrap();
    }
    assert_eq!(server.relay.metrics().pipes_lent(), 1);
    let delivered = server.relay.metrics().spliced_bytes();
    // Neighbours do not notice.
    let (mut other_technician, mut other_agent) = server.pair(2).await;
    other_agent.write_all(&block).await.unwrap();
    other_agent.shutdown().await.unwrap();
    assert_eq!(rest(&mut other_technician).await, block);
    assert_eq!(server.relay.metrics().spliced_bytes(), delivered + block.len() as u64);

    agent.shutdown().await.unwrap();
    let got = rest(&mut technician).await;
    assert_eq!(got.len(), sent);
    assert!(got.chunks(block.len()).all(|chunk| *chunk == block[..chunk.len()]));
    server.until(|relay| relay.metrics().pipes_lent() == 0).await;
}

#[tokio::test]
async fn idle_pairs_own_no_pipe() {
    let server = Server::start().await;
    let mut pairs = Vec::new();
    for serial in 0..300 {
        let (mut technician, mut agent) = server.pair(serial).await;
        technician.write_all(b"ping").await.unwrap();
        let mut four = [0; 4];
        within(agent.read_exact(&mut four)).await.unwrap();
        pairs.push((technician, agent));
    }
    server.until(|relay| relay.metrics().pipes_lent() == 0).await;
    assert_eq!(server.relay.metrics().pairs(), 300);
    assert!(server.relay.metrics().pipes_idle() <= 4);
}

#[tokio::test]
async fn the_byte_limit_cuts_the_pair() {
    let server = Server::start().await;
    let capped = |leg, max_bytes| Ticket { max_bytes, ..ticket(leg, 1) };
    let mut technician = server.leg(&capped(Role::Technician, 0), b"").await;
    let mut agent = server.leg(&capped(Role::Agent, 1000), &noise(1, 5000)).await;
    assert_eq!(status(&mut technician).await, Status::Paired);
    assert_eq!(status(&mut agent).await, Status::Paired);
    assert_eq!(rest(&mut technician).await, &noise(1, 5000)[..1000]);
    server.until(|relay| relay.metrics().pairs() == 0).await;
}

#[tokio::test(start_paused = true)]
async fn the_time_limit_cuts_the_pair() {
    let server = Server::start().await;
    let capped = |leg, max_seconds| Ticket { max_seconds, ..ticket(leg, 1) };
    let mut technician = server.leg(&capped(Role::Technician, 20), b"").await;
    let mut agent = server.leg(&capped(Role::Agent, 0), b"").await;
    assert_eq!(status(&mut technician).await, Status::Paired);
    assert_eq!(status(&mut agent).await, Status::Paired);
    let start = tokio::time::Instant::now();
    assert_eq!(rest(&mut technician).await, b"");
    assert!((19..=21).contains(&start.elapsed().as_secs()));
}

#[tokio::test(start_paused = true)]
async fn a_half_open_pair_that_stays_silent_is_closed() {
    let server = Server::start().await;
    let (mut technician, mut agent) = server.pair(1).await;
    technician.shutdown().await.unwrap();
    assert_eq!(rest(&mut agent).await, b"");
    let start = tokio::time::Instant::now();
    let closed = tokio::time::timeout(Duration::from_secs(200), technician.read_u8()).await;
    assert!(closed.expect("closed").is_err());
    assert!((58..=62).contains(&start.elapsed().as_secs()));
}

#[tokio::test]
async fn stopping_closes_every_pair_and_every_leg_that_waits() {
    let server = Server::start().await;
    let (mut technician, mut agent) = server.pair(1).await;
    let mut waiting = server.leg(&ticket(Role::Agent, 2), b"").await;
    server.until(|relay| relay.metrics().legs_waiting() == 1).await;
    let relay = server.relay.clone();
    server.stop().await;
    for leg in [&mut technician, &mut agent, &mut waiting] {
        assert_eq!(rest(leg).await, b"");
    }
    assert_eq!((relay.metrics().pairs(), relay.metrics().legs_waiting()), (0, 0));
}
