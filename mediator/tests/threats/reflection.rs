//! Row 6: what the UDP port sends to an address that it only believes.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use adit_tunnel::path::stun::binding_request;

use super::attack::sources;
use super::program::Program;

/// Types tried from one source; less than an answer's rate limit, so that nothing is left out by it.
const BATCH: usize = 16;

/// Sends `datagrams` thrice each, as a client would that hears nothing; returns the bytes that went in.
fn send_thrice(server: SocketAddr, source: &UdpSocket, datagrams: &[Vec<u8>]) -> usize {
    let mut sent = 0;
    for datagram in datagrams.iter().flat_map(|datagram| [datagram; 3]) {
        source.send_to(datagram, server).unwrap();
        sent += datagram.len();
    }
    sent
}

/// All that came to `source` without waiting.
fn received(source: &UdpSocket) -> Vec<Vec<u8>> {
    let mut buffer = [0; 4096];
    source.set_nonblocking(true).unwrap();
    std::iter::from_fn(|| source.recv(&mut buffer).ok().map(|length| buffer[..length].to_vec())).collect()
}

/// Waits until the server has handled all that was sent before: it has answered what came later.
fn processed(server: SocketAddr, witness: Ipv4Addr) {
    let witness = UdpSocket::bind((witness, 0)).unwrap();
    witness.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    witness.send_to(&binding_request([9; 12]), server).unwrap();
    witness.recv(&mut [0; 200]).expect("the server goes on answering");
}

fn header(kind: u16, length: u16, cookie: [u8; 4]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &length.to_be_bytes(), &cookie, &[5; 12]].concat()
}

/// Everything but a plain Binding request, which [`row_06_reflection`] measures on its own.
fn others() -> Vec<Vec<u8>> {
    const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
    let plain = binding_request([5; 12]).to_vec();
    let mut all = Vec::new();
    // Every STUN method and class (RFC 8489 section 5), TURN's among them, and ChannelData behind them.
    all.extend((0..0x5000_u16).filter(|kind| *kind != 1).map(|kind| header(kind, 0, COOKIE)));
    // Truncated, wrong lengths, attributes that end too late.
    all.extend((0..plain.len()).map(|end| plain[..end].to_vec()));
    all.extend([1, 3, 4, 8, 0xffff].map(|length| header(1, length, COOKIE)));
    for kind in (0..=0xffff_u16).step_by(257) {
        // Understood or not, required or not, with a length that fits and one that does not.
        for (claimed, value) in [(0, 0), (4, 4), (400, 4), (1, 4), (96, 96)] {
            let body = [&kind.to_be_bytes()[..], &u16::to_be_bytes(claimed), &vec![0; value]].concat();
            all.push([header(1, body.len() as u16, COOKIE), body].concat());
        }
    }
    // Many unknown attributes: an error answer would list them all.
    let body: Vec<u8> =
        (0x7000..0x7100_u16).flat_map(|kind| [&kind.to_be_bytes()[..], &[0, 0]].concat()).collect();
    all.push([header(1, body.len() as u16, COOKIE), body].concat());
    // QUIC: Initials of versions known and unknown, Handshake, short header; DTLS; RTP; nothing at all.
    for version in [1_u32, 0x6b33_43cf, 0xbaba_baba, 0] {
        for first in [0xc0_u8, 0xd0, 0xe0, 0xf0] {
            let mut initial = vec![first | 3];
            initial.extend(version.to_be_bytes());
            initial.extend([8, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0x44, 0x9e]);
            initial.resize(1200, 0x5a);
            all.push(initial);
        }
    }
    all.push([0x40; 60].to_vec());
    all.push([&[0x16, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 200, 1, 0, 0, 188][..], &[1; 188]].concat());
    all.push([0x80; 172].to_vec());
    all.push(vec![]);
    all
}

/// Every kind of datagram from sources that did not ask, thrice each: out / in <= 1.0. A Binding success:
/// <= 1.6 on IPv4, <= 2.2 on IPv6.
#[test]
fn row_06_reflection() {
    let _alone = super::alone();
    let program = Program::start(None);
    let lines = program.log().len();
    let others = others();
    let (sources, witnesses) = (sources(130, 4000), sources(131, 4000));
    let (mut total_in, mut total_out, mut worst) = (0, 0, 0.0_f64);
    let mut listening = Vec::new();
    for (number, batch) in others.chunks(BATCH).enumerate() {
        let source = UdpSocket::bind((sources[number], 0)).unwrap();
        let sent = send_thrice(program.udp, &source, batch);
        processed(program.udp, witnesses[number]);
        let out: usize = received(&source).iter().map(Vec::len).sum();
        (total_in, total_out) = (total_in + sent, total_out + out);
        worst = worst.max(out as f64 / sent.max(1) as f64);
        assert!(out <= sent, "{out} bytes for {sent}: batch {number}, {:02x?}", batch[0]);
        // A later one would be a retransmission.
        if out > 0 || number % 50 == 0 {
            listening.push(source);
        }
    }
    println!(
        "row 6: {} kinds of datagram: {total_in} bytes in, {total_out} out; worst of {BATCH} {worst:.2}",
        others.len()
    );

    let v6 = SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], program.udp.port()));
    for (server, local, most) in [(program.udp, "127.132.0.1:0", 16), (v6, "[::1]:0", 22)] {
        let source = UdpSocket::bind(local).unwrap();
        source.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let request = binding_request([5; 12]);
        source.send_to(&request, server).unwrap();
        let length = source.recv(&mut [0; 200]).expect("an answer");
        println!("row 6: Binding success to {local}: {:.2}", length as f64 / request.len() as f64);
        assert!(length * 10 <= request.len() * most);
        // More than the rate: the rest gets nothing.
        let requests = 1000;
        let mut answers = 0;
        for _ in 0..requests / 10 {
            (0..10).for_each(|_| drop(source.send_to(&request, server)));
            std::thread::sleep(Duration::from_millis(1));
            answers += received(&source).len();
        }
        println!("row 6: {answers} of {requests} answered to one source");
        assert!((1..=2 * 200).contains(&answers), "{answers}");
        listening.push(source);
    }
    std::thread::sleep(Duration::from_secs(1));
    for source in &listening[..listening.len() - 2] {
        assert!(received(source).is_empty(), "a retransmission");
    }
    assert_eq!(program.log().len(), lines, "{:?}", program.log());
}
