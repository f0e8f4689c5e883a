//! An operator's day, from packages only: a server and two customers with ten machines each, every one of them a
//! machine with a systemd of its own, in networks that have the same addresses behind a NAT each.

use std::io::Read;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use adit_tests::internet::{Customer, Internet};
use adit_tests::machine::{Machine, Talk};
use anyhow::{Context, ensure};
use serde_json::Value;

use super::{ECHO, OWN, PATIENCE, Packages, Steps, echo, everything, same};

const SERVER: &str = "adit.example.org";
const CUSTOMERS: [&str; 2] = ["acme", "globex"];
/// Machines of each customer.
const AGENTS: u8 = 10;
/// From the revocation of a device to the last byte through it.
const CUT: Duration = Duration::from_secs(5);
/// Bytes of a transfer in its middle.
const UNDER_WAY: u64 = 32 << 20;
/// Until every agent is back at a server that has moved: their pauses grow to 30 s.
const BACK: Duration = Duration::from_secs(60);
/// A printer's port, which no agent allows by itself.
const PRINTER: u16 = 9100;
/// Host number of each customer's tenth machine, beside which the printer stands.
const LAST: u8 = 100 + AGENTS;

#[test]
fn a_day_from_packages_only() -> anyhow::Result<()> {
    let steps = Steps(Instant::now());
    let packages = Packages::build()?;
    let mut internet = Internet::up()?;
    internet.name(SERVER, "198.51.100.10")?;
    let mut server = Machine::boot()?;
    internet.join(&server, 10)?;
    let before = everything(&server)?;
    steps.done("built packages, booted a server");

    packages.install(&server, "old", "adit-mediator")?;
    server.ok(&format!("adit-mediator install --host {SERVER}"))?;
    steps.done("noon: installed the server");

    let (agents, _networks) = roll_out(&server, &packages, &internet)?;
    online(&server, &agents, PATIENCE)?;
    steps.done(&format!(
        "rolled out {} agents of {} customers with a token each",
        agents.len(),
        CUSTOMERS.len()
    ));

    let [anna, ben] = ["anna", "ben"].map(|_| Machine::boot());
    let (anna, ben) = (anna?, ben?);
    for (host, (machine, (name, customer))) in
        (201..).zip([&anna, &ben].into_iter().zip(["anna", "ben"].into_iter().zip(CUSTOMERS)))
    {
        internet.join(machine, host)?;
        packages.install(machine, "old", "adit")?;
        let token = token(&server, &format!("--role technician --tag customer={customer}"))?;
        machine.ok(&format!("echo {token} | adit enroll - --name {name}"))?;
    }
    only_their_own(&anna, &ben)?;
    steps.done("two technicians: each sees and reaches only their customer's agents, at the same addresses");

    lost_laptop(&server, &ben)?;
    steps.done("revoked a lost laptop in mid-transfer");

    reinstalled(&server, &agents[2])?;
    online(&server, &agents, PATIENCE)?;
    steps.done("took a reinstalled machine back");

    // The name is not changed in time: whoever is there meanwhile knows the new address from the server itself.
    server.ok("adit-mediator hosts add 198.51.100.20 && ip address add 198.51.100.20/24 dev eth0")?;
    only_acme(&anna)?;
    for agent in &agents {
        agent.machine.wait("grep -q 198.51.100.20:443 /var/lib/adit-agent/device.toml", PATIENCE)?;
    }
    // With the first address of an interface its others go, too.
    server.ok("ip address flush dev eth0 && ip address add 198.51.100.20/24 dev eth0")?;
    let took = online_since_now(&server, agents.len())?;
    println!("         moved: all agents back after {took:.1?}");
    let mut session = talk(&anna, "acme-1", "auto")?;
    echo(&mut session, "at the new address")?;
    drop(session);
    steps.done("moved the server to another address");

    // Destroyed; its successor stands elsewhere, and only the name says where.
    server.ok(&format!("ADIT_BACKUP_PASSPHRASE='a long one' adit-mediator backup {OWN}/adit.age"))?;
    let backup = std::fs::read(server.path(OWN).join("adit.age"))?;
    drop(server);
    server = Machine::boot()?;
    internet.join(&server, 30)?;
    internet.name(SERVER, "198.51.100.30")?;
    packages.install(&server, "old", "adit-mediator")?;
    std::fs::write(server.path(OWN).join("adit.age"), backup)?;
    server.ok(&format!(
        "ADIT_BACKUP_PASSPHRASE='a long one' adit-mediator restore {OWN}/adit.age && adit-mediator install"
    ))?;
    let start = Instant::now();
    online(&server, &agents, BACK)?;
    println!("         restored: all agents back {:.1?} after its start", start.elapsed());
    ensure!(refused(&ben)?, "the lost laptop is back");
    only_acme(&anna)?;
    steps.done("restored a destroyed server under another address: nobody was visited");

    upgrade(&server, &anna, &agents[0], &packages)?;
    online(&server, &agents, PATIENCE)?;
    steps.done("upgraded server, agent and technician while sessions ran: they went on");

    let last = &agents[agents.len() - 1];
    last.machine.ok("systemctl stop printer; dpkg --purge adit")?;
    same(&last.before, &everything(&last.machine)?)?;
    server.ok("dpkg --purge adit-mediator")?;
    same(&before, &everything(&server)?)?;
    steps.done("uninstalled: nothing left");
    Ok(())
}

struct Agent {
    name: String,
    machine: Machine,
    /// All that was on it.
    before: String,
}

/// What an operator does: one token for each customer, and one script for every machine.
fn roll_out(
    server: &Machine,
    packages: &Packages,
    internet: &Internet,
) -> anyhow::Result<(Vec<Agent>, Vec<Customer>)> {
    let (mut agents, mut networks) = (vec![], vec![]);
    for (number, customer) in (100..).zip(CUSTOMERS) {
        let network = internet.customer(number)?;
        let token =
            token(server, &format!("--role agent --tag customer={customer} --uses {AGENTS} --ttl 8h"))?;
        let wanted: Vec<u8> = (1..=AGENTS).collect();
        agents.extend(each(&wanted, |n| {
            let name = format!("{customer}-{n}");
            let machine = Machine::boot()?;
            network.join(&machine, 100 + n)?;
            machine.ok(&format!("hostname {name}; mkdir -p {OWN}"))?;
            let before = everything(&machine)?;
            packages.install(&machine, "old", "adit")?;
            std::fs::write(machine.path(OWN).join("token"), format!("{token}\n"))?;
            machine.ok(&format!("adit enroll --token-file {OWN}/token --data /var/lib/adit-agent"))?;
            if *n == 1 {
                // The first one serves the printers of its site, too.
                let allow = format!("[agent]\nallow = [\"{ECHO}\", \"192.168.178.0/24:{PRINTER}\"]\n");
                std::fs::write(machine.path("/var/lib/adit-agent").join("config.toml"), allow)?;
            }
            machine.ok("adit service install")?;
            let service = match *n {
                2 => format!("zeros systemd-socket-activate --accept --inetd --listen {ECHO} cat /dev/zero"),
                AGENTS => format!(
                    "printer systemd-socket-activate --accept --inetd --listen 0.0.0.0:{PRINTER} hostname"
                ),
                _ => format!("echo systemd-socket-activate --accept --inetd --listen {ECHO} cat"),
            };
            machine.ok(&format!("systemd-run --quiet --unit {service}"))?;
            Ok(Agent { name, machine, before })
        })?);
        networks.push(network);
    }
    Ok((agents, networks))
}

/// Does something with all of them at once; the results in their order.
fn each<T: Sync, R: Send>(all: &[T], act: impl Fn(&T) -> anyhow::Result<R> + Sync) -> anyhow::Result<Vec<R>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = all.iter().map(|one| scope.spawn(|| act(one))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

fn token(server: &Machine, options: &str) -> anyhow::Result<String> {
    Ok(server.ok(&format!("adit-mediator token {options}"))?.trim().to_owned())
}

/// Waits until all agents are online. Those that are not tell why.
fn online(server: &Machine, agents: &[Agent], deadline: Duration) -> anyhow::Result<()> {
    let count = agents.len();
    let line =
        format!("adit-mediator devices --role agent --json | grep -c '\"online\":true' | grep -qx {count}");
    let waited = server.wait(&line, deadline);
    if waited.is_err() {
        for agent in agents.iter().rev().take(30) {
            let said =
                agent.machine.sh("journalctl -u adit-agent -o cat -n 5; systemctl is-active adit-agent")?;
            println!("{}: {}", agent.name, said.stdout);
        }
        println!("{}", server.ok("adit-mediator devices --all; journalctl -u adit-mediator -o cat -n 80")?);
    }
    waited.map(drop)
}

/// Waits until that many agents have come online after this call; how long that took.
fn online_since_now(server: &Machine, agents: usize) -> anyhow::Result<Duration> {
    let start = Instant::now();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    loop {
        let devices = server.ok("adit-mediator devices --role agent --json")?;
        let since = devices
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok()?["online_since"].as_u64());
        if since.filter(|since| *since >= now).count() == agents {
            return Ok(start.elapsed());
        }
        ensure!(start.elapsed() < BACK, "not all back after {BACK:?}:\n{devices}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn listed(technician: &Machine) -> anyhow::Result<Vec<String>> {
    let list = technician.ok("adit ls --json")?;
    let name = |line| Some(serde_json::from_str::<Value>(line).ok()?["name"].as_str()?.to_owned());
    list.lines().map(|line| name(line).with_context(|| line.to_owned())).collect()
}

fn only_acme(technician: &Machine) -> anyhow::Result<()> {
    let list = listed(technician)?;
    ensure!(
        list.len() == usize::from(AGENTS) && list.iter().all(|name| name.starts_with("acme-")),
        "{list:?}"
    );
    Ok(())
}

fn only_their_own(anna: &Machine, ben: &Machine) -> anyhow::Result<()> {
    only_acme(anna)?;
    for (technician, own, foreign) in [(anna, CUSTOMERS[0], CUSTOMERS[1]), (ben, CUSTOMERS[1], CUSTOMERS[0])]
    {
        let list = listed(technician)?;
        let theirs = |name: &String| name.starts_with(&format!("{own}-"));
        ensure!(list.len() == usize::from(AGENTS) && list.iter().all(theirs), "{list:?}");
        let refused = technician.sh(&format!("adit stdio {foreign}-1 {ECHO}"))?;
        ensure!(refused.code == 3 && !refused.stderr.contains(&format!("{foreign}-2")), "{refused:?}");
        let mut session = talk(technician, &format!("{own}-3"), "auto")?;
        echo(&mut session, "is anybody there?")?;
        // Both have a printer at this address.
        let printer = technician.ok(&format!("adit stdio {own}-1 192.168.178.{LAST}:{PRINTER}"))?;
        ensure!(printer.trim() == format!("{own}-{AGENTS}"), "the printer says {printer:?}");
        let elsewhere = technician.sh(&format!("adit stdio {own}-3 192.168.178.{LAST}:{PRINTER}"))?;
        ensure!(elsewhere.code == 3, "an agent serves what was not written down: {elsewhere:?}");
    }
    Ok(())
}

fn talk(technician: &Machine, agent: &str, via: &str) -> anyhow::Result<Talk> {
    Talk::start(technician.command("adit", &["stdio", agent, ECHO, "--via", via]))
}

/// Whether this technician is turned away everywhere.
fn refused(technician: &Machine) -> anyhow::Result<bool> {
    let (list, session) = (technician.sh("adit ls")?, technician.sh(&format!("adit stdio globex-1 {ECHO}"))?);
    Ok(list.code == 3 && session.code == 3)
}

fn lost_laptop(server: &Machine, laptop: &Machine) -> anyhow::Result<()> {
    let mut transfer = Transfer::start(laptop, "globex-2")?;
    transfer.flowing.recv_timeout(PATIENCE).context("too slow")?;
    let start = Instant::now();
    server.ok("adit-mediator revoke ben")?;
    let (last, bytes) = transfer.end(PATIENCE)?;
    let cut = last.saturating_duration_since(start);
    println!("         the transfer ended {cut:.1?} after the command, after {} MiB", bytes >> 20);
    ensure!(cut <= CUT, "cut only after {cut:?}");
    ensure!(refused(laptop)?, "the lost laptop is not turned away");
    Ok(())
}

/// A transfer without an end.
struct Transfer {
    child: Child,
    /// Said once it is well under way.
    flowing: Receiver<()>,
    /// When the last byte came, and how many did.
    ended: Receiver<(Instant, u64)>,
}

impl Transfer {
    fn start(technician: &Machine, agent: &str) -> anyhow::Result<Self> {
        let mut command = technician.command("adit", &["stdio", agent, ECHO]);
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let mut stdout = child.stdout.take().context("piped")?;
        let ((flows, flowing), (ends, ended)) = (channel(), channel());
        std::thread::spawn(move || {
            let (mut buffer, mut last, mut bytes) = (vec![0; 1 << 16], Instant::now(), 0);
            while let Ok(some @ 1..) = stdout.read(&mut buffer) {
                let before = bytes;
                bytes += some as u64;
                last = Instant::now();
                if before < UNDER_WAY && bytes >= UNDER_WAY {
                    let _ = flows.send(());
                }
            }
            let _ = ends.send((last, bytes));
        });
        Ok(Self { child, flowing, ended })
    }

    /// Waits until its program has ended.
    fn end(&mut self, deadline: Duration) -> anyhow::Result<(Instant, u64)> {
        let ended = self.ended.recv_timeout(deadline).context("the technician's program goes on")?;
        ensure!(!self.child.wait()?.success(), "it says that all went well");
        Ok(ended)
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A new disk in an old machine.
fn reinstalled(server: &Machine, agent: &Agent) -> anyhow::Result<()> {
    let machine = &agent.machine;
    machine.ok("adit service uninstall --purge")?;
    let enrol = format!("adit enroll --token-file {OWN}/token --data /var/lib/adit-agent");
    let new = |options: &str| -> anyhow::Result<()> {
        let token = token(server, &format!("--role agent --tag customer=acme {options}"))?;
        Ok(std::fs::write(machine.path(OWN).join("token"), format!("{token}\n"))?)
    };
    new("--uses 2")?;
    let taken = machine.sh(&enrol)?;
    let named = taken.stderr.contains(&agent.name) && taken.stderr.contains("--replace");
    ensure!(taken.code == 3 && named, "{taken:?}");
    new("")?;
    machine.ok(&format!("{enrol} --replace && adit service install"))?;
    Ok(())
}

/// New packages while sessions run.
fn upgrade(server: &Machine, anna: &Machine, agent: &Agent, packages: &Packages) -> anyhow::Result<()> {
    let machine = &agent.machine;
    let mut sessions =
        [("relay", talk(anna, &agent.name, "relay")?), ("auto", talk(anna, &agent.name, "auto")?)];
    let mut echoes = |after: &str| -> anyhow::Result<()> {
        for (via, session) in &mut sessions {
            let took = echo(session, after).with_context(|| format!("via {via}, {after}"))?;
            ensure!(session.is_running(), "via {via}, {after}: the session is over");
            println!("         {after}: the next echo via {via} took {took:.1?}");
        }
        Ok(())
    };
    let pid = |machine: &Machine, unit: &str| machine.ok(&format!("systemctl show -P MainPID {unit}"));
    echoes("before")?;
    let old = pid(server, "adit-mediator")?;
    packages.install(server, "new", "adit-mediator")?;
    ensure!(pid(server, "adit-mediator")? != old, "the server was not restarted");
    echoes("server upgraded")?;
    let old = pid(machine, "adit-agent")?;
    packages.install(machine, "new", "adit")?;
    packages.install(anna, "new", "adit")?;
    echoes("agent and technician upgraded")?;
    ensure!(pid(machine, "adit-agent")? == old, "the agent did not wait for its sessions");
    drop(sessions);
    let start = Instant::now();
    let new = "systemctl is-active adit-agent && test $(systemctl show -P MainPID adit-agent) !=";
    machine.wait(&format!("{new} {}", old.trim()), PATIENCE)?;
    println!("         the new agent took over {:.1?} after its last session", start.elapsed());
    Ok(())
}
