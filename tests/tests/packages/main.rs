//! Packages and services on a machine of its own: installed, upgraded with sessions running, removed. What the
//! sandbox is said to do is looked up in the running processes.
//!
//! Needs root; the machine is a real systemd over a throwaway overlay (see `adit_tests::machine`).

mod day;

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use adit_tests::machine::{Machine, Talk};
use adit_tests::world::binary;
use anyhow::{Context, ensure};
use tempfile::TempDir;

/// Everything on loopback: seconds are hours.
const PATIENCE: Duration = Duration::from_secs(20);
/// `systemd-analyze security`: 0 is a locked box, 10 an open one. Of what is left, the network is the purpose.
const MOST_EXPOSED: f64 = 1.5;
const PACKAGES: [&str; 3] = ["adit-mediator", "adit-relay", "adit"];
const UNITS: [&str; 3] = ["adit-mediator", "adit-relay", "adit-agent"];
/// An echo on a port that agents allow by default.
const ECHO: &str = "127.0.0.1:5900";
/// State of what the test itself runs: gone with the machine.
const OWN: &str = "/run/test";

#[test]
fn row_23_packages_and_services_without_root() -> anyhow::Result<()> {
    let steps = Steps(Instant::now());
    let packages = Packages::build()?;
    steps.done("built six packages");

    let machine = Machine::boot()?;
    network_and_echo(&machine)?;
    let before = everything(&machine)?;
    steps.done("booted a machine");

    for package in PACKAGES {
        packages.install(&machine, "old", package)?;
    }
    for unit in UNITS {
        let is = machine.sh(&format!("systemctl is-enabled {unit}; systemctl is-active {unit}"))?;
        ensure!(is.stdout == "disabled\ninactive\n", "{unit} right after the package: {is:?}");
        machine.ok(&format!("getent passwd {unit} | grep /usr/sbin/nologin"))?;
    }
    exposure(&machine)?;
    steps.done("installed the packages: users, units that are off");

    refusals(&machine)?;
    machine.ok("adit-mediator install --host 127.0.0.1")?;
    let again =
        machine.ok("adit-mediator install --host 127.0.0.1; systemctl show -P NRestarts adit-mediator")?;
    ensure!(again.ends_with("\n0\n"), "{again}");
    relay_and_agent(&machine)?;
    steps.done("set up the three services");

    technician_and_another_agent(&machine)?;
    for (agent, via) in [("served", "relay"), ("served", "direct"), ("another", "relay")] {
        let mut session = talk(&machine, agent, via)?;
        echo(&mut session, &format!("{agent} via {via}"))?;
    }
    spliced(&machine)?;
    steps.done("sessions through the services, relayed and direct");

    let mut session = talk(&machine, "served", "auto")?;
    echo(&mut session, "while the sandbox is looked at")?;
    for unit in UNITS {
        sandbox(&machine, unit)?;
    }
    echo(&mut session, "afterwards")?;
    drop(session);
    steps.done("looked into the sandboxes");

    upgrade(&machine, &packages, &steps)?;

    removal(&machine, &before, &steps)
}

#[test]
fn without_a_package_install_does_the_same() -> anyhow::Result<()> {
    let steps = Steps(Instant::now());
    let machine = Machine::boot()?;
    network_and_echo(&machine)?;
    machine.ok("mkdir -p /opt/adit /root/adit")?;
    for program in ["adit", "adit-relay", "adit-mediator"] {
        fs::copy(binary(program)?, machine.path("/opt/adit").join(program))?;
    }
    let before = everything(&machine)?;

    // What the sandbox cannot see is refused before anything is done.
    machine.ok("cp /opt/adit/adit-mediator /root/adit/")?;
    let refused = machine.sh("/root/adit/adit-mediator install --host 127.0.0.1")?;
    ensure!(refused.code == 2 && refused.stderr.contains("/usr/local/bin"), "{refused:?}");
    machine.ok("rm -r /root/adit")?;
    machine.ok("mkdir /root/adit")?;
    same(&before, &everything(&machine)?)?;

    let planned = machine.ok("/opt/adit/adit-mediator install --host 127.0.0.1 --dry-run")?;
    println!("--dry-run:\n{planned}");
    ensure!(planned.contains("systemctl --quiet enable adit-mediator"), "{planned}");
    same(&before, &everything(&machine)?)?;

    // `init` ran as root, in a directory of the administrator's choice.
    machine.ok("/opt/adit/adit-mediator init --data /srv/mediator --host 127.0.0.1")?;
    machine.ok("/opt/adit/adit-mediator token --data /srv/mediator --role agent")?;
    machine.ok("/opt/adit/adit-mediator install --data /srv/mediator --relay off")?;
    let line = machine.ok("tr '\\0' ' ' </proc/$(systemctl show -P MainPID adit-mediator)/cmdline")?;
    ensure!(line == "/opt/adit/adit-mediator run --data /srv/mediator --relay off ", "{line}");
    let owners = machine.ok("find /srv/mediator -printf '%u %m %p\\n' | sort")?;
    println!("{owners}");
    ensure!(owners.lines().all(|line| line.starts_with("adit-mediator ")), "{owners}");

    // An administrator goes on as root beside the service.
    machine.ok("/opt/adit/adit-mediator token --data /srv/mediator --role agent >/run/token")?;
    machine.ok("/opt/adit/adit enroll - --data /var/lib/adit-agent --name served </run/token")?;
    machine.ok("/opt/adit/adit service install && /opt/adit/adit service status")?;
    machine.wait("journalctl -u adit-agent -o cat | grep -i online", PATIENCE)?;
    let owners =
        machine.ok("find /srv/mediator /var/lib/adit-agent ! -user adit-mediator ! -user adit-agent")?;
    ensure!(owners.is_empty(), "not the services' own: {owners}");

    // A new program in the place of the old one is started by `install`; else nothing is.
    let pid = || machine.ok("systemctl show -P MainPID adit-agent");
    let first = pid()?;
    machine.ok("/opt/adit/adit service install")?;
    ensure!(pid()? == first, "restarted for nothing");
    machine.ok("cp /opt/adit/adit /opt/adit/new && mv /opt/adit/new /opt/adit/adit && /opt/adit/adit service install")?;
    ensure!(pid()? != first, "the old program still runs");
    steps.done("set up, used, and set up again");

    machine.ok("/opt/adit/adit service uninstall")?;
    let status = machine.sh("/opt/adit/adit service status --json")?;
    ensure!(status.code == 1 && status.stdout.contains("\"installed\":false"), "{status:?}");
    machine.ok("test -s /var/lib/adit-agent/key.pem")?;
    machine.ok("/opt/adit/adit service uninstall --purge")?;
    machine.ok("/opt/adit/adit-mediator uninstall --data /srv/mediator --purge")?;
    machine.ok("/opt/adit/adit-mediator uninstall --data /srv/mediator --purge")?;
    same(&before, &everything(&machine)?)?;
    steps.done("removed: nothing left");
    Ok(())
}

/// Prints what was reached, and when.
struct Steps(Instant);

impl Steps {
    fn done(&self, what: &str) {
        println!("{:5.1} s  {what}", self.0.elapsed().as_secs_f64());
    }
}

/// Two versions of the packages.
struct Packages(TempDir);

impl Packages {
    /// By the one command that builds them, quick rather than small.
    fn build() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/packages");
        for (which, version) in [("old", "0.1.0-1"), ("new", "0.1.1-1")] {
            let to = dir.path().join(which);
            let built = Command::new(&script).arg(&to).args(["--fast", "--deb-version", version]).output()?;
            ensure!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
            let count = fs::read_dir(&to)?.count();
            ensure!(count == PACKAGES.len(), "{count} packages in {}", to.display());
        }
        Ok(Self(dir))
    }

    /// Installs, or upgrades, one of them in a machine.
    fn install(&self, machine: &Machine, version: &str, package: &str) -> anyhow::Result<()> {
        let mut all = fs::read_dir(self.0.path().join(version))?.filter_map(Result::ok);
        let named = |name: &str| name.starts_with(&format!("{package}_"));
        let file = all.find(|file| file.file_name().to_str().is_some_and(named)).context("a package")?;
        machine.ok(&format!("mkdir -p {OWN}"))?;
        fs::copy(file.path(), machine.path(OWN).join("package.deb"))?;
        machine.ok(&format!("dpkg --install {OWN}/package.deb"))?;
        Ok(())
    }
}

/// An address beside loopback, for direct paths, and something to connect to.
fn network_and_echo(machine: &Machine) -> anyhow::Result<()> {
    machine.ok("ip link add lan0 type veth peer name lan1 && ip address add 192.0.2.1/24 dev lan0 && \
         ip link set lan0 up && ip link set lan1 up")?;
    machine.ok(&format!(
        "systemd-run --quiet --unit echo systemd-socket-activate --accept --inetd --listen {ECHO} cat"
    ))?;
    Ok(())
}

/// All files of the system, packages and users: what must be the same before and after.
fn everything(machine: &Machine) -> anyhow::Result<String> {
    // Not the homes and work directories, which others change meanwhile: they show through the overlay. Of what
    // changes with every package and user only the contents count.
    machine.ok(
        "find /etc /usr /var /opt /srv -xdev \\( -path /var/lib/dpkg -o -path /var/cache -o -path '/etc/*-' \\) -prune \
         -o ! -path /etc/.pwd.lock -print | sort; ls -A / /root; dpkg -l | grep adit; getent passwd; getent group",
    )
}

/// Fails unless the system is as it was.
fn same(before: &str, after: &str) -> anyhow::Result<()> {
    let only_in = |one: &str, other: &str| -> Vec<String> {
        let other: HashSet<&str> = other.lines().collect();
        one.lines().filter(|line| !other.contains(line)).map(str::to_owned).collect()
    };
    let (left, gone) = (only_in(after, before), only_in(before, after));
    let some = |lines: &[String]| lines[..lines.len().min(20)].join(" ");
    ensure!(left.is_empty() && gone.is_empty(), "left behind: {}; gone: {}", some(&left), some(&gone));
    ensure!(before.lines().count() > 1000, "nothing was looked at");
    Ok(())
}

/// systemd's own judgement of the units.
fn exposure(machine: &Machine) -> anyhow::Result<()> {
    let verified = machine.sh("systemd-analyze verify /usr/lib/systemd/system/adit-*.service")?;
    ensure!(verified.code == 0 && verified.stderr.is_empty(), "{verified:?}");
    for unit in UNITS {
        let judged = machine.ok(&format!(
            "systemd-analyze security --offline=true --no-pager /usr/lib/systemd/system/{unit}.service"
        ))?;
        let line = judged.lines().find(|line| line.contains("Overall exposure")).context("a verdict")?;
        let score = line.rsplit_once(": ").and_then(|(_, score)| score.split(' ').next());
        let score: f64 = score.context("a score")?.parse()?;
        println!("         {unit}: exposure {score} of 10 (mark: {MOST_EXPOSED})");
        ensure!(score <= MOST_EXPOSED, "{judged}");
    }
    Ok(())
}

/// What `install` says when it cannot, before it has done anything.
fn refusals(machine: &Machine) -> anyhow::Result<()> {
    let user = "setpriv --reuid 65534 --regid 65534 --clear-groups";
    let said = machine.sh(&format!("{user} adit-mediator install --host 127.0.0.1"))?;
    ensure!(said.code == 2 && said.stderr.contains("sudo adit-mediator install --host"), "{said:?}");
    let said = machine.sh("unshare --mount sh -c 'mount -t tmpfs none /run && adit service install'")?;
    let command = "/usr/bin/adit agent --data /var/lib/adit-agent";
    ensure!(said.code == 2 && said.stderr.contains(command), "{said:?}");
    for (program, remedy) in [
        ("adit-mediator install", "--host adit.example.org"),
        ("adit-relay install", "adit-relay enroll TOKEN --data /var/lib/adit-relay"),
        ("adit service install", "adit enroll - --data /var/lib/adit-agent"),
    ] {
        let said = machine.sh(program)?;
        ensure!(said.code == 2 && said.stderr.contains(remedy), "{program}: {said:?}");
    }
    // 443 is 443: who has it is named, and the setting; nothing is made.
    machine.ok("systemd-run --quiet --unit squatter systemd-socket-activate --listen 0.0.0.0:443 true")?;
    machine.wait("ss -Hltn sport = :443 | grep -q 443", PATIENCE)?;
    let said = machine.sh("adit-mediator install --host 127.0.0.1")?;
    println!("{}", said.stderr);
    let named = said.stderr.contains("systemd-socket- (process") && said.stderr.contains("[listen] https in");
    ensure!(said.code == 2 && named, "{said:?}");
    machine.ok("systemctl stop squatter; test -z \"$(ls -A /var/lib/adit-mediator 2>/dev/null)\"")?;
    Ok(())
}

/// Both enrolled by root, as an administrator does it.
fn relay_and_agent(machine: &Machine) -> anyhow::Result<()> {
    let token = |role: &str| format!("adit-mediator token --role {role}");
    machine.ok(&format!(
        "{} | adit-relay enroll - --data /var/lib/adit-relay --host 127.0.0.1 --name second",
        token("relay")
    ))?;
    // Beside the mediator's own relay on one machine it needs ports of its own.
    let taken = machine.sh("adit-relay install")?;
    let named = taken.stderr.contains("adit-mediator (process")
        && taken.stderr.contains("[listen] relay in /var/lib");
    ensure!(taken.code == 2 && named, "{taken:?}");
    machine.ok("printf '[listen]\\nrelay = \"[::]:8003\"\\nudp = \"[::]:8003\"\\nhttps = \"[::]:8443\"\\n' >>/run/l; \
                sed -i '/^\\[listen\\]/d' /var/lib/adit-relay/config.toml; \
                sed -i '/^hosts/r /run/l' /var/lib/adit-relay/config.toml; rm /run/l")?;
    machine.ok("adit-relay install")?;
    machine.ok(&format!("{} | adit enroll - --data /var/lib/adit-agent --name served", token("agent")))?;
    machine.ok("adit service install")?;
    let status = machine.ok("setpriv --reuid 65534 --regid 65534 --clear-groups adit service status")?;
    ensure!(status.starts_with("adit-agent: installed, enabled, running (process "), "{status}");
    Ok(())
}

/// What the service's process may do, as the kernel has it.
fn sandbox(machine: &Machine, unit: &str) -> anyhow::Result<()> {
    let status = machine.ok(&format!("cat /proc/$(systemctl show -P MainPID {unit})/status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(|value| value.split_whitespace().collect::<Vec<_>>()).unwrap_or_default()
    };
    let uid = machine.ok(&format!("id -u {unit}"))?.trim().to_owned();
    ensure!(uid != "0" && field("Uid") == [uid.as_str(); 4], "{unit} runs as {:?}", field("Uid"));
    // CAP_NET_BIND_SERVICE is bit 10; an agent has not even that one.
    let capability = if unit == "adit-agent" { 0 } else { 1 << 10 };
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let has = u64::from_str_radix(field(set).first().context("a set")?, 16)?;
        ensure!(has == capability, "{unit}: {set} {has:x}");
    }
    ensure!(field("NoNewPrivs") == ["1"] && field("Seccomp") == ["2"], "{unit}: {status}");

    // Where it may write, asked as that user in the service's own view of the file system.
    let writable = machine.ok(&format!(
        "nsenter --target $(systemctl show -P MainPID {unit}) --mount --wd=/ \
         setpriv --reuid {uid} --regid $(id -g {unit}) --clear-groups sh -c \
         'test -w / && echo /; find /boot /dev /etc /home /media /mnt /opt /root /run /srv /tmp /usr /var \
         -path /var/lib/{unit} -prune -o -writable ! -type l ! -type s -print 2>/dev/null'; true"
    ))?;
    let paths: Vec<&str> = writable.lines().collect();
    println!("         {unit}: uid {uid}, capabilities {capability:x}, writable: {}", paths.join(" "));
    let expected =
        |path: &&str| path.starts_with("/dev/") || path.starts_with("/tmp") || path.starts_with("/var/tmp");
    let others: Vec<&&str> = paths.iter().filter(|path| !expected(path)).collect();
    ensure!(others.is_empty(), "{unit} may write: {others:?}");
    ensure!(!paths.is_empty(), "{unit}: find looked at nothing");
    let secret = machine.ok(&format!("find /var/lib/{unit} -maxdepth 0 -printf '%u %m'"))?;
    ensure!(secret == format!("{unit} 700"), "{unit}: {secret}");

    // What it listens on: the ports of the interface, and nothing else.
    let sockets = machine.ok(&format!(
        "ss -Hlntup | grep pid=$(systemctl show -P MainPID {unit}), | awk '{{sub(/.*:/, \"\", $5); print $1, $5}}' | sort -u"
    ))?;
    let sockets: Vec<&str> = sockets.lines().collect();
    println!("         {unit}: listens on {}", sockets.join(", "));
    let all_as_expected = match unit {
        "adit-mediator" => sockets == ["tcp 443", "tcp 8002", "tcp 9464", "udp 443", "udp 8002"],
        "adit-relay" => sockets == ["tcp 8003", "tcp 8443", "tcp 9465", "udp 8003"],
        _ => {
            let direct = |socket: &str| socket.strip_prefix("udp ").and_then(|port| port.parse().ok());
            let in_range = |port: u16| (40000..=41000).contains(&port);
            !sockets.is_empty() && sockets.iter().all(|socket| direct(socket).is_some_and(in_range))
        }
    };
    ensure!(all_as_expected, "{unit} listens on {sockets:?}");
    Ok(())
}

/// A technician, and an agent that is no service: its sessions are none of the package's business.
fn technician_and_another_agent(machine: &Machine) -> anyhow::Result<()> {
    machine.ok(&format!(
        "adit-mediator token --role technician --all-agents | adit enroll - --data {OWN}/technician --name anna && \
         adit-mediator token --role agent | adit enroll - --data {OWN}/another --name another && \
         systemd-run --quiet --unit another adit agent --data {OWN}/another"
    ))?;
    let online = format!("adit ls --json --data {OWN}/technician | grep -c '\"online\":true' | grep -qx 2");
    machine.wait(&online, PATIENCE)?;
    Ok(())
}

/// A session whose two ends echo lines.
fn talk(machine: &Machine, agent: &str, via: &str) -> anyhow::Result<Talk> {
    let data = format!("{OWN}/technician");
    Talk::start(machine.command("adit", &["stdio", agent, ECHO, "--data", &data, "--via", via]))
}

fn echo(session: &mut Talk, line: &str) -> anyhow::Result<Duration> {
    let start = Instant::now();
    session.say(line).with_context(|| line.to_owned())?;
    let heard = session.hear(PATIENCE).with_context(|| format!("an echo of {line:?}"))?;
    ensure!(heard == line, "{heard:?} instead of {line:?}");
    Ok(start.elapsed())
}

/// The relay's fast way works inside the sandbox, too.
fn spliced(machine: &Machine) -> anyhow::Result<()> {
    let mut all = 0;
    for port in [9464, 9465] {
        let metrics = machine.ok(&format!("curl --silent --fail http://127.0.0.1:{port}/metrics"))?;
        let by_splice = "adit_relay_forwarded_bytes_total{method=\"splice\"} ";
        let bytes = metrics.lines().find_map(|line| line.strip_prefix(by_splice)).context("a counter")?;
        println!("         relay with metrics on {port}: {bytes} bytes spliced");
        all += bytes.parse::<u64>()?;
    }
    ensure!(all > 0, "nothing was spliced");
    Ok(())
}

/// New packages while sessions run: they go on.
fn upgrade(machine: &Machine, packages: &Packages, steps: &Steps) -> anyhow::Result<()> {
    let pid = |unit: &str| machine.ok(&format!("systemctl show -P MainPID {unit}"));
    let mut session = talk(machine, "another", "relay")?;
    echo(&mut session, "before")?;
    for (package, unit) in
        [("adit-mediator", "adit-mediator"), ("adit-relay", "adit-relay"), ("adit", "adit-agent")]
    {
        let old = pid(unit)?.trim().to_owned();
        packages.install(machine, "new", package)?;
        // An agent without a session makes way for the new one by itself, a moment later.
        let running =
            format!("systemctl is-active {unit} && test $(systemctl show -P MainPID {unit}) != {old}");
        machine.wait(&running, PATIENCE)?;
        let version = machine.ok(&format!("dpkg-query --show --showformat '${{Version}}' {package}"))?;
        ensure!(version == "0.1.1-1", "{package} is {version}");
        let took = echo(&mut session, &format!("after {package}"))?;
        let pairs = "curl --silent http://127.0.0.1:9464/metrics http://127.0.0.1:9465/metrics | grep ^adit_relay_pairs";
        let pairs = machine.ok(pairs)?;
        println!("         pairs at the two relays: {}", pairs.trim().replace('\n', ", "));
        ensure!(pairs.contains("adit_relay_pairs 1"), "the session is not relayed: {pairs}");
        ensure!(session.is_running(), "the technician's process has ended");
        println!("         {package} upgraded, {unit} restarted; the next echo took {took:?}");
        // Both relays are there again before the next one goes.
        machine.wait("curl --silent --fail http://127.0.0.1:9465/readyz", PATIENCE)?;
        machine.wait("curl --silent --fail http://127.0.0.1:9464/readyz", PATIENCE)?;
    }
    let mut session = talk(machine, "served", "relay")?;
    echo(&mut session, "the new agent")?;
    steps.done("upgraded with a session running: it went on");
    Ok(())
}

fn removal(machine: &Machine, before: &str, steps: &Steps) -> anyhow::Result<()> {
    machine.ok("systemctl stop another; dpkg --remove adit adit-relay adit-mediator")?;
    for unit in UNITS {
        let is = machine.sh(&format!("systemctl is-active {unit}"))?;
        ensure!(is.code != 0, "{unit} still runs");
        machine.ok(&format!("test -n \"$(ls -A /var/lib/{unit})\""))?;
    }
    steps.done("removed: state is kept");
    machine.ok("dpkg --purge adit adit-relay adit-mediator")?;
    same(before, &everything(machine)?)?;
    let processes = machine.ok("ps -eo user,args | grep -v grep | grep -c adit- || true")?;
    ensure!(processes.trim() == "0", "{processes} processes left");
    steps.done("purged: nothing left");
    Ok(())
}
