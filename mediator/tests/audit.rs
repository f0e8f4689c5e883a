//! No grant without its record on the disk, whatever happens to the mediator.

use std::collections::HashSet;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::Server;
use adit_client::control::{ControlChannel, hello};
use adit_client::identity::Identity;
use adit_protocol::control::{Down, Open, Up};
use adit_protocol::{Role, SessionId};
use tokio::time::timeout;

/// How often the mediator is killed.
const KILLS: usize = 200;

/// The mediator as a process, which can be killed.
struct Mediator(Child);

impl Mediator {
    fn start(server: &Server) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_adit-mediator"))
            .args(["run", "--data"])
            .arg(server.dir.path())
            .env_remove("ADIT_LOG")
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut log = BufReader::new(child.stderr.take().expect("piped")).lines();
        assert!(log.any(|line| line.expect("text").contains("ready")), "it ended before it was ready");
        // The pipe must not fill, nor break.
        std::thread::spawn(move || log.for_each(drop));
        Self(child)
    }

    /// SIGKILL.
    fn kill(mut self) {
        self.0.kill().expect("it runs");
        self.0.wait().expect("it ended");
    }
}

/// Asks for sessions, one after the other, and notes those that were granted, until the channel breaks.
async fn ask(technician: Identity) -> HashSet<String> {
    let mut granted = HashSet::new();
    let Ok(mut channel) = ControlChannel::dial(&technician, hello(vec![])).await else { return granted };
    let open = || Open {
        request: 1,
        agent: "desk".into(),
        targets: vec!["127.0.0.1:22".into()],
        via: "auto".into(),
        flight: vec![],
    };
    while channel.send(Up::Open(open())).await.is_ok() {
        match channel.recv().await {
            Ok(Down::Granted(grant)) => granted.insert(name(&grant.session)),
            Ok(_) => continue,
            Err(_) => break,
        };
    }
    granted
}

/// Notes the sessions that are offered, until the channel breaks.
async fn take(mut channel: ControlChannel) -> HashSet<String> {
    let mut offered = HashSet::new();
    while let Ok(down) = channel.recv().await {
        if let Down::Offer(grant) = down {
            offered.insert(name(&grant.session));
        }
    }
    offered
}

fn name(session: &[u8]) -> String {
    SessionId::try_from(session).expect("16 bytes").to_string()
}

/// Fault row "audit": 200 random kill -9, no grant and no offer without its record.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_audit_200_kills() {
    let mut server = Server::start().await;
    let agent = server.device(Role::Agent, "desk", &["site=a"]).await;
    let technician = server.device(Role::Technician, "laptop", &["site=a"]).await;
    server.stop().await;
    let start = Instant::now();
    let (mut grants, mut offers) = (0, 0);
    for kill in 0..KILLS {
        let mediator = Mediator::start(&server);
        let channel = ControlChannel::dial(&agent, hello(vec![])).await.expect("dials");
        let taking = tokio::spawn(take(channel));
        let asking = tokio::spawn(ask(technician.clone()));
        // Spread over everything from the first request on.
        tokio::time::sleep(Duration::from_micros(rand::random_range(0..60_000))).await;
        mediator.kill();
        let granted = timeout(crate::common::PATIENCE, asking).await.expect("in time").expect("no panic");
        let offered = timeout(crate::common::PATIENCE, taking).await.expect("in time").expect("no panic");
        let recorded: HashSet<String> = std::fs::read_to_string(server.dir.path().join("audit.jsonl"))
            .expect("reads")
            .lines()
            // The last line may be cut off: it tells of nothing that was granted.
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter(|line| line["event"] == "grant")
            .filter_map(|line| Some(line["session"].as_str()?.to_owned()))
            .collect();
        for session in granted.iter().chain(&offered) {
            assert!(recorded.contains(session), "kill {kill}: {session} was granted without a record");
        }
        grants += granted.len();
        offers += offered.len();
    }
    println!(
        "{KILLS} kills in {:.0?}: {grants} grants and {offers} offers, each with its record",
        start.elapsed()
    );
    assert!(grants > KILLS && offers > KILLS, "too few to mean anything: {grants} grants, {offers} offers");
}
