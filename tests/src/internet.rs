//! A small internet for machines: public addresses, a name server, and customers' networks behind NAT, which all
//! have the same private addresses. Needs root.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, ensure};
use tempfile::TempDir;

use crate::machine::Machine;

/// Where the name server is.
const NAMES: &str = "198.51.100.1";
/// First three numbers of every customer's network.
const PRIVATE: &str = "192.168.178";
/// A bridge that is up. With an address of its own: else it takes that of its lowest port, and whoever is there already
/// loses it for seconds when another machine joins.
const BRIDGE: &str =
    "ip link set lo up; ip link add bridge address 02:00:00:00:00:01 type bridge && ip link set bridge up";

/// The internet. It ends when dropped.
pub struct Internet {
    wires: Namespace,
    names: Option<Ended>,
    dir: TempDir,
}

/// A customer's network, 192.168.178.0/24 behind a router with a public address.
pub struct Customer(Namespace);

impl Internet {
    /// Makes one, with nobody in it.
    pub fn up() -> anyhow::Result<Self> {
        let wires = Namespace::new()?;
        wires.sh(&format!("{BRIDGE} && ip address add {NAMES}/24 dev bridge"))?;
        let dir = tempfile::Builder::new().prefix("adit-internet-").tempdir()?;
        Ok(Self { wires, names: None, dir })
    }

    /// From now on `name` has this address, and no other name has any.
    pub fn name(&mut self, name: &str, address: &str) -> anyhow::Result<()> {
        let hosts = self.dir.path().join("hosts");
        std::fs::write(&hosts, format!("{address} {name}\n"))?;
        self.names = None;
        let server = self
            .wires
            .command("dnsmasq")
            .args(["--keep-in-foreground", "--conf-file=/dev/null", "--pid-file", "--user=root"])
            .args([
                "--no-resolv",
                "--no-hosts",
                "--local=/example.org/",
                "--bind-interfaces",
                "--listen-address",
                NAMES,
            ])
            .arg(format!("--addn-hosts={}", hosts.display()))
            .stderr(Stdio::null())
            .spawn()
            .context("dnsmasq (Debian: dnsmasq-base)")?;
        self.names = Some(Ended(server));
        Ok(())
    }

    /// Gives a machine a public address: 198.51.100.`host`.
    pub fn join(&self, machine: &Machine, host: u8) -> anyhow::Result<()> {
        self.wires.plug_in(machine, host, "198.51.100", None)
    }

    /// Connects one more customer, whose router has the public address 198.51.100.`host`.
    pub fn customer(&self, host: u8) -> anyhow::Result<Customer> {
        let router = Namespace::new()?;
        self.wires.wire(host, "internet", router.id())?;
        router.sh(&format!(
            "{BRIDGE} && ip address add {PRIVATE}.1/24 dev bridge && ip address add 198.51.100.{host}/24 dev internet && \
             ip link set internet up && echo 1 >/proc/sys/net/ipv4/ip_forward"
        ))?;
        router.sh(
            "nft 'add table ip nat; add chain ip nat out { type nat hook postrouting priority srcnat; }; \
             add rule ip nat out oifname internet masquerade; add chain ip nat in { type filter hook forward priority filter; }; \
             add rule ip nat in iifname internet ct state { established, related } accept; \
             add rule ip nat in iifname internet drop'",
        )?;
        Ok(Customer(router))
    }
}

impl Customer {
    /// Puts a machine into the network: 192.168.178.`host`.
    pub fn join(&self, machine: &Machine, host: u8) -> anyhow::Result<()> {
        self.0.plug_in(machine, host, PRIVATE, Some(&format!("{PRIVATE}.1")))
    }
}

/// A network namespace. A shell holds it, which ends when nobody holds its standard input any more.
struct Namespace(Ended);

impl Namespace {
    fn new() -> anyhow::Result<Self> {
        let mut shell = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo ready; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(shell.stdout.take().context("piped")?).read_line(&mut line)?;
        ensure!(line == "ready\n", "no network namespace: run this test as root");
        Ok(Self(Ended(shell)))
    }

    fn id(&self) -> String {
        self.0.0.id().to_string()
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.id(), "--net", program]).stdin(Stdio::null());
        command
    }

    fn sh(&self, line: &str) -> anyhow::Result<()> {
        let run = self.command("sh").args(["-c", line]).output()?;
        ensure!(run.status.success(), "{line}: {}", String::from_utf8_lossy(&run.stderr));
        Ok(())
    }

    /// A cable from the bridge to the interface `name` in the namespace of a process.
    fn wire(&self, port: u8, name: &str, process: String) -> anyhow::Result<()> {
        self.sh(&format!(
            "ip link add port{port} type veth peer name {name} netns {process} && ip link set port{port} master bridge up"
        ))
    }

    fn plug_in(
        &self,
        machine: &Machine,
        host: u8,
        network: &str,
        router: Option<&str>,
    ) -> anyhow::Result<()> {
        self.wire(host, "eth0", machine.init().to_owned())?;
        let route = router.map_or(String::new(), |router| format!("&& ip route add default via {router}"));
        // One question at a time: of two at once from one port Linux' NAT may lose one.
        machine.ok(&format!(
            "ip address add {network}.{host}/24 dev eth0 && ip link set eth0 up {route} && \
             rm -f /etc/resolv.conf && printf 'nameserver {NAMES}\noptions single-request\n' >/etc/resolv.conf"
        ))?;
        Ok(())
    }
}

/// A process that ends when dropped.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
