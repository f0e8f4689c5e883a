//! `adit.exe` under Wine: enrolled, as agent, as technician and as service, on the relay and direct, against the
//! real server and the other end on Linux. Everything on loopback.
//!
//! `.ci/windows` builds it and runs this test, with [`EXE`] and [`WINE`] set. Without [`EXE`] there is no test
//! here at all: on most machines there is no `adit.exe`.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use adit_tests::process::{Process, fail_on_logged_errors, print_outputs};
use adit_tests::traffic::{Noise, hex, sha256};
use adit_tests::world::binary;
use adit_tests::{poll, within};
use anyhow::{Context, ensure};
use aws_lc_rs::digest;
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

/// Environment variable: the path of `adit.exe`, with what Wine needs beside it.
const EXE: &str = "ADIT_WINDOWS_EXE";
/// Environment variable: the path of Wine. Its `WINEPREFIX` must be set, too, and be there.
const WINE: &str = "ADIT_WINE";
/// How long anything may take that waits for no more than a program's start. Wine is slow to start.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long Wine may start its own services, one at a time, before it starts ours.
const BOOTING: Duration = Duration::from_secs(150);
/// How long a transfer may take.
const TRANSFER: Duration = Duration::from_secs(60);
/// Allowed, and nobody listens.
const CLOSED: &str = "127.0.0.1:9";
/// Bytes that go there and back on each way.
const BYTES: u64 = 16 << 20;
/// Bytes through standard input and output.
const STDIO_BYTES: u64 = 1 << 20;

type Test = fn(Stage) -> anyhow::Result<()>;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // They share Wine's prefix, and measure.
    arguments.test_threads = Some(1);
    let tests: [(&str, Test); 3] = [
        ("wine_agent_serves_a_linux_technician", |stage| stage.run(wine_agent)),
        ("wine_technician_reaches_a_linux_agent", |stage| stage.run(wine_technician)),
        ("wine_runs_the_service", |stage| stage.run(wine_service)),
    ];
    let Some(exe) = std::env::var_os(EXE).map(PathBuf::from) else {
        return libtest_mimic::run(&arguments, Vec::new()).exit_code();
    };
    let Ok(_user) = User::start() else {
        eprintln!("{WINE} is not set to the path of Wine");
        return ExitCode::FAILURE;
    };
    let trials = tests.map(|(name, test)| {
        let exe = exe.clone();
        Trial::test(name, move || {
            let result = Stage::new(exe).and_then(test);
            result.map_err(|error| {
                print_outputs();
                Failed::from(format!("{error:#}"))
            })
        })
    });
    libtest_mimic::run(&arguments, trials.into()).exit_code()
}

async fn wine_agent(stage: &Stage) -> anyhow::Result<()> {
    let server = stage.server().await?;
    let (echo, udp) = (tcp_echo().await?, udp_echo().await?);
    let enrolled = stage.enrol(System::Wine, "agent", &[]).await?;
    ensure!(enrolled["role"] == "agent", "{enrolled}");
    stage.enrol(System::Linux, "technician", &["--all-agents"]).await?;
    let agent = stage.agent(System::Wine, &[echo.to_string(), format!("{udp}/udp")]).await?;

    stage.list(System::Linux).await?;
    for (via, carrier) in [("relay", "relay"), ("direct", "quic")] {
        let (forward, local) = stage.forward(System::Linux, echo, via, carrier).await?;
        transfer(local, &format!("Linux technician, {via}, wine agent")).await?;
        let status = stage.status(System::Wine, "agent").await?;
        ensure!(status["command"] == "agent" && status["sessions"][0]["peer"] == "technician", "{status}");
        ensure!(status["sessions"][0]["received"].as_u64() >= Some(BYTES), "{status}");
        stage.end(forward).await?;
    }
    stage.datagrams(System::Linux, udp).await?;
    stage.stdio(System::Linux, echo).await?;
    stage.refusals(System::Linux).await?;
    stage.end(agent).await?;
    drop(server);
    Ok(())
}

async fn wine_technician(stage: &Stage) -> anyhow::Result<()> {
    let server = stage.server().await?;
    let (echo, udp) = (tcp_echo().await?, udp_echo().await?);
    let greeter = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    stage.enrol(System::Linux, "agent", &[]).await?;
    let enrolled = stage.enrol(System::Wine, "technician", &["--all-agents"]).await?;
    ensure!(enrolled["role"] == "technician", "{enrolled}");
    let allow = [echo.to_string(), format!("{udp}/udp"), greeter.local_addr()?.to_string()];
    let agent = stage.agent(System::Linux, &allow).await?;

    stage.list(System::Wine).await?;
    for (via, carrier) in [("relay", "relay"), ("direct", "quic")] {
        let (forward, local) = stage.forward(System::Wine, echo, via, carrier).await?;
        transfer(local, &format!("wine technician, {via}, Linux agent")).await?;
        let status = stage.status(System::Wine, "technician").await?;
        ensure!(status["command"] == "forward" && status["sessions"][0]["peer"] == "agent", "{status}");
        stage.end(forward).await?;
    }
    stage.datagrams(System::Wine, udp).await?;
    stage.stdio(System::Wine, echo).await?;
    stage.target_ends_first(greeter).await?;
    stage.refusals(System::Wine).await?;
    stage.end(agent).await?;
    drop(server);
    Ok(())
}

/// Wine's service manager, not Windows': it knows neither accounts nor access lists.
async fn wine_service(stage: &Stage) -> anyhow::Result<()> {
    let server = stage.server().await?;
    let echo = tcp_echo().await?;
    let service = async |arguments: &[&str]| {
        let arguments = [&["service"], arguments].concat();
        let process = Process::here(stage.adit(System::Wine, &arguments, "agent")?)?;
        process.finish(BOOTING).await
    };
    // In the order of its help: the directory is made before a key is in it.
    let installed = service(&["install"]).await?;
    ensure!(installed.code == 0 && installed.stderr.contains("adit enroll"), "{installed:?}");
    ensure!(service(&["status"]).await?.code == 1, "it runs without an identity");
    stage.enrol(System::Wine, "agent", &[]).await?;
    let data = stage.state.path().join("agent");
    std::fs::write(data.join("config.toml"), format!("[agent]\nallow = [\"{echo}\"]\n"))?;
    let started = service(&["install"]).await?;
    ensure!(started.code == 0 && started.stdout.contains("started"), "{started:?}");
    poll(PATIENCE, "the service to run", async || {
        let status: Value =
            serde_json::from_str(service(&["status", "--json"]).await.ok()?.stdout.trim()).ok()?;
        (status["running"] == true && status["enabled"] == true && status["pid"].is_u64()).then_some(())
    })
    .await?;

    stage.enrol(System::Linux, "technician", &["--all-agents"]).await?;
    stage.list(System::Linux).await?;
    let (forward, local) = stage.forward(System::Linux, echo, "relay", "relay").await?;
    transfer(local, "Linux technician, relay, service under wine").await?;
    let uninstalled = service(&["uninstall", "--purge"]).await?;
    ensure!(uninstalled.code == 0, "{uninstalled:?}");
    let reason = forward.event(PATIENCE, "closed", 0, |event| Some(event["reason"].clone())).await?;
    println!("Wine: the service is gone, and the technician heard: {reason}");
    ensure!(reason.as_str().is_some_and(|reason| reason.contains("stopped")), "{reason}");
    let status = service(&["status", "--json"]).await?;
    ensure!(status.code == 1 && status.stdout.contains("\"installed\":false"), "{status:?}");
    ensure!(!data.exists(), "its state is left");
    drop(server);
    Ok(())
}

/// A process under Wine that waits for input. Wine ends everything, its services above all, soon after the last
/// process that is no service.
struct User(Child);

impl User {
    fn start() -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::var_os(WINE).context("not set")?);
        command.arg("cmd.exe").env("WINEDEBUG", "-all");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(command.spawn()?))
    }
}

impl Drop for User {
    fn drop(&mut self) {
        // Both fail only when it has ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where a program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum System {
    Linux,
    Wine,
}

/// The programs, and the directory that all of them have their state in.
struct Stage {
    exe: PathBuf,
    wine: PathBuf,
    state: TempDir,
}

impl Stage {
    fn new(exe: PathBuf) -> anyhow::Result<Self> {
        ensure!(exe.is_file(), "{EXE}: there is no {}", exe.display());
        ensure!(std::env::var_os("WINEPREFIX").is_some(), "WINEPREFIX is not set");
        let wine = std::env::var_os(WINE).map(PathBuf::from).with_context(|| format!("{WINE} is not set"))?;
        Ok(Self { exe, wine, state: tempfile::Builder::new().prefix("adit-windows-").tempdir()? })
    }

    fn run(self, test: impl AsyncFnOnce(&Self) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let started = Instant::now();
        runtime.block_on(test(&self))?;
        println!("took {:.1?}", started.elapsed());
        fail_on_logged_errors()
    }

    /// `adit` there, with these arguments, and `--data` for the state directory `name`.
    fn adit(&self, system: System, arguments: &[&str], name: &str) -> anyhow::Result<Command> {
        let data = self.state.path().join(name);
        let mut command = match system {
            System::Linux => Command::new(binary("adit")?),
            System::Wine => {
                let mut command = Command::new(&self.wine);
                command.arg(&self.exe).env("WINEDEBUG", "-all");
                command
            }
        };
        let data = match system {
            System::Linux => data.into_os_string(),
            // Wine's drive Z is the root of the file system.
            System::Wine => format!("Z:{}", data.display()).replace('/', "\\").into(),
        };
        let own = std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("ADIT_"));
        own.for_each(|(name, _)| {
            command.env_remove(name);
        });
        command.args(arguments).arg("--data").arg(data);
        Ok(command)
    }

    /// Runs `adit` to its successful end, with `input`; the one JSON object that it says.
    async fn say(
        &self,
        system: System,
        arguments: &[&str],
        name: &str,
        input: &str,
    ) -> anyhow::Result<Value> {
        let mut process = Process::here(self.adit(system, arguments, name)?)?;
        process.feed(input.as_bytes()).await?;
        let said = process.finish(PATIENCE).await?.ok()?;
        serde_json::from_str(said.trim()).with_context(|| format!("not one JSON object: {said:?}"))
    }

    /// A mediator with an embedded relay on free ports.
    async fn server(&self) -> anyhow::Result<Process> {
        let data = self.state.path().join("server");
        let mediator = |arguments: &[&str]| {
            let mut command = Command::new(binary("adit-mediator")?);
            command.args(arguments).arg("--data").arg(&data);
            Process::here(command)
        };
        mediator(&["init", "--host", "127.0.0.1"])?.finish(PATIENCE).await?.ok()?;
        let ports = free_ports()?;
        let [https, relay, diagnostics, udp] = ports;
        let config = format!(
            "hosts = [\"127.0.0.1\"]\n[listen]\nhttps = \"{https}\"\nrelay = \"{relay}\"\n\
             diagnostics = \"{diagnostics}\"\nudp = \"{udp}\"\n"
        );
        std::fs::write(data.join("config.toml"), config)?;
        let server = mediator(&["run"])?;
        server
            .error_output(PATIENCE, "that it is ready", |lines| {
                lines.iter().any(|line| line.contains("ready")).then_some(())
            })
            .await?;
        Ok(server)
    }

    /// Enrols a device, with its token on standard input; what it says.
    async fn enrol(&self, system: System, role: &str, more: &[&str]) -> anyhow::Result<Value> {
        let mut command = Command::new(binary("adit-mediator")?);
        command.args(["token", "--role", role]).args(more);
        command.arg("--data").arg(self.state.path().join("server"));
        let token = Process::here(command)?.finish(PATIENCE).await?.ok()?;
        let arguments = ["enroll", "-", "--json", "--name", role];
        let enrolled = self.say(system, &arguments, role, &format!("{}\r\n", token.trim())).await?;
        println!("{system:?}: enrolled as {}", enrolled["role"]);
        Ok(enrolled)
    }

    /// A running agent that is online.
    async fn agent(&self, system: System, allow: &[String]) -> anyhow::Result<Process> {
        let mut arguments = vec!["agent", "--json", "--allow", CLOSED];
        allow.iter().for_each(|allow| arguments.extend(["--allow", allow]));
        let agent = Process::here(self.adit(system, &arguments, "agent")?)?;
        agent.event(PATIENCE, "online", 0, |_| Some(())).await?;
        Ok(agent)
    }

    async fn list(&self, system: System) -> anyhow::Result<()> {
        poll(PATIENCE, "the agent to be listed as online", async || {
            let listed = self.say(system, &["ls", "--json"], "technician", "").await.ok()?;
            (listed["name"] == "agent" && listed["online"] == true).then_some(())
        })
        .await
    }

    /// A forward whose tunnel is on `carrier`, and its local address.
    async fn forward(
        &self,
        system: System,
        target: impl std::fmt::Display,
        via: &str,
        carrier: &str,
    ) -> anyhow::Result<(Process, SocketAddr)> {
        let spec = format!("127.0.0.1:0:{target}");
        let arguments = ["forward", "agent", "-L", &spec, "--via", via, "--json"];
        let forward = Process::here(self.adit(system, &arguments, "technician")?)?;
        let local =
            forward.event(PATIENCE, "listening", 0, |event| event["local"].as_str()?.parse().ok()).await?;
        forward.event(PATIENCE, "tier", 0, |event| (event["carrier"] == carrier).then_some(())).await?;
        Ok((forward, local))
    }

    /// What the one process that uses this directory is doing.
    async fn status(&self, system: System, name: &str) -> anyhow::Result<Value> {
        self.say(system, &["status", "--json"], name, "").await
    }

    /// Datagrams there and back; one that is lost is sent again.
    async fn datagrams(&self, system: System, target: SocketAddr) -> anyhow::Result<()> {
        let (forward, local) = self.forward(system, format!("{target}/udp"), "direct", "quic").await?;
        let socket = UdpSocket::bind("127.0.0.1:0").await?;
        socket.connect(local).await?;
        let sent = [0xa5; 1000];
        let got = poll(PATIENCE, "a datagram's echo", async || {
            let mut got = [0; 2000];
            socket.send(&sent).await.ok()?;
            let length = tokio::time::timeout(Duration::from_secs(1), socket.recv(&mut got)).await;
            length.ok()?.ok().map(|length| got[..length].to_vec())
        })
        .await?;
        ensure!(got == sent, "another datagram came back");
        println!("{system:?}: a datagram there and back");
        self.end(forward).await
    }

    /// Standard input and output, to their ends.
    async fn stdio(&self, system: System, target: SocketAddr) -> anyhow::Result<()> {
        let mut noise = Vec::new();
        Noise::new(3).send(&mut noise, STDIO_BYTES).await?;
        let arguments = ["stdio", "agent", &target.to_string(), "--via", "relay"];
        let mut command = tokio::process::Command::from(self.adit(system, &arguments, "technician")?);
        let pipe = Stdio::piped;
        let mut child = command.stdin(pipe()).stdout(pipe()).stderr(pipe()).kill_on_drop(true).spawn()?;
        let mut stdin = child.stdin.take().context("piped")?;
        let feeding = tokio::spawn(async move { stdin.write_all(&noise).await });
        let output = within(TRANSFER, "adit stdio", async { Ok(child.wait_with_output().await?) }).await?;
        feeding.await??;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(0), "{:?}: {complaint}", output.status);
        let hash = hex(&digest::digest(&digest::SHA256, &output.stdout));
        ensure!(
            hash == sha256(3, STDIO_BYTES),
            "{} bytes came back, and not those sent",
            output.stdout.len()
        );
        println!("{system:?}: adit stdio, {STDIO_BYTES} bytes there and back, SHA-256 agrees");
        Ok(())
    }

    /// The target's end of file ends `adit stdio` under Wine, while its standard input stays open.
    async fn target_ends_first(&self, target: TcpListener) -> anyhow::Result<()> {
        let arguments = ["stdio", "agent", &target.local_addr()?.to_string()];
        let mut stdio = Process::here(self.adit(System::Wine, &arguments, "technician")?)?;
        let (mut stream, _) = within(PATIENCE, "a connection", async { Ok(target.accept().await?) }).await?;
        stream.write_all(b"hello\n").await?;
        stream.shutdown().await?;
        let stdin = stdio.stdin.take().context("piped")?;
        let finished = stdio.finish(PATIENCE).await?;
        drop(stdin);
        ensure!(finished.code == 0 && finished.stdout == "hello", "{finished:?}");
        Ok(())
    }

    /// Exit codes pass through.
    async fn refusals(&self, system: System) -> anyhow::Result<()> {
        for (agent, target, wanted) in [("agent", "198.51.100.1:22", 3), ("agent", CLOSED, 4)] {
            let stdio = Process::here(self.adit(system, &["stdio", agent, target], "technician")?)?;
            let finished = stdio.finish(PATIENCE).await?;
            ensure!(finished.code == wanted, "{agent} {target}: {finished:?}");
            ensure!(finished.stderr.contains("error: "), "{finished:?}");
        }
        println!("{system:?}: a target that is not allowed ends with 3, one that is closed with 4");
        Ok(())
    }

    /// Ctrl-C is no failure.
    async fn end(&self, process: Process) -> anyhow::Result<()> {
        process.interrupt()?;
        let name = process.name.clone();
        let finished = process.finish(PATIENCE).await?;
        ensure!(finished.code == 0, "{name}: {} after Ctrl-C: {}", finished.code, finished.stderr);
        Ok(())
    }
}

/// Sends bytes to an echo and takes them back at the same time.
async fn transfer(local: SocketAddr, what: &str) -> anyhow::Result<()> {
    const SEED: u64 = 7;
    let started = Instant::now();
    let hash = within(TRANSFER, what, async {
        let (mut reader, mut writer) = TcpStream::connect(local).await?.into_split();
        let sending = tokio::spawn(async move {
            Noise::new(SEED).send(&mut writer, BYTES).await?;
            writer.shutdown().await
        });
        let (mut hash, mut buffer, mut got) = (digest::Context::new(&digest::SHA256), vec![0; 64 << 10], 0);
        loop {
            match reader.read(&mut buffer).await? {
                0 => break,
                length => {
                    got += length as u64;
                    hash.update(&buffer[..length]);
                }
            }
        }
        sending.await??;
        ensure!(got == BYTES, "{got} of {BYTES} bytes came back");
        Ok(hex(&hash.finish()))
    })
    .await
    .with_context(|| what.to_owned())?;
    ensure!(hash == sha256(SEED, BYTES), "{what}: the bytes are not those sent: SHA-256 differs");
    let mbit = (BYTES * 8) as f64 / 1e6 / started.elapsed().as_secs_f64();
    println!("{what}: {} MiB there and back, SHA-256 agrees, {mbit:.0} Mbit/s each way", BYTES >> 20);
    Ok(())
}

/// A service that sends back what it gets.
async fn tcp_echo() -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = stream.split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
                let _ = writer.shutdown().await;
            });
        }
    });
    Ok(address)
}

async fn udp_echo() -> anyhow::Result<SocketAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = socket.local_addr()?;
    tokio::spawn(async move {
        let mut buffer = [0; 2000];
        while let Ok((length, source)) = socket.recv_from(&mut buffer).await {
            let _ = socket.send_to(&buffer[..length], source).await;
        }
    });
    Ok(address)
}

/// Free on TCP and on UDP, all different: none is let go of before all are found.
fn free_ports() -> anyhow::Result<[SocketAddr; 4]> {
    let mut held = Vec::new();
    while held.len() < 4 {
        let tcp = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = tcp.local_addr()?;
        if let Ok(udp) = std::net::UdpSocket::bind(address) {
            held.push((address, tcp, udp));
        }
    }
    let found: Vec<SocketAddr> = held.iter().map(|(address, ..)| *address).collect();
    found.try_into().map_err(|_| anyhow::anyhow!("four of them"))
}
