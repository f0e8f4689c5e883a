//! Rows of the threat table that need two ends and something hostile, but no network.

use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use adit_client::identity::certificate::{Authority, Subject};
use adit_client::identity::{DeviceKey, Identity};
use adit_client::tls::{self, carrier_accept, carrier_connect};
use adit_client::tunnel::{Notice, Tunnel, byte_carrier};
use adit_protocol::frame::{Frame, Hello, Position};
use adit_protocol::{DeviceId, PROTOCOL_VERSION, Role, SessionId};
use adit_tunnel::session::{CarrierKind, End};
use bytes::BytesMut;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// More than any step takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes that the technician sends in each try.
const BYTES: usize = 256 * 1024;
/// What no relay may ever see.
const MARKER: &[u8] = b"plaintext-marker-8c1f2e";

/// What a hostile relay does to the bytes of one direction.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Attack {
    Nothing,
    Flip,
    Drop,
    Reorder,
    Replay,
    Insert,
    Cut,
}

/// Moves bytes from one leg to the other, and attacks one place somewhere in them. Keeps all that it saw.
async fn relay(
    mut from: ReadHalf<DuplexStream>,
    mut to: WriteHalf<DuplexStream>,
    attack: Attack,
    seed: u64,
    seen: Arc<Mutex<Vec<u8>>>,
) {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut before = if attack == Attack::Nothing { usize::MAX } else { random.random_range(0..BYTES) };
    let (mut piece, mut last) = (vec![0; 16 * 1024], Vec::new());
    while let Ok(count @ 1..) = from.read(&mut piece).await {
        let mut bytes = piece[..count].to_vec();
        seen.lock().expect("no panic").extend_from_slice(&bytes);
        if before < count {
            let at = std::mem::replace(&mut before, usize::MAX);
            match attack {
                Attack::Nothing => {}
                Attack::Flip => bytes[at] ^= 1 << random.random_range(0..8u8),
                Attack::Drop => drop(bytes.drain(at..(at + random.random_range(1..40usize)).min(count))),
                Attack::Reorder => bytes.rotate_left(at.max(1)),
                Attack::Replay => bytes = [&last[..], &bytes].concat(),
                Attack::Insert => bytes.insert(at, random.random()),
                Attack::Cut => bytes.truncate(at),
            }
            if to.write_all(&bytes).await.is_err() || attack == Attack::Cut {
                break;
            }
        } else {
            before = if before == usize::MAX { before } else { before - count };
            if to.write_all(&bytes).await.is_err() {
                break;
            }
        }
        last = piece[..count].to_vec();
    }
    let _ = to.shutdown().await;
}

fn organisation() -> [Identity; 2] {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    let authority = Authority::new(&DeviceKey::generate().expect("key"), now).expect("root");
    [(Role::Technician, 1), (Role::Agent, 2)].map(|(role, id)| {
        let key = DeviceKey::generate().expect("key");
        let subject = Subject { device_id: DeviceId([id; 16]), role, name: "x".into(), tags: vec![] };
        Identity {
            device_id: subject.device_id,
            role,
            certificate: authority.sign_key(&key.public_key(), &subject, now).expect("signs"),
            name: subject.name,
            tags: vec![],
            servers: vec![],
            hosts: vec![],
            ticket_key: None,
            root: authority.certificate().clone(),
            key: Arc::new(key),
            revoked: Arc::default(),
            proxies: Default::default(),
            p2p: Default::default(),
        }
    })
}

/// A tunnel over a relay that attacks what the technician sends: what the agent got of it, whether that was all,
/// and what the relay saw.
async fn attacked(attack: Attack, seed: u64) -> (Vec<u8>, bool, Vec<u8>) {
    let [technician, agent] = organisation();
    let client = Arc::new(tls::tunnel_client(&technician, Some(agent.device_id)).expect("a configuration"));
    let server = Arc::new(tls::tunnel_server(&agent, Some(technician.device_id)).expect("a configuration"));
    let (one, near) = duplex(64 * 1024);
    let (other, far) = duplex(64 * 1024);
    let ((near_read, near_write), (far_read, far_write)) = (split(near), split(far));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = JoinSet::new();
    tasks.spawn(relay(near_read, far_write, attack, seed, seen.clone()));
    tasks.spawn(relay(far_read, near_write, Attack::Nothing, seed, seen.clone()));

    let (tunnel, _notices) = Tunnel::new(End::Technician, SessionId([7; 16]));
    let (agents, mut incoming) = Tunnel::new(End::Agent, SessionId([7; 16]));
    let carried = tunnel.clone();
    tasks.spawn(async move {
        if let Ok(stream) = carrier_connect(client, one).await {
            byte_carrier::run(carried, CarrierKind::Relay, stream, None, None).await;
        }
    });
    tasks.spawn(async move {
        let stream = tunnel.open(&"127.0.0.1:9".parse().expect("a target")).await.expect("opens");
        let mut sent = 0;
        while sent < BYTES
            && let Ok(room) = stream.writable().await
        {
            let next = (sent + room).min(BYTES);
            let Ok(()) = stream.write_bytes(content()[sent..next].to_vec().into()) else { break };
            sent = next;
        }
        stream.finish();
        // Kept open until the test is over.
        stream.finished().await.unwrap_or_default();
    });
    let got = Arc::new(Mutex::new((Vec::new(), false)));
    let collected = got.clone();
    let receiving = async move {
        while let Some(notice) = incoming.recv().await {
            let Notice::Incoming(stream, _) = notice else { continue };
            stream.accept();
            while let Ok(bytes) = stream.read_chunk(usize::MAX).await {
                let mut collected = collected.lock().expect("no panic");
                collected.1 = bytes.is_empty();
                collected.0.extend_from_slice(&bytes);
                if collected.1 {
                    stream.finish();
                    return;
                }
            }
        }
    };
    let carrying = async {
        if let Ok(stream) = carrier_accept(server, other).await {
            byte_carrier::run(agents, CarrierKind::Relay, stream, None, None).await;
        }
    };
    let over = async {
        tokio::select! {
            () = receiving => {}
            () = carrying => {}
        }
    };
    timeout(PATIENCE, over).await.expect("what was attacked ends, or all has arrived");
    tasks.shutdown().await;
    let (bytes, whole) = got.lock().expect("no panic").clone();
    let seen = seen.lock().expect("no panic").clone();
    (bytes, whole, seen)
}

/// Noise, so that it cannot be compressed or guessed, with the marker in front.
fn content() -> &'static [u8] {
    static CONTENT: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let mut bytes = MARKER.to_vec();
        bytes.resize(BYTES, 0);
        SmallRng::seed_from_u64(1).fill(&mut bytes[MARKER.len()..]);
        bytes
    });
    &CONTENT
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_13_hostile_relay() {
    let (got, whole, seen) = attacked(Attack::Nothing, 0).await;
    assert!(whole && got == content());
    assert!(seen.len() > BYTES, "the relay saw {} bytes", seen.len());
    assert!(!seen.windows(MARKER.len()).any(|window| window == MARKER), "plaintext at the relay");
    let (mut tries, mut delivered) = (0, 0);
    for attack in [Attack::Flip, Attack::Drop, Attack::Reorder, Attack::Replay, Attack::Insert, Attack::Cut] {
        for seed in 0..20 {
            let (got, whole, _) = attacked(attack, seed).await;
            // Replaying nothing, or turning a piece by its whole length, is no attack.
            assert!(!whole || got == content(), "{attack:?} {seed}");
            assert!(content().starts_with(&got), "{attack:?} {seed}: a wrong byte was delivered");
            tries += 1;
            delivered += usize::from(whole);
        }
    }
    println!("{tries} attacks, none delivered a wrong byte; {delivered} changed nothing");
    assert!(delivered <= tries / 10, "the attacks must bite: {delivered} of {tries} did not");
}

/// An agent that opens streams, or sends what no agent sends, loses its carrier, and the technician's end has
/// nothing of it.
#[tokio::test]
async fn row_14_hostile_agent() {
    let hello = Frame::Hello(Hello {
        version: u64::from(PROTOCOL_VERSION),
        session: SessionId([7; 16]),
        instance: 1,
        peer_instance: 0,
        positions: vec![],
    });
    let open = |target: &str| Frame::Open { stream: 0, target: target.parse().expect("a target") };
    let window = Frame::Window(Position { stream: 9, acked: 1, credit: 2 });
    for hostile in
        [open("127.0.0.1:22"), open("127.0.0.1:53/udp"), window, Frame::Reset { stream: 3, code: 1 }]
    {
        let (tunnel, mut notices) = Tunnel::new(End::Technician, SessionId([7; 16]));
        let (one, mut other) = duplex(64 * 1024);
        let carrier = tokio::spawn(byte_carrier::run(tunnel.clone(), CarrierKind::Relay, one, None, None));
        let mut bytes = BytesMut::new();
        hello.encode(&mut bytes);
        hostile.encode(&mut bytes);
        other.write_all(&bytes).await.expect("writes");
        let reason = timeout(PATIENCE, carrier).await.expect("ends").expect("no panic");
        println!("{hostile:?}: {reason}");
        assert!(reason.contains("the peer"), "{hostile:?}: {reason}");
        assert_eq!(tunnel.stream_count(), 0);
        while let Ok(notice) = notices.try_recv() {
            assert!(!matches!(notice, Notice::Incoming(..) | Notice::IncomingFlow(..)), "{notice:?}");
        }
    }
    // What an agent says of itself reaches a terminal only as text.
    let name = "\u{1b}]0;owned\u{7}\u{202e}../../etc/passwd\r\n".repeat(50);
    let shown = adit_client::events::printable(&name, 100);
    assert!(!shown.chars().any(|c| c.is_control() || c == '\u{202e}'), "{shown}");
    assert!(shown.chars().count() < 1500);
    assert!(
        !adit_client::identity::certificate::is_name("../x")
            && !adit_client::identity::certificate::is_name(&name)
    );
}
