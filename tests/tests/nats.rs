//! The NATs of the path engine's simulation and those of the lab: the same packets, the same verdicts.

use std::net::SocketAddr;
use std::time::Instant;

use adit_tests::lab::{Lab, NatKind, Reflector, Topology, UdpProbe};
use adit_tests::lab_tests;
use anyhow::{Context, ensure};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

#[path = "../../tunnel/tests/path/nat.rs"]
#[allow(dead_code, reason = "the simulation's own, as it stands")]
mod simulated;

use simulated::Kind;

lab_tests!(simulated_nats_are_like_those_of_the_lab);

/// What the simulation calls it, and the lab.
const PAIRS: [(Kind, NatKind); 9] = [
    (Kind::Open, NatKind::None),
    (Kind::Firewall, NatKind::Firewall),
    (Kind::FullCone, NatKind::FullCone),
    (Kind::AddressRestricted, NatKind::AddressRestricted),
    (Kind::PortRestricted, NatKind::Cone),
    (Kind::Rejecting, NatKind::Rejecting),
    (Kind::Symmetric, NatKind::Symmetric),
    (Kind::Sequential, NatKind::Sequential),
    (Kind::Blocked, NatKind::UdpBlocked),
];
/// Packets, each with its answer, for each kind.
const STEPS: usize = 28;

async fn simulated_nats_are_like_those_of_the_lab() -> anyhow::Result<()> {
    for (kind, nat) in PAIRS {
        let (questions, answers, unasked, let_in) =
            compare(kind, nat).await.with_context(|| nat.to_string())?;
        println!(
            "{nat}: {answers} of {questions} questions answered, {let_in} of {unasked} unasked packets let in"
        );
    }
    Ok(())
}

/// How many questions were asked and answered, and how many packets that nobody had asked for were sent and let in.
async fn compare(kind: Kind, nat: NatKind) -> anyhow::Result<(usize, usize, usize, usize)> {
    let lab = Lab::up(&Topology::new(nat, NatKind::None).relays(1)).await?;
    let (server, other) = (&lab.server, &lab.relays[0]);
    // Two ports of one address, and another address.
    let reflectors = [Reflector::start(server)?, Reflector::start(server)?, Reflector::start(other)?];
    let probes = [UdpProbe::open(&lab.agent.host)?, UdpProbe::open(&lab.agent.host)?];
    let inside = |at: usize| anyhow::Ok(SocketAddr::new(lab.agent.host.address.into(), probes[at].port()?));
    let mut simulated = simulated::Nat::new(kind, lab.agent.public_address()?.into());
    // Which address of the simulation stands for which one of the lab.
    let mut known: Vec<(SocketAddr, SocketAddr)> = Vec::new();
    let (mut questions, mut answers, mut unasked, mut let_in) = (0, 0, 0, 0);
    let mut random = SmallRng::seed_from_u64(7);
    // Mappings outlast the test, in both.
    let now = Instant::now();
    for step in 0..STEPS {
        let (probe, reflector) =
            (random.random_range(0..probes.len()), random.random_range(0..reflectors.len()));
        let outside = reflectors[reflector].address;
        if known.is_empty() || random.random_bool(0.5) {
            let mapped = simulated.outbound(now, inside(probe)?, outside);
            let answered = mapped.and_then(|mapped| simulated.inbound(now, outside, mapped));
            let expected = mapped.filter(|_| answered == inside(probe).ok());
            let seen = probes[probe].mapping(&reflectors[reflector])?;
            ensure!(
                seen.is_some() == expected.is_some(),
                "step {step}: {} asks {outside}: seen at {seen:?}, in the simulation at {expected:?}",
                inside(probe)?
            );
            questions += 1;
            if let (Some(seen), Some(expected)) = (seen, expected) {
                answers += 1;
                let before = known.iter().find(|(one, other)| *one == expected || *other == seen);
                ensure!(
                    before.is_none_or(|before| *before == (expected, seen)),
                    "step {step}: {} asks {outside}: mapped to {seen}, in the simulation to {expected}: {known:?}",
                    inside(probe)?
                );
                if before.is_none() {
                    known.push((expected, seen));
                }
            }
        } else {
            let (in_simulation, in_lab) = known[random.random_range(0..known.len())];
            let expected = simulated.inbound(now, outside, in_simulation);
            reflectors[reflector].send(in_lab)?;
            unasked += 1;
            // Only one of the two can get it: the other one is not waited for.
            let at = match expected {
                Some(to) => usize::from(to != inside(0)?),
                None => probe,
            };
            let came = probes[at].receive()?;
            ensure!(
                came == expected.map(|_| outside),
                "step {step}: {outside} sends to {in_lab}: {came:?} comes in, in the simulation it goes to {expected:?}"
            );
            let_in += usize::from(came.is_some());
        }
    }
    Ok((questions, answers, unasked, let_in))
}
