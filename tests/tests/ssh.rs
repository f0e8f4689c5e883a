//! SSH with OpenSSH at both ends, and `adit stdio` between them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use adit_tests::lab::{Host, Lab, NatKind, Topology};
use adit_tests::lab_tests;
use adit_tests::process::Process;
use adit_tests::proxy::ProxyKind;
use adit_tests::traffic::{Noise, sha256};
use adit_tests::world::{AGENT, PATIENCE, Setup, World, binary};
use anyhow::ensure;

lab_tests!(scp_both_ways_on_direct, scp_both_ways_on_the_relay, scp_both_ways_where_only_443_is_open, scp_both_ways_behind_a_proxy, adit_ssh_logs_in; as ordinary user: the_programs_do_it_without_adit);

const PORT: u16 = 2222;
const BYTES: u64 = 200_000_000;

async fn scp_both_ways_on_direct() -> anyhow::Result<()> {
    through_a_tunnel(setup(NatKind::Cone), "quic").await
}

async fn scp_both_ways_on_the_relay() -> anyhow::Result<()> {
    through_a_tunnel(setup(NatKind::UdpBlocked), "relay").await
}

async fn scp_both_ways_where_only_443_is_open() -> anyhow::Result<()> {
    through_a_tunnel(setup(NatKind::HttpsOnly), "relay-https").await
}

async fn scp_both_ways_behind_a_proxy() -> anyhow::Result<()> {
    through_a_tunnel(Setup::behind(ProxyKind::SquidBasic), "relay-https").await
}

/// `adit ssh`: the agent's name is the host's, options and command are ssh's, and so is the exit code.
async fn adit_ssh_logs_in() -> anyhow::Result<()> {
    let target = format!("127.0.0.1:{PORT}");
    let world = World::up(setup(NatKind::Cone).allow(&[&target])).await?;
    let server = SshServer::start(&world.lab.agent.host, world.scratch()).await?;
    let (data, at) = (world.data("technician"), server.dir.display().to_string());
    let destination = format!("adit@{AGENT}");
    let (identity, known) = (format!("IdentityFile={at}/user_key"), format!("UserKnownHostsFile={at}/known"));
    let login = [
        "ssh",
        "--data",
        &data,
        "--target",
        &target,
        &destination,
        "-F",
        "/dev/null",
        "-o",
        &identity,
        "-o",
        &known,
    ];
    let options = ["-o", "StrictHostKeyChecking=accept-new", "-o", "BatchMode=yes"];
    let ssh = async |command: &[&str]| {
        let arguments = [&login[..], &options, command].concat();
        world.technician(&arguments)?.finish(PATIENCE).await
    };
    let finished = ssh(&["echo 'two  words'; exit 7"]).await?;
    ensure!((finished.code, finished.stdout.as_str()) == (7, "two  words"), "{finished:?}");
    let known = std::fs::read_to_string(format!("{at}/known"))?;
    ensure!(known.starts_with(&format!("{AGENT}/{target} ")), "{known}");
    let unknown = world
        .technician(&["ssh", "--data", &data, "nobody", "-o", "BatchMode=yes", "true"])?
        .finish(PATIENCE)
        .await?;
    println!("{}", unknown.stderr);
    ensure!(unknown.code == 255 && unknown.stderr.contains("no agent \"nobody\""), "{unknown:?}");
    Ok(())
}

fn setup(nat: NatKind) -> Setup {
    Setup::new(Topology::new(nat, nat))
}

async fn through_a_tunnel(setup: Setup, carrier: &str) -> anyhow::Result<()> {
    let target = format!("127.0.0.1:{PORT}");
    let world = World::up(setup.allow(&[&target])).await?;
    let server = SshServer::start(&world.lab.agent.host, world.scratch()).await?;
    let adit = binary("adit")?;
    let proxy =
        format!("ProxyCommand={} stdio {AGENT} {target} --data {}", adit.display(), world.data("technician"));
    server.try_out(&world.lab.technician.host, &["-o", &proxy], AGENT).await?;
    println!("{carrier}: {:?}", world.lab.technician.traffic()?);
    let carriers = world.agent.events("tier");
    ensure!(carriers.iter().any(|event| event["carrier"] == carrier), "{carriers:?}");
    Ok(())
}

/// If this fails, the others say nothing about adit.
async fn the_programs_do_it_without_adit() -> anyhow::Result<()> {
    let lab = Lab::up(&Topology::new(NatKind::None, NatKind::None)).await?;
    let scratch = tempfile::tempdir()?;
    let server = SshServer::start(&lab.agent.host, scratch.path()).await?;
    let port = PORT.to_string();
    let address = lab.agent.host.address.to_string();
    server.try_out(&lab.technician.host, &["-o", &format!("Port={port}")], &address).await
}

/// An OpenSSH server with keys of its own, for the one user `adit`.
struct SshServer {
    dir: PathBuf,
    _sshd: Process,
}

impl SshServer {
    async fn start(host: &Host, scratch: &Path) -> anyhow::Result<Self> {
        let dir = scratch.join("ssh");
        std::fs::create_dir_all(&dir)?;
        for key in ["host_key", "user_key"] {
            let mut command = Command::new("ssh-keygen");
            command.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(dir.join(key));
            host.spawn(command)?.finish(PATIENCE).await?.ok()?;
        }
        std::fs::copy(dir.join("user_key.pub"), dir.join("authorized_keys"))?;
        let at = dir.display();
        std::fs::write(
            dir.join("sshd_config"),
            format!(
                "Port {PORT}\nListenAddress 0.0.0.0\nHostKey {at}/host_key\nAuthorizedKeysFile {at}/authorized_keys\n\
                 StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
                 Subsystem sftp internal-sftp\n"
            ),
        )?;
        // In the lab's user namespace everyone is root, and a root sshd wants users that do not exist
        // there. So sshd is an ordinary user in a namespace of its own, with a passwd of its own.
        std::fs::write(dir.join("passwd"), format!("adit:x:1000:1000::{at}:/bin/sh\n"))?;
        let script = format!(
            "mount --bind {at}/passwd /etc/passwd && \
             exec unshare --user --map-user=1000 --map-group=1000 /usr/sbin/sshd -D -e -f {at}/sshd_config"
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script]);
        let sshd = host.spawn(command)?;
        sshd.error_output(PATIENCE, "sshd to listen", |lines| {
            lines.iter().any(|line| line.contains("Server listening")).then_some(())
        })
        .await?;
        Ok(Self { dir, _sshd: sshd })
    }

    /// Runs a command and copies a file each way from `client`.
    async fn try_out(&self, client: &Host, options: &[&str], name: &str) -> anyhow::Result<()> {
        let ssh = async |program: &str, arguments: &[&str]| {
            let at = self.dir.display();
            let mut command = Command::new(program);
            command.args(["-F", "/dev/null", "-i"]).arg(self.dir.join("user_key"));
            for option in ["StrictHostKeyChecking=accept-new", "BatchMode=yes", "User=adit"] {
                command.args(["-o", option]);
            }
            command
                .args(["-o", &format!("UserKnownHostsFile={at}/known_hosts")])
                .args(options)
                .args(arguments);
            client.spawn(command)?.finish(Duration::from_secs(120)).await?.ok()
        };
        ensure!(ssh("ssh", &[name, "echo", "marker-77"]).await? == "marker-77");

        let path = |name: &str| self.dir.join(name).to_string_lossy().into_owned();
        let seed: u32 = rand::random();
        let mut file = tokio::fs::File::create(path("sent")).await?;
        Noise::new(seed.into()).send(&mut file, BYTES).await?;
        file.sync_all().await?;
        for (from, to) in [
            (path("sent"), format!("{name}:{}", path("on_agent"))),
            (format!("{name}:{}", path("on_agent")), path("back")),
        ] {
            let start = Instant::now();
            ssh("scp", &["-q", &from, &to]).await?;
            println!("{BYTES} bytes in {:?}", start.elapsed());
        }
        for copy in ["on_agent", "back"] {
            let mut command = Command::new("sha256sum");
            command.arg(path(copy));
            let sum = client.spawn(command)?.finish(PATIENCE).await?.ok()?;
            ensure!(sum.starts_with(&sha256(seed.into(), BYTES)), "{copy}: SHA-256 differs");
        }
        Ok(())
    }
}
