//! What users get for bad input: the right exit code, an error that helps, and nothing lost.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use adit_tests::lab::{NatKind, Topology};
use adit_tests::process::Finished;
use adit_tests::traffic::{TransferServer, download};
use adit_tests::world::{AGENT, PATIENCE, Setup, World, binary, start};
use adit_tests::{lab_tests, poll};
use anyhow::{Context, ensure};
use tokio::net::TcpListener;

lab_tests!(
    unknown_agent,
    agent_offline,
    target_not_allowed,
    target_closed,
    port_taken,
    malformed_token,
    expired_token,
    used_up_token,
    wrong_fingerprint,
    server_unreachable,
    damaged_state_directory,
    clock_wrong_by_a_day,
    ctrl_c_in_mid_transfer
);

async fn unknown_agent() -> anyhow::Result<()> {
    let world = up().await?;
    let finished = stdio(&world, "no-such-agent", "127.0.0.1:22").await?;
    // It names the ones there are.
    refused(&finished, &[3, 4], &["no-such-agent", AGENT])
}

async fn agent_offline() -> anyhow::Result<()> {
    let mut world = up().await?;
    world.agent.kill().await?;
    poll(PATIENCE, "the agent to be offline", async || {
        let data = world.data("technician");
        let listed = world.technician(&["ls", "--json", "--data", &data]).ok()?;
        listed.finish(PATIENCE).await.ok()?.stdout.contains("\"online\":false").then_some(())
    })
    .await?;
    refused(&stdio(&world, AGENT, "127.0.0.1:22").await?, &[4], &[AGENT, "offline"])
}

async fn target_not_allowed() -> anyhow::Result<()> {
    let world = up().await?;
    refused(&stdio(&world, AGENT, "192.0.2.1:22").await?, &[3], &["192.0.2.1:22", "allow"])
}

async fn target_closed() -> anyhow::Result<()> {
    let world = up().await?;
    // Allowed, and nobody listens.
    refused(&stdio(&world, AGENT, "127.0.0.1:9").await?, &[4], &["127.0.0.1:9"])
}

async fn port_taken() -> anyhow::Result<()> {
    let world = up().await?;
    let taken = world.lab.technician.host.task(TcpListener::bind("127.0.0.1:0"))?.await??;
    let (port, data) = (taken.local_addr()?.port().to_string(), world.data("technician"));
    let listen = format!("{port}:127.0.0.1:22");
    let forward = world.technician(&["forward", AGENT, "-L", &listen, "--data", &data])?;
    refused(&forward.finish(PATIENCE).await?, &[1, 2], &[&port])
}

async fn malformed_token() -> anyhow::Result<()> {
    let world = up().await?;
    refused(&enrol(&world, "hunter2").await?, &[2], &["token"])
}

async fn expired_token() -> anyhow::Result<()> {
    let world = up().await?;
    let token = world.token(&["--role", "agent", "--ttl", "1s"]).await?;
    tokio::time::sleep(Duration::from_millis(2100)).await;
    refused(&enrol(&world, &token).await?, &[3], &["expired"])
}

async fn used_up_token() -> anyhow::Result<()> {
    let world = up().await?;
    let token = world.token(&["--role", "agent", "--uses", "1"]).await?;
    ensure!(enrol(&world, &token).await?.code == 0);
    refused(&enrol(&world, &token).await?, &[3], &["used"])
}

async fn wrong_fingerprint() -> anyhow::Result<()> {
    let world = up().await?;
    let token = world.token(&["--role", "agent"]).await?;
    // The fingerprint begins with the second byte.
    let (head, rest) = token.split_once('.').context("a token has a dot")?;
    let other = if rest[4..].starts_with('A') { 'B' } else { 'A' };
    let forged = format!("{head}.{}{other}{}", &rest[..4], &rest[5..]);
    refused(&enrol(&world, &forged).await?, &[3], &["fingerprint"])?;
    // Nothing is lost: the true token was not used up.
    ensure!(enrol(&world, &token).await?.code == 0);
    Ok(())
}

async fn server_unreachable() -> anyhow::Result<()> {
    let mut world = up().await?;
    let (token, server) = (world.token(&["--role", "agent"]).await?, world.lab.server.address.to_string());
    world.mediator.kill().await?;
    refused(&enrol(&world, &token).await?, &[4], &[&server])?;
    refused(&stdio(&world, AGENT, "127.0.0.1:22").await?, &[4], &[&server])
}

async fn damaged_state_directory() -> anyhow::Result<()> {
    let world = up().await?;
    let (good, damaged) = (world.data("technician"), world.data("damaged"));
    for (n, file) in files(Path::new(&good))?.iter().enumerate() {
        let copy = format!("{damaged}{n}");
        copy_dir(Path::new(&good), Path::new(&copy))?;
        std::fs::write(Path::new(&copy).join(file), b"\0damaged\0")?;
        let finished = world.technician(&["ls", "--data", &copy])?.finish(PATIENCE).await?;
        println!("{file} damaged: exit code {}: {}", finished.code, finished.stderr);
        // A file that is not needed may be damaged; one that is needed is named.
        if finished.code != 0 {
            refused(&finished, &[2], &[file])?;
        }
    }
    let finished = world.technician(&["ls", "--data", &world.data("empty")])?.finish(PATIENCE).await?;
    refused(&finished, &[2], &["enroll"])
}

async fn clock_wrong_by_a_day() -> anyhow::Result<()> {
    let world = up().await?;
    for shift in ["-1d", "+1d"] {
        let mut command = Command::new("faketime");
        command.args(["-m", "-f", shift]).arg(binary("adit")?).args([
            "ls",
            "--data",
            &world.data("technician"),
        ]);
        command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        let finished = world.lab.technician.host.spawn(command)?.finish(PATIENCE).await?;
        println!("clock {shift}: exit code {}: {}", finished.code, finished.stderr);
        // A day's grace: it works, or says what is wrong.
        if finished.code != 0 {
            refused(&finished, &[2, 3], &["clock"])?;
        }
    }
    Ok(())
}

async fn ctrl_c_in_mid_transfer() -> anyhow::Result<()> {
    let world = up().await?;
    let transfers = TransferServer::start(&world.lab.agent.host).await?;
    let target = format!("127.0.0.1:{}", transfers.port);
    let forward = world.forward(&[&target]).await?;
    let (host, local): (_, SocketAddr) = (world.lab.technician.host.clone(), forward.local[0]);
    let start = world.lab.technician.traffic()?;
    let transfer = tokio::spawn(async move { download(&host, local, 1, 4 << 30, PATIENCE).await });
    poll(PATIENCE, "the transfer to be under way", async || {
        let now = world.lab.technician.traffic().ok()?;
        (now.relayed + now.direct > start.relayed + start.direct + (16 << 20)).then_some(())
    })
    .await?;
    forward.process.interrupt()?;
    let finished = forward.process.finish(Duration::from_secs(5)).await?;
    ensure!([0, 130].contains(&finished.code), "exit code {}", finished.code);
    ensure!(finished.stdout.contains("\"closed\""), "no event says that it closed");
    let cut_short = transfer.await?;
    ensure!(cut_short.is_err(), "a transfer that was cut short looks whole");

    // The agent has let go of everything, and serves the next.
    poll(PATIENCE, "the agent to free its connection to the target", async || {
        let mut command = Command::new("ss");
        command.args(["-Htn", "state", "established", &format!("dport = :{}", transfers.port)]);
        let open = world.lab.agent.host.spawn(command).ok()?.finish(PATIENCE).await.ok()?;
        (open.code == 0 && open.stdout.is_empty()).then_some(())
    })
    .await?;
    let again = world.forward(&[&target]).await?;
    download(&world.lab.technician.host, again.local[0], 2, 1 << 20, PATIENCE).await?;
    Ok(())
}

async fn up() -> anyhow::Result<World> {
    World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone))).await
}

async fn stdio(world: &World, agent: &str, target: &str) -> anyhow::Result<Finished> {
    world.technician(&["stdio", agent, target, "--data", &world.data("technician")])?.finish(PATIENCE).await
}

/// Enrols a new device with `token`, at the agent's site.
async fn enrol(world: &World, token: &str) -> anyhow::Result<Finished> {
    let data = world.data(&format!("new-{}", rand::random::<u32>()));
    start(&world.lab.agent.host, "adit", &["enroll", token, "--data", &data])?.finish(PATIENCE).await
}

/// The program ended with one of `codes`, and its last words are an error of one or two lines that
/// has all of `words` in it.
fn refused(finished: &Finished, codes: &[i32], words: &[&str]) -> anyhow::Result<()> {
    println!("exit code {}: {}", finished.code, finished.stderr);
    ensure!(
        codes.contains(&finished.code),
        "exit code {} and not {codes:?}: {}",
        finished.code,
        finished.stderr
    );
    let lines: Vec<&str> = finished.stderr.lines().collect();
    ensure!(!finished.stderr.contains("panicked") && !finished.stderr.contains("RUST_BACKTRACE"), "a panic");
    let error = lines[lines.len().saturating_sub(2)..].join("\n");
    for word in words {
        ensure!(
            error.to_lowercase().contains(&word.to_lowercase()),
            "the error does not say {word:?}: {error}"
        );
    }
    Ok(())
}

fn files(dir: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    ensure!(!names.is_empty(), "{} is empty", dir.display());
    Ok(names)
}

fn copy_dir(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to)?;
    for name in files(from)? {
        std::fs::copy(from.join(&name), to.join(&name))?;
    }
    Ok(())
}
