//! What an end of a tunnel withstands from its peer: each test has the number of its row in SECURITY.md.
#![cfg(target_os = "linux")]

use std::time::Instant;

use adit_protocol::SessionId;
use adit_protocol::frame::data_header;
use adit_tunnel::session::*;
use bytes::Bytes;

/// Bytes of this process in memory.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()).expect("pages") * 4096
}

/// Carries everything between the two ends until they are silent.
fn exchange(now: Instant, ends: &mut [Session; 2], ids: [CarrierId; 2]) {
    loop {
        let mut quiet = true;
        for this in 0..2 {
            while let Some(event) = ends[this].poll_event() {
                if let Event::Incoming { stream, .. } = event {
                    ends[this].accept(stream).expect("it is there");
                }
            }
            while let Some(Transmit { head, payload }) =
                ends[this].poll_transmit(now, ids[this], Lane::Control)
            {
                quiet = false;
                for bytes in [head, payload] {
                    ends[1 - this].receive(now, ids[1 - this], Lane::Control, bytes).expect("both behave");
                }
            }
        }
        if quiet {
            return;
        }
    }
}

/// Every second byte of all streams' windows, and nobody who reads: the session's budget at most.
#[test]
fn row_09_gapped_streams() {
    let (now, id) = (Instant::now(), SessionId([1; 16]));
    let budget = Config::default().budget;
    let mut ends = [
        Session::new(End::Technician, id, 1, Config::default()),
        Session::new(End::Agent, id, 2, Config::default()),
    ];
    let attach = |ends: &mut [Session; 2]| {
        let ids = [0, 1].map(|end: usize| ends[end].attach(now, CarrierKind::Relay));
        exchange(now, ends, ids);
        ids
    };
    let mut ids = attach(&mut ends);
    let streams: Vec<StreamId> = (0..Config::default().max_streams)
        .map(|_| ends[0].open("127.0.0.1:1".parse().expect("a target")).expect("opens"))
        .collect();
    exchange(now, &mut ends, ids);

    let before = resident();
    let (mut bytes, mut lost) = (0_u64, 0);
    for stream in streams {
        for offset in (1..INITIAL_WINDOW).step_by(2) {
            // Each in a read buffer of its own size.
            let frame = [&data_header(stream.0, offset, 1, false, false)[..], b"x"].concat();
            if ends[1].receive(now, ids[1], Lane::Control, Bytes::from(frame)).is_err() {
                // The carrier is closed; the peer comes with another.
                [0, 1].iter().for_each(|end: &usize| ends[*end].detach(now, ids[*end]));
                ids = attach(&mut ends);
                lost += 1;
                break;
            }
            bytes += 1;
        }
    }
    let grown = resident().saturating_sub(before);
    println!(
        "row 9: {bytes} single bytes in 256 streams, {lost} carriers lost: {} KiB of memory",
        grown / 1024
    );
    assert!(bytes > 0 && grown <= budget, "{grown} of {budget}");
}
