//! What a relay costs: one unshaped stream and a ping-pong between two local processes, through the
//! relay that splices, the relay that copies, and a plain copy loop for comparison; CPU is the relay
//! process's own.
//!
//! `cargo run --release -p adit-relay --example throughput [GIGABYTES]` (Linux)
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use adit_protocol::ticket::Ticket;
use adit_protocol::{DeviceId, Role, SessionId, leg};
use adit_relay::{Config, Relay};
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};

const ID: DeviceId = DeviceId([1; 16]);
const MODES: [&str; 3] = ["splice", "copy", "plain"];
const PINGS: usize = 20_000;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["relay", mode] => relay(mode),
        ["source", mode, address, gigabytes] => source(connect(mode, address, Role::Agent, 1), gigabytes),
        ["echo", mode, address] => echo(connect(mode, address, Role::Agent, 2)),
        _ => {
            let gigabytes = arguments.first().map_or(8, |text| text.parse().expect("gigabytes"));
            for round in 1..=3 {
                for mode in MODES {
                    measure(round, mode, gigabytes);
                }
            }
        }
    }
}

fn measure(round: u32, mode: &str, gigabytes: u64) {
    let mut relay = spawn(&["relay", mode]);
    let mut address = String::new();
    BufReader::new(relay.stdout.take().unwrap()).read_line(&mut address).unwrap();
    let address = address.trim();

    let mut source = spawn(&["source", mode, address, &gigabytes.to_string()]);
    let mut sink = connect(mode, address, Role::Technician, 1);
    let (mut buffer, mut total) = (vec![0; 1 << 20], 0);
    let (start, before) = (Instant::now(), cpu_seconds(relay.id()));
    loop {
        match sink.read(&mut buffer).unwrap() {
            0 => break,
            count => total += count as u64,
        }
    }
    assert_eq!(total, gigabytes * 1_000_000_000);
    let seconds = start.elapsed().as_secs_f64();
    let cpu = (cpu_seconds(relay.id()) - before) / gigabytes as f64;
    source.wait().unwrap();
    drop(sink);

    let mut echo = spawn(&["echo", mode, address]);
    let mut pinger = connect(mode, address, Role::Technician, 2);
    let mut times: Vec<u128> = (0..PINGS).map(|_| ping(&mut pinger)).collect();
    times.sort_unstable();
    drop(pinger);
    echo.wait().unwrap();
    relay.kill().unwrap();
    relay.wait().unwrap();
    let megabits = total as f64 * 8.0 / seconds / 1e6;
    let (p50, p99) = (times[PINGS / 2] / 1000, times[PINGS * 99 / 100] / 1000);
    println!("{round} {mode:7} {megabits:6.0} Mbit/s  {cpu:.3} CPU s/GB  ping p50 {p50} us, p99 {p99} us");
}

fn spawn(arguments: &[&str]) -> Child {
    let program = std::env::current_exe().unwrap();
    Command::new(program).args(arguments).stdout(Stdio::piped()).spawn().unwrap()
}

/// User and system time of a process, from `/proc` (100 ticks a second).
fn cpu_seconds(process: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

#[tokio::main]
async fn relay(mode: &str) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap());
    if mode != "plain" {
        let relay = Relay::new(Config { epoch: 1, splice: mode == "splice", ..Config::new(ID) });
        relay.set_ticket_key(public(1));
        return relay.serve(listener, std::future::pending()).await;
    }
    loop {
        let (mut one, _) = listener.accept().await.unwrap();
        let (mut other, _) = listener.accept().await.unwrap();
        one.set_nodelay(true).unwrap();
        other.set_nodelay(true).unwrap();
        tokio::spawn(async move {
            let size = 64 * 1024;
            tokio::io::copy_bidirectional_with_sizes(&mut one, &mut other, size, size).await
        });
    }
}

fn connect(mode: &str, address: &str, role: Role, serial: u64) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    if mode == "plain" {
        return stream;
    }
    let (holder, peer) = if role == Role::Agent { (2, 3) } else { (3, 2) };
    let ticket = Ticket {
        session: SessionId([5; 16]),
        serial,
        relay: ID,
        epoch: 1,
        leg: role,
        holder: public(holder),
        peer: public(peer),
        expires: u64::MAX,
        max_bytes: 0,
        max_seconds: 0,
    };
    let mut secret = [1; 64];
    secret[32..].copy_from_slice(&public(1));
    let text = ticket.sign(&secret).unwrap();
    let bytes =
        leg::encode(&text, &ticket, |message| pair(holder).sign(message).as_ref().try_into().unwrap());
    stream.write_all(&bytes).unwrap();
    stream.read_exact(&mut [0]).unwrap();
    stream
}

fn source(mut stream: TcpStream, gigabytes: &str) {
    let block = vec![7; 100_000];
    for _ in 0..gigabytes.parse::<u64>().unwrap() * 10_000 {
        stream.write_all(&block).unwrap();
    }
}

fn echo(mut stream: TcpStream) {
    let mut bytes = [0; 64];
    while stream.read_exact(&mut bytes).is_ok() {
        stream.write_all(&bytes).unwrap();
    }
}

fn ping(stream: &mut TcpStream) -> u128 {
    let (start, mut bytes) = (Instant::now(), [1; 64]);
    stream.write_all(&bytes).unwrap();
    stream.read_exact(&mut bytes).unwrap();
    start.elapsed().as_nanos()
}

fn pair(seed: u8) -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap()
}

fn public(seed: u8) -> [u8; 32] {
    pair(seed).public_key().as_ref().try_into().unwrap()
}
