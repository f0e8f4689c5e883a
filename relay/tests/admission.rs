//! No ticket, no byte: who is not paired, and that nothing is forwarded then.

use crate::common::{Server, config, preamble, rest, status, ticket};
use adit_protocol::Role;
use adit_protocol::leg::Status;
use adit_relay::metrics::Reason;
use adit_relay::{Config, Limits, Relay};
use tokio::io::AsyncWriteExt;

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
