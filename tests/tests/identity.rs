//! Identities in the field: a stolen key, secrets, wrong clocks. Tests are named after the rows of
//! the threat table.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use adit_tests::lab::{NatKind, Rate, Topology};
use adit_tests::proxy::ProxyKind;
use adit_tests::traffic::{TransferServer, download};
use adit_tests::world::{AGENT, Setup, World, run};
use adit_tests::{lab_tests, poll};
use anyhow::{Context, ensure};

lab_tests!(
    row_22_stolen_key_on_the_relay,
    row_22_stolen_key_on_the_direct_path,
    row_24_secrets,
    row_24_a_proxys_password,
    fault_clock_wrong_by_a_day,
);

/// From the command to the end of the last byte.
const CUT: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(30);

async fn row_22_stolen_key_on_the_relay() -> anyhow::Result<()> {
    stolen_key(Topology::new(NatKind::UdpBlocked, NatKind::Cone), "relay").await
}

async fn row_22_stolen_key_on_the_direct_path() -> anyhow::Result<()> {
    stolen_key(Topology::new(NatKind::Cone, NatKind::Cone), "direct").await
}

/// A technician's device is revoked in mid-transfer: cut within 5 s, and it cannot come back.
async fn stolen_key(topology: Topology, tier: &str) -> anyhow::Result<()> {
    let world = World::up(Setup::new(topology.rate(Rate::mbit(50))).allow(&["127.0.0.1:1-65535"])).await?;
    let server = TransferServer::start(&world.lab.agent.host).await?;
    let forward = world.forward(&[&format!("127.0.0.1:{}", server.port)]).await?;
    forward.reaches(tier, PATIENCE).await?;
    let (host, local) = (&world.lab.technician.host, forward.local[0]);
    let transfer = download(host, local, 7, 1 << 30, Duration::from_secs(120));
    let revoking = async {
        let moved = world.lab.agent.traffic()?;
        poll(PATIENCE, "bytes to flow", async || {
            let now = world.lab.agent.traffic().ok()?;
            (now.relayed + now.direct > moved.relayed + moved.direct + (8 << 20)).then_some(())
        })
        .await?;
        let start = Instant::now();
        let data = world.data("server");
        run(&world.lab.server, "adit-mediator", &["revoke", "technician", "--data", &data]).await?;
        anyhow::Ok(start)
    };
    let (transferred, start) = tokio::join!(async { (transfer.await, Instant::now()) }, revoking);
    let cut = transferred.1.saturating_duration_since(start?);
    println!("{tier}: the transfer ended {cut:?} after the command");
    ensure!(transferred.0.is_err(), "the transfer went on to its end");
    ensure!(cut < CUT, "cut only after {cut:?}");
    // It cannot come back: neither for a list nor for a session.
    let technician = world.data("technician");
    for arguments in
        [&["ls", "--data", &technician][..], &["stdio", AGENT, "127.0.0.1:22", "--data", &technician]]
    {
        let refused = world.technician(arguments)?.finish(PATIENCE).await?;
        ensure!(refused.code == 3 && refused.stderr.contains("revoked"), "{arguments:?}: {refused:?}");
    }
    Ok(())
}

/// Everything at TRACE with known secrets: none in logs, on command lines, or readable by others.
async fn row_24_secrets() -> anyhow::Result<()> {
    // Also what only a name within a library lets through.
    adit_tests::world::log("trace,tungstenite::protocol=trace,tokio_tungstenite::compat=trace");
    let world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone))).await?;
    let token = world.token(&["--role", "technician", "--all-agents"]).await?;
    let second = world.data("second");
    let file = world.scratch().join("token");
    std::fs::write(&file, &token)?;
    let enrol = ["enroll", "--token-file", &file.to_string_lossy(), "--data", &second, "--name", "second"];
    run(&world.lab.technician.host, "adit", &enrol).await?;
    let server = TransferServer::start(&world.lab.agent.host).await?;
    let forward = world.forward(&[&format!("127.0.0.1:{}", server.port)]).await?;
    forward.reaches("direct", PATIENCE).await?;
    download(&world.lab.technician.host, forward.local[0], 7, 1 << 20, PATIENCE).await?;

    // Private keys as they stand in their files, without the lines around them; the token's secret part.
    let mut secrets = vec![("token", token[6..].to_owned())];
    let mut files = 0;
    for dir in ["server", "agent", "technician", "second"] {
        for entry in walk(Path::new(&world.data(dir)))? {
            let mode = std::fs::metadata(&entry)?.permissions().mode();
            let text = std::fs::read_to_string(&entry).unwrap_or_default();
            if let Some(key) = text.split("-----").nth(2).filter(|_| text.contains("PRIVATE KEY")) {
                ensure!(mode & 0o077 == 0, "{} has mode {mode:o}", entry.display());
                secrets.push(("key", key.trim().replace(['\n', '\r'], "")));
            }
            files += 1;
        }
        let mode = std::fs::metadata(world.data(dir))?.permissions().mode();
        ensure!(mode & 0o077 == 0, "{dir} has mode {mode:o}");
    }
    ensure!(
        secrets.len() >= 6 && files > 12,
        "too little was looked at: {} secrets, {files} files",
        secrets.len()
    );
    // `adit-mediator token` prints tokens, and nothing else: that is no log.
    let mut outputs = adit_tests::process::all_outputs();
    outputs.retain(|text| !text.starts_with("adit1."));
    let logged: usize = outputs.iter().map(String::len).sum();
    ensure!(outputs.iter().any(|text| text.contains("TRACE")), "nothing was logged at TRACE");
    for text in &outputs {
        for (kind, secret) in &secrets {
            ensure!(!text.contains(secret.as_str()), "a {kind} is in a log");
        }
        // Tickets (PASETO) and ICE passwords are made by the mediator; their forms are known.
        ensure!(!text.contains("v4.public."), "a ticket is in a log");
        ensure!(
            !text.contains("password: \"") && !text.contains("ufrag: \""),
            "ICE credentials are in a log"
        );
    }
    let mut lines = 0;
    for process in std::fs::read_dir("/proc")?.flatten() {
        let Ok(line) = std::fs::read(process.path().join("cmdline")) else { continue };
        lines += 1;
        let line = String::from_utf8_lossy(&line);
        ensure!(
            !secrets.iter().any(|(_, secret)| line.contains(secret.as_str())),
            "a secret stands on a command line"
        );
    }
    println!("{} secrets in none of {logged} bytes of logs and {lines} command lines", secrets.len());
    Ok(())
}

/// The password of a proxy: in no log, on no command line, and in a file of its owner's alone.
async fn row_24_a_proxys_password() -> anyhow::Result<()> {
    adit_tests::world::log("trace,hyper_util=trace");
    let world = World::up(Setup::behind(ProxyKind::SquidBasic)).await?;
    let server = TransferServer::start(&world.lab.agent.host).await?;
    let forward = world.forward(&[&format!("127.0.0.1:{}", server.port)]).await?;
    forward.reaches("relay", PATIENCE).await?;
    download(&world.lab.technician.host, forward.local[0], 7, 1 << 20, PATIENCE).await?;
    // Enrolment remembered the proxy: the agent needs no environment.
    let file = format!("{}/config.toml", world.data("agent"));
    let (text, mode) = (std::fs::read_to_string(&file)?, std::fs::metadata(&file)?.permissions().mode());
    ensure!(
        text.contains("\nproxy = \"http://anna:Geheim-42@") && mode & 0o077 == 0,
        "mode {mode:o}: {text}"
    );
    let outputs = adit_tests::process::all_outputs();
    // The filter is in force; on the relay nothing logs more than that.
    ensure!(outputs.iter().any(|text| text.contains("DEBUG")), "nothing was logged");
    // As it is, and as Basic has it.
    for secret in ["Geheim-42", "YW5uYTpHZWhlaW0tNDI="] {
        ensure!(!outputs.iter().any(|text| text.contains(secret)), "{secret} is in a log");
        for process in std::fs::read_dir("/proc")?.flatten() {
            let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
            ensure!(!String::from_utf8_lossy(&line).contains(secret), "{secret} stands on a command line");
        }
    }
    Ok(())
}

/// An agent whose clock is a day ahead, or behind, works all the same.
async fn fault_clock_wrong_by_a_day() -> anyhow::Result<()> {
    let mut world = World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone))).await?;
    // The library itself: the wrapper would outlive the kill, and its program with it.
    let wrapped = Command::new("faketime").args(["-m", "-f", "+0", "printenv", "LD_PRELOAD"]).output()?;
    let library = String::from_utf8(wrapped.stdout)?.trim().to_owned();
    for shift in ["+24h", "-24h"] {
        world.agent.kill().await?;
        let (host, data) = (&world.lab.agent.host, world.data("agent"));
        let mut command = Command::new(adit_tests::world::binary("adit")?);
        command.env("LD_PRELOAD", &library).env("FAKETIME", shift).env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        command.args(["agent", "--json", "--data", &data, "--allow", "127.0.0.1:1-65535"]);
        world.agent = host.spawn(command)?;
        world.agent_online().await?;
        let day =
            Command::new("date").args(["--utc", "+%F", "--date", &shift.replace('h', " hours")]).output()?;
        let day = String::from_utf8(day.stdout)?;
        let dated = |lines: &[String]| lines.iter().any(|line| line.starts_with(day.trim())).then_some(());
        world.agent.error_output(PATIENCE, "a line of its log, dated by its clock", dated).await?;
        let server = TransferServer::start(&world.lab.agent.host).await?;
        let forward = world.forward(&[&format!("127.0.0.1:{}", server.port)]).await?;
        download(&world.lab.technician.host, forward.local[0], 1, 4 << 20, PATIENCE).await?;
        println!("{shift}: works, on {:?}", forward.tier());
    }
    Ok(())
}

fn walk(dir: &Path) -> anyhow::Result<Vec<std::path::PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(walk(&path)?);
        } else if path.is_file() {
            files.push(path);
        }
    }
    Ok(files)
}
