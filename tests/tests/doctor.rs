//! `adit doctor` knows the lab's networks, and says what to do.

use adit_tests::lab::{NatKind, Topology};
use adit_tests::lab_tests;
use adit_tests::process::Finished;
use adit_tests::world::{AGENT, PATIENCE, Setup, World, start};
use anyhow::{Context, ensure};
use serde_json::Value;

lab_tests!(
    both_networks_are_known_and_what_to_expect,
    a_blocked_network_and_a_dead_server_come_with_remedies,
    an_agent_that_runs_is_not_disturbed
);

/// The findings as `level: text`, and the exit code.
fn findings(finished: &Finished) -> anyhow::Result<Vec<String>> {
    let lines = finished.stdout.lines().map(|line| {
        let finding: Value = serde_json::from_str(line)?;
        let (level, text) = (finding["level"].as_str(), finding["text"].as_str());
        ensure!(level == Some("ok") || finding["remedy"].is_string(), "no remedy: {finding}");
        Ok(format!("{}: {}", level.context("a level")?, text.context("a text")?))
    });
    lines.collect()
}

fn has(findings: &[String], level: &str, words: &str) -> anyhow::Result<()> {
    let is_it = |finding: &&String| finding.starts_with(level) && finding.contains(words);
    ensure!(findings.iter().filter(is_it).count() >= 1, "no {level} {words:?} in {findings:#?}");
    Ok(())
}

async fn doctor(world: &World, arguments: &[&str]) -> anyhow::Result<(i32, Vec<String>)> {
    let data = world.data("technician");
    let arguments = [&["doctor", "--json", "--data", &data], arguments].concat();
    let finished = world.technician(&arguments)?.finish(2 * PATIENCE).await?;
    let found = findings(&finished)?;
    println!("{arguments:?}: {}", finished.code);
    found.iter().for_each(|finding| println!("  {finding}"));
    Ok((finished.code, found))
}

async fn both_networks_are_known_and_what_to_expect() -> anyhow::Result<()> {
    const ALIKE: &str = "maps alike for all destinations";
    const RANDOM: &str = "a random port for each destination";
    for (agent, technician, there, here, expect) in [
        (NatKind::Cone, NatKind::Symmetric, ALIKE, RANDOM, "within seconds"),
        (NatKind::Sequential, NatKind::None, "one after the other", "no NAT", "a second or two"),
        (NatKind::Symmetric, NatKind::Symmetric, RANDOM, RANDOM, "stay on the relay"),
        (NatKind::Upnp, NatKind::Symmetric, RANDOM, RANDOM, "a router maps ports"),
    ] {
        let world = World::up(Setup::new(Topology::new(agent, technician))).await?;
        let (code, found) = doctor(&world, &[AGENT]).await?;
        ensure!(code == 0 && !found.iter().any(|finding| finding.starts_with("fault")), "{found:#?}");
        for (from, words) in [("here", here), (AGENT, there)] {
            for words in [words, "mediator at", "relay at", "STUN at"] {
                let said =
                    found.iter().any(|it| it.contains(&format!("from {from}: ")) && it.contains(words));
                ensure!(said, "nothing of {words:?} from {from}: {found:#?}");
            }
        }
        for (from, nat) in [("here", technician), (AGENT, agent)] {
            let mapped = format!("from {from}: the router maps");
            let said =
                found.iter().find(|it| it.contains(&mapped)).map(|it| it.contains("ports on request ("));
            let expected = (nat != NatKind::None).then_some(true);
            ensure!(said == expected, "port mapping from {from}: {found:#?}");
            let way =
                found.iter().any(|it| it.starts_with("ok") && it.contains(&mapped) && it.contains("UPnP"));
            ensure!(way == (nat == NatKind::Upnp), "port mapping from {from}: {found:#?}");
        }
        has(&found, "", &format!("to {AGENT}: "))?;
        ensure!(found.last().is_some_and(|last| last.contains(expect)), "{found:#?}");
    }
    Ok(())
}

async fn a_blocked_network_and_a_dead_server_come_with_remedies() -> anyhow::Result<()> {
    let mut world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::UdpBlocked))).await?;
    let (code, found) = doctor(&world, &["no-such-agent"]).await?;
    ensure!(code == 4);
    has(&found, "fault", "STUN at")?;
    has(&found, "fault", "no-such-agent")?;
    has(&found, "ok", "relay at")?;
    world.mediator.kill().await?;
    let (code, found) = doctor(&world, &[]).await?;
    ensure!(code == 4);
    has(&found, "fault", "cannot be reached")?;
    Ok(())
}

async fn an_agent_that_runs_is_not_disturbed() -> anyhow::Result<()> {
    let world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone))).await?;
    let data = world.data("agent");
    let agent = &world.lab.agent.host;
    let finished = start(agent, "adit", &["doctor", "--json", "--data", &data])?.finish(PATIENCE).await?;
    ensure!(finished.code == 0, "{finished:?}");
    has(&findings(&finished)?, "ok", "knows this device")?;
    let asked = start(agent, "adit", &["doctor", "another", "--data", &data])?.finish(PATIENCE).await?;
    ensure!(asked.code == 2 && asked.stderr.contains("only a technician"), "{asked:?}");
    // Still there, and no clone of itself.
    let listed = world.technician(&["ls", "--json", "--data", &world.data("technician")])?;
    ensure!(listed.finish(PATIENCE).await?.ok()?.contains("\"online\":true"));
    ensure!(world.agent.events("online").len() == 1 && world.agent.events("offline").is_empty());
    ensure!(!world.mediator.error_lines().iter().any(|line| line.contains("clone")));
    Ok(())
}
