//! The program `adit-mediator` on loopback: its log, its memory, its numbers, and genuine devices of it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use adit_client::control::{ControlChannel, hello};
use adit_client::enrol::{Enrolment, enrol};
use adit_client::identity::Identity;
use adit_mediator::organisation::Organisation;
use adit_mediator::token::{self, Wanted};
use adit_protocol::Role;
use adit_protocol::token::EnrolmentToken;
use tempfile::TempDir;

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Program {
    child: Child,
    pub(crate) https: SocketAddr,
    pub(crate) udp: SocketAddr,
    pub(crate) relay: SocketAddr,
    pub(crate) diagnostics: SocketAddr,
    log: Arc<Mutex<Vec<String>>>,
    dir: TempDir,
    devices: TempDir,
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Program {
    /// Runs, with at most so many descriptors.
    pub(crate) fn start(descriptors: Option<u32>) -> Self {
        Self::start_with(descriptors, "")
    }

    /// The same with more settings.
    pub(crate) fn start_with(descriptors: Option<u32>, settings: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Organisation::init(dir.path(), &["127.0.0.1".into()]).unwrap();
        let local = || SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let tcp = [(); 3].map(|()| TcpListener::bind(local()).unwrap());
        let [https, relay, diagnostics] = tcp.each_ref().map(|socket| socket.local_addr().unwrap());
        let udp = UdpSocket::bind(local()).unwrap().local_addr().unwrap();
        // IPv6 too on the UDP port, so that both families can be measured.
        let config = format!(
            "hosts = [\"127.0.0.1\"]\n[listen]\nudp = \"[::]:{}\"\nrelay = \"{relay}\"\nhttps = \"{https}\"\n\
             diagnostics = \"{diagnostics}\"\n{settings}",
            udp.port()
        );
        std::fs::write(dir.path().join("config.toml"), config).unwrap();
        drop(tcp);
        let mut command = Command::new("sh");
        let limit = descriptors.map(|limit| format!("ulimit -n {limit} && ")).unwrap_or_default();
        command.args([
            "-c",
            &format!("{limit}exec \"$0\" \"$@\""),
            env!("CARGO_BIN_EXE_adit-mediator"),
            "run",
        ]);
        command.arg("--data").arg(dir.path()).env_remove("ADIT_LOG").env_remove("ADIT_DATA");
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (lines, pipe) = (log.clone(), child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                lines.lock().unwrap().push(line);
            }
        });
        let devices = tempfile::tempdir().unwrap();
        let program = Self { child, https, udp, relay, diagnostics, log, dir, devices };
        program.until("it to be ready", || program.log().iter().any(|line| line.contains("ready")));
        program
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for a state that nobody announces.
    pub(crate) fn until(&self, what: &str, mut reached: impl FnMut() -> bool) {
        let start = Instant::now();
        while !reached() {
            assert!(start.elapsed() < PATIENCE, "waited for {what}; log: {:?}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// A value of `/metrics`; labels belong to the name.
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let mut stream = TcpStream::connect(self.diagnostics).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0, |value| value.trim().parse().unwrap())
    }

    /// Waits until nobody is inside who has not shown who it is, and what the kernel has queued is read.
    pub(crate) fn until_quiet(&self) {
        self.until("the flood to be over", || {
            self.metric("adit_mediator_unauthenticated") + self.metric("adit_relay_unauthenticated") == 0
        });
    }

    /// Bytes in memory.
    pub(crate) fn resident(&self) -> u64 {
        self.status("VmRSS:")
    }

    /// The most there ever were.
    pub(crate) fn resident_peak(&self) -> u64 {
        self.status("VmHWM:")
    }

    fn status(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
    }

    /// Descriptors that are open.
    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// Processor time used so far.
    pub(crate) fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        // utime and stime, in ticks of 10 ms (proc(5)).
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 10)
    }

    pub(crate) async fn token(&self, uses: u32) -> EnrolmentToken {
        let (role, ttl) = (Role::Agent, 3600);
        let wanted = Wanted { role, ttl, uses, tags: vec![], all_agents: false, may_replace: false };
        token::make(self.dir.path(), wanted).await.unwrap()
    }

    /// Enrols a new device.
    pub(crate) async fn enrol(&self, token: &EnrolmentToken, name: &str) -> Identity {
        let dir = self.devices.path().join(name);
        let wanted = Enrolment {
            dir,
            name: name.into(),
            tags: vec![],
            hosts: vec![],
            replace: false,
            proxies: Default::default(),
        };
        enrol(token, &wanted).await.unwrap()
    }
}

/// Dials the control channel and waits for the welcome, `count` times; how long each took.
pub(crate) async fn logins(identity: &Identity, count: usize) -> Times {
    let mut times = Times(Vec::new());
    for _ in 0..count {
        let start = Instant::now();
        let dialling = ControlChannel::dial(identity, hello(vec![]));
        let channel = tokio::time::timeout(PATIENCE, dialling).await.expect("in time").expect("a login");
        times.0.push(start.elapsed());
        channel.close().await;
    }
    times
}

/// How long things took.
#[derive(Default)]
pub(crate) struct Times(pub(crate) Vec<Duration>);

impl Times {
    pub(crate) fn percentile(&self, percent: usize) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort();
        sorted[(sorted.len() * percent).div_ceil(100) - 1]
    }

    pub(crate) fn max(&self) -> Duration {
        self.percentile(100)
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [p50, p99, max] = [50, 99, 100].map(|percent| self.percentile(percent));
        write!(f, "{} logins, p50 {p50:.1?}, p99 {p99:.1?}, max {max:.1?}", self.0.len())
    }
}
