//! What the redirector's pages cost: beside nginx as a plain reverse proxy to the same web server over the same links.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use adit_tests::lab::{Host, NatKind, Topology};
use adit_tests::process::Process;
use adit_tests::world::{AGENT, PATIENCE, Setup, World};
use adit_tests::{lab_tests, poll, slack};
use anyhow::{Context, ensure};
use serde_json::Value;

lab_tests!(beside_nginx);

const CONNECTIONS: usize = 64;
const ROUNDS: usize = 3;
const SECONDS: u64 = 4;
/// Port of the web server beside the agent, and of nginx on the server.
const TARGET: u16 = 8080;
const PROXY: u16 = 8443;

async fn beside_nginx() -> anyhow::Result<()> {
    let world = World::up(Setup::new(Topology::new(NatKind::None, NatKind::None)).redirector()).await?;
    let (agent, server) = (&world.lab.agent.host, &world.lab.server);
    let files = world.scratch().join("files");
    std::fs::create_dir(&files)?;
    for (name, length) in SIZES {
        std::fs::write(files.join(name), vec![b'x'; length])?;
    }
    let _target = nginx(
        agent,
        &world.scratch().join("target"),
        &format!(
            "server {{ listen {TARGET} backlog=4096; root {}; keepalive_requests 1000000; }}",
            files.display()
        ),
    )?;
    // As fast as it gets: with connections to the target that are kept.
    let data = world.data("server");
    let root = format!("{data}/web-root.pem");
    let _proxy = nginx(
        server,
        &world.scratch().join("proxy"),
        &format!(
            "upstream target {{ server {}:{TARGET}; keepalive 128; keepalive_requests 1000000; }}
             server {{
                 listen {PROXY} ssl backlog=4096; ssl_protocols TLSv1.3; keepalive_requests 1000000;
                 ssl_certificate {data}/https.pem; ssl_certificate_key {data}/https-key.pem;
                 location / {{
                     proxy_pass http://target; proxy_http_version 1.1; proxy_set_header Connection \"\";
                     proxy_set_header X-Forwarded-For $remote_addr;
                 }}
             }}",
            agent.address
        ),
    )?;
    let technician = &world.lab.technician.host;
    let by_nginx = format!("https://{}:{PROXY}", server.address);
    poll(PATIENCE, "nginx", async || {
        let mut command = Command::new("curl");
        command.args(["-fsS", "--cacert", &root, "-o", "/dev/null", &format!("{by_nginx}/1KiB")]);
        let curl = technician.spawn(command).ok()?.finish(PATIENCE).await.ok()?;
        (curl.code == 0).then_some(())
    })
    .await?;

    let target = format!("http://127.0.0.1:{TARGET}/");
    let technicians = world.data("technician");
    let redirect = ["redirect", AGENT, &target, "--ttl", "1h", "--json", "--data", &technicians];
    let opened: Value = serde_json::from_str(&world.technician(&redirect)?.finish(PATIENCE).await?.ok()?)?;
    let link = opened["link"].as_str().context("a link")?;
    let by_adit = link.split("/.adit").next().context("a link")?.to_owned();
    let mut command = Command::new("curl");
    command.args(["-sSi", "--cacert", &root, link]);
    let entered = technician.spawn(command)?.finish(PATIENCE).await?.ok()?;
    let cookie = entered
        .lines()
        .find_map(|line| line.strip_prefix("set-cookie: ")?.split(';').next())
        .context("a cookie")?;

    for (name, _) in SIZES {
        let (mut nginx, mut adit) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            nginx.push(wrk(technician, &format!("{by_nginx}/{name}"), "x=y").await?);
            adit.push(wrk(technician, &format!("{by_adit}/{name}"), cookie).await?);
        }
        let (nginx, adit) = (median(nginx), median(adit));
        let (rate, tail) = (adit.rate / nginx.rate, adit.p99.as_secs_f64() / nginx.p99.as_secs_f64());
        println!(
            "{name}, {CONNECTIONS} connections, medians of {ROUNDS}: nginx {:.0}/s, p99 {:?}; adit {:.0}/s, p99 {:?}; \
             requests {rate:.2} x (mark 0.5), p99 {tail:.2} x (mark 2)",
            nginx.rate, nginx.p99, adit.rate, adit.p99
        );
        ensure!(rate >= 0.5 / slack(), "{name}: {rate:.2} x the requests of nginx");
        ensure!(tail <= 2.0 * slack(), "{name}: {tail:.2} x the p99 of nginx");
    }
    Ok(())
}

const SIZES: [(&str, usize); 2] = [("1KiB", 1 << 10), ("1MiB", 1 << 20)];

/// What wrk measured.
#[derive(Debug, Clone, Copy)]
struct Load {
    /// Requests a second.
    rate: f64,
    p99: Duration,
}

async fn wrk(host: &Host, url: &str, cookie: &str) -> anyhow::Result<Load> {
    let mut command = Command::new("wrk");
    let (connections, seconds) = (CONNECTIONS.to_string(), format!("{SECONDS}s"));
    command.args([
        "-t",
        "1",
        "-c",
        &connections,
        "-d",
        &seconds,
        "--latency",
        "-H",
        &format!("Cookie: {cookie}"),
        url,
    ]);
    let said = host.spawn(command)?.finish(Duration::from_secs(SECONDS + 20)).await?.ok()?;
    ensure!(!said.contains("Non-2xx") && !said.contains("Socket errors"), "{said}");
    let after = |word: &str| said.lines().find_map(|line| line.trim().strip_prefix(word).map(str::trim));
    let rate = after("Requests/sec:").and_then(|rate| rate.parse().ok()).with_context(|| said.clone())?;
    let p99 = after("99%").and_then(time).with_context(|| said.clone())?;
    Ok(Load { rate, p99 })
}

fn time(text: &str) -> Option<Duration> {
    let unit = text.find(|c: char| c.is_ascii_alphabetic())?;
    let value: f64 = text[..unit].parse().ok()?;
    let seconds = match &text[unit..] {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        _ => return None,
    };
    Some(Duration::from_secs_f64(value * seconds))
}

fn median(mut loads: Vec<Load>) -> Load {
    let middle = loads.len() / 2;
    loads.sort_by(|a, b| a.rate.total_cmp(&b.rate));
    let rate = loads[middle].rate;
    loads.sort_by_key(|load| load.p99);
    Load { rate, p99: loads[middle].p99 }
}

/// nginx with Debian's own settings otherwise.
fn nginx(host: &Host, dir: &Path, servers: &str) -> anyhow::Result<Process> {
    std::fs::create_dir(dir)?;
    let (at, config) = (dir.display(), dir.join("nginx.conf"));
    let user = if rustix::process::getuid().is_root() { "user root;" } else { "" };
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|name| format!("{name}_temp_path {at}/{name};"))
        .concat();
    std::fs::write(
        &config,
        format!(
            "daemon off; {user} pid {at}/pid; error_log stderr; worker_processes auto;
             events {{ worker_connections 768; }}
             http {{ sendfile on; tcp_nopush on; access_log off; {temporary} {servers} }}"
        ),
    )?;
    let mut command = Command::new("nginx");
    command.arg("-c").arg(&config).arg("-e").arg("stderr");
    host.spawn(command)
}
